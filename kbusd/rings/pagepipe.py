# ruff: noqa: F821  (names without a definition here come from the .pxd)
"""How the pages of a large body get from one client's socket to another's, uncopied.

    client's socket -> pipe of its worker -> carrier -> pipe of the receiver's worker -> its client's socket

splice(2) moves them, so that of four copies of a body two are saved, and neither worker touches it. A
pipe is its worker's alone: whoever else had an end could hold the pipe's lock (by splicing from a
silent socket, say) for as long as he likes, and we would hang in it. So what two workers share is a
*carrier*, a pair of sockets that the broker has made, of which each has one end; the locks of an
end are those of its owner.

What is in a carrier was there before its frame is sent, and nobody can take it out but the
receiver. But how much there is, is the sender's word: the receiver goes by that, and makes up for
what is missing (workers/output.py). Descriptors in a carrier would be closed by splice(2) in the
receiver's process, which may take for ever, so the kernel has to refuse them (SO_PASSRIGHTS, Linux 6.16, which the
broker sets); where it can't, large bodies go by the bulk area alone.

Nothing here blocks: the workers' filter demands SPLICE_F_NONBLOCK, and no socket of ours would.
"""

from __future__ import annotations

import cython
from cython.cimports.kbusd.rings.libc import EINTR, close, errno, fcntl, read, write

# A piece of up to 36 KiB that a client writes takes two slots of the pipe; small ones take one each. What
# finds no slot goes another way. Pages from a carrier take a slot each.
CAPACITY = cython.declare(cython.int, 512 * 1024)
# What a carrier holds, or as much as net.core.wmem_max allows; the kernel doubles it. The longest body
# that goes through one, and what the kernel counts besides.
CARRIED = cython.declare(cython.int, (1 << 20) + (1 << 18))


@cython.cclass
class PagePipe:
    """A pipe with both ends ours, in which are `inside` bytes. Owns the ends."""

    def __cinit__(self):
        self.read_fd = self.write_fd = -1

    def __dealloc__(self):
        if self.read_fd >= 0:
            close(self.read_fd)
        if self.write_fd >= 0:
            close(self.write_fd)

    def fill(self, source, most) -> cython.Py_ssize_t:
        """Move up to `most` bytes in: how many; 0 the socket `source` has ended, -EAGAIN it has
        nothing now, or the pipe is full, another -errno: no more can go this way."""
        moved: cython.Py_ssize_t
        while True:
            moved = splice(source, cython.NULL, self.write_fd, cython.NULL, most, SPLICE_F_NONBLOCK)
            if moved >= 0:
                self.inside += moved
                return moved
            if errno != EINTR:
                return -errno

    def full(self) -> cython.bint:
        """Whether nothing more can be moved in."""
        return not kbusd_ready(self.write_fd, POLLOUT)

    def pour(self, to) -> cython.Py_ssize_t:
        """Move out what the socket `to` takes of what is inside: how many bytes; -EAGAIN none now,
        another -errno it fails."""
        moved: cython.Py_ssize_t
        while True:
            moved = splice(
                self.read_fd, cython.NULL, to, cython.NULL, self.inside, SPLICE_F_NONBLOCK
            )
            if moved >= 0:
                self.inside -= moved
                return moved
            if errno != EINTR:
                return -errno

    def take(self, to) -> cython.void:
        """Copy out what is inside, all of it."""
        got: cython.Py_ssize_t
        while self.inside:
            got = read(self.read_fd, to, self.inside)
            if got > 0:
                to += got
                self.inside -= got
            elif got == 0 or errno != EINTR:
                return  # never: it is there, and `to` is ours

    def put(self, data, length) -> cython.void:
        """Copy `length` bytes in, or as many of them as there is room for."""
        got: cython.Py_ssize_t = write(self.write_fd, data, length)
        if got > 0:
            self.inside += got


@cython.cclass
class Carrier:
    """A descriptor of our end of a carrier. Owns it."""

    def __cinit__(self):
        self.fd = -1

    def __dealloc__(self):
        if self.fd >= 0:
            close(self.fd)

    def widen(self) -> cython.void:
        """Let our end send as much as useful, before the other takes it."""
        kbusd_widen(self.fd, CARRIED)

    def take(self, to, length) -> cython.bint:
        """Copy `length` bytes out; False if there are fewer."""
        got: cython.Py_ssize_t
        while length:
            got = read(self.fd, to, length)
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
@cython.exceptval(check=False)
def is_guarded(fd: cython.int) -> cython.bint:
    """Whether the kernel keeps descriptors out of our end of a carrier; no if there is none (-1)."""
    return fd >= 0 and not kbusd_takes_descriptors(fd)


@cython.cfunc
def make_carrier(fd: cython.int) -> Carrier:
    """Of our end of one, which stays the caller's; None if that is not guarded, or if there are no
    descriptors."""
    if not is_guarded(fd):
        return None
    carrier: Carrier = Carrier()
    carrier.fd = fcntl(fd, F_DUPFD_CLOEXEC, 0)
    if carrier.fd < 0:
        return None
    return carrier
