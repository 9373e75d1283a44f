"""Clients and workers that fail or attack: it costs them their connection and others nothing.

Each test has bystanders whose traffic must go on, in order and complete, while it happens.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import random
import re
import resource
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator

import pytest

from kbusd.broker.guarded import THREADS

from . import procs
from . import wireformat as w
from .clients import DEBIAN_PYTHON
from .daemon import OPEN_POLICY, Bus, configuration, need_a_tree_for_all, read_line
from .rawclient import DRIVER, BusError, Disconnected, RawClient, RawSocket

SEED = 20150401
ALONE, HOARDING = 64231, 64232  # uids that nobody else on the machine has
SECONDS = 20.0
SPARES = 4  # workers that wait


class Bystanders:
    """A pair of clients that call each other all the time, in a thread, and check every answer."""

    def __init__(self, bus: Bus) -> None:
        self.a, self.b = RawClient(bus.address), RawClient(bus.address)
        self.b.add_match(f"interface='test.Bystander',sender='{self.a.name}'")
        self.rounds = 0
        self.error: Exception | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                n = self.rounds
                self.a.signal("/", "test.Bystander", "S", "u", (n,))
                serial = self.a.send_call(self.b.name, "/", "test.I", "M", "u", (n,))
                signal_, call = self.b.read(), self.b.read()
                assert (signal_.member, signal_.args) == ("S", [n])
                assert (call.member, call.args) == ("M", [n])
                self.b.reply(call, "u", (n,))
                reply = self.a.read()
                assert (reply.reply_serial, reply.args) == (serial, [n])
                self.rounds += 1
        except Exception as error:  # noqa: BLE001 - handed to the test, which raises it
            self.error = error

    def go_on(self, rounds: int = 20) -> None:
        """Wait until they have done some more rounds from now."""
        goal = self.rounds + rounds
        procs.eventually(
            lambda: self.error or self.rounds >= goal, "the bystanders' traffic goes on", 20
        )
        if self.error:
            raise self.error

    def end(self) -> None:
        self._stop.set()
        self._thread.join()
        self.a.close()
        self.b.close()
        if self.error:
            raise self.error


@pytest.fixture
def bystanders(bus: Bus) -> Iterator[Bystanders]:
    pair = Bystanders(bus)
    pair.go_on()
    yield pair
    try:
        pair.go_on()
    finally:
        pair.end()


def kill(bus: Bus, client: RawClient) -> int:
    """Kill the worker of a client; returns its pid."""
    pid = bus.worker_of(client).pid
    os.kill(pid, signal.SIGKILL)
    return pid


def logged(bus: Bus, *texts: str) -> None:
    """Wait until one line of the log holds all the texts."""
    procs.eventually(
        lambda: any(all(text in line for text in texts) for line in bus.log().splitlines()),
        f"a line of the log with {texts}",
    )


# -- killed workers ----------------------------------------------------------------------


@pytest.mark.kbusd_only
def test_killed_worker_costs_only_its_client(bus: Bus, bystanders: Bystanders) -> None:
    watcher, victim = bus.connect(), bus.connect()
    victim.request_name("test.faults.Victim")
    watcher.add_match("type='signal',member='NameOwnerChanged',arg2=''")
    pid = kill(bus, victim)
    victim.expect_disconnect()
    assert watcher.wait_signal("NameOwnerChanged").args == ["test.faults.Victim", victim.name, ""]
    assert watcher.wait_signal("NameOwnerChanged").args == [victim.name, victim.name, ""]
    logged(bus, f"pid {pid}", "SIGKILL")


@pytest.mark.kbusd_only
def test_killed_worker_of_a_callee_gives_no_reply(bus: Bus, bystanders: Bystanders) -> None:
    caller, callee = bus.connect(), bus.connect()
    serials = [caller.send_call(callee.name, "/", "test.I", "M") for _ in range(5)]
    for _ in serials:
        callee.read()
    kill(bus, callee)
    for serial in serials:
        with pytest.raises(BusError, match="NoReply"):
            caller.wait_reply(serial)
    assert caller.drain() == []


@pytest.mark.kbusd_only
def test_killed_worker_of_a_caller(bus: Bus, bystanders: Bystanders) -> None:
    caller, callee = bus.connect(), bus.connect()
    caller.send_call(callee.name, "/", "test.I", "M")
    call = callee.read()
    callee.add_match(f"member='NameOwnerChanged',arg0='{caller.name}'")
    kill(bus, caller)
    callee.wait_signal("NameOwnerChanged")
    serial = callee.reply(call)
    with pytest.raises(BusError, match="ServiceUnknown"):  # as dbus-daemon answers it
        callee.wait_reply(serial)
    assert callee.drain() == []


@pytest.mark.kbusd_only
def test_killed_worker_in_the_middle_of_a_flood(bus: Bus, bystanders: Bystanders) -> None:
    """What arrives of the flood is its beginning, in order, without a gap."""
    sender, receiver = bus.connect(), bus.connect()
    worker = bus.worker_of(sender).pid
    payload = b"x" * 2000

    def flood() -> None:
        try:
            for n in range(20_000):
                sender.signal("/", "test.I", "S", "uay", (n, payload), to=receiver.name)
                if n == 500:
                    os.kill(worker, signal.SIGKILL)
        except (BrokenPipeError, ConnectionResetError):
            pass

    receiver.add_match(f"member='NameOwnerChanged',arg0='{sender.name}'")
    thread = threading.Thread(target=flood)
    thread.start()
    got = []
    while (message := receiver.read()).member == "S":
        got.append(message.args[0])
    thread.join()
    assert got == list(range(len(got)))


@pytest.mark.kbusd_only
def test_fifty_workers_killed_at_once(bus: Bus, bystanders: Bystanders) -> None:
    watcher = bus.connect()
    victims = [bus.connect() for _ in range(50)]
    subscriber = bus.connect()
    for client in [*victims, subscriber]:
        client.add_match("interface='test.Faults'")
    watcher.add_match("member='NameOwnerChanged',arg2=''")
    pids = [bus.worker_of(victim).pid for victim in victims]
    for n in range(100):
        watcher.signal("/", "test.Faults", "S", "u", (n,))
        if n == 50:
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
    for victim in victims:
        victim.expect_disconnect()
    gone = {watcher.wait_signal("NameOwnerChanged").args[0] for _ in victims}
    assert gone == {victim.name for victim in victims}
    assert [subscriber.read().args[0] for _ in range(100)] == list(range(100))
    # As many can come back.
    again = [bus.connect() for _ in range(50)]
    assert len({client.name for client in again}) == 50


@pytest.mark.kbusd_only
def test_killed_spare_workers_are_replaced(bus: Bus, bystanders: Bystanders) -> None:
    clients = [bus.connect(), bystanders.a, bystanders.b, bus.janitor]
    busy = {bus.worker_of(client).pid for client in clients if client}
    for process in bus.workers():
        if process.pid not in busy:
            os.kill(process.pid, signal.SIGKILL)
    # Whoever was given to a dying one has to try again.
    procs.eventually(lambda: connects(bus), "there is a worker again")
    for _ in range(10):
        client = bus.connect()
        assert client.driver("NameHasOwner", "s", (client.name,)) == [True]


@pytest.mark.kbusd_only
def test_killed_zygote_is_replaced(start_bus: Callable[..., Bus]) -> None:
    bus = start_bus()
    a, b = bus.connect(), bus.connect()
    # A worker has the zygote's name until it has its own.
    (zygote,) = [p for p in bus.tree() if p.comm == "kbusd-zygote" and p.ppid == bus.pid]
    os.kill(zygote.pid, signal.SIGKILL)
    a.signal("/", "test.I", "StillThere", to=b.name)
    assert b.read().member == "StillThere"
    procs.eventually(lambda: connects(bus), "there is a zygote again")
    for _ in range(10):
        client = bus.connect()
        client.signal("/", "test.I", "New", to=a.name)
        assert a.wait_signal("New").sender == client.name
    logged(bus, "zygote")


@pytest.mark.kbusd_only
def test_killed_broker_ends_the_bus(start_bus: Callable[..., Bus]) -> None:
    """All of it, with a word about the reason."""
    bus = start_bus()
    client = bus.connect()
    tree = bus.tree()
    (broker,) = [p for p in tree if p.comm == "kbusd-broker"]
    os.kill(broker.pid, signal.SIGKILL)
    assert bus.process.wait(SECONDS) == 1
    client.expect_disconnect()
    procs.eventually(lambda: not any(procs.alive(p) for p in tree), "its processes end")
    assert not bus.socket.exists()
    assert f"kbusd.broker (pid {broker.pid}) was killed by SIGKILL" in bus.log()
    bus.kill()


@pytest.mark.kbusd_only
def test_killed_supervisor_takes_everything_along(start_bus: Callable[..., Bus]) -> None:
    """Nobody is left who would hold the clients, or the socket of the next bus."""
    bus = start_bus()
    client, stopped = bus.connect(), bus.connect()
    tree = bus.tree()
    worker = bus.worker_of(stopped).pid
    os.kill(worker, signal.SIGSTOP)
    bus.process.kill()
    assert bus.process.wait(SECONDS) == -signal.SIGKILL
    client.expect_disconnect()
    others = [process for process in tree if process.pid != worker]
    procs.eventually(lambda: not any(procs.alive(p) for p in others), "its processes end")
    os.kill(worker, signal.SIGCONT)
    stopped.expect_disconnect()
    procs.eventually(lambda: not any(procs.alive(p) for p in tree), "the stopped one, too")
    assert "Traceback" not in bus.log()
    bus.kill()


@pytest.mark.kbusd_only
def test_killed_launcher_is_replaced(start_bus: Callable[..., Bus]) -> None:
    bus = start_bus()

    def launchers() -> list[int]:
        return [p.pid for p in bus.tree() if p.comm == "kbusd-launcher"]

    procs.eventually(launchers, "there is a launcher")  # the bus does not wait for it
    (first,) = launchers()
    os.kill(first, signal.SIGKILL)

    def another() -> bool:
        return len(found := launchers()) == 1 and found != [first]

    procs.eventually(another, "there is a launcher again")
    assert bus.connect().name


@pytest.mark.kbusd_only
def test_stopped_worker_holds_up_nobody(bus: Bus, bystanders: Bystanders) -> None:
    """Its client loses time, and gets all of what was sent when its worker goes on."""
    sender, stopped, other = (bus.connect() for _ in range(3))
    for client in (stopped, other):
        client.add_match("interface='test.Faults'")
    worker = bus.worker_of(stopped).pid
    os.kill(worker, signal.SIGSTOP)
    try:
        for n in range(2000):
            sender.signal("/", "test.Faults", "S", "u", (n,))
            if n % 10 == 0:
                sender.signal("/", "test.Faults", "U", "u", (n,), to=stopped.name)
        assert [other.read().args[0] for _ in range(2000)] == list(range(2000))
        bystanders.go_on()
    finally:
        os.kill(worker, signal.SIGCONT)
    expected = [n for n in range(2000) for _ in range(2 if n % 10 == 0 else 1)]
    assert [stopped.read().args[0] for _ in expected] == expected


@pytest.mark.kbusd_only
def test_stopped_worker_is_ended_and_who_sends_to_it_lives_on(
    bus: Bus, bystanders: Bystanders
) -> None:
    """More than the quota waits for it: its own client pays, and what was asked of it is answered."""
    sender, stopped = bus.connect(), bus.connect()
    sender.signal("/", "test.Faults", "S", to=stopped.name)
    stopped.wait_signal("S")
    asked = sender.send_call(stopped.name, "/", "test.I", "M")
    stopped.wait_call("M")
    worker = bus.worker_of(stopped).pid
    os.kill(worker, signal.SIGSTOP)
    for n in range(120):
        sender.signal("/", "test.Faults", "S", "uay", (n, b"x" * 65536), to=stopped.name)
    with pytest.raises(BusError, match="NoReply"):
        sender.wait_reply(asked)
    stopped.expect_disconnect()
    logged(bus, stopped.name, "did not answer")
    assert sender.driver("NameHasOwner", "s", (stopped.name,)) == [False]
    with pytest.raises(BusError, match="ServiceUnknown"):
        sender.call(stopped.name, "/", "test.I", "M")


# -- clients that misbehave --------------------------------------------------------------


def test_garbage_of_every_kind(bus: Bus, bystanders: Bystanders) -> None:
    """Random bytes before and after authentication, and valid messages with a byte changed."""
    dice = random.Random(SEED)
    valid = w.build(
        w.CALL,
        {w.PATH: "/a", w.DESTINATION: DRIVER, w.INTERFACE: DRIVER, w.MEMBER: "ListNames"},
        "sa{sv}(yd)",
        ("text", {"key": ("au", [1, 2, 3])}, (1, 2.5)),
    )
    for n in range(60):
        try:
            if n % 3 == 0:
                sock: RawSocket = RawSocket(bus.address)
                sock.write(b"\0" * (n % 2) + dice.randbytes(dice.randrange(1, 2000)))
            elif n % 3 == 1:
                sock = RawClient(bus.address)
                sock.write(dice.randbytes(dice.randrange(16, 4000)))
            else:
                sock = RawClient(bus.address)
                for _ in range(20):
                    broken = bytearray(valid)
                    broken[dice.randrange(len(broken))] = dice.randrange(256)
                    sock.write(bytes(broken))
        except (BrokenPipeError, ConnectionResetError):
            pass
        sock.close()


def test_disconnect_in_the_middle_of_everything(bus: Bus, bystanders: Bystanders) -> None:
    """Mid-SASL, mid-message and mid-descriptors, again and again; nothing is kept."""
    first = bus.connect()
    read, write = os.pipe()
    message = w.build(
        w.SIGNAL,
        {
            w.PATH: "/",
            w.INTERFACE: "test.I",
            w.MEMBER: "S",
            w.DESTINATION: first.name,
            w.UNIX_FDS: 1,
        },
        "hay",
        (0, b"x" * 5000),
    )
    for n in range(30):
        sock = RawSocket(bus.address)
        sock.write(b"\0AUTH EXTERNAL\r\nDATA\r\nNEGOTIATE_UNIX_FD\r\nBEG"[: n + 1])
        sock.close()
        client = RawClient(bus.address, hello=n % 2 == 0)
        client.write(message[: 20 + 100 * n], [write])
        client.close()
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        assert pipe.read() == b""
    assert first.drain() == []


def test_a_thousand_connections(start_bus: Callable[..., Bus]) -> None:
    """One user opens as many as it can: those over the limit are refused, who is in stays in."""
    bus = start_bus(limits={"max_connections_per_user": 150, "auth_timeout": 5000})
    pair = Bystanders(bus)
    sockets: list[RawSocket] = []
    refused = 0
    try:
        for _ in range(1000):
            try:
                sockets.append(RawClient(bus.address))
            except (BusError, Disconnected, BrokenPipeError, ConnectionResetError):
                refused += 1
        assert refused >= 850
        assert len(sockets) + refused == 1000
        pair.go_on()
    finally:
        for sock in sockets:
            sock.close()
        pair.end()
    procs.eventually(lambda: connects(bus), "there is room again")


def connects(bus: Bus) -> bool:
    try:
        RawClient(bus.address).close()
    except (BusError, Disconnected, BrokenPipeError, ConnectionResetError):
        return False
    return True


def test_silent_connections(start_bus: Callable[..., Bus]) -> None:
    """Connections that never authenticate are dropped, and do not keep others out meanwhile."""
    bus = start_bus(limits={"max_incomplete_connections": 50, "auth_timeout": 500})
    witness = bus.connect()
    sockets = []
    for _ in range(100):
        try:
            sockets.append(RawSocket(bus.address))
        except (ConnectionRefusedError, TimeoutError):
            break
    assert witness.driver("NameHasOwner", "s", (witness.name,)) == [True]
    assert bus.connect().name
    for sock in sockets:
        sock.expect_disconnect()
        sock.close()


@pytest.mark.kbusd_only
def test_subscriber_that_does_not_read_is_disconnected(start_bus: Callable[..., Bus]) -> None:
    """Its queue is limited; the reason stands in the log; other subscribers lose nothing."""
    bus = start_bus(limits={"max_outgoing_bytes": 4_000_000})
    sender, stuck, reader = (bus.connect() for _ in range(3))
    for client in (stuck, reader):
        client.add_match("interface='test.Faults'")
    payload = b"x" * 50_000
    sender.add_match(f"member='NameOwnerChanged',arg0='{stuck.name}'")
    for n in range(200):
        sender.signal("/", "test.Faults", "S", "uay", (n, payload))
        assert reader.read().args[0] == n
    assert sender.wait_signal("NameOwnerChanged").args == [stuck.name, stuck.name, ""]
    logged(bus, stuck.name)


def test_flood_from_many_senders_to_one(bus: Bus, bystanders: Bystanders) -> None:
    """All of it arrives, each sender's in its order."""
    receiver, senders = bus.connect(), [bus.connect() for _ in range(8)]
    for n in range(300):
        for sender in senders:
            sender.send_call(
                receiver.name, "/", "test.I", "M", "u", (n,), flags=w.NO_REPLY_EXPECTED
            )
    seen: dict[str | None, list[int]] = {sender.name: [] for sender in senders}
    for _ in range(300 * len(senders)):
        message = receiver.read()
        seen[message.sender].append(message.args[0])
    assert all(numbers == list(range(300)) for numbers in seen.values())


def test_writer_that_never_reads_its_replies(bus: Bus, bystanders: Bystanders) -> None:
    """Its socket fills up; the bus neither blocks nor dies."""
    client = RawClient(bus.address)
    client.sock.settimeout(1.0)
    try:
        for _ in range(20_000):
            client.send_call(DRIVER, "/org/freedesktop/DBus", DRIVER, "ListNames")
    except (TimeoutError, BrokenPipeError, ConnectionResetError):
        pass
    bystanders.go_on()
    client.close()


# -- resources ---------------------------------------------------------------------------


def test_descriptors_run_out(start_bus: Callable[..., Bus]) -> None:
    """With few descriptors for the whole bus, whoever is connected goes on; later there is room."""
    bus = start_bus(prefix=["prlimit", "--nofile=256:256", "--"])
    pair = Bystanders(bus)
    sockets: list[RawSocket] = []
    try:
        for _ in range(300):
            sock = RawSocket(bus.address)
            sockets.append(sock)
            try:
                sock.write(b"\0AUTH EXTERNAL\r\nDATA\r\nBEGIN\r\n")
            except (BrokenPipeError, ConnectionResetError):
                continue
        pair.go_on()
    finally:
        for sock in sockets:
            sock.close()
    pair.go_on()
    pair.end()
    procs.eventually(lambda: connects(bus), "there is room again")


@contextlib.contextmanager
def no_descriptor_free(bus: Bus) -> Iterator[None]:
    """The supervisor gets no further one meanwhile."""
    used = {int(name) for name in os.listdir(f"/proc/{bus.pid}/fd")}
    first_free = next(n for n in itertools.count() if n not in used)
    before = resource.prlimit(bus.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(bus.pid, resource.RLIMIT_NOFILE, (first_free, before[1]))
    yield
    resource.prlimit(bus.pid, resource.RLIMIT_NOFILE, before)


@pytest.mark.kbusd_only
def test_a_reload_without_a_descriptor_is_made_up_for(start_bus: Callable[..., Bus]) -> None:
    """It was the end of the bus."""
    bus = start_bus()
    pair = Bystanders(bus)
    with no_descriptor_free(bus):
        bus.process.send_signal(signal.SIGHUP)
        logged(bus, "cannot start kbusd.policy.reader: Too many open files")
        pair.go_on()
    logged(bus, "configuration read again")
    pair.go_on()
    pair.end()
    assert bus.connect().driver("ReloadConfig") == []


@pytest.mark.kbusd_only
def test_a_zygote_without_a_descriptor_is_made_up_for(start_bus: Callable[..., Bus]) -> None:
    """It was the end of the bus. Who is connected goes on, who comes waits."""
    bus = start_bus()
    pair = Bystanders(bus)
    (zygote,) = [p for p in bus.tree() if p.comm == "kbusd-zygote" and p.ppid == bus.pid]
    with no_descriptor_free(bus):
        os.kill(zygote.pid, signal.SIGKILL)
        logged(bus, "cannot start kbusd.workers.zygote: Too many open files")
        pair.go_on()
        late = RawSocket(bus.address)
        late.write(b"\0AUTH EXTERNAL\r\nDATA\r\n")
        procs.eventually(
            lambda: bus.log().count("cannot start kbusd.workers.zygote") >= 3, "it is tried again"
        )
        pair.go_on()
    while not late.read_line().startswith(b"OK "):
        pass
    late.close()
    for _ in range(10):
        bus.connect()
    pair.end()


def bus_of(start_bus: Callable[..., Bus], uid: int, limit: str) -> tuple[Bus, list[str]]:
    """A bus of a user who runs nothing else, with this limit; and the command that becomes him."""
    if os.geteuid() != 0:
        pytest.skip("needs root to become a user that has no other process")
    become = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "--"]
    need_a_tree_for_all(become)
    bus = start_bus(
        configuration(
            f"unix:abstract=kbusd-test-{uid}-{os.getpid()}",
            policy=OPEN_POLICY.replace("<allow", '<allow user="*"/><allow', 1),
        ),
        prefix=[*become, "prlimit", limit, "--"],
    )
    return bus, become


@pytest.mark.kbusd_only
def test_processes_run_out(start_bus: Callable[..., Bus]) -> None:
    """Who is connected goes on, who comes waits till somebody leaves."""
    bus, _ = bus_of(start_bus, ALONE, f"--nproc={14 + THREADS}:{14 + THREADS}")
    pair = Bystanders(bus)
    clients: list[RawSocket] = []
    while "cannot make a worker: Resource temporarily unavailable" not in bus.log():
        clients.append(RawSocket(bus.address))
        clients[-1].write(b"\0AUTH EXTERNAL\r\nDATA\r\nBEGIN\r\n")
        assert len(clients) < 50
        pair.go_on(5)
    late = RawSocket(bus.address)
    late.write(b"\0AUTH EXTERNAL\r\nDATA\r\n")
    pair.go_on()
    for client in clients:
        client.close()
    while not late.read_line().startswith(b"OK "):
        pass
    late.close()
    pair.end()


HOARDER = """
import array, os, resource, socket, sys
_, most = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
many = array.array("i", [os.pipe()[1]] * 253)
pairs = []
try:
    while True:
        pairs.append(socket.socketpair())
        pairs[-1][0].setblocking(False)
        try:
            while True:
                pairs[-1][0].sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, many)])
        except BlockingIOError:
            pass
except OSError as error:
    print(error.errno, flush=True)
sys.stdin.read()
"""


@pytest.mark.kbusd_only
def test_descriptors_in_flight_run_out(start_bus: Callable[..., Bus]) -> None:
    """The user's own program sends more than the bus may have open: nobody can be given a worker.
    Who is connected goes on; later there is room. The log tells what was wanting, in words."""
    bus, become = bus_of(start_bus, HOARDING, "--nofile=4096:4096")
    pair = Bystanders(bus)
    pair.go_on()
    waiting: list[RawSocket] = []
    hoarder = subprocess.Popen(
        [*become, "prlimit", "--nofile=8192:8192", DEBIAN_PYTHON, "-c", HOARDER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,
    )
    try:
        assert hoarder.stdout and read_line(hoarder.stdout) == str(errno.ETOOMANYREFS)
        for _ in range(2 * SPARES):
            waiting.append(RawSocket(bus.address))
            pair.go_on(5)
        logged(bus, "disconnected the client of worker", "Too many references")
        pair.go_on()
    finally:
        hoarder.communicate()
        for sock in waiting:
            sock.close()
    procs.eventually(lambda: connects(bus), "there is room again", SECONDS)
    pair.end()


def test_full_shared_memory_directory(start_bus: Callable[..., Bus]) -> None:
    """Nothing of the bus lies in /dev/shm: when that is full, messages of every size still pass."""
    if os.geteuid() != 0:
        pytest.skip("needs root for a mount namespace")
    script = (
        "mount -t tmpfs -o size=4k none /dev/shm && ! head -c 8192 /dev/zero > /dev/shm/full "
        '2>/dev/null; exec "$0" "$@"'
    )
    bus = start_bus(prefix=["unshare", "--mount", "sh", "-c", script])
    a, b = bus.connect(), bus.connect()
    for size in (10, 100_000, 5_000_000):
        a.signal("/", "test.I", "S", "ay", (b"x" * size,), to=b.name)
        assert len(b.read().body) == size + 4


def busy_time(bus: Bus) -> None:
    """Connections, names, rules, calls, broadcasts and large messages, and then nobody."""
    for _ in range(10):
        clients = [RawClient(bus.address) for _ in range(6)]
        for n, client in enumerate(clients):
            client.request_name(f"test.busy.N{n}", 4)
            client.add_match("interface='test.Busy'")
            client.add_match(f"member='M{n}',arg0='x{n}'")
        for n in range(20):
            clients[n % 6].signal("/", "test.Busy", "S", "ay", (b"y" * n * 1000,))
            clients[n % 6].send_call(
                clients[(n + 1) % 6].name, "/", "test.I", "M", flags=w.NO_REPLY_EXPECTED
            )
        for client in clients:
            client.drain()
            client.close()


def test_nothing_is_left_of_a_busy_time(start_bus: Callable[..., Bus]) -> None:
    """Processes, descriptors and memory of the bus return to where they were."""
    bus = start_bus()
    watcher = bus.connect()

    def lasting() -> list[int]:
        return [bus.pid] + [p.pid for p in bus.tree() if not p.comm.startswith("kbusd-worker")]

    def measure() -> tuple[int, int, int]:
        pids = lasting()
        memory = sum(procs.pss(pid) for pid in pids)
        return len(bus.tree()), sum(len(procs.descriptors(pid)) for pid in pids), memory

    def settled() -> tuple[int, int, int]:
        """The measure once every client but one is gone."""
        procs.eventually(lambda: len(watcher.driver("ListNames")[0]) == 2, "the clients are gone")
        last = measure()

        def same() -> bool:
            nonlocal last
            before, last = last, measure()
            return before[:2] == last[:2]

        procs.eventually(same, "the bus is at rest")
        return last

    busy_time(bus)
    count, fds, memory = settled()
    for _ in range(3):
        busy_time(bus)
    procs.eventually(
        lambda: measure()[:2] <= (count, fds) and settled()[1] <= fds,
        f"{count} processes with {fds} descriptors, not {settled()}",
    )
    assert settled()[2] <= memory + 1_500_000


# -- the log -----------------------------------------------------------------------------


@pytest.mark.kbusd_only
def test_the_log_says_who_broke_which_rule(bus: Bus) -> None:
    client = bus.connect()
    client.write(w.build(w.SIGNAL, {w.PATH: "/a"}, serial=1))
    client.expect_disconnect()
    logged(bus, client.name)
    line = next(line for line in bus.log().splitlines() if client.name in line)
    assert f"pid={os.getpid()}" in line or f"pid {os.getpid()}" in line
    assert f"uid={os.geteuid()}" in line or f"uid {os.geteuid()}" in line


@pytest.mark.kbusd_only
def test_the_log_says_who_could_not_authenticate(bus: Bus) -> None:
    sock = RawSocket(bus.address)
    sock.write(b"not a NUL byte\r\n")
    sock.expect_disconnect()
    sock.close()
    logged(bus, str(os.getpid()))


# -- all of it at once ---------------------------------------------------------------------


class Chaos:
    """Faults of every kind, one after the other as the dice fall; each leaves nobody behind."""

    def __init__(self, bus: Bus, dice: random.Random) -> None:
        self.bus, self.dice = bus, dice
        self.victim = RawClient(bus.address)

    def message(self, size: int = 20_000) -> bytes:
        fields = {w.PATH: "/", w.INTERFACE: "test.Chaos", w.MEMBER: "S", w.UNIX_FDS: 1}
        return w.build(w.SIGNAL, fields, "hay", (0, b"x" * size), serial=9)

    def kills_a_worker_under_load(self) -> None:
        self.victim.add_match("interface='test.Bystander'")
        self.victim.send_call(self.victim.name, "/", "test.I", "M")
        pid = kill(self.bus, self.victim)
        logged(self.bus, f"pid {pid}", "SIGKILL")

    def kills_many_workers(self) -> None:
        victims = [RawClient(self.bus.address) for _ in range(20)]
        pids = [self.bus.worker_of(victim).pid for victim in victims]
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        for victim in victims:
            victim.expect_disconnect()
            victim.close()
        for pid in pids:
            logged(self.bus, f"pid {pid}", "SIGKILL")

    def kills_the_zygote(self) -> None:
        for process in self.bus.tree():
            if process.comm == "kbusd-zygote" and process.ppid == self.bus.pid:
                os.kill(process.pid, signal.SIGKILL)
                logged(self.bus, f"kbusd.workers.zygote (pid {process.pid})", "SIGKILL")

    def stops_a_worker(self) -> None:
        self.victim.add_match("interface='test.Bystander'")
        worker = self.bus.worker_of(self.victim).pid
        os.kill(worker, signal.SIGSTOP)
        self.pair.go_on(100)
        os.kill(worker, signal.SIGCONT)
        sender = self.pair.a.name
        got = [self.victim.wait(lambda m: m.sender == sender).args[0] for _ in range(100)]
        assert got == list(range(got[0], got[0] + 100)), "in order and complete"

    def writes_byte_by_byte(self) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for byte in w.build(w.SIGNAL, {w.PATH: "/", w.MEMBER: "S"}, serial=3):  # no interface
                self.victim.write(bytes([byte]))
        self.victim.expect_disconnect()
        logged(self.bus, self.victim.name, f"pid {os.getpid()}", "invalid message")

    def writes_garbage(self) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.victim.write(b"\xff" + self.dice.randbytes(5000))
        self.victim.expect_disconnect()
        logged(self.bus, self.victim.name, f"pid {os.getpid()}", "invalid message")

    def does_not_read(self) -> None:
        self.victim.add_match("interface='test.Bystander'")
        for _ in range(200):
            self.victim.send_call(DRIVER, "/org/freedesktop/DBus", DRIVER, "ListNames")
        self.pair.go_on(200)

    def leaves_in_the_middle(self) -> None:
        read, write = os.pipe()
        data = self.message()
        self.victim.write(data[: self.dice.randrange(16, len(data))], [write])
        os.close(write)
        self.victim.close()
        with os.fdopen(read, "rb") as pipe:
            assert pipe.read() == b"", "nobody keeps the descriptor"

    def leaves_while_it_authenticates(self) -> None:
        line = b"\0AUTH EXTERNAL\r\nDATA\r\nNEGOTIATE_UNIX_FD\r\nBEGIN\r\n"
        for _ in range(20):
            sock = RawSocket(self.bus.address)
            sock.write(line[: self.dice.randrange(1, len(line))])
            sock.close()

    def floods_with_connects(self) -> None:
        sockets = [RawSocket(self.bus.address) for _ in range(100)]
        self.pair.go_on(10)
        for sock in sockets:
            sock.close()

    def takes_all_descriptors(self) -> None:
        with no_descriptor_free(self.bus):
            self.bus.process.send_signal(signal.SIGHUP)
            self.pair.go_on(50)

    def strikes(self, pair: Bystanders) -> None:
        self.pair = pair
        faults = [
            name for name in vars(Chaos) if re.match("(kill|stop|write|do|leave|flood|take)", name)
        ]
        self.dice.shuffle(faults)
        for name in faults:
            getattr(self, name)()
            pair.go_on(5)
            self.victim.close()
            procs.eventually(lambda: connects(self.bus), f"there is room after one that {name}")
            self.victim = RawClient(self.bus.address)
            assert self.victim.driver("NameHasOwner", "s", (self.victim.name,)) == [True]


@pytest.mark.slow
@pytest.mark.timeout(
    600
)  # some hundred clients and as many faults: on a busy machine it takes minutes
@pytest.mark.kbusd_only
@pytest.mark.parametrize("seed", range(3))
def test_chaos(start_bus: Callable[..., Bus], seed: int) -> None:
    """The traffic of others goes on, in order and complete, and in the end nothing is left of it."""
    bus = start_bus()
    pairs = [Bystanders(bus) for _ in range(2)]
    chaos = Chaos(bus, random.Random(SEED + seed))

    def at_rest() -> tuple[int, int]:
        """Descriptors and memory of what lasts, when all clients but ours are gone."""
        names = chaos.victim.driver("ListNames")[0]
        lasting = [p for p in bus.tree() if not p.comm.startswith("kbusd-worker")]
        if (len(names), len(bus.workers()), len(lasting)) != (6, 5 + SPARES, 3):
            return 1 << 30, 0
        pids = [bus.pid, *(p.pid for p in lasting)]
        broker = next(p.pid for p in lasting if p.comm == "kbusd-broker")
        return sum(len(procs.descriptors(pid)) for pid in pids), procs.pss(broker)

    chaos.strikes(pairs[0])
    procs.eventually(lambda: at_rest()[1], "the bus is at rest", SECONDS)
    fds, memory = at_rest()
    for _ in range(3):
        for pair in pairs:
            chaos.strikes(pair)
    procs.eventually(lambda: at_rest()[0] <= fds, f"not more than {fds} descriptors", SECONDS)
    assert at_rest()[1] <= memory + 1_500_000
    for pair in pairs:
        pair.end()
    chaos.victim.close()
