"""Endpoints in the broker: which there are, and what the worker of a client behind one is refused, should
it have been taken over."""

from __future__ import annotations

from typing import Any

import pytest

from kbusd.policy import endpoints
from kbusd.policy.configuration import Configuration
from kbusd.policy.endpoints import Endpoint
from kbusd.rings import entries as e
from tests.unit.broker.world import OPEN, OWNER, World

ERROR = "org.freedesktop.DBus.Error."
FDS = [1, 2, 3]
APP = endpoints.parse("app", ["see=t.See", "talk=t.Talk", "own=t.App.*"])


def world(*configured: Endpoint, **settings: Any) -> World:
    one = World(endpoints=configured, **settings)
    one.bus.ready()
    return one


def changed(endpoint: Endpoint) -> tuple[str, e.EndpointChanged]:
    return "log", e.EndpointChanged(endpoint.name, endpoints.encode(endpoint))


def error(answer: Any) -> str:
    failure = answer[1]
    assert isinstance(failure, e.Failure), answer
    return failure.error.removeprefix(ERROR)


def again(of: World, *configured: Endpoint, sockets: dict[str, str] | None = None) -> list[Any]:
    """Read the configuration again; what the world was asked for."""
    of.events.clear()
    limits = of.configuration.limits
    of.bus.reconfigure(
        Configuration(limits=limits, policy=OPEN, endpoints=configured, sockets=sockets or {}),
        of.bus.generation + 1,
    )
    return of.events


def test_those_of_the_configuration_are_told_before_anybody_is_there() -> None:
    one = world(APP)
    assert one.events == [changed(APP), ("listen", ("app",))]
    assert one.bus.snapshot(0, 0).endpoints == (("app", endpoints.encode(APP)),)


def test_a_bus_without_endpoints_asks_for_none() -> None:
    assert world().events == []


def test_a_new_configuration() -> None:
    one = world(APP)
    client = one.client(1, endpoint="app")
    stays = endpoints.parse("app", ["see=t.Other"])
    new = endpoints.parse("new", [])
    events = again(one, stays, new)
    assert changed(stays) in events and changed(new) in events
    assert ("listen", ("app", "new")) in events
    assert not [event for event in events if event[0] == "kill"]
    assert not [event for event in again(one, stays, new) if event[0] == "listen"]
    # One whose socket is somewhere else now is closed there first.
    events = again(one, stays, new, sockets={"app": "/elsewhere"})
    listens = [names for what, *names in events if what == "listen"]
    assert listens == [[("new",)], [("app", "new")]]
    events = again(one, new)
    assert ("log", e.EndpointChanged("app", b"")) in events
    assert ("kill", client.worker, "its endpoint app is gone") in events


def test_the_admin_asks_while_the_configuration_is_being_read() -> None:
    one = world()
    one.bus.reload()
    assert one.events == [("reload",)]
    one.bus.reload()
    assert one.events == [("reload",)]
    assert ("reload",) in again(one)
    assert ("reload",) not in again(one)


def add(of: World, by: Any, name: str, *lines: str, bound: bool = False, request: int = 5) -> Any:
    policy = endpoints.encode(endpoints.parse(name, lines))
    return of.ask(by, e.AddEndpoint(request, name, policy, bound))


def test_who_adds_one_is_told_where_it_is_once_it_is_there() -> None:
    one = world()
    admin = one.client(1, uid=OWNER)
    events = add(one, admin, "new", "talk=a.b")
    new = endpoints.parse("new", ["talk=a.b"])
    assert events == [changed(new), ("listen", ("new",))]
    one.events.clear()
    one.bus.endpoints.listening({"": "unix:path=/bus", "new": "unix:path=/bus.new"})
    assert one.events == [(1, e.Reply(5, "unix:path=/bus.new"))]
    ((_, listed),) = one.ask(admin, e.ListEndpoints(6))
    assert listed == e.Reply(6, [("new", "unix:path=/bus.new", ("talk=a.b",))])


def test_one_that_cannot_be_listened_on() -> None:
    one = world()
    admin = one.client(1, uid=OWNER)
    add(one, admin, "new")
    one.events.clear()
    one.bus.endpoints.listening({})
    assert error(one.events[0]) == "Failed"
    assert one.events[1] == ("log", e.EndpointChanged("new", b""))


def test_an_answer_to_what_was_asked_before_is_not_taken_for_one() -> None:
    one = world()
    admin = one.client(1, uid=OWNER)
    add(one, admin, "first", request=5)
    add(one, admin, "second", request=6)
    one.events.clear()
    one.bus.endpoints.listening({"first": "unix:path=/1"})
    assert one.events == []
    one.bus.endpoints.listening({"first": "unix:path=/1", "second": "unix:path=/2"})
    assert one.events == [
        (1, e.Reply(5, "unix:path=/1")),
        (1, e.Reply(6, "unix:path=/2")),
    ]


def test_what_goes_with_who_asked_for_it() -> None:
    one = world()
    admin = one.client(1, uid=OWNER)
    add(one, admin, "bound", bound=True)
    add(one, admin, "free")
    one.bus.endpoints.listening({"bound": "x", "free": "y"})
    one.bus.endpoints.listening({"bound": "x", "free": "y"})
    client = one.client(2, endpoint="bound")
    one.events.clear()
    one.bus.gone(1)
    assert ("log", e.EndpointChanged("bound", b"")) in one.events
    assert ("listen", ("free",)) in one.events
    assert ("kill", client.worker, "its endpoint bound is gone") in one.events


def test_endpoints_are_for_the_owner_of_the_bus_to_make() -> None:
    one = world(APP)
    for stranger in (one.client(1), one.client(2, endpoint="app"), one.client(3, 0, "app")):
        for message in (
            e.AddEndpoint(5, "new", endpoints.encode(endpoints.parse("new", [])), False),
            e.RemoveEndpoint(5, "app"),
            e.ListEndpoints(5),
        ):
            (answer,) = one.ask(stranger, message)
            assert error(answer) == "AccessDenied"


def test_what_is_said_of_one_is_checked() -> None:
    one = world(APP)
    admin = one.client(1, uid=0)
    forged = endpoints.encode(Endpoint("../up"))
    for name, policy, expected in (
        ("../up", forged, "InvalidArgs"),
        ("other", endpoints.encode(APP), "InvalidArgs"),
        ("new", b"\xc1", "InvalidArgs"),
        ("app", endpoints.encode(APP), "FileExists"),
    ):
        (answer,) = one.ask(admin, e.AddEndpoint(5, name, policy, False))
        assert error(answer) == expected
    (answer,) = one.ask(admin, e.RemoveEndpoint(5, "app"))
    assert error(answer) == "Failed"


def test_there_are_so_many_at_most() -> None:
    one = world()
    admin = one.client(1, uid=0)
    for number in range(256):
        add(one, admin, f"e{number}")
    assert error(add(one, admin, "more")[0]) == "LimitsExceeded"


# -- a worker that was taken over --------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "refused"),
    [
        (e.RequestName(5, "t.App.One", 0), None),
        (e.RequestName(5, "t.Talk", 0), "AccessDenied"),
        (e.RequestName(5, "t.Hidden", 0), "AccessDenied"),
        (e.StartService(5, "t.Hidden", False), "ServiceUnknown"),
        (e.BecomeMonitor(5, ()), "AccessDenied"),
        (e.UpdateEnvironment(5, {}), "AccessDenied"),
        (e.ReloadConfig(5), "AccessDenied"),
        (e.Statistics(5), "AccessDenied"),
        (e.SetPolicy(5, ()), "AccessDenied"),
        (e.Describe(5, b""), "AccessDenied"),
        (e.AskAbout(5, 1), "AccessDenied"),
        (e.AddMatch(5, "type='signal'"), None),
        (e.AddMatch(5, "type='signal',eavesdrop='true'"), "AccessDenied"),
        (e.CountConnection(5, 1), "AccessDenied"),
    ],
)
def test_what_the_worker_may_ask(message: e.Request, refused: str | None) -> None:
    """Although its client is root."""
    one = world(APP)
    app = one.client(1, uid=0, endpoint="app")
    answers = [event for event in one.ask(app, message) if event[0] == 1]
    if refused is None:
        assert isinstance(answers[0][1], e.Reply)
    else:
        assert error(answers[0]) == refused
        assert "the worker of :1.1" in one.words[-1]  # an honest one does not ask


def test_whom_it_gets_to_know() -> None:
    """Those that it may call, those that have called it, and those that want signals of it."""
    one = world(APP)
    app, talk, hidden, wants, other = (
        one.client(1, endpoint="app"),
        *(one.client(worker) for worker in (2, 3, 4, 5)),
    )
    one.ask(talk, e.RequestName(5, "t.Talk", 0))
    one.ask(hidden, e.RequestName(5, "t.Hidden", 0))
    one.ask(hidden, e.AddMatch(5, "type='signal',sender='t.Talk'"))
    one.ask(hidden, e.AddMatch(5, "type='method_call'"))
    one.ask(wants, e.AddMatch(5, f"type='signal',sender='{app.unique_name}'"))

    def introduced(asker: Any, peer: Any) -> bool:
        ((_, answer, *_),) = one.ask(asker, e.Introduce(5, peer.id, 1, 2), FDS)
        return isinstance(answer, e.Introduction)

    assert not introduced(app, hidden)
    assert introduced(app, talk)
    assert introduced(app, wants)
    assert introduced(other, app)
    assert introduced(hidden, app)


def test_whose_process_it_may_know() -> None:
    one = world(APP)
    app = one.client(1, endpoint="app")
    hidden, seen = one.client(2), one.client(3)
    one.ask(seen, e.RequestName(1, "t.See", 0))
    hidden.pidfd, seen.pidfd, app.pidfd = 92, 93, 91
    assert one.ask(app, e.ProcessOf(5, hidden.id)) == [(1, e.Reply(5))]
    assert one.ask(app, e.ProcessOf(6, seen.id)) == [(1, e.Reply(6), 93)]
    assert one.ask(app, e.ProcessOf(7, app.id)) == [(1, e.Reply(7), 91)]
    assert one.ask(hidden, e.ProcessOf(8, app.id)) == [(2, e.Reply(8), 91)]
    assert error(one.ask(app, e.CountConnection(9, seen.id))[0]) == "AccessDenied"


def test_one_that_is_no_more_takes_nobody() -> None:
    one = world(APP)
    one.bus.worker_started(1, 9001)
    one.bus.assigned(1, e.Credentials(1000, 1000, 1, endpoint="gone"))
    (answer,) = one.ask(one.bus.connections[1], e.Hello(5))
    assert error(answer) == "AccessDenied"


def test_those_behind_one_do_not_keep_their_user_from_the_bus() -> None:
    one = world(APP, limits={"max_connections_per_user": 6})

    def hello(worker: int, endpoint: str) -> Any:
        one.bus.worker_started(worker, 9000 + worker)
        one.bus.assigned(worker, e.Credentials(1000, 1000, worker, endpoint=endpoint))
        return one.ask(one.bus.connections[worker], e.Hello(5))[-1]

    for worker in (1, 2, 3):
        assert isinstance(hello(worker, "app")[1], e.Reply)
    assert error(hello(4, "app")) == "LimitsExceeded"
    assert isinstance(hello(5, "")[1], e.Reply)
    one.bus.gone(1)
    assert isinstance(hello(6, "app")[1], e.Reply)
    for worker in (2, 3, 5, 6):
        one.bus.gone(worker)
    assert not one.bus._per_uid
