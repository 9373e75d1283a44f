"""Whether a worker still runs that others say takes nothing of what they send to it.

    A: Stuck(B)  ->  broker  -> B: Probe
                     broker  <- B: Running        nothing more happens
                     no answer, twice in a row    B is ended, and its peers read so in the log

A's word ends nobody: a worker that runs answers in time, however others flood it, so that a worker
that was taken over can only cause questions, one a second at most. Who says Stuck gets no answer: it
hears of the end of B by the log, or else finds out for itself that B reads on.
"""

from __future__ import annotations

from dataclasses import dataclass

from kbusd.broker.connection import Connection
from kbusd.broker.outside import Outside
from kbusd.broker.refusal import Violation
from kbusd.rings.entries import Probe

# An honest worker answers within milliseconds, on a busy machine within a second.
ANSWER_SECONDS = 2.5
ROUNDS = 2  # the first may have passed while the broker itself had no processor
REST_SECONDS = 1.0  # for whoever has just answered


@dataclass(slots=True)
class Asked:
    """`connection` was sent a Probe."""

    connection: Connection
    deadline: float
    rounds: int = 1


class Probes:
    """Those who have not answered yet, the longest waiting first, and when others answered last."""

    def __init__(self, outside: Outside) -> None:
        self._outside = outside
        self._open: dict[int, Asked] = {}  # by worker
        self._ran: dict[int, float] = {}

    def stuck(self, accused: Connection) -> None:
        """Somebody who knows the worker says that it takes nothing."""
        now = self._outside.now()
        worker = accused.worker
        rested = worker not in self._ran or now >= self._ran[worker] + REST_SECONDS
        if worker in self._open or not rested:
            return
        self._outside.send(worker, Probe())
        self._open[worker] = Asked(accused, now + ANSWER_SECONDS)

    def running(self, connection: Connection) -> None:
        """It has answered. Raises Violation."""
        if self._open.pop(connection.worker, None) is None:
            raise Violation("answered a Probe that it was not sent")
        self._ran[connection.worker] = self._outside.now()

    def gone(self, connection: Connection) -> None:
        self._open.pop(connection.worker, None)
        self._ran.pop(connection.worker, None)

    def deadline(self) -> float | None:
        """When `tick` has something to do."""
        return min((asked.deadline for asked in self._open.values()), default=None)

    def tick(self, now: float) -> None:
        """End those that did not answer."""
        for worker, asked in list(self._open.items()):
            if asked.deadline > now:
                continue
            if asked.rounds < ROUNDS:
                asked.rounds += 1
                asked.deadline = now + ANSWER_SECONDS
                continue
            del self._open[worker]
            seconds = ANSWER_SECONDS * ROUNDS
            self._outside.kill(
                worker, f"its worker took nothing and did not answer within {seconds:.0f} s"
            )

    def __len__(self) -> int:
        return len(self._open)
