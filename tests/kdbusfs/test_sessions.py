"""What a connection of kdbus is and may do, by kind, against a real bus."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from kbusd.kdbus import abi, items, layout
from tests.kdbusfs.test_clients import KdbusBus, fails

# Mounting takes root; where we are not, the tests run in the guest.
pytestmark = [] if os.geteuid() == 0 else [pytest.mark.guest]

LISTED = abi.LIST_NAMES | abi.LIST_QUEUED | abi.LIST_ACTIVATORS
PRIMARY, IN_QUEUE = abi.NAME_PRIMARY, abi.NAME_IN_QUEUE
NAME = "com.example.Name"


@pytest.fixture(scope="module")
def shared() -> Iterator[KdbusBus]:
    bus = KdbusBus()
    yield bus
    bus.stop()


@pytest.fixture
def bus(shared: KdbusBus) -> Iterator[KdbusBus]:
    yield shared
    shared.close_clients()


def signal_filter() -> bytes:
    """A bloom filter that no mask stands against."""
    return items.build(abi.ITEM_BLOOM_FILTER, bytes(8 + 64))


def any_name(kind: int) -> bytes:
    change = layout.NAME_CHANGE.pack(abi.MATCH_ID_ANY, 0, abi.MATCH_ID_ANY, 0)
    return items.build(kind, change)


# -- names -------------------------------------------------------------------------------------


def test_everybody_sees_who_owns_and_who_waits_and_how(bus: KdbusBus) -> None:
    a, b, d = bus.kdbus(), bus.kdbus(), bus.connect()
    assert a.acquire(NAME, abi.NAME_ALLOW_REPLACEMENT) & abi.NAME_ACQUIRED
    assert b.acquire(NAME, abi.NAME_QUEUE) & IN_QUEUE
    d.request_name(NAME)
    waiting = abi.NAME_QUEUE | IN_QUEUE
    for each in (a, b):
        assert each.entries(LISTED) == [
            (a.id, NAME, PRIMARY | abi.NAME_ALLOW_REPLACEMENT),
            (b.id, NAME, waiting),
            (int(d.name[3:]), NAME, waiting),
        ]
        assert [entry[0] for entry in each.entries(abi.LIST_NAMES)] == [a.id]
    assert a.acquire(NAME) == PRIMARY  # nothing acquired
    assert b.entries(abi.LIST_NAMES) == [(a.id, NAME, PRIMARY)]  # the new flags hold
    b.add_match(any_name(abi.ITEM_NAME_CHANGE))
    a.release(NAME)
    change = b.recv().item(abi.ITEM_NAME_CHANGE)
    assert change
    queued = PRIMARY | abi.NAME_QUEUE
    assert layout.NAME_CHANGE.unpack_from(change) == (a.id, PRIMARY, b.id, queued)
    # One that comes later learns the same from the snapshot.
    assert bus.kdbus().entries(LISTED)[0] == (b.id, NAME, queued)


def test_a_connection_hears_itself_if_its_matches_say_so(bus: KdbusBus) -> None:
    a, b = bus.kdbus(), bus.kdbus()
    for each in (a, b):
        each.add_match()
    a.send(abi.DST_ID_BROADCAST, b"to all", signal_filter(), flags=abi.MSG_SIGNAL)
    for each in (a, b):
        got = each.recv()
        assert (got.src, got.payload) == (a.id, b"to all")
        assert not each.readable()


def test_a_broadcast_has_arrived_when_send_returns(bus: KdbusBus) -> None:
    for _ in range(5):  # each is the first contact of two workers
        a, b = bus.kdbus(), bus.kdbus()
        b.add_match()
        a.send(abi.DST_ID_BROADCAST, bytes(1000), signal_filter(), flags=abi.MSG_SIGNAL)
        assert fails(b.byebye) == "EBUSY"
        assert len(b.recv().payload) == 1000
        b.byebye()


def test_a_message_tells_its_senders_parent(bus: KdbusBus) -> None:
    a, b = bus.kdbus(send=abi.ATTACH_PIDS), bus.kdbus(recv=abi.ATTACH_PIDS)
    a.send(b.id, b"")
    pids = b.recv().item(abi.ITEM_PIDS)
    assert pids
    assert layout.PIDS.unpack(pids) == (os.getpid(), os.getpid(), os.getppid())


def test_no_name_is_released_that_nobody_can_have(bus: KdbusBus) -> None:
    a = bus.kdbus()
    for name in ("com", ".com.example", "com.example.*"):
        assert fails(lambda name=name: a.release(name)) == "ESRCH"
        assert fails(lambda name=name: a.acquire(name)) == "EINVAL"
