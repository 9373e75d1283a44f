"""That a receiver finds in its pool what was sent, and that RECV and FREE are what `session.py` makes of them."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kbusd.kdbus import abi, commands, items, layout
from kbusd.kdbus.errors import Errno
from kbusd.kdbus.mailbox import Entry, Mailbox
from kbusd.kdbus.message import Memfd
from tests.unit.kdbus.world import Memory

ME, USER, POOL = 7, 1001, 1 << 14
HEADER = (0, -3, 9, ME, abi.PAYLOAD_DBUS, 11, 0)
PARTS = st.lists(
    st.binary(min_size=1, max_size=50)
    | st.integers(1, 50)
    | st.builds(Memfd, st.integers(0, 9), st.integers(1, 50), st.just(3)),
    max_size=6,
)


class Pool:
    """A pool in which something else was before."""

    def __init__(self) -> None:
        self.memory = Memory(POOL)
        self.memory.buffer[:] = b"\xee" * POOL
        self.box = Mailbox(POOL, self.memory)

    def place(
        self,
        parts: list[bytes | int | Memfd],
        fds: int = 0,
        dst_name: str | None = None,
        attached: bytes = b"",
    ) -> Entry:
        return self.box.place(HEADER, parts, fds, dst_name, b"", attached, USER, True)

    def slice(self, entry: Entry) -> bytes:
        at = entry.slice.offset
        return bytes(self.memory.buffer[at : at + entry.slice.size])


@given(PARTS, st.integers(0, 3), st.sampled_from((None, "a.b", "a.bcdefg")), st.binary(max_size=20))
def test_a_receiver_finds_what_was_sent(
    parts: list[bytes | int | Memfd], fds: int, dst_name: str | None, description: bytes
) -> None:
    attached = items.build(abi.ITEM_CONN_DESCRIPTION, description)
    pool = Pool()
    first = pool.place([b"the first"])
    entry = pool.place(parts, fds, dst_name, attached)
    slice = pool.slice(entry)
    size, *fields = layout.MESSAGE.unpack_from(slice)
    assert tuple(fields) == HEADER
    assert entry.slice.size == entry.memory == len(slice) and entry.counted == fds
    assert entry.slice.offset == first.slice.size
    chain = list(items.split(slice[:size], layout.MESSAGE.size))
    assert chain.pop().data == description
    left = bytearray(slice)  # of which what is found is taken out
    position, numbers = 0, []
    for part in parts:
        item = chain.pop(0)
        if isinstance(part, Memfd):
            assert item.type == abi.ITEM_PAYLOAD_MEMFD
            assert layout.MEMFD.unpack(item.data) == (part.start, part.size, -1, 0)
            numbers.append(item.offset + 16)
            position += part.size
            continue
        length, offset = layout.VECTOR.unpack(item.data)
        assert item.type == abi.ITEM_PAYLOAD_OFF
        if isinstance(part, int):
            assert (length, offset) == (part, abi.NO_OFFSET)
            position += part
        else:
            assert slice[offset : offset + length] == part and offset >= size
            assert offset % 8 == position % 8
            left[offset : offset + length] = bytes(length)
            position += length
    if fds:
        item = chain.pop(0)
        assert (item.type, item.data) == (abi.ITEM_FDS, b"\xff" * 4 * fds)
        numbers += [item.offset + 4 * i for i in range(fds)]
    assert entry.fds_at == tuple(numbers)
    assert [item.text for item in chain] == ([dst_name] if dst_name else [])
    assert not any(left[size:]), "what others had in the pool is to be seen"
    assert items.split(slice[:size], layout.MESSAGE.size)  # and between the items
    assert set(bytes(pool.memory.buffer[entry.slice.offset + len(slice) :])) <= {0xEE}


def test_nothing_but_a_head() -> None:
    assert Pool().place([]).memory == 64


def test_what_has_no_room_is_not_counted() -> None:
    pool = Pool()
    for _ in range(2):
        with pytest.raises(Errno):
            pool.place([bytes(POOL)])
    assert pool.box.pool.statistics().used == 0
    pool.place([b"x"])


COMMANDS = st.tuples(
    st.sampled_from((64, 32, 72, 40, 8, 1 << 40)),  # what it says to be long
    st.sampled_from((0, 0, 0, 1, 2, 4, 6, abi.FLAG_NEGOTIATE, 1 << 20)),
    st.sampled_from((0, 9)),
    st.sampled_from((0, 120, 8, 1 << 63, POOL)),  # priority, or offset
    st.sampled_from((0, 0, 8, -8)),  # how much longer it is
    st.booleans(),
)


@given(st.lists(COMMANDS, max_size=12), st.integers(0, 3), st.integers(0, 2))
def test_recv_and_free_are_what_the_general_code_makes_of_them(
    steps: list[tuple[int, int, int, int, int, bool]], messages: int, lost: int
) -> None:
    """Two pools in the same state: one is asked the quick way first, the other never is."""
    quick, general = Pool(), Pool()
    for pool in (quick, general):
        for number in range(messages):
            pool.box.queue.push(pool.place([bytes([number]) * 8]), 0)
        for _ in range(lost):
            pool.box.queue.lose()
    for size, flags, returned, number, more, recv in steps:
        fixed = layout.RECV if recv else layout.FREE
        raw = struct.pack("=4Q", size, flags, returned, number).ljust(fixed.size + more, b"\0")
        did = quick.box.recv(raw) if recv else quick.box.free(raw)
        if did is None:
            continue
        number, quickly = did
        decoded = (commands.decode_recv if recv else commands.decode_free)(raw)
        value = decoded.value
        assert value is not None
        expected = decoded.pokes
        try:
            if isinstance(value, commands.Recv):
                assert (value.flags, value.priority) == (0, None)
                dropped = general.box.queue.take_lost()
                expected += commands.recv_result(*general.box.pool.empty, 0, dropped)
                ticket, entry = general.box.queue.peek()
                general.box.unqueue(ticket)
                offset, length = general.box.pool.publish(entry.slice)
                general.box.pool.release(entry.slice)
                expected = decoded.pokes + commands.recv_result(offset, length, 0, dropped)
            else:
                general.box.pool.free(value)
            assert number == 0
        except Errno as error:
            assert number == error.errno
        after = [bytearray(raw), bytearray(raw)]
        for each, stores in zip(
            after, (quickly, [(p.offset, p.data) for p in expected]), strict=True
        ):
            for at, data in stores:
                each[at : at + len(data)] = data
        assert after[0] == after[1]
        assert quick.box.pool.statistics() == general.box.pool.statistics()
        assert len(quick.box.queue) == len(general.box.queue)


@given(st.integers(1, 3), st.booleans(), st.integers(0, 1 << 40))
def test_what_is_promised_is_what_recv_and_free_would_do(
    messages: int, freed: bool, priority: int
) -> None:
    promising, other = Pool(), Pool()
    for pool in (promising, other):
        for number in range(messages):
            pool.box.queue.push(pool.place([bytes([number]) * 8]), 0)
    raw = struct.pack("=8Q", 64, 0, 99, priority, 99, 99, 99, 99)
    promised = promising.box.promise(raw)
    assert promised is not None and promising.box.promise(raw) == promised
    assert len(promising.box.queue) == messages
    done = other.box.recv(raw)
    assert done is not None and done[0] == 0
    after = bytearray(raw)
    for at, data in done[1]:
        after[at : at + len(data)] = data
    offset, size, struct_after = promised
    assert struct_after == after
    assert struct.unpack_from("=2Q", after, 40) == (offset, size)
    promising.box.received(freed)
    if freed:
        other.box.free(struct.pack("=4Q", 32, 0, 0, offset))
    assert promising.box.pool.statistics() == other.box.pool.statistics()
    assert len(promising.box.queue) == len(other.box.queue) == messages - 1
    assert not any(promising.memory.seen), "it is renewed by who keeps the promise"
    assert any(other.memory.seen)


def test_only_the_plain_case_is_promised() -> None:
    raw = struct.pack("=8Q", 64, 0, 0, 0, 0, 0, 0, 0)
    pool = Pool()
    assert pool.box.promise(raw) is None, "there is nothing"
    entry = pool.place([b"x"])
    pool.box.queue.push(entry, 0)
    assert pool.box.promise(raw) is not None
    for name, value in (("fds", [3]), ("incomplete", True), ("kept", (None, None, ()))):
        before = getattr(entry, name)
        setattr(entry, name, value)
        assert pool.box.promise(raw) is None, name
        setattr(entry, name, before)
    pool.box.queue.lose()
    assert pool.box.promise(raw) is None, "what was lost is to be told first"
