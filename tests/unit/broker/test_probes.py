"""Probes: a worker that is stopped is ended, and no worker can have one ended that runs."""

from __future__ import annotations

import pytest

from kbusd.broker.connection import Connection
from kbusd.broker.probes import ANSWER_SECONDS, REST_SECONDS, ROUNDS
from kbusd.broker.refusal import Violation
from kbusd.rings import entries as e
from tests.unit.broker.world import World


@pytest.fixture
def world() -> World:
    """With a, b, c on it (workers 1, 2, 3); a and b know each other."""
    world = World()
    a, b, _ = (world.client(worker) for worker in (1, 2, 3))
    world.ask(a, e.Introduce(7, b.id, 0, 0), [1, 2, 3])
    world.ask(b, e.Introduced(1, 0, 0), [5, 6, 7])
    return world


def of(world: World, worker: int) -> Connection:
    return world.bus.connections[worker]


def pass_time(world: World, rounds: int) -> list[tuple[object, ...]]:
    """What happens in so many rounds."""
    world.events.clear()
    for _ in range(rounds):
        world.time += ANSWER_SECONDS
        world.bus.tick()
    return world.events


def test_who_does_not_answer_is_ended_after_a_second_chance(world: World) -> None:
    assert world.ask(of(world, 1), e.Stuck(0, of(world, 2).id)) == [(2, e.Probe())]
    assert pass_time(world, ROUNDS - 1) == []
    assert [each[:2] for each in pass_time(world, 1)] == [("kill", 2)]
    assert world.bus.deadline() is None


def test_who_answers_lives_and_is_left_alone_for_a_while(world: World) -> None:
    a, b = of(world, 1), of(world, 2)
    world.ask(a, e.Stuck(0, b.id))
    assert world.ask(a, e.Stuck(0, b.id)) == []
    assert world.ask(b, e.Running(0)) == []
    assert world.ask(a, e.Stuck(0, b.id)) == []
    assert pass_time(world, ROUNDS + 1) == []
    world.time += REST_SECONDS
    assert world.ask(a, e.Stuck(0, b.id)) == [(2, e.Probe())]


def test_a_worker_that_does_not_know_another_cannot_have_it_asked(world: World) -> None:
    for peer in (of(world, 1).id, of(world, 2).id, of(world, 3).id, 0, -1, 99):
        assert world.ask(of(world, 3), e.Stuck(0, peer)) == []


def test_nobody_answers_for_another_or_unasked(world: World) -> None:
    world.ask(of(world, 1), e.Stuck(0, of(world, 2).id))
    with pytest.raises(Violation):
        world.ask(of(world, 1), e.Running(0))
    assert [each[:2] for each in pass_time(world, ROUNDS)] == [("kill", 2)]


def test_who_goes_meanwhile_is_forgotten(world: World) -> None:
    world.ask(of(world, 1), e.Stuck(0, of(world, 2).id))
    world.bus.gone(2)
    assert pass_time(world, ROUNDS) == []
    assert world.bus.deadline() is None
