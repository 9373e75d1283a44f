"""Messages as a kdbus client has them: those that it received, and D-Bus messages of jeepney's.

Descriptors of a received message are its owner's: `close`, or a with statement, closes them.
"""

from __future__ import annotations

import mmap
import os
from array import array
from collections.abc import Sequence

import jeepney
from jeepney.low_level import HeaderFields, MessageType

from kbusd.kdbus import abi, attach, bloom, bloommatch, items, layout, payload
from kbusd.kdbus.items import Item
from kbusd.wire import body as wire_body
from kbusd.wire import header as wire_header


class Memfd:
    """`size` bytes from `start` in a sealed memfd. The descriptor is the message's that it came with."""

    def __init__(self, fd: int, start: int, size: int) -> None:
        self.fd, self.start, self.size = fd, start, size

    def read(self) -> bytes:
        """The bytes. Raises OSError, ValueError if the descriptor is not there (-1)."""
        page = self.start % mmap.ALLOCATIONGRANULARITY
        length, begin = self.size + page, self.start - page
        with mmap.mmap(self.fd, length, mmap.MAP_PRIVATE, mmap.PROT_READ, offset=begin) as mapped:
            return mapped[page:]


Part = bytes | Memfd


class Received:
    """A message that has come: copied out of the pool, but for what lies in memfds.

    `reply_to` is the cookie of the call that it answers; `items` are all of them, metadata too
    (kdbus.item(7)); `incomplete`: descriptors that belong to it are not here, their numbers are -1."""

    def __init__(self, pool: mmap.mmap, offset: int, numbers: Sequence[int]) -> None:
        """The message at `offset`; `numbers` are its descriptors, in order: memfds, then `fds`."""
        size: int = layout.U64.unpack_from(pool, offset)[0]
        raw = pool[offset : offset + size]
        (_, self.flags, self.priority, self.destination, self.sender, self.payload_type,
         self.cookie, reply) = layout.MESSAGE.unpack_from(raw)  # fmt: skip
        self.reply_to: int = 0 if self.flags & abi.MSG_EXPECT_REPLY else reply
        self.deadline: int = reply if self.flags & abi.MSG_EXPECT_REPLY else 0
        """CLOCK_MONOTONIC in nanoseconds, until when a reply is waited for."""
        self.items: tuple[Item, ...] = items.split(raw, layout.MESSAGE.size)
        self.parts: list[Part] = []
        self.fds: list[int] = []
        left = iter(numbers)
        for item in self.items:
            if item.type == abi.ITEM_PAYLOAD_OFF:
                length, at = layout.VECTOR.unpack(item.data)
                start = offset + at
                zeroes = at == abi.NO_OFFSET
                self.parts.append(bytes(length) if zeroes else pool[start : start + length])
            elif item.type == abi.ITEM_PAYLOAD_MEMFD:
                begin, length, _, _ = layout.MEMFD.unpack(item.data)
                self.parts.append(Memfd(next(left, -1), begin, length))
            elif item.type == abi.ITEM_FDS:
                self.fds = [next(left, -1) for _ in range(len(item.data) // 4)]
        memfds = [part.fd for part in self.parts if isinstance(part, Memfd)]
        self.incomplete = -1 in (*self.fds, *memfds)

    def __enter__(self) -> Received:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close its descriptors; those that were taken out of `fds` are not."""
        memfds = [part for part in self.parts if isinstance(part, Memfd)]
        for fd in (*self.fds, *(memfd.fd for memfd in memfds)):
            if fd >= 0:
                os.close(fd)
        self.fds = []
        for memfd in memfds:
            memfd.fd = -1

    @property
    def payload(self) -> bytes:
        """All of it, memfds read. Raises OSError, ValueError if one is not here."""
        return b"".join(part.read() if isinstance(part, Memfd) else part for part in self.parts)

    def item(self, type: int) -> Item | None:
        """The first item of a type."""
        return next((item for item in self.items if item.type == type), None)

    def dbus(self) -> jeepney.Message:
        """As a D-Bus message, from either form of the payload; its sender is who kdbus says it is. Its
        descriptors are its own from now on.

        Raises ValueError if it is none, or if descriptors are missing."""
        data = self.payload
        if self.payload_type != abi.PAYLOAD_DBUS:
            raise ValueError(f"a payload of type {self.payload_type:#x} is no D-Bus message")
        if payload.version(data) == 2:
            data = _wire(payload.read(data))
        if -1 in self.fds:
            raise ValueError("descriptors of the message are not here")
        fds = [jeepney.FileDescriptor(fd) for fd in self.fds]
        found = jeepney.Message.from_buffer(data, fds)
        self.fds = []
        if self.sender != abi.SRC_ID_KERNEL:
            found.header.fields[HeaderFields.sender] = f":1.{self.sender}"
        return found


def _wire(found: payload.Message) -> bytes:
    header = wire_header.build(
        ord("B") if found.order == "big" else ord("l"),
        found.type,
        found.flags,
        found.path,
        found.interface,
        found.member,
        found.error_name,
        found.destination,
        found.sender,
        found.signature,
        found.unix_fds,
        found.reply_cookie != 0,
        found.reply_cookie & 0xFFFFFFFF,
        found.cookie & 0xFFFFFFFF or 1,
        len(found.body),
    )
    return header + found.body


def fds_of(record: bytes, fds: list[int]) -> tuple[int, list[int]] | None:
    """What came over the attached socket: offset and descriptors of a message; None: something else."""
    if len(record) < layout.VECTOR.size + 8 or layout.U64.unpack_from(record)[0] != attach.FDS:
        return None
    offset, count = layout.VECTOR.unpack_from(record, 8)
    return offset, (fds + [-1] * count)[:count]


class Outgoing:
    """What SEND needs to know of a message of jeepney's."""

    def __init__(self, sent: jeepney.Message, cookie: int, parameter: bloom.Parameter) -> None:
        """Raises ValueError if it goes to nobody, or has more than the bus takes."""
        descriptors = array("i")
        self.data = sent.serialise(cookie, descriptors)
        self.fds = list(descriptors)
        fields = sent.header.fields
        kind: MessageType = sent.header.message_type
        self.flags = payload.kdbus_flags(kind.value, int(sent.header.flags))
        self.reply_to: int = fields.get(HeaderFields.reply_serial, 0)
        self.filter: bytes | None = None
        destination: str | None = fields.get(HeaderFields.destination)
        if destination is None and not self.flags & abi.MSG_SIGNAL:
            raise ValueError("a message without a destination, which is no signal")
        self.destination: int | str = abi.DST_ID_BROADCAST
        if destination is not None:
            id = payload.unique_id(destination)
            self.destination = destination if id is None else id
        if self.flags & abi.MSG_SIGNAL:
            head = wire_header.parse(self.data)
            arguments = wire_body.string_arguments(
                self.data[head.header_length :],
                head.signature,
                head.endian == "B",
                elements=bloommatch.MAX_ELEMENTS + 1,
            )
            bits = bloommatch.message_filter(
                parameter.size,
                parameter.n_hash,
                kind.value,
                head.interface,
                head.member,
                head.path,
                arguments,
            )
            self.filter = layout.U64.pack(0) + bits


def chain(
    parts: Sequence[tuple[int, int] | Memfd],
    fds: Sequence[int],
    name: str | None,
    filter: bytes | None,
) -> list[bytes]:
    """The items of a message to send; vectors are (address, size)."""
    found: list[bytes] = []
    for part in parts:
        if isinstance(part, Memfd):
            data = layout.MEMFD.pack(part.start, part.size, part.fd, 0)
            found.append(items.build(abi.ITEM_PAYLOAD_MEMFD, data))
        else:
            address, size = part
            found.append(items.build(abi.ITEM_PAYLOAD_VEC, layout.VECTOR.pack(size, address)))
    if fds:
        found.append(items.build(abi.ITEM_FDS, b"".join(layout.I32.pack(fd) for fd in fds)))
    if filter is not None:
        found.append(items.build(abi.ITEM_BLOOM_FILTER, filter))
    if name is not None:
        found.append(items.string(abi.ITEM_DST_NAME, name))
    return found
