# ruff: noqa: F821  (names without a definition here come from libc.pxd)
"""The system calls of a device server that Python does not offer, straight from libc (libc.pxd).

Privileged: they reach into the caller of a request that is held. What they copy is not looked at. Each
may take as long as the memory that it touches takes to come, and other threads go on meanwhile: the
caller may have mapped a file of a file system that never answers. All raise OSError as the kernel says.
"""

from __future__ import annotations

import os

import cython
from cython.cimports.kbusd.supervisor.libc import (
    AT_EMPTY_PATH,
    AT_STATX_DONT_SYNC,
    SYS_pidfd_getfd,
    errno,
    iovec,
    process_vm_readv,
    process_vm_writev,
    statx,
    statx_t,
    syscall,
)
from cython.cimports.kbusd.supervisor.libc import mount as c_mount
from cython.cimports.kbusd.supervisor.libc import umount2 as c_umount2
from cython.cimports.libc.stdint import uint8_t, uint64_t

MAX_RANGES = 1024  # IOV_MAX


@cython.cfunc
def _failed():
    number: cython.int = errno
    return OSError(number, os.strerror(number))


@cython.cfunc
@cython.exceptval(-1, check=False)
def _copy(
    tid: cython.int, ranges: tuple, ours: uint8_t[::1], write: cython.bint
) -> cython.Py_ssize_t:
    """Between `ours` and these (address, bytes) of a thread's memory, one after another."""
    theirs: iovec[1024]
    mine: iovec
    done: cython.Py_ssize_t
    at: uint64_t
    size: cython.size_t
    total: cython.size_t = 0
    count: cython.ulong = 0
    if len(ranges) > MAX_RANGES:
        raise ValueError(f"{len(ranges)} ranges")
    for at, size in ranges:
        if size > cython.cast(cython.size_t, ours.shape[0]) - total:
            raise ValueError("the ranges are larger than what is there for them")
        theirs[count].iov_base = cython.cast(cython.p_void, at)
        theirs[count].iov_len = size
        total += size
        count += 1
    if total == 0:
        return 0
    mine.iov_base = cython.address(ours[0])
    mine.iov_len = total
    with cython.nogil:
        if write:
            done = process_vm_writev(tid, cython.address(mine), 1, theirs, count, 0)
        else:
            done = process_vm_readv(tid, cython.address(mine), 1, theirs, count, 0)
    if done < 0:
        raise _failed()
    return done


def read_memory(tid: cython.int, ranges: tuple, buffer: uint8_t[::1]):
    """process_vm_readv(2) of (address, bytes) into `buffer`, one after another. Returns how many
    bytes there were until the first that the thread does not have. EFAULT if there was none."""
    return _copy(tid, ranges, buffer, False)


def write_memory(tid: cython.int, ranges: tuple, data: bytes):
    """process_vm_writev(2), the same the other way."""
    return _copy(tid, ranges, bytearray(data), True)


def pidfd_getfd(pidfd: cython.int, number: cython.int):
    """pidfd_getfd(2): another process's descriptor, as one of ours, close-on-exec."""
    fd: cython.long
    with cython.nogil:
        fd = syscall(SYS_pidfd_getfd, pidfd, number, 0)
    if fd < 0:
        raise _failed()
    return fd


def devices_of(fd: cython.int, path: bytes = b""):
    """(device of the file system, device that the file is), of a descriptor or of an absolute path,
    without asking any file system: the one that this is about may be served by us, or by nobody. statx(2)."""
    found: statx_t
    name: cython.p_char = path
    done: cython.int
    with cython.nogil:
        done = statx(fd, name, AT_EMPTY_PATH | AT_STATX_DONT_SYNC, 0, cython.address(found))
    if done != 0:
        raise _failed()
    return (
        os.makedev(found.stx_dev_major, found.stx_dev_minor),
        os.makedev(found.stx_rdev_major, found.stx_rdev_minor),
    )


def mount(source: bytes, target: bytes, kind: bytes, flags: cython.ulong, options: bytes):
    """mount(2)."""
    if c_mount(source, target, kind, flags, cython.cast(cython.p_char, options)) != 0:
        raise _failed()


def umount(target: bytes, flags: cython.int):
    """umount2(2)."""
    if c_umount2(target, flags) != 0:
        raise _failed()
