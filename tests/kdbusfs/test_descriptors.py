"""Descriptors and memfds of kdbus clients that attach a socket: by kbusd.client, and by the interposer.

`program.c` is a kdbus program that knows nothing of either.
"""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import struct
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jeepney
import pytest
from jeepney.bus_messages import MatchRule

from kbusd.client.kdbus import Connection
from kbusd.client.kdbus_messages import Memfd, Received
from kbusd.kdbus import abi, attach
from tests.bus import wireformat as w
from tests.bus.daemon import STRICT_POLICY
from tests.kdbusfs.places import NATIVE, everywhere
from tests.kdbusfs.test_clients import FILE, NODE, KdbusBus, fails
from tests.kdbusfs.test_sessions import brought

TREE = Path(__file__).parents[2]
PRELOAD = TREE / "kbusd/preload/libkbus-preload.so"
SECONDS = 10.0
TEXT = b"in a memfd"


@pytest.fixture(scope="module", params=[FILE, NODE])
def shared(request: pytest.FixtureRequest) -> Iterator[KdbusBus]:
    bus = KdbusBus(request.param, policy=STRICT_POLICY)
    yield bus
    bus.stop()


@pytest.fixture
def opened(bus: KdbusBus) -> Iterator[Callable[..., Connection]]:
    """Opens connections, which are closed at the end."""
    made: list[Connection] = []

    def open(**how: Any) -> Connection:
        made.append(Connection(bus.node, **how))
        return made[-1]

    yield open
    for each in made:
        each.close()


@pytest.fixture
def pair(opened: Callable[..., Connection]) -> tuple[Connection, Connection]:
    return opened(), opened()


@pytest.fixture
def memfd() -> Iterator[int]:
    fd = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    os.write(fd, TEXT)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, 0xF)
    yield fd
    os.close(fd)


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """The reading end, which never waits, and the writing end."""
    ends = os.pipe2(os.O_CLOEXEC)
    os.set_blocking(ends[0], False)
    yield ends
    for fd in ends:
        try:
            os.close(fd)
        except OSError:
            pass


def is_there(pipe: int, received: Received) -> None:
    """The message brought the writing end of this pipe, in its FDS."""
    (fd,) = received.fds
    assert fcntl.fcntl(fd, fcntl.F_GETFD) == fcntl.FD_CLOEXEC
    os.write(fd, b"through")
    assert os.read(pipe, 99) == b"through"


def at_end(fd: int) -> None:
    """Nobody has the writing end any more."""
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        try:
            assert os.read(fd, 1) == b""
            return
        except BlockingIOError:
            time.sleep(0.01)
    raise AssertionError("somebody still has the descriptor")


# -- between kdbus clients ---------------------------------------------------------------------


def test_descriptors_go_from_one_kdbus_client_to_another(
    pair: tuple[Connection, Connection], pipe: tuple[int, int]
) -> None:
    a, b = pair
    a.send(b.id, b"here it is", fds=[pipe[1]], cookie=5)
    with b.receive(SECONDS) as got:
        assert (got.sender, got.cookie, got.payload) == (a.id, 5, b"here it is")
        assert not got.incomplete
        is_there(pipe[0], got)
    os.close(pipe[1])
    at_end(pipe[0])


def test_a_memfd_comes_as_the_same_memfd(
    pair: tuple[Connection, Connection], memfd: int, pipe: tuple[int, int]
) -> None:
    a, b = pair
    a.send(b.id, [b"first ", Memfd(memfd, 3, 7)], fds=[pipe[1]])
    with b.receive(SECONDS) as got:
        assert got.payload == b"first a memfd"
        first, segment = got.parts
        assert first == b"first " and isinstance(segment, Memfd)
        assert (segment.start, segment.size) == (3, 7)
        assert os.path.sameopenfile(segment.fd, memfd)
        is_there(pipe[0], got)


def test_a_reply_brings_descriptors(
    pair: tuple[Connection, Connection], memfd: int, pipe: tuple[int, int]
) -> None:
    a, b = pair

    def serve() -> None:
        with b.receive(SECONDS) as call:
            b.send(call.sender, [Memfd(memfd, 0, 10)], fds=[pipe[1]], reply_to=call.cookie)

    server = threading.Thread(target=serve)
    server.start()
    with a.call(b.id, b"?", timeout=SECONDS) as reply:
        server.join()
        assert reply.payload == TEXT
        is_there(pipe[0], reply)


def test_a_memfd_that_can_change_is_refused(pair: tuple[Connection, Connection]) -> None:
    a, b = pair
    fd = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    os.write(fd, TEXT)
    assert fails(lambda: a.send(b.id, [Memfd(fd, 0, 10)])) == "ETXTBSY"
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, 0xF)
    assert fails(lambda: a.send(b.id, [Memfd(fd, 0, 11)])) == "EFAULT"
    assert fails(lambda: a.send(b.id, [Memfd(fd, 0, 10)] * 17)) == "E2BIG"
    a.send(b.id, [Memfd(fd, 0, 10)] * 16)
    os.close(fd)
    with b.receive(SECONDS) as got:
        assert got.payload == TEXT * 16


def test_limits_of_descriptors(
    bus: KdbusBus, opened: Callable[..., Connection], pipe: tuple[int, int]
) -> None:
    a, b, deaf = opened(), opened(), opened(accept_fds=False)
    fd = pipe[1]
    assert fails(lambda: a.send(deaf.id, b"x", fds=[fd])) == "ECOMM"
    assert fails(lambda: a.send(b.id, b"x", fds=[fd] * 17)) == "EMFILE"
    a.send(b.id, b"x", fds=[fd] * 16)
    assert fails(lambda: a.send(b.id, b"x", fds=[fd])) == "EMFILE"
    node = os.open(bus.node, os.O_RDWR)
    assert fails(lambda: a.send(b.id, b"x", fds=[node])) == "ENOTSUP"  # EOPNOTSUPP
    os.close(node)
    with b.receive(SECONDS) as got:
        assert len(got.fds) == 16
    a.send(b.id, b"x", fds=[fd])


def test_a_message_that_is_dropped_closes_what_it_brought(
    pair: tuple[Connection, Connection], pipe: tuple[int, int]
) -> None:
    a, b = pair
    a.send(b.id, b"x", fds=[pipe[1]])
    os.close(pipe[1])
    assert b.readable(SECONDS)
    b.drop()
    at_end(pipe[0])


def test_a_worker_that_dies_closes_what_its_client_did_not_receive(
    bus: KdbusBus, opened: Callable[..., Connection], pipe: tuple[int, int]
) -> None:
    a, b = opened(), opened()
    a.send(b.id, b"x", fds=[pipe[1]])
    os.close(pipe[1])
    os.kill(holder(bus, pipe[0]), signal.SIGKILL)
    at_end(pipe[0])
    assert fails(lambda: b.receive(SECONDS)) in ("ECONNRESET", "ENOTCONN")
    assert a.names()


def holder(bus: KdbusBus, fd: int) -> int:
    """The worker that has a descriptor of the same pipe or socket."""
    wanted = os.readlink(f"/proc/self/fd/{fd}")
    (found,) = [each.pid for each in bus.workers() if wanted in descriptors(each.pid)]
    return int(found)


def descriptors(pid: int) -> list[str]:
    """What a process has open."""
    found = []
    try:
        for fd in os.listdir(f"/proc/{pid}/fd"):
            found.append(os.readlink(f"/proc/{pid}/fd/{fd}"))
    except OSError:
        pass  # it is closing them, or ends
    return found


# -- of what moves with a name -----------------------------------------------------------------

NAME = "com.example.Moves"


@pytest.mark.parametrize("sender", ["is there", "is gone"])
def test_descriptors_move_with_the_name_that_they_were_sent_to(
    bus: KdbusBus,
    opened: Callable[..., Connection],
    memfd: int,
    pipe: tuple[int, int],
    sender: str,
) -> None:
    """To a service, back to the activator, and to the next one."""
    flags = abi.HELLO_ACTIVATOR | abi.HELLO_ACCEPT_FD
    activator = bus.kdbus(flags=flags, chain=brought(NAME))
    a, first, second = opened(), opened(), opened()
    a.send(NAME, [b"first ", Memfd(memfd, 3, 7)], fds=[pipe[1]])
    os.close(pipe[1])
    assert activator.readable(SECONDS)
    if sender == "is gone":
        a.close()
    first.acquire(NAME)
    assert first.readable(SECONDS)
    first.release(NAME)
    assert activator.readable(SECONDS)
    second.acquire(NAME)
    with second.receive(SECONDS) as got:
        assert got.payload == b"first a memfd"
        if sender == "is there":
            assert os.path.sameopenfile(got.parts[1].fd, memfd)  # type: ignore[union-attr]
        assert not got.incomplete
        is_there(pipe[0], got)
    at_end(pipe[0])


def test_descriptors_that_a_service_does_not_take_are_lost_with_their_message(
    bus: KdbusBus, opened: Callable[..., Connection], pipe: tuple[int, int]
) -> None:
    flags = abi.HELLO_ACTIVATOR | abi.HELLO_ACCEPT_FD
    activator = bus.kdbus(flags=flags, chain=brought(NAME))
    a, service = opened(), bus.kdbus()
    a.send(NAME, b"with", fds=[pipe[1]])
    a.send(NAME, b"without")
    os.close(pipe[1])
    assert activator.readable(SECONDS)
    service.acquire(NAME)
    assert service.recv_now().payload == b"without"
    assert service.dropped == 1
    at_end(pipe[0])


def test_a_dbus_client_that_takes_a_name_gets_the_descriptors_as_well(
    bus: KdbusBus, opened: Callable[..., Connection], pipe: tuple[int, int]
) -> None:
    flags = abi.HELLO_ACTIVATOR | abi.HELLO_ACCEPT_FD
    activator = bus.kdbus(flags=flags, chain=brought(NAME))
    a, taker = opened(), bus.connect()
    address = jeepney.DBusAddress("/test", bus_name=NAME, interface="com.example.Test")
    call = jeepney.new_method_call(address, "Take", "h", (pipe[1],))
    call.header.flags = jeepney.MessageFlag.no_reply_expected
    a.send_message(call)
    assert activator.readable(SECONDS)
    taker.request_name(NAME)
    got = taker.wait(lambda message: message.fds)
    os.write(got.fds[0], b"through")
    assert os.read(pipe[0], 99) == b"through"
    os.close(got.fds[0])


# -- with D-Bus clients ------------------------------------------------------------------------


def test_descriptors_of_a_dbus_client_come_to_a_kdbus_client_and_go_back(
    bus: KdbusBus, opened: Callable[..., Connection], pipe: tuple[int, int]
) -> None:
    kdbus, dbus = opened(), bus.connect()
    kdbus.acquire("com.example.Kdbus")
    fields = {
        w.PATH: "/test", w.INTERFACE: "com.example.Test", w.MEMBER: "Take",
        w.DESTINATION: "com.example.Kdbus",
    }  # fmt: skip
    dbus.send(1, fields, "h", (0,), fds=[pipe[1]])
    with kdbus.receive(SECONDS) as got:
        call = got.dbus()
    (passed,) = call.body
    fd = passed.to_raw_fd()
    os.write(fd, b"to kdbus")
    assert os.read(pipe[0], 99) == b"to kdbus"
    kdbus.send_message(jeepney.new_method_return(call, "hs", (fd, "back")))
    os.close(fd)
    reply = dbus.wait(lambda message: message.type == 2 and message.fds)
    assert reply.args[1] == "back"
    os.write(reply.fds[0], b"and back")
    assert os.read(pipe[0], 99) == b"and back"
    os.close(reply.fds[0])


@pytest.mark.parametrize("pool", [1 << 20, 16 << 20])
def test_a_large_call_of_a_dbus_client_goes_beside_the_pool(
    bus: KdbusBus, opened: Callable[..., Connection], pipe: tuple[int, int], pool: int
) -> None:
    """It was refused if it was larger than a sixth of that."""
    kdbus, dbus = opened(pool_size=pool), bus.connect()
    fields = {
        w.PATH: "/test", w.INTERFACE: "com.example.Test", w.MEMBER: "Take",
        w.DESTINATION: f":1.{kdbus.id}",
    }  # fmt: skip
    data = os.urandom(4 << 20)
    for _ in range(3):
        dbus.send(1, fields, "hay", (0, data), fds=[pipe[1]])
    for _ in range(3):
        with kdbus.receive(SECONDS) as got:
            # sd-bus wants the header, and what is behind the body, in the pool.
            assert [isinstance(part, Memfd) for part in got.parts] == [False, True, False]
            is_there(pipe[0], got)
            call = got.dbus()
        assert call.body[1] == data
        kdbus.send_message(jeepney.new_method_return(call, "s", ("got it",)))
        assert dbus.wait(lambda message: message.type == 2).args == ["got it"]
        call.body[0].close()


def test_a_small_call_goes_through_the_pool(
    bus: KdbusBus, opened: Callable[..., Connection]
) -> None:
    kdbus, dbus = opened(pool_size=16 << 20), bus.connect()
    dbus.send_call(f":1.{kdbus.id}", "/x", "com.example.Test", "Take", "ay", [bytes(500_000)])
    with kdbus.receive(SECONDS) as got:
        assert len(got.parts) == 1


def test_jeepneys_messages(opened: Callable[..., Connection]) -> None:
    a, b = opened(), opened()
    rule = MatchRule(type="signal", interface="com.example.Test", member="Changed")
    b.add_rule(1, rule.serialise())
    address = jeepney.DBusAddress("/test", interface="com.example.Test")
    a.send_message(jeepney.new_signal(address, "Other", "s", ("not this",)))
    a.send_message(jeepney.new_signal(address, "Changed", "s", ("this",)))
    with b.receive(SECONDS) as got:
        assert got.dbus().body == ("this",)
    remote = jeepney.DBusAddress("/test", f":1.{b.id}", "com.example.Test")

    def serve() -> None:
        with b.receive(SECONDS) as got:
            b.send_message(jeepney.new_method_return(got.dbus(), "u", (42,)))

    server = threading.Thread(target=serve)
    server.start()
    answer = a.call_message(jeepney.new_method_call(remote, "Ask"), timeout=SECONDS)
    server.join()
    assert answer.body == (42,)
    assert any(item.type == abi.ITEM_CREDS for item in a.info(b.id))


# -- attached sockets --------------------------------------------------------------------------


def attaching(bus: KdbusBus, fd: int) -> str:
    """How an ATTACH with this descriptor fails."""
    with Raw(bus) as raw:
        return fails(lambda: raw.attach(fd))


class Raw(Connection):
    """A node on which nothing was done."""

    def __init__(self, bus: KdbusBus) -> None:
        self._socket = self._pool = None
        self._numbers = {}
        self._fd = os.open(bus.node, os.O_RDWR)

    def attach(self, fd: int) -> None:
        self.command(attach.COMMAND, struct.pack("=3Q", 0, 0, fd))

    def __enter__(self) -> Raw:
        return self


def test_only_a_socket_pair_can_be_attached(bus: KdbusBus) -> None:
    with open("/etc/passwd") as file:
        assert attaching(bus, file.fileno()) == "ENOTSOCK"
    with socket.socket() as tcp:
        assert attaching(bus, tcp.fileno()) == "ENOTSOCK"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as datagrams:
        assert attaching(bus, datagrams.fileno()) == "ENOTSOCK"
    assert attaching(bus, 9999) == "EBADF"
    with Raw(bus) as node:
        assert attaching(bus, node.fileno()) == "ENOTSUP"  # EOPNOTSUPP
        assert fails(lambda: node.attach(node.fileno())) == "ENOTSUP"


def test_attaching_again_and_again_leaves_nothing(bus: KdbusBus) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with Raw(bus) as node, ours:
        with theirs:
            node.attach(theirs.fileno())
            worker = holder(bus, theirs.fileno())
            had = len(descriptors(worker))
            for _ in range(1000):
                assert fails(lambda: node.attach(theirs.fileno())) == "EALREADY"
            for _ in range(1000):
                assert fails(lambda: node.attach(node.fileno())) == "ENOTSUP"
            assert len(descriptors(worker)) == had
        node.close()
        assert ours.recv(1) == b"", "the worker has not closed the socket"


def test_a_socket_that_is_closed_or_full_costs_only_its_owner(
    pair: tuple[Connection, Connection], pipe: tuple[int, int]
) -> None:
    a, b = pair
    ours, b._socket = b._socket, None  # it does not read
    assert ours is not None
    for _ in range(1000):
        a.send(b.id, b"x", fds=[pipe[1]])
        if flags_of(b) == abi.RECV_RETURN_INCOMPLETE_FDS:
            break
    else:
        raise AssertionError("a socket that is never full")
    ours.close()
    a.send(b.id, b"x", fds=[pipe[1]])
    assert flags_of(b) == abi.RECV_RETURN_INCOMPLETE_FDS
    os.close(pipe[1])
    at_end(pipe[0])


def flags_of(client: Connection) -> int:
    """RECV; what its return_flags say of the message."""
    got = client.command(abi.CMD_RECV, struct.pack("=2Qq4Q", 0, 0, 0, 0, 0, 0, 0))
    offset, _, flags = struct.unpack_from("=3Q", got, 40)
    client._free(offset)
    return int(flags)


def test_numbers_are_told_once_and_for_what_was_handed_over(
    pair: tuple[Connection, Connection], pipe: tuple[int, int]
) -> None:
    a, b = pair

    def told(offset: int, count: int, address: int) -> None:
        b.command(attach.INSTALLED, struct.pack("=5Q", 0, 0, offset, count, address))

    assert fails(lambda: told(0, 2, 8)) == "ENXIO"
    a.send(b.id, b"x", fds=[pipe[1]])
    assert b.readable(SECONDS)
    got = b.command(abi.CMD_RECV, struct.pack("=2Qq4Q", 0, 0, 0, 0, 0, 0, 0))
    (offset,) = struct.unpack_from("=Q", got, 40)
    assert fails(lambda: told(offset, 2, 8)) == "EINVAL"
    assert fails(lambda: told(offset, 1 << 62, 8)) == "EINVAL"
    assert fails(lambda: told(offset, 1, 8)) == "EFAULT"
    b._free(offset)
    assert fails(lambda: told(offset, 1, 8)) == "ENXIO"


# -- a program that knows nothing of this ------------------------------------------------------


@pytest.fixture(scope="module", params=["cc", "musl-gcc"])
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With glibc, and with musl."""
    return compiled(tmp_path_factory.mktemp("program"), request.param)


def compiled(where: Path, compiler: str = "cc") -> Path:
    source, made = Path(__file__).with_name("program.c"), where / "program"
    subprocess.run([compiler, "-O1", "-Wall", "-o", made, source, "-lpthread"], check=True)
    return made


def output(program: Path, *arguments: str, preload: bool = True, fails: bool = False) -> list[str]:
    environment = {**os.environ, "LD_PRELOAD": str(PRELOAD) if preload else ""}
    pipe = subprocess.PIPE
    done = subprocess.run(
        [program, *arguments], env=environment, timeout=SECONDS * 3, stdout=pipe, text=True
    )
    lines = done.stdout.splitlines()
    assert done.returncode == fails, lines
    return lines


ALL_OF_IT = ['flags 0, memfd "in a memfd", fd there', "through the pipe: in a memfd"]
WITHOUT = ['flags 1, bytes "in a memfd", fd none', "through the pipe: "]


@pytest.mark.parametrize("how", ["", "dup", "fork", "closeall"])
@pytest.mark.parametrize("by", ["async", "sync"])
def test_a_program_gets_descriptors_by_the_interposer(
    bus: KdbusBus, program: Path, by: str, how: str
) -> None:
    assert output(program, bus.node, by, how) == ALL_OF_IT


def test_threads_of_a_program_get_each_its_own(bus: KdbusBus, program: Path) -> None:
    assert output(program, bus.node, "async", "threads") == ["all 400"]


@pytest.mark.parametrize("by", ["async", "sync"])
def test_a_program_without_it_is_told_that_they_are_missing(
    bus: KdbusBus, program: Path, by: str
) -> None:
    if bus.node.startswith("/dev"):
        assert output(program, bus.node, by, preload=False, fails=True) == ["mmap: No such device"]
    else:
        assert output(program, bus.node, by, preload=False) == WITHOUT


def test_the_interposer_needs_no_libc_of_its_own() -> None:
    tags = subprocess.run(["readelf", "-d", PRELOAD], check=True, capture_output=True, text=True)
    assert "NEEDED" not in tags.stdout
    symbols = subprocess.run(["nm", "-Du", PRELOAD], check=True, capture_output=True, text=True)
    needed = {line.split()[-1] for line in symbols.stdout.splitlines()}
    assert needed <= {"syscall", "__errno_location", "memcpy", "memset"}


@everywhere(NATIVE)
def test_all_of_it_where_kbusd_is_root_or_ordinary() -> None:
    bus = KdbusBus("kdbusfs")
    try:
        with tempfile.TemporaryDirectory() as where:
            assert output(compiled(Path(where)), bus.node, "sync") == ALL_OF_IT
        reader, writer = os.pipe()
        with Connection(bus.node) as a, Connection(bus.node) as b:
            a.send(b.id, b"x", fds=[writer])
            with b.receive(SECONDS) as got:
                os.write(got.fds[0], b"there")
                assert os.read(reader, 9) == b"there"
    finally:
        bus.close_clients()
        bus.stop()
