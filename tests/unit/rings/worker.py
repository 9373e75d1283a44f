"""A worker as the rings see it: what it sends and where, by the rules of fanout.py.

The driver of the model tests and of the stress; plain Python on the public interface.
"""

from __future__ import annotations

import os
import socket
from collections import deque

import msgspec

from kbusd.rings.broadcast import Broadcast, BroadcastReader
from kbusd.rings.clock import Clock
from kbusd.rings.doorbell import ring
from kbusd.rings.fanout import STOP, Fanout, Subscriber
from kbusd.rings.merge import Merge
from kbusd.rings.ring import Ring, RingReader
from kbusd.rings.status import StatusPage, StatusView
from kbusd.rings.values import Frame

MESSAGE, LOG, MARK = 1, 2, 3
_HEAD = "<IBBHQIIIIQ"


def frame_of(raw: tuple[bytes, bytes, bytes]) -> Frame:
    """A frame as Fanout.demote gives it."""
    import struct

    head, envelope, body = raw
    _, kind, flags, fds, stamp, serial, reply_serial, _, _, aux = struct.unpack(_HEAD, head)
    return Frame(kind, stamp, envelope, body, 0, flags, fds, serial, reply_serial, aux)


class Outgoing:
    """What goes from one worker to one other."""

    def __init__(self, ring: Ring, doorbell: int, view: StatusView, subscriber: Subscriber) -> None:
        self.ring = ring
        self.doorbell = doorbell
        self.view = view
        self.subscriber = subscriber
        self.waiting: deque[Frame] = deque()
        self.touched = False

    def put(self, frame: Frame) -> None:
        self.touched = True
        if self.waiting or not self.ring.write(frame):
            self.waiting.append(frame)
            self.ring.wait_for_space(True)

    def flush(self) -> bool:
        if not self.waiting:
            return True
        while self.waiting and self.ring.write(self.waiting[0]):
            self.waiting.popleft()
            self.touched = True
        if self.waiting:
            return False
        self.ring.wait_for_space(False)
        return True


class Bell:
    """Our end of a doorbell."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __del__(self) -> None:
        os.close(self.fd)


class Worker:
    """`ring_size` and `broadcast_size` in bytes, `patience` in ns."""

    def __init__(
        self, name: int, ring_size: int, broadcast_size: int, patience: int = 20_000_000
    ) -> None:
        self.name = name
        self.ring_size = ring_size
        self.clock = Clock()
        self.status = StatusPage()
        self.fanout = Fanout(Broadcast(broadcast_size))
        self.merge = Merge(self.clock, patience)
        self.to: dict[int, Outgoing] = {}
        self.source: dict[object, int] = {}
        self.followed: dict[int, BroadcastReader] = {}
        self.bells: dict[int, Bell] = {}  # of each other: our end

    def unicast(self, to: int, body: bytes, serial: int = 0) -> None:
        self.to[to].put(Frame(MESSAGE, self.clock.tick(), b"u", body, serial=serial))

    def signal(self, to: list[int], body: bytes, serial: int = 0) -> None:
        """To all in `to`: once by Broadcast for those that have joined, else by Ring.

        `end` says when it is in all rings."""
        broadcast = self.fanout.broadcast
        frame = Frame(MESSAGE, self.clock.tick(), b"s", body, serial=serial)
        length = (40 + 1 + len(body) + 7) & ~7
        broadcast.open_many(frame.stamp)
        aux = 0
        if any(self.to[name].subscriber.joined for name in to):
            for late in self.fanout.in_the_way(length):
                self.demote(late.owner)
            aux = broadcast.position + length
        # The copies may come before the original; every second time they do.
        if frame.stamp & 1 or not aux:
            self._copies(to, msgspec.structs.replace(frame, aux=aux))
        if aux:
            assert broadcast.write(frame, self.fanout.limit())
            for name in to:
                if self.to[name].subscriber.joined:
                    self.fanout.want(self.to[name].subscriber)
                    self.to[name].touched = True
            if not frame.stamp & 1:
                self._copies(to, msgspec.structs.replace(frame, aux=aux))

    def _copies(self, to: list[int], frame: Frame) -> None:
        for name in to:
            if not frame.aux or not self.to[name].subscriber.joined:
                self.to[name].put(frame)

    def end(self) -> bool:
        """Whether nothing waits for a ring any more."""
        if any(out.waiting for out in self.to.values()):
            return False
        self.fanout.broadcast.close_many()
        return True

    def demote(self, name: int) -> None:
        out = self.to[name]
        for raw in self.fanout.take_out(out.subscriber):
            out.put(frame_of(raw))
        if out.waiting or out.subscriber.broken:
            out.put(Frame(MARK, self.clock.tick(), b"", b"", aux=STOP))
        else:
            self.join(name)

    def join(self, name: int) -> None:
        out = self.to[name]
        if not out.subscriber.joined:
            out.put(Frame(MARK, self.clock.tick(), b"", b"", aux=self.fanout.add(out.subscriber)))

    def ring(self) -> None:
        for out in self.to.values():
            if out.touched:
                out.touched = False
                if out.view.asleep():
                    ring(out.doorbell)


def introduce(a: Worker, b: Worker) -> None:
    """Make two workers known to each other, both ways."""
    halves = []
    for one, other, end in zip((a, b), (b, a), socket.socketpair(), strict=True):
        end.setblocking(False)
        one.bells[other.name] = Bell(end.detach())
        halves.append((Ring(one.ring_size), one.status.take_slot(), one.status.take_slot()))
    for one, other, mine, theirs in ((a, b, *halves), (b, a, *reversed(halves))):
        view = StatusView(other.status.fd)
        mine[0].connect(view, theirs[1])
        one.to[other.name] = Outgoing(
            mine[0],
            one.bells[other.name].fd,
            view,
            Subscriber(view, theirs[2], other.name),
        )
        reader = RingReader(theirs[0].fd, one.status, mine[1])
        broadcast = BroadcastReader(other.fanout.broadcast.fd)
        one.merge.add(reader, broadcast, mine[2], one.bells[other.name].fd)
        one.source[reader] = other.name
        one.followed[other.name] = broadcast
