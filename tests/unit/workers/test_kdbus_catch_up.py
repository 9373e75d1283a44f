"""A kdbus client's worker, with the test as its supervisor, its broker and two peers.

So a peer stays between `begin` and `end` of its Broadcast, which no client can bring about for long.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from kbusd.cuse import abi as fuse
from kbusd.kdbus import abi, items, layout
from kbusd.rings import entries, envelope, memfd
from kbusd.rings.broadcast import Broadcast
from kbusd.rings.clock import Clock
from kbusd.rings.envelope import Envelope
from kbusd.rings.line import Line, pair
from kbusd.rings.ring import Ring
from kbusd.rings.status import StatusPage, StatusView
from kbusd.rings.values import Frame
from kbusd.workers import kdbus_device
from kbusd.workers.context import Context
from kbusd.workers.dbus_socket import DBusSocket
from kbusd.workers.kdbus_engine import DeviceEngine
from tests.kdbusfs.test_clients import call
from tests.unit.workers.conftest import everything

ME, SLOW, QUICK = 1, 2, 3
SECONDS = 20
FOR_EVER = 10**18
CALL, MESSAGE, LOG = 1, 1, 2
COMMAND = 0x1000  # where the client's memory is


class Peer:
    """What a worker of ours has, and the one that it was made known to holds of it."""

    def __init__(self, id: int) -> None:
        self.id = id
        self.ring, self.status = Ring(65536), StatusPage()
        self.broadcast = Broadcast(65536)
        self.shared = [
            socket.socketpair() for _ in range(3)
        ]  # bell, side socket, carrier: our end, its end

    def half(self) -> list[int]:
        fds = [self.ring.fileno(), self.status.fd, self.broadcast.fileno()]
        return [*fds, *(its.fileno() for _, its in self.shared)]


class Stage:
    """The worker `ME`, whose client has said HELLO, and two peers that it knows."""

    def __init__(self, context: Context) -> None:
        self.clock, self.log = Clock(), Broadcast(65536)
        supervisor, ours = pair()
        broker, theirs = pair()
        me = entries.Credentials(os.geteuid(), os.getegid(), os.getpid())
        device = entries.Device(me, "0-test", "bus", os.O_RDWR)
        made = msgspec.structs.replace(context, log_fd=self.log.fileno())
        self.pid = os.fork()
        if self.pid == 0:
            try:
                supervisor.close()
                broker.close()
                kdbus_device.DeviceEngine = patient  # type: ignore[assignment, attr-defined]
                line = Line(theirs, entries.BrokerMessage)
                kdbus_device.serve(made, DBusSocket(made, line), device, ours, line)
            finally:
                os._exit(0)
        for end in (ours, theirs):
            end.close()
        self.line = Line(supervisor, entries.FromDeviceWorker)
        self.broker = Line(broker, entries.WorkerMessage)
        for end in (supervisor, broker):
            end.settimeout(SECONDS)
        self.me, self.unique = me, 0
        self.heard: object = None  # what the worker said last
        self.ask(
            abi.CMD_HELLO, struct.pack("=10Q", 96, 0, 0, 0, 0, 0, 0, 1 << 16, 0, 0) + bytes(16)
        )
        self._welcome()
        assert self.answer() == 0
        self.peers = {id: Peer(id) for id in (SLOW, QUICK)}
        for peer in self.peers.values():
            self._introduce(peer)

    def ask(self, command: int, data: bytes, behind: bytes = b"") -> None:
        """The client's ioctl; `data` is its struct, `behind` the memory after that, which comes along."""
        self.unique += 2
        self.memory = data + behind
        inside = data if command >> 30 & 1 else b""  # as the kernel copies it
        body = fuse.IOCTL_IN.pack(5, 0, command, COMMAND, len(inside), len(data)) + inside
        head = fuse.IN_HEADER.pack(40 + len(body), fuse.IOCTL, self.unique, 3, 0, 0, 9, 0, 0)
        came = ((COMMAND, self.memory),) if behind else ()
        self.line.send(entries.Asked(head + body, came))

    def answer(self) -> int:
        """What it returns."""
        while (result := self.attend()) is None:
            pass
        return result

    def attend(self) -> int | None:
        """Do what the worker says next; what the ioctl returns, if it says that."""
        received = self.line.receive()
        assert received is not None
        self.heard = received[0]
        match self.heard:
            case entries.Copy(unique, ranges):
                parts = [
                    self.memory[at - COMMAND :][:size] if at >= COMMAND else b""
                    for at, size in ranges
                ]
                self.line.send(entries.Copied(unique, 0, tuple(map(len, parts)), b"".join(parts)))
            case entries.AskFacts(unique):
                self.line.send(entries.Facts(unique, {}, self.me))
            case entries.Store(unique):
                self.line.send(entries.Stored(unique, 0))
            case entries.Answered(reply):
                result, *_ = fuse.IOCTL_OUT.unpack_from(reply, fuse.OUT_HEADER.size)
                return int(result)
        return None

    def wanted(self, kind: type) -> entries.Request:
        """The same, while the client waits for it."""
        while True:
            ready, _, _ = select.select([self.broker, self.line], [], [], SECONDS)
            assert ready, "nothing is said"
            if self.broker in ready:
                return self.asked(kind)[0]
            self.attend()

    def asked(self, kind: type) -> tuple[entries.Request, list[int]]:
        """What the worker wants of the broker."""
        received = self.broker.receive()
        assert received is not None and isinstance(received[0], kind), received
        return received

    def _welcome(self) -> None:
        while not isinstance(self.heard, entries.AskFacts):
            self.attend()
        request, _ = self.asked(entries.Hello)
        people = tuple((id, self.me) for id in (ME, SLOW, QUICK))
        state = entries.Snapshot(0, self.clock.tick(), people, (), (), (), (), 0, kdbus=((ME, 0),))
        snapshot = memfd.sealed("snapshot", msgspec.msgpack.encode(state))
        self.broker.send(entries.Reply(request.request, ME), [snapshot])
        os.close(snapshot)

    def _introduce(self, peer: Peer) -> None:
        slots = peer.status.take_slot(), peer.status.take_slot()
        self.broker.send(entries.Introduction(peer.id, peer.id, *slots), peer.half())
        for _, its in peer.shared:
            its.close()
        answer, fds = self.asked(entries.Introduced)
        assert isinstance(answer, entries.Introduced)
        peer.ring.connect(StatusView(fds[1]), answer.slot)

    def close(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


def patient(engine: DBusSocket) -> object:
    made = DeviceEngine(engine)
    made.promised_ns = FOR_EVER
    return made


@pytest.fixture
def stage(context: Context) -> Iterator[Stage]:
    made = Stage(context)
    yield made
    made.close()


def test_recv_missed_what_waited_for_a_peer_that_was_about_to_write(stage: Stage) -> None:
    """It said EAGAIN, though SEND had returned."""
    slow, quick = stage.peers[SLOW], stage.peers[QUICK]
    slow.broadcast.open_many(stage.clock.tick())
    facts = envelope.encode(Envelope(CALL, False, f":1.{ME}", "/x", "a.b", "Sent", None, ""))
    assert quick.ring.write(Frame(MESSAGE, stage.clock.tick(), facts, b"", serial=1))
    stage.ask(abi.CMD_RECV, struct.pack("=2Qq5Q", 64, 0, 0, 0, 0, 0, 0, 0))
    assert stage.answer() == 0, errno.errorcode[errno.EAGAIN]


def test_after_the_first_message_to_a_dbus_client_others_overtook_what_was_asked_of_the_broker(
    stage: Stage,
) -> None:
    """As its worker began a second time, and forgot what it waited for."""
    name = items.string(abi.ITEM_NAME, "com.example.Slow")
    payload, at = call("Do", flags=1), COMMAND + layout.SEND.size
    message = items.command(
        layout.MESSAGE.pack(0, 0, 0, SLOW, 0, abi.PAYLOAD_DBUS, 1, 0),
        [items.build(abi.ITEM_PAYLOAD_VEC, layout.VECTOR.pack(len(payload), at + 512))],
    )
    send = layout.SEND.pack(layout.SEND.size, 0, 0, at, 0, 0, 0)
    for _ in range(2):
        stage.ask(abi.CMD_NAME_ACQUIRE, items.command(layout.PLAIN.pack(0, 0, 0), [name]))
        request = stage.wanted(entries.RequestName)
        stage.ask(abi.CMD_SEND, send, message.ljust(512, b"\0") + payload)
        stage.ask(abi.CMD_RECV, struct.pack("=2Qq5Q", 64, 0, 0, 0, 0, 0, 0, 0))
        assert stage.answer() == -errno.EAGAIN
        stage.broker.send(entries.Reply(request.request, 1))
        assert [stage.answer(), stage.answer()] == [0, 0]


def test_of_two_answers_that_came_while_the_policy_was_fetched_the_second_was_kept_back(
    stage: Stage, tmp_path: Path
) -> None:
    requests = []
    for id in (SLOW, QUICK):
        stage.ask(abi.CMD_CONN_INFO, layout.INFO_COMMAND.pack(56, 0, 0, id, 0, 0, 0))
        requests.append(stage.wanted(entries.AskAbout).request)
    stamp = stage.clock.tick()
    stage.log.append(LOG, stamp, b"", msgspec.msgpack.encode(entries.PolicyChanged(1)))
    stage.broker.send(entries.Reply(requests[0], b"", stamp))
    fetch, _ = stage.asked(entries.FetchPolicy)
    stage.broker.send(entries.Reply(requests[1], b"", stamp))
    policy = memfd.sealed("policy", everything(tmp_path))
    stage.broker.send(entries.Reply(fetch.request, 1), [policy])
    os.close(policy)
    assert [stage.answer(), stage.answer()] == [0, 0]
