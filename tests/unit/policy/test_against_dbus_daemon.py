"""Our verdicts against those of the real dbus-daemon, on generated policies.

One dbus-daemon runs for the module; each example rewrites its configuration, reloads, sends a
fixed set of messages between three connections and looks at what arrives:

    A  sends everything; runs as root
    B  receives, owns names, one of them in a queue; runs as nobody when we may choose
    C  eavesdrops on what A sends to B; runs as root

Each policy ends in a few rules for interfaces that only this harness uses (SCAFFOLD), so that
reloading, ordering and set-up work under any policy. They are part of what we decide about, too.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from xml.sax.saxutils import quoteattr

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jeepney import DBusAddress, HeaderFields, MessageFlag, MessageType, new_method_call
from jeepney.io.blocking import DBusConnection, open_dbus_connection
from jeepney.low_level import Endianness, Header
from jeepney.low_level import Message as WireMessage

from kbusd.policy import configuration, decide
from kbusd.policy.decide import ClientPolicy, Message, Verdict
from kbusd.policy.rules import rule

pytestmark = pytest.mark.skipif(
    shutil.which("dbus-daemon") is None, reason="needs the real dbus-daemon"
)

DRIVER = "org.freedesktop.DBus"
B_NAME, B_OTHER, B_QUEUED, A_NAME = "com.example.B", "com.example.B.Sub", "com.queued.Q", "org.a.A"
ACTIVATABLE = "com.activatable.X"
SETUP, BARRIER = "harness.Setup", "harness.Barrier"
NOBODY = 65534

SCAFFOLD = f"""
<allow send_destination="{DRIVER}" send_interface="{DRIVER}" send_member="ReloadConfig"/>
<allow send_destination="{DRIVER}" send_interface="{DRIVER}" send_member="RequestName"/>
<allow send_destination="{DRIVER}" send_interface="{DRIVER}" send_member="ReleaseName"/>
<allow receive_sender="{DRIVER}" receive_type="method_return"/>
<allow receive_sender="{DRIVER}" receive_type="error"/>
<allow send_interface="{SETUP}"/><allow receive_interface="{SETUP}"/>
<allow send_interface="{BARRIER}"/><allow receive_interface="{BARRIER}" eavesdrop="true"/>
"""

OPEN = '<allow user="*"/><allow own="*"/><allow send_type="*"/><allow receive_type="*"/>'


class Person(NamedTuple):
    uid: int
    gid: int
    groups: tuple[int, ...]
    anonymous: bool = False


ROOT = Person(os.geteuid(), os.getegid(), tuple(os.getgroups()))
OTHER = Person(NOBODY, NOBODY, (NOBODY,)) if ROOT.uid == 0 else ROOT


@contextlib.contextmanager
def acting_as(person: Person) -> Iterator[None]:
    """Connections opened here are `person`'s. Root only, else only for ourselves."""
    if person == ROOT:
        yield
        return
    os.setgroups(person.groups)
    os.setegid(person.gid)
    os.seteuid(person.uid)
    try:
        yield
    finally:
        os.seteuid(ROOT.uid)
        os.setegid(ROOT.gid)
        os.setgroups(ROOT.groups)


class Reference:
    """The dbus-daemon that we compare with, and its clients."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.file = directory / "bus.conf"
        service = directory / "services" / f"{ACTIVATABLE}.service"
        service.parent.mkdir()
        service.write_text(f"[D-BUS Service]\nName={ACTIVATABLE}\nExec=/bin/false\n")
        self.write(f'<policy context="default">{OPEN}</policy>')
        self.process = subprocess.Popen(
            ["dbus-daemon", "--nofork", f"--config-file={self.file}", "--print-address=1"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.people: dict[str, Person] = {}
        self.connections: list[DBusConnection] = []

    def connect_all(self) -> None:
        assert self.process.stdout is not None
        self.address = self.process.stdout.readline().strip().split(",")[0]
        self.a = self.connect("A", ROOT)
        self.b = self.connect("B", OTHER)
        # Only who runs the bus, or root, may eavesdrop at all.
        self.c = self.connect("C", ROOT)
        self.d = self.connect("D", ROOT)
        for connection, name in (
            (self.b, B_NAME),
            (self.b, B_OTHER),
            (self.d, B_QUEUED),
            (self.b, B_QUEUED),
            (self.a, A_NAME),
        ):
            call_driver(connection, "RequestName", "su", (name, 0))
        call_driver(self.b, "AddMatch", "s", (f"sender='{self.a.unique_name}',type='signal'",))
        call_driver(self.c, "AddMatch", "s", (f"sender='{self.a.unique_name}',eavesdrop='true'",))

    def connect(self, name: str, person: Person) -> DBusConnection:
        self.people[name] = person
        with acting_as(person):
            connection = open_dbus_connection(self.address, enable_fds=True, auth_timeout=10)
        self.connections.append(connection)
        return connection

    def write(self, policies: str) -> None:
        self.file.write_text(
            f"<busconfig><type>session</type><listen>unix:tmpdir={self.directory}</listen>"
            f"<servicedir>{self.directory}/services</servicedir>"
            '<limit name="max_replies_per_connection">100000</limit>\n'
            f"{policies}</busconfig>"
        )

    def reload(self, policies: str) -> None:
        """Put `policies` in force for every connection."""
        self.write(policies + f'<policy context="mandatory">{SCAFFOLD}</policy>')
        call_driver(self.d, "ReloadConfig", "", ())

    def policy_of(self, name: str) -> ClientPolicy:
        """What we make of the configuration in force."""
        loaded = configuration.load(str(self.file), environment={})
        return ClientPolicy(loaded.policy, self.people[name], owner=ROOT.uid)

    def names_of(self, name: str) -> tuple[str, ...]:
        """All names of a connection, as our policy wants them."""
        owned = {"A": (A_NAME,), "B": (B_NAME, B_OTHER, B_QUEUED), "C": (), "D": (B_QUEUED,)}
        return (getattr(self, name.lower()).unique_name, *owned[name])

    def close(self) -> None:
        for connection in self.connections:
            connection.close()
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(timeout=10)
        assert self.process.stdout is not None
        self.process.stdout.close()


def call_driver(connection: DBusConnection, member: str, signature: str, body: Any) -> WireMessage:
    address = DBusAddress("/org/freedesktop/DBus", DRIVER, DRIVER)
    reply = connection.send_and_get_reply(
        new_method_call(address, member, signature, body), timeout=20
    )
    assert reply.header.message_type is MessageType.method_return, reply
    return reply


@pytest.fixture(scope="module")
def reference() -> Iterator[Reference]:
    # Not tmp_path: nobody must be able to reach the socket.
    directory = Path(tempfile.mkdtemp(prefix="kbusd-policy-"))
    directory.chmod(0o755)
    daemon = Reference(directory)
    try:
        daemon.connect_all()
        yield daemon
    finally:
        daemon.close()
        shutil.rmtree(directory)


# -- what is sent -----------------------------------------------------------------------------


class Probe(NamedTuple):
    """One message from A. `reply`: to no call of the receiver's (0), or to one (1)."""

    type: int
    destination: str | None
    path: str | None = None
    interface: str | None = None
    member: str | None = None
    error_name: str | None = None
    fds: int = 0
    requested: bool = False

    def message(self) -> Message:
        return Message(
            self.type,
            self.path,
            self.interface,
            self.member,
            self.error_name,
            self.destination,
            self.fds,
        )


CALL, RETURN, ERROR, SIGNAL = 1, 2, 3, 4


def probes() -> list[Probe]:
    found = []
    for destination in (B_NAME, B_OTHER, "unique"):
        for path, interface, member in (
            ("/p", "i.One", "M"),
            ("/q", "i.One", "N"),
            ("/p", "i.Two", "M"),
            ("/q", None, "M"),
            ("/p", None, "N"),
        ):
            found.append(Probe(CALL, destination, path, interface, member))
            if interface is not None:
                found.append(Probe(SIGNAL, destination, path, interface, member))
    found += [
        Probe(SIGNAL, None, "/p", "i.One", "M"),
        Probe(SIGNAL, None, "/q", "i.Two", "N"),
        Probe(SIGNAL, None, "/q", "i.Two", "N", fds=1),
        Probe(CALL, B_NAME, "/p", "i.One", "M", fds=1),
        Probe(CALL, B_NAME, "/q", "i.Two", "N", fds=2),
    ]
    for requested in (True, False):
        found += [
            Probe(RETURN, "unique", requested=requested),
            Probe(RETURN, "unique", fds=1, requested=requested),
            Probe(RETURN, "unique", "/p", "i.One", "M", requested=requested),
            Probe(ERROR, "unique", error_name="e.One", requested=requested),
            Probe(ERROR, "unique", error_name="e.Two", requested=requested),
        ]
    return found


PROBES = probes()
DRIVER_PROBES = [
    Probe(CALL, DRIVER, "/org/freedesktop/DBus", DRIVER, "GetId"),
    Probe(CALL, DRIVER, "/", "org.freedesktop.DBus.Peer", "Ping"),
    Probe(CALL, DRIVER, "/p", "org.freedesktop.DBus.Introspectable", "Introspect"),
    Probe(CALL, DRIVER, "/org/freedesktop/DBus", None, "ListNames"),
]


def wire(probe: Probe, serial: int, reply_serial: int | None) -> WireMessage:
    fields: dict[HeaderFields, Any] = {}
    for key, value in (
        (HeaderFields.path, probe.path),
        (HeaderFields.interface, probe.interface),
        (HeaderFields.member, probe.member),
        (HeaderFields.error_name, probe.error_name),
        (HeaderFields.reply_serial, reply_serial),
        (HeaderFields.destination, probe.destination),
    ):
        if value is not None:
            fields[key] = value
    body: tuple[int, ...] = ()
    if probe.fds:
        fields[HeaderFields.signature] = "h" * probe.fds
        body = (0,) * probe.fds
    header = Header(
        Endianness.little, MessageType(probe.type), MessageFlag(0), 1, 0, serial, fields
    )
    return WireMessage(header, body)


class Outcome(NamedTuple):
    """Whom a probe reached, and the error text that A got for it."""

    b: bool
    c: bool
    error: str | None


def observe(reference: Reference) -> list[Outcome]:
    """Send all PROBES and see what becomes of them."""
    a, b, c = reference.a, reference.b, reference.c
    unique = b.unique_name
    pending = iter([setup_call(reference) for probe in PROBES if probe.requested])
    serials = []
    for probe in PROBES:
        if probe.destination == "unique":
            probe = probe._replace(destination=unique)
        serial = next(a.outgoing_serial)
        reply_to = None
        if probe.type in (RETURN, ERROR):
            reply_to = next(pending) if probe.requested else 4_000_000_000
        a.send(wire(probe, serial, reply_to), serial=serial)
        serials.append(serial)
    barrier = next(a.outgoing_serial)
    a.send(wire(Probe(CALL, unique, "/", BARRIER, "B"), barrier, None), serial=barrier)
    at_b, at_c = ({m.header.serial for m in until(x, barrier, a.unique_name)} for x in (b, c))
    errors = driver_errors(a)
    return [Outcome(serial in at_b, serial in at_c, errors.get(serial)) for serial in serials]


def setup_call(reference: Reference) -> int:
    """Have B call A; returns the serial that A can answer."""
    serial = next(reference.b.outgoing_serial)
    probe = Probe(CALL, reference.a.unique_name, "/", SETUP, "S")
    reference.b.send(wire(probe, serial, None), serial=serial)
    while True:
        message = reference.a.receive(timeout=20)
        if message.header.fields.get(HeaderFields.interface) == SETUP:
            return serial


def until(connection: DBusConnection, serial: int, sender: str) -> list[WireMessage]:
    """What `connection` gets of `sender` before the message with `serial`."""
    found = []
    while True:
        message = connection.receive(timeout=20)
        close_fds(message)
        if message.header.fields.get(HeaderFields.sender) == sender:
            if message.header.serial == serial:
                return found
            found.append(message)


def close_fds(message: WireMessage) -> None:
    for part in message.body:
        if hasattr(part, "close"):
            part.close()


def driver_errors(connection: DBusConnection) -> dict[int, str]:
    """The texts of AccessDenied errors that wait for `connection`, by the serial they answer."""
    address = DBusAddress("/org/freedesktop/DBus", DRIVER, DRIVER)
    serial = next(connection.outgoing_serial)
    # Releasing a name of no one's is always permitted here and answered after all else.
    ask = new_method_call(address, "ReleaseName", "s", ("not.owned.ByAnyone",))
    connection.send(ask, serial=serial)
    errors = {}
    while True:
        message = connection.receive(timeout=20)
        fields = message.header.fields
        answers = fields.get(HeaderFields.reply_serial)
        if fields.get(HeaderFields.sender) != DRIVER or answers is None:
            continue
        if answers == serial:
            return errors
        if fields.get(HeaderFields.error_name) == decide.ACCESS_DENIED:
            errors[answers] = message.body[0]


# -- what we expect ---------------------------------------------------------------------------


def expect(reference: Reference) -> list[Outcome]:
    """What our policy says about PROBES."""
    a, b, c = (reference.policy_of(name) for name in "ABC")
    a_names, b_names, c_names = (reference.names_of(name) for name in "ABC")
    outcomes = []
    for probe in PROBES:
        message = probe.message()
        if probe.destination == "unique":
            message = message._replace(destination=reference.b.unique_name)
        unicast = probe.destination is not None
        send = a.can_send(message, b_names, probe.requested)
        receive = b.can_receive(message, a_names, probe.requested)
        reached = send.allowed and receive.allowed
        overheard = (
            (reached or not unicast)
            and a.can_send(message, c_names, False).allowed
            and c.can_receive(message, a_names, False, eavesdropping=unicast).allowed
        )
        error = None
        if not reached and probe.type == CALL:
            verdict, side = (send, "send") if not send.allowed else (receive, "receive")
            error = refusal(verdict, message, side, probe.requested)
        outcomes.append(Outcome(reached, overheard, error))
    return outcomes


def refusal(verdict: Verdict, message: Message, side: Any, requested: bool) -> str:
    """Our text without what dbus-daemon cannot know or we do not (who the peers are)."""
    return without_infos(
        decide.complaint(
            verdict,
            message,
            side,
            sender="",
            sender_info="uid=1",
            receiver_info="uid=1" if message.destination != DRIVER else "bus",
            requested_reply=requested,
        ).removesuffix(f" ({decide.explain(verdict)})")
    )


def without_infos(text: str) -> str:
    text = re.sub(r'sender="[^"]*"', "sender=", text)
    return re.sub(r"\(uid=[^)]*\)", "(someone)", text)


def compare(reference: Reference, policies: str) -> None:
    """Fail on the first probe about which the two disagree."""
    reference.reload(policies)
    for probe, real, ours in zip(PROBES, observe(reference), expect(reference), strict=True):
        if probe.type != CALL:
            real = real._replace(error=None)
        elif real.error is not None:
            real = real._replace(error=without_infos(real.error))
        assert ours == real, f"{probe}\n{policies}"


# -- generated policies -------------------------------------------------------------------------

booleans = st.sampled_from(["true", "false"])
counts = st.sampled_from(["0", "1", "2"])
own_names = [B_NAME, "com.example", "com.example.Other", A_NAME, "*"]
COMMON = {
    "path": st.sampled_from(["/p", "/q", "*"]),
    "type": st.sampled_from(["method_call", "method_return", "error", "signal", "*"]),
    "interface": st.sampled_from(["i.One", "i.Two", "*"]),
    "member": st.sampled_from(["M", "N", "*"]),
    "error": st.sampled_from(["e.One", "e.Two", "*"]),
    "requested_reply": booleans,
}
SEND = {f"send_{name}": values for name, values in COMMON.items()} | {
    "send_destination": st.sampled_from([B_NAME, B_OTHER, B_QUEUED, A_NAME, DRIVER, "no.one", "*"]),
    "send_destination_prefix": st.sampled_from(["com.example", B_NAME, "com.queued", "com.exam"]),
    "send_broadcast": booleans,
}
RECEIVE = {f"receive_{name}": values for name, values in COMMON.items()} | {
    "receive_sender": st.sampled_from([A_NAME, B_NAME, DRIVER, "no.one", "*"]),
}
MODIFIERS = {"eavesdrop": booleans, "min_fds": counts, "max_fds": counts}


def is_valid(attributes: dict[str, str]) -> bool:
    try:
        rule("allow", attributes, "", 0, lambda _: 0, lambda _: 0, lambda _: None)
    except ValueError:
        return False
    return True


@st.composite
def elements(draw: st.DrawFn) -> str:
    side = draw(st.sampled_from([SEND, SEND, RECEIVE]))
    names = draw(st.lists(st.sampled_from(sorted(side)), min_size=1, max_size=3, unique=True))
    names += draw(st.lists(st.sampled_from(sorted(MODIFIERS)), max_size=1))
    attributes = {name: draw((side | MODIFIERS)[name]) for name in names}
    for direction in ("send", "receive"):
        if f"{direction}_member" in attributes:
            attributes.setdefault(f"{direction}_path", "/p")
    if not is_valid(attributes):
        attributes = {names[0].split("_")[0] + "_type": "*"}
        if not is_valid(attributes):
            attributes = {"eavesdrop": "true"}
    kind = draw(st.sampled_from(["allow", "deny"]))
    return f"<{kind} {' '.join(f'{name}={quoteattr(v)}' for name, v in attributes.items())}/>"


CONTEXTS = [
    'context="default"',
    'context="default"',
    'context="mandatory"',
    f'user="{ROOT.uid}"',
    f'user="{OTHER.uid}"',
    f'group="{OTHER.gid}"',
    'at_console="true"',
    'at_console="false"',
]


@st.composite
def policy_documents(draw: st.DrawFn) -> str:
    start = draw(st.sampled_from([OPEN, OPEN, '<allow send_type="signal"/><allow own="*"/>']))
    blocks = draw(
        st.lists(
            st.tuples(st.sampled_from(CONTEXTS), st.lists(elements(), min_size=1, max_size=4)),
            min_size=1,
            max_size=4,
        )
    )
    text = f'<policy context="default"><allow user="*"/>{start}</policy>\n'
    for context, rules in blocks:
        text += f"<policy {context}>\n" + "\n".join(rules) + "\n</policy>\n"
    return text


generated = settings(
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


ANY_ATTRIBUTE = (
    SEND
    | RECEIVE
    | MODIFIERS
    | {
        "own": st.sampled_from([B_NAME, "*", ""]),
        "own_prefix": st.sampled_from([B_NAME, "*"]),
        "user": st.sampled_from(["root", "*", "no-such-user"]),
        "group": st.sampled_from(["root", "*", "no-such-group"]),
        "log": booleans,
        "unknown": booleans,
    }
)
odd_values = st.sampled_from(["", "maybe", "-1", "0x2", "1 2", "33554432", "33554433", "*"])


@settings(generated, max_examples=300)
@given(data=st.data())
def test_same_elements_are_refused(reference: Reference, data: st.DataObject) -> None:
    names = data.draw(st.lists(st.sampled_from(sorted(ANY_ATTRIBUTE)), max_size=4, unique=True))
    attributes = {
        name: data.draw(st.one_of(ANY_ATTRIBUTE[name], ANY_ATTRIBUTE[name], odd_values))
        for name in names
    }
    context = data.draw(st.sampled_from(CONTEXTS))
    written = " ".join(f"{name}={quoteattr(value)}" for name, value in attributes.items())
    reference.write(
        f'<policy {context}><allow {written}/></policy><policy context="default">{OPEN}</policy>'
        f'<policy context="mandatory">{SCAFFOLD}</policy>'
    )
    address = DBusAddress("/org/freedesktop/DBus", DRIVER, DRIVER)
    reply = reference.d.send_and_get_reply(new_method_call(address, "ReloadConfig"), timeout=20)
    refused = reply.header.message_type is MessageType.error
    try:
        configuration.load(str(reference.file), environment={})
    except configuration.ConfigurationError as error:
        assert refused, error
    else:
        assert not refused, reply.body


@settings(generated, max_examples=40)
@given(policies=policy_documents())
def test_same_verdicts(reference: Reference, policies: str) -> None:
    compare(reference, policies)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@settings(generated, max_examples=3000, derandomize=False)
@given(policies=policy_documents())
def test_same_verdicts_at_length(reference: Reference, policies: str) -> None:
    compare(reference, policies)


@pytest.mark.parametrize(
    "element",
    [
        f'<{kind} {side}_{attribute}="{value}"{modifier}/>'
        for kind in ("allow", "deny")
        for side in ("send", "receive")
        for attribute, value in (
            ("type", "method_call"),
            ("type", "error"),
            ("path", "/p"),
            ("interface", "i.One"),
            ("error", "e.One"),
            ("requested_reply", "true"),
            ("requested_reply", "false"),
        )
        for modifier in ("", ' eavesdrop="true"', ' max_fds="0"')
    ],
)
def test_same_verdict_on_one_rule(reference: Reference, element: str) -> None:
    """After a rule set that allows most, and alone."""
    for before in (OPEN, '<allow user="*"/>'):
        compare(reference, f'<policy context="default">{before}{element}</policy>')


@settings(generated, max_examples=25)
@given(rules=st.lists(elements(), min_size=1, max_size=6))
def test_same_verdicts_about_the_bus_itself(reference: Reference, rules: list[str]) -> None:
    reference.reload(f'<policy context="default"><allow user="*"/>\n{"".join(rules)}</policy>')
    policy = reference.policy_of("A")
    serials = []
    for probe in DRIVER_PROBES:
        serial = next(reference.a.outgoing_serial)
        reference.a.send(wire(probe, serial, None), serial=serial)
        serials.append(serial)
    errors = driver_errors(reference.a)
    for probe, serial in zip(DRIVER_PROBES, serials, strict=True):
        verdict = policy.can_send(probe.message(), (DRIVER,), False)
        assert verdict.allowed is (serial not in errors), probe
        if not verdict.allowed:
            ours = refusal(verdict, probe.message(), "send", False)
            assert ours == without_infos(errors[serial])


@pytest.mark.parametrize(
    "rules",
    [
        "",
        '<allow send_destination="com.activatable.X"/>',
        '<allow send_destination_prefix="com.activatable"/>',
        '<allow send_destination_prefix="com.activatabl"/>',
        '<allow send_type="*"/><deny send_destination="com.activatable.X"/>',
        '<allow send_type="*"/><deny send_broadcast="false"/>',
    ],
)
def test_same_verdict_on_what_would_be_activated(reference: Reference, rules: str) -> None:
    reference.reload(f'<policy context="default"><allow user="*"/>{rules}</policy>')
    probe = Probe(CALL, ACTIVATABLE, "/p", "i.One", "M")
    verdict = reference.policy_of("A").can_send(probe.message(), (ACTIVATABLE,), False)
    serial = next(reference.a.outgoing_serial)
    reference.a.send(wire(probe, serial, None), serial=serial)
    while True:
        message = reference.a.receive(timeout=20)
        if message.header.fields.get(HeaderFields.reply_serial) == serial:
            break
    error = message.header.fields[HeaderFields.error_name]
    assert verdict.allowed is (error != decide.ACCESS_DENIED)


@settings(generated, max_examples=25)
@given(
    rules=st.lists(
        st.tuples(
            st.sampled_from(["allow", "deny"]),
            st.sampled_from(["own", "own_prefix"]),
            st.sampled_from(["com.x", "com.x.y", "com.x.y.z", "com", "com.xx", "*"]),
        ),
        max_size=5,
    )
)
def test_same_verdicts_on_owning(reference: Reference, rules: list[tuple[str, str, str]]) -> None:
    text = "".join(f'<{kind} {attribute}="{name}"/>' for kind, attribute, name in rules)
    reference.reload(f'<policy context="default"><allow user="*"/>{text}</policy>')
    policy = reference.policy_of("A")
    address = DBusAddress("/org/freedesktop/DBus", DRIVER, DRIVER)
    for name in ("com.x", "com.x.y", "com.x.y.z", "com.xx", "com.xx.y", "org.x"):
        ask = new_method_call(address, "RequestName", "su", (name, 0))
        reply = reference.a.send_and_get_reply(ask, timeout=20)
        verdict = policy.can_own(name)
        owned = reply.header.message_type is MessageType.method_return
        assert verdict.allowed is owned, name
        if owned:
            call_driver(reference.a, "ReleaseName", "s", (name,))
        else:
            ours = decide.own_rejection(verdict, reference.a.unique_name, name)
            assert ours == f"{reply.body[0]} ({decide.explain(verdict)})"


@pytest.mark.parametrize(
    "rules",
    [
        "",
        '<allow user="*"/>',
        '<deny user="*"/>',
        f'<allow user="{NOBODY}"/>',
        f'<allow group="{NOBODY}"/>',
        '<deny user="root"/>',
        f'<allow user="*"/><deny group="{NOBODY}"/>',
        f'<deny group="*"/><allow user="{NOBODY}"/>',
        '<allow group="root"/>',
    ],
)
def test_same_verdicts_on_connecting(reference: Reference, rules: str) -> None:
    for context in ("default", "mandatory"):
        reference.reload(f'<policy context="{context}">{rules}</policy>')
        for name, person in (("A", ROOT), ("B", OTHER)):
            try:
                with acting_as(person):
                    # Hello is not subject to policy; a refused user does not get that far.
                    open_dbus_connection(reference.address, auth_timeout=10).close()
                connected = True
            except (ConnectionError, BrokenPipeError):
                connected = False
            assert reference.policy_of(name).can_connect().allowed is connected, (name, context)
