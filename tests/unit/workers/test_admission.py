"""Whom a message goes to and whether it may: asked by the sender's worker, and by the receiver's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from kbusd.policy import configuration
from kbusd.policy.decide import ClientPolicy
from kbusd.rings.entries import (
    ConnectionAdded,
    ConnectionRemoved,
    Credentials,
    CustomChanged,
    NameOwnerChanged,
    NamePolicyChanged,
    PolicyEntry,
)
from kbusd.rings.envelope import Envelope
from kbusd.workers.name_policies import NamePolicies
from kbusd.workers.replica import Replica
from kbusd.workers.routing import ACCESS_DENIED, CALL, RETURN, SIGNAL, Router

ALICE, BOB = 1, 2  # connections; their uids are 1001 and 1002
LISTEN = "<listen>unix:tmpdir=/tmp</listen>"


def person(id: int) -> Credentials:
    return Credentials(1000 + id, 100, 4000 + id, ())


def envelope(type: int = CALL, interface: str | None = "a.b", to: str | None = ":1.2") -> Envelope:
    return Envelope(type, False, to, "/p", interface, "M", None, "")


class Worker:
    """The part of a worker that decides, for `me`, under one configuration."""

    def __init__(self, policy: ClientPolicy, me: int) -> None:
        self.log: list[str] = []
        self.replica = Replica()
        self.replica.me = me
        for id in (ALICE, BOB):
            self.replica.apply(ConnectionAdded(id, person(id)))
        self.replica.apply(NameOwnerChanged("com.bob", 0, BOB))
        names = NamePolicies(self.replica, 0, closed=False)
        self.router = Router(self.replica, policy, self.log.append, names=names)

    def sends(self, message: Envelope) -> bool:
        return self.router.decide(message, 0, 0, lambda: ()).error is None

    def takes(self, message: Envelope, sender: int = ALICE) -> bool:
        return self.router.admit(message, self.replica.connections[sender], 0) is None


@pytest.fixture
def workers(tmp_path: Path) -> Callable[[str], tuple[Worker, Worker]]:
    def make(rules: str) -> tuple[Worker, Worker]:
        file = tmp_path / "bus.conf"
        file.write_text(
            f'<busconfig>{LISTEN}<policy context="default"><allow send_destination="*"/>'
            f'<allow receive_sender="*"/></policy>\n{rules}</busconfig>'
        )
        policy = configuration.load(str(file)).policy
        alice, bob = (Worker(ClientPolicy(policy, person(id)), id) for id in (ALICE, BOB))
        return alice, bob

    return make


@pytest.mark.parametrize(
    "rule",
    [
        '<deny send_interface="a.b"/>',
        '<deny send_destination="com.bob" send_interface="a.b"/>',
        '<deny send_destination_prefix="com" send_member="M" send_interface="a.b"/>',
    ],
)
def test_what_the_sender_may_not_send_the_receiver_does_not_take(
    workers: Callable[[str], tuple[Worker, Worker]], rule: str
) -> None:
    """A worker that was taken over sends what it likes."""
    alice, bob = workers(f'<policy user="1001">\n{rule}</policy>')
    for to in (":1.2", "com.bob"):
        assert not alice.sends(envelope(to=to))
        assert not bob.takes(envelope(to=to))
        assert "Rejected send message" in bob.log[-1] and "bus.conf:3)" in bob.log[-1]
    assert bob.takes(envelope(interface="a.c"))
    assert bob.takes(envelope(interface="a.b"), sender=BOB)


def test_a_new_policy_holds_for_others_too(
    workers: Callable[[str], tuple[Worker, Worker]],
) -> None:
    _, bob = workers('<policy user="1001"><deny send_interface="a.b"/></policy>')
    assert not bob.takes(envelope())
    bob.router.policy = workers("")[1].router.policy
    assert bob.takes(envelope())


def test_broadcasts_and_replies_are_judged_by_the_receiver_too(
    workers: Callable[[str], tuple[Worker, Worker]],
) -> None:
    _, bob = workers('<policy user="1001"><deny send_type="signal"/></policy>')
    assert not bob.takes(envelope(SIGNAL, to=None))
    assert bob.takes(envelope(RETURN))


def test_a_rule_that_logs_is_asked_for_every_message(
    workers: Callable[[str], tuple[Worker, Worker]],
) -> None:
    alice, bob = workers('<policy user="1001"><allow send_interface="a.b" log="true"/></policy>')
    for count in (1, 2):
        decision = alice.router.decide(envelope(), 0, 0, lambda: ())
        assert decision.targets == (BOB,) and decision.depends
        assert len(alice.log) == count and "Would reject message" in alice.log[-1]
    assert not alice.router.decide(envelope(interface="a.c"), 0, 0, lambda: ()).depends
    assert bob.takes(envelope()) and not bob.log  # the sender's worker has logged it


def test_a_message_of_unknown_type_goes_nowhere(
    workers: Callable[[str], tuple[Worker, Worker]],
) -> None:
    alice, _ = workers("")
    error = alice.router.decide(envelope(5), 0, 0, lambda: ()).error
    assert error == (ACCESS_DENIED, "Message bus will not accept messages of unknown type\n")


WORLD, TALK = 3, 1
CAROL = 3  # behind a custom endpoint of kdbus


def test_kdbuss_policy_holds_between_d_bus_clients_too(
    workers: Callable[[str], tuple[Worker, Worker]],
) -> None:
    alice, bob = workers("")
    for each in (alice, bob):
        each.replica.apply(NamePolicyChanged(ALICE, (PolicyEntry("com.bob", False, ()),)))
    assert not alice.sends(envelope()) and not bob.takes(envelope())
    assert bob.takes(envelope(RETURN))  # which was asked for
    assert not alice.takes(envelope(SIGNAL, to=None), BOB)
    assert bob.takes(envelope(SIGNAL, to=None))
    for each in (alice, bob):
        entry = PolicyEntry("com.bob", False, ((WORLD, TALK, 0),))
        each.replica.apply(NamePolicyChanged(ALICE, (entry,)))
    assert alice.sends(envelope())
    assert bob.takes(envelope()) and alice.takes(envelope(SIGNAL, to=None), BOB)


def test_who_is_behind_an_endpoint_reaches_no_d_bus_client_unasked(
    workers: Callable[[str], tuple[Worker, Worker]],
) -> None:
    _, bob = workers("")
    bob.replica.apply(ConnectionAdded(CAROL, person(CAROL), 0, 7))
    assert not bob.takes(envelope(), CAROL)
    entry = PolicyEntry("com.bob", False, ((WORLD, TALK, 0),))
    bob.replica.apply(CustomChanged(7, (entry,)))
    assert bob.takes(envelope(), CAROL)
    bob.replica.apply(CustomChanged(7, ()))
    assert not bob.takes(envelope(), CAROL)
    assert bob.sends(envelope(to=f":1.{CAROL}"))  # from outside it is a connection as others are
    bob.replica.apply(ConnectionRemoved(CAROL))
