"""Programs that end at any time, and many files: no hang, nobody else disturbed, nothing left."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import resource
import signal
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kbusd.kdbus import abi, items, layout
from tests.bus import procs
from tests.bus.daemon import STRICT_POLICY
from tests.guest.child import Child, Say
from tests.kdbusfs.kclient import KdbusClient
from tests.kdbusfs.test_buses import UID, Maker
from tests.kdbusfs.test_clients import EXPECT, FILE, KdbusBus, fails, sealed
from tests.kdbusfs.test_device import Unanswered
from tests.kdbusfs.test_endpoints import Endpoint
from tests.kdbusfs.test_sessions import any_name, signal_filter

NAME = "com.example.Mortal"
KILLS = 6


@pytest.fixture(scope="module", params=[FILE])
def shared(request: pytest.FixtureRequest) -> Iterator[KdbusBus]:
    bus = KdbusBus(request.param, policy=STRICT_POLICY)
    yield bus
    bus.stop()


def state(bus: KdbusBus) -> tuple[int, int]:
    """How many processes the bus has, and how many descriptors its supervisor."""
    return len(bus.tree()), len(os.listdir(f"/proc/{bus.pid}/fd"))


def is_as(bus: KdbusBus, before: tuple[int, int]) -> bool:
    """Whether nothing is left; spare workers come and go, with their descriptors."""
    processes, descriptors = state(bus)
    return processes <= before[0] + 2 and descriptors <= before[1] + 8


# -- SIGKILL during each command ---------------------------------------------------------------

COMMANDS: dict[str, Callable[[KdbusBus, KdbusClient, int], object]] = {
    "open": lambda bus, a, b: os.close(os.open(bus.node, os.O_RDWR)),
    "HELLO": lambda bus, a, b: KdbusClient(bus.node).close(),
    "BYEBYE": lambda bus, a, b: KdbusClient(bus.node).byebye(),
    "SEND": lambda bus, a, b: a.send(b, bytes(300_000), flags=abi.MSG_SIGNAL),
    "SEND memfd": lambda bus, a, b: a.send(b, b"", sealed(bytes(5000))),
    "SEND to all": lambda bus, a, b: a.send(
        abi.DST_ID_BROADCAST, b"x", signal_filter(), flags=abi.MSG_SIGNAL
    ),
    "SEND sync": lambda bus, a, b: a.call(b, b"x", seconds=0.001),
    "RECV": lambda bus, a, b: (a.send(a.id, bytes(10_000)), a.recv()),
    "NAME": lambda bus, a, b: (a.acquire(f"{NAME}.P{os.getpid()}"), a.release(f"{NAME}.P{os.getpid()}")),
    "LIST": lambda bus, a, b: a.list(abi.LIST_UNIQUE),
    "CONN_INFO": lambda bus, a, b: a.info(b),
    "UPDATE": lambda bus, a, b: a.update(
        items.build(abi.ITEM_ATTACH_FLAGS_SEND, layout.U64.pack(abi.ATTACH_ALL))
    ),
    "MATCH": lambda bus, a, b: (
        a.add_match(any_name(abi.ITEM_NAME_ADD)),
        a.do(abi.CMD_MATCH_REMOVE, struct.pack("=3Q", 0, 0, 1)),
    ),
    "ENDPOINT_MAKE": lambda bus, a, b: Endpoint(bus.node, f"{UID}-p{os.getpid()}").close(),
    "BUS_MAKE": lambda bus, a, b: (
        Maker(Path(bus.node).parents[1]).make(f"{UID}-p{os.getpid()}").close()
    ),
}  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_a_client_that_is_killed_in_a_command(bus: KdbusBus, command: str) -> None:
    """At any moment: chosen anew each time, and told if it was a bad one."""
    a, b = bus.kdbus(), bus.kdbus()
    before = state(bus)
    delays = [random.uniform(0, 0.02) for _ in range(KILLS)]
    for delay in delays:
        pid = os.fork()
        if pid == 0:
            with contextlib.suppress(BaseException):
                own = KdbusClient(bus.node)
                while True:
                    with contextlib.suppress(OSError):
                        COMMANDS[command](bus, own, b.id)
            os._exit(1)
        time.sleep(delay)  # what it is in the middle of cannot be waited for
        os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + 10
        while os.waitpid(pid, os.WNOHANG) == (0, 0):
            assert time.monotonic() < deadline, f"it can't be killed ({delays})"
            time.sleep(0.001)
        a.send(a.id, b"still here")
        assert a.recv().payload == b"still here"
    b.close()
    procs.eventually(lambda: is_as(bus, before), f"nothing is left ({delays})")


# -- in between --------------------------------------------------------------------------------


def test_a_caller_that_is_killed_before_the_reply(bus: KdbusBus) -> None:
    b = bus.kdbus()
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            until = time.monotonic_ns() + 60_000_000_000
            KdbusClient(bus.node).send(b.id, b"?", flags=EXPECT, reply=until, cookie=5)
            signal.pause()
        os._exit(1)
    asked = b.recv()
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert fails(lambda: b.send(asked.src, b"!", reply=asked.cookie)) == "ENXIO"


def test_a_callee_that_is_killed_before_it_replies(bus: KdbusBus) -> None:
    a = bus.kdbus()
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            callee = KdbusClient(bus.node)
            callee.acquire(NAME)
            callee.recv(seconds=60)
            callee.recv(seconds=60)
            os.kill(os.getpid(), signal.SIGKILL)
        os._exit(1)
    procs.eventually(lambda: [NAME] in a.list(abi.LIST_NAMES).values(), "it is there")
    (to,) = (id for id, names in a.list(abi.LIST_NAMES).items() if NAME in names)
    until = time.monotonic_ns() + 60_000_000_000
    a.send(to, b"?", flags=EXPECT, reply=until, cookie=5)
    assert fails(lambda: a.call(to, b"?", cookie=6, seconds=60)) == "EPIPE"
    os.waitpid(pid, 0)
    assert a.recv().item(abi.ITEM_REPLY_DEAD) is not None


def _call(say: Say, path: str, to: int, seconds: float) -> None:
    with KdbusClient(path) as client:
        say(fails(lambda: client.call(to, b"never", seconds=seconds)))


def test_a_client_that_is_stopped_in_a_call_can_go_on_and_be_killed(bus: KdbusBus) -> None:
    b, c = bus.kdbus(), bus.kdbus()
    stopped, killed = Child(_call, bus.node, b.id, 1.0), Child(_call, bus.node, b.id, 60.0)
    for _ in range(2):
        assert b.recv().payload == b"never"
    for child in (stopped, killed):
        child.signal(signal.SIGSTOP)
    b.send(c.id, b"meanwhile")
    assert c.recv().payload == b"meanwhile"
    killed.signal(signal.SIGKILL)
    killed.wait()
    stopped.signal(signal.SIGCONT)
    assert stopped.hear() in ("ETIMEDOUT", "EINTR")
    stopped.wait()


def _send_what_never_comes(say: Say, path: str) -> None:
    memory = Unanswered()  # which nobody but this process could answer
    with KdbusClient(path) as client:
        vector = layout.VECTOR.pack(16, memory.address)
        say("sends")
        client.send(client.id, b"", items.build(abi.ITEM_PAYLOAD_VEC, vector))


def is_copying(pid: int) -> bool:
    """Whether a thread of the supervisor is in process_vm_readv(2)."""
    for thread in os.listdir(f"/proc/{pid}/task"):
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/task/{thread}/syscall").read_text().startswith("310 "):
                return True
    return False


def test_a_client_whose_memory_never_comes_can_be_killed(bus: KdbusBus) -> None:
    """While it sends it. It could not: the copier waited for it, and it for its answer."""
    b, c = bus.kdbus(), bus.kdbus()
    before = state(bus)
    child = Child(_send_what_never_comes, bus.node)
    assert child.hear() == "sends"
    procs.eventually(lambda: is_copying(bus.pid), "it is being copied")
    b.send(c.id, b"meanwhile")
    assert c.recv().payload == b"meanwhile"
    child.signal(signal.SIGKILL)
    child.wait()
    procs.eventually(lambda: not is_copying(bus.pid), "nobody waits for it any more")
    procs.eventually(lambda: is_as(bus, before), "nothing is left of it")


# -- many --------------------------------------------------------------------------------------


def memory(pid: int) -> int:
    """Resident, in KiB."""
    text = Path(f"/proc/{pid}/status").read_text()
    return int(text.split("VmRSS:")[1].split()[0])


def fill(bus: KdbusBus, most: int) -> list[int]:
    """Open files until there may be no more."""
    opened: list[int] = []
    try:
        while len(opened) < most:
            opened.append(os.open(bus.node, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        assert error.errno == errno.EMFILE
    return opened


@pytest.fixture
def descriptors() -> Iterator[int]:
    """How many this process may have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield hard
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize(
    ("transport", "count"),
    [(FILE.values[0], 200), pytest.param(FILE.values[0], 2000, marks=pytest.mark.slow)],
)
@pytest.mark.skipif(UID != 0, reason="mounts, and has many descriptors")
def test_thousands_of_files_come_and_go(transport: str, count: int, descriptors: int) -> None:
    limits = {"max_connections_per_user": count, "max_completed_connections": 2 * count}
    assert descriptors > 5 * count, "too few descriptors for this test (RLIMIT_NOFILE)"
    bus = KdbusBus(transport, policy=STRICT_POLICY, limits=limits)
    try:
        a = bus.kdbus()
        for fd in fill(bus, 100):
            os.close(fd)
        a.list(0)
        before, resident = state(bus), memory(bus.pid)
        for _ in range(2):
            opened = fill(bus, count + 1)
            assert count - 4 <= len(opened) < count  # the tree and `a` count as well
            assert fails(lambda: os.open(bus.node, os.O_RDWR)) == "EMFILE"  # the next as well
            a.send(a.id, b"still here")
            assert a.recv().payload == b"still here"
            for fd in opened:
                os.close(fd)
            a.send(a.id, b"and now")
            assert a.recv().payload == b"and now"
            procs.eventually(lambda: is_as(bus, before), "all is let go", timeout=60)
            # It was 256 KiB for each file once, which were not given back.
            assert memory(bus.pid) < resident + 8192 + 2 * count
        assert "refused a file" in bus.log()
    finally:
        bus.stop()
