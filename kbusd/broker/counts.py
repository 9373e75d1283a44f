"""What waits for a client and from it, of which only its own worker knows: asked of that.

    A: CountConnection(B)  ->  broker  -> B: Count
    A: Reply               <-  broker  <- B: Counted

What B says is its word and nothing more: it is shown to whoever asked, and nobody acts on it. A worker
that says nothing in time is left out, with what the broker knows of its connection. One question serves
all who ask meanwhile.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from kbusd.broker.connection import MAX_WAITING, Connection
from kbusd.broker.outside import Outside
from kbusd.broker.refusal import LIMITS_EXCEEDED, Refused
from kbusd.rings.entries import Count, Counted, Queued, Reply

ANSWER_SECONDS = 1.0


@dataclass(slots=True)
class Question:
    """Asked of one worker; by whom, their request's number, and what the broker knows by itself."""

    deadline: float
    askers: list[tuple[Connection, int, dict[str, int]]] = field(default_factory=list)


class Counts:
    """Questions that were not answered yet, the oldest first."""

    def __init__(self, outside: Outside) -> None:
        self._outside = outside
        self._open: dict[int, Question] = {}  # by worker

    def ask(
        self, asker: Connection, request: int, asked: Connection, known: dict[str, int]
    ) -> None:
        """Have `request` answered with `known` and what the worker of `asked` counts. Raises Refused."""
        if asker.waiting >= MAX_WAITING:
            raise Refused(LIMITS_EXCEEDED, f"{asker} waits for too much at once")
        asker.waiting += 1
        question = self._open.get(asked.worker)
        if question is None:
            question = self._open[asked.worker] = Question(self._outside.now() + ANSWER_SECONDS)
            self._outside.send(asked.worker, Count())
        question.askers.append((asker, request, known))

    def counted(self, connection: Connection, message: Counted) -> None:
        """It has answered; perhaps too late, then nobody asks any more."""
        question = self._open.pop(connection.worker, None)
        if question is not None:
            numbers = {
                **_named("Incoming", message.incoming),
                **_named("Outgoing", message.outgoing),
            }
            self._answer(question, numbers)

    def gone(self, connection: Connection) -> None:
        """It asks no more, and answers no more."""
        for question in self._open.values():
            question.askers = [each for each in question.askers if each[0] is not connection]
        unanswered = self._open.pop(connection.worker, None)
        if unanswered is not None:
            self._answer(unanswered, {})

    def deadline(self) -> float | None:
        """When `tick` has something to do."""
        return next((each.deadline for each in self._open.values()), None)

    def tick(self, now: float) -> None:
        """Answer without those that said nothing."""
        for worker, question in list(self._open.items()):
            if question.deadline <= now:
                del self._open[worker]
                self._answer(question, {})

    def _answer(self, question: Question, numbers: dict[str, int]) -> None:
        for asker, request, known in question.askers:
            asker.waiting -= 1
            self._outside.send(asker.worker, Reply(request, {**known, **numbers}))


def _named(side: str, queue: Queued) -> dict[str, int]:
    """As dbus-daemon names them."""
    return {
        f"{side}Messages": queue.messages,
        f"{side}Bytes": queue.bytes,
        f"{side}FDs": queue.fds,
        f"Peak{side}Bytes": queue.peak_bytes,
        f"Peak{side}FDs": queue.peak_fds,
    }
