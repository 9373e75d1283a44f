"""The sequences of systemd 221 to 230's sd-bus on a kdbus node: what it sent with which flags and items, and
what it demanded of a message before it took it. One that fails its checks it dropped without a word, so
these are as much of the ABI as the errnos.

Source: src/libsystemd/sd-bus, bus-kernel.c and bus-control.c, as of then.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kbusd.kdbus import abi, bloom, gvariant, items, layout, payload
from tests.bus import wireformat as w
from tests.bus.daemon import STRICT_POLICY
from tests.bus.rawclient import RawClient
from tests.kdbusfs.kclient import Buffer, KdbusClient, Message
from tests.kdbusfs.test_clients import FILE, NODE, KdbusBus
from tests.kdbusfs.test_clients import bloom as mask

ANY = (1 << 64) - 1
POOL = 16 << 20
EXPECT, AUTO = abi.MSG_EXPECT_REPLY, abi.MSG_NO_AUTO_START
LAST_CAP = int(Path("/proc/sys/kernel/cap_last_cap").read_text())


@pytest.fixture(scope="module", params=[FILE, NODE])
def shared(request: pytest.FixtureRequest) -> Iterator[KdbusBus]:
    bus = KdbusBus(request.param, policy=STRICT_POLICY)
    yield bus
    bus.stop()


class SdBus(KdbusClient):
    """A connection as sd_bus_start made it, with all that can be learnt of senders."""

    def __init__(self, bus: KdbusBus) -> None:
        described = items.string(abi.ITEM_CONN_DESCRIPTION, "sd-test")
        super().__init__(
            bus.node, flags=abi.HELLO_ACCEPT_FD, send=ANY, recv=abi.ATTACH_ALL, size=POOL,
            chain=(described,),
        )  # fmt: skip
        bus.opened.append(self)
        kind, parameter = self.bloom.type, bloom.parse_parameter(self.bloom.data)
        assert (kind, parameter.size, parameter.n_hash) == (abi.ITEM_BLOOM_PARAMETER, 64, 8)
        self.cookie = 0

    def say(self, to: int | str | None, kind: int, flags: int = 0, **message: Any) -> int:
        """Send, and return the cookie. Zeroes are a vector without an address."""
        self.cookie += 1
        made = payload.Message(type=kind, cookie=self.cookie, flags=flags, **message)
        whole = payload.write(made)
        begin = body_begin(whole)
        parts = [whole[:begin], whole[begin:]]
        if made.signature.startswith("ut"):
            parts = [whole[:begin], whole[begin : begin + 4], b"", whole[begin + 8 :]]
        kept = [Buffer(part) for part in parts]
        chain = [items.string(abi.ITEM_DST_NAME, to)] if isinstance(to, str) else []
        for part in kept:
            size, address = (part.size, part.address) if part.size else (4, 0)
            chain.append(items.build(abi.ITEM_PAYLOAD_VEC, layout.VECTOR.pack(size, address)))
        kdbus_flags = payload.kdbus_flags(kind, flags)
        if kdbus_flags & abi.MSG_SIGNAL:
            chain.append(
                items.build(abi.ITEM_BLOOM_FILTER, bytes(8) + mask(f"member:{made.member}"))
            )
        until = time.monotonic_ns() + 5_000_000_000
        self.send(
            0 if isinstance(to, str) else ANY if to is None else to, b"", *chain, flags=kdbus_flags,
            cookie=self.cookie, reply=until if kdbus_flags & EXPECT else made.reply_cookie,
        )  # fmt: skip
        return self.cookie

    def hear(self) -> payload.Message:
        return self.accept(self.recv())

    def accept(self, got: Message) -> payload.Message:
        """The message, if sd-bus would not have dropped it."""
        kinds = [item.type for item in got.items]
        parts = [kind for kind in kinds if kind in (abi.ITEM_PAYLOAD_OFF, abi.ITEM_PAYLOAD_MEMFD)]
        assert parts[0] == parts[-1] == abi.ITEM_PAYLOAD_OFF  # a memfd is neither first nor last
        first = layout.VECTOR.unpack(next(i.data for i in got.items if i.type == parts[0]))[0]
        assert got.payload[3] == 2 and first >= body_begin(got.payload)
        read = payload.read(got.payload)
        assert read.cookie == got.cookie
        assert bool(read.flags & payload.NO_REPLY_EXPECTED) != bool(got.flags & EXPECT)
        assert bool(read.flags & payload.NO_AUTO_START) == bool(got.flags & AUTO)
        if not got.flags & EXPECT:
            assert read.reply_cookie == got.reply
        caps = got.item(abi.ITEM_CAPS)
        if caps is not None:  # it had no use for another number of capabilities than its kernel's
            assert struct.unpack_from("=I", caps)[0] == LAST_CAP
            assert len(caps) - 4 >= -(-LAST_CAP // 32) * 16
        return read


def body_begin(whole: bytes) -> int:
    word = gvariant.word_size(len(whole))
    return (int.from_bytes(whole[-word:], "little") + 7) & ~7


def ut(number: int, large: int) -> bytes:
    return struct.pack("<IIQ", number, 0, large)


CALL: dict[str, Any] = {"path": "/a/b", "interface": "com.example.I", "member": "Do"}


@pytest.fixture(params=["kdbus", "D-Bus"])
def peer(request: pytest.FixtureRequest, bus: KdbusBus) -> SdBus | RawClient:
    return SdBus(bus) if request.param == "kdbus" else bus.connect()


def own(peer: SdBus | RawClient, name: str) -> None:
    peer.acquire(name) if isinstance(peer, SdBus) else peer.request_name(name)


def test_a_call_in_parts_and_its_reply(bus: KdbusBus, peer: SdBus | RawClient) -> None:
    a = SdBus(bus)
    own(peer, "com.example.Sd")
    cookie = a.say("com.example.Sd", 1, **CALL, signature="ut", body=ut(5, 1 << 40))
    if isinstance(peer, SdBus):
        came = peer.hear()
        assert (came.member, came.signature, came.body) == ("Do", "ut", ut(5, 1 << 40))
        peer.say(a.id, 2, flags=1, reply_cookie=cookie, signature="ut", body=ut(6, 7))
    else:
        call = peer.wait_call("Do")
        assert call.args == [5, 1 << 40]
        peer.reply(call, "ut", (6, 7))
    reply = a.hear()
    assert (reply.type, reply.reply_cookie, reply.body) == (2, cookie, ut(6, 7))


def test_a_call_without_reply_or_start_and_a_signal(bus: KdbusBus, peer: SdBus | RawClient) -> None:
    a = SdBus(bus)
    a.add_match(items.build(abi.ITEM_BLOOM_MASK, mask("member:Changed")))
    if isinstance(peer, SdBus):
        peer.say(a.id, 1, flags=3, **CALL)
        peer.say(None, 4, flags=1, **CALL | {"member": "Changed"})
        peer.say(a.id, 4, flags=1, **CALL | {"member": "Changed"})
    else:
        peer.send_call(f":1.{a.id}", "/a/b", "com.example.I", "Do", flags=3)
        peer.signal("/a/b", "com.example.I", "Changed")
        fields = {w.PATH: "/a/b", w.INTERFACE: "com.example.I", w.MEMBER: "Changed"}
        peer.send(w.SIGNAL, fields | {w.DESTINATION: f":1.{a.id}"})
    heard = [a.hear() for _ in range(3)]
    assert [each.member for each in heard] == ["Do", "Changed", "Changed"]
    assert [each.flags & 3 for each in heard] == [3, 1, 1]
    assert not a.readable()


def test_an_error_to_a_dbus_client(bus: KdbusBus) -> None:
    a, d = SdBus(bus), bus.connect()
    serial = d.send_call(f":1.{a.id}", "/a/b", "com.example.I", "Do", "s", ["x"])
    call = a.hear()
    assert (call.cookie, call.flags & 1) == (serial, 0)
    a.say(int(d.name[3:]), 3, flags=1, reply_cookie=serial, error_name="com.example.No")
    assert d.wait(lambda m: m.reply_serial == serial).error_name == "com.example.No"


def test_a_rule_about_owners_is_many_matches_with_one_cookie(bus: KdbusBus) -> None:
    """NAME_ADD, REMOVE, CHANGE, ID_ADD and ID_REMOVE each in a command of its own; one command ends all."""
    a, b = SdBus(bus), SdBus(bus)
    name = layout.NAME_CHANGE.pack(ANY, 0, ANY, 0)
    for kind in (abi.ITEM_NAME_ADD, abi.ITEM_NAME_REMOVE, abi.ITEM_NAME_CHANGE):
        a.add_match(items.build(kind, name), cookie=9)
    for kind in (abi.ITEM_ID_ADD, abi.ITEM_ID_REMOVE):
        a.add_match(items.build(kind, layout.ID_CHANGE.pack(ANY, 0)), cookie=9)
    b.acquire("com.example.Own")
    assert a.recv().item(abi.ITEM_NAME_ADD) is not None
    SdBus(bus).byebye()
    assert a.recv().item(abi.ITEM_ID_ADD) and a.recv().item(abi.ITEM_ID_REMOVE)
    a.do(abi.CMD_MATCH_REMOVE, struct.pack("=3Q", 0, 0, 9))
    b.release("com.example.Own")
    assert not a.readable()


def test_names_that_a_service_file_can_start_are_listed_as_activators(bus: KdbusBus) -> None:
    """sd_bus_list_names asks for these alone."""
    a, d = SdBus(bus), bus.connect()
    file = bus.services / "com.example.Started.service"
    file.write_text("[D-BUS Service]\nName=com.example.Started\nExec=/bin/false\n")
    try:
        d.driver("ReloadConfig")
        assert a.entries(abi.LIST_ACTIVATORS) == [(0, "com.example.Started", abi.NAME_ACTIVATOR)]
        everything = a.entries(abi.LIST_UNIQUE | abi.LIST_NAMES | abi.LIST_QUEUED)
        assert sorted(everything) == sorted([(a.id, "", 0), (int(d.name[3:]), "", 0)])
    finally:
        file.unlink()
        d.driver("ReloadConfig")


def test_what_is_learnt_of_senders_is_changed_while_connected(bus: KdbusBus) -> None:
    a, b = SdBus(bus), SdBus(bus)
    for flags in (0, abi.ATTACH_ALL):
        a.update(items.build(abi.ITEM_ATTACH_FLAGS_RECV, layout.U64.pack(flags)))
        b.say(a.id, 1, flags=1, **CALL)
        got = a.recv()
        a.accept(got)
        assert (got.item(abi.ITEM_CREDS) is not None) == bool(flags)
