"""What is really in force for a process, read back from the kernel (proc(5)), and what differs.

Only reads /proc. What a process says of itself is not asked: its name (comm) is used to tell
its role, and a role that it does not have shows as differences. The kernel shows neither the Landlock
domain nor the securebits of another process; they are therefore deduced (see `_deduce`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress

import msgspec

from kbusd.sandbox import apply, constants, kernel
from kbusd.sandbox.compiled import Compiled

SECCOMP_MODES = {0: "none", 1: "strict", 2: "filter"}


class InForce(msgspec.Struct, frozen=True, kw_only=True):
    """The confinement of one process. None: the kernel does not say (or not to us).

    Ids are real, effective, saved, file system. Capabilities are bits. `filters` counts what
    was inherited, too. Limits are (soft, hard), -1 unlimited, by the names that profiles use.
    `unlike` counts threads that are not confined as the first. `namespaces`: by the names that profiles use;
    empty if they are not shown to us."""

    pid: int
    parent: int
    role: str
    title: str
    uids: tuple[int, int, int, int]
    gids: tuple[int, int, int, int]
    groups: tuple[int, ...]
    effective: int
    permitted: int
    inheritable: int
    ambient: int
    bounding: int
    no_new_privileges: bool
    seccomp: int
    filters: int | None
    dumpable: bool | None
    limits: dict[str, tuple[int, int]]
    label: str
    unlike: int
    namespaces: dict[str, str] = {}


_OF_A_THREAD = (
    *("Uid", "Gid", "Groups", "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"),
    *("NoNewPrivs", "Seccomp", "Seccomp_filters"),
)
_LIMIT_LINES = {
    "Max address space": "as",
    "Max core file size": "core",
    "Max cpu time": "cpu",
    "Max data size": "data",
    "Max file size": "fsize",
    "Max locked memory": "memlock",
    "Max msgqueue size": "msgqueue",
    "Max open files": "nofile",
    "Max processes": "nproc",
}
_LINKS = {"mount": "mnt"}  # below /proc/PID/ns


def read(pid: int, titles: Mapping[str, str] | None = None) -> InForce:
    """The confinement of `pid`. `titles`: process name -> role; an unknown one has role "?".

    Raises ProcessLookupError if there is no such process (any more)."""
    try:
        status = _status(pid)
        if status["State"].startswith(("Z", "X")):
            raise ProcessLookupError(f"process {pid} has ended")
        uids = _four(status["Uid"])
        return InForce(
            pid=pid,
            parent=int(status["PPid"]),
            role=(titles or {}).get(status["Name"], "?"),
            title=status["Name"],
            uids=uids,
            gids=_four(status["Gid"]),
            groups=tuple(int(group) for group in status["Groups"].split()),
            effective=int(status["CapEff"], 16),
            permitted=int(status["CapPrm"], 16),
            inheritable=int(status["CapInh"], 16),
            ambient=int(status.get("CapAmb", "0"), 16),
            bounding=int(status["CapBnd"], 16),
            no_new_privileges=status["NoNewPrivs"] == "1",
            seccomp=int(status.get("Seccomp", "0")),
            filters=int(status["Seccomp_filters"]) if "Seccomp_filters" in status else None,
            dumpable=_dumpable(pid, uids[1]),
            limits=_limits(pid),
            label=_label(pid),
            unlike=_unlike(pid, status),
            namespaces=_namespaces(pid),
        )
    except FileNotFoundError:
        raise ProcessLookupError(f"there is no process {pid}") from None


def family(supervisor: int) -> list[int]:
    """The supervisor and all its descendants, parents before children."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdecimal():
            try:
                parent = int(_status(int(entry))["PPid"])
            except (FileNotFoundError, ProcessLookupError):
                continue
            children.setdefault(parent, []).append(int(entry))
    found = [supervisor]
    for pid in found:
        found += sorted(children.get(pid, ()))
    return found


def named(title: str) -> list[int]:
    """Every process whose name is `title`, and that has not ended; those of our pid namespace first."""
    pids = []
    for entry in os.listdir("/proc"):
        if entry.isdecimal():
            try:
                status = _status(int(entry))
                if status["Name"] == title and not status["State"].startswith("Z"):
                    pids.append((len(status["NSpid"].split()), int(entry)))
            except (FileNotFoundError, ProcessLookupError):
                continue
    return [pid for _, pid in sorted(pids)]


def in_our_namespace(pid: int) -> bool:
    """Whether a process has no pid namespace of its own, as in a container. Raises OSError."""
    return len(_status(pid)["NSpid"].split()) == 1


def differences(
    found: InForce,
    wanted: Compiled,
    *,
    supervisor: InForce,
    parent: InForce | None,
    uid: int | None = None,
) -> list[str]:
    """How `found` falls short of its profile `wanted`, in words; empty if it does not.

    User and SELinux domain are expected to change only if the supervisor is root's and there are others whom to
    become. `parent`: with a filter of its own a process has more filters than its parent; who is forked by one that is not root is to be
    a user apart. `uid`: whom root's children become, if that is known."""
    wrong: list[str] = []
    privileged = supervisor.uids[1] == 0 and not apply.ALONE
    if privileged and wanted.uid is not None:
        if 0 in found.uids or len(set(found.uids)) != 1:
            wrong.append(f"user ids are {found.uids}, want one that is not root's")
        elif parent is not None and parent.uids[1] != 0:
            first, count = wanted.apart or (parent.uids[1], 1)
            if not first <= found.uids[1] < first + count:
                wrong.append(f"user id is {found.uids[1]}, want one of {count} from {first} on")
        elif uid not in (None, found.uids[1]):
            wrong.append(f"user id is {found.uids[1]}, want {uid}")
        if len(set(found.gids)) != 1:
            wrong.append(f"group ids differ: {found.gids}")
    elif len(set(found.uids)) != 1:
        wrong.append(f"user ids differ: {found.uids}")
    if privileged and wanted.groups is not None and found.groups != wanted.groups:
        wrong.append(f"groups are {found.groups}, want {wanted.groups}")
    if wanted.capabilities is not None:
        held = found.effective | found.permitted | found.inheritable | found.ambient
        if extra := held & ~wanted.capabilities:
            wrong.append(f"holds capabilities {capability_names(extra)}")
    setpcap = supervisor.effective & 1 << constants.CAPABILITIES["setpcap"]
    if setpcap and wanted.bounding is not None and found.bounding & ~wanted.bounding:
        wrong.append(f"bounding set has {capability_names(found.bounding & ~wanted.bounding)}")
    if wanted.no_new_privileges and not found.no_new_privileges:
        wrong.append("no_new_privs is not set")
    if wanted.not_dumpable and found.dumpable:
        wrong.append("is dumpable")
    for limit in wanted.limits:
        hard = found.limits.get(limit.name, (-1, -1))[1]
        if limit.value >= 0 and not 0 <= hard <= limit.value:
            wrong.append(f"limit {limit.name} is {hard}, want at most {limit.value}")
    if supervisor.effective & 1 << constants.CAPABILITIES["sys_admin"]:
        same = [
            name
            for name, number in constants.NAMESPACES.items()
            if wanted.unshare & number and found.namespaces
            if found.namespaces.get(name) == supervisor.namespaces.get(name)
        ]
        if same:
            wrong.append(
                f"is in the supervisor's namespace{'s'[: len(same) > 1]} {', '.join(same)}"
            )
    if wanted.bpf:
        above = (parent.filters or 0) if parent else 0
        if found.seccomp != 2:
            wrong.append(f"seccomp mode is {SECCOMP_MODES.get(found.seccomp, found.seccomp)}")
        elif found.filters is not None and found.filters <= above:
            wrong.append(f"has {found.filters} filters, no more than its parent")
    if privileged and wanted.selinux and selinux_type(found.label) != wanted.selinux:
        wrong.append(f"SELinux label is {found.label or 'none'}, want type {wanted.selinux}")
    if found.unlike:
        wrong.append(f"{found.unlike} of its threads are not confined as the first")
    return wrong


def deduce_landlock(
    found: InForce, started: Compiled | None, parent: InForce | None
) -> bool | None:
    """Whether `found` is in a Landlock domain. None: nothing tells. `started`: what it was started with."""
    try:
        kernel.landlock_abi()
    except OSError:
        return False
    return (
        None if started is None else _deduce(started.landlock is not None, found, started, parent)
    )


def deduce_securebits(
    found: InForce, started: Compiled | None, parent: InForce | None
) -> bool | None:
    """As `deduce_landlock`; only who has root's rights can set them."""
    return None if started is None else _deduce(bool(started.securebits), found, started, parent)


def _deduce(asked: bool, found: InForce, started: Compiled, parent: InForce | None) -> bool | None:
    """`apply.confine` loads the filter last, and gives up if what comes before it is refused and the kernel
    has it. So a filter of its own is the proof that what its profile asks came before."""
    if not asked:
        return False
    above = (parent.filters or 0) if parent else 0
    if started.bpf and found.seccomp == 2 and found.filters is not None and found.filters > above:
        return True
    return None


def capability_names(bits: int) -> str:
    """Capabilities as profiles name them; "-" for none, "all but ..." for most of them."""
    have = [name for name, number in constants.CAPABILITIES.items() if bits >> number & 1]
    lack = [name for name in constants.CAPABILITIES if name not in have]
    if not lack:
        return "all"
    return f"all but {','.join(lack)}" if len(lack) < 8 else ",".join(have) or "-"


def selinux_type(label: str) -> str:
    """The type of an SELinux context, "" if it is none."""
    parts = label.split(":")
    return parts[2] if len(parts) >= 3 else ""


def _unlike(pid: int, first: Mapping[str, str]) -> int:
    count = 0
    for name in os.listdir(f"/proc/{pid}/task"):
        thread = f"{pid}/task/{name}"
        with suppress(FileNotFoundError, ProcessLookupError):  # it has ended
            status = _status(thread)
            alike = all(status.get(key) == first.get(key) for key in _OF_A_THREAD)
            count += not alike or _label(thread) != _label(pid)
    return count


def _status(pid: int | str) -> dict[str, str]:
    with open(f"/proc/{pid}/status", encoding="utf-8", errors="replace") as file:
        lines = [line.partition(":") for line in file]
    return {key: value.strip() for key, _, value in lines}


def _four(text: str) -> tuple[int, int, int, int]:
    a, b, c, d = (int(number) for number in text.split())
    return a, b, c, d


def _dumpable(pid: int, euid: int) -> bool | None:
    """Files under /proc/PID belong to root if the process is not dumpable (proc(5))."""
    if euid == 0:
        return None
    return os.stat(f"/proc/{pid}/status").st_uid == euid


def _limits(pid: int) -> dict[str, tuple[int, int]]:
    limits = {}
    with open(f"/proc/{pid}/limits") as file:
        for line in file:
            if name := _LIMIT_LINES.get(line[:26].strip()):
                soft, hard = (-1 if n == "unlimited" else int(n) for n in line[26:].split()[:2])
                limits[name] = (soft, hard)
    return limits


def _namespaces(pid: int) -> dict[str, str]:
    try:
        return {
            name: os.readlink(f"/proc/{pid}/ns/{_LINKS.get(name, name)}")
            for name in constants.NAMESPACES
        }
    except PermissionError:
        return {}


def _label(pid: int | str) -> str:
    try:
        with open(f"/proc/{pid}/attr/current") as file:
            return file.read().rstrip("\0\n")
    except OSError:
        return ""  # no security module that labels
