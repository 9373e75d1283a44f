"""What the broker's core may ask of the world. `server.py` does it; a test records it.

The core decides and never touches a descriptor but by these calls, so that every scenario can
be played without a process.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from kbusd.broker.connection import At, Behind
from kbusd.rings.entries import BrokerMessage, Launch, LogEntry


class Outside(Protocol):
    """Effects. None of them blocks, and none calls back into the core."""

    def append(self, entry: LogEntry) -> None:
        """Write one entry to the control log."""

    def stamp(self) -> int:
        """That of the entry written last."""

    def send(self, worker: int, message: BrokerMessage, fds: Sequence[int] = ()) -> None:
        """Send to a worker; `fds` stay the caller's."""

    def wake(self, worker: int) -> None:
        """See to it that the worker looks at the log once more than it has."""

    def joined(self, worker: int) -> None:
        """Let the supervisor know that the worker's client said Hello."""

    def kill(self, worker: int, reason: str) -> None:
        """Have the supervisor end the worker."""

    def reload(self) -> None:
        """Have the supervisor read the configuration again; `Bus.reconfigure` follows."""

    def listen(self, endpoints: tuple[str, ...]) -> None:
        """Have the supervisor listen for these endpoints; `Bus.listening` follows."""

    def launch(self, launch: Launch) -> None:
        """Have the launcher run a service; `Bus.launch_ended` follows, if it ends."""

    def end_launch(self, job: int) -> None:
        """Have the launcher kill a service that took too long."""

    def look(self, directories: tuple[str, ...]) -> None:
        """Have the launcher look when the directories changed; `Bus.looked` follows."""

    def snapshot(self, behind: Behind) -> list[int]:
        """A descriptor of a sealed memfd with a recent Snapshot, and of the log to go on with for who is
        behind an endpoint; they stay the callee's."""

    def state(self) -> tuple[bytes, At]:
        """A recent Snapshot for who is behind no endpoint, encoded, and where in the log it was made."""

    def reaches(self, at: At) -> bool:
        """Whether one that was made there is still good for who says Hello now."""

    def policy(self) -> int:
        """A descriptor of the sealed memfd with the configuration; stays the callee's."""

    def socketpairs(self) -> tuple[list[int], list[int]]:
        """One's and the other's ends of what two workers are to share, new: bell, side socket, carrier. They are the
        caller's to close. Raises OSError."""

    def dispose(self, fds: Sequence[int], worker: int) -> None:
        """Close our ends of socketpairs, whose other ends this worker has had."""

    def close(self, fd: int) -> None:
        """Close a descriptor that `socketpairs` gave."""

    def allows(self, subject: bytes | None, target: bytes | None, permission: str) -> bool:
        """What SELinux says of two labels (class `dbus`); True where it is not enabled. None is the
        bus's own."""

    def now(self) -> float:
        """CLOCK_MONOTONIC, in seconds."""

    def say(self, text: str) -> None:
        """One line for the admin."""
