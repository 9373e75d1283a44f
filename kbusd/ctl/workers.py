"""`kbusctl workers`: every process of a bus with its confinement as the kernel has it.

Reads /proc, the profiles, and those that the bus was started with; changes nothing and talks to no process.
"""

from __future__ import annotations

import argparse
import os
import pwd
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from kbusd.sandbox import inforce, profiles, started
from kbusd.sandbox.compile import Compiled, compile_profile

_HEAD = (
    "PID",
    "PROCESS",
    "USER",
    "CAPABILITIES",
    "SECCOMP",
    "NO_NEW_PRIVS",
    "DUMPABLE",
    "LANDLOCK",
    "SELINUX",
)


class Row(msgspec.Struct, frozen=True):
    """One process: what is in force, Landlock and securebits as deduced, and what differs from its profile.

    `unseen`: why nobody can tell what it was started with."""

    process: inforce.InForce
    landlock: bool | None
    differences: tuple[str, ...]
    securebits: bool | None = None
    unseen: str = ""


class Unclear(Exception):
    """Which bus is meant can't be told; the text says what to give."""


def add_to(commands: Any) -> None:
    """The command `workers`."""
    command = commands.add_parser(
        "workers", help="every process of a bus, with its confinement as the kernel has it"
    )
    add_which(command)
    command.set_defaults(run=_run)


def add_which(command: argparse.ArgumentParser) -> None:
    """Options that say which bus is meant, and --json."""
    which = command.add_mutually_exclusive_group()
    which.add_argument("--pid", type=int, metavar="SUPERVISOR", help="the bus by its process id")
    which.add_argument("--pidfile", metavar="FILE", help="the bus by its pid file")
    command.add_argument("--json", action="store_true", help="for programs")


def _run(options: argparse.Namespace) -> int:
    rows = survey(supervisor_of(options.pid, options.pidfile))
    print(msgspec.json.encode(rows).decode() if options.json else table(rows))
    return 1 if any(row.differences for row in rows) else 0


def survey(supervisor: int) -> list[Row]:
    """A row for each process of the bus of `supervisor`; services that it started are left out.

    Raises ProcessLookupError, Unclear (not a supervisor) and ProfileError."""
    bus = _bus(supervisor)
    titles = {
        compiled.title: name
        for each in (bus.wanted, bus.started)
        for name, compiled in each.items()
    }
    found: dict[int, inforce.InForce] = {}
    for pid in inforce.family(supervisor):
        try:
            process = inforce.read(pid, titles)
        except ProcessLookupError:
            if pid == supervisor:
                raise
            continue
        parent = found.get(process.parent)
        if pid == supervisor and process.role != "supervisor":
            raise Unclear(f"process {pid} is {process.title}, not the supervisor of a bus")
        if (parent is None and pid != supervisor) or (parent and parent.role == "launcher"):
            continue
        found[pid] = process
    return [_row(process, bus, found, found[supervisor]) for process in found.values()]


class _Bus(NamedTuple):
    """The profiles that the files have now, those that it was started with, and why those can't be told."""

    wanted: dict[str, Compiled]
    started: dict[str, Compiled]
    unseen: str


def _bus(supervisor: int) -> _Bus:
    wanted = {name: compile_profile(profiles.load(name)) for name in profiles.names()}
    try:
        return _Bus(wanted, started.profiles(supervisor), "")
    except started.Unseen as why:
        return _Bus(wanted, {}, str(why))


def _row(
    process: inforce.InForce,
    bus: _Bus,
    found: dict[int, inforce.InForce],
    supervisor: inforce.InForce,
) -> Row:
    parent = found.get(process.parent)
    profile = bus.wanted.get(process.role)
    if profile is None:
        return Row(process, None, (f"no profile is for a process named {process.title}",))
    before = bus.started.get(process.role)
    uid = before.uid if before else None
    wrong = inforce.differences(process, profile, supervisor=supervisor, parent=parent, uid=uid)
    if before is None and not bus.unseen:
        wrong.append("the supervisor has no profile for it: who started it?")
    elif before is not None and (sections := started.changed(before, profile)):
        wrong.append(
            f"was started with another profile than {profile.files[0]} is now"
            f" ({', '.join(sections)}): start the bus again"
        )
    return Row(
        process,
        inforce.deduce_landlock(process, before, parent),
        tuple(wrong),
        inforce.deduce_securebits(process, before, parent),
        bus.unseen,
    )


def supervisor_of(pid: int | None, pidfile: str | None) -> int:
    """The supervisor that is meant; without a hint, the only one there is outside of containers. Raises Unclear."""
    if pid is not None:
        return pid
    if pidfile is not None:
        try:
            return int(Path(pidfile).read_text())
        except (OSError, ValueError) as error:
            raise Unclear(f"pid file {pidfile}: {error}") from None
    found = running()
    here = [pid for pid in found if inforce.in_our_namespace(pid)]
    if len(here) == 1:
        return here[0]
    if not found:
        raise Unclear("no kbusd is running")
    which = "".join(f"\n  {pid}  {_command(pid)}" for pid in found)
    raise Unclear(f"say which bus by --pid or --pidfile; these are running:{which}")


def _command(pid: int) -> str:
    """How it was started, and whether in a container."""
    words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    given = [each.decode(errors="replace") for each in words if each]
    at = next((n for n, each in enumerate(given) if os.path.basename(each) == "kbusd"), 0)
    inside = "" if inforce.in_our_namespace(pid) else "  (in a container)"
    return " ".join(["kbusd", *given[at + 1 :]]) + inside


def running() -> list[int]:
    """The supervisors of all buses."""
    return inforce.named(profiles.load("supervisor").title)


def table(rows: list[Row]) -> str:
    """The rows for a terminal."""
    lines = columns([_HEAD, *(_cells(row) for row in rows)])
    if any(row.landlock for row in rows):
        lines.append(
            "* deduced: the kernel does not show Landlock; the filter, loaded after it, is there"
        )
    if unseen := next((row.unseen for row in rows if row.unseen), ""):
        lines.append(f"? not seen: with which profiles the bus was started; {unseen}")
    lines += [
        f"DIFFERS  {row.process.pid} {row.process.title}: {wrong}"
        for row in rows
        for wrong in row.differences
    ]
    return "\n".join(lines)


def columns(cells: Sequence[Sequence[str]]) -> list[str]:
    """Lines in which what stands below each other is aligned."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    ]


def _cells(row: Row) -> tuple[str, ...]:
    process = row.process
    mode = inforce.SECCOMP_MODES.get(process.seccomp, str(process.seccomp))
    if process.seccomp == 2:
        mode += f" x{process.filters}"
    return (
        str(process.pid),
        process.title,
        _user(process.uids[1]),
        inforce.capability_names(process.effective | process.permitted),
        mode,
        "yes" if process.no_new_privileges else "no",
        {True: "yes", False: "no", None: "?"}[process.dumpable],
        {True: "yes*", False: "no", None: "?"}[row.landlock],
        process.label or "-",
    )


def _user(uid: int) -> str:
    try:
        return f"{uid} {pwd.getpwuid(uid).pw_name}"
    except KeyError:
        return str(uid)
