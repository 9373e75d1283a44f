"""What a sender promises of the order across rings, while one of its receivers has no room.

The receivers here wait as long as it takes, so that order is all that is tested.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from kbusd.rings.clock import Clock
from kbusd.rings.fanout import Subscriber
from kbusd.rings.line import pair
from kbusd.rings.ring import Ring, RingReader
from kbusd.rings.status import StatusPage, StatusView
from kbusd.rings.values import Frame
from kbusd.workers.context import Context
from kbusd.workers.peers import Peer
from tests.bus import wireformat as w
from tests.unit.rings.worker import introduce
from tests.unit.workers.alone import Alone, alone

FULL, QUICK = 2, 3  # one that does not read its ring, and one that answers at once
RING = 262144  # bytes of the engine's rings
MESSAGE = 1  # kind of frame
LONG = 60_000_000_000  # ns
ANSWER = 4711


@pytest.fixture
def engine(context: Context) -> Iterator[Alone]:
    with alone(context, [FULL, QUICK], "interface='test.I'", stall_ns=LONG) as one:
        yield from met(one)


def met(one: Alone) -> Iterator[Alone]:
    """Both have been sent something, so that rings are there."""
    introduce(one.workers[FULL], one.workers[QUICK])
    for id in (FULL, QUICK):
        one.gather(id, [one.send(w.SIGNAL, f":1.{id}", "First")])
    yield one


def fill(engine: Alone) -> None:
    """Until fewer than 16 bytes are free in the ring to FULL."""
    size = 1_000
    while size > 0:
        before = engine.unread(FULL)
        engine.send(w.SIGNAL, f":1.{FULL}", "Fill", size)
        engine.until(lambda before=before: engine.unread(FULL) > before, "it is in the ring")
        if before == 0:
            rest = engine.unread(FULL) - size  # of a frame, without the body's content
        size = min(RING - engine.unread(FULL) - rest - 8, 60_000)
    assert RING - engine.unread(FULL) < 16


def answer_overtakes_not(engine: Alone, serial: int) -> None:
    """QUICK reacts to the signal `serial` by a message to FULL, which gets it behind the signal."""
    engine.gather(QUICK, [serial])
    engine.workers[QUICK].unicast(FULL, b"", ANSWER)
    got = engine.gather(FULL, [serial, ANSWER])
    assert got.index(serial) < got.index(ANSWER)


def test_an_answer_overtook_a_signal_that_waited_for_a_full_ring(engine: Alone) -> None:
    """By Ring to both, as it has a descriptor."""
    fill(engine)
    with open(os.devnull) as file:
        serial = engine.send(w.SIGNAL, None, "S", 20_000, (file.fileno(),))
    answer_overtakes_not(engine, serial)


def test_an_answer_overtook_a_large_signal_that_waited_for_a_full_ring(engine: Alone) -> None:
    fill(engine)
    answer_overtakes_not(engine, engine.send(w.SIGNAL, None, "S", 200_000))


def test_an_answer_overtook_a_signal_behind_a_demotion(engine: Alone) -> None:
    """16 signals fill the Broadcast. FULL has not read them and gets copies, four in a ring; behind
    the last four the MARK finds room, by which the demotion is over, but not the signal."""
    size, frames = 62_000, []
    for number in range(17):
        frames.append(engine.send(w.SIGNAL, None, "S", size))
        engine.gather(QUICK, [frames[-1]])
        if number == 0:
            engine.gather(FULL, frames)
    frames.append(engine.send(w.SIGNAL, None, "S", size))
    engine.gather(QUICK, [frames[-1]])
    engine.workers[QUICK].unicast(FULL, b"", ANSWER)
    engine.until(lambda: engine.unread(FULL) > 4 * size, "the ring is full of copies")
    assert engine.gather(FULL, [frames[-1], ANSWER]) == [*frames[1:], ANSWER]


def test_a_signal_is_not_waited_for_when_its_stall_is_over(context: Context) -> None:
    """What FULL never reads holds up nobody for longer."""
    with alone(context, [FULL, QUICK], "interface='test.I'", stall_ns=10_000_000) as one:
        for engine in met(one):
            fill(engine)
            with open(os.devnull) as file:
                serial = engine.send(w.SIGNAL, None, "S", 20_000, (file.fileno(),))
            engine.gather(QUICK, [serial])
            engine.workers[FULL].unicast(QUICK, b"", ANSWER)
            engine.gather(QUICK, [ANSWER])


def test_what_came_behind_a_message_without_room_was_forgotten_until_the_client_wrote_again(
    engine: Alone,
) -> None:
    fill(engine)
    together = b"".join(engine.message(w.SIGNAL, f":1.{FULL}", "S", 20_000) for _ in range(3))
    engine.client.sendall(together)
    engine.until(engine.has_read, "the engine has read all of them")
    serials = [engine.serial - 2, engine.serial - 1, engine.serial]
    assert engine.gather(FULL, serials)[-3:] == serials


# -- one peer ----------------------------------------------------------------------------


def peer(ring: Ring, page: StatusPage) -> tuple[Peer, RingReader]:
    """The writer's side of a ring, before the introduction is complete, and the reader's."""
    reader = RingReader(ring.fd, page, page.take_slot())
    one = Peer(2, ":1.2", None)
    one.asked(ring, 0, 1)
    return one, reader


def ready(one: Peer, reader: RingReader, page: StatusPage) -> None:
    view, (side, other) = StatusView(page.fd), pair()
    other.close()
    bell, carry = (os.open(os.devnull, os.O_WRONLY) for _ in range(2))
    one.ready(reader, view, 0, Subscriber(view, 1), bell, side, carry)


FRAME = Frame(MESSAGE, 0, b"", b"x" * 1500)


def test_room_made_before_it_was_wanted_was_not_seen_by_the_next_message() -> None:
    """A reader that made room between our look and our word that we want it rings nobody."""
    ring, page, clock = Ring(4096), StatusPage(), Clock()
    one, reader = peer(ring, page)
    ready(one, reader, page)
    assert one.write(FRAME, clock) and one.write(FRAME, clock)
    assert not one.write(FRAME, clock)
    assert ring.statistics().full == 2, "it looks once before it says so and once after"
    assert reader.read()
    assert reader.release(), "the writer waits"
    assert one.flush() == 1
    assert not reader.release()
    one.gone()


def test_room_made_before_it_was_wanted_was_not_seen_after_an_introduction() -> None:
    ring, page, clock = Ring(4096), StatusPage(), Clock()
    one, reader = peer(ring, page)
    for _ in range(3):
        assert not one.write(FRAME, clock)
    ready(one, reader, page)
    assert one.flush() == 0
    assert ring.statistics().full == 2
    assert reader.read()
    assert reader.release()
    assert one.flush() == 1
    one.gone()
