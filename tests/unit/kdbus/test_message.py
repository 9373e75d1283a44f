"""Messages: what a sender may not send, and that a receiver finds in its pool what was sent."""

from __future__ import annotations

import struct

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kbusd.kdbus import abi, bloom, commands, items, layout, match, message, metadata
from kbusd.kdbus.errors import Errno
from kbusd.kdbus.mailbox import Mailbox
from kbusd.kdbus.message import Header, Memfd, Message, Vector
from kbusd.kdbus.pool import KERNEL_USER
from kbusd.kdbus.scan import scan
from tests.unit.kdbus.refused import refused
from tests.unit.kdbus.world import Memory

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
    return read(items.command(fixed, chain), sync)


def read(data: bytes, sync: bool = False) -> Message:
    """As the general code reads it; what the quick one reads must be the same."""
    quick = None if sync else scan(data, ME)
    try:
        general = message.examine(commands.parse_message(data), sync, ME, 8)
    except Errno:
        assert quick is None
        raise
    assert quick in (None, general)
    return general


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


# -- notifications ---------------------------------------------------------------------------


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
    memory = Memory(4096)
    fields = msgspec.structs.astuple(notice[0])
    Mailbox(4096, memory).place(fields, (), 0, None, notice[1], attached, KERNEL_USER, True)
    head = bytes(memory.buffer)
    size, *fields = layout.MESSAGE.unpack_from(head)
    assert fields == [flags, 0, dst, abi.SRC_ID_KERNEL, abi.PAYLOAD_KERNEL, 0, cookie]
    first, second = items.split(head[:size], layout.MESSAGE.size)
    items.validate(first)
    assert (first.type, first.data, second.type) == (type, payload, abi.ITEM_TIMESTAMP)


@given(
    st.lists(
        st.sampled_from((NAME, NAME, vec(8), vec(3, 0), vec(1 << 20), vec(16, U64_MAX - 15)))
        | st.builds(vec, st.integers(1, 1 << 22), st.integers(0, U64_MAX)),
        max_size=4,
    ),
    st.sampled_from((0, 1, 2, 3)),
    st.sampled_from((0, 9)),
    st.sampled_from((0, ME)),
    st.integers(0, 2),
    st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), max_size=2),
    st.integers(-9, 9),
)
def test_whatever_is_read_quickly_is_read_the_same_in_general(
    chain: list[bytes],
    flags: int,
    dst: int,
    src: int,
    timeout: int,
    changes: list[tuple[int, int]],
    longer: int,
) -> None:
    fixed = layout.MESSAGE.pack(0, flags, -3, dst, src, abi.PAYLOAD_DBUS, 11, timeout)
    data = bytearray(items.command(fixed, chain))
    for at, value in changes:
        data[at % len(data)] = value
    if longer > 5 or longer < -5:
        data = (data + bytes(longer)) if longer > 0 else data[:longer]
        data[:8] = u64(len(data))
    try:
        read(bytes(data))
    except Errno as error:
        assert error.errno


@pytest.mark.parametrize("flags", [0, REPLY])
@pytest.mark.parametrize(
    "chain",
    [
        (),
        (vec(10),),
        (vec(10), vec(3, 0), NAME),
        (NAME, vec(2 << 20)),
        (memfd(0, 1 << 20),),
        (vec(10), memfd(4096, 9, 5), *[memfd(0, 1)] * 15),
    ],
)
def test_most_messages_are_read_quickly(chain: tuple[bytes, ...], flags: int) -> None:
    fixed = layout.MESSAGE.pack(0, flags, -3, 9, ME, abi.PAYLOAD_DBUS, 11, 5)
    data = items.command(fixed, chain)
    assert scan(data, ME) == read(data)


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
