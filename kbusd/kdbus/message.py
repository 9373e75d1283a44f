"""Messages: what a sender may hand in, notifications, and lists (kdbus.message(7)).

After ipc/kdbus/message.c. How a message lies in a receiver's pool is `mailbox.py`'s.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable

import msgspec

from kbusd.kdbus import abi, bloom, items, layout, match, metadata, names
from kbusd.kdbus.commands import Parsed
from kbusd.kdbus.errors import Errno


class Header(msgspec.Struct, frozen=True):
    """The fixed part of a message. `reply_or_timeout`: the cookie that a reply is for, or until when
    one is waited for (CLOCK_MONOTONIC, nanoseconds), depending on MSG_EXPECT_REPLY."""

    flags: int
    priority: int
    dst_id: int
    src_id: int
    payload_type: int
    cookie: int
    reply_or_timeout: int


class Vector(msgspec.Struct, frozen=True):
    """`size` bytes of payload, in the sender's memory at `address`; 0 is nowhere: zeroes."""

    size: int
    address: int


class Memfd(msgspec.Struct, frozen=True):
    """`size` bytes of payload, from `start` in a memfd; `fd` is the sender's number."""

    start: int
    size: int
    fd: int


Part = Vector | Memfd


class Message(msgspec.Struct, frozen=True):
    """A message as its sender wrote it, checked. `fds` are the sender's numbers."""

    header: Header
    parts: tuple[Part, ...]
    fds: tuple[int, ...]
    filter: bloom.Filter | None
    dst_name: str | None


def examine(parsed: Parsed, sync: bool, sender: int, bloom_size: int) -> Message:
    """The message that commands.parse_message found, if the connection `sender` may send such a one.

    `sync`: by SEND with SYNC_REPLY. Descriptors are yet to be looked at. Raises Errno, in the order
    of kdbus_cmd_send and kdbus_msg_examine.
    """
    header = Header(*parsed.fixed[1:])
    if header.src_id not in (0, sender):
        raise Errno(errno.EINVAL, f"message from {header.src_id}, sent by {sender}")
    _check_header(header, sync)
    parts: list[Part] = []
    fds: tuple[int, ...] | None = None
    filter: bloom.Filter | None = None
    dst_name: str | None = None
    size = memfds = 0
    for item in parsed.items:
        match item.type:
            case abi.ITEM_PAYLOAD_VEC:
                vector = Vector(*layout.VECTOR.unpack(item.data))
                size += vector.size
                if size > abi.MAX_PAYLOAD_SIZE:
                    raise Errno(
                        errno.EMSGSIZE,
                        f"{size} bytes of payload in vectors, over {abi.MAX_PAYLOAD_SIZE}",
                    )
                if vector.address and vector.address + vector.size > 1 << 64:
                    raise Errno(errno.EFAULT, f"a vector from {vector.address:#x} wraps around")
                parts.append(vector)
            case abi.ITEM_PAYLOAD_MEMFD:
                memfd = Memfd(*layout.MEMFD.unpack(item.data)[:3])
                if memfd.start + memfd.size >= 1 << 64:
                    raise Errno(errno.EMSGSIZE, f"a memfd's segment from {memfd.start:#x} wraps")
                memfds += 1
                if memfds > abi.MAX_MEMFDS:
                    raise Errno(errno.E2BIG, f"more than {abi.MAX_MEMFDS} memfds")
                parts.append(memfd)
            case abi.ITEM_FDS:
                fds = tuple(fd for (fd,) in layout.I32.iter_unpack(item.data))
                if len(fds) > abi.MAX_FDS_PER_USER:
                    raise Errno(
                        errno.EMFILE, f"{len(fds)} descriptors, over {abi.MAX_FDS_PER_USER}"
                    )
            case abi.ITEM_BLOOM_FILTER:
                filter = bloom.parse_filter(item.data, bloom_size)
            case abi.ITEM_DST_NAME:
                dst_name = item.text
                names.check_well_known(dst_name)
                if header.dst_id == abi.DST_ID_BROADCAST:
                    raise Errno(errno.EBADMSG, f"a broadcast to {dst_name}")
            case _:
                raise Errno(errno.EINVAL, f"a message that is to be sent with {item.name}")
    if (filter is not None) != bool(header.flags & abi.MSG_SIGNAL):
        raise Errno(errno.EBADMSG, "a signal without a bloom filter, or one without a signal")
    if header.dst_id == abi.DST_ID_NAME and dst_name is None:
        raise Errno(errno.EDESTADDRREQ, "a message to neither an id nor a name")
    if header.dst_id == abi.DST_ID_BROADCAST and fds is not None:
        raise Errno(errno.ENOTUNIQ, "a broadcast with descriptors")
    for fd in fds or ():
        if fd < 0:
            raise Errno(errno.EBADF, f"descriptor {fd}")
    sent = msgspec.structs.replace(header, src_id=sender)
    return Message(sent, tuple(parts), fds or (), filter, dst_name)


def _check_header(header: Header, sync: bool) -> None:
    signal = bool(header.flags & abi.MSG_SIGNAL)
    if header.payload_type == abi.PAYLOAD_KERNEL:
        raise Errno(errno.EINVAL, "the payload type of the bus's own messages")
    if header.dst_id == abi.DST_ID_BROADCAST:
        if not signal:
            raise Errno(errno.EBADMSG, "a broadcast that is no signal")
        if header.reply_or_timeout:
            raise Errno(errno.ENOTUNIQ, "a broadcast with a timeout")
    if header.flags & abi.MSG_EXPECT_REPLY:
        if not header.reply_or_timeout or not header.cookie:
            raise Errno(errno.EINVAL, "a reply is expected without a timeout or a cookie")
        if signal:
            raise Errno(errno.ENOTUNIQ, "a reply is expected to a signal")
    elif sync:
        raise Errno(errno.EINVAL, "SEND with SYNC_REPLY, but the message expects no reply")
    elif signal and header.reply_or_timeout:
        raise Errno(errno.EINVAL, "a signal can't be a reply")


# -- notifications ---------------------------------------------------------------------------


def announce_id(what: match.IdChange, flags: int) -> tuple[Header, bytes]:
    """The header and the item of a notification to all; `flags` are the connection's HELLO flags.

    Every notification has a timestamp besides, which is for place() to attach.
    """
    data = layout.ID_CHANGE.pack(what.id, flags)
    return _notice(abi.DST_ID_BROADCAST, 0, abi.MSG_SIGNAL), items.build(what.type, data)


def announce_name(what: match.NameChange, old_flags: int, new_flags: int) -> tuple[Header, bytes]:
    """The same about a name; the flags are the NAME flags of its old and of its new owner."""
    change = layout.NAME_CHANGE.pack(what.old_id, old_flags, what.new_id, new_flags)
    data = change + (what.name or "").encode("latin-1") + b"\0"
    return _notice(abi.DST_ID_BROADCAST, 0, abi.MSG_SIGNAL), items.build(what.type, data)


def announce_no_reply(type: int, dst_id: int, cookie: int) -> tuple[Header, bytes]:
    """The same for ITEM_REPLY_TIMEOUT or ITEM_REPLY_DEAD: to `dst_id`, no reply to `cookie` comes."""
    return _notice(dst_id, cookie, 0), items.build(type, b"")


def _notice(dst_id: int, cookie: int, flags: int) -> Header:
    return Header(flags, 0, dst_id, abi.SRC_ID_KERNEL, abi.PAYLOAD_KERNEL, 0, cookie)


# -- answers that lie in a pool --------------------------------------------------------------


def info(id: int, flags: int, attached: bytes) -> bytes:
    """What CONN_INFO finds in its pool: a connection's id, its HELLO flags and padded items."""
    return layout.INFO.pack(layout.INFO.size + len(attached), id, flags) + attached


def bus_info(id: int, flags: int, name: str, attached: bytes) -> bytes:
    """What BUS_CREATOR_INFO finds: a bus's number, its MAKE flags, its name, its maker's metadata."""
    return info(id, flags, items.string(abi.ITEM_MAKE_NAME, name) + attached)


class Listed(msgspec.Struct, frozen=True):
    """A connection that may be listed: its id, its HELLO flags, the names that it owns or waits for.

    NAME flags tell those: ACTIVATOR, IN_QUEUE, else it is the owner.
    """

    id: int
    flags: int
    names: tuple[metadata.OwnedName, ...] = ()


def name_list(connections: Iterable[Listed], flags: int) -> bytes:
    """What LIST finds in its pool, for LIST flags: one info a name, or one a connection without.

    Names that the asker may not see have been left out; monitors are.
    """
    found = []
    for connection in connections:
        if connection.flags & abi.HELLO_MONITOR:
            continue
        if connection.flags & abi.HELLO_ACTIVATOR and not flags & abi.LIST_ACTIVATORS:
            continue
        shown = [name for name in connection.names if _is_listed(name.flags, flags)]
        for name in shown:
            found.append(info(connection.id, connection.flags, metadata.owned_name(name)))
        if not shown and flags & abi.LIST_UNIQUE:
            found.append(info(connection.id, connection.flags, b""))
    return b"".join(found)


def _is_listed(name: int, flags: int) -> bool:
    if name & abi.NAME_ACTIVATOR:
        return bool(flags & abi.LIST_ACTIVATORS)
    if name & abi.NAME_IN_QUEUE:
        return bool(flags & abi.LIST_QUEUED)
    return bool(flags & abi.LIST_NAMES)
