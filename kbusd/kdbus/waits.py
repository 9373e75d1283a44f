"""Commands that must wait: for the caller's memory, for the bus, for a reply. Without any I/O.

A command is a coroutine that awaits a `Wait`. Whoever can end the waiting calls `done` or `fail`, and
the command goes on inside that call. There is no loop and no task: `start` runs a command to its first
Wait, and tells at its end how it went.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Generator
from typing import Any, Generic, TypeVar

from kbusd.kdbus.errors import Errno

T = TypeVar("T")


class Interrupted(Exception):
    """The caller got a signal, and what it waits for may be begun again (ERESTARTSYS)."""


class Wait(Generic[T]):
    """One thing that is waited for, by one command."""

    def __init__(self) -> None:
        self.settled = False
        self._value: T | None = None
        self._error: Exception | None = None
        self._then: Callable[[], None] | None = None

    def done(self, value: T) -> None:
        """It is there. Once settled, a Wait stays as it is."""
        if not self.settled:
            self._value = value
            self._settle()

    def fail(self, error: Exception) -> None:
        """It will not come: raised where it is awaited."""
        if not self.settled:
            self._error = error
            self._settle()

    def _settle(self) -> None:
        self.settled = True
        if self._then is not None:
            self._then()

    def then(self, function: Callable[[], None]) -> None:
        """Call `function` when settled; at most one is called."""
        self._then = function

    def __await__(self) -> Generator[Wait[Any], None, T]:
        if not self.settled:
            yield self
        if self._error is not None:
            raise self._error
        return self._value  # type: ignore[return-value]


def start(
    command: Coroutine[Wait[Any], None, T], ended: Callable[[T | Errno | Interrupted], None]
) -> None:
    """Run a command; `ended` is called once, with what it returns or with how it fails."""

    def go_on() -> None:
        try:
            wait = command.send(None)
        except StopIteration as stop:
            ended(stop.value)
        except (Errno, Interrupted) as error:
            ended(error)
        else:
            wait.then(go_on)

    go_on()
