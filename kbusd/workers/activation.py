"""Messages that are held until the service that they are for is started.

Those to one name are held together, so that their order is kept. Descriptors are duplicated, and
belong to whoever takes the messages out again.
"""

from __future__ import annotations

import os
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
    """By the name that is being started."""

    __slots__ = ("_held",)

    def __init__(self) -> None:
        self._held: dict[str, list[Held]] = {}

    def hold(self, name: str, message: Held) -> bool:
        """Hold a message; True: it is the first, so the service is to be started."""
        copy = message._replace(fds=tuple(os.dup(fd) for fd in message.fds))
        waiting = self._held.setdefault(name, [])
        waiting.append(copy)
        return len(waiting) == 1

    def take(self, name: str) -> list[Held]:
        """What was held for `name`, in order."""
        return self._held.pop(name, [])
