"""Commands: what each decodes to, each way in which it is refused, negotiation, what is written back.

The rules that hold for all are tested on all.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kbusd.kdbus import abi, bloom, commands, items, layout, match, metadata, policy
from kbusd.kdbus.commands import SPECS, Decoded, Spec
from kbusd.kdbus.errors import Errno, Poke
from tests.unit.kdbus.refused import refused

U64_MAX = (1 << 64) - 1
DECODERS: dict[int, Callable[[bytes], Decoded[Any]]] = {
    abi.CMD_BUS_MAKE: commands.decode_bus_make,
    abi.CMD_ENDPOINT_MAKE: commands.decode_endpoint_make,
    abi.CMD_ENDPOINT_UPDATE: commands.decode_endpoint_update,
    abi.CMD_HELLO: commands.decode_hello,
    abi.CMD_UPDATE: lambda data: commands.decode_update(data, 0),
    abi.CMD_BYEBYE: commands.decode_byebye,
    abi.CMD_FREE: commands.decode_free,
    abi.CMD_CONN_INFO: commands.decode_conn_info,
    abi.CMD_BUS_CREATOR_INFO: commands.decode_bus_creator_info,
    abi.CMD_LIST: commands.decode_list,
    abi.CMD_SEND: commands.decode_send,
    abi.CMD_RECV: commands.decode_recv,
    abi.CMD_NAME_ACQUIRE: commands.decode_name_acquire,
    abi.CMD_NAME_RELEASE: commands.decode_name_release,
    abi.CMD_MATCH_ADD: lambda data: commands.decode_match_add(data, 8),
    abi.CMD_MATCH_REMOVE: commands.decode_match_remove,
}
ALL = pytest.mark.parametrize("number", SPECS, ids=lambda number: SPECS[number].name)
RETURN_FLAGS = Poke(16, bytes(8))


def u64(*numbers: int) -> bytes:
    return struct.pack(f"={len(numbers)}Q", *numbers)


def make(number: int, *chain: bytes, flags: int = 0, more: bytes = b"") -> bytes:
    """A command: its struct with these flags and the fields in `more`, and its items."""
    return make_as(SPECS[number], *chain, flags=flags, more=more)


def make_as(spec: Spec, *chain: bytes, flags: int = 0, more: bytes = b"") -> bytes:
    # return_flags are rubbish, as they may be
    start = u64(0, flags, 99) if spec.returns_flags else u64(0, flags)
    fixed = (start + more).ljust(spec.fixed.size, b"\0")
    return items.command(fixed, chain)


NAME = items.string(abi.ITEM_NAME, "a.b")
MAKE_NAME = items.string(abi.ITEM_MAKE_NAME, "1000-x")
BLOOM = items.build(abi.ITEM_BLOOM_PARAMETER, u64(64, 1))
NEEDED = {
    abi.CMD_BUS_MAKE: (MAKE_NAME, BLOOM),
    abi.CMD_ENDPOINT_MAKE: (MAKE_NAME,),
    abi.CMD_NAME_ACQUIRE: (NAME,),
    abi.CMD_NAME_RELEASE: (NAME,),
    abi.CMD_CONN_INFO: (NAME,),
}


# -- all commands ----------------------------------------------------------------------------


@ALL
def test_the_least_that_is_valid(number: int) -> None:
    found = DECODERS[number](make(number, *NEEDED.get(number, ())))
    assert found.value is not None
    assert found.pokes == (RETURN_FLAGS,)


@ALL
def test_how_much_is_fetched(number: int) -> None:
    spec = SPECS[number]
    least = spec.fixed.size
    assert commands.total_size(spec, 0x1000, u64(least)) == least
    assert commands.total_size(spec, 0x1000, u64(32 << 10)) == 32 << 10
    with refused("EINVAL"):
        commands.total_size(spec, 0x1000, u64(least - 1))
    with refused("EMSGSIZE"):
        commands.total_size(spec, 0x1000, u64((32 << 10) + 1))
    with refused("EMSGSIZE"):
        commands.total_size(spec, 0x1000, u64(U64_MAX))
    for address in (0x1001, 0x1004):
        with refused("EFAULT"):
            commands.total_size(spec, address, u64(least))


@ALL
def test_refusals_for_all(number: int) -> None:
    decode, needed = DECODERS[number], NEEDED.get(number, ())
    known = SPECS[number].flags
    refusals = [
        make(number, *needed, flags=1 << 32),
        make(number, *needed, flags=known | (known + 1) << 20),
        make(number, *needed, items.build(0x7777, b"")),
        make(number, *needed, items.build(abi.ITEM_TIMESTAMP, bytes(24))),
        make(number, *needed, items.build(abi.ITEM_NEGOTIATE, bytes(9))),
        make(number, *needed, items.build(abi.ITEM_NEGOTIATE, b""), u64(16, abi.ITEM_NEGOTIATE)),
        make(number, *needed, u64(15, abi.ITEM_NEGOTIATE)),
        make(number, *needed, u64(U64_MAX, abi.ITEM_NEGOTIATE)),
        make(number, *needed, bytes(8)),
        u64(SPECS[number].fixed.size + 8) + make(number, *needed)[8:],
    ]
    for data in refusals:
        with pytest.raises(Errno) as caught:
            decode(data)
        assert caught.value.pokes == (RETURN_FLAGS,)
        with refused("EINVAL"):
            decode(data)
    with refused("EINVAL"):
        decode(bytes(8))


@ALL
def test_items_are_needed_and_not_repeated(number: int) -> None:
    spec, needed = SPECS[number], NEEDED.get(number, ())
    for at in range(len(spec.needed)):
        with refused("EINVAL", "without"):
            DECODERS[number](make(number, *needed[:at], *needed[at + 1 :]))
    for item in needed:
        with refused("EINVAL", "more than one"):
            DECODERS[number](make(number, *needed, item))


@ALL
def test_negotiation(number: int) -> None:
    """It needs no mandatory items, does nothing, and answers about flags and items."""
    spec = SPECS[number]
    known = sorted(spec.once | spec.many)
    asked = [abi.ITEM_NEGOTIATE, *known, 0x7777, abi.ITEM_REPLY_DEAD, 0]
    data = make(number, items.build(abi.ITEM_NEGOTIATE, u64(*asked)), flags=abi.FLAG_NEGOTIATE)
    found = DECODERS[number](data)
    assert found.value is None
    written = bytearray(data)
    for poke in found.pokes:
        written[poke.offset : poke.offset + len(poke.data)] = poke.data
    size, flags, returned = struct.unpack_from("=3Q", written)
    assert (size, flags, returned) == (len(data), spec.flags, 0)
    answers = struct.unpack_from(f"={len(asked)}Q", written, spec.fixed.size + 16)
    assert answers == (abi.ITEM_NEGOTIATE, *known, 0, 0, 0)
    with refused("EINVAL"):
        DECODERS[number](make(number, flags=abi.FLAG_NEGOTIATE | 1 << 40))


def test_items_are_negotiated_without_the_flag_too() -> None:
    asked = items.build(abi.ITEM_NEGOTIATE, u64(abi.ITEM_NAME, 0x7777))
    found = commands.decode_free(make(abi.CMD_FREE, asked, more=u64(64)))
    assert found.value == 64
    assert found.pokes == (Poke(48, bytes(8)), Poke(56, bytes(8)), RETURN_FLAGS)
    with pytest.raises(Errno) as caught:
        commands.decode_name_release(make(abi.CMD_NAME_RELEASE, asked))
    assert Poke(48, bytes(8)) in caught.value.pokes


ITEM_BYTES = st.builds(
    items.build, st.sampled_from([*sorted(abi.ITEM_TYPES), 0x7777]), st.binary(max_size=40)
)
GOOD_ITEMS = st.sampled_from(
    [
        NAME,
        MAKE_NAME,
        BLOOM,
        items.build(abi.ITEM_POLICY_ACCESS, u64(3, 1, 0)),
        items.build(abi.ITEM_POLICY_ACCESS, u64(9, 1, 0)),
        items.build(abi.ITEM_CREDS, bytes(64)),
        items.build(abi.ITEM_PIDS, bytes(24)),
        items.build(abi.ITEM_ID, u64(1)),
        items.build(abi.ITEM_BLOOM_MASK, u64(1)),
        items.build(abi.ITEM_NAME_ADD, u64(1, 0, 0, 0) + b"\xff\0"),
        items.build(abi.ITEM_CANCEL_FD, bytes(4)),
        items.build(abi.ITEM_ATTACH_FLAGS_SEND, u64(1 << 20)),
        items.build(abi.ITEM_NEGOTIATE, u64(1, 2)),
    ]
)


@ALL
@settings(max_examples=40)
@given(
    flags=st.sampled_from((0, 0, 1, 2, 3, 1 << 40, abi.FLAG_NEGOTIATE)),
    more=st.binary(max_size=88),
    chain=st.lists(GOOD_ITEMS | ITEM_BYTES, max_size=4),
    rest=st.binary(max_size=20),
    at=st.integers(0, 200),
    byte=st.none() | st.integers(0, 255),
)
def test_hostile_bytes_raise_errno_only(
    number: int,
    flags: int,
    more: bytes,
    chain: list[bytes],
    rest: bytes,
    at: int,
    byte: int | None,
) -> None:
    data = bytearray(
        make(number, *chain, rest, flags=flags, more=more[: SPECS[number].fixed.size - 24])
    )
    if byte is not None:
        data[at % len(data)] = byte
    try:
        found = DECODERS[number](bytes(data))
    except Errno as error:
        assert error.errno and error.text
        pokes = error.pokes
    else:
        pokes = found.pokes
    for poke in pokes:
        assert poke.offset >= 8 and poke.offset + len(poke.data) <= len(data)


# -- one by one ------------------------------------------------------------------------------


def test_bus_make() -> None:
    send = items.build(abi.ITEM_ATTACH_FLAGS_SEND, u64(abi.ATTACH_ANY))
    data = make(abi.CMD_BUS_MAKE, BLOOM, MAKE_NAME, send, flags=abi.MAKE_ACCESS_WORLD)
    assert commands.decode_bus_make(data).value == commands.BusMake(
        "1000-x", bloom.Parameter(64, 1), abi.MAKE_ACCESS_WORLD, abi.ATTACH_ALL
    )
    for chain in (
        (items.build(abi.ITEM_BLOOM_PARAMETER, u64(63, 1)), MAKE_NAME),
        (BLOOM, MAKE_NAME, items.build(abi.ITEM_ATTACH_FLAGS_SEND, u64(1 << 14))),
    ):
        with refused("EINVAL"):
            commands.decode_bus_make(make(abi.CMD_BUS_MAKE, *chain))
    for name, errno in (("../x", "EINVAL"), ("", "EINVAL"), ("x" * 4096, "ENAMETOOLONG")):
        bad = items.string(abi.ITEM_MAKE_NAME, name)
        with refused(errno):
            commands.decode_bus_make(make(abi.CMD_BUS_MAKE, BLOOM, bad))


def test_endpoints() -> None:
    made = commands.decode_endpoint_make(make(abi.CMD_ENDPOINT_MAKE, MAKE_NAME, flags=1))
    assert made.value == commands.EndpointMake("1000-x", abi.MAKE_ACCESS_GROUP)
    access = items.build(abi.ITEM_POLICY_ACCESS, u64(3, 1, 0))
    other = items.string(abi.ITEM_NAME, "c.*")
    data = make(abi.CMD_ENDPOINT_UPDATE, NAME, access, other, access)
    updated = commands.decode_endpoint_update(data).value
    assert updated == (
        policy.Entry("a.b", False, (policy.Access(3, 1, 0),)),
        policy.Entry("c", True, (policy.Access(3, 1, 0),)),
    )
    with refused("EINVAL"):
        commands.decode_endpoint_update(make(abi.CMD_ENDPOINT_UPDATE, access, NAME))


def hello(
    *chain: bytes, flags: int = 0, send: int = 0, recv: int = 0, pool: int = 4096
) -> commands.Hello:
    data = make(abi.CMD_HELLO, *chain, flags=flags, more=u64(send, recv, 5, 5, pool))
    found = commands.decode_hello(data).value
    assert found is not None
    return found


CREDS = items.build(abi.ITEM_CREDS, u64(1, 2, 3, 4, 5, 6, 7, 8))
PIDS = items.build(abi.ITEM_PIDS, u64(1, 2, 3))
LABEL = items.string(abi.ITEM_SECLABEL, b"label\xff")
ACTIVATOR, HOLDER, MONITOR = abi.HELLO_ACTIVATOR, abi.HELLO_POLICY_HOLDER, abi.HELLO_MONITOR


def test_hello() -> None:
    found = hello(
        CREDS,
        PIDS,
        LABEL,
        items.string(abi.ITEM_CONN_DESCRIPTION, "me"),
        flags=abi.HELLO_ACCEPT_FD,
        send=3,
        recv=abi.ATTACH_ANY,
        pool=8192,
    )
    assert (found.attach_send, found.pool_size, found.name, found.kind) == (3, 8192, None, 0)
    assert found.creds == metadata.Creds(1, 2, 3, 4, 5, 6, 7, 8)
    assert found.pids == metadata.Pids(1, 2, 3)
    assert (found.label, found.description) == (b"label\xff", b"me")
    assert commands.check_hello(found, True, False, 4096) == commands.Admitted(
        3, abi.ATTACH_ALL, ()
    )


@pytest.mark.parametrize(
    ("found", "owner", "custom", "errno"),
    [
        (hello(pool=0), True, False, "EINVAL"),
        (hello(pool=4097), True, False, "EINVAL"),
        (hello(NAME, flags=ACTIVATOR | MONITOR), True, False, "EINVAL"),
        (hello(NAME, flags=ACTIVATOR | HOLDER), True, False, "EINVAL"),
        (hello(NAME), True, False, "EINVAL"),
        (hello(NAME, flags=MONITOR), True, False, "EINVAL"),
        (hello(flags=ACTIVATOR), True, False, "EINVAL"),
        (hello(flags=HOLDER), True, False, "EINVAL"),
        (hello(items.string(abi.ITEM_NAME, ".a.b"), flags=HOLDER), True, False, "EINVAL"),
        (hello(flags=MONITOR), False, True, "EOPNOTSUPP"),
        (hello(flags=MONITOR), False, False, "EPERM"),
        (hello(NAME, flags=ACTIVATOR), False, False, "EPERM"),
        (hello(NAME, flags=HOLDER), False, True, "EPERM"),
        (hello(CREDS), False, False, "EPERM"),
        (hello(PIDS), False, False, "EPERM"),
        (hello(items.string(abi.ITEM_SECLABEL, "")), False, False, "EPERM"),
        (hello(send=1 << 14), True, False, "EINVAL"),
        (hello(recv=1 << 63), True, False, "EINVAL"),
        (hello(items.string(abi.ITEM_NAME, "a.*"), flags=ACTIVATOR), True, False, "EINVAL"),
    ],
)
def test_refused_hellos(found: commands.Hello, owner: bool, custom: bool, errno: str) -> None:
    with refused(errno):
        commands.check_hello(found, owner, custom, 4096)


def test_hello_brings_policy() -> None:
    access = items.build(abi.ITEM_POLICY_ACCESS, u64(1, 2, 1000))
    for flags, name in ((ACTIVATOR, "a.b"), (HOLDER, "a.*")):
        found = hello(items.string(abi.ITEM_NAME, name), access, flags=flags)
        entries = commands.check_hello(found, True, False, 4096).policy
        assert entries == (
            policy.Entry(name.removesuffix(".*"), name == "a.*", (policy.Access(1, 2, 1000),)),
        )


def test_update() -> None:
    send = items.build(abi.ITEM_ATTACH_FLAGS_SEND, u64(abi.ATTACH_ANY))
    recv = items.build(abi.ITEM_ATTACH_FLAGS_RECV, u64(1))
    access = items.build(abi.ITEM_POLICY_ACCESS, u64(3, 0, 0))

    def update(kind: int, *chain: bytes) -> commands.Update | None:
        return commands.decode_update(make(abi.CMD_UPDATE, *chain), kind).value

    assert update(0) == commands.Update(None, None, None)
    assert update(0, send, recv) == commands.Update(abi.ATTACH_ALL, 1, None)
    assert update(MONITOR, send, recv) == commands.Update(abi.ATTACH_ALL, 1, None)
    assert update(ACTIVATOR, recv) == commands.Update(None, 1, None)
    held = update(HOLDER, NAME, access)
    assert held is not None and held.policy == (
        policy.Entry("a.b", False, (policy.Access(3, 0, 0),)),
    )
    for kind, item in ((ACTIVATOR, send), (HOLDER, send), (HOLDER, recv), (0, NAME), (0, access)):
        with refused("EOPNOTSUPP"):
            update(kind, item)
    with refused("EINVAL"):
        update(0, items.build(abi.ITEM_ATTACH_FLAGS_RECV, u64(abi.ATTACH_ALL + 1)))
    with refused("E2BIG"):
        update(HOLDER, NAME, access, NAME)


def test_info_and_lists() -> None:
    def info(*chain: bytes, id: int = 0, flags: int = 0) -> commands.Info | None:
        return commands.decode_conn_info(make(abi.CMD_CONN_INFO, *chain, more=u64(id, flags))).value

    assert info(id=7, flags=abi.ATTACH_ANY) == commands.Info(7, None, abi.ATTACH_ALL)
    assert info(NAME, id=7) == commands.Info(7, "a.b", 0)
    assert info(items.string(abi.ITEM_NAME, b"\xff")) == commands.Info(0, "ÿ", 0)
    with refused("EINVAL"):
        info()
    with refused("EINVAL"):
        info(id=7, flags=1 << 14)
    creator = make(abi.CMD_BUS_CREATOR_INFO, more=u64(0, 5))
    assert commands.decode_bus_creator_info(creator).value == 5
    assert commands.decode_list(make(abi.CMD_LIST, flags=5)).value == 5


def test_send_and_recv() -> None:
    cancel = items.build(abi.ITEM_CANCEL_FD, struct.pack("=i", -1))
    data = make(abi.CMD_SEND, cancel, flags=abi.SEND_SYNC_REPLY, more=u64(0x1000))
    assert commands.decode_send(data).value == commands.Send(1, 0x1000, -1)
    assert commands.negotiated_message(data) == 0x1000
    recv = make(abi.CMD_RECV, flags=abi.RECV_USE_PRIORITY, more=struct.pack("=q", -5))
    assert commands.decode_recv(recv).value == commands.Recv(abi.RECV_USE_PRIORITY, -5)
    recv = make(abi.CMD_RECV, flags=abi.RECV_PEEK, more=struct.pack("=q", -5))
    assert commands.decode_recv(recv).value == commands.Recv(abi.RECV_PEEK, None)
    both = abi.RECV_DROP | abi.RECV_USE_PRIORITY
    with refused("EINVAL"):
        commands.decode_recv(make(abi.CMD_RECV, flags=both))


def test_a_message_is_parsed_as_a_command_is() -> None:
    data = make_as(commands.MESSAGE, flags=abi.MSG_SIGNAL)
    assert commands.parse_message(data).pokes == ()  # it has no return_flags
    with refused("EINVAL"):
        commands.parse_message(make_as(commands.MESSAGE, flags=8))
    with pytest.raises(Errno) as caught:
        commands.parse_message(make_as(commands.MESSAGE, flags=abi.FLAG_NEGOTIATE))
    assert caught.value.pokes == (Poke(8, u64(7)),)


def test_names_and_matches() -> None:
    flags = abi.NAME_QUEUE | abi.NAME_REPLACE_EXISTING
    acquire = make(abi.CMD_NAME_ACQUIRE, NAME, flags=flags)
    assert commands.decode_name_acquire(acquire).value == commands.NameAcquire("a.b", flags)
    returned = abi.NAME_QUEUE | abi.NAME_IN_QUEUE | abi.NAME_PRIMARY | abi.NAME_ACQUIRED
    again = commands.decode_name_acquire(make(abi.CMD_NAME_ACQUIRE, NAME, flags=returned))
    assert again.value == commands.NameAcquire("a.b", abi.NAME_QUEUE)
    asked = make(abi.CMD_NAME_ACQUIRE, NAME, flags=returned | abi.FLAG_NEGOTIATE)
    known = abi.NAME_REPLACE_EXISTING | abi.NAME_ALLOW_REPLACEMENT | abi.NAME_QUEUE
    assert Poke(8, u64(known)) in commands.decode_name_acquire(asked).pokes
    with refused("EINVAL"):
        commands.decode_name_acquire(
            make(abi.CMD_NAME_ACQUIRE, NAME, flags=returned | abi.NAME_ACTIVATOR)
        )
    for name in ("foo", ".foo.bar", "a.*"):
        bad = items.string(abi.ITEM_NAME, name)
        with refused("EINVAL"):
            commands.decode_name_acquire(make(abi.CMD_NAME_ACQUIRE, bad))
        released = commands.decode_name_release(make(abi.CMD_NAME_RELEASE, bad))
        assert released.value == name  # for the registry not to know
    chain = (
        items.build(abi.ITEM_BLOOM_MASK, u64(1, 2)),
        items.build(abi.ITEM_ID, u64(7)),
        items.build(abi.ITEM_NEGOTIATE, b""),
        items.build(abi.ITEM_ID, u64(8)),
    )
    data = make(abi.CMD_MATCH_ADD, *chain, flags=abi.MATCH_REPLACE, more=u64(55))
    assert commands.decode_match_add(data, 8).value == commands.MatchAdd(
        55, True, (bloom.Mask((u64(1), u64(2))), match.Source(7), match.Source(8))
    )
    with refused("EDOM"):
        commands.decode_match_add(data, 64)
    assert commands.decode_match_remove(make(abi.CMD_MATCH_REMOVE, more=u64(55))).value == 55


def test_results_land_in_their_fields() -> None:
    def after(number: int, pokes: tuple[Poke, ...]) -> tuple[int, ...]:
        data = bytearray(SPECS[number].fixed.size)
        for poke in pokes:
            data[poke.offset : poke.offset + len(poke.data)] = poke.data
        return SPECS[number].fixed.unpack(data)

    uuid = bytes(range(16))
    assert after(abi.CMD_HELLO, commands.hello_result(1, 2, 3, 4, uuid)) == (
        (0, 0, 0, 0, 0) + (1, 2, 0, 3, 4) + (uuid,)
    )
    assert after(abi.CMD_CONN_INFO, commands.info_result(1, 2)) == (0, 0, 0, 0, 0, 1, 2)
    assert after(abi.CMD_LIST, commands.list_result(1, 2)) == (0, 0, 0, 1, 2)
    assert after(abi.CMD_SEND, commands.send_result(1, 2, 3)) == (0, 0, 0, 0, 1, 2, 3)
    assert after(abi.CMD_RECV, commands.recv_result(1, 2, 3, 0)) == (0, 0, 0, 0, 0, 1, 2, 3)
    lost = after(abi.CMD_RECV, commands.recv_result(1, 2, 3, 4))
    assert lost == (0, 0, abi.RECV_RETURN_DROPPED_MSGS, 0, 4, 1, 2, 3)
    assert after(abi.CMD_NAME_ACQUIRE, (commands.return_flags(5),)) == (0, 0, 5)
    item = items.split(commands.bloom_item(bloom.Parameter(64, 2)), 0)
    assert [(each.type, each.data) for each in item] == [(abi.ITEM_BLOOM_PARAMETER, u64(64, 2))]
    assert layout.HELLO.size == 96
