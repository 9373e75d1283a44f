"""The supervisor's loop: one table of processes, one of workers, handlers of a few lines.

    socket readable  -> accept, read the kernel's facts, tell the broker, hand to a spare worker
    zygote says      -> Forked: a spare more; Ended: tell the broker, fork another
    broker says      -> Kill: end that worker; ReloadWanted: read the configuration again
    a child ends     -> broker: the bus ends; zygote, launcher: started again
    SIGTERM, SIGINT  -> end everything, leave nothing; SIGHUP: read the configuration again

Privileged: it holds the listening sockets and may end any process of the bus. It reads nothing
that a client wrote. Trusts the kernel and its configuration; decodes what children say by type.
"""

from __future__ import annotations

import contextlib
import os
import resource
import selectors
import signal
import socket
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec
import prctl

from kbusd.rings import entries
from kbusd.rings.line import Line, LineError, pair
from kbusd.sandbox.errors import SandboxError
from kbusd.supervisor import profiles
from kbusd.supervisor.clients import credentials_of
from kbusd.supervisor.journal import Journal
from kbusd.supervisor.listen import Listener
from kbusd.supervisor.spawn import sealed_memfd, spawn

SPARE_WORKERS = 4  # a connect costs a hand-over while these last; forking one takes about 2 ms
FEW_SPARES = 2  # so few are made up for at once, else when it is quiet: forking disturbs a connect
QUIET_SECONDS = 0.005
MAX_SPARES_LOST = 16  # in a row: something is wrong with all of them
FDS_PER_WORKER = 3  # line, pidfd, and for a moment the broker's end or the client
OTHER_FDS = 64
MAX_RESTARTS = 5
RESTART_SECONDS = 10.0
START_SECONDS = 30.0
STOP_SECONDS = 2.0
RETRY_SECONDS = 0.1  # after the system ran out of something


class StartError(Exception):
    """The bus could not be started; the text says which process and why."""


class Settings(msgspec.Struct, frozen=True):
    """The part of the compiled configuration that the supervisor acts on."""

    type: str | None
    user: str | None
    fork: bool
    keep_umask: bool
    syslog: bool
    pidfile: str | None
    listen: tuple[str, ...]
    limits: dict[str, int]
    warnings: tuple[str, ...] = ()


@dataclass
class Worker:
    number: int
    pid: int
    pidfd: int
    line: Line
    client: entries.Credentials | None = None

    def __str__(self) -> str:
        who = f" of pid {self.client.pid}, uid {self.client.uid}" if self.client else " (spare)"
        return f"worker {self.number} (pid {self.pid}){who}"


class Supervisor:
    """Runs one bus until it is told to stop. `read_configuration` returns (process id, pipe)."""

    def __init__(
        self,
        configuration: bytes,
        listeners: Sequence[Listener],
        guid: str,
        journal: Journal,
        read_configuration: Callable[[], tuple[int, int]],
    ) -> None:
        self.settings = msgspec.msgpack.decode(configuration, type=Settings)
        self.configuration = sealed_memfd("kbusd-configuration", configuration)
        self.listeners = list(listeners)
        self.guid = guid
        self.address = ";".join(f"{each.address},guid={guid}" for each in listeners)
        self.journal = journal
        self.read_configuration = read_configuration
        self.selector = selectors.DefaultSelector()
        self.children: dict[int, str] = {}
        self.workers: dict[int, Worker] = {}
        self.spare: deque[Worker] = deque()
        self.by_uid: Counter[int] = Counter()
        self.next_worker = 1
        self.forking = 0
        self.spares_lost = 0
        self.restarts: list[float] = []
        self.max_workers = SPARE_WORKERS
        self.listening = False
        self.pause_until = 0.0
        self.exit_status: int | None = None
        self.reading: tuple[int, int, bytearray] | None = None
        self.reload_again = False
        self.log_fd = -1
        self.stderr = 2

    # -- start ---------------------------------------------------------------------------------

    def start(self) -> None:
        """Start every process of the bus and wait until a client can be served."""
        prctl.set_child_subreaper(True)  # workers of a dead zygote come to us
        self._watch_signals()
        if self.journal.relays:
            self._relay_stderr()
        try:
            self.compiled = profiles.compile_all(self.settings.user)
            self.files = resource.getrlimit(resource.RLIMIT_NOFILE)  # confine raises it
            for warning in profiles.confine(self.compiled["supervisor"]):
                self.journal.warn(warning)
        except SandboxError as error:
            raise StartError(str(error)) from None
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0] - OTHER_FDS
        self.max_workers = max(files // FDS_PER_WORKER, SPARE_WORKERS)
        self.broker = self._start_broker()
        self._start_launcher()
        self._start_zygote()
        deadline = time.monotonic() + START_SECONDS
        while not self.spare and self.exit_status is None:
            if time.monotonic() > deadline:
                raise StartError(f"no worker was ready within {START_SECONDS:.0f} s")
            self._turn(0.5)
        if self.exit_status is not None:
            raise StartError("a process of the bus ended while starting; see the lines above")

    def _start(self, name: str, messages: object, arguments: Sequence[str], *fds: int) -> Line:
        ours, theirs = pair()
        with theirs:
            pid = spawn(name, arguments, [theirs.fileno(), *fds], self.stderr)
        self.children[pid] = name
        return Line(ours, messages)

    def _start_broker(self) -> Line:
        line = self._start(
            "kbusd.broker",
            entries.ToSupervisor,
            ["--guid", self.guid, "--address", self.address],
            self.configuration,
            self.compiled["broker"],
        )
        line.sock.settimeout(START_SECONDS)
        try:
            received = line.receive()
        except (EOFError, LineError, OSError) as error:
            raise StartError(f"the broker did not start: {error}") from None
        if received is None or not isinstance(received[0], entries.BrokerReady):
            raise StartError("the broker's first word was not BrokerReady")
        (self.log_fd,) = received[1]
        line.sock.setblocking(False)
        self.selector.register(line, selectors.EVENT_READ, self._from_broker)
        return line

    def _start_launcher(self) -> None:
        ours, theirs = pair()
        with ours, theirs:
            pid = spawn(
                "kbusd.supervisor.launcher",
                [],
                [theirs.fileno(), self.compiled["launcher"]],
                self.stderr,
            )
            resource.prlimit(pid, resource.RLIMIT_NOFILE, self.files)  # a service's, as we got it
            self.children[pid] = "kbusd.supervisor.launcher"
            self._tell(self.broker, entries.LauncherLine(), [ours.fileno()])

    def _start_zygote(self) -> None:
        self.zygote = self._start(
            "kbusd.workers.zygote",
            entries.FromZygote,
            [self.guid, str(os.getpid())],
            self.configuration,
            self.compiled["zygote"],
            self.compiled["worker"],
            self.log_fd,
        )
        self.selector.register(self.zygote, selectors.EVENT_READ, self._from_zygote)
        self.forking = 0
        self._refill()

    # -- the loop ------------------------------------------------------------------------------

    def run(self) -> int:
        """Serve until told to stop; returns the exit status."""
        try:
            while self.exit_status is None:
                self._turn(None)
        finally:
            self.stop()
        return self.exit_status or 0

    def _turn(self, timeout: float | None) -> None:
        wanted = bool(self.spare) and not self.broker.queue and time.monotonic() >= self.pause_until
        if wanted != self.listening:
            self._listen(wanted)
        short = len(self.spare) + self.forking < SPARE_WORKERS
        if self.pause_until > time.monotonic():
            timeout = RETRY_SECONDS
        elif short:
            timeout = QUIET_SECONDS
        ready = self.selector.select(timeout)
        for key, _ in ready:
            if self.exit_status is None:
                key.data()
        if short and self.exit_status is None and (not ready or len(self.spare) < FEW_SPARES):
            self._refill()
        for line in (self.broker, self.zygote):
            self._flush(line)

    def _listen(self, on: bool) -> None:
        for listener in self.listeners:
            if on:
                self.selector.register(
                    listener.sock, selectors.EVENT_READ, lambda it=listener: self._accept(it)
                )
            else:
                self.selector.unregister(listener.sock)
        self.listening = on

    def _tell(self, line: Line, message: msgspec.Struct, fds: Sequence[int] = ()) -> None:
        try:
            line.send(message, fds)
        except OSError:
            pass  # it is gone; its end is noticed by waitpid

    def _flush(self, line: Line) -> None:
        if line.queue:
            with contextlib.suppress(OSError):
                line.flush()
        if line.sock.fileno() >= 0 and line in self.selector.get_map():
            events = selectors.EVENT_READ | (selectors.EVENT_WRITE if line.queue else 0)
            key = self.selector.get_key(line)
            if key.events != events:
                self.selector.modify(line, events, key.data)

    # -- clients -------------------------------------------------------------------------------

    def _accept(self, listener: Listener) -> None:
        while self.spare and not self.broker.queue:
            try:
                client, _ = listener.sock.accept()
            except BlockingIOError:
                return
            except OSError as error:
                self.journal.warn(f"cannot accept a client: {error.strerror}")
                self.pause_until = time.monotonic() + RETRY_SECONDS
                return
            with client:
                client.setblocking(False)  # for the worker, which may not change it
                self._serve(client)

    def _serve(self, client: socket.socket) -> None:
        try:
            credentials = credentials_of(client)
        except OSError as error:
            self.journal.warn(f"refused a client: the kernel does not say who it is: {error}")
            return
        limit = self.settings.limits.get("max_connections_per_user", 1 << 30) + 64
        if self.by_uid[credentials.uid] >= limit:
            self.journal.warn(
                f"refused pid {credentials.pid}: uid {credentials.uid} has {limit} connections"
                " already (limit max_connections_per_user and 64 not yet authenticated)"
            )
            return
        worker = self.spare.popleft()
        self.spares_lost = 0
        worker.client = credentials
        self.by_uid[credentials.uid] += 1
        self._tell(self.broker, entries.Assigned(worker.number, credentials))
        self._tell(worker.line, entries.Client(credentials), [client.fileno()])

    # -- workers -------------------------------------------------------------------------------

    def _refill(self) -> None:
        room = self.max_workers - len(self.workers) - self.forking
        for _ in range(min(room, SPARE_WORKERS - len(self.spare) - self.forking)):
            self._tell(self.zygote, entries.Fork(self.next_worker))
            self.next_worker += 1
            self.forking += 1

    def _from_zygote(self) -> None:
        try:
            while (received := self.zygote.receive()) is not None:
                message, fds = received
                if isinstance(message, entries.Forked):
                    self._forked(message, fds)
                else:
                    self._ended(message.worker, message.status)
        except (EOFError, LineError) as error:
            if isinstance(error, LineError):
                self.journal.warn(f"zygote: {error}")
            self.selector.unregister(self.zygote)
            self.zygote.close()  # its end comes by SIGCHLD

    def _forked(self, message: entries.Forked, fds: list[int]) -> None:
        line_fd, broker_fd, pidfd = fds
        self.forking -= 1
        line = Line(socket.socket(fileno=line_fd), entries.ToSupervisor)
        worker = Worker(message.worker, message.pid, pidfd, line)
        self.workers[message.worker] = worker
        self._tell(self.broker, entries.WorkerStarted(message.worker, message.pid), [broker_fd])
        os.close(broker_fd)
        self.spare.append(worker)

    def _ended(self, number: int, status: int) -> None:
        worker = self.workers.pop(number, None)
        if worker is None:
            return
        code = os.waitstatus_to_exitcode(status)
        reason = "" if code == 0 else describe(code)
        if reason and self.exit_status is None:
            self.journal.warn(f"{worker} {reason}")
        if worker.client is not None:
            self.by_uid[worker.client.uid] -= 1
        else:
            self.spare.remove(worker)
            self.spares_lost += 1
            if self.spares_lost >= MAX_SPARES_LOST:
                self.journal.warn(f"{self.spares_lost} spare workers in a row ended by themselves")
                self.exit_status = 1
        self._tell(self.broker, entries.WorkerGone(number, reason))
        worker.line.close()
        os.close(worker.pidfd)

    def _from_broker(self) -> None:
        try:
            while (received := self.broker.receive()) is not None:
                message, _ = received
                if isinstance(message, entries.Kill):
                    self._kill(message)
                elif isinstance(message, entries.ReloadWanted):
                    self._reload()
        except (EOFError, LineError) as error:
            self.journal.warn(f"the broker's line ended: {error or 'closed'}")
            self.exit_status = 1

    def _kill(self, message: entries.Kill) -> None:
        worker = self.workers.get(message.worker)
        if worker is not None:
            self.journal.warn(f"ending {worker}: {message.reason}")
            signal.pidfd_send_signal(worker.pidfd, signal.SIGKILL)

    # -- configuration -------------------------------------------------------------------------

    def _reload(self) -> None:
        if self.reading is not None:
            self.reload_again = True
            return
        pid, pipe = self.read_configuration()
        self.reading = (pid, pipe, bytearray())
        self.selector.register(pipe, selectors.EVENT_READ, self._configuration_read)

    def _configuration_read(self) -> None:
        assert self.reading is not None
        _, pipe, data = self.reading
        chunk = os.read(pipe, 1 << 20)
        if chunk:
            data += chunk
            return
        self.selector.unregister(pipe)
        os.close(pipe)
        self.reading = None
        if data:
            self.settings = msgspec.msgpack.decode(data, type=Settings)
            os.close(self.configuration)
            self.configuration = sealed_memfd("kbusd-configuration", bytes(data))
            self.journal.say("configuration read again")
            self._tell(self.broker, entries.Reconfigured(), [self.configuration])
            self._tell(self.zygote, entries.Configured(), [self.configuration])
        else:
            self.journal.warn("configuration not read again; the one in force stays")
            self._tell(self.broker, entries.Reconfigured())
        if self.reload_again:
            self.reload_again = False
            self._reload()

    # -- signals and children ------------------------------------------------------------------

    def _watch_signals(self) -> None:
        reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._signal_pipe = writer
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
            signal.signal(number, lambda *_: None)
        self.selector.register(reader, selectors.EVENT_READ, lambda: self._signalled(reader))

    def _signalled(self, reader: int) -> None:
        with contextlib.suppress(BlockingIOError):
            for number in set(os.read(reader, 512)):
                match number:
                    case signal.SIGTERM | signal.SIGINT:
                        self.exit_status = 0
                    case signal.SIGHUP:
                        self._reload()
                    case signal.SIGCHLD:
                        self._reap()

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            name = self.children.pop(pid, None)
            if name is not None:
                self._child_ended(name, pid, os.waitstatus_to_exitcode(status))
                continue
            for worker in [each for each in self.workers.values() if each.pid == pid]:
                self._ended(worker.number, status)

    def _child_ended(self, name: str, pid: int, code: int) -> None:
        if self.exit_status is not None:
            return
        self.journal.warn(f"{name} (pid {pid}) {describe(code)}")
        match name:
            case "kbusd.workers.zygote" if self.log_fd >= 0 and self._may_restart():
                if self.zygote.sock.fileno() >= 0:
                    self._from_zygote()
                self._start_zygote()
            case "kbusd.supervisor.launcher" if code < 0:
                self._start_launcher()
            case _:
                self.exit_status = 1

    def _may_restart(self) -> bool:
        """Not if it ended too often in a short time: then something is wrong for good."""
        now = time.monotonic()
        self.restarts = [at for at in self.restarts if now - at < RESTART_SECONDS] + [now]
        return len(self.restarts) <= MAX_RESTARTS

    def _relay_stderr(self) -> None:
        reader, writer = os.pipe2(os.O_CLOEXEC)
        self.stderr = writer
        self.selector.register(
            reader, selectors.EVENT_READ, lambda: self.journal.relay(os.read(reader, 65536))
        )

    # -- stop ----------------------------------------------------------------------------------

    def stop(self) -> None:
        """End every process of the bus and remove its sockets. Nothing of it is left after."""
        for listener in self.listeners:
            listener.sock.close()
            if listener.path is not None:
                with contextlib.suppress(OSError):
                    os.unlink(listener.path)
        for worker in self.workers.values():
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(worker.pidfd, signal.SIGKILL)
        for name in ("broker", "zygote"):
            if (line := getattr(self, name, None)) is not None:
                line.close()
        deadline = time.monotonic() + STOP_SECONDS
        while self.children and time.monotonic() < deadline:
            self._reap()
            time.sleep(0.01)
        for pid in self.children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for pid in list(self.children):
            os.waitpid(pid, 0)
        self.children.clear()


def describe(code: int) -> str:
    """An exit code in words; a death by SIGSYS is what seccomp does."""
    if code >= 0:
        return f"exited with status {code}"
    name = signal.Signals(-code).name
    hint = ": a system call that its profile forbids" if name == "SIGSYS" else ""
    return f"was killed by {name}{hint}"
