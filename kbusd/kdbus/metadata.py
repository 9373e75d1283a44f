"""Metadata: what receivers learn of a sender, as items (kdbus.item(7), ipc/kdbus/metadata.c).

The values come in as the host's kernel has them; uids and gids are shown as the receiver's user
namespace has them, by its maps, which come in as data too. Pids come in as the receiver's pid
namespace has them, since there is no map for those.
"""

from __future__ import annotations

import errno
import struct

import msgspec

from kbusd.kdbus import abi, layout
from kbusd.kdbus.errors import Errno
from kbusd.kdbus.items import build, string

NO_ID = (1 << 32) - 1
OVERFLOW_ID = 65534
"""Shown for an id that the receiver's namespace does not have (/proc/sys/kernel/overflowuid)."""


class IdMap(msgspec.Struct, frozen=True):
    """The ids of a user namespace: (first id inside, first id outside, count) as in uid_map."""

    ranges: tuple[tuple[int, int, int], ...] = ((0, 0, NO_ID),)

    def inside(self, id: int) -> int | None:
        """What the namespace calls the host's `id`; None if it has no such id."""
        for first, outside, count in self.ranges:
            if 0 <= id - outside < count:
                return first + id - outside
        return None

    def outside(self, id: int) -> int | None:
        """What the host calls the namespace's `id`; None if the namespace has no such id."""
        for first, outside, count in self.ranges:
            if 0 <= id - first < count:
                return outside + id - first
        return None

    @classmethod
    def read(cls, text: bytes) -> IdMap:
        """From /proc/PID/uid_map or gid_map, as a process outside sees it (user_namespaces(7))."""
        lines = [tuple(map(int, line.split())) for line in text.splitlines()]
        return cls(tuple(line for line in lines if len(line) == 3))

    def shown(self, id: int) -> int:
        """As `inside`, the overflow id for one that is not there; no id stays no id."""
        if id == NO_ID:
            return id
        inside = self.inside(id)
        return OVERFLOW_ID if inside is None else inside


SAME = IdMap()


class Creds(msgspec.Struct, frozen=True):
    """User and group ids of a process (credentials(7))."""

    uid: int
    euid: int
    suid: int
    fsuid: int
    gid: int
    egid: int
    sgid: int
    fsgid: int


class Pids(msgspec.Struct, frozen=True):
    """A process, the thread of it, its parent; 0 where the receiver can't see it."""

    pid: int
    tid: int
    ppid: int


class Caps(msgspec.Struct, frozen=True):
    """Capability sets as bit masks, and the highest capability that there is."""

    last: int
    inheritable: int
    permitted: int
    effective: int
    bounding: int


class Audit(msgspec.Struct, frozen=True):
    """The audit session and login uid of a process."""

    session: int
    login_uid: int


class Timestamp(msgspec.Struct, frozen=True):
    """When a message was sent: its number in the domain, and two clocks in nanoseconds."""

    seqnum: int
    monotonic_ns: int
    realtime_ns: int


class OwnedName(msgspec.Struct, frozen=True):
    """A well-known name and its NAME flags."""

    name: str
    flags: int


class Metadata(msgspec.Struct, frozen=True):
    """All that is known of a sender; what is None is not known and makes no item."""

    creds: Creds | None = None
    pids: Pids | None = None
    groups: tuple[int, ...] | None = None
    tid_comm: bytes | None = None
    pid_comm: bytes | None = None
    exe: bytes | None = None
    cmdline: bytes | None = None  # as in /proc/PID/cmdline: arguments, a zero byte after each
    cgroup: bytes | None = None
    caps: Caps | None = None
    label: bytes | None = None
    audit: Audit | None = None
    names: tuple[OwnedName, ...] = ()
    description: bytes | None = None
    timestamp: Timestamp | None = None


def attach_flags(flags: int) -> int:
    """ATTACH flags from a client; ANY is ALL. Raises Errno EINVAL for unknown ones (util.c)."""
    if flags == abi.ATTACH_ANY:
        return abi.ATTACH_ALL
    if flags & ~abi.ATTACH_ALL:
        raise Errno(errno.EINVAL, f"unknown attach flags {flags & ~abi.ATTACH_ALL:#x}")
    return flags


_PUBLIC = (
    abi.ATTACH_CONN_DESCRIPTION
    | abi.ATTACH_TIMESTAMP
    | abi.ATTACH_NAMES
    | abi.ATTACH_AUXGROUPS
    | abi.ATTACH_CREDS
    | abi.ATTACH_PIDS
)


def granted(offered: int, wanted: int, in_proc: bool) -> int:
    """Which metadata is attached: what the sender offers, and what anybody may know, if wanted.

    `in_proc`: the receiver could read it all in /proc, so that it costs the sender nothing.
    """
    return wanted & (abi.ATTACH_ALL if in_proc else offered | _PUBLIC)


def build_items(data: Metadata, mask: int, uids: IdMap = SAME, gids: IdMap = SAME) -> bytes:
    """The items of `data` that `mask` (ATTACH flags) lets through, in the kernel's order, padded."""
    parts = []
    if mask & abi.ATTACH_CREDS and (creds := data.creds) is not None:
        users = (creds.uid, creds.euid, creds.suid, creds.fsuid)
        groups = (creds.gid, creds.egid, creds.sgid, creds.fsgid)
        packed = layout.CREDS.pack(*map(uids.shown, users), *map(gids.shown, groups))
        parts.append(build(abi.ITEM_CREDS, packed))
    if mask & abi.ATTACH_PIDS and (pids := data.pids) is not None:
        parts.append(build(abi.ITEM_PIDS, layout.PIDS.pack(pids.pid, pids.tid, pids.ppid)))
    if mask & abi.ATTACH_AUXGROUPS and data.groups is not None:
        shown = [layout.U64.pack(gids.shown(group)) for group in data.groups]
        parts.append(build(abi.ITEM_AUXGROUPS, b"".join(shown)))
    for flag, type, text in (
        (abi.ATTACH_TID_COMM, abi.ITEM_TID_COMM, data.tid_comm),
        (abi.ATTACH_PID_COMM, abi.ITEM_PID_COMM, data.pid_comm),
        (abi.ATTACH_EXE, abi.ITEM_EXE, data.exe),
        (abi.ATTACH_CMDLINE, abi.ITEM_CMDLINE, _without_end(data.cmdline)),
        (abi.ATTACH_CGROUP, abi.ITEM_CGROUP, data.cgroup),
    ):
        if mask & flag and text is not None:
            parts.append(string(type, text))
    if mask & abi.ATTACH_CAPS and data.caps is not None:
        parts.append(build(abi.ITEM_CAPS, _caps(data.caps)))
    if mask & abi.ATTACH_SECLABEL and data.label is not None:
        parts.append(string(abi.ITEM_SECLABEL, data.label))
    if mask & abi.ATTACH_AUDIT and (audit := data.audit) is not None:
        login_uid = uids.inside(audit.login_uid)  # unlike a user's, no overflow id
        packed = layout.AUDIT.pack(audit.session, NO_ID if login_uid is None else login_uid)
        parts.append(build(abi.ITEM_AUDIT, packed))
    if mask & abi.ATTACH_NAMES:
        parts.extend(map(owned_name, data.names))
    if mask & abi.ATTACH_CONN_DESCRIPTION and data.description is not None:
        parts.append(string(abi.ITEM_CONN_DESCRIPTION, data.description))
    if mask & abi.ATTACH_TIMESTAMP and (stamp := data.timestamp) is not None:
        parts.append(timestamp(stamp))
    return b"".join(parts)


def timestamp(stamp: Timestamp) -> bytes:
    """The TIMESTAMP item, which comes last."""
    packed = layout.TIMESTAMP.pack(stamp.seqnum, stamp.monotonic_ns, stamp.realtime_ns)
    return build(abi.ITEM_TIMESTAMP, packed)


def owned_name(name: OwnedName) -> bytes:
    """The OWNED_NAME item of a name, padded."""
    return build(
        abi.ITEM_OWNED_NAME, layout.U64.pack(name.flags) + name.name.encode("latin-1") + b"\0"
    )


def _without_end(cmdline: bytes | None) -> bytes | None:
    return None if cmdline is None else cmdline.removesuffix(b"\0")


def _caps(caps: Caps) -> bytes:
    """struct kdbus_caps: the highest capability, then each set in 32-bit words, the low one first."""
    words = [caps.last]
    for bits in (caps.inheritable, caps.permitted, caps.effective, caps.bounding):
        bits &= (2 << caps.last) - 1
        words += [bits >> shift & 0xFFFFFFFF for shift in range(0, caps.last + 1, 32)]
    return struct.pack(f"={len(words)}I", *words)
