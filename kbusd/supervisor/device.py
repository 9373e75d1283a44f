"""Serves the files of kdbusfs: passes each request of the kernel to whom it concerns, and back.

    request with a file's handle  -> the worker that serves this open file
    any other                     -> the tree, a worker that knows names, owners and access bits
    READ, WRITE, FLUSH, RELEASE   -> answered here: from the pool, with an errno, by closing the line
    a worker asks                 -> memory or descriptors of the caller of a request that it holds

Privileged, and reads nothing that a client wrote: of a request the head that kbusd/cuse/routing.py
gives, of an answer the head. What workers say is hostile; one that breaks the rules is ended. Nobody
gets at a request, a page or a poller but by the request or the file that is his.

Why threads, in a process that otherwise has none. To put bytes into a page of the cache waits while that
page is being read, and it is us who are asked for it. To copy from a client's memory may mean to
read a page of our own file, or of a file system of the client's that never answers. Whichever thread is
stuck so, another takes the next event: all of them run the same loop. An event source is off from when
it is taken until it has been dealt with (EPOLLONESHOT), so what one process says is dealt with in
order, and by one thread at a time. What is shared is changed by single operations of Python's dicts.
"""

from __future__ import annotations

import errno
import os
import select
import threading
import time
from collections import Counter, deque
from contextlib import suppress
from struct import Struct
from typing import Any

from kbusd.cuse import abi, replies, routing
from kbusd.rings import entries
from kbusd.rings.line import LineError, close_all
from kbusd.supervisor import caller, reach
from kbusd.supervisor.holder import Holder, Host, Worker
from kbusd.supervisor.mount import mount, unmount

THREADS = 3
FAIR = 64  # messages of one worker before it is somebody else's turn
MAX_REQUEST = (128 << 10) + 4096
MAX_WAITING = 1024  # messages for a worker that does not listen
MAX_TREES = 8  # asked the same; more than die at once, as nobody looks whether a spare one lives
RETRY_SECONDS = 0.01
_FOPEN_NOFLUSH = 1 << 5
_NUMBER = Struct("=Q")
_READ = Struct("=QI")  # offset, size; behind the handle
_BEHIND_HANDLE = routing.HEADER_SIZE + 8
_ARMED = select.EPOLLIN | select.EPOLLONESHOT
_UNANSWERED = frozenset({abi.FORGET, abi.BATCH_FORGET})
# Of a file; FLUSH is not asked for again after ENOSYS.
_REFUSALS = {abi.WRITE: errno.EINVAL, abi.FLUSH: errno.ENOSYS}

Work = entries.Opened | entries.Tree


class Device:
    """One mount of kdbusfs; `node` is what is in it."""

    def __init__(self, path: str, node: entries.Node, host: Host) -> None:
        """Mounts. Raises MountError."""
        self.nodes = (node,)
        self.host = host
        self.path, self.fuse, self.number = mount(path)
        self.epoll = select.epoll()
        self.epoll.register(self.fuse, _ARMED)
        self.tree: Holder | None = None
        self.early: deque[bytes] = deque()  # requests for a tree that is not there yet
        self.again: Counter[int] = Counter()  # how many trees have left them unanswered
        self.files: dict[int, Holder] = {}  # by handle, which is the worker's number
        self.by_fd: dict[int, Holder] = {}
        self.held: dict[int, tuple[Holder | None, bytes]] = {}  # None: by us, for want of a worker
        self.slow: set[Holder] = set()
        self.jobs: deque[Work | entries.Kill] = deque()
        self.bell, self._ring = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)  # there are jobs
        self.aside = reach.Aside(self._start_thread, THREADS)
        self._call_for(entries.Tree(self.nodes, first=2))
        for _ in range(THREADS):
            self._start_thread()

    # -- the supervisor's thread -----------------------------------------------------------------

    def attend(self) -> None:
        """Let who wants a worker wait for one; end who must go."""
        with suppress(BlockingIOError):
            os.read(self.bell, 4096)
        while self.jobs:
            match self.jobs.popleft():
                case entries.Opened(unique) as opened:
                    _, request = self.held.get(unique, (None, b""))
                    if request:  # else it was interrupted meanwhile
                        self._admit(opened, caller.credentials(request))
                case entries.Tree() as tree:
                    me = entries.Credentials(os.geteuid(), os.getegid(), os.getpid())
                    self.host.clients.add(me, tree)
                case entries.Kill() as kill:
                    self.host.said(kill, [])

    def _admit(self, opened: entries.Opened, credentials: entries.Credentials) -> None:
        limit = self.host.settings.limits["max_connections_per_user"]
        if self.host.clients.of[credentials.uid] < limit:
            self.host.clients.add(credentials, opened)
            return
        why = f"uid {credentials.uid} has {limit} connections (limit max_connections_per_user)"
        self.host.journal.warn(f"refused a file to pid {credentials.pid}: {why}")
        self._fail(opened.unique, errno.EMFILE)

    def employ(self, worker: Worker, work: Work, credentials: entries.Credentials) -> None:
        """This worker is to serve a file that somebody opens, or to be the tree."""
        if isinstance(work, entries.Tree):
            tree = Holder(worker, entries.FromTree, credentials.uid, 0, self.slow)
            self._join(tree, work)
            return self._ask_tree()
        file = Holder(worker, entries.FromDeviceWorker, credentials.uid, work.node, self.slow)
        self.files[file.number] = file
        self._join(file, entries.Device(credentials, work.bus, work.endpoint, work.flags))
        reply = replies.opened(work.unique, file.number, abi.FOPEN_KEEP_CACHE | _FOPEN_NOFLUSH)
        if self.held.pop(work.unique, None) is None or not self._write(reply):
            self._release(file)  # nobody waits for it any more

    def stop(self) -> None:
        """Unmount. With the end of this process, whoever has a file open gets ENOTCONN."""
        if self.path:
            unmount(self.path)
            self.path = ""

    # -- the loop --------------------------------------------------------------------------------

    def _start_thread(self) -> None:
        threading.Thread(target=self._serve, name="kbusd-device", daemon=True).start()

    def _serve(self) -> None:
        buffer = bytearray(MAX_REQUEST)
        while True:
            for fd, _ in self.epoll.poll(RETRY_SECONDS if self.slow else None, 1):
                if fd == self.fuse:
                    self._take_request(buffer)
                else:
                    self._hear(self.by_fd[fd])
            for holder in tuple(self.slow):
                if holder.flush() > MAX_WAITING:
                    reason = f"leaves {MAX_WAITING} requests unread"
                    self._call_for(entries.Kill(holder.number, reason))

    def _take_request(self, buffer: bytearray) -> None:
        try:
            size = os.readv(self.fuse, [buffer])
            self._request(bytes(memoryview(buffer)[:size]))
        except OSError as error:
            if error.errno == errno.ENODEV and self.path:
                return self.host.journal.warn(f"{self.path} was unmounted; restart to have it back")
            # ENOENT, EAGAIN: it was taken back.
        except ValueError as error:
            self.host.journal.warn(f"{self.path}: the kernel sent {error}")
        self.epoll.modify(self.fuse, _ARMED)

    def _request(self, request: bytes) -> None:
        opcode, unique, _, number = routing.route(request)
        if opcode == routing.INTERRUPT:
            self._interrupt(number, request)
        elif number == 0:
            self.early.append(request)
            self._ask_tree()
        elif (holder := self.files.get(number)) is None:
            self._write(replies.failure(unique, errno.ENOTCONN))
        elif opcode == abi.IOCTL:
            self._ask(holder, unique, request)
        elif opcode == abi.POLL:
            (holder.kernel_handle,) = _NUMBER.unpack_from(request, _BEHIND_HANDLE)
            self._ask(holder, unique, request)
        elif opcode == abi.READ:
            data = holder.read(*_READ.unpack_from(request, _BEHIND_HANDLE))
            self._write(
                replies.reply(unique, data) if data else replies.failure(unique, errno.EINVAL)
            )
        elif opcode == abi.RELEASE:
            self._release(holder)
            self._write(replies.reply(unique))
        else:
            self._write(replies.failure(unique, _REFUSALS.get(opcode, errno.ENOTDIR)))

    def _ask(self, holder: Holder, unique: int, request: bytes, held: bool = True) -> None:
        if held:
            self.held[unique] = holder, request
        with suppress(OSError):
            if not holder.gone:
                return holder.send(entries.Asked(request))
        if held and holder.node:
            self._fail(unique, errno.ECONNRESET)
        elif self.held.pop(unique, None) is not None:  # the next tree can answer it as well
            self.early.append(request)
            if self.tree is not holder:
                self._ask_tree()

    def _ask_tree(self) -> None:
        for _ in range(len(self.early)):
            with suppress(IndexError):
                if (tree := self.tree) is not None:
                    request = self.early.popleft()
                    opcode, unique, _, _ = routing.route(request)
                    self._ask(tree, unique, request, held=opcode not in _UNANSWERED)

    def _interrupt(self, unique: int, request: bytes) -> None:
        holder, _ = self.held.get(unique, (None, b""))
        if holder is not None:
            self._ask(holder, 0, request, held=False)
        else:
            self._fail(unique, errno.EINTR)  # if it is there, it waits for a worker

    def _release(self, holder: Holder) -> None:
        self.files.pop(holder.number, None)
        holder.end(released=True)

    def _write(self, reply: bytes) -> bool:
        """False if nobody waits for it any more."""
        try:
            os.write(self.fuse, reply)
        except OSError:
            return False
        return True

    def _fail(self, unique: int, number: int) -> None:
        if self.held.pop(unique, None) is not None:
            self._write(replies.failure(unique, number))

    # -- what workers say ------------------------------------------------------------------------

    def _join(self, holder: Holder, work: entries.Device | entries.Tree) -> None:
        with suppress(OSError):
            holder.send(work)
        if isinstance(work, entries.Tree):
            self.tree = holder  # before anybody can hear that it is gone, or it would stay
        self.by_fd[holder.line.fileno()] = holder
        self.epoll.register(holder.line.fileno(), _ARMED)

    def _hear(self, holder: Holder) -> None:
        try:
            for _ in range(FAIR):
                if (received := holder.line.receive()) is None:
                    break
                message, fds = received
                if type(message) is entries.Answered and not fds:
                    self._answered(holder, message.reply)
                else:
                    self._said(holder, message, fds)
            self.epoll.modify(holder.line.fileno(), _ARMED)
        except EOFError:
            self._lose(holder)
        except Exception as error:  # noqa: BLE001 (whatever it is, this worker brought it about)
            self._call_for(entries.Kill(holder.number, str(error)))
            self._lose(holder)

    def _call_for(self, job: Work | entries.Kill) -> None:
        self.jobs.append(job)
        with suppress(BlockingIOError):
            os.write(self._ring, b"!")

    def _lose(self, holder: Holder) -> None:
        """Its process is gone, or as good as; whoever waits for it must not do so for ever."""
        self.epoll.unregister(holder.line.fileno())
        del self.by_fd[holder.line.fileno()]
        holder.end(gone=True)
        left = [unique for unique, (who, _) in list(self.held.items()) if who is holder]
        if holder is self.tree:
            # The next is asked again, but for ever is not for what each of them dies of.
            self.again = Counter({each: self.again[each] + 1 for each in left})
            left = [each for each in left if self.again[each] >= MAX_TREES]
            self.early += [self.held.pop(each)[1] for each in self.again if each not in left]
            self.tree = None
            # It has numbered fewer than there were nanoseconds.
            self._call_for(entries.Tree(self.nodes, first=time.monotonic_ns()))
        for unique in left:
            self._fail(unique, errno.ECONNRESET)
        if holder.kernel_handle:
            self._write(replies.wake(holder.kernel_handle))

    def _answered(self, holder: Holder, reply: bytes) -> None:
        if len(reply) < abi.OUT_HEADER.size:
            raise LineError(f"an answer of {len(reply)} bytes")
        length, error, unique = abi.OUT_HEADER.unpack_from(reply)
        if length != len(reply) or not -512 < error <= 0:
            raise LineError(f"an answer of {len(reply)} bytes says {length}, error {error}")
        self._request_of(holder, unique)
        del self.held[unique]
        self._write(reply)

    def _request_of(self, holder: Holder, unique: int, opcode: int | None = None) -> bytes:
        """The request of this number, if it holds it. Raises LineError."""
        who, request = self.held.get(unique, (None, b""))
        if who is not holder or (opcode is not None and routing.route(request)[0] != opcode):
            raise LineError(f"meddled with request {unique}, which it does not hold")
        return request

    def _said(self, holder: Holder, message: Any, fds: list[int]) -> None:
        try:
            match message, fds:
                case entries.Opened(unique), []:
                    self.held[unique] = None, self._request_of(holder, unique, abi.OPEN)
                    self._call_for(message)
                case entries.Nudge(), []:
                    if holder.kernel_handle:
                        self._write(replies.wake(holder.kernel_handle))
                case entries.Pool(), [fd] if holder.pool < 0:
                    holder.take_pool(fd)
                    fds.clear()
                case entries.Push(offset, size), [] if holder.pool >= 0:
                    with self.aside.work(holder.uid):
                        reach.push(self.fuse, holder, offset, size)
                case ((entries.Copy() | entries.Store() | entries.Take() | entries.AskFacts()), []):
                    request = self._request_of(holder, message.unique, abi.IOCTL)
                    with self.aside.work(holder.uid):
                        reach.serve(holder, message, caller.ids(request)[2], self.number)
                case _:
                    raise LineError(f"said {type(message).__name__} with {len(fds)} descriptors")
        finally:
            if fds:
                with self.aside.work(holder.uid):
                    close_all(fds)
