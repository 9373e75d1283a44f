"""Who owns which well-known name, and who waits for it.

A name's queue is a list of claims, the owner first. The rules are those of the D-Bus
specification, "Message Bus Names", where it is silent those of dbus-daemon 1.14:

1. Asking again for a name that one owns changes the flags and nothing else (4).
2. The owner is replaced if it allows replacement and the asker wants it. The old owner goes
   to the head of the waiters, or leaves if it said DO_NOT_QUEUE.
3. Otherwise an asker with DO_NOT_QUEUE gets 3 and loses its place, if it waited.
4. Otherwise it waits (2): at the head if it said REPLACE_EXISTING, else where it was or last.
5. An activator (kdbus.connection(7)) stands behind all claims: it has the name while there are none.
   A name has one activator at most, a connection is that of one name at most.

Nothing here decides *whether* a connection may have a name but the number of its names; the
caller asks policy. Changes of a queue are returned, for the log.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from kbusd.broker.connection import Connection

ALLOW_REPLACEMENT = 1
REPLACE_EXISTING = 2
DO_NOT_QUEUE = 4

_TOLD = ALLOW_REPLACEMENT | DO_NOT_QUEUE  # REPLACE_EXISTING is over when it is asked

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
    is another. `waiting` has those who wait for it now, the next owner first; `claims` the flags of
    the owner and of those, if he is not the `activator`."""

    name: str
    old: Connection | None
    new: Connection | None
    waiting: tuple[Connection, ...] = ()
    claims: tuple[int, ...] = ()
    activator: Connection | None = None


_State = tuple[list[tuple[Connection, int]], Connection | None]


class Registry:
    """All well-known names of a bus."""

    def __init__(self) -> None:
        self.queues: dict[str, list[Claim]] = {}
        self.activators: dict[str, Connection] = {}

    def __len__(self) -> int:
        """How many names somebody owns."""
        return len(self.queues.keys() | self.activators.keys())

    def owner(self, name: str) -> Connection | None:
        queue = self.queues.get(name)
        return queue[0].connection if queue else self.activators.get(name)

    def waiters(self, name: str) -> list[Connection]:
        """The owner and those who wait, in order, without the activator."""
        return [claim.connection for claim in self.queues.get(name, ())]

    def activate(self, connection: Connection, name: str) -> Change | None:
        """Make a connection the activator of a name that has none."""
        before = self._state(name)
        self.activators[name] = connection
        connection.names.append(name)
        return self._change(name, before)

    def states(self) -> Iterator[Change]:
        """Each name that somebody owns, as if it had just become so."""
        for name in self.queues.keys() | self.activators.keys():
            change = self._change(name, ([], None))
            assert change is not None
            yield change

    def request(self, connection: Connection, name: str, flags: int) -> tuple[int, Change | None]:
        """RequestName; returns its result code and what changed."""
        before = self._state(name)
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
                self._leave(name, mine)
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
        before = self._state(name)
        if self.activators.get(name) is connection:
            del self.activators[name]
            connection.names.remove(name)
            return RELEASED, self._change(name, before)
        if self.owner(name) is None:
            return NON_EXISTENT, None
        for claim in self.queues.get(name, ()):
            if claim.connection is connection:
                self._leave(name, claim)
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

    def _leave(self, name: str, claim: Claim) -> None:
        queue = self.queues[name]
        queue.remove(claim)
        claim.connection.names.remove(name)
        if not queue:
            del self.queues[name]

    def _state(self, name: str) -> _State:
        claims = self.queues.get(name, ())
        told = [(claim.connection, claim.flags & _TOLD) for claim in claims]
        return told, self.activators.get(name)

    def _change(self, name: str, before: _State) -> Change | None:
        """What there is to say of a name of which this was so."""
        after = self._state(name)
        if after == before:
            return None
        claims, activator = after
        return Change(
            name,
            _owner(before),
            _owner(after),
            tuple(connection for connection, _ in claims[1:]),
            tuple(flags for _, flags in claims),
            activator,
        )


def _owner(state: _State) -> Connection | None:
    claims, activator = state
    return claims[0][0] if claims else activator
