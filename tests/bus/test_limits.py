"""Limits from the configuration file: over them, the one who asks is refused; others go on."""

from __future__ import annotations

import pytest

from . import wireformat as w
from .daemon import Bus
from .rawclient import DRIVER, BusError, Disconnected, RawSocket

EXCEEDED = "org.freedesktop.DBus.Error.LimitsExceeded"


def test_match_rules_per_connection(start_bus) -> None:  # type: ignore[no-untyped-def]
    bus: Bus = start_bus(limits={"max_match_rules_per_connection": 3})
    a, b = bus.connect(), bus.connect()
    for n in range(3):
        a.add_match(f"member='M{n}'")
    with pytest.raises(BusError) as caught:
        a.add_match("member='M3'")
    assert caught.value.name == EXCEEDED
    assert caught.value.text == (
        f'Connection "{a.name}" is not allowed to add more match rules (increase limits in '
        "configuration file if required; max_match_rules_per_connection=3)"
    )
    b.add_match("member='M3'")
    a.driver("RemoveMatch", "s", ("member='M0'",))
    a.add_match("member='M3'")


def test_names_per_connection(start_bus) -> None:  # type: ignore[no-untyped-def]
    """The unique name counts, as it does in dbus-daemon."""
    bus: Bus = start_bus(limits={"max_names_per_connection": 3})
    a, b = bus.connect(), bus.connect()
    for n in range(2):
        assert a.request_name(f"test.limit.N{n}") == 1
    with pytest.raises(BusError) as caught:
        a.request_name("test.limit.N2")
    assert caught.value.name == EXCEEDED
    assert caught.value.text == (
        f'Connection "{a.name}" is not allowed to own more services (increase limits in '
        "configuration file if required; max_names_per_connection=3)"
    )
    assert b.request_name("test.limit.N2") == 1
    a.driver("ReleaseName", "s", ("test.limit.N0",))
    assert a.request_name("test.limit.N3") == 1


def test_pending_replies_per_connection(start_bus) -> None:  # type: ignore[no-untyped-def]
    bus: Bus = start_bus(limits={"max_replies_per_connection": 3})
    a, b = bus.connect(), bus.connect()
    serials = [a.send_call(b.name, "/", "test.I", "M") for _ in range(4)]
    with pytest.raises(BusError) as caught:
        a.wait_reply(serials[3])
    assert caught.value.name == EXCEEDED
    calls = [b.read() for _ in range(3)]
    b.reply(calls[0])
    a.wait_reply(serials[0])
    fifth = a.send_call(b.name, "/", "test.I", "M")
    b.reply(b.read())
    a.wait_reply(fifth)


def connect_fails(bus: Bus) -> bool:
    try:
        bus.connect()
    except (BusError, Disconnected, BrokenPipeError, ConnectionResetError):
        return True
    return False


@pytest.mark.parametrize("limit", ["max_connections_per_user", "max_completed_connections"])
def test_connections(start_bus, limit: str) -> None:  # type: ignore[no-untyped-def]
    bus: Bus = start_bus(limits={limit: 3})
    clients = [bus.connect() for _ in range(3)]
    assert connect_fails(bus)
    clients[1].add_match(f"member='NameOwnerChanged',arg0='{clients[0].name}'")
    clients[0].close()
    clients[1].wait_signal("NameOwnerChanged")
    assert clients[1].driver("NameHasOwner", "s", (clients[2].name,)) == [True]
    assert bus.connect().name


def test_descriptors_per_message(start_bus) -> None:  # type: ignore[no-untyped-def]
    bus: Bus = start_bus(limits={"max_message_unix_fds": 2})
    a, b = bus.connect(), bus.connect()
    a.signal("/", "test.I", "Two", "hh", (0, 1), to=b.name, fds=[0, 0])
    assert len(b.read().fds) == 2
    a.signal("/", "test.I", "Three", "hhh", (0, 1, 2), to=b.name, fds=[0, 0, 0])
    a.expect_disconnect()
    assert b.drain() == []


def test_incomplete_connections_do_not_lock_others_out(start_bus) -> None:  # type: ignore[no-untyped-def]
    bus: Bus = start_bus(limits={"max_incomplete_connections": 5, "auth_timeout": 300})
    silent = [RawSocket(bus.address) for _ in range(20)]
    assert bus.connect().driver("NameHasOwner", "s", (DRIVER,)) == [True]
    for sock in silent:
        sock.expect_disconnect()
        sock.close()


def test_a_receiver_that_does_not_read_costs_the_sender_not_the_bus(start_bus) -> None:  # type: ignore[no-untyped-def]
    """Its queue is limited: further calls are refused and everybody else goes on."""
    bus: Bus = start_bus(limits={"max_outgoing_bytes": 2_000_000})
    sender, stuck, other = (bus.connect() for _ in range(3))
    payload = b"x" * 100_000
    refused = False
    for _ in range(200):
        serial = sender.send_call(stuck.name, "/", "test.I", "Flood", "ay", (payload,))
        other_serial = sender.send_call(other.name, "/", "test.I", "Fine")
        other.reply(other.wait_call("Fine"))
        sender.wait_reply(other_serial)
        answers = [m for m in sender.inbox if m.reply_serial == serial]
        sender.inbox.clear()
        if answers:
            assert answers[0].error_name == EXCEEDED
            refused = True
            break
    assert refused
    first = stuck.read()
    assert (first.type, first.body[4:]) == (w.CALL, payload)


def test_what_a_client_wrote_first_is_judged_first(start_bus) -> None:  # type: ignore[no-untyped-def]
    """A call beyond the limit stays beyond it, though a reply that was written after it frees a place."""
    bus: Bus = start_bus(limits={"max_replies_per_connection": 1})
    caller, callee = bus.connect(), bus.connect()
    for _ in range(1000):
        first = caller.send_call(callee.name, "/", "test.I", "First")
        call = callee.wait_call("First")
        second = caller.send_call(callee.name, "/", "test.I", "Second")
        callee.reply(call)
        caller.wait_reply(first)
        with pytest.raises(BusError, match="LimitsExceeded"):
            caller.wait_reply(second)
