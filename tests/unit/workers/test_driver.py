"""The driver where dbus-daemon is no yardstick: pipelining, the log around Hello, lost entries."""

from __future__ import annotations

import msgspec
import pytest

from kbusd.policy.configuration import DEFAULT_LIMITS, Configuration
from kbusd.policy.rules import OWN, USER, Policy, Rule
from kbusd.policy.services import Service
from kbusd.rings import entries as e
from kbusd.workers import driver
from kbusd.workers.driver import Call, Driver, Error, Return
from kbusd.workers.introspection import INTERFACES, MONITORING, STATS
from kbusd.workers.replica import Replica, ReplicaError
from tests.unit.workers.model import Model, ModelClient
from tests.unit.workers.reference import Seen

OWNER = 500
FACTS = driver.Bus("0" * 32, "1" * 32, OWNER, 77)
OPEN = Policy(default=(Rule(True, USER, "t.conf", 1), Rule(True, OWN, "t.conf", 2)))
NO_REPLY = 1
NOC = "NameOwnerChanged"


def person(uid: int = 1000) -> e.Credentials:
    return e.Credentials(uid, 100, 4000, (27, 4), ipc_owner=uid == 0)


def make(facts: driver.Bus = FACTS) -> Model:
    service = Service("com.example.Service", ("/bin/false",), "/x.service")
    configuration = Configuration(
        type="session", limits=DEFAULT_LIMITS, policy=OPEN, services=(service,)
    )
    return Model(configuration, facts)


def join(model: Model, uid: int = 1000) -> ModelClient:
    client = model.connect(person(uid))
    client.call("Hello")
    return client


def members(seen: list[Seen]) -> list[str | tuple[object, ...]]:
    return [each.member or each.body for each in seen]


# -- order ---------------------------------------------------------------------------------------


def test_hello_is_answered_before_the_name_is_announced() -> None:
    model = make()
    hello, acquired = model.connect(person()).call("Hello")
    assert (hello.body, hello.destination) == ((":1.1",), ":1.1")
    assert (acquired.member, acquired.body) == ("NameAcquired", (":1.1",))


def test_calls_behind_hello_wait_for_it() -> None:
    model = make()
    client = model.connect(person())
    for member in ("Hello", "ListNames", "Hello"):
        client.send(member)
    assert client.driver.busy
    assert client.seen == []
    model.run()
    assert not client.driver.busy
    assert members(client.seen) == [
        (":1.1",),
        "NameAcquired",
        (["org.freedesktop.DBus", ":1.1"],),
        "org.freedesktop.DBus.Error.Failed",
    ]


def test_a_read_sees_the_changes_before_it() -> None:
    model = make()
    client = join(model)
    client.taken()
    client.send("RequestName", "su", ("com.example.A", 0))
    client.send("NameHasOwner", "s", ("com.example.A",))
    client.send("ReleaseName", "s", ("com.example.A",))
    client.send("NameHasOwner", "s", ("com.example.A",))
    assert client.driver.busy
    model.run()
    assert members(client.taken()) == [
        "NameAcquired",
        (1,),
        (True,),
        "NameLost",
        (1,),
        (False,),
    ]
    assert not client.driver.busy


def test_changes_are_pipelined_and_errors_do_not_overtake() -> None:
    model = make()
    client = join(model)
    client.taken()
    serials = [
        client.send("AddMatch", "s", ("type='signal'",)),
        client.send("AddMatch", "s", ("member='X'",)),
        client.send("AddMatch", "s", ("bogus",)),
        client.send("AddMatch", "s", ("member='Y'",)),
    ]
    assert len(client.asked) == 2
    model.run()
    assert [each.reply_serial for each in client.taken()] == serials


def test_starting_a_service_holds_nothing_up() -> None:
    model = make()
    client = join(model)
    client.taken()
    client.send("StartServiceByName", "su", ("com.example.Service", 0))
    assert not client.driver.busy
    client.send("GetId")
    assert members(client.taken()) == [("0" * 32,)]
    model.run()
    assert members(client.taken()) == ["org.freedesktop.DBus.Error.Spawn.ChildExited"]


def test_a_client_that_pipelines_without_end_is_full() -> None:
    client = join(make())
    for _ in range(driver.MAX_UNFINISHED):
        assert not client.driver.full
        client.send("AddMatch", "s", ("type='signal'",))
    assert client.driver.full
    client.model.run()
    assert not client.driver.full


# -- calls ---------------------------------------------------------------------------------------


def test_who_wants_no_reply_gets_values_and_errors_and_no_acknowledgement() -> None:
    """As from dbus-daemon, which leaves out only the word that something was done."""
    client = join(make())
    (names,) = client.call("ListNames", flags=NO_REPLY)
    assert names.kind == "method_return"
    assert client.call("AddMatch", "s", ("type='error'",), flags=NO_REPLY) == []
    (unknown,) = client.call("Foo", flags=NO_REPLY)
    assert unknown.kind == "error"
    (bogus,) = client.call("AddMatch", "s", ("bogus",), flags=NO_REPLY)
    assert bogus.kind == "error"
    requested = client.call("RequestName", "su", ("a.b", 0), flags=NO_REPLY)
    assert members(requested) == ["NameAcquired", (1,)]
    peer = "org.freedesktop.DBus.Peer"
    assert client.call("Ping", interface=peer, flags=NO_REPLY) == []
    assert client.call("Ping", interface=peer, destination=None, flags=NO_REPLY) != []


def test_big_endian_calls() -> None:
    client = join(make())
    (_, reply) = client.call("RequestName", "su", ("com.example.A", 4), big_endian=True)
    assert reply.body == (1,)
    (reply,) = client.call("GetNameOwner", "s", ("com.example.A",), big_endian=True)
    assert reply.body == (":1.1",)
    (reply,) = client.call("BecomeMonitor", "asu", ([], 1), interface=MONITORING, big_endian=True)
    (text,) = reply.body
    assert text.startswith("rejected attempt to call BecomeMonitor by connection :1.1 (uid=1000")


@pytest.mark.parametrize(("uid", "allowed"), [(0, True), (OWNER, True), (1000, False)])
def test_who_may_become_a_monitor_and_set_the_environment(uid: int, allowed: bool) -> None:
    client = join(make(), uid)
    (reply,) = client.call("UpdateActivationEnvironment", "a{ss}", ({"A": "b"},))
    assert (reply.kind == "method_return") == allowed
    reply = client.call("BecomeMonitor", "asu", ([], 0), interface=MONITORING)[0]
    assert (reply.kind == "method_return") == allowed


def test_credentials_name_groups_and_label() -> None:
    model = make(FACTS._replace(selinux=True, label=b"bus_t\0"))
    client = model.connect(e.Credentials(7, 8, 9, (10, 3), b"user_t\0"))
    client.call("Hello")
    (reply,) = client.call("GetConnectionCredentials", "s", (":1.1",))
    assert reply.body[0] == {
        "ProcessID": ("u", 9),
        "UnixUserID": ("u", 7),
        "UnixGroupIDs": ("au", [3, 8, 10]),
        "LinuxSecurityLabel": ("ay", b"user_t\0"),
    }
    (reply,) = client.call("GetConnectionSELinuxSecurityContext", "s", (":1.1",))
    assert reply.body[0] == b"user_t"
    (reply,) = client.call("GetConnectionSELinuxSecurityContext", "s", ("org.freedesktop.DBus",))
    assert reply.body[0] == b"bus_t"


def test_features_say_what_the_bus_has() -> None:
    model = make(FACTS._replace(selinux=True, apparmor=True, systemd_activation=True))
    (reply,) = join(model).call(
        "Get",
        "ss",
        ("org.freedesktop.DBus", "Features"),
        interface="org.freedesktop.DBus.Properties",
    )
    assert reply.body == (
        (
            "as",
            [
                "ActivatableServicesChanged",
                "AppArmor",
                "HeaderFiltering",
                "SELinux",
                "SystemdActivation",
            ],
        ),
    )


def test_every_method_in_the_table_is_done() -> None:
    """A method that is announced and not carried out would end the worker."""
    arguments = {"s": "x", "u": 1, "b": True, "as": [], "a{ss}": {}, "v": ("s", "x")}
    for interface, each in INTERFACES.items():
        for member, method in each.methods.items():
            client = join(make(), uid=0)
            body = tuple(arguments[kind] for kind in method.inputs)
            seen = client.call(member, method.signature, body, interface=interface)
            reply = next(message for message in seen if message.reply_serial == 2)
            if reply.kind == "method_return":
                assert reply.signature == "".join(method.outputs), member


def test_statistics_count_what_is_there() -> None:
    model = make()
    a, b = join(model), join(model)
    a.call("AddMatch", "s", ("type='signal'",))
    a.call("RequestName", "su", ("a.b", 0))
    (reply,) = b.call("GetStats", interface=STATS)
    numbers = {key: value for key, (_, value) in reply.body[0].items()}
    assert (numbers["ActiveConnections"], numbers["BusNames"], numbers["MatchRules"]) == (2, 3, 1)
    (reply,) = b.call("GetConnectionStats", "s", ("a.b",), interface=STATS)
    assert reply.body[0]["UniqueName"] == ("s", ":1.1")
    assert reply.body[0]["MatchRules"] == ("u", 1)
    assert reply.body[0]["BusNames"] == ("u", 2)
    assert reply.body[0]["PeakIncomingBytes"] == ("u", 1)  # the word of worker 1 (model.py)


def test_statistics_of_one_who_has_gone_before_they_were_counted() -> None:
    model = make()
    a, b = join(model), join(model)
    serial = b.send("GetConnectionStats", "s", (":1.1",), interface=STATS)
    model.broker.gone(a.worker)
    model.run()
    (reply,) = (seen for seen in b.taken() if seen.reply_serial == serial)
    assert (reply.kind, reply.member) == ("error", "org.freedesktop.DBus.Error.NameHasNoOwner")


# -- the log -------------------------------------------------------------------------------------


def bare(*connections: int, me: int = 1) -> Driver:
    """A driver after Hello, without a bus around it."""
    made = Driver(Replica(), FACTS, person())
    (ask,) = made.call(call("Hello"))
    assert isinstance(ask, driver.Ask)
    made.answer(ask.token, e.Reply(1, me), snapshot(*connections))
    return made


def call(member: str, signature: str = "", body: bytes = b"") -> Call:
    return Call(
        1,
        0,
        "/org/freedesktop/DBus",
        "org.freedesktop.DBus",
        member,
        signature,
        body,
        False,
        "org.freedesktop.DBus",
    )


def snapshot(
    *connections: int,
    names: dict[str, int] | None = None,
    rules: tuple[str, ...] = (),
    activatable: tuple[str, ...] = (),
) -> bytes:
    return msgspec.msgpack.encode(
        e.Snapshot(
            0,
            0,
            tuple((id, person()) for id in connections),
            tuple((names or {}).items()),
            tuple((1, rule) for rule in rules),
            (),
            activatable,
            0,
        )
    )


def said(actions: list[driver.Action]) -> list[tuple[str, list[str]]]:
    """Signals as (member, arguments)."""
    found = []
    for action in actions:
        assert isinstance(action, driver.Signal)
        values = [part.decode() for part in action.body.replace(b"\0", b" ").split()]
        found.append((action.member, [part for part in values if len(part) > 1]))
    return found


def test_my_own_arrival_may_be_in_the_snapshot_or_behind_it() -> None:
    in_snapshot = bare(1, 2)
    assert in_snapshot.call(call("GetId"))
    behind = bare(2)
    assert behind.busy
    assert behind.call(call("NameHasOwner", "s", b"\4\0\0\0:1.1\0")) == []
    (reply,) = behind.entry(e.ConnectionAdded(1, person()))
    assert reply == Return(1, "b", b"\1\0\0\0")
    assert not behind.busy


def test_a_refused_hello_can_be_said_again() -> None:
    made = Driver(Replica(), FACTS, person())
    (ask,) = made.call(call("Hello"))
    assert isinstance(ask, driver.Ask)
    refusal = e.Failure(1, "org.freedesktop.DBus.Error.LimitsExceeded", "no")
    assert made.answer(ask.token, refusal) == [Error(1, refusal.error, "no")]
    assert made.name == ":not.active.yet"
    (again,) = made.call(call("Hello"))
    assert isinstance(again, driver.Ask)


@pytest.mark.parametrize("value", [None, "x", 0, -1, [1, 2], {}])
def test_a_broker_that_answers_hello_with_nonsense(value: object) -> None:
    made = Driver(Replica(), FACTS, person())
    (ask,) = made.call(call("Hello"))
    assert isinstance(ask, driver.Ask)
    with pytest.raises(TypeError):
        made.answer(ask.token, e.Reply(1, value), snapshot())


def test_a_snapshot_that_does_not_decode() -> None:
    made = Driver(Replica(), FACTS, person())
    (ask,) = made.call(call("Hello"))
    assert isinstance(ask, driver.Ask)
    with pytest.raises(msgspec.MsgspecError):
        made.answer(ask.token, e.Reply(1, 1), b"\xc1")


def test_a_log_that_lies() -> None:
    with pytest.raises(ReplicaError):
        bare(1).entry(e.NameOwnerChanged("a.b", 5, 1))


def test_missed_entries_are_made_up_for() -> None:
    rules = ("member='NameOwnerChanged'", "member='ActivatableServicesChanged'")
    made = bare(1, 2, 3)
    made.resync(snapshot(1, 2, 3, names={"a.b": 1, "c.d": 2, "e.f": 3}, rules=rules))
    actions = made.resync(
        snapshot(1, 3, 4, names={"a.b": 4, "e.f": 3, "g.h": 1}, rules=rules, activatable=("x.y",))
    )
    assert said(actions) == [
        (NOC, [":1.4", ":1.4"]),
        ("NameLost", ["a.b"]),
        (NOC, ["a.b", ":1.1", ":1.4"]),
        (NOC, ["c.d", ":1.2"]),
        (NOC, ["g.h", ":1.1"]),
        ("NameAcquired", ["g.h"]),
        (NOC, [":1.2", ":1.2"]),
        ("ActivatableServicesChanged", []),
    ]


def test_new_services_are_announced() -> None:
    made = bare(1)
    assert made.entry(e.ActivatableChanged(("a.b",))) == []
    made.entry(e.MatchAdded(1, "type='signal'"))
    (signal,) = made.entry(e.ActivatableChanged(("a.b", "c.d")))
    assert signal == driver.Signal("ActivatableServicesChanged", "", b"", None)


def test_a_monitor_sees_what_others_are_told() -> None:
    model = make()
    monitor, other = join(model, uid=0), join(model)
    monitor.call("BecomeMonitor", "asu", ([], 0), interface=MONITORING)
    other.call("RequestName", "su", ("a.b", 0))
    late = join(model)
    assert [(each.member, each.body, each.destination) for each in monitor.taken()] == [
        (NOC, ("a.b", "", other.driver.name), None),
        ("NameAcquired", ("a.b",), other.driver.name),
        (NOC, (late.driver.name, "", late.driver.name), None),
        ("NameAcquired", (late.driver.name,), late.driver.name),
    ]


def test_a_monitor_that_is_refused_misses_nothing() -> None:
    """Signals are held while the broker decides; a refusal lets them through."""
    made = bare(1, 2)
    made.credentials = person(0)
    made.entry(e.MatchAdded(1, "type='signal'"))
    (ask,) = made.call(
        call("BecomeMonitor", "asu", b"\0\0\0\0\0\0\0\0")._replace(interface=MONITORING)
    )
    assert isinstance(ask, driver.Ask)
    assert made.entry(e.NameOwnerChanged("a.b", 0, 2)) == []
    error, signal = made.answer(ask.token, e.Failure(1, "x.y", "no"))
    assert isinstance(error, Error)
    assert said([signal]) == [(NOC, ["a.b", ":1.2"])]


def test_a_service_that_came_while_a_monitor_was_refused_held_its_client_up() -> None:
    """Not till the service has started, which may take long: it is known that there is one."""
    made = bare(1, 2)
    made.credentials = person(0)
    (ask,) = made.call(
        call("BecomeMonitor", "asu", b"\0\0\0\0\0\0\0\0")._replace(interface=MONITORING)
    )
    assert isinstance(ask, driver.Ask)
    made.look_for("a.b")
    made.entry(e.ActivatableChanged(("a.b",)))
    made.answer(ask.token, e.Failure(1, "x.y", "no"))
    assert not made.busy
