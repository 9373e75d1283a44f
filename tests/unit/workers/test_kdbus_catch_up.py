"""A kdbus client's worker, with the test as its supervisor, its broker and two peers.

So a peer stays between `begin` and `end` of its Broadcast, which no client can bring about for long.
"""

from __future__ import annotations

import errno
import os
import signal
import socket
import struct
from collections.abc import Iterator

import msgspec
import pytest

from kbusd.cuse import abi as fuse
from kbusd.kdbus import abi
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

ME, SLOW, QUICK = 1, 2, 3
SECONDS = 20
FOR_EVER = 10**18
CALL, MESSAGE = 1, 1
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
        self.ask(
            abi.CMD_HELLO, struct.pack("=10Q", 96, 0, 0, 0, 0, 0, 0, 1 << 16, 0, 0) + bytes(16)
        )
        self._welcome()
        assert self.answer() == 0
        self.peers = {id: Peer(id) for id in (SLOW, QUICK)}
        for peer in self.peers.values():
            self._introduce(peer)

    def ask(self, command: int, data: bytes) -> None:
        """The client's ioctl; `data` is its struct."""
        self.unique += 2
        self.memory = data
        inside = data if command >> 30 & 1 else b""  # as the kernel copies it
        body = fuse.IOCTL_IN.pack(5, 0, command, COMMAND, len(inside), len(data)) + inside
        head = fuse.IN_HEADER.pack(40 + len(body), fuse.IOCTL, self.unique, 3, 0, 0, 9, 0, 0)
        self.line.send(entries.Asked(head + body))

    def answer(self) -> int:
        """What it returns."""
        while True:
            received = self.line.receive()
            assert received is not None
            match received[0]:
                case entries.Copy(unique, ranges):
                    parts = [
                        self.memory[at - COMMAND :][:size] if at >= COMMAND else b""
                        for at, size in ranges
                    ]
                    self.line.send(
                        entries.Copied(unique, 0, tuple(map(len, parts)), b"".join(parts))
                    )
                case entries.AskFacts(unique):
                    self.line.send(entries.Facts(unique, {}, self.me))
                case entries.Store(unique):
                    self.line.send(entries.Stored(unique, 0))
                case entries.Answered(reply):
                    result, *_ = fuse.IOCTL_OUT.unpack_from(reply, fuse.OUT_HEADER.size)
                    return int(result)

    def _asked(self, kind: type) -> tuple[entries.Request, list[int]]:
        """What the worker wants of the broker."""
        received = self.broker.receive()
        assert received is not None and isinstance(received[0], kind), received
        return received

    def _welcome(self) -> None:
        while not isinstance((received := self.line.receive() or ("",))[0], entries.AskFacts):
            if isinstance(received[0], entries.Store):  # whether it can be told of its connection
                self.line.send(entries.Stored(received[0].unique, 0))
        self.line.send(entries.Facts(received[0].unique, {}, self.me))
        request, _ = self._asked(entries.Hello)
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
        answer, fds = self._asked(entries.Introduced)
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
