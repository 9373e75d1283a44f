"""A connection's queue of received messages: in order of arrival, and by priority.

ipc/kdbus/queue.c. RECV takes the oldest message, or with USE_PRIORITY the oldest among those of the
lowest number, if that is not above the one asked for. What could not be queued is counted, and the
count is reported once.
"""

import errno
import heapq

import cython
from cython.cimports.libc.stdint import int64_t

from kbusd.kdbus.errors import Errno


@cython.cclass
class Queue:
    """Messages of a kind of the caller's choosing, each with a priority (lower is more urgent)."""

    def __init__(self):
        self._entries = {}  # arrival -> message
        self._urgent = []  # heap of (priority, arrival), some of them gone
        self._arrivals = 0
        self._lost = 0

    def __len__(self):
        return len(self._entries)

    def __iter__(self):
        """Each message with the ticket by which it is removed, the oldest first."""
        return iter(list(self._entries.items()))

    @property
    def readable(self):
        """Whether poll(2) is to say POLLIN: there is a message, or the loss of one to be told."""
        return bool(self._entries) or self._lost > 0

    @property
    def lost(self):
        """How many were lost since this was last told."""
        return self._lost

    def push(self, message, priority):
        """Queue a message; returns its ticket."""
        ticket: int64_t = self._arrivals
        self._arrivals += 1
        self._entries[ticket] = message
        heapq.heappush(self._urgent, (priority, ticket))
        return ticket

    def peek(self, priority=None):
        """The next message and its ticket: the oldest, or the most urgent if `priority` is given.

        Raises Errno EAGAIN if there is none, or none at least as urgent as `priority`.
        """
        if priority is None:
            for ticket in self._entries:
                return ticket, self._entries[ticket]
            raise Errno(errno.EAGAIN, "the queue is empty")
        while self._urgent:
            urgency, ticket = self._urgent[0]
            if ticket not in self._entries:
                heapq.heappop(self._urgent)
            elif urgency > priority:
                break
            else:
                return ticket, self._entries[ticket]
        raise Errno(errno.EAGAIN, f"the queue has no message of priority {priority} or better")

    def remove(self, ticket):
        """Take a message out, from wherever it stands."""
        message = self._entries.pop(ticket)
        if len(self._urgent) > 2 * len(self._entries) + 16:
            # Whoever never asks by priority leaves only dead entries here.
            self._urgent = [each for each in self._urgent if each[1] in self._entries]
            heapq.heapify(self._urgent)
        return message

    def lose(self):
        """Count a message that this connection should have got and did not."""
        self._lost += 1

    def take_lost(self):
        """How many were lost since this was last asked."""
        lost: int64_t = self._lost
        self._lost = 0
        return lost
