"""The mount point of kdbusfs: mounted at the start, unmounted at the end, cleared of a dead mount.

Privileged: mount(2) needs CAP_SYS_ADMIN, over the host or in a user namespace of one's own. Reads the
kernel's table of mounts. Never looks into what it has mounted: only we ourselves could answer.
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress

from kbusd.sandbox import selinux
from kbusd.supervisor import calls

KIND = "fuse.kbusd"
LABEL = "system_u:object_r:kbus_device_t:s0"  # of all files in it: selinux/kbus.te
_MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_NOSYMFOLLOW = 2, 4, 8, 256  # the last since Linux 5.10
_MNT_DETACH = 2


class MountError(Exception):
    """There can be no mount here; the text says where and why."""


def mount(path: str) -> tuple[str, int, int]:
    """Mount on a directory; returns what to unmount, the descriptor to serve it by, non-blocking, and
    its device number. A mount that a killed kbusd left there is taken away first. Raises MountError."""
    path = os.path.realpath(path)
    try:
        if mounts(path):
            _clear(path)
        try:
            fuse = _mount(path, f",context={LABEL}" if selinux.enabled() else "")
        except OSError as error:
            if error.errno != errno.EINVAL or not selinux.enabled():
                raise
            fuse = _mount(path, "")  # the policy has no such label: it is that of all FUSE mounts
    except OSError as error:
        hint = "; it takes root, or a user namespace" if error.errno == errno.EPERM else ""
        where = error.filename or path
        raise MountError(f"cannot mount on {where}: {error.strerror}{hint}") from None
    return path, fuse, mounts(path)[-1]


def _mount(path: str, more: str) -> int:
    """Mount; returns the descriptor. Raises OSError."""
    fuse = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    # Access bits are the kernel's to check, who knows the caller's groups best.
    options = f"fd={fuse},rootmode=40000,user_id={os.geteuid()},group_id={os.getegid()}"
    options += f",default_permissions,allow_other{more}"
    flags = _MS_NOSUID | _MS_NODEV | _MS_NOEXEC | _MS_NOSYMFOLLOW
    try:
        calls.mount(b"kbusd", os.fsencode(path), KIND.encode(), flags, options.encode())
    except OSError:
        os.close(fuse)
        raise
    return fuse


def unmount(path: str) -> None:
    """Take the mount away, whoever uses it; for those it ends with the descriptor."""
    with suppress(OSError):
        calls.umount(os.fsencode(path), _MNT_DETACH)


def mounts(path: str) -> list[int]:
    """The device numbers of kdbusfs mounts on this very path, the topmost last (proc(5), mountinfo)."""
    found = []
    with open("/proc/self/mountinfo", "rb") as table:
        for line in table:
            fields, _, behind = line.partition(b" - ")
            _, _, device, _, where, *_ = fields.split()
            if behind.startswith(KIND.encode() + b" ") and _unescape(where) == os.fsencode(path):
                major, minor = device.split(b":")
                found.append(os.makedev(int(major), int(minor)))
    return found


def _unescape(path: bytes) -> bytes:
    first, *rest = path.split(b"\\")
    return first + b"".join(bytes([int(each[:3], 8)]) + each[3:] for each in rest)


def _clear(path: str) -> None:
    """Unmount what nobody serves any more."""
    while mounts(path):
        try:
            os.stat(path)
        except OSError as error:
            if error.errno != errno.ENOTCONN:
                raise
            calls.umount(os.fsencode(path), _MNT_DETACH)
        else:
            raise MountError(f"{path} is the mount point of another kbusd that runs")
