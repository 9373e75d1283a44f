"""Whoever holds requests of the kernel for kdbusfs: the worker of an open file, or the tree.

One end of its line, what is known of its file, and what is needed of the supervisor. Privileged only in what it is part of: device.py.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fcntl import F_GET_SEALS, fcntl
from typing import Any, Protocol

import msgspec

from kbusd.rings import entries
from kbusd.rings.entries import Credentials
from kbusd.rings.line import Line, LineError
from kbusd.supervisor.clients import Clients
from kbusd.supervisor.journal import Journal
from kbusd.supervisor.relay import End

Order = entries.MakeBus | entries.MakeEndpoint

MAX_LENT = 64 << 20  # bytes in descriptors that it has not read yet, for it to be heard
_SO_MEMINFO, _MEMINFO = 55, struct.Struct("=9I")  # sock_diag(7)
_UNREAD = 2  # SK_MEMINFO_WMEM_ALLOC


@dataclass(frozen=True)
class Opening:
    """Somebody has opened a file, and waits for a worker: what is to be done with it, and the custom
    endpoint of which the broker is told."""

    work: Callable[..., None]
    endpoint: int

    def __call__(self, worker: Worker | None, credentials: Credentials) -> None:
        self.work(worker, credentials)


class Worker(Protocol):
    """What is needed of the supervisor's."""

    number: int
    pid: int
    line: Line


class Host(Protocol):
    """What the supervisor does for us, in its own thread."""

    settings: Any
    openers: Clients
    journal: Journal

    def kill(self, number: int, reason: str) -> None: ...

    def make(self, holder: Holder, creator: entries.Credentials, order: Order) -> None: ...

    def enter(self, holder: Holder, who: entries.Credentials, facts: entries.Facts) -> None: ...


class Holder(End):
    """Whoever holds requests: the worker of an open file, or the tree.

    Nothing with descriptors ever waits for it here: to close them may take for ever."""

    def __init__(
        self,
        worker: Worker,
        messages: object,
        uid: int,
        node: int,
        late: Callable[[Holder], None],
    ) -> None:
        """`late`: called with it when it is to be flushed. The worker's line is ours from now on."""
        super().__init__()
        self.number, self.pid = worker.number, worker.pid
        self.uid = uid
        self.node = node
        # Only ours: what is left unread in it is closed with it (Aside.close).
        self.fd = worker.line.sock.detach()
        self.line = Line(socket.socket(fileno=self.fd), messages)
        self.late = late
        self.lent = 0
        self.paused = False  # it is not listened to
        self.has_ordered = False  # something that the supervisor's thread has not done yet
        self.bus = self.endpoint = ""
        self.why = errno.ECONNRESET
        self.owned: Callable[[], None] | None = None  # ends what lives as long as the file
        self.owns_no_more = False
        self.bound = False  # whether that is as its worker, too
        self.opener = Credentials(uid, 0, 0)

    def say(self, message: msgspec.Struct) -> None:
        """Raises OSError if it is gone."""
        with self.lock:
            self.line.send(message)
            waits = bool(self.line.queue)
        if waits:
            self.late(self)

    def lend(self, message: msgspec.Struct, fds: Sequence[int], size: int) -> bool:
        """Say it, with descriptors that take `size` bytes of memory; False if it has no room for that now."""
        with self.lock, suppress(OSError):
            if not self._unread():
                self.lent = 0
            if self.line.offer(message, fds):
                self.lent += size
                return True
        return False

    def _unread(self) -> int:
        """How much of what was said it has not read. Raises OSError."""
        found = self.line.sock.getsockopt(socket.SOL_SOCKET, _SO_MEMINFO, _MEMINFO.size)
        unread: int = _MEMINFO.unpack(found)[_UNREAD]
        return unread

    def may_be_heard(self) -> bool:
        """Not if it does not take what it has asked for, which would pile up here."""
        with self.lock, suppress(OSError):
            if not self.gone and self.lent > MAX_LENT and not self._unread():
                self.lent = 0
        waits = self.line.queue or self.has_ordered or self.lent > MAX_LENT
        return self.gone or not waits

    def has_hung_up(self) -> bool:
        """Whether its end of the line is closed."""
        poller = select.poll()
        poller.register(self.line, 0)
        return bool(poller.poll(0))

    def flush(self) -> int:
        """How many messages it does not take now."""
        with self.lock:
            try:
                if not self.gone:
                    self.line.flush()
            except OSError:
                self.line.queue.clear()  # nobody takes them any more
            return len(self.line.queue)

    def read(self, offset: int, size: int) -> bytes:
        """From the pool, with zeros behind its end: a short answer would make the file short. Nothing
        if there is no pool."""
        return b"" if self.pool < 0 else os.pread(self.pool, size, offset).ljust(size, b"\0")

    def take_pool(self, fd: int, events_at: int) -> None:
        """Raises LineError."""
        try:
            fcntl(fd, F_GET_SEALS)  # only a memfd has any, and is read without waiting for anybody
        except OSError:
            raise LineError("offered as a pool what is no memfd") from None
        if not -1 <= events_at < 1 << 62:
            raise LineError(f"has its events at {events_at}")
        self.pool, self.events_at = fd, events_at

    def may_make(self, order: Order, control: str) -> bool:
        """Whether a file of this node is one that makes such a thing; `control`: the bus of control nodes."""
        if isinstance(order, entries.MakeBus):
            return self.bus == control
        return self.bus != control and self.endpoint == "bus"

    def own(self, end: Callable[[], None], *, bound: bool = False) -> bool:
        """Have `end` called when the file is closed, and if it is `bound` when its worker has ended; False
        if that is so, or something else is to be called."""
        with self.lock:
            if self.released or self.owned is not None or (bound and self.gone):
                return False
            self.owned, self.bound = end, bound
            return True

    def cut(self) -> None:
        """The file is of no use any more, though its client has it open."""
        with self.lock, suppress(OSError):
            self.why = errno.ESHUTDOWN
            self.line.sock.shutdown(socket.SHUT_RDWR)

    def end(self, *, gone: bool = False, released: bool = False) -> int:
        """The worker is gone, or its file is closed; when both are, so is the pool. Returns what is to be
        closed then, which may take for ever: our end of the line; -1 for nothing."""
        line = pool = -1
        with self.lock:
            with suppress(OSError):
                self.line.sock.shutdown(socket.SHUT_RDWR)
            self.gone |= gone
            self.released |= released
            if gone:
                self.line.queue.clear()
                line, self.fd = self.line.sock.detach(), -1
            if self.gone and self.released:
                pool, self.pool = self.pool, -1
            due = self.owned is not None and not self.owns_no_more and (released or self.bound)
            self.owns_no_more |= due
        if pool >= 0:
            os.close(pool)
        if due and self.owned is not None:
            self.owned()
        return line
