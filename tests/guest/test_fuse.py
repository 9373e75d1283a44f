"""A FUSE mount of an ordinary user in a user namespace works, ioctl, poll and mmap included.

kdbusfs is one. The server here has one file, DATA long. Struct layouts: linux/fuse.h, version 7.38.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import select
import stat
import struct
from pathlib import Path
from typing import Any

import pytest

from .child import Child, Say
from .cuse_device import IN_HEADER, OUT_HEADER

pytestmark = pytest.mark.guest

USER = 1234
DATA = b"forty-two bytes that the server thought of"
ROOT, FILE = 1, 2
INIT, LOOKUP, GETATTR, OPEN, READ, RELEASE, IOCTL, POLL = 26, 1, 3, 14, 15, 18, 39, 40
CLONE_NEWNS, CLONE_NEWUSER = 0x20000, 0x10000000
COMMAND = 0x80049501  # _IOR(0x95, 1, __u32)

LIBC = ctypes.CDLL(None, use_errno=True)


def check(result: int) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def become_root_of_a_user_namespace() -> None:
    os.setgroups([])
    os.setresgid(USER, USER, USER)
    os.setresuid(USER, USER, USER)
    # A change of user makes us undumpable, and our files under /proc root's.
    LIBC.prctl(4, 1, 0, 0, 0)
    check(LIBC.unshare(CLONE_NEWUSER | CLONE_NEWNS))
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {USER} 1")
    Path("/proc/self/gid_map").write_text(f"0 {USER} 1")


def attributes(node: int) -> bytes:
    mode = stat.S_IFDIR | 0o755 if node == ROOT else stat.S_IFREG | 0o444
    # struct fuse_attr: ino size blocks, three times, their nanoseconds, then from mode to flags.
    return struct.pack("<6Q10I", node, 4096, 8, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)


def answer(opcode: int, node: int, body: bytes) -> bytes | int:
    """A reply's body, or an errno."""
    match opcode:
        case _ if opcode == INIT:
            readahead = struct.unpack_from("<I", body, 8)[0]
            return struct.pack(
                "<IIIIHHIIHHI7I", 7, 38, readahead, 0, 0, 0, 65536, 1, 0, 0, 0, *[0] * 7
            )
        case _ if opcode == LOOKUP:
            if body != b"file\0":
                return errno.ENOENT
            return struct.pack("<QQQQII", FILE, 0, 0, 0, 0, 0) + attributes(FILE)
        case _ if opcode == GETATTR:
            return struct.pack("<QII", 0, 0, 0) + attributes(node)
        case _ if opcode == OPEN:
            return struct.pack("<QII", 7, 0, 0)
        case _ if opcode == READ:
            offset, size = struct.unpack_from("<QI", body, 8)
            return DATA[offset : offset + size]
        case _ if opcode == IOCTL:
            handle, _, command, _, in_size, out_size = struct.unpack_from("<QIIQII", body)
            assert (handle, command, in_size, out_size) == (7, COMMAND, 0, 4)
            return struct.pack("<iIII", 5, 0, 0, 0) + b"four"
        case _ if opcode == POLL:
            return struct.pack("<II", select.POLLIN, 0)
        case _ if opcode == RELEASE:
            return b""
    return errno.ENOSYS


def serve(say: Say, mountpoint: str) -> None:
    """Mount, let a forked child of ours use it, and serve it until the child has let go."""
    become_root_of_a_user_namespace()
    fuse = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    options = f"fd={fuse},rootmode=40000,user_id=0,group_id=0".encode()
    check(LIBC.mount(b"kdbusfs", mountpoint.encode(), b"fuse", 0, options))
    if os.fork() == 0:
        os.close(fuse)
        os._exit(use(say, mountpoint))
    while True:
        request = os.read(fuse, 1 << 20)
        length, opcode, unique, node, *_ = IN_HEADER.unpack_from(request)
        reply = answer(opcode, node, request[IN_HEADER.size : length])
        body, error = (reply, 0) if isinstance(reply, bytes) else (b"", reply)
        os.write(fuse, OUT_HEADER.pack(OUT_HEADER.size + len(body), -error, unique) + body)
        if opcode == RELEASE:
            say("released")
            return


def use(say: Say, mountpoint: str) -> int:
    told: dict[str, Any] = {}
    fd = os.open(f"{mountpoint}/file", os.O_RDONLY)
    told["owner"] = os.fstat(fd).st_uid
    with mmap.mmap(fd, 4096, mmap.MAP_SHARED, mmap.PROT_READ) as memory:
        told["mmap"] = memory[: len(DATA)].decode()
    told["read"] = os.pread(fd, 10, 10).decode()
    buffer = ctypes.create_string_buffer(4)
    told["ioctl"] = [LIBC.ioctl(fd, ctypes.c_ulong(COMMAND), buffer), buffer.raw.decode()]
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    told["poll"] = [events for _, events in poll.poll(20_000)]
    say(told)
    os.close(fd)
    return 0


def test_an_ordinary_user_mounts_and_uses_a_file_system_of_its_own(tmp_path: Path) -> None:
    tmp_path.parent.chmod(0o755)
    child = Child(serve, str(tmp_path))
    try:
        told = child.hear()
        assert told == {
            "owner": 0,
            "mmap": DATA.decode(),
            "read": DATA[10:20].decode(),
            "ioctl": [5, "four"],
            "poll": [select.POLLIN],
        }
        assert child.hear() == "released"
    finally:
        child.kill()
