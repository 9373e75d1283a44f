"""A connection to a bus by its kdbus node, in Python: over kdbusfs and over CUSE.

    with Connection("/dev/kdbus/1000-session/bus") as bus:
        bus.acquire("com.example.Echo")
        with bus.receive() as call:
            bus.send(call.sender, call.payload, reply_to=call.cookie)

Payloads are bytes of any kind between kdbus clients; what is to be understood by D-Bus clients is a
D-Bus message, for which `send_message`, `call_message` and Received.dbus() take and give jeepney's.
It blocks, and one thread at a time may use a connection; `fileno` is for poll(2), readable is a message.

Whatever the bus refuses is an OSError with the errno that kdbus(7) documents. It trusts the bus, which
alone can write into the pool, and no other client: messages are split with every check.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import select
import socket
import struct
import time
from array import array
from collections.abc import Iterator, Sequence

import jeepney

from kbusd.client.kdbus_messages import Memfd, Outgoing, Part, Received, chain, fds_of
from kbusd.kdbus import abi, attach, bloom, bloommatch, items, layout
from kbusd.wire import match

POOL = 1 << 20
TIMEOUT = 25.0
"""Seconds that a call waits for its reply, as D-Bus libraries have it."""

_libc = ctypes.CDLL(None, use_errno=True)
_MAX_SERIAL = (1 << 32) - 1


class _Buffer:
    """Bytes at an address that is a multiple of 8 and does not change."""

    def __init__(self, data: bytes) -> None:
        self._words = (ctypes.c_uint64 * (len(data) // 8 + 1))()
        self.address = ctypes.addressof(self._words)
        self.size = len(data)
        ctypes.memmove(self.address, data, self.size)

    @property
    def bytes(self) -> bytes:
        return ctypes.string_at(self.address, self.size)


def _receive(sock: socket.socket) -> tuple[bytes, list[int]]:
    """One record and its descriptors. (socket.recv_fds passes no flags on.)"""
    space = socket.CMSG_SPACE(4 * attach.MAX_FDS)
    record, rights, *_ = sock.recvmsg(64, space, socket.MSG_CMSG_CLOEXEC)
    fds = array("i")
    for _, _, data in rights:
        fds.frombytes(data[: len(data) // 4 * 4])
    return record, list(fds)


class Connection:
    """An open node that has said HELLO. `id` is what ":1.ID" is to D-Bus clients."""

    def __init__(
        self,
        path: str,
        *,
        pool_size: int = POOL,
        accept_fds: bool = True,
        attach_send: int = abi.ATTACH_ANY,
        attach_recv: int = 0,
        flags: int = 0,
        description: str | None = None,
    ) -> None:
        """`pool_size`: bytes, whole pages; what others send waits there. `attach_*`: ATTACH flags, what
        others may learn of us, and what messages are to tell us of their senders. `flags`: more of HELLO.

        Raises OSError."""
        self._socket: socket.socket | None = None
        self._pool: mmap.mmap | None = None
        self._numbers: dict[int, list[int]] = {}
        self._cookie = 0
        self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            self._attach()
            self._hello(
                pool_size,
                flags | abi.HELLO_ACCEPT_FD * accept_fds,
                attach_send,
                attach_recv,
                description,
            )
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """The connection ends; messages that it has received stay."""
        for fds in self._numbers.values():
            for fd in fds:
                if fd >= 0:
                    os.close(fd)
        self._numbers = {}
        if self._pool is not None:
            self._pool.close()
        if self._socket is not None:
            self._socket.close()
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1

    def fileno(self) -> int:
        """For poll(2). -1: it is closed."""
        return self._fd

    # -- setting up ----------------------------------------------------------------------------

    def _attach(self) -> None:
        """Name a socket for the pool and for descriptors; a bus that knows of none is no error."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            try:
                got = self.command(attach.COMMAND, struct.pack("=3Q", 0, 0, theirs.fileno()))
            except OSError:
                ours.close()
                self._by_socket = False
                return
        ours.setblocking(False)  # what is to come is there when the ioctl returns
        self._socket = ours
        self._by_socket = bool(struct.unpack_from("=Q", got, 16)[0] & attach.POOL)

    def _hello(self, size: int, flags: int, send: int, recv: int, description: str | None) -> None:
        fixed = struct.pack("=9Q", flags, 0, send, recv, 0, 0, size, 0, 0) + bytes(16)
        named = (
            [] if description is None else [items.string(abi.ITEM_CONN_DESCRIPTION, description)]
        )
        got = self.command(abi.CMD_HELLO, fixed, *named)
        self.bus_flags, self.id, _, offset, length = struct.unpack_from("=5Q", got, 40)
        self.bus_id = got[80:96].hex()
        """Of the bus, as GetId has it."""
        self._pool = self._map(size)
        (item,) = items.split(self._pool[offset : offset + length], 0)
        self.bloom: bloom.Parameter = bloom.parse_parameter(item.data)
        self._free(offset)

    def _map(self, size: int) -> mmap.mmap:
        if not self._by_socket:
            return mmap.mmap(self._fd, size, mmap.MAP_SHARED, mmap.PROT_READ)
        assert self._socket is not None
        record, fds = _receive(self._socket)
        try:
            if record != attach.pool_record(size) or len(fds) != 1:
                raise ConnectionError("no pool came over the attached socket")
            return mmap.mmap(fds[0], size, mmap.MAP_SHARED, mmap.PROT_READ)
        finally:
            for fd in fds:
                os.close(fd)

    def command(self, command: int, fixed: bytes, *chain: bytes) -> bytes:
        """Any command: `fixed` are the fields of its struct after `size`, `chain` its items; returns what
        the struct has become. Raises OSError. EINTR is not told: it is asked again."""
        buffer = _Buffer(items.command(bytes(8) + fixed, chain))
        while True:
            address = ctypes.c_void_p(buffer.address)
            if _libc.ioctl(self._fd, ctypes.c_ulong(command), address) >= 0:
                return buffer.bytes
            number = ctypes.get_errno()
            if number != errno.EINTR:
                raise OSError(number, os.strerror(number))

    def _free(self, offset: int) -> None:
        self.command(abi.CMD_FREE, struct.pack("=3Q", 0, 0, offset))

    # -- messages ------------------------------------------------------------------------------

    def send(
        self,
        destination: int | str,
        payload: bytes | Sequence[Part] = b"",
        *,
        fds: Sequence[int] = (),
        cookie: int = 1,
        reply_to: int = 0,
        flags: int = 0,
        priority: int = 0,
        filter: bytes | None = None,
        payload_type: int = abi.PAYLOAD_DBUS,
    ) -> None:
        """To an id or a name; returns when the message is in the receiver's pool. `fds` stay ours.

        A call is sent by `call`, a signal has MSG_SIGNAL in `flags` and a `filter`. Raises OSError:
        ESRCH nobody owns the name, ENXIO there is no such id, ENOBUFS the receiver's pool is full,
        ECOMM it takes no descriptors, EMFILE more wait there than may, EPERM policy forbids it or nobody
        waits for this reply, ETXTBSY a memfd is not sealed."""
        self._send(
            destination, payload, fds, cookie, reply_to, flags, priority, filter, payload_type, -1
        )

    def call(
        self,
        destination: int | str,
        payload: bytes | Sequence[Part] = b"",
        *,
        fds: Sequence[int] = (),
        cookie: int | None = None,
        timeout: float = TIMEOUT,
        flags: int = 0,
        payload_type: int = abi.PAYLOAD_DBUS,
        cancel: int = -1,
    ) -> Received:
        """Send and wait for the reply; `timeout` in seconds; readable `cancel`, a descriptor, ends it.

        Raises OSError as `send` does, and ETIMEDOUT, EPIPE the other went or dropped the call,
        ECANCELED."""
        until = time.monotonic_ns() + int(timeout * 1e9)
        flags |= abi.MSG_EXPECT_REPLY
        cookie = self.next_cookie() if cookie is None else cookie
        offset = self._send(
            destination, payload, fds, cookie, until, flags, 0, None, payload_type, cancel, True
        )
        return self._take(offset)

    def send_message(self, message: jeepney.Message) -> int:
        """A D-Bus message, which goes where its header says; its serial. Replies are messages that come.

        Raises OSError as `send` does, ValueError if it goes nowhere."""
        cookie = self.next_cookie()
        out = Outgoing(message, cookie, self.bloom)
        reply = out.reply_to
        if out.flags & abi.MSG_EXPECT_REPLY:
            reply = time.monotonic_ns() + int(TIMEOUT * 1e9)
        self.send(
            out.destination,
            out.data,
            fds=out.fds,
            cookie=cookie,
            reply_to=reply,
            flags=out.flags,
            filter=out.filter,
        )
        return cookie

    def call_message(self, message: jeepney.Message, timeout: float = TIMEOUT) -> jeepney.Message:
        """Send a D-Bus method call and wait for its reply, which may be an error message.

        Raises OSError as `call` does, ValueError if what comes is no D-Bus message."""
        cookie = self.next_cookie()
        out = Outgoing(message, cookie, self.bloom)
        with self.call(
            out.destination,
            out.data,
            fds=out.fds,
            cookie=cookie,
            timeout=timeout,
            flags=out.flags,
        ) as reply:
            return reply.dbus()

    def next_cookie(self) -> int:
        """A number for a message that expects a reply; it fits D-Bus's serials."""
        self._cookie = self._cookie % _MAX_SERIAL + 1
        return self._cookie

    def _send(
        self,
        destination: int | str,
        payload: bytes | Sequence[Part],
        fds: Sequence[int],
        cookie: int,
        reply: int,
        flags: int,
        priority: int,
        filter: bytes | None,
        payload_type: int,
        cancel: int,
        sync: bool = False,
    ) -> int:
        """The offset of the reply, if it is `sync`."""
        kept: list[_Buffer] = []
        parts: list[tuple[int, int] | Memfd] = []
        for part in [payload] if isinstance(payload, bytes) else payload:
            if isinstance(part, Memfd):
                parts.append(part)
            elif part:
                kept.append(_Buffer(part))
                parts.append((kept[-1].address, kept[-1].size))
        name = destination if isinstance(destination, str) else None
        id = destination if isinstance(destination, int) else abi.DST_ID_NAME
        fixed = layout.MESSAGE.pack(0, flags, priority, id, 0, payload_type, cookie, reply)
        message = _Buffer(items.command(fixed, chain(parts, fds, name, filter)))
        command = struct.pack("=6Q", abi.SEND_SYNC_REPLY * sync, 0, message.address, 0, 0, 0)
        cancels = [items.build(abi.ITEM_CANCEL_FD, layout.I32.pack(cancel))] if cancel >= 0 else []
        offset: int = struct.unpack_from("=Q", self.command(abi.CMD_SEND, command, *cancels), 32)[0]
        return offset

    def readable(self, timeout: float | None = 0.0) -> bool:
        """Whether there is a message, within some seconds; None: wait for ever."""
        return bool(self._poll(timeout) & select.POLLIN)

    def _poll(self, timeout: float | None) -> int:
        poller = select.poll()
        poller.register(self._fd, select.POLLIN)
        wait = None if timeout is None else timeout * 1000
        return sum(events for _, events in poller.poll(wait))

    def receive(self, timeout: float | None = None, *, priority: int | None = None) -> Received:
        """The next message, or the most urgent that is at least so urgent; None: wait for ever.

        Raises TimeoutError after `timeout` seconds, OSError: ECONNRESET the connection has ended."""
        if not self._poll(timeout):
            raise TimeoutError(f"no message within {timeout} s")
        flags = 0 if priority is None else abi.RECV_USE_PRIORITY
        fixed = struct.pack("=2Qq4Q", flags, 0, priority or 0, 0, 0, 0, 0)
        got = self.command(abi.CMD_RECV, fixed)
        self.lost, offset = struct.unpack_from("=2Q", got, 32)
        """How many messages to all were lost before the last that was received: the pool was full."""
        return self._take(offset)

    def drop(self) -> None:
        """Throw away the next message; who called learns that no reply comes. Raises OSError EAGAIN."""
        self.command(abi.CMD_RECV, struct.pack("=2Qq4Q", abi.RECV_DROP, 0, 0, 0, 0, 0, 0))

    def _take(self, offset: int) -> Received:
        """The message at `offset`, with its descriptors."""
        assert self._pool is not None
        for at, fds in self._arrived():
            self._numbers[at] = fds
        try:
            return Received(self._pool, offset, self._numbers.pop(offset, ()))
        finally:
            self._free(offset)

    def _arrived(self) -> Iterator[tuple[int, list[int]]]:
        while self._socket is not None:
            try:
                record, fds = _receive(self._socket)
            except BlockingIOError:
                return
            if not record:
                return
            found = fds_of(record, fds)
            if found is not None:
                yield found

    # -- names and matches ---------------------------------------------------------------------

    def acquire(self, name: str, flags: int = 0) -> int:
        """Own a name, or with NAME_QUEUE wait for it. Returns NAME flags. Raises OSError: EEXIST,
        EALREADY, EPERM."""
        got = self.command(
            abi.CMD_NAME_ACQUIRE, struct.pack("=2Q", flags, 0), items.string(abi.ITEM_NAME, name)
        )
        return int(layout.U64.unpack_from(got, 16)[0])

    def release(self, name: str) -> None:
        """Raises OSError: ESRCH there is no such name, EADDRINUSE it is another's."""
        self.command(abi.CMD_NAME_RELEASE, bytes(16), items.string(abi.ITEM_NAME, name))

    def names(self, flags: int = abi.LIST_NAMES | abi.LIST_UNIQUE) -> dict[int, list[str]]:
        """Connections and the names of each, as far as LIST flags say and policy shows."""
        assert self._pool is not None
        got = self.command(abi.CMD_LIST, struct.pack("=4Q", flags, 0, 0, 0))
        offset, size = struct.unpack_from("=2Q", got, 24)
        found: dict[int, list[str]] = {}
        at = offset
        while at < offset + size:
            length, id, _ = layout.INFO.unpack_from(self._pool, at)
            owned = found.setdefault(id, [])
            for item in items.split(self._pool[at : at + length], layout.INFO.size):
                if item.type == abi.ITEM_OWNED_NAME:
                    owned.append(item.data[8:-1].decode())
            at += length
        self._free(offset)
        return found

    def info(self, who: int | str, attach_flags: int = abi.ATTACH_ANY) -> tuple[items.Item, ...]:
        """Metadata items of a connection. Raises OSError: ESRCH, ENXIO."""
        assert self._pool is not None
        name = [items.string(abi.ITEM_NAME, who)] if isinstance(who, str) else []
        id = 0 if isinstance(who, str) else who
        got = self.command(
            abi.CMD_CONN_INFO, struct.pack("=6Q", 0, 0, id, attach_flags, 0, 0), *name
        )
        offset, size = struct.unpack_from("=2Q", got, 40)
        found = items.split(self._pool[offset : offset + size], layout.INFO.size)
        self._free(offset)
        return found

    def add_match(self, cookie: int, *rules: bytes, replace: bool = False) -> None:
        """Get signals and notices that match all these items. Raises OSError: EMFILE, EDOM."""
        flags = abi.MATCH_REPLACE * replace
        self.command(abi.CMD_MATCH_ADD, struct.pack("=3Q", flags, 0, cookie), *rules)

    def add_rule(self, cookie: int, rule: str) -> None:
        """The same by a D-Bus match rule; more may come than it asks for, as bloom filters have it.

        Raises OSError, and ValueError if the rule is not valid."""
        wanted = match.parse(rule)
        for each in bloommatch.matches(self.bloom.size, self.bloom.n_hash, wanted):
            self.add_match(cookie, *(items.build(type, data) for type, data in each))

    def remove_match(self, cookie: int) -> None:
        """Remove all matches of a cookie. Raises OSError EBADSLT: there are none."""
        self.command(abi.CMD_MATCH_REMOVE, struct.pack("=3Q", 0, 0, cookie))

    def byebye(self) -> None:
        """End the connection, if nothing waits. Raises OSError EBUSY: there are messages."""
        self.command(abi.CMD_BYEBYE, bytes(16))
