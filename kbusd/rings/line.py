"""A line: one end of a SOCK_SEQPACKET socketpair between two processes of a bus.

One record is one msgspec-encoded struct of `entries.py`, with up to 16 descriptors. What comes
in is hostile until decoded by type; a record that was cut short, lost a descriptor or does not
decode raises LineError, after which the line is not to be used again. Never blocks unless asked.
"""

from __future__ import annotations

import array
import os
import socket
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

MAX_RECORD = 256 * 1024
MAX_FDS = 16
_ANCILLARY = socket.CMSG_SPACE(MAX_FDS * 4)
# As plain numbers: for each "or" of two flags Python makes a new one, by five calls.
_SOL_SOCKET, _SCM_RIGHTS = int(socket.SOL_SOCKET), int(socket.SCM_RIGHTS)
_SEND = int(socket.MSG_NOSIGNAL)
_RECEIVE = int(socket.MSG_CMSG_CLOEXEC)
_DONT_WAIT = int(socket.MSG_DONTWAIT)
_CUT_SHORT = int(socket.MSG_TRUNC | socket.MSG_CTRUNC)
_LINE = int(socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
_buffer = bytearray(
    MAX_RECORD
)  # what comes in is here until it is decoded, in a process of one thread
_encode = msgspec.msgpack.Encoder().encode


# By the identity of the union; each keeps its union alive.
_decoders: dict[int, tuple[Any, Callable[[memoryview], Any]]] = {}


class LineError(Exception):
    """The other end broke the rules of the line; the text says which."""


class Line:
    """Sends and receives typed records on `sock`. `messages` is the union that may come in.

    Where several threads receive, each line or each thread needs a `buffer` of its own, MAX_RECORD bytes."""

    __slots__ = ("_buffer", "_decode", "queue", "sock")

    def __init__(self, sock: socket.socket, messages: Any, buffer: bytearray = _buffer) -> None:
        if sock.gettimeout() != 0:
            sock.setblocking(False)
        self.sock = sock
        self._buffer = buffer
        self._decode = prepare(messages)
        self.queue: deque[tuple[bytes, tuple[int, ...]]] = deque()

    def fileno(self) -> int:
        return self.sock.fileno()

    def send(self, message: msgspec.Struct, fds: Sequence[int] = ()) -> None:
        """Send, or queue if the other end is slow (then call `flush` when writable).

        Queued descriptors are duplicated. Raises OSError (EPIPE, ECONNRESET) if it is gone."""
        data = _encode(message)
        if self.queue or not self._try(data, fds):
            self.queue.append((data, _dup_all(fds)))

    def offer(self, message: msgspec.Struct, fds: Sequence[int] = ()) -> bool:
        """Send if that is possible at once; False if not, and nothing is queued. That the other end is
        gone shows at the next read."""
        try:
            return not self.queue and self._try(_encode(message), fds)
        except OSError:
            return False

    def flush(self) -> bool:
        """Send what is queued; False while something is left."""
        while self.queue:
            data, fds = self.queue[0]
            if not self._try(data, fds):
                return False
            self.queue.popleft()
            self.release(fds)
        return True

    def discard(self) -> None:
        """What is queued is not sent any more."""
        while self.queue:
            self.release(self.queue.popleft()[1])

    def release(self, fds: Sequence[int]) -> None:
        """Close what came with a record, or was queued."""
        close_all(fds)

    def _try(self, data: bytes, fds: Sequence[int]) -> bool:
        ancillary = [(_SOL_SOCKET, _SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            self.sock.sendmsg([data], ancillary, _SEND | self._wait_flag())
        except BlockingIOError:
            return False
        return True

    def receive(self, buffer: bytearray | None = None) -> tuple[Any, list[int]] | None:
        """The next record and its descriptors, or None if there is none now.

        Raises EOFError when the other end has closed, LineError when it broke the rules."""
        buffer = self._buffer if buffer is None else buffer
        try:
            size, fds, cut_short = self._next(buffer, self._wait_flag())
        except BlockingIOError:
            return None
        except ConnectionResetError:
            # It has closed and left something of ours unread; what it had said before comes next.
            return self.receive(buffer)
        return self.decoded(memoryview(buffer)[:size], fds, cut_short)

    def _next(self, buffer: bytearray, flags: int) -> tuple[int, list[int], int]:
        """The next record's size, its descriptors, and whether it was cut short."""
        size, ancillary, found, _ = self.sock.recvmsg_into([buffer], _ANCILLARY, _RECEIVE | flags)
        fds = array.array("i")
        for level, kind, payload in ancillary:
            if level == _SOL_SOCKET and kind == _SCM_RIGHTS:
                fds.frombytes(payload[: len(payload) - len(payload) % 4])
        return size, fds.tolist() if ancillary else [], found & _CUT_SHORT

    def decoded(self, record: memoryview, fds: list[int], cut_short: int) -> tuple[Any, list[int]]:
        """The same of a record that was received by other means."""
        try:
            if cut_short:
                raise LineError("a record was cut short or lost descriptors")
            if not record:
                raise EOFError
            return self._decode(record), fds
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            self.release(fds)
            raise LineError(f"a record does not decode: {error}") from None
        except (LineError, EOFError):
            self.release(fds)
            raise

    def _wait_flag(self) -> int:
        # By call, not by the descriptor's own flag: the other end of it may have been passed on.
        return 0 if self.sock.gettimeout() is None else _DONT_WAIT

    def close(self) -> None:
        self.discard()
        self.sock.close()


def close_all(fds: Sequence[int] | array.array[int]) -> None:
    for fd in fds:
        os.close(fd)


def _dup_all(fds: Sequence[int]) -> tuple[int, ...]:
    """All or none of them. Raises OSError."""
    copies: list[int] = []
    try:
        copies.extend(map(os.dup, fds))
    except OSError:
        close_all(copies)
        raise
    return tuple(copies)


def prepare(messages: Any) -> Callable[[memoryview], Any]:
    """The decoder of a union of messages, made once: it takes most of a millisecond."""
    known = _decoders.get(id(messages))
    if known is None:
        known = _decoders[id(messages)] = (messages, msgspec.msgpack.Decoder(messages).decode)
    return known[1]


def adopt(fd: int) -> socket.socket:
    """The end of a line that was passed to us, non-blocking, without a system call.

    socket.socket(fileno=...) and setblocking make some that a sandbox may refuse (FIONBIO)."""
    return socket.socket(socket.AF_UNIX, _LINE, fileno=fd)


def pair() -> tuple[socket.socket, socket.socket]:
    """Both ends of a new line."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
