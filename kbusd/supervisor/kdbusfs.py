"""The mount of kdbusfs: a connection (connection.py) with a tree of files, and a page cache for each.

Requests that are of no open file go to the tree, a worker that knows names, owners and access bits. One
that dies is followed by another, which is asked what it has left unanswered. A file's pool is read by
the kernel from a memfd of its worker's, and renewed when that says so.
"""

from __future__ import annotations

import errno
import os
import time
from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from struct import Struct
from typing import Any

from kbusd.cuse import abi, routing
from kbusd.rings import entries
from kbusd.rings.line import LineError
from kbusd.supervisor.connection import Connection
from kbusd.supervisor.device import Devices
from kbusd.supervisor.domains import HOST, Domain
from kbusd.supervisor.holder import Holder, Worker
from kbusd.supervisor.mount import mount, unmount

MAX_TREES = 8  # asked the same; more than die at once, as nobody looks whether a spare one lives
PATIENCE = 10.0  # seconds; a tree has everything that it is asked for in its memory
_FOPEN_NOFLUSH = 1 << 5
_INODE = Struct("=16xQ")
_UNANSWERED = frozenset({abi.FORGET, abi.BATCH_FORGET})


class Mount(Connection):
    """One mount; `nodes` are what is in it at first."""

    open_flags = _FOPEN_NOFLUSH  # without KEEP_CACHE: no file begins with what was another's

    def __init__(
        self, devices: Devices, path: str, nodes: tuple[entries.Node, ...], domain: Domain = HOST
    ) -> None:
        """Mounts. Raises MountError."""
        where, fuse, number = mount(path)
        super().__init__(devices, where, fuse, domain)
        devices.numbers.add(number)
        self.nodes = tuple(filter(None, map(domain.local, nodes)))
        self.tree: Holder | None = None
        self.early: deque[bytes] = deque()  # requests for a tree that is not there yet
        self.again: Counter[int] = Counter()  # how many trees have left them unanswered
        # What the tree was asked, and when; some of it is answered.
        self.asked: dict[int, float] = {}
        self.inodes: dict[int, int] = {}  # of open files: their numbers
        # By chmod(2) and chown(2), for the next tree; by bus and endpoint, "" for a directory.
        self.changed: dict[tuple[str, str], entries.Node] = {}
        self._want_tree(first=2)
        devices.listen(fuse, self.take)

    def publish(self, node: entries.Node) -> None:
        """It is in the tree from now on, if it is of this domain."""
        if (local := self.domain.local(node)) is not None:
            self._plant((*self.nodes, local))

    def withdraw(self, node: entries.Node) -> None:
        """It goes, if it is there, and whoever has it open is cut off."""
        local = self.domain.local(node)
        self._plant(tuple(each for each in self.nodes if each != local))
        for file in tuple(self.files.values()):
            if (file.bus, file.endpoint) == (node.bus, node.endpoint):
                file.cut()

    def _plant(self, nodes: tuple[entries.Node, ...]) -> None:
        self.nodes = nodes
        for gone in self.changed.keys() - self._names():
            del self.changed[gone]
        if (tree := self.tree) is not None:
            with suppress(OSError):
                tree.say(entries.Nodes(nodes))

    def _names(self) -> set[tuple[str, str]]:
        return {(each.bus, name) for each in self.nodes for name in (each.endpoint, "")}

    def stop(self) -> None:
        """Unmount."""
        if self.where:
            self.taken_away = True
            unmount(self.where)
            self.where = ""

    def leave(self) -> None:
        """Unmount, and cut off who has a file open; the connection ends when the last has closed it."""
        self.taken_away = True
        unmount(self.where)
        for file in tuple(self.files.values()):
            file.cut()

    # -- the tree ----------------------------------------------------------------------------------

    def _want_tree(self, first: int) -> None:
        self.first = first
        me = entries.Credentials(os.geteuid(), os.getegid(), os.getpid())
        work = partial(self._employ_tree, first)
        self.devices.call(partial(self.host.openers.add, me, work))

    def _employ_tree(self, first: int, worker: Worker, credentials: entries.Credentials) -> None:
        tree = Holder(worker, entries.FromTree, credentials.uid, 0, self.devices.late)
        with suppress(OSError):
            tree.say(entries.Tree(self.nodes, first, tuple(self.changed.values())))
        self.tree = tree  # before anybody can hear that it is gone, or it would stay
        self.listen_to(tree)
        self._ask_tree()

    def other(self, opcode: int, unique: int, request: bytes) -> None:
        self.early.append(request)
        self._ask_tree()

    def _ask_tree(self) -> None:
        for _ in range(len(self.early)):
            with suppress(IndexError):
                if (tree := self.tree) is not None:
                    self._ask_this(tree, self.early.popleft())

    def _ask_this(self, tree: Holder, request: bytes) -> None:
        opcode, unique, _, _ = routing.route(request)
        if opcode in _UNANSWERED:
            self.pass_on(tree, request)
            return
        inode = _INODE.unpack_from(request)[0]
        file = self.files.get(self.inodes.get(inode, 0)) if inode < self.first else None
        if file is not None:
            with suppress(OSError):
                tree.say(entries.Open(inode, file.bus[len(self.domain.prefix) :], file.endpoint))
        self.held[unique] = tree, request
        self.asked[unique] = time.monotonic()
        self.look()
        if not self.pass_on(tree, request) and self.held.pop(unique, None) is not None:
            self.early.append(request)  # the next tree can answer it as well
            if self.tree is not tree:
                self._ask_tree()

    def look(self) -> None:
        """Whoever holds a request of somebody for ever is no tree."""
        while self.asked:
            try:
                unique, at = next(iter(self.asked.items()))
            except (StopIteration, RuntimeError):
                continue  # another thread is at it, too
            if self.held.get(unique, (None, b""))[0] is self.tree is not None:
                if time.monotonic() - at < PATIENCE:
                    return self.devices.watch(self)
                self.asked.clear()  # the next one is asked again
                return self.accuse(self.tree, f"has not answered for {PATIENCE:.0f} s")
            self.asked.pop(unique, None)

    def inode(self, unique: int, number: int) -> int:
        """That of no other open file, or one's worker could write what another reads."""
        _, request = self.held.get(unique, (None, b""))
        inode: int = _INODE.unpack_from(request)[0] if request else 0
        if self.inodes.setdefault(inode, number) != number:
            self.fail(unique, errno.ESTALE)
        return inode

    def _release(self, holder: Holder, done: Callable[[], object] | None = None) -> None:
        if self.inodes.get(holder.node) == holder.number:
            del self.inodes[holder.node]
        super()._release(holder, done)

    def left(self, holder: Holder, uniques: list[int]) -> list[int]:
        """The next tree is asked again, but for ever is not for what each of them dies of."""
        if holder is not self.tree:
            return uniques
        self.again = Counter({each: self.again[each] + 1 for each in uniques})
        hopeless = [each for each in uniques if self.again[each] >= MAX_TREES]
        self.early += [self.held.pop(each)[1] for each in self.again if each not in hopeless]
        self.tree = None
        # It has numbered fewer than there were nanoseconds.
        self._want_tree(first=time.monotonic_ns())
        return hopeless

    def may_push(self, holder: Holder) -> None:
        if holder.pool < 0:
            raise LineError("pushed pages of a pool that it has not given")

    def said(self, holder: Holder, message: Any, fds: list[int]) -> None:
        match message, fds:
            case entries.Opened(unique), []:
                self.held[unique] = None, self.request_of(holder, unique, abi.OPEN)
                self.devices.call(partial(self.grant, message))
            case entries.Changed(unique, node), []:
                self.request_of(holder, unique, abi.SETATTR)
                if (node.bus, node.endpoint) in self._names():
                    self.changed[node.bus, node.endpoint] = node
            case entries.Pool(events_at), [fd] if holder.pool < 0:
                holder.take_pool(fd, events_at)
                fds.clear()
            case _:
                super().said(holder, message, fds)
