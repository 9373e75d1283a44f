"""What a reader that was overrun has taken out of a peer's Ring and not delivered yet.

Two queues: unicast frames, and copies of what it missed in the peer's Broadcast. Each is in the
order of stamps; between the two, the order is only known once all copies have come (fanout.py).
"""

from __future__ import annotations

from collections import deque

import cython
from cython.cimports.cpython.bytes import PyBytes_FromStringAndSize
from cython.cimports.kbusd.rings.frame import HEAD


@cython.cclass
class Held:
    """A frame copied out of shared memory."""


@cython.cclass
class CatchUp:
    """`held` is in bytes."""

    def __init__(self):
        self.unicast = deque()
        self.broadcast = deque()

    def keep(self, copy, head, payload) -> cython.void:
        """Append a frame; `payload` is copied."""
        frame: Held = Held()
        frame.head = head[0]
        frame.payload = PyBytes_FromStringAndSize(
            cython.cast(cython.p_char, payload), head.length - HEAD
        )
        self.held += head.length
        if copy:
            self.broadcast.append(frame)
        else:
            self.unicast.append(frame)

    def drop(self, copy) -> cython.void:
        """The first frame was delivered."""
        frame: Held = self.broadcast.popleft() if copy else self.unicast.popleft()
        self.held -= frame.head.length
