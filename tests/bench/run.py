"""`make bench`: kbusd, dbus-daemon and dbus-broker side by side, with the same compiled clients.

In each round the three are started afresh and stay up; each topology is then measured on one
after the other, in an order that turns round from round to round, so that a slow moment of the
machine hits all of them. Rounds are many and short, because it depends on the scheduler's
placement whether a round trip takes 40 µs (all on one core) or 120; hence also a topology that is
held on one core, and the throughput that confinement costs is measured in turns of milliseconds. Writes out/bench.json, out/bench.txt and out/bench.svg.

    python tests/bench/run.py [--quick] [--only round-trip,fanout] [--buses ...] [--rounds N]

Exit status: 0; 1 if a measurement failed or a bus did not start. Missed targets do not fail it
unless --strict is given.
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import buses
import measure as measured
import msgspec
import report
from measure import HERE, Failed, compile_programs
from topologies import TOPOLOGIES, Topology, measure, measure_without_bus

OUT = HERE / "out"
SCHEMA = 1


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, help="how often everything is measured (11)")
    parser.add_argument("--seconds", type=float, help="length of one measurement (0.35)")
    parser.add_argument("--quick", action="store_true", help="2 rounds of 0.2 s")
    parser.add_argument("--only", default="", help="topologies, by the beginning of their names")
    parser.add_argument("--buses", default=",".join(buses.available()))
    parser.add_argument("--kbusd", default="", help="the command, instead of this environment's")
    parser.add_argument(
        "--allow-missing", action="store_true", help="go on without a bus that can't be started"
    )
    parser.add_argument("--strict", action="store_true", help="missed targets fail the run")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    options.rounds = options.rounds or (2 if options.quick else 11)
    options.seconds = options.seconds or (0.2 if options.quick else 0.35)
    options.buses = options.buses.split(",")
    if unknown := set(options.buses) - set(buses.NAMES):
        parser.error(f"no such bus: {', '.join(sorted(unknown))}; there are {buses.NAMES}")
    chosen = [part for part in options.only.split(",") if part]
    options.topologies = [
        topology
        for topology in TOPOLOGIES
        if not chosen or any(topology.name.startswith(part) for part in chosen)
    ]
    if not options.topologies:
        parser.error(f"--only: there are {', '.join(t.name for t in TOPOLOGIES)}")
    return options


def kbusd_command(given: str) -> list[str]:
    """The one that was given, else the installed command, else the module."""
    if given:
        return shlex.split(given)
    installed = Path(sys.executable).parent / "kbusd"
    return [str(installed)] if installed.exists() else [sys.executable, "-m", "kbusd.main"]


def machine() -> dict[str, str]:
    cpu = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    compiler = subprocess.run(
        ["gcc", "-dumpfullversion"], check=True, capture_output=True, text=True
    )
    return {
        "cpu": f"{cpu}, {len(os.sched_getaffinity(0))} cores",
        "kernel": platform.release(),
        "python": platform.python_version(),
        "gcc": compiler.stdout.strip(),
        "load at start": " ".join(f"{load:.2f}" for load in os.getloadavg()),
    }


class Runner:
    """Keeps the buses of a round up and collects the samples."""

    def __init__(self, options: argparse.Namespace, kbusd: list[str], directory: Path) -> None:
        self._options = options
        self._kbusd = kbusd
        self._directory = directory
        self._running: dict[str, buses.Bus] = {}
        self.samples: list[report.Sample] = []
        self.missing: set[str] = set()

    def _start(self, name: str) -> buses.Bus | None:
        try:
            return buses.Bus(name, self._directory, self._kbusd)
        except buses.NotStarted as error:
            banner = "!" * 78
            print(f"{banner}\n{name} IS MISSING from what follows: {error}\n{banner}", flush=True)
            if not self._options.allow_missing:
                raise
            self.missing.add(name)
            return None

    def round(self, number: int) -> None:
        """Measures everything once. Raises `buses.NotStarted` unless that is allowed."""
        order = [name for name in self._options.buses if name not in self.missing]
        if number % 2:
            order.reverse()
        wanted = {name for each in self._options.topologies for name in order if each.is_for(name)}
        order = [name for name in order if name in wanted]
        try:
            for name in order:
                if (bus := self._start(name)) is not None:
                    self._running[name] = bus
            if "unconfined" in order:
                figures = {"filter_load_ms": measured.filter_load_ms()}
                self.samples.append(report.Sample("kbusd", "filter-load", number, figures))
            for topology in self._options.topologies:
                if topology.bare and (not topology.device or report.KDBUSFS in order):
                    self._measure_without_bus(number, topology)
                for name in order:
                    bus = self._running.get(name)
                    if bus is not None and topology.is_for(name):
                        self._measure(number, topology, name)
                print(".", end="", flush=True)
        finally:
            for bus in self._running.values():
                bus.stop()
            self._running.clear()

    def _measure_without_bus(self, number: int, topology: Topology) -> None:
        """Its phases count as buses, and as what is measured of these."""
        test = topology.name.removesuffix("-direct")
        try:
            phases = measure_without_bus(topology, self._options.seconds, HERE / "bin")
        except Failed as error:
            self.samples.append(report.Sample("direct", test, number, error=f"{error}"))
            return
        for phase, metrics in phases.items():
            self.samples.append(report.Sample(f"direct, {phase}", test, number, metrics))

    def _measure(self, number: int, topology: Topology, name: str) -> None:
        bus = self._running[name]
        other = self._running.get("unconfined") if topology.in_turns else None
        if topology.in_turns and (name != "kbusd" or other is None):
            return
        try:
            results = measure(topology, bus, self._options.seconds, HERE / "bin", other)
        except Failed as error:
            what = f"{error}" if bus.alive() else f"{error}; the bus is dead"
            print(f"\nFAILED: {topology.name} on {name}: {what}\n{bus.log_tail()}", flush=True)
            self.samples.append(report.Sample(name, topology.name, number, error=what))
            # What it left behind must not be measured: the next topology gets a new one.
            bus.stop()
            del self._running[name]
            if (fresh := self._start(name)) is not None:
                self._running[name] = fresh
            return
        for test, metrics in results.items():
            self.samples.append(report.Sample(name, test, number, metrics))


def write(directory: Path, recording: report.Recording) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    encoded = msgspec.json.format(msgspec.json.encode(recording), indent=1)
    (directory / "bench.json").write_bytes(encoded + b"\n")
    (directory / "bench.txt").write_text(report.text(recording))
    (directory / "bench.svg").write_text(report.svg(recording))


def main() -> int:
    options = arguments()
    kbusd = kbusd_command(options.kbusd)
    compile_programs(HERE / "bin")
    described = machine()
    with tempfile.TemporaryDirectory(prefix="kbusd-bench-") as directory:
        Path(directory).chmod(0o755)  # a bus may drop to a user that must reach its socket
        runner = Runner(options, kbusd, Path(directory))
        try:
            for number in range(options.rounds):
                print(f"round {number + 1} of {options.rounds} ", end="", flush=True)
                runner.round(number)
                print(flush=True)
        except buses.NotStarted:
            return 1
    recording = report.Recording(
        SCHEMA,
        datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        described,
        {
            each: buses.version(each, kbusd)
            for each in options.buses
            if each not in buses.PRIVILEGED
        },
        {"rounds": options.rounds, "seconds": options.seconds, "only": options.only},
        runner.samples,
    )
    write(options.out, recording)
    print(f"\n{report.text(recording)}\n{options.out}/bench.json, bench.txt, bench.svg")
    if report.failures(recording):
        return 1
    return 1 if options.strict and report.missed(recording) else 0


if __name__ == "__main__":
    sys.exit(main())
