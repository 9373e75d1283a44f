"""Files that were closed, or said BYEBYE, and whose connections are not gone yet.

close(2) of a file in a mount does not wait for us, but the kernel tells us of it before any later request
of the same process. What is asked from then on waits till the effect stands in the log of the bus, which
workers read before they answer. A CUSE node's close(2) does wait for us, till then.

    a file is closed    -> its worker ends -> the broker says Left
    it made something   -> that is withdrawn, in the supervisor's thread

Nobody waits for much more than WAIT_SECONDS, as the worker may have been taken over; a user whose worker took
longer is not waited for by others for a while, nor is one who closes many files at once. What a worker waits for
a processor does not count, up to BUSY_SECONDS, nor what the broker takes once the worker has ended.
"""

from __future__ import annotations

import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from kbusd.cuse import abi, routing
from kbusd.sandbox import kernel
from kbusd.supervisor import caller
from kbusd.supervisor.domains import Domain
from kbusd.supervisor.holder import Holder
from kbusd.supervisor.relay import Room

WAIT_SECONDS = 1.0
BUSY_SECONDS = 9.0  # more, where it is that others run
MORE_SECONDS = 0.02  # for each file that was closed before, as their workers end one after another
TARDY_SECONDS = 60.0
MAX_FOR_OTHERS = 8  # of one uid that are going at a time, for requests of others to wait for them
MAX_LANES = 64  # so many users close files at a time, for anybody to wait for another
LOOK_SECONDS = 0.01  # how often to see whether something takes too long
_OF_FILES = frozenset({abi.IOCTL, abi.POLL})
_OF_TREES = frozenset({abi.LOOKUP, abi.GETATTR, abi.OPEN, abi.OPENDIR, abi.READDIR, abi.ACCESS})


class Asked(Protocol):
    """A connection to the kernel (connection.py)."""

    domain: Domain

    def give(self, request: bytes) -> None:
        """A request that was read already."""


@dataclass
class _Going:
    holder: Holder
    domain: Domain
    delayed: tuple[float, int]  # before (kernel.py)
    until: float
    missing: int  # of what has to happen
    owned: bool  # something ends with it that is in the tree
    done: Callable[[], object] | None  # closed by a client that waits for it

    def is_delayed(self, now: float) -> bool:
        """Whether it is not its worker's fault that it takes so long."""
        (before, had_run), (delayed, has_run) = self.delayed, kernel.delayed(self.holder.pid)
        self.delayed = before, has_run
        # Has it waited ever since we looked last? That does not count as delay before it is over.
        waits = has_run >= 0 and had_run in (-1, has_run)
        return now < self.until + (BUSY_SECONDS if waits else min(delayed - before, BUSY_SECONDS))

    def lanes(self) -> tuple[_LaneKey, ...]:
        """Of which it is one."""
        mine = self.domain, self.holder.uid, False
        return (mine, (self.domain, self.holder.uid, True)) if self.owned else (mine,)


@dataclass
class _Waiting:
    requests: list[bytes]  # one, and what interrupts it
    after: int  # in so many lanes


_Key = tuple["Asked", int]
_LaneKey = tuple[Domain, int, bool]


@dataclass
class _Lane:
    """What is going of one uid in one domain; all of it, or what is `owned`. Turns rise in both."""

    going: dict[int, int] = field(default_factory=dict)  # by number: its turn
    waiting: deque[tuple[int, _Key]] = field(default_factory=deque)  # for all up to this turn


class Closings:
    """Of all files. `busy`: whether there is any, so that requests must be shown to `postpone`."""

    def __init__(
        self,
        listen: Callable[[int, Callable[[Room], bool]], None],
        call: Callable[[Callable[[], None]], None],
    ) -> None:
        """`listen`: have it called when there is something to read; `call`: in the supervisor's thread."""
        self.busy = False
        self._call = call
        self._open: dict[int, bool] = {}  # by number of the worker: whether its connection is gone
        self._going: dict[int, _Going] = {}
        self._of: Counter[int] = Counter()  # how many of them, by uid
        self._lanes: dict[_LaneKey, _Lane] = {}
        self._turn = 0
        self._tardy: dict[int, float] = {}  # uids, until when
        self._look_at = 0.0
        self._waiting: dict[_Key, _Waiting] = {}
        self._ready: deque[_Key] = deque()
        self._lock = threading.Lock()
        self._bell, self._ring = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        listen(self._bell, self._go_on)

    def opened(self, number: int) -> None:
        """This worker serves a file."""
        self._open[number] = False

    def last(self, holder: Holder, domain: Domain) -> None:
        """Its connection ends, while its file is open."""
        with self._lock:
            if not self._open.get(holder.number, True) and holder.number not in self._going:
                self._begin(holder, domain, 1, None)

    def close(
        self, holder: Holder, domain: Domain, done: Callable[[], object] | None = None
    ) -> None:
        """Its file is closed; `done` is to be called when all see it."""
        with self._lock:
            gone = self._open.pop(holder.number, True)
            owned = holder.owned is not None
            missing = owned + (not gone)
            if missing:
                self._begin(holder, domain, missing, done)
        holder.end(released=True)
        if owned:
            self._call(partial(self._step, holder.number))
        elif not missing and done is not None:
            done()

    def left(self, number: int) -> None:
        """The broker says so: whatever this connection had is nobody's or another's."""
        self._step(number, left=True)

    def over(self, bus: str) -> None:
        """This bus has ended: of its connections nothing is said any more."""
        for number, each in list(self._going.items()):
            if each.holder.bus == bus:
                self._finish(number)

    def expire(self) -> None:
        """Give up on what takes too long."""
        now = time.monotonic()
        if now < self._look_at:
            return
        self._look_at = now + LOOK_SECONDS
        self._tardy = {uid: until for uid, until in self._tardy.items() if until > now}
        for number, each in list(self._going.items()):
            if each.until <= now and not each.is_delayed(now):
                self._tardy[each.holder.uid] = now + TARDY_SECONDS
                self._finish(number)

    def postpone(self, connection: Asked, request: bytes) -> bool:
        """Whether this request waits, for what was closed before."""
        opcode, unique, _, number = routing.route(request)
        with self._lock:
            if opcode == routing.INTERRUPT:
                if (waiting := self._waiting.get((connection, number))) is not None:
                    waiting.requests.append(request)
                return waiting is not None
            if opcode not in (_OF_FILES if number else _OF_TREES):
                return False
            after = self._awaited(connection.domain, caller.ids(request)[0], number == 0)
            if after:
                self._waiting[connection, unique] = _Waiting([request], len(after))
                for lane in after:
                    lane.waiting.append((self._turn, (connection, unique)))
            return bool(after)

    def _awaited(self, domain: Domain, uid: int, tree: bool) -> list[_Lane]:
        if len(self._lanes) > MAX_LANES:
            own = self._lanes.get((domain, uid, tree))
            return [own] if own else []
        return [
            lane
            for (where, who, what), lane in self._lanes.items()
            if where is domain and what == tree and (who == uid or self._is_quick(who))
        ]

    def _is_quick(self, uid: int) -> bool:
        return self._of[uid] <= MAX_FOR_OTHERS and self._tardy.get(uid, 0) <= time.monotonic()

    def _begin(
        self, holder: Holder, domain: Domain, missing: int, done: Callable[[], object] | None
    ) -> None:
        before = self._going.get(holder.number)
        patience = WAIT_SECONDS + len(self._going) * MORE_SECONDS
        until = before.until if before else time.monotonic() + patience
        delayed = before.delayed if before else (kernel.delayed(holder.pid)[0], -1)
        going = _Going(holder, domain, delayed, until, missing, holder.owned is not None, done)
        self._going[holder.number] = going
        self._of[holder.uid] += before is None
        self._turn += 1
        for key in going.lanes():
            self._lanes.setdefault(key, _Lane()).going.setdefault(holder.number, self._turn)
        self.busy = True

    def _step(self, number: int, left: bool = False) -> None:
        """One thing less is missing."""
        with self._lock:  # whole: whoever closes it meanwhile counts this as done, or waits for it
            if left and number in self._open:
                self._open[number] = True
            if (going := self._going.get(number)) is not None:
                going.missing -= 1
            done = going is not None and going.missing <= 0
        if done:
            self._finish(number)

    def _finish(self, number: int) -> None:
        with self._lock:
            if (going := self._going.pop(number, None)) is not None:
                self._of -= Counter([going.holder.uid])  # those of whom none is left are forgotten
                for key in going.lanes():
                    self._pass(key, number)
            if self._ready:
                with suppress(BlockingIOError):
                    os.write(self._ring, b"!")
            self.busy = bool(self._going or self._waiting)
        if going is not None and going.done is not None:
            going.done()

    def _pass(self, key: _LaneKey, number: int) -> None:
        """This one is gone from a lane: whoever waited for it, and for none before it, waits no more."""
        lane = self._lanes[key]
        del lane.going[number]
        first = next(iter(lane.going.values()), self._turn + 1)
        while lane.waiting and lane.waiting[0][0] < first:
            _, who = lane.waiting.popleft()
            self._waiting[who].after -= 1
            if not self._waiting[who].after:
                self._ready.append(who)
        if not lane.going:
            del self._lanes[key]

    def _go_on(self, _: Room) -> bool:
        """With one request that waits for nothing any more; the bell rings on while there are others."""
        with self._lock:
            key = self._ready.popleft() if self._ready else None
            waiting = None if key is None else self._waiting.pop(key)
            if not self._ready:
                with suppress(BlockingIOError):
                    os.read(self._bell, 4096)
            self.busy = bool(self._going or self._waiting)
        if key is not None and waiting is not None:
            for request in waiting.requests:
                key[0].give(request)
        return True
