"""Who gets a broadcast, against asking every rule in turn; names, owners and a log that lies."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kbusd.rings.entries import (
    ActivatableChanged,
    ConnectionAdded,
    ConnectionRemoved,
    Credentials,
    LogEntry,
    MatchAdded,
    MatchRemoved,
    MonitorAttached,
    NameOwnerChanged,
    PolicyChanged,
    QueueChanged,
    Snapshot,
)
from kbusd.wire import match
from kbusd.wire.body import PathArgument
from kbusd.workers.replica import (
    BUS_ID,
    BUS_NAME,
    Replica,
    ReplicaError,
    parse_unique,
    unique_name,
)

SIGNAL = 4


def person(id: int) -> Credentials:
    return Credentials(1000 + id, 1000, 4000 + id, (1000, 2000))


def replica_of(*entries: LogEntry, connections: int = 4, me: int = 0) -> Replica:
    replica = Replica()
    replica.me = me
    for id in range(1, connections + 1):
        replica.apply(ConnectionAdded(id, person(id)))
    for entry in entries:
        replica.apply(entry)
    return replica


def ask(
    replica: Replica,
    sender: int = 1,
    path: str = "/a",
    interface: str = "a.b",
    member: str = "M",
    args: Sequence[str | None] = (),
) -> tuple[tuple[int, ...], bool]:
    return replica.subscribers(SIGNAL, sender, None, path, interface, member, lambda: args)


# -- names ---------------------------------------------------------------------------------------


def test_owners_by_unique_and_well_known_name() -> None:
    replica = replica_of(NameOwnerChanged("a.b", 0, 2))
    assert replica.owner("a.b") == 2
    assert replica.owner(":1.2") == 2
    assert replica.owner(BUS_NAME) == BUS_ID
    assert replica.owner("a.c") is None
    assert replica.owner(":1.5") is None
    assert replica.connections[2].names == {"a.b"}
    replica.apply(NameOwnerChanged("a.b", 2, 3))
    assert [sorted(replica.connections[id].names) for id in (2, 3)] == [[], ["a.b"]]
    replica.apply(NameOwnerChanged("a.b", 3, 0))
    assert replica.owner("a.b") is None


@pytest.mark.parametrize("name", [":1.", ":1.01", ":2.1", ":1.-1", ":1.+1", ":1.1 ", ":1.²", ":1"])
def test_only_this_buss_unique_names_are_one(name: str) -> None:
    assert parse_unique(name) is None


def test_unique_names_there_and_back() -> None:
    assert [parse_unique(unique_name(id)) for id in (1, 10, 2**63)] == [1, 10, 2**63]


def test_who_waits_for_a_name_counts_for_policy_and_not_for_match_rules() -> None:
    replica = replica_of(NameOwnerChanged("a.b", 0, 2), QueueChanged("a.b", (3, 1)))
    assert replica.owners("a.b") == [2, 3, 1]
    assert set(replica.policy_names(1)) == {":1.1", "a.b"}
    assert set(replica.sender_names(1)) == {":1.1"}
    replica.apply(NameOwnerChanged("a.b", 2, 3, (1,)))
    assert replica.owners("a.b") == [3, 1]
    assert set(replica.policy_names(2)) == {":1.2"}
    replica.apply(QueueChanged("a.b", ()))
    assert replica.owners("a.b") == [3]
    assert set(replica.policy_names(1)) == {":1.1"}
    replica.apply(NameOwnerChanged("a.b", 3, 0))
    assert replica.owners("a.b") == []


def test_owners_of_unique_names_and_of_the_bus() -> None:
    replica = replica_of()
    assert replica.owners(":1.2") == [2]
    assert replica.owners(BUS_NAME) == [BUS_ID]
    for name in (":1.01", ":1.9", "a.b", "", ":1."):
        assert replica.owners(name) == []


# -- subscribers ---------------------------------------------------------------------------------


def test_each_subscriber_once_in_order() -> None:
    replica = replica_of(
        MatchAdded(3, "type='signal'"),
        MatchAdded(2, "member='M'"),
        MatchAdded(2, "interface='a.b'"),
        MatchAdded(2, "interface='a.b'"),
        MatchAdded(1, "member='Other'"),
    )
    assert ask(replica) == ((2, 3), False)


def test_a_rule_added_twice_is_removed_twice() -> None:
    replica = replica_of(MatchAdded(2, "member='M'"), MatchAdded(2, "member='M'"))
    replica.apply(MatchRemoved(2, "member='M'"))
    assert ask(replica) == ((2,), False)
    replica.apply(MatchRemoved(2, "member='M'"))
    assert ask(replica) == ((), False)


def test_a_rule_is_removed_by_an_equal_one() -> None:
    replica = replica_of(MatchAdded(2, "member='M',type='signal'"))
    assert ask(replica)[0] == (2,)
    replica.apply(MatchRemoved(2, "type=signal,member=M"))
    assert ask(replica)[0] == ()


def test_nobody_gets_a_unicast() -> None:
    replica = replica_of(MatchAdded(2, "type='signal'"), MatchAdded(3, "eavesdrop=true"))
    found = replica.subscribers(SIGNAL, 1, ":1.4", "/a", "a.b", "M", lambda: ())
    assert found == ((), False)


def test_sender_by_well_known_name_follows_the_owner() -> None:
    replica = replica_of(NameOwnerChanged("a.b", 0, 1), MatchAdded(2, "sender='a.b'"))
    assert ask(replica, sender=1)[0] == (2,)
    before = replica.matches_version
    replica.apply(NameOwnerChanged("a.b", 1, 3))
    assert replica.matches_version != before
    assert ask(replica, sender=1)[0] == ()
    assert ask(replica, sender=3)[0] == (2,)


def test_arguments_are_fetched_once_and_only_where_they_matter() -> None:
    replica = replica_of(
        MatchAdded(2, "member='M',arg0='x'"),
        MatchAdded(3, "member='M',arg1path='/y/'"),
        MatchAdded(4, "member='M',arg0namespace='x'"),
    )
    fetched: list[int] = []

    def arguments() -> Sequence[str | None]:
        fetched.append(1)
        return ("x.z", "/y/z")

    assert replica.subscribers(SIGNAL, 1, None, "/", "a.b", "M", arguments) == ((3, 4), True)
    assert len(fetched) == 1
    assert replica.subscribers(SIGNAL, 1, None, "/", "a.b", "N", arguments) == ((), False)
    assert len(fetched) == 1


def test_arg0_wants_a_string_and_no_object_path() -> None:
    replica = replica_of(MatchAdded(2, "arg0='/x'"))
    assert ask(replica, args=("/x",))[0] == (2,)
    assert ask(replica, args=(PathArgument("/x"),))[0] == ()
    assert ask(replica, args=(None, "/x"))[0] == ()


def test_what_is_cached_is_dropped_only_when_it_must_be() -> None:
    replica = replica_of(MatchAdded(2, "member='M'"))
    ask(replica)
    before = replica.matches_version
    replica.apply(ConnectionAdded(9, person(9)))
    replica.apply(NameOwnerChanged("nobody.asks", 0, 9))
    replica.apply(NameOwnerChanged("nobody.asks", 9, 0))
    replica.apply(MatchAdded(2, "member='M'"))
    replica.apply(ConnectionRemoved(9))
    replica.apply(ActivatableChanged(("x.y",)))
    assert replica.matches_version == before
    replica.apply(ConnectionRemoved(2))
    assert replica.matches_version != before
    assert ask(replica)[0] == ()


def test_nothing_is_left_of_those_who_left() -> None:
    """A client that adds and removes rules for ever must cost no other worker memory."""
    replica = replica_of(connections=1, me=1)
    ask(replica)
    for id in range(2, 6):
        replica.apply(ConnectionAdded(id, person(id)))
        for rule in ("arg0='x'", f"arg0='{id}'", "member='M'", f"sender=':1.{id}'", "type=error"):
            replica.apply(MatchAdded(id, rule))
    replica.apply(MatchRemoved(2, "arg0='x'"))
    for id in range(2, 6):
        replica.apply(ConnectionRemoved(id))
    assert replica.match_rules() == 0
    assert not replica._watches
    assert replica._index is not None
    assert (len(replica._index), replica._index.senders) == (0, {})


def test_what_my_client_receives() -> None:
    replica = replica_of(
        MatchAdded(2, "member='M',sender='a.b'"), MatchAdded(3, "type='signal'"), me=2
    )

    def mine(sender: int, member: str) -> tuple[bool, bool]:
        return replica.receives(SIGNAL, sender, "/", "a.b", member, lambda: ())

    assert mine(1, "M") == (False, False)
    before = replica.my_version
    replica.apply(MatchAdded(3, "type='signal',member='N'"))
    assert replica.my_version == before
    replica.apply(NameOwnerChanged("a.b", 0, 1))
    assert replica.my_version != before
    assert mine(1, "M") == (True, False)
    assert mine(1, "N") == (False, False)
    replica.apply(MatchRemoved(2, "member='M',sender='a.b'"))
    assert mine(1, "M") == (False, False)


# -- monitors ------------------------------------------------------------------------------------


def test_monitors_see_messages_to_others() -> None:
    replica = replica_of(NameOwnerChanged("a.b", 0, 2))
    replica.apply(MonitorAttached(3, ()))
    replica.apply(MonitorAttached(4, ("destination='a.b'", "arg0='x'")))
    assert 3 not in replica.connections
    assert replica.owner(":1.3") is None

    def seen(destination: str | None, *args: str) -> tuple[int, ...]:
        return replica.watching(SIGNAL, 1, destination, "/", "a.b", "M", lambda: args)[0]

    assert seen(":1.2") == (3, 4)
    assert seen("a.b") == (3, 4)
    assert seen(":1.1") == (3,)
    assert seen(":1.1", "x") == (3, 4)
    assert seen(None) == (3,)
    replica.apply(ConnectionRemoved(3))
    assert seen(None) == ()


def test_eavesdroppers_see_messages_to_others_while_they_have_a_rule_that_says_so() -> None:
    replica = replica_of(NameOwnerChanged("a.b", 0, 2))

    def seen(destination: str | None, *args: str, only: int = 0) -> tuple[tuple[int, ...], bool]:
        return replica.overhearing(SIGNAL, 1, destination, "/", "a.b", "M", lambda: args, only)

    replica.apply(MatchAdded(3, "member='M',eavesdrop='false'"))
    assert not replica.eavesdroppers
    rule = "destination='a.b',eavesdrop='true'"
    for _ in range(2):
        replica.apply(MatchAdded(3, rule))
    assert seen(":1.2") == seen("a.b") == ((3,), False)
    assert seen(":1.1")[0] == ()
    replica.apply(MatchAdded(4, "arg0='x',eavesdrop='true'"))
    assert seen(":1.1", "x") == ((4,), True)
    assert seen("a.b", "x", only=3) == ((3,), False)
    replica.apply(MatchRemoved(3, rule))
    assert seen("a.b") == ((3,), True)
    replica.apply(MatchRemoved(3, rule))
    replica.apply(ConnectionRemoved(4))
    assert not replica.eavesdroppers


# -- a log that lies -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "entry",
    [
        ConnectionAdded(1, person(1)),
        ConnectionAdded(-1, person(1)),
        ConnectionRemoved(9),
        ConnectionRemoved(2),
        NameOwnerChanged("a.b", 3, 1),
        NameOwnerChanged("a.b", 0, 1),
        NameOwnerChanged("a.c", 0, 9),
        MatchAdded(9, "type='signal'"),
        MatchRemoved(1, "type='signal'"),
        MatchRemoved(1, "bogus"),
        MonitorAttached(1, ()),
        MonitorAttached(2, ("bogus",)),
        NameOwnerChanged("a.b", 2, 0, (1,)),
        NameOwnerChanged("a.b", 2, 1, (1,)),
        QueueChanged("a.b", (2,)),
        QueueChanged("a.b", (1, 1)),
        QueueChanged("a.b", (9,)),
        QueueChanged("a.c", (1,)),
    ],
)
def test_a_log_that_contradicts_itself(entry: LogEntry) -> None:
    replica = replica_of(NameOwnerChanged("a.b", 0, 2), MatchAdded(1, "member='M'"))
    with pytest.raises(ReplicaError):
        replica.apply(entry)


@pytest.mark.parametrize("entry", [ConnectionRemoved(3), MonitorAttached(3, ())])
def test_who_goes_leaves_the_queues_first(entry: LogEntry) -> None:
    replica = replica_of(NameOwnerChanged("a.b", 0, 2), QueueChanged("a.b", (3,)))
    with pytest.raises(ReplicaError):
        replica.apply(entry)


def test_a_rule_that_does_not_parse_is_the_brokers_fault() -> None:
    replica = replica_of(MatchAdded(1, "bogus"))
    with pytest.raises(ReplicaError, match="bogus"):
        ask(replica)


# -- against a simple model ----------------------------------------------------------------------

NAMES = ["a.b", "c.d"]
PATHS = ["/", "/a", "/a/b"]
MEMBERS = ["M", "N"]
KEYS: dict[str, list[str]] = {
    "type": ["signal", "method_call"],
    "sender": [*NAMES, ":1.1", ":1.2", BUS_NAME],
    "interface": ["a.b", "c.d"],
    "member": MEMBERS,
    "path": PATHS,
    "path_namespace": PATHS,
    "destination": [":1.1", "a.b"],
    "arg0": ["x", "/a/"],
    "arg0namespace": ["x"],
    "arg0path": ["/a/", "/a/b"],
    "arg1": ["x"],
    "eavesdrop": ["true"],
}


@st.composite
def rules(draw: st.DrawFn) -> str:
    keys = draw(st.lists(st.sampled_from(sorted(KEYS)), unique=True, max_size=4))
    if "path" in keys and "path_namespace" in keys:
        keys.remove("path")
    if "arg0" in keys or "arg0namespace" in keys:
        keys = [key for key in keys if key != "arg0path"]
    if "arg0namespace" in keys:
        keys = [key for key in keys if key != "arg0"]
    return ",".join(f"{key}='{draw(st.sampled_from(KEYS[key]))}'" for key in keys)


IDS = st.integers(1, 4)
STEPS = st.one_of(
    st.tuples(st.just("add"), IDS, rules()),
    st.tuples(st.just("remove"), IDS, st.integers(0, 9)),
    st.tuples(st.just("own"), st.integers(0, 4), st.sampled_from(NAMES)),
    st.tuples(st.just("leave"), IDS, st.none()),
)
ARGUMENTS: st.SearchStrategy[Any] = st.lists(
    st.sampled_from([None, "x", "x.y", "/a/", "/a/b", PathArgument("/a/b"), PathArgument("/a/")]),
    max_size=2,
)


@settings(max_examples=300, deadline=None)
@given(st.lists(STEPS, max_size=14), st.booleans(), st.data())
def test_the_index_finds_what_asking_every_rule_finds(
    steps: list[Any], early: bool, data: st.DataObject
) -> None:
    replica = replica_of(me=1)
    held: Counter[tuple[int, str]] = Counter()
    owners: dict[str, int] = {}
    gone: set[int] = set()
    if early:
        ask(replica)  # build the index now, so that it has to follow
    for kind, id, what in steps:
        if id in gone:
            continue
        if kind == "add":
            replica.apply(MatchAdded(id, what))
            held[id, what] += 1
        elif kind == "remove":
            mine = sorted(rule for holder, rule in held.elements() if holder == id)
            if mine:
                rule = mine[what % len(mine)]
                replica.apply(MatchRemoved(id, rule))
                held -= Counter([(id, rule)])
        elif kind == "own":
            if owners.get(what, 0) != id:
                replica.apply(NameOwnerChanged(what, owners.get(what, 0), id))
                owners[what] = id
        else:
            for name in [name for name, owner in owners.items() if owner == id]:
                replica.apply(NameOwnerChanged(name, id, 0))
                del owners[name]
            replica.apply(ConnectionRemoved(id))
            gone.add(id)
            held = Counter({key: n for key, n in held.items() if key[0] != id})
    if data.draw(st.booleans()):
        copy = Replica()
        copy.me = 1
        copy.load(snapshot_of(replica))
        replica = copy
    sender = data.draw(st.sampled_from([BUS_ID, *sorted({1, 2, 3, 4} - gone)]))
    path, member = data.draw(st.sampled_from(PATHS)), data.draw(st.sampled_from(MEMBERS))
    interface = data.draw(st.sampled_from(NAMES))
    args = tuple(data.draw(ARGUMENTS))
    names = {unique_name(sender)} | {name for name, owner in owners.items() if owner == sender}
    expected = {
        id
        for id, rule in held
        if match.parse(rule).matches(SIGNAL, names, None, path, interface, member, args)
    }
    found, depends = ask(replica, sender, path, interface, member, args)
    assert found == tuple(sorted(expected))
    for others in ((), ("x",), (PathArgument("/a/b"), "x")):
        assert depends or ask(replica, sender, path, interface, member, others)[0] == found
    if 1 not in gone:
        wanted, _ = replica.receives(SIGNAL, sender, path, interface, member, lambda: args)
        assert wanted == (1 in expected)
    assert replica.match_rules() == sum(held.values())


def snapshot_of(replica: Replica) -> Snapshot:
    """As it comes from the broker: through the encoding."""
    state = Snapshot(
        position=0,
        stamp=0,
        connections=tuple((each.id, each.credentials) for each in replica.connections.values()),
        names=tuple(replica.names.items()),
        matches=tuple(
            (each.id, watch.text) for each in replica.connections.values() for watch in each.matches
        ),
        monitors=(),
        activatable=replica.activatable,
        policy_generation=replica.policy_generation,
    )
    return msgspec.msgpack.decode(msgspec.msgpack.encode(state), type=Snapshot)


def test_a_snapshot_replaces_everything() -> None:
    replica = replica_of(
        NameOwnerChanged("old.name", 0, 1),
        MatchAdded(1, "member='M'"),
        ActivatableChanged(("old.service",)),
        PolicyChanged(3),
    )
    ask(replica)
    replica.load(
        Snapshot(
            position=7,
            stamp=1,
            connections=((5, person(5)), (6, person(6))),
            names=(("new.name", 5),),
            matches=((5, "member='N'"),),
            monitors=((6, ("type='signal'",)),),
            activatable=("new.service",),
            policy_generation=4,
        )
    )
    assert sorted(replica.connections) == [5]
    assert replica.names == {"new.name": 5}
    assert sorted(replica.monitors) == [6]
    assert (replica.activatable, replica.policy_generation) == (("new.service",), 4)
    assert ask(replica, sender=5)[0] == ()
    assert ask(replica, sender=5, member="N")[0] == (5,)


def test_nobody_behind_a_custom_endpoint_of_kdbus_overhears() -> None:
    replica = Replica()
    who = Credentials(1000, 100, 50)
    for id, custom in ((1, 0), (2, 7), (3, 0)):
        replica.apply(ConnectionAdded(id, who, None, custom))
    for id in (1, 2):
        replica.apply(MatchAdded(id, "eavesdrop='true',type='method_call'"))
    asked = replica.overhearing(1, 3, ":1.3", "/p", None, "M", tuple)
    assert asked[0] == (1,)
