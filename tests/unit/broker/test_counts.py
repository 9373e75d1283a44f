"""Counts: what another worker knows is asked of it, and nobody waits for one that says nothing."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from kbusd.broker.connection import MAX_WAITING, Connection
from kbusd.broker.counts import ANSWER_SECONDS
from kbusd.rings import entries as e
from tests.unit.broker.world import World

COUNTED = e.Counted(0, e.Queued(1, 2, 3, 4, 5), e.Queued(6, 7, 8, 9, 10))


@pytest.fixture
def world() -> World:
    """With a, b, c on it (workers 1, 2, 3)."""
    world = World()
    for worker in (1, 2, 3):
        world.client(worker)
    return world


def of(world: World, worker: int) -> Connection:
    return world.bus.connections[worker]


def answers(events: list[tuple[Any, ...]]) -> dict[tuple[int, int], Any]:
    return {(to, message.request): message.value for to, message in events}


def test_one_question_serves_all_who_ask(world: World) -> None:
    a, b, c = (of(world, worker) for worker in (1, 2, 3))
    assert world.ask(a, e.CountConnection(7, b.id)) == [(2, e.Count())]
    assert world.ask(c, e.CountConnection(8, b.id)) == []
    told = answers(world.ask(b, COUNTED))
    assert told.keys() == {(1, 7), (3, 8)}
    assert (told[1, 7]["Serial"], told[3, 8]["Serial"]) == (0, 1)
    assert told[1, 7]["PeakBusNames"] == 1
    assert (told[1, 7]["IncomingMessages"], told[1, 7]["PeakOutgoingFDs"]) == (1, 10)
    assert world.ask(b, COUNTED) == []  # nobody asks any more
    assert world.ask(a, e.CountConnection(9, b.id)) == [(2, e.Count())]


def test_who_says_nothing_in_time_is_left_out_and_lives(world: World) -> None:
    a, b = of(world, 1), of(world, 2)
    world.ask(a, e.CountConnection(7, b.id))
    assert world.bus.deadline() == world.time + ANSWER_SECONDS
    world.events.clear()
    world.time += ANSWER_SECONDS
    world.bus.tick()
    assert answers(world.events)[1, 7].keys() == {"Serial", "PeakMatchRules", "PeakBusNames"}
    assert a.waiting == 0
    assert world.bus.deadline() is None
    assert world.ask(b, COUNTED) == []


def test_who_goes_is_answered_for_and_not_answered(world: World) -> None:
    a, b, c = (of(world, worker) for worker in (1, 2, 3))
    world.ask(a, e.CountConnection(7, b.id))
    world.ask(c, e.CountConnection(8, b.id))
    world.bus.gone(1)
    world.events.clear()
    world.bus.gone(2)
    told = [each for each in world.events if isinstance(each[1], e.Reply)]
    assert answers(told).keys() == {(3, 8)}


def test_nobody_asks_without_end_or_about_nobody(world: World) -> None:
    a, b = of(world, 1), of(world, 2)
    for number in range(MAX_WAITING):
        world.ask(a, e.CountConnection(number, b.id))
    for id in (b.id, 99, 0, -1):
        ((to, refused),) = world.ask(a, e.CountConnection(5, id))
        assert (to, type(refused)) == (1, e.Failure)


@pytest.mark.parametrize("number", [-1, 1 << 32, "x"])
def test_a_count_is_a_number(number: object) -> None:
    raw = msgspec.msgpack.encode(["counted", 0, [number], []])
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(raw, type=e.WorkerMessage)
