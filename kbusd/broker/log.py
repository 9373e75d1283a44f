"""The control log and the snapshots that let a worker join in its middle.

The broker is its only writer. Those behind an endpoint have a log of their own, with what filtered.py lets
pass. A snapshot is a sealed memfd with the encoded state at one position
of the log; it is given out until the log has gone on by more than replaying is worth, so that most
connections cost no new one. A small one goes to a worker as it is, before Hello (entries.State).
"""

from __future__ import annotations

import os
from collections.abc import Callable

import msgspec

from kbusd.broker.connection import OPEN, At, Behind
from kbusd.broker.filtered import Filter
from kbusd.rings import memfd
from kbusd.rings.broadcast import Broadcast
from kbusd.rings.clock import Clock
from kbusd.rings.entries import LogEntry, Snapshot

CAPACITY = 4 * 1024 * 1024  # touched page by page as the log grows; then it goes round
OF_ENDPOINT = 1024 * 1024
LOG = 2  # kind of frame: a control-log entry
REPLAY_ENTRIES = 8  # a worker applies an entry in about 5 µs while its client waits for Hello
REPLAY_BYTES = 64 * 1024  # far below CAPACITY: a snapshot's position stays in reach

_encode = msgspec.msgpack.Encoder().encode


class Log:
    """Appends entries, makes snapshots. `state` gives a Snapshot of a position."""

    def __init__(self, capacity: int = CAPACITY) -> None:
        self._ring = Broadcast(capacity)
        self._end = 0  # the position behind the last entry
        self._data = b""  # the snapshot, encoded
        self._at = At(0, 0)
        self._snapshot = -1  # the memfd that holds it, if somebody has asked for one
        self.entries = 0
        self.snapshots = 0

    def fileno(self) -> int:
        """The log's memfd."""
        fd: int = self._ring.fileno()
        return fd

    def append(self, entry: LogEntry, stamp: int) -> None:
        self._end = self._ring.append(LOG, stamp, b"", _encode(entry))
        self.entries += 1

    def forget(self) -> None:
        """The next snapshot is a new one."""
        self._data = b""
        if self._snapshot >= 0:
            os.close(self._snapshot)
            self._snapshot = -1

    def state(self, state: Callable[[int], Snapshot], size: int) -> tuple[bytes, At]:
        """A recent snapshot, encoded, and where it was made; `size` is about how much there is to write.

        The larger the state, the longer one is used: making it costs what replaying saves."""
        if not self._data or not self.reaches(self._at, size):
            self.forget()
            self._data = _encode(state(self._end))
            self._at = At(self._end, self.entries)
            self.snapshots += 1
        return self._data, self._at

    def snapshot(self, state: Callable[[int], Snapshot], size: int) -> int:
        """A sealed memfd with it."""
        data, _ = self.state(state, size)
        if self._snapshot < 0:
            self._snapshot = memfd.sealed("kbusd-snapshot", data)
        return self._snapshot

    def reaches(self, at: At, size: int, times: int = 1) -> bool:
        """Whether it is still worth replaying what came after this snapshot; or so many times as much."""
        return (
            self.entries - at.entries <= times * max(REPLAY_ENTRIES, size // 4)
            and self._end - at.position <= times * REPLAY_BYTES
        )


class Logs:
    """The log, and those of endpoints. `state` gives a Snapshot of a position and stamp; `behind` the filter
    of an endpoint."""

    def __init__(
        self, state: Callable[[int, int], Snapshot], behind: Callable[[Behind], Filter]
    ) -> None:
        self._log = Log()
        self._clock = Clock()
        self.stamp = 0
        self._state = state
        self._filter = behind
        self._behind: dict[Behind, tuple[Log, Filter]] = {}

    def fileno(self) -> int:
        """The memfd of the log for all who came by no endpoint."""
        return self._log.fileno()

    def append(self, entry: LogEntry) -> None:
        self.stamp = self._clock.tick()
        self._log.append(entry, self.stamp)
        for behind, (log, filter) in list(self._behind.items()):
            for passed in filter.entries(entry, lambda: self._state(0, 0)):
                log.append(passed, self.stamp)
                self.stamp = self._clock.tick()  # they rise from frame to frame
            if filter.changes(entry):
                log.forget()  # it was made by what the endpoint said before
            if filter.is_over(entry):
                log.forget()
                del self._behind[behind]

    def snapshot(self, behind: Behind, size: int) -> list[int]:
        """Where to join in: a snapshot; for who is behind an endpoint, also the log to go on with."""
        if behind == OPEN:
            return [self._log.snapshot(self._now, size)]
        if behind not in self._behind:
            self._behind[behind] = Log(OF_ENDPOINT), self._filter(behind)
        log, filter = self._behind[behind]

        def state(position: int) -> Snapshot:
            return filter.snapshot(self._state(position, self.stamp))

        return [log.snapshot(state, size), log.fileno()]

    def state(self, size: int) -> tuple[bytes, At]:
        """The same for who is behind nothing, as it is."""
        return self._log.state(self._now, size)

    def reaches(self, at: At, size: int) -> bool:
        """Whether he may still go on from there: also if a new one was made since."""
        return self._log.reaches(at, size, 2)

    def _now(self, position: int) -> Snapshot:
        return self._state(position, self.stamp)
