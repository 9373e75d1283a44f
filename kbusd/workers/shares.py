"""Who may have how much waiting for a client that does not read as fast as others send to it.

What a client asked for is its own: what the bus tells it, and signals that its match rules name if
root or its own user sends them; if too much of that waits, it does not read and is disconnected. All
else (calls, unicast signals, replies, signals of other users) is charged to its sender, who may have
only a share of the rest of the limit waiting, so that no flood can get a client disconnected: users
have shares among each other, and a user's connections among each other.

    A user may have no more than what is free, divided by the number of users with something waiting;
    a connection no more than what its user may still have, divided by the number of that user's.

Each newcomer counts itself, so the first user gets half of it all, the n-th 1/n(n+1), and however
much a user floods through however many connections, others find room. By connection alone, one
user's hundred connections would leave nothing to another; by user alone, one program of a session
would leave nothing to the others, who are all the same user. (dbus-broker's src/util/user.c divides
among users like this; kdbus kept half of what was free from any one of them, so that the n-th
got 1/2**n.) Who is at its share with what waits already may add no more; so any one message fits.

Amounts are bytes, descriptors converted to bytes. Nothing is counted while the client's socket takes
what comes; the engine sees to that. Trusts its caller; the ids and sizes are no client's words.
"""

from __future__ import annotations

from collections import deque

import msgspec

_RUN = 65536  # what one sender sends in a row is one entry up to here: floods cost no memory


class SharesStatistics(msgspec.Struct, frozen=True):
    """What is charged: to senders, and to the client itself."""

    users: int
    senders: int
    charged: int
    own: int


class _User:
    """What one user's connections have waiting."""

    __slots__ = ("senders", "total")

    def __init__(self) -> None:
        self.total = 0
        self.senders: dict[int, int] = {}


class Shares:
    """The queue of one client. `limit`: how much may wait in all; `own`: of what it asked for."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.own = 0
        self._charged = 0
        self._users: dict[int, _User] = {}
        self._queue: deque[list[int]] = deque()  # [end, uid, id, amount], in the order of `end`
        self._told: set[int] = set()

    def over(self, uid: int, id: int) -> bool:
        """Whether connection `id` of user `uid` has used up its share."""
        user = self._users.get(uid, _NOBODY)
        others = self._charged - user.total
        users = len(self._users) + (user is _NOBODY)
        allowed = max(self.limit - self.own - others, 0) // (users + 1)
        connections = len(user.senders) + (id not in user.senders)
        return user.senders.get(id, 0) * connections > allowed - user.total

    def charge(self, uid: int, id: int, amount: int, end: int) -> None:
        """`amount` waits from `id`; it is gone when the client was sent `end` bytes in all."""
        user = self._users.setdefault(uid, _User())
        user.total += amount
        user.senders[id] = user.senders.get(id, 0) + amount
        self._charged += amount
        self._enter(uid, id, amount, end)

    def charge_own(self, amount: int, end: int) -> None:
        """`amount` waits of what the client asked for."""
        self.own += amount
        self._enter(0, 0, amount, end)

    def _enter(self, uid: int, id: int, amount: int, end: int) -> None:
        if self._queue:
            last = self._queue[-1]
            if last[2] == id and last[3] < _RUN:
                last[0] = end
                last[3] += amount
                return
        self._queue.append([end, uid, id, amount])

    def release(self, sent: int) -> None:
        """The client was sent `sent` bytes in all."""
        while self._queue and self._queue[0][0] <= sent:
            _, uid, id, amount = self._queue.popleft()
            if id == 0:
                self.own -= amount
                continue
            self._charged -= amount
            user = self._users[uid]
            user.total -= amount
            user.senders[id] -= amount
            if not user.senders[id]:
                del user.senders[id]
                if not user.senders:
                    del self._users[uid]
        if not self._queue:
            self._told.clear()

    def first_refusal(self, id: int) -> bool:
        """Whether nobody was told yet that `id` is over its share, since nothing waited last."""
        told = id in self._told
        self._told.add(id)
        return not told

    def statistics(self) -> SharesStatistics:
        senders = sum(len(user.senders) for user in self._users.values())
        return SharesStatistics(len(self._users), senders, self._charged, self.own)


_NOBODY = _User()
