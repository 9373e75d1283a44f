"""Buses that programs make: who may, how they look in the tree, who is on them, how they end."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import stat
import struct
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from kbusd.kdbus import abi, items, layout
from tests.bus import procs
from tests.kdbusfs.kclient import KdbusClient
from tests.kdbusfs.test_clients import FILE, KdbusBus

UID = os.geteuid()
BLOOM = layout.BLOOM_PARAMETER.pack(128, 3)


@pytest.fixture(scope="module", params=[FILE])
def shared(request: pytest.FixtureRequest) -> Iterator[KdbusBus]:
    bus = KdbusBus(request.param)
    yield bus
    bus.stop()


@pytest.fixture
def root(shared: KdbusBus) -> Iterator[Path]:
    """Where the tree is."""
    yield Path(shared.node).parents[1]
    shared.close_clients()
    procs.eventually(lambda: not made(Path(shared.node).parents[1]), "its buses end")


def made(root: Path) -> list[str]:
    """The directories of buses, but for the configured one."""
    return sorted(each for each in os.listdir(root) if each not in ("control", f"{UID}-session"))


class Maker(KdbusClient):
    """An open control file."""

    def __init__(self, root: Path) -> None:
        super().__init__(str(root / "control"), hello=False)

    def make(
        self, name: str, flags: int = 0, bloom: bytes = BLOOM, *chain: bytes, told: int = 0
    ) -> Maker:
        tell = [items.build(abi.ITEM_ATTACH_FLAGS_SEND, layout.U64.pack(told))] if told else []
        self.do(
            abi.CMD_BUS_MAKE,
            struct.pack("=2Q", flags, 0),
            items.build(abi.ITEM_BLOOM_PARAMETER, bloom),
            items.string(abi.ITEM_MAKE_NAME, name),
            *tell,
            *chain,
        )
        return self


@contextlib.contextmanager
def world_bus(transport: str, n_hash: int = 8, told: int = 0) -> Iterator[str]:
    """The node of a bus, made for this, that the world may open."""
    bus = KdbusBus(transport)
    root, name = Path(bus.node).parents[1], f"{UID}-world"
    bloom = layout.BLOOM_PARAMETER.pack(64, n_hash)
    with Maker(root).make(name, abi.MAKE_ACCESS_WORLD, bloom, told=told):
        yield str(root / name / "bus")
    bus.stop()


def errno_of(maker: Maker, name: str, *how: object) -> str:
    with pytest.raises(OSError) as caught:
        maker.make(name, *how)  # type: ignore[arg-type]
    return errno.errorcode[caught.value.errno or 0]


def test_a_made_bus_is_a_bus_of_its_own(root: Path, shared: KdbusBus) -> None:
    with Maker(root).make(f"{UID}-mine"):
        node = root / f"{UID}-mine" / "bus"
        assert made(root) == [f"{UID}-mine"]
        assert os.listdir(node.parent) == ["bus"]
        with KdbusClient(str(node)) as one, KdbusClient(str(node)) as two, shared.kdbus() as other:
            assert (one.id, two.id) == (1, 2)
            assert one.uuid == two.uuid != other.uuid
            for each in (one, other):
                made_of = uuid.UUID(bytes=each.uuid)
                assert (made_of.version, made_of.variant) == (4, uuid.RFC_4122)
            assert one.bloom.data == BLOOM
            one.acquire("org.example.Mine")
            two.send(one.id, b"hello", cookie=7)
            assert one.recv().payload == b"hello"
            assert two.list(abi.LIST_NAMES) == {1: ["org.example.Mine"]}
            assert other.list(abi.LIST_NAMES) == {}


@pytest.mark.parametrize(
    ("flags", "mode", "within"),
    [
        (0, 0o600, 0o500),
        (abi.MAKE_ACCESS_GROUP, 0o660, 0o550),
        (abi.MAKE_ACCESS_WORLD, 0o666, 0o555),
    ],
)
def test_access_to_the_node_is_as_its_maker_wants(
    root: Path, flags: int, mode: int, within: int
) -> None:
    with Maker(root).make(f"{UID}-open", flags):
        found = os.stat(root / f"{UID}-open" / "bus")
        assert stat.S_IMODE(found.st_mode) == mode
        assert (found.st_uid, found.st_gid) == (UID, os.getegid())
        with KdbusClient(str(root / f"{UID}-open" / "bus")):
            pass
        directory = root / f"{UID}-open"
        if root.is_relative_to("/dev"):
            return  # that is the kernel's

        def seen() -> tuple[int, int, int]:
            found = os.stat(directory)
            return stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid

        assert seen() == (within, UID, os.getegid())
        os.chmod(directory / "bus", 0o600)
        os.chmod(root / "control", 0o600)
        assert seen()[0] == within and stat.S_IMODE(os.stat(root).st_mode) == 0o555
        os.chmod(root / "control", 0o666)
        os.chmod(directory, 0o711)
        assert seen() == (0o711, UID, os.getegid())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (f"{UID + 1}-other", "EINVAL"),
        ("mine", "EINVAL"),
        (f"{UID}-", "EINVAL"),
        (f"{UID}-a/b", "EINVAL"),
        (f"{UID}-..", "EINVAL"),
        (f"../{UID}-x", "EINVAL"),
        (f"{UID}-{'x' * 64}", "ENAMETOOLONG"),
        (f"{UID}-session", "EEXIST"),
        (f"{UID}-taken", "EEXIST"),
    ],
)
def test_a_name_that_can_not_be_is_refused(root: Path, name: str, expected: str) -> None:
    with Maker(root).make(f"{UID}-taken"), Maker(root) as maker:
        assert errno_of(maker, name) in (expected, "EINVAL" if expected == "ENAMETOOLONG" else "")
        maker.make(f"{UID}-fresh")  # the file is as good as before
        assert made(root) == [f"{UID}-fresh", f"{UID}-taken"]


@pytest.mark.parametrize(
    "bloom", [(0, 1), (7, 1), (12, 1), (8, 0), (4104, 1), (1 << 63, 1)], ids=str
)
def test_a_bus_has_bloom_filters_that_can_be(root: Path, bloom: tuple[int, int]) -> None:
    with Maker(root) as maker:
        assert errno_of(maker, f"{UID}-b", 0, layout.BLOOM_PARAMETER.pack(*bloom)) == "EINVAL"


def test_one_user_makes_16_at_most(root: Path) -> None:
    with contextlib.ExitStack() as stack:
        for number in range(16):
            stack.enter_context(Maker(root)).make(f"{UID}-n{number}")
        with Maker(root) as maker:
            assert errno_of(maker, f"{UID}-n16") == "EMFILE"


def test_a_file_makes_one_bus_and_takes_no_other_command(root: Path) -> None:
    with Maker(root) as maker:
        with pytest.raises(OSError) as caught:
            maker.hello()
        assert caught.value.errno == errno.EBADFD
        maker.make(f"{UID}-one")
        assert errno_of(maker, f"{UID}-two") == "EBADFD"
        assert made(root) == [f"{UID}-one"]


def test_what_a_kernel_of_2015_did_not_know_is_refused_and_can_be_negotiated(root: Path) -> None:
    with Maker(root) as maker:
        assert errno_of(maker, f"{UID}-f", 1 << 40) == "EINVAL"
        got = maker.do(abi.CMD_BUS_MAKE, struct.pack("=2Q", abi.FLAG_NEGOTIATE, 0))
        assert struct.unpack_from("=Q", got, 8) == (abi.MAKE_ACCESS_GROUP | abi.MAKE_ACCESS_WORLD,)
        assert made(root) == []


def test_who_made_it_can_be_asked_for_as_far_as_the_maker_wants(root: Path) -> None:
    told = abi.ATTACH_CREDS | abi.ATTACH_PIDS
    with Maker(root).make(f"{UID}-told", told=told):
        with KdbusClient(str(root / f"{UID}-told" / "bus")) as client:
            fixed = struct.pack("=6Q", 0, 0, 0, (1 << 13) - 1 | told, 0, 0)
            got = client.do(abi.CMD_BUS_CREATOR_INFO, fixed)
            offset, size = struct.unpack_from("=2Q", got, 40)
            head = layout.INFO.size
            found = {
                item.type: item.data
                for item in items.split(client.pool[offset : offset + size], head)
            }
            assert found[abi.ITEM_MAKE_NAME] == f"{UID}-told\0".encode()
            assert layout.CREDS.unpack(found[abi.ITEM_CREDS])[:4] == (UID,) * 4
            assert layout.PIDS.unpack(found[abi.ITEM_PIDS])[0] == os.getpid()
            assert abi.ITEM_EXE not in found


def test_a_bus_ends_with_the_file_that_made_it(root: Path, shared: KdbusBus) -> None:
    before = {each.pid for each in procs.descendants(shared.pid)}
    with Maker(root).make(f"{UID}-brief") as maker:
        client = KdbusClient(str(root / f"{UID}-brief" / "bus"))
        late = KdbusClient(str(root / f"{UID}-brief" / "bus"), hello=False)
        poller = select.poll()
        poller.register(client.fd, select.POLLIN)
        assert not poller.poll(0)
        ours = [
            each
            for each in procs.descendants(shared.pid)
            # A worker just forked is called a zygote, too.
            if each.pid not in before and each.ppid == shared.pid
        ]
        assert {each.comm for each in ours} == {"kbusd-broker", "kbusd-zygote"}
        ours += [each for zygote in ours for each in procs.descendants(zygote.pid)]
        assert len(ours) >= 3
        maker.close()
        assert poller.poll(5000)
        with pytest.raises(OSError) as caught:
            client.send(client.id, b"x")
        assert caught.value.errno == errno.ESHUTDOWN
        client.close()
        with pytest.raises(OSError) as caught:
            late.hello()
        assert caught.value.errno == errno.ESHUTDOWN
        with pytest.raises(OSError) as caught:
            os.fchmod(late.fd, 0o640)
        assert caught.value.errno == errno.ESTALE
        assert stat.S_IMODE(os.fstat(late.fd).st_mode) == 0o600
        late.close()
    procs.eventually(lambda: made(root) == [], "the bus is gone")
    with pytest.raises(FileNotFoundError):
        os.open(root / f"{UID}-brief" / "bus", os.O_RDWR)
    procs.eventually(lambda: not any(map(procs.alive, ours)), "so are its processes")
    with Maker(root).make(f"{UID}-brief"):  # the name is free again
        pass


def test_a_bus_ends_with_the_process_that_made_it(root: Path) -> None:
    code = (
        "import sys, pathlib, time; from tests.kdbusfs.test_buses import Maker;"
        f"m = Maker(pathlib.Path({str(root)!r})).make('{UID}-killed');"
        "print('made', flush=True); time.sleep(60)"
    )
    tree = Path(__file__).parents[2]
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=tree) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"made\n"
        assert made(root) == [f"{UID}-killed"]
        process.kill()
    procs.eventually(lambda: made(root) == [], "the bus is gone")


def test_a_dead_broker_ends_its_own_bus_only(root: Path, shared: KdbusBus) -> None:
    before = {each.pid for each in procs.descendants(shared.pid)}
    with Maker(root).make(f"{UID}-a"), Maker(root).make(f"{UID}-b"):
        with KdbusClient(str(root / f"{UID}-b" / "bus")) as b:
            brokers = [
                each.pid
                for each in procs.descendants(shared.pid)
                if each.pid not in before and each.comm == "kbusd-broker"
            ]
            assert len(brokers) == 2
            os.kill(min(brokers), signal.SIGKILL)
            procs.eventually(lambda: made(root) == [f"{UID}-b"], "the bus is gone")
            b.send(b.id, b"still here")
            assert b.recv().payload == b"still here"
            with shared.kdbus() as client:
                client.send(client.id, b"and here")
                assert client.recv().payload == b"and here"


def test_many_buses_come_and_go(root: Path, shared: KdbusBus) -> None:
    before = len(os.listdir(f"/proc/{shared.pid}/fd"))
    for _ in range(3):
        with contextlib.ExitStack() as stack:
            for number in range(5):
                stack.enter_context(Maker(root).make(f"{UID}-many{number}"))
            assert len(made(root)) == 5
        procs.eventually(lambda: made(root) == [], "the bus is gone")
    fds = f"/proc/{shared.pid}/fd"
    procs.eventually(lambda: len(os.listdir(fds)) <= before + 2, "no descriptor is left")


def test_bus_make_that_a_signal_interrupts_goes_on_when_it_is_restarted(root: Path) -> None:
    """SA_RESTART; so it is with who is stopped, and goes on. It was told EBADFD."""
    signals = []
    old = signal.signal(signal.SIGALRM, lambda *_: signals.append(1))
    signal.siginterrupt(signal.SIGALRM, False)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)
        with Maker(root).make(f"{UID}-again"):
            signal.setitimer(signal.ITIMER_REAL, 0)
            with KdbusClient(str(root / f"{UID}-again" / "bus")) as client:
                assert client.id
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    assert signals
