"""Broadcast: every reader gets all, or learns that it was overrun."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kbusd.rings.broadcast import Broadcast, BroadcastReader, Overrun
from kbusd.rings.values import Frame

SIZE = 4096
NOBODY = 2**64 - 1


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(st.integers(0, 1000), st.sampled_from(["a", "b"]))))
def test_a_reader_gets_all_or_knows_that_it_does_not(plan: list[int | str]) -> None:
    log = Broadcast(SIZE)
    readers = {"a": BroadcastReader(log.fd), "b": BroadcastReader(log.fd)}
    read = {"a": 0, "b": 0}
    written: list[tuple[int, bytes, int]] = []  # where it begins, body, stamp
    for step in plan:
        if isinstance(step, int):
            body = bytes([len(written) & 0xFF]) * step
            written.append((log.position, body, len(written)))
            assert log.append(2, len(written) - 1, b"env", body) == log.position
            continue
        start = written[read[step]][0] if read[step] < len(written) else log.position
        try:
            frame = readers[step].read()
        except Overrun:
            assert start + SIZE < log.position
            readers[step].seek(log.position)
            read[step] = len(written)
            continue
        assert start + SIZE >= log.position
        if frame is None:
            assert read[step] == len(written)
        else:
            _, body, stamp = written[read[step]]
            assert (frame.envelope, frame.body, frame.stamp) == (b"env", body, stamp)
            read[step] += 1


def test_what_a_reader_has_not_read_stays_while_the_limit_says_so() -> None:
    log = Broadcast(SIZE)
    reader = BroadcastReader(log.fd)
    count = 0
    while log.write(Frame(2, count + 1, b"", bytes(88)), reader.position):
        count += 1
    assert count == SIZE // 128
    for _ in range(3):
        assert reader.read() is not None
    assert log.write(Frame(2, 100, b"", bytes(88)), reader.position)
    assert [frame.stamp for frame in iter(reader.read, None)] == [*range(4, count + 1), 100]


def test_a_frame_larger_than_all_is_refused() -> None:
    log = Broadcast(SIZE)
    with pytest.raises(ValueError, match="a frame of"):
        log.append(2, 1, b"", bytes(SIZE))
    assert log.append(2, 1, b"", bytes(SIZE - 40)) == SIZE


def test_a_late_reader_begins_where_it_is_told() -> None:
    log = Broadcast(SIZE)
    log.append(2, 1, b"", b"before")
    position = log.position
    log.append(2, 2, b"", b"after")
    reader = BroadcastReader(log.fd, position)
    frame = reader.read()
    assert frame is not None
    assert frame.body == b"after"
    assert frame.position == log.position
    assert reader.read() is None


def test_statistics() -> None:
    log = Broadcast(SIZE)
    for stamp in range(50):
        log.append(2, stamp, b"", bytes(88))
    statistics = log.statistics()
    assert statistics.frames == 50
    assert statistics.tail == 50 * 128 - SIZE
