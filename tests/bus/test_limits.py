"""Limits from the configuration file: over them, the one who asks is refused; others go on."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from . import procs
from . import wireformat as w
from .daemon import OPEN_POLICY, Bus, is_reference
from .rawclient import DRIVER, DRIVER_PATH, BusError, Disconnected, RawClient, RawSocket

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
    assert is_reference() or f"pid {os.getpid()}): The maximum number of active" in bus.log()
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
    silent = [RawSocket(bus.address) for _ in range(10)]
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


# -- whose turn it is ----------------------------------------------------------------------

SOMEBODY, ANOTHER = 65534, 65533  # users whom the tests' own clients can be
HELLO = w.build(
    w.CALL,
    {
        w.PATH: "/org/freedesktop/DBus",
        w.DESTINATION: DRIVER,
        w.INTERFACE: DRIVER,
        w.MEMBER: "Hello",
    },
    serial=1,
)
EVERYBODY = OPEN_POLICY.replace("<allow own", '<allow user="*"/><allow own')
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be several users")


@contextlib.contextmanager
def somebody(uid: int) -> Iterator[None]:
    """The kernel keeps who a client is when it connects."""
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def flood() -> Iterator[list[socket.socket]]:
    """Sockets to be closed at the end."""
    sockets: list[socket.socket] = []
    yield sockets
    for each in sockets:
        each.close()


def connect_unread(bus: Bus, sockets: list[socket.socket], count: int, words: bytes) -> None:
    """Connections that say something at once and look at no answer."""
    for _ in range(count):
        sock = socket.socket(socket.AF_UNIX)
        sockets.append(sock)
        sock.connect(str(bus.socket))
        if words:
            sock.send(words)


def answered(sockets: list[socket.socket]) -> int:
    """How many of them the bus has said something to."""
    poll = select.poll()
    for each in sockets:
        poll.register(each, select.POLLIN)
    return len(poll.poll(0))


@pytest.mark.kbusd_only
@as_root
def test_a_flood_of_connects_delays_nobody_else(start_bus, flood: list[socket.socket]) -> None:  # type: ignore[no-untyped-def]
    """Uids take turns: by order, not by time, whoever comes while 500 wait is among the next."""
    bus: Bus = start_bus(policy=EVERYBODY, limits={"max_connections_per_user": 1000})
    with somebody(SOMEBODY):
        words = b"\0AUTH EXTERNAL\r\nDATA\r\nBEGIN\r\n" + HELLO
        connect_unread(bus, flood, 500, words)
    before = answered(flood)
    with somebody(ANOTHER):
        assert bus.connect().name
    after = answered(flood)
    assert after - before < (500 - before) / 2
    assert after < 500


@pytest.mark.kbusd_only
@as_root
def test_the_silent_of_one_uid_do_not_take_all_places(
    start_bus,
    flood: list[socket.socket],  # type: ignore[no-untyped-def]
) -> None:
    bus: Bus = start_bus(policy=EVERYBODY, limits={"max_incomplete_connections": 8})
    with somebody(SOMEBODY):
        connect_unread(bus, flood, 20, b"")
    for uid in (ANOTHER, ANOTHER - 1, 0):
        with somebody(uid):
            assert bus.connect().name
    assert answered(flood) == 0  # nobody waited until they had to go
    procs.eventually(lambda: served(bus, flood) == 4, "half of the places are taken")


@pytest.mark.kbusd_only
def test_who_left_while_it_waited_costs_no_worker(start_bus, flood: list[socket.socket]) -> None:  # type: ignore[no-untyped-def]
    bus: Bus = start_bus(limits={"max_incomplete_connections": 1})
    connect_unread(bus, flood, 1, b"")
    procs.eventually(lambda: served(bus, flood) == 1, "it has the only place")
    gone: list[socket.socket] = []
    connect_unread(bus, gone, 30, b"\0AUTH EXTERNAL\r\n")
    for each in gone:
        each.close()
    numbers = {process.pid for process in bus.workers()}
    flood.pop().close()
    client = bus.connect()
    assert client.name == ":1.1"
    fresh = {process.pid for process in bus.workers()} - numbers
    assert len(fresh) <= 2, "one for the silent one's place, one for the new client's"


def served(bus: Bus, sockets: list[socket.socket]) -> int:
    """How many of them a worker holds."""
    links = {f"socket:[{procs.peer_inode(each)}]" for each in sockets}
    return sum(len(links.intersection(procs.descriptors(p.pid))) for p in bus.workers())


@pytest.mark.kbusd_only
def test_connections_of_one_uid_that_wait_are_limited(
    start_bus,
    flood: list[socket.socket],  # type: ignore[no-untyped-def]
) -> None:
    bus: Bus = start_bus(limits={"max_connections_per_user": 2, "max_incomplete_connections": 1})
    connect_unread(bus, flood, 2 + 64, b"")
    with contextlib.closing(RawSocket(bus.address)) as one_more:
        one_more.expect_disconnect()
    refusal = f"uid {os.geteuid()} has 66 connections already (limit max_connections_per_user"
    assert refusal in bus.log()


def test_who_does_not_say_hello_is_disconnected(start_bus) -> None:  # type: ignore[no-untyped-def]
    bus: Bus = start_bus(limits={"auth_timeout": 200})
    client = RawClient(bus.address, hello=False)
    client.expect_disconnect()


@pytest.mark.kbusd_only
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can change its groups")
def test_who_is_in_too_many_groups_takes_no_place_for_good(start_bus) -> None:  # type: ignore[no-untyped-def]
    """Root of a container may take 65536; told of so many, the bus lost the client, but not its place."""
    bus: Bus = start_bus(limits={"max_incomplete_connections": 2})
    before = os.getgroups()
    for _ in range(4):
        os.setgroups(range(4_000_000, 4_065_536))
        try:
            refused = RawSocket(bus.address)
        finally:
            os.setgroups(before)
        refused.expect_disconnect()
        refused.close()
    assert bus.connect().driver("NameHasOwner", "s", (DRIVER,)) == [True]
    assert "is in more than 1024 groups" in bus.log()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to be several users")
@pytest.mark.slow
def test_one_user_with_all_that_he_may_have_keeps_nothing_from_others(start_bus) -> None:  # type: ignore[no-untyped-def]
    """Connections, names, match rules, calls that wait, messages that nobody reads; all at once."""
    policy = OPEN_POLICY.replace("<allow", '<allow user="*"/><allow', 1)
    limits = {
        "max_connections_per_user": 60,
        "max_match_rules_per_connection": 40,
        "max_names_per_connection": 40,
        "max_replies_per_connection": 40,
        "max_outgoing_bytes": 1_000_000,
    }
    bus = start_bus(policy=policy, limits=limits)
    with somebody(64231):
        greedy = [RawClient(bus.address) for _ in range(60)]
        with pytest.raises((BusError, Disconnected, ConnectionResetError)):
            RawClient(bus.address)
    for number, client in enumerate(greedy):
        for n in range(50):
            client.send_call(
                DRIVER, DRIVER_PATH, DRIVER, "AddMatch", "s", (f"arg{n % 64}='{n}{number}'",)
            )
            client.send_call(
                DRIVER, DRIVER_PATH, DRIVER, "RequestName", "su", (f"greedy.N{number}.M{n}", 0)
            )
            client.send_call(greedy[number - 1].name, "/", "test.I", "M", "ay", (b"x" * 8000,))
        client.signal("/", "test.I", "S", "ay", (b"x" * 100_000,))
    with somebody(64232):
        one, other = RawClient(bus.address), RawClient(bus.address)
    for n in range(38):
        assert one.request_name(f"modest.N{n}") == 1
        other.add_match(f"interface='test.Modest',arg0='{n}'")
    for n in range(38):
        one.signal("/", "test.Modest", "S", "s", (str(n),))
        serial = one.send_call(other.name, "/", "test.I", "M", "u", (n,))
        assert other.wait_signal("S").args == [str(n)]
        other.reply(other.wait_call("M"), "u", (n,))
        assert one.wait_reply(serial).args == [n]
    for client in (*greedy, one, other):
        client.close()


@pytest.mark.parametrize(
    ("limit", "most", "sent"),
    [
        ("max_pending_service_starts", 3, {}),
        ("max_incoming_bytes", 3000, {"signature": "ay", "args": (bytes(900),)}),
        ("max_incoming_unix_fds", 6, {"signature": "hh", "args": (0, 1)}),
    ],
)
def test_what_waits_for_a_service_to_start_had_no_limit(  # type: ignore[no-untyped-def]
    start_bus, limit: str, most: int, sent: dict[str, Any]
) -> None:
    bus: Bus = start_bus(limits={limit: most})
    (bus.services / "slow.service").write_text(
        "[D-BUS Service]\nName=slow.Service\nExec=/bin/sleep 100\n"
    )
    client = bus.connect()
    client.driver("ReloadConfig")
    fds = [0, 0] if "fds" in limit else []
    for _ in range(3):
        client.send_call(
            "slow.Service", "/", "a.b", "M", **sent, fds=fds, flags=w.NO_REPLY_EXPECTED
        )
    serial = client.send_call("slow.Service", "/", "a.b", "M", **sent, fds=fds)
    with pytest.raises(BusError) as caught:
        client.wait_reply(serial)
    assert caught.value.name == EXCEEDED
    assert caught.value.text == (
        "The maximum number of pending activations has been reached, activation of slow.Service"
        f" failed ({limit}={most})"
    )
    procs.eventually(lambda: sleeping(bus), "the service runs")
    [service] = sleeping(bus)
    os.kill(service.pid, signal.SIGKILL)


def sleeping(bus: Bus) -> list[procs.Process]:
    return [each for each in procs.descendants(bus.pid) if each.comm == "sleep"]


def test_a_time_as_long_as_can_be_said_ended_the_bus(start_bus) -> None:  # type: ignore[no-untyped-def]
    bus: Bus = start_bus(limits={"auth_timeout": 2**31 - 1, "reply_timeout": 2**31 - 1})
    caller, callee = bus.connect(), bus.connect()
    serial = caller.send_call(callee.name, "/", "a.b", "M")
    callee.reply(callee.read())
    caller.wait_reply(serial)
