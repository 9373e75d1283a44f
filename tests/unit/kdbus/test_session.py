"""Connections on a bus in memory: what each command does, and what the others see of it."""

from __future__ import annotations

import errno
import os
import struct

import pytest

from kbusd.kdbus import abi, items, layout, metadata, waits
from kbusd.kdbus.errors import Errno
from kbusd.kdbus.parcel import BYTES, Parcel
from kbusd.kdbus.port import Known
from kbusd.kdbus.session import FRESH_NS, Session
from kbusd.kdbus.waits import Interrupted, Wait
from tests.unit.kdbus.refused import refused
from tests.unit.kdbus.world import (
    POOL,
    SECOND,
    Client,
    Message,
    Run,
    World,
    any_id,
    any_name,
    bits,
)

READABLE = 0x41
HELLO = struct.pack("=7Q", 0, 0, 0, 0, POOL, 0, 0) + bytes(16)


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def pair(world: World) -> tuple[Client, Client]:
    return world.client(recv=abi.ATTACH_ALL), world.client(uid=1001, recv=abi.ATTACH_ALL)


def readable(client: Client) -> bool:
    return client.session.poll() & READABLE == READABLE


# -- the life of a connection ------------------------------------------------------------------


def test_hello_tells_who_one_is_and_how_signals_are_filtered(world: World) -> None:
    client = world.client(hello=False)
    assert client.session.poll() & 0x18  # POLLERR, POLLHUP
    got = client.hello()
    flags, id, size, offset, length = struct.unpack_from("=5Q", got, 40)
    assert (flags, id, size) == (0, 1, POOL)
    assert got[80:96] == client.port.uuid
    (item,) = items.split(client.pool[offset : offset + length], 0)
    assert (item.type, item.data) == (abi.ITEM_BLOOM_PARAMETER, layout.BLOOM_PARAMETER.pack(8, 1))
    client.free(offset)
    assert client.session.poll() == 0x104  # writable
    with refused("EBADFD"):
        client.hello()


@pytest.mark.parametrize("command", [abi.CMD_HELLO, abi.CMD_ENDPOINT_MAKE])
def test_a_set_up_that_a_signal_interrupted_was_in_the_way_of_the_same_begun_again(
    world: World, command: int
) -> None:
    client = world.client(hello=False)
    client.session = client.port.session = Session(client.port, owner=True)
    whole = {
        abi.CMD_HELLO: client.struct(abi.CMD_HELLO, HELLO),
        abi.CMD_ENDPOINT_MAKE: client.struct(
            abi.CMD_ENDPOINT_MAKE, b"", items.string(abi.ITEM_MAKE_NAME, "1000-more")
        ),
    }[command]
    world.looks = []
    first = client.begin(command, whole)
    again = client.begin(command, whole)  # it has its answer before we know of that
    world.looks[0].fail(Errno(errno.EINTR, "a signal came"))
    world.looks[1].done(None)
    with refused("EINTR"):
        client.end(first)
    client.end(again)


def test_of_two_who_say_hello_the_one_whom_the_bus_was_told_of_last_is_taken(world: World) -> None:
    client = world.client(hello=False)
    whole = client.struct(abi.CMD_HELLO, HELLO)
    world.looks = []
    first, second = client.begin(abi.CMD_HELLO, whole), client.begin(abi.CMD_HELLO, whole)
    world.looks[0].done(None)
    with refused("EBADFD"):
        client.end(first)
    world.looks[1].done(None)
    client.end(second)


def test_a_second_hello_while_the_first_waits_is_refused(world: World) -> None:
    client = world.client(hello=False)
    world.hold = True
    whole = client.struct(abi.CMD_HELLO, struct.pack("=7Q", 0, 0, 0, 0, POOL, 0, 0) + bytes(16))
    first = client.begin(abi.CMD_HELLO, whole)
    assert first.result is None
    with refused("EBADFD"):
        client.end(client.begin(abi.CMD_HELLO, whole))
    world.go()
    client.end(first)
    assert client.id == 1


def test_a_hello_whose_struct_took_long_to_come_is_refused_once_another_is_carried_out(
    world: World,
) -> None:
    client = world.client(hello=False)
    late = client.port.stores = Wait()
    first = client.begin(abi.CMD_HELLO, client.struct(abi.CMD_HELLO, HELLO))
    client.port.stores = None
    client.hello()
    late.done(None)
    with refused("EBADFD"):
        client.end(first)


@pytest.mark.parametrize(
    ("pool", "flags", "name"),
    [(0, 0, "EINVAL"), (100, 0, "EINVAL"), (POOL, abi.HELLO_ACTIVATOR, "EINVAL"),
     (POOL, abi.HELLO_MONITOR, "EPERM"), (POOL, 1 << 20, "EINVAL")],
)  # fmt: skip
def test_hello_that_is_refused_leaves_the_handle_fresh(
    world: World, pool: int, flags: int, name: str
) -> None:
    client = world.client(hello=False)
    with refused(name):
        client.hello(pool=pool, flags=flags)
    assert client.left[16:24] == bytes(8)  # return_flags are written all the same
    client.hello()


def test_before_hello_there_is_nothing_else(world: World) -> None:
    client = world.client(hello=False)
    with refused("EBADFD"):
        client.recv()
    with refused("ENOTTY"):
        client.end(client.begin(0x1234, bytes(8)))


def test_negotiation_changes_nothing(world: World) -> None:
    client = world.client(hello=False)
    got = client.hello(flags=abi.FLAG_NEGOTIATE)
    assert struct.unpack_from("=Q", got, 8)[0] == 15
    assert client.id == 0
    client.hello()


def test_byebye_ends_the_connection_for_all(pair: tuple[Client, Client]) -> None:
    a, b = pair
    b.acquire("com.example.B")
    b.add_match(any_id(abi.ITEM_ID_REMOVE))
    a.send(b.id)
    with refused("EBUSY"):
        b.do(abi.CMD_BYEBYE, b"")
    b.recv()
    b.do(abi.CMD_BYEBYE, b"")
    with refused("ECONNRESET"):
        b.recv()
    assert b.session.poll() & 0x10  # POLLHUP
    with refused("ENXIO"):
        a.send(b.id)
    with refused("ESRCH"):
        a.send(0, items.string(abi.ITEM_DST_NAME, "com.example.B"))


# -- messages ----------------------------------------------------------------------------------


def test_a_message_comes_whole_with_who_sent_it(pair: tuple[Client, Client]) -> None:
    a, b = pair
    a.acquire("com.example.A")
    a.send(b.id, cookie=5, priority=-3, payload=b"seven b")
    assert readable(b) and not readable(a)
    got = b.recv()
    assert (got.src_id, got.dst_id, got.cookie, got.priority) == (a.id, b.id, 5, -3)
    assert (got.payload_type, got.payload) == (abi.PAYLOAD_DBUS, b"seven b")
    assert layout.CREDS.unpack(got.all(abi.ITEM_CREDS)[0].data) == (1000,) * 8
    assert layout.PIDS.unpack(got.all(abi.ITEM_PIDS)[0].data)[0] == 100 + a.id
    assert got.all(abi.ITEM_OWNED_NAME)[0].data[8:-1] == b"com.example.A"
    assert got.all(abi.ITEM_TIMESTAMP)[0].data == layout.TIMESTAMP.pack(77, SECOND, SECOND + 7)
    assert not got.all(abi.ITEM_EXE) and not got.all(abi.ITEM_SECLABEL)  # not offered by the sender
    assert not readable(b)
    with refused("EAGAIN"):
        b.recv()


def test_who_sends_is_who_does_so_now(world: World) -> None:
    a, b = world.client(send=abi.ATTACH_ALL), world.client(recv=abi.ATTACH_ALL)

    def sent(tid: int = 9) -> tuple[bytes, int]:
        """What is told of a message of this thread, which says HELLO as 9."""
        run = Run(a.port)
        message = a.message(b.id)
        run.tid = tid
        run.memory = {
            a.STRUCT: a.struct(abi.CMD_SEND, layout.U64.pack(a.MESSAGE)),
            a.MESSAGE: message,
            a.PAYLOAD: a.payload,
        }
        waits.start(a.session.ioctl(run, abi.CMD_SEND, a.STRUCT, b""), run.ended)
        a.end(run)
        got = b.recv()
        pids = layout.PIDS.unpack(got.all(abi.ITEM_PIDS)[0].data)
        return got.all(abi.ITEM_TID_COMM)[0].data, pids[1]

    assert sent() == (b"thread\0", 9)
    a.port.comm = b"other"
    assert sent(10) == (b"other\0", 10)
    assert sent(9) == (b"other\0", 9)
    a.port.comm = b"renamed"
    asked = a.port.refreshes
    assert [sent() for _ in range(5)] == [(b"other\0", 9)] * 5
    assert a.port.refreshes == asked  # not at each
    world.now += FRESH_NS
    assert sent() == (b"renamed\0", 9)


def test_who_offers_nothing_of_the_kind_is_not_looked_at(world: World) -> None:
    a, b = world.client(), world.client(recv=abi.ATTACH_ALL)
    for _ in range(3):
        world.now += FRESH_NS
        a.send(b.id)
        assert layout.PIDS.unpack(b.recv().all(abi.ITEM_PIDS)[0].data)[1] == 9
    assert a.port.refreshes == 0


def test_ids_are_those_of_the_receivers_namespace(world: World) -> None:
    a, b = world.client(uid=1000), world.client(recv=abi.ATTACH_ALL)
    shifted = metadata.IdMap(((0, 1000, 1),))
    b.port.maps = shifted, metadata.IdMap(())
    a.send(b.id)
    got = b.recv()
    nobody = metadata.OVERFLOW_ID
    creds = layout.CREDS.unpack(got.all(abi.ITEM_CREDS)[0].data)
    assert creds == (0,) * 4 + (nobody,) * 4
    assert got.all(abi.ITEM_AUXGROUPS)[0].data == layout.U64.pack(nobody) * 2
    b.do(abi.CMD_CONN_INFO, struct.pack("=2Q", a.id, abi.ATTACH_ALL))


@pytest.mark.parametrize(("space", "expected"), [(7, (5, 5, 1)), (8, (0, 0, 0)), (0, (0, 0, 0))])
def test_pids_are_those_of_the_receivers_namespace_if_it_is_the_senders(
    world: World, space: int, expected: tuple[int, int, int]
) -> None:
    b = world.client(recv=abi.ATTACH_ALL)
    b.port.sees_pids, b.port.space = False, 7
    source = Known(
        50, 1000, frozenset(), metadata.Creds(*[0] * 8), metadata.Pids(900, 900, 800), (), None,
        space=space, inside=metadata.Pids(5, 5, 1),
    )  # fmt: skip
    found = Parcel(0, 0, b.id, abi.PAYLOAD_DBUS, 1, 0, ((BYTES, 8, 0),))
    b.session.receive(source, found, [bytes(8)], 7)
    assert layout.PIDS.unpack(b.recv().all(abi.ITEM_PIDS)[0].data) == expected


def test_metadata_is_what_the_sender_offers_and_the_receiver_asks_for(world: World) -> None:
    open_one = world.client(send=abi.ATTACH_ALL)
    curious, modest = world.client(recv=abi.ATTACH_ALL), world.client()
    for receiver in (curious, modest):
        open_one.send(receiver.id)
    got = curious.recv()
    assert got.all(abi.ITEM_TID_COMM)[0].data == b"thread\0"
    assert got.all(abi.ITEM_SECLABEL)[0].data == b"label\0"
    kinds = {item.type for item in modest.recv().items}
    assert kinds == {abi.ITEM_PAYLOAD_OFF}
    modest.do(
        abi.CMD_UPDATE, b"", items.build(abi.ITEM_ATTACH_FLAGS_RECV, layout.U64.pack(2))
    )  # CREDS
    open_one.send(modest.id)
    assert modest.recv().all(abi.ITEM_CREDS)


def test_metadata_that_has_changed_since_the_message_before_is_told_anew(world: World) -> None:
    sender, receiver = world.client(send=abi.ATTACH_ALL), world.client(recv=abi.ATTACH_ALL)

    def told(type: int) -> list[bytes]:
        sender.send(receiver.id)
        return [item.data for item in receiver.recv().all(type)]

    assert told(abi.ITEM_OWNED_NAME) == []
    sender.acquire("a.b")
    assert told(abi.ITEM_OWNED_NAME) == [layout.U64.pack(abi.NAME_PRIMARY) + b"a.b\0"]
    sender.acquire("a.b", abi.NAME_ALLOW_REPLACEMENT)
    flags = abi.NAME_PRIMARY | abi.NAME_ALLOW_REPLACEMENT
    assert told(abi.ITEM_OWNED_NAME) == [layout.U64.pack(flags) + b"a.b\0"]
    sender.release("a.b")
    assert told(abi.ITEM_OWNED_NAME) == []
    sender.port.comm = b"renamed"
    world.now += FRESH_NS
    assert told(abi.ITEM_TID_COMM) == [b"renamed\0"]
    receiver.port.maps = metadata.IdMap(((0, 1000, 1),)), metadata.SAME
    assert [layout.CREDS.unpack(data)[0] for data in told(abi.ITEM_CREDS)] == [0]
    first, second = (layout.TIMESTAMP.unpack(told(abi.ITEM_TIMESTAMP)[0])[1] for _ in "12")
    assert first == second
    world.now += 1
    assert layout.TIMESTAMP.unpack(told(abi.ITEM_TIMESTAMP)[0])[1] == second + 1
    receiver.port.sees_pids = False
    assert layout.PIDS.unpack(told(abi.ITEM_PIDS)[0]) == (0, 0, 0)


def test_a_payload_of_vectors_zeroes_and_memfds(pair: tuple[Client, Client]) -> None:
    a, b = pair
    vector = items.build(abi.ITEM_PAYLOAD_VEC, layout.VECTOR.pack(3, a.PAYLOAD))
    zeroes = items.build(abi.ITEM_PAYLOAD_VEC, layout.VECTOR.pack(10, 0))
    memfd = items.build(abi.ITEM_PAYLOAD_MEMFD, layout.MEMFD.pack(0, 5, 4, 0))
    message = a.message(b.id, vector, zeroes, memfd, vector, payload=b"")
    a.payload = b"abc"
    a.end(a.begin_send(message))
    assert b.recv().payload == b"abc" + bytes(10) + b"memfd" + b"abc"
    assert not a.port.open, "descriptors are left open"


def test_descriptors_are_told_as_incomplete(world: World) -> None:
    a, deaf, b = world.client(), world.client(), world.client(flags=abi.HELLO_ACCEPT_FD)
    fds = items.build(abi.ITEM_FDS, struct.pack("=2i", 5, 6))
    with refused("ECOMM"):
        a.send(deaf.id, fds)
    a.send(b.id, fds)
    got = b.recv(flags=abi.RECV_PEEK)
    assert b.return_flags == 0
    got = b.recv()
    assert b.return_flags == abi.RECV_RETURN_INCOMPLETE_FDS
    assert got.all(abi.ITEM_FDS)[0].data == struct.pack("=2i", -1, -1)
    assert not a.port.open


def with_memfd_and_fds() -> tuple[bytes, ...]:
    memfd = items.build(abi.ITEM_PAYLOAD_MEMFD, layout.MEMFD.pack(1, 5, 4, 0))
    return memfd, items.build(abi.ITEM_FDS, struct.pack("=2i", 5, 6))


def numbers(message: Message) -> tuple[int, ...]:
    """Of the memfds and of the descriptors."""
    memfds = [layout.MEMFD.unpack(item.data)[2] for item in message.all(abi.ITEM_PAYLOAD_MEMFD)]
    (fds,) = message.all(abi.ITEM_FDS)
    return (*memfds, *(fd for (fd,) in layout.I32.iter_unpack(fds.data)))


@pytest.fixture
def attached(world: World) -> tuple[Client, Client]:
    a, b = world.client(), world.client(flags=abi.HELLO_ACCEPT_FD)
    b.port.attached = True
    return a, b


def test_whoever_has_attached_a_socket_gets_descriptors(attached: tuple[Client, Client]) -> None:
    a, b = attached
    a.send(b.id, *with_memfd_and_fds())
    assert numbers(b.recv(flags=abi.RECV_PEEK)) == (-1, -1, -1)
    assert not b.port.handed, "descriptors for who only peeks"
    got = b.recv()
    assert b.return_flags == 0
    assert b.port.handed == [(b.offset, (2004, 2005, 2006))]
    assert not b.port.open and not a.port.open
    (segment,) = got.all(abi.ITEM_PAYLOAD_MEMFD)
    assert layout.MEMFD.unpack(segment.data)[:2] == (1, 5)
    assert b.session.awaits(b.offset) == 3
    b.session.installed(b.offset, (40, 41, 42))
    assert numbers(Message(b.pool, b.offset)) == (40, 41, 42)
    with refused("ENXIO"):
        b.session.awaits(b.offset)


def test_descriptors_that_a_socket_does_not_take_are_told_as_incomplete(
    attached: tuple[Client, Client],
) -> None:
    a, b = attached
    b.port.takes = False
    a.send(b.id, *with_memfd_and_fds())
    assert numbers(b.recv()) == (-1, -1, -1)
    assert b.return_flags == abi.RECV_RETURN_INCOMPLETE_FDS
    assert not b.port.open
    with refused("ENXIO"):
        b.session.awaits(b.offset)


def test_a_reply_that_is_waited_for_brings_descriptors(attached: tuple[Client, Client]) -> None:
    a, b = attached
    run = b.call(a.id, sync=True)
    a.send(b.id, *with_memfd_and_fds(), reply=a.recv().cookie)
    _, offset, _, flags = struct.unpack_from("=4Q", b.end(run), 24)
    assert (flags, b.port.handed) == (0, [(offset, (2004, 2005, 2006))])
    assert not b.port.open
    b.session.installed(offset, (7, 8, 9))
    assert numbers(Message(b.pool, offset)) == (7, 8, 9)


def test_a_message_that_is_freed_waits_for_no_numbers(attached: tuple[Client, Client]) -> None:
    a, b = attached
    a.send(b.id, *with_memfd_and_fds())
    b.recv()
    b.free(b.offset)
    with refused("ENXIO"):
        b.session.awaits(b.offset)


def test_descriptors_of_a_message_that_is_never_received_are_closed(
    attached: tuple[Client, Client],
) -> None:
    a, b = attached
    for _ in range(2):
        a.send(b.id, *with_memfd_and_fds())
    assert len(b.port.open) == 6
    b.recv(flags=abi.RECV_DROP)
    assert len(b.port.open) == 3
    assert b.session.has_descriptors and not a.session.has_descriptors
    b.session.end()
    assert not b.port.open and not b.session.has_descriptors


def test_sixteen_descriptors_of_one_user_wait_at_a_receiver(
    attached: tuple[Client, Client],
) -> None:
    a, b = attached
    fds = items.build(abi.ITEM_FDS, struct.pack("=16i", *range(16)))
    one = items.build(abi.ITEM_FDS, struct.pack("=i", 3))
    a.send(b.id, fds)
    with refused("EMFILE"):
        a.send(b.id, one)
    assert len(b.port.open) == 16
    b.recv()
    a.send(b.id, one)


def test_peeking_leaves_a_message_and_dropping_takes_it(pair: tuple[Client, Client]) -> None:
    a, b = pair
    a.send(b.id, cookie=1)
    a.send(b.id, cookie=2)
    assert b.recv(flags=abi.RECV_PEEK).cookie == 1
    first = b.offset
    assert b.recv(flags=abi.RECV_PEEK).cookie == 1
    assert b.offset == first
    assert b.recv(flags=abi.RECV_DROP) is None
    assert b.recv().cookie == 2
    b.free(first)
    with refused("ENXIO"):
        b.free(first)
    with refused("ENXIO"):
        b.free(8)


def test_the_most_urgent_comes_first_if_asked_for(pair: tuple[Client, Client]) -> None:
    a, b = pair
    for priority in (5, -7, 0):
        a.send(b.id, priority=priority)
    assert b.recv(flags=abi.RECV_USE_PRIORITY, priority=10).priority == -7
    with refused("EAGAIN"):
        b.recv(flags=abi.RECV_USE_PRIORITY, priority=-1)
    assert b.recv().priority == 5


def test_what_is_freed_can_be_used_again(pair: tuple[Client, Client]) -> None:
    a, b = pair
    for _ in range(100):
        a.send(b.id, payload=bytes(POOL // 8))
        assert b.recv().payload == bytes(POOL // 8)
        b.free(b.offset)


def test_a_sender_that_floods_is_refused_and_others_are_not(world: World) -> None:
    flooder, other, b = world.client(uid=1), world.client(uid=2), world.client(uid=3)
    with refused("ENOBUFS"):
        for _ in range(1000):
            flooder.send(b.id, payload=bytes(1000))
    other.send(b.id, payload=bytes(1000), cookie=9)
    cookies = set()
    while readable(b):
        cookies.add(b.recv().cookie)
        b.free(b.offset)
    assert cookies == {1, 9}
    flooder.send(b.id)


@pytest.mark.parametrize(
    ("dst", "chain", "name"),
    [
        (99, (), "ENXIO"),
        (0, (items.string(abi.ITEM_DST_NAME, "no.body"),), "ESRCH"),
        (0, (), "EDESTADDRREQ"),
        (abi.DST_ID_BROADCAST, (), "EBADMSG"),
    ],
)
def test_where_no_message_can_go(
    pair: tuple[Client, Client], dst: int, chain: tuple[bytes, ...], name: str
) -> None:
    with refused(name):
        pair[0].send(dst, *chain)


def test_a_name_and_an_id_must_agree(pair: tuple[Client, Client]) -> None:
    a, b = pair
    b.acquire("com.example.B")
    name = items.string(abi.ITEM_DST_NAME, "com.example.B")
    with refused("EREMCHG"):
        a.send(a.id, name)
    a.send(b.id, name)
    assert b.recv().all(abi.ITEM_DST_NAME)[0].text == "com.example.B"


def test_memory_that_the_caller_has_not_is_efault(pair: tuple[Client, Client]) -> None:
    a, b = pair
    for missing in (a.MESSAGE, a.PAYLOAD):
        whole = a.struct(abi.CMD_SEND, layout.U64.pack(a.MESSAGE))
        parts = {a.MESSAGE: a.message(b.id), a.PAYLOAD: b"hello"}
        del parts[missing]
        with refused("EFAULT"):
            a.end(a.begin(abi.CMD_SEND, whole, *parts.items()))
    assert not readable(b)


def test_an_unowned_name_is_started_unless_that_is_not_wanted(world: World) -> None:
    a, service = world.client(), world.client()
    world.services["com.example.S"] = service
    name = items.string(abi.ITEM_DST_NAME, "com.example.S")
    with refused("ESRCH"):
        a.send(0, name, flags=abi.MSG_NO_AUTO_START)
    a.send(0, name)
    assert service.recv().payload == b"hello"


# -- calls -------------------------------------------------------------------------------------


def test_a_call_is_answered_once(pair: tuple[Client, Client]) -> None:
    a, b = pair
    a.end(a.call(b.id, cookie=8))
    assert b.recv().flags == abi.MSG_EXPECT_REPLY
    b.send(a.id, reply=8, payload=b"answer")
    got = a.recv()
    assert (got.reply, got.payload) == (8, b"answer")
    with refused("EBADSLT"):
        b.send(a.id, reply=8)
    with refused("EBADSLT"):
        a.send(b.id, reply=8)
    assert a.session.deadline() is None


def test_a_synchronous_call_waits_for_its_reply(pair: tuple[Client, Client]) -> None:
    a, b = pair
    run = a.call(b.id, cookie=8, sync=True)
    assert run.result is None
    b.recv()
    b.send(a.id, reply=8, payload=b"answer")
    offset, size, flags = struct.unpack_from("=3Q", a.end(run), 32)
    assert not readable(a) and size and not flags
    assert Message(a.pool, offset).payload == b"answer"
    a.free(offset)
    with refused("ENXIO"):
        a.free(offset)


def test_byebye_ends_a_synchronous_call(pair: tuple[Client, Client]) -> None:
    a, b = pair
    run = a.call(b.id, cookie=8, sync=True)
    a.do(abi.CMD_BYEBYE, b"")
    with refused("ECONNRESET"):
        a.end(run)


@pytest.mark.parametrize("sync", [False, True])
def test_a_call_that_is_not_answered_in_time(pair: tuple[Client, Client], sync: bool) -> None:
    a, b = pair
    run = a.call(b.id, cookie=8, sync=sync)
    b.recv()
    world = a.world
    assert a.session.deadline() == world.now + SECOND
    world.now += SECOND
    a.session.tick()
    if sync:
        with refused("ETIMEDOUT"):
            a.end(run)
    else:
        got = a.recv()
        assert (got.src_id, got.reply) == (abi.SRC_ID_KERNEL, 8)
        assert got.all(abi.ITEM_REPLY_TIMEOUT)
    with refused("EBADSLT"):
        b.send(a.id, reply=8)
    assert not readable(a)


@pytest.mark.parametrize("sync", [False, True])
@pytest.mark.parametrize("how", ["goes", "drops"])
def test_a_callee_that_will_not_answer(pair: tuple[Client, Client], sync: bool, how: str) -> None:
    a, b = pair
    run = a.call(b.id, cookie=8, sync=sync)
    if how == "goes":
        b.session.end()
    else:
        b.recv(flags=abi.RECV_DROP)
    if sync:
        with refused("EPIPE"):
            a.end(run)
    else:
        got = a.recv()
        assert got.all(abi.ITEM_REPLY_DEAD) and got.reply == 8


def test_a_call_is_cancelled_by_a_descriptor(pair: tuple[Client, Client]) -> None:
    a, b = pair
    cancel = items.build(abi.ITEM_CANCEL_FD, layout.I32.pack(7))
    run = a.call(b.id, cancel, cookie=8, sync=True)
    (cancelled,) = a.port.watched.values()
    cancelled()
    with refused("ECANCELED"):
        a.end(run)
    assert not a.port.watched and not a.port.open
    assert a.session.deadline() is None
    b.recv()
    with refused("EBADSLT"):
        b.send(a.id, reply=8)


def test_an_interrupted_call_goes_on_waiting_when_it_is_made_again(
    pair: tuple[Client, Client],
) -> None:
    a, b = pair
    run = a.call(b.id, cookie=8, sync=True)
    assert run.waits_for is not None
    run.waits_for.fail(Interrupted())
    with pytest.raises(Interrupted):
        a.end(run)
    again = a.call(b.id, cookie=8, sync=True)
    assert again.result is None
    b.recv()
    with refused("EAGAIN"):
        b.recv()  # nothing was sent twice
    b.send(a.id, reply=8)
    a.end(again)


def test_what_was_answered_while_the_call_was_interrupted_is_in_the_queue(
    pair: tuple[Client, Client],
) -> None:
    a, b = pair
    run = a.call(b.id, cookie=8, sync=True)
    assert run.waits_for is not None
    run.waits_for.fail(Interrupted())
    b.recv()
    b.send(a.id, reply=8, payload=b"late")
    assert a.recv().payload == b"late"


def test_a_call_that_was_answered_while_it_was_interrupted_is_not_sent_again(
    pair: tuple[Client, Client],
) -> None:
    a, b = pair
    run = a.call(b.id, cookie=8, sync=True)
    assert run.waits_for is not None
    run.waits_for.fail(Interrupted())
    with pytest.raises(Interrupted):
        a.end(run)
    b.recv()
    b.send(a.id, reply=8, payload=b"late")
    again = a.call(b.id, cookie=8, sync=True)
    a.end(again)
    with refused("EAGAIN"):
        b.recv()  # nothing was sent twice
    with refused("EAGAIN"):
        a.recv()  # nor was the answer given twice
    new = a.call(b.id, cookie=8, sync=True)
    assert b.recv() and new.result is None


def test_calls_without_number_are_refused(pair: tuple[Client, Client]) -> None:
    a, _ = pair
    b = a.world.client(uid=1002, pool=16 * POOL)
    with refused("EMLINK"):
        for cookie in range(1, 1000):
            a.end(a.call(b.id, cookie=cookie))
    assert cookie == abi.MAX_PENDING_REPLIES + 1


def test_a_call_counts_till_its_caller_has_read_that_there_is_no_reply(world: World) -> None:
    a, b = world.client(), world.client(uid=1002, pool=16 * POOL)
    for cookie in range(1, abi.MAX_PENDING_REPLIES + 1):
        a.end(a.call(b.id, cookie=cookie))
    world.now += SECOND
    a.session.tick()
    with refused("EMLINK"):
        a.end(a.call(b.id, cookie=999))
    a.recv()
    b.recv(abi.RECV_DROP)
    a.end(a.call(b.id, cookie=999))
    with refused("EMLINK"):
        a.end(a.call(b.id, cookie=1000))


def test_a_call_that_could_not_be_sent_is_not_waited_for(world: World) -> None:
    a, b = world.client(), world.client()
    with refused("ENOBUFS"):
        for _ in range(1000):
            a.send(b.id)
    with refused("ENOBUFS"):
        a.end(a.call(b.id))
    assert a.session.deadline() is None


# -- names -------------------------------------------------------------------------------------


def test_names_are_owned_queued_for_and_released(pair: tuple[Client, Client]) -> None:
    a, b = pair
    assert a.acquire("com.example.N") & (abi.NAME_ACQUIRED | abi.NAME_PRIMARY) == (
        abi.NAME_ACQUIRED | abi.NAME_PRIMARY
    )
    with refused("EEXIST"):
        b.acquire("com.example.N")
    assert b.acquire("com.example.N", abi.NAME_QUEUE) & abi.NAME_IN_QUEUE
    with refused("EADDRINUSE"):
        world_client = a.world.client()
        world_client.release("com.example.N")
    with refused("ESRCH"):
        a.release("no.such.name")
    a.release("com.example.N")
    a.send(0, items.string(abi.ITEM_DST_NAME, "com.example.N"))
    assert b.recv()
    with refused("EINVAL"):
        a.acquire("nodots")


def test_the_list_of_names_and_connections(pair: tuple[Client, Client]) -> None:
    a, b = pair
    a.acquire("com.example.A")
    assert a.list(abi.LIST_NAMES) == [(a.id, "com.example.A")]
    assert a.list(abi.LIST_UNIQUE | abi.LIST_NAMES) == [(a.id, "com.example.A"), (b.id, "")]
    assert a.list(abi.LIST_UNIQUE) == [(a.id, ""), (b.id, "")]
    assert a.list(abi.LIST_QUEUED) == []


def test_what_can_be_learnt_of_a_connection(pair: tuple[Client, Client]) -> None:
    a, b = pair
    b.acquire("com.example.B")
    name = items.string(abi.ITEM_NAME, "com.example.B")
    by_name = a.do(abi.CMD_CONN_INFO, layout.U64.pack(0) + layout.U64.pack(abi.ATTACH_ANY), name)
    offset, size = struct.unpack_from("=2Q", by_name, 40)
    length, id, _ = layout.INFO.unpack_from(a.pool, offset)
    assert (length, id) == (size, b.id)
    found = {item.type for item in items.split(a.pool[offset : offset + size], layout.INFO.size)}
    assert {abi.ITEM_CREDS, abi.ITEM_PIDS, abi.ITEM_AUXGROUPS, abi.ITEM_OWNED_NAME} <= found
    assert abi.ITEM_SECLABEL not in found
    for fields, chain, errno_name in (
        ((0, 0), (), "EINVAL"),
        ((99, 0), (), "ENXIO"),
        ((0, 0), (items.string(abi.ITEM_NAME, "no.body"),), "ESRCH"),
    ):
        with refused(errno_name):
            a.do(abi.CMD_CONN_INFO, struct.pack("=2Q", *fields), *chain)


def test_who_made_the_bus(pair: tuple[Client, Client]) -> None:
    a, _ = pair
    got = a.do(abi.CMD_BUS_CREATOR_INFO, struct.pack("=2Q", 0, abi.ATTACH_CREDS))
    offset, size = struct.unpack_from("=2Q", got, 40)
    name, creds = items.split(a.pool[offset : offset + size], layout.INFO.size)
    assert (name.type, name.text) == (abi.ITEM_MAKE_NAME, "1000-test")
    assert creds.type == abi.ITEM_CREDS


# -- signals and notifications -----------------------------------------------------------------


def test_a_signal_goes_to_those_whose_mask_it_satisfies(world: World) -> None:
    a, one, two, none = (world.client() for _ in range(4))
    one.add_match(bits(abi.ITEM_BLOOM_MASK, 0b01))
    two.add_match(bits(abi.ITEM_BLOOM_MASK, 0b11))
    everything = world.client()
    everything.add_match()
    a.send(abi.DST_ID_BROADCAST, bits(abi.ITEM_BLOOM_FILTER, 0b101), flags=abi.MSG_SIGNAL)
    assert [readable(c) for c in (a, one, two, none, everything)] == [
        False, True, False, False, True,
    ]  # fmt: skip
    assert one.recv().dst_id == abi.DST_ID_BROADCAST
    one.do(abi.CMD_MATCH_REMOVE, layout.U64.pack(1))
    assert not one.port.subscribed[True]
    with refused("EBADSLT"):
        one.do(abi.CMD_MATCH_REMOVE, layout.U64.pack(1))


def test_a_signal_to_one_comes_only_if_it_matches(pair: tuple[Client, Client]) -> None:
    a, b = pair
    signal = bits(abi.ITEM_BLOOM_FILTER, 1)
    a.send(b.id, signal, flags=abi.MSG_SIGNAL)
    assert not readable(b)
    b.add_match(items.build(abi.ITEM_ID, layout.U64.pack(a.id)))
    a.send(b.id, signal, flags=abi.MSG_SIGNAL)
    assert b.recv().dst_id == b.id


def test_a_signal_without_room_is_lost_and_counted(world: World) -> None:
    a, b = world.client(), world.client(pool=16 * POOL)
    b.add_match()
    for _ in range(abi.MAX_MESSAGES_PER_USER + 3):
        a.send(abi.DST_ID_BROADCAST, bits(abi.ITEM_BLOOM_FILTER, 1), flags=abi.MSG_SIGNAL)
    b.recv()
    assert b.dropped == 3
    b.recv()
    assert b.dropped == 0


def test_what_the_bus_announces(world: World) -> None:
    watcher = world.client()  # which wants no metadata, but is told when
    kinds = (abi.ITEM_ID_ADD, abi.ITEM_ID_REMOVE)
    names = (abi.ITEM_NAME_ADD, abi.ITEM_NAME_REMOVE, abi.ITEM_NAME_CHANGE)
    for cookie, kind in enumerate(kinds):
        watcher.add_match(any_id(kind), cookie=cookie)
    for cookie, kind in enumerate(names):
        watcher.add_match(any_name(kind, "com.example.N"), cookie=10 + cookie)
    assert watcher.port.subscribed == {True: False, False: True}
    a, b = world.client(), world.client()
    a.acquire("com.example.N")
    a.acquire("com.example.Other")
    b.acquire("com.example.N", abi.NAME_QUEUE)
    a.session.end()
    b.release("com.example.N")
    seen = []
    while readable(watcher):
        got = watcher.recv()
        assert (got.src_id, got.payload_type) == (abi.SRC_ID_KERNEL, abi.PAYLOAD_KERNEL)
        (stamp,) = got.all(abi.ITEM_TIMESTAMP)
        assert layout.TIMESTAMP.unpack(stamp.data)[0] == world.now + 1
        item = got.items[0]
        if item.type in kinds:
            seen.append((item.type, layout.ID_CHANGE.unpack(item.data)[0]))
        else:
            old, _, new, _ = layout.NAME_CHANGE.unpack_from(item.data)
            assert item.data[layout.NAME_CHANGE.size :] == b"com.example.N\0"
            seen.append((item.type, old, new))
    assert seen == [
        (abi.ITEM_ID_ADD, a.id),
        (abi.ITEM_ID_ADD, b.id),
        (abi.ITEM_NAME_ADD, 0, a.id),
        (abi.ITEM_NAME_CHANGE, a.id, b.id),
        (abi.ITEM_ID_REMOVE, a.id),
        (abi.ITEM_NAME_REMOVE, b.id, 0),
    ]


def test_matches_without_number_are_refused(pair: tuple[Client, Client]) -> None:
    a, _ = pair
    with refused("EMFILE"):
        for cookie in range(1000):
            a.add_match(cookie=cookie)
    a.add_match(cookie=3, flags=abi.MATCH_REPLACE)


def test_errors_name_the_system_error() -> None:
    assert str(Errno(errno.ENXIO, "x")) == f"x ({os.strerror(errno.ENXIO)})"


def test_a_signal_to_one_who_has_no_room_is_nobodys_trouble(pair: tuple[Client, Client]) -> None:
    a, b = pair
    b.add_match()
    with refused("ENOBUFS"):
        for cookie in range(abi.MAX_MESSAGES_PER_USER):
            a.send(b.id, cookie=cookie)
    a.send(b.id, bits(abi.ITEM_BLOOM_FILTER, 0), flags=abi.MSG_SIGNAL)
    a.send(b.id, bits(abi.ITEM_BLOOM_FILTER, 0), items.build(abi.ITEM_FDS, bytes(4)), flags=4)
    b.recv()
    assert b.dropped == 0


def test_a_synchronous_call_whose_time_is_over_is_not_sent(pair: tuple[Client, Client]) -> None:
    a, b = pair
    with refused("ETIMEDOUT"):
        a.end(a.call(b.id, timeout=0, sync=True))
    assert not readable(b)


def test_a_reply_with_descriptors_that_nobody_takes_ends_the_call(
    pair: tuple[Client, Client],
) -> None:
    a, b = pair
    run = a.call(b.id, cookie=5, sync=True)
    with refused("ECOMM"):
        b.send(a.id, items.build(abi.ITEM_FDS, bytes(4)), reply=5)
    with refused("EREMOTEIO"):
        a.end(run)


def test_a_connection_has_so_many_names(world: World) -> None:
    a, b = world.client(), world.client()
    for number in range(abi.MAX_NAMES):
        a.acquire(f"a.b{number}")
    with refused("E2BIG"):
        a.acquire("a.c")
    a.acquire("a.b0")  # its own, again
    a.release("a.b0")
    a.acquire("a.c")
    b.acquire("a.b0")


def test_only_some_commands_are_for_every_kind_of_connection(world: World) -> None:
    holder, monitor = world.client(hello=False), world.client(hello=False)
    for client, kind in ((holder, abi.HELLO_POLICY_HOLDER), (monitor, abi.HELLO_MONITOR)):
        client.hello()
        client.session.kind = kind
        for command in (abi.CMD_BYEBYE, abi.CMD_SEND, abi.CMD_NAME_ACQUIRE, abi.CMD_MATCH_ADD):
            with refused("ENOTSUP"):
                client.do(command, b"")
        assert client.list(abi.LIST_UNIQUE)
    for command in (abi.CMD_RECV, abi.CMD_FREE):
        with refused("ENOTSUP"):
            holder.do(command, b"")
    with refused("EAGAIN"):
        monitor.recv()


# -- custom endpoints --------------------------------------------------------------------------


def endpoint_make(client: Client, name: str = "1000-apps") -> bytes:
    return client.do(abi.CMD_ENDPOINT_MAKE, b"", items.string(abi.ITEM_MAKE_NAME, name))


def test_a_file_that_makes_an_endpoint_updates_it_and_nothing_else(world: World) -> None:
    maker = world.client(hello=False)
    maker.session = maker.port.session = Session(maker.port, owner=True)
    policy = items.string(abi.ITEM_NAME, "a.b")
    with refused("EBADFD"):
        maker.do(abi.CMD_ENDPOINT_UPDATE, b"", policy)
    endpoint_make(maker)
    assert maker.port.made.name == "1000-apps"
    maker.do(abi.CMD_ENDPOINT_UPDATE, b"", policy)
    assert [each.name for each in maker.port.policy] == ["a.b"]
    for again in (maker.hello, lambda: endpoint_make(maker), lambda: maker.acquire("a.b")):
        with refused("EBADFD"):
            again()


@pytest.mark.parametrize("how", [{}, {"owner": True, "custom": True}])
def test_an_endpoint_is_made_by_the_privileged_at_the_buss_own_node(
    world: World, how: dict[str, bool]
) -> None:
    client = world.client(hello=False)
    client.session = client.port.session = Session(client.port, **how)
    with refused("EPERM"):
        endpoint_make(client)


def test_two_commands_do_not_set_a_file_up_at_once(world: World) -> None:
    maker = world.client(hello=False)
    maker.session = maker.port.session = Session(maker.port, owner=True)
    world.hold = True
    name = items.string(abi.ITEM_MAKE_NAME, "1000-apps")
    run = maker.begin(abi.CMD_ENDPOINT_MAKE, maker.struct(abi.CMD_ENDPOINT_MAKE, b"", name))
    for again in (maker.hello, lambda: endpoint_make(maker)):
        with refused("EBADFD"):
            again()
    world.go()
    maker.end(run)


def test_whom_one_does_not_see_is_not_there_but_is_answered(world: World) -> None:
    a, b = world.client(), world.client()
    run = b.call(a.id, cookie=9)
    b.end(run)
    world.hidden.add(b.id)
    with refused("ENXIO"):
        a.send(b.id)
    with refused("ENXIO"):
        a.send(b.id, reply=8)
    with refused("ENXIO"):
        a.do(abi.CMD_CONN_INFO, struct.pack("=2Q", b.id, 0))
    a.send(b.id, reply=9)
    assert b.recv().reply == 9


def test_who_is_behind_an_endpoint_has_the_endpoints_part_of_a_pool(world: World) -> None:
    a = world.client()
    one, two = (
        Known(
            n, 1000, frozenset(), metadata.Creds(*[0] * 8), metadata.Pids(1, 1, 0), (), None,
            custom=end,
        )
        for n, end in ((50, 0), (51, 7))
    )  # fmt: skip
    found = Parcel(0, 0, a.id, abi.PAYLOAD_DBUS, 1, 0, ((BYTES, 8000, 0),))

    def fill(source: Known) -> int:
        for number in range(100):
            try:
                a.session.receive(source, found, [bytes(8000)], 7)
            except Errno:
                return number
        return 100

    assert fill(one) and fill(two) and not fill(one)
