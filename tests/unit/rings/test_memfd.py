"""Seals: what a peer can not do to shared memory that we map, and what we refuse to map."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import threading

import pytest

from kbusd.rings import memfd
from kbusd.rings.broadcast import Broadcast, BroadcastReader
from kbusd.rings.memfd import RingError
from kbusd.rings.ring import Ring, RingReader
from kbusd.rings.status import StatusPage, StatusView

F_SEAL_FUTURE_WRITE = 0x10
PAGE = os.sysconf("SC_PAGESIZE")


def producers() -> list[Ring | Broadcast | StatusPage]:
    return [Ring(4 * PAGE), Broadcast(4 * PAGE), StatusPage()]


@pytest.mark.parametrize("which", range(3))
def test_nobody_can_shrink_grow_or_write_what_we_share(which: int) -> None:
    shared = producers()[which]
    size = os.fstat(shared.fd).st_size
    for length in (0, size - PAGE, size + PAGE):
        with pytest.raises(PermissionError):
            os.ftruncate(shared.fd, length)
    with pytest.raises(PermissionError):
        os.write(shared.fd, b"x")
    with pytest.raises(PermissionError):
        mmap.mmap(shared.fd, size)
    with pytest.raises(PermissionError):
        fcntl.fcntl(shared.fd, fcntl.F_ADD_SEALS, 0)


def test_a_read_only_mapping_stays_read_only() -> None:
    ring = Ring(PAGE)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.mprotect.argtypes = libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    where = libc.mmap(None, PAGE, mmap.PROT_READ, mmap.MAP_SHARED, ring.fd, 0)
    assert libc.mprotect(where, PAGE, mmap.PROT_READ | mmap.PROT_WRITE) == -1
    assert ctypes.get_errno() == errno.EACCES
    assert libc.munmap(where, PAGE) == 0


def test_a_large_body_is_what_it_was_when_it_was_sealed() -> None:
    fd = memfd.sealed("body", b"some bytes")
    try:
        assert memfd.read(fd) == b"some bytes"
        assert memfd.check_sealed(fd, 10) == 10
        with pytest.raises(PermissionError):
            os.pwrite(fd, b"x", 0)
        with pytest.raises(RingError, match="has 10 bytes"):
            memfd.check_sealed(fd, 11)
    finally:
        os.close(fd)


def test_an_empty_body() -> None:
    fd = memfd.sealed("body", b"")
    assert memfd.read(fd) == b""
    os.close(fd)


SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | F_SEAL_FUTURE_WRITE


@pytest.mark.parametrize(
    ("seals", "rule"),
    [
        (0, "not sealed against shrink"),
        (SEALS & ~fcntl.F_SEAL_SHRINK, "not sealed against shrink"),
        (SEALS & ~fcntl.F_SEAL_GROW, "not sealed against grow"),
        (SEALS & ~F_SEAL_FUTURE_WRITE, "not sealed against future write"),
    ],
)
def test_a_memfd_without_its_seals_is_refused(seals: int, rule: str) -> None:
    status = StatusPage()
    fd = memfd.make("peer", 2 * PAGE)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    with pytest.raises(RingError, match=rule):
        RingReader(fd, status, status.take_slot())
    with pytest.raises(RingError, match=rule):
        BroadcastReader(fd)
    with pytest.raises(RingError, match=rule):
        StatusView(fd)
    os.close(fd)


@pytest.mark.parametrize("size", [0, 8, PAGE, 4 * PAGE, 2 * PAGE + 8, 1 << 40])
def test_a_memfd_of_a_strange_size_is_refused(size: int) -> None:
    status = StatusPage()
    fd = memfd.make("peer", size)
    memfd.seal(fd)
    with pytest.raises(RingError, match="bytes"):
        RingReader(fd, status, status.take_slot())
    with pytest.raises(RingError, match="bytes"):
        BroadcastReader(fd)
    with pytest.raises(RingError, match="bytes"):
        StatusView(fd)
    os.close(fd)


def test_what_is_no_memfd_is_refused() -> None:
    status = StatusPage()
    read, write = os.pipe()
    null = os.open("/dev/null", os.O_RDONLY)
    file = os.open(__file__, os.O_RDONLY)
    for fd in (read, null, file, 10_000):
        with pytest.raises(RingError, match="no memfd"):
            RingReader(fd, status, status.take_slot())
        with pytest.raises(RingError, match="no memfd"):
            memfd.read(fd)
    for fd in (read, write, null, file):
        os.close(fd)


def test_a_ring_that_is_not_used_takes_no_memory() -> None:
    shared = producers()
    assert [os.fstat(each.fd).st_blocks * 512 for each in shared] == [0, 0, 0]


def test_the_mapping_outlives_the_descriptor() -> None:
    status = StatusPage()
    ring = Ring(PAGE)
    reader = RingReader(ring.fd, status, status.take_slot())
    ring.close_fd()
    assert ring.fd == -1
    ring.close_fd()
    from kbusd.rings.values import Frame

    assert ring.write(Frame(1, 1, b"e", b"b"))
    frame = reader.read()
    assert frame is not None
    assert (frame.envelope, frame.body) == (b"e", b"b")


def test_who_holds_a_page_for_a_moment_does_not_keep_us_from_sealing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What the kernel gives up waiting for, after 0.16 s, with EBUSY."""
    held, holder = os.pipe()
    others, other = os.pipe()
    busy = os.memfd_create("busy", os.MFD_ALLOW_SEALING)
    os.write(busy, bytes(PAGE))
    os.splice(busy, other, PAGE, offset_src=0)  # which holds the page, till it is read

    def let_go() -> None:
        for _ in range(2):  # as long as the kernel waits, twice
            with pytest.raises(OSError, match="busy"):
                fcntl.fcntl(busy, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
        os.read(held, PAGE)

    write = os.write

    def hold(fd: int, data: memoryview) -> int:
        done = write(fd, data)
        os.splice(fd, holder, PAGE, offset_src=0)
        thread.start()
        return done

    thread = threading.Thread(target=let_go)
    monkeypatch.setattr(os, "write", hold)
    try:
        fd = memfd.sealed("held", bytes(PAGE))
        assert memfd.check_sealed(fd, PAGE) == PAGE
        os.close(fd)
    finally:
        thread.join()
        for each in (held, holder, others, other, busy):
            os.close(each)
