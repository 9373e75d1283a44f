"""File descriptors: they arrive open, once, at the right client, and never leak."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from . import procs
from . import wireformat as w
from .daemon import Bus
from .rawclient import BusError, RawClient

Pipes = list[tuple[int, int]]


@pytest.fixture
def pipes() -> Iterator[Pipes]:
    """Sixteen pipes, closed after the test."""
    made = [os.pipe() for _ in range(16)]
    yield made
    close_all([fd for pair in made for fd in pair])


def send_fds(sender: RawClient, receiver: RawClient, fds: list[int]) -> int:
    handles = list(range(len(fds)))
    return sender.signal("/", "test.Fd", "Take", "ah", (handles,), to=receiver.name, fds=fds)


def close_all(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)


@pytest.mark.parametrize("count", [1, 2, 16])
def test_descriptors_arrive_in_order(bus: Bus, pipes: Pipes, count: int) -> None:
    sender, receiver = bus.connect(), bus.connect()
    send_fds(sender, receiver, [write for _, write in pipes[:count]])
    message = receiver.read()
    assert message.fields[w.UNIX_FDS] == count
    assert len(message.fds) == count
    for number, ((read, _), fd) in enumerate(zip(pipes, message.fds, strict=False)):
        os.write(fd, b"%d" % number)
        assert os.read(read, 10) == b"%d" % number
    close_all(message.fds)


def test_no_copy_stays_with_the_bus(bus: Bus) -> None:
    """The reading end sees the end as soon as sender and receiver have closed theirs."""
    sender, receiver = bus.connect(), bus.connect()
    read, write = os.pipe()
    send_fds(sender, receiver, [write])
    os.close(write)
    close_all(receiver.read().fds)
    with os.fdopen(read, "rb") as pipe:
        assert pipe.read() == b""


def test_in_a_call_and_its_reply(bus: Bus, pipes: Pipes) -> None:
    caller, callee = bus.connect(), bus.connect()
    serial = caller.send_call(callee.name, "/", "test.Fd", "Swap", "h", (0,), fds=[pipes[0][1]])
    call = callee.read()
    os.write(call.fds[0], b"call")
    assert os.read(pipes[0][0], 10) == b"call"
    callee.reply(call, "h", (0,), fds=[pipes[1][1]])
    reply = caller.wait_reply(serial)
    os.write(reply.fds[0], b"reply")
    assert os.read(pipes[1][0], 10) == b"reply"
    close_all(call.fds + reply.fds)


def test_in_a_broadcast_everyone_gets_a_copy(bus: Bus, pipes: Pipes) -> None:
    sender, receivers = bus.connect(), [bus.connect() for _ in range(3)]
    for receiver in receivers:
        receiver.add_match("interface='test.Fd'")
    sender.signal("/", "test.Fd", "Before")
    sender.signal("/", "test.Fd", "Take", "h", (0,), fds=[pipes[0][1]])
    sender.signal("/", "test.Fd", "After")
    for receiver in receivers:
        messages = [receiver.read() for _ in range(3)]
        assert [m.member for m in messages] == ["Before", "Take", "After"]
        os.write(messages[1].fds[0], b"x")
        close_all(messages[1].fds)
    assert os.read(pipes[0][0], 10) == b"xxx"


def test_many_messages_in_one_go(bus: Bus, pipes: Pipes) -> None:
    """Descriptors of messages that are read together stay with their own message."""
    sender, receiver = bus.connect(), bus.connect()
    for _ in range(4):
        for number, (_, write) in enumerate(pipes):
            send_fds(sender, receiver, [write] * (number % 3))
    for _ in range(4):
        for number, (read, _) in enumerate(pipes):
            message = receiver.read()
            assert len(message.fds) == number % 3
            for fd in message.fds:
                os.write(fd, b"%02d" % number)
                assert os.read(read, 10) == b"%02d" % number
            close_all(message.fds)


def test_descriptors_of_a_message_that_comes_in_pieces(bus: Bus, pipes: Pipes) -> None:
    """They come with the first bytes of a message that then takes its time."""
    sender, receiver = bus.connect(), bus.connect()
    message = w.build(
        w.SIGNAL,
        {
            w.PATH: "/",
            w.INTERFACE: "test.Fd",
            w.MEMBER: "Take",
            w.DESTINATION: receiver.name,
            w.UNIX_FDS: 2,
        },
        "hh",
        (0, 1),
        serial=1000,
    )
    sender.write(message[:10], [pipes[0][1], pipes[1][1]])
    sender.write(message[10:50])
    sender.write(message[50:])
    got = receiver.read()
    for fd, (read, _) in zip(got.fds, pipes, strict=False):
        os.write(fd, b"x")
        assert os.read(read, 10) == b"x"
    assert len(got.fds) == 2
    close_all(got.fds)


def test_too_many_descriptors_disconnect(bus: Bus) -> None:
    """The default limit of a message is 16."""
    sender, receiver = bus.connect(), bus.connect()
    read, write = os.pipe()
    send_fds(sender, receiver, [write] * 17)
    sender.expect_disconnect()
    assert receiver.drain() == []
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        assert pipe.read() == b""


def test_descriptors_without_negotiation_disconnect(bus: Bus, pipes: Pipes) -> None:
    sender, receiver = bus.connect(fds=False), bus.connect()
    send_fds(sender, receiver, [pipes[0][1]])
    sender.expect_disconnect()
    assert receiver.drain() == []


def test_receiver_without_negotiation(bus: Bus, pipes: Pipes) -> None:
    caller, receiver = bus.connect(), bus.connect(fds=False)
    with pytest.raises(BusError) as caught:
        caller.call(receiver.name, "/", "test.Fd", "Take", "h", (0,), fds=[pipes[0][1]])
    assert caught.value.name == "org.freedesktop.DBus.Error.NotSupported"
    assert receiver.drain(caller) == []


@pytest.mark.parametrize("flags", [0, w.NO_REPLY_EXPECTED])
@pytest.mark.parametrize("kind", ["call", "signal", "reply"])
def test_whatever_it_is_that_has_descriptors_its_sender_hears_that_they_are_not_taken(
    bus: Bus, pipes: Pipes, kind: str, flags: int
) -> None:
    sender, receiver = bus.connect(), bus.connect(fds=False)
    options: dict[str, Any] = {"fds": [pipes[0][1]], "flags": flags}
    given = ("h", (0,))
    if kind == "call":
        serial = sender.send_call(receiver.name, "/", "test.Fd", "M", *given, **options)
    elif kind == "signal":
        serial = sender.signal("/", "test.Fd", "S", *given, to=receiver.name, **options)
    else:
        receiver.send_call(sender.name, "/", "test.Fd", "Give")
        serial = sender.reply(sender.wait_call("Give"), *given, **options)
    with pytest.raises(BusError) as caught:
        sender.wait_reply(serial)
    assert caught.value.name == "org.freedesktop.DBus.Error.NotSupported"
    assert receiver.drain(sender) == []


def test_broadcast_skips_receivers_without_negotiation(bus: Bus, pipes: Pipes) -> None:
    sender, able, unable = bus.connect(), bus.connect(), bus.connect(fds=False)
    for receiver in (able, unable):
        receiver.add_match("interface='test.Fd'")
    sender.signal("/", "test.Fd", "Take", "h", (0,), fds=[pipes[0][1]])
    sender.signal("/", "test.Fd", "Plain")
    got = able.drain(sender)
    assert [m.member for m in got] == ["Take", "Plain"]
    close_all(got[0].fds)
    assert [m.member for m in unable.drain(sender)] == ["Plain"]


def test_more_descriptors_than_announced(bus: Bus) -> None:
    """Two come, one is announced: the bus closes what belongs to nothing, at the latest with us."""
    sender, receiver = bus.connect(), bus.connect()
    read, write = os.pipe()
    fields = {w.PATH: "/", w.INTERFACE: "test.Fd", w.MEMBER: "Take", w.DESTINATION: receiver.name}
    sender.send(w.SIGNAL, fields | {w.UNIX_FDS: 1}, "h", (0,), fds=[write, write])
    os.close(write)
    sender.close()
    receiver.add_match(f"member='NameOwnerChanged',arg0='{sender.name}'")
    receiver.driver("GetId")
    while receiver.driver("NameHasOwner", "s", (sender.name,)) == [True]:
        pass
    for message in receiver.drain():
        close_all(message.fds)
    with os.fdopen(read, "rb") as pipe:
        assert pipe.read() == b""


def test_descriptors_of_an_undeliverable_message_are_closed(bus: Bus) -> None:
    sender = bus.connect()
    read, write = os.pipe()
    with pytest.raises(BusError, match="ServiceUnknown"):
        sender.call("test.fd.Nobody", "/", "test.Fd", "Take", "h", (0,), fds=[write])
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        assert pipe.read() == b""


def test_disconnect_before_the_message_is_whole(bus: Bus) -> None:
    sender, receiver = bus.connect(), bus.connect()
    read, write = os.pipe()
    fields = {w.PATH: "/", w.INTERFACE: "test.Fd", w.MEMBER: "Take", w.DESTINATION: receiver.name}
    message = w.build(w.SIGNAL, fields | {w.UNIX_FDS: 1}, "h", (0,), serial=5)
    sender.write(message[:40], [write])
    os.close(write)
    sender.close()
    with os.fdopen(read, "rb") as pipe:
        assert pipe.read() == b""
    assert receiver.drain() == []


def test_order_with_plain_messages(bus: Bus, pipes: Pipes) -> None:
    sender, receiver = bus.connect(), bus.connect()
    expected = []
    for n in range(60):
        fds = [pipes[n % 16][1]] if n % 3 == 0 else []
        payload = b"x" * (100_000 if n % 7 == 0 else 10)
        sender.signal("/", "test.Fd", f"M{n}", "ay", (payload,), to=receiver.name, fds=fds)
        expected.append((f"M{n}", len(fds), len(payload) + 4))
    got = receiver.drain(sender)
    assert [(m.member, len(m.fds), len(m.body)) for m in got] == expected
    for message in got:
        close_all(message.fds)


@pytest.mark.kbusd_only
@pytest.mark.skipif(
    os.geteuid() != 0, reason="the kernel counts those of an ordinary user together"
)
def test_more_than_may_be_in_flight_wait_for_a_client_that_reads_late(
    start_bus: Callable[..., Bus], pipes: Pipes
) -> None:
    """The kernel lets nobody have more in sockets than he may have open (ETOOMANYREFS)."""
    bus = start_bus(limits={"max_message_unix_fds": 253, "max_outgoing_unix_fds": 100_000})
    sender, receiver = bus.connect(), bus.connect()
    _, write = pipes[0]
    for n in range(60):
        sender.signal("/", "t.I", "S", "u", (n,), to=receiver.name, fds=[write] * 253)
    sender.drain()
    for n in range(60):
        message = receiver.wait_signal("S")
        assert (message.args, len(message.fds)) == ([n], 253)
        close_all(message.fds)


@pytest.mark.kbusd_only
@pytest.mark.skipif(
    os.geteuid() != 0, reason="the kernel counts those of an ordinary user together"
)
def test_more_than_a_worker_may_have_at_once_cost_its_client_the_sender(
    start_bus: Callable[..., Bus], pipes: Pipes
) -> None:
    """It took all of them out of its ring before it sent the first on, with limits as a session bus has them."""
    bus = start_bus(limits={"max_message_unix_fds": 253, "max_outgoing_unix_fds": 250_000_000})
    sender, receiver = bus.connect(), bus.connect()
    sender.signal("/", "t.I", "Met", to=receiver.name)
    receiver.wait_signal("Met")
    _, write = pipes[0]
    with procs.stopped(bus.worker_of(receiver).pid):
        for n in range(49):
            sender.signal("/", "t.I", "S", "u", (n,), to=receiver.name, fds=[write] * 253)
        sender.driver("GetId")  # all are in the ring
    for n in range(49):
        message = receiver.wait_signal("S")
        assert (message.args, len(message.fds)) == ([n], 253)
        close_all(message.fds)
