"""A connection begins with Hello: what is refused before it, and what order follows it."""

from __future__ import annotations

import pytest

from . import wireformat as w
from .daemon import Bus
from .rawclient import DRIVER, DRIVER_PATH, BusError, RawClient


def number(name: str) -> int:
    assert name.startswith(":1.")
    return int(name[3:])


def test_hello_reply_comes_before_name_acquired(bus: Bus) -> None:
    client = bus.connect(hello=False)
    serial = client.send_call(DRIVER, DRIVER_PATH, DRIVER, "Hello")
    reply, acquired = client.read(), client.read()
    assert (reply.type, reply.reply_serial, reply.sender) == (w.RETURN, serial, DRIVER)
    name = reply.args[0]
    assert reply.destination == name
    assert acquired.type == w.SIGNAL
    assert (acquired.sender, acquired.destination) == (DRIVER, name)
    assert (acquired.path, acquired.interface) == (DRIVER_PATH, DRIVER)
    assert (acquired.member, acquired.args) == ("NameAcquired", [name])


def test_unique_names_are_consecutive(bus: Bus) -> None:
    names = [number(bus.connect().name) for _ in range(4)]
    assert names == list(range(names[0], names[0] + 4))


@pytest.mark.kbusd_differs("ids begin at 1, as kdbus's do: 0 is nobody in the control log")
def test_unique_names_begin_at_zero(start_bus) -> None:  # type: ignore[no-untyped-def]
    """GLib's own tests count on it (gdbus-connection)."""
    assert start_bus().connect().name == ":1.0"


def test_no_unique_name_is_spent_without_hello(bus: Bus) -> None:
    first = bus.connect()
    silent = RawClient(bus.address, hello=False)
    silent.close()
    assert number(bus.connect().name) == number(first.name) + 1


def test_second_hello_is_an_error(bus: Bus) -> None:
    client = bus.connect()
    with pytest.raises(BusError) as caught:
        client.driver("Hello")
    assert caught.value.name == "org.freedesktop.DBus.Error.Failed"
    assert caught.value.text == "Already handled an Hello message"
    assert client.driver("GetNameOwner", "s", (client.name,)) == [client.name]


@pytest.mark.parametrize("interface", [DRIVER, "org.freedesktop.DBus.Peer"])
def test_driver_call_before_hello_is_refused(bus: Bus, interface: str) -> None:
    client = bus.connect(hello=False)
    with pytest.raises(BusError) as caught:
        client.driver("ListNames", interface=interface)
    assert caught.value.name == "org.freedesktop.DBus.Error.AccessDenied"
    assert client.driver("Hello")[0].startswith(":1.")


def test_call_to_another_before_hello_disconnects(bus: Bus) -> None:
    client = bus.connect(hello=False)
    client.send_call("test.Nobody", "/", "test.I", "M")
    client.expect_disconnect()


def test_signal_before_hello_disconnects(bus: Bus) -> None:
    client = bus.connect(hello=False)
    client.signal("/a", "test.I", "S")
    client.expect_disconnect()


def test_name_owner_changed_on_connect_and_disconnect(bus: Bus) -> None:
    watcher = bus.connect()
    watcher.add_match("type='signal',member='NameOwnerChanged'")
    client = bus.connect()
    changed = watcher.wait_signal("NameOwnerChanged")
    assert changed.args == [client.name, "", client.name]
    assert (changed.sender, changed.destination) == (DRIVER, None)
    client.close()
    assert watcher.wait_signal("NameOwnerChanged").args == [client.name, client.name, ""]


def test_calls_in_one_write(bus: Bus) -> None:
    """Messages that are glued together are all answered, in order."""
    client = bus.connect()
    fields = {w.PATH: "/", w.DESTINATION: DRIVER, w.INTERFACE: DRIVER, w.MEMBER: "GetId"}
    client.write(b"".join(w.build(w.CALL, fields, serial=n) for n in (50, 51, 52)))
    assert [client.read().reply_serial for _ in range(3)] == [50, 51, 52]


def test_byte_by_byte(bus: Bus) -> None:
    """A client that writes one byte at a time is served like any other."""
    client = bus.connect()
    call = w.build(
        w.CALL,
        {w.PATH: "/", w.DESTINATION: DRIVER, w.INTERFACE: DRIVER, w.MEMBER: "GetNameOwner"},
        "s",
        (client.name,),
        serial=77,
    )
    for i in range(len(call)):
        client.write(call[i : i + 1])
    assert client.wait_reply(77).args == [client.name]


@pytest.mark.parametrize("type_", [w.SIGNAL, w.RETURN, w.ERROR])
def test_what_is_no_call_to_the_bus_before_hello_is_refused(bus: Bus, type_: int) -> None:
    client = bus.connect(hello=False)
    fields = {w.DESTINATION: DRIVER, w.REPLY_SERIAL: 7}
    if type_ == w.SIGNAL:
        fields |= {w.PATH: "/", w.INTERFACE: "test.I", w.MEMBER: "S"}
    if type_ == w.ERROR:
        fields[w.ERROR_NAME] = "test.Error"
    serial = client.send(type_, fields)
    refusal = client.read()
    assert refusal.error_name == "org.freedesktop.DBus.Error.AccessDenied"
    assert (refusal.reply_serial, refusal.sender) == (serial, DRIVER)
    assert client.driver("Hello")[0].startswith(":1.")


def test_a_call_without_destination_is_answered_before_hello(bus: Bus) -> None:
    """As by the other end of any connection: without a sender."""
    client = bus.connect(hello=False)
    ping = client.send_call(None, "/", "org.freedesktop.DBus.Peer", "Ping")
    pong = client.read()
    assert (pong.type, pong.reply_serial, pong.sender) == (w.RETURN, ping, None)
    client.send(w.RETURN, {w.REPLY_SERIAL: 7})
    client.send_call(None, "/", "test.I", "M")
    assert client.read().error_name == "org.freedesktop.DBus.Error.UnknownMethod"
    assert client.driver("Hello")[0].startswith(":1.")
