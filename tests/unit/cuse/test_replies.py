"""Replies and notifications, byte by byte; and that none is made which the kernel would refuse."""

from __future__ import annotations

import errno
import stat
import struct

import pytest

from kbusd.cuse import abi, replies
from kbusd.cuse.replies import Attributes, Entry


def opened(data: bytes, unique: int = 2) -> bytes:
    """What follows the head of a successful reply."""
    length, error, number = struct.unpack_from("=IiQ", data)
    assert (length, error, number) == (len(data), 0, unique)
    return data[16:]


def notice(data: bytes, code: int) -> bytes:
    length, number, unique = struct.unpack_from("=IiQ", data)
    assert (length, number, unique) == (len(data), code, 0)
    return data[16:]


def test_success_and_failure() -> None:
    assert opened(replies.reply(2, b"abc")) == b"abc"
    assert replies.failure(2, errno.ENOSYS) == struct.pack("=IiQ", 16, -errno.ENOSYS, 2)
    for bad in (0, -5, 512, 1000):
        with pytest.raises(ValueError, match="errno"):
            replies.failure(2, bad)


def test_init() -> None:
    data = opened(replies.init(2, 0xFFFFFFFF, 1 << 17, 1 << 20))
    assert len(data) == 64
    fields = struct.unpack_from("=4I2H2I2H", data)
    flags = abi.ASYNC_READ | abi.BIG_WRITES | abi.MAX_PAGES
    assert fields == (7, 31, 1 << 17, flags, 0xFFFF, 0xFFFF, 1 << 20, 1, 256, 0)
    assert struct.unpack_from("=4I2H2I2H", opened(replies.init(2, 0, 0, 4096)))[3:9] == (
        (0, 0xFFFF, 0xFFFF, 4096, 1, 0)
    )


def test_cuse_init() -> None:
    data = opened(replies.cuse_init(2, "kdbus/0-system/bus"))
    assert data[:72] == struct.pack("=8I40x", 7, 31, 0, 1, 131072, 131072, 0, 0)
    assert data[72:] == b"DEVNAME=kdbus/0-system/bus\0"


@pytest.mark.parametrize(
    "path", ["", "../x", "kdbus/../x", "/kdbus", "kdbus/", "a//b", "a\0b", "a b", "a=b\n", "é"]
)
def test_no_device_outside_of_dev(path: str) -> None:
    with pytest.raises(ValueError, match="device node"):
        replies.cuse_init(2, path)


NODE = Attributes(5, stat.S_IFREG | 0o600, 1000, 100, 4097)


def test_nodes() -> None:
    attributes = struct.pack(
        "=6Q10I", 5, 4097, 9, 0, 0, 0, 0, 0, 0, NODE.mode, 1, 1000, 100, 0, 4096, 0
    )
    assert opened(replies.attributes(2, NODE)) == struct.pack("=QII", 0, 0, 0) + attributes
    assert opened(replies.entry(2, NODE, generation=3, valid=1)) == (
        struct.pack("=4QII", 5, 3, 1, 1, 0, 0) + attributes
    )
    assert len(opened(replies.statfs(2, 4))) == 80
    assert opened(replies.opened(2, 9, abi.FOPEN_KEEP_CACHE)) == struct.pack("=QII", 9, 2, 0)
    assert opened(replies.written(2, 9)) == struct.pack("=II", 9, 0)


def test_directories() -> None:
    entries = [
        Entry(5, b"control", stat.S_IFREG, 1),
        Entry(6, b"0-system", stat.S_IFDIR, 2),
    ]
    first = struct.pack("=QQII", 5, 1, 7, 8) + b"control\0"
    second = struct.pack("=QQII", 6, 2, 8, 4) + b"0-system"
    assert opened(replies.directory(2, entries, 4096)) == first + second
    assert opened(replies.directory(2, entries, len(first) + len(second))) == first + second
    assert opened(replies.directory(2, entries, len(first) + len(second) - 1)) == first
    assert opened(replies.directory(2, entries, 5)) == b""


def test_ioctls() -> None:
    assert opened(replies.ioctl(2, 3, b"abc")) == struct.pack("=iIII", 3, 0, 0, 0) + b"abc"
    assert opened(replies.ioctl(2, -512)) == struct.pack("=iIII", -512, 0, 0, 0)
    data = opened(replies.ioctl_retry(2, [(0x1000, 8), (0x2000, 16)], [(0x1000, 8)]))
    assert data == struct.pack("=iIII6Q", 0, 4, 2, 1, 0x1000, 8, 0x2000, 16, 0x1000, 8)
    replies.ioctl_retry(2, [(0, 1)] * 128, [(0, 1)] * 128)
    for fetch, store in (
        ([(0, 1)] * 257, []),
        ([(0, 1)] * 128, [(0, 1)] * 129),
        ([(0, 131073)], []),
        ([], [(0, 65536), (0, 65537)]),
    ):
        with pytest.raises(ValueError, match="vectors"):
            replies.ioctl_retry(2, fetch, store)


def test_poll_and_notifications() -> None:
    assert opened(replies.poll(2, 5)) == struct.pack("=II", 5, 0)
    assert notice(replies.wake(44), 1) == struct.pack("=Q", 44)
    assert notice(replies.forget_pages(5), 2) == struct.pack("=Qqq", 5, 0, 0)
    assert notice(replies.forget_pages(5, -1), 2) == struct.pack("=Qqq", 5, -1, 0)
    assert notice(replies.forget_entry(1, b"bus"), 3) == struct.pack("=QII", 1, 3, 0) + b"bus\0"
    assert notice(replies.store(5, 4096, b"abc"), 4) == (
        struct.pack("=QQII", 5, 4096, 3, 0) + b"abc"
    )
