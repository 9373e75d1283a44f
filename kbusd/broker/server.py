"""The broker's I/O: one thread, one epoll, lines to supervisor, launcher and every worker.

Reads records, hands them to `bus.py`, and is the Outside that it acts through. No worker blocks it: a
record that its reader does not take is queued. Till it takes that, nothing more is heard of it, so
that it can't have answers piled up; what others have sent to it may, and a worker with too much of it is
ended. So is, when half of our descriptors wait for workers or they have run out, the one for which most
wait. A line that breaks its rules costs its worker and nobody else; when the supervisor's line closes
the bus is over.

A Wake carries nothing: it is sent at the end of a turn and only if nothing else was sent to
that worker after the entry it is for. While a worker's socket is full it has records to read
anyway, and looks at the log when it does; so Wakes are never queued.
"""

from __future__ import annotations

import mmap
import os
import resource
import select
import socket
import time
from collections.abc import Sequence
from contextlib import suppress

import msgspec

from kbusd.broker.bus import Bus
from kbusd.broker.connection import At, Behind, Connection
from kbusd.broker.filtered import Filter
from kbusd.broker.guarded import Closers, Guarded
from kbusd.broker.log import Logs
from kbusd.broker.refusal import Violation
from kbusd.policy import configuration
from kbusd.rings.entries import (
    Assigned,
    BrokerMessage,
    BrokerReady,
    Discard,
    EndLaunch,
    EndpointMade,
    Endpoints,
    Entering,
    FromLauncher,
    Hello,
    Joined,
    Kill,
    Launch,
    LaunchEnded,
    LauncherLine,
    Left,
    Listening,
    LogEntry,
    Look,
    Looked,
    Reconfigured,
    ReloadAsked,
    ReloadWanted,
    SetEndpoint,
    SupervisorMessage,
    ToLauncher,
    Wake,
    WorkerGone,
    WorkerMessage,
    WorkerStarted,
)
from kbusd.rings.journal import Journal
from kbusd.rings.line import Line, LineError, adopt, close_all
from kbusd.rings.unread import ready
from kbusd.sandbox import selinux

MAX_QUEUED = 1024  # records for a worker that does not read; its socket holds some 200 more
LONGEST_SECONDS = 3600.0  # epoll_wait(2) takes an int of milliseconds
JOINED_SECONDS = 0.005  # after Hello: the supervisor can wait, while the client waits for its reply
SUPERVISOR_SECONDS = 1.0  # at most, till it says what it is about to say
_AFTER_SUPERVISOR = (Hello, SetEndpoint)
_LOST = int(socket.MSG_CTRUNC)
# By two workers: bell, side socket, carrier; whether descriptors may pass.
_SHARED = (False, True, False)
_SO_PASSRIGHTS = 83  # Linux 6.16
_STREAM = socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
_READ = select.EPOLLIN
_WRITE = select.EPOLLOUT


class _SupervisorLine(Line):
    """`lost`: the record that came last had a descriptor that we could not have: an admin has lowered our limit."""

    __slots__ = ("lost",)

    def _next(self, buffer: bytearray, flags: int) -> tuple[int, list[int], int]:
        size, fds, cut_short = super()._next(buffer, flags)
        self.lost = bool(cut_short & _LOST)
        return size, fds, cut_short & ~_LOST


class Server:
    """Runs one bus until the supervisor's line closes."""

    def __init__(
        self, supervisor: socket.socket, configuration_fd: int, address: str, owner: int
    ) -> None:
        self._journal = Journal("kbusd broker")
        self._log = Logs(lambda *at: self._bus.snapshot(*at), self._filter)
        self._supervisor = _SupervisorLine(supervisor, SupervisorMessage)
        self._launcher: Line | None = None
        self._to_launcher: list[ToLauncher] = []
        self._configuration = configuration_fd
        # Its threads have a journal of their own: one takes one thread at a time.
        self._closers = Closers(self._whose, Journal("kbusd broker").say)
        self._lines: dict[int, Guarded] = {}  # by worker
        self._workers: dict[int, int] = {}  # descriptor of a line -> worker
        self._wake_up: set[int] = set()
        self._joined: list[int] = []  # what the supervisor may know a moment later
        self._over = False
        self._failure: LineError | None = None
        self._broken: dict[int, str] = {}
        # Descriptors for workers; we will have as many as we could.
        self._most_waiting = resource.getrlimit(resource.RLIMIT_NOFILE)[1] // 2
        self._epoll = select.epoll()
        self._epoll.register(self._supervisor.fileno(), _READ)
        self._vectors: selinux.AccessVectors | None = None
        if selinux.enabled():
            # Still in the domain of the supervisor, which is the bus to its clients.
            self._vectors = selinux.AccessVectors(selinux.label(), self.say)
            self._epoll.register(self._vectors.fileno(), _READ)
        self._bus = Bus(self, read_configuration(configuration_fd), address, owner)

    def start_threads(self) -> None:
        """Before `run`, and before the process can start none any more. Raises OSError."""
        self._closers.start()

    def run(self) -> None:
        """Serve. Returns when the supervisor has closed its line; raises LineError if it erred."""
        self._supervisor.send(BrokerReady(), [self._log.fileno()])
        self._bus.ready()
        while not self._over:
            deadline = self._bus.deadline()
            timeout = -1.0
            if deadline is not None:
                timeout = min(max(0.0, deadline - self.now()), LONGEST_SECONDS)
            if self._joined:
                timeout = min(timeout, JOINED_SECONDS) if timeout >= 0 else JOINED_SECONDS
            ready = self._epoll.poll(timeout)
            while self._joined:
                self._tell_supervisor(Joined(self._joined.pop()))
            for fd, events in ready:
                self._ready(fd, events)
            if deadline is not None and self.now() >= deadline:
                self._bus.tick()
            self._finish_turn()
        if self._failure is not None:
            raise self._failure

    def _ready(self, fd: int, events: int) -> None:
        worker = self._workers.get(fd)
        if worker is not None:
            if events & _WRITE:
                self._flush(worker)
            if events & ~_WRITE:
                self._from_worker(worker)
        elif fd == self._supervisor.fileno():
            if events & _WRITE:
                self._flush_other(self._supervisor)
            if events & ~_WRITE:
                self._next_from_supervisor()  # most often there is one
        elif self._launcher is not None and fd == self._launcher.fileno():
            if events & _WRITE:
                self._flush_other(self._launcher)
            if events & ~_WRITE:
                self._from_launcher(self._launcher)
        elif self._vectors is not None and fd == self._vectors.fileno():
            self._vectors.forget()
            self._bus.labels_changed()

    def _finish_turn(self) -> None:
        while self._broken:
            worker, reason = self._broken.popitem()
            self._drop(worker, reason)
        for worker in self._wake_up:
            line = self._lines.get(worker)
            if line is not None:
                line.offer(Wake())
        self._wake_up.clear()

    # -- workers -------------------------------------------------------------------------------

    def _from_worker(self, worker: int) -> None:
        line = self._lines[worker]
        try:
            # One a turn: a flood starves nobody, and most often there is one.
            received = line.receive()
            if received is None:
                return
            message, fds = received
            try:
                connection = self._bus.connections[worker]
                known = connection.credentials is not None
                if not known or (connection.file and isinstance(message, _AFTER_SUPERVISOR)):
                    self._from_supervisor()  # what it said is there already, if this is honest
                if connection.credentials is None:
                    self._await_client(connection)
                if worker in self._lines:
                    self._bus.handle(connection, message, fds)
            finally:
                line.release(fds)
        except EOFError:
            self._forget(worker)
        except Violation as error:
            self._broken[worker] = f"its worker {error}"
        except LineError as error:
            self._broken[worker] = f"its worker broke the line's rules: {error}"
        except OSError as error:
            self._make_room()
            self._broken[worker] = f"its worker asked for what is not to be had: {error.strerror}"

    def _whose(self, worker: int) -> str:
        connection = self._bus.connections.get(worker)
        return f"worker {worker}" if connection is None else str(connection)

    def _drop(self, worker: int, reason: str) -> None:
        """A worker that broke the rules or does not read: have it ended, forget it now."""
        if worker in self._lines:
            self._tell_supervisor(Kill(worker, reason))
            self._forget(worker, reason)

    def _forget(self, worker: int, reason: str = "") -> None:
        line = self._lines.pop(worker, None)
        if line is not None:
            del self._workers[line.fileno()]
            self._epoll.unregister(line.fileno())
            line.close()
        self._wake_up.discard(worker)
        self._broken.pop(worker, None)
        connection = self._bus.connections.get(worker)
        self._bus.gone(worker, reason)
        if connection is not None and connection.file:
            self._tell_supervisor(Left(worker))

    def _flush(self, worker: int) -> None:
        line = self._lines[worker]
        try:
            if line.flush():
                self._epoll.modify(line.fileno(), _READ)
        except OSError:
            pass  # it is gone; its line says so next

    def _await_client(self, connection: Connection) -> None:
        """A worker was quick: the supervisor gives it a client, and then says so to us."""
        supervisor = self._supervisor.sock
        while connection.credentials is None and ready(
            supervisor, select.POLLIN, SUPERVISOR_SECONDS
        ):
            if not self._next_from_supervisor():
                return

    # -- supervisor and launcher ---------------------------------------------------------------

    def _from_supervisor(self) -> None:
        """All that it has said by now."""
        while self._next_from_supervisor():
            pass

    def _next_from_supervisor(self) -> bool:
        try:
            received = self._supervisor.receive()
            if received is not None:
                self._supervisor_says(*received)
            return received is not None
        except EOFError:
            self._over = True
        except LineError as error:
            self._over = True
            self._failure = error
        return False

    def _supervisor_says(self, message: SupervisorMessage, fds: list[int]) -> None:
        try:
            match message:
                case WorkerStarted(worker, pid, files) if (
                    len(fds) == 1 and worker not in self._lines
                ):
                    line = Guarded(adopt(fds.pop()), WorkerMessage, self._closers, worker)
                    self._lines[worker] = line
                    self._workers[line.fileno()] = worker
                    self._epoll.register(line.fileno(), _READ)
                    self._bus.worker_started(worker, pid, files)
                case WorkerStarted(worker, _) if self._supervisor.lost:
                    why = "the broker can have no more descriptors (RLIMIT_NOFILE)"
                    self._tell_supervisor(Kill(worker, why))
                case Assigned(worker, credentials, hasty, custom) if len(fds) <= 1:
                    pidfd = fds.pop() if fds else -1
                    self._bus.assigned(worker, credentials, hasty, custom, pidfd)
                case Entering(worker, credentials):
                    self._bus.entering(worker, credentials)
                case EndpointMade(worker):
                    self._bus.endpoint_made(worker)
                case WorkerGone(worker, reason):
                    self._forget(worker, reason)
                case LauncherLine() if len(fds) == 1:
                    self._start_launcher(adopt(fds.pop()))
                case LauncherLine() if self._supervisor.lost:
                    self.say("the launcher's line is lost: no more descriptors (RLIMIT_NOFILE)")
                case Reconfigured(generation) if len(fds) == 1:
                    self._reconfigure(fds.pop(), generation)
                case Reconfigured(generation) if self._supervisor.lost:
                    why = "can have no more descriptors (RLIMIT_NOFILE)"
                    self._keep_configuration(why, generation)
                case Reconfigured() if not fds:
                    self._bus.reconfigure(None)
                case ReloadAsked() if not fds:
                    self._bus.reload()
                case Listening(addresses) if not fds:
                    self._bus.endpoints.listening(addresses)
                case _:
                    raise LineError(f"the supervisor sent {message} with {len(fds)} descriptors")
        finally:
            close_all(fds)

    def _reconfigure(self, fd: int, generation: int) -> None:
        try:
            new = read_configuration(fd)
        except (msgspec.MsgspecError, OSError, ValueError) as error:
            os.close(fd)
            self._keep_configuration(error, generation)
            return
        os.close(self._configuration)
        self._configuration = fd
        self._bus.reconfigure(new, generation)

    def _keep_configuration(self, why: object, generation: int) -> None:
        self.say(f"the new configuration cannot be read, the one in force stays: {why}")
        self._bus.reconfigure(None, generation)

    def _start_launcher(self, sock: socket.socket) -> None:
        if self._launcher is not None:
            self._end_launcher(self._launcher)
        self._launcher = Line(sock, FromLauncher)
        self._epoll.register(sock.fileno(), _READ)
        self._bus.activation.watching.launcher_ready()
        waiting, self._to_launcher = self._to_launcher, []
        for message in waiting:
            self._tell_launcher(message)

    def _from_launcher(self, line: Line) -> None:
        try:
            while (received := line.receive()) is not None:
                message, fds = received
                close_all(fds)
                if isinstance(message, LaunchEnded):
                    self._bus.activation.ended(message.job, message.status, message.error)
                elif isinstance(message, Looked):
                    self._bus.activation.watching.looked(message)
                else:
                    self._bus.activation.watching.changed()
        except EOFError:
            self._end_launcher(line)
        except LineError as error:
            self.say(f"launcher: {error}")
            self._end_launcher(line)

    def _end_launcher(self, line: Line) -> None:
        self._epoll.unregister(line.fileno())
        line.close()
        self._launcher = None
        self._bus.activation.launcher_gone()

    def _tell_launcher(self, message: ToLauncher) -> None:
        if self._launcher is None:
            self._to_launcher.append(message)
            return
        self._send_other(self._launcher, message)

    def _tell_supervisor(self, message: msgspec.Struct) -> None:
        self._send_other(self._supervisor, message)

    def _send_other(self, line: Line, message: msgspec.Struct) -> None:
        try:
            line.send(message)
        except OSError:
            return  # it is gone; its line says so next
        if line.queue:
            self._epoll.modify(line.fileno(), _READ | _WRITE)

    def _flush_other(self, line: Line) -> None:
        try:
            if line.flush():
                self._epoll.modify(line.fileno(), _READ)
        except OSError:
            pass

    # -- what the core asks for (outside.py) -----------------------------------------------------

    def append(self, entry: LogEntry) -> None:
        self._log.append(entry)

    def stamp(self) -> int:
        return self._log.stamp

    def send(self, worker: int, message: BrokerMessage, fds: Sequence[int] = ()) -> None:
        line = self._lines.get(worker)
        if line is None:
            return
        self._wake_up.discard(worker)
        try:
            line.send(message, fds)
        except (BrokenPipeError, ConnectionResetError):
            return  # it is gone; its line says so next
        except OSError as error:
            if self._make_room():
                self.send(worker, message, fds)
            else:
                self._broken[worker] = f"cannot be sent to: {error.strerror}"
            return
        if line.queue:
            self._epoll.modify(line.fileno(), _WRITE)
            self._bus.leaves_unread(worker)
            if fds:
                self._make_room(self._most_waiting)
            if len(line.queue) > MAX_QUEUED:
                self._broken[worker] = f"its worker left {MAX_QUEUED} records unread"

    def _make_room(self, most: int = 0) -> bool:
        """If more than so many descriptors wait for workers, end the one that leaves most of them."""
        waiting = {
            worker: sum(len(fds) for _, fds in line.queue) for worker, line in self._lines.items()
        }
        if sum(waiting.values()) <= most:
            return False
        worker = max(waiting, key=waiting.__getitem__)
        self._lines[worker].discard()
        self._broken[worker] = f"its worker left {waiting[worker]} descriptors unread"
        return True

    def wake(self, worker: int) -> None:
        self._wake_up.add(worker)

    def joined(self, worker: int) -> None:
        self._joined.append(worker)

    def kill(self, worker: int, reason: str) -> None:
        self._broken[worker] = reason

    def discard(self, worker: int) -> None:
        self._tell_supervisor(Discard(worker))

    def reload(self) -> None:
        self._tell_supervisor(ReloadWanted())

    def listen(self, endpoints: tuple[str, ...]) -> None:
        self._tell_supervisor(Endpoints(endpoints))

    def launch(self, launch: Launch) -> None:
        self._tell_launcher(launch)

    def end_launch(self, job: int) -> None:
        self._tell_launcher(EndLaunch(job))

    def look(self, directories: tuple[str, ...]) -> None:
        self._tell_launcher(Look(directories))

    def snapshot(self, behind: Behind) -> list[int]:
        return self._log.snapshot(behind, self._bus.size())

    def state(self) -> tuple[bytes, At]:
        return self._log.state(self._bus.size())

    def reaches(self, at: At) -> bool:
        return self._log.reaches(at, self._bus.size())

    def policy(self) -> int:
        return self._configuration

    def socketpairs(self) -> tuple[list[int], list[int]]:
        pairs = [_socketpair(passes) for passes in _SHARED]
        return [one.detach() for one, _ in pairs], [other.detach() for _, other in pairs]

    def close(self, fd: int) -> None:
        os.close(fd)

    def dispose(self, fds: Sequence[int], worker: int) -> None:
        self._closers.close(worker, fds)

    def allows(self, subject: bytes | None, target: bytes | None, permission: str) -> bool:
        if self._vectors is None:
            return True
        bus = self._vectors.bus
        subject, target = (bus if each is None else each for each in (subject, target))
        return self._vectors.allows(subject, target, permission)

    def now(self) -> float:
        return time.monotonic()

    def say(self, text: str) -> None:
        self._journal.say(text)

    def _filter(self, behind: Behind) -> Filter:
        return Filter(behind, self._bus.shown, self._bus.inside(behind))


def _socketpair(passes: bool) -> tuple[socket.socket, socket.socket]:
    """For two workers that do not trust each other. Raises OSError."""
    pair = socket.socketpair(socket.AF_UNIX, _STREAM)
    for end in pair:
        # A byte out of band would be thrown away by who reads on, and the descriptors that it has with it closed.
        end.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
        if not passes:
            with suppress(OSError):  # older kernels: who is sent descriptors has to notice
                end.setsockopt(socket.SOL_SOCKET, _SO_PASSRIGHTS, 0)
    return pair


def read_configuration(fd: int) -> configuration.Configuration:
    """The configuration in a sealed memfd. Raises msgspec.DecodeError, OSError."""
    # Mapped: the file offset is shared with the other processes that hold the memfd.
    with mmap.mmap(fd, 0, access=mmap.ACCESS_READ) as data:
        return configuration.decode(data[:])
