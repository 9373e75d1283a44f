"""What SELinux says of two labels: the broker asks, the log tells, every worker knows."""

from __future__ import annotations

from typing import Any

from kbusd.broker.connection import Connection
from kbusd.rings import entries as e
from kbusd.workers.replica import BUS_ID, Replica
from tests.unit.broker.world import World, credentials

FDS = (1, 2, 3)


def join(world: World, worker: int, label: bytes) -> Connection:
    world.bus.worker_started(worker, 9000 + worker)
    who = e.Credentials(1000, 1000, 9000 + worker, (1000,), label)
    world.bus.assigned(worker, who)
    connection = world.bus.connections[worker]
    world.ask(connection, e.Hello(1))
    return connection


def log(world: World) -> list[Any]:
    return [entry for kind, entry, *_ in world.events if kind == "log"]


def failure(events: list[Any]) -> e.Failure:
    (found,) = [event[1] for event in events if isinstance(event[1], e.Failure)]
    return found


def test_who_is_kept_apart_stands_in_the_log_before_the_connection() -> None:
    world = World()
    world.refused = {(b"a", b"b", "send_msg")}
    replica = Replica()
    join(world, 1, b"a")
    first = log(world)
    assert [type(each) for each in first] == [e.ConnectionAdded]
    join(world, 2, b"b")
    second = log(world)
    assert second[0] == e.LabelApart(b"b", of=(b"a",))
    assert isinstance(second[1], e.ConnectionAdded)
    for entry in (*first, *second):
        replica.apply(entry)
    assert replica.kept_apart(1, 2) == (b"a", b"b")
    assert replica.kept_apart(2, 1) is None
    assert replica.restrained == {b"a"}


def test_nothing_is_said_of_labels_that_are_gone_and_a_snapshot_says_the_same() -> None:
    world = World()
    world.refused = {(b"a", b"b", "send_msg"), (b"b", b"a", "send_msg")}
    join(world, 1, b"a")
    join(world, 2, b"b")
    assert world.bus.snapshot(0, 0).apart == (e.LabelApart(b"b", (b"a",), (b"a",)),)
    world.events.clear()
    world.bus.gone(2)
    assert e.LabelApart(b"b") in log(world)
    assert world.bus.snapshot(0, 0).apart == ()


def test_another_policy_is_asked_about_all_labels() -> None:
    world = World()
    replica = Replica()
    for worker, label in ((1, b"a"), (2, b"b")):
        join(world, worker, label)
        for entry in log(world):
            replica.apply(entry)
    world.events.clear()
    world.bus.labels_changed()
    assert not log(world)
    world.refused = {(b"b", b"a", "send_msg"), (b"b", None, "send_msg")}
    world.bus.labels_changed()
    for entry in log(world):
        replica.apply(entry)
    assert replica.kept_apart(2, 1) == (b"b", b"a")
    assert replica.kept_apart(2, BUS_ID) == (b"b", b"")
    world.refused = set()
    world.events.clear()
    world.bus.labels_changed()
    for entry in log(world):
        replica.apply(entry)
    assert replica.kept_apart(2, 1) is None and not replica.apart and not replica.restrained


def test_who_may_not_talk_to_the_bus_gets_no_hello() -> None:
    for direction in ((b"a", None), (None, b"a")):
        world = World()
        world.refused = {(*direction, "send_msg")}
        connection = join(world, 1, b"a")
        assert failure(world.events).error.endswith("AccessDenied")
        assert connection.id == 0 or connection not in world.bus.by_id.values()
        assert not log(world)
        assert "SELinux" in world.words[-1]


def test_owning_a_name_is_asked_with_its_context_or_that_of_the_bus() -> None:
    world = World(selinux={"org.example.Two": "name_t"})
    world.refused = {(b"a", None, "acquire_svc")}
    connection = join(world, 1, b"a")
    refused = world.ask(connection, e.RequestName(2, "org.example.One", 0))
    assert failure(refused).error.endswith("AccessDenied")
    assert "acquire_svc" in world.words[-1]
    (reply,) = [
        event[1]
        for event in world.ask(connection, e.RequestName(3, "org.example.Two", 0))
        if isinstance(event[1], e.Reply)
    ]
    assert reply.value == 1
    world.refused = {(b"a", b"name_t", "acquire_svc")}
    assert failure(world.ask(connection, e.RequestName(4, "org.example.Two", 0)))


def test_only_who_may_never_send_anything_either_way_is_not_introduced() -> None:
    world = World()
    world.refused = {(b"a", b"b", "send_msg"), (b"a", b"c", "send_msg"), (b"c", b"a", "send_msg")}
    a, _, c = (join(world, n, label) for n, label in ((1, b"a"), (2, b"b"), (3, b"c")))
    asked = world.ask(a, e.Introduce(2, 2, 0, 0), FDS)
    assert any(isinstance(event[1], e.Introduction) for event in asked)
    assert failure(world.ask(a, e.Introduce(3, 3, 0, 0), FDS)).error.endswith("AccessDenied")
    assert failure(world.ask(c, e.Introduce(2, 1, 0, 0), FDS)).error.endswith("AccessDenied")


def test_without_selinux_labels_say_nothing() -> None:
    world = World()
    assert credentials(1).label == b""
    join(world, 1, b"")
    join(world, 2, b"")
    assert not world.bus.labels.apart
