"""The bulk area: space against a model, and peers that lie about it."""

from __future__ import annotations

import fcntl
import mmap
import os
import random
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kbusd.rings import memfd
from kbusd.rings.bulk import Bulk, BulkView
from kbusd.rings.memfd import RingError
from kbusd.rings.status import StatusPage, StatusView
from tests.bus.procs import eventually
from tests.kdbusfs.test_device import Unanswered
from tests.unit import carriers

FRESH = 1 << 63
SIZE = 4 << 20
MOST = 2 << 20
LARGE = 16 << 20


class Pair:
    """Sender and receiver in one process, in the receiver's slot 3."""

    def __init__(self, large: bool = False) -> None:
        self.page = StatusPage()
        slots = [self.page.take_slot() for _ in range(4)]
        self.view = BulkView(self.page, slots[3])
        self.bulk = Bulk(StatusView(self.page.fileno()), slots[3])
        self.bulk.make(large)

    def send(self, body: bytes) -> int | None:
        aux = self.bulk.put(body)
        if aux is not None and aux & FRESH:
            self.view.map(self.bulk.fd)
        return aux

    def claim(self, count: int) -> None:
        """What a hostile receiver says of how much it is done with."""
        self.page.publish_bulk(3, count)


@pytest.fixture
def pair() -> Iterator[Pair]:
    yield Pair()


def pipes() -> int:
    """How many ends of pipes we have."""
    count = 0
    for each in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # what listed them
            count += os.readlink(f"/proc/self/fd/{each}").startswith("pipe:")
    return count


def where(aux: int) -> tuple[int, int]:
    return (aux & ~FRESH) >> 32, aux & 0xFFFFFFFF


sizes = st.one_of(st.integers(1, MOST), st.integers(1, 300), st.just(MOST), st.just(SIZE // 3))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.one_of(st.tuples(st.just("send"), sizes), st.tuples(st.just("read"), st.just(0))))
)
def test_bodies_arrive_in_order_and_never_overlap(steps: list[tuple[str, int]]) -> None:
    pair = Pair()
    waiting: list[tuple[int, bytes]] = []
    for number, (step, size) in enumerate(steps):
        if step == "read":
            if waiting:
                aux, body = waiting.pop(0)
                assert pair.view.read(aux) == body
            continue
        body = bytes([number % 251]) * size
        aux = pair.send(body)
        if aux is None:
            # Of what is in use, a body is at most a half: with nothing in use there is room.
            assert waiting
            continue
        at, length = where(aux)
        assert length == size and at + size <= SIZE
        for other, _ in waiting:
            begin, taken = where(other)
            assert at + size <= begin or begin + taken <= at
        waiting.append((aux, body))
    for aux, body in waiting:
        assert pair.view.read(aux) == body
    assert pair.bulk.put(b"x" * MOST) is not None


def test_question_and_answer_use_the_same_pages(pair: Pair) -> None:
    for _ in range(10):
        aux = pair.send(b"x" * 1_000_000)
        assert aux is not None and where(aux)[0] == 0
        pair.view.read(aux)


def test_two_of_the_longest_fit_and_no_longer_one_does(pair: Pair) -> None:
    assert pair.send(b"x" * (MOST + 1)) is None
    assert pair.send(b"") is None
    first = pair.send(b"a" * MOST)
    second = pair.send(b"b" * MOST)
    assert first is not None and second is not None
    assert pair.send(b"c") is None
    assert pair.view.read(first) == b"a" * MOST
    third = pair.send(b"c" * MOST)
    assert third is not None and where(third)[0] == 0
    assert pair.view.read(second) == b"b" * MOST
    assert pair.view.read(third) == b"c" * MOST


def test_a_large_area_takes_one_body_of_its_size() -> None:
    pair = Pair(large=True)
    assert pair.send(b"x" * (LARGE + 1)) is None
    for body in (b"a" * LARGE, b"b" * (MOST + 1)):
        aux = pair.send(body)
        assert aux is not None and where(aux) == (0, len(body))
        assert pair.send(b"c" * LARGE) is None
        assert pair.view.read(aux) == body


def test_small_bodies_do_not_keep_a_large_area() -> None:
    pair = Pair(large=True)
    aux = pair.send(b"x" * (MOST + 1))
    assert aux is not None
    pair.view.read(aux)
    pair.bulk.rest()
    aux = pair.send(b"x" * MOST)
    assert aux is not None and pair.bulk.idle == 1
    pair.view.read(aux)
    pair.send(b"x" * (MOST + 1))
    assert pair.bulk.idle == 0


def test_a_body_out_of_bounds_of_a_large_area_is_refused() -> None:
    pair = Pair(large=True)
    assert pair.send(b"x") is not None
    for aux in (LARGE + 1, 1 << 32 | LARGE, LARGE << 32 | 1):
        with pytest.raises(RingError):
            pair.view.read(aux)


def test_no_page_exists_before_it_is_written(pair: Pair) -> None:
    assert os.fstat(pair.bulk.fd).st_blocks == 0
    aux = pair.send(b"x" * 100)
    assert aux is not None and aux & FRESH
    assert os.fstat(pair.bulk.fd).st_blocks * 512 <= 4096


def test_an_area_is_given_up_only_when_nothing_is_in_it(pair: Pair) -> None:
    aux = pair.send(b"x")
    assert aux is not None
    assert not pair.bulk.give_up()
    pair.view.read(aux)
    assert pair.bulk.give_up()
    assert pair.bulk.put(b"y") is None
    pair.bulk.make()
    aux = pair.send(b"z" * 70_000)  # a new area, and the count goes on
    assert aux is not None and aux & FRESH
    assert pair.view.read(aux) == b"z" * 70_000
    assert pair.bulk.statistics().done == 1
    again = pair.send(b"w")
    assert again is not None and where(again)[0] == 0 and not again & FRESH
    assert pair.bulk.statistics().done == 2


def test_an_area_that_was_never_told_of_is_given_up_in_silence(pair: Pair) -> None:
    assert not pair.bulk.give_up()


def test_the_area_can_not_be_made_smaller_or_mapped_writable(pair: Pair) -> None:
    fd = pair.bulk.fd
    with pytest.raises(PermissionError):
        os.ftruncate(fd, 4096)
    with pytest.raises(PermissionError):
        mmap.mmap(fd, SIZE)
    with pytest.raises(PermissionError):
        os.pwrite(fd, b"x", 0)


@pytest.mark.parametrize("count", [2, 1 << 40, 2**64 - 1])
def test_a_receiver_that_counts_what_was_not_sent_gets_no_more(pair: Pair, count: int) -> None:
    assert pair.send(b"x") is not None
    pair.claim(count)
    assert pair.bulk.put(b"y") is None
    assert pair.bulk.statistics().broken


def test_a_receiver_that_counts_backwards_gets_no_more(pair: Pair) -> None:
    for _ in range(2):
        aux = pair.send(b"x")
        assert aux is not None
        pair.view.read(aux)
    assert pair.send(b"y") is not None
    pair.claim(1)
    assert pair.bulk.put(b"z") is None
    assert pair.bulk.statistics().broken


@pytest.mark.parametrize(
    "aux",
    [
        0,
        SIZE << 32,
        SIZE << 32 | 1,
        (SIZE - 1) << 32 | 2,
        SIZE + 1,
        0xFFFFFFFF,
        0x7FFFFFFF << 32 | 0xFFFFFFFF,
        FRESH | 0x7FFFFFFF << 32 | 1,
    ],
)
def test_a_body_out_of_bounds_is_refused(pair: Pair, aux: int) -> None:
    assert pair.send(b"x") is not None
    with pytest.raises(RingError):
        pair.view.read(aux)


def test_a_body_before_any_area_is_refused() -> None:
    page = StatusPage()
    with pytest.raises(RingError):
        BulkView(page, page.take_slot()).read(1)


@pytest.mark.parametrize("size", [SIZE - 4096, LARGE + 4096, 0])
def test_an_area_of_another_size_is_refused(pair: Pair, size: int) -> None:
    fd = memfd.make("area", size)
    memfd.seal(fd)
    with pytest.raises(RingError):
        pair.view.map(fd)
    os.close(fd)


@pytest.mark.parametrize("missing", [fcntl.F_SEAL_SHRINK, fcntl.F_SEAL_GROW, 0x10])
def test_an_area_that_could_change_its_size_is_refused(pair: Pair, missing: int) -> None:
    seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | 0x10
    fd = memfd.make("area", SIZE)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals & ~missing)
    with pytest.raises(RingError):
        pair.view.map(fd)
    os.close(fd)


def test_a_descriptor_that_is_no_memfd_is_refused(pair: Pair) -> None:
    read, write = os.pipe()
    with pytest.raises(RingError):
        pair.view.map(read)
    os.close(read)
    os.close(write)


def test_the_next_user_of_a_slot_begins_at_nothing(pair: Pair) -> None:
    aux = pair.send(b"x")
    assert aux is not None
    pair.view.read(aux)
    pair.view.shut()
    later = Bulk(StatusView(pair.page.fileno()), 3)
    later.make()
    for _ in range(2):
        assert later.put(b"x" * MOST) is not None
    assert later.put(b"x") is None and not later.statistics().broken


# -- lent bodies -------------------------------------------------------------------------


def fill(pair: Pair) -> list[int]:
    """Bodies until there is no room."""
    sent = []
    while (aux := pair.send(bytes([len(sent)]) * (MOST // 2))) is not None:
        sent.append(aux)
    return sent


def test_a_lent_body_is_overwritten_only_when_it_is_given_back(pair: Pair) -> None:
    first, second, *_ = fill(pair)
    area, body = pair.view.keep(first)
    assert body == bytes([0]) * (MOST // 2)
    assert pair.view.read(second) == bytes([1]) * (MOST // 2)
    assert pair.send(b"x") is None
    pair.view.give_back(area)
    assert pair.send(b"x") is not None
    assert pair.bulk.statistics().done == 2


def test_one_body_is_lent_at_a_time(pair: Pair) -> None:
    first, second, *_ = fill(pair)
    area, _ = pair.view.keep(first)
    nothing, body = pair.view.keep(second)
    assert nothing is None and body == bytes([1]) * (MOST // 2)
    pair.view.give_back(area)
    assert pair.send(b"x") is not None


def test_what_was_lent_of_a_former_area_changes_nothing_in_the_next(pair: Pair) -> None:
    area, _ = pair.view.keep(pair.send(b"a" * 1000) or 0)
    pair.view.map(pair.bulk.fd)  # a hostile sender can do that at any time
    pair.view.read(pair.send(b"b") or 0)
    pair.send(b"c")
    pair.view.give_back(area)
    pair.send(b"d")
    assert pair.bulk.statistics().done == 2
    assert not pair.bulk.statistics().broken


# -- bodies that go by a carrier ---------------------------------------------------------------

AT = 100


class Carried(Pair):
    """With a carrier, and a client that writes what is to go by it."""

    def __init__(self, guarded: bool = True) -> None:
        self.ours, self.theirs = carriers.pair(guarded)
        self.client, self.served = socket.socketpair(
            socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK
        )
        super().__init__()
        self.bulk.give_up()
        self.bulk.make(carrier=self.ours.fileno())

    def send_carried(self, body: bytes, **how: bool) -> tuple[int, bytes, int]:
        """`aux`, what else the frame says, and how many bytes went by the carrier."""
        assert self.client.send(body[AT:]) == len(body) - AT
        aux, at, count = self.bulk.put_carried(body, AT, self.served.fileno(), **how)
        if aux & FRESH:
            self.view.map(self.bulk.fd, self.theirs.fileno())
        return aux, struct.pack("=II", at, count), count

    def close(self) -> None:
        for end in (self.ours, self.theirs, self.client, self.served):
            end.close()


@pytest.fixture
def carried() -> Iterator[Carried]:
    if not carriers.refuses_descriptors():
        pytest.skip("nothing goes by carriers: no SO_PASSRIGHTS")
    pair = Carried()
    yield pair
    pair.close()


def test_a_body_goes_by_the_carrier(carried: Carried) -> None:
    for size in (50_000, 100_000, 150_000):
        body = random.Random(size).randbytes(size)
        aux, told, count = carried.send_carried(body)
        assert count == size - AT
        assert carried.view.read_carried(aux, told) == body


@pytest.mark.parametrize("keep", [False, True])
def test_an_area_kept_the_pipe_that_its_last_body_came_by(carried: Carried, keep: bool) -> None:
    before = pipes()
    carried.send_carried(bytes(100_000), keep=keep)
    assert pipes() == before


def test_what_the_carrier_has_no_room_for_goes_by_the_area(carried: Carried) -> None:
    carried.ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16384)
    body = random.Random(0).randbytes(180_000)
    aux, told, count = carried.send_carried(body)
    assert 0 < count < len(body) - AT
    assert carried.view.read_carried(aux, told) == body


def test_a_carrier_that_nobody_empties_is_not_waited_for(carried: Carried) -> None:
    carried.ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    while True:
        try:
            carried.ours.send(bytes(4096))
        except BlockingIOError:
            break
    body = random.Random(0).randbytes(100_000)
    aux, _, count = carried.send_carried(body)
    assert count == 0
    assert carried.view.read(aux) == body


def test_what_turns_out_to_be_for_somebody_else_is_in_no_carrier(carried: Carried) -> None:
    body = random.Random(0).randbytes(100_000)
    aux, _, count = carried.send_carried(body, keep=True)
    assert count == 0
    assert carried.view.read(aux) == body
    with pytest.raises(BlockingIOError):
        carried.theirs.recv(1)


def test_while_something_is_in_use_nothing_goes_by_the_carrier(carried: Carried) -> None:
    first, second = (random.Random(seed).randbytes(90_000) for seed in range(2))
    one, told, _ = carried.send_carried(first)
    other, _, count = carried.send_carried(second)
    assert count == 0
    assert carried.view.read_carried(one, told) == first
    assert carried.view.read(other) == second


def test_less_than_announced_is_no_body(carried: Carried) -> None:
    body = random.Random(0).randbytes(100_000)
    aux, told, _ = carried.send_carried(body)
    assert len(carried.theirs.recv(10_000)) == 10_000
    assert carried.view.read_carried(aux, told) == b""


@pytest.mark.skipif(os.geteuid() != 0, reason="memory that does not come is root's to have")
@pytest.mark.parametrize("whose", ["the sender's", "the receiver's"])
def test_who_holds_an_end_all_day_holds_up_nobody_at_the_other(
    carried: Carried, whose: str
) -> None:
    """A client to which a worker gave its end, and who reads from there into memory that never comes."""
    body = random.Random(0).randbytes(100_000)
    memory = Unanswered()
    mine, other = carried.ours, carried.theirs
    if whose == "the receiver's":
        mine, other = other, mine
        other.send(bytes(10))
    else:
        sent = carried.send_carried(body)
        other.send(bytes(10))
    holder = threading.Thread(target=mine.recv_into, args=(memory.page, 10))
    holder.start()
    try:
        eventually(lambda: memory.wanted(), "it holds the lock of its end")
        if whose == "the receiver's":
            _, _, count = carried.send_carried(body)
            assert count == len(body) - AT
        else:
            assert carried.view.read_carried(sent[0], sent[1]) == body
    finally:
        memory.answer()
        holder.join()


def test_nothing_goes_by_a_carrier_by_which_descriptors_could_come() -> None:
    carried = Carried(guarded=False)
    body = random.Random(0).randbytes(100_000)
    aux, _, count = carried.send_carried(body)
    assert count == 0
    assert carried.view.read(aux) == body
    carried.close()
