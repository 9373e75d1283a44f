"""Runs one of the compiled clients against a bus, in step with it, and reads what it cost.

`stage.h` says how a program and the harness talk. CPU time is read at both ends of a phase for
the daemon's whole process tree and for the clients': run time in nanoseconds from
/proc/PID/task/*/schedstat, plus, for processes that came and went in between, what their parent
has reaped (in clock ticks, /proc/PID/stat). Memory is the sum of the tree's PSS.
"""

from __future__ import annotations

import os
import struct
import subprocess
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import msgspec

from kbusd.sandbox import kernel
from kbusd.sandbox.compile import compile_all

HERE = Path(__file__).parent
PROGRAMS = ("calls", "versus", "direct", "fanout", "connects", "idle", "kdbusfs", "fuse")
TICK_NS = 1_000_000_000 // os.sysconf("SC_CLK_TCK")
PROGRAM_SECONDS = 60.0
SETTLE_SECONDS = 5.0

Metrics = dict[str, float]


class Failed(Exception):
    """A measuring program ended with an error; the text is what it wrote."""


def compile_programs(into: Path) -> None:
    """Compiles those that are older than their sources. Raises `CalledProcessError`."""
    into.mkdir(exist_ok=True)
    newest = max(file.stat().st_mtime for file in HERE.glob("*.[ch]"))
    for program in PROGRAMS:
        target = into / program
        if target.exists() and target.stat().st_mtime > newest:
            continue
        sources = [HERE / f"{name}.c" for name in (program, "calling", "client", "stage")]
        subprocess.run(
            ["gcc", "-O2", "-std=gnu11", "-Wall", "-Wextra", "-o", target, *sources], check=True
        )


def _stat_fields(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat after the command name (state, ppid, ...)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None


def process_tree(root: int) -> set[int]:
    """`root` and all its descendants."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit() and (fields := _stat_fields(int(entry))) is not None:
            children.setdefault(int(fields[1]), []).append(int(entry))
    tree: set[int] = set()
    waiting = [root]
    while waiting:
        pid = waiting.pop()
        tree.add(pid)
        waiting.extend(children.get(pid, ()))
    return tree


class CpuTime(msgspec.Struct, frozen=True):
    """CPU time of one process: its own, and that of the children it has reaped, in ns."""

    own: int
    reaped: int


def cpu_times(root: int) -> dict[int, CpuTime]:
    """Of every process of the tree that can be read."""
    times = {}
    for pid in process_tree(root):
        fields = _stat_fields(pid)
        own = 0
        try:
            for task in os.listdir(f"/proc/{pid}/task"):
                own += int(Path(f"/proc/{pid}/task/{task}/schedstat").read_text().split()[0])
        except OSError:
            continue
        if fields is not None:
            times[pid] = CpuTime(own, (int(fields[13]) + int(fields[14])) * TICK_NS)
    return times


def cpu_used(before: Mapping[int, CpuTime], after: Mapping[int, CpuTime]) -> float:
    """Seconds between two readings of one tree."""
    nothing = CpuTime(0, 0)
    spent = 0
    for pid, end in after.items():
        start = before.get(pid, nothing)
        spent += end.own - start.own + end.reaped - start.reaped
    return spent / 1e9


def pss_bytes(pids: Iterable[int]) -> int:
    """Proportional set size, summed; a process that has gone counts nothing."""
    total = 0
    for pid in pids:
        try:
            text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        except OSError:
            continue
        for line in text.splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1]) * 1024
                break
    return total


def settled_pss(root: int) -> tuple[int, int]:
    """PSS of the tree and its number of processes, once two readings agree to 1 % (a bus may
    still be starting or ending processes)."""
    deadline = time.monotonic() + SETTLE_SECONDS
    tree = process_tree(root)
    seen = pss_bytes(tree)
    while True:
        time.sleep(0.15)
        tree = process_tree(root)
        now = pss_bytes(tree)
        if abs(now - seen) <= seen // 100 or time.monotonic() > deadline:
            return now, len(tree)
        seen = now


@contextmanager
def held_on_one_core(daemon: int) -> Iterator[None]:
    """Meanwhile the daemon's tree, and whatever we or it start, run on one core only."""
    allowed = os.sched_getaffinity(0)
    try:
        _set_affinity(daemon, {min(allowed)})
        yield
    finally:
        _set_affinity(daemon, allowed)


def _set_affinity(daemon: int, cores: set[int]) -> None:
    os.sched_setaffinity(0, cores)
    for pid in process_tree(daemon):
        try:
            for task in os.listdir(f"/proc/{pid}/task"):
                os.sched_setaffinity(int(task), cores)
        except OSError:
            continue  # it ended meanwhile


def run_program(
    bin_directory: Path,
    program: str,
    arguments: Iterable[object],
    daemon: int,
    memory: bool = False,
) -> dict[str, Metrics]:
    """The metrics of each phase by its name. Raises `Failed`.

    `daemon` is the root of the bus's process tree. With `memory`, each phase also has the tree's
    PSS before and after it, and is not timed.
    """
    process = subprocess.Popen(
        [str(bin_directory / program), *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None and process.stdout is not None
    assert process.stderr is not None
    watchdog = threading.Timer(PROGRAM_SECONDS, process.kill)
    watchdog.start()
    phases: dict[str, Metrics] = {}
    try:
        while line := process.stdout.readline():
            word, _, phase = line.strip().partition(" ")
            if word != "ready":
                raise Failed(f"{program} printed {line!r}")
            pss_before = settled_pss(daemon) if memory else (0, 0)
            daemon_before, clients_before = cpu_times(daemon), cpu_times(process.pid)
            began = time.monotonic()
            process.stdin.write("\n")
            process.stdin.flush()
            answer = process.stdout.readline()
            wall = time.monotonic() - began
            daemon_after, clients_after = cpu_times(daemon), cpu_times(process.pid)
            if not answer:
                break
            metrics = msgspec.json.decode(answer, type=Metrics)
            metrics["wall_s"] = wall
            metrics["daemon_cpu_s"] = cpu_used(daemon_before, daemon_after)
            metrics["clients_cpu_s"] = cpu_used(clients_before, clients_after)
            if memory:
                pss, processes = settled_pss(daemon)
                metrics["pss_before"], metrics["pss_after"] = pss_before[0], pss
                metrics["processes_before"], metrics["processes_after"] = (
                    pss_before[1],
                    processes,
                )
            phases[phase] = metrics
            process.stdin.write("\n")
            process.stdin.flush()
        if process.wait(10) or not phases:
            reason = process.stderr.read().strip()
            if not watchdog.is_alive():
                reason = f"no answer within {PROGRAM_SECONDS:.0f} s. {reason}"
            raise Failed(f"{program}: {reason or f'ended with {process.returncode}'}")
    except (BrokenPipeError, msgspec.DecodeError) as error:
        raise Failed(f"{program}: {error}; {process.stderr.read().strip()}") from error
    finally:
        watchdog.cancel()
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            try:
                stream.close()
            except BrokenPipeError:
                pass
    return phases


def filter_load_ms(times: int = 31) -> float:
    """The median of what a child needs to load a worker's filter."""
    compiled = compile_all("")["worker"]
    found = []
    for _ in range(times):
        reader, writer = os.pipe()
        if (pid := os.fork()) == 0:
            kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
            before = time.perf_counter_ns()
            kernel.load_filter(compiled.bpf)
            os.write(writer, struct.pack("Q", time.perf_counter_ns() - before))
            os._exit(0)
        found.append(struct.unpack("Q", os.read(reader, 8))[0])
        os.close(reader)
        os.close(writer)
        os.waitpid(pid, 0)
    return median(found) / 1e6
