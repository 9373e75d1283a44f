"""Clients that have no worker yet: who they are, and whose turn it is.

Privileged: who a client is, is the kernel's word at the time when it connected (unix(7)), and the
rest of the bus believes it. Reads nothing that a client wrote.
"""

from __future__ import annotations

import socket
from collections import Counter, deque
from collections.abc import Callable

from kbusd.rings.entries import Credentials, Share
from kbusd.rings.unread import dispose, hung_up
from kbusd.sandbox import kernel

# Who connects; or what a device does with (worker, credentials) when it is its turn.
Client = socket.socket | Callable[..., None]
_SO_PEERPIDFD = 77
# A Windows domain gives nobody more than 1015. Every worker has those of every connection; and 43,000, which a
# container's root may take, are more than a record between two processes has room for.
MAX_GROUPS = 1024
_STREAM = int(socket.SOCK_STREAM | socket.SOCK_NONBLOCK)


def accept(listening: socket.socket) -> socket.socket:
    """The next who connects, as a socket that never blocks: for the worker, which may not change that. Raises OSError."""
    return socket.socket(socket.AF_UNIX, _STREAM, 0, kernel.accept(listening.fileno()))


def credentials_of(client: socket.socket, endpoint: str = "") -> Credentials:
    """Who is at the other end, having come by `endpoint`. Raises OSError."""
    pid, uid, gid, groups, label = kernel.peer(client.fileno())
    # A socket does not tell capabilities.
    return Credentials(uid, gid, pid, groups, label, endpoint=endpoint, ipc_owner=uid == 0)


def pidfd_of(client: socket.socket) -> int:
    """A pidfd of the process that connected, from kernels since 6.5: not by its number, which may be
    another's by now. Raises OSError."""
    return client.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)


class Clients:
    """Clients that wait for a worker. The users, and the endpoints of each, take turns: who floods delays
    nobody but himself.

    `of` counts those of one. It goes up by `add`; who takes the next one lets it go down when that
    is gone. It is here for both, because whoever left while he waited is forgotten unseen."""

    def __init__(self) -> None:
        self.of: Counter[Share] = Counter()
        self._queues: dict[Share, deque[tuple[Credentials, Client]]] = {}  # in turn

    def waiting(self) -> int:
        return sum(map(len, self._queues.values()))

    def refusal(self, credentials: Credentials, limit: int) -> str:
        """Why one more of its uid, who may have so many, is not taken; "": it may wait."""
        if self.of[credentials.share] >= limit:
            return f"has {limit} connections already (limit max_connections_per_user)"
        too_many = len(credentials.groups) > MAX_GROUPS
        return f"is in more than {MAX_GROUPS} groups" if too_many else ""

    def add(self, credentials: Credentials, client: Client) -> None:
        self.of[credentials.share] += 1
        self._queues.setdefault(credentials.share, deque()).append((credentials, client))

    def next(self, may: Callable[[Share], bool]) -> tuple[Credentials, Client] | None:
        """The next client of a share that may have a worker now."""
        while (share := next(filter(may, self._queues), None)) is not None:
            queue = self._queues.pop(share)
            credentials, client = queue.popleft()
            if queue:
                self._queues[share] = queue  # behind the others
            if not isinstance(client, socket.socket) or not hung_up(client):
                return credentials, client
            dispose(client)
            self.of[share] -= 1
        return None
