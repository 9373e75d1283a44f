"""Whatever happens, whoever follows the log knows what the broker knows; and nothing breaks it.

Random lives of a few connections are played; the log is applied to a worker's replica, which has
to agree with one that was loaded from the broker's snapshot, and with the model of who waits for
which name.
"""

from __future__ import annotations

from typing import Any

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kbusd.broker.connection import Behind, Connection
from kbusd.broker.filtered import Filter
from kbusd.broker.refusal import Violation
from kbusd.policy import endpoints
from kbusd.rings import entries as e
from kbusd.workers.replica import Replica
from tests.unit.broker.world import SHARED, World, credentials, service

NAMES = st.sampled_from(["a.b", "a.c", "d.e"])
RULES = st.sampled_from(
    ["", "type='signal'", "member='X'", "member='X',type='signal'", "type='signal',member='X'"]
    + ["sender='d.e'", "sender='a.b'", "sender='org.freedesktop.DBus',arg0='d.e'"]
)
# What those see who came by an endpoint. The last hides what they may have got before.
SAID = [
    endpoints.parse("app", lines)
    for lines in (["own=a.b", "see=a.c"], ["own=d.*", "see=a.b"], ["talk=a.c"])
]
# The same of an endpoint of kdbus, for users: 0, and others.
SEE, TALK, OWN = 0, 1, 2
USER, WORLD = 1, 3
SAID_BY_NODE = [
    (
        e.PolicyEntry("a.b", False, ((USER, OWN, 0), (WORLD, SEE, 0))),
        e.PolicyEntry("d.e", False, ((USER, TALK, 7),)),
    ),
    (e.PolicyEntry("a", True, ((WORLD, TALK, 0),)), e.PolicyEntry("d.e", False, ((USER, OWN, 0),))),
    (),
]
MAKER = 1000  # the worker of who has made that
PICK = st.integers(0, 1 << 30)
FDS = (1, 2, 3)


class Life(RuleBasedStateMachine):
    """A bus with a handful of connections of root, so that all of them may do everything."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World(
            services=(service("a.b"),), limits={"max_names_per_connection": 3}, endpoints=SAID[:1]
        )
        self.world.bus.ready()
        self.world.events.clear()
        self.follower = Replica()
        self.world.bus.worker_started(MAKER, 1)
        self.world.bus.assigned(MAKER, credentials(MAKER, 0), hasty=False)
        self.world.bus.endpoint_made(MAKER)
        self.follower = Replica()
        self.follower.load(self.whole())
        # Those who follow the logs of endpoints: one of a socket, of kdbus as root and as somebody else.
        self.behind = [
            (Filter(each, self.world.bus.shown, ()), Replica())
            for each in (
                Behind("app"),
                Behind("", MAKER, 0, 0, (0,)),
                Behind("", MAKER, 7, 7, (7,)),
            )
        ]
        for filter, replica in self.behind:
            replica.load(filter.snapshot(self.whole()))
        self.read = 0
        self.alive: list[Connection] = []
        self.worker = 0
        self.asked: list[tuple[int, int]] = []  # (peer's worker, number) of Introductions

    def ask(self, connection: Connection, request: e.Request, fds: tuple[int, ...] = ()) -> Any:
        self.world.bus.handle(connection, request, fds)
        self.follow()

    def follow(self) -> None:
        for event in self.world.events[self.read :]:
            if event[0] == "log":
                self.follower.apply(event[1])
                for filter, replica in self.behind:
                    for passed in filter.entries(event[1], self.whole):
                        replica.apply(passed)
            elif isinstance(event[1], e.Introduction):
                self.asked.append((event[0], event[1].request))
        self.read = len(self.world.events)

    def whole(self) -> e.Snapshot:
        return self.world.bus.snapshot(0, 0)

    def one(self, pick: int) -> Connection:
        return self.alive[pick % len(self.alive)]

    def active(self, pick: int) -> Connection | None:
        connection = self.one(pick)
        return None if connection.monitor is not None or connection.kdbus else connection

    @rule(activates=st.none() | NAMES)
    def connect(self, activates: str | None) -> None:
        if activates in self.world.bus.registry.activators:
            activates = None
        self.worker += 1
        self.world.bus.worker_started(self.worker, 1)
        self.world.bus.assigned(self.worker, credentials(self.worker, 0))
        self.alive.append(self.world.bus.connections[self.worker])
        policy = (e.PolicyEntry(activates, False, ((3, 1, 0),)),) if activates else ()
        taken = any(policy == other for other in self.world.bus.name_policy.entries.values())
        hello = e.Hello(1, 2, activates, () if taken else policy) if activates else e.Hello(1)
        self.ask(self.alive[-1], hello)

    @rule()
    def connect_by_the_endpoint(self) -> None:
        self.worker += 1
        self.alive.append(self.world.client(self.worker, 0, "app"))
        self.read = 0  # of what the world has kept since
        self.follow()

    @rule(uid=st.sampled_from([0, 7]))
    def connect_by_the_node(self, uid: int) -> None:
        self.worker += 1
        self.alive.append(self.world.client(self.worker, uid, custom=MAKER))
        self.read = 0
        self.follow()

    @rule(said=st.sampled_from(SAID))
    def say_something_else(self, said: endpoints.Endpoint) -> None:
        self.world.bus.endpoints.configure([said])
        self.follow()

    @rule(said=st.sampled_from(SAID_BY_NODE))
    def say_something_else_by_the_node(self, said: tuple[e.PolicyEntry, ...]) -> None:
        self.ask(self.world.bus.connections[MAKER], e.SetEndpoint(1, said))

    @precondition(lambda self: self.alive)
    @rule(pick=PICK)
    def disconnect(self, pick: int) -> None:
        connection = self.one(pick)
        self.alive.remove(connection)
        self.world.bus.gone(connection.worker)
        self.follow()

    @precondition(lambda self: self.alive)
    @rule(pick=PICK, name=NAMES, flags=st.integers(0, 7))
    def request_name(self, pick: int, name: str, flags: int) -> None:
        if connection := self.active(pick):
            self.ask(connection, e.RequestName(2, name, flags))

    @precondition(lambda self: self.alive)
    @rule(pick=PICK, name=NAMES)
    def release_name(self, pick: int, name: str) -> None:
        if connection := self.active(pick):
            self.ask(connection, e.ReleaseName(2, name))

    @precondition(lambda self: self.alive)
    @rule(pick=PICK, text=RULES, add=st.booleans())
    def match(self, pick: int, text: str, add: bool) -> None:
        if connection := self.active(pick):
            self.ask(connection, e.AddMatch(2, text) if add else e.RemoveMatch(2, text))

    @precondition(lambda self: self.alive)
    @rule(pick=PICK, text=RULES)
    def become_monitor(self, pick: int, text: str) -> None:
        if connection := self.active(pick):
            self.ask(connection, e.BecomeMonitor(2, (text,)))

    @precondition(lambda self: self.alive)
    @rule(pick=PICK, name=NAMES)
    def start(self, pick: int, name: str) -> None:
        if connection := self.active(pick):
            self.ask(connection, e.StartService(2, name, False))

    @precondition(lambda self: self.alive)
    @rule(pick=PICK, other=PICK)
    def introduce(self, pick: int, other: int) -> None:
        self.ask(self.one(pick), e.Introduce(2, self.one(other).id, 0, 0), FDS)

    @precondition(lambda self: self.asked)
    @rule(pick=PICK)
    def introduced(self, pick: int) -> None:
        worker, number = self.asked.pop(pick % len(self.asked))
        peer = self.world.bus.connections.get(worker)
        if peer is not None:
            self.ask(peer, e.Introduced(number, 0, 0), FDS)

    @rule(seconds=st.sampled_from([0.1, 9.0, 30.0]))
    def wait(self, seconds: float) -> None:
        self.world.time += seconds
        self.world.bus.tick()
        self.follow()

    @invariant()
    def the_log_tells_what_the_snapshot_tells(self) -> None:
        loaded = Replica()
        loaded.load(self.world.bus.snapshot(0, 0))
        assert view(self.follower) == view(loaded)
        assert view(loaded)["ids"] == {each.id for each in self.alive if each.monitor is None}

    @invariant()
    def the_logs_of_endpoints_do_so_too_and_tell_nothing_hidden(self) -> None:
        for filter, replica in self.behind:
            behind = filter.behind
            loaded = Replica()
            loaded.load(filter.snapshot(self.whole()))
            assert view(replica) == view(loaded)
            told, shown = self.world.bus.shown(behind), view(loaded)
            inside = set(self.world.bus.inside(behind))
            assert shown["names"] == {
                name: owner
                for name, owner in self.follower.names.items()
                if told.sees(name) or owner in inside
            }
            assert all(map(told.sees, shown["queues"]))
            for id, rules in shown["matches"].items():
                assert id in inside or not any("DBus" in each for each in rules)

    @invariant()
    def everyone_knows_his_names(self) -> None:
        registry = self.world.bus.registry
        for name in registry.queues.keys() | registry.activators.keys():
            waiters = registry.waiters(name)
            if not waiters:
                waiters = [registry.activators[name]]
            assert len(set(waiters)) == len(waiters)
            assert all(each.names.count(name) == 1 for each in waiters)
            assert set(waiters) <= set(self.alive)
            assert self.follower.owners(name) == [each.id for each in waiters]
        for each in self.alive:
            assert all(
                each in registry.waiters(name) or registry.activators[name] is each
                for name in each.names
            )

    @invariant()
    def side_sockets_are_held_for_open_introductions_only(self) -> None:
        assert len(self.world.open_fds) == SHARED * len(self.world.bus.introductions)
        assert all(each.introductions >= 0 for each in self.alive)
        for each in self.alive:
            assert all(each in peer.introduced for peer in each.introduced)
            assert each.introduced <= set(self.alive)

    @invariant()
    def nobody_waits_without_reason(self) -> None:
        assert all(each.waiting >= 0 for each in self.alive)
        if not len(self.world.bus.activation):
            assert all(each.waiting == 0 for each in self.alive)


def view(replica: Replica) -> dict[str, Any]:
    """What a replica knows, in a form that can be compared."""
    return {
        "ids": set(replica.connections),
        "credentials": {id: each.credentials for id, each in replica.connections.items()},
        "names": replica.names,
        "owned": {id: each.names for id, each in replica.connections.items()},
        "queues": replica.queues,
        "claims": replica.claims,
        "activators": replica.activators,
        "policies": replica.policies,
        "custom": {number: said for number, said in replica.custom.items() if said},
        "endpoints": replica.endpoints,
        "activatable": replica.activatable,
        "waits_for": {id: each.waits_for for id, each in replica.connections.items()},
        "matches": {
            id: sorted(watch.text for watch in each.matches)
            for id, each in replica.connections.items()
        },
        "monitors": replica.monitors,
    }


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def hostile_requests() -> st.SearchStrategy[e.Request]:
    """Any request that decodes, with any values in it."""
    numbers = st.integers(-(1 << 63), (1 << 63) - 1)
    text = st.text(max_size=300) | NAMES | RULES | st.sampled_from([":1.1", ":1.2", ":1.³"])
    access = st.tuples(st.integers(0, 4), st.integers(-1, 3), numbers | st.integers(-1, 3))
    entry = st.builds(e.PolicyEntry, text, st.booleans(), st.lists(access, max_size=3).map(tuple))
    kinds = {
        str: text,
        int: numbers | st.integers(-2, 4),
        int | None: st.none() | numbers | st.integers(0, 15),
        bool: st.booleans(),
        dict[str, str]: st.dictionaries(text, text, max_size=5),
        tuple[str, ...]: st.lists(text, max_size=5).map(tuple),
        bytes: st.binary(max_size=20) | st.just(bytes(1 << 15)),
        e.Queued: st.builds(e.Queued, *[st.integers(0, (1 << 32) - 1)] * 5),
        tuple[e.PolicyEntry, ...]: st.lists(entry, max_size=2).map(tuple),
    }
    requests = []
    for kind in e.WorkerMessage.__args__:
        fields = msgspec.structs.fields(kind)
        requests.append(st.builds(kind, **{each.name: kinds[each.type] for each in fields}))
    return st.one_of(requests)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 3), hostile_requests(), st.sampled_from([(), FDS, (1,)])),
        max_size=30,
    )
)
def test_no_worker_can_say_what_the_broker_does_not_survive(
    said: list[tuple[int, e.Request, tuple[int, ...]]],
) -> None:
    world = World(services=(service("a.b"),), service_dirs=("/s",))
    world.client(1, uid=0)
    world.client(2)
    world.bus.worker_started(3, 1)
    for worker, request, fds in said:
        connection = world.bus.connections.get(worker)
        if connection is None:
            continue
        try:
            world.bus.handle(connection, request, fds)
        except Violation:
            world.bus.gone(worker, "violation")
    for worker in (1, 2, 3):
        world.bus.gone(worker)
    assert not world.open_fds
    assert world.bus.size() == 0
    assert world.bus.deadline() is None or len(world.bus.activation)
