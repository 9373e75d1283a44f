# ruff: noqa: F821  (names without a definition here come from the .pxd)
"""Shared memory in sealed memfds (memfd_create(2), fcntl(2) "File Sealing").

A producer maps its memfd writable, then seals it: nobody can shrink it (which would kill a reader
with SIGBUS), grow it or map it writable any more. A consumer maps a descriptor from a peer only
after it has seen the seals and a sane size; it trusts nothing else about it.

A ring is mapped twice: one page of control words, the data, and the same data once more, so that
what wraps round is contiguous. Large bodies are sealed against any write and mapped privately.
"""

from __future__ import annotations

import os

import cython
from cython.cimports.kbusd.rings.libc import (
    _SC_PAGESIZE,
    EBUSY,
    EINVAL,
    F_ADD_SEALS,
    F_GET_SEALS,
    F_SEAL_FUTURE_WRITE,
    F_SEAL_GROW,
    F_SEAL_SEAL,
    F_SEAL_SHRINK,
    F_SEAL_WRITE,
    MAP_ANONYMOUS,
    MAP_FAILED,
    MAP_FIXED,
    MAP_NORESERVE,
    MAP_PRIVATE,
    MAP_SHARED,
    MFD_ALLOW_SEALING,
    MFD_CLOEXEC,
    MFD_NOEXEC_SEAL,
    PROT_NONE,
    PROT_READ,
    PROT_WRITE,
    errno,
    fcntl,
    fstat,
    ftruncate,
    memfd_create,
    mmap,
    munmap,
    stat_t,
    sysconf,
)
from cython.cimports.kbusd.rings.libc import close as c_close
from cython.cimports.libc.stdint import int64_t, uint8_t

PAGE = sysconf(_SC_PAGESIZE)
RING_SEALS = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_FUTURE_WRITE
LARGE_SEALS = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE
SEAL_TRIES = cython.declare(cython.int, 8)

_NAMES = {
    F_SEAL_SHRINK: "shrink",
    F_SEAL_GROW: "grow",
    F_SEAL_WRITE: "write",
    F_SEAL_FUTURE_WRITE: "future write",
}


class RingError(Exception):
    """A peer broke a rule of the rings, or shared memory could not be had; the text says which."""


# -- for C: no exceptions, -errno or NULL ------------------------------------------------------


def create(name, size) -> cython.int:
    """A new memfd of `size` bytes, not sealed yet, or -errno. No page of it exists yet."""
    fd: cython.int = memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING | MFD_NOEXEC_SEAL)
    if fd < 0 and errno == EINVAL:  # before Linux 6.3
        fd = memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING)
    if fd < 0:
        return -errno
    if ftruncate(fd, size) < 0:
        code: cython.int = errno
        c_close(fd)
        return -code
    return fd


def add_seals(fd, seals) -> cython.int:
    """Add `seals` and forbid more: 0 or -errno.

    Against writing it takes till nobody in the kernel holds a page of it, which is EBUSY after 0.16 s: who only
    looks at pages, as what counts their use does, may have lost its core."""
    tries: cython.int = 0
    while fcntl(fd, F_ADD_SEALS, seals | F_SEAL_SEAL) < 0:
        tries += 1
        if errno != EBUSY or tries == SEAL_TRIES:
            return -errno
    return 0


def sealed_size(fd, seals) -> int64_t:
    """The size of a memfd that has all of `seals`; -1 if it has not, or is none."""
    status: stat_t
    have: cython.int = fcntl(fd, F_GET_SEALS)
    if have < 0 or have & seals != seals or fstat(fd, cython.address(status)) < 0:
        return -1
    return status.st_size


def map_whole(fd, size, writable):
    """Map `size` bytes, shared; NULL if that fails."""
    where: cython.p_void = mmap(
        cython.NULL, size, PROT_READ | PROT_WRITE if writable else PROT_READ, MAP_SHARED, fd, 0
    )
    if where == MAP_FAILED:
        return cython.NULL
    return cython.cast(cython.pointer(uint8_t), where)


def map_twice(fd, size, writable):
    """Map a page of control words, `size` bytes of data, and the data again; NULL on failure."""
    protection: cython.int = PROT_READ | PROT_WRITE if writable else PROT_READ
    where: cython.p_void = mmap(
        cython.NULL,
        PAGE + 2 * size,
        PROT_NONE,
        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
        -1,
        0,
    )
    if where == MAP_FAILED:
        return cython.NULL
    base: cython.pointer(uint8_t) = cython.cast(cython.pointer(uint8_t), where)
    if (
        mmap(base, PAGE + size, protection, MAP_SHARED | MAP_FIXED, fd, 0) == MAP_FAILED
        or mmap(base + PAGE + size, size, protection, MAP_SHARED | MAP_FIXED, fd, PAGE)
        == MAP_FAILED
    ):
        munmap(where, PAGE + 2 * size)
        return cython.NULL
    return base


def unmap_whole(where, size):
    if where != cython.NULL:
        munmap(cython.cast(cython.p_void, where), size)


def unmap_twice(where, size):
    if where != cython.NULL:
        munmap(cython.cast(cython.p_void, where), PAGE + 2 * size)


def large_map(fd, size):
    """Map the first `size` bytes read-only; NULL unless sealed for good and large enough."""
    if size == 0 or sealed_size(fd, LARGE_SEALS) < cython.cast(int64_t, size):
        return cython.NULL
    # Private: a write-sealed memfd could not be mapped shared before Linux 6.7. Not populated: to
    # check most bodies takes a look at few pages.
    where: cython.p_void = mmap(cython.NULL, size, PROT_READ, MAP_PRIVATE, fd, 0)
    if where == MAP_FAILED:
        return cython.NULL
    return cython.cast(cython.pointer(uint8_t), where)


def large_unmap(where, size):
    unmap_whole(where, size)


# -- for Python --------------------------------------------------------------------------------


def make(name: str | bytes, size: int) -> int:
    """A new memfd of `size` bytes, not sealed yet. Raises OSError."""
    fd: cython.int = create(os.fsencode(name), size)
    if fd < 0:
        raise OSError(-fd, f"memfd {name!r} of {size} bytes: {os.strerror(-fd)}")
    return fd


def seal(fd: int) -> None:
    """Nobody can shrink, grow or newly map `fd` writable any more. Raises OSError."""
    code: cython.int = add_seals(fd, RING_SEALS)
    if code < 0:
        raise OSError(-code, f"sealing a memfd: {os.strerror(-code)}")


def check_seals(fd: int, lowest: int, highest: int) -> int:
    """The size of a peer's memfd, which must be sealed and `lowest` to `highest` bytes.

    Raises RingError naming the rule that it breaks."""
    return _check(fd, RING_SEALS, lowest, highest)


def check_sealed(fd: int, length: int) -> int:
    """The size of a memfd that nobody can write to any more and that has `length` bytes or more.

    Raises RingError naming the rule that it breaks."""
    return _check(fd, LARGE_SEALS, length, 1 << 62)


def _check(fd: cython.int, seals: cython.int, lowest: int64_t, highest: int64_t) -> int64_t:
    have: cython.int = fcntl(fd, F_GET_SEALS)
    if have < 0:
        raise RingError("a descriptor is no memfd, or cannot be sealed")
    for each, name in _NAMES.items():
        if seals & each and not have & each:
            raise RingError(f"a memfd is not sealed against {name}")
    size: int64_t = sealed_size(fd, seals)
    if not lowest <= size <= highest:
        raise RingError(f"a memfd has {size} bytes, not {lowest} to {highest}")
    return size


def sealed(name: str | bytes, data: bytes | memoryview) -> int:
    """A memfd that holds `data` and that nobody can change. Raises OSError."""
    fd = make(name, len(data))
    try:
        view = memoryview(data)
        while view.nbytes:
            view = view[os.write(fd, view) :]
        code: cython.int
        number: cython.int = fd
        with cython.nogil:
            code = add_seals(number, LARGE_SEALS)
        if code < 0:
            raise OSError(-code, f"sealing a memfd: {os.strerror(-code)}")
    except BaseException:
        os.close(fd)
        raise
    return fd


def read(fd: int, most: int = 1 << 62) -> bytes:
    """All bytes of a memfd made by `sealed`, not above `most`. Raises RingError, also unless nobody
    can change it."""
    size = _check(fd, LARGE_SEALS, 0, most)
    if size == 0:
        return b""
    # Mapped: the file offset is shared with the other processes that hold the memfd.
    where: cython.pointer(cython.const[uint8_t]) = large_map(fd, size)
    if where == cython.NULL:
        raise RingError("a sealed memfd could not be mapped")
    try:
        return cython.cast(cython.p_char, where)[:size]
    finally:
        large_unmap(where, size)
