"""Ring against the simplest model, a queue with limited room."""

from __future__ import annotations

from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kbusd.rings.memfd import RingError
from kbusd.rings.ring import Ring, RingReader
from kbusd.rings.status import StatusPage, StatusView
from kbusd.rings.values import Frame

SIZE = 4096


def pair(size: int = SIZE) -> tuple[Ring, RingReader, StatusPage]:
    status = StatusPage()
    slot = status.take_slot()
    ring = Ring(size)
    ring.connect(StatusView(status.fd), slot)
    return ring, RingReader(ring.fd, status, slot), status


frames = st.builds(
    Frame,
    kind=st.integers(1, 5),
    stamp=st.integers(0, 2**64 - 1),
    envelope=st.binary(max_size=300),
    body=st.one_of(st.binary(max_size=100), st.integers(0, 5000).map(bytes)),
    flags=st.integers(0, 255),
    fds=st.integers(0, 65535),
    serial=st.integers(0, 2**32 - 1),
    reply_serial=st.integers(0, 2**32 - 1),
    aux=st.integers(0, 2**64 - 1),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(frames, st.sampled_from(["read", "release", "read", "drain"]))))
def test_a_ring_is_a_queue(plan: list[Frame | str]) -> None:
    ring, reader, _ = pair()
    queue: deque[Frame] = deque()
    used = unreleased = 0
    for step in plan:
        if isinstance(step, Frame):
            length = (40 + len(step.envelope) + len(step.body) + 7) & ~7
            room = used + length <= SIZE
            assert ring.write(step) == room
            if room:
                queue.append(step)
                used += length
        elif step == "release":
            assert not reader.release()
            used -= unreleased
            unreleased = 0
        else:
            for _ in range(1000 if step == "drain" else 1):
                frame = reader.read()
                if not queue:
                    assert frame is None
                    break
                expected = queue.popleft()
                assert frame is not None
                unreleased += (40 + len(expected.envelope) + len(expected.body) + 7) & ~7
                assert frame.position == reader.position
                assert frame == Frame(**{**_fields(expected), "position": frame.position})


def _fields(frame: Frame) -> dict[str, object]:
    return {name: getattr(frame, name) for name in frame.__struct_fields__}


def test_frames_wait_for_the_reader_to_attach() -> None:
    status = StatusPage()
    slot = status.take_slot()
    ring = Ring(SIZE)
    while ring.write(Frame(1, 1, b"", bytes(472))):
        pass
    assert ring.statistics().frames == 8
    ring.connect(StatusView(status.fd), slot)
    reader = RingReader(ring.fd, status, slot)
    assert not ring.write(Frame(1, 1, b"", bytes(472)))
    assert reader.read() is not None
    reader.release()
    assert ring.write(Frame(1, 1, b"", bytes(472)))


def test_a_producer_without_room_is_seen_until_it_has_written() -> None:
    ring, reader, _ = pair()
    assert ring.write(Frame(1, 1, b"", bytes(4000)))
    assert not ring.write(Frame(1, 2, b"", bytes(4000)))
    ring.wait_for_space(True)
    assert reader.read() is not None
    assert reader.release()
    assert ring.write(Frame(1, 2, b"", bytes(4000)))
    ring.wait_for_space(False)
    assert reader.read() is not None
    assert not reader.release()


def test_a_frame_larger_than_the_ring_never_fits() -> None:
    ring, _, _ = pair()
    assert not ring.write(Frame(1, 1, b"", bytes(SIZE)))
    assert ring.write(Frame(1, 1, b"", bytes(SIZE - 40)))
    assert not ring.broken


@pytest.mark.parametrize("size", [0, 100, 4095, 12288, 1 << 30])
def test_sizes_that_are_no_ring(size: int) -> None:
    with pytest.raises(ValueError, match="a ring of"):
        Ring(size)


def test_a_slot_that_is_not_there() -> None:
    status = StatusPage()
    ring = Ring(SIZE)
    for slot in (-1, 8192, 2**31 - 1):
        with pytest.raises(RingError, match="no slot"):
            ring.connect(StatusView(status.fd), slot)


def test_statistics() -> None:
    ring, reader, _ = pair()
    ring.write(Frame(1, 1, b"", bytes(60)))
    ring.write(Frame(1, 2, b"", bytes(60)))
    reader.read()
    assert ring.statistics().used == 208
    assert ring.statistics().frames == 2
    assert reader.statistics().unread == 104
    assert reader.statistics().frames == 1
