"""`kbusctl security`: a row for each confinement of each process: what it prevents, whether it is on.

In the manner of systemd-analyze security. What the kernel says counts, not what a profile wishes; a
reason why something is off is the profile's.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import msgspec

from kbusd.ctl import workers
from kbusd.sandbox import inforce, profiles
from kbusd.sandbox.users import there

_OF_ZYGOTE = ("worker", "kdbus-worker")
_SHORT = "config-reader"
_LIMITS = (
    ("core", "messages in a core file"),
    ("nproc", "forking"),
    ("nofile", "exhausting descriptors"),
    ("data", "exhausting memory with what is its own"),
    ("as", "exhausting memory with all that it maps"),
)
_PREVENTS = dict(_LIMITS) | {
    "user": "reading and changing what root may",
    "apart": "using up for others what the kernel counts by user",
    "groups": "what membership in groups opens (disk, shadow, docker)",
    "capabilities": "each privilege of root by itself",
    "bounding": "getting privileges of root by running a program",
    "securebits": "getting privileges by being, or becoming, uid 0",
    "no-new-privileges": "gaining rights by running a set-uid program",
    "seccomp": "system calls that its job does not need: the kernel as a target",
    "landlock": "opening files, whatever the filter misses",
    "selinux": "using what its domain was not given, by the admin's policy",
    "namespaces": "the network, and the System V IPC of others",
    "not-dumpable": "ptrace and memory reads by the user's other processes",
}


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
    """Of the first process of each kind; of others of its kind, `kbusctl workers` shows what differs.

    Of the config reader, which lives for a moment, what its profile asks for."""
    seen = set()
    spaces = next(row.process.namespaces for row in rows if row.process.pid == supervisor)
    for row in rows:
        role = row.process.role
        if role not in seen and role in profiles.names():
            seen.add(role)
            yield from _of(row, profiles.load(role), spaces)
    if _SHORT not in seen:
        yield from _asked(profiles.load(_SHORT))


def _asked(profile: profiles.Profile) -> Iterator[Finding]:
    """Of a process that is not there now."""
    asks: dict[str, Any] = {
        name: limit for name, limit in profile.limits.items() if name in dict(_LIMITS)
    }
    asks |= {key.replace("_", "-"): getattr(profile, key) for key in profiles.SECTIONS}
    stays = profile.user if profile.user and not profile.user.names else None
    for key, section in asks.items():
        off = not section.enabled or section == stays
        detail = section.why if off else "its profile asks for it; it runs while files are read"
        yield Finding(profile.title, key, _PREVENTS[key], False if off else None, detail)


def _of(row: workers.Row, profile: profiles.Profile, spaces: dict[str, str]) -> Iterator[Finding]:
    it = row.process
    stays = profile.user if profile.user and not profile.user.names else None

    def finding(key: str, on: bool | None, detail: str = "") -> Finding:
        section: Any = profile.user if key == "apart" else profile.limits.get(key)
        if key == "bounding":
            section = profile.capabilities
        section = section or getattr(profile, key.replace("-", "_"), None)
        if on is False and not detail:
            wanted = section is not None and section.enabled and section != stays
            detail = "not to be had here" if wanted else section.why if section else "not asked for"
        return Finding(it.title, key, _PREVENTS[key], on, detail)

    yield finding("user", it.uids[1] != 0)
    if profile.user and profile.user.apart and it.role in _OF_ZYGOTE:
        first, count = there(profile.user.apart, profile.user.apart_inside) or (0, 0)
        yield finding("apart", 0 <= it.uids[1] - first < count)
    yield finding("groups", not it.groups)
    held = inforce.capability_names(it.effective | it.permitted)
    yield finding("capabilities", held == "-", "" if held == "-" else f"has {held}")
    bounding = inforce.capability_names(it.bounding)
    yield finding("bounding", bounding == "-", "" if bounding == "-" else f"has {bounding}")
    yield finding("securebits", row.securebits, row.unseen)
    yield finding("no-new-privileges", it.no_new_privileges)
    yield finding("seccomp", it.seccomp == 2)
    yield finding("landlock", row.landlock, "" if row.landlock is False else row.unseen)
    yield finding("selinux", _domain(it, profile))
    yield finding("namespaces", _apart(it.namespaces, spaces))
    yield finding("not-dumpable", _not(it.dumpable))
    for name, _ in _LIMITS:
        _, hard = it.limits.get(name, (-1, -1))
        limit = profile.limits.get(name)
        on = limit is not None and limit.enabled and hard >= 0
        yield finding(name, on, f"at most {hard}" if on else "")


def _not(value: bool | None) -> bool | None:
    return None if value is None else not value


def _domain(it: inforce.InForce, profile: profiles.Profile) -> bool:
    wanted = profile.selinux.type if profile.selinux else ""
    return bool(wanted) and inforce.selinux_type(it.label) == wanted


def _apart(own: dict[str, str], supervisor: dict[str, str]) -> bool | None:
    """Whether it has network and IPC of its own."""
    if not own or not supervisor:
        return None
    return all(own[name] != supervisor[name] for name in ("net", "ipc"))


def table(found: list[Finding]) -> Iterator[str]:
    """For a terminal."""
    marks = {True: "on", False: "OFF", None: "?"}
    for process in dict.fromkeys(each.process for each in found):
        rows = [each for each in found if each.process == process]
        counted = sum(each.on is True for each in rows)
        there_is_one = counted or all(each.on is not None for each in rows)
        yield f"{process}: {f'{counted} of {len(rows)}' if there_is_one else 'not there now'}"
        cells = [(f"  {marks[r.on]}", r.confinement, r.prevents, r.detail) for r in rows]
        yield from workers.columns(cells)
        yield ""
