"""Who asks: the caller of a FUSE request that is held, by the kernel's word.

While its request is held a thread can't exit or execute another program, so what stands in /proc/TID is
its own. Privileged: reads /proc of any process, and copies its descriptors. The texts are passed on
unread, but for two lines of `status`, which the kernel writes (proc(5)).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence, Set
from contextlib import suppress
from struct import Struct

from kbusd.rings.entries import Credentials
from kbusd.supervisor import calls

_IDS = Struct("=III")  # uid, gid, thread; in the head of a request
_IDS_AT = 24
_FILES = (
    "status", "stat", "comm", "cmdline", "cgroup", "attr/current", "loginuid", "sessionid",
    "uid_map", "gid_map",
)  # fmt: skip
_LINKS = ("exe", "root", "ns/user", "ns/pid")
_MAX_FILE = 64 << 10
_MAX_DESCRIPTORS = 16


def ids(request: bytes) -> tuple[int, int, int]:
    """fsuid, fsgid and thread of whoever made a request; 0 for a thread that we can't see."""
    uid, gid, tid = _IDS.unpack_from(request, _IDS_AT)
    return uid, gid, tid


def credentials(request: bytes) -> Credentials:
    """The same with its process, groups and security label; the request is held."""
    uid, gid, tid = ids(request)
    process, parent, label = 0, 0, b""
    groups: tuple[int, ...] = ()
    with suppress(OSError, ValueError):
        fields = _status(tid)
        process, parent = int(fields[b"Tgid"]), int(fields[b"PPid"])
        groups = tuple(int(each) for each in fields[b"Groups"].split())
        label = _read(tid, "attr/current").rstrip(b"\0\n")
    return Credentials(uid, gid, process, groups, label, parent)


def descriptors(tid: int, numbers: Sequence[int], ours: Set[int]) -> Iterator[int]:
    """Copies of its descriptors, one after another. Raises OSError; ELOOP for one of our own devices,
    by number: it is looked at first, as to close it might be to wait for ourselves."""
    if len(numbers) > _MAX_DESCRIPTORS or any(not 0 <= each < 1 << 31 for each in numbers):
        raise OSError(errno.EBADF, "no such descriptor")
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
