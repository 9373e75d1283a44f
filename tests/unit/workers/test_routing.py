"""Where a message goes and whether it may: the sender's worker asks the policy of both sides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from kbusd.policy.decide import ClientPolicy
from kbusd.policy.rules import RECEIVE, SEND, Policy, Rule
from kbusd.rings.entries import (
    ActivatableChanged,
    ConnectionAdded,
    Credentials,
    LabelApart,
    LogEntry,
    MatchAdded,
    MonitorAttached,
    NameOwnerChanged,
    QueueChanged,
)
from kbusd.rings.envelope import Envelope
from kbusd.workers import routing
from kbusd.workers.replica import BUS_ID, BUS_NAME, Replica

ALLOW = (Rule(True, SEND, "t.conf", 1), Rule(True, RECEIVE, "t.conf", 2))


def person(id: int) -> Credentials:
    """Connection 1 belongs to uid 1, and so on."""
    return Credentials(id, id, 100 + id, (id,))


def router(policy: Policy, *entries: LogEntry) -> routing.Router:
    """That of connection 1; there are 1, 2 and 3, who watch signals of test.I."""
    replica = Replica()
    replica.me = 1
    for id in (1, 2, 3):
        replica.apply(ConnectionAdded(id, person(id)))
        replica.apply(MatchAdded(id, "interface='test.I'"))
    for entry in entries:
        replica.apply(entry)
    return routing.Router(replica, ClientPolicy(policy, person(1), owner=0), lambda _: None)


def message(destination: str | None = None, type: int = routing.SIGNAL, **fields: Any) -> Envelope:
    values = {"path": "/", "interface": "test.I", "member": "M", "error_name": None} | fields
    return Envelope(type, False, destination, signature="", **values)


def decide(of: routing.Router, what: Envelope) -> routing.Decision:
    return of.decide(what, 0, 0, tuple)


def refused(decision: routing.Decision) -> str:
    assert decision.error is not None
    assert decision.error[0] == routing.ACCESS_DENIED
    return decision.error[1]


def test_a_receivers_policy_is_known_to_the_sender() -> None:
    """User 2 may not get test.I, which its own worker would refuse as well."""
    rule = Rule(False, RECEIVE, "t.conf", 9, interface="test.I")
    of = router(Policy(default=ALLOW, users={2: (rule,)}))
    text = refused(decide(of, message(":1.2")))
    assert text.startswith("Rejected receive message, 2 matched rules")
    assert "(uid=2 pid=102" in text
    assert text.endswith("(denied by rule t.conf:9)")
    assert decide(of, message(":1.3")).targets == (3,)
    broadcast = decide(of, message())
    assert broadcast.targets == (1, 3)
    assert [text.partition(",")[0] for text in broadcast.refusals] == ["Rejected receive message"]


def test_a_senders_policy_keeps_a_broadcast_from_some() -> None:
    rule = Rule(False, SEND, "t.conf", 9, name="a.b")
    of = router(Policy(default=(*ALLOW, rule)), NameOwnerChanged("a.b", 0, 2))
    broadcast = decide(of, message())
    assert broadcast.targets == (1, 3)
    assert [text.partition(",")[0] for text in broadcast.refusals] == ["Rejected send message"]


@pytest.mark.parametrize(("waiting", "targets"), [((), (3,)), ((3,), ())])
def test_a_queue_counts(waiting: Sequence[int], targets: Sequence[int]) -> None:
    rule = Rule(False, SEND, "t.conf", 9, name="a.b")
    entries = NameOwnerChanged("a.b", 0, 2), QueueChanged("a.b", tuple(waiting))
    assert decide(router(Policy((*ALLOW, rule)), *entries), message(":1.3")).targets == targets


def test_who_may_not_send_to_a_service_does_not_start_it() -> None:
    rule = Rule(False, SEND, "t.conf", 9, name="a.b")
    of = router(Policy(default=(*ALLOW, rule)), ActivatableChanged(("a.b", "a.c")))
    assert 'destination="a.b" (bus)' in refused(decide(of, message("a.b", routing.CALL)))
    assert decide(of, message("a.c", routing.CALL)).activate == "a.c"
    assert decide(router(Policy((*ALLOW, rule))), message("a.b")).activate == "a.b"  # fails there


def test_what_the_bus_says_to_others_is_refused_for_them() -> None:
    """As a monitor's worker sees it: one text for each who does not get the signal."""
    rule = Rule(False, RECEIVE, "t.conf", 9, name=BUS_NAME, member="NameLost")
    of = router(
        Policy(default=(*ALLOW, rule)),
        MatchAdded(2, "member='NameLost'"),
        MatchAdded(3, "member='NameLost'"),
        ConnectionAdded(4, person(4)),
        MonitorAttached(4, ()),
    )
    of.replica.me = 4
    lost = {"interface": BUS_NAME, "member": "NameLost"}
    assert of.admit_from_bus(message(":1.4", **lost)) is not None
    (text,) = of.refused_from_bus(message(":1.2", **lost), tuple)
    assert 'sender="(unset)" ((bus))' in text
    assert len(of.refused_from_bus(message(**lost), tuple)) == 2
    assert of.refused_from_bus(message(":1.2", interface=BUS_NAME), tuple) == []
    assert of.refused_from_bus(message(":1.9", **lost), tuple) == []
    of.replica.me = 2
    assert of.refused_from_bus(message(":1.3", **lost), tuple) == []  # it is no monitor


def test_messages_to_the_bus_itself() -> None:
    rule = Rule(False, SEND, "t.conf", 9, name=BUS_NAME)
    of = router(Policy(default=(*ALLOW, rule)))
    assert 'destination="org.freedesktop.DBus" (bus)' in refused(decide(of, message(BUS_NAME)))
    of.replica.me = 0
    assert decide(of, message(BUS_NAME, routing.CALL)).targets == (BUS_ID,)


def labelled(id: int, label: bytes) -> Credentials:
    return Credentials(id, id, 100 + id, (id,), label)


def test_selinux_keeps_labels_apart_each_way_whatever_the_policy_allows() -> None:
    """The sender's worker asks, and the receiver's, too; who asked may not even be answered."""
    replica = Replica()
    replica.me = 1
    replica.apply(LabelApart(b"b", of=(b"a",)))
    for id, label in ((1, b"a"), (2, b"b"), (3, b"c")):
        replica.apply(ConnectionAdded(id, labelled(id, label)))
        replica.apply(MatchAdded(id, "interface='test.I'"))
    own = ClientPolicy(Policy(default=ALLOW), labelled(1, b"a"), owner=0)
    of = routing.Router(replica, own, lambda _: None, "bus_t")
    for kind in (routing.CALL, routing.RETURN, routing.SIGNAL):
        text = refused(decide(of, message(":1.2", kind)))
        assert "denied  { send_msg } for scontext=a tcontext=b tclass=dbus" in text
        assert decide(of, message(":1.3", kind)).targets == (3,)
    broadcast = decide(of, message())
    assert broadcast.targets == (1, 3)
    assert len(broadcast.refusals) == 1
    # The other way it is allowed.
    assert of.admit(message(":1.1"), replica.connections[2], 0) is None
    replica.me = 2
    text = str(of.admit(message(":1.2"), replica.connections[1], 0))
    assert "scontext=a tcontext=b" in text
    # It may come to be kept from the bus itself.
    replica.apply(LabelApart(b"b", to=(b"",), of=(b"",)))
    text = refused(decide(of, message(BUS_NAME, routing.CALL)))
    assert "scontext=b tcontext=bus_t tclass=dbus" in text
    assert "scontext=bus_t tcontext=b" in str(of.admit_from_bus(message(":1.2")))
