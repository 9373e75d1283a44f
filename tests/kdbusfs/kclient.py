"""A kdbus client: opens a node, speaks the ioctl ABI, maps its pool. For tests.

Numbers and layouts are the codec's; memory, ioctl and mmap are used as a program of 2015 would. Buffers are
aligned to 8 bytes, which fcntl.ioctl's are not.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import select
import socket
import stat
import struct
import time
from typing import Any

from kbusd.kdbus import abi, attach, items, layout

LIBC = ctypes.CDLL(None, use_errno=True)
POOL = 1 << 20


class Buffer:
    """Bytes at a fixed, aligned address."""

    def __init__(self, data: bytes) -> None:
        self._words = (ctypes.c_uint64 * (len(data) // 8 + 1))()
        self.address = ctypes.addressof(self._words)
        self.size = len(data)
        ctypes.memmove(self.address, data, len(data))

    @property
    def bytes(self) -> bytes:
        return ctypes.string_at(self.address, self.size)


def ioctl(fd: int, command: int, address: int) -> int:
    """ioctl(2). Raises OSError."""
    result = LIBC.ioctl(fd, ctypes.c_ulong(command), ctypes.c_void_p(address))
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return int(result)


class Message:
    """A message in a pool; `fds` came with it over the socket, memfds first, and are closed."""

    def __init__(self, pool: mmap.mmap, offset: int, fds: list[int] | None = None) -> None:
        head = pool[offset : offset + layout.MESSAGE.size]
        (self.size, self.flags, self.priority, self.dst, self.src, self.payload_type,
         self.cookie, self.reply) = layout.MESSAGE.unpack(head)  # fmt: skip
        self.items = items.split(pool[offset : offset + self.size], layout.MESSAGE.size)
        self.payload = b""
        for item in self.items:
            if item.type == abi.ITEM_PAYLOAD_OFF:
                size, at = layout.VECTOR.unpack(item.data)
                start = offset + at
                self.payload += bytes(size) if at == abi.NO_OFFSET else pool[start : start + size]
            elif item.type == abi.ITEM_PAYLOAD_MEMFD and fds:
                start, size, _, _ = layout.MEMFD.unpack(item.data)
                self.payload += os.pread(fds[0], size, start)
                os.close(fds.pop(0))
        for fd in fds or ():
            os.close(fd)

    def item(self, type: int) -> bytes | None:
        """The data of the first item of a type."""
        return next((item.data for item in self.items if item.type == type), None)


class KdbusClient:
    """One open node, and with `hello` a connection."""

    def __init__(self, path: str, hello: bool = True, **how: Any) -> None:
        self.fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self.id = 0
        if hello:
            self.hello(**how)

    def __enter__(self) -> KdbusClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self.fd >= 0:
            if self.id:
                self.pool.close()
            os.close(self.fd)
            self.fd = -1

    def do(self, command: int, fixed: bytes, *chain: bytes) -> bytes:
        """Carry out a command whose fields after `size` are `fixed`; what its struct has become."""
        self.buffer = Buffer(items.command(bytes(8) + fixed, chain))
        ioctl(self.fd, command, self.buffer.address)
        return self.buffer.bytes

    def attach(self) -> None:
        """Name a socket, over which the pool comes if the node can't be mapped."""
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.setblocking(False)  # what is to come is there when the ioctl returns
        with theirs:
            got = self.do(attach.COMMAND, struct.pack("=3Q", 0, 0, theirs.fileno()))
        (self.attach_flags,) = struct.unpack_from("=Q", got, 16)

    def map(self, size: int) -> mmap.mmap:
        """The pool."""
        if not stat.S_ISCHR(os.fstat(self.fd).st_mode):
            return mmap.mmap(self.fd, size, mmap.MAP_SHARED, mmap.PROT_READ)
        record, (memfd,), *_ = socket.recv_fds(self.socket, 64, 4)
        assert struct.unpack("=2Q", record) == (1, size)
        try:
            return mmap.mmap(memfd, size, mmap.MAP_SHARED, mmap.PROT_READ)
        finally:
            os.close(memfd)

    def hello(
        self, flags: int = 0, send: int = 0, recv: int = 0, size: int = POOL,
        chain: tuple[bytes, ...] = (),
    ) -> None:  # fmt: skip
        if stat.S_ISCHR(os.fstat(self.fd).st_mode):
            self.attach()
        fixed = struct.pack("=9Q", flags, 0, send, recv, 0, 0, size, 0, 0) + bytes(16)
        got = self.do(abi.CMD_HELLO, fixed, *chain)
        self.id, _, offset, length = struct.unpack_from("=4Q", got, 48)
        self.uuid = got[80:96]
        self.pool = self.map(size)
        (self.bloom,) = items.split(self.pool[offset : offset + length], 0)
        if not flags & abi.HELLO_POLICY_HOLDER:  # which has no FREE
            self.free(offset)

    def update(self, *chain: bytes) -> None:
        self.do(abi.CMD_UPDATE, bytes(16), *chain)

    def info(self, id: int = 0, name: str = "", flags: int = abi.ATTACH_ALL) -> dict[int, bytes]:
        """CONN_INFO: the items by type."""
        fixed = struct.pack("=6Q", 0, 0, id, flags, 0, 0)
        chain = [items.string(abi.ITEM_NAME, name)] if name else []
        got = self.do(abi.CMD_CONN_INFO, fixed, *chain)
        offset, size = struct.unpack_from("=2Q", got, 40)
        (_, self.found, self.found_flags) = layout.INFO.unpack(
            self.pool[offset : offset + layout.INFO.size]
        )
        found = items.split(self.pool[offset : offset + size], layout.INFO.size)
        self.free(offset)
        return {item.type: item.data for item in found}

    def free(self, offset: int) -> None:
        self.do(abi.CMD_FREE, struct.pack("=3Q", 0, 0, offset))

    def byebye(self) -> None:
        self.do(abi.CMD_BYEBYE, bytes(16))

    def acquire(self, name: str, flags: int = 0) -> int:
        """NAME_ACQUIRE; returns the flags that it returns."""
        fixed = struct.pack("=2Q", flags, 0)
        got = self.do(abi.CMD_NAME_ACQUIRE, fixed, items.string(abi.ITEM_NAME, name))
        return int(layout.U64.unpack_from(got, 16)[0])

    def release(self, name: str) -> None:
        self.do(abi.CMD_NAME_RELEASE, bytes(16), items.string(abi.ITEM_NAME, name))

    def add_match(self, *rules: bytes, cookie: int = 1) -> None:
        self.do(abi.CMD_MATCH_ADD, struct.pack("=3Q", 0, 0, cookie), *rules)

    def send(
        self, dst: int, payload: bytes = b"", *chain: bytes, flags: int = 0, cookie: int = 1,
        reply: int = 0, sync: bool = False, priority: int = 0, cancel: bytes = b"",
    ) -> tuple[int, int]:  # fmt: skip
        """Send a message; the offset and size of the reply, if it is `sync`."""
        data = Buffer(payload)
        if payload:
            vector = layout.VECTOR.pack(data.size, data.address)
            chain = (items.build(abi.ITEM_PAYLOAD_VEC, vector), *chain)
        fixed = layout.MESSAGE.pack(0, flags, priority, dst, 0, abi.PAYLOAD_DBUS, cookie, reply)
        message = Buffer(items.command(fixed, chain))
        sent = struct.pack("=6Q", abi.SEND_SYNC_REPLY * sync, 0, message.address, 0, 0, 0)
        offset, size = struct.unpack_from("=2Q", self.do(abi.CMD_SEND, sent, cancel), 32)
        return offset, size

    def call(
        self, dst: int, payload: bytes, *chain: bytes, seconds: float = 5.0, **how: Any
    ) -> Message:
        """Send and wait for the reply."""
        until = time.monotonic_ns() + int(seconds * 1e9)
        how = {"flags": abi.MSG_EXPECT_REPLY, "reply": until, "sync": True} | how
        offset, _ = self.send(dst, payload, *chain, **how)
        message = Message(self.pool, offset)
        self.free(offset)
        return message

    def recv(self, flags: int = 0, seconds: float = 5.0) -> Message:
        """The next message, within some time. Raises OSError, TimeoutError."""
        if not self.readable(seconds):
            raise TimeoutError(f"no message within {seconds} s")
        return self.recv_now(flags)

    def recv_now(self, flags: int = 0) -> Message:
        """The next message, which is there. Raises OSError."""
        got = self.do(abi.CMD_RECV, struct.pack("=2Qq4Q", flags, 0, 0, 0, 0, 0, 0))
        self.dropped, offset, _, self.return_flags = struct.unpack_from("=4Q", got, 32)
        message = Message(self.pool, offset, self._handed())
        self.free(offset)
        return message

    def _handed(self) -> list[int]:
        """The descriptors of the message that was just received, if there is a socket."""
        with contextlib.suppress(BlockingIOError):
            if hasattr(self, "socket"):
                return socket.recv_fds(self.socket, 64, 253)[1]
        return []

    def readable(self, seconds: float = 0.0) -> bool:
        """Whether poll(2) says that there is a message, within some time."""
        poller = select.poll()
        poller.register(self.fd, select.POLLIN)
        return any(events & select.POLLIN for _, events in poller.poll(seconds * 1000))

    def list(self, flags: int) -> dict[int, list[str]]:
        """The names of each connection that LIST shows."""
        found: dict[int, list[str]] = {}
        for id, name, _ in self.entries(flags):
            found.setdefault(id, []).extend([name] if name else [])
        return found

    def entries(self, flags: int) -> list[tuple[int, str, int]]:
        """What LIST shows: connection, name or "", NAME flags."""
        got = self.do(abi.CMD_LIST, struct.pack("=4Q", flags, 0, 0, 0))
        offset, size = struct.unpack_from("=2Q", got, 24)
        found: list[tuple[int, str, int]] = []
        at = offset
        while at < offset + size:
            length, id, _ = layout.INFO.unpack(self.pool[at : at + layout.INFO.size])
            names = items.split(self.pool[at : at + length], layout.INFO.size)
            found += [(id, n.data[8:-1].decode(), *layout.U64.unpack(n.data[:8])) for n in names]
            found += [] if names else [(id, "", 0)]
            at += length
        self.free(offset)
        return found
