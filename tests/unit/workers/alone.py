"""One engine, or worker, alone in a child process: the test is its client, its broker and all other workers.

So a test decides when a peer reads its ring, which no client can, and sees what stands in it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import socket
import struct
import termios
import time
from collections.abc import Iterator
from dataclasses import dataclass

import msgspec

from kbusd.rings import entries, memfd
from kbusd.rings.broadcast import Broadcast, BroadcastReader
from kbusd.rings.clock import Clock
from kbusd.rings.envelope import Envelope, encode
from kbusd.rings.fanout import Subscriber
from kbusd.rings.line import Line, close_all, pair
from kbusd.rings.ring import Ring, RingReader
from kbusd.rings.status import StatusView
from kbusd.rings.values import Frame
from kbusd.workers.context import Context
from kbusd.workers.dbus_socket import DBusSocket
from kbusd.workers.worker import serve
from tests.bus import wireformat as w
from tests.unit.rings.worker import Outgoing, Worker

LOG = 2  # kind of frame
ENGINE = 1  # its connection's id
SECONDS = 20.0
BIG = 1 << 20  # bytes of the rings to the engine


@dataclass
class Met:
    """What a worker of ours holds of the engine."""

    reader: RingReader
    bell: socket.socket
    side: socket.socket
    carry: socket.socket


def start_worker(context: Context) -> tuple[int, socket.socket, socket.socket, Line, Line]:
    """One that has no client yet. Returns its pid, both ends of its client's socket, the second to be handed
    over to it, and the lines by which we are its supervisor and its broker."""
    supervisor, ours = pair()
    broker, theirs = pair()
    client, served = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    pid = os.fork()
    if pid == 0:
        try:
            for sock in (supervisor, broker, client):
                sock.close()
            served.setblocking(False)
            line = Line(theirs, entries.BrokerMessage)
            serve(context, DBusSocket(context, line), Line(ours, entries.ToWorker), line)
        finally:
            os._exit(0)
    ours.close()
    theirs.close()
    client.settimeout(SECONDS)
    lines = Line(supervisor, entries.ToWorker), Line(broker, entries.WorkerMessage)
    broker.settimeout(SECONDS)
    return pid, client, served, *lines


class Alone:
    """`client` is the socket of the engine's client, which has said Hello; `workers` are ours."""

    def __init__(
        self, context: Context, ids: list[int], rule: str, uid: int | None = None, **options: int
    ) -> None:
        """Each of `ids` is a connection with the match rule `rule`, of user `uid` or of ours; so is
        the engine's own, but of us. `options`: Engine's."""
        me = entries.Credentials(os.geteuid(), os.getegid(), os.getpid())
        self.clock = Clock()
        self.log = Broadcast(65536, "test-log")
        self.workers = {id: Worker(id, BIG, BIG, 10**12) for id in ids}
        self.met: dict[int, Met] = {}
        self.client, served = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self.supervisor, theirs = pair()
        broker, line = pair()
        self.broker = Line(broker, entries.WorkerMessage)
        context = msgspec.structs.replace(context, log_fd=self.log.fileno())
        self.pid = os.fork()
        if self.pid == 0:
            with contextlib.suppress(BaseException):
                self.client.close()
                self.supervisor.close()
                broker.close()
                served.setblocking(False)
                engine = DBusSocket(context, Line(line, entries.BrokerMessage), **options)
                engine.serve(served.fileno(), theirs.fileno(), me, b"", [], True)
                os._exit(0)
            os._exit(1)
        for end in (served, theirs, line):
            end.close()
        them = me if uid is None else entries.Credentials(uid, uid, os.getpid())
        for id in (ENGINE, *ids):
            self.enter(entries.ConnectionAdded(id, me if id == ENGINE else them))
        for id in (ENGINE, *ids):
            self.enter(entries.MatchAdded(id, rule))
        self.serial = 0
        self.left: str | None = None  # why the engine ended
        self.send(w.CALL, "org.freedesktop.DBus", "Hello", path="/org/freedesktop/DBus")
        self.until(lambda: select.select([self.client], [], [], 0)[0], "Hello is answered")

    def enter(self, entry: entries.Entry) -> None:
        """Write to the control log."""
        self.log.append(LOG, self.clock.tick(), b"", msgspec.msgpack.encode(entry))

    def send(
        self,
        type_: int,
        to: str | None,
        member: str,
        size: int = 0,
        fds: tuple[int, ...] = (),
        path: str = "/",
    ) -> int:
        """A message of the engine's client with `size` bytes in it; returns its serial."""
        data = self.message(type_, to, member, size, len(fds), path)
        sent = socket.send_fds(self.client, [data], fds) if fds else 0
        self.client.sendall(data[sent:])
        return self.serial

    def message(
        self, type_: int, to: str | None, member: str, size: int, fds: int = 0, path: str = "/"
    ) -> bytes:
        """The same, not sent; its serial is `serial`."""
        self.serial += 1
        interface = "org.freedesktop.DBus" if to == "org.freedesktop.DBus" else "test.I"
        fields: dict[int, object] = {w.PATH: path, w.INTERFACE: interface, w.MEMBER: member}
        if to is not None:
            fields[w.DESTINATION] = to
        if fds:
            fields[w.UNIX_FDS] = fds
        given = ("ay", (b"x" * size,)) if size else ("", ())
        return w.build(type_, fields, *given, serial=self.serial)

    def has_read(self) -> bool:
        """Whether the engine has read all that its client wrote (unix(7), SIOCOUTQ)."""
        left = fcntl.ioctl(self.client, termios.TIOCOUTQ, b"\0" * 4)
        return struct.unpack("i", left) == (0,)

    def until(self, condition: object, what: str) -> None:
        """Do a broker's work, and flush what waits for the engine, until `condition()` holds."""
        deadline = time.monotonic() + SECONDS
        while not condition():  # type: ignore[operator]
            assert self.left is None, f"the engine ended: {self.left}"
            assert time.monotonic() < deadline, f"not within {SECONDS} s: {what}"
            for worker in self.workers.values():
                if ENGINE in worker.to:
                    worker.to[ENGINE].flush()
                worker.ring()
            if select.select([self.broker], [], [], 0.001)[0]:
                received = self.broker.receive()
                if received is not None:
                    self._answer(*received)

    def _answer(self, message: object, fds: list[int]) -> None:
        match message:
            case entries.Hello(request):
                state = entries.Snapshot(0, 0, (), (), (), (), (), 0)
                snapshot = memfd.sealed("test-snapshot", msgspec.msgpack.encode(state))
                self.broker.send(entries.Reply(request, ENGINE), [snapshot])
                os.close(snapshot)
            case entries.Introduce(request, peer, slot, broadcast_slot):
                self._introduce(request, self.workers[peer], slot, broadcast_slot, fds)
                return
            case entries.Leaving(_, reason):
                self.left = reason
        close_all(fds)

    def _introduce(
        self, request: int, worker: Worker, slot: int, broadcast_slot: int, fds: list[int]
    ) -> None:
        ring_fd, status_fd, broadcast_fd = fds
        (bell, its_bell), (mine, theirs), (carry, its) = (socket.socketpair() for _ in range(3))
        view = StatusView(status_fd)
        ring = Ring(worker.ring_size)
        ring.connect(view, slot)
        slots = [worker.status.take_slot(), worker.status.take_slot()]
        reader = RingReader(ring_fd, worker.status, slots[0])
        worker.merge.add(reader, BroadcastReader(broadcast_fd), slots[1], bell.fileno())
        worker.source[reader] = ENGINE
        worker.to[ENGINE] = Outgoing(
            ring, bell.fileno(), view, Subscriber(view, broadcast_slot, ENGINE)
        )
        self.met[worker.name] = Met(reader, bell, mine, carry)
        own = [ring.fd, worker.status.fd, worker.fanout.broadcast.fd]
        own += [its_bell.fileno(), theirs.fileno(), its.fileno()]
        self.broker.send(entries.Reply(request, slots), own)
        for end in (its_bell, theirs, its):
            end.close()
        close_all([ring_fd, status_fd, broadcast_fd])

    def unread(self, id: int) -> int:
        """Bytes in the ring from the engine to `id`."""
        return self.met[id].reader.statistics().unread if id in self.met else 0

    def take(self, id: int) -> list[tuple[int, Frame]]:
        """What `id` can deliver now, as (sender, frame)."""
        worker = self.workers[id]
        taken = [(worker.source[reader], frame) for reader, frame in worker.merge.take()]
        assert worker.merge.put_aside() == []
        return taken

    def put(
        self, id: int, type_: int, to: str | None, member: str, size: int = 0, serial: int = 1
    ) -> None:
        """A message of the worker `id` to the engine, with `size` bytes in it."""
        envelope = Envelope(type_, False, to, "/", "test.I", member, None, "ay" if size else "")
        body = w.marshal("ay", (b"x" * size,)) if size else b""
        stamp = self.workers[id].clock.tick()
        self.workers[id].to[ENGINE].put(Frame(1, stamp, encode(envelope), body, serial=serial))
        self.workers[id].ring()

    def gather(self, id: int, serials: list[int]) -> list[int]:
        """Serials that `id` delivers until it has all of `serials`."""
        got: list[int] = []

        def all_there() -> bool:
            got.extend(frame.serial for _, frame in self.take(id))
            return set(serials) <= set(got)

        self.until(all_there, f"{serials} come to :1.{id}")
        return got

    def close(self) -> None:
        """The client goes; the child ends, or is killed if it does not."""
        self.client.close()
        self.supervisor.close()
        with os.fdopen(os.pidfd_open(self.pid)) as ended:
            if not select.select([ended], [], [], 5)[0]:
                os.kill(self.pid, signal.SIGKILL)
            _, status = os.waitpid(self.pid, 0)
        for met in self.met.values():
            for end in (met.bell, met.side, met.carry):
                end.close()
        self.broker.close()
        assert status == 0, f"the engine ended with status {status}"


@contextlib.contextmanager
def alone(context: Context, ids: list[int], rule: str, **options: int) -> Iterator[Alone]:
    one = Alone(context, ids, rule, **options)
    try:
        yield one
    finally:
        one.close()
