"""Items: chains of them come back as they were built, and no bytes do anything but raise Errno."""

from __future__ import annotations

import struct

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kbusd.kdbus import abi, items, layout
from kbusd.kdbus.errors import Errno
from tests.unit.kdbus.refused import refused

TYPES = sorted(abi.ITEM_TYPES)
U64 = (1 << 64) - 1


@given(st.lists(st.tuples(st.integers(0, U64), st.binary(max_size=40)), max_size=6), st.booleans())
def test_a_chain_comes_back(chain: list[tuple[int, bytes]], padded: bool) -> None:
    data = b"".join(items.build(type, payload) for type, payload in chain)
    if chain and not padded:
        data = data[: len(data) - -len(chain[-1][1]) % 8]
    found = items.split(bytes(24) + data, 24)
    assert [(item.type, item.data) for item in found] == chain
    for item in found:
        assert (bytes(24) + data)[item.offset : item.offset + len(item.data)] == item.data


@given(
    st.lists(
        st.tuples(st.sampled_from((*range(64), U64, U64 - 7)), st.sampled_from(TYPES)), max_size=8
    ),
    st.binary(max_size=24),
)
@example([(U64, 1)], b"")
@example([(16, 1), (U64 - 15, 1)], b"")
def test_sizes_that_lie_raise_errno_only(heads: list[tuple[int, int]], rest: bytes) -> None:
    data = b"".join(layout.ITEM.pack(*head) for head in heads) + rest
    try:
        for item in items.split(data, 0):
            items.validate(item)
    except Errno as error:
        assert error.errno and error.text


@given(st.sampled_from(TYPES), st.binary(max_size=80))
def test_payloads_raise_errno_only(type: int, payload: bytes) -> None:
    try:
        items.validate(items.Item(type, payload))
    except Errno as error:
        assert error.errno and error.text


@pytest.mark.parametrize(
    "data",
    [
        bytes(15),  # no room for a head
        struct.pack("=2Q", 15, 1),  # smaller than its head
        struct.pack("=2Q", 17, 1),  # larger than what is there
        struct.pack("=2Q", U64, 1),
        struct.pack("=2Q", 17, 1) + b"a" + bytes(7) + struct.pack("=2Q", 0, 1),
        struct.pack("=2Q", 16, 1) + bytes(8),
    ],
)
def test_bad_sizes(data: bytes) -> None:
    with refused("EINVAL"):
        items.split(data, 0)


def vec(size: int, address: int) -> bytes:
    return struct.pack("=2Q", size, address)


def memfd(size: int, fd: int) -> bytes:
    return struct.pack("=QQiI", 0, size, fd, 0)


@pytest.mark.parametrize(
    ("type", "payload", "errno"),
    [
        (abi.ITEM_NEGOTIATE, bytes(9), "EINVAL"),
        (abi.ITEM_PAYLOAD_VEC, bytes(15), "EINVAL"),
        (abi.ITEM_PAYLOAD_VEC, vec(0, 1), "EINVAL"),
        (abi.ITEM_PAYLOAD_OFF, bytes(24), "EINVAL"),
        (abi.ITEM_PAYLOAD_MEMFD, memfd(0, 3), "EINVAL"),
        (abi.ITEM_PAYLOAD_MEMFD, memfd(1, -1), "EBADF"),
        (abi.ITEM_PAYLOAD_MEMFD, bytes(20), "EINVAL"),
        (abi.ITEM_FDS, bytes(5), "EINVAL"),
        (abi.ITEM_CANCEL_FD, bytes(8), "EINVAL"),
        (abi.ITEM_BLOOM_PARAMETER, bytes(8), "EINVAL"),
        (abi.ITEM_BLOOM_FILTER, bytes(7), "EINVAL"),
        (abi.ITEM_MAKE_NAME, b"", "EINVAL"),
        (abi.ITEM_MAKE_NAME, b"\0", "EINVAL"),
        (abi.ITEM_MAKE_NAME, b"0-a\0b\0", "EINVAL"),
        (abi.ITEM_MAKE_NAME, b"0-a", "EINVAL"),
        (abi.ITEM_MAKE_NAME, b"../x\0", "EINVAL"),
        (abi.ITEM_MAKE_NAME, b"0-a/b\0", "EINVAL"),
        (abi.ITEM_MAKE_NAME, b"0-blah@123\0", "EINVAL"),
        (abi.ITEM_MAKE_NAME, b"0-blah-\0", "EINVAL"),
        (abi.ITEM_MAKE_NAME, b"0" * 64 + b"\0", "ENAMETOOLONG"),
        (abi.ITEM_MAKE_NAME, b"a" * 4096 + b"\0", "ENAMETOOLONG"),
        (abi.ITEM_CONN_DESCRIPTION, b"two words\0", "EINVAL"),
        (abi.ITEM_ATTACH_FLAGS_SEND, bytes(4), "EINVAL"),
        (abi.ITEM_ATTACH_FLAGS_RECV, bytes(16), "EINVAL"),
        (abi.ITEM_ID, bytes(7), "EINVAL"),
        (abi.ITEM_DST_ID, bytes(7), "EINVAL"),
        (abi.ITEM_CREDS, bytes(63), "EINVAL"),
        (abi.ITEM_PIDS, bytes(8), "EINVAL"),
        (abi.ITEM_NAME, b"", "EINVAL"),
        (abi.ITEM_NAME, b"a.b", "EINVAL"),
        (abi.ITEM_SECLABEL, b"a\0b\0", "EINVAL"),
        (abi.ITEM_POLICY_ACCESS, bytes(25), "EINVAL"),
        (abi.ITEM_NAME_ADD, bytes(31), "EINVAL"),
        (abi.ITEM_NAME_CHANGE, bytes(32) + b"a.b", "EINVAL"),
        (abi.ITEM_ID_ADD, bytes(8), "EINVAL"),
        (abi.ITEM_REPLY_DEAD, b"\0", "EINVAL"),
    ],
)
def test_bad_payloads(type: int, payload: bytes, errno: str) -> None:
    with refused(errno, abi.ITEM_TYPES[type]):
        items.validate(items.Item(type, payload))


@pytest.mark.parametrize(
    ("type", "payload"),
    [
        (abi.ITEM_NEGOTIATE, b""),
        (abi.ITEM_PAYLOAD_VEC, vec(1, 0)),
        (abi.ITEM_PAYLOAD_MEMFD, memfd(1, 0)),
        (abi.ITEM_FDS, b""),
        (abi.ITEM_BLOOM_FILTER, bytes(8)),
        (abi.ITEM_BLOOM_MASK, b"x"),
        (abi.ITEM_MAKE_NAME, b"1000-my_bus.1\0"),
        (abi.ITEM_MAKE_NAME, b"a" * 63 + b"\0"),
        (abi.ITEM_NAME, b"not a name \xff\0"),
        (abi.ITEM_NAME_ADD, bytes(32)),
        (abi.ITEM_NAME_ADD, bytes(32) + b"a.b\0"),
        (abi.ITEM_SECLABEL, b"\0"),
        (abi.ITEM_REPLY_DEAD, b""),
        (0x7777, b"anything"),
    ],
)
def test_good_payloads(type: int, payload: bytes) -> None:
    items.validate(items.Item(type, payload))


def test_any_byte_of_a_name_has_a_character() -> None:
    assert items.Item(abi.ITEM_NAME, bytes(range(1, 256)) + b"\0").text.encode("latin-1") == bytes(
        range(1, 256)
    )
