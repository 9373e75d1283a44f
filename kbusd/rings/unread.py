"""Sockets that are closed before everything in them was read.

Descriptors may be on their way in them, and the kernel closes those with the socket, in the thread that does
so. That may take for ever: one of a TCP socket waits as long as its owner said (SO_LINGER), one of a file for the
file system. So whoever serves others has it done by a thread, as many as there may be.
"""

from __future__ import annotations

import socket
import threading
from collections import deque
from contextlib import suppress
from select import POLLHUP, poll

MAX_THREADS = 64

_threads: list[threading.Thread] = []
_left: deque[socket.socket] = deque()


def ready(what: socket.socket | int, events: int, seconds: float) -> bool:
    """Whether one of these events happens to it within this time (poll(2))."""
    word = poll()
    word.register(what, events)
    return bool(word.poll(seconds * 1000))


def hung_up(sock: socket.socket) -> bool:
    """Whether nobody is at the other end any more."""
    return ready(sock, POLLHUP, 0.0)


def dispose(sock: socket.socket) -> None:
    """Close it, without waiting for anything."""
    unread = False
    with suppress(OSError):
        unread = bool(sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
    if not unread:
        sock.close()
        return
    _left.append(sock)
    _threads[:] = filter(threading.Thread.is_alive, _threads)
    with suppress(RuntimeError):  # there can be no further thread now: next time
        while _left and len(_threads) < MAX_THREADS:
            thread = threading.Thread(target=_left[0].close, daemon=True)
            thread.start()
            _threads.append(thread)
            _left.popleft()
