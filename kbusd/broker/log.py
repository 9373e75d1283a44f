"""The control log and the snapshots that let a worker join in its middle.

The broker is its only writer. A snapshot is a sealed memfd with the encoded state at one position
of the log; it is given out until the log has gone on by more than replaying is worth, so that most
connections cost no new one.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import msgspec

from kbusd.rings import memfd
from kbusd.rings.broadcast import Broadcast
from kbusd.rings.clock import Clock
from kbusd.rings.entries import LogEntry, Snapshot

CAPACITY = 4 * 1024 * 1024  # touched page by page as the log grows; then it goes round
LOG = 2  # kind of frame: a control-log entry
REPLAY_ENTRIES = 8  # a worker applies an entry in about 5 µs while its client waits for Hello
REPLAY_BYTES = 64 * 1024  # far below CAPACITY: a snapshot's position stays in reach

_encode = msgspec.msgpack.Encoder().encode


class Log:
    """Appends entries, makes snapshots. `state` gives a Snapshot of a position and stamp."""

    def __init__(self) -> None:
        self._ring = Broadcast(CAPACITY)
        self._clock = Clock()
        self._end = 0  # the position behind the last entry
        self._snapshot = -1
        self._position = 0  # of the snapshot
        self._since = 0
        self._stamp = 0
        self.entries = 0
        self.snapshots = 0

    def fileno(self) -> int:
        """The log's memfd."""
        fd: int = self._ring.fileno()
        return fd

    def append(self, entry: LogEntry) -> None:
        self._stamp = self._clock.tick()
        self._end = self._ring.append(LOG, self._stamp, b"", _encode(entry))
        self.entries += 1

    def snapshot(self, state: Callable[[int, int], Snapshot], size: int) -> int:
        """A sealed memfd with a recent snapshot; `size` is about how much there is to write.

        The larger the state, the longer one is used: making it costs what replaying saves."""
        if (
            self._snapshot < 0
            or self.entries - self._since > max(REPLAY_ENTRIES, size // 4)
            or self._end - self._position > REPLAY_BYTES
        ):
            if self._snapshot >= 0:
                os.close(self._snapshot)
                self._snapshot = -1
            data = _encode(state(self._end, self._stamp))
            self._snapshot = memfd.sealed("kbusd-snapshot", data)
            self._position = self._end
            self._since = self.entries
            self.snapshots += 1
        return self._snapshot
