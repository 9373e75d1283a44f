# ruff: noqa: F821  (names without a definition here come from the .pxd)
"""The doorbell: a stream socketpair of two workers, by which each wakes the other when it sleeps.

The broker makes it when they are introduced, and nobody else has an end. So nobody can take away a ring that
another has given, as with an eventfd; and nobody can make who rings wait, as with a pipe, whose lock is held by
whoever moves something in it for as long as he likes: send(2) takes no lock of the other end's. What a ring means
stands in the rings and status pages; the bytes mean nothing.

Reader: `StatusPage.set_sleeping(True)` (store, seq_cst fence), look at all heads once more, sleep.
Writer: publish, `StatusView.sleeping` (seq_cst fence, load), ring if it sleeps. So one of the two
always sees the other.

The other end is hostile, and may send descriptors along, over this socket or another that the two share. Those
that are received and not taken, or left when the socket is closed, the kernel closes, in the thread that does so,
and that may take for ever: of a socket that lingers (SO_LINGER), of a file whose file system does not answer. So
whatever comes is looked at first. (From Linux 6.16 on the broker has the kernel refuse them.)
"""

from __future__ import annotations

from collections.abc import Sequence

import cython
from cython.cimports.kbusd.rings.libc import EAGAIN, EINTR, close, errno
from cython.cimports.libc.stdint import uint8_t

PIECES = cython.declare(cython.int, 256)  # 4 MiB: more than the kernel lets anybody have on the way


def ring_doorbell(bell):
    """Ring. One that is full rings already; who is gone needs no ring."""
    send(bell, b"\1", 1, MSG_DONTWAIT | MSG_NOSIGNAL)


def ring(bell: int) -> None:
    """`ring_doorbell` for Python."""
    ring_doorbell(bell)


def hear(bell):
    """What was rung is heard, up to 512 times: a flood does not keep us here."""
    buffer: uint8_t[512]
    return _take(bell, buffer, 512)


def heard(bell: int) -> bool:
    """`hear` for Python: whether it may ring again. Raises ValueError if descriptors came."""
    found: Heard = hear(bell)
    if found == GIFTS:
        raise ValueError("descriptors came with a bell")
    return found == RUNG


@cython.cfunc
@cython.exceptval(check=False)
def _take(fd: cython.int, to: cython.pointer(uint8_t), size: cython.size_t) -> Heard:
    """Take up to so many bytes, if no descriptors are with them."""
    gifts: cython.int
    found: cython.Py_ssize_t = kbusd_look(fd, to, size, cython.address(gifts))
    if found < 0:
        return RUNG if errno == EAGAIN or errno == EINTR else OVER
    if found == 0:
        return OVER
    if gifts:
        return GIFTS
    recv(fd, to, found, MSG_DONTWAIT)  # the same bytes: nobody else reads here
    return RUNG


def part(fd: int) -> bool:
    """Close a stream socket that somebody hostile has the other end of, or, False, leave it open for good:
    what he has left in it may take for ever to be closed. He hears that we are gone. Any other descriptor is
    closed."""
    pieces: cython.int = 0
    buffer: uint8_t[16384]
    found: Heard = RUNG
    if shutdown(fd, SHUT_RDWR) == 0:  # from here on nothing more comes
        while found == RUNG and pieces < PIECES:
            found = _take(fd, buffer, 16384)
            pieces += 1
        if found != OVER:
            return False
    close(fd)
    return True


def part_all(fds: Sequence[int]) -> int:
    """`part` of each; how many stay open."""
    return sum(not part(fd) for fd in fds)
