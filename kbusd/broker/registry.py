"""Who owns which well-known name, and who waits for it.

A name's queue is a list of claims, the owner first. The rules are those of the D-Bus
specification, "Message Bus Names", where it is silent those of dbus-daemon 1.14:

1. Asking again for a name that one owns changes the flags and nothing else (4).
2. The owner is replaced if it allows replacement and the asker wants it. The old owner goes
   to the head of the waiters, or leaves if it said DO_NOT_QUEUE.
3. Otherwise an asker with DO_NOT_QUEUE gets 3 and loses its place, if it waited.
4. Otherwise it waits (2): at the head if it said REPLACE_EXISTING, else where it was or last.

Nothing here decides *whether* a connection may have a name but the number of its names; the
caller asks policy. Changes of a queue are returned, for the log.
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
    """A name passed from `old` to `new`, None is nobody; or these are the same and only its queue
    is another. `waiting` has those who wait for it now, the next owner first."""

    name: str
    old: Connection | None
    new: Connection | None
    waiting: tuple[Connection, ...] = ()


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
        before = self.waiters(name)
        queue = self.queues.setdefault(name, [])
        code = self._request(name, queue, connection, flags)
        return code, self._change(name, before)

    def _request(self, name: str, queue: list[Claim], connection: Connection, flags: int) -> int:
        if not queue:
            queue.append(Claim(connection, flags))
            connection.names.append(name)
            return PRIMARY_OWNER
        owner = queue[0]
        if owner.connection is connection:
            owner.flags = flags
            return ALREADY_OWNER
        mine = next((claim for claim in queue if claim.connection is connection), None)
        if flags & REPLACE_EXISTING and owner.flags & ALLOW_REPLACEMENT:
            self._replace(name, queue, mine, connection, flags)
            return PRIMARY_OWNER
        if flags & DO_NOT_QUEUE:
            if mine is not None:
                self._leave(name, queue, mine)
            return EXISTS
        if mine is None:
            mine = Claim(connection, flags)
            connection.names.append(name)
            queue.append(mine)
        mine.flags = flags
        if flags & REPLACE_EXISTING:
            queue.remove(mine)
            queue.insert(1, mine)
        return IN_QUEUE

    def release(self, connection: Connection, name: str) -> tuple[int, Change | None]:
        """ReleaseName; returns its result code and what changed."""
        queue = self.queues.get(name)
        if queue is None:
            return NON_EXISTENT, None
        before = self.waiters(name)
        for claim in queue:
            if claim.connection is connection:
                self._leave(name, queue, claim)
                return RELEASED, self._change(name, before)
        return NOT_OWNER, None

    def _replace(
        self,
        name: str,
        queue: list[Claim],
        mine: Claim | None,
        connection: Connection,
        flags: int,
    ) -> None:
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

    def _leave(self, name: str, queue: list[Claim], claim: Claim) -> None:
        queue.remove(claim)
        claim.connection.names.remove(name)
        if not queue:
            del self.queues[name]

    def _change(self, name: str, before: list[Connection]) -> Change | None:
        """What there is to say of a name whose owner and waiters were `before`."""
        after = self.waiters(name)
        if after == before:
            return None
        old, new = before[0] if before else None, after[0] if after else None
        return Change(name, old, new, tuple(after[1:]))
