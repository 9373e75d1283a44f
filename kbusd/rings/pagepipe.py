# ruff: noqa: F821  (names without a definition here come from the .pxd)
"""A pipe by which the pages of a large body get from one client's socket to another's, uncopied.

The sender's worker splices what its client has written into the pipe, the receiver's worker from
there into its client's socket: of four copies of a body two are saved, and neither worker touches
it. What is in the pipe was there before its frame is sent, and a pipe has no memory that somebody
could take away; but the sender keeps the end to read from, since a message may turn out to be for
somebody else when it is complete. So a hostile one can take back what it has announced: the
receiver goes by the length that was announced, whatever comes (workers/output.py).

Nothing here blocks. Of splice(2) the workers' filter demands SPLICE_F_NONBLOCK: the kernel holds
the pipe's lock while it waits for a socket, and the other end would hang with it.
"""

from __future__ import annotations

import cython
from cython.cimports.kbusd.rings.libc import EAGAIN, EINTR, close, errno, fcntl, read

from kbusd.rings.memfd import RingError

# A piece that came at once takes one slot of the pipe, or two, and is of up to 48 KiB; small ones
# take a slot of a page each. What finds no slot goes another way.
CAPACITY = cython.declare(cython.int, 512 * 1024)


@cython.cclass
class PagePipe:
    """The sender's has both ends, the receiver's `read_fd` alone. Owns them."""

    def __cinit__(self):
        self.read_fd = self.write_fd = -1

    def __dealloc__(self):
        if self.read_fd >= 0:
            close(self.read_fd)
        if self.write_fd >= 0:
            close(self.write_fd)

    def empty(self) -> cython.bint:
        """Whether nothing is in it."""
        return not kbusd_ready(self.read_fd, POLLIN)

    def fill(self, source, most) -> cython.Py_ssize_t:
        """Move up to `most` bytes in: how many; 0 the socket `source` has ended, -EAGAIN it has
        nothing now, or the pipe is full, another -errno: no more can go this way."""
        moved: cython.Py_ssize_t = splice(
            source, cython.NULL, self.write_fd, cython.NULL, most, SPLICE_F_NONBLOCK
        )
        if moved >= 0:
            return moved
        if errno == EINTR:
            return -EAGAIN
        return -errno

    def full(self) -> cython.bint:
        """Whether nothing more can be moved in."""
        return not kbusd_ready(self.write_fd, POLLOUT)

    def pour(self, to, most) -> cython.Py_ssize_t:
        """Move up to `most` bytes out: how many; 0 there are none, -EAGAIN the socket `to` takes
        nothing now, another -errno it fails."""
        moved: cython.Py_ssize_t
        while True:
            moved = splice(self.read_fd, cython.NULL, to, cython.NULL, most, SPLICE_F_NONBLOCK)
            if moved >= 0:
                return moved
            if errno == EAGAIN and self.empty():
                return 0
            if errno != EINTR:
                return -errno

    def take(self, to, length) -> cython.bint:
        """Copy `length` bytes out; False if there are fewer."""
        got: cython.Py_ssize_t
        while length:
            got = read(self.read_fd, to, length)
            if got < 0 and errno == EINTR:
                continue
            if got <= 0:
                return False
            to += got
            length -= got
        return True


@cython.cfunc
def make_pipe() -> PagePipe:
    """A new one; None if there are no descriptors, or our user has too many pipes that large."""
    ends: cython.int[2]
    pipe: PagePipe = PagePipe()
    if pipe2(ends, O_NONBLOCK | O_CLOEXEC):
        return None
    pipe.read_fd = ends[0]
    pipe.write_fd = ends[1]
    if fcntl(pipe.write_fd, F_SETPIPE_SZ, CAPACITY) < 0:
        return None
    return pipe


@cython.cfunc
def adopt(fd: cython.int) -> PagePipe:
    """The receiver's, of a descriptor that is its own from now on. Raises RingError if that is no
    pipe, or one that could be waited for; then it stays the caller's."""
    flags: cython.int = fcntl(fd, F_GETFL)
    if not kbusd_is_pipe(fd) or flags < 0 or not flags & O_NONBLOCK:
        raise RingError("what should be a pipe is none, or would block")
    pipe: PagePipe = PagePipe()
    pipe.read_fd = fd
    return pipe
