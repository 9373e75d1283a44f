"""`kbusd --cuse`: character devices, who may open them, and what is theirs alone. In the guest.

What clients do with them is tested where kdbusfs is, in test_clients.py.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import select
import signal
import socket
import stat
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from kbusd.cuse import requests
from kbusd.kdbus import abi, attach, items
from kbusd.rings import entries
from kbusd.supervisor.cuse import NodeError
from tests.bus import procs
from tests.bus.daemon import STRICT_POLICY, Bus, daemon_command
from tests.guest.child import Child, Say

from .kclient import KdbusClient, ioctl
from .rig import NODE as RIG_NODE
from .rig import Rig, command, errno_of
from .test_clients import EXPECT, KdbusBus, call, fails, id_of, to_name

pytestmark = pytest.mark.guest

USER = 1234
NODE = "/dev/kdbus/0-session/bus"
FOREVER = (1 << 63) - 1


@contextmanager
def running(*options: str, **shape: Any) -> Iterator[Bus]:
    bus = Bus(options=list(options), **shape)
    try:
        yield bus
    finally:
        bus.stop()


@pytest.fixture(scope="module")
def shared() -> Iterator[KdbusBus]:
    started = KdbusBus("cuse", below="shared")
    yield started
    started.stop()


def refused(bus: Bus, *options: str, become: tuple[str, ...] = ()) -> str:
    """What a kbusd with these options says that does not start."""
    command = [*become, *daemon_command(), f"--config-file={bus.config}", "--nofork", *options]
    command.append(f"--address=unix:path={bus.directory}/another")
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 1, done
    return done.stderr


def become_user() -> None:
    os.setgroups([])
    os.setresgid(USER, USER, USER)
    os.setresuid(USER, USER, USER)


def as_user(do: Callable[[], Any]) -> Any:
    """What a process of another user says."""

    def work(say: Say) -> None:
        become_user()
        say(do())

    child = Child(work)
    try:
        return child.hear()
    finally:
        child.kill()


def open_and_close(path: str) -> str:
    return errno_of(lambda: os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC)))


# -- nodes ---------------------------------------------------------------------------------------


def test_a_session_s_node_is_its_owner_s_alone() -> None:
    with running("--cuse"):
        found = os.stat(NODE)
        assert stat.S_ISCHR(found.st_mode) and stat.S_IMODE(found.st_mode) == 0o600
        assert (found.st_uid, found.st_gid) == (0, 0)
        assert stat.S_IMODE(os.stat("/dev/kdbus").st_mode) == 0o755
        assert as_user(lambda: open_and_close(NODE)) == "EACCES"
        assert open_and_close(NODE) == ""
    assert not os.path.exists("/dev/kdbus/0-session")


def test_a_system_bus_is_everybody_s_who_is_told_apart() -> None:
    policy = f'<policy context="default"><allow user="*"/></policy>{STRICT_POLICY}'
    with running("--cuse=domain/box", type_="system", policy=policy) as bus:
        path = "/dev/kdbus/domain/box/0-system/bus"
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o666

        def work(say: Say) -> None:
            become_user()
            with KdbusClient(path) as mine:
                mine.acquire("com.example.User")
                say(mine.id)
                signal.pause()

        child = Child(work)
        id = child.hear()
        assert isinstance(id, int), id
        client = bus.connect()
        assert client.driver("GetNameOwner", "s", ["com.example.User"]) == [f":1.{id}"]
        assert client.driver("GetConnectionUnixUser", "s", [f":1.{id}"]) == [USER]
        assert client.driver("GetConnectionUnixProcessID", "s", [f":1.{id}"]) == [child.pid]
        child.kill()
    assert not os.path.exists("/dev/kdbus/domain")


@pytest.mark.parametrize(
    "directory", ["..", "../x", "a/../b", "a//b", "a/", "/dev", ".a", "x" * 4096]
)
def test_names_that_leave_the_tree_are_refused(shared: KdbusBus, directory: str) -> None:
    before = os.listdir("/dev"), os.listdir("/dev/kdbus")
    assert "is no path of a device node" in refused(shared, f"--cuse={directory}")
    assert before == (os.listdir("/dev"), os.listdir("/dev/kdbus"))


def test_a_node_is_served_by_one() -> None:
    with running("--cuse") as bus, KdbusClient(NODE) as a:
        assert "/dev/kdbus/0-session/bus is served by another process" in refused(bus, "--cuse")
        with KdbusClient(NODE) as b:
            a.send(b.id, b"as ever")
            assert b.recv().payload == b"as ever"
        assert os.stat(NODE).st_mode == stat.S_IFCHR | 0o600


def test_why_there_can_be_no_node() -> None:
    with running() as bus:
        bus.directory.chmod(0o777)
        user = ("setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups")
        said = refused(bus, "--cuse", become=user)
        assert "/dev/cuse" in said and "CAP_SYS_ADMIN" in said
        os.rename("/dev/cuse", "/dev/cuse.away")
        try:
            said = refused(bus, "--cuse")
        finally:
            os.rename("/dev/cuse.away", "/dev/cuse")
        assert "/dev/cuse: No such file or directory; is the module cuse loaded?" in said


def test_a_killed_bus_cuts_its_clients_off_and_leaves_the_name_free() -> None:
    bus = KdbusBus("cuse")
    a = bus.kdbus()
    child = Child(_wait_in_a_call, bus.node, a.id)
    assert a.recv().payload == b"never"
    os.kill(bus.pid, signal.SIGKILL)
    assert child.hear() in ("ECONNABORTED", "ENOTCONN")
    child.wait()
    assert fails(lambda: a.free(0)) == "ENOTCONN"
    procs.eventually(lambda: not os.path.exists(bus.node), "the node goes")
    another = KdbusBus("cuse")
    try:
        with KdbusClient(another.node) as b:
            assert b.id
        assert fails(lambda: a.free(0)) == "ENOTCONN"
    finally:
        another.stop()
        bus.kill()


def _wait_in_a_call(say: Say, path: str, to: int) -> None:
    with KdbusClient(path) as client:
        say(errno_of(lambda: client.call(to, b"never", seconds=60)))


def test_an_aborted_node_is_told_and_its_workers_end() -> None:
    with running("--cuse") as bus:
        with KdbusClient(NODE) as a:
            before = {process.pid for process in bus.workers()}
            Path("/sys/class/cuse/kdbus!0-session!bus/abort").write_text("1")
            assert fails(lambda: a.free(0)) == "ENOTCONN"
        procs.eventually(lambda: NODE in bus.log(), "the admin is told")
        procs.eventually(
            lambda: before - {process.pid for process in bus.workers()}, "its worker ends"
        )
        assert bus.connect().driver("GetId")


def test_a_node_that_is_withdrawn_can_be_published_again() -> None:
    def client(path: str) -> Any:
        told = []
        for _ in range(2):
            deadline = time.monotonic() + 10
            while errno_of(lambda: os.stat(path)) and time.monotonic() < deadline:
                time.sleep(0.01)
            fd = os.open(path, os.O_RDWR)
            poller = select.poll()
            poller.register(fd, select.POLLIN)
            told.append([errno_of(lambda fd=fd: fcntl.ioctl(fd, command(1))) for _ in range(3)])  # type: ignore[misc]
            told[-1].append(str(bool(poller.poll(5000)[0][1] & select.POLLERR)))
            os.close(fd)
        return told

    rig = Rig(client, cuse=True)
    with pytest.raises(NodeError) as caught:
        rig.nodes.publish(RIG_NODE)
    assert caught.value.errno == errno.EEXIST
    for turn in range(2):
        player = rig.hire()
        assert player.device and player.device.transport == "cuse"
        body = player.serve_ioctl(-errno.EPROTO)
        assert body.unrestricted and not body.data and not body.out_size
        player.asked(requests.Ioctl)
        (node,) = rig.nodes.nodes.values()
        server = f"/proc/self/fd/{node.fuse}"
        del node
        rig.nodes.withdraw(RIG_NODE)
        assert player.ends()
        player.die()
        rig.nodes.withdraw(RIG_NODE)  # which is nothing any more
        procs.eventually(lambda: not os.path.exists(rig.path), "the node and its directory go")
        procs.eventually(
            lambda server=server: not os.path.exists(server), "its descriptor is closed"
        )
        if turn == 0:
            rig.nodes.publish(RIG_NODE)
    told = rig.end()
    for before, held, after, hung_up in told:
        assert (before, held, hung_up) == ("EPROTO", "ESHUTDOWN", "True")
        assert after in ("ECONNABORTED", "ENOTCONN")
    assert not rig.killed and not rig.warnings


def test_who_opens_a_node_that_is_withdrawn_meanwhile_costs_no_worker() -> None:
    rig = Rig(open_and_close, cuse=True)
    player, work, credentials = rig.wanted()
    rig.nodes.withdraw(RIG_NODE)
    work(player.supervisors, credentials)
    player.hear(entries.Device)
    assert player.ends()
    assert rig.end() == "ESHUTDOWN"


# -- transports ------------------------------------------------------------------------------------


def test_a_client_of_each_kind_on_one_bus() -> None:
    bus = KdbusBus("cuse", "kdbusfs")
    try:
        node, file = (KdbusClient(path) for path in bus.nodes)
        bus.opened += [node, file]
        d = bus.connect()
        d.request_name("com.example.D")
        assert stat.S_ISCHR(os.fstat(node.fd).st_mode) and stat.S_ISREG(os.fstat(file.fd).st_mode)
        node.send(file.id, b"to the file")
        assert (got := file.recv()).payload == b"to the file" and got.src == node.id
        file.send(node.id, b"to the node")
        assert node.recv().payload == b"to the node"
        for client in (node, file):
            client.send(0, call("Ask"), to_name("com.example.D"), flags=EXPECT, reply=FOREVER)
            asked = d.wait_call("Ask")
            assert asked.sender == f":1.{client.id}"
            d.reply(asked)
            assert client.recv().src == id_of(d)
    finally:
        bus.stop()


def answered(b: KdbusClient, child: Child) -> Any:
    """What a child says whose calls are answered: again if one is started again after its answer came."""
    while not child.speaks():
        if b.readable(0.1):
            asked = b.recv()
            b.send(asked.src, b"answer", reply=asked.cookie)
    return child.hear()


# -- callers ---------------------------------------------------------------------------------------


def test_addresses_that_are_not_the_caller_s(bus: KdbusBus) -> None:
    a = bus.kdbus()
    for address in (0, 8, 1 << 63, (1 << 64) - 8):
        for number in (abi.CMD_HELLO, abi.CMD_SEND, abi.CMD_RECV, attach.COMMAND):
            with KdbusClient(bus.node, hello=False) as fresh:
                fd = fresh.fd if number in (abi.CMD_HELLO, attach.COMMAND) else a.fd
                assert fails(lambda fd=fd, c=number, at=address: ioctl(fd, c, at)) == "EFAULT"


@pytest.mark.parametrize("restart", [False, True], ids=["EINTR", "SA_RESTART"])
def test_a_signal_interrupts_a_call(bus: KdbusBus, restart: bool) -> None:
    b = bus.kdbus()

    def work(say: Say) -> None:
        signal.signal(signal.SIGUSR1, lambda *_: None)
        signal.siginterrupt(signal.SIGUSR1, not restart)
        with KdbusClient(bus.node) as mine:
            say(errno_of(lambda: mine.call(b.id, b"question", seconds=30)))

    child = Child(work)
    assert b.recv(abi.RECV_PEEK).payload == b"question"
    child.signal(signal.SIGUSR1)
    if restart:
        assert answered(b, child) == ""
    else:
        assert child.hear() == "EINTR"
    child.wait()


def test_a_client_that_is_stopped_in_a_call_disturbs_nobody(bus: KdbusBus) -> None:
    b, c = bus.kdbus(), bus.kdbus()
    child = Child(_wait_in_a_call, bus.node, b.id)
    assert b.recv(abi.RECV_PEEK).payload == b"never"
    child.signal(signal.SIGSTOP)
    for turn in range(20):
        b.send(c.id, b"%d" % turn)
        assert c.recv().payload == b"%d" % turn
    with KdbusClient(bus.node) as d:
        assert d.id
    child.signal(signal.SIGCONT)
    assert answered(b, child) == ""
    child.wait()


def test_a_fork_keeps_the_file_open(bus: KdbusBus) -> None:
    a, b = bus.kdbus(), bus.kdbus()

    read, write = os.pipe()
    child = os.fork()
    if child == 0:  # which has a's file as well, and no more
        os.close(write)
        os.read(read, 1)
        os._exit(0)
    id = a.id
    os.close(a.fd)
    a.fd = -1
    b.send(id, b"to whoever has it")
    os.close(write)
    os.close(read)
    os.waitpid(child, 0)
    procs.eventually(lambda: id not in b.list(abi.LIST_UNIQUE), "the last of them closes it")


def test_many_open_and_close(bus: KdbusBus) -> None:
    fds = Path(f"/proc/{bus.pid}/fd")
    with KdbusClient(bus.node):
        before = len(os.listdir(fds))
        for _ in range(5):
            opened = [os.open(bus.node, os.O_RDWR | os.O_CLOEXEC) for _ in range(20)]
            for fd in opened:
                os.close(fd)
        # Spare workers come and go meanwhile, with their descriptors.
        procs.eventually(lambda: len(os.listdir(fds)) <= before + 8, "descriptors are closed")


def test_read_and_write_are_not_what_it_is_for(bus: KdbusBus) -> None:
    a = bus.kdbus()
    assert fails(lambda: os.read(a.fd, 10)) == "EINVAL"
    assert fails(lambda: os.write(a.fd, b"x")) == "EINVAL"
    assert fails(lambda: mmap.mmap(a.fd, 4096, mmap.MAP_SHARED, mmap.PROT_READ)) == "ENODEV"


# -- descriptors -----------------------------------------------------------------------------------


def test_a_node_of_ours_is_never_taken(bus: KdbusBus) -> None:
    """Neither by a worker nor, for a moment, by the supervisor: to close it would wait for itself."""
    a, b = bus.kdbus(), bus.kdbus()
    cancel = items.build(abi.ITEM_CANCEL_FD, struct.pack("=i", a.fd))
    assert fails(lambda: a.call(b.id, b"x", cancel=cancel)) == "ENOTSUP"
    with KdbusClient(bus.node, hello=False) as fresh:
        assert _attach(fresh, a.fd) == "ENOTSUP"
    held = [os.readlink(each) for each in Path(f"/proc/{bus.pid}/fd").iterdir() if each.exists()]
    assert bus.node not in held


def _attach(client: KdbusClient, fd: int, flags: int = 0) -> str:
    try:
        client.do(attach.COMMAND, struct.pack("=3Q", flags, 0, fd))
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return ""


def test_what_can_be_attached(bus: KdbusBus) -> None:
    with KdbusClient(bus.node, hello=False) as client, open("/dev/null", "rb") as null:
        assert _attach(client, 900) == "EBADF"
        assert _attach(client, (1 << 64) - 1) == "EBADF"
        assert _attach(client, null.fileno()) == "ENOTSOCK"
        assert _attach(client, 0, flags=2) == "EINVAL"
        assert _attach(client, 900, flags=abi.FLAG_NEGOTIATE) == ""
        for family, kind in [
            (socket.AF_UNIX, socket.SOCK_STREAM),
            (socket.AF_UNIX, socket.SOCK_DGRAM),
            (socket.AF_INET, socket.SOCK_STREAM),
        ]:
            with socket.socket(family, kind) as wrong:
                assert _attach(client, wrong.fileno()) == "ENOTSOCK"
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as alone:
            assert _attach(client, alone.fileno()) == "ENOTSOCK"
        os.seteuid(USER)
        foreign = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        os.seteuid(0)
        with foreign[0], foreign[1]:
            assert _attach(client, foreign[0].fileno()) == "ENOTSOCK"
        client.attach()
        assert client.attach_flags == attach.POOL
        with pytest.raises(OSError) as caught:
            client.attach()
        assert caught.value.errno == errno.EALREADY


def test_a_pool_can_be_had_after_hello_and_not_be_written(bus: KdbusBus) -> None:
    with KdbusClient(bus.node, hello=False) as client:
        size = 1 << 16
        fixed = struct.pack("=9Q", 0, 0, 0, 0, 0, 0, size, 0, 0) + bytes(16)
        got = client.do(abi.CMD_HELLO, fixed)
        offset, length = struct.unpack_from("=2Q", got, 64)
        client.attach()
        record, (fd,), *_ = socket.recv_fds(client.socket, 64, 4)
        assert struct.unpack("=2Q", record) == (1, size)
        for flags in (mmap.MAP_SHARED, mmap.MAP_PRIVATE):
            mmap.mmap(fd, size, flags, mmap.PROT_READ).close()
        assert fails(lambda: mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_WRITE)) == "EPERM"
        assert fails(lambda: os.pwrite(fd, b"x", 0)) == "EPERM"
        assert fails(lambda: os.ftruncate(fd, 0)) == "EPERM"
        assert fails(lambda: fcntl.fcntl(fd, fcntl.F_ADD_SEALS, 0)) == "EPERM"
        (bloom,) = items.split(os.pread(fd, length, offset), 0)
        assert bloom.type == abi.ITEM_BLOOM_PARAMETER
        os.close(fd)


def test_a_socket_that_takes_nothing_costs_only_its_client(bus: KdbusBus) -> None:
    with KdbusClient(bus.node, hello=False) as client:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        assert _attach(client, theirs.fileno()) == ""
        ours.close()
        theirs.close()
        fixed = struct.pack("=9Q", 0, 0, 0, 0, 0, 0, 1 << 16, 0, 0) + bytes(16)
        assert fails(lambda: client.do(abi.CMD_HELLO, fixed)) == "EPIPE"
    with KdbusClient(bus.node) as another:
        assert another.id
