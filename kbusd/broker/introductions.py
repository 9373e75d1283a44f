"""Making two workers known to each other, exactly once.

    A: Introduce(B) ->  broker  -> B: Introduction(A)     both get one end of each socketpair
    A: Reply        <-  broker  <- B: Introduced

- If both ask at once, the first to arrive counts; the second is answered with an empty Reply,
  which comes to it behind the Introduction that serves it.
- If B goes, A gets NameHasNoOwner. If A goes, B learns it from the log.
- If B does not answer in time, A gets TimedOut and B finds a Withdrawn behind the Introduction.

The broker only passes the descriptors on: it maps none and keeps none but A's ends of the socketpairs that it
makes for the two, until the answer. Nobody but the two workers ever has an end of these.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kbusd.broker.connection import Connection
from kbusd.broker.outside import Outside
from kbusd.broker.refusal import (
    FAILED,
    LIMITS_EXCEEDED,
    NAME_HAS_NO_OWNER,
    TIMED_OUT,
    Refused,
    Violation,
)
from kbusd.rings.entries import Failure, Introduce, Introduced, Introduction, Reply, Withdrawn

RING_FDS = 3  # ring, status page, Broadcast
ANSWER_SECONDS = 10.0  # an honest worker answers in well under a millisecond
MAX_PENDING = 256  # of one worker, not yet answered
MAX_INTRODUCED = 4096  # peers of one worker; each costs both about 100 KiB of address space


@dataclass(frozen=True, slots=True)
class Pending:
    """`asker` wants to know `peer`, which has not answered yet."""

    asker: Connection
    request: int
    peer: Connection
    ends: Sequence[int]  # the asker's, of what the two are to share
    deadline: float


class Introductions:
    """All introductions that are under way; those that are made stand in the connections."""

    def __init__(self, outside: Outside) -> None:
        self._outside = outside
        self._pending: dict[int, Pending] = {}
        self._pairs: dict[tuple[int, int], int] = {}  # (asker's id, peer's id) -> number
        self._next = 1
        self.made = 0

    def introduce(
        self, asker: Connection, message: Introduce, fds: Sequence[int], peer: Connection | None
    ) -> None:
        """Begin. Raises Refused, Violation."""
        if len(fds) != RING_FDS:
            raise Violation(f"sent {len(fds)} descriptors with Introduce")
        if peer is None or peer is asker:
            raise Refused(NAME_HAS_NO_OWNER, f"There is no connection :1.{message.peer}")
        if (peer.id, asker.id) in self._pairs:
            self._outside.send(asker.worker, Reply(message.request))
            return
        if peer in asker.introduced or (asker.id, peer.id) in self._pairs:
            raise Refused(FAILED, f"{asker} was introduced to {peer} already")
        if asker.introductions >= MAX_PENDING or len(asker.introduced) >= MAX_INTRODUCED:
            raise Refused(LIMITS_EXCEEDED, f"{asker} asked for too many introductions")
        ours, theirs = self._outside.socketpairs()
        number = self._next
        self._next += 1
        self._outside.send(
            peer.worker,
            Introduction(number, asker.id, message.slot, message.broadcast_slot),
            [*fds, *theirs],
        )
        for end in theirs:
            self._outside.close(end)
        deadline = self._outside.now() + ANSWER_SECONDS
        self._pending[number] = Pending(asker, message.request, peer, ours, deadline)
        self._pairs[asker.id, peer.id] = number
        asker.introductions += 1

    def introduced(self, peer: Connection, message: Introduced, fds: Sequence[int]) -> None:
        """The peer's answer; one that comes too late is dropped. Raises Violation."""
        if len(fds) != RING_FDS:
            raise Violation(f"sent {len(fds)} descriptors with Introduced")
        pending = self._pending.get(message.request)
        if pending is None:
            return
        if pending.peer is not peer:
            raise Violation("answered an Introduction that was not for it")
        self._outside.send(
            pending.asker.worker,
            Reply(pending.request, [message.slot, message.broadcast_slot]),
            [*fds, *pending.ends],
        )
        self._end(message.request)
        pending.asker.introduced.add(peer)
        peer.introduced.add(pending.asker)
        self.made += 1

    def know(self, one: Connection, other: Connection) -> bool:
        """Whether the two were introduced, or are about to be."""
        pairs = (one.id, other.id), (other.id, one.id)
        return other in one.introduced or any(pair in self._pairs for pair in pairs)

    def gone(self, connection: Connection) -> set[Connection]:
        """The connection ended; returns those who have to hear of it."""
        concerned = connection.introduced
        for peer in concerned:
            peer.introduced.discard(connection)
        connection.introduced = set()
        for number, pending in list(self._pending.items()):
            if pending.asker is connection:
                concerned.add(pending.peer)
                self._end(number)
            elif pending.peer is connection:
                self._fail(number, NAME_HAS_NO_OWNER, f"{connection} is gone")
        return concerned

    def deadline(self) -> float | None:
        """When `tick` has something to do. All wait equally long, so the first is the oldest."""
        for pending in self._pending.values():
            return pending.deadline
        return None

    def tick(self, now: float) -> None:
        """Give up on peers that do not answer."""
        for number, pending in list(self._pending.items()):
            if pending.deadline > now:
                return
            peer = pending.peer
            self._outside.say(
                f"worker {peer.worker} of {peer} did not answer an introduction to"
                f" {pending.asker} within {ANSWER_SECONDS:.0f} s"
            )
            self._outside.send(peer.worker, Withdrawn(number, pending.asker.id))
            self._fail(number, TIMED_OUT, f"The worker of {peer.unique_name} does not answer")

    def _fail(self, number: int, error: str, text: str) -> None:
        pending = self._pending[number]
        self._outside.send(pending.asker.worker, Failure(pending.request, error, text))
        self._end(number)

    def _end(self, number: int) -> None:
        pending = self._pending.pop(number)
        del self._pairs[pending.asker.id, pending.peer.id]
        pending.asker.introductions -= 1
        self._outside.dispose(pending.ends, pending.peer.worker)

    def __len__(self) -> int:
        return len(self._pending)
