"""What was sent to a name that has just become ours, from its activator or back to it, and is on its way.

In kdbus a message moves with its name, in one go. Here its sender's worker sends it again (`kdbus/kept.py`),
and whoever had the name says of whom how much there will be. Nothing but the time that our own client waits
depends on that word: it ends with `until`, and nobody is waited for who is gone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from kbusd.kdbus.waits import Wait

NOTE = b"moved:"


class Moved(msgspec.Struct, frozen=True, array_like=True):
    """Said by whoever had `name`: how many messages its senders will send again, by their ids."""

    name: str
    coming: dict[int, int]


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Moved).decode


def write(moved: Moved) -> bytes:
    """As a note between workers."""
    return NOTE + _encode(moved)


def read(note: bytes) -> Moved | None:
    """None if no honest worker writes this."""
    try:
        return _decode(note[len(NOTE) :])
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None


class Coming:
    """To one name, which the connection `source` had; `ended` is called when all of it has come, or at the
    latest when it is `until` (CLOCK_MONOTONIC, ns)."""

    def __init__(self, source: int, until: int, ended: Callable[[], None]) -> None:
        self.source, self.until = source, until
        self.settled = False
        self._ended = ended
        self._told = False
        self._left: dict[int, int] = {}  # by sender
        self._waits: list[Wait[Any]] = []

    def wait(self) -> Wait[None]:
        """Until all of it has come."""
        wait: Wait[None] = Wait()
        if self.settled:
            wait.done(None)
        else:
            self._waits.append(wait)
        return wait

    def told(self, coming: Mapping[int, int]) -> None:
        """By `source`."""
        self._told = True
        for id, count in coming.items():
            self._left[id] = self._left.get(id, 0) + count
        self._look()

    def came(self, id: int) -> None:
        """A message of a connection did."""
        self._left[id] = self._left.get(id, 0) - 1
        self._look()

    def gone(self, id: int) -> None:
        """A connection is: it sends nothing more, and what it had said has come before."""
        self._left.pop(id, None)
        self._told = self._told or id == self.source
        self._look()

    def end(self) -> None:
        """Whatever has come."""
        if self.settled:
            return
        self.settled = True
        self._ended()
        waits, self._waits = self._waits, []
        for each in waits:
            each.done(None)

    def _look(self) -> None:
        if self._told and all(left <= 0 for left in self._left.values()):
            self.end()
