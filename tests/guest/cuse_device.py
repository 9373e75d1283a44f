"""A character device with a server of its own, as small as can be, to see what the kernel does.

Struct layouts: linux/fuse.h, version 7.38. Independent of the product on purpose.
"""

from __future__ import annotations

import errno
import os
import select
import struct
from pathlib import Path
from typing import Any

from .child import Child, Say

IN_HEADER = struct.Struct("<IIQQIIIHH")  # len opcode unique nodeid uid gid pid extlen padding
OUT_HEADER = struct.Struct("<IiQ")  # len error unique
INIT, OPEN, READ, WRITE, RELEASE, INTERRUPT, IOCTL, POLL = 4096, 14, 15, 16, 18, 36, 39, 40
NAMES = {OPEN: "open", READ: "read", WRITE: "write", RELEASE: "release"}
NAMES |= {INTERRUPT: "interrupt", IOCTL: "ioctl", POLL: "poll"}
UNRESTRICTED_IOCTL = 1  # a flag of INIT's reply
RETRY = 4  # a flag of an ioctl's
MOST = 128 << 10  # bytes in a read, a write, and each way in a round of an ioctl

# What the ioctls of this device do; numbers that say nothing of a size or a direction. (Some small
# ones, such as 2, never reach a device.)
REVERSE, WAIT, HOLD = 0x9501, 0x9502, 0x9503
ERESTARTSYS = 512  # linux/errno.h: never seen by programs
POINTER = struct.Struct("<QQ")  # struct iovec, and what REVERSE's argument points to


class Device:
    """/dev/NAME, served by a child that tells of every request: {"is": ..., "uid", "pid", ...}.

    read gives what was written last, and blocks nobody. ioctl REVERSE reverses the bytes that its
    argument's POINTER points to; WAIT is answered when it is interrupted; HOLD never."""

    def __init__(self, name: str) -> None:
        self.path = Path("/dev", name)
        self.server = Child(serve, name)
        assert self.server.hear() == {"is": "ready"}

    def request(self, kind: str) -> Any:
        """What is told of the next request, which has to be of this kind."""
        told = self.server.hear()
        assert isinstance(told, dict) and told["is"] == kind, told
        return told

    def stop(self) -> None:
        self.server.kill()


def serve(say: Say, name: str) -> None:
    """The server's whole life; ends by an OSError when the kernel has no more requests."""
    fd = os.open("/dev/cuse", os.O_RDWR | os.O_CLOEXEC)
    _, opcode, unique, *_ = IN_HEADER.unpack_from(os.read(fd, MOST + 4096))
    assert opcode == INIT
    # major minor unused flags max_read max_write dev_major dev_minor spare
    head = struct.pack("<IIIIIIII10I", 7, 38, 0, UNRESTRICTED_IOCTL, MOST, MOST, 0, 0, *[0] * 10)
    _reply(fd, unique, head + f"DEVNAME={name}\0".encode())
    say({"is": "ready"})
    written = b""
    handles = 0
    sleeper: int | None = None
    while True:
        request = os.read(fd, MOST + 4096)
        _, opcode, unique, _, uid, gid, pid, _, _ = IN_HEADER.unpack_from(request)
        body = request[IN_HEADER.size :]
        told: dict[str, Any] = {"is": NAMES.get(opcode, opcode), "uid": uid, "gid": gid, "pid": pid}
        match opcode:
            case _ if opcode == OPEN:
                handles += 1
                told["handle"] = handles
                _reply(fd, unique, struct.pack("<QII", handles, 0, 0))
            case _ if opcode == READ:
                (told["size"],) = struct.unpack_from("<I", body, 16)
                _reply(fd, unique, written[: told["size"]])
                written = b""
            case _ if opcode == WRITE:
                written = body[40:]
                told["size"] = len(written)
                if sleeper is not None:
                    # Before the reply, so that who waits is woken by this and nothing else.
                    os.write(fd, OUT_HEADER.pack(24, 1, 0) + struct.pack("<Q", sleeper))
                    sleeper = None
                _reply(fd, unique, struct.pack("<II", len(written), 0))
            case _ if opcode == POLL:
                _, handle, flags, _ = struct.unpack_from("<QQII", body)
                if flags & 1:
                    sleeper = handle
                _reply(fd, unique, struct.pack("<II", select.POLLIN if written else 0, 0))
            case _ if opcode == RELEASE:
                (told["handle"],) = struct.unpack_from("<Q", body)
                _reply(fd, unique)
            case _ if opcode == IOCTL:
                _ioctl(fd, unique, body, told)
            case _ if opcode == INTERRUPT:
                # Of the ioctl, by its result; the header's error may not be one of these.
                (interrupted,) = struct.unpack_from("<Q", body)
                _reply(fd, interrupted, struct.pack("<iIII", -ERESTARTSYS, 0, 0, 0))
            case _:
                _reply(fd, unique, error=errno.ENOSYS)
        say(told)


def _ioctl(fd: int, unique: int, body: bytes, told: dict[str, Any]) -> None:
    _, _, command, argument, in_size, out_size = struct.unpack_from("<QIIQII", body)
    data = body[32:]
    told |= {"command": command, "in": in_size, "out": out_size}
    if command != REVERSE:
        return
    if in_size == 0:
        _retry(fd, unique, [(argument, POINTER.size)], [])
        return
    where, size = POINTER.unpack_from(data)
    if in_size == POINTER.size:
        _retry(fd, unique, [(argument, POINTER.size), (where, size)], [(where, size)])
        return
    answer = struct.pack("<iIII", size, 0, 0, 0)
    _reply(fd, unique, answer + data[POINTER.size :][::-1])


def _retry(
    fd: int, unique: int, inward: list[tuple[int, int]], outward: list[tuple[int, int]]
) -> None:
    head = struct.pack("<iIII", 0, RETRY, len(inward), len(outward))
    _reply(fd, unique, head + b"".join(POINTER.pack(*vector) for vector in inward + outward))


def _reply(fd: int, unique: int, body: bytes = b"", error: int = 0) -> None:
    os.write(fd, OUT_HEADER.pack(OUT_HEADER.size + len(body), -error, unique) + body)
