"""Messages that are held until the service that they are for is started, or for when it is.

Those to one name are held together, so that their order is kept. Descriptors are duplicated, and
belong to whoever takes the messages out again.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import NamedTuple

from kbusd.rings.envelope import Envelope


class Held(NamedTuple):
    """One message: its envelope, its frame's head, its body. `wants_reply`: it is a call."""

    envelope: Envelope
    wants_reply: bool
    head: bytes
    body: bytes
    fds: tuple[int, ...]


class Activating:
    """By the name that is being started. `limits`: those of the configuration."""

    __slots__ = ("_bytes", "_fds", "_held", "_messages", "limits")

    def __init__(self) -> None:
        self._held: dict[str, list[Held]] = {}
        self._messages = self._bytes = self._fds = 0
        self.limits: Mapping[str, int] = {}

    def refusal(self, name: str, message: Held) -> str | None:
        """Why this one can't be held as well, if too much is already. dbus-daemon counts messages; of a client
        with more bytes or descriptors on the way than it may have, it reads no more."""
        for limit, held in (
            ("max_pending_service_starts", self._messages + 1),
            ("max_incoming_bytes", self._bytes + len(message.body)),
            ("max_incoming_unix_fds", self._fds + len(message.fds)),
        ):
            if held > self.limits[limit]:
                return (
                    "The maximum number of pending activations has been reached, activation of"
                    f" {name} failed ({limit}={self.limits[limit]})"
                )
        return None

    def hold(self, name: str, message: Held) -> bool:
        """Hold a message; True: it is the first, so the service is to be started."""
        copy = message._replace(fds=tuple(os.dup(fd) for fd in message.fds))
        waiting = self._held.setdefault(name, [])
        waiting.append(copy)
        self._count(copy, 1)
        return len(waiting) == 1

    def take(self, name: str) -> list[Held]:
        """What was held for `name`, in order."""
        held = self._held.pop(name, [])
        for message in held:
            self._count(message, -1)
        return held

    def _count(self, message: Held, one: int) -> None:
        self._messages += one
        self._bytes += one * len(message.body)
        self._fds += one * len(message.fds)


MAX_KEPT = 256


class Kept:
    """Copies of what our client has sent to names that have an activator (kdbus.connection(7)), by name and
    serial, until it was read: if the name goes to another meanwhile, it is sent again to that."""

    __slots__ = ("_kept",)

    def __init__(self) -> None:
        self._kept: dict[str, dict[int, Held]] = {}

    def keep(self, name: str, serial: int, message: Held) -> None:
        """The oldest are forgotten if there are too many."""
        kept = self._kept.setdefault(name, {})
        kept[serial] = message._replace(fds=tuple(os.dup(fd) for fd in message.fds))
        if len(kept) > MAX_KEPT:
            self._forget(kept, next(iter(kept)))

    def read(self, serial: int) -> None:
        """It is not to be sent again."""
        for kept in self._kept.values():
            if serial in kept:
                self._forget(kept, serial)

    def take(self, name: str) -> dict[int, Held]:
        """What was sent to `name` and not read, in order; the descriptors are the caller's."""
        return self._kept.pop(name, {})

    def _forget(self, kept: dict[int, Held], serial: int) -> None:
        for fd in kept.pop(serial).fds:
            os.close(fd)
