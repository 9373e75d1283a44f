"""Messages to names that have an activator: our client's, until their receivers have read them; and those of others that
our client had, until their senders have sent them again.

In kdbus such a message moves when the name does: from the activator to the service that takes it, and back if
that leaves it unread (kdbus_conn_move_messages). Here whoever had it throws it away, and we, whose word on
who sent it counts, send it once more to the new owner. Order is kept: what was sent to the name comes
before what is sent next. But if our client goes before we know that the name has moved, nobody sends it again: whoever
had it keeps it till we say that we have, and passes it on if we are gone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from kbusd.kdbus.parcel import Parcel

MAX_MESSAGES = 1024
MAX_BYTES = 16 << 20
MAX_FDS = 512


@dataclass(slots=True, eq=False)
class Sent:
    """A message to the name `parcel.dst_name`. `fds`: its memfds, then its descriptors."""

    parcel: Parcel
    data: bytes
    fds: Sequence[int]


class Kept:
    """In the order in which they were sent; the oldest goes if there are too many. `close` lets go of
    descriptors."""

    def __init__(self, close: Callable[[Sequence[int]], None]) -> None:
        self._close = close
        self._sent: list[Sent] = []
        self._bytes = 0
        self.fds = 0
        """How many descriptors are kept."""

    def __contains__(self, sent: Sent) -> bool:
        return sent in self._sent

    def keep(self, parcel: Parcel, data: bytes, fds: Sequence[int]) -> Sent:
        """`fds` are ours from now on."""
        sent = Sent(parcel, data, fds)
        self._sent.append(sent)
        self._bytes += len(data)
        self.fds += len(fds)
        while len(self._sent) > MAX_MESSAGES or self._bytes > MAX_BYTES or self.fds > MAX_FDS:
            self.drop(self._sent[0])
        return sent

    def drop(self, sent: Sent) -> None:
        """It is not to be sent again, if it still was."""
        if sent in self._sent:
            self._sent.remove(sent)
            self._bytes -= len(sent.data)
            self.fds -= len(sent.fds)
            self._close(sent.fds)

    def read(self, cookie: int) -> None:
        """Its receiver has read, or dropped, the message with this cookie."""
        found = next((each for each in self._sent if each.parcel.cookie == cookie), None)
        if found is not None:
            self.drop(found)

    def to(self, name: str) -> Iterator[Sent]:
        """Those that were sent to a name."""
        return (each for each in tuple(self._sent) if each.parcel.dst_name == name)

    def of(self, origin: bytes) -> Iterator[Sent]:
        """Those that come from this connection."""
        return (each for each in tuple(self._sent) if each.parcel.origin == origin)
