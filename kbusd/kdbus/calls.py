"""The calls of one connection that wait for a reply (ipc/kdbus/reply.c, kdbus.message(7)).

A reply is let through because the caller's side remembers what was asked of whom; policy is not asked
again. Cookies are the caller's choice: of several calls to one connection with the same cookie, the
latest is answered first. A synchronous call that a signal interrupted stays for a while: if the system
call is started again, with the same cookie, it goes on waiting and sends nothing twice. A reply that nobody
waits for gets EBADSLT, as of the last kdbus and its test-message.c; before, it was EPERM.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass

from kbusd.kdbus import abi
from kbusd.kdbus.errors import Errno


@dataclass(slots=True, eq=False)
class Call:
    """What was asked of the connection `callee`; `deadline` is CLOCK_MONOTONIC in nanoseconds.

    `name` is the well-known name to which the message was sent, if it was.
    """

    callee: int
    cookie: int
    deadline: int
    sync: bool
    name: str | None = None
    interrupted: bool = False

    @property
    def watched(self) -> bool:
        """Whether its deadline is ours to watch; who waits synchronously watches its own."""
        return not self.sync or self.interrupted


class Calls:
    """What waits, the latest first."""

    def __init__(self) -> None:
        self._calls: list[Call] = []

    def __len__(self) -> int:
        return len(self._calls)

    def add(self, call: Call, untold: int = 0) -> None:
        """Wait for a reply. Raises Errno EMLINK if there are too many already, with the `untold`: calls that
        nobody will answer, which the caller has not read yet."""
        count = len(self._calls) + untold
        if count >= abi.MAX_PENDING_REPLIES:
            raise Errno(errno.EMLINK, f"{count} calls wait for a reply, or to be told of none")
        self._calls.insert(0, call)

    def take(self, callee: int, cookie: int) -> Call:
        """The call that a reply of `callee` answers; it waits no longer. Raises Errno EBADSLT."""
        for call in self._calls:
            if call.cookie == cookie and call.callee == callee:
                self._calls.remove(call)
                return call
        raise Errno(errno.EBADSLT, f"a reply of {callee} to {cookie}, which was not asked")

    def remove(self, call: Call) -> None:
        """A call waits no longer, if it still did."""
        if call in self._calls:
            self._calls.remove(call)

    def resume(self, cookie: int) -> Call | None:
        """The interrupted call that a synchronous SEND with this cookie goes on with, if any."""
        call = next((each for each in self._calls if each.cookie == cookie), None)
        if call is None or not call.interrupted:
            return None
        call.interrupted = False
        return call

    def next_deadline(self) -> int | None:
        """When `expire` is to be called next."""
        return min((call.deadline for call in self._calls if call.watched), default=None)

    def expire(self, now: int) -> list[Call]:
        """Drop what is over its deadline; returns the calls of which REPLY_TIMEOUT is to be told."""
        late = [call for call in self._calls if call.watched and call.deadline <= now]
        self._calls = [call for call in self._calls if call not in late]
        return [call for call in late if not call.interrupted]

    def drop(self, callee: int) -> list[Call]:
        """A connection is gone. Returns what it will not answer: EPIPE for those who wait in SEND, else
        REPLY_DEAD."""
        dead = [call for call in self._calls if call.callee == callee]
        self._calls = [call for call in self._calls if call.callee != callee]
        return dead

    def pass_on(self, name: str, cookie: int, to: int) -> None:
        """A name went from its activator to an owner or back, and a message to it along with it."""
        for call in self._calls:
            if call.cookie == cookie and call.name == name:
                call.callee = to
