"""What is done after close(2), or BYEBYE, finds the connection gone: nothing of it is there any more."""

from __future__ import annotations

import contextlib
import os
import signal
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kbusd.cuse import abi as fuse
from kbusd.kdbus import abi, items, layout
from kbusd.supervisor import closing
from kbusd.supervisor.domains import HOST
from kbusd.supervisor.relay import Room
from tests.bus import procs
from tests.bus.daemon import STRICT_POLICY
from tests.kdbusfs.kclient import KdbusClient
from tests.kdbusfs.test_buses import UID, Maker
from tests.kdbusfs.test_clients import FILE, NODE, KdbusBus, fails
from tests.kdbusfs.test_endpoints import Endpoint

NAME = "com.example.Closed"
ROUNDS = 100
ROUNDS_IN_GUEST = 15  # where a connection takes a third of a second
CUT_OFF = ("ESHUTDOWN", "ENOTCONN")  # a node of CUSE is gone altogether


@pytest.fixture(scope="module", params=[FILE, NODE])
def shared(request: pytest.FixtureRequest) -> Iterator[KdbusBus]:
    bus = KdbusBus(request.param, policy=STRICT_POLICY)
    yield bus
    bus.stop()


def ended(client: KdbusClient) -> None:
    client.byebye()


def closed(client: KdbusClient) -> None:
    client.close()


def rounds(bus: KdbusBus) -> int:
    return ROUNDS if bus.node.startswith(bus.mount) else ROUNDS_IN_GUEST


@pytest.mark.parametrize("end", [closed, ended])
def test_what_is_done_next_finds_it_gone(bus: KdbusBus, end: Callable[[KdbusClient], None]) -> None:
    """Over and over: what others are told too late is seen by chance else."""
    watcher, other = bus.kdbus(), bus.kdbus()
    watcher.add_match(items.build(abi.ITEM_ID_REMOVE, layout.ID_CHANGE.pack(abi.MATCH_ID_ANY, 0)))
    for _ in range(rounds(bus)):
        client = KdbusClient(bus.node)
        client.acquire(NAME)
        end(client)
        assert watcher.readable()
        got = watcher.recv().item(abi.ITEM_ID_REMOVE)
        assert got
        assert layout.ID_CHANGE.unpack(got)[0] == client.id
        client.close()
    for _ in range(rounds(bus)):
        client = KdbusClient(bus.node)
        client.acquire(NAME)
        end(client)
        assert client.id not in other.list(abi.LIST_UNIQUE)
        assert fails(lambda client=client: other.send(client.id, b"x")) == "ENXIO"
        assert other.acquire(NAME) & abi.NAME_ACQUIRED
        other.release(NAME)
        client.close()


def test_another_process_that_hears_of_it_finds_it_gone(bus: KdbusBus) -> None:
    (told, tell), (heard, say) = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(tell)
        with contextlib.suppress(BaseException):
            other = KdbusClient(bus.node)
            while os.read(told, 1):
                other.acquire(NAME)
                other.release(NAME)
                os.write(say, b"!")
        os._exit(0)
    os.close(say)
    for _ in range(rounds(bus)):
        with KdbusClient(bus.node) as client:
            client.acquire(NAME)
        os.write(tell, b"!")
        assert os.read(heard, 1) == b"!"
    for fd in (told, tell, heard):
        os.close(fd)
    os.waitpid(pid, 0)


def test_who_waits_for_the_end_of_a_process_finds_its_connections_gone(bus: KdbusBus) -> None:
    other = bus.kdbus()
    for _ in range(20):
        pid = os.fork()
        if pid == 0:
            KdbusClient(bus.node).acquire(NAME)
            os.kill(os.getpid(), signal.SIGKILL)
        os.waitpid(pid, 0)
        other.acquire(NAME)
        other.release(NAME)


def test_a_custom_endpoint_is_gone_when_its_file_is_closed(bus: KdbusBus) -> None:
    for _ in range(10):
        with Endpoint(bus.node, f"{UID}-gone") as made:
            behind = KdbusClient(made.node)
        assert not os.path.exists(made.node)
        assert fails(lambda behind=behind: behind.send(behind.id, b"x")) in CUT_OFF
        behind.close()


def test_a_made_bus_is_gone_when_its_file_is_closed(bus: KdbusBus) -> None:
    root = Path(bus.node).parents[1]
    for _ in range(3):
        with Maker(root).make(f"{UID}-gone"):
            client = KdbusClient(str(root / f"{UID}-gone" / "bus"))
        assert not os.path.exists(root / f"{UID}-gone" / "bus")
        assert fails(lambda client=client: client.send(client.id, b"x")) in CUT_OFF
        client.close()


# -- workers that do not end -------------------------------------------------------------------


@pytest.fixture
def unending(bus: KdbusBus) -> Iterator[KdbusClient]:
    """A connection with the name whose worker is stopped."""
    with KdbusClient(bus.node) as client:
        client.acquire(NAME)
        procs.eventually(lambda: len(bus.serving()) == 1, "those of former clients have ended")
        (worker,) = bus.serving()
        os.kill(worker.pid, signal.SIGSTOP)
        try:
            yield client
        finally:
            os.kill(worker.pid, signal.SIGCONT)
    procs.eventually(lambda: not procs.alive(worker), "it ends after all")


def test_nobody_waits_for_ever_for_what_does_not_end(unending: KdbusClient, bus: KdbusBus) -> None:
    unending.close()
    with KdbusClient(bus.node) as other:
        assert unending.id in other.list(abi.LIST_UNIQUE)


def test_a_call_that_waits_for_what_was_closed_is_interrupted(
    bus: KdbusBus, unending: KdbusClient
) -> None:
    caller, callee = bus.kdbus(), bus.kdbus()
    old = signal.signal(signal.SIGALRM, lambda *_: None)
    signal.siginterrupt(signal.SIGALRM, True)
    try:
        unending.close()
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        assert fails(lambda: caller.call(callee.id, b"x", seconds=20)) == "EINTR"
    finally:
        signal.signal(signal.SIGALRM, old)


# -- who waits for whom ------------------------------------------------------------------------


class Kernel:
    """A connection to it, which notes what is dealt with."""

    domain = HOST

    def __init__(self) -> None:
        self.calls: list[Callable[[], None]] = []
        self.dealt: list[int] = []
        self.closings = closing.Closings(self.listen, self.calls.append)

    def listen(self, _: int, handler: Callable[[Room], bool]) -> None:
        self.ring = handler

    def give(self, request: bytes) -> None:
        self.dealt.append(int.from_bytes(request[8:16], "little"))

    def close(self, number: int, uid: int) -> None:
        self.closings.opened(number)
        file: Any = SimpleNamespace(
            number=number, uid=uid, pid=os.getpid(), bus="0-x", owned=None, end=lambda **_: 0
        )
        self.closings.close(file, HOST)

    def waits(self, unique: int, uid: int, opcode: int = fuse.IOCTL) -> bool:
        head = struct.pack("=IIQQIIIHH", 48, opcode, unique, 1, uid, 0, 0, 0, 0)
        return self.closings.postpone(self, head + struct.pack("=Q", 77))


def test_a_user_who_closes_many_files_keeps_only_himself_waiting() -> None:
    kernel = Kernel()
    for number in range(closing.MAX_FOR_OTHERS):
        kernel.close(number, uid=1)
    assert kernel.waits(100, uid=2)
    kernel.close(closing.MAX_FOR_OTHERS, uid=1)
    assert not kernel.waits(101, uid=2)
    assert kernel.waits(102, uid=1)
    for number in range(closing.MAX_FOR_OTHERS):
        kernel.closings.left(number)
    kernel.ring(Room())
    assert kernel.dealt == [100]  # what was closed after it was asked is nothing to it
    kernel.closings.left(closing.MAX_FOR_OTHERS)
    kernel.ring(Room())
    assert kernel.dealt == [100, 102]
    assert not kernel.closings.busy


def test_a_user_whose_worker_did_not_end_keeps_only_himself_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kernel, now = Kernel(), [1000.0]
    monkeypatch.setattr(closing.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(closing.kernel, "delayed", lambda _: (0.0, -1))  # it sleeps
    kernel.close(1, uid=1)
    assert kernel.waits(100, uid=2)
    now[0] += closing.WAIT_SECONDS
    kernel.closings.expire()
    kernel.ring(Room())
    assert kernel.dealt == [100]
    kernel.close(2, uid=1)
    assert not kernel.waits(101, uid=2)
    assert kernel.waits(102, uid=1)
    now[0] += closing.TARDY_SECONDS
    assert kernel.waits(103, uid=2)


def test_a_bus_that_ends_holds_nothing_up() -> None:
    kernel = Kernel()
    kernel.close(1, uid=1)
    assert kernel.waits(100, uid=2)
    kernel.closings.over("0-y")
    assert kernel.closings.busy
    kernel.closings.over("0-x")
    kernel.ring(Room())
    assert kernel.dealt == [100]
