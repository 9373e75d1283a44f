# ruff: noqa: F821  (names without a definition here come from the .pxd)
"""The doorbell: a pipe that wakes a worker which sleeps.

Peers hold the write end. They can ring, also without end, but they cannot take away a ring that
another peer has given, as they could with an eventfd. What a ring means stands in the rings and
status pages; bytes in the pipe mean nothing.

Reader: `StatusPage.set_sleeping(True)` (store, seq_cst fence), look at all heads once more, sleep.
Writer: publish, `StatusView.sleeping` (seq_cst fence, load), ring if it sleeps. So one of the two
always sees the other.
"""

from __future__ import annotations

import os

import cython
from cython.cimports.kbusd.rings.libc import close, read, write
from cython.cimports.libc.stdint import uint8_t


def ring_doorbell(write_fd):
    """Ring. A full pipe rings already; a reader that is gone needs no ring."""
    write(write_fd, b"\1", 1)


def ring(write_fd: int) -> None:
    """`ring_doorbell` for Python."""
    ring_doorbell(write_fd)


@cython.cclass
class Doorbell:
    """Mine: `read_fd` to poll, `write_fd` to hand out. Raises OSError when made."""

    def __init__(self):
        self.read_fd = self.write_fd = -1
        self.read_fd, self.write_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def __dealloc__(self):
        if self.read_fd >= 0:
            close(self.read_fd)
            close(self.write_fd)

    def drain(self) -> cython.void:
        """Take what is in the pipe, up to 4 KiB: a flood does not keep us here."""
        buffer: uint8_t[4096]
        read(self.read_fd, buffer, 4096)

    def clear(self) -> None:
        """`drain` for Python."""
        self.drain()

    def fileno(self) -> int:
        return self.read_fd
