"""Introductions: exactly one for each pair, whoever asks, dies or sleeps."""

from __future__ import annotations

import pytest

from kbusd.broker.introductions import ANSWER_SECONDS, MAX_PENDING
from kbusd.broker.refusal import Violation
from kbusd.policy.rules import OWN, RECEIVE, SEND, USER, Policy, Rule
from kbusd.rings import entries as e
from tests.unit.broker.world import SHARED, World

ERROR = "org.freedesktop.DBus.Error."
A_FDS = [1, 2, 3]
B_FDS = [5, 6, 7]


def test_both_get_the_others_descriptors_and_their_ends_of_the_sockets() -> None:
    world = World()
    a, b = world.client(1), world.client(2)
    ((to, message, *fds),) = world.ask(a, e.Introduce(7, b.id, 10, 11), A_FDS)
    assert (to, message) == (2, e.Introduction(1, a.id, 10, 11))
    theirs = fds[3:]
    assert fds[:3] == A_FDS and len(theirs) == SHARED
    ((to, message, *fds),) = world.ask(b, e.Introduced(1, 20, 21), B_FDS)
    assert (to, message) == (1, e.Reply(7, [20, 21]))
    ours = fds[3:]
    assert fds[:3] == B_FDS and len(ours) == SHARED
    assert not set(ours) & set(theirs)
    assert not world.open_fds


def test_when_both_ask_at_once_there_is_one_introduction() -> None:
    world = World()
    a, b = world.client(1), world.client(2)
    world.ask(a, e.Introduce(7, b.id, 10, 11), A_FDS)
    assert world.ask(b, e.Introduce(9, a.id, 20, 21), B_FDS) == [(2, e.Reply(9))]
    ((to, message, *_),) = world.ask(b, e.Introduced(1, 20, 21), B_FDS)
    assert (to, message) == (1, e.Reply(7, [20, 21]))
    assert world.bus.introductions.made == 1
    assert not world.open_fds


def test_nobody_is_introduced_twice_to_himself_or_to_nobody() -> None:
    world = World()
    a, b = world.client(1), world.client(2)
    world.ask(a, e.Introduce(7, b.id, 0, 0), A_FDS)
    assert world.ask(a, e.Introduce(8, b.id, 0, 0), A_FDS)[0][1].error == ERROR + "Failed"
    world.ask(b, e.Introduced(1, 0, 0), B_FDS)
    assert world.ask(b, e.Introduce(9, a.id, 0, 0), B_FDS)[0][1].error == ERROR + "Failed"
    for nobody in (a.id, 99, 0, -1):
        (answer,) = world.ask(a, e.Introduce(9, nobody, 0, 0), A_FDS)
        assert answer[1].error == ERROR + "NameHasNoOwner"


def world_of(*rules: Rule) -> World:
    """`rules` beside those by which everybody may connect and receive."""
    given = Rule(True, USER, "t.conf", 1), Rule(True, RECEIVE, "t.conf", 2), *rules
    return World(policy=Policy(default=given))


@pytest.mark.parametrize(
    ("rules", "may"),
    [
        ((), False),
        ((Rule(False, SEND, "t.conf", 3),), False),
        ((Rule(True, SEND, "t.conf", 3, name="org.freedesktop.DBus"),), False),
        ((Rule(True, SEND, "t.conf", 3, name="a.b"),), False),
        ((Rule(True, SEND, "t.conf", 3, name="a.b"), Rule(True, OWN, "t.conf", 4)), True),
        ((Rule(True, SEND, "t.conf", 3, name="a", prefix=True),), True),
        ((Rule(True, SEND, "t.conf", 3, type=2, requested_reply=True),), True),
        ((Rule(True, SEND, "t.conf", 3), Rule(False, RECEIVE, "t.conf", 4)), False),
    ],
)
def test_only_those_are_introduced_who_may_ever_send_something(
    rules: tuple[Rule, ...], may: bool
) -> None:
    world = world_of(*rules)
    a, b = world.client(1), world.client(2)
    ((to, message, *_),) = world.ask(a, e.Introduce(7, b.id, 0, 0), A_FDS)
    if may:
        assert (to, type(message)) == (2, e.Introduction)
    else:
        assert (to, message.error) == (1, ERROR + "AccessDenied")
        assert world.words == [f"{a} may not send anything to {b}: no rule allows it"]
        assert not world.open_fds


def test_a_monitor_is_introduced_whatever_policy_says() -> None:
    world = world_of()
    a, b = world.client(1), world.client(2, uid=0)
    world.ask(b, e.BecomeMonitor(3, ()))
    ((to, message, *_),) = world.ask(a, e.Introduce(7, b.id, 0, 0), A_FDS)
    assert (to, type(message)) == (2, e.Introduction)


def test_the_asker_is_told_when_the_peer_goes_instead_of_answering() -> None:
    world = World()
    a, b = world.client(1), world.client(2)
    world.ask(a, e.Introduce(7, b.id, 0, 0), A_FDS)
    world.events.clear()
    world.bus.gone(2)
    entry, (to, message) = world.taken()
    assert entry == ("log", e.ConnectionRemoved(b.id))
    assert (to, message.request, message.error) == (1, 7, ERROR + "NameHasNoOwner")
    assert not world.open_fds


def test_the_peer_hears_from_the_log_that_the_asker_went() -> None:
    world = World()
    a, b = world.client(1), world.client(2)
    world.ask(a, e.Introduce(7, b.id, 0, 0), A_FDS)
    world.events.clear()
    world.bus.gone(1)
    assert world.woken == {2}
    assert world.ask(b, e.Introduced(1, 0, 0), B_FDS) == []
    assert not world.open_fds


def test_those_who_were_introduced_hear_that_a_connection_ended_and_nobody_else() -> None:
    world = World()
    a, b, _ = world.client(1), world.client(2), world.client(3)
    world.ask(a, e.Introduce(7, b.id, 0, 0), A_FDS)
    world.ask(b, e.Introduced(1, 0, 0), B_FDS)
    world.events.clear()
    world.bus.gone(2)
    assert world.woken == {1}
    assert not a.introduced


def test_a_peer_that_does_not_answer_is_given_up_and_told_so() -> None:
    world = World()
    a, b = world.client(1), world.client(2)
    world.ask(a, e.Introduce(7, b.id, 0, 0), A_FDS)
    world.events.clear()
    assert world.bus.deadline() == world.time + ANSWER_SECONDS
    world.bus.tick()
    assert world.taken() == []
    world.time += ANSWER_SECONDS
    world.bus.tick()
    withdrawn, (to, message) = world.taken()
    assert withdrawn == (2, e.Withdrawn(1, a.id))
    assert (to, message.request, message.error) == (1, 7, ERROR + "TimedOut")
    assert world.bus.deadline() is None
    assert not world.open_fds
    assert len(world.words) == 1
    assert world.ask(b, e.Introduced(1, 0, 0), B_FDS) == []
    assert world.ask(a, e.Introduce(8, b.id, 0, 0), A_FDS)[0][1] == e.Introduction(2, a.id, 0, 0)


def test_answering_for_somebody_else_is_a_violation() -> None:
    world = World()
    a, b, c = world.client(1), world.client(2), world.client(3)
    world.ask(a, e.Introduce(7, b.id, 0, 0), A_FDS)
    with pytest.raises(Violation):
        world.ask(c, e.Introduced(1, 0, 0), B_FDS)


def test_unanswered_introductions_of_one_worker_are_limited() -> None:
    world = World(limits={"max_connections_per_user": 1000})
    a = world.client(1)
    for n in range(2, MAX_PENDING + 3):
        peer = world.client(n)
        (answer,) = world.ask(a, e.Introduce(n, peer.id, 0, 0), A_FDS)
    assert answer[1].error == ERROR + "LimitsExceeded"
    assert len(world.open_fds) == SHARED * MAX_PENDING
    world.bus.gone(1)
    assert not world.open_fds
