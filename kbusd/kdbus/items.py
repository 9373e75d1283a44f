"""Items: the typed blocks that follow the fixed part of every kdbus struct (kdbus.item(7)).

An item is a size, a type and that much payload; the next one begins at the next multiple of 8.
`split` takes what a client wrote, so it checks all that ipc/kdbus/item.c checked, and two sizes
(PIDS, DST_ID) that the kernel forgot and then read past. Payloads are copied out as bytes.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable

import msgspec

from kbusd.kdbus import abi, layout, names
from kbusd.kdbus.errors import Errno
from kbusd.kdbus.layout import align8

HEADER = layout.ITEM.size


class Item(msgspec.Struct, frozen=True):
    """One item. `offset` is where its payload begins in the bytes that it was read from."""

    type: int
    data: bytes
    offset: int = 0

    @property
    def text(self) -> str:
        """A string's characters. Any byte has one, so that what no name can be matches none."""
        return self.data[:-1].decode("latin-1")

    @property
    def number(self) -> int:
        """The payload of an item that holds one 64-bit number."""
        return int(layout.U64.unpack_from(self.data)[0])

    @property
    def name(self) -> str:
        """The item's type as the header spells it."""
        return type_name(self.type)


def type_name(type: int) -> str:
    """The name of an item type, for people."""
    return abi.ITEM_TYPES.get(type, f"item type {type:#x}")


def split(data: bytes, start: int) -> tuple[Item, ...]:
    """The items that fill `data` from `start` (a multiple of 8) to its end.

    Raises Errno: EINVAL for a size that lies. Payloads are not looked at; that is `validate`.
    """
    found = []
    at, end = start, len(data)
    while at < end:
        if end - at < HEADER:
            raise Errno(errno.EINVAL, f"{end - at} bytes at {at} are too few for an item")
        size, type = layout.ITEM.unpack_from(data, at)
        if size < HEADER or size > end - at:
            raise Errno(
                errno.EINVAL,
                f"{type_name(type)} at {at} says {size} bytes; {HEADER} to {end - at} are there",
            )
        found.append(Item(type, bytes(data[at + HEADER : at + size]), at + HEADER))
        at += align8(size)
    return tuple(found)


_SIZES = {
    abi.ITEM_PAYLOAD_VEC: layout.VECTOR.size,
    abi.ITEM_PAYLOAD_OFF: layout.VECTOR.size,
    abi.ITEM_PAYLOAD_MEMFD: layout.MEMFD.size,
    abi.ITEM_CANCEL_FD: layout.I32.size,
    abi.ITEM_BLOOM_PARAMETER: layout.BLOOM_PARAMETER.size,
    abi.ITEM_ATTACH_FLAGS_SEND: layout.U64.size,
    abi.ITEM_ATTACH_FLAGS_RECV: layout.U64.size,
    abi.ITEM_ID: layout.U64.size,
    abi.ITEM_DST_ID: layout.U64.size,
    abi.ITEM_TIMESTAMP: layout.TIMESTAMP.size,
    abi.ITEM_CREDS: layout.CREDS.size,
    abi.ITEM_PIDS: layout.PIDS.size,
    abi.ITEM_AUDIT: layout.AUDIT.size,
    abi.ITEM_POLICY_ACCESS: layout.POLICY_ACCESS.size,
    abi.ITEM_ID_ADD: layout.ID_CHANGE.size,
    abi.ITEM_ID_REMOVE: layout.ID_CHANGE.size,
    abi.ITEM_REPLY_TIMEOUT: 0,
    abi.ITEM_REPLY_DEAD: 0,
}
_LEAST = {
    abi.ITEM_BLOOM_FILTER: layout.U64.size,
    abi.ITEM_OWNED_NAME: layout.U64.size,
    abi.ITEM_CAPS: 4,
    abi.ITEM_NAME_ADD: layout.NAME_CHANGE.size,
    abi.ITEM_NAME_REMOVE: layout.NAME_CHANGE.size,
    abi.ITEM_NAME_CHANGE: layout.NAME_CHANGE.size,
}
_MULTIPLES = {abi.ITEM_NEGOTIATE: 8, abi.ITEM_FDS: 4, abi.ITEM_AUXGROUPS: 4}
_STRINGS = {
    abi.ITEM_NAME,
    abi.ITEM_DST_NAME,
    abi.ITEM_PID_COMM,
    abi.ITEM_TID_COMM,
    abi.ITEM_EXE,
    abi.ITEM_CMDLINE,
    abi.ITEM_CGROUP,
    abi.ITEM_SECLABEL,
}
_NAME_CHANGES = {abi.ITEM_NAME_ADD, abi.ITEM_NAME_REMOVE, abi.ITEM_NAME_CHANGE}
_NODE_NAMES = {abi.ITEM_MAKE_NAME, abi.ITEM_CONN_DESCRIPTION}


def validate(item: Item) -> None:
    """Raise Errno unless the payload is one that the item's type may have (item.c)."""
    size, type = len(item.data), item.type
    exact = _SIZES.get(type)
    if exact is not None and size != exact:
        raise Errno(errno.EINVAL, f"{item.name} has {size} bytes, not {exact}")
    if size < _LEAST.get(type, 0):
        raise Errno(errno.EINVAL, f"{item.name} has {size} bytes, fewer than {_LEAST[type]}")
    if size % _MULTIPLES.get(type, 1):
        raise Errno(errno.EINVAL, f"{item.name} has {size} bytes, no multiple of its elements")
    if type in _STRINGS:
        _check_string(item, item.data)
    elif type in _NODE_NAMES:
        _check_node_name(item)
    elif type in _NAME_CHANGES and size > layout.NAME_CHANGE.size:
        _check_string(item, item.data[layout.NAME_CHANGE.size :])
    elif type == abi.ITEM_PAYLOAD_VEC or type == abi.ITEM_PAYLOAD_OFF:
        if layout.VECTOR.unpack(item.data)[0] == 0:
            raise Errno(errno.EINVAL, f"{item.name} is a vector of 0 bytes")
    elif type == abi.ITEM_PAYLOAD_MEMFD:
        _, length, fd, _ = layout.MEMFD.unpack(item.data)
        if length == 0:
            raise Errno(errno.EINVAL, "PAYLOAD_MEMFD is a segment of 0 bytes")
        if fd < 0:
            raise Errno(errno.EBADF, f"PAYLOAD_MEMFD has the descriptor {fd}")


def _check_string(item: Item, text: bytes) -> None:
    if not text or text.find(0) != len(text) - 1:
        raise Errno(errno.EINVAL, f"{item.name} is no string that ends with its only zero byte")


def _check_node_name(item: Item) -> None:
    if len(item.data) < 2:
        raise Errno(errno.EINVAL, f"{item.name} is empty")
    if len(item.data) > abi.MAX_NODE_NAME_LENGTH + 1:
        raise Errno(
            errno.ENAMETOOLONG,
            f"{item.name} has {len(item.data) - 1} bytes, more than {abi.MAX_NODE_NAME_LENGTH}",
        )
    _check_string(item, item.data)
    if not names.is_node_name(item.text):
        raise Errno(errno.EINVAL, f"{item.name} {item.text!r} has characters that no node may have")


def build(type: int, data: bytes) -> bytes:
    """An item, padded to a multiple of 8 bytes."""
    padding = -len(data) % 8
    return layout.ITEM.pack(HEADER + len(data), type) + data + bytes(padding)


def string(type: int, text: str | bytes) -> bytes:
    """An item whose payload is a string, padded; `text` has no zero byte."""
    data = text.encode("latin-1") if isinstance(text, str) else text
    return build(type, data + b"\0")


def command(fixed: bytes, items: Iterable[bytes] = ()) -> bytes:
    """A command or message: its fixed part, the size in it set to that of the whole, and items."""
    body = b"".join(items)
    return layout.U64.pack(len(fixed) + len(body)) + fixed[8:] + body
