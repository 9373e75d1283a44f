"""What a worker decides where endpoints are concerned: its own client's, the sender's, a subscriber's."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kbusd.policy import endpoints
from kbusd.policy.configuration import DEFAULT_LIMITS, Configuration
from kbusd.policy.decide import ClientPolicy
from kbusd.policy.rules import OWN, RECEIVE, SEND, USER, Policy, Rule
from kbusd.rings import entries as e
from kbusd.rings.envelope import Envelope
from kbusd.workers.behind import Sight
from kbusd.workers.driver import Bus
from kbusd.workers.replica import Replica
from kbusd.workers.routing import ACCESS_DENIED, CALL, ERROR, RETURN, SIGNAL, Router
from tests.unit.workers.model import Model, ModelClient

APP, OTHER, HIDDEN = 1, 2, 3
EVERYTHING = Policy(
    default=tuple(Rule(True, kind, "t.conf", 1) for kind in (USER, OWN, SEND, RECEIVE))
)
LINES = ("call=t.Other=t.Face.*@/p", "deny-call=t.Other=t.Face.Bad", "broadcast=t.Other=t.Face.M")


class Worker:
    """The part of a worker that decides, for `me`; APP is behind an endpoint."""

    def __init__(self, me: int, lines: Sequence[str] = LINES) -> None:
        self.log: list[str] = []
        self.replica = Replica()
        self.replica.me = me
        self.say(lines)
        for id in (APP, OTHER, HIDDEN):
            who = e.Credentials(1000, 1000, id, endpoint="app" if id == APP else "")
            self.replica.apply(e.ConnectionAdded(id, who))
            self.replica.apply(e.MatchAdded(id, "type='signal'"))
        self.replica.apply(e.NameOwnerChanged("t.Other", 0, OTHER))
        self.replica.apply(e.NameOwnerChanged("t.Hidden", 0, HIDDEN))
        policy = ClientPolicy(EVERYTHING, self.replica.connections[me].credentials)
        self.router = Router(self.replica, policy, self.log.append)
        if me == APP:
            self.router.sight = Sight(self.replica, "app")

    def say(self, lines: Sequence[str]) -> None:
        policy = endpoints.encode(endpoints.parse("app", lines))
        self.replica.apply(e.EndpointChanged("app", policy))

    def decides(self, message: Envelope, *args: str) -> object:
        return self.router.decide(message, 0, 0, lambda: args)

    def takes(self, message: Envelope, sender: int, *args: str) -> bool:
        connection = self.replica.connections[sender]
        return self.router.admit(message, connection, 0, lambda: args) is None


def message(
    type: int = CALL, interface: str | None = "t.Face", to: str | None = ":1.2", member: str = "M"
) -> Envelope:
    return Envelope(type, False, to, "/p", interface, member, None, "")


@pytest.mark.parametrize(
    ("what", "passes"),
    [
        (message(), True),
        (message(to="t.Other"), True),
        (message(SIGNAL), True),
        (message(interface="t.Else"), False),
        (message(interface=None), False),
        (message(member="Bad"), False),
        (message(SIGNAL, member="Bad"), False),
    ],
)
def test_what_its_worker_does_not_send_the_receiver_does_not_take(
    what: Envelope, passes: bool
) -> None:
    """The first may have been taken over."""
    decision = Worker(APP).router.decide(what, 0, 0, tuple)
    assert (decision.targets == (OTHER,)) is passes
    assert decision.error is None or decision.error[0] == ACCESS_DENIED
    assert Worker(OTHER).takes(what, APP) is passes
    assert not Worker(HIDDEN).takes(what, APP)
    assert Worker(OTHER).takes(what, HIDDEN)  # which has no endpoint


def test_answers_pass_for_the_caller_knows_what_it_asked() -> None:
    for kind in (RETURN, ERROR):
        assert Worker(HIDDEN).takes(message(kind, to=":1.3"), APP)


def test_answers_go_to_those_who_have_called() -> None:
    app = Worker(APP)
    gone = app.router.decide(message(RETURN, to=":1.99"), 0, 0, tuple)
    hidden = app.router.decide(message(RETURN, to=":1.3"), 0, 0, tuple)
    assert hidden.error is not None and gone.error is not None
    assert hidden.error[1].replace(":1.3", ":1.99") == gone.error[1]
    assert app.takes(message(to=":1.1"), HIDDEN)
    assert app.router.decide(message(RETURN, to=":1.3"), 0, 0, tuple).targets == (HIDDEN,)


def test_broadcasts_are_kept_from_those_whose_endpoint_does_not_let_them_through() -> None:
    def hearers(me: int, what: Envelope) -> tuple[int, ...]:
        return Worker(me).router.decide(what, 0, 0, tuple).targets

    loud, other = message(SIGNAL, to=None), message(SIGNAL, to=None, member="N")
    assert hearers(OTHER, loud) == (APP, OTHER, HIDDEN)
    assert hearers(OTHER, other) == (OTHER, HIDDEN)
    assert hearers(HIDDEN, loud) == (OTHER, HIDDEN)
    assert hearers(APP, loud) == (APP, OTHER, HIDDEN)
    app = Worker(APP)
    assert app.takes(loud, OTHER)
    assert not app.takes(other, OTHER)
    assert not app.takes(loud, HIDDEN)


@pytest.mark.parametrize("change", [(), None])
def test_an_endpoint_that_changes_or_goes(change: Sequence[str] | None) -> None:
    app, other = Worker(APP), Worker(OTHER)
    for worker in (app, other):
        if change is None:
            worker.replica.apply(e.EndpointChanged("app", b""))
        else:
            worker.say(change)
    assert app.router.decide(message(), 0, 0, tuple).error is not None
    assert not other.takes(message(), APP)


def test_arguments_are_looked_at_only_where_a_rule_asks_for_them() -> None:
    def unwanted() -> Sequence[str]:
        raise AssertionError("looked at")

    for me, ask in ((APP, "decide"), (OTHER, "admit")):
        plain = Worker(me)
        wants = Worker(me, ("call=t.Other=t.Face.M arg0='yes'",))
        if ask == "decide":
            assert not plain.router.decide(message(), 0, 0, unwanted).depends
            assert wants.router.decide(message(), 0, 0, lambda: ("yes",)).depends
            assert wants.router.decide(message(), 0, 0, lambda: ("no",)).error is not None
        else:
            sender = plain.replica.connections[APP]
            assert plain.router.admit(message(), sender, 0, unwanted) is None
            assert not plain.router.looked
            assert wants.takes(message(), APP, "yes")
            assert wants.router.looked
            assert not wants.takes(message(), APP, "no")


def test_an_endpoint_that_makes_no_sense_lets_nothing_through() -> None:
    app = Worker(APP)
    app.replica.apply(e.EndpointChanged("app", b"\xc1"))
    assert app.router.decide(message(), 0, 0, tuple).error is not None


def sights() -> tuple[Worker, Callable[[str], bool]]:
    app = Worker(APP, ("see=t.Other",))
    assert app.router.sight is not None
    return app, app.router.sight.sees


def test_who_is_seen() -> None:
    app, sees = sights()
    assert [name for name in (":1.1", ":1.2", ":1.3", ":1.4", ":2.2", "t.Other") if sees(name)] == [
        ":1.1",
        ":1.2",
        "t.Other",
    ]
    app.replica.apply(e.NameOwnerChanged("t.Other", OTHER, HIDDEN))
    assert sees(":1.3") and not sees(":1.2")


# -- the driver, while names come and go ---------------------------------------------------------

NAMES = ("t.See", "t.Talk.Below", "t.Hidden", "t.Talk.Secret", "t.Own")
VIEW = endpoints.parse("app", ["see=t.See", "talk=t.Talk.*", "hide=t.Talk.Secret", "own=t.Own"])
FACTS = Bus("0" * 32, "0" * 32, owner=0, pid=1)
acts = st.tuples(
    st.integers(0, 2),
    st.sampled_from(("RequestName", "ReleaseName", "leave")),
    st.sampled_from(NAMES),
)


class Bystanders:
    """A bus with three clients, and the app; what the app was told of names is in `told`."""

    def __init__(self) -> None:
        configuration = Configuration(
            type="session", limits=DEFAULT_LIMITS, policy=EVERYTHING, endpoints=(VIEW,)
        )
        self.model = Model(configuration, FACTS)
        self.model.broker.ready()
        self.model.run()
        self.others = [self.join() for _ in range(3)]
        self.app = self.join("app")
        self.app.call("AddMatch", "s", ("type='signal'",))
        self.told: dict[str, str] = {}
        self.shown = {"org.freedesktop.DBus", self.app.driver.name}

    def join(self, endpoint: str = "") -> ModelClient:
        client = self.model.connect(e.Credentials(1000, 1000, 1, endpoint=endpoint))
        client.call("Hello")
        return client

    def do(self, who: int, act: str, name: str) -> None:
        client = self.others[who]
        if act == "leave":
            client.position = None  # it reads no more of the log
            self.model.broker.gone(client.worker)
            self.model.run()
            self.others[who] = self.join()
        elif act == "RequestName":
            client.call(act, "su", (name, 3))
        else:
            client.call(act, "s", (name,))
        self.app.catch_up()
        for seen in self.app.taken():
            if seen.member == "NameOwnerChanged":
                changed, _, new = seen.body
                self.told[changed] = new
                self.shown |= {each for each in seen.body if each.startswith(":")}

    def ask(self, member: str, *args: str) -> object:
        (answer,) = self.app.call(member, "s" * len(args), args)
        return answer.body[0] if answer.kind == "method_return" else None


@given(st.lists(acts, max_size=12))
def test_what_it_is_told_is_what_there_is_and_nothing_of_the_rest(
    all: list[tuple[int, str, str]],
) -> None:
    scene = Bystanders()
    for act in all:
        scene.do(*act)
        owners = scene.model.broker.registry
        for name in NAMES:
            owner = owners.owner(name)
            visible = name in ("t.See", "t.Talk.Below", "t.Own") and owner is not None
            assert scene.ask("NameHasOwner", name) is visible
            expected = owner.unique_name if visible and owner is not None else None
            assert scene.ask("GetNameOwner", name) == expected
            assert scene.told.get(name, "") == (expected or "")
            if expected is not None:
                scene.shown.add(expected)
        listed = scene.ask("ListNames")
        assert isinstance(listed, list)
        assert {name for name in listed if name[0] == "t"} == {
            name for name, owner in scene.told.items() if owner and name[0] == "t"
        }
        assert {name for name in listed if name[0] == ":"} <= scene.shown
        present = {f":1.{id}" for id in scene.model.broker.by_id}
        for name in present:
            assert scene.ask("NameHasOwner", name) is (name in listed)
