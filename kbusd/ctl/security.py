"""`kbusctl security`: a row for each confinement of each process: what it prevents, whether it is on.

In the manner of systemd-analyze security. What the kernel says counts, not what a profile wishes; a
reason why something is off is the profile's.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from typing import Any

import msgspec

from kbusd.ctl import workers
from kbusd.sandbox import inforce, profiles
from kbusd.sandbox.users import there

_OF_ZYGOTE = ("worker", "kdbus-worker")


class Finding(msgspec.Struct, frozen=True):
    """One confinement of one kind of process. `on`: None if nobody can tell."""

    process: str
    confinement: str
    prevents: str
    on: bool | None
    detail: str


def add_to(commands: Any) -> None:
    """The command `security`."""
    command = commands.add_parser(
        "security", help="each confinement: what it prevents, whether it is on, and why not"
    )
    workers.add_which(command)
    command.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    supervisor = workers.supervisor_of(options.pid, options.pidfile)
    rows = workers.survey(supervisor)
    found = list(findings(rows, supervisor))
    if options.json:
        print(msgspec.json.encode(found).decode())
    else:
        print("\n".join(table(found)))
    return 1 if any(row.differences for row in rows) else 0


def findings(rows: list[workers.Row], supervisor: int) -> Iterator[Finding]:
    """Of the first process of each kind; of others of its kind, `kbusctl workers` shows what differs."""
    seen = set()
    for row in rows:
        role = row.process.role
        if role not in seen and role in profiles.names():
            seen.add(role)
            yield from _of(row, profiles.load(role), supervisor)


def _of(row: workers.Row, profile: profiles.Profile, supervisor: int) -> Iterator[Finding]:
    it = row.process
    stays = profile.user if profile.user and not profile.user.names else None

    def finding(key: str, prevents: str, on: bool | None, detail: str = "") -> Finding:
        section = profile.user if key == "apart" else profile.limits.get(key)
        section = section or getattr(profile, key.replace("-", "_"), None)
        if on is False and not detail:
            wanted = section is not None and section.enabled and section != stays
            detail = "not to be had here" if wanted else section.why if section else "not asked for"
        return Finding(it.title, key, prevents, on, detail)

    yield finding("user", "reading and changing what root may", it.uids[1] != 0)
    if profile.user and profile.user.apart and it.role in _OF_ZYGOTE:
        first, count = there(profile.user.apart, profile.user.apart_inside) or (0, 0)
        own = 0 <= it.uids[1] - first < count
        yield finding("apart", "using up for others what the kernel counts by user", own)
    yield finding("groups", "what membership in groups opens (disk, shadow, docker)", not it.groups)
    held = inforce.capability_names(it.effective | it.permitted)
    yield finding(
        "capabilities",
        "each privilege of root by itself",
        held == "-",
        "" if held == "-" else f"has {held}",
    )
    yield finding(
        "no-new-privileges", "gaining rights by running a set-uid program", it.no_new_privileges
    )
    yield finding(
        "seccomp",
        "system calls that its job does not need: the kernel as a target",
        it.seccomp == 2,
    )
    yield finding("landlock", "opening files, whatever the filter misses", row.landlock)
    yield finding(
        "selinux",
        "using what its domain was not given, by the admin's policy",
        _domain(it, profile),
    )
    apart = _apart(it.pid, supervisor)
    yield finding(
        "namespaces",
        "the network, and the System V IPC of others",
        apart,
    )
    yield finding(
        "not-dumpable", "ptrace and memory reads by the user's other processes", _not(it.dumpable)
    )
    for name, prevents in (
        ("core", "messages in a core file"),
        ("nproc", "forking"),
        ("nofile", "exhausting descriptors"),
    ):
        _, hard = it.limits.get(name, (-1, -1))
        limit = profile.limits.get(name)
        on = limit is not None and limit.enabled and hard >= 0
        yield finding(name, prevents, on, f"at most {hard}" if on else "")


def _not(value: bool | None) -> bool | None:
    return None if value is None else not value


def _domain(it: inforce.InForce, profile: profiles.Profile) -> bool:
    wanted = profile.selinux.type if profile.selinux else ""
    return bool(wanted) and inforce.selinux_type(it.label) == wanted


def _apart(pid: int, supervisor: int) -> bool | None:
    """Whether it has a network namespace other than the supervisor's."""
    try:
        return os.readlink(f"/proc/{pid}/ns/net") != os.readlink(f"/proc/{supervisor}/ns/net")
    except OSError:
        return None


def table(found: list[Finding]) -> Iterator[str]:
    """For a terminal."""
    marks = {True: "on", False: "OFF", None: "?"}
    for process in dict.fromkeys(each.process for each in found):
        rows = [each for each in found if each.process == process]
        counted = sum(each.on is True for each in rows)
        yield f"{process}: {counted} of {len(rows)}"
        cells = [(f"  {marks[r.on]}", r.confinement, r.prevents, r.detail) for r in rows]
        yield from workers.columns(cells)
        yield ""
