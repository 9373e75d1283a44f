"""The driver says what dbus-daemon says: the same calls to both, everything that comes back compared.

Not compared: GetId (an id is random), and that dbus-daemon answers calls that want no reply.
A scenario is a list of calls by clients "a", "b", ... which say Hello when first named. In texts,
"{a}" is the unique name of client a, which differs between the two buses.
"""

from __future__ import annotations

import os
import re
from typing import Any, NamedTuple
from xml.etree import ElementTree

import pytest

from kbusd.policy import configuration
from kbusd.workers import driver
from tests.unit.workers.conftest import machine_id, my_credentials
from tests.unit.workers.model import Model, ModelClient
from tests.unit.workers.reference import Client, ReferenceBus, Seen

BUS = "org.freedesktop.DBus"
PROPERTIES = "org.freedesktop.DBus.Properties"
PEER = "org.freedesktop.DBus.Peer"
INTROSPECTABLE = "org.freedesktop.DBus.Introspectable"
MONITORING = "org.freedesktop.DBus.Monitoring"
STATS = "org.freedesktop.DBus.Debug.Stats"
LONG = "x" * 256


class Step(NamedTuple):
    client: str
    member: str
    signature: str
    body: tuple[Any, ...]
    options: dict[str, Any]


def step(client: str, member: str, signature: str = "", *body: Any, **options: Any) -> Step:
    return Step(client, member, signature, body, options)


NAMES = ["", "x", "com.example.Nobody", "com.example.Mine", ":1.99", ":1", "{a}", "{b}", BUS]
NAMES += ["a..b", LONG, ":1.01", ":2.1", ":1.", ":1.-1", ":1.99x1", "com.example.Activatable"]

BY_NAME = ["ReleaseName", "NameHasOwner", "GetNameOwner", "ListQueuedOwners"]
BY_NAME += ["GetConnectionUnixUser", "GetConnectionUnixProcessID", "GetAdtAuditSessionData"]
BY_NAME += ["GetConnectionSELinuxSecurityContext", "GetConnectionCredentials"]

RULES = [
    "",
    "x",
    "type='signal'",
    "type='bogus'",
    "type='signal',type='signal'",
    "path='x'",
    "path='/',path_namespace='/'",
    "arg64='x'",
    "arg='x'",
    "argx='x'",
    "arg0foo='x'",
    "arg0='a',arg0path='/'",
    "arg0namespace='a..b'",
    "sender='..'",
    "destination='..'",
    "interface='x'",
    "member='x.y'",
    "eavesdrop='maybe'",
    "unknown='x'",
    "member='unbalanced",
    "member='" + "m" * 1100 + "'",
]

SCENARIOS: dict[str, list[Step]] = {
    "lists": [
        step("a", "ListNames"),
        step("a", "ListActivatableNames"),
        step("a", "ListNames", path="/"),
        step("a", "ListNames", path="/foo", interface=None),
        step("b", "ListNames"),
    ],
    "hello again": [
        step("a", "Hello"),
        step("a", "Hello", "s", "x"),
        step("a", "Hello", interface=None),
        step("a", "Hello", interface="a.b"),
        step("a", "Hello", interface=PROPERTIES, path="/"),
    ],
    "unknown": [
        step("a", member, interface=interface, path=path)
        for member in ("Foo", "ListNames", "Ping", "GetAll", "BecomeMonitor", "Introspect")
        for interface in (None, "a.b", BUS, PEER, PROPERTIES, MONITORING, STATS)
        for path in ("/org/freedesktop/DBus", "/", "/org/freedesktop/DBus/x")
        if (member, interface) not in [("Introspect", None), ("ListNames", BUS)]
    ],
    "wrong arguments": [
        step("a", member, signature, *body)
        for member in [*BY_NAME, "RequestName", "StartServiceByName", "AddMatch", "RemoveMatch"]
        for signature, body in [("", ()), ("u", (1,)), ("ss", ("x", "y")), ("o", ("/",))]
    ]
    + [
        step("a", member, "s", "x")
        for member in ("ListNames", "ListActivatableNames", "GetId", "ReloadConfig", "Hello")
    ],
    "by name": [step("a", "RequestName", "su", "com.example.Mine", 0), step("b", "ListNames")]
    + [
        step("a", member, "s", name)
        for member in BY_NAME
        for name in NAMES
        if (member, name) != ("ReleaseName", "com.example.Mine")
    ],
    "request names": [step("a", "RequestName", "su", name, 0) for name in NAMES]
    + [step("a", "RequestName", "su", "com.example.Forbidden", 0)],
    "start": [step("a", "StartServiceByName", "su", name, 0) for name in NAMES]
    + [step("a", "StartServiceByName", "su", "com.example.Failing", 7)],
    "start what runs": [
        step("a", "RequestName", "su", "com.example.Activatable", 0),
        step("a", "StartServiceByName", "su", "com.example.Activatable", 0),
    ],
    "match rules": [
        step("a", member, "s", rule)
        for rule in RULES
        for member in ("AddMatch", "RemoveMatch", "RemoveMatch")
    ],
    "properties": [
        step("a", "Get", "ss", interface, name, interface=PROPERTIES)
        for interface in (BUS, "", "a.b", PEER)
        for name in ("Features", "Interfaces", "Foo", "")
    ]
    + [step("a", "GetAll", "s", name, interface=PROPERTIES) for name in (BUS, "", "a.b", PEER)]
    + [
        step("a", "Set", "ssv", interface, name, ("as", []), interface=PROPERTIES)
        for interface in (BUS, "", "a.b", PEER)
        for name in ("Features", "Foo")
    ]
    + [step("a", "Get", "s", BUS, interface=PROPERTIES), step("a", "GetAll", "s", BUS, path="/")],
    "peer": [
        step("a", member, interface=interface, path=path)
        for member in ("Ping", "GetMachineId")
        for interface in (PEER, None)
        for path in ("/", "/org/freedesktop/DBus", "/foo/bar")
    ]
    + [step("a", "Ping", "s", "x", interface=PEER), step("a", "Pong", interface=PEER)],
    "to nobody": [
        step("a", member, *arguments, interface=interface, destination=None)
        for member in ("Ping", "GetMachineId", "Foo")
        for interface in (PEER, "a.b", None)
        for arguments in ((), ("s", "x"))
        if not (interface == PEER and arguments)
    ],
    "environment": [
        step("a", "UpdateActivationEnvironment", "a{ss}", {"A": "b", "": "x", "B=": ""}),
        step("a", "UpdateActivationEnvironment", "a{ss}", {}, path="/"),
        step("a", "UpdateActivationEnvironment", "as", [], path="/"),
        step("a", "UpdateActivationEnvironment", "as", []),
    ],
    "queue": [
        step("a", "AddMatch", "s", "type='signal'"),
        step("b", "AddMatch", "s", "member='NameOwnerChanged',arg0='com.example.A'"),
        step("a", "RequestName", "su", "com.example.A", 0),
        step("b", "RequestName", "su", "com.example.A", 0),
        step("b", "RequestName", "su", "com.example.A", 0),
        step("c", "RequestName", "su", "com.example.A", 4),
        step("c", "RequestName", "su", "com.example.A", 0xFFFFFFFF),
        step("c", "ReleaseName", "s", "com.example.A"),
        step("a", "ListQueuedOwners", "s", "com.example.A"),
        step("a", "GetNameOwner", "s", "com.example.A"),
        step("a", "ReleaseName", "s", "com.example.A"),
        step("b", "RequestName", "su", "com.example.A", 1),
        step("a", "RequestName", "su", "com.example.A", 2),
        step("a", "ListQueuedOwners", "s", "com.example.A"),
        step("b", "RequestName", "su", "com.example.B", 0),
        step("b", "ListNames"),
        step("a", "ReleaseName", "s", "com.example.A"),
        step("a", "ReleaseName", "s", "com.example.A"),
        step("b", "ReleaseName", "s", "com.example.A"),
        step("c", "GetNameOwner", "s", "com.example.A"),
    ],
    "who sees owners change": [
        step("a", "AddMatch", "s", "sender='org.freedesktop.DBus',arg0namespace='com.example'"),
        step("b", "AddMatch", "s", "sender='com.example.A',member='NameOwnerChanged'"),
        step("c", "AddMatch", "s", "path='/org/freedesktop/DBus',arg2=''"),
        step("d", "AddMatch", "s", "member='NameAcquired'"),
        step("e", "AddMatch", "s", "arg0path='com.example.A'"),
        step("f", "AddMatch", "s", "path_namespace='/org',interface='org.freedesktop.DBus'"),
        step("g", "AddMatch", "s", "type='method_call'"),
        step("h", "AddMatch", "s", "destination='{a}'"),
        step("d", "RequestName", "su", "com.example.A", 0),
        step("d", "RequestName", "su", "org.other", 0),
        step("f", "AddMatch", "s", "type='signal'"),
        step("d", "ReleaseName", "s", "com.example.A"),
        step("f", "RemoveMatch", "s", "type=signal"),
        step("d", "ReleaseName", "s", "org.other"),
    ],
    "statistics": [
        step("a", "GetConnectionStats", "s", name, interface=STATS)
        for name in (BUS, "x", ":1.99", "com.example.Nobody")
    ]
    + [
        step("a", "AddMatch", "s", rule)
        for rule in (
            "arg3='x',path_namespace='/a',interface='a.b',type='signal'",
            "eavesdrop=true,arg0namespace='a.b',destination=':1.5',arg2path='/x/'",
            "type=method_call,path='/',sender='a.b',member=F",
            "member='Foo',arg0='it'\\''s'",
            "eavesdrop=false",
        )
    ]
    + [step("b", "GetAllMatchRules", interface=STATS), step("a", "GetStats", path="/")],
    "monitor refused": [
        step("a", "BecomeMonitor", "asu", [], 1, interface=MONITORING),
        step("a", "BecomeMonitor", "asu", ["x"], 1, interface=MONITORING),
        step("a", "BecomeMonitor", "asu", ["x"], 0, interface=MONITORING),
        step("a", "BecomeMonitor", "asu", ["type='signal'"], 0, interface=MONITORING, path="/"),
        step("a", "BecomeMonitor", "as", [], interface=MONITORING),
        step("a", "RequestName", "su", "com.example.A", 0),
    ],
}


class Pair:
    """Both buses, and the clients on each."""

    def __init__(self, reference: ReferenceBus, model: Model) -> None:
        self.reference = reference
        self.model = model
        self.theirs: dict[str, Client] = {}
        self.ours: dict[str, ModelClient] = {}
        self.their_names: dict[str, str] = {}
        self.our_names: dict[str, str] = {}

    def join(self, letter: str) -> None:
        if letter in self.theirs:
            return
        theirs = self.theirs[letter] = self.reference.connect()
        ours = self.ours[letter] = self.model.connect(my_credentials())
        self.their_names[letter] = theirs.until_reply(theirs.send("Hello"))[-1].body[0]
        expected = theirs.receive()
        assert expected is not None
        hello, acquired = ours.call("Hello")
        self.our_names[letter] = hello.body[0]
        assert blank(Seen.of(expected), self.their_names) == blank(acquired, self.our_names)

    def play(self, each: Step) -> tuple[dict[str, list[Seen]], dict[str, list[Seen]]]:
        """What every client saw of one step: theirs, ours."""
        self.join(each.client)
        their_body = fill(each.body, self.their_names)
        client = self.theirs[each.client]
        client.send(each.member, each.signature, their_body, **each.options)
        theirs: dict[str, list[Seen]] = {}
        # The caller first: when its next call is answered, all of this one has been sent.
        for letter in [each.client, *(set(self.theirs) - {each.client})]:
            # A failed activation is answered late; two more calls are not enough to wait for it.
            if letter == each.client and each.member == "StartServiceByName":
                seen = self.theirs[letter].until_reply(self.theirs[letter].serial)
            else:
                seen = self.theirs[letter].until_reply(self.theirs[letter].send("GetId"))[:-1]
            theirs[letter] = [blank(message, self.their_names) for message in seen]
        our_body = fill(each.body, self.our_names)
        self.ours[each.client].send(each.member, each.signature, our_body, **each.options)
        self.model.run()
        ours = {
            letter: [blank(message, self.our_names) for message in client.taken()]
            for letter, client in self.ours.items()
        }
        return theirs, ours

    def close(self) -> None:
        for client in self.theirs.values():
            client.close()


def fill(value: Any, names: dict[str, str]) -> Any:
    """Put unique names in place of "{a}"."""
    if isinstance(value, str):
        return re.sub(r"\{([a-z])\}", lambda found: names.get(found[1], ":1.98"), value)
    if isinstance(value, tuple):
        return tuple(fill(each, names) for each in value)
    return value


def blank(value: Any, names: dict[str, str]) -> Any:
    """The inverse of `fill`, and without what may differ: serials, the order of sets."""
    letters = {name: letter for letter, name in names.items()}
    if isinstance(value, str):
        return re.sub(
            r":1\.\d+", lambda n: f"{{{letters[n[0]]}}}" if n[0] in letters else n[0], value
        )
    if isinstance(value, Seen):
        return value._replace(
            reply_serial=None if value.reply_serial is None else -1,
            body=blank(value.body, names),
            destination=blank(value.destination, names),
        )
    if isinstance(value, tuple):
        return tuple(blank(each, names) for each in value)
    if isinstance(value, list):
        return sorted((blank(each, names) for each in value), key=repr)
    if isinstance(value, dict):
        return {blank(key, names): blank(each, names) for key, each in value.items()}
    return value


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_same_as_dbus_daemon(reference: ReferenceBus, model: Model, scenario: str) -> None:
    pair = Pair(reference, model)
    try:
        for each in SCENARIOS[scenario]:
            theirs, ours = pair.play(each)
            assert ours == theirs, each
    finally:
        pair.close()


def test_environment_of_a_system_bus(system: ReferenceBus) -> None:
    """Nobody may set what system services run with, root neither."""
    facts = driver.Bus(system.guid, machine_id(), os.geteuid(), 1, system=True)
    model = Model(configuration.load(system.configuration), facts)
    theirs, ours = system.connect(), model.connect(my_credentials())
    theirs.call("Hello")
    ours.call("Hello")
    expected = theirs.call("UpdateActivationEnvironment", "a{ss}", ({},))
    (seen,) = ours.call("UpdateActivationEnvironment", "a{ss}", ({},))
    theirs.close()
    assert seen.member == "org.freedesktop.DBus.Error.AccessDenied"
    assert seen._replace(destination=None) == expected._replace(destination=None)


def test_before_hello(reference: ReferenceBus, model: Model) -> None:
    for options in (
        {"member": "ListNames"},
        {"member": "Ping", "interface": PEER},
        {"member": "Hello", "interface": "a.b"},
        {"member": "Hello", "signature": "s", "body": ("x",)},
        {"member": "Foo", "destination": None},
        {"member": "Ping", "interface": PEER, "destination": None},
    ):
        theirs, ours = reference.connect(), model.connect(my_credentials())
        member = options.pop("member")
        expected = theirs.until_reply(theirs.send(member, **options))  # type: ignore[arg-type]
        seen = ours.call(member, **options)  # type: ignore[arg-type]
        if options.get("destination", BUS) is None:
            seen = [each._replace(destination=None) for each in seen]
        assert seen == expected
        assert ours.call("Hello")[0].kind == "method_return"
        theirs.close()


@pytest.mark.parametrize(
    "path", ["/", "/org", "/org/freedesktop", "/org/freedesktop/DBus", "/foo", "/org/freedesk"]
)
def test_introspection_describes_the_same(reference: ReferenceBus, model: Model, path: str) -> None:
    theirs, ours = reference.connect(), model.connect(my_credentials())
    theirs.call("Hello")
    ours.call("Hello")
    expected = theirs.call("Introspect", interface=INTROSPECTABLE, path=path).body[0]
    (seen,) = ours.call("Introspect", interface=INTROSPECTABLE, path=path)
    theirs.close()

    def shape(element: ElementTree.Element) -> Any:
        return element.tag, sorted(element.attrib.items()), [shape(each) for each in element]

    mine = ElementTree.fromstring(seen.body[0])
    for own in [each for each in mine if each.get("name", "").startswith("org.kbusd.")]:
        mine.remove(own)
    assert shape(mine) == shape(ElementTree.fromstring(expected))


def test_becoming_a_monitor(reference: ReferenceBus, model: Model) -> None:
    """The reply comes first, then the loss of every name; others see the names go."""
    pair = Pair(reference, model)
    try:
        for each in (
            step("a", "AddMatch", "s", "type='signal'"),
            step("m", "RequestName", "su", "com.example.M", 0),
            step("m", "AddMatch", "s", "type='signal'"),
        ):
            theirs, ours = pair.play(each)
            assert ours == theirs, each
        arguments = ("BecomeMonitor", "asu", (["member='NameLost'"], 0))
        monitor = pair.theirs["m"]
        expected = monitor.until_reply(monitor.send(*arguments, interface=MONITORING))
        lost: list[Seen] = []
        while len(lost) < 2:
            message = monitor.receive()
            assert message is not None
            if (event := Seen.of(message)).member == "NameLost":
                lost.append(event)
        reply, *rest = pair.ours["m"].call(*arguments, interface=MONITORING)
        assert blank(reply, pair.our_names) == blank(expected[0], pair.their_names)
        # The order among its own names is ours; every list is sorted here.
        assert blank(rest, pair.our_names) == blank(lost, pair.their_names)
        a = pair.theirs["a"]
        gone = a.until_reply(a.send("GetId"))[:-1]
        assert blank(pair.ours["a"].taken(), pair.our_names) == blank(gone, pair.their_names)
    finally:
        pair.close()
