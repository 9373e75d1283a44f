"""The state of the bus comes before Hello is answered, or with the answer; the test is the broker."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import termios
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kbusd.rings import entries as e
from kbusd.rings import memfd
from kbusd.rings.broadcast import Broadcast
from kbusd.rings.clock import Clock
from kbusd.rings.line import Line
from kbusd.workers.context import Context
from tests.bus import wireformat as w
from tests.bus.procs import eventually
from tests.unit.workers.alone import start_worker
from tests.unit.workers.conftest import everything

LOG = 2  # kind of frame
ME, OTHER, LATE = 1, 7, 8
SECONDS = 20
WHO = e.Credentials(os.geteuid(), os.getegid(), os.getpid())
SASL = b"\0AUTH EXTERNAL\r\nDATA\r\nNEGOTIATE_UNIX_FD\r\nBEGIN\r\n"
BUS = {w.PATH: "/org/freedesktop/DBus", w.DESTINATION: "org.freedesktop.DBus"}


class Stage:
    """A worker whose client has authenticated. OTHER is on the bus since before the snapshot, LATE
    since after it. `spare`: it was told that before there was a client."""

    def __init__(
        self, context: Context, generation: int = 0, policy: bytes = b"", spare: bool = False
    ) -> None:
        """`generation`: that of the configuration in force; `policy`: with which it is answered if it asks
        for that."""
        self.clock = Clock()
        self.log = Broadcast(65536)
        context = msgspec.structs.replace(context, log_fd=self.log.fileno())
        self.pid, self.client, served, self.supervisor, self.broker = start_worker(context)
        self.buffer = b""
        self.enter(e.ConnectionAdded(OTHER, WHO))
        state = e.Snapshot(self.log.position, 0, ((OTHER, WHO),), (), (), (), (), 0)
        self.state = msgspec.msgpack.encode(state)
        self.enter(e.ConnectionAdded(LATE, WHO))
        if spare:
            self.broker.send(e.State(self.state))
            eventually(lambda: is_read(self.broker), "the worker takes over the state")
            self.supervisor.send(e.Soon())
        self.supervisor.send(e.Client(WHO, generation=generation), [served.fileno()])
        served.close()
        self.client.sendall(SASL)
        if policy:
            self.reply(self.asked(e.FetchPolicy), generation, policy)
        while self.buffer.count(b"\r\n") < 3:
            self.buffer += self.client.recv(4096)
        self.buffer = self.buffer.split(b"\r\n", 3)[3]

    def close(self) -> None:
        self.client.close()
        self.supervisor.close()
        self.broker.close()
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)

    def enter(self, entry: e.LogEntry) -> None:
        self.log.append(LOG, self.clock.tick(), b"", msgspec.msgpack.encode(entry))

    def asked(self, kind: type) -> Any:
        """What the worker says to us, which must be of that kind."""
        received = self.broker.receive()
        assert received is not None and isinstance(received[0], kind), received
        return received[0]

    def call(self, member: str, *names: str) -> None:
        fields = BUS | {w.MEMBER: member}
        self.client.sendall(w.build(w.CALL, fields, "s" * len(names), names))

    def snapshot(self, generation: int = 0, *ids: int) -> bytes:
        """The state of the bus now, with these connections."""
        there = tuple((id, WHO) for id in ids)
        state = e.Snapshot(self.log.position, 0, there, (), (), (), (), generation)
        return msgspec.msgpack.encode(state)

    def reply(self, request: e.Request, value: Any, data: bytes) -> None:
        """Answer with what stands in a memfd."""
        fd = memfd.sealed("test", data)
        self.broker.send(e.Reply(request.request, value), [fd])
        os.close(fd)

    def fill_log(self) -> None:
        """It goes round."""
        for _ in range(1000):
            self.enter(e.ActivatableChanged(("a.b" * 50,)))

    def admit(self, request: int, *fds: int, policy: bytes = b"") -> None:
        """Answer Hello, and then what the worker asks for if another policy is in force."""
        self.enter(e.ConnectionAdded(ME, WHO))
        self.broker.send(e.Reply(request, ME), fds)
        if policy:
            self.reply(self.asked(e.FetchPolicy), 1, policy)
        assert self.read().args == [f":1.{ME}"]
        assert self.read().member == "NameAcquired"

    def read(self) -> w.Message:
        while len(self.buffer) < 16 or len(self.buffer) < w.total_length(self.buffer[:16]):
            data = self.client.recv(65536)
            assert data, "the client was disconnected"
            self.buffer += data
        size = w.total_length(self.buffer[:16])
        message, self.buffer = w.parse(self.buffer[:size]), self.buffer[size:]
        return message

    def owned(self) -> list[bool]:
        """Whether its client finds these on the bus."""
        found = []
        for id in (OTHER, LATE, ME, 9):
            self.call("NameHasOwner", f":1.{id}")
            found += self.read().args
        return found


def is_read(sock: socket.socket | Line) -> bool:
    """All that was sent there (unix(7), SIOCOUTQ)."""
    return not any(fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4)))


@pytest.fixture
def stage(context: Context) -> Iterator[Stage]:
    made = Stage(context)
    yield made
    made.close()


ALL_BUT_ONE = [True, True, True, False]


def test_the_state_is_told_before_the_client_says_hello(stage: Stage) -> None:
    stage.broker.send(e.State(stage.state))
    stage.call("Hello")
    stage.admit(stage.asked(e.Hello).request)
    assert stage.owned() == ALL_BUT_ONE


def test_the_state_is_told_after_the_client_has_said_hello(stage: Stage) -> None:
    stage.call("Hello")
    hello = stage.asked(e.Hello)
    stage.broker.send(e.State(stage.state))
    stage.admit(hello.request)
    assert stage.owned() == ALL_BUT_ONE


def test_a_snapshot_with_the_answer_replaces_what_was_told(stage: Stage) -> None:
    stage.broker.send(e.State(msgspec.msgpack.encode(e.Snapshot(0, 0, (), (), (), (), (), 0))))
    stage.call("Hello")
    hello = stage.asked(e.Hello)
    fd = memfd.sealed("snapshot", stage.state)
    stage.admit(hello.request, fd)
    os.close(fd)
    assert stage.owned() == ALL_BUT_ONE


def test_a_policy_that_has_changed_since_is_asked_for_after_hello(stage: Stage) -> None:
    stage.enter(e.PolicyChanged(1))
    stage.broker.send(e.State(stage.state))
    stage.call("Hello")
    hello = stage.asked(e.Hello)
    stage.enter(e.ConnectionAdded(ME, WHO))
    stage.broker.send(e.Reply(hello.request, ME))
    stage.asked(e.FetchPolicy)


def denying(tmp_path: Path) -> bytes:
    """A configuration that forbids its client to ask for owners."""
    denied = '<deny send_interface="org.freedesktop.DBus" send_member="NameHasOwner"/>'
    return everything(tmp_path, denied)


def is_denied(stage: Stage) -> bool:
    """Whether it judges what its client sends by that."""
    stage.call("NameHasOwner", f":1.{ME}")
    return stage.read().error_name == "org.freedesktop.DBus.Error.AccessDenied"


def test_a_spare_worker_kept_the_policy_from_before_a_reload(stage: Stage, tmp_path: Path) -> None:
    """It was told the state from after it, and so never saw PolicyChanged."""
    stage.enter(e.PolicyChanged(1))
    stage.broker.send(e.State(stage.snapshot(1)))
    stage.call("Hello")
    stage.admit(stage.asked(e.Hello).request, policy=denying(tmp_path))
    assert is_denied(stage)


def test_a_client_that_had_authenticated_before_a_reload_kept_the_old_policy(
    stage: Stage, tmp_path: Path
) -> None:
    stage.broker.send(e.State(stage.state))
    stage.call("Hello")
    hello = stage.asked(e.Hello)
    stage.enter(e.PolicyChanged(1))
    fd = memfd.sealed("snapshot", stage.snapshot(1))
    stage.admit(hello.request, fd, policy=denying(tmp_path))
    os.close(fd)
    assert is_denied(stage)


def test_a_worker_that_fell_behind_the_log_kept_the_policy_from_before_a_reload(
    stage: Stage, tmp_path: Path
) -> None:
    stage.broker.send(e.State(stage.state))
    stage.call("Hello")
    stage.admit(stage.asked(e.Hello).request)
    assert stage.owned() == ALL_BUT_ONE
    os.kill(stage.pid, signal.SIGSTOP)
    stage.enter(e.PolicyChanged(1))
    stage.fill_log()
    os.kill(stage.pid, signal.SIGCONT)
    stage.call("NameHasOwner", f":1.{LATE}")  # which waits for the state, and then for the policy
    stage.reply(stage.asked(e.FetchSnapshot), None, stage.snapshot(1, ME))
    stage.reply(stage.asked(e.FetchPolicy), 1, denying(tmp_path))
    assert is_denied(stage)
    assert stage.read().error_name == "org.freedesktop.DBus.Error.AccessDenied"


def test_a_worker_that_has_the_policy_in_force_fetches_none(context: Context) -> None:
    stage = Stage(msgspec.structs.replace(context, generation=1), 1)
    try:
        stage.enter(e.PolicyChanged(1))
        stage.broker.send(e.State(stage.state))
        stage.call("Hello")
        stage.admit(stage.asked(e.Hello).request)
        assert stage.owned() == ALL_BUT_ONE  # the client would wait, as nobody answers
    finally:
        stage.close()


def test_a_spare_worker_authenticated_its_client_by_the_configuration_from_before_a_reload(
    context: Context, tmp_path: Path
) -> None:
    stage = Stage(context, 1, denying(tmp_path))
    try:
        stage.enter(e.PolicyChanged(1))
        stage.broker.send(e.State(stage.snapshot(1)))
        stage.call("Hello")
        stage.admit(stage.asked(e.Hello).request)
        assert is_denied(stage)
    finally:
        stage.close()


def test_a_worker_whose_state_the_log_had_left_behind_was_ended(stage: Stage) -> None:
    """The broker handled Hello just before, and so found that state good enough."""
    stage.broker.send(e.State(stage.state))
    stage.fill_log()
    stage.call("Hello")
    stage.admit(stage.asked(e.Hello).request)
    stage.reply(stage.asked(e.FetchSnapshot), None, stage.snapshot(0, OTHER, LATE, ME))
    assert stage.owned() == ALL_BUT_ONE


def test_a_client_that_was_refused_may_say_hello_again(stage: Stage) -> None:
    stage.broker.send(e.State(stage.state))
    stage.call("Hello")
    stage.broker.send(e.Failure(stage.asked(e.Hello).request, "t.Refused", "not now"))
    assert stage.read().error_name == "t.Refused"
    stage.enter(e.ConnectionAdded(9, WHO))
    stage.call("Hello")
    stage.admit(stage.asked(e.Hello).request)
    assert stage.owned() == [True] * 4


def test_an_answer_without_any_state_ends_the_worker(stage: Stage) -> None:
    stage.call("Hello")
    stage.broker.send(e.Reply(stage.asked(e.Hello).request, ME))
    assert "without a snapshot" in stage.asked(e.Leaving).reason


# -- what is told early (early.py) ---------------------------------------------------------------


def hello(**options: Any) -> bytes:
    return w.build(
        w.CALL, BUS | {w.INTERFACE: "org.freedesktop.DBus", w.MEMBER: "Hello"}, **options
    )


def test_the_answer_to_hello_does_not_wait_for_what_else_it_means(stage: Stage) -> None:
    """The log contradicts itself, so the worker ends once it reads that; its client was told before."""
    stage.broker.send(e.State(stage.state))
    stage.client.sendall(hello())
    request = stage.asked(e.Hello).request
    stage.enter(e.ConnectionRemoved(99))
    stage.broker.send(e.Reply(request, ME))
    assert stage.read().args == [f":1.{ME}"]
    assert stage.read().member == "NameAcquired"
    assert "contradicts itself" in stage.asked(e.Leaving).reason


@pytest.mark.parametrize("id", [1, 127, 128, 255, 256, 65535, 65536, 2**32 - 1, 2**32])
@pytest.mark.parametrize("expected", [1, 128])
def test_whichever_id_is_given_the_answer_to_hello_says_so_once(
    stage: Stage, id: int, expected: int
) -> None:
    stage.broker.send(e.State(stage.state, expected))
    stage.client.sendall(hello(serial=0x352E313A))  # ":1.5", if it were text
    request = stage.asked(e.Hello).request
    stage.enter(e.ConnectionAdded(id, WHO))
    stage.broker.send(e.Reply(request, id))
    reply, signal = stage.read(), stage.read()
    assert (reply.type, reply.args, reply.serial) == (w.RETURN, [f":1.{id}"], 1)
    assert reply.fields[w.REPLY_SERIAL] == 0x352E313A
    assert (signal.member, signal.args, signal.serial) == ("NameAcquired", [f":1.{id}"], 2)
    stage.call("GetNameOwner", f":1.{id}")
    assert (answer := stage.read()).args == [f":1.{id}"] and answer.serial == 3


@pytest.mark.parametrize(
    "message",
    [
        hello(flags=1),
        hello(endian=">"),
        hello(extra_fields=((200, "s", "unknown"),)),
        w.build(w.CALL, BUS | {w.MEMBER: "Hello"}),
    ],
)
def test_a_hello_that_is_not_the_usual_one_is_answered_as_well(
    stage: Stage, message: bytes
) -> None:
    stage.broker.send(e.State(stage.state))
    stage.client.sendall(message)
    stage.admit(stage.asked(e.Hello).request)
    assert stage.owned() == ALL_BUT_ONE


def test_what_policy_keeps_from_a_client_it_is_not_told_early(
    context: Context, tmp_path: Path
) -> None:
    denied = '<deny receive_interface="org.freedesktop.DBus" receive_member="NameAcquired"/>'
    stage = Stage(context.with_configuration(everything(tmp_path, denied), 0))
    try:
        stage.broker.send(e.State(stage.state))
        stage.client.sendall(hello())
        request = stage.asked(e.Hello).request
        stage.enter(e.ConnectionAdded(ME, WHO))
        stage.broker.send(e.Reply(request, ME))
        assert stage.read().args == [f":1.{ME}"]
        stage.call("NameHasOwner", f":1.{ME}")
        assert stage.read().args == [True]
    finally:
        stage.close()


def test_who_was_told_that_it_has_joined_is_not_refused_that_by_a_policy_that_came_meanwhile(
    stage: Stage, tmp_path: Path
) -> None:
    stage.broker.send(e.State(stage.state))
    stage.client.sendall(hello())
    request = stage.asked(e.Hello).request
    stage.enter(e.PolicyChanged(1))
    denied = '<deny receive_interface="org.freedesktop.DBus" receive_member="NameAcquired"/>'
    stage.admit(request, policy=everything(tmp_path, denied))
    assert stage.owned() == ALL_BUT_ONE


def test_a_spare_worker_takes_over_the_state(context: Context) -> None:
    stage = Stage(context, spare=True)
    try:
        stage.enter(e.ConnectionAdded(9, WHO))
        stage.client.sendall(hello())
        stage.admit(stage.asked(e.Hello).request)
        assert stage.owned() == [True] * 4
    finally:
        stage.close()


def test_a_state_that_is_told_anew_replaces_what_was_taken_over(context: Context) -> None:
    stage = Stage(context, spare=True)
    try:
        stage.enter(e.ConnectionAdded(9, WHO))
        stage.broker.send(e.State(stage.snapshot(0, OTHER)))
        stage.client.sendall(hello())
        stage.admit(stage.asked(e.Hello).request)
        assert stage.owned() == [True, False, True, False]
    finally:
        stage.close()


def test_a_client_that_leaves_before_its_hello_is_answered(stage: Stage) -> None:
    stage.broker.send(e.State(stage.state))
    stage.client.sendall(hello())
    request = stage.asked(e.Hello).request
    stage.client.shutdown(socket.SHUT_WR)
    stage.admit(request)
    assert stage.asked(e.Leaving).reason == ""


@pytest.mark.parametrize("size", [1, 15, 16, 100])
def test_a_hello_that_comes_in_pieces(stage: Stage, size: int) -> None:
    stage.broker.send(e.State(stage.state))
    message = hello()
    for at in range(0, len(message), size):
        stage.client.sendall(message[at : at + size])
        eventually(lambda: is_read(stage.client), "the worker reads each piece by itself")
    stage.admit(stage.asked(e.Hello).request)
    assert stage.owned() == ALL_BUT_ONE
