"""Replies to the kernel's requests, and notifications that it gets unasked: from values to bytes.

Each is to be written with one write(2) to the descriptor that the request came from. A reply that the
kernel finds malformed is lost and its caller gets EIO, so what the kernel would refuse is refused here
with ValueError: it would be a mistake of ours. linux/fuse.h is the source of all layouts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import msgspec

from kbusd.cuse import abi

_ELEMENT = "[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?"
MAX_PATH = 255
# Requests that nobody waits for, as RELEASE, which the kernel has on the way at a time. It keeps back those above,
# which is not to happen: what their process asks next would come first.
_BACKGROUND = 0xFFFF
_NODE = re.compile(f"{_ELEMENT}(?:/{_ELEMENT})*")


class Attributes(msgspec.Struct, frozen=True):
    """What stat(2) says of a node; `mode` includes the type. `size` is in bytes."""

    node: int
    mode: int
    uid: int
    gid: int
    size: int = 0
    links: int = 1


class Entry(msgspec.Struct, frozen=True):
    """An entry of a directory. `offset` is where the next READDIR begins; `type` as in the mode."""

    node: int
    name: bytes
    mode: int
    offset: int


# -- any request -----------------------------------------------------------------------------


def reply(unique: int, data: bytes = b"") -> bytes:
    """Success, with what the request's kind of reply consists of."""
    return abi.OUT_HEADER.pack(abi.OUT_HEADER.size + len(data), 0, unique) + data


def failure(unique: int, errno: int) -> bytes:
    """The caller gets `errno` (positive, below 512)."""
    if not 0 < errno < abi.ERESTARTSYS:
        raise ValueError(f"errno {errno} can't be told to the kernel")
    return abi.OUT_HEADER.pack(abi.OUT_HEADER.size, -errno, unique)


# -- beginning -------------------------------------------------------------------------------


def init(unique: int, kernel_flags: int, max_readahead: int, max_write: int) -> bytes:
    """INIT: what we want of what the kernel has. `max_write` is in bytes, whole pages.

    From then on a read(2) with room for less than `max_write` and 80 bytes fails with EINVAL.
    """
    flags = kernel_flags & (abi.ASYNC_READ | abi.BIG_WRITES | abi.MAX_PAGES)
    pages = -(-max_write // 4096) if flags & abi.MAX_PAGES else 0
    return reply(
        unique,
        abi.INIT_OUT.pack(
            abi.MAJOR,
            abi.MINOR,
            max_readahead,
            flags,
            _BACKGROUND,
            _BACKGROUND,
            max_write,
            1,
            pages,
            0,
            0,
        ),
    )


def cuse_init(unique: int, path: str, major: int = 0, minor: int = 0) -> bytes:
    """CUSE_INIT: makes the device node /dev/`path`. Major and minor 0 let the kernel choose.

    The kernel takes any path; ours are names of nodes between "/", which sysfs can hold as one name.
    """
    if not _NODE.fullmatch(path) or len(path) > MAX_PATH:
        raise ValueError(f"{path!r} is no path of a device node")
    fixed = abi.CUSE_INIT_OUT.pack(
        abi.MAJOR,
        abi.MINOR,
        0,
        abi.CUSE_UNRESTRICTED_IOCTL,
        abi.MAX_TRANSFER,
        abi.MAX_TRANSFER,
        major,
        minor,
    )
    return reply(unique, fixed + f"DEVNAME={path}\0".encode())


# -- nodes -----------------------------------------------------------------------------------


def entry(unique: int, attributes: Attributes, generation: int, valid: int = 0) -> bytes:
    """LOOKUP: the node of that name. `valid`: seconds for which the kernel need not ask again."""
    head = abi.ENTRY_OUT.pack(attributes.node, generation, valid, valid, 0, 0)
    return reply(unique, head + _attributes(attributes))


def attributes(unique: int, attributes: Attributes, valid: int = 0) -> bytes:
    """GETATTR and SETATTR."""
    return reply(unique, abi.ATTR_OUT.pack(valid, 0, 0) + _attributes(attributes))


def _attributes(of: Attributes) -> bytes:
    return abi.ATTR.pack(
        of.node, of.size, -(-of.size // 512), 0, 0, 0,
        0, 0, 0, of.mode, of.links, of.uid, of.gid, 0, 4096, 0,
    )  # fmt: skip


def statfs(unique: int, files: int) -> bytes:
    """STATFS: a file system without blocks, with this many nodes."""
    return reply(unique, abi.STATFS_OUT.pack(0, 0, 0, files, 0, 4096, 255, 4096, 0))


def opened(unique: int, handle: int, flags: int) -> bytes:
    """OPEN and OPENDIR: the handle that requests will bring, and FOPEN flags."""
    return reply(unique, abi.OPEN_OUT.pack(handle, flags, 0))


def written(unique: int, size: int) -> bytes:
    """WRITE: how many bytes were taken."""
    return reply(unique, abi.WRITE_OUT.pack(size, 0))


def directory(unique: int, entries: Iterable[Entry], size: int) -> bytes:
    """READDIR: the first of these entries, as many as fit into `size` bytes."""
    parts: list[bytes] = []
    left = size
    for each in entries:
        part = abi.DIRENT.pack(each.node, each.offset, len(each.name), each.mode >> 12) + each.name
        part += bytes(-len(part) % 8)
        left -= len(part)
        if left < 0:
            break
        parts.append(part)
    return reply(unique, b"".join(parts))


# -- ioctl and poll --------------------------------------------------------------------------


def ioctl(unique: int, result: int, data: bytes = b"") -> bytes:
    """IOCTL: what ioctl(2) returns (or a negative errno), and the bytes for the caller's memory.

    -ERESTARTSYS is for an interrupted one, and only for that.
    """
    return reply(unique, abi.IOCTL_OUT.pack(result, 0, 0, 0) + data)


def ioctl_retry(
    unique: int, fetch: Sequence[tuple[int, int]], store: Sequence[tuple[int, int]]
) -> bytes:
    """IOCTL, unrestricted: ask again with the caller's memory at `fetch`, to be written at `store`.

    Both are (address, bytes). The next request has what was fetched as its data, and the next
    answer's data goes to `store`.
    """
    if len(fetch) + len(store) > abi.MAX_IOVECS:
        raise ValueError(f"{len(fetch) + len(store)} vectors, more than {abi.MAX_IOVECS}")
    for vectors in (fetch, store):
        if sum(size for _, size in vectors) > abi.MAX_TRANSFER:
            raise ValueError(f"vectors of more than {abi.MAX_TRANSFER} bytes")
    head = abi.IOCTL_OUT.pack(0, abi.IOCTL_RETRY, len(fetch), len(store))
    return reply(unique, head + b"".join(abi.IOCTL_IOVEC.pack(*each) for each in (*fetch, *store)))


def poll(unique: int, events: int) -> bytes:
    """POLL: which poll(2) events hold now."""
    return reply(unique, abi.POLL_OUT.pack(events, 0))


# -- notifications ---------------------------------------------------------------------------


def _notify(code: int, data: bytes) -> bytes:
    return abi.OUT_HEADER.pack(abi.OUT_HEADER.size + len(data), code, 0) + data


def wake(kernel_handle: int) -> bytes:
    """Whoever polls with this handle is to ask again."""
    return _notify(abi.NOTIFY_POLL, abi.NOTIFY_POLL_OUT.pack(kernel_handle))


def store(node: int, offset: int, data: bytes) -> bytes:
    """Put bytes into the page cache of a node.

    Blocks while a page of them is being read: whoever writes this must not be who answers READ.
    """
    return _notify(abi.NOTIFY_STORE, abi.NOTIFY_STORE_OUT.pack(node, offset, len(data), 0) + data)


def forget_pages(node: int, offset: int = 0, size: int = 0) -> bytes:
    """Drop a node's attributes and pages from the cache; size 0 is to the end, offset -1 no pages."""
    return _notify(abi.NOTIFY_INVAL_INODE, abi.NOTIFY_INVAL_INODE_OUT.pack(node, offset, size))


def forget_entry(parent: int, name: bytes) -> bytes:
    """Drop a name from the cache: it is not there any more, or means another node."""
    head = abi.NOTIFY_INVAL_ENTRY_OUT.pack(parent, len(name), 0)
    return _notify(abi.NOTIFY_INVAL_ENTRY, head + name + b"\0")
