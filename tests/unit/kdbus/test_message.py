"""Messages: what a sender may not send, and that a receiver finds in its pool what was sent."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kbusd.kdbus import abi, bloom, commands, items, layout, match, message, metadata
from kbusd.kdbus.errors import Errno
from kbusd.kdbus.message import Header, Memfd, Message, Part, Placed, Vector
from tests.unit.kdbus.refused import refused

BROADCAST = abi.DST_ID_BROADCAST
U64_MAX = (1 << 64) - 1
ME = 7


def u64(*numbers: int) -> bytes:
    return struct.pack(f"={len(numbers)}Q", *numbers)


def sent(
    *chain: bytes,
    flags: int = 0,
    dst: int = 9,
    src: int = 0,
    type: int = abi.PAYLOAD_DBUS,
    timeout: int = 0,
    sync: bool = False,
) -> Message:
    fixed = layout.MESSAGE.pack(0, flags, -3, dst, src, type, 11, timeout)
    parsed = commands.parse_message(items.command(fixed, chain))
    return message.examine(parsed, sync, ME, 8)


def vec(size: int, address: int = 0x1000) -> bytes:
    return items.build(abi.ITEM_PAYLOAD_VEC, u64(size, address))


def memfd(start: int, size: int, fd: int = 3) -> bytes:
    return items.build(abi.ITEM_PAYLOAD_MEMFD, struct.pack("=QQiI", start, size, fd, 0))


def fds(*numbers: int) -> bytes:
    return items.build(abi.ITEM_FDS, struct.pack(f"={len(numbers)}i", *numbers))


NAME = items.string(abi.ITEM_DST_NAME, "a.b")
FILTER = items.build(abi.ITEM_BLOOM_FILTER, u64(0, 1))
SIGNAL, REPLY = abi.MSG_SIGNAL, abi.MSG_EXPECT_REPLY


def test_what_is_sent() -> None:
    found = sent(vec(10), vec(3, 0), memfd(4096, 9, 5), fds(4, 6), NAME, timeout=99, src=ME)
    assert found == Message(
        Header(0, -3, 9, ME, abi.PAYLOAD_DBUS, 11, 99),
        (Vector(10, 0x1000), Vector(3, 0), Memfd(4096, 9, 5)),
        (4, 6),
        None,
        "a.b",
    )
    assert sent(FILTER, flags=SIGNAL, dst=BROADCAST).filter == bloom.Filter(0, u64(1))
    assert sent().header.src_id == ME
    assert sent(flags=REPLY, timeout=1, sync=True).header.reply_or_timeout == 1
    assert sent(vec(2 << 20)).parts == (Vector(2 << 20, 0x1000),)
    assert len(sent(*[memfd(0, 1)] * 16).parts) == 16
    assert len(sent(fds(*range(16))).fds) == 16
    assert sent(NAME, dst=abi.DST_ID_NAME).dst_name == "a.b"


@pytest.mark.parametrize(
    ("chain", "header", "errno"),
    [
        ((), {"src": 8}, "EINVAL"),
        ((), {"type": abi.PAYLOAD_KERNEL}, "EINVAL"),
        ((), {"dst": BROADCAST}, "EBADMSG"),
        ((FILTER,), {"dst": BROADCAST, "flags": SIGNAL, "timeout": 1}, "ENOTUNIQ"),
        ((), {"flags": REPLY}, "EINVAL"),
        ((FILTER,), {"flags": REPLY | SIGNAL, "timeout": 1}, "ENOTUNIQ"),
        ((), {"sync": True}, "EINVAL"),
        ((FILTER,), {"flags": SIGNAL, "timeout": 1}, "EINVAL"),
        ((vec((2 << 20) + 1),), {}, "EMSGSIZE"),
        ((vec(1 << 20), vec(1 << 20), vec(1)), {}, "EMSGSIZE"),
        ((vec(U64_MAX), vec(2)), {}, "EMSGSIZE"),
        ((vec(16, U64_MAX - 7),), {}, "EFAULT"),
        ((memfd(U64_MAX, 1),), {}, "EMSGSIZE"),
        ((memfd(0, 1),) * 17, {}, "E2BIG"),
        ((fds(*range(17)),), {}, "EMFILE"),
        ((fds(*range(253)),), {}, "EMFILE"),
        ((fds(3, -1),), {}, "EBADF"),
        ((fds(1), fds(2)), {}, "EINVAL"),
        ((FILTER, FILTER), {"flags": SIGNAL}, "EINVAL"),
        ((items.build(abi.ITEM_BLOOM_FILTER, u64(0, 1, 2)),), {"flags": SIGNAL}, "EDOM"),
        ((items.build(abi.ITEM_BLOOM_FILTER, u64(0) + b"x"),), {"flags": SIGNAL}, "EFAULT"),
        ((items.string(abi.ITEM_DST_NAME, "foo"),), {}, "EINVAL"),
        ((FILTER, NAME), {"dst": BROADCAST, "flags": SIGNAL}, "EBADMSG"),
        ((), {"flags": SIGNAL}, "EBADMSG"),
        ((FILTER,), {}, "EBADMSG"),
        ((), {"dst": abi.DST_ID_NAME}, "EDESTADDRREQ"),
        ((FILTER, fds(3)), {"dst": BROADCAST, "flags": SIGNAL}, "ENOTUNIQ"),
        ((items.build(abi.ITEM_NEGOTIATE, b""),), {}, "EINVAL"),
        ((items.build(abi.ITEM_PAYLOAD_OFF, u64(1, 1)),), {}, "EINVAL"),
        ((items.build(abi.ITEM_CREDS, bytes(64)),), {}, "EINVAL"),
        ((vec(1),) * 1400, {}, "EMSGSIZE"),
    ],
)
def test_refusals(chain: tuple[bytes, ...], header: dict[str, int], errno: str) -> None:
    with refused(errno):
        if len(chain) > 1000:
            size = layout.MESSAGE.size + sum(map(len, chain))
            commands.total_size(commands.MESSAGE, 0, u64(size))
        sent(*chain, **header)  # type: ignore[arg-type]


@given(
    st.lists(
        st.builds(
            items.build,
            st.sampled_from(sorted(commands.MESSAGE.once | commands.MESSAGE.many)),
            st.binary(min_size=8, max_size=32)
            | st.lists(st.sampled_from((0, 1, 8, 1 << 20, U64_MAX)), min_size=1, max_size=3).map(
                lambda numbers: u64(*numbers)
            ),
        )
        | st.sampled_from((NAME, FILTER, vec(8), memfd(0, 8), fds(0))),
        max_size=5,
    ),
    st.sampled_from((0, SIGNAL, REPLY)),
    st.sampled_from((0, 9, BROADCAST)),
    st.sampled_from((0, 1)),
)
def test_hostile_messages_raise_errno_only(
    chain: list[bytes], flags: int, dst: int, timeout: int
) -> None:
    try:
        sent(*chain, flags=flags, dst=dst, timeout=timeout)
    except Errno as error:
        assert error.errno and error.text


# -- in a pool -------------------------------------------------------------------------------

HEADER = Header(0, 0, 9, ME, abi.PAYLOAD_DBUS, 11, 0)
PARTS = st.lists(
    st.builds(Vector, st.integers(1, 50), st.sampled_from((0, 0x1000)))
    | st.builds(Memfd, st.integers(0, 9), st.integers(1, 50), st.just(3)),
    max_size=6,
)


def received(placed: Placed, parts: list[Part]) -> bytes:
    """The slice after all has been written, each vector with bytes of its own number."""
    slice = bytearray(b"\xee" * placed.size)
    slice[: len(placed.head)] = placed.head
    slice[len(placed.head) :] = bytes(placed.size - len(placed.head))
    real = [part for part in parts if isinstance(part, Vector) and part.address]
    assert len(real) == len(placed.vectors)
    for number, (part, at) in enumerate(zip(real, placed.vectors, strict=True), 1):
        assert not any(slice[at : at + part.size]), "vectors overlap"
        assert at >= len(placed.head) and at + part.size <= placed.size
        slice[at : at + part.size] = bytes([number]) * part.size
    return bytes(slice)


@given(PARTS, st.integers(0, 3), st.sampled_from((None, "a.b")), st.binary(max_size=20))
def test_a_receiver_finds_what_was_sent(
    parts: list[Part], fds: int, dst_name: str | None, description: bytes
) -> None:
    attached = items.build(abi.ITEM_CONN_DESCRIPTION, description)
    placed = message.place(HEADER, parts, fds, dst_name, attached=attached)
    slice = received(placed, parts)
    size, *fields = layout.MESSAGE.unpack_from(slice)
    assert Header(*fields) == HEADER
    assert placed.size % 8 == 0 and size == len(placed.head)
    chain = list(items.split(slice[:size], layout.MESSAGE.size))
    assert chain.pop().data == description
    number = position = 0
    for part in parts:
        item = chain.pop(0)
        if isinstance(part, Memfd):
            assert item.type == abi.ITEM_PAYLOAD_MEMFD
            assert layout.MEMFD.unpack(item.data) == (part.start, part.size, -1, 0)
            assert item.offset + 16 in placed.memfds_at
        else:
            length, offset = layout.VECTOR.unpack(item.data)
            assert (item.type, length) == (abi.ITEM_PAYLOAD_OFF, part.size)
            if part.address:
                number += 1
                assert slice[offset : offset + length] == bytes([number]) * length
                assert offset % 8 == position % 8
            else:
                assert offset == abi.NO_OFFSET
        position += part.size
    if fds:
        item = chain.pop(0)
        assert (item.type, item.data) == (abi.ITEM_FDS, b"\xff" * 4 * fds)
        assert placed.fds_at == item.offset
    assert [item.text for item in chain] == ([dst_name] if dst_name else [])


def test_nothing_but_a_head() -> None:
    placed = message.place(HEADER)
    assert (placed.size, len(placed.head), placed.vectors) == (64, 64, ())


@pytest.mark.parametrize(
    ("notice", "flags", "dst", "cookie", "type", "payload"),
    [
        (
            message.announce_id(match.IdChange(abi.ITEM_ID_ADD, 5), 1),
            SIGNAL,
            BROADCAST,
            0,
            abi.ITEM_ID_ADD,
            u64(5, 1),
        ),
        (
            message.announce_name(match.NameChange(abi.ITEM_NAME_CHANGE, "a.b", 5, 6), 1, 2),
            SIGNAL,
            BROADCAST,
            0,
            abi.ITEM_NAME_CHANGE,
            u64(5, 1, 6, 2) + b"a.b\0",
        ),
        (
            message.announce_no_reply(abi.ITEM_REPLY_TIMEOUT, 7, 11),
            0,
            7,
            11,
            abi.ITEM_REPLY_TIMEOUT,
            b"",
        ),
    ],
)
def test_notifications(
    notice: tuple[Header, bytes], flags: int, dst: int, cookie: int, type: int, payload: bytes
) -> None:
    stamp = metadata.Metadata(timestamp=metadata.Timestamp(1, 2, 3))
    attached = metadata.build_items(stamp, abi.ATTACH_TIMESTAMP)
    head = message.place(notice[0], notice=notice[1], attached=attached).head
    size, *fields = layout.MESSAGE.unpack_from(head)
    assert fields == [flags, 0, dst, abi.SRC_ID_KERNEL, abi.PAYLOAD_KERNEL, 0, cookie]
    first, second = items.split(head[:size], layout.MESSAGE.size)
    items.validate(first)
    assert (first.type, first.data, second.type) == (type, payload, abi.ITEM_TIMESTAMP)


def infos(data: bytes) -> list[tuple[int, int, list[tuple[int, bytes]]]]:
    found = []
    while data:
        size, id, flags = layout.INFO.unpack_from(data)
        assert size % 8 == 0
        chain = items.split(data[:size], layout.INFO.size)
        found.append((id, flags, [(item.type, item.data) for item in chain]))
        data = data[size:]
    return found


def test_infos() -> None:
    description = items.string(abi.ITEM_CONN_DESCRIPTION, "me")
    assert infos(message.info(5, 1, description)) == [
        (5, 1, [(abi.ITEM_CONN_DESCRIPTION, b"me\0")])
    ]
    assert infos(message.bus_info(5, 1, "0-x", description)) == [
        (5, 1, [(abi.ITEM_MAKE_NAME, b"0-x\0"), (abi.ITEM_CONN_DESCRIPTION, b"me\0")])
    ]


def test_lists() -> None:
    def name(text: str, flags: int) -> metadata.OwnedName:
        return metadata.OwnedName(text, flags)

    connections = [
        message.Listed(1, 0, (name("a.b", abi.NAME_PRIMARY), name("c.d", abi.NAME_IN_QUEUE))),
        message.Listed(2, 0),
        message.Listed(3, abi.HELLO_ACTIVATOR, (name("e.f", abi.NAME_ACTIVATOR),)),
        message.Listed(4, abi.HELLO_MONITOR),
    ]

    def listed(flags: int) -> list[tuple[int, str]]:
        return [
            (id, chain[0][1][8:-1].decode() if chain else "")
            for id, _, chain in infos(message.name_list(connections, flags))
        ]

    assert listed(0) == []
    assert listed(abi.LIST_UNIQUE) == [(1, ""), (2, "")]  # activators only if asked for
    assert listed(abi.LIST_NAMES) == [(1, "a.b")]
    assert listed(abi.LIST_QUEUED) == [(1, "c.d")]
    assert listed(abi.LIST_ACTIVATORS) == [(3, "e.f")]
    assert listed(15) == [(1, "a.b"), (1, "c.d"), (2, ""), (3, "e.f")]
    assert listed(abi.LIST_UNIQUE | abi.LIST_NAMES) == [(1, "a.b"), (2, "")]
