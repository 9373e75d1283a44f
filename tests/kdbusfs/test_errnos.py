"""What every command is refused with: each errno of kdbus's manual pages, and bad input, at real nodes.

A row of the table is a thing to do and the errno that it ends with. After all of them, and after each sort of
bad input, the bus is as good as before. What takes a connection to be in some state for long is tested where
that is: EINTR, ETIMEDOUT, EPIPE, ECANCELED, EREMOTEIO and ESHUTDOWN in test_clients.py, test_selftests.py
and test_buses.py; EMFILE of too many buses and files there and in test_deaths.py.

What the pages have and the last kdbus did not give: EBADMSG of BUS_MAKE, EFAULT of a pool's size (EINVAL), ECONNREFUSED
of HELLO, EALREADY of BYEBYE (ECONNRESET) and of NAME_ACQUIRE (success), EEXIST of SEND (EINVAL), EINVAL of FREE for
what was peeked at (success), ENOTTY of a command on another sort of file (EBADFD).
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import resource
import signal
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kbusd.kdbus import abi, items, layout
from kbusd.kdbus.commands import SPECS
from tests.bus import procs
from tests.kdbusfs.kclient import LIBC, Buffer, KdbusClient, ioctl
from tests.kdbusfs.test_buses import Maker
from tests.kdbusfs.test_clients import FILE, KdbusBus, fails, sealed, to_name
from tests.kdbusfs.test_endpoints import Endpoint
from tests.kdbusfs.test_policy import as_user
from tests.kdbusfs.test_sessions import brought, signal_filter

UID = os.geteuid()
NAME = "com.example.Errno"
EXPECT, SIGNAL = abi.MSG_EXPECT_REPLY, abi.MSG_SIGNAL
ALL, KERNEL = abi.DST_ID_BROADCAST, 0xFFFF_8000_0000_0000
LATER = 1 << 62
HOLDER, ACTIVATOR, MONITOR = abi.HELLO_POLICY_HOLDER, abi.HELLO_ACTIVATOR, abi.HELLO_MONITOR
PR_SET_PDEATHSIG = 1
FIXED = {number: spec.fixed.size for number, spec in SPECS.items()}

# What is the nodes' own is little of it, and takes a minute there.
SLOW_NODE = pytest.param("cuse", marks=[pytest.mark.guest, pytest.mark.slow])

# Other users are who some of it is about.
pytestmark = [] if UID == 0 else [pytest.mark.guest]


class Bed:
    """A made bus with one connection of each kind on it; `a` is who acts."""

    def __init__(self, root: Path) -> None:
        bloom = layout.BLOOM_PARAMETER.pack(64, 8)
        self.maker = Maker(root).make(f"{UID}-errnos", abi.MAKE_ACCESS_WORLD, bloom)
        self.node = str(root / f"{UID}-errnos" / "bus")
        self.endpoint = Endpoint(self.node)
        self.a, self.b = KdbusClient(self.node), KdbusClient(self.node, size=1 << 16)
        self.stranger = as_user(1, self.node)
        self.holder = KdbusClient(self.node, flags=HOLDER, chain=brought("com.example.Held"))
        self.monitor = KdbusClient(self.node, flags=MONITOR)
        self.activator = KdbusClient(self.node, flags=ACTIVATOR, chain=brought("com.example.Act"))
        self.inside = KdbusClient(self.endpoint.node)
        self.b.acquire(NAME)
        self.control = KdbusClient(str(root / "control"), hello=False)
        self.fresh = KdbusClient(self.node, hello=False)
        self.pipe = os.pipe()

    def files(self) -> list[KdbusClient]:
        kept = (self.maker, self.endpoint, self.a, self.b, self.stranger, self.holder)
        return [*kept, self.monitor, self.activator, self.inside, self.control, self.fresh]

    def close(self) -> None:
        for each in reversed(self.files()):
            each.close()
        for fd in self.pipe:
            os.close(fd)


@pytest.fixture(scope="module", params=[FILE, SLOW_NODE])
def shared(request: pytest.FixtureRequest) -> Iterator[KdbusBus]:
    bus = KdbusBus(request.param)
    yield bus
    bus.stop()


@pytest.fixture(scope="module")
def bed(shared: KdbusBus) -> Iterator[Bed]:
    made = Bed(Path(shared.node).parents[1])
    yield made
    made.close()


def item(type: int, *numbers: int) -> bytes:
    return items.build(type, struct.pack(f"={len(numbers)}Q", *numbers))


def vector(size: int, address: int = 0) -> bytes:
    return items.build(abi.ITEM_PAYLOAD_VEC, layout.VECTOR.pack(size, address))


def fds(*numbers: int) -> bytes:
    return items.build(abi.ITEM_FDS, struct.pack(f"={len(numbers)}i", *numbers))


def memfd(fd: int, size: int = 1) -> bytes:
    return items.build(abi.ITEM_PAYLOAD_MEMFD, layout.MEMFD.pack(0, size, fd, 0))


def hello(bed: Bed, node: str = "", uid: int = UID, **how: Any) -> Callable[[], Any]:
    """Open a connection, which ought to fail."""
    return lambda: as_user(uid, node or bed.node, **how).close()


def raw(client: KdbusClient, command: int, data: bytes) -> Callable[[], Any]:
    """An ioctl whose struct is this."""
    buffer = Buffer(data)
    return lambda: ioctl(client.fd, command, buffer.address)


def cmd(client: KdbusClient, number: int, *chain: bytes, flags: int = 0, more: bytes = b""):  # type: ignore[no-untyped-def]
    fixed = (struct.pack("=2Q", flags, 0) + more).ljust(FIXED[number] - 8, b"\0")
    return lambda: client.do(number, fixed, *chain)


def fill(bed: Bed) -> None:
    for _ in range(1000):
        bed.a.send(bed.b.id, bytes(1000))


def named(name: str) -> bytes:
    return items.string(abi.ITEM_MAKE_NAME, name)


def exhaust(bed: Bed, number: int, more: bytes = b"", flags: int = 0) -> None:
    """Let a command fill a pool that nobody frees."""
    with KdbusClient(bed.node, size=mmap.PAGESIZE) as small:
        overdo(lambda _: cmd(small, number, flags=flags, more=more)())


def overdo(what: Callable[[int], Any]) -> None:
    for number in range(1000):
        what(number)


U64 = layout.U64.pack
Row = tuple[str, Callable[[Bed], Callable[[], Any]]]

ROWS: dict[str, Row] = {
    # -- HELLO
    "hello-no-pool": ("EINVAL", lambda t: hello(t, size=0)),
    "hello-odd-pool": ("EINVAL", lambda t: hello(t, size=4097)),
    "hello-pool-of-all-memory": ("ENOMEM", lambda t: hello(t, size=1 << 62)),
    "hello-flags": ("EINVAL", lambda t: hello(t, flags=1 << 40)),
    "hello-two-kinds": ("EINVAL", lambda t: hello(t, flags=HOLDER | ACTIVATOR, chain=brought("a.b"))),
    "hello-attach-send": ("EINVAL", lambda t: hello(t, send=1 << 40)),
    "hello-attach-recv": ("EINVAL", lambda t: hello(t, recv=1 << 40)),
    "hello-name": ("EINVAL", lambda t: hello(t, chain=(items.string(abi.ITEM_NAME, "a.b"),))),
    "hello-nameless": ("EINVAL", lambda t: hello(t, flags=HOLDER)),
    "hello-bad-name": ("EINVAL", lambda t: hello(t, flags=HOLDER, chain=brought("a..b"))),
    "hello-pattern": ("EINVAL", lambda t: hello(t, flags=ACTIVATOR, chain=brought("a.b.*"))),
    "hello-item": ("EINVAL", lambda t: hello(t, chain=(item(abi.ITEM_ID, 1),))),
    "hello-taken": ("EEXIST", lambda t: hello(t, flags=ACTIVATOR, chain=brought("com.example.Act"))),
    "hello-held": ("EEXIST", lambda t: hello(t, flags=HOLDER, chain=brought("com.example.Held"))),
    "hello-unprivileged": ("EPERM", lambda t: hello(t, uid=1, flags=MONITOR)),
    "hello-unprivileged-holder": ("EPERM", lambda t: hello(t, uid=1, flags=HOLDER, chain=brought("a.b"))),
    "hello-unprivileged-activator": ("EPERM", lambda t: hello(t, uid=1, flags=ACTIVATOR, chain=brought("a.b"))),
    "hello-pretends-pids": ("EPERM", lambda t: hello(t, uid=1, chain=(item(abi.ITEM_PIDS, 1, 1, 0),))),
    "hello-pretends": ("EPERM", lambda t: hello(t, uid=1, chain=(item(abi.ITEM_CREDS, *[0] * 8),))),
    "hello-pretends-label": ("EPERM", lambda t: hello(t, uid=1, chain=(items.string(abi.ITEM_SECLABEL, "x"),))),
    "hello-monitor-inside": ("ENOTSUP", lambda t: hello(t, t.endpoint.node, flags=MONITOR)),
    "hello-holder-inside": ("EPERM", lambda t: hello(t, t.endpoint.node, flags=HOLDER, chain=brought("a.b"))),
    "hello-twice": ("EBADFD", lambda t: cmd(t.a, abi.CMD_HELLO)),
    "hello-control": ("EBADFD", lambda t: cmd(t.control, abi.CMD_HELLO)),
    # -- on the wrong file
    "make-bus-elsewhere": ("EBADFD", lambda t: cmd(t.fresh, abi.CMD_BUS_MAKE)),
    "make-endpoint-connected": ("EBADFD", lambda t: cmd(t.a, abi.CMD_ENDPOINT_MAKE)),
    "make-endpoint-unnamed": ("EINVAL", lambda t: cmd(t.fresh, abi.CMD_ENDPOINT_MAKE)),
    "update-no-endpoint": ("EBADFD", lambda t: cmd(t.fresh, abi.CMD_ENDPOINT_UPDATE)),
    "send-before-hello": ("EBADFD", lambda t: cmd(t.fresh, abi.CMD_SEND)),
    "list-of-endpoint-owner": ("EBADFD", lambda t: cmd(t.endpoint, abi.CMD_LIST)),
    "no-command": ("ENOTTY", lambda t: lambda: ioctl(t.a.fd, 0x9599, 0)),
    # -- kinds that do not have it
    "send-monitor": ("ENOTSUP", lambda t: lambda: t.monitor.send(1, b"x")),
    "send-holder": ("ENOTSUP", lambda t: lambda: t.holder.send(1, b"x")),
    "send-activator": ("ENOTSUP", lambda t: lambda: t.activator.send(1, b"x")),
    "recv-holder": ("ENOTSUP", lambda t: cmd(t.holder, abi.CMD_RECV)),
    "free-holder": ("ENOTSUP", lambda t: lambda: t.holder.free(0)),
    "acquire-monitor": ("ENOTSUP", lambda t: lambda: t.monitor.acquire("a.b")),
    "release-activator": ("ENOTSUP", lambda t: lambda: t.activator.release("com.example.Act")),
    "match-monitor": ("ENOTSUP", lambda t: lambda: t.monitor.add_match()),
    "unmatch-monitor": ("ENOTSUP", lambda t: cmd(t.monitor, abi.CMD_MATCH_REMOVE)),
    "byebye-monitor": ("ENOTSUP", lambda t: lambda: t.monitor.byebye()),
    "update-policy-ordinary": ("ENOTSUP", lambda t: lambda: t.a.update(*brought("a.b"))),
    "update-send-holder": ("ENOTSUP", lambda t: lambda: t.holder.update(item(abi.ITEM_ATTACH_FLAGS_SEND, 0))),
    "update-recv-holder": ("ENOTSUP", lambda t: lambda: t.holder.update(item(abi.ITEM_ATTACH_FLAGS_RECV, 0))),
    # -- UPDATE
    "update-access-ordinary": ("ENOTSUP", lambda t: lambda: t.a.update(item(abi.ITEM_POLICY_ACCESS, 3, 0, 0))),
    "update-flags": ("EINVAL", lambda t: lambda: t.a.update(item(abi.ITEM_ATTACH_FLAGS_SEND, 1 << 40))),
    "update-two-names": ("E2BIG", lambda t: lambda: t.holder.update(*brought("a.b"), *brought("a.c"))),
    "update-order": ("EINVAL", lambda t: lambda: t.holder.update(item(abi.ITEM_POLICY_ACCESS, 3, 0, 0))),
    "update-anothers": ("EEXIST", lambda t: lambda: t.holder.update(*brought("com.example.Act"))),
    "update-access": ("EINVAL", lambda t: lambda: t.holder.update(*brought("a.b", (abi.POLICY_ACCESS_WORLD, 3, 0)))),
    "update-who": ("EINVAL", lambda t: lambda: t.holder.update(*brought("a.b", (4, abi.POLICY_SEE, 0)))),
    "update-no-uid": ("EINVAL", lambda t: lambda: t.holder.update(*brought("a.b", (abi.POLICY_ACCESS_USER, 0, (1 << 32) - 1)))),
    # -- BUS_MAKE (the manual page has EBADMSG for a missing item, the kernel never gave it)
    "make-bus-of-nothing": ("EINVAL", lambda t: cmd(t.control, abi.CMD_BUS_MAKE)),
    "make-bus-no-bloom": ("EINVAL", lambda t: cmd(t.control, abi.CMD_BUS_MAKE, named(f"{UID}-x"))),
    "make-bus-no-name": ("EINVAL", lambda t: cmd(t.control, abi.CMD_BUS_MAKE, item(abi.ITEM_BLOOM_PARAMETER, 8, 1))),
    "make-bus-attach": ("EINVAL", lambda t: cmd(t.control, abi.CMD_BUS_MAKE, named(f"{UID}-x"), item(abi.ITEM_BLOOM_PARAMETER, 8, 1), item(abi.ITEM_ATTACH_FLAGS_SEND, 1 << 40))),
    "make-bus-long-name": ("ENAMETOOLONG", lambda t: cmd(t.control, abi.CMD_BUS_MAKE, named(f"{UID}-" + "x" * 63))),
    # -- CONN_INFO, LIST
    "info-of-nobody": ("EINVAL", lambda t: lambda: t.a.info()),
    "info-flags": ("EINVAL", lambda t: lambda: t.a.info(1, flags=1 << 40)),
    "info-no-id": ("ENXIO", lambda t: lambda: t.a.info(1 << 50)),
    "info-no-name": ("ESRCH", lambda t: lambda: t.a.info(name="no.body")),
    "info-other-id": ("ESRCH", lambda t: lambda: t.a.info(t.a.id, NAME)),
    "info-hidden-name": ("ESRCH", lambda t: lambda: t.inside.info(name=NAME)),
    "info-hidden": ("ENXIO", lambda t: lambda: t.inside.info(t.b.id)),
    "creator-flags": ("EINVAL", lambda t: cmd(t.a, abi.CMD_BUS_CREATOR_INFO, more=struct.pack("=2Q", 0, 1 << 40))),
    "info-full": ("EXFULL", lambda t: lambda: exhaust(t, abi.CMD_CONN_INFO, struct.pack("=2Q", t.a.id, 0))),
    "creator-full": ("EXFULL", lambda t: lambda: exhaust(t, abi.CMD_BUS_CREATOR_INFO)),
    "list-full": ("EXFULL", lambda t: lambda: exhaust(t, abi.CMD_LIST, flags=abi.LIST_UNIQUE)),
    "list-flags": ("EINVAL", lambda t: lambda: t.a.list(1 << 20)),
    # -- names
    "acquire-none": ("EINVAL", lambda t: cmd(t.a, abi.CMD_NAME_ACQUIRE)),
    "acquire-bad": ("EINVAL", lambda t: lambda: t.a.acquire("nodots")),
    "acquire-pattern": ("EINVAL", lambda t: lambda: t.a.acquire("a.b.*")),
    "acquire-long": ("EINVAL", lambda t: lambda: t.a.acquire("a." + "b" * 254)),
    "acquire-4096": ("EINVAL", lambda t: lambda: t.a.acquire("a." + "b" * 4094)),
    "acquire-empty": ("EINVAL", lambda t: lambda: t.a.acquire("")),
    "acquire-path": ("EINVAL", lambda t: lambda: t.a.acquire("../x.y")),
    "acquire-flags": ("EINVAL", lambda t: lambda: t.a.acquire("a.b", 1 << 40)),
    "acquire-taken": ("EEXIST", lambda t: lambda: t.a.acquire(NAME)),
    "acquire-not-replaceable": ("EEXIST", lambda t: lambda: t.a.acquire(NAME, abi.NAME_REPLACE_EXISTING)),
    "acquire-forbidden": ("EPERM", lambda t: lambda: t.stranger.acquire("com.example.Any")),
    "acquire-too-many": ("E2BIG", lambda t: lambda: overdo(lambda n: t.a.acquire(f"com.many.N{n}"))),
    "release-nobodys": ("ESRCH", lambda t: lambda: t.a.release("no.body")),
    "release-anothers": ("EADDRINUSE", lambda t: lambda: t.a.release(NAME)),
    # -- matches
    "match-size": ("EDOM", lambda t: lambda: t.a.add_match(items.build(abi.ITEM_BLOOM_MASK, bytes(32)))),
    "match-name": ("EINVAL", lambda t: lambda: t.a.add_match(items.string(abi.ITEM_NAME, "nodots"))),
    "match-too-many": ("EMFILE", lambda t: lambda: overdo(lambda n: t.a.add_match(cookie=n))),
    "unmatch-none": ("EBADSLT", lambda t: cmd(t.a, abi.CMD_MATCH_REMOVE, more=U64(99999))),
    # -- SEND
    "send-src": ("EINVAL", lambda t: message(t, src=t.b.id)),
    "send-kernel-payload": ("EINVAL", lambda t: message(t, payload_type=abi.PAYLOAD_KERNEL)),
    "send-flags": ("EINVAL", lambda t: message(t, flags=1 << 30)),
    "send-command-flags": ("EINVAL", lambda t: cmd(t.a, abi.CMD_SEND, flags=1 << 40)),
    "send-item": ("EINVAL", lambda t: message(t, item(abi.ITEM_ID, 5))),
    "send-no-timeout": ("EINVAL", lambda t: message(t, flags=EXPECT)),
    "send-no-cookie": ("EINVAL", lambda t: message(t, flags=EXPECT, reply=LATER, cookie=0)),
    "send-sync-no-reply": ("EINVAL", lambda t: lambda: t.a.send(t.b.id, b"x", sync=True)),
    "send-late": ("ETIMEDOUT", lambda t: lambda: t.a.send(t.b.id, b"x", sync=True, flags=EXPECT, reply=1)),
    "send-late-to-nobody": ("ETIMEDOUT", lambda t: lambda: t.a.send(0, b"x", to_name("no.body"), sync=True, flags=EXPECT, reply=1)),
    "send-signal-expects": ("ENOTUNIQ", lambda t: message(t, signal_filter(), flags=SIGNAL | EXPECT, reply=LATER)),
    "send-signal-reply": ("EINVAL", lambda t: message(t, signal_filter(), flags=SIGNAL, reply=5)),
    "send-negotiating": ("EINVAL", lambda t: message(t, flags=abi.FLAG_NEGOTIATE)),
    "send-all-expects": ("ENOTUNIQ", lambda t: message(t, signal_filter(), dst=ALL, flags=SIGNAL | EXPECT, reply=LATER)),
    "send-all-timeout": ("ENOTUNIQ", lambda t: message(t, signal_filter(), dst=ALL, flags=SIGNAL, reply=9)),
    "send-all-fds": ("ENOTUNIQ", lambda t: message(t, signal_filter(), fds(0), dst=ALL, flags=SIGNAL)),
    "send-signal-no-filter": ("EBADMSG", lambda t: message(t, flags=SIGNAL)),
    "send-all-no-signal": ("EBADMSG", lambda t: message(t, dst=ALL)),
    "send-no-filter": ("EBADMSG", lambda t: message(t, dst=ALL, flags=SIGNAL)),
    "send-filter": ("EBADMSG", lambda t: message(t, signal_filter())),
    "send-filter-and-name": ("EBADMSG", lambda t: message(t, signal_filter(), to_name(NAME), dst=ALL, flags=SIGNAL)),
    "send-filter-size": ("EDOM", lambda t: message(t, items.build(abi.ITEM_BLOOM_FILTER, bytes(8 + 32)), dst=ALL, flags=SIGNAL)),
    "send-filter-odd": ("EFAULT", lambda t: message(t, items.build(abi.ITEM_BLOOM_FILTER, bytes(8 + 63)), dst=ALL, flags=SIGNAL)),
    "send-17-memfds": ("E2BIG", lambda t: message(t, *[memfd(0)] * 17)),
    "send-257-vectors": ("EMSGSIZE", lambda t: message(t, *[vector(8)] * 257)),
    "send-too-much": ("EMSGSIZE", lambda t: message(t, vector((2 << 20) + 1))),
    "send-too-much-in-all": ("EMSGSIZE", lambda t: message(t, vector(1 << 20), vector(1 << 20), vector(1))),
    "send-wrapping-vector": ("EFAULT", lambda t: message(t, vector(64, (1 << 64) - 8))),
    "send-kernel-vector": ("EFAULT", lambda t: message(t, vector(64, KERNEL))),
    "send-unmapped-vector": ("EFAULT", lambda t: message(t, vector(64, 4096))),
    "send-two-fds-items": ("EINVAL", lambda t: message(t, fds(0), fds(1))),
    "send-two-names": ("EINVAL", lambda t: message(t, to_name(NAME), to_name(NAME), dst=0)),
    "send-no-fd": ("EBADF", lambda t: message(t, fds(99999))),
    "send-negative-fd": ("EBADF", lambda t: message(t, fds(-1))),
    "send-17-fds": ("EMFILE", lambda t: message(t, fds(*[t.pipe[0]] * 17))),
    "send-254-fds": ("EMFILE", lambda t: message(t, fds(*[0] * 254))),
    "send-fds-unwanted": ("ECOMM", lambda t: message(t, fds(t.pipe[0]))),
    "send-own-file": ("ENOTSUP", lambda t: message(t, fds(t.a.fd))),
    "send-control-file": ("ENOTSUP", lambda t: message(t, fds(t.control.fd))),
    "send-memfd-closed": ("EBADF", lambda t: message(t, memfd(99999))),
    "send-memfd-is-none": ("EMEDIUMTYPE", lambda t: message(t, memfd(t.pipe[0]))),
    "send-memfd-path": ("EBADF", lambda t: message(t, memfd(os.open("/", os.O_PATH | os.O_CLOEXEC)))),
    "send-memfd-unsealed": ("ETXTBSY", lambda t: message(t, memfd(unsealed()))),
    "send-memfd-own-file": ("ENOTSUP", lambda t: message(t, memfd(t.a.fd))),
    "send-memfd-empty": ("EINVAL", lambda t: message(t, items.build(abi.ITEM_PAYLOAD_MEMFD, layout.MEMFD.pack(0, 0, 0, 0)))),
    "send-memfd-wrapping": ("EMSGSIZE", lambda t: message(t, items.build(abi.ITEM_PAYLOAD_MEMFD, layout.MEMFD.pack((1 << 64) - 8, 64, 0, 0)))),
    "send-vector-empty": ("EINVAL", lambda t: message(t, vector(0))),
    "send-memfd-long": ("EFAULT", lambda t: message(t, long_memfd())),
    "send-to-nothing": ("EDESTADDRREQ", lambda t: message(t, dst=0)),
    "send-no-name": ("ESRCH", lambda t: message(t, to_name("no.body"), dst=0)),
    "send-endless-name": ("EINVAL", lambda t: message(t, items.build(abi.ITEM_DST_NAME, b"no.body"), dst=0)),
    "send-bad-name": ("EINVAL", lambda t: message(t, to_name("nodots"), dst=0)),
    "send-other-owner": ("EREMCHG", lambda t: message(t, to_name(NAME), dst=t.a.id)),
    "send-no-id": ("ENXIO", lambda t: message(t, dst=1 << 50)),
    "send-to-holder": ("ENXIO", lambda t: message(t, dst=t.holder.id)),
    "send-to-monitor": ("ENXIO", lambda t: message(t, dst=t.monitor.id)),
    "send-to-activator": ("ENXIO", lambda t: message(t, dst=t.activator.id)),
    "send-no-auto-start": ("EADDRNOTAVAIL", lambda t: message(t, to_name("com.example.Act"), dst=0, flags=abi.MSG_NO_AUTO_START)),
    "send-forbidden": ("EPERM", lambda t: lambda: t.stranger.send(t.a.id, b"x")),
    "send-faked-reply": ("EBADSLT", lambda t: message(t, reply=77)),
    "send-full": ("ENOBUFS", lambda t: lambda: fill(t)),
    "send-no-cancel-fd": ("EBADF", lambda t: cancelled(t, 99999)),
    "send-cancel-file": ("EINVAL", lambda t: cancelled(t, os.open("/etc/passwd", os.O_RDONLY | os.O_CLOEXEC))),
    "send-no-message": ("EFAULT", lambda t: cmd(t.a, abi.CMD_SEND, more=U64(4096))),
    "send-kernel-message": ("EFAULT", lambda t: cmd(t.a, abi.CMD_SEND, more=U64(KERNEL))),
    "send-odd-message": ("EFAULT", lambda t: cmd(t.a, abi.CMD_SEND, more=U64(4097))),
    "send-too-many-calls": ("EMLINK", lambda t: lambda: overdo(lambda n: t.a.send(t.a.id, b"", flags=EXPECT, reply=LATER, cookie=n + 1))),
    # -- RECV, FREE, BYEBYE
    "recv-nothing": ("EAGAIN", lambda t: cmd(t.stranger, abi.CMD_RECV)),
    "recv-flags": ("EINVAL", lambda t: cmd(t.a, abi.CMD_RECV, flags=1 << 40)),
    "recv-drop-priority": ("EINVAL", lambda t: cmd(t.a, abi.CMD_RECV, flags=abi.RECV_DROP | abi.RECV_USE_PRIORITY)),
    "free-nothing": ("ENXIO", lambda t: lambda: t.a.free(8)),
    "free-behind": ("ENXIO", lambda t: lambda: t.a.free(1 << 40)),
    "byebye-busy": ("EBUSY", lambda t: lambda: t.b.byebye()),
    # -- ENDPOINT_UPDATE
    "endpoint-bad-name": ("EINVAL", lambda t: lambda: t.endpoint.set(*brought("nodots"))),
    "endpoint-item": ("EINVAL", lambda t: lambda: t.endpoint.set(item(abi.ITEM_ID, 1))),
    "endpoint-order": ("EINVAL", lambda t: lambda: t.endpoint.set(item(abi.ITEM_POLICY_ACCESS, 3, 0, 0))),
    "endpoint-twice": ("EEXIST", lambda t: lambda: t.endpoint.set(*brought("a.b"), *brought("a.b"))),
}  # fmt: skip


def message(bed: Bed, *chain: bytes, dst: int | None = None, src: int = 0, flags: int = 0, cookie: int = 1,
            reply: int = 0, payload_type: int = abi.PAYLOAD_DBUS) -> Callable[[], Any]:  # fmt: skip
    to = bed.b.id if dst is None else dst
    fixed = layout.MESSAGE.pack(0, flags, 0, to, src, payload_type, cookie, reply)
    buffer = Buffer(items.command(fixed, chain))
    sent = struct.pack("=6Q", 0, 0, buffer.address, 0, 0, 0)

    def send() -> None:
        assert buffer  # whose memory it is
        bed.a.do(abi.CMD_SEND, sent)

    return send


def unsealed() -> int:
    fd = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    os.write(fd, b"0123456789")
    return fd


def long_memfd() -> bytes:
    fd = unsealed()
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, 0xF)
    return memfd(fd, 11)


def cancelled(bed: Bed, fd: int) -> Callable[[], Any]:
    cancel = items.build(abi.ITEM_CANCEL_FD, struct.pack("=i", fd))
    how = {"flags": EXPECT, "reply": LATER, "sync": True, "cancel": cancel}
    return lambda: bed.a.send(bed.a.id, b"x", **how)  # type: ignore[arg-type]


@pytest.mark.parametrize("row", ROWS)
def test_what_is_wrong_is_told_by_its_errno(bed: Bed, row: str) -> None:
    expected, make = ROWS[row]
    assert fails(make(bed)) == expected


def test_free_takes_what_was_peeked_at_once_and_what_is_no_slice_always(bed: Bed) -> None:
    with KdbusClient(bed.node) as client:
        client.send(client.id, b"peek")
        got = client.do(abi.CMD_RECV, struct.pack("=2Qq4Q", abi.RECV_PEEK, 0, 0, 0, 0, 0, 0))
        (offset,) = struct.unpack_from("=Q", got, 40)
        client.free(offset)
        assert fails(lambda: client.free(offset)) == "ENXIO"
        assert client.recv().payload == b"peek"
        for _ in range(2):
            client.free(len(client.pool))  # what is said to be nothing lies there


def test_bad_input_leaves_a_line_in_the_log_but_not_without_end(shared: KdbusBus) -> None:
    def lines(text: str) -> list[str]:
        return [line for line in shared.log().splitlines() if text in line]

    with KdbusClient(shared.node) as client:
        assert fails(lambda: client.info(name="no.such.name")) == "ESRCH"
        for _ in range(40):
            assert fails(lambda: client.send(client.id, b"x", flags=1 << 41)) == "EINVAL"
        procs.eventually(lambda: len(lines(f"{1 << 41:#x}")) == 16, "so many lines")
        first, *_, last = lines(f"{1 << 41:#x}")
        assert f"thread {os.getpid()} of uid {UID}" in first
        assert "message with unknown flags" in first
        assert last.endswith("(what else is wrong is not logged)")
        assert not lines("no.such.name")
    with KdbusClient(str(Path(shared.node).parents[1] / "control"), hello=False) as control:
        assert fails(cmd(control, abi.CMD_BUS_MAKE, flags=1 << 42)) == "EINVAL"
        procs.eventually(lambda: lines(f"{1 << 42:#x}"), "of a control node, too")


# -- for every command -------------------------------------------------------------------------

# A file that takes the command, if it is well formed.
TAKES = {
    abi.CMD_BUS_MAKE: "control", abi.CMD_ENDPOINT_MAKE: "fresh", abi.CMD_HELLO: "fresh",
    abi.CMD_ENDPOINT_UPDATE: "endpoint",
}  # fmt: skip
EVERY = pytest.mark.parametrize("number", SPECS, ids=lambda number: SPECS[number].name)


@EVERY
def test_every_command_has_a_size_flags_and_items_that_can_be(bed: Bed, number: int) -> None:
    client: KdbusClient = getattr(bed, TAKES.get(number, "a"))
    fixed = FIXED[number]
    head = struct.pack("=3Q", fixed, 0, 0).ljust(fixed, b"\0")

    def sized(size: int, data: bytes = head) -> Callable[[], Any]:
        return raw(
            client, number, U64(size) + data[8:].ljust(size - 8 if size < 1 << 16 else 0, b"\0")
        )

    for size in (0, 8, fixed - 8):
        assert fails(raw(client, number, U64(size) + head[8:])) == "EINVAL"
    assert fails(sized(abi.MAX_COMMAND_SIZE + 8)) == "EMSGSIZE"
    for size in (1 << 32, 1 << 63, (1 << 64) - 8):
        assert fails(raw(client, number, U64(size) + head[8:])) == "EMSGSIZE"
    flags = head[:8] + U64(1 << 50) + head[16:]
    assert fails(raw(client, number, flags)) == "EINVAL"
    for chain in (
        item(0x7777, 1),
        item(abi.ITEM_NEGOTIATE) + item(abi.ITEM_NEGOTIATE),
        struct.pack("=2Q", 8, abi.ITEM_NEGOTIATE),  # shorter than its head
        struct.pack("=2Q", 0, abi.ITEM_NEGOTIATE),
        struct.pack("=3Q", 1 << 40, abi.ITEM_NEGOTIATE, 0),  # reaches into the next, and on
        struct.pack("=3Q", 32, abi.ITEM_NEGOTIATE, 0),
        struct.pack("=3Q", (1 << 64) - 8, abi.ITEM_NEGOTIATE, 0),
        b"half",
    ):
        data = head + chain
        assert fails(raw(client, number, U64(len(data)) + data[8:])) == "EINVAL", chain
    for address in (0, 4096, KERNEL, (1 << 64) - 8, 1 << 47):
        assert fails(lambda a=address: ioctl(client.fd, number, a)) == "EFAULT"
    whole = Buffer(head + bytes(8))
    assert fails(lambda: ioctl(client.fd, number, whole.address + 4)) == "EFAULT"


@EVERY
def test_a_struct_that_ends_at_memory_that_is_not_there(bed: Bed, number: int) -> None:
    client: KdbusClient = getattr(bed, TAKES.get(number, "a"))
    page = mmap.PAGESIZE
    pages = mmap.mmap(-1, 2 * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(pages))
    assert LIBC.mprotect(ctypes.c_void_p(address + page), page, 0) == 0
    fixed = FIXED[number]
    data = struct.pack("=3Q", fixed + 64, 0, 0).ljust(fixed, b"\0")
    start = page - fixed
    ctypes.memmove(address + start, data, fixed)
    assert fails(lambda: ioctl(client.fd, number, address + start)) == "EFAULT"
    assert LIBC.mprotect(ctypes.c_void_p(address + page), page, 3) == 0


@pytest.mark.parametrize("number", [abi.CMD_HELLO, abi.CMD_ENDPOINT_MAKE, abi.CMD_BUS_MAKE])
def test_what_sets_a_file_up_from_memory_that_cant_be_written_leaves_it_as_it_was(
    bed: Bed, number: int
) -> None:
    """Its client could not be told of the connection, bus or endpoint; kdbus ended that."""
    node = Path(bed.node)
    control = number == abi.CMD_BUS_MAKE
    path = str(node.parents[1] / "control") if control else bed.node
    bloom = items.build(abi.ITEM_BLOOM_PARAMETER, layout.BLOOM_PARAMETER.pack(64, 1))
    name = items.string(abi.ITEM_MAKE_NAME, f"{os.getuid()}-unwritten")
    fixed, chain = {
        abi.CMD_HELLO: (struct.pack("=9Q", 0, 0, 0, 0, 0, 0, 4096, 0, 0) + bytes(16), ()),
        abi.CMD_ENDPOINT_MAKE: (bytes(16), (name,)),
        abi.CMD_BUS_MAKE: (bytes(16), (bloom, name)),
    }[number]
    with KdbusClient(path, hello=False) as file:
        data = items.command(bytes(8) + fixed, chain)
        page = mmap.mmap(-1, mmap.PAGESIZE)
        page[: len(data)] = data
        address = ctypes.addressof(ctypes.c_char.from_buffer(page))
        assert LIBC.mprotect(ctypes.c_void_p(address), mmap.PAGESIZE, mmap.PROT_READ) == 0
        before = set(os.listdir(node.parents[control]))
        assert fails(lambda: ioctl(file.fd, number, address)) == "EFAULT"
        assert set(os.listdir(node.parents[control])) == before
        assert LIBC.mprotect(ctypes.c_void_p(address), mmap.PAGESIZE, 3) == 0
        ioctl(file.fd, number, address)


# -- a process in each state ---------------------------------------------------------------------


def child_that(do: Callable[[], None]) -> int:
    """A process that does it, and then sleeps till it is killed."""
    said, say = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setpgid(0, 0)
            LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            do()
            os.write(say, b"!")
            while True:
                time.sleep(60)
        finally:
            os._exit(1)
    os.close(say)
    try:
        assert os.read(said, 1), "it ended"
    finally:
        os.close(said)
    return pid


def kill(pid: int) -> None:
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def files_of(node: str) -> dict[str, Callable[[], Any]]:
    root = str(Path(node).parents[1])
    return {
        "opened": lambda: os.open(node, os.O_RDWR),
        "connected": lambda: KdbusClient(node),
        "named": lambda: (client := KdbusClient(node), client.acquire("com.example.Dies")),
        "endpoint": lambda: Endpoint(node, f"{UID}-dies"),
        "bus": lambda: Maker(Path(root)).make(f"{UID}-dies"),
        "holder": lambda: KdbusClient(node, flags=HOLDER, chain=brought("com.example.Dies")),
        "monitor": lambda: KdbusClient(node, flags=MONITOR),
        "activator": lambda: KdbusClient(node, flags=ACTIVATOR, chain=brought("com.example.Dies")),
    }


EVERYTHING = abi.LIST_UNIQUE | abi.LIST_NAMES | abi.LIST_ACTIVATORS | abi.LIST_QUEUED
STATES = tuple(files_of("/x/y/z"))


@pytest.mark.parametrize("state", STATES)
def test_a_process_that_dies_leaves_nothing(bus: KdbusBus, state: str) -> None:
    before = bus.kdbus()
    ids = set(before.list(EVERYTHING))
    kept: list[Any] = []
    for _ in range(2):  # the second finds all free again
        kill(child_that(lambda: kept.append(files_of(bus.node)[state]())))
        procs.eventually(lambda: set(before.list(EVERYTHING)) == ids, "it is gone")
        directory = Path(bus.node).parent
        procs.eventually(lambda: os.listdir(directory) == ["bus"], "so is its endpoint")  # noqa: B023
        procs.eventually(lambda: not (directory.parent / f"{UID}-dies").exists(), "and its bus")  # noqa: B023


def test_a_process_that_dies_in_a_call_or_is_stopped_in_one(bus: KdbusBus) -> None:
    callee = bus.kdbus()

    def waiting() -> Callable[[], None]:
        def call() -> None:
            client = KdbusClient(bus.node)
            if os.fork() == 0:
                client.call(callee.id, b"x", seconds=60)
                os._exit(0)

        return call

    pid = child_that(waiting())
    procs.eventually(lambda: callee.readable(0.1), "it calls")
    asked = callee.recv()
    (caller,) = procs.descendants(pid)
    os.kill(caller.pid, signal.SIGSTOP)
    other = bus.kdbus()
    for _ in range(50):  # nobody else is disturbed
        other.send(callee.id, b"meanwhile")
        assert callee.recv().payload == b"meanwhile"
    os.kill(caller.pid, signal.SIGCONT)
    callee.send(asked.src, b"answer", reply=asked.cookie)
    procs.eventually(lambda: not procs.alive(caller), "it got its answer")
    kill(pid)
    procs.eventually(lambda: asked.src not in callee.list(abi.LIST_UNIQUE), "it is gone")


def test_a_connection_lives_as_long_as_any_process_has_it_open(bus: KdbusBus) -> None:
    client, other = bus.kdbus(), bus.kdbus()
    pid = child_that(lambda: None)  # which has inherited both
    id, fd = client.id, os.dup(client.fd)
    client.close()
    os.close(fd)
    assert id in other.list(abi.LIST_UNIQUE)
    other.send(id, b"it is still there")
    kill(pid)
    procs.eventually(lambda: id not in other.list(abi.LIST_UNIQUE), "it is gone")


def test_a_forked_child_uses_the_connection_as_its_parent_does(bus: KdbusBus) -> None:
    client, other = bus.kdbus(), bus.kdbus()

    def act() -> None:
        client.send(other.id, b"of the child")
        client.acquire("com.example.Child")

    pid = child_that(act)
    client.send(other.id, b"of the parent")
    assert {other.recv().payload for _ in range(2)} == {b"of the child", b"of the parent"}
    kill(pid)
    assert other.list(abi.LIST_NAMES) == {client.id: ["com.example.Child"]}


def test_hundreds_of_opens_are_refused_or_served_and_leave_nothing(bus: KdbusBus) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    before = len(os.listdir(f"/proc/{bus.pid}/fd"))
    opened: list[int] = []
    refused = 0
    most = 400 if bus.mount in bus.node else 40  # a system call takes long in the guest
    for _ in range(most):
        try:
            opened.append(os.open(bus.node, os.O_RDWR | os.O_CLOEXEC))
        except OSError as error:
            assert error.errno in (24, 105, 11, 12), error  # EMFILE and the like
            refused += 1
            break
    assert len(opened) >= most // 2 or refused
    for fd in opened:
        os.close(fd)
    procs.eventually(lambda: len(os.listdir(f"/proc/{bus.pid}/fd")) <= before + 8, "none is left")
    client = bus.kdbus()
    client.send(client.id, b"as before")
    assert client.recv().payload == b"as before"
    assert (soft, hard) == resource.getrlimit(resource.RLIMIT_NOFILE)


def test_after_all_of_it_the_bus_is_as_before(bed: Bed) -> None:
    with KdbusClient(bed.node) as one, KdbusClient(bed.node) as two:
        one.send(two.id, b"hello", sealed(b" world"))
        assert two.recv().payload.startswith(b"hello")


__all__ = ["bed", "shared"]
