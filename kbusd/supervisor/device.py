"""The devices of a bus, and the threads that serve them: its mount of kdbusfs, its CUSE nodes.

    a connection (connection.py) has a request      -> it takes it
    a worker that serves an open file says something -> its connection hears it
    what is the supervisor's own to do               -> `attend`, in its thread

Why threads, in a process that otherwise has none. To put bytes into a page of the cache waits while that
page is being read, and it is us who are asked for it. To copy from a client's memory may mean to
read a page of our own file, or of a file system of the client's that never answers. So whatever may
wait is done inside `aside` (aside.py). One thread listens and does everything; another looks every
TICK_SECONDS, while there is traffic, whether it is stuck in there. If so, a new one takes over; the
descriptor whose event the stuck one deals with is off until then, so what one process says is dealt with
in order. What is shared is changed by single operations of Python's dicts.
"""

from __future__ import annotations

import os
import select
import threading
import traceback
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Protocol

from kbusd.rings import entries
from kbusd.supervisor.aside import Aside
from kbusd.supervisor.clients import Clients
from kbusd.supervisor.closing import Closings
from kbusd.supervisor.domains import HOST, Domain
from kbusd.supervisor.holder import Holder, Host
from kbusd.supervisor.ready import Ready
from kbusd.supervisor.relay import Room

MAX_WAITING = 1024  # messages for a worker that does not listen

Handler = Callable[[Room], bool | None]
"""Called when there is something to read, with room for it; says whether to listen on, None if it has seen to
that by itself."""


class Transport(Protocol):
    """One way in which clients find the nodes of the tree."""

    domain: Domain

    def publish(self, node: entries.Node) -> None:
        """It is there from now on, if it is of this domain. Raises OSError."""

    def withdraw(self, node: entries.Node) -> None:
        """No more, and whoever has it open is cut off."""

    def stop(self) -> None:
        """Take all of it away; this process ends."""

    def leave(self) -> None:
        """Take all of it away; this process goes on."""


class Watched(Protocol):
    """What has to be looked at though nothing happens."""

    def look(self) -> None: ...


class Devices:
    """All devices of one bus. `bell` is readable when `attend` is to be called."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.transports: list[Transport] = []
        self.queues: dict[str, Clients] = {}  # by the bus of the node; a prefix for control
        self.domains = {HOST.prefix: HOST}  # the bus of whose control node is this
        self.endpoints: dict[tuple[str, str], int] = {}  # custom ones, by bus and node
        self.numbers: set[int] = set()  # of our devices: what no process of ours may have open
        self.slow: set[Holder] = set()  # whom we have more to say than they listen to
        self.watched: set[Watched] = set()  # what is to be looked at from time to time
        self.bell, self._ring = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._jobs: deque[Callable[[], None]] = deque()
        self.epoll = select.epoll()
        self.handlers: dict[int, Handler] = {}
        self._alarm, self._wake = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self.aside = Aside(self._take_over, self._start_thread)
        self.listen(self._alarm, self._woken)
        self.closings = Closings(self.listen, self.call)
        self._start_thread()

    # -- the supervisor's thread -----------------------------------------------------------------

    def attend(self) -> None:
        """Do what was asked for by `call` until now."""
        with suppress(BlockingIOError):
            os.read(self.bell, 4096)
        for _ in range(len(self._jobs)):
            self._jobs.popleft()()

    def stop(self) -> None:
        """Take every device away. With the end of this process, whoever has one open gets ENOTCONN."""
        for transport in self.transports:
            transport.stop()

    def clients_of(self, domain: Domain, bus: str) -> Clients | None:
        """Where those wait who open a node of this bus in this domain; "": its control node."""
        return None if "/" in bus else self.queues.get(domain.prefix + bus)

    def domain_of(self, bus: str) -> Domain | None:
        """In which a bus is, if that is still there."""
        return self.domains.get(bus[: bus.rfind("/") + 1])

    def endpoint(self, domain: Domain, opened: entries.Opened) -> int | None:
        """The number of a custom endpoint, 0 for another node; None if it is gone."""
        if not opened.bus or opened.endpoint == "bus":
            return 0
        return self.endpoints.get((domain.prefix + opened.bus, opened.endpoint))

    # -- any thread --------------------------------------------------------------------------------

    def call(self, job: Callable[[], None]) -> None:
        """Have something done in the supervisor's thread."""
        self._jobs.append(job)
        with suppress(BlockingIOError):
            os.write(self._ring, b"!")

    def kill(self, holder: Holder, reason: str) -> None:
        """It broke a rule."""
        self.call(partial(self.host.kill, holder.number, reason))

    def listen(self, fd: int, handler: Handler) -> None:
        """Call it whenever there is something to read."""
        self.handlers[fd] = handler
        self.epoll.register(fd, select.EPOLLIN)

    def forget(self, fd: int) -> None:
        """Before it is closed. Its handler may be at work once more, unless it is that which calls."""
        with suppress(OSError):  # it is off
            self.epoll.unregister(fd)
        del self.handlers[fd]

    def watch(self, what: Watched) -> None:
        """Have a look at it within a second or so."""
        if what not in self.watched:
            self.watched.add(what)
            self._alert()

    def late(self, holder: Holder) -> None:
        """Something waits for it, or may do so no more: whoever listens is to flush it."""
        self.slow.add(holder)
        self._alert()

    def _alert(self) -> None:
        if threading.get_ident() != self.aside.listener:
            with suppress(BlockingIOError):
                os.write(self._wake, b"!")

    def pause(self, holder: Holder) -> None:
        """Not to listen to it till it may be heard."""
        fd = holder.line.fileno()
        if (handler := self.handlers.get(fd)) is not None:
            self.turn(fd, handler, on=False)
            holder.paused = True
            self.late(holder)

    # -- threads that listen -----------------------------------------------------------------------

    def _woken(self, _: Room) -> bool:
        with suppress(BlockingIOError):
            os.read(self._alarm, 4096)
        return True

    def _start_thread(self) -> None:
        threading.Thread(target=self._serve, name="kbusd-device", daemon=True).start()

    def _serve(self) -> None:
        """Listen, until stuck for once."""
        Ready(self.epoll.fileno()).serve(self, self.aside, self.handlers, self.slow)

    def _take_over(self) -> None:
        """Who listens is stuck, with the event of `aside.event`."""
        event = self.aside.event
        if (handler := self.handlers.get(event)) is not None:
            self.turn(event, handler, on=False)

    def turn(self, fd: int, handler: Handler, on: bool) -> None:
        """A descriptor is not listened to any more, or is again; if it is not that of another by now."""
        if self.handlers.get(fd) is handler:
            with suppress(OSError):  # it is so already
                if on:
                    self.epoll.register(fd, select.EPOLLIN)
                else:
                    self.epoll.unregister(fd)

    def flush(self) -> None:
        """Try again with those that are slow, and give up on those that take too long to go."""
        for holder in tuple(self.slow):
            self.slow.discard(holder)
            waiting = holder.flush()
            if waiting > MAX_WAITING:
                self.kill(holder, f"leaves {MAX_WAITING} requests unread")
            if holder.paused and (holder.may_be_heard() or waiting > MAX_WAITING):
                holder.paused = False
                fd = holder.line.fileno()
                if (handler := self.handlers.get(fd)) is not None:
                    self.turn(fd, handler, on=True)
            if waiting or holder.paused:
                self.slow.add(holder)
        for what in tuple(self.watched):
            self.watched.discard(what)
            what.look()
        if self.closings.busy:
            self.closings.expire()
        if self.aside.left:
            self.aside.let_go()
            self.aside.close_left()

    def bug(self, error: Exception) -> None:
        """A handler ended so."""
        at = traceback.extract_tb(error.__traceback__)[-1]
        what = f"{error!r} in {at.filename}:{at.lineno}"
        self.host.journal.warn(f"a bug of kbusd's devices: {what}; what was asked for is lost")
