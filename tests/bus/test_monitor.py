"""BecomeMonitor: a monitor sees what passes, as it was written, and takes no part itself."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from . import wireformat as w
from .daemon import Bus
from .rawclient import DRIVER, DRIVER_PATH, BusError, RawClient

MONITORING = "org.freedesktop.DBus.Monitoring"


def become_monitor(client: RawClient, *rules: str) -> None:
    """Become a monitor and read what says that the client lost its names."""
    client.driver("BecomeMonitor", "asu", (list(rules), 0), interface=MONITORING)


@pytest.fixture
def monitor(bus: Bus) -> Iterator[RawClient]:
    client = bus.connect()
    become_monitor(client)
    return client


def passing(monitor: RawClient, sender: RawClient) -> list[w.Message]:
    """What the monitor saw of one sender until a signal that it sends now."""
    sender.signal("/end", "test.Monitor", "End")
    seen = []
    while (message := monitor.read()).member != "End":
        if sender.name in (message.sender, message.destination):
            seen.append(message)
    return seen


def test_sees_calls_replies_errors_and_signals(bus: Bus, monitor: RawClient) -> None:
    a, b = bus.connect(), bus.connect()
    serial = a.send_call(b.name, "/", "test.I", "Call", "s", ("x",), flags=w.ALLOW_INTERACTIVE)
    b.reply(b.read(), "s", ("y",))
    a.wait_reply(serial)
    serial = a.send_call(b.name, "/", "test.I", "Bad")
    b.reply_error(b.read(), "test.E", "z")
    with pytest.raises(BusError):
        a.wait_reply(serial)
    a.signal("/s", "test.I", "Uni", to=b.name)
    a.signal("/s", "test.I", "Broad", "u", (3,))
    seen = [m for m in passing(monitor, a) if DRIVER not in (m.sender, m.destination)]
    assert [(m.type, m.member, m.error_name) for m in seen] == [
        (w.CALL, "Call", None),
        (w.RETURN, None, None),
        (w.CALL, "Bad", None),
        (w.ERROR, None, "test.E"),
        (w.SIGNAL, "Uni", None),
        (w.SIGNAL, "Broad", None),
    ]
    assert [(m.sender, m.destination) for m in seen] == [
        (a.name, b.name),
        (b.name, a.name),
        (a.name, b.name),
        (b.name, a.name),
        (a.name, b.name),
        (a.name, None),
    ]
    assert seen[0].flags == w.ALLOW_INTERACTIVE
    assert (seen[0].serial, seen[0].args) == (serial - 1, ["x"])
    assert seen[1].args == ["y"]


def test_sees_a_well_known_destination_as_written(bus: Bus, monitor: RawClient) -> None:
    a, b = bus.connect(), bus.connect()
    b.request_name("test.monitor.Name")
    a.send_call("test.monitor.Name", "/", "test.I", "Named", flags=w.NO_REPLY_EXPECTED)
    assert monitor.wait_call("Named").destination == "test.monitor.Name"


def test_sees_the_driver_at_work(bus: Bus, monitor: RawClient) -> None:
    a = bus.connect()
    a.request_name("test.monitor.Driver")
    with pytest.raises(BusError):
        a.call("test.monitor.Nobody", "/", "test.I", "Lost")
    seen = passing(monitor, a)
    kinds = [(m.type, m.member or m.error_name) for m in seen]
    hello = kinds.index((w.CALL, "Hello"))
    assert (w.RETURN, None) in kinds[hello:]
    assert (w.SIGNAL, "NameAcquired") in kinds
    assert (w.CALL, "RequestName") in kinds
    assert (w.CALL, "Lost") in kinds
    assert (w.ERROR, "org.freedesktop.DBus.Error.ServiceUnknown") in kinds
    request = kinds.index((w.CALL, "RequestName"))
    reply = next(i for i, m in enumerate(seen) if m.type == w.RETURN and i > request)
    assert seen[reply].reply_serial == seen[request].serial


def test_sees_the_answer_to_what_policy_forbids(start_bus) -> None:  # type: ignore[no-untyped-def]
    """For each subscriber of a broadcast that may not have it, at its place among the rest."""
    refused = "org.freedesktop.DBus.Error.AccessDenied"
    rules = """
        <deny send_interface="test.unsent"/><deny receive_interface="test.unreceived"/>
        <deny receive_interface="org.freedesktop.DBus" receive_member="NameLost"/>
        """
    allowed = '<allow send_destination="*"/><allow receive_sender="*"/><allow own="*"/>'
    bus: Bus = start_bus(policy=f'<policy context="default">{allowed}{rules}</policy>')
    a, b, c, monitor = (bus.connect() for _ in range(4))
    for each in (a, b, c):
        each.add_match("path='/watched'")
    a.request_name("test.monitor.Lost")
    become_monitor(monitor)
    serials = {
        interface: a.signal("/watched", interface, "S", flags=w.NO_REPLY_EXPECTED)
        for interface in ("test.unsent", "test.unreceived", "test.fine")
    }
    a.driver("ReleaseName", "s", ("test.monitor.Lost",))
    seen = []
    while not seen or (seen[-1].error_name, seen[-1].destination) != (refused, DRIVER):
        seen.append(monitor.read())
    lost = next(m for m in seen if m.member == "NameLost" and m.destination == a.name)
    assert seen[-1].reply_serial == lost.serial
    seen = [m for m in seen if a.name in (m.sender, m.destination)]
    assert [(m.interface or m.error_name, m.reply_serial) for m in seen[:9]] == [
        ("test.unsent", None),
        *[(refused, serials["test.unsent"])] * 3,
        ("test.unreceived", None),
        *[(refused, serials["test.unreceived"])] * 3,
        ("test.fine", None),
    ]
    assert [m.interface for m in b.drain(a) if m.sender == a.name] == ["test.fine"]
    assert not any(m.error_name for m in a.inbox)


def test_sees_name_owner_changed(bus: Bus, monitor: RawClient) -> None:
    a = bus.connect()
    a.close()
    gone = [a.name, a.name, ""]
    monitor.wait(lambda m: m.member == "NameOwnerChanged" and m.args == gone)


def test_loses_its_names_and_its_rules(bus: Bus) -> None:
    watcher, client = bus.connect(), bus.connect()
    client.request_name("test.monitor.Lost")
    watcher.add_match("member='NameOwnerChanged'")
    become_monitor(client, "member='Never'")
    lost = {tuple(watcher.read().args) for _ in range(2)}
    assert lost == {
        ("test.monitor.Lost", client.name, ""),
        (client.name, client.name, ""),
    }
    names = watcher.driver("ListNames")[0]
    assert client.name not in names
    assert "test.monitor.Lost" not in names
    with pytest.raises(BusError, match="ServiceUnknown"):
        watcher.call(client.name, "/", "test.I", "M")


def test_loses_its_unique_name_first_then_the_others_in_order(bus: Bus) -> None:
    watcher, next_, client = bus.connect(), bus.connect(), bus.connect()
    names = ["test.monitor.B", "test.monitor.A", "test.monitor.C"]
    for name in names:
        client.request_name(name)
    watcher.request_name("test.monitor.Queued")
    client.request_name("test.monitor.Queued")
    next_.request_name("test.monitor.A")
    watcher.add_match("member='NameOwnerChanged'")
    client.driver("BecomeMonitor", "asu", (["member='Never'"], 0), interface=MONITORING)
    lost = [client.wait(lambda m: m.member == "NameLost").args[0] for _ in range(4)]
    assert lost == [client.name, *names]
    owner = {"test.monitor.A": next_.name}
    changes = [watcher.wait(lambda m: m.member == "NameOwnerChanged").args for _ in range(4)]
    assert changes == [[name, client.name, owner.get(name, "")] for name in lost]
    assert watcher.driver("ListQueuedOwners", "s", ("test.monitor.Queued",)) == [[watcher.name]]
    watcher.send_call("test.monitor.A", "/", "test.I", "Called")
    assert next_.wait_call("Called").sender == watcher.name


def test_only_what_its_rules_match(bus: Bus) -> None:
    monitor, a = bus.connect(), bus.connect()
    become_monitor(monitor, "type='signal',interface='test.Wanted'", "member='AlsoWanted'")
    a.signal("/", "test.Wanted", "One")
    a.signal("/", "test.Unwanted", "Two")
    a.send_call(a.name, "/", "test.Unwanted", "AlsoWanted", flags=w.NO_REPLY_EXPECTED)
    a.signal("/", "test.Wanted", "Three")
    monitor.wait_signal("Three")
    assert [m.member for m in monitor.inbox if m.sender == a.name] == ["One", "AlsoWanted"]


def test_sees_calls_to_a_match_on_destination(bus: Bus) -> None:
    monitor, a, b = (bus.connect() for _ in range(3))
    become_monitor(monitor, f"destination='{b.name}'")
    a.send_call(b.name, "/", "test.I", "Yes", flags=w.NO_REPLY_EXPECTED)
    a.send_call(a.name, "/", "test.I", "No", flags=w.NO_REPLY_EXPECTED)
    a.send_call(b.name, "/", "test.I", "Last", flags=w.NO_REPLY_EXPECTED)
    monitor.wait_call("Last")
    assert [m.member for m in monitor.inbox if m.sender == a.name] == ["Yes"]


def test_a_monitor_that_sends_is_disconnected(bus: Bus, monitor: RawClient) -> None:
    witness = bus.connect()
    witness.add_match("interface='test.Monitor'")
    monitor.signal("/", "test.Monitor", "S")
    monitor.expect_disconnect()
    assert witness.drain() == []


def test_two_monitors_see_the_same(bus: Bus, monitor: RawClient) -> None:
    second = bus.connect()
    become_monitor(second)
    a, b = bus.connect(), bus.connect()
    for n in range(20):
        a.signal("/", "test.I", f"S{n}", to=b.name)
        b.signal("/", "test.I", f"T{n}")
    b.drain(a)
    a.drain(b)
    for one in (monitor, second):
        for client, letter in ((a, "S"), (b, "T")):
            client.signal("/end", "test.Monitor", f"End{letter}{one.name[3:]}")
            one.wait_signal(f"End{letter}{one.name[3:]}")
            mine = [m.member for m in one.inbox if m.sender == client.name]
            assert [m for m in mine if m[1:].isdigit()] == [f"{letter}{n}" for n in range(20)]


def test_a_monitor_that_leaves_disturbs_nobody(bus: Bus, monitor: RawClient) -> None:
    a, b = bus.connect(), bus.connect()
    for n in range(50):
        a.signal("/", "test.I", f"S{n}", to=b.name)
        if n == 20:
            monitor.close()
    assert [m.member for m in b.drain(a)] == [f"S{n}" for n in range(50)]


def test_big_message_reaches_the_monitor(bus: Bus, monitor: RawClient) -> None:
    a, b = bus.connect(), bus.connect()
    payload = b"monitor!" * 100_000
    a.signal("/", "test.I", "Big", "ay", (payload,), to=b.name)
    assert monitor.wait_signal("Big").body[4:] == payload
    assert b.read().body[4:] == payload


def test_become_monitor_with_an_invalid_rule(bus: Bus) -> None:
    client = bus.connect()
    with pytest.raises(BusError) as caught:
        become_monitor(client, "nonsense")
    assert caught.value.name.endswith(".MatchRuleInvalid")
    assert client.name in client.driver("ListNames", path=DRIVER_PATH)[0]
