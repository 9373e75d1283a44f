"""Where the time goes: a profile of a bus's processes while one topology runs.

    python tests/bench/perf_record.py pipelined [--bus kbusd] [--seconds 3] [--only-comm NAME]

Samples every process of the bus's tree, new ones included, with `perf record -e cpu-clock`
(virtual machines often have no cycle counter; the clock works everywhere) and prints, for each
process name, where it was: functions of the kernel, libc and our compiled modules alike. Read
`_raw_spin_unlock_irqrestore` at the top as "waking somebody up": interrupts are off in there, and
the sample falls on the instruction that turns them on. Needs Debian's linux-perf and root, or
kernel.perf_event_paranoid <= 1. Compiled modules show C names (`__pyx_f_...`): the typed Python
function of that name.

For one running worker by hand:

    perf record -e cpu-clock -F 4999 -g -p PID -- sleep 5; perf report --no-children
    perf trace -s -p PID -- sleep 1        its system calls, counted (or: strace -c -f -p PID)
    py-spy record -p PID -o worker.svg     Python frames, where perf shows only the interpreter
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import buses
from measure import HERE, compile_programs
from run import kbusd_command
from topologies import TOPOLOGIES, measure

FREQUENCY = 4999  # not a divisor of the timer's, so as not to sample in step with it


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("topology", choices=[topology.name for topology in TOPOLOGIES])
    parser.add_argument("--bus", choices=buses.NAMES, default="kbusd")
    parser.add_argument("--kbusd", default="")
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--output", type=Path, default=HERE / "out" / "perf.data")
    parser.add_argument("--limit", type=float, default=0.5, help="least share shown, in percent")
    options = parser.parse_args()
    topology = next(t for t in TOPOLOGIES if t.name == options.topology)
    compile_programs(HERE / "bin")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="kbusd-perf-") as directory:
        Path(directory).chmod(0o755)
        bus = buses.Bus(options.bus, Path(directory), kbusd_command(options.kbusd))
        # System-wide: workers are forked while we look, and clients are worth seeing too.
        recorder = subprocess.Popen(
            ["perf", "record", "-q", "-a", "-g", "-F", str(FREQUENCY), "-e", "cpu-clock"]
            + ["-o", str(options.output)],
        )
        try:
            results = measure(topology, bus, options.seconds, HERE / "bin")
        finally:
            recorder.terminate()
            recorder.wait()
            bus.stop()
    for test, metrics in results.items():
        figures = ", ".join(f"{name} {figure:,.2f}" for name, figure in metrics.items())
        print(f"{test}: {figures}")
    sys.stdout.flush()
    subprocess.run(
        ["perf", "report", "--stdio", "--no-children", "-g", "none", "--sort", "comm,dso,sym"]
        + ["--percent-limit", str(options.limit), "-i", str(options.output)],
        check=True,
    )


if __name__ == "__main__":
    main()
