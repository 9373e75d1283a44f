"""Values that the rings give to Python: frames and statistics. Nothing here does I/O."""

from __future__ import annotations

import msgspec


class Frame(msgspec.Struct, frozen=True):
    """A frame copied out of a ring. `stamp` in ns, `position` the byte count behind the frame."""

    kind: int
    stamp: int
    envelope: bytes
    body: bytes
    position: int = 0
    flags: int = 0
    fds: int = 0
    serial: int = 0
    reply_serial: int = 0
    aux: int = 0


class RingStatistics(msgspec.Struct, frozen=True):
    """A Ring's producer: bytes and frames written, how often it found no room; `used` in bytes."""

    size: int
    written: int
    frames: int
    used: int
    full: int
    broken: bool


class ReaderStatistics(msgspec.Struct, frozen=True):
    """A consumer: bytes and frames read, `unread` in bytes."""

    size: int
    read: int
    frames: int
    unread: int


class BroadcastStatistics(msgspec.Struct, frozen=True):
    """A Broadcast's producer: bytes and frames written, lowest position that can still be read."""

    size: int
    written: int
    frames: int
    tail: int
    full: int


class BulkStatistics(msgspec.Struct, frozen=True):
    """A bulk area: whether there is one now; bodies sent through it, and those done with."""

    open: bool
    sent: int
    done: int
    broken: bool


class StatusStatistics(msgspec.Struct, frozen=True):
    """A status page: slots there are and slots taken."""

    slots: int
    taken: int
    sleeping: bool


class FanoutStatistics(msgspec.Struct, frozen=True):
    """A Broadcast's subscribers that read it now, and how often one was demoted."""

    joined: int
    demotions: int
    broadcast: BroadcastStatistics


class MergeStatistics(msgspec.Struct, frozen=True):
    """A merge: its sources, those that follow a Broadcast, those that catch up; bytes held."""

    sources: int
    following: int
    catching_up: int
    held: int
