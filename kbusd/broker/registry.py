"""Who owns which well-known name, and who waits for it.

A name's queue is a list of claims, the owner first. The rules are those of the D-Bus
specification, "Message Bus Names", where it is silent those of dbus-daemon 1.14:

1. Asking again for a name that one owns changes the flags and nothing else (4).
2. The owner is replaced if it allows replacement and the asker wants it. The old owner goes
   to the head of the waiters, or leaves if it said DO_NOT_QUEUE.
3. Otherwise an asker with DO_NOT_QUEUE gets 3 and loses its place, if it waited.
4. Otherwise it waits (2): at the head if it said REPLACE_EXISTING, else where it was or last.

Nothing here decides *whether* a connection may have a name but the number of its names; the
caller asks policy. Changes of owner are returned, for the log.
"""

from __future__ import annotations

from dataclasses import dataclass

from kbusd.broker.connection import Connection

ALLOW_REPLACEMENT = 1
REPLACE_EXISTING = 2
DO_NOT_QUEUE = 4

PRIMARY_OWNER = 1
IN_QUEUE = 2
EXISTS = 3
ALREADY_OWNER = 4

RELEASED = 1
NON_EXISTENT = 2
NOT_OWNER = 3


@dataclass(slots=True)
class Claim:
    """One place in a name's queue."""

    connection: Connection
    flags: int


@dataclass(frozen=True, slots=True)
class Change:
    """A name passed from `old` to `new`; None is nobody."""

    name: str
    old: Connection | None
    new: Connection | None


class Registry:
    """All well-known names of a bus."""

    def __init__(self) -> None:
        self.queues: dict[str, list[Claim]] = {}

    def owner(self, name: str) -> Connection | None:
        queue = self.queues.get(name)
        return queue[0].connection if queue else None

    def waiters(self, name: str) -> list[Connection]:
        """The owner and those who wait, in order; empty for a name that nobody owns."""
        return [claim.connection for claim in self.queues.get(name, ())]

    def request(self, connection: Connection, name: str, flags: int) -> tuple[int, Change | None]:
        """RequestName; returns its result code and what changed."""
        queue = self.queues.get(name)
        if queue is None:
            self.queues[name] = [Claim(connection, flags)]
            connection.names.append(name)
            return PRIMARY_OWNER, Change(name, None, connection)
        owner = queue[0]
        if owner.connection is connection:
            owner.flags = flags
            return ALREADY_OWNER, None
        mine = next((claim for claim in queue if claim.connection is connection), None)
        if flags & REPLACE_EXISTING and owner.flags & ALLOW_REPLACEMENT:
            return PRIMARY_OWNER, self._replace(name, queue, mine, connection, flags)
        if flags & DO_NOT_QUEUE:
            if mine is not None:
                self._leave(name, queue, mine)
            return EXISTS, None
        if mine is None:
            mine = Claim(connection, flags)
            connection.names.append(name)
            queue.append(mine)
        mine.flags = flags
        if flags & REPLACE_EXISTING:
            queue.remove(mine)
            queue.insert(1, mine)
        return IN_QUEUE, None

    def release(self, connection: Connection, name: str) -> tuple[int, Change | None]:
        """ReleaseName; returns its result code and what changed."""
        queue = self.queues.get(name)
        if queue is None:
            return NON_EXISTENT, None
        for claim in queue:
            if claim.connection is connection:
                return RELEASED, self._leave(name, queue, claim)
        return NOT_OWNER, None

    def _replace(
        self,
        name: str,
        queue: list[Claim],
        mine: Claim | None,
        connection: Connection,
        flags: int,
    ) -> Change:
        old = queue[0]
        if mine is None:
            mine = Claim(connection, flags)
            connection.names.append(name)
        else:
            queue.remove(mine)
            mine.flags = flags
        queue.insert(0, mine)
        if old.flags & DO_NOT_QUEUE:
            queue.remove(old)
            old.connection.names.remove(name)
        return Change(name, old.connection, connection)

    def _leave(self, name: str, queue: list[Claim], claim: Claim) -> Change | None:
        was_owner = queue[0] is claim
        queue.remove(claim)
        claim.connection.names.remove(name)
        if not queue:
            del self.queues[name]
        if not was_owner:
            return None
        return Change(name, claim.connection, queue[0].connection if queue else None)
