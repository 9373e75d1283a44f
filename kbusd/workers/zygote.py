"""The zygote: a clean process that has imported what a worker needs, and forks workers.

fd 3: line to the supervisor; 4: compiled configuration; 5, 6, 7: its own and the workers' compiled
sandbox profiles, for sockets and for files; 8: the control log; 9: who made the bus, if a program did. It holds no secret and never sees a client. Everything is
imported before the first fork (late imports die under seccomp) and frozen out of the garbage
collector's sight, so that a worker shares these pages as long as it lives.

Workers are asked for as others get a client. Forking would disturb that client, so it waits until
nothing more is asked for a moment, unless the supervisor is in a hurry.
"""

from __future__ import annotations

import contextlib
import gc
import os
import select
import signal
import socket
import sys
from _thread import allocate_lock
from collections.abc import Callable
from importlib import import_module
from typing import NamedTuple, NoReturn

import msgspec

from kbusd.rings import entries
from kbusd.rings.line import Line, LineError, pair
from kbusd.sandbox import apply
from kbusd.sandbox.compiled import Compiled
from kbusd.sandbox.compiled import decode as decode_compiled
from kbusd.workers import worker
from kbusd.workers.context import Context, read_all
from kbusd.workers.rehearsal import Rehearsal

QUIET_SECONDS = 0.001
REHEARSALS = 16  # Python 3.11 specialises code that has run eight times


class Locking(NamedTuple):
    """A worker that has not said yet that it is locked down; till then no client may get it."""

    number: int
    pid: int
    supervisors: socket.socket
    brokers: socket.socket


class Zygote:
    """Forks a worker for each Fork, says what became of it."""

    def __init__(self, context: Context, for_files: Compiled, line: Line) -> None:
        self.context = context
        self.for_files = for_files
        self.line = line
        self.wanted: list[entries.Fork] = []
        self.hurry = False
        self.workers: dict[int, int] = {}
        self.locking: dict[int, Locking] = {}  # by the pipe that they say it on
        self.epoll = select.epoll(flags=select.EPOLL_CLOEXEC)

    def fork(self) -> None:
        """Fork those that are wanted. One right after the other: between two forks we, too, would copy
        every page that we write to."""
        nests = [(each, pair(), pair(), os.pipe2(os.O_CLOEXEC)) for each in self.wanted]
        pids: list[int] = []
        for each, (_, ours), (_, theirs), (_, writer) in nests:
            pids.append(os.fork())
            if pids[-1] == 0:
                self._live(each, ours, theirs, writer)
        for pid, (each, line, brokers, (reader, writer)) in zip(pids, nests, strict=True):
            os.close(writer)
            line[1].close()
            brokers[1].close()
            self.locking[reader] = Locking(each.worker, pid, line[0], brokers[0])
            self.epoll.register(reader, select.EPOLLIN)
        self.wanted.clear()
        self.hurry = False

    def _live(
        self, fork: entries.Fork, ours: socket.socket, theirs: socket.socket, writer: int
    ) -> NoReturn:
        """The worker's life."""
        try:
            # What else we have inherited is closed by the lock-down, before a client comes.
            context = self.context
            if fork.files:
                context = msgspec.structs.replace(context, profile=self.for_files)
            worker.main(context, ours, theirs, writer, not self.hurry)
        except BaseException as error:  # the process ends here, whatever it was
            os.write(2, f"kbusd-worker: {type(error).__name__}: {error}\n".encode())
            if os.environ.get("KBUSD_TRACEBACK"):
                sys.excepthook(*sys.exc_info())
        finally:
            os._exit(70)

    def locked(self, reader: int) -> None:
        """The worker says one byte, or has ended."""
        number, pid, supervisors, brokers = self.locking.pop(reader)
        self.epoll.unregister(reader)  # by itself it leaves only when no child has it either
        said = os.read(reader, 1)
        os.close(reader)
        with supervisors, brokers:
            if not said:
                raise SystemExit("kbusd-zygote: a worker could not be confined; see above")
            self.workers[pid] = number
            pidfd = os.pidfd_open(pid)
            fds = [supervisors.fileno(), brokers.fileno(), pidfd]
            self.line.send(entries.Forked(number, pid), fds)
            os.close(pidfd)

    def reap(self) -> None:
        while self.workers or self.locking:
            ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if ended is None:
                return
            # It may have said that it is locked down just before: that goes out first.
            for reader in [fd for fd, each in self.locking.items() if each.pid == ended.si_pid]:
                self.locked(reader)
            pid, status = os.waitpid(ended.si_pid, 0)
            code = os.waitstatus_to_exitcode(status)
            self.line.send(entries.Ended(self.workers.pop(pid), code))

    def receive(self) -> None:
        while (received := self.line.receive()) is not None:
            message, fds = received
            match message:
                case entries.Fork():
                    self.wanted.append(message)
                    self.hurry |= message.hurry
                case entries.Configured(generation):
                    new = read_all(fds[0])
                    self.context = self.context.with_configuration(new, generation)
                    os.close(fds[0])
                    gc.collect()
                    gc.freeze()

    def run(self) -> None:
        reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.siginterrupt(signal.SIGCHLD, False)  # close(2), say, can't be tried again
        self.epoll.register(reader, select.EPOLLIN)
        self.epoll.register(self.line.fileno(), select.EPOLLIN)
        while True:
            seconds = 0.001 if self.line.queue else QUIET_SECONDS if self.wanted else None
            ready = self.epoll.poll(seconds)
            for fd, _ in ready:
                if fd == reader:
                    with contextlib.suppress(BlockingIOError):
                        os.read(reader, 4096)
                    self.reap()
                elif fd in self.locking:
                    self.locked(fd)
                else:
                    self.receive()
            if not ready or self.hurry:
                self.fork()
            self.line.flush()


_POOL = 16384  # of Python's allocator, for objects of one size up to 512 bytes
_POOL_HEAD = 48
_MOST_HOLES = 2000  # of one size
_MOST_LARGE = 2 << 20  # bytes of those above
_filling: list[object] = []


def _fill_holes() -> None:
    """Take the places of objects that are gone. They are scattered over pages that workers share, of
    which each would be copied for one new object of a worker; its new ones lie side by side now: the
    next of each size is the first of a pool, whose head is on the same page, or at the end of the heap."""
    empty = sys.getsizeof(b"")
    end, room = id(bytes(100_000)), _MOST_LARGE
    for size in range(8192, 512, -16):
        make = lambda size=size: bytes(size - empty)
        room -= size * _fill(make, lambda at: at >= end, room // size)
    _filling.extend(allocate_lock() for _ in range(500))  # of 32 bytes that are malloc's
    for size in range(512, 32, -16):
        _fill(lambda size=size: bytes(size - empty), _begins_a_pool)  # type: ignore[misc]
    numbers = iter(range(_MOST_HOLES))
    _fill(lambda: float(next(numbers)), _begins_a_pool)  # of 32 bytes
    _fill(object, _begins_a_pool)  # of 16


def _fill(
    make: Callable[[], object], is_beyond: Callable[[int], bool], most: int = _MOST_HOLES
) -> int:
    """With things of one size, until the next is not in a hole any more; returns how many."""
    for count in range(most):
        new = make()
        if is_beyond(id(new)):
            return count
        _filling.append(new)
    return most


def _begins_a_pool(at: int) -> bool:
    return at % _POOL == _POOL_HEAD


def main() -> None:
    _, guid, supervisor, generation, *kinds = sys.argv
    if "kdbus" in kinds:
        import_module("kbusd.workers.kdbus_device")  # which costs every worker some memory
        import_module("kbusd.workers.tree")
    own, workers, for_files = (decode_compiled(read_all(fd)) for fd in (5, 6, 7))
    line = Line(socket.socket(fileno=3), entries.ToZygote)
    made = "made" in kinds
    maker = read_all(9) if made else b""
    kdbus = "kdbus" in kinds
    context = Context.make(guid, int(supervisor), read_all(4), workers, 8, maker, kdbus)
    context = msgspec.structs.replace(context, generation=int(generation))
    for fd in (4, 5, 6, 7, 9) if made else (4, 5, 6, 7):
        os.close(fd)
    try:
        for _ in range(REHEARSALS):
            Rehearsal(context).play(worker.serve)
    except OSError as error:
        raise SystemExit(f"kbusd-zygote: cannot rehearse: {error.strerror}") from None
    apply.confine(own, keep_fds=[0, 1, 2, 3, 8])
    zygote = Zygote(context, for_files, line)
    gc.collect()
    _fill_holes()
    gc.freeze()
    try:
        zygote.run()
    except (EOFError, LineError, ConnectionError):
        pass  # the bus has ended
    except OSError as error:  # the system is out of something; the supervisor knows what to do
        raise SystemExit(f"kbusd-zygote: cannot make a worker: {error.strerror}") from None


if __name__ == "__main__":
    main()
