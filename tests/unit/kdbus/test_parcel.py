"""Parcels: what a sender's worker packs comes out the same, and nothing that a hostile one says harms."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kbusd.kdbus import abi, parcel
from kbusd.kdbus.errors import Errno
from kbusd.kdbus.parcel import BYTES, MEMFD, ZEROES, About, Parcel, ParcelError
from tests.unit.kdbus.world import FILTER, World, bits

NUMBERS = st.integers(-(1 << 63), (1 << 64) - 1) | st.integers(-2, 20)
KINDS = st.sampled_from([BYTES, ZEROES, MEMFD, 3])
PARTS = st.lists(st.tuples(KINDS, NUMBERS, NUMBERS), max_size=3).map(tuple)
ABOUT = st.builds(
    lambda tid, comm, line: parcel.encode(About(tid, comm, comm, comm, line)),
    NUMBERS, st.none() | st.binary(max_size=20), st.none() | st.binary(max_size=20),
)  # fmt: skip
FIELDS = {
    "flags": NUMBERS | st.sampled_from([0, abi.MSG_EXPECT_REPLY, abi.MSG_SIGNAL]),
    "priority": NUMBERS,
    "dst_id": NUMBERS,
    "payload_type": NUMBERS,
    "cookie": NUMBERS,
    "reply_or_timeout": NUMBERS,
    "parts": PARTS,
    "fds": NUMBERS,
    "dst_name": st.none() | st.text(max_size=10),
    "filter": st.none() | st.tuples(NUMBERS, st.binary(max_size=16) | st.just(b"\xff" * FILTER)),
    "offered": NUMBERS,
    "sent": st.tuples(NUMBERS, NUMBERS),
    "about": st.binary(max_size=5) | ABOUT,
}
HONEST = [
    Parcel(0, 0, 1, abi.PAYLOAD_DBUS, 1, 0, ((BYTES, 5, 0), (ZEROES, 9, 0)), 0, "a.b"),
    Parcel(abi.MSG_EXPECT_REPLY, 0, 1, abi.PAYLOAD_DBUS, 1, 1 << 60, ((BYTES, 5, 0),)),
    Parcel(
        abi.MSG_SIGNAL, 0, abi.DST_ID_BROADCAST, abi.PAYLOAD_DBUS, 1, 0, ((BYTES, 5, 0),),
        filter=(0, b"\xff" * FILTER), offered=abi.ATTACH_ALL, about=parcel.encode(About(7, b"x")),
    ),
]  # fmt: skip
CHANGES = st.fixed_dictionaries({}, optional=FIELDS) | st.sampled_from(sorted(FIELDS)).flatmap(
    lambda name: st.fixed_dictionaries({name: FIELDS[name]})
)
PARCELS = st.builds(
    lambda honest, changes: msgspec.structs.replace(honest, **changes),
    st.sampled_from(HONEST),
    CHANGES,
)


EDGES = (-(1 << 63), -2, -1, 0, 1, 8, 1 << 31, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)


def variants(honest: Parcel) -> Iterator[Parcel]:
    """An honest parcel with one number in it changed, every one in turn."""
    for name in FIELDS:
        value = getattr(honest, name)
        for edge in EDGES:
            if isinstance(value, int):
                yield msgspec.structs.replace(honest, **{name: edge})
            elif name == "sent":
                yield msgspec.structs.replace(honest, sent=(edge, 1))
            elif name == "filter" and value is not None:
                yield msgspec.structs.replace(honest, filter=(edge, value[1]))
            elif name == "about":
                about = parcel.encode(About(edge, b"comm"))
                yield msgspec.structs.replace(honest, about=about)
            elif name == "parts":
                for kind in (ZEROES, MEMFD, 3):
                    yield msgspec.structs.replace(honest, parts=(*value, (kind, edge, 0)))
                    yield msgspec.structs.replace(honest, parts=(*value, (kind, 1, edge)))


def give(raw: bytes) -> None:
    """Another worker sends this to a client that wants to know everything."""
    world = World()
    a, b = world.client(recv=abi.ATTACH_ALL), world.client()
    a.add_match(bits(abi.ITEM_BLOOM_MASK, 3))
    source = a.port.find(b.id)
    assert source is not None
    with suppress(Errno, ParcelError):
        found = parcel.decode(raw, 5, 0, FILTER)
        a.session.receive(source, found, parcel.split(found, b"hello"), 1)
        assert a.recv().src_id == b.id


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60) | PARCELS.map(parcel.encode))
def test_nothing_that_another_worker_sends_does_harm(raw: bytes) -> None:
    give(raw)


@pytest.mark.parametrize("honest", HONEST, ids=["message", "call", "signal"])
def test_no_number_that_another_worker_sends_does_harm(honest: Parcel) -> None:
    for variant in variants(honest):
        give(parcel.encode(variant))


@pytest.mark.parametrize("honest", HONEST, ids=["message", "call", "signal"])
def test_an_honest_parcel_is_taken(honest: Parcel) -> None:
    world = World()
    a, b = world.client(), world.client()
    a.add_match(bits(abi.ITEM_BLOOM_MASK, 3))
    source = a.port.find(b.id)
    assert source is not None
    found = parcel.decode(parcel.encode(honest), 5, 0, FILTER)
    assert found == honest
    a.session.receive(source, found, parcel.split(found, b"hello"), 1)
    assert a.recv().payload[:5] == b"hello"


@pytest.mark.parametrize(
    ("parts", "length", "fds"),
    [
        (((BYTES, 4, 0),), 5, 0),
        (((BYTES, 5, 0), (MEMFD, 1, 0)), 5, 0),
        (((BYTES, 0, 0),), 0, 0),
        (((ZEROES, abi.MAX_PAYLOAD_SIZE, 0), (BYTES, 1, 0)), 1, 0),
        (((MEMFD, 1, (1 << 64) - 1),), 0, 1),
        (((MEMFD, 1, 0),) * 17, 0, 17),
    ],
)
def test_parts_that_are_not_what_is_there(
    parts: tuple[tuple[int, int, int], ...], length: int, fds: int
) -> None:
    raw = parcel.encode(Parcel(0, 0, 1, abi.PAYLOAD_DBUS, 1, 0, parts))
    with pytest.raises(ParcelError):
        parcel.decode(raw, length, fds, FILTER)


def test_calls_of_one_caller_that_are_owed_are_bounded() -> None:
    world = World()
    a, b = world.client(pool=1 << 20), world.client()
    source = a.port.find(b.id)
    assert source is not None
    for cookie in range(1, abi.MAX_PENDING_REPLIES + 1):
        call = Parcel(abi.MSG_EXPECT_REPLY, 0, a.id, abi.PAYLOAD_DBUS, cookie, 1 << 60)
        a.session.receive(source, call, (), 1)
        a.recv()
    with pytest.raises(Errno, match="wait for a reply"):
        a.session.receive(source, call, (), 1)
    b.session.end()
    world.client()
