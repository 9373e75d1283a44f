"""Whoever holds requests of the kernel for kdbusfs: the worker of an open file, or the tree.

One end of its line, what is known of its file, and what is needed of the supervisor. Privileged only in what it is part of: device.py.
"""

from __future__ import annotations

import errno
import os
import socket
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
    """Whoever holds requests: the worker of an open file, or the tree."""

    def __init__(
        self, worker: Worker, messages: object, uid: int, node: int, slow: set[Holder]
    ) -> None:
        """`slow`: those that are to be flushed."""
        super().__init__()
        self.number = worker.number
        self.uid = uid
        self.node = node
        # Of our own: the supervisor closes its one when the process has ended, in its thread.
        self.fd = os.dup(worker.line.fileno())
        self.line = Line(socket.socket(fileno=self.fd), messages)
        self.slow = slow
        self.bus = self.endpoint = ""
        self.why = errno.ECONNRESET
        self.owned: Callable[[], None] | None = None  # ends what lives as long as the file
        # Whether that is as its worker, too; who opened the file had CAP_IPC_OWNER.
        self.bound = self.ipc_owner = False

    def say(self, message: msgspec.Struct, fds: Sequence[int] = ()) -> None:
        """Raises OSError if it is gone."""
        with self.lock:
            self.line.send(message, fds)
            if self.line.queue:
                self.slow.add(self)

    def flush(self) -> int:
        """How many messages it does not take now."""
        with self.lock:
            try:
                done = self.gone or self.line.flush()
            except OSError:
                done = True
            if done:
                self.slow.discard(self)
            return 0 if done else len(self.line.queue)

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

    def end(self, *, gone: bool = False, released: bool = False) -> None:
        """The worker is gone, or its file is closed; when both are, so is the pool."""
        with self.lock:
            with suppress(OSError):
                self.line.sock.shutdown(socket.SHUT_RDWR)
            self.gone |= gone
            self.released |= released
            if gone:
                self.fd = -1
                self.line.close()
            if self.gone and self.released and self.pool >= 0:
                os.close(self.pool)
                self.pool = -1
        if self.owned is not None and (released or self.bound):
            self.owned()
