"""The broker's end of a worker's line: nothing that the worker sends can hold up the broker.

close(2) may take for ever: of a socket that lingers (SO_LINGER), of a file whose file system does not answer, of a
pipe that somebody else is at (splice(2) holds its lock while it waits). It is the last to hold a socket who
closes it, and with it what is on the way in it. So a record is looked at before it is taken, and what came from
a worker, or may have such on the way, is closed by a thread. Those start before lock-down, as nothing can
afterwards; each can be held up by one worker that was taken over.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import threading
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from queue import SimpleQueue
from typing import Any

from kbusd.rings.line import Line, LineError, close_all
from kbusd.sandbox import kernel

THREADS = 16
_PEEK = int(socket.MSG_PEEK)


class Closers:
    """Threads that close."""

    def __init__(self) -> None:
        self._wanted: SimpleQueue[int] = SimpleQueue()
        self._lock = threading.Lock()
        self._of: dict[int, deque[int]] = {}  # what is to be closed, by worker

    def start(self) -> None:
        """Raises OSError if there can be no threads."""
        kernel.one_heap()
        try:
            for _ in range(THREADS):
                threading.Thread(target=self._run, daemon=True).start()
        except RuntimeError as error:
            raise OSError(
                errno.EAGAIN, f"{error}, of {THREADS}; each is a process to RLIMIT_NPROC"
            ) from None

    def close(self, worker: int, fds: Sequence[int]) -> None:
        """Without waiting for it. What is this worker's fault is closed by one thread, one after the other."""
        with self._lock:
            mine = self._of.get(worker)
            if mine is None:
                self._of[worker] = deque(fds)
                self._wanted.put(worker)
            else:
                mine.extend(fds)

    def _run(self) -> None:
        while True:
            worker = self._wanted.get()
            while (fd := self._next(worker)) >= 0:
                with suppress(OSError):  # of writing what was written back; it is closed
                    os.close(fd)

    def _next(self, worker: int) -> int:
        with self._lock:
            if mine := self._of[worker]:
                return mine.popleft()
            del self._of[worker]
            return -1


class Guarded(Line):
    """A line to `worker`. `messages` as for Line. What comes with a record is the caller's to `release`."""

    __slots__ = ("_closers", "_worker")

    def __init__(self, sock: socket.socket, messages: Any, closers: Closers, worker: int) -> None:
        super().__init__(sock, messages)
        self._closers = closers
        self._worker = worker

    def _next(self, buffer: bytearray, flags: int) -> tuple[int, list[int], int]:
        # What the kernel can't hand over, it closes, if the record is received; not if that is looked at.
        size, fds, cut_short = super()._next(buffer, flags | _PEEK)
        if cut_short or not all(map(_is_memory, fds)):
            self.release(fds)
            raise LineError("with a record came too much, or what is no memfd")
        try:
            self.sock.recvmsg(0, 0, flags)
        except ConnectionResetError:
            # Told once, and not the end: what was looked at is still there.
            self.sock.recvmsg(0, 0, flags)
        return size, fds, cut_short

    def release(self, fds: Sequence[int]) -> None:
        slow = [fd for fd in fds if not _is_memory(fd)]
        if slow:
            self._closers.close(self._worker, slow)
        close_all([fd for fd in fds if fd not in slow])

    def close(self) -> None:
        """What was not received is on the way in it. (Nothing tells the end from a record without bytes, behind
        which there may be others.)"""
        self._closers.close(self._worker, [self.sock.detach()])
        super().close()


def _is_memory(fd: int) -> bool:
    """Whether it is a memfd. Asks nothing that could wait: any other question would be one to a file system, or
    take a pipe's lock."""
    try:
        return fcntl.fcntl(fd, fcntl.F_GET_SEALS) >= 0
    except OSError:
        return False
