"""What a worker has asked of the broker, and who wants to know the answers.

An answer comes behind whatever it caused in the control log; the engine reads that first. The
broker is trusted for who is who, and its words are decoded by type before they come here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from kbusd.rings import entries
from kbusd.rings.line import Line

Answer = entries.Reply | entries.Failure
Then = Callable[[Answer, list[int]], None]
_replace = msgspec.structs.replace


class Asking:
    """Requests on the line to the broker that have no answer yet. `said`: how many of the first ones have
    been sent already, as they will be asked (early.py)."""

    __slots__ = ("_number", "_open", "line", "said")

    def __init__(self, line: Line) -> None:
        self.line = line
        self.said = 0
        self._number = 0
        self._open: dict[int, Then] = {}

    def ask(self, request: entries.Request, then: Then | None, fds: Sequence[int] = ()) -> int:
        """Send `request`; `then(answer, fds)` is called with its Reply or Failure. Returns its number, for who
        takes the answer off the line. Raises OSError."""
        self._number += 1
        if self._number > self.said:
            self.line.send(_replace(request, request=self._number), fds)
        if then is not None:
            self._open[self._number] = then
        return self._number

    def untouched(self) -> bool:
        """Whether nothing was asked yet."""
        return self._number == 0

    def answered(self, answer: Answer, fds: list[int]) -> None:
        """The broker has answered; an answer that nobody asked for is dropped."""
        then = self._open.pop(answer.request, None)
        if then is not None:
            then(answer, fds)
