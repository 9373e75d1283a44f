"""The broker as a process, driven over its lines as supervisor, workers and launcher drive it."""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from kbusd.broker.guarded import THREADS
from kbusd.policy import configuration
from kbusd.rings import entries as e
from kbusd.rings.broadcast import BroadcastReader
from kbusd.rings.line import Line, close_all, pair
from kbusd.rings.memfd import sealed
from kbusd.rings.unread import ready
from kbusd.sandbox.compile import compile_all
from kbusd.sandbox.compiled import encode
from tests.bus.lingering import lingering
from tests.bus.procs import eventually
from tests.unit.broker.world import ADDRESS, World, credentials, service

SECONDS = 10.0
LOG = 2
_decode_entry = msgspec.msgpack.Decoder(e.LogEntry).decode
_decode_snapshot = msgspec.msgpack.Decoder(e.Snapshot).decode
PROFILE = encode(compile_all()["broker"])  # the real one: what it forbids ends the process


class Broker:
    """The process; we are its supervisor."""

    def __init__(self, files: int = 4096, **settings: Any) -> None:
        """`files`: how many descriptors it may have."""
        ours, theirs = pair()
        fds = (
            theirs.detach(),
            sealed("configuration", configuration.encode(World(**settings).configuration)),
            sealed("profile", PROFILE),
        )
        self.process = start(["--guid", "00", "--address", ADDRESS], fds, files)
        self.line = Line(ours, e.ToSupervisor)
        self.next_worker = 1
        message, (self.log_fd,) = self.hear()
        assert message == e.BrokerReady()
        self.log = BroadcastReader(self.log_fd)

    def hear(self) -> tuple[Any, list[int]]:
        return hear(self.line)

    def worker(self, uid: int = 1000) -> Worker:
        """A worker that has a client, which has not said Hello yet."""
        worker = self.spare()
        self.line.send(e.Assigned(worker.number, credentials(worker.number, uid)))
        return worker

    def spare(self) -> Worker:
        ours, theirs = pair()
        worker = Worker(self.next_worker, Line(ours, e.BrokerMessage))
        self.next_worker += 1
        with theirs:
            self.line.send(e.WorkerStarted(worker.number, 1), [theirs.fileno()])
        return worker

    def client(self, uid: int = 1000) -> Worker:
        worker = self.worker(uid)
        reply, fds = worker.ask(e.Hello(1))
        worker.id = reply.value
        close_all(fds)
        assert self.hear()[0] == e.Joined(worker.number)
        return worker

    def entries(self) -> list[e.LogEntry]:
        """What stands in the log and was not taken yet."""
        found: list[e.LogEntry] = []
        while (frame := self.log.read()) is not None:
            assert (frame.kind, frame.envelope) == (LOG, b"")
            found.append(_decode_entry(frame.body))
        return found

    def fds(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))


class Worker:
    """A worker's end of its line."""

    def __init__(self, number: int, line: Line) -> None:
        self.number = number
        self.line = line
        self.id = 0
        self.told: list[bytes] = []

    def ask(self, message: e.Request, fds: Sequence[int] = ()) -> tuple[Any, list[int]]:
        """Ask and pass by what is not the answer."""
        self.line.send(message, fds)
        while True:
            answer, received = hear(self.line)
            if isinstance(answer, e.Reply | e.Failure) and answer.request == message.request:
                return answer, received
            if isinstance(answer, e.State):
                self.told.append(answer.snapshot)


def hear(line: Line) -> tuple[Any, list[int]]:
    """What comes next; without its place among the log's entries, which the clock decides."""
    assert select.select([line], [], [], SECONDS)[0], "no answer"
    received = line.receive()
    assert received is not None
    message, fds = received
    return replace(message, stamp=0) if isinstance(message, e.Reply) else message, fds


def closed(line: Line) -> bool:
    """Whether the other end closes the line, whatever comes before."""
    try:
        while True:
            close_all(hear(line)[1])
    except EOFError:
        return True


def start(arguments: Sequence[str], fds: Sequence[int], files: int) -> subprocess.Popen[bytes]:
    """`python -m kbusd.broker` with `fds` (which are closed here) as 3, 4, 5."""
    high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 200) for fd in fds]
    close_all(fds)
    moves = " ".join(f"{n}<&{fd} {fd}<&-" for n, fd in enumerate(high, 3))
    try:
        return subprocess.Popen(
            ["bash", "-c", f'ulimit -n {files}; exec "$@" {moves}', "sh"]
            + [sys.executable, "-m", "kbusd.broker", *arguments],
            pass_fds=high,
            stderr=subprocess.PIPE,
        )
    finally:
        close_all(high)


@pytest.fixture
def broker() -> Iterator[Broker]:
    yield from running(Broker())


def running(broker: Broker) -> Iterator[Broker]:
    try:
        yield broker
    finally:
        broker.line.close()
        try:
            broker.process.wait(SECONDS)
        finally:
            broker.process.kill()
            broker.process.wait()
            assert broker.process.stderr is not None
            broker.process.stderr.close()
            os.close(broker.log_fd)


def snapshot(fd: int) -> e.Snapshot:
    with mmap.mmap(fd, 0, access=mmap.ACCESS_READ) as data:
        return _decode_snapshot(data[:])


def test_a_hello_may_overtake_the_word_of_who_says_it(broker: Broker) -> None:
    worker = broker.spare()
    worker.line.send(e.Hello(1))
    while struct.unpack("i", fcntl.ioctl(worker.line.fileno(), termios.TIOCOUTQ, bytes(4)))[0]:
        assert broker.process.poll() is None  # it has not read it yet
    broker.line.send(e.Assigned(worker.number, credentials(worker.number, 1000)))
    assert isinstance(hear(worker.line)[0], e.State)
    assert isinstance(hear(worker.line)[0], e.Reply)


def test_hello_gives_an_id_and_a_snapshot_from_which_the_log_leads_on(broker: Broker) -> None:
    a = broker.worker()
    reply, fds = a.ask(e.Hello(1))
    assert (reply.value, fds) == (1, [])
    state = _decode_snapshot(a.told.pop())
    broker.log.seek(state.position)
    assert broker.entries() == [e.ConnectionAdded(1, credentials(1))]


def test_what_was_told_long_before_hello_is_followed_by_a_snapshot(broker: Broker) -> None:
    slow, a = broker.worker(), broker.client()
    for request in range(100):
        a.ask(e.AddMatch(request, f"member='M{request}'"))
    _, (fd,) = slow.ask(e.Hello(1))
    assert _decode_snapshot(slow.told.pop()).matches == ()
    assert len(snapshot(fd).matches) == 100
    with pytest.raises(OSError, match=r"denied|permitted"):
        os.truncate(fd, 0)
    os.close(fd)


def test_a_snapshot_is_used_again_and_renewed(broker: Broker) -> None:
    a = broker.client()
    _, (first,) = broker.client().ask(e.FetchSnapshot(2))
    _, (second,) = broker.client().ask(e.FetchSnapshot(2))
    assert os.fstat(first).st_ino == os.fstat(second).st_ino
    for request in range(100):
        a.ask(e.AddMatch(request, f"member='M{request}'"))
    _, (third,) = a.ask(e.FetchSnapshot(200))
    assert os.fstat(first).st_ino != os.fstat(third).st_ino
    assert len(snapshot(third).matches) == 100
    close_all([first, second, third])


def test_a_snapshot_is_renewed_before_there_is_too_much_to_replay(broker: Broker) -> None:
    a = broker.client()
    _, (first,) = a.ask(e.FetchSnapshot(2))
    for request in range(3, 66):
        a.ask(e.AddMatch(request, f"arg0='{request:01000}'"))
    _, (second,) = a.ask(e.FetchSnapshot(70))
    assert os.fstat(first).st_ino != os.fstat(second).st_ino
    close_all([first, second])


def test_an_answer_is_as_good_as_a_wake(broker: Broker) -> None:
    a = broker.client()
    a.ask(e.AddMatch(2, "member='NameOwnerChanged'"))
    a.line.send(e.RequestName(3, "a.b", 0))
    assert hear(a.line)[0] == e.Reply(3, 1)
    a.line.send(e.Statistics(4))
    assert hear(a.line)[0].request == 4


def test_the_log_cannot_be_written_by_its_readers(broker: Broker) -> None:
    with pytest.raises(PermissionError):
        mmap.mmap(broker.log_fd, 4096, prot=mmap.PROT_WRITE)
    with pytest.raises(PermissionError):
        os.write(broker.log_fd, b"x")


def test_a_name_changes_hands_and_the_next_owner_is_woken(broker: Broker) -> None:
    a, b = broker.client(), broker.client()
    assert a.ask(e.RequestName(2, "a.b", 0))[0] == e.Reply(2, 1)
    assert b.ask(e.RequestName(2, "a.b", 0))[0] == e.Reply(2, 2)
    broker.entries()
    a.line.close()
    assert hear(b.line)[0] == e.Wake()
    assert broker.entries() == [
        e.NameOwnerChanged("a.b", a.id, b.id),
        e.ConnectionRemoved(a.id),
    ]


def introduced(broker: Broker) -> list[tuple[socket.socket, socket.socket]]:
    """Both ends of what two workers share: bell, side socket, carrier."""
    a, b = broker.client(), broker.client()
    gifts = [os.memfd_create(f"gift{n}") for n in range(6)]
    a.line.send(e.Introduce(2, b.id, 1, 2), gifts[:3])
    message, for_b = hear(b.line)
    assert message == e.Introduction(1, a.id, 1, 2)
    b.line.send(e.Introduced(1, 3, 4), gifts[3:])
    reply, for_a = hear(a.line)
    assert reply == e.Reply(2, [3, 4])
    same = [os.fstat(fd).st_ino for fd in gifts]
    assert [os.fstat(fd).st_ino for fd in for_b[:3] + for_a[:3]] == same
    assert len(for_a) == len(for_b) == 6
    close_all([*gifts, *for_a[:3], *for_b[:3]])
    ends = ((socket.socket(fileno=fd) for fd in fds[3:]) for fds in (for_a, for_b))
    return list(zip(*ends, strict=True))


def test_introduced_workers_share_streams_that_nobody_else_has(broker: Broker) -> None:
    """A byte out of band, and what is sent along with it, would be thrown away where others are read."""
    for left, right in introduced(broker):
        with left, right:
            assert left.type == right.type == socket.SOCK_STREAM
            assert not os.get_blocking(left.fileno()) and not os.get_blocking(right.fileno())
            left.send(b"one")
            with contextlib.suppress(OSError):  # before Linux 5.15 a Unix socket has none
                left.send(b"!", socket.MSG_OOB)
            left.send(b"two")
            got = b"".join(iter(lambda sock=right: received(sock), b""))
            assert got in (b"one!two", b"onetwo")


def received(sock: socket.socket) -> bytes:
    with contextlib.suppress(BlockingIOError):
        return sock.recv(100)
    return b""


def test_the_kernel_lets_descriptors_pass_on_the_side_socket_alone(broker: Broker) -> None:
    bell, side, carry = introduced(broker)
    for left, right in (bell, carry):
        try:
            left.getsockopt(socket.SOL_SOCKET, 83)
        except OSError:
            pytest.skip("Linux before 6.16 has no SO_PASSRIGHTS")
        for one, other in ((left, right), (right, left)):
            with pytest.raises(PermissionError):
                socket.send_fds(one, [b"x"], [0])
            with pytest.raises(BlockingIOError):
                other.recv(1)
    socket.send_fds(side[0], [b"x"], [0])
    (fd,) = socket.recv_fds(side[1], 1, 1)[1]
    close_all([fd, *(end.detach() for pair in (bell, side, carry) for end in pair)])


def test_a_worker_that_sends_garbage_is_ended_and_nobody_else(broker: Broker) -> None:
    a, b = broker.client(), broker.client()
    a.line.sock.send(b"\xc1 garbage")
    message, _ = broker.hear()
    assert (type(message), message.worker) == (e.Kill, a.number)
    assert closed(a.line)
    assert b.ask(e.RequestName(2, "a.b", 0))[0] == e.Reply(2, 1)


@pytest.mark.parametrize("count", [1, 4])
def test_a_worker_that_sends_descriptors_too_many_is_ended(broker: Broker, count: int) -> None:
    a = broker.client()
    before = broker.fds()
    gift = os.memfd_create("gift")
    a.line.send(e.Introduce(2, 99, 0, 0), [gift] * count)
    message, _ = broker.hear()
    assert (type(message), message.worker) == (e.Kill, a.number)
    assert closed(a.line)
    another = broker.client()
    eventually(lambda: broker.fds() == before, "the threads have closed its line")
    another.line.close()
    os.close(gift)


def test_nothing_said_that_all_threads_that_close_were_held_up(broker: Broker) -> None:
    """What a connection holds is never closed then; who is at fault, the admin could not find out."""
    said: list[bytes] = []
    others = []
    hostile = [broker.client() for _ in range(THREADS)]
    os.kill(broker.process.pid, signal.SIGSTOP)  # else we might be the last to close it
    for worker in hostile:
        slow, other = lingering()
        others.append(other)
        worker.line.send(e.Introduce(2, 99, 0, 0), [broker.log_fd] * 3 + [slow.fileno()])
        slow.close()
    os.kill(broker.process.pid, signal.SIGCONT)
    assert {type(broker.hear()[0]) for _ in hostile} == {e.Kill}

    def heard(text: bytes) -> bool:
        assert broker.process.stderr is not None
        while ready(broker.process.stderr.fileno(), select.POLLIN, 0):
            said.append(broker.process.stderr.readline())
        return any(text in line for line in said)

    deadline = time.monotonic() + SECONDS
    while not heard(b"nothing that takes time to close is closed any more"):
        assert time.monotonic() < deadline, said
        broker.client().line.close()
        ready(broker.line.fileno(), select.POLLIN, 0.1)
    assert all(f":1.{n} (uid 1000, pid ".encode() in said[-1] for n in range(1, THREADS + 1))
    for other in others:
        other.close()
    while not heard(b"closes again what takes time"):
        assert time.monotonic() < deadline, said


def test_hello_on_a_line_without_a_client_is_ended(broker: Broker) -> None:
    spare = broker.spare()
    spare.line.send(e.Hello(1))
    message, _ = broker.hear()
    assert (type(message), message.worker) == (e.Kill, spare.number)


def fill(lazy: Worker, message: Any) -> None:
    """Have it ask, and read nothing, until its own line is full."""
    data = msgspec.msgpack.encode(message)
    try:
        while select.select([], [lazy.line], [], 1)[1]:
            lazy.line.sock.send(data, socket.MSG_DONTWAIT)
    except BlockingIOError:
        pass


def test_a_worker_that_does_not_read_waits_and_blocks_nobody(broker: Broker) -> None:
    lazy, other = broker.client(), broker.client()
    lazy.line.send(e.AddMatch(2, "member='NameOwnerChanged'"))
    for request in range(3, 200):  # Wakes alone never do it
        other.ask(e.RequestName(request, f"a.b{request}", 0))
    fill(lazy, e.ReleaseName(7, "a.b"))
    assert other.ask(e.RequestName(2, "a.b", 0))[0] == e.Reply(2, 1)
    assert lazy.ask(e.RequestName(8, "a.c", 0))[0] == e.Reply(8, 1)  # when it has read


def test_answers_with_descriptors_do_not_pile_up(broker: Broker) -> None:
    """Each was kept twice over, a thousand for a worker, until the broker could serve nobody."""
    lazy, other = broker.client(), broker.client()
    before = broker.fds()
    fill(lazy, e.FetchPolicy(7))
    assert other.ask(e.RequestName(2, "a.b", 0))[0] == e.Reply(2, 1)
    assert broker.fds() <= before + 1
    lazy.line.close()


def test_who_leaves_most_descriptors_waiting_goes_before_they_run_out() -> None:
    """What the broker had no descriptor for was the end of the bus."""
    for broker in running(Broker(files=512)):
        lazy = broker.client()
        gifts = [os.memfd_create("gift") for _ in range(3)]
        fill(lazy, e.FetchPolicy(7))
        others = [broker.client() for _ in range(60)]
        for other in others:
            other.line.send(e.Introduce(3, lazy.id, 0, 0), gifts)
        message, _ = broker.hear()
        assert (type(message), message.worker) == (e.Kill, lazy.number)
        assert "descriptors unread" in message.reason
        for other in others:
            assert other.ask(e.RequestName(4, f"a.b{other.id}", 0))[0] == e.Reply(4, 1)
        close_all(gifts)


def test_who_asks_for_what_is_not_to_be_had_is_ended_and_not_the_bus() -> None:
    """Introductions that nobody answers: each holds descriptors of the broker's."""
    for broker in running(Broker(files=96)):
        other, *hostile = (broker.client() for _ in range(16))
        gifts = [os.memfd_create("gift") for _ in range(3)]
        for number, peer in enumerate(hostile):
            for asker in hostile[:number]:
                with contextlib.suppress(OSError):  # it is ended already
                    asker.line.send(e.Introduce(3, peer.id, 0, 0), gifts)
        assert isinstance(broker.hear()[0], e.Kill)
        assert other.ask(e.RequestName(4, "a.b", 0))[0] == e.Reply(4, 1)
        close_all(gifts)


def test_the_bus_ended_when_the_limit_of_descriptors_was_lowered() -> None:
    """What came with the supervisor's next record was lost. Now it costs that worker; and reloads fail."""
    for broker in running(Broker(files=48)):
        first = broker.client()
        spares = [broker.spare()]
        while not ready(broker.line.fileno(), select.POLLIN, 0.02):
            spares.append(broker.spare())
        message, _ = broker.hear()
        late = spares.pop()
        broker.line.send(e.Assigned(late.number, credentials(late.number, 1000)))
        assert (type(message), message.worker) == (e.Kill, late.number)
        assert "descriptors" in message.reason and closed(late.line)
        broker.line.send(e.WorkerGone(late.number, "killed"))
        first.line.send(e.ReloadConfig(2))
        assert broker.hear()[0] == e.ReloadWanted()
        data = sealed("configuration", configuration.encode(World().configuration))
        broker.line.send(e.Reconfigured(1), [data])
        os.close(data)
        assert isinstance(hear(first.line)[0], e.Failure)
        ours, theirs = pair()
        with theirs:
            broker.line.send(e.LauncherLine(), [theirs.fileno()])
        assert closed(Line(ours, e.ToLauncher))  # so the launcher ends, and another is started
        for spare in spares[:8]:
            spare.line.close()
        eventually(lambda b=broker: b.fds() <= 40, "there are descriptors again")
        assert broker.client().id == first.id + 1


def test_a_sleeping_worker_is_not_sent_one_wake_per_change(broker: Broker) -> None:
    watcher, other = broker.client(), broker.client()
    watcher.ask(e.AddMatch(2, "member='NameOwnerChanged'"))
    for request in range(3000):
        other.ask(e.RequestName(request, "a.b", 0))
        other.ask(e.ReleaseName(request, "a.b"))
    assert watcher.ask(e.RequestName(3, "a.c", 0))[0].request == 3


def test_services_are_launched_by_the_launcher() -> None:
    for broker in running(Broker(services=(service("a.b", "/x"),))):
        a, b = broker.client(), broker.client()
        a.line.send(e.StartService(2, "a.b", False))
        ours, theirs = pair()
        launcher = Line(ours, e.ToLauncher)
        with theirs:
            broker.line.send(e.LauncherLine(), [theirs.fileno()])
        message, _ = hear(launcher)
        assert (message.name, message.arguments) == ("a.b", ("/x",))
        assert hear(a.line)[0] == e.Wake()  # that there is such a service
        assert b.ask(e.RequestName(2, "a.b", 0))[0] == e.Reply(2, 1)
        assert hear(a.line)[0] == e.Reply(2, 1)
        launcher.close()


def test_a_late_service_is_given_up_on_time() -> None:
    late = Broker(services=(service("a.b", "/x"),), limits={"service_start_timeout": 50})
    for broker in running(late):
        reply, _ = broker.client().ask(e.StartService(2, "a.b", False))
        assert reply.error == "org.freedesktop.DBus.Error.TimedOut"


def test_a_new_configuration_is_in_force_once_the_reload_is_answered(broker: Broker) -> None:
    a = broker.client()
    broker.entries()
    a.line.send(e.ReloadConfig(2))
    assert broker.hear()[0] == e.ReloadWanted()
    fd = sealed(
        "new", configuration.encode(World(limits={"max_names_per_connection": 1}).configuration)
    )
    broker.line.send(e.Reconfigured(1), [fd])
    assert hear(a.line)[0] == e.Reply(2)
    assert broker.entries() == [e.PolicyChanged(1), e.ActivatableChanged(())]
    assert isinstance(a.ask(e.RequestName(3, "a.b", 0))[0], e.Failure)
    reply, (policy,) = a.ask(e.FetchPolicy(4))
    assert reply.value == 1
    assert os.fstat(policy).st_ino == os.fstat(fd).st_ino
    close_all([fd, policy])


def test_descriptors_return_to_where_they_were(broker: Broker) -> None:
    first = broker.client()
    before = broker.fds()
    gifts = [os.memfd_create("gift") for _ in range(3)]
    for _ in range(50):
        a, b = broker.client(), broker.client()
        a.line.send(e.Introduce(2, b.id, 0, 0), gifts)
        message, fds = hear(b.line)
        close_all(fds)
        if a.number % 4 == 0:
            b.line.send(e.Introduced(message.request, 0, 0), gifts)
            close_all(hear(a.line)[1])
        a.line.close()
        b.line.close()
    last = broker.client()
    eventually(lambda: broker.fds() == before + 1, "the threads have closed the lines")
    first.line.close()
    last.line.close()
    close_all(gifts)


def test_ends_well_when_the_supervisor_goes(broker: Broker) -> None:
    broker.line.close()
    assert broker.process.wait(SECONDS) == 0
