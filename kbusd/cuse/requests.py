"""Requests of the kernel to a CUSE or FUSE server: from bytes to one frozen struct per opcode.

The kernel wrote the fixed parts; names, written bytes and the data of ioctls come from clients. Both
are checked against the length alike. A request that we do not serve is an Unknown, for which ENOSYS
is the answer. linux/fuse.h is the source of all layouts.
"""

from __future__ import annotations

from struct import Struct

import msgspec

from kbusd.cuse import abi


class Malformed(ValueError):
    """No kernel sends this."""


class Header(msgspec.Struct, frozen=True):
    """Of any request. The ids are the caller's fsuid and fsgid; `tid` is its thread, 0 if it can't be
    seen from the server's pid namespace."""

    opcode: int
    unique: int
    node: int
    uid: int
    gid: int
    tid: int


class Init(msgspec.Struct, frozen=True):
    """The first request of a FUSE mount."""

    major: int
    minor: int
    max_readahead: int
    flags: int


class CuseInit(msgspec.Struct, frozen=True):
    """The first request to a CUSE server."""

    major: int
    minor: int
    flags: int


class Lookup(msgspec.Struct, frozen=True):
    """Which node has this name in the directory `Header.node`? The answer counts as one look-up."""

    name: bytes


class Forget(msgspec.Struct, frozen=True):
    """Look-ups of nodes that the kernel no longer holds: (node, how many). Wants no answer."""

    nodes: tuple[tuple[int, int], ...]


class GetAttr(msgspec.Struct, frozen=True):
    """fstat if there is a handle, else stat."""

    handle: int | None


class SetAttr(msgspec.Struct, frozen=True):
    """chmod and chown: what is None stays. `other` are FATTR flags of more that is to change."""

    mode: int | None
    uid: int | None
    gid: int | None
    size: int | None
    other: int


class Open(msgspec.Struct, frozen=True):
    """open(2) flags."""

    flags: int


class OpenDir(msgspec.Struct, frozen=True):
    """open(2) flags, for a directory."""

    flags: int


class Read(msgspec.Struct, frozen=True):
    """pread(2), or a page of a mapping that is missing."""

    handle: int
    offset: int
    size: int


class ReadDir(msgspec.Struct, frozen=True):
    """Entries after the one of this offset, as many as fit."""

    handle: int
    offset: int
    size: int


class Write(msgspec.Struct, frozen=True):
    """pwrite(2)."""

    handle: int
    offset: int
    data: bytes


class Release(msgspec.Struct, frozen=True):
    """The last descriptor of a handle is closed; the caller waits for the answer."""

    handle: int


class ReleaseDir(msgspec.Struct, frozen=True):
    """The same for a directory."""

    handle: int


class Flush(msgspec.Struct, frozen=True):
    """One descriptor of a handle is closed."""

    handle: int


class StatFs(msgspec.Struct, frozen=True):
    """statfs(2)."""


class Access(msgspec.Struct, frozen=True):
    """access(2); not sent if the mount has default_permissions."""

    mask: int


class Interrupt(msgspec.Struct, frozen=True):
    """The caller of the request `unique` got a signal. Wants no answer itself."""

    unique: int


class Ioctl(msgspec.Struct, frozen=True):
    """ioctl(2). `data` are the bytes that were asked for (unrestricted) or that `command` encodes."""

    handle: int
    flags: int
    command: int
    argument: int
    data: bytes
    out_size: int

    @property
    def unrestricted(self) -> bool:
        """Whether the answer may be a list of vectors to fetch (replies.ioctl_retry)."""
        return bool(self.flags & abi.IOCTL_UNRESTRICTED)


class Poll(msgspec.Struct, frozen=True):
    """poll(2): say now what is ready, and with `notify` wake `kernel_handle` when that changes."""

    handle: int
    kernel_handle: int
    notify: bool
    events: int


class Destroy(msgspec.Struct, frozen=True):
    """The mount goes. No further request comes."""


class Unknown(msgspec.Struct, frozen=True):
    """Something else, to be answered with ENOSYS."""


Body = (
    Init
    | CuseInit
    | Lookup
    | Forget
    | GetAttr
    | SetAttr
    | Open
    | OpenDir
    | Read
    | ReadDir
    | Write
    | Release
    | ReleaseDir
    | Flush
    | StatFs
    | Access
    | Interrupt
    | Ioctl
    | Poll
    | Destroy
    | Unknown
)


class Request(msgspec.Struct, frozen=True):
    """A request of the kernel."""

    header: Header
    body: Body


def decode(request: bytes) -> Request:
    """A request as it was read from /dev/fuse or /dev/cuse. Raises Malformed."""
    if len(request) < abi.IN_HEADER.size:
        raise Malformed(f"a request of {len(request)} bytes")
    length, opcode, unique, node, uid, gid, tid, extra, _ = abi.IN_HEADER.unpack_from(request)
    end = length - 8 * extra  # extensions stand at the end; we use none
    if length != len(request) or end < abi.IN_HEADER.size:
        raise Malformed(
            f"a request of {len(request)} bytes says {length}, {8 * extra} of them extra"
        )
    content = request[abi.IN_HEADER.size : end]
    return Request(Header(opcode, unique, node, uid, gid, tid), _body(opcode, node, content))


def _body(opcode: int, node: int, content: bytes) -> Body:
    match opcode:
        case abi.IOCTL:
            handle, flags, command, argument, size, out_size = _fixed(abi.IOCTL_IN, content)
            data = _rest(abi.IOCTL_IN, content, size)
            return Ioctl(handle, flags, command, argument, data, out_size)
        case abi.POLL:
            handle, kernel_handle, flags, events = _fixed(abi.POLL_IN, content)
            return Poll(handle, kernel_handle, bool(flags & abi.POLL_SCHEDULE_NOTIFY), events)
        case abi.READ:
            handle, offset, size, *_ = _fixed(abi.READ_IN, content)
            return Read(handle, offset, size)
        case abi.WRITE:
            handle, offset, size, *_ = _fixed(abi.WRITE_IN, content)
            return Write(handle, offset, _rest(abi.WRITE_IN, content, size))
        case abi.OPEN:
            return Open(_fixed(abi.OPEN_IN, content)[0])
        case abi.RELEASE:
            return Release(_fixed(abi.RELEASE_IN, content)[0])
        case abi.FLUSH:
            return Flush(_fixed(abi.FLUSH_IN, content)[0])
        case abi.INTERRUPT:
            return Interrupt(_fixed(abi.INTERRUPT_IN, content)[0])
        case abi.LOOKUP:
            name, end, after = content.partition(b"\0")
            if not name or not end or after:
                raise Malformed("LOOKUP of what is no string")
            return Lookup(name)
        case abi.FORGET:
            return Forget(((node, _fixed(abi.FORGET_IN, content)[0]),))
        case abi.BATCH_FORGET:
            count = _fixed(abi.BATCH_FORGET_IN, content)[0]
            nodes = _rest(abi.BATCH_FORGET_IN, content, count * abi.FORGET_ONE.size)
            return Forget(tuple(abi.FORGET_ONE.iter_unpack(nodes)))
        case abi.GETATTR:
            flags, _, handle = _fixed(abi.GETATTR_IN, content)
            return GetAttr(handle if flags & abi.GETATTR_FH else None)
        case abi.SETATTR:
            return _setattr(_fixed(abi.SETATTR_IN, content))
        case abi.OPENDIR:
            return OpenDir(_fixed(abi.OPEN_IN, content)[0])
        case abi.READDIR:
            handle, offset, size, *_ = _fixed(abi.READ_IN, content)
            return ReadDir(handle, offset, size)
        case abi.RELEASEDIR:
            return ReleaseDir(_fixed(abi.RELEASE_IN, content)[0])
        case abi.STATFS:
            return StatFs()
        case abi.ACCESS:
            return Access(_fixed(abi.ACCESS_IN, content)[0])
        case abi.INIT:
            return Init(*_fixed(abi.INIT_IN, content))
        case abi.CUSE_INIT:
            major, minor, _, flags = _fixed(abi.CUSE_INIT_IN, content)
            return CuseInit(major, minor, flags)
        case abi.DESTROY:
            return Destroy()
    return Unknown()


def _setattr(fields: tuple[int, ...]) -> SetAttr:
    valid, size, mode, uid, gid = fields[0], fields[3], fields[11], fields[13], fields[14]
    served = abi.FATTR_MODE | abi.FATTR_UID | abi.FATTR_GID | abi.FATTR_SIZE
    return SetAttr(
        mode if valid & abi.FATTR_MODE else None,
        uid if valid & abi.FATTR_UID else None,
        gid if valid & abi.FATTR_GID else None,
        size if valid & abi.FATTR_SIZE else None,
        valid & ~served,
    )


def _fixed(layout: Struct, content: bytes) -> tuple[int, ...]:
    if len(content) < layout.size:
        raise Malformed(f"a request with {len(content)} bytes where {layout.size} belong")
    fields: tuple[int, ...] = layout.unpack_from(content)
    return fields


def _rest(layout: Struct, content: bytes, size: int) -> bytes:
    rest = content[layout.size :]
    if len(rest) != size:
        raise Malformed(f"a request with {len(rest)} bytes of data says {size}")
    return rest
