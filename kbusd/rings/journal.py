"""The broker's words to the admin: lines on standard error, which the supervisor passes on.

A line may hold a client's words, so control characters are replaced. Never blocks: while nobody
reads, lines are dropped and counted, and the count is told later.
"""

from __future__ import annotations

import os
import select

MAX_LINE = 1024
_STDERR = 2


class Journal:
    """Writes lines to `fd`."""

    def __init__(self, fd: int = _STDERR) -> None:
        self._fd = fd
        self._dropped = 0
        self._writable = select.poll()
        self._writable.register(fd, select.POLLOUT)

    def say(self, text: str) -> None:
        """One line, or nothing if it cannot be written at once."""
        if not self._writable.poll(0):
            self._dropped += 1
            return
        if self._dropped:
            text = f"{text} ({self._dropped} lines before this one were lost)"
        line = "".join(c if c.isprintable() else "?" for c in text[:MAX_LINE])
        try:
            os.write(self._fd, f"kbusd broker: {line}\n".encode(errors="replace"))
        except OSError:
            self._dropped += 1
        else:
            self._dropped = 0
