"""Parcels: what a sender's worker packs comes out the same, and nothing that a hostile one says harms."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kbusd.kdbus import abi, parcel
from kbusd.kdbus.errors import Errno
from kbusd.kdbus.parcel import BYTES, MEMFD, ZEROES, About, Parcel, ParcelError
from tests.unit.kdbus.world import FILTER, World

NUMBERS = st.integers(-(1 << 63), (1 << 64) - 1) | st.integers(-2, 20)
KINDS = st.sampled_from([BYTES, ZEROES, MEMFD, 3])
PARTS = st.lists(st.tuples(KINDS, NUMBERS, NUMBERS), max_size=3).map(tuple)
ABOUT = st.builds(
    lambda tid, comm, line: parcel.encode(About(tid, comm, comm, comm, line)),
    NUMBERS, st.none() | st.binary(max_size=20), st.none() | st.binary(max_size=20),
)  # fmt: skip
PARCELS = st.builds(
    Parcel,
    NUMBERS | st.sampled_from([0, abi.MSG_EXPECT_REPLY, abi.MSG_SIGNAL]), NUMBERS,
    NUMBERS | st.sampled_from([1, 2, abi.DST_ID_BROADCAST]), NUMBERS, NUMBERS, NUMBERS,
    PARTS | st.just(((BYTES, 5, 0),)), NUMBERS, st.none() | st.text(max_size=10) | st.just("a.b"),
    st.none() | st.tuples(NUMBERS, st.binary(min_size=FILTER, max_size=FILTER)),
    NUMBERS, st.tuples(NUMBERS, NUMBERS), st.binary(max_size=5) | ABOUT,
)  # fmt: skip


@settings(max_examples=500, deadline=None)
@given(st.lists(st.binary(max_size=60) | PARCELS.map(parcel.encode), min_size=1, max_size=5))
def test_nothing_that_another_worker_sends_does_harm(raws: list[bytes]) -> None:
    world = World()
    a, b = world.client(recv=abi.ATTACH_ALL), world.client()
    a.add_match()
    source = a.port.find(b.id)
    assert source is not None
    for raw in raws:
        try:
            found = parcel.decode(raw, 5, 0, FILTER)
            a.session.receive(source, found, parcel.split(found, b"hello"), 1)
        except (Errno, ParcelError):
            continue
    while a.session.poll() & 1:
        try:
            message = a.recv()
        except Errno:
            break
        assert message.src_id == b.id


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
