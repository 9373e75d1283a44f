"""What kdbus's own self-tests demand of it, command by command, in our words: one test for one of theirs.

Clients say HELLO as those programs do, and send what they send: 128 KiB, zeroes, a few bytes, and a memfd.
A step that fails tells its errno; "" is success.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kbusd.kdbus import abi, items, layout
from tests.bus import procs
from tests.kdbusfs.kclient import LIBC, Buffer, KdbusClient, Message
from tests.kdbusfs.kclient import ioctl as kclient_ioctl
from tests.kdbusfs.test_buses import Maker, world_bus
from tests.kdbusfs.test_clients import FILE, NODE, to_name
from tests.kdbusfs.test_descriptors import PRELOAD, TREE
from tests.kdbusfs.test_endpoints import Endpoint
from tests.kdbusfs.test_sessions import brought, signal_filter

UID = os.geteuid()
NOBODY = 65534
POOL = 16 << 20
LARGE = b"0123456789_0".ljust((128 << 10) + 3, b"\0")
SMALL = b"0123456789_1\0"
ALL, EXPECT, SIGNAL = abi.DST_ID_BROADCAST, abi.MSG_EXPECT_REPLY, abi.MSG_SIGNAL
USER, GROUP, WORLD = abi.POLICY_ACCESS_USER, abi.POLICY_ACCESS_GROUP, abi.POLICY_ACCESS_WORLD
SEE, TALK, OWN = abi.POLICY_SEE, abi.POLICY_TALK, abi.POLICY_OWN
HOLDER, ACTIVATOR, MONITOR = abi.HELLO_POLICY_HOLDER, abi.HELLO_ACTIVATOR, abi.HELLO_MONITOR
EVERYTHING = abi.LIST_UNIQUE | abi.LIST_NAMES | abi.LIST_ACTIVATORS | abi.LIST_QUEUED
REPLACE, ALLOW, QUEUE = abi.NAME_REPLACE_EXISTING, abi.NAME_ALLOW_REPLACEMENT, abi.NAME_QUEUE
MOST = abi.MAX_MESSAGES_PER_USER
MS = 1_000_000

# Other users are who some of it is about.
pytestmark = [] if UID == 0 else [pytest.mark.guest]


@pytest.fixture(scope="module", params=[FILE, NODE])
def made(request: pytest.FixtureRequest) -> Iterator[str]:
    """The node of a bus made as theirs are."""
    with world_bus(request.param, n_hash=1, told=abi.ATTACH_ALL) as node:
        yield node


@pytest.fixture
def node(made: str) -> Iterator[str]:
    yield made
    with KdbusClient(made) as last:
        procs.eventually(lambda: set(last.list(EVERYTHING)) == {last.id}, "all others are gone")


def outcome(do: Callable[[], Any]) -> str:
    """The errno that it ends with, or "" for success."""
    try:
        do()
    except OSError as error:
        return errno.errorcode[error.errno or 0].replace("ENOTSUP", "EOPNOTSUPP")
    return ""


class Peer(KdbusClient):
    """A connection like theirs."""

    def __init__(self, path: str, flags: int = 0, *chain: bytes) -> None:
        description = items.string(abi.ITEM_CONN_DESCRIPTION, "this-is-my-name")
        super().__init__(
            path, flags=flags | abi.HELLO_ACCEPT_FD, send=abi.ATTACH_ALL, recv=abi.ATTACH_ALL,
            size=POOL, chain=(description, *chain),
        )  # fmt: skip

    def post(
        self, to: int | str, cookie: int = 1, flags: int = 0, after: int = 0, priority: int = 0,
        sync: bool = False, cancel: bytes = b"",
    ) -> str:  # fmt: skip
        """Send one of their messages; `after`: when a reply is too late, in ns from now."""
        large, small = Buffer(LARGE), Buffer(SMALL)
        vectors = [(large.size, large.address), (-large.size % 8, 0), (small.size, small.address)]
        chain = [items.build(abi.ITEM_PAYLOAD_VEC, layout.VECTOR.pack(*each)) for each in vectors]
        memfd = -1
        if to == ALL:
            chain.append(signal_filter())
            flags |= SIGNAL
        else:
            memfd = os.memfd_create("test", os.MFD_ALLOW_SEALING)
            os.ftruncate(memfd, 1 << 20)
            os.write(memfd, b"kdbus memfd 1234567")
            fcntl.fcntl(memfd, fcntl.F_ADD_SEALS, 0xF)
            data = layout.MEMFD.pack(0, 16, memfd, 0)
            chain.append(items.build(abi.ITEM_PAYLOAD_MEMFD, data))
        if isinstance(to, str):
            chain.insert(0, to_name(to))
            to = 0
        until = time.clock_gettime_ns(time.CLOCK_MONOTONIC) + after if after else 0
        how: dict[str, Any] = {"flags": flags, "cookie": cookie, "reply": until}
        how |= {"priority": priority, "sync": sync, "cancel": cancel}

        def send() -> None:
            offset, _ = self.send(to, b"", *chain, **how)
            if sync:
                self.shown = Message(self.pool, offset)
                self.drain()
                self.free(offset)

        try:
            return outcome(send)
        finally:
            if memfd >= 0:
                os.close(memfd)

    def answer(self, to: int, cookie: int) -> str:
        return outcome(lambda: self.send(to, LARGE, cookie=0, reply=cookie))

    def fill(self, to: int, most: int) -> int:
        """How many messages without anything in them go to a connection."""
        for number in range(most):
            if outcome(lambda n=number: self.send(to, cookie=n)):  # type: ignore[misc]
                return number
        return most

    def take(self, ms: int = 0, flags: int = 0, priority: int = 0, free: bool = True) -> str:
        """Receive, as soon as there is something; `shown` is it then."""
        until = time.monotonic() + ms / 1000
        while True:
            left = max(0, until - time.monotonic())
            if ms and not self.readable(left):
                return "ETIMEDOUT"
            got = outcome(lambda: self._receive(flags, priority, free))
            if got != "EAGAIN" or not ms:
                return got

    def _receive(self, flags: int, priority: int, free: bool) -> None:
        got = self.do(abi.CMD_RECV, struct.pack("=2Qq4Q", flags, 0, priority, 0, 0, 0, 0))
        (self.return_flags,) = layout.U64.unpack_from(got, 16)
        self.dropped, offset, _, _ = struct.unpack_from("=4Q", got, 32)
        self.shown = Message(self.pool, offset)
        self.drain()
        if free:
            self.free(offset)

    def drain(self) -> None:
        """Close what came over the socket, if there is one."""
        while hasattr(self, "socket"):
            try:
                _, fds, *_ = socket.recv_fds(self.socket, 64, 64)
            except BlockingIOError:
                return
            for fd in fds:
                os.close(fd)

    def notice(self, ms: int = 0) -> tuple[Any, ...]:
        """The type of the first item of what is received, and what it tells."""
        assert self.take(ms) == ""
        item = self.shown.items[0]
        if item.type in (abi.ITEM_ID_ADD, abi.ITEM_ID_REMOVE):
            return item.type, layout.ID_CHANGE.unpack(item.data)[0]
        old, _, new, _ = layout.NAME_CHANGE.unpack_from(item.data)
        return item.type, old, new, item.data[layout.NAME_CHANGE.size : -1].decode()

    def want(self, name: str, flags: int = 0) -> str:
        def acquire() -> None:
            self.got = self.acquire(name, flags)

        return outcome(acquire)

    def drop(self, name: str) -> str:
        return outcome(lambda: self.release(name))

    def match_anything(self) -> None:
        self.add_match(items.build(abi.ITEM_ID, layout.U64.pack(ALL)), cookie=0)

    def match_id(self, type: int, id: int = ALL, cookie: int = 1) -> None:
        self.add_match(items.build(type, layout.ID_CHANGE.pack(id, 0)), cookie=cookie)

    def match_name(self, type: int, name: str) -> None:
        change = layout.NAME_CHANGE.pack(ALL, 0, ALL, 0) + name.encode() + b"\0"
        self.add_match(items.build(type, change))

    def policy(self, name: str, *accesses: tuple[int, int, int]) -> str:
        return outcome(lambda: self.update(*brought(name, *accesses)))

    def set_attach(self, send: int, recv: int) -> str:
        each = ((abi.ITEM_ATTACH_FLAGS_SEND, send), (abi.ITEM_ATTACH_FLAGS_RECV, recv))
        chain = [items.build(type, layout.U64.pack(flags)) for type, flags in each]
        return outcome(lambda: self.update(*chain))

    def bye(self) -> str:
        return outcome(self.byebye)


class Forked:
    """A process that does something, as another user if that is said; an assertion that fails there fails
    where it is joined."""

    def __init__(self, do: Callable[[], Any], uid: int = UID) -> None:
        self._said, say = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            text = ""
            try:
                LIBC.prctl(1, signal.SIGKILL)
                if uid != UID:
                    os.setgroups([])
                    os.setresgid(uid, uid, uid)
                    os.setresuid(uid, uid, uid)
                do()
            except BaseException:  # noqa: BLE001 (who joins is to be told)
                text = traceback.format_exc()
            os.write(say, text.encode()[-4000:])
            os._exit(0)
        os.close(say)

    def join(self) -> None:
        with open(self._said, "rb") as said:
            text = said.read().decode()
        assert os.waitpid(self.pid, 0)[1] == 0, "it was killed"
        assert not text, text


def as_nobody(do: Callable[[], Any], uid: int = NOBODY) -> None:
    Forked(do, uid).join()


def nobody(node: str, do: Callable[[Peer], Any]) -> None:
    """What a user without rights does with a connection of his."""

    as_nobody(lambda: nobody_here(node, do))


def nobody_here(node: str, do: Callable[[Peer], Any]) -> None:
    with Peer(node) as client:
        do(client)


def may(expected: str, got: str) -> None:
    assert got == expected


# -- test-bus.c, test-connection.c ---------------------------------------------------------------


def test_bus_make(node: str) -> None:
    root, bloom = Path(node).parents[1], layout.BLOOM_PARAMETER.pack(64, 1)
    with Maker(root) as one, Maker(root) as two:
        for name in ("foo", f"{UID}-blah@123", f"{UID}-blah-"):
            assert outcome(lambda name=name: one.make(name, 0, bloom)) == "EINVAL"  # type: ignore[misc]
        one.make(f"{UID}-self-1", 0, bloom)
        assert outcome(lambda: two.make(f"{UID}-self-1", 0, bloom)) == "EEXIST"
        with Peer(str(root / f"{UID}-self-1/bus")) as client:
            fixed = struct.pack("=6Q", 0, 0, 0, abi.ATTACH_ALL, 0, 0)
            got = client.do(abi.CMD_BUS_CREATOR_INFO, fixed)
            offset, size = struct.unpack_from("=2Q", got, 40)
            found = items.split(client.pool[offset : offset + size], layout.INFO.size)
            assert [each.text for each in found if each.type == abi.ITEM_MAKE_NAME] == [
                f"{UID}-self-1"
            ]
            client.free(offset)
        assert outcome(lambda: one.make(f"{UID}-self-2", 0, bloom)) == "EBADFD"
        two.make(f"{UID}-self-2", 0, bloom)


def test_commands_end_where_their_last_item_does(node: str) -> None:
    """As their programs send them: of no multiple of 8 bytes, and with anything between two items."""
    root = Path(node).parents[1]

    def raw(fixed: bytes, *chain: tuple[int, bytes]) -> bytes:
        body = b""
        for type, data in chain:
            body += b"\xa5" * (-len(body) % 8) + layout.ITEM.pack(16 + len(data), type) + data
        return layout.U64.pack(8 + len(fixed) + len(body)) + fixed + body

    def do(file: KdbusClient, command: int, data: bytes) -> None:
        assert len(data) % 8
        buffer = Buffer(data)
        kclient_ioctl(file.fd, command, buffer.address)

    bloom = layout.BLOOM_PARAMETER.pack(64, 1)
    tells = layout.U64.pack(abi.ATTACH_ALL)
    names = f"{UID}--odd-1".encode() + b"\0", b"com.example.odd\0", b"com.example.od\0"
    with KdbusClient(str(root / "control"), hello=False) as maker, Peer(node) as one:
        made = raw(
            bytes(16),
            (abi.ITEM_BLOOM_PARAMETER, bloom),
            (abi.ITEM_ATTACH_FLAGS_SEND, tells),
            (abi.ITEM_MAKE_NAME, names[0]),
        )
        do(maker, abi.CMD_BUS_MAKE, made)
        assert (root / f"{UID}--odd-1/bus").exists()
        assert one.want(names[2][:-1].decode()) == ""
        do(one, abi.CMD_CONN_INFO, raw(bytes(48), (abi.ITEM_NAME, names[2])))
        change = layout.NAME_CHANGE.pack(ALL, 0, ALL, 0) + names[2]
        do(one, abi.CMD_MATCH_ADD, raw(bytes(24), (abi.ITEM_NAME_ADD, change)))
        access = layout.POLICY_ACCESS.pack(USER, OWN, UID)
        held = items.build(abi.ITEM_NAME, names[2])[: 16 + len(names[2])]
        policy = held + b"\xa5" * (-len(held) % 8), items.build(abi.ITEM_POLICY_ACCESS, access)
        Peer(node, HOLDER, *policy).close()


def test_hello(node: str) -> None:
    def say(size: int = layout.HELLO.size, flags: int = 1, pool: int = POOL, shift: int = 0) -> str:
        fixed = layout.HELLO.pack(
            size, flags, 0, abi.ATTACH_ALL, abi.ATTACH_ALL, 0, 0, pool, ALL, 0, bytes(16)
        )
        buffer = Buffer(bytes(shift) + fixed)
        got = outcome(lambda: kclient_ioctl(file.fd, abi.CMD_HELLO, buffer.address + shift))
        self.offset = layout.U64.unpack_from(buffer.bytes, shift + 64)[0]
        return got

    with KdbusClient(node, hello=False) as file:
        self = file
        assert say(shift=1) == "EFAULT"
        assert say(size=1) == "EINVAL"
        assert say(flags=1 << 32) == "EINVAL"
        for pool in (0, 4097):
            assert say(pool=pool) == "EINVAL"
        assert say() == ""
        assert file.offset != ALL
        file.free(file.offset)
    with KdbusClient(node, hello=False) as file:
        assert say(flags=ACTIVATOR) == "EINVAL"


def test_byebye(node: str) -> None:
    with Peer(node) as one, Peer(node) as two:
        one.match_anything()
        two.match_anything()
        assert one.post(ALL, 0) == ""
        assert two.bye() == "EBUSY"
        assert two.take() == ""
        assert two.bye() == ""
        assert two.bye() == "ECONNRESET"


KNOWN = abi.ATTACH_NAMES | abi.ATTACH_CREDS | abi.ATTACH_PIDS | abi.ATTACH_CONN_DESCRIPTION


def test_connection_info(node: str) -> None:
    def short() -> None:
        chain = struct.pack("=2Q", 17, abi.ITEM_NAME) + b"foo.bar.bla"
        head = layout.INFO_COMMAND.pack(layout.INFO_COMMAND.size + 17, 0, 0, 0, 0, 0, 0)
        buffer = Buffer(head + chain)
        kclient_ioctl(one.fd, abi.CMD_CONN_INFO, buffer.address)

    def shows(found: dict[int, bytes]) -> None:
        assert one.found == one.id
        assert layout.CREDS.unpack(found[abi.ITEM_CREDS]) == (UID,) * 8
        pids = layout.PIDS.unpack(found[abi.ITEM_PIDS])
        assert pids == (os.getpid(), threading.get_native_id(), os.getppid())
        assert abi.ITEM_NAME not in found
        assert found[abi.ITEM_CONN_DESCRIPTION] == b"this-is-my-name\0"

    with Peer(node) as one:
        one.info(one.id, flags=0)
        assert outcome(short) == "EINVAL"
        assert outcome(lambda: one.info(name="non.existent.name", flags=0)) == "ESRCH"
        found = one.info(one.id, flags=KNOWN)
        shows(found)
        assert abi.ITEM_CAPS not in found and abi.ITEM_OWNED_NAME not in found
        one.acquire("com.example.a")
        found = one.info(name="com.example.a", flags=KNOWN)
        shows(found)
        assert found[abi.ITEM_OWNED_NAME][8:] == b"com.example.a\0"
        parent, grand = os.getpid(), os.getppid()

        def asks() -> None:
            flags = KNOWN | abi.ATTACH_CAPS | abi.ATTACH_CGROUP
            for wanted in (KNOWN, flags):
                found = one.info(one.id, flags=wanted)
                assert layout.CREDS.unpack(found[abi.ITEM_CREDS]) == (UID,) * 8
                assert layout.PIDS.unpack(found[abi.ITEM_PIDS]) == (parent, parent, grand)
                assert found[abi.ITEM_OWNED_NAME][8:] == b"com.example.a\0"
                for each in (abi.ITEM_CAPS, abi.ITEM_CGROUP):
                    assert (each in found) == (wanted == flags)

        as_nobody(asks)
        one.acquire("com.example.b")
        fixed = struct.pack("=6Q", 0, 0, one.id, KNOWN, 0, 0)
        offset, size = struct.unpack_from("=2Q", one.do(abi.CMD_CONN_INFO, fixed), 40)
        all = items.split(one.pool[offset : offset + size], layout.INFO.size)
        assert [each.type for each in all].count(abi.ITEM_OWNED_NAME) == 2


def test_connection_update(node: str) -> None:
    with Peer(node) as one, Peer(node) as two:
        for mask in (abi.ATTACH_ALL, abi.ATTACH_ALL & ~abi.ATTACH_TIMESTAMP):
            if mask != abi.ATTACH_ALL:
                assert two.set_attach(abi.ATTACH_ALL, mask) == ""
            assert one.post(two.id, 0x12345678) == ""
            assert two.take() == ""
            stamped = two.shown.item(abi.ITEM_TIMESTAMP) is not None
            assert stamped == (mask == abi.ATTACH_ALL)
        assert two.set_attach(abi.ATTACH_ALL + 1, abi.ATTACH_ALL) == "EINVAL"


# ATTACH flags, in the order of their bits, and the items that they stand for.
TOLD = (
    abi.ITEM_TIMESTAMP, abi.ITEM_CREDS, abi.ITEM_PIDS, abi.ITEM_AUXGROUPS, abi.ITEM_OWNED_NAME,
    abi.ITEM_TID_COMM, abi.ITEM_PID_COMM, abi.ITEM_EXE, abi.ITEM_CMDLINE, abi.ITEM_CGROUP,
    abi.ITEM_CAPS, abi.ITEM_SECLABEL, abi.ITEM_AUDIT, abi.ITEM_CONN_DESCRIPTION,
)  # fmt: skip
ALWAYS = {abi.ITEM_CREDS, abi.ITEM_PIDS, abi.ITEM_TID_COMM, abi.ITEM_PID_COMM, abi.ITEM_EXE}
"""Of those, what there is of every process on every kernel."""
PUBLIC = {
    abi.ITEM_CREDS, abi.ITEM_PIDS, abi.ITEM_AUXGROUPS, abi.ITEM_OWNED_NAME,
    abi.ITEM_CONN_DESCRIPTION,
}  # fmt: skip


def test_attach_flags_of_connections(node: str) -> None:
    """test-attach-flags.c, without what kdbus itself gave up: a mask of the module's, flags that a bus requires."""
    with Peer(node) as one, Peer(node) as reader:
        found = set(reader.info(one.id))
        assert ALWAYS | {abi.ITEM_CONN_DESCRIPTION, abi.ITEM_CMDLINE} <= found
        assert not found & {abi.ITEM_TIMESTAMP, abi.ITEM_OWNED_NAME}
        assert reader.info(one.id, flags=abi.ATTACH_NAMES) == {}
        assert one.want("com.example.attach") == ""
        found.add(abi.ITEM_OWNED_NAME)
        for bit, type in enumerate(TOLD):
            assert set(reader.info(one.id, flags=1 << bit)) == {type} & found
        for bit, type in enumerate(TOLD):  # what it lets be known, beside what anybody may know
            assert one.set_attach(1 << bit, 0) == ""
            assert set(reader.info(one.id)) == ({type} | PUBLIC) & found
        assert one.set_attach(0, 0) == ""
        assert set(reader.info(one.id)) == PUBLIC


@pytest.mark.parametrize("told", [abi.ATTACH_ALL, abi.ATTACH_PIDS | abi.ATTACH_CREDS, 0])
def test_attach_flags_of_a_buss_creator(node: str, told: int) -> None:
    root, bloom = Path(node).parents[1], layout.BLOOM_PARAMETER.pack(64, 1)
    both = abi.ATTACH_PIDS | abi.ATTACH_CREDS
    with Maker(root).make(f"{UID}-tells", 0, bloom, told=told):
        with Peer(str(root / f"{UID}-tells/bus")) as client:

            def asked(flags: int) -> set[int]:
                fixed = struct.pack("=6Q", 0, 0, 0, flags, 0, 0)
                got = client.do(abi.CMD_BUS_CREATOR_INFO, fixed)
                offset, size = struct.unpack_from("=2Q", got, 40)
                found = items.split(client.pool[offset : offset + size], layout.INFO.size)
                client.free(offset)
                return {each.type for each in found}

            name = {abi.ITEM_MAKE_NAME}
            assert asked(0) == name
            assert asked(both) == name | ({abi.ITEM_PIDS, abi.ITEM_CREDS} if told else set())
            assert asked(abi.ATTACH_PIDS) == name | ({abi.ITEM_PIDS} if told else set())
            everything = asked(abi.ATTACH_ALL)
            never = {abi.ITEM_TIMESTAMP, abi.ITEM_OWNED_NAME, abi.ITEM_CONN_DESCRIPTION}
            assert not everything & never
            if told == abi.ATTACH_ALL:
                assert everything >= name | ALWAYS
            else:
                assert everything == asked(both)


@pytest.mark.parametrize("other", ["byebye", "match"])
def test_race_of_byebye_with_another_thread(node: str, other: str) -> None:
    """test-race.c: one of two BYEBYEs succeeds; MATCH_REMOVE comes before it or after."""
    commands = {
        "byebye": (abi.CMD_BYEBYE, struct.pack("=3Q", 24, 0, 0)),
        "match": (abi.CMD_MATCH_REMOVE, struct.pack("=4Q", 32, 0, 0, 0xDEADBEEF)),
    }
    for _ in range(10):
        with KdbusClient(node) as client:
            barrier = threading.Barrier(2)
            said = {}

            def run(at: int, command: int, data: bytes) -> None:
                buffer = Buffer(data)
                barrier.wait()  # noqa: B023
                said[at] = outcome(lambda: kclient_ioctl(client.fd, command, buffer.address))  # noqa: B023

            threads = [
                threading.Thread(target=run, args=(at, *commands[which]))
                for at, which in enumerate(("byebye", other))
            ]
            for each in threads:
                each.start()
            for each in threads:
                each.join()
            if other == "byebye":
                assert sorted(said.values()) == ["", "ECONNRESET"]
            else:
                assert said[0] == ""
                assert said[1] in ("EBADSLT", "ECONNRESET")


WRITABLE = """
import ctypes, mmap, struct, sys
from kbusd.kdbus import abi
from tests.kdbusfs.kclient import LIBC, KdbusClient
client = KdbusClient(sys.argv[1], hello=False)
client.do(abi.CMD_HELLO, struct.pack("=9Q", 1, 0, 0, 0, 0, 0, 1 << 20, 0, 0) + bytes(16))
LIBC.mmap.restype = ctypes.c_void_p
def mapped(protection):
    return LIBC.mmap(None, 1 << 20, protection, 1, client.fd, ctypes.c_long(0))
assert mapped(3) == 2**64 - 1 and ctypes.get_errno() == 1, "EPERM"
at = mapped(1)
assert at != 2**64 - 1
assert LIBC.mprotect(ctypes.c_void_p(at), 1 << 20, 3) == -1
"""


def test_writable_pool(node: str) -> None:
    """With the interposer, and so for the nodes in any case: without, FUSE lets a client write there."""
    command = [sys.executable, "-c", WRITABLE, node]
    environment = os.environ | {"LD_PRELOAD": str(PRELOAD)}
    done = subprocess.run(
        command, check=False, env=environment, cwd=TREE, capture_output=True, text=True, timeout=50
    )
    assert done.returncode == 0, done.stderr


def test_message_free(node: str) -> None:
    with Peer(node) as one:
        for offset in (0, POOL + 1):
            assert outcome(lambda offset=offset: one.free(offset)) == "ENXIO"  # type: ignore[misc]


# -- test-chat.c, test-names.c --------------------------------------------------------------------


def test_chat(node: str) -> None:
    with Peer(node) as a, Peer(node) as b:
        assert a.want("foo.bar.test", ALLOW) == ""
        assert a.want("foo.bar.baz") == ""
        assert b.want("foo.bar.baz", QUEUE) == ""
        assert a.want("foo.bar.double") == ""
        assert a.want("foo.bar.double") == ""
        assert not a.got & abi.NAME_ACQUIRED
        assert a.drop("foo.bar.double") == ""
        assert a.drop("foo.bar.double") == "ESRCH"
        b.list(EVERYTHING)
        a.match_anything()
        b.match_anything()
        assert b.post(ALL, 0xC0000000) == ""
        for count in range(12):
            poller = select.poll()
            poller.register(a.fd, select.POLLIN)
            poller.register(b.fd, select.POLLIN)
            ready = {fd for fd, _ in poller.poll(3000)}
            assert ready
            for each, other in ((a, b), (b, a)):
                if each.fd in ready:
                    if each is a and count > 2:
                        a.drop("foo.bar.baz")
                    assert each.take() == ""
                    assert each.post(other.id, 0xC0000000 | count) == ""
            b.list(EVERYTHING)


def shown(client: Peer, name: str, flags: int, owner: Peer | None = None) -> bool:
    listed = client.entries(EVERYTHING & ~abi.LIST_UNIQUE)
    return ((owner or client).id, name, flags) in listed


PRIMARY = abi.NAME_PRIMARY


def test_names(node: str) -> None:
    name = "foo.bla.blaz"
    with Peer(node) as one, Peer(node) as two:
        assert two.want("foo.bar.xxx") == ""
        for bad in (".bla.blaz", "foo", "foo.bla.bl.*"):
            assert one.want(bad) == "EINVAL"
            assert one.drop(bad) == "ESRCH"
        assert one.want(name) == ""
        assert shown(one, name, PRIMARY)
        assert two.want(name) == "EEXIST"
        assert one.drop(name) == ""
        assert not shown(one, name, PRIMARY)
        assert one.drop(name) == "ESRCH"
        assert one.drop("foo.bar.xxx") == "EADDRINUSE"
        # name-queue
        assert one.want(name) == ""
        assert two.want(name, QUEUE) == ""
        assert two.got & abi.NAME_IN_QUEUE
        assert shown(two, name, PRIMARY, one)
        assert shown(two, name, QUEUE | abi.NAME_IN_QUEUE)
        assert one.drop(name) == ""
        assert shown(two, name, PRIMARY | QUEUE)
        assert two.drop(name) == ""
        # name-takeover
        assert one.want(name, ALLOW) == ""
        assert shown(one, name, PRIMARY | ALLOW)
        assert two.want(name, REPLACE) == ""
        assert two.got & abi.NAME_ACQUIRED
        assert shown(two, name, PRIMARY)


# -- test-fd.c ------------------------------------------------------------------------------------


def fds_item(fds: list[int]) -> bytes:
    return items.build(abi.ITEM_FDS, struct.pack(f"={len(fds)}i", *fds))


def memfd_items(fds: list[int]) -> list[bytes]:
    return [items.build(abi.ITEM_PAYLOAD_MEMFD, layout.MEMFD.pack(0, 8, fd, 0)) for fd in fds]


def sealed(data: bytes) -> int:
    fd = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    os.write(fd, data)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, 0xF)
    return fd


def brought_fds(client: Peer) -> int:
    """How many numbers the message has in its items; a memfd may be shown as bytes."""
    found = 0
    for item in client.shown.items:
        if item.type == abi.ITEM_FDS:
            found += len(item.data) // 4
        elif item.type in (abi.ITEM_PAYLOAD_MEMFD, abi.ITEM_PAYLOAD_OFF):
            found += 1
    return found


@pytest.fixture
def fds() -> Iterator[list[int]]:
    opened = [os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC) for _ in range(17)]
    yield opened
    for each in opened:
        os.close(each)


@pytest.fixture
def memfds() -> Iterator[list[int]]:
    opened = [sealed(struct.pack("=Q", number)) for number in range(129)]
    yield opened
    for each in opened:
        os.close(each)


def test_fd_passing(node: str, fds: list[int], memfds: list[int]) -> None:
    def send(to: int, fds: list[int], memfds: list[int], a: Peer | None = None) -> str:
        chain = [fds_item(fds)] if fds else []
        chain += memfd_items(memfds)
        if to == ALL:
            chain.insert(0, signal_filter())
        flags = SIGNAL if to == ALL else 0
        return outcome(lambda: (a or one).send(to, b"", *chain, cookie=0, flags=flags))

    with Peer(node) as one, Peer(node) as two, socket.socket(socket.AF_UNIX) as sock:
        own = [one.fd, two.fd]
        assert send(two.id, own, []) == send(one.id, own, [], two) == "EOPNOTSUPP"
        assert send(two.id, [sock.fileno()], []) == "EOPNOTSUPP"
        assert send(ALL, fds[:1], []) == "ENOTUNIQ"
        assert send(ALL, [], memfds[:1]) == ""
        assert send(two.id, [99999], []) == "EBADF"
        assert send(two.id, fds, []) == "EMFILE"
        assert send(two.id, [], memfds) == send(two.id, [], memfds[:17]) == "E2BIG"
        assert send(two.id, fds, memfds[:10]) == "EMFILE"
        assert send(two.id, fds[:16], memfds[:17]) == send(two.id, fds[:16], memfds[1:]) == "E2BIG"
        assert two.take() == "EAGAIN"
        for some, others in ((fds[:16], []), ([], memfds[:16]), (fds[:16], memfds[:16])):
            assert send(two.id, some, others) == ""
            assert two.take() == ""
            assert brought_fds(two) == len(some) + len(others)
        # What waits in the queue counts, but memfds do not.
        assert send(two.id, fds[:16], memfds[:16]) == ""
        assert send(two.id, fds[:16], []) == "EMFILE"
        assert send(two.id, [], memfds[:16]) == ""
        for most in (32, 16):
            assert two.take() == ""
            assert brought_fds(two) == most
        assert two.take() == "EAGAIN"


class Plain(Peer):
    """One that accepts no descriptors and wants no metadata."""

    def __init__(self, path: str) -> None:
        KdbusClient.__init__(self, path, send=abi.ATTACH_ALL, size=POOL)


def test_fd_passing_to_who_accepts_none(node: str, fds: list[int], memfds: list[int]) -> None:
    with Peer(node) as source, Plain(node) as plain, Plain(node) as other:
        item = fds_item(fds[:1])
        assert outcome(lambda: source.send(plain.id, b"", item)) == "ECOMM"
        assert outcome(lambda: source.send(plain.id, b"", *memfd_items(memfds[:1]))) == ""
        assert plain.take(5000) == ""

        def calls() -> None:
            assert outcome(lambda: plain.call(other.id, b"", item, seconds=0.1)) == "ECOMM"
            got = plain.post(source.id, 78, EXPECT, 5000 * MS, sync=True)
            assert got == "EREMOTEIO"
            assert plain.take(5000) == ""
            assert plain.shown.cookie == 79

        child = Forked(calls)
        assert source.take(5000) == ""
        assert source.shown.cookie == 78
        reply = {"cookie": 0, "reply": 78}
        node_item = fds_item([plain.fd])
        assert outcome(lambda: source.send(plain.id, b"", node_item, **reply)) == "EOPNOTSUPP"
        assert outcome(lambda: source.send(plain.id, b"", item, **reply)) == "ECOMM"
        assert source.post(plain.id, 79) == ""
        child.join()
        assert other.take() == "EAGAIN"


# -- test-benchmark.c -------------------------------------------------------------------------


@pytest.mark.parametrize("memfd", [True, False])
def test_benchmark(node: str, memfd: bool) -> None:
    """What it sends and how, many times; not how long it takes."""
    stress = bytes(range(256)) * 32
    with Peer(node) as a, Peer(node) as b:
        for each in (a, b):
            each.match_anything()
        assert a.want("foo.bar.echo") == ""
        if not memfd:
            assert a.set_attach(abi.ATTACH_ALL, 0) == ""
        assert a.take() == "EAGAIN"
        for number in range(50):
            stamp = struct.pack("=Q", number) if memfd else b""
            fds = [sealed(stamp)] if memfd else []
            b.send(a.id, stress, *memfd_items(fds), cookie=0)
            for fd in fds:
                os.close(fd)
            assert a.readable(5)
            assert a.recv_now().payload == stress + stamp


# -- test-endpoint.c, test-monitor.c -----------------------------------------------------------


def test_custom_endpoint(node: str) -> None:
    name = "foo.bar.baz"
    assert outcome(lambda: Endpoint(node, f"{UID}-{'X' * 63}")) == "ENAMETOOLONG"
    assert outcome(lambda: Endpoint(node, f"{UID + 1}-foobar")) == "EINVAL"
    with Endpoint(node, f"{UID}-foo") as made, Peer(node) as one, Peer(made.node) as reader:
        reader.match_id(abi.ITEM_ID_ADD, cookie=1)
        reader.match_id(abi.ITEM_ID_REMOVE, cookie=2)
        reader.match_name(abi.ITEM_NAME_ADD, name)
        assert outcome(lambda: Peer(made.node, MONITOR)) == "EOPNOTSUPP"
        with Peer(made.node) as inside:
            assert reader.notice() == (abi.ITEM_ID_ADD, inside.id)
            inside.match_name(abi.ITEM_NAME_ADD, name)
            assert one.want(name) == ""
            assert inside.take() == "EAGAIN"
            for hidden in (name, "random.crappy.name"):
                assert outcome(lambda n=hidden: inside.info(name=n, flags=0)) == "ESRCH"  # type: ignore[misc]
            for id in (one.id, 0x0FFFFFFFFFFFFFFF):
                assert outcome(lambda id=id: inside.info(id, flags=0)) == "ENXIO"  # type: ignore[misc]
            assert reader.take() == "EAGAIN"
            assert one.drop(name) == ""
            assert reader.take() == "EAGAIN"
            made.set(*brought(name, (WORLD, SEE, 0)))
            assert one.want(name) == ""
            for each in (inside, reader):
                assert each.notice() == (abi.ITEM_NAME_ADD, 0, one.id, name)
            inside.info(name=name, flags=0)
            inside.info(one.id, flags=0)

    with (
        Endpoint(node, f"{UID}-apps1") as first,
        Endpoint(node, f"{UID}-apps2", abi.MAKE_ACCESS_WORLD) as second,
    ):

        def other() -> None:
            assert outcome(lambda: Endpoint(node, f"{NOBODY}-unpriv", 0)) == "EPERM"
            assert outcome(lambda: Peer(first.node)) == "EACCES"
            Peer(second.node).close()

        as_nobody(other)


def test_monitor(node: str) -> None:
    with Peer(node) as one, Peer(node) as two:
        two.match_id(abi.ITEM_ID_ADD, cookie=1)
        two.match_id(abi.ITEM_ID_REMOVE, cookie=2)
        with Peer(node, MONITOR) as monitor:
            assert two.take() == "EAGAIN"
            assert monitor.want("foo.bar.baz") == "EOPNOTSUPP"
            assert one.post(two.id, 5) == ""
            for each in (two, monitor):
                assert each.take() == ""
                assert each.shown.cookie == 5
            assert outcome(monitor.match_anything) == "EOPNOTSUPP"
            stamp, creds = abi.ATTACH_TIMESTAMP, abi.ATTACH_CREDS
            for cookie, mask in ((6, abi.ATTACH_ALL), (7, 0), (8, stamp | creds)):
                assert monitor.set_attach(abi.ATTACH_ALL, mask) == ""
                assert one.post(ALL, cookie) == ""
                assert monitor.take(5000) == ""
                assert monitor.shown.cookie == cookie
                for bit, type in (
                    (stamp, abi.ITEM_TIMESTAMP),
                    (creds, abi.ITEM_CREDS),
                    (abi.ATTACH_PIDS, abi.ITEM_PIDS),
                ):
                    assert (monitor.shown.item(type) is not None) == bool(mask & bit)
        assert two.take() == "EAGAIN"
    as_nobody(lambda: may("EPERM", outcome(lambda: Peer(node, MONITOR))))


# -- test-message.c -------------------------------------------------------------------------------


def test_message_basic(node: str) -> None:
    cookie = 0x1234ABCD5678EEFF
    with Peer(node) as sender, Peer(node) as other:
        for each in (other, sender):
            each.match_anything()
        assert sender.post(ALL, cookie) == ""
        for each in (sender, other):
            assert each.take() == ""
            assert each.shown.cookie == cookie
        assert sender.post(other.id, 0, EXPECT) == "EINVAL"
        assert other.answer(sender.id, 99 ^ cookie) == "EBADSLT"


def test_message_prio(node: str) -> None:
    with Peer(node) as a, Peer(node) as b:
        for cookie, priority in enumerate(
            (25, -600, 10, -35, -100, 20, -15, -800, -150, 10, -800, -10), 1
        ):
            assert b.post(a.id, cookie, priority=priority) == ""

        def next(most: int) -> int | str:
            got = a.take(flags=abi.RECV_USE_PRIORITY, priority=most)
            return got or a.shown.priority

        asked = (-200, -100, -400, -400, 10, 10)
        assert [next(most) for most in asked] == [-800, -800, -600, "EAGAIN", -150, -100]
        assert a.take() == ""


def test_quota_of_an_activator(node: str) -> None:
    name = "foo.test.activator"
    with (
        Peer(node, ACTIVATOR, *brought(name, (USER, OWN, UID))) as activator,
        Peer(node) as conn,
        Peer(node) as sender,
    ):
        sender.list(EVERYTHING)
        waiting = 0
        while (got := sender.post(name, waiting)) == "":
            waiting += 1
        assert got == "ENOBUFS"
        assert waiting > 0
        assert conn.post(activator.id) == "ENXIO"
        assert conn.post(name) == "ENOBUFS"
        assert sender.post(ALL) == ""
        assert activator.take(free=False) == ""
        assert activator.dropped == 0
        waiting -= 1
        while sender.post(conn.id) == "":
            pass
        assert conn.take(free=False) == ""
        assert conn.dropped == 0
        assert conn.want(name, REPLACE) == ""
        assert conn.take(free=False) == ""
        assert 0 < conn.dropped < waiting
        waiting -= conn.dropped
        assert conn.drop(name) == ""
        assert activator.take() == ""
        assert activator.shown.src == sender.id
        waiting -= 1
        while (got := conn.take()) == "":
            pass
        assert got == "EAGAIN"
        assert sender.fill(conn.id, MOST) == MOST
        assert sender.post(conn.id) == "ENOBUFS"
        assert conn.got & abi.NAME_ACQUIRED
        assert conn.want(name, conn.got) == ""  # what was returned before
        assert conn.take(free=False) == ""
        assert conn.dropped == waiting


def test_quota_of_the_buss_own_notices(node: str) -> None:
    with Peer(node) as reader, Peer(node) as conn:
        reader.match_id(abi.ITEM_ID_ADD, cookie=1)
        reader.match_id(abi.ITEM_ID_REMOVE, cookie=2)
        name = (
            "foo.bla.blaz"  # theirs are of connections, which take long to make where a node is one
        )
        for cookie, kind in enumerate((abi.ITEM_NAME_ADD, abi.ITEM_NAME_REMOVE), 3):
            change = layout.NAME_CHANGE.pack(ALL, 0, ALL, 0) + name.encode() + b"\0"
            reader.add_match(items.build(kind, change), cookie=cookie)
        for _ in range(MOST // 2):
            assert conn.want(name) == conn.drop(name) == ""
        assert conn.post(reader.id) == ""
        conn.close()
        Peer(node).close()
        assert reader.take() == ""
        assert reader.return_flags == abi.RECV_RETURN_DROPPED_MSGS
        assert reader.dropped == 3
        for _ in range(MOST):
            assert reader.take(free=False) == ""
            assert reader.return_flags == reader.dropped == 0
        assert reader.take() == "EAGAIN"


def test_quota_of_a_pool(node: str) -> None:
    with Peer(node) as a, Peer(node) as b, Peer(node) as c:
        data = bytes(2 << 20)
        size = layout.MESSAGE.size + 32 + len(data)
        for _ in range(size, POOL // 2 // 3, size):
            assert outcome(lambda: a.send(c.id, data)) == ""
        assert outcome(lambda: a.send(c.id, data)) == "ENOBUFS"
        assert b.post(c.id) == ""
        for _ in range(size, POOL // 2 // 3, size):
            assert c.take() == ""
            assert c.shown.src == a.id
        assert c.take() == ""
        assert c.shown.src == b.id
        assert c.take() == "EAGAIN"


def test_quota_of_expected_replies(node: str) -> None:
    with Peer(node) as conn:
        others = [Peer(node) for _ in range(9)]
        try:
            for number in range(128):
                got = conn.post(others[number // 16].id, number + 1, EXPECT, 100 * MS)
                assert got == "", number
            # However long that took: a call counts till its caller has read what became of it.
            assert conn.post(others[8].id, 1000, EXPECT, 1000 * MS) == "EMLINK"
            while conn.take(5000) != "":
                pass
            assert conn.post(others[8].id, 1000, EXPECT, 1000 * MS) == ""
        finally:
            for each in others:
                each.close()


def test_quota_of_messages(node: str) -> None:
    with Peer(node) as a, Peer(node) as b:
        for most in (MOST, MOST + 1):
            assert b.fill(a.id, most) == MOST
            assert b.post(a.id) == "ENOBUFS"
            for _ in range(MOST):
                assert a.take() == ""
            assert a.take() == "EAGAIN"


def test_memory_access(node: str) -> None:
    with Peer(node) as a, Peer(node) as b:
        kernel = items.build(abi.ITEM_PAYLOAD_VEC, layout.VECTOR.pack(8, 0xFFFFFFFF81000000))
        assert outcome(lambda: a.send(b.id, b"", kernel)) == "EFAULT"


# -- test-timeout.c, test-sync.c ----------------------------------------------------------------


def test_timeout(node: str) -> None:
    with Peer(node) as a, Peer(node) as b:
        expected = set(range(1, 5))
        for cookie in sorted(expected):
            assert b.post(a.id, cookie, EXPECT, cookie * 100 * MS) == ""
        while expected:
            assert b.take(5000) == ""
            message = b.shown
            assert (message.payload_type, message.src, message.dst) == (0, 0, b.id)
            expected.remove(message.reply)


def test_sync_reply(node: str) -> None:
    with Peer(node) as a, Peer(node) as b:
        wrong: list[str] = []

        def replies() -> None:
            wrong.append(a.take(5000))
            wrong.append(a.answer(b.id, ~7 & ALL).replace("EBADSLT", ""))
            wrong.append(a.answer(b.id, 7))

        thread = threading.Thread(target=replies)
        thread.start()
        assert b.post(a.id, 7, EXPECT, 5000 * MS, sync=True) == ""
        thread.join()
        assert wrong == ["", "", ""]

        def interrupted() -> None:
            signal.signal(signal.SIGINT, lambda *_: None)
            signal.siginterrupt(signal.SIGINT, False)
            assert b.post(a.id, 8, EXPECT, 100 * MS, sync=True) == "ETIMEDOUT"

        child = Forked(interrupted)
        assert a.take(5000) == ""
        assert a.shown.cookie == 8
        os.kill(child.pid, signal.SIGINT)
        child.join()
        assert a.take() == "EAGAIN"

        for number, signalled in ((9, True), (10, False)):
            event = os.eventfd(0)
            cancel = items.build(abi.ITEM_CANCEL_FD, struct.pack("=i", event))
            expected = "ECANCELED" if signalled else ""

            def calls() -> None:
                got = b.post(a.id, number, EXPECT, 2000 * MS, sync=True, cancel=cancel)  # noqa: B023
                assert got == expected  # noqa: B023

            child = Forked(calls)
            assert a.take(5000) == ""
            assert a.shown.cookie == number
            if signalled:
                os.eventfd_write(event, 1)
            else:
                assert a.answer(b.id, number) == ""
            child.join()
            os.close(event)


def test_sync_reply_of_who_is_gone(node: str) -> None:
    source, gone = Peer(node), Peer(node)
    source.match_anything()

    def calls() -> None:
        id = gone.id
        gone.close()
        assert source.take(5000) == ""
        assert (source.shown.cookie, source.shown.src) == (20, id)
        assert source.post(id, 21, EXPECT, 2000 * MS, sync=True) == "EPIPE"

    child = Forked(calls)
    assert gone.post(ALL, 20) == ""
    assert gone.take(5000) == ""
    assert gone.shown.cookie == 21
    gone.close()
    source.close()
    child.join()


def test_sync_byebye(node: str) -> None:
    for index, expected in ((1, "ECONNRESET"), (0, "EPIPE")):
        with Peer(node) as a, Peer(node) as b:
            said: list[str] = []

            def ends() -> None:
                said.append(a.take(5000))  # noqa: B023
                said.append(a.take())  # noqa: B023
                said.append((a, b)[index].bye())  # noqa: B023

            thread = threading.Thread(target=ends)
            thread.start()
            assert b.post(a.id, 7, EXPECT, 5000 * MS, sync=True) == expected
            thread.join()
            assert said == ["", "EAGAIN", ""]


# -- test-match.c ---------------------------------------------------------------------------------


def test_match_id(node: str) -> None:
    with Peer(node) as one:
        one.match_id(abi.ITEM_ID_ADD)
        with Peer(node) as two:
            assert one.notice() == (abi.ITEM_ID_ADD, two.id)
            two.close()
        # match-replace: what follows is told of the removed only
        rule = items.build(abi.ITEM_ID_REMOVE, layout.ID_CHANGE.pack(ALL, 0))
        one.do(abi.CMD_MATCH_ADD, struct.pack("=3Q", abi.MATCH_REPLACE, 0, 1), rule)
        with Peer(node) as two:
            assert one.take() == "EAGAIN"
            two.close()
        assert one.notice() == (abi.ITEM_ID_REMOVE, two.id)
        # match-id-remove: of one id
        one.do(abi.CMD_MATCH_REMOVE, struct.pack("=3Q", 0, 0, 1))
        with Peer(node) as two, Peer(node) as three:
            one.match_id(abi.ITEM_ID_REMOVE, two.id)
            three.close()
            two.close()
        assert one.notice() == (abi.ITEM_ID_REMOVE, two.id)


def test_match_name(node: str) -> None:
    name = "foo.bla.blaz"
    with Peer(node) as one, Peer(node) as two:
        for kind in (abi.ITEM_NAME_ADD, abi.ITEM_NAME_REMOVE, abi.ITEM_NAME_CHANGE):
            one.match_name(kind, name)
        assert one.want(name) == ""
        assert one.notice() == (abi.ITEM_NAME_ADD, 0, one.id, name)
        assert one.drop(name) == ""
        assert one.notice() == (abi.ITEM_NAME_REMOVE, one.id, 0, name)
        assert one.want(name) == ""
        one.notice()
        assert two.want(name, QUEUE) == ""
        assert two.got & abi.NAME_IN_QUEUE
        assert one.drop(name) == ""
        assert one.notice() == (abi.ITEM_NAME_CHANGE, one.id, two.id, name)
        assert one.take() == "EAGAIN"


def test_match_bloom(node: str) -> None:
    def bits(*set: tuple[int, int]) -> bytearray:
        made = bytearray(64)
        for at, byte in set:
            made[at] = byte
        return made

    masks = bytes(bits((0, 0x55), (63, 0x80)) + bits((1, 0xAA), (9, 0x02)))
    wide = ((0, 0xFF), (8, 0xFF), (63, 0xFF))
    with Peer(node) as one, Peer(node) as two:
        one.add_match(items.build(abi.ITEM_BLOOM_MASK, masks))
        for cookie, generation, filter, expected in (
            (1, 0, bits(), "EAGAIN"),
            (2, 0, bits((0, 0x55), (63, 0x80)), ""),
            (3, 0, bits(*wide), ""),
            (4, 1, bits(*wide), "EAGAIN"),
            (5, 1, bits(*wide, (1, 0xAA), (9, 0x02)), ""),
        ):
            item = items.build(abi.ITEM_BLOOM_FILTER, layout.U64.pack(generation) + bytes(filter))
            two.send(ALL, b"", item, flags=SIGNAL, cookie=cookie)
            assert one.take() == expected, cookie
            if not expected:
                assert one.shown.cookie == cookie


# -- test-activator.c ------------------------------------------------------------------------------


def test_activator(node: str) -> None:
    name = "foo.test.activator"
    accesses = (USER, OWN, UID), (WORLD, TALK, 0)
    with Peer(node, ACTIVATOR, *brought(name, *accesses)) as activator, Peer(node) as one:
        one.match_anything()
        one.list(EVERYTHING)
        assert one.post(name, 5) == ""
        assert activator.readable(3)
        one.list(abi.LIST_NAMES)
        assert one.want(name, REPLACE) == ""
        assert one.take(5000) == ""
        assert one.shown.cookie == 5
        assert activator.take() == "EAGAIN"


def test_activator_and_others(node: str) -> None:
    name = "foo.priv.activator"
    policy = brought(name, (USER, OWN, UID), (USER, TALK, UID))
    with Peer(node, ACTIVATOR, *policy) as activator, Peer(node) as service, Peer(node) as client:

        def refused(other: Peer) -> None:
            assert other.post(activator.id) == "ENXIO"
            assert other.post(name) == "EPERM"
            assert other.want(name, REPLACE) == "EPERM"

        nobody(node, refused)
        assert not activator.readable()
        assert service.post(name, 6) == ""
        assert activator.readable()
        nobody(node, refused)
        assert service.want(name, REPLACE) == ""
        assert service.take(5000) == ""
        nobody(node, refused)
        assert not service.readable()
        assert client.post(name, 7) == ""
        assert service.take(5000) == ""
        assert service.shown.cookie == 7
        activator.close()
        nobody(node, lambda other: may("EPERM", other.post(name)))
        assert not service.readable()
        assert client.post(name, 8) == ""
        assert service.take(5000) == ""
        held = Peer(node, HOLDER, *brought(name, (WORLD, TALK, UID)))
        nobody(node, lambda other: may("", other.post(name)))
        assert service.take(5000) == ""
        nobody(node, lambda other: may("EPERM", other.want(name, REPLACE)))
        held.close()


# -- test-policy.c, test-policy-priv.c, test-policy-ns.c ------------------------------------------


def test_policy(node: str) -> None:
    a, b = "com.example.a", "com.example.b"
    for name in (".example.a", "example"):
        assert outcome(lambda name=name: Peer(node, HOLDER, *brought(name))) == "EINVAL"  # type: ignore[misc]
    entry = (USER, SEE, UID)
    with Peer(node, HOLDER, *brought(a)) as one, Peer(node, HOLDER, *brought(b)) as two:
        for client, name, expected in (
            (one, a, ""),
            (two, a, "EEXIST"),
            (two, a + ".*", ""),
            (one, a + ".*", "EEXIST"),
            (one, "com.example.*", ""),
            (two, a, ""),
            (two, "com.example.*", "EEXIST"),
            (two, ".example.*", "EINVAL"),
            (two, "example", "EINVAL"),
        ):
            assert client.policy(name, entry) == expected, name


def test_before_there_is_any_policy_who_has_no_rights_reaches_nobody(node: str) -> None:
    with Peer(node) as conn:
        conn.match_anything()

        def tries(other: Peer) -> None:
            assert other.want("com.example.a") == "EPERM"
            assert other.post(conn.id) == "EPERM"
            assert other.post(ALL, 1, EXPECT, 5000 * MS) == "ENOTUNIQ"

        nobody(node, tries)
        assert conn.take() == "EAGAIN"
        as_nobody(lambda: may("EPERM", outcome(lambda: Peer(node, HOLDER, *brought("a.b")))))
        exchange(node, conn, "", "ETIMEDOUT")
        exchange(node, None, "", "")
        exchange(node, None, "ETIMEDOUT", "ETIMEDOUT", NOBODY - 1)


def exchange(node: str, conn: Peer | None, heard: str, hears: str, uid: int = NOBODY) -> None:
    """A broadcast of `conn`, or else of a user's, and one back of nobody's: what becomes of them."""
    event = os.eventfd(0, os.EFD_CLOEXEC)

    def listens(child: Peer) -> None:
        child.match_anything()
        os.eventfd_write(event, 1)
        assert child.take(500 if hears else 5000) == hears
        assert hears or child.shown.cookie == 70
        assert child.post(ALL, 71) == ""

    def speaks(client: Peer) -> None:
        os.eventfd_read(event)
        assert client.post(ALL, 70) == ""
        assert client.take() == ""
        assert client.shown.src == client.id
        assert client.take(500 if heard else 5000) == heard
        assert heard or client.shown.cookie == 71

    def other() -> None:
        with Peer(node) as client:
            client.match_anything()
            speaks(client)

    def run() -> None:
        with Peer(node) as child:
            listens(child)

    child = Forked(run, NOBODY)
    if conn is not None:
        speaks(conn)
    else:
        Forked(other, uid).join()
    child.join()
    os.close(event)


def test_policy_decides_who_owns(node: str) -> None:
    name = "com.example.a"
    with Peer(node) as first, Peer(node, HOLDER, *brought(name)) as holder:
        assert first.want(name) == ""
        assert first.drop(name) == ""
        nobody(node, lambda other: may("EPERM", other.want(name)))
        nobody(node, lambda other: may("EOPNOTSUPP", other.policy(name, (WORLD, OWN, 0))))
        talks = (GROUP, SEE, NOBODY), (USER, TALK, NOBODY), (WORLD, TALK, 0), (WORLD, SEE, 0)
        middle = [(USER, OWN, uid) for uid in (1, 2, NOBODY, 3, 4)]
        for accesses, expected in (
            ([(WORLD, OWN, 0)], ""),
            ([(GROUP, OWN, NOBODY)], ""),
            ([(GROUP, OWN, 1)], "EPERM"),
            ([(USER, OWN, NOBODY)], ""),
            ([(USER, OWN, 1)], "EPERM"),
            (talks, "EPERM"),
            (middle, ""),
            ((), "EPERM"),
        ):
            assert holder.policy(name, *accesses) == ""
            nobody(node, lambda other: may(expected, other.want(name)))  # noqa: B023


def test_policy_decides_who_talks(node: str) -> None:
    name = "com.example.b"
    with (
        Peer(node) as owner,
        Peer(node) as other,
        Peer(node, HOLDER, *brought("com.example.a")) as holder,
    ):
        assert owner.want(name) == ""
        assert other.post(name) == ""
        assert owner.take() == ""
        nobody(node, lambda child: may("EPERM", child.post(name)))
        assert holder.policy("com.example.c", (USER, OWN, NOBODY)) == ""

        def among_equals(child: Peer) -> None:
            with Peer(node) as equal:
                assert equal.want("com.example.c") == ""
                assert child.post("com.example.c") == ""
                assert equal.take() == ""

        nobody(node, among_equals)
        sees = [
            (USER, access, uid) for uid, access in ((0, OWN), (1, TALK), (NOBODY, SEE), (3, TALK))
        ]
        for accesses, expected in (
            ([(USER, TALK, NOBODY)], ""),
            ([(GROUP, TALK, NOBODY)], ""),
            ([(WORLD, TALK, 0)], ""),
            (sees, "EPERM"),
            ([(WORLD, OWN, 0)], ""),
        ):
            assert holder.policy(name, *accesses) == ""
            nobody(node, lambda child: may(expected, child.post(name)))  # noqa: B023
            assert owner.take() == ("EAGAIN" if expected else "")

        def then_not(child: Peer) -> None:
            assert child.post(name) == ""
            assert owner.take(5000) == ""
            assert holder.policy(name) == ""
            assert child.post(name) == "EPERM"

        assert holder.policy(name, (WORLD, TALK, 0)) == ""
        nobody(node, then_not)
        assert owner.want("com.example.d") == ""
        last = Peer(node, HOLDER, *brought("com.example.d"))
        assert last.policy("com.example.d", (WORLD, OWN, 0)) == ""

        def ends_it(child: Peer) -> None:
            assert child.post("com.example.d") == ""
            assert owner.take(5000) == ""
            os.read(told, 1)
            last.close()
            assert child.post("com.example.d") == "EPERM"

        told, tell = os.pipe()
        child = Forked(lambda: nobody_here(node, ends_it), NOBODY)
        last.close()
        os.write(tell, b"!")
        child.join()
        for each in (told, tell):
            os.close(each)


def test_policy_of_broadcasts(node: str) -> None:
    a, b = "com.example.broadcastA", "com.example.broadcastB"
    policy = (USER, OWN, UID)
    with (
        Peer(node) as first,
        Peer(node) as second,
        Peer(node, HOLDER, *brought(a, policy)) as holder_a,
        Peer(node, HOLDER, *brought(b, policy)) as holder_b,
    ):
        for each, name in ((first, a), (second, b)):
            each.match_anything()
            assert each.want(name) == ""
        nobody(node, lambda child: may("EPERM", child.post(first.id)))
        assert first.post(ALL, 80) == ""
        for each in (first, second):
            assert each.take() == ""
            assert (each.shown.cookie, each.shown.src) == (80, first.id)
        assert second.drop(b) == ""
        assert holder_b.policy(b, (WORLD, OWN, UID)) == ""

        def speaks() -> None:
            with Peer(node) as owner, Peer(node) as hears, Peer(node) as deaf:
                assert owner.want(b) == ""
                hears.match_anything()
                assert owner.post(ALL, 81) == ""
                assert hears.take(5000) == ""
                assert hears.shown.cookie == 81
                assert deaf.take() == "EAGAIN"

        as_nobody(speaks)
        for each in (first, second):
            assert each.take(5000) == ""
            assert each.shown.cookie == 81
        exchange(node, None, "ETIMEDOUT", "ETIMEDOUT", NOBODY - 1)
        for each in (first, second):
            assert [each.take() for _ in range(3)] == ["", "", "EAGAIN"]
        assert holder_a.policy(a, (WORLD, TALK, UID)) == ""
        exchange(node, first, "", "")

        def from_the_owner(child: Peer) -> None:
            assert child.want(b) == ""
            assert child.post(ALL, 82) == ""

        for _ in range(2):
            nobody(node, from_the_owner)
            assert first.take(5000) == ""
            assert first.shown.cookie == 82
            first.drop(a)


def test_policy_ns(node: str) -> None:
    name = "foo.test.policy-test"
    open = (USER, OWN, UID), (WORLD, TALK, UID)
    with Peer(node) as target:
        target.match_anything()

        def pings(expected: str) -> Callable[[Peer], None]:
            def ping(child: Peer) -> None:
                child.match_anything()
                assert child.post(target.id, 90) == expected
                assert child.take(5000 if not expected else 0) == (expected and "EAGAIN")

            return ping

        nobody(node, pings("EPERM"))
        with Peer(node, HOLDER, *brought(name, *open)) as holder:
            assert outcome(lambda: Peer(node, ACTIVATOR, *brought(name))) == "EEXIST"
            assert target.want(name) == ""
            everybody_sends(node, name, target, "")
            target.list(EVERYTHING)
            as_nobody(lambda: everybody_sends(node, name, target, ""))

            def answered() -> None:
                with Peer(node) as child:
                    pings("")(child)

            child = Forked(answered, NOBODY)
            assert target.take(5000) == ""
            assert target.post(target.shown.src, 91) == ""
            child.join()
            assert holder.policy(name, (USER, TALK, UID)) == ""
            as_nobody(lambda: everybody_sends(node, name, target, "EPERM"))
            nobody(node, pings("EPERM"))

            def in_a_user_namespace() -> None:
                new_user_namespace()
                with Peer(node) as child:
                    child.match_anything()
                    assert child.post(name) == "EPERM"

            as_nobody(in_a_user_namespace)
            assert target.take() == "EAGAIN"


def everybody_sends(node: str, name: str, target: Peer, expected: str) -> None:
    """Threads receive at one connection what others send to it."""
    got: list[str] = []
    lock = threading.Lock()

    def receive() -> None:
        while (outcome := "" if target.readable(20) else "ETIMEDOUT") == "":
            with lock:  # the client of these tests has one buffer
                outcome = target.take()
            if outcome != "EAGAIN":
                break
        got.append(outcome)

    senders = [Peer(node) for _ in range(1 if expected else 8)]
    threads = [threading.Thread(target=receive) for _ in senders if not expected]
    for each in threads:
        each.start()
    for sender in senders:
        sender.match_anything()
        assert sender.post(name) == expected
    for each in threads:
        each.join()
    assert got == [""] * len(threads)
    for sender in senders:
        sender.close()


def new_user_namespace(more: int = 0) -> None:
    """Its root is who we are."""
    uid, gid = os.geteuid(), os.getegid()
    assert LIBC.prctl(4, 1, 0, 0, 0) == 0  # PR_SET_DUMPABLE: /proc/self is ours again
    assert LIBC.unshare(0x10000000 | more) == 0  # CLONE_NEWUSER
    for file, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
        Path(f"/proc/self/{file}").write_text(text)


# -- test-metadata-ns.c ---------------------------------------------------------------------------


def creds(message: Message) -> tuple[int, ...]:
    return layout.CREDS.unpack(message.item(abi.ITEM_CREDS) or b"")


def pids(message: Message) -> tuple[int, ...]:
    return layout.PIDS.unpack(message.item(abi.ITEM_PIDS) or b"")


def effective(message: Message) -> bool:
    """Whether the sender has any effective capability."""
    words = struct.unpack("=9I", message.item(abi.ITEM_CAPS) or b"")
    return any(words[5:7])


def test_metadata_ns(node: str) -> None:
    """And what one may do in a namespace of one's own is told in there only."""
    name = "com.example.metadata"
    parent = (os.getpid(), os.getpid(), os.getppid())
    told = os.eventfd(0)
    with (
        Peer(node, HOLDER, *brought(name, (WORLD, TALK, UID))),
        Peer(node, MONITOR) as monitor,
        Peer(node) as conn,
    ):
        conn.match_anything()
        assert conn.want(name) == ""

        def hears(client: Peer, creds_: tuple[int, ...], pids_: tuple[int, ...]) -> None:
            for dst in (client.id, ALL):
                assert client.take(5000) == ""
                assert client.shown.dst == dst
                assert creds(client.shown) == creds_
                assert pids(client.shown) == pids_
                assert effective(client.shown)

        def unprivileged() -> None:
            with Peer(node) as client:
                client.match_anything()
                assert client.post(conn.id) == ""

                def inside() -> None:
                    with Peer(node) as inner:
                        inner.match_anything()
                        assert inner.post(conn.id) == ""
                        assert inner.post(inner.id) == ""
                        assert inner.take(5000) == ""
                        assert effective(inner.shown)
                        os.eventfd_read(told)
                        hears(inner, (NOBODY,) * 8, (0, 0, 0))

                def namespace() -> None:
                    new_user_namespace(0x20000000)  # CLONE_NEWPID, for its child
                    Forked(inside).join()

                Forked(namespace).join()
                hears(client, (0,) * 8, parent)

        child = Forked(unprivileged, NOBODY)
        assert conn.take(5000) == ""
        first = conn.shown.src
        assert creds(conn.shown) == (NOBODY,) * 8
        assert pids(conn.shown) == (child.pid, child.pid, os.getpid())
        assert conn.take(5000) == ""
        second = conn.shown.src
        assert creds(conn.shown) == (NOBODY,) * 8
        assert not effective(conn.shown)
        assert 0 not in pids(conn.shown)
        assert conn.post(first) == ""
        os.eventfd_write(told, 1)
        assert conn.post(second) == conn.post(ALL) == ""
        child.join()
        seen = 0
        while monitor.take() == "":
            if monitor.shown.payload_type == abi.PAYLOAD_DBUS:
                assert 0 not in pids(monitor.shown)
                seen += 1
        assert seen == 6
    os.close(told)
