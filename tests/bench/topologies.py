"""What is measured: each topology by name, the program that measures it and its arguments."""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path
from statistics import median

import msgspec
from buses import Bus
from measure import Metrics, held_on_one_core, run_program

MESSAGE_BYTES = 200
IN_FLIGHT = 100
FANOUT_WINDOW = 32
PAYLOADS = {
    "64B": 64,
    "1KiB": 1024,
    "4KiB": 4096,
    "16KiB": 16384,
    "64KiB": 65536,
    "256KiB": 262144,
    "1MiB": 1048576,
    "8MiB": 8388608,
}
IDLE_CONNECTIONS = 200
IN_TURNS_RUNS = 5  # each with clients of its own: where they and the workers lie varies, too


class Topology(msgspec.Struct, frozen=True):
    """`arguments` follow the socket's path; "SECONDS" in them stands for the time to measure. With
    `device`, the path of the bus's node comes before them, and it is only for kdbusfs.

    With `one_core`, the bus and the clients are held on one core: without the scheduler's choice,
    which moves a round trip by a factor of three, what is left is the work itself. With `in_turns`,
    kbusd and kbusd unconfined are called in turns, for a difference that is smaller than the machine's
    from one second to the next. Without a bus, if `bare`; with `device`, what kdbusfs is compared with.
    """

    name: str
    program: str
    arguments: tuple[object, ...]
    one_core: bool = False
    device: bool = False
    in_turns: bool = False
    bare: bool = False

    def is_for(self, bus: str) -> bool:
        """Whether it is measured on this bus."""
        if self.bare:
            return False
        if self.device or bus == "kdbusfs":
            return self.device and bus == "kdbusfs"
        if self.in_turns:
            return bus in ("kbusd", "unconfined")
        return bus != "unconfined" or self.name == "connect"

    def timed(self, seconds: float) -> list[object]:
        """Its arguments, for so long a measurement."""
        return [seconds if value == "SECONDS" else value for value in self.arguments]


def _calls(name: str, pairs: int, window: int, size: int, signature: str) -> Topology:
    return Topology(name, "calls", (pairs, window, size, signature, "SECONDS"))


def _in_turns(name: str, window: int, size: int, signature: str) -> Topology:
    return Topology(name, "versus", (window, size, signature, "SECONDS"), in_turns=True)


def _device(name: str, what: str, count: int, size: int) -> Topology:
    return Topology(name, "kdbusfs", (what, count, size, "SECONDS"), device=True)


TOPOLOGIES = (
    # First, on a fresh bus: later the heap has room to spare and connections seem to cost nothing.
    Topology("idle", "idle", (IDLE_CONNECTIONS,)),
    _calls("round-trip", 1, 1, MESSAGE_BYTES, "s"),
    Topology("round-trip-one-core", "calls", (1, 1, MESSAGE_BYTES, "s", "SECONDS"), one_core=True),
    _calls("pipelined", 1, IN_FLIGHT, MESSAGE_BYTES, "s"),
    _calls("pairs-2", 2, IN_FLIGHT, MESSAGE_BYTES, "s"),
    _calls("pairs-4", 4, IN_FLIGHT, MESSAGE_BYTES, "s"),
    *(
        Topology(f"fanout-{n}", "fanout", (n, FANOUT_WINDOW, MESSAGE_BYTES, "SECONDS"))
        for n in (1, 8, 64)
    ),
    *(_calls(f"payload-{name}", 1, 1, size, "ay") for name, size in PAYLOADS.items()),
    Topology("payload-1MiB-direct", "direct", (PAYLOADS["1MiB"], "SECONDS"), bare=True),
    Topology("connect", "connects", (40, 10, 200)),
    _in_turns("confined-round-trip", 1, MESSAGE_BYTES, "s"),
    _in_turns("confined-pipelined", IN_FLIGHT, MESSAGE_BYTES, "s"),
    _in_turns("confined-64KiB", 1, PAYLOADS["64KiB"], "ay"),
    Topology("kdbusfs-calls-direct", "fuse", ("SECONDS",), device=True, bare=True),
    _device("kdbusfs-calls", "calls", 1, 64),
    _device("kdbusfs-message", "message", 1, 64),
    _device("kdbusfs-memfd", "memfd", 1, 1 << 20),
    _device("kdbusfs-fanout-64", "message", 64, MESSAGE_BYTES),
)


def measure(
    topology: Topology, bus: Bus, seconds: float, bin_directory: Path, other: Bus | None = None
) -> dict[str, Metrics]:
    """Runs it once. Returns metrics by "topology" or, with several phases, "topology/phase".

    `other` is the second bus of a topology in turns. Raises `measure.Failed`.
    """
    arguments = topology.timed(seconds)
    memory = topology.program == "idle"
    paths = [bus.socket, bus.node] if topology.device else [bus.socket]
    if other is not None:
        runs = [
            run_program(
                bin_directory, topology.program, [*paths, other.socket, *arguments], bus.pid
            )
            for _ in range(IN_TURNS_RUNS)
        ]
        ratios = [phases["versus"]["throughput_ratio"] for phases in runs]
        return {topology.name: {"throughput_ratio": median(ratios)}}
    with held_on_one_core(bus.pid) if topology.one_core else nullcontext():
        phases = run_program(
            bin_directory, topology.program, [*paths, *arguments], bus.pid, memory=memory
        )
    results: dict[str, Metrics] = {}
    for phase, metrics in phases.items():
        operations = (
            metrics.get("calls") or metrics.get("deliveries") or metrics.get("connects") or 0
        )
        if operations:
            metrics["daemon_cpu_us_each"] = metrics["daemon_cpu_s"] * 1e6 / operations
            metrics["clients_cpu_us_each"] = metrics["clients_cpu_s"] * 1e6 / operations
        if memory:
            grown = metrics["pss_after"] - metrics["pss_before"]
            metrics["pss_mb_each"] = grown / metrics["connections"] / 1e6
        name = topology.name if len(phases) == 1 else f"{topology.name}/{phase}"
        results[name] = metrics
    return results


def measure_without_bus(
    topology: Topology, seconds: float, bin_directory: Path
) -> dict[str, Metrics]:
    """The same of a bare topology, by phase. Raises `measure.Failed`."""
    phases = run_program(bin_directory, topology.program, topology.timed(seconds), os.getpid())
    for metrics in phases.values():
        del metrics["daemon_cpu_s"]
        metrics["clients_cpu_us_each"] = metrics["clients_cpu_s"] * 1e6 / metrics["calls"]
    return phases
