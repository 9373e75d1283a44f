"""Scenarios of one bus: who asks what, and exactly what stands in the log and is answered."""

from __future__ import annotations

import gc

import pytest
from msgspec.structs import replace

from kbusd.broker.bus import FAULTY
from kbusd.broker.connection import Connection
from kbusd.broker.refusal import Violation
from kbusd.policy.endpoints import Endpoint
from kbusd.policy.rules import OWN, USER, Policy, Rule
from kbusd.rings import entries as e
from tests.unit.broker.world import OPEN, World, credentials, service

ANNOUNCED = ("log", e.ActivatableChanged(()))
ERROR = "org.freedesktop.DBus.Error."


def refused(request: int, error: str, text: str) -> e.Failure:
    return e.Failure(request, ERROR + error, text)


# -- rules that name a connection -------------------------------------------------------------------


def test_rules_that_name_a_connection_go_with_it() -> None:
    """They stayed, counted for the limit, and were listed."""
    world = World(limits={"max_match_rules_per_connection": 4})
    one, other, gone = (world.client(worker) for worker in (1, 2, 3))
    name = gone.unique_name
    mine = [f"sender='{name}'", f"destination='{name}',sender={name}", f"sender={name}"]
    for rule in (*mine, "sender=':1.33'"):
        world.ask(one, e.AddMatch(2, rule))
    world.ask(other, e.AddMatch(2, mine[0]))
    world.ask(gone, e.AddMatch(2, mine[0]))  # its own goes as all of its own do, without a word
    assert world.bus.matches.count == 6
    world.events.clear()
    world.bus.gone(gone.worker)
    events = world.taken()
    removed = [event[1] for event in events[:-1]]
    assert sorted(removed, key=lambda entry: (entry.id, entry.rule)) == [
        *(e.MatchRemoved(one.id, rule) for rule in sorted(mine)),
        e.MatchRemoved(other.id, mine[0]),
    ]
    assert events[-1] == ("log", e.ConnectionRemoved(gone.id))
    assert world.bus.matches.count == 1
    not_found = "The given match rule wasn't found and can't be removed"
    assert world.ask(one, e.RemoveMatch(3, mine[0])) == [
        (one.worker, refused(3, "MatchRuleNotFound", not_found))
    ]
    for rule in "abc":  # and there is room
        world.ask(one, e.AddMatch(4, f"member='{rule}'"))
    assert world.bus.matches.count == 4


def test_rules_that_name_who_becomes_a_monitor_go() -> None:
    world = World()
    one, monitor = world.client(1), world.client(2, uid=0)
    rule = f"sender='{monitor.unique_name}'"
    world.ask(one, e.AddMatch(2, rule))
    events = world.ask(monitor, e.BecomeMonitor(3, ()))
    assert events[0] == ("log", e.MatchRemoved(one.id, rule))


def test_a_rule_that_was_removed_by_its_owner_is_not_looked_for_again() -> None:
    world = World()
    one, other, gone = (world.client(worker) for worker in (1, 2, 3))
    rule = f"sender='{gone.unique_name}'"
    world.ask(gone, e.AddMatch(2, "member='M'"))
    for _ in range(2):
        world.ask(one, e.AddMatch(2, rule))
    world.ask(one, e.RemoveMatch(3, rule))
    world.ask(other, e.AddMatch(4, rule))
    world.bus.gone(other.worker)
    world.events.clear()
    world.bus.gone(gone.worker)
    assert world.taken()[0] == ("log", e.MatchRemoved(one.id, rule))
    assert len(world.taken()) == 2 and world.bus.matches.count == 0


def test_a_rule_does_not_tell_those_behind_an_endpoint_who_was_there() -> None:
    """It stays, as if nobody had had that name."""
    world = World()
    world.bus.endpoints.configure([Endpoint("app")])
    app, gone = world.client(1, endpoint="app"), world.client(2)
    world.ask(gone, e.AddMatch(2, "member='M'"))
    world.ask(app, e.AddMatch(2, f"sender='{gone.unique_name}'"))
    world.events.clear()
    world.bus.gone(gone.worker)
    assert world.taken() == [("log", e.ConnectionRemoved(gone.id))]
    answer = world.ask(app, e.RemoveMatch(3, f"sender='{gone.unique_name}'"))[-1]
    assert isinstance(answer[1], e.Reply)


# -- Hello -----------------------------------------------------------------------------------------


def test_hello_is_answered_with_id_and_snapshot_once_it_stands_in_the_log() -> None:
    world = World()
    world.bus.worker_started(4, 44)
    world.bus.assigned(4, credentials(4))
    events = world.ask(world.bus.connections[4], e.Hello(1))
    assert events == [
        ("log", e.ConnectionAdded(1, credentials(4))),
        (4, e.Reply(1, 1), 77),
    ]
    assert world.joined_by == [4]


def test_a_short_state_is_told_before_hello_and_holds_as_long_as_the_log_leads_on_from_it() -> None:
    world = World()
    world.told = b"state"
    for worker in (4, 5):
        world.bus.worker_started(worker, worker)
    assert world.events == [(4, e.State(b"state")), (5, e.State(b"state"))]
    for worker in (4, 5):
        world.bus.assigned(worker, credentials(worker))
    assert len(world.events) == 2
    assert (4, e.Reply(1, 1)) in world.ask(world.bus.connections[4], e.Hello(1))
    world.reach = False
    assert (5, e.Reply(1, 2), 77) in world.ask(world.bus.connections[5], e.Hello(1))


def test_who_is_behind_an_endpoint_or_has_opened_a_file_is_told_no_state() -> None:
    world = World()
    world.told = b"state"
    world.bus.endpoints.configure([Endpoint("app")])
    world.events.clear()
    world.bus.worker_started(1, 1)
    world.bus.assigned(1, replace(credentials(1), endpoint="app"))
    world.bus.worker_started(2, 2, files=True)
    world.bus.assigned(2, credentials(2), hasty=False)
    assert world.events == []


def test_once_there_was_an_endpoint_no_worker_is_told_the_state_before_its_client_comes() -> None:
    """As it may come by one."""
    world = World()
    world.bus.endpoints.configure([Endpoint("app")])
    world.bus.endpoints.configure([])
    world.told = b"state"
    world.events.clear()
    world.bus.worker_started(4, 4)
    assert world.events == []
    world.bus.assigned(4, credentials(4))
    assert world.events == [(4, e.State(b"state"))]


def test_spare_workers_that_know_the_state_get_no_client_once_one_may_come_by_an_endpoint() -> None:
    """They go before anybody can listen for it. One that got a client just before has another one."""
    world = World()
    world.told = b"state"
    world.bus.worker_started(3, 3)
    world.bus.assigned(3, credentials(3))
    world.bus.worker_started(4, 4)
    world.bus.worker_started(5, 5, files=True)
    world.events.clear()
    world.bus.endpoints.configure([Endpoint("app")])
    assert world.events[0] == ("discard", 4)
    assert ("discard", 3) not in world.events and ("discard", 5) not in world.events
    world.events.clear()
    world.bus.assigned(4, credentials(4))
    assert world.events == [(4, e.State(b"state"))]


def test_a_state_that_has_become_too_old_is_told_anew_when_a_client_comes() -> None:
    world = World()
    world.told = b"state"
    world.bus.worker_started(4, 4)
    world.reach = False
    world.told = b"new"
    world.events.clear()
    world.bus.assigned(4, credentials(4))
    assert world.events == [(4, e.State(b"new"))]


def test_who_does_not_say_hello_in_time_is_ended() -> None:
    world = World(limits={"auth_timeout": 3000})
    for worker in (1, 2, 3):
        world.bus.worker_started(worker, worker)
        world.bus.assigned(worker, credentials(worker))
        world.time += 1
    world.ask(world.bus.connections[1], e.Hello(1))
    world.events.clear()
    world.time = world.bus.deadline() or 0
    world.bus.tick()
    assert world.events == [("kill", 2, "did not say Hello within 3 s (limit auth_timeout)")]
    world.bus.gone(2)
    world.bus.gone(3)
    assert world.bus.deadline() is None


def test_no_unique_name_is_spent_on_a_connection_without_hello() -> None:
    world = World()
    world.bus.worker_started(1, 11)
    world.bus.assigned(1, credentials(1))
    world.bus.gone(1)
    assert world.events == []
    assert world.client(2).unique_name == ":1.1"


def test_the_process_of_a_client_is_known_by_descriptor_while_it_is_there() -> None:
    world = World()
    a, b = world.client(1), world.client(2)
    closed: list[int] = []
    world.close = closed.append  # type: ignore[method-assign]
    assert world.ask(a, e.ProcessOf(5, b.id)) == [(1, e.Reply(5))]
    world.bus.worker_started(3, 3)
    world.bus.assigned(3, e.Credentials(1, 1, 1), True, pidfd=99)
    world.ask(world.bus.connections[3], e.Hello(1))
    assert world.ask(a, e.ProcessOf(6, 3)) == [(1, e.Reply(6), 99)]
    for id in (-1, 0, 77):
        assert world.ask(a, e.ProcessOf(7, id)) == [(1, e.Reply(7))]
    world.bus.gone(3)
    assert closed == [99]
    world.bus.assigned(3, e.Credentials(1, 1, 1), True, pidfd=98)  # it went before
    assert closed == [99, 98]


def test_second_hello_is_refused() -> None:
    world = World()
    a = world.client(1)
    assert world.ask(a, e.Hello(2)) == [
        (1, refused(2, "Failed", "Already handled an Hello message"))
    ]


def test_hello_of_a_spare_worker_is_a_violation() -> None:
    world = World()
    world.bus.worker_started(1, 11)
    with pytest.raises(Violation):
        world.ask(world.bus.connections[1], e.Hello(1))


def test_anything_before_hello_is_a_violation() -> None:
    world = World()
    world.bus.worker_started(1, 11)
    world.bus.assigned(1, credentials(1))
    with pytest.raises(Violation):
        world.ask(world.bus.connections[1], e.RequestName(1, "a.b", 0))


def test_policy_decides_who_connects() -> None:
    world = World(policy=Policy(default=(Rule(True, USER, "t", 1, id=7),)))
    world.bus.worker_started(1, 11)
    world.bus.assigned(1, credentials(1, uid=8))
    (answer,) = world.ask(world.bus.connections[1], e.Hello(1))
    assert answer[1].error == ERROR + "AccessDenied"
    assert world.client(2, uid=7).unique_name == ":1.1"


def anonymous(world: World, uid: int) -> e.Reply | e.Failure:
    """What a worker is answered which says that its client of this user is anonymous."""
    world.bus.worker_started(1, 11)
    world.bus.assigned(1, credentials(1, uid))
    world.ask(world.bus.connections[1], e.Hello(1, anonymous=True))
    return next(event[1] for event in world.taken() if event[0] == 1)


def test_a_worker_whose_client_it_says_is_anonymous_gets_nowhere_unless_anybody_may_be() -> None:
    for settings in (
        {},
        {"allow_anonymous": True, "auth": ("EXTERNAL",)},
        {"auth": ("ANONYMOUS",)},
    ):
        world = World(policy=Policy(), **settings)
        answer = anonymous(world, uid=7)
        assert isinstance(answer, e.Failure) and answer.error == ERROR + "AccessDenied"
    assert anonymous(World(policy=Policy(), allow_anonymous=True), uid=7) == e.Reply(1, 1)


def test_a_worker_loses_privileges_by_saying_that_its_client_is_anonymous() -> None:
    for uid in (0, 500):
        world = World(allow_anonymous=True)
        assert anonymous(world, uid) == e.Reply(1, 1)
        (answer,) = world.ask(world.bus.connections[1], e.BecomeMonitor(2, ()))
        assert answer[1].error == ERROR + "AccessDenied"


def test_no_client_of_kdbus_is_anonymous() -> None:
    world = World(allow_anonymous=True)
    world.bus.worker_started(1, 11)
    world.bus.assigned(1, credentials(1))
    with pytest.raises(Violation):
        world.ask(world.bus.connections[1], e.Hello(1, 0, anonymous=True))


def test_limits_of_connections() -> None:
    world = World(limits={"max_completed_connections": 3, "max_connections_per_user": 2})
    a, _ = world.client(1, uid=1), world.client(2, uid=1)
    world.client(3, uid=1)
    assert world.taken() == [
        (
            3,
            refused(
                1,
                "LimitsExceeded",
                "The maximum number of active connections for UID 1 has been reached",
            ),
        )
    ]
    world.client(4, uid=2)
    world.client(5, uid=3)
    assert world.taken() == [
        (
            5,
            refused(
                1, "LimitsExceeded", "The maximum number of active connections has been reached"
            ),
        )
    ]
    world.bus.gone(a.worker)
    assert world.client(6, uid=1).id != 0


# -- names -----------------------------------------------------------------------------------------


def test_names_pass_to_the_next_in_the_queue() -> None:
    world = World()
    a, b = world.client(1), world.client(2)
    assert world.ask(a, e.RequestName(2, "a.b", 0)) == [
        ("log", e.NameOwnerChanged("a.b", 0, 1)),
        (1, e.Reply(2, 1)),
    ]
    assert world.ask(b, e.RequestName(2, "a.b", 0)) == [
        ("log", e.QueueChanged("a.b", (2,))),
        (2, e.Reply(2, 2)),
    ]
    assert world.ask(a, e.ReleaseName(3, "a.b")) == [
        ("log", e.NameOwnerChanged("a.b", 1, 2)),
        (1, e.Reply(3, 1)),
    ]
    assert world.woken == {1, 2}


def test_replacing_an_owner_that_allows_it() -> None:
    world = World()
    a, b = world.client(1), world.client(2)
    world.ask(a, e.RequestName(2, "a.b", 1))
    assert world.ask(b, e.RequestName(2, "a.b", 2)) == [
        ("log", e.NameOwnerChanged("a.b", 1, 2, (1,), (0, 1))),
        (2, e.Reply(2, 1)),
    ]


def test_who_waits_stands_in_the_log() -> None:
    world = World()
    a, b, c = (world.client(number) for number in (1, 2, 3))
    world.ask(a, e.RequestName(2, "a.b", 0))
    world.ask(b, e.RequestName(2, "a.b", 0))
    assert world.ask(c, e.RequestName(2, "a.b", 2))[0] == ("log", e.QueueChanged("a.b", (3, 2)))
    assert world.ask(c, e.RequestName(3, "a.b", 0)) == [(3, e.Reply(3, 2))]  # nothing changed
    assert world.bus.snapshot(0, 0).queues == (e.QueueChanged("a.b", (3, 2)),)
    assert world.ask(b, e.RequestName(3, "a.b", 4))[0] == ("log", e.QueueChanged("a.b", (3,)))
    world.events.clear()
    world.bus.gone(3)
    assert world.taken() == [
        ("log", e.QueueChanged("a.b", ())),
        ("log", e.ConnectionRemoved(3)),
    ]
    assert world.bus.snapshot(0, 0).queues == ()


@pytest.mark.parametrize(
    ("name", "error", "text"),
    [
        ("bad", "InvalidArgs", 'Requested bus name "bad" is not valid'),
        (
            ":1.5",
            "InvalidArgs",
            "Cannot acquire a service starting with ':' such as \":1.5\"",
        ),
        (
            "org.freedesktop.DBus",
            "InvalidArgs",
            (
                'Connection ":1.1" is not allowed to own the service "org.freedesktop.DBus"because it'
                " is reserved for D-Bus' use only"
            ),
        ),
        (
            "not.yours",
            "AccessDenied",
            (
                'Connection ":1.1" is not allowed to own the service "not.yours" due to security'
                " policies in the configuration file"
            ),
        ),
    ],
)
def test_names_that_cannot_be_had(name: str, error: str, text: str) -> None:
    world = World()
    a = world.client(1)
    assert world.ask(a, e.RequestName(2, name, 0)) == [(1, refused(2, error, text))]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("bad", 'Given bus name "bad" is not valid'),
        (":1.1", "Cannot release a service starting with ':' such as \":1.1\""),
        (
            "org.freedesktop.DBus",
            "Cannot release the org.freedesktop.DBus service because it is owned by the bus",
        ),
    ],
)
def test_names_that_cannot_be_released(name: str, text: str) -> None:
    world = World()
    a = world.client(1)
    assert world.ask(a, e.ReleaseName(2, name)) == [(1, refused(2, "InvalidArgs", text))]


def test_release_of_what_one_does_not_own() -> None:
    world = World()
    a, b = world.client(1), world.client(2)
    world.ask(b, e.RequestName(2, "a.b", 0))
    assert world.ask(a, e.ReleaseName(2, "a.b")) == [(1, e.Reply(2, 3))]
    assert world.ask(a, e.ReleaseName(3, "c.d")) == [(1, e.Reply(3, 2))]


def test_limit_of_names_counts_the_unique_one() -> None:
    world = World(limits={"max_names_per_connection": 2})
    a = world.client(1)
    assert world.ask(a, e.RequestName(2, "a.b", 0))[-1] == (1, e.Reply(2, 1))
    text = (
        'Connection ":1.1" is not allowed to own more services (increase limits in configuration'
        " file if required; max_names_per_connection=2)"
    )
    assert world.ask(a, e.RequestName(3, "a.c", 0)) == [(1, refused(3, "LimitsExceeded", text))]


# -- match rules -----------------------------------------------------------------------------------


def test_match_rules_are_logged_before_they_are_confirmed() -> None:
    world = World()
    a = world.client(1)
    rule = "type='signal',member='X'"
    assert world.ask(a, e.AddMatch(2, rule)) == [
        ("log", e.MatchAdded(1, rule)),
        (1, e.Reply(2)),
    ]
    assert world.ask(a, e.RemoveMatch(3, "member='X',type='signal'")) == [
        ("log", e.MatchRemoved(1, rule)),
        (1, e.Reply(3)),
    ]
    text = "The given match rule wasn't found and can't be removed"
    assert world.ask(a, e.RemoveMatch(4, rule)) == [(1, refused(4, "MatchRuleNotFound", text))]


def test_a_rule_that_was_added_twice_is_there_until_removed_twice() -> None:
    world = World()
    a = world.client(1)
    for request in (2, 3):
        world.ask(a, e.AddMatch(request, "member='X'"))
    for request in (4, 5):
        assert world.ask(a, e.RemoveMatch(request, "member='X'"))[-1] == (1, e.Reply(request))
    assert world.ask(a, e.RemoveMatch(6, "member='X'"))[0][1].error == ERROR + "MatchRuleNotFound"


def test_limit_of_match_rules_counts_equal_ones() -> None:
    world = World(limits={"max_match_rules_per_connection": 2})
    a = world.client(1)
    for request in (2, 3):
        world.ask(a, e.AddMatch(request, "member='X'"))
    text = (
        'Connection ":1.1" is not allowed to add more match rules (increase limits in'
        " configuration file if required; max_match_rules_per_connection=2)"
    )
    assert world.ask(a, e.AddMatch(4, "member='X'")) == [(1, refused(4, "LimitsExceeded", text))]


def test_invalid_match_rule() -> None:
    world = World()
    a = world.client(1)
    (answer,) = world.ask(a, e.AddMatch(2, "member"))
    assert answer[1].error == ERROR + "MatchRuleInvalid"


# -- who is woken ----------------------------------------------------------------------------------


def test_only_workers_whom_a_change_of_owner_concerns_are_woken() -> None:
    world = World()
    owner, everything, this, other, namespace, nothing = (world.client(n) for n in range(1, 7))
    driver = "type='signal',sender='org.freedesktop.DBus'"
    world.ask(everything, e.AddMatch(2, driver))
    world.ask(this, e.AddMatch(2, f"{driver},member='NameOwnerChanged',arg0='a.b'"))
    world.ask(other, e.AddMatch(2, f"{driver},member='NameOwnerChanged',arg0='a.c'"))
    world.ask(namespace, e.AddMatch(2, f"{driver},member='NameOwnerChanged',arg0namespace='a'"))
    world.ask(nothing, e.AddMatch(2, "type='signal',interface='a.b'"))
    world.ask(nothing, e.AddMatch(3, "type='method_call'"))
    world.ask(owner, e.RequestName(2, "a.b", 0))
    assert world.woken == {1, 2, 3, 5}
    world.ask(this, e.RemoveMatch(3, f"{driver},arg0='a.b',member='NameOwnerChanged'"))
    world.ask(everything, e.RemoveMatch(3, driver))
    world.ask(owner, e.ReleaseName(3, "a.b"))
    assert world.woken == {1, 5}


def test_a_new_connection_wakes_those_who_watch_for_it() -> None:
    world = World()
    a = world.client(1)
    world.ask(a, e.AddMatch(2, "member='NameOwnerChanged',arg0=':1.3'"))
    world.client(2)
    assert world.woken == set()
    world.client(3)
    assert world.woken == {1}


# -- the end of a connection -----------------------------------------------------------------------


def test_names_of_a_connection_that_ends_pass_on_and_its_own_name_goes_last() -> None:
    world = World()
    a, b = world.client(1), world.client(2)
    for request, name in enumerate(("a.a", "a.b", "a.c"), 2):
        world.ask(a, e.RequestName(request, name, 0))
    world.ask(b, e.RequestName(2, "a.b", 0))
    world.ask(a, e.AddMatch(9, "member='NameOwnerChanged'"))
    world.events.clear()
    world.bus.gone(1)
    assert world.taken() == [
        ("log", e.NameOwnerChanged("a.c", 1, 0)),
        ("log", e.NameOwnerChanged("a.b", 1, 2)),
        ("log", e.NameOwnerChanged("a.a", 1, 0)),
        ("log", e.ConnectionRemoved(1)),
    ]
    assert 2 in world.woken
    assert world.bus.matches.count == 0
    assert world.bus.snapshot(0, 0).names == (("a.b", 2),)


def test_the_admin_reads_who_was_disconnected_and_why() -> None:
    world = World()
    a, _ = world.client(1), world.client(2)
    world.ask(a, e.Leaving(2, "sent a message of an invalid type"))
    world.bus.gone(1)
    world.bus.gone(2)
    assert world.words == [
        "disconnected :1.1 (uid 1000, pid 9001): sent a message of an invalid type"
    ]


def test_nothing_of_a_connection_is_left() -> None:
    world = World(services=(service("a.b"),), limits={"service_start_timeout": 1000})
    a, b = world.client(1, uid=0), world.client(2, uid=0)
    for rule in ("", "type='method_call'", "interface='a.b'", "arg0='a.b'"):
        world.ask(a, e.AddMatch(2, rule))
    world.ask(a, e.RequestName(3, "a.c", 0))
    world.ask(b, e.RequestName(3, "a.c", 0))
    world.ask(a, e.StartService(4, "a.b", False))
    world.ask(a, e.ReloadConfig(5))
    world.ask(a, e.ReloadConfig(6))
    world.ask(a, e.Introduce(7, b.id, 0, 0), (1, 2, 3))
    world.ask(b, e.Introduced(1, 0, 0), (1, 2, 3))
    world.ask(a, e.BecomeMonitor(8, ()))
    world.bus.gone(1)
    del a
    gc.collect()
    assert [each for each in gc.get_objects() if isinstance(each, Connection)] == [b]


# -- monitors --------------------------------------------------------------------------------------


def test_a_monitor_loses_names_and_rules_and_then_is_one() -> None:
    world = World()
    root = world.client(1, uid=0)
    world.ask(root, e.RequestName(2, "a.b", 0))
    world.ask(root, e.AddMatch(3, "member='X'"))
    assert world.ask(root, e.BecomeMonitor(4, ("type='signal'",))) == [
        ("log", e.MatchRemoved(1, "member='X'")),
        ("log", e.MonitorAttached(1, ("type='signal'",))),
        ("log", e.NameOwnerChanged("a.b", 1, 0)),
        (1, e.Reply(4)),
    ]
    assert world.bus.snapshot(5, 6).monitors == ((1, ("type='signal'",)),)
    with pytest.raises(Violation):
        world.ask(root, e.RequestName(5, "a.b", 0))
    world.client(2)
    assert world.woken == {1}
    world.events.clear()
    world.bus.gone(1)
    assert world.taken() == [("log", e.ConnectionRemoved(1))]


def test_only_root_and_the_owner_of_the_bus_may_monitor() -> None:
    world = World()
    (answer,) = world.ask(world.client(1, uid=7), e.BecomeMonitor(2, ()))
    assert answer[1].error == ERROR + "AccessDenied"
    assert world.ask(world.client(2, uid=500), e.BecomeMonitor(2, ()))[-1] == (2, e.Reply(2))


def test_only_root_and_the_owner_of_the_bus_may_eavesdrop() -> None:
    world = World()
    (answer,) = world.ask(world.client(1, uid=7), e.AddMatch(2, "eavesdrop=true"))
    assert answer[1].error == ERROR + "AccessDenied"
    assert world.bus.matches.count == 0
    rule = "eavesdrop=true"
    assert world.ask(world.client(2, uid=500), e.AddMatch(2, rule))[-1] == (2, e.Reply(2))


# -- configuration ---------------------------------------------------------------------------------


def test_reload_is_answered_by_the_next_configuration_and_judged_by_it() -> None:
    world = World()
    a = world.client(1)
    assert world.ask(a, e.ReloadConfig(2)) == [("reload",)]
    world.events.clear()
    policy = Policy(default=(*OPEN.default, Rule(False, OWN, "t.conf", 9, name="a.b")))
    new = World(policy=policy).configuration
    world.bus.reconfigure(new, 1)
    assert world.taken() == [("log", e.PolicyChanged(1)), ANNOUNCED, (1, e.Reply(2))]
    assert world.ask(a, e.RequestName(3, "a.b", 0))[0][1].error == ERROR + "AccessDenied"
    assert world.ask(a, e.FetchPolicy(4)) == [(1, e.Reply(4, 1), 88)]


def test_a_configuration_that_says_the_same_is_fetched_by_nobody() -> None:
    """Each worker did, and judged everything anew. The signal is said all the same, as dbus-daemon says it."""
    world = World()
    a = world.client(1)
    world.ask(a, e.ReloadConfig(2))
    world.events.clear()
    world.bus.reconfigure(world.configuration, 0)
    assert world.taken() == [ANNOUNCED, (1, e.Reply(2))]


def test_a_configuration_that_could_not_be_had_is_fetched_by_all_once_it_can() -> None:
    """Workers that started meanwhile have it, the others don't."""
    world = World()
    world.client(1)
    for generation in (0, 1):
        world.events.clear()
        world.bus.reconfigure(None, generation)
        assert world.taken() == []
    for expected in ([("log", e.PolicyChanged(1)), ANNOUNCED], [ANNOUNCED]):
        world.events.clear()
        world.bus.reconfigure(world.configuration, 1)
        assert world.taken() == expected


def test_a_reload_asked_while_one_is_under_way_waits_for_another() -> None:
    world = World()
    a = world.client(1)
    world.ask(a, e.ReloadConfig(2))
    assert world.ask(a, e.ReloadConfig(3)) == []
    world.events.clear()
    world.bus.reconfigure(world.configuration)
    assert ("reload",) in world.taken()
    assert world.taken()[-1] == (1, e.Reply(2))
    world.events.clear()
    world.bus.reconfigure(world.configuration)
    assert world.taken()[-1] == (1, e.Reply(3))


def test_a_configuration_that_cannot_be_read_changes_nothing_and_is_an_error() -> None:
    world = World()
    a = world.client(1)
    world.ask(a, e.ReloadConfig(2))
    world.events.clear()
    world.bus.reconfigure(None)
    assert world.taken() == [(1, e.Failure(2, *FAULTY))]
    assert world.bus.generation == 0


def test_a_shortage_is_refused_and_costs_nobody_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()

    def short(_: str) -> list[int]:
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(world, "snapshot", short)
        world.client(1)
        (answer,) = world.taken()
        assert answer[1].error == ERROR + "NoMemory"
    assert world.client(2).id == 1
    assert world.ask(world.bus.connections[1], e.Hello(2))[-1] == (1, e.Reply(2, 2), 77)


# -- snapshots -------------------------------------------------------------------------------------


def test_snapshot_tells_the_whole_state() -> None:
    world = World()
    a, b = world.client(1), world.client(2, uid=5)
    world.ask(a, e.RequestName(2, "a.b", 0))
    world.ask(b, e.RequestName(2, "a.b", 0))
    world.ask(b, e.AddMatch(3, "member='X'"))
    world.ask(b, e.AddMatch(4, "member='X'"))
    assert world.bus.snapshot(10, 20) == e.Snapshot(
        position=10,
        stamp=20,
        connections=((1, credentials(1)), (2, credentials(2, 5))),
        names=(("a.b", 1),),
        matches=((2, "member='X'"), (2, "member='X'")),
        monitors=(),
        activatable=(),
        policy_generation=0,
        queues=(e.QueueChanged("a.b", (2,)),),
    )


def test_statistics_count() -> None:
    world = World()
    a = world.client(1)
    world.bus.worker_started(2, 2)
    world.ask(a, e.RequestName(2, "a.b", 0))
    world.ask(a, e.AddMatch(3, "member='X'"))
    ((_, reply),) = world.ask(a, e.Statistics(4))
    assert reply.value["BusNames"] == 2
    assert reply.value["MatchRules"] == 1
    assert reply.value["SpareWorkers"] == 1


@pytest.mark.parametrize("fds", [[5], [5, 6, 7, 8]])
def test_wrong_number_of_descriptors_is_a_violation(fds: list[int]) -> None:
    world = World()
    a = world.client(1)
    with pytest.raises(Violation):
        world.ask(a, e.Introduce(2, 2, 0, 0), fds)
    with pytest.raises(Violation):
        world.ask(a, e.AddMatch(2, "member='X'"), fds)
