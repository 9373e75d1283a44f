"""Policy from the configuration file: what is denied is answered or dropped, the rest passes."""

from __future__ import annotations

import os
from typing import Any

import pytest

from . import procs
from . import wireformat as w
from .daemon import OPEN_POLICY, Bus, is_reference
from .rawclient import DRIVER, DRIVER_PATH, BusError, RawClient, RawSocket

DENIED = "org.freedesktop.DBus.Error.AccessDenied"
ALLOW_ALL = '<allow send_destination="*"/><allow receive_sender="*"/><allow own="*"/>'
UID = os.geteuid()
OTHER_UID = 65534


def default(rules: str, base: str = ALLOW_ALL) -> str:
    return f'<policy context="default">{base}\n{rules}</policy>\n'


def denied(client: RawClient, *args: Any, **options: Any) -> str:
    """The text with which a call is refused."""
    with pytest.raises(BusError) as caught:
        client.call(*args, **options)
    assert caught.value.name == DENIED
    return caught.value.text


def allowed(caller: RawClient, callee: RawClient, to: str, interface: str, member: str) -> None:
    caller.send_call(to, "/", interface, member, flags=w.NO_REPLY_EXPECTED)
    assert callee.wait_call(member).interface == interface


# -- own ---------------------------------------------------------------------------------


def test_own(start_bus) -> None:  # type: ignore[no-untyped-def]
    bus: Bus = start_bus(
        policy=default('<deny own="test.own.Denied"/><deny own_prefix="test.prefix"/>')
    )
    client = bus.connect()
    for name in ("test.own.Denied", "test.prefix", "test.prefix.x.y"):
        text = denied(client, DRIVER, DRIVER_PATH, DRIVER, "RequestName", "su", (name, 0))
        assert name in text
        assert client.driver("NameHasOwner", "s", (name,)) == [False]
    for name in ("test.own.Denied2", "test.own", "test.prefixed"):
        assert client.request_name(name) == 1


def test_nothing_may_be_owned_unless_allowed(start_bus) -> None:  # type: ignore[no-untyped-def]
    base = '<allow send_destination="*"/><allow receive_sender="*"/>'
    policy = default('<allow own="test.own.Only"/>', base)
    client = start_bus(policy=policy).connect()
    assert client.request_name("test.own.Only") == 1
    with pytest.raises(BusError, match="AccessDenied"):
        client.request_name("test.own.Other")


# -- send --------------------------------------------------------------------------------

SEND = default(
    """
    <deny send_destination="test.dest.Denied"/>
    <deny send_interface="test.denied.Interface" send_type="method_call"/>
    <deny send_interface="test.one.Member" send_member="Forbidden"/>
    <deny send_type="signal" send_interface="test.denied.Signal"/>
    <deny send_path="/forbidden" send_type="method_call"/>
    <deny send_destination="org.freedesktop.DBus"
          send_interface="org.freedesktop.DBus" send_member="UpdateActivationEnvironment"/>
    <deny send_destination_prefix="test.destprefix"/>
    """
)


@pytest.fixture
def send_bus(start_bus) -> Bus:  # type: ignore[no-untyped-def]
    return start_bus(policy=SEND)  # type: ignore[no-any-return]


def test_send_destination(send_bus: Bus) -> None:
    a, b, c = (send_bus.connect() for _ in range(3))
    b.request_name("test.dest.Denied")
    b.request_name("test.dest.Other")
    c.request_name("test.dest.Free")
    denied(a, "test.dest.Denied", "/", "test.I", "M")
    # The rule is about the owner, however it is addressed.
    denied(a, "test.dest.Other", "/", "test.I", "M")
    denied(a, b.name, "/", "test.I", "M")
    allowed(a, c, "test.dest.Free", "test.I", "M")
    b.driver("ReleaseName", "s", ("test.dest.Denied",))
    allowed(a, b, b.name, "test.I", "M")


def test_send_destination_prefix(send_bus: Bus) -> None:
    a, b, c = (send_bus.connect() for _ in range(3))
    b.request_name("test.destprefix.x")
    c.request_name("test.destprefixed")
    denied(a, b.name, "/", "test.I", "M")
    allowed(a, c, c.name, "test.I", "M")


def test_send_interface_member_and_path(send_bus: Bus) -> None:
    a, b = send_bus.connect(), send_bus.connect()
    denied(a, b.name, "/", "test.denied.Interface", "M")
    denied(a, b.name, "/", "test.one.Member", "Forbidden")
    denied(a, b.name, "/forbidden", "test.I", "M")
    allowed(a, b, b.name, "test.one.Member", "Other")
    a.signal("/forbidden", "test.denied.Interface", "S", to=b.name)
    assert b.wait_signal("S").interface == "test.denied.Interface"


def test_send_signal(send_bus: Bus) -> None:
    a, b = send_bus.connect(), send_bus.connect()
    b.add_match("interface='test.denied.Signal'")
    b.add_match("interface='test.allowed.Signal'")
    a.signal("/", "test.denied.Signal", "Broadcast")
    a.signal("/", "test.denied.Signal", "Unicast", to=b.name)
    a.signal("/", "test.allowed.Signal", "Fine")
    assert [m.member for m in b.drain(a)] == ["Fine"]


@pytest.mark.parametrize("flags", [0, w.NO_REPLY_EXPECTED])
def test_a_denied_unicast_signal_is_answered(send_bus: Bus, flags: int) -> None:
    """The sender hears why, though a signal has no reply; the reference's monitor tests see it."""
    a, b = send_bus.connect(), send_bus.connect()
    serial = a.signal("/", "test.denied.Signal", "Unicast", to=b.name, flags=flags)
    with pytest.raises(BusError) as caught:
        a.wait_reply(serial)
    assert caught.value.name == DENIED


def test_send_to_the_driver(send_bus: Bus) -> None:
    client = send_bus.connect()
    denied(client, DRIVER, DRIVER_PATH, DRIVER, "UpdateActivationEnvironment", "a{ss}", ({},))
    assert client.driver("NameHasOwner", "s", (client.name,)) == [True]


def test_replies_are_allowed_where_calls_are_denied(start_bus) -> None:  # type: ignore[no-untyped-def]
    """The system bus's way: no method calls by default, but whoever is called may answer."""
    policy = default(
        """
        <allow user="*"/><allow send_type="signal"/>
        <allow send_requested_reply="true" send_type="method_return"/>
        <allow send_requested_reply="true" send_type="error"/>
        <allow receive_type="method_call"/><allow receive_type="method_return"/>
        <allow receive_type="error"/><allow receive_type="signal"/>
        <allow send_destination="org.freedesktop.DBus"/>
        <allow own="test.reply.Service"/>
        <allow send_destination="test.reply.Service"/>
        """,
        '<deny own="*"/><deny send_type="method_call"/>',
    )
    bus: Bus = start_bus(policy=policy, type_="system")
    client, service, other = (bus.connect() for _ in range(3))
    service.request_name("test.reply.Service")
    serial = client.send_call("test.reply.Service", "/", "test.I", "M")
    service.reply(service.wait_call("M"), "s", ("answer",))
    assert client.wait_reply(serial).args == ["answer"]
    denied(service, client.name, "/", "test.I", "M")
    denied(client, other.name, "/", "test.I", "M")
    other.send(w.RETURN, {w.DESTINATION: client.name, w.REPLY_SERIAL: 99})
    other.signal("/", "test.I", "After", to=client.name)
    assert client.read().member == "After"


def test_hello_is_always_allowed(start_bus) -> None:  # type: ignore[no-untyped-def]
    """A policy that denies everything lets whoever may connect say Hello, and nothing more."""
    rules = '<allow user="*"/><allow receive_sender="*"/><deny send_type="method_call"/>'
    policy = f'<policy context="default">{rules}</policy>'
    bus: Bus = start_bus(policy=policy, type_="system")
    client = bus.connect(hello=False)
    name = client.driver("Hello")[0]
    assert name.startswith(":1.")
    denied(client, DRIVER, DRIVER_PATH, DRIVER, "ListNames")


def test_a_name_that_is_waited_for_counts(start_bus) -> None:  # type: ignore[no-untyped-def]
    """send_destination is about every connection in the name's queue, not only its owner."""
    bus: Bus = start_bus(policy=default('<deny send_destination="test.queued.Name"/>'))
    a, owner, queued = (bus.connect() for _ in range(3))
    allowed(a, queued, queued.name, "test.I", "Before")
    assert owner.request_name("test.queued.Name") == 1
    assert queued.request_name("test.queued.Name") == 2
    denied(a, queued.name, "/", "test.I", "M")
    queued.driver("ReleaseName", "s", ("test.queued.Name",))
    allowed(a, queued, queued.name, "test.I", "After")


def test_a_queue_counts_for_prefixes_and_for_senders(start_bus) -> None:  # type: ignore[no-untyped-def]
    rules = """
        <deny send_destination_prefix="test.prefixed"/>
        <deny receive_sender="test.sender.Name" receive_interface="test.I"/>
        """
    bus: Bus = start_bus(policy=default(rules))
    a, owner, queued = (bus.connect() for _ in range(3))
    for name in ("test.prefixed.One", "test.sender.Name"):
        assert owner.request_name(name, 1) == 1
        assert queued.request_name(name) == 2
    denied(a, queued.name, "/", "test.Other", "M")
    assert "Rejected receive" in denied(queued, a.name, "/", "test.I", "M")
    # Who was replaced stays in the queue.
    assert queued.request_name("test.prefixed.One", 2) == 1
    denied(a, owner.name, "/", "test.Other", "M")
    owner.driver("ReleaseName", "s", ("test.prefixed.One",))
    allowed(a, owner, owner.name, "test.Other", "M")
    a.add_match("sender='test.sender.Name'")  # of match rules only the owner counts
    owner.signal("/", "test.Other", "FromOwner")
    queued.signal("/", "test.Other", "FromQueued")
    assert [m.member for each in (owner, queued) for m in a.drain(each)] == ["FromOwner"]


def test_denied_call_that_wants_no_reply_gets_an_error(send_bus: Bus) -> None:
    a, b = send_bus.connect(), send_bus.connect()
    serial = a.send_call(b.name, "/", "test.denied.Interface", "M", flags=w.NO_REPLY_EXPECTED)
    assert b.drain(a) == []
    with pytest.raises(BusError, match="AccessDenied"):
        a.wait_reply(serial)


def test_who_may_not_send_to_a_service_does_not_start_it(start_bus) -> None:  # type: ignore[no-untyped-def]
    bus: Bus = start_bus(policy=default('<deny send_destination="test.start.Denied"/>'))
    started = bus.directory / "started"
    (bus.services / "test.start.Denied.service").write_text(
        f"[D-BUS Service]\nName=test.start.Denied\nExec=/bin/sh -c '>>{started}; exit 1'\n"
    )
    client = bus.connect()
    client.driver("ReloadConfig")
    denied(client, "test.start.Denied", "/", "test.I", "M")
    assert not started.exists()
    # Another way, which shows that it could have been started.
    with pytest.raises(BusError, match="Spawn"):
        client.driver("StartServiceByName", "su", ("test.start.Denied", 0))
    assert started.exists()


def test_last_matching_rule_wins(start_bus) -> None:  # type: ignore[no-untyped-def]
    policy = default(
        """
        <deny send_interface="test.rule.One"/>
        <allow send_interface="test.rule.One" send_member="Yes"/>
        <deny send_interface="test.rule.Two" send_member="No"/>
        <allow send_interface="test.rule.Two"/>
        """
    )
    bus: Bus = start_bus(policy=policy)
    a, b = bus.connect(), bus.connect()
    denied(a, b.name, "/", "test.rule.One", "No")
    allowed(a, b, b.name, "test.rule.One", "Yes")
    allowed(a, b, b.name, "test.rule.Two", "No")


def test_mandatory_comes_after_default(start_bus) -> None:  # type: ignore[no-untyped-def]
    policy = (
        '<policy context="mandatory"><deny send_interface="test.Mandatory"/></policy>'
        + default('<allow send_interface="test.Mandatory"/>')
    )
    bus: Bus = start_bus(policy=policy)
    a, b = bus.connect(), bus.connect()
    denied(a, b.name, "/", "test.Mandatory", "M")


# -- receive -----------------------------------------------------------------------------


def test_receive(start_bus) -> None:  # type: ignore[no-untyped-def]
    policy = default(
        """
        <deny receive_interface="test.unreceived.Interface"/>
        <deny receive_sender="test.unreceived.Sender"/>
        <deny receive_type="signal" receive_member="Unreceived" receive_interface="test.I"/>
        """
    )
    bus: Bus = start_bus(policy=policy)
    a, b, c = (bus.connect() for _ in range(3))
    denied(a, b.name, "/", "test.unreceived.Interface", "M")
    c.request_name("test.unreceived.Sender")
    denied(c, b.name, "/", "test.I", "M")
    b.add_match("type='signal'")
    c.signal("/", "test.I", "FromC")
    a.signal("/", "test.I", "Unreceived")
    a.signal("/", "test.unreceived.Interface", "Unreceived")
    a.signal("/", "test.I", "Received")
    got = [m.member for m in b.drain(a) if m.sender != DRIVER]
    assert got == ["Received"]


def test_a_unicast_signal_that_is_not_received_is_answered(start_bus) -> None:  # type: ignore[no-untyped-def]
    bus: Bus = start_bus(policy=default('<deny receive_interface="test.unreceived.Interface"/>'))
    a, b = bus.connect(), bus.connect()
    serial = a.signal("/", "test.unreceived.Interface", "S", to=b.name)
    with pytest.raises(BusError, match="AccessDenied"):
        a.wait_reply(serial)
    assert b.drain(a) == []


def test_what_the_bus_says_must_be_received(start_bus) -> None:  # type: ignore[no-untyped-def]
    """Signals and replies of the bus itself are subject to the receiver's policy."""
    sender = 'receive_sender="org.freedesktop.DBus"'
    rules = f"""
        <deny {sender} receive_interface="org.freedesktop.DBus" receive_member="NameAcquired"/>
        <deny {sender} receive_type="error" receive_requested_reply="true"/>
        <deny own="test.own.Denied"/>
        """
    client = start_bus(policy=default(rules)).connect(hello=False)
    client.name = client.driver("Hello")[0]
    assert client.request_name("test.own.Mine") == 1
    client.send_call(DRIVER, DRIVER_PATH, DRIVER, "RequestName", "su", ("test.own.Denied", 0))
    client.driver("ReleaseName", "s", ("test.own.Mine",))
    assert [m.member for m in client.inbox] == ["NameLost"]


# -- who ---------------------------------------------------------------------------------


def test_user_rules(start_bus) -> None:  # type: ignore[no-untyped-def]
    policy = default('<deny own="*"/><deny send_interface="test.ForNobody"/>') + (
        f'<policy user="{UID}"><allow own="test.user.Mine"/></policy>'
        f'<policy user="{OTHER_UID}"><allow own="test.user.Theirs"/></policy>'
    )
    client = start_bus(policy=policy).connect()
    assert client.request_name("test.user.Mine") == 1
    with pytest.raises(BusError, match="AccessDenied"):
        client.request_name("test.user.Theirs")


def test_user_comes_after_group_and_default(start_bus) -> None:  # type: ignore[no-untyped-def]
    policy = (
        f'<policy user="{UID}"><allow own="test.order.A"/><deny own="test.order.B"/></policy>'
        f'<policy group="{os.getegid()}"><deny own="test.order.A"/><allow own="test.order.B"/>'
        '<allow own="test.order.C"/></policy>' + default('<deny own="test.order.C"/>')
    )
    client = start_bus(policy=policy).connect()
    assert client.request_name("test.order.A") == 1
    with pytest.raises(BusError, match="AccessDenied"):
        client.request_name("test.order.B")
    assert client.request_name("test.order.C") == 1


@pytest.mark.parametrize("rule", [f'<deny user="{UID}"/>', f'<deny group="{os.getegid()}"/>'])
def test_who_may_connect(start_bus, rule: str) -> None:  # type: ignore[no-untyped-def]
    """A user that policy keeps out does not get past authentication."""
    bus: Bus = start_bus(policy=OPEN_POLICY + f'<policy context="mandatory">{rule}</policy>')
    raw = RawSocket(bus.address)
    raw.write(b"\0AUTH EXTERNAL " + str(UID).encode().hex().encode() + b"\r\nBEGIN\r\n")
    raw.expect_disconnect()
    raw.close()


def test_another_user_may_not_connect_to_a_session_bus(start_bus) -> None:  # type: ignore[no-untyped-def]
    if UID != 0:
        pytest.skip("needs root to be somebody else")
    bus: Bus = start_bus()
    bus.socket.chmod(0o777)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.setgroups([])
            os.setgid(OTHER_UID)
            os.setuid(OTHER_UID)
            raw = RawSocket(bus.address)
            raw.write(b"\0AUTH EXTERNAL\r\nDATA\r\nBEGIN\r\n")
            raw.expect_disconnect()
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_another_user_on_a_system_bus(start_bus) -> None:  # type: ignore[no-untyped-def]
    """Anybody may connect there, and is seen as whom the kernel says."""
    if UID != 0:
        pytest.skip("needs root to be somebody else")
    policy = default('<allow user="*"/>')
    bus: Bus = start_bus(type_="system", policy=policy)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.setgroups([])
            os.setgid(OTHER_UID)
            os.setuid(OTHER_UID)
            client = RawClient(bus.address)
            user = client.driver("GetConnectionUnixUser", "s", (client.name,))
            status = 0 if user == [OTHER_UID] else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# -- reload and report -------------------------------------------------------------------


def test_reload_config_changes_the_policy(start_bus) -> None:  # type: ignore[no-untyped-def]
    bus: Bus = start_bus(policy=default(""))
    a, b = bus.connect(), bus.connect()
    allowed(a, b, b.name, "test.Reload", "M")
    text = bus.config.read_text()
    changed = text.replace("</policy>", '<deny send_interface="test.Reload"/></policy>')
    bus.config.write_text(changed)
    a.driver("ReloadConfig")
    denied(a, b.name, "/", "test.Reload", "M")
    bus.config.write_text(text)
    a.driver("ReloadConfig")
    allowed(a, b, b.name, "test.Reload", "M")


def test_reload_of_a_broken_file_keeps_the_old_policy(start_bus) -> None:  # type: ignore[no-untyped-def]
    bus: Bus = start_bus(policy=default('<deny send_interface="test.Denied"/>'))
    a, b = bus.connect(), bus.connect()
    bus.config.write_text("<busconfig><nonsense/></busconfig>")
    with pytest.raises(BusError):
        a.driver("ReloadConfig")
    denied(a, b.name, "/", "test.Denied", "M")
    allowed(a, b, b.name, "test.Fine", "M")


@pytest.mark.kbusd_only
def test_a_refusal_names_the_rule_with_file_and_line(start_bus) -> None:  # type: ignore[no-untyped-def]
    bus: Bus = start_bus(policy=default('<deny send_interface="test.Denied"/>'))
    lines = bus.config.read_text().splitlines()
    number = next(n for n, line in enumerate(lines, 1) if "test.Denied" in line)
    a, b = bus.connect(), bus.connect()
    text = denied(a, b.name, "/", "test.Denied", "M")
    assert f"{bus.config}:{number}" in text + bus.log()


@pytest.mark.parametrize("effect", ["deny", "allow"])
def test_the_log_has_refusals_and_what_a_rule_with_log_allows(start_bus, effect: str) -> None:  # type: ignore[no-untyped-def]
    bus: Bus = start_bus(policy=default(f'<{effect} send_interface="test.Logged" log="true"/>'))
    a, b = bus.connect(), bus.connect()
    for n in range(2):
        a.send_call(b.name, "/", "test.Logged", f"M{n}", flags=w.NO_REPLY_EXPECTED)
    a.send_call(b.name, "/", "test.Other", "M2", flags=w.NO_REPLY_EXPECTED)
    b.wait_call("M2")
    what = "Rejected send message" if effect == "deny" else "Would reject message"
    lines = [line for line in bus.log().splitlines() if what in line]
    for n in range(2):
        assert any(f'member="M{n}"' in line and a.name in line for line in lines)
    assert not any('member="M2"' in line for line in lines)


@pytest.mark.parametrize("size", [1, 500_000])
def test_a_message_that_waits_is_logged_once(start_bus, size: int) -> None:  # type: ignore[no-untyped-def]
    """The first to each peer waits for an introduction; a large one is looked at before it is whole."""
    bus: Bus = start_bus(policy=default('<allow send_interface="test.Logged" log="true"/>'))
    sender, receivers = bus.connect(), [bus.connect() for _ in range(5)]
    for receiver in receivers:
        for _ in range(2):
            payload = b"x" * size
            sender.signal("/", "test.Logged", "S", "ay", (payload,), to=receiver.name)
            receiver.wait_signal("S")
    lines = [line for line in bus.log().splitlines() if 'member="S"' in line]
    for receiver in receivers:
        assert sum(f'destination="{receiver.name}"' in line for line in lines) == 2


@pytest.mark.kbusd_only
def test_the_log_has_names_that_were_refused_but_not_without_end(start_bus) -> None:  # type: ignore[no-untyped-def]
    bus: Bus = start_bus(policy=default('<deny own="test.Denied"/>'))
    client = bus.connect()
    for _ in range(50):
        with pytest.raises(BusError):
            client.request_name("test.Denied")
    lines = [line for line in bus.log().splitlines() if "may not own test.Denied" in line]
    assert f"denied by rule {bus.config}:" in lines[0]
    assert len(lines) == 16


def test_clients_that_came_after_a_reload_were_judged_by_the_policy_from_before(start_bus) -> None:  # type: ignore[no-untyped-def]
    """So much stands in the log since then that their workers, made before, start from behind it."""
    bus: Bus = start_bus()
    admin = bus.connect()
    if not is_reference():
        procs.eventually(lambda: len(bus.workers()) >= 4, "there are spare workers")
    new = OPEN_POLICY.replace(
        "</policy>", '<deny send_interface="test.I" send_member="Forbidden"/></policy>'
    )
    bus.config.write_text(bus.config.read_text().replace(OPEN_POLICY, new))
    admin.driver("ReloadConfig")
    for number in range(20):
        admin.add_match(f"member='M{number}'")
    late = bus.connect()
    for _ in range(5):
        other, late = late, bus.connect(hello=False)  # workers of both would let it pass
        hello = late.send_call(DRIVER, DRIVER_PATH, DRIVER, "Hello")
        first = late.send_call(other.name, "/", "test.I", "Forbidden")
        late.name = late.wait_reply(hello).args[0]
        with pytest.raises(BusError, match="AccessDenied"):
            late.wait_reply(first)
