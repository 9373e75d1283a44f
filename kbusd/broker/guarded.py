"""The broker's end of a worker's line: nothing that the worker sends can hold up the broker.

close(2) may take for ever: of a socket that lingers (SO_LINGER), of a file whose file system does not answer. It
is the last to hold a socket who closes it, and with it what is on the way in it. So a record is looked at
before it is taken. With a memfd or a pipe there is nothing to wait for; all else that came from a worker, or may
have such on the way, is closed by a thread. Those start before lock-down, as nothing can afterwards; each can be
held up by one worker that was taken over.
"""

from __future__ import annotations

import fcntl
import os
import socket
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from queue import SimpleQueue
from typing import Any

from kbusd.rings.line import Line, LineError
from kbusd.sandbox import kernel

THREADS = 16
_PEEK = int(socket.MSG_PEEK)


class Closers:
    """Threads that close."""

    def __init__(self) -> None:
        self._wanted: SimpleQueue[Sequence[int]] = SimpleQueue()

    def start(self) -> None:
        """Raises RuntimeError if there can be no threads."""
        kernel.one_heap()
        started = threading.Barrier(THREADS + 1)
        for _ in range(THREADS):
            threading.Thread(target=self._run, args=(started.wait,), daemon=True).start()
        started.wait()

    def close(self, fds: Sequence[int]) -> None:
        """Without waiting for it. One thread closes these, one after the other."""
        self._wanted.put(fds)

    def _run(self, started: Callable[[], int]) -> None:
        started()
        while True:
            for fd in self._wanted.get():
                with suppress(OSError):  # of writing what was written back; it is closed
                    os.close(fd)


class Guarded(Line):
    """A line to a worker. `messages` as for Line."""

    __slots__ = ("_closers",)

    def __init__(self, sock: socket.socket, messages: Any, closers: Closers) -> None:
        super().__init__(sock, messages)
        self._closers = closers

    def _next(self, buffer: bytearray, flags: int) -> tuple[int, list[int], int]:
        # What the kernel can't hand over, it closes, if the record is received; not if that is looked at.
        size, fds, cut_short = super()._next(buffer, flags | _PEEK)
        if cut_short or not all(map(closes_at_once, fds)):
            self._closers.close(fds)
            raise LineError("with a record came what is neither a memfd nor a pipe, or too much")
        self.sock.recvmsg(0, 0, flags)
        return size, fds, cut_short

    def _release(self, fds: Sequence[int]) -> None:
        if fds:
            self._closers.close(fds)  # there may be a side socket, which others have written to

    def close(self) -> None:
        """What was not received is on the way in it. (Nothing tells the end from a record without bytes, behind
        which there may be others.)"""
        self._closers.close([self.sock.detach()])
        super().close()


def closes_at_once(fd: int) -> bool:
    """Whether it is a memfd or a pipe."""
    for question in (fcntl.F_GET_SEALS, fcntl.F_GETPIPE_SZ):
        with suppress(OSError):
            return fcntl.fcntl(fd, question) >= 0
    return False
