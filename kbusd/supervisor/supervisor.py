"""The supervisor's loop: what it waits for, and what it does then.

    socket readable  -> accept, ask the kernel who it is; the client waits for its turn
    a spare worker   -> hand the client whose turn it is over, tell the broker
    broker says      -> Kill: end that worker; Joined: its client is complete;
                        ReloadWanted: read the configuration again
    zygote says      -> Forked: a spare more; Ended: tell the broker
    a child ends     -> broker: the bus ends; zygote, launcher: started again; reader: configured
    no descriptors,  -> what exists goes on; what could not be started is tried again, later each
    memory, processes   time; a configuration stays in force till another is read
    SIGTERM, SIGINT  -> end everything, leave nothing; SIGHUP: the broker wants it read again

Privileged: it holds the listening sockets and may end any process of the bus. It reads nothing
that a client wrote. Trusts the kernel and its configuration; decodes what children say by type.
"""

from __future__ import annotations

import os
import signal
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import count, islice
from resource import RLIMIT_NOFILE, getrlimit
from select import POLLIN, POLLOUT, poll
from socket import MSG_DONTWAIT, MSG_NOSIGNAL, SHUT_RD, socket

import msgspec

from kbusd.rings import entries, memfd
from kbusd.rings.line import Line, LineError, adopt, close_all, pair
from kbusd.rings.unread import dispose, ready
from kbusd.sandbox import apply, kernel
from kbusd.sandbox import compile as sandbox
from kbusd.sandbox.errors import describe
from kbusd.supervisor.clients import Client, Clients, accept, credentials_of, pidfd_of
from kbusd.supervisor.journal import Journal
from kbusd.supervisor.listen import Listener, open_endpoint
from kbusd.supervisor.spawn import spawn

BROKER = "kbusd.broker"
LAUNCHER = "kbusd.supervisor.launcher"
READER = "kbusd.policy.reader"
ZYGOTE = "kbusd.workers.zygote"

SPARES = 4
# Encoded, as it is the first that is done with a processor's caches cold.
SOON, WITHOUT_WAITING = msgspec.msgpack.encode(entries.Soon()), int(MSG_DONTWAIT | MSG_NOSIGNAL)
FDS_PER_WORKER = 5  # line, pidfd, a client that waits; in kdbusfs a pool; one in case of need
OTHER_FDS = 64
NOT_AUTHENTICATED = 64  # may come on top of max_connections_per_user, which the broker sees to
START_SECONDS, STOP_SECONDS = 30.0, 5.0
# After the system ran out of something, or a process ended by itself; twice that the next time, and so on.
RETRY_SECONDS, MAX_RETRY_SECONDS = 0.1, 5.0


# Given where its errors are to go, returns the process's id and the memfd with the outcome. Raises OSError.
Read = Callable[[int], tuple[int, int]]


class StartError(Exception):
    """The bus could not be started; the text says which process and why."""


class Settings(msgspec.Struct, frozen=True):
    """The part of the compiled configuration that the supervisor acts on."""

    user: str
    limits: dict[str, int]
    sockets: dict[str, str]  # of endpoints; "": what the paths of others begin with
    digest: bytes = b""


@dataclass(eq=False)
class Pool:
    """Workers of one kind that wait, and the clients that wait for them. A connect costs a hand-over
    while `wanted` last; forking one takes about 2 ms."""

    wanted: int
    clients: Clients
    files: bool = False  # of devices, for which its workers are locked down
    spare: deque[Worker] = field(default_factory=deque)


@dataclass(eq=False)
class Worker:
    number: int
    pid: int
    pidfd: int
    line: Line
    pool: Pool
    client: entries.Credentials | None = None

    def __str__(self) -> str:
        who = f" of pid {self.client.pid}, uid {self.client.uid}" if self.client else " (spare)"
        return f"worker {self.number} (pid {self.pid}){who}"


class Supervisor:
    """Runs one bus until it is told to stop.

    `data`: the compiled configuration; `read` starts the process that reads another.
    `signals`: where the numbers of signals arrive, one byte each."""

    def __init__(
        self, data: bytes, listeners: list[Listener], journal: Journal, signals: int, read: Read
    ) -> None:
        self._configure(data)
        self.listeners = listeners
        self.guid = uuid.uuid4().hex
        self.address = ";".join(f"{each.address},guid={self.guid}" for each in reversed(listeners))
        self.journal, self.signals, self.read = journal, signals, read
        # How often the configuration has become another; the memfds of a reader at work, and of the log.
        self.generation, self.reading, self.log_fd = 0, -1, -1
        self.exit_status: int | None = None
        self.children: dict[int, str] = {}  # process id -> module
        self.lines: dict[str, Line] = {}  # to broker and zygote
        self.profiles: dict[str, int] = {}  # sealed memfds
        self.missing: set[str] = set()  # modules that are to run and do not
        # When to start them, and spare workers, again; till when to accept nobody.
        self.retry_at = self.pause_until = 0.0
        self.delay = RETRY_SECONDS
        self.workers: dict[int, Worker] = {}
        self.clients = Clients()  # by sockets
        self.pools = [Pool(SPARES, self.clients)]
        self.forking: dict[int, Pool] = {}  # by the number of the worker
        self.numbers = count(1)  # of workers
        self.incomplete: dict[int, entries.Share] = {}  # worker -> of whom no Hello has come
        self.kinds: tuple[str, ...] = ()  # what workers can be, besides for sockets

    # -- start and end -------------------------------------------------------------------------

    def start(self) -> None:
        """Start every process of the bus and wait until a client can be served.

        Raises StartError, and SandboxError if a confinement can't be had."""
        kernel.prctl(kernel.PR_SET_CHILD_SUBREAPER, 1)  # workers of a dead zygote come to us
        profiles = sandbox.compile_all(self.settings.user)
        self.soft_files = getrlimit(RLIMIT_NOFILE)[0]  # confine raises it
        for warning in apply.confine(profiles["supervisor"]):
            self.journal.warn(warning)
        for name, profile in profiles.items():
            self.profiles[name] = memfd.sealed(f"kbusd-profile-{name}", sandbox.encode(profile))
        self.max_workers = (getrlimit(RLIMIT_NOFILE)[0] - OTHER_FDS) // FDS_PER_WORKER
        self._start_broker()
        deadline = time.monotonic() + START_SECONDS
        while not self.pools[0].spare:
            self._turn(0.5)
            if self.exit_status is not None or self.retry_at or time.monotonic() > deadline:
                raise StartError("no worker got ready, in time or at all; see the lines above")

    def _start(self, module: str, arguments: Sequence[str], *fds: int) -> socket:
        """Start another process of the bus; returns our end of its line, whose other is its 3."""
        ours, theirs = pair()
        with theirs:
            places = dict(enumerate((theirs.fileno(), *fds), 3))
            self.children[spawn(module, arguments, places, self.journal.stderr)] = module
        return ours

    def _start_broker(self) -> None:
        arguments = ["--guid", self.guid, "--address", self.address]
        ours = self._start(BROKER, arguments, self.configuration, self.profiles["broker"])
        self.lines[BROKER] = Line(ours, entries.ToSupervisor)

    def _start_launcher(self) -> None:
        # With a service's limit, as we got it.
        with self._start(LAUNCHER, [str(self.soft_files)], self.profiles["launcher"]) as ours:
            self._tell(BROKER, entries.LauncherLine(), [ours.fileno()])

    def _start_zygote(self) -> None:
        arguments = [self.guid, str(os.getpid()), str(self.generation), *self.kinds]
        profiles = (self.profiles[name] for name in ("zygote", "worker", "kdbus-worker"))
        fds = self.configuration, *profiles, self.log_fd
        self.lines[ZYGOTE] = Line(self._start(ZYGOTE, arguments, *fds), entries.FromZygote)
        self.forking.clear()

    def stop(self, until: float = 0.0) -> None:
        """End every process of the bus and remove its sockets. Nothing of it is left after, unless it
        waits for what never answers, then or STOP_SECONDS later."""
        until = until or time.monotonic() + STOP_SECONDS
        while self.listeners:
            self.listeners.pop().close()
        # Not reaped yet, so the numbers are their own.
        ends = {pid: os.pidfd_open(pid) for pid in self.children}
        for pidfd in (*ends.values(), *(worker.pidfd for worker in self.workers.values())):
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        for pid, pidfd in ends.items():
            # What waits for a file system ends when that answers.
            ready(pidfd, POLLIN, max(0.0, until - time.monotonic()))
            os.close(pidfd)
            os.waitpid(pid, os.WNOHANG)
        self.journal.relay()

    # -- the loop ------------------------------------------------------------------------------

    def run(self) -> int:
        """Serve until told to stop; returns the exit status."""
        while self.exit_status is None:
            self._turn(RETRY_SECONDS if self.waits() else None)
        return self.exit_status

    def waits(self) -> bool:
        """Whether there will be something to do though nothing happens."""
        return self.retry_at > 0 or self.pause_until > time.monotonic()

    def _turn(self, seconds: float | None) -> None:
        """Wait, so long at most, and do what there is to do."""
        waiting = poll()
        actions = {}
        for fd, events, action in self.sources():
            waiting.register(fd, events)
            actions[fd] = action
        for fd, _ in waiting.poll(None if seconds is None else seconds * 1000):
            if self.exit_status is None:
                actions[fd]()
        self.settle()

    def settle(self) -> None:
        """What there is to do, whatever has happened."""
        if BROKER in self.lines and not self.lines[BROKER].queue:  # else it could not keep up
            self._serve()
        if self.retry_at <= time.monotonic():
            self.retry_at = 0.0
            self._start_missing()
            # Forking would disturb those who are about to say Hello.
            if not self.incomplete or any(p.wanted // 2 > len(p.spare) for p in self.pools):
                self._refill()

    def sources(self) -> Iterator[tuple[int, int, Callable[[], None]]]:
        """What we wait for now: descriptor, events, and what to do then."""
        yield self.signals, POLLIN, self._signalled
        for module, line in self.lines.items():
            events = POLLIN | POLLOUT if line.queue else POLLIN
            yield line.fileno(), events, partial(self._receive, module)
        if self.journal.pipe >= 0:
            yield self.journal.pipe, POLLIN, self.journal.relay
        if self.clients.waiting() < self.max_workers and self.pause_until <= time.monotonic():
            for listener in self.listeners:
                yield listener.sock.fileno(), POLLIN, partial(self._accept, listener)

    def _tell(self, module: str, message: msgspec.Struct, fds: Sequence[int] = ()) -> None:
        with suppress(OSError, KeyError):  # it is gone; waitpid will say so
            self.lines[module].send(message, fds)

    def _receive(self, module: str) -> None:
        if (line := self.lines.get(module)) is None:
            return  # in this very turn it was seen that its process has ended
        try:
            while (received := line.receive()) is not None:
                self.said(*received)
            line.flush()
        except (EOFError, LineError, OSError) as error:
            if isinstance(error, LineError):
                self.journal.warn(f"{module}: {error}")
            # It ends by that, if it has not already, and waitpid will say so.
            self.lines.pop(module).close()

    def said(self, message: msgspec.Struct, fds: list[int]) -> None:
        """What broker and zygote say; which of these each may say is settled by its line's type."""
        match message, fds:
            case entries.BrokerReady(), [log_fd] if self.log_fd < 0:
                self.log_fd = log_fd
                self.missing |= {LAUNCHER, ZYGOTE}
            case entries.Kill(number, reason), []:
                with suppress(KeyError, ProcessLookupError):  # it has ended already
                    self.journal.warn(f"ending {self.workers[number]}: {reason}")
                    signal.pidfd_send_signal(self.workers[number].pidfd, signal.SIGKILL)
            case entries.Discard(number), []:
                if (worker := self.workers.get(number)) and worker in worker.pool.spare:
                    worker.pool.spare.remove(worker)
                    worker.line.close()  # it ends by that
            case entries.Joined(number), []:
                self.incomplete.pop(number, None)
                self.delay = RETRY_SECONDS
            case entries.ReloadWanted(), []:
                self._reload()
            case entries.Endpoints(names), []:
                self._listen(names[:512])
            case entries.Forked(number, pid), [line_fd, broker_fd, pidfd] if number in self.forking:
                line, pool = Line(adopt(line_fd), entries.ToSupervisor), self.forking.pop(number)
                self.workers[number] = worker = Worker(number, pid, pidfd, line, pool)
                if not pool.files:
                    line.sock.shutdown(SHUT_RD)  # or what it says there would be closed here
                pool.spare.append(worker)
                self._tell(BROKER, entries.WorkerStarted(number, pid, pool.files), [broker_fd])
                os.close(broker_fd)
            case entries.Ended(number, code), []:
                self._worker_ended(number, code)
            case _:
                close_all(fds)
                raise LineError(f"sent {message} with {len(fds)} descriptors")

    # -- clients and workers -------------------------------------------------------------------

    def _listen(self, names: Sequence[str]) -> None:
        """For these endpoints, and no others, too."""
        for each in [each for each in self.listeners if each.endpoint not in ("", *names)]:
            self.listeners.remove(each)
            each.close()
        for name in set(names) - {each.endpoint for each in self.listeners}:
            try:
                path = self.settings.sockets.get(name) or self.settings.sockets[""]
                self.listeners.append(open_endpoint(name, path))
            except OSError as error:
                self.journal.warn(f"cannot listen for endpoint {name}: {error.strerror}")
        self._tell(BROKER, entries.Listening({e.endpoint: e.address for e in self.listeners}))

    def _accept(self, listener: Listener) -> None:
        # It gets ready while we look who comes; where many come, no processor is free for that.
        if len(spare := self.pools[0].spare) == SPARES and not self.incomplete:
            with suppress(OSError):  # it has ended
                spare[0].line.sock.send(SOON, WITHOUT_WAITING)
        try:
            client = accept(listener.sock)
            credentials = credentials_of(client, listener.endpoint)
        except OSError as error:
            if not isinstance(error, BlockingIOError):  # else it has gone again
                self.journal.warn(f"cannot accept a client: {error.strerror}")
                self.pause_until = time.monotonic() + RETRY_SECONDS
            return
        limit = self.settings.limits["max_connections_per_user"] + NOT_AUTHENTICATED
        if why := self.clients.refusal(credentials, limit):
            self.journal.warn(f"refused pid {credentials.pid}: uid {credentials.uid} {why}")
            return dispose(client)
        self.clients.add(credentials, client)

    def _serve(self) -> None:
        """Give spare workers to those whose turn it is."""
        for pool in self.pools:
            while pool.spare and (turn := pool.clients.next(self._may_have_a_worker)):
                self._give(pool.spare.popleft(), *turn)

    def _give(self, worker: Worker, credentials: entries.Credentials, client: Client) -> None:
        worker.client = credentials
        endpoint, fds = getattr(client, "endpoint", 0), list[int]()
        if hasty := isinstance(client, socket):
            self.incomplete[worker.number] = credentials.share
            try:
                who = entries.Client(credentials, kernel.uid_map(credentials.pid), self.generation)
                worker.line.send(who, [client.fileno()])
            except OSError as error:
                self.journal.warn(f"disconnected the client of {worker}: {error.strerror}")
                worker.line.close()  # it ends by that
            with client, suppress(OSError):
                fds.append(pidfd_of(client))
        else:
            client(worker, credentials)
        # Second, so that the broker does not take the processor that this worker is about to have.
        self._tell(BROKER, entries.Assigned(worker.number, credentials, hasty, endpoint), fds)
        close_all(fds)

    def _may_have_a_worker(self, share: entries.Share) -> bool:
        """Nobody takes more than half of what is left of the places for those without a Hello."""
        free = self.settings.limits["max_incomplete_connections"] - len(self.incomplete)
        return list(self.incomplete.values()).count(share) < free

    def _refill(self) -> None:
        for pool in self.pools:
            missing = pool.wanted - len(pool.spare) - list(self.forking.values()).count(pool)
            hurry = bool(self.workers) and len(pool.spare) < pool.wanted // 2
            room = self.max_workers - len(self.workers) - len(self.forking)
            for number in islice(self.numbers, max(0, min(missing, room))):
                self._tell(ZYGOTE, entries.Fork(number, hurry, pool.files))
                self.forking[number] = pool

    def _worker_ended(self, number: int, code: int) -> None:
        if (worker := self.workers.pop(number, None)) is None:
            return
        self.incomplete.pop(number, None)
        if reason := describe(code) if code else "":
            self.journal.warn(f"{worker} {reason}")
        if worker.client is not None:
            self.clients.of[worker.client.share] -= 1
        elif worker in worker.pool.spare:
            worker.pool.spare.remove(worker)
            self._lose()
        self._tell(BROKER, entries.WorkerGone(number, reason))
        worker.line.close()
        os.close(worker.pidfd)

    def _start_missing(self) -> None:
        while self.missing:
            module = self.missing.pop()
            try:
                getattr(self, f"_start_{module.rpartition('.')[2]}")()  # _start_zygote, say
            except OSError as error:
                self.journal.warn(f"cannot start {module}: {error.strerror}")
                return self._lose(module)

    def _lose(self, *modules: str) -> None:
        """Something ended by itself, or could not be started. It is made anew; later each time, until
        a client is served again."""
        self.missing.update(modules)
        self.retry_at = time.monotonic() + self.delay
        self.delay = min(2 * self.delay, MAX_RETRY_SECONDS)

    # -- configuration -------------------------------------------------------------------------

    def _configure(self, data: bytes) -> None:
        self.settings = msgspec.msgpack.decode(data, type=Settings)
        self.configuration = memfd.sealed("kbusd-configuration", data)

    def _reload(self) -> None:
        if self.reading < 0:
            self.missing.add(READER)

    def _start_reader(self) -> None:
        pid, self.reading = self.read(self.journal.stderr)
        self.children[pid] = READER

    def _configuration_read(self, code: int) -> None:
        if code == 0:
            before = self.settings.digest
            os.close(self.configuration)  # one descriptor, for the new one
            self._configure(os.pread(self.reading, os.fstat(self.reading).st_size, 0))
            self.journal.say("configuration read again")
            self.generation += self.settings.digest != before  # else nobody needs to fetch it
            self._tell(ZYGOTE, entries.Configured(self.generation), [self.configuration])
        else:
            self.journal.warn("configuration not read again; the one in force stays")
        os.close(self.reading)
        self.reading = -1
        self._tell(BROKER, entries.Reconfigured(self.generation), [self.configuration][code != 0 :])

    # -- signals and children ------------------------------------------------------------------

    def _signalled(self) -> None:
        for number in set(os.read(self.signals, 512)):
            if number == signal.SIGCHLD:
                self._reap()
            elif number == signal.SIGHUP:
                self._tell(BROKER, entries.ReloadAsked())
            else:
                self.exit_status = 0

    def _reap(self) -> None:
        with suppress(ChildProcessError):
            while (pid := (ended := os.waitpid(-1, os.WNOHANG))[0]) != 0:
                self.ended(pid, os.waitstatus_to_exitcode(ended[1]))

    def ended(self, pid: int, code: int) -> None:
        """A process has, which may be of this bus."""
        if module := self.children.pop(pid, ""):
            self._child_ended(module, pid, code)
        for worker in [each for each in self.workers.values() if each.pid == pid]:
            self._worker_ended(worker.number, code)

    def _child_ended(self, module: str, pid: int, code: int) -> None:
        self._receive(module)  # its last words
        if module in self.lines:  # a worker that is not locked down yet has the other end
            self.lines.pop(module).close()
        if module == READER:
            return self._configuration_read(code)
        self.journal.warn(f"{module} (pid {pid}) {describe(code)}")
        # A zygote that fails before there is a worker could not confine the first.
        if (module == ZYGOTE and (code <= 0 or self.workers)) or (module == LAUNCHER and code <= 0):
            self._lose(module)
        else:
            self.exit_status = 1
