"""The words of broker and workers to the admin: lines on standard error, the bus's journal.

A line may hold a client's words, so control characters are replaced, and a worker's journal takes
only so many lines a second: a client must not fill the admin's disk by being refused. Never
blocks: while nobody reads, lines are dropped. How many were lost is told with the next line.
"""

from __future__ import annotations

import os
import select
import time

MAX_LINE = 1024
_STDERR = 2


class Journal:
    """Writes lines that begin with `who` to `fd`, `per_second` at most (0: as many as there are)."""

    def __init__(self, who: str, fd: int = _STDERR, per_second: int = 0) -> None:
        self._who = who
        self._fd = fd
        self._per_second = per_second
        self._second = 0
        self._said = 0
        self._dropped = 0
        self._writable = select.poll()
        self._writable.register(fd, select.POLLOUT)

    def say(self, text: str) -> None:
        """One line, or nothing if it cannot be written at once."""
        if self._too_many() or not self._writable.poll(0):
            self._dropped += 1
            return
        if self._dropped:
            text = f"{text} ({self._dropped} lines before this one were lost)"
        line = "".join(c if c.isprintable() else "?" for c in text[:MAX_LINE])
        try:
            os.write(self._fd, f"{self._who}: {line}\n".encode(errors="replace"))
        except OSError:
            self._dropped += 1
        else:
            self._dropped = 0

    def _too_many(self) -> bool:
        second = int(time.monotonic())
        if second != self._second:
            self._second, self._said = second, 0
        self._said += 1
        return 0 < self._per_second < self._said
