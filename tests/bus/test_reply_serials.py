"""Which answers are let through: to whom was asked, once, and what counts as an answer.

Policy takes whatever has a REPLY_SERIAL for a reply, calls and signals too. An answer uses up what it answers,
also if it is refused. Everything here holds for dbus-daemon as well.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from . import wireformat as w
from .daemon import STRICT_POLICY, Bus
from .rawclient import BusError, RawClient

DENIED = "org.freedesktop.DBus.Error.AccessDenied"
NOT_SUPPORTED = "org.freedesktop.DBus.Error.NotSupported"
NO_REPLY = "org.freedesktop.DBus.Error.NoReply"
PEER = "org.freedesktop.DBus.Peer"
FIELDS = {w.PATH: "/odd", w.INTERFACE: "test.Odd", w.MEMBER: "M"}


def strict(start_bus: Callable[..., Bus], rules: str = "") -> Bus:
    return start_bus(policy=STRICT_POLICY.replace("</policy>", f"{rules}</policy>"))


def refused(client: RawClient, serial: int) -> str:
    with pytest.raises(BusError) as caught:
        client.wait_reply(serial)
    assert caught.value.name == DENIED
    return caught.value.text


def answering(type_: int, to: RawClient, serial: int, **fields: Any) -> tuple[int, dict[int, Any]]:
    return type_, {**FIELDS, w.DESTINATION: to.name, w.REPLY_SERIAL: serial, **fields}


@pytest.mark.parametrize("type_", [w.CALL, w.SIGNAL])
@pytest.mark.parametrize("flags", [0, w.NO_REPLY_EXPECTED])
def test_what_answers_nothing_is_judged_as_a_reply_that_nobody_asked_for(
    start_bus: Callable[..., Bus], type_: int, flags: int
) -> None:
    bus = strict(start_bus)
    one, other = bus.connect(), bus.connect()
    for _ in range(2):  # what was decided is kept
        text = refused(one, one.send(*answering(type_, other, 7), flags=flags))
        assert 'requested_reply="0"' in text
        assert other.drain(one) == []
    one.send(type_, {**FIELDS, w.DESTINATION: other.name}, flags=flags)
    assert other.read().member == "M"


def test_such_a_signal_to_all_is_for_nobody(start_bus: Callable[..., Bus]) -> None:
    bus = strict(start_bus)
    one, other = bus.connect(), bus.connect()
    other.add_match("interface='test.Odd'")
    one.send(w.SIGNAL, {**FIELDS, w.REPLY_SERIAL: 7})
    one.send(w.SIGNAL, FIELDS)
    assert other.read().reply_serial is None
    assert one.drain() == []


def test_the_bus_asked_nobody(start_bus: Callable[..., Bus]) -> None:
    client = strict(start_bus).connect()
    fields = {w.PATH: "/", w.MEMBER: "GetId", w.DESTINATION: "org.freedesktop.DBus"}
    assert client.wait_reply(client.send(w.CALL, fields)).type == w.RETURN
    refused(client, client.send(w.CALL, {**fields, w.REPLY_SERIAL: 7}))


def test_a_rule_can_allow_them(start_bus: Callable[..., Bus]) -> None:
    rules = '<allow send_destination="*" send_requested_reply="false"/>'
    rules += '<allow receive_sender="*" receive_requested_reply="false"/>'
    bus = strict(start_bus, rules)
    one, other = bus.connect(), bus.connect()
    for type_ in (w.CALL, w.SIGNAL):
        one.send(*answering(type_, other, 7))
        assert other.read().reply_serial == 7


def test_the_receivers_policy_counts_as_well(start_bus: Callable[..., Bus]) -> None:
    rules = '<allow send_destination="*" send_requested_reply="false"/>'
    bus = strict(start_bus, rules)
    one, other = bus.connect(), bus.connect()
    text = refused(one, one.send(*answering(w.CALL, other, 7)))
    assert text.startswith("Rejected receive message")


@pytest.mark.parametrize("type_", [w.CALL, w.SIGNAL])
def test_what_answers_a_call_is_let_through_once(start_bus: Callable[..., Bus], type_: int) -> None:
    """And past a <deny>, as a reply; then the call is answered."""
    bus = strict(start_bus, '<deny send_interface="test.Odd"/>')
    caller, callee = bus.connect(), bus.connect()
    asked = caller.send_call(callee.name, "/", "test.I", "Ask")
    call = callee.read()
    callee.send(*answering(type_, caller, asked))
    got = caller.read()
    assert (got.type, got.member, got.reply_serial) == (type_, "M", asked)
    refused(callee, callee.send(*answering(type_, caller, asked)))
    refused(callee, callee.reply(call))
    refused(callee, callee.send(type_, {**FIELDS, w.DESTINATION: caller.name}))
    assert caller.drain(callee) == []


def test_to_oneself(start_bus: Callable[..., Bus]) -> None:
    client = strict(start_bus).connect()
    refused(client, client.send(*answering(w.SIGNAL, client, 7)))
    asked = client.send_call(client.name, "/", "test.I", "Ask")
    assert client.read().member == "Ask"
    client.send(*answering(w.SIGNAL, client, asked))
    assert client.read().type == w.SIGNAL
    refused(client, client.send(*answering(w.SIGNAL, client, asked)))


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize(
    "rule",
    [
        'send_destination="test.Caller" send_type="error" send_requested_reply="true"',
        'receive_sender="test.Callee" receive_type="error" receive_requested_reply="true"',
    ],
)
def test_an_answer_that_policy_refuses_uses_up_the_call(
    start_bus: Callable[..., Bus], rule: str, own: bool
) -> None:
    """A second one that it would have let through was."""
    bus = strict(start_bus, f"<deny {rule}/>")
    caller = bus.connect()
    callee = caller if own else bus.connect()
    caller.request_name("test.Caller")
    callee.request_name("test.Callee")
    caller.drain()
    callee.drain()
    caller.send_call(callee.name, "/", "test.I", "Ask")
    call = callee.wait_call("Ask")
    refused(callee, callee.reply_error(call, "test.Error"))
    refused(callee, callee.reply(call))
    assert caller.drain(callee) == []
    asked = caller.send_call(callee.name, "/", "test.I", "Ask")
    callee.reply(callee.wait_call("Ask"))
    assert caller.wait_reply(asked).type == w.RETURN


def test_an_answer_with_descriptors_for_who_takes_none_uses_up_the_call(
    start_bus: Callable[..., Bus],
) -> None:
    bus = strict(start_bus)
    caller, callee = bus.connect(fds=False), bus.connect()
    caller.send_call(callee.name, "/", "test.I", "Ask")
    call = callee.read()
    with pytest.raises(BusError) as caught:
        callee.wait_reply(callee.reply(call, "h", (0,), fds=[0]))
    assert caught.value.name == NOT_SUPPORTED
    refused(callee, callee.reply(call))
    assert caller.drain(callee) == []


def test_a_call_with_descriptors_for_who_takes_none_stays_open(
    start_bus: Callable[..., Bus],
) -> None:
    """So its caller is told twice that nobody will answer it."""
    bus = strict(start_bus)
    caller, callee = bus.connect(), bus.connect(fds=False)
    asked = caller.send_call(callee.name, "/", "test.I", "Ask", "h", (0,), fds=[0])
    assert caller.wait(lambda m: m.reply_serial == asked).error_name == NOT_SUPPORTED
    callee.close()
    assert caller.wait(lambda m: m.reply_serial == asked).error_name == NO_REPLY


@pytest.mark.parametrize("member", ["M", "Ping"])
@pytest.mark.parametrize("type_", [w.SIGNAL, w.RETURN, w.ERROR, 77])
def test_what_has_the_interface_peer_and_no_destination_is_taken_for_a_call(
    bus: Bus, type_: int, member: str
) -> None:
    """By libdbus, before the bus sees it; we published such a signal and dropped the rest."""
    client, other, monitor = bus.connect(), bus.connect(), bus.connect()
    other.add_match(f"interface='{PEER}'")
    monitoring = "org.freedesktop.DBus.Monitoring"
    monitor.driver("BecomeMonitor", "asu", (["type='signal'"], 0), interface=monitoring)
    fields = {w.PATH: "/", w.INTERFACE: PEER, w.MEMBER: member}
    if type_ in (w.RETURN, w.ERROR):
        fields[w.REPLY_SERIAL] = 7
    if type_ == w.ERROR:
        fields[w.ERROR_NAME] = "test.Error"
    serial = client.send(type_, fields, flags=w.NO_REPLY_EXPECTED)
    answer = client.read()
    assert (answer.reply_serial, answer.sender, answer.destination) == (serial, None, None)
    assert answer.error_name == "org.freedesktop.DBus.Error.UnknownMethod"
    assert answer.args == [f"Unknown method invoked on {PEER} interface"]
    assert other.drain(client) == []
    assert monitor.wait(lambda m: m.sender == client.name).interface != PEER


def test_peer_before_hello(bus: Bus) -> None:
    client = bus.connect(hello=False)
    serial = client.send(w.SIGNAL, {w.PATH: "/", w.INTERFACE: PEER, w.MEMBER: "M"})
    assert client.read().reply_serial == serial
    assert client.driver("Hello")
