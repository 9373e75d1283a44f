"""Connections that only kdbus knows: activators, policy holders, monitors."""

from __future__ import annotations

import pytest

from kbusd.broker.connection import Connection
from kbusd.broker.refusal import Violation
from kbusd.rings import entries as e
from tests.unit.broker.world import OWNER, World, credentials

ACTIVATOR, HOLDER, MONITOR = 2, 4, 8
USER, WORLD = 1, 3
TALK, OWN = 1, 2


def join(world: World, worker: int, hello: e.Hello, uid: int = OWNER) -> Connection:
    world.bus.worker_started(worker, 1)
    world.bus.assigned(worker, credentials(worker, uid))
    connection = world.bus.connections[worker]
    world.ask(connection, hello)
    return connection


def log(world: World) -> list[e.LogEntry]:
    return [event[1] for event in world.events if event[0] == "log"]


def activator(world: World, worker: int, name: str = "a.b") -> Connection:
    return join(world, worker, e.Hello(1, ACTIVATOR, name))


def test_a_name_goes_from_its_activator_to_an_owner_and_back() -> None:
    world = World()
    activator(world, 1)
    assert log(world)[1:] == [e.NameOwnerChanged("a.b", 0, 1, activator=1)]
    b, c = world.client(2), world.client(3)
    assert world.ask(b, e.RequestName(2, "a.b", 4)) == [
        ("log", e.NameOwnerChanged("a.b", 1, 2, (), (4,), 1)),
        (2, e.Reply(2, 1)),
    ]
    world.ask(c, e.RequestName(2, "a.b", 0))
    world.ask(b, e.ReleaseName(3, "a.b"))
    assert log(world) == [e.NameOwnerChanged("a.b", 2, 3, (), (), 1)]  # who waits comes first
    world.events.clear()
    world.bus.gone(3)
    assert log(world)[0] == e.NameOwnerChanged("a.b", 3, 1, activator=1)
    world.events.clear()
    world.bus.gone(1)
    assert log(world)[0] == e.NameOwnerChanged("a.b", 1, 0)


def test_a_name_has_one_activator() -> None:
    world = World()
    world.client(9)
    owner = world.client(2)
    world.ask(owner, e.RequestName(2, "a.b", 0))
    activator(world, 1)
    assert log(world)[1:] == [e.QueueChanged("a.b", (), (), 3)]
    second = activator(world, 3)
    assert second.id == 0
    world.bus.gone(1)
    activator(world, 4)
    assert world.bus.registry.owner("a.b") is owner


@pytest.mark.parametrize("kind", [ACTIVATOR, HOLDER, MONITOR])
def test_they_are_for_the_privileged(kind: int) -> None:
    world = World()
    hello = e.Hello(1, kind, "a.b" if kind == ACTIVATOR else "")
    assert join(world, 1, hello, uid=1000).id == 0
    assert log(world) == []
    assert join(world, 2, hello, uid=0).id != 0


def test_policy_says_who_may_own() -> None:
    world = World()
    entry = e.PolicyEntry("a.b", False, ((USER, OWN, 7), (WORLD, TALK, 0)))
    holder = join(world, 1, e.Hello(1, HOLDER, policy=(entry,)))
    assert log(world)[1:] == [e.NamePolicyChanged(1, (entry,))]
    a, b = world.client(2, uid=7), world.client(3, uid=8)
    refused = world.ask(b, e.RequestName(2, "a.b", 0))[0][1]
    assert isinstance(refused, e.Failure) and refused.error.endswith("AccessDenied")
    assert world.ask(b, e.RequestName(3, "a.c", 0))[-1] == (3, e.Reply(3, 1))
    assert world.ask(a, e.RequestName(2, "a.b", 0))[-1] == (2, e.Reply(2, 1))
    assert world.bus.snapshot(0, 0).policies == ((1, (entry,)),)
    other = join(world, 4, e.Hello(1, HOLDER, policy=(entry,)))
    assert other.id == 0  # there can be one for a name
    opened = e.PolicyEntry("a.b", False, ((WORLD, OWN, 0),))
    world.ask(holder, e.SetPolicy(2, (opened,)))
    assert log(world) == [e.NamePolicyChanged(1, (opened,))]
    assert world.ask(b, e.RequestName(4, "a.b", 0))[-1] == (3, e.Reply(4, 2))
    world.bus.gone(1)
    assert world.bus.snapshot(0, 0).policies == ()
    with pytest.raises(Violation):
        world.ask(a, e.SetPolicy(9, (opened,)))


def test_on_a_made_bus_what_no_policy_allows_is_denied() -> None:
    world = World(type="kdbus")
    other, owner = world.client(1, uid=7), world.client(2, uid=OWNER)
    refused = world.ask(other, e.RequestName(2, "a.b", 0))[0][1]
    assert isinstance(refused, e.Failure) and refused.error.endswith("AccessDenied")
    assert world.ask(owner, e.RequestName(2, "a.c", 0))[-1] == (2, e.Reply(2, 1))
    entry = e.PolicyEntry("a.b", False, ((USER, OWN, 7),))
    join(world, 3, e.Hello(1, HOLDER, policy=(entry,)))
    assert world.ask(other, e.RequestName(3, "a.b", 0))[-1] == (1, e.Reply(3, 1))


def test_a_monitor_is_one_from_the_beginning() -> None:
    world = World()
    monitor = join(world, 1, e.Hello(1, MONITOR))
    assert log(world) == [e.MonitorAttached(1, (), MONITOR)]
    with pytest.raises(Violation):
        world.ask(monitor, e.RequestName(2, "a.b", 0))
    assert world.bus.snapshot(0, 0).kdbus == ((1, MONITOR),)


def test_what_a_worker_says_of_its_client_is_told_to_who_asks() -> None:
    world = World()
    a = join(world, 1, e.Hello(1, 0, about=b"first"))
    b = world.client(2)
    assert world.ask(b, e.AskAbout(2, 1)) == [(2, e.Reply(2, b"first"))]
    world.ask(a, e.Describe(2, b"second"))
    assert world.ask(b, e.AskAbout(3, 1)) == [(2, e.Reply(3, b"second"))]
    assert world.ask(b, e.AskAbout(4, 99)) == [(2, e.Reply(4, b""))]
    with pytest.raises(Violation):
        world.ask(a, e.Describe(3, bytes(1 << 15)))
