"""Connections that only kdbus knows: activators, policy holders, monitors."""

from __future__ import annotations

import pytest

from kbusd.broker.connection import Connection
from kbusd.broker.refusal import Violation
from kbusd.rings import entries as e
from tests.unit.broker.world import OWNER, World, credentials

ACTIVATOR, HOLDER, MONITOR = 2, 4, 8
USER, WORLD = 1, 3
SEE, TALK, OWN = 0, 1, 2


def join(
    world: World, worker: int, hello: e.Hello, uid: int = OWNER, custom: int = 0
) -> Connection:
    world.bus.worker_started(worker, 1)
    world.bus.assigned(worker, credentials(worker, uid), custom=custom)
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
    whose = world.bus.by_id[1].credentials
    assert whose is not None and log(world) == [e.MonitorAttached(1, (), MONITOR, whose)]
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


# -- custom endpoints --------------------------------------------------------------------------

MADE = 9  # the worker of who makes one


def endpoint(world: World, *policy: e.PolicyEntry) -> Connection:
    """Have one made; its maker, who is no connection."""
    world.bus.worker_started(MADE, 1)
    world.bus.assigned(MADE, credentials(MADE, OWNER))
    world.bus.endpoint_made(MADE)
    maker = world.bus.connections[MADE]
    world.ask(maker, e.SetEndpoint(1, policy))
    return maker


def error(world: World, connection: Connection, request: e.Request) -> str:
    """The last part of the error's name, "" if it is none."""
    answer = world.ask(connection, request)[-1][1]
    return answer.error.rpartition(".")[2] if isinstance(answer, e.Failure) else ""


def test_an_endpoint_says_what_who_is_behind_it_owns_and_sees() -> None:
    world = World()
    own = e.PolicyEntry("a.b", False, ((WORLD, OWN, 0),))
    see = e.PolicyEntry("c", True, ((USER, 0, OWNER),))
    maker = endpoint(world, own, see)
    assert log(world) == [e.CustomChanged(MADE, (own, see))]
    inside = join(world, 1, e.Hello(1, 0), custom=MADE)
    assert log(world)[-1] == e.ConnectionAdded(1, credentials(1, OWNER), 0, MADE)
    outside = join(world, 2, e.Hello(1, 0, about=b"of 2"))
    assert error(world, inside, e.RequestName(2, "a.b", 0)) == ""
    assert error(world, inside, e.RequestName(3, "c.d", 0)) == "AccessDenied"
    assert error(world, inside, e.StartService(4, "c.d", False)) == "AccessDenied"
    assert error(world, outside, e.RequestName(5, "c.e", 0)) == ""
    assert world.ask(inside, e.AskAbout(6, 2)) == [(1, e.Reply(6, b"of 2"))]
    world.ask(outside, e.ReleaseName(7, "c.e"))
    assert world.ask(inside, e.AskAbout(8, 2)) == [(1, e.Reply(8, b""))]
    snapshot = world.bus.snapshot(0, 0)
    assert (snapshot.behind, snapshot.custom) == (((1, MADE),), ((MADE, (own, see)),))
    assert error(world, maker, e.SetEndpoint(9, (own, own))) == "FileExists"
    world.events.clear()
    world.bus.gone(MADE)
    assert log(world) == [e.CustomChanged(MADE, ())]
    assert error(world, inside, e.RequestName(10, "a.b", 0)) == "AccessDenied"


def test_who_is_behind_an_endpoint_meets_whom_it_may_talk_to_and_who_listens() -> None:
    world = World()
    see = e.PolicyEntry("a.b", False, ((WORLD, SEE, 0),))
    maker = endpoint(world, see)
    inside = join(world, 1, e.Hello(1, 0), custom=MADE)
    other = join(world, 2, e.Hello(1, 0))
    meet = e.Introduce(5, other.id, 0, 0)

    def met() -> bool:
        """Whether the other's worker is asked to meet it."""
        world.ask(inside, meet, (1, 2, 3))
        return any(isinstance(each[1], e.Introduction) for each in world.taken())

    assert not met()
    world.ask(other, e.RequestName(2, "a.b", 0))
    assert not met()
    world.ask(maker, e.SetEndpoint(3, (e.PolicyEntry("a.b", False, ((WORLD, TALK, 0),)),)))
    assert met()
    third = join(world, 3, e.Hello(1, 0))
    meet = e.Introduce(6, third.id, 0, 0)
    world.ask(third, e.AddMatch(4, "sender='c.d'"))
    assert not met()
    world.ask(third, e.AddMatch(4, "type='signal'"))
    assert met()


@pytest.mark.parametrize("kind", [ACTIVATOR, HOLDER, MONITOR])
def test_nobody_behind_an_endpoint_is_privileged(kind: int) -> None:
    world = World(type="kdbus")
    any = e.PolicyEntry("a", True, ((WORLD, OWN, 0),))
    endpoint(world, any)
    hello = e.Hello(1, kind, "a.b" if kind == ACTIVATOR else "")
    assert join(world, 1, hello, uid=0, custom=MADE).id == 0
    inside = join(world, 2, e.Hello(1, 0), uid=0, custom=MADE)
    assert error(world, inside, e.RequestName(2, "a.b", 0)) == "AccessDenied"  # the bus's policy
    assert error(world, inside, e.BecomeMonitor(3, ())) == "AccessDenied"


def test_only_who_has_made_an_endpoint_says_its_policy() -> None:
    world = World()
    a = world.client(1)
    with pytest.raises(Violation):
        world.ask(a, e.SetEndpoint(2, ()))
    maker = endpoint(world)
    with pytest.raises(Violation):
        world.ask(maker, e.RequestName(2, "a.b", 0))
    for wrong in ("a", "a..b"):
        with pytest.raises(Violation):
            world.ask(maker, e.SetEndpoint(3, (e.PolicyEntry(wrong, False, ()),)))
