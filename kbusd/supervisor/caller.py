"""Who asks: the caller of a FUSE request that is held, by the kernel's word.

While its request is held a thread can't exit or execute another program, so what stands in /proc/TID is
its own. Privileged: reads /proc of any process, and copies its descriptors. The texts are passed on
unread, but for lines of `status` and `cgroup`, which the kernel writes (proc(5)).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence, Set
from contextlib import suppress
from struct import Struct

from kbusd.rings.entries import Credentials, Opener, Process
from kbusd.supervisor import calls

HELLO = 0xC0609580  # KDBUS_CMD_HELLO (linux/kdbus.h)
_IDS = Struct("=III")  # uid, gid, thread; in the head of a request
_IDS_AT = 24
_FILES = (
    "status", "stat", "comm", "cmdline", "cgroup", "attr/current", "loginuid", "sessionid",
    "uid_map", "gid_map",
)  # fmt: skip
_LINKS = ("exe", "root", "ns/user", "ns/pid")
_MAX_FILE = 64 << 10
_MAX_DESCRIPTORS = 16
_MAX_CGROUP = 1024
_HOME = os.readlink("/proc/self/ns/user")


def ids(request: bytes) -> tuple[int, int, int]:
    """fsuid, fsgid and thread of whoever made a request; 0 for a thread that we can't see."""
    uid, gid, tid = _IDS.unpack_from(request, _IDS_AT)
    return uid, gid, tid


def credentials(request: bytes, *, whole: bool = True) -> Credentials:
    """The same with its process, groups and security label, and what else /proc has of it, if it is to be
    `whole`; the request is held."""
    uid, gid, tid = ids(request)
    number, parent, label, ipc_owner = 0, 0, b"", False
    groups: tuple[int, ...] = ()
    process = opener = None
    with suppress(OSError, ValueError, KeyError):
        fields = _status(tid)
        number, parent = int(fields[b"Tgid"]), int(fields[b"PPid"])
        groups = _numbers(fields[b"Groups"])
        if (real := _numbers(fields[b"Uid"])[0]) != uid:
            opener = Opener(uid, gid, groups, real)
        may = int(fields[b"CapEff"], 16) >> 15 & 1  # CAP_IPC_OWNER
        # By the link, which the SELinux policy lets us read; not by what it leads to.
        ipc_owner = may != 0 and os.readlink(f"/proc/{tid}/ns/user") == _HOME
        with suppress(OSError):  # where no security module labels processes
            label = _read(tid, "attr/current").rstrip(b"\0\n")
        process = _process(tid, parent, fields) if whole else None
    return Credentials(uid, gid, number, groups, label, parent, process, "", ipc_owner, opener)


def _process(tid: int, parent: int, fields: dict[bytes, bytes]) -> Process:
    inside = 0
    with suppress(OSError, KeyError):
        above = _numbers(_status(parent)[b"NStgid"])
        own = _numbers(fields[b"NStgid"])
        inside = above[-1] if len(above) == len(own) else 0
    cgroup, audit = b"", None
    with suppress(OSError):  # where the kernel has no cgroups
        cgroup = _cgroup(_read(tid, "cgroup"))
    with suppress(OSError):  # where the kernel has no audit
        audit = int(_read(tid, "loginuid")), int(_read(tid, "sessionid"))
    sets = (b"CapInh", b"CapPrm", b"CapEff", b"CapBnd")
    return Process(
        _four(_numbers(fields[b"Uid"])),
        _four(_numbers(fields[b"Gid"])),
        _four([int(fields[name], 16) for name in sets]),
        cgroup,
        audit,
        int(os.readlink(f"/proc/{tid}/ns/pid").strip("pid:[]")),
        (_numbers(fields[b"NStgid"])[-1], inside),
        int(os.readlink(f"/proc/{tid}/ns/user").strip("user:[]")),
    )


def _cgroup(text: bytes) -> bytes:
    """Its path: where systemd keeps it, else in the unified hierarchy, else in the first (cgroups(7)). If
    there is no hierarchy, all are in the root."""
    paths = dict(line.split(b":", 2)[1:] for line in text.splitlines() if line.count(b":") >= 2)
    first = next(iter(paths.values()), b"/")
    return paths.get(b"name=systemd", paths.get(b"", first))[:_MAX_CGROUP]


def _numbers(text: bytes) -> tuple[int, ...]:
    return tuple(int(each) for each in text.split())


def _four(found: Sequence[int]) -> tuple[int, int, int, int]:
    first, second, third, fourth = found
    return first, second, third, fourth


def descriptors(tid: int, numbers: Sequence[int], ours: Set[int]) -> Iterator[int]:
    """Copies of its descriptors, one after another. Raises OSError; ELOOP for one of our own devices,
    by number: it is looked at first, as to close it might be to wait for ourselves."""
    if len(numbers) > _MAX_DESCRIPTORS or any(not 0 <= each < 1 << 31 for each in numbers):
        raise OSError(errno.EBADF, "no such descriptor")
    process = tid
    try:
        pidfd = os.pidfd_open(process)
    except (
        OSError
    ):  # not the first of its process; to ask that beforehand takes longer than all the rest
        process = int(_status(tid)[b"Tgid"])
        pidfd = os.pidfd_open(process)
    try:
        for number in numbers:
            try:
                found = calls.devices_of(-1, b"/proc/%d/fd/%d" % (process, number))
            except FileNotFoundError:
                raise OSError(errno.EBADF, os.strerror(errno.EBADF)) from None
            if not ours.isdisjoint(found):
                raise OSError(errno.ELOOP, "a device of our own")
            yield calls.pidfd_getfd(pidfd, number)
    finally:
        os.close(pidfd)


def facts(tid: int) -> dict[str, bytes]:
    """What /proc has of it; without what can't be read."""
    found = {}
    for name in _FILES:
        with suppress(OSError):
            found[name] = _read(tid, name)
    for name in _LINKS:
        with suppress(OSError):
            found[name] = os.readlink(f"/proc/{tid}/{name}".encode())
    return found


def _read(tid: int, name: str) -> bytes:
    fd = os.open(f"/proc/{tid}/{name}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, _MAX_FILE)
    finally:
        os.close(fd)


def _status(tid: int) -> dict[bytes, bytes]:
    lines = (line.partition(b":") for line in _read(tid, "status").split(b"\n"))
    return {name: value for name, _, value in lines}
