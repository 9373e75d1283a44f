"""Kdbus clients and D-Bus clients on one bus: the same names, calls, signals, and who is gone."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import random
import select
import signal
import struct
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kbusd.kdbus import abi, items, layout, payload
from tests.bus import procs
from tests.bus import wireformat as w
from tests.bus.daemon import STRICT_POLICY, Bus
from tests.bus.rawclient import RawClient
from tests.kdbusfs.kclient import Buffer, KdbusClient, Message, ioctl

# Mounting takes root; where we are not, the tests run in the guest, where CUSE always is.
FILE = pytest.param("kdbusfs", marks=[] if os.geteuid() == 0 else [pytest.mark.guest])
NODE = pytest.param("cuse", marks=pytest.mark.guest)

ALL = (1 << 64) - 1
EXPECT = abi.MSG_EXPECT_REPLY


class KdbusBus(Bus):
    """A bus with a mount or nodes; `kdbus()` opens a connection that is closed with the others."""

    def __init__(self, *transports: str, below: str = "", **shape: Any) -> None:
        self.mount = tempfile.mkdtemp(prefix="kbt-fs-", dir="/tmp")
        self.opened: list[KdbusClient] = []
        options = {"kdbusfs": f"--kdbusfs={self.mount}", "cuse": f"--cuse={below}"}
        super().__init__(options=[options[each] for each in transports], **shape)
        name = f"{os.geteuid()}-{shape.get('type_', 'session')}/bus"
        roots = {"kdbusfs": self.mount, "cuse": os.path.join("/dev/kdbus", below)}
        self.nodes = [f"{roots[each]}/{name}" for each in transports]
        self.node = self.nodes[0]

    def kdbus(self, **how: Any) -> KdbusClient:
        client = KdbusClient(self.node, **how)
        self.opened.append(client)
        return client

    def serving(self) -> list[procs.Process]:
        """The workers that have a client with a pool; others end meanwhile."""

        def has_pool(worker: procs.Process) -> bool:
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                return "kbusd-pool" in Path(f"/proc/{worker.pid}/maps").read_text()
            return False

        return list(filter(has_pool, self.workers()))

    def close_clients(self) -> None:
        while self.opened:
            self.opened.pop().close()
        super().close_clients()

    def kill(self, others: Any = None) -> None:
        super().kill(others)
        subprocess.run(["umount", "-l", self.mount], check=False, stderr=subprocess.DEVNULL)
        os.rmdir(self.mount)


@pytest.fixture(scope="module", params=[FILE, NODE])
def shared(request: pytest.FixtureRequest) -> Iterator[KdbusBus]:
    bus = KdbusBus(request.param, policy=STRICT_POLICY)
    yield bus
    bus.stop()


def call(
    member: str, signature: str = "", body: bytes = b"", cookie: int = 1, **more: Any
) -> bytes:
    """A method call in GVariant, as sd-bus wrote it."""
    return payload.write(
        payload.Message(
            type=1, cookie=cookie, path="/test", interface="com.example.Test", member=member,
            signature=signature, body=body, **more,
        )
    )  # fmt: skip


def text(value: str) -> bytes:
    """A dbus1 body "s"."""
    data = value.encode()
    return struct.pack("<I", len(data)) + data + b"\0"


def answer(to: Message, signature: str = "", body: bytes = b"") -> bytes:
    return payload.write(
        payload.Message(
            type=2, cookie=1, reply_cookie=to.cookie, signature=signature, body=body, flags=1
        )
    )


def fails(do: Callable[[], Any]) -> str:
    """The name of the errno that it fails with."""
    with pytest.raises(OSError) as caught:
        do()
    return errno.errorcode[caught.value.errno or 0]


def sealed(data: bytes) -> bytes:
    """An item with this payload in a memfd, which stays open."""
    fd = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    os.write(fd, data)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, 0xF)
    return items.build(abi.ITEM_PAYLOAD_MEMFD, layout.MEMFD.pack(0, len(data), fd, 0))


def to_name(name: str) -> bytes:
    return items.string(abi.ITEM_DST_NAME, name)


def id_of(client: RawClient) -> int:
    return int(client.name.removeprefix(":1."))


# -- kdbus alone -------------------------------------------------------------------------------


def test_two_kdbus_clients_talk(bus: KdbusBus) -> None:
    a, b = bus.kdbus(), bus.kdbus(recv=abi.ATTACH_ALL)
    assert a.uuid.hex() == bus.guid
    assert b.id == a.id + 1
    a.send(b.id, b"0123456789", cookie=0xC0FFEE)
    got = b.recv()
    assert (got.src, got.dst, got.cookie, got.payload) == (a.id, b.id, 0xC0FFEE, b"0123456789")
    creds, pids = got.item(abi.ITEM_CREDS), got.item(abi.ITEM_PIDS)
    assert creds and pids
    assert layout.CREDS.unpack(creds) == (os.geteuid(),) * 4 + (os.getegid(),) * 4
    assert layout.PIDS.unpack(pids)[:2] == (os.getpid(), os.getpid())
    assert not b.readable()


def test_send_says_at_once_what_became_of_a_message(bus: KdbusBus) -> None:
    a, b = bus.kdbus(), bus.kdbus(size=1 << 16)
    assert fails(lambda: a.send(999999, b"x")) == "ENXIO"
    assert fails(lambda: a.send(0, b"x", to_name("no.body"))) == "ESRCH"

    def flood() -> None:
        for _ in range(1000):
            a.send(b.id, bytes(1000))

    assert fails(flood) == "ENOBUFS"
    assert fails(lambda: a.send(b.id, bytes(1 << 21))) in ("ENOBUFS", "EXFULL")
    assert fails(lambda: a.send(b.id, b"x", cookie=1, reply=77)) == "EBADSLT"
    while b.readable():
        assert b.recv().payload == bytes(1000)
    a.send(b.id, b"room again")
    assert b.recv().payload == b"room again"


@pytest.mark.parametrize("size", [1, 4095, 4096, 70_000, 1 << 20, 2 << 20])
def test_payloads_of_all_sizes_come_whole(bus: KdbusBus, size: int) -> None:
    a, b = bus.kdbus(), bus.kdbus(size=32 << 20)
    data = os.urandom(size)
    for _ in range(2):
        a.send(b.id, data)
        assert b.recv().payload == data


def test_a_memfd_comes_as_its_bytes(bus: KdbusBus) -> None:
    a, b = bus.kdbus(), bus.kdbus()
    fd = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    os.write(fd, b"in a memfd")
    item = items.build(abi.ITEM_PAYLOAD_MEMFD, layout.MEMFD.pack(3, 7, fd, 0))
    assert fails(lambda: a.send(b.id, b"", item)) == "ETXTBSY"
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, 0xF)
    a.send(b.id, b"first ", item)
    got = b.recv()
    if hasattr(b, "socket"):  # attached: it gets the memfd itself (test_descriptors.py)
        assert got.item(abi.ITEM_PAYLOAD_MEMFD) is not None
    else:
        assert got.payload == b"first a memfd"
    long = items.build(abi.ITEM_PAYLOAD_MEMFD, layout.MEMFD.pack(3, 8, fd, 0))
    assert fails(lambda: a.send(b.id, b"", long)) == "EFAULT"
    own = items.build(abi.ITEM_PAYLOAD_MEMFD, layout.MEMFD.pack(0, 1, 0, 0))
    assert fails(lambda: a.send(b.id, b"", own)) == "EMEDIUMTYPE"
    node = items.build(abi.ITEM_FDS, struct.pack("=i", a.fd))
    assert fails(lambda: a.send(b.id, b"", node)) == "ENOTSUP"  # EOPNOTSUPP
    os.close(fd)


def test_bad_pointers_are_refused(bus: KdbusBus) -> None:
    a = bus.kdbus()
    for address in (0, 8, 1 << 47, (1 << 64) - 64):
        assert fails(lambda address=address: ioctl(a.fd, abi.CMD_RECV, address)) == "EFAULT"
        assert fails(lambda address=address: ioctl(a.fd, abi.CMD_HELLO, address)) in (
            "EFAULT",
            "EBADFD",
        )
    command = Buffer(items.command(struct.pack("=7Q", 0, 0, 0, 8, 0, 0, 0)))
    assert fails(lambda: ioctl(a.fd, abi.CMD_SEND, command.address)) == "EFAULT"
    assert fails(lambda: ioctl(a.fd, 0x1234, 0)) == "ENOTTY"
    a.acquire("com.example.StillThere")


def test_a_synchronous_call_between_kdbus_clients(bus: KdbusBus) -> None:
    a, b = bus.kdbus(), bus.kdbus()
    child = os.fork()
    if child == 0:
        try:
            call = b.recv()
            b.send(call.src, b"pong", reply=call.cookie)
        finally:
            os._exit(0)
    assert a.call(b.id, b"ping", cookie=9).payload == b"pong"
    assert os.waitpid(child, 0)[1] == 0


def test_a_call_that_nobody_answers(bus: KdbusBus) -> None:
    a, b = bus.kdbus(), bus.kdbus()
    assert fails(lambda: a.call(b.id, b"x", seconds=0.05)) == "ETIMEDOUT"
    until = time.monotonic_ns() + 50_000_000
    a.send(b.id, b"x", flags=EXPECT, reply=until, cookie=5)
    got = a.recv()
    assert (got.src, got.reply) == (0, 5)
    assert got.item(abi.ITEM_REPLY_TIMEOUT) == b""
    a.send(b.id, b"x", flags=EXPECT, reply=until + 10_000_000_000, cookie=6)
    b.close()
    got = a.recv()
    assert got.item(abi.ITEM_REPLY_DEAD) == b"" and got.reply == 6


def test_a_call_is_cancelled_by_a_descriptor(bus: KdbusBus) -> None:
    a, b = bus.kdbus(), bus.kdbus()
    reader, writer = os.pipe()
    cancel = items.build(abi.ITEM_CANCEL_FD, struct.pack("=i", reader))
    timer = threading.Timer(0.1, lambda: os.write(writer, b"!"))
    timer.start()
    began = time.monotonic()
    assert fails(lambda: a.call(b.id, b"x", cancel=cancel, seconds=60)) == "ECANCELED"
    assert time.monotonic() - began < 30
    timer.join()
    os.close(reader)
    os.close(writer)
    assert b.recv().payload == b"x"


def test_a_signal_interrupts_a_call_which_then_goes_on(bus: KdbusBus) -> None:
    a, b = bus.kdbus(), bus.kdbus()
    hits: list[int] = []

    def on_alarm(*_: object) -> None:
        hits.append(1)
        b.send(a.id, b"after the signal", reply=8)

    def alarm() -> None:
        if b.readable(5):  # the call has come, so its sender waits
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGALRM)

    before = signal.signal(signal.SIGALRM, on_alarm)
    signal.siginterrupt(signal.SIGALRM, True)
    waiting = threading.Thread(target=alarm)
    waiting.start()
    until = time.monotonic_ns() + 8_000_000_000
    try:
        how: dict[str, Any] = {"flags": EXPECT, "reply": until, "sync": True, "cookie": 8}
        assert fails(lambda: a.send(b.id, b"x", **how)) == "EINTR"
    finally:
        waiting.join()
        signal.signal(signal.SIGALRM, before)
    assert hits
    assert a.recv().payload == b"after the signal"


def test_a_client_that_is_killed_in_a_call_is_gone(bus: KdbusBus) -> None:
    b = bus.kdbus()
    b.add_match(items.build(abi.ITEM_ID_REMOVE, layout.ID_CHANGE.pack(abi.MATCH_ID_ANY, 0)))
    child = os.fork()
    if child == 0:
        with KdbusClient(bus.node) as a:
            a.call(b.id, b"never", seconds=60)
        os._exit(1)
    asked = b.recv()
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    gone = b.recv().item(abi.ITEM_ID_REMOVE)
    assert gone and layout.ID_CHANGE.unpack(gone)[0] == asked.src


def test_byebye_and_what_follows(bus: KdbusBus) -> None:
    a, b = bus.kdbus(), bus.kdbus()
    a.acquire("com.example.Bye")
    a.byebye()
    assert fails(lambda: a.acquire("com.example.Bye")) == "ECONNRESET"
    poller = select.poll()
    poller.register(a.fd, select.POLLIN)
    assert poller.poll(5000)[0][1] & (select.POLLERR | select.POLLHUP)
    deadline = time.monotonic() + 5
    while any("com.example.Bye" in names for names in b.list(abi.LIST_NAMES).values()):
        assert time.monotonic() < deadline


def test_hello_that_failed_can_be_tried_again_with_another_pool(bus: KdbusBus) -> None:
    name = (items.string(abi.ITEM_NAME, "com.example.Taken"),)
    bus.kdbus(flags=abi.HELLO_ACTIVATOR, chain=name)
    with KdbusClient(bus.node, hello=False) as a:
        for size in (1 << 16, 1 << 17):
            fixed = struct.pack("=9Q", abi.HELLO_ACTIVATOR, 0, 0, 0, 0, 0, size, 0, 0) + bytes(16)
            assert fails(lambda hello=fixed: a.do(abi.CMD_HELLO, hello, *name)) == "EEXIST"
        a.hello(size=1 << 18)
        a.send(a.id, b"still there")
        assert a.recv().payload == b"still there"


def test_byebye_that_writes_flags_back_is_answered(bus: KdbusBus) -> None:
    a, other = bus.kdbus(), bus.kdbus()
    said = Buffer(struct.pack("=3Q", 24, 0, 0xDEAD))  # return_flags, which are 0 afterwards
    assert ioctl(a.fd, abi.CMD_BYEBYE, said.address) == 0
    assert struct.unpack("=3Q", said.bytes) == (24, 0, 0)
    assert fails(a.byebye) == "ECONNRESET"
    assert a.id not in other.list(abi.LIST_UNIQUE)


# -- both kinds --------------------------------------------------------------------------------


def test_both_see_the_same_names(bus: KdbusBus) -> None:
    a, d = bus.kdbus(), bus.connect()
    assert f":1.{a.id}" in d.driver("ListNames")[0]
    a.acquire("com.example.K")
    assert d.driver("GetNameOwner", "s", ["com.example.K"]) == [f":1.{a.id}"]
    assert d.request_name("com.example.K", 4) == 3
    d.request_name("com.example.D")
    assert fails(lambda: a.acquire("com.example.D")) == "EEXIST"
    listed = a.list(abi.LIST_NAMES | abi.LIST_UNIQUE)
    assert listed == {a.id: ["com.example.K"], id_of(d): ["com.example.D"]}
    assert d.driver("GetConnectionUnixProcessID", "s", ["com.example.K"]) == [os.getpid()]


def test_both_learn_of_owners(bus: KdbusBus) -> None:
    a, d = bus.kdbus(), bus.connect()
    d.add_match("type='signal',member='NameOwnerChanged'")
    for kind in (abi.ITEM_NAME_ADD, abi.ITEM_NAME_REMOVE):
        rule = layout.NAME_CHANGE.pack(abi.MATCH_ID_ANY, 0, abi.MATCH_ID_ANY, 0)
        a.add_match(items.build(kind, rule + b"com.example.O\0"))
    b = bus.kdbus()
    assert d.wait_signal("NameOwnerChanged").args == [f":1.{b.id}", "", f":1.{b.id}"]
    b.acquire("com.example.O")
    assert d.wait_signal("NameOwnerChanged").args == ["com.example.O", "", f":1.{b.id}"]
    b.release("com.example.O")
    assert d.wait_signal("NameOwnerChanged").args == ["com.example.O", f":1.{b.id}", ""]
    for kind, old, new in ((abi.ITEM_NAME_ADD, 0, b.id), (abi.ITEM_NAME_REMOVE, b.id, 0)):
        change = a.recv().item(kind)
        assert change and change[layout.NAME_CHANGE.size :] == b"com.example.O\0"
        assert layout.NAME_CHANGE.unpack_from(change)[0::2] == (old, new)
    b.close()
    assert d.wait_signal("NameOwnerChanged").args == [f":1.{b.id}", f":1.{b.id}", ""]


@pytest.mark.parametrize("form", ["GVariant", "dbus1"])
def test_a_kdbus_client_calls_a_dbus_service(bus: KdbusBus, form: str) -> None:
    a, d = bus.kdbus(), bus.connect()
    d.request_name("com.example.Service")
    if form == "GVariant":
        data = call("Frob", "s", text("grüße"), cookie=1 << 40)
        cookie = 1 << 40
    else:
        fields = {w.PATH: "/test", w.INTERFACE: "com.example.Test", w.MEMBER: "Frob"}
        data, cookie = w.build(w.CALL, fields, "s", ["grüße"], serial=77), 77
    until = time.monotonic_ns() + 5_000_000_000
    to = to_name("com.example.Service")
    a.send(0, data, to, flags=EXPECT, reply=until, cookie=cookie)
    came = d.wait_call("Frob")
    assert (came.sender, came.args) == (f":1.{a.id}", ["grüße"])
    assert came.fields[w.DESTINATION] == "com.example.Service"
    d.reply(came, "us", (5, "done"))
    got = a.recv()
    assert (got.src, got.reply) == (id_of(d), cookie)
    read = payload.read(got.payload)
    assert (read.type, read.reply_cookie, read.signature) == (2, cookie, "us")
    assert read.body == struct.pack("<I", 5) + text("done")
    assert read.sender == d.name


def test_a_dbus_error_comes_as_one(bus: KdbusBus) -> None:
    a, d = bus.kdbus(), bus.connect()
    until = time.monotonic_ns() + 5_000_000_000
    a.send(id_of(d), call("Frob", cookie=3), flags=EXPECT, reply=until, cookie=3)
    d.reply_error(d.wait_call("Frob"), "com.example.Error.No", "no")
    read = payload.read(a.recv().payload)
    assert (read.type, read.error_name, read.reply_cookie) == (3, "com.example.Error.No", 3)
    assert read.body == text("no")


def test_a_dbus_callee_that_goes_without_an_answer(bus: KdbusBus) -> None:
    a, d = bus.kdbus(), bus.connect()
    until = time.monotonic_ns() + 5_000_000_000
    a.send(id_of(d), call("Frob", cookie=3), flags=EXPECT, reply=until, cookie=3)
    d.wait_call("Frob")
    d.close()
    got = a.recv()
    assert got.item(abi.ITEM_REPLY_DEAD) == b"" and got.reply == 3
    assert not a.readable(0.05)


def test_a_dbus_client_calls_a_kdbus_service(bus: KdbusBus) -> None:
    a, d = bus.kdbus(), bus.connect()
    a.acquire("com.example.KService")
    for destination in ("com.example.KService", f":1.{a.id}"):
        serial = d.send_call(destination, "/x", "com.example.I", "Do", "sau", ["eins", [1, 2, 3]])
        got = a.recv()
        read = payload.read(got.payload)
        assert (got.src, got.cookie, got.flags) == (id_of(d), serial, EXPECT)
        assert (read.member, read.path, read.signature) == ("Do", "/x", "sau")
        assert read.destination == destination
        a.send(got.src, answer(got, "s", text("zwei")), reply=got.cookie)
        assert d.wait_reply(serial).args == ["zwei"]
        assert fails(lambda got=got: a.send(got.src, answer(got), reply=got.cookie)) == "EBADSLT"


def test_a_dbus_call_to_a_kdbus_client_that_goes(bus: KdbusBus) -> None:
    a, d = bus.kdbus(), bus.connect()
    serial = d.send_call(f":1.{a.id}", "/x", "com.example.I", "Do")
    a.recv()
    a.close()
    reply = d.wait(lambda m: m.reply_serial == serial)
    assert reply.error_name == "org.freedesktop.DBus.Error.NoReply"


def test_a_payload_that_is_no_dbus_message_is_for_kdbus_clients_alone(bus: KdbusBus) -> None:
    a, d = bus.kdbus(), bus.connect()
    assert fails(lambda: a.send(id_of(d), b"0123456789")) == "EBADMSG"
    assert fails(lambda: a.send(id_of(d), call("Frob"), cookie=2)) == "EBADMSG"
    assert fails(lambda: a.send(id_of(d), b"")) == "EBADMSG"


def bloom(*properties: str) -> bytes:
    """A mask that asks for these, as sd-bus computed it."""
    from kbusd.kdbus import bloomhash

    mask = bytearray(64)
    for each in properties:
        bloomhash.add(mask, 8, each.encode())
    return bytes(mask)


def signal_payload(member: str, value: str, **more: Any) -> bytes:
    return payload.write(
        payload.Message(
            type=4, flags=1, cookie=1, path="/sig", interface="com.example.S", member=member,
            signature="s", body=text(value), **more,
        )
    )  # fmt: skip


def test_signals_of_dbus_clients_satisfy_masks(bus: KdbusBus) -> None:
    a, b, d = bus.kdbus(), bus.kdbus(), bus.connect()
    a.add_match(items.build(abi.ITEM_BLOOM_MASK, bloom("member:Yes", "arg0:value")))
    b.add_match(items.build(abi.ITEM_BLOOM_MASK, bloom("member:Other")))
    for member, value in (("No", "value"), ("Yes", "other"), ("Yes", "value")):
        d.signal("/sig", "com.example.S", member, "s", [value])
    got = a.recv()
    read = payload.read(got.payload)
    assert (got.src, got.dst, read.member, read.body) == (
        id_of(d), ALL, "Yes", text("value"),
    )  # fmt: skip
    assert got.flags == abi.MSG_SIGNAL
    assert not a.readable() and not b.readable()


def test_signals_of_dbus_clients_satisfy_masks_about_elements_of_arrays(bus: KdbusBus) -> None:
    """sd-bus made `argN-has` of its rule arg0has."""
    a, b, d = bus.kdbus(), bus.kdbus(), bus.connect()
    a.add_match(items.build(abi.ITEM_BLOOM_MASK, bloom("arg0-has:second", "arg2-has:/third")))
    b.add_match(items.build(abi.ITEM_BLOOM_MASK, bloom("arg0-has:third")))
    d.signal("/sig", "com.example.S", "Lists", "asuao", [["first", "second"], 2, ["/third"]])
    assert payload.read(a.recv().payload).member == "Lists"
    assert not b.readable()


def test_signals_of_kdbus_clients_reach_all_subscribers_once(bus: KdbusBus) -> None:
    a, b, d, deaf = bus.kdbus(), bus.kdbus(), bus.connect(), bus.connect()
    d.add_match("type='signal',interface='com.example.S',arg0='value'")
    d.add_match("type='signal'")
    deaf.add_match("type='signal',member='Other'")
    b.add_match(items.build(abi.ITEM_BLOOM_MASK, bloom("member:Yes")))
    filter = layout.U64.pack(0) + bloom("member:Yes", "interface:com.example.S")
    item = items.build(abi.ITEM_BLOOM_FILTER, filter)
    a.send(ALL, signal_payload("Yes", "value"), item, flags=abi.MSG_SIGNAL)
    came = d.wait_signal("Yes")
    assert (came.sender, came.args) == (f":1.{a.id}", ["value"])
    got = b.recv()
    assert (got.src, got.payload) == (a.id, signal_payload("Yes", "value"))
    a.send(ALL, b"opaque", item, flags=abi.MSG_SIGNAL)
    assert b.recv().payload == b"opaque"
    assert [m for m in d.drain() if m.interface == "com.example.S"] == []
    assert not deaf.drain()


def test_a_signal_from_a_kdbus_client_to_one_dbus_client(bus: KdbusBus) -> None:
    a, d = bus.kdbus(), bus.connect()
    item = items.build(abi.ITEM_BLOOM_FILTER, layout.U64.pack(0) + bytes(64))
    a.send(id_of(d), signal_payload("Only", "you"), item, flags=abi.MSG_SIGNAL)
    assert d.wait_signal("Only").args == ["you"]


def test_a_monitor_sees_what_kdbus_clients_say(bus: KdbusBus) -> None:
    monitor, a, b = bus.connect(), bus.kdbus(), bus.kdbus()
    monitor.driver(
        "BecomeMonitor", "asu", [["type='method_call',member='Frob'"], 0],
        interface="org.freedesktop.DBus.Monitoring",
    )  # fmt: skip
    a.send(b.id, call("Frob", "s", text("seen")), flags=EXPECT, reply=ALL >> 1)
    b.recv()
    seen = monitor.wait_call("Frob")
    assert (seen.sender, seen.args) == (f":1.{a.id}", ["seen"])


def test_a_large_body_of_a_dbus_client(bus: KdbusBus) -> None:
    a, d = bus.kdbus(size=64 << 20), bus.connect()
    for size in (50_000, 200_000, 2_000_000, 3 << 20):
        data = os.urandom(size)
        serial = d.send_call(f":1.{a.id}", "/x", "com.example.I", "Do", "ay", [data])
        got = a.recv()
        read = payload.read(got.payload)
        assert read.body[4:] == data
        memfd = sealed(answer(got, "ay", read.body))
        a.send(got.src, b"", memfd, reply=got.cookie)
        assert bytes(d.wait_reply(serial).args[0]) == data


@pytest.mark.parametrize("transport", [FILE, NODE])
def test_policy_holds_for_kdbus_clients(transport: str) -> None:
    policy = (
        '<policy context="default"><allow send_destination="*"/><allow receive_sender="*"/>'
        '<allow own="*"/><deny own="com.example.Reserved"/>'
        '<deny send_destination="com.example.Closed" send_interface="com.example.Test"'
        ' send_member="Secret"/></policy>'
    )
    bus = KdbusBus(transport, below="policy", policy=policy)
    try:
        a, b = bus.kdbus(), bus.kdbus()
        assert fails(lambda: a.acquire("com.example.Reserved")) == "EPERM"
        d = bus.connect()
        for owner in ("dbus", "kdbus"):
            if owner == "dbus":
                d.request_name("com.example.Closed")
            else:
                d.driver("ReleaseName", "s", ["com.example.Closed"])
                b.acquire("com.example.Closed")
            to = to_name("com.example.Closed")
            how: dict[str, Any] = {"flags": EXPECT, "reply": ALL >> 1}
            assert fails(lambda to=to, how=how: a.send(0, call("Secret"), to, **how)) == "EPERM"
            a.send(0, call("Public"), to, **how)
        assert payload.read(b.recv().payload).member == "Public"
    finally:
        bus.stop()


@pytest.mark.parametrize("transport", [FILE, NODE])
def test_a_kdbus_client_that_came_after_a_reload_was_judged_by_the_policy_from_before(
    transport: str,
) -> None:
    bus = KdbusBus(transport, below="reload", policy=STRICT_POLICY)
    try:
        a, d = bus.kdbus(), bus.connect()
        new = STRICT_POLICY.replace(
            "</policy>",
            '<deny send_interface="com.example.Test" send_member="Secret"/></policy>',
        )
        bus.config.write_text(bus.config.read_text().replace(STRICT_POLICY, new))
        d.driver("ReloadConfig")
        for number in range(20):
            d.add_match(f"member='M{number}'")
        how: dict[str, Any] = {"flags": EXPECT, "reply": ALL >> 1}
        for to in (a.id, id_of(d)) * 2:
            late = bus.kdbus()
            assert fails(lambda to=to, late=late: late.send(to, call("Secret"), **how)) == "EPERM"
    finally:
        bus.close_clients()
        bus.stop()


def wait_till_it_sleeps(pid: int) -> None:
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "S":
        assert time.monotonic() < deadline, "it never sleeps"
        os.sched_yield()


def test_what_was_sent_is_received_while_the_worker_does_nothing(bus: KdbusBus) -> None:
    """It has promised what RECV and FREE will be answered with; all else waits for it."""
    if Path(bus.node).is_char_device():
        pytest.skip("of CUSE nothing is promised")
    before = {each.pid for each in bus.serving()}
    b = bus.kdbus()
    (worker,) = {each.pid for each in bus.serving()} - before
    a = bus.kdbus()
    for number in range(4):  # till it knows what this client's RECV looks like
        a.send(b.id, b"before", cookie=number)
        assert b.recv().cookie == number
    for number in range(20):
        a.send(b.id, b"now", cookie=number)
        wait_till_it_sleeps(worker)
        os.kill(worker, signal.SIGSTOP)
        too_long = threading.Timer(5, os.kill, (worker, signal.SIGCONT))
        too_long.start()
        try:
            got = b.recv(seconds=0)
            assert too_long.is_alive(), "it had to answer"
        finally:
            too_long.cancel()
            os.kill(worker, signal.SIGCONT)
        assert (got.cookie, got.payload) == (number, b"now")
        assert not b.readable()
        assert fails(b.recv_now) == "EAGAIN"


def test_what_was_received_by_a_promise_counts_no_more_when_the_next_message_comes(
    bus: KdbusBus,
) -> None:
    """The receiver's worker is not woken for RECV and FREE: it has to know of them before it judges."""
    a, b = bus.kdbus(), bus.kdbus(size=1 << 16)
    for number in range(20):  # two at a time are more than a user may have in this pool
        a.send(b.id, bytes(8000), cookie=number)
        assert fails(lambda: a.send(b.id, bytes(8000))) == "ENOBUFS"
        assert b.recv().cookie == number


def test_promises_change_nothing_of_what_a_client_is_told(bus: KdbusBus) -> None:
    """All kinds of RECV by turns, against a queue that is a list."""
    chance = random.Random(7)
    a, b = bus.kdbus(), bus.kdbus()
    queue: list[tuple[int, int]] = []  # priority, cookie
    slices: list[int] = []
    cookie = 0

    def recv(flags: int, priority: int = 0) -> tuple[int, int] | str:
        try:
            got = b.do(abi.CMD_RECV, struct.pack("=2Qq4Q", flags, 0, priority, 0, 0, 0, 0))
        except OSError as error:
            return errno.errorcode[error.errno or 0]
        offset, size = struct.unpack_from("=2Q", got, 40)
        if not size:
            return 0, 0
        slices.append(offset)
        message = Message(b.pool, offset)
        return message.priority, message.cookie

    for _ in range(3000):
        kind = chance.choice(
            ("send", "send", "recv", "recv", "recv", "free", "free", "other", "poll")
        )
        if kind == "send" and len(queue) < 20:
            cookie += 1
            queue.append((chance.randrange(3), cookie))
            a.send(b.id, bytes(chance.randrange(1, 100)), cookie=cookie, priority=queue[-1][0])
        elif kind == "recv":
            assert recv(0) == (queue.pop(0) if queue else "EAGAIN")
        elif kind == "free" and slices:
            at = slices.pop(chance.randrange(len(slices)))
            b.free(at)
            assert fails(lambda at=at: b.free(at)) == "ENXIO"  # type: ignore[misc]
        elif kind == "poll":
            assert b.readable() == bool(queue)
        elif kind == "other" and queue:
            best = min(queue, key=lambda each: each[0])
            match chance.randrange(3):
                case 0:
                    assert recv(abi.RECV_PEEK) == queue[0]
                    assert recv(0) == queue.pop(0)
                    at = slices.pop()
                    if slices.pop() == at:  # the same slice is published once
                        slices.append(at)
                case 1:
                    assert recv(abi.RECV_USE_PRIORITY, 5) == best
                    queue.remove(best)
                case _:
                    assert recv(abi.RECV_DROP) == (0, 0)
                    queue.pop(0)


def test_threads_that_receive_at_once_get_each_message_once(bus: KdbusBus) -> None:
    a, b = bus.kdbus(), bus.kdbus()
    count, got = 600, []

    def receive() -> None:
        while len(got) < count:
            buffer = Buffer(struct.pack("=8Q", 64, *(0,) * 7))
            try:
                ioctl(b.fd, abi.CMD_RECV, buffer.address)
            except BlockingIOError:
                continue
            (offset,) = struct.unpack_from("=Q", buffer.bytes, 40)
            got.append(Message(b.pool, offset).cookie)
            free = Buffer(struct.pack("=4Q", 32, 0, 0, offset))
            ioctl(b.fd, abi.CMD_FREE, free.address)

    threads = [threading.Thread(target=receive) for _ in range(3)]
    for thread in threads:
        thread.start()
    for number in range(count):
        a.send(b.id, b"x", cookie=number)
    for thread in threads:
        thread.join()
    assert sorted(got) == list(range(count))


def test_a_worker_that_dies_takes_its_client_along_and_nobody_else(bus: KdbusBus) -> None:
    before = {worker.pid for worker in bus.serving()}  # of former clients, as long as those last
    a, b, c = bus.kdbus(), bus.kdbus(), bus.kdbus()
    worker = next(each for each in bus.serving() if each.pid not in before)
    os.kill(worker.pid, signal.SIGKILL)
    gone = [client for client in (a, b, c) if _is_gone(client)]
    assert len(gone) == 1
    rest = [client for client in (a, b, c) if client not in gone]
    rest[0].send(rest[1].id, b"still here")
    assert rest[1].recv(seconds=5).src in (0, rest[0].id)


def _is_gone(client: KdbusClient) -> bool:
    deadline = time.monotonic() + 1
    while time.monotonic() < deadline:
        try:
            client.list(0)
        except OSError as error:
            return error.errno in (errno.ECONNRESET, errno.ENOTCONN)
    return False
