"""What a connection of kdbus is and may do, by kind, against a real bus."""

from __future__ import annotations

import contextlib
import os
import signal
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kbusd.kdbus import abi, items, layout
from tests.bus import procs
from tests.bus.daemon import STRICT_POLICY
from tests.kdbusfs.kclient import LIBC, KdbusClient, Message
from tests.kdbusfs.test_clients import (
    EXPECT,
    KdbusBus,
    answer,
    call,
    fails,
    text,
    to_name,
)

# Mounting takes root; where we are not, the tests run in the guest.
pytestmark = [] if os.geteuid() == 0 else [pytest.mark.guest]

LISTED = abi.LIST_NAMES | abi.LIST_QUEUED | abi.LIST_ACTIVATORS
PRIMARY, IN_QUEUE = abi.NAME_PRIMARY, abi.NAME_IN_QUEUE
NAME = "com.example.Name"
CLONE_NEWPID, CLONE_NEWUSER = 0x20000000, 0x10000000


@pytest.fixture(scope="module")
def shared() -> Iterator[KdbusBus]:
    # One that users may open whom its policy then lets in.
    connect = (
        '<policy context="default"><allow user="*"/><allow eavesdrop="true"/>'
        '<allow send_destination="*" eavesdrop="true"/></policy>'
    )
    bus = KdbusBus("kdbusfs", type_="system", policy=STRICT_POLICY + connect)
    yield bus
    bus.stop()


def signal_filter() -> bytes:
    """A bloom filter that no mask stands against."""
    return items.build(abi.ITEM_BLOOM_FILTER, bytes(8 + 64))


def any_name(kind: int) -> bytes:
    change = layout.NAME_CHANGE.pack(abi.MATCH_ID_ANY, 0, abi.MATCH_ID_ANY, 0)
    return items.build(kind, change)


# -- names -------------------------------------------------------------------------------------


def test_everybody_sees_who_owns_and_who_waits_and_how(bus: KdbusBus) -> None:
    a, b, d = bus.kdbus(), bus.kdbus(), bus.connect()
    assert a.acquire(NAME, abi.NAME_ALLOW_REPLACEMENT) & abi.NAME_ACQUIRED
    assert b.acquire(NAME, abi.NAME_QUEUE) & IN_QUEUE
    d.request_name(NAME)
    waiting = abi.NAME_QUEUE | IN_QUEUE
    for each in (a, b):
        assert each.entries(LISTED) == [
            (a.id, NAME, PRIMARY | abi.NAME_ALLOW_REPLACEMENT),
            (b.id, NAME, waiting),
            (int(d.name[3:]), NAME, waiting),
        ]
        assert [entry[0] for entry in each.entries(abi.LIST_NAMES)] == [a.id]
    assert a.acquire(NAME) == PRIMARY  # nothing acquired
    assert b.entries(abi.LIST_NAMES) == [(a.id, NAME, PRIMARY)]  # the new flags hold
    b.add_match(any_name(abi.ITEM_NAME_CHANGE))
    a.release(NAME)
    change = b.recv().item(abi.ITEM_NAME_CHANGE)
    assert change
    queued = PRIMARY | abi.NAME_QUEUE
    assert layout.NAME_CHANGE.unpack_from(change) == (a.id, PRIMARY, b.id, queued)
    # One that comes later learns the same from the snapshot.
    assert bus.kdbus().entries(LISTED)[0] == (b.id, NAME, queued)


def test_who_waits_for_a_name_and_asks_again_without_queue_waits_no_more(bus: KdbusBus) -> None:
    a, b = bus.kdbus(), bus.kdbus()
    a.acquire(NAME)
    assert b.acquire(NAME, abi.NAME_QUEUE) & IN_QUEUE
    assert b.acquire(NAME, abi.NAME_ALLOW_REPLACEMENT) == abi.NAME_ALLOW_REPLACEMENT
    assert a.entries(LISTED) == [(a.id, NAME, PRIMARY)]
    assert fails(lambda: b.acquire(NAME)) == "EEXIST"


def test_a_connection_hears_itself_if_its_matches_say_so(bus: KdbusBus) -> None:
    a, b = bus.kdbus(), bus.kdbus()
    for each in (a, b):
        each.add_match()
    a.send(abi.DST_ID_BROADCAST, b"to all", signal_filter(), flags=abi.MSG_SIGNAL)
    for each in (a, b):
        got = each.recv()
        assert (got.src, got.payload) == (a.id, b"to all")
        assert not each.readable()


def test_what_the_bus_announces_has_its_place_among_all_messages(bus: KdbusBus) -> None:
    a, b, c = bus.kdbus(), bus.kdbus(recv=abi.ATTACH_TIMESTAMP), bus.kdbus(recv=0)
    for each in (b, c):
        each.add_match(any_name(abi.ITEM_NAME_ADD))
    a.send(b.id, b"before")
    a.acquire(NAME)
    a.send(b.id, b"after")
    before, added, after = [b.recv() for _ in range(3)]
    numbers = [seqnum(each) for each in (before, added, after)]
    assert 0 < numbers[0] < numbers[1] < numbers[2]
    assert seqnum(c.recv()) == numbers[1]  # asked for or not
    b.send(a.id, b"?", flags=abi.MSG_EXPECT_REPLY, cookie=1, reply=time.monotonic_ns() + 1)
    assert seqnum(b.recv(seconds=5)) > numbers[2]


def seqnum(got: Message) -> int:
    stamp = got.item(abi.ITEM_TIMESTAMP)
    assert stamp
    number: int = layout.TIMESTAMP.unpack(stamp)[0]
    return number


def test_a_broadcast_has_arrived_when_send_returns(bus: KdbusBus) -> None:
    for _ in range(5):  # each is the first contact of two workers
        a, b = bus.kdbus(), bus.kdbus()
        b.add_match()
        a.send(abi.DST_ID_BROADCAST, bytes(1000), signal_filter(), flags=abi.MSG_SIGNAL)
        assert fails(b.byebye) == "EBUSY"
        assert len(b.recv().payload) == 1000
        b.byebye()


def test_a_message_tells_its_senders_parent(bus: KdbusBus) -> None:
    a, b = bus.kdbus(send=abi.ATTACH_PIDS), bus.kdbus(recv=abi.ATTACH_PIDS)
    a.send(b.id, b"")
    pids = b.recv().item(abi.ITEM_PIDS)
    assert pids
    assert layout.PIDS.unpack(pids) == (os.getpid(), os.getpid(), os.getppid())


def test_no_name_is_released_that_nobody_can_have(bus: KdbusBus) -> None:
    a = bus.kdbus()
    for name in ("com", ".com.example", "com.example.*"):
        assert fails(lambda name=name: a.release(name)) == "ESRCH"
        assert fails(lambda name=name: a.acquire(name)) == "EINVAL"


# -- activators --------------------------------------------------------------------------------

OWN, TALK = abi.POLICY_OWN, abi.POLICY_TALK
USER, WORLD = abi.POLICY_ACCESS_USER, abi.POLICY_ACCESS_WORLD
AUTO = abi.MSG_NO_AUTO_START


def brought(name: str, *accesses: tuple[int, int, int]) -> tuple[bytes, ...]:
    """The items of a policy."""
    packed = (layout.POLICY_ACCESS.pack(*each) for each in accesses)
    return (
        items.string(abi.ITEM_NAME, name),
        *(items.build(abi.ITEM_POLICY_ACCESS, each) for each in packed),
    )


def activator(bus: KdbusBus, *accesses: tuple[int, int, int], name: str = NAME) -> KdbusClient:
    return bus.kdbus(flags=abi.HELLO_ACTIVATOR, chain=brought(name, *accesses))


def test_an_activator_has_a_name_while_nobody_else_has(bus: KdbusBus) -> None:
    watcher = bus.kdbus()
    for kind in (abi.ITEM_NAME_ADD, abi.ITEM_NAME_CHANGE, abi.ITEM_NAME_REMOVE):
        watcher.add_match(any_name(kind))
    a, b, d = activator(bus), bus.kdbus(), bus.connect()
    held = abi.NAME_ACTIVATOR | PRIMARY
    assert b.entries(abi.LIST_ACTIVATORS) == [(a.id, NAME, held)]
    assert b.entries(abi.LIST_NAMES) == []
    assert a.id not in b.list(abi.LIST_UNIQUE)
    assert d.driver("GetNameOwner", "s", [NAME]) == [f":1.{a.id}"]
    assert fails(lambda: b.send(0, b"x", to_name(NAME), flags=AUTO)) == "EADDRNOTAVAIL"
    assert fails(lambda: b.send(a.id, b"x")) == "ENXIO"
    assert fails(lambda: activator(bus)) == "EEXIST"
    for number in range(3):
        b.send(0, b"%d" % number, to_name(NAME), cookie=number)
    assert a.readable(5)
    b.acquire(NAME)  # whoever asks replaces an activator
    assert [b.recv().payload for _ in range(3)] == [b"0", b"1", b"2"]
    assert not a.readable()
    assert b.entries(LISTED) == [
        (a.id, NAME, abi.NAME_ACTIVATOR | IN_QUEUE),
        (b.id, NAME, PRIMARY),
    ]
    d.request_name(NAME, 0)  # waits
    b.release(NAME)
    d.driver("ReleaseName", "s", [NAME])
    a.close()
    seen = []
    for _ in range(5):
        ((kind, data), _) = ((i.type, i.data) for i in watcher.recv().items)
        old, old_flags, new, new_flags = layout.NAME_CHANGE.unpack_from(data)
        seen.append((kind, old, old_flags, new, new_flags))
    add, change, remove = abi.ITEM_NAME_ADD, abi.ITEM_NAME_CHANGE, abi.ITEM_NAME_REMOVE
    other = int(d.name[3:])
    assert seen == [
        (add, 0, 0, a.id, held),
        (change, a.id, held, b.id, PRIMARY),
        (change, b.id, PRIMARY, other, PRIMARY | abi.NAME_QUEUE),
        (change, other, PRIMARY | abi.NAME_QUEUE, a.id, held),
        (remove, a.id, held, 0, 0),
    ]


def test_what_nobody_received_goes_back_to_the_activator(bus: KdbusBus) -> None:
    a, b, c = activator(bus), bus.kdbus(), bus.kdbus()
    b.acquire(NAME)
    c.send(0, b"by name", to_name(NAME))
    c.send(b.id, b"by id")
    b.release(NAME)
    got = a.recv()
    assert (got.payload, got.src) == (b"by name", c.id)
    assert b.recv().payload == b"by id" and not b.readable()
    c.send(0, b"again", to_name(NAME))
    c.close()  # a sender need not be there any more
    b.acquire(NAME)
    assert b.readable(5)
    b.close()  # without having read it
    assert a.recv().payload == b"again"


@pytest.mark.parametrize("how", ["released", "closed"])
@pytest.mark.parametrize("looks", ["recv", "poll"])
def test_what_was_left_unread_is_back_when_the_name_is(bus: KdbusBus, how: str, looks: str) -> None:
    """All of it, in the order in which it was sent, whoever sent it: nobody has to wait for it."""
    a, senders = activator(bus), [bus.kdbus() for _ in range(3)]
    payloads = [b"%d" % number for number in range(12)]
    for _ in range(3):
        b = bus.kdbus()
        b.acquire(NAME)
        for number, payload in enumerate(payloads):
            senders[number * 7 % 3].send(0, payload, to_name(NAME), cookie=number)
        if how == "released":
            b.release(NAME)
        else:
            b.close()
        if looks == "poll":
            assert a.readable()
        assert [a.recv_now().payload for _ in payloads] == payloads
        assert fails(a.recv_now) == "EAGAIN" and not a.readable()


def test_a_service_takes_what_its_activator_had_in_order(bus: KdbusBus) -> None:
    a, b, senders = activator(bus), bus.kdbus(), [bus.kdbus() for _ in range(3)]
    payloads = [b"%d" % number for number in range(12)]
    for number, payload in enumerate(payloads):
        senders[number * 7 % 3].send(0, payload, to_name(NAME), cookie=number)
    assert a.readable()
    b.acquire(NAME)
    assert [b.recv_now().payload for _ in payloads] == payloads


def pids(bus: KdbusBus) -> set[int]:
    return {worker.pid for worker in bus.serving()}


def test_an_activator_waits_for_no_sender_whose_worker_hangs(bus: KdbusBus) -> None:
    a, b, d = activator(bus), bus.kdbus(), bus.kdbus()
    b.acquire(NAME)
    others = pids(bus)
    c = bus.kdbus()
    (hung,) = pids(bus) - others
    c.send(0, b"hangs", to_name(NAME))
    d.send(0, b"does not", to_name(NAME))
    os.kill(hung, signal.SIGSTOP)
    b.release(NAME)
    before = signal.signal(signal.SIGALRM, lambda *_: None)
    signal.siginterrupt(signal.SIGALRM, True)
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    assert fails(a.recv_now) == "EINTR"  # nor does a signal to it
    signal.signal(signal.SIGALRM, before)
    assert a.recv_now().payload == b"does not"
    assert fails(a.recv_now) == "EAGAIN"
    os.kill(hung, signal.SIGCONT)
    assert a.recv().payload == b"hangs"


@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("sender", ["kdbus", "dbus"])
def test_what_was_sent_to_a_name_was_lost_if_its_sender_went_just_while_that_moved(
    bus: KdbusBus, sender: str, back: bool
) -> None:
    """Whose worker is stopped stands for one that ends before it has seen that the name has moved."""
    a, b = activator(bus), bus.kdbus()
    others = pids(bus)
    c = bus.kdbus() if sender == "kdbus" else bus.connect()
    if back:
        b.acquire(NAME)
    if isinstance(c, KdbusClient):
        (hung,) = pids(bus) - others
        id, sent = c.id, b"still here"
        c.send(0, sent, to_name(NAME))
    else:
        hung = bus.worker_of(c).pid
        id, sent = int(c.name[3:]), b"StillHere"
        c.send_call(NAME, "/x", "com.example.I", "StillHere")
        procs.eventually((b if back else a).readable, "it is there")
    os.kill(hung, signal.SIGSTOP)
    moves = threading.Thread(target=lambda: b.release(NAME) if back else b.acquire(NAME))
    moves.start()
    owner, d = a if back else b, bus.kdbus()
    procs.eventually(lambda: list(d.list(abi.LIST_NAMES)) == ([] if back else [b.id]), "it moves")
    os.kill(hung, signal.SIGKILL)
    moves.join()
    got = owner.recv()
    assert sent in got.payload and got.src == id
    assert not owner.readable(0)


@pytest.mark.parametrize("sender", ["kdbus", "dbus"])
def test_what_its_sender_has_sent_again_comes_once_though_he_goes_then(
    bus: KdbusBus, sender: str
) -> None:
    activator(bus)
    b, c, d = bus.kdbus(), bus.kdbus(), bus.connect()
    if sender == "kdbus":
        c.send(0, b"once", to_name(NAME))
    else:
        d.send_call(NAME, "/x", "com.example.I", "Do")
        d.driver("GetId")  # its call is on the way
    b.acquire(NAME)
    c.close()
    d.close()
    gone = {c.id, int(d.name[3:])}
    procs.eventually(lambda: gone.isdisjoint(b.list(abi.LIST_UNIQUE)), "they are gone")
    assert b.recv_now() and fails(b.recv_now) == "EAGAIN"


def test_calls_to_an_activator_are_answered_by_the_service(bus: KdbusBus) -> None:
    a, b, c, d = activator(bus), bus.kdbus(), bus.kdbus(), bus.connect()
    until = time.monotonic_ns() + 60_000_000_000
    c.send(0, b"ask", to_name(NAME), flags=EXPECT, reply=until, cookie=7)
    serial = d.send_call(NAME, "/x", "com.example.I", "Do")
    deadline = time.monotonic() + 5
    while a.entries(LISTED) and not a.readable(0.1):
        assert time.monotonic() < deadline
    d.driver("GetId")  # its call is on the way
    b.acquire(NAME)
    asked = {message.src: message for message in (b.recv(), b.recv())}
    b.send(c.id, b"answer", reply=7)
    assert c.recv().payload == b"answer"
    other = int(d.name[3:])
    b.send(other, answer(asked[other], "s", text("done")), reply=asked[other].cookie)
    assert d.wait_reply(serial).args == ["done"]


def test_a_dbus_client_that_takes_a_name_gets_what_its_activator_had(bus: KdbusBus) -> None:
    activator(bus)
    c, d, taker = bus.kdbus(), bus.connect(), bus.connect()
    until = time.monotonic_ns() + 60_000_000_000
    first = call("First", "s", text("1"), cookie=7)
    c.send(0, first, to_name(NAME), flags=EXPECT, reply=until, cookie=7)
    serial = d.send_call(NAME, "/x", "com.example.I", "Second")
    d.driver("GetId")  # its call is on the way
    c.send(0, call("Third", cookie=8, flags=1), to_name(NAME), cookie=8)
    taker.request_name(NAME)
    got, third, second = (taker.wait_call(each) for each in ("First", "Third", "Second"))
    assert got.sender == third.sender == f":1.{c.id}"
    assert (got.args, second.sender) == (["1"], d.name)
    taker.reply(got, "s", ["one"])
    taker.reply(second, "s", ["two"])
    assert b"one" in c.recv().payload
    assert d.wait_reply(serial).args == ["two"]


def test_a_monitor_and_an_eavesdropper_see_once_what_moves_with_its_name(bus: KdbusBus) -> None:
    monitor, nosy = bus.connect(), bus.connect()
    nosy.add_match(f"eavesdrop='true',type='method_call',destination='{NAME}'")
    a, c, d, service, taker = activator(bus), bus.kdbus(), bus.connect(), bus.kdbus(), bus.connect()
    monitor.driver(
        "BecomeMonitor", "asu", [["type='method_call',path='/test'"], 0],
        interface="org.freedesktop.DBus.Monitoring",
    )  # fmt: skip
    c.send(0, call("OfKdbus", cookie=1, flags=1), to_name(NAME))
    d.send_call(NAME, "/test", "com.example.Test", "OfDbus")
    d.driver("GetId")  # its call is on the way
    assert a.readable(5)
    service.acquire(NAME)
    service.release(NAME)
    taker.request_name(NAME)
    for member in ("OfKdbus", "OfDbus"):
        taker.wait_call(member)
    taker.driver("ReleaseName", "s", [NAME])
    for each, members in ((c, "LastOfKdbus"), (d, "LastOfDbus")):
        if each is c:
            c.send(0, call(members, cookie=2, flags=1), to_name(NAME), cookie=2)
        else:
            d.send_call(NAME, "/test", "com.example.Test", members)
    # Between kdbus clients nobody eavesdrops.
    for client, expected in (
        (monitor, ["LastOfDbus", "LastOfKdbus", "OfDbus", "OfKdbus"]),
        (nosy, ["LastOfDbus", "OfDbus", "OfKdbus"]),
    ):
        seen = [client.wait(lambda m: m.type == 1 and m.path == "/test").member for _ in expected]
        assert sorted(seen) == expected


@pytest.mark.skipif(os.geteuid() != 0, reason="acts as another user")
@pytest.mark.parametrize("how", ["released", "closed", "killed"])
def test_what_an_ordinary_users_service_left_goes_back_to_the_activator(
    bus: KdbusBus, how: str
) -> None:
    a = activator(bus, (WORLD, OWN, 0))
    c, d = bus.kdbus(), bus.connect()
    taken, go_on = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:

        def serve() -> None:
            service = KdbusClient(bus.node)
            service.acquire(NAME)
            os.write(taken[1], b"!")
            os.read(go_on[0], 1)
            assert service.recv().payload == b"read"
            if how == "released":
                service.release(NAME)
            elif how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)

        with contextlib.suppress(BaseException):
            os.setgroups([])
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
            serve()
        os._exit(0)
    assert os.read(taken[0], 1)
    for payload in (b"read", b"unread"):
        c.send(0, payload, to_name(NAME))
    serial = d.send_call(NAME, "/x", "com.example.I", "Unread")
    d.driver("GetId")
    os.write(go_on[1], b"!")
    os.waitpid(pid, 0)
    got = [a.recv(), a.recv()]
    assert {each.src for each in got} == {c.id, int(d.name[3:])}
    assert b"unread" in [each.payload for each in got]
    assert not a.readable()
    taker = bus.connect()
    c.send(0, call("Last", flags=1), to_name(NAME))
    taker.request_name(NAME)
    assert (
        taker.wait(lambda m: m.type == 1).member == "Last"
    )  # what the activator's client has read does not move
    taker.close()
    assert serial
    for fd in (*taken, *go_on):
        os.close(fd)


def test_only_the_privileged_are_more_than_ordinary(bus: KdbusBus) -> None:
    def unprivileged(**how: object) -> Callable[[], object]:
        return lambda: bus.kdbus(**how)

    kinds = (abi.HELLO_ACTIVATOR, abi.HELLO_POLICY_HOLDER, abi.HELLO_MONITOR)
    creds = items.build(abi.ITEM_CREDS, layout.CREDS.pack(*[0] * 8))

    def child() -> None:
        for kind in kinds:
            chain = () if kind == abi.HELLO_MONITOR else brought("com.example.No")
            assert fails(unprivileged(flags=kind, chain=chain)) == "EPERM"
        assert fails(unprivileged(chain=(creds,))) == "EPERM"
        bus.kdbus()

    as_nobody(child)


def set_capabilities(effective: int, permitted: int) -> None:
    """capset(2), of the calling thread."""
    header = struct.pack("=Ii", 0x20080522, 0)
    assert LIBC.capset(header, struct.pack("=6I", effective, permitted, 0, 0, 0, 0)) == 0


@pytest.mark.parametrize("opens", ["with", "without", "in its own namespace"])
def test_who_opens_a_file_with_ipc_owner_is_privileged(bus: KdbusBus, opens: str) -> None:
    """Whatever it may do when it says HELLO."""
    ipc_owner = 1 << 15
    creds = items.build(abi.ITEM_CREDS, layout.CREDS.pack(*[0] * 8))
    says: tuple[dict[str, Any], ...] = (
        {"flags": abi.HELLO_ACTIVATOR, "chain": brought("com.example.Capable")},
        {"flags": abi.HELLO_POLICY_HOLDER, "chain": brought("com.example.Held")},
        {"flags": abi.HELLO_MONITOR},
        {"chain": (creds,)},
    )

    def child() -> None:
        assert LIBC.prctl(8, 1, 0, 0, 0) == 0  # PR_SET_KEEPCAPS
        os.setgroups([])
        os.setresgid(*[65534] * 3)
        os.setresuid(*[65534] * 3)
        set_capabilities(ipc_owner * (opens == "with"), ipc_owner)
        if opens == "in its own namespace":
            assert LIBC.unshare(CLONE_NEWUSER) == 0  # where it may do anything
        files = [KdbusClient(bus.node, hello=False) for _ in says]
        set_capabilities(ipc_owner * (opens == "without"), ipc_owner)
        for file, how in zip(files, says, strict=True):
            if opens == "with":
                file.hello(**how)
            else:
                assert fails(lambda file=file, how=how: file.hello(**how)) == "EPERM"
        files[3].close()
        if opens == "with":
            files[1].update(*brought("com.example.Held", (WORLD, OWN, 0)))

    in_a_child(child)


def as_nobody(do: Callable[[], None], uid: int = 65534) -> None:
    """Do it in a process of an ordinary user."""

    def child() -> None:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
        do()

    in_a_child(child)


def in_a_child(do: Callable[[], None]) -> None:
    child = os.fork()
    if child == 0:
        try:
            do()
        except BaseException as error:  # noqa: BLE001  (it would run the rest of the tests)
            print(f"in the child: {error!r}", flush=True)
            os._exit(1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


# -- policy ------------------------------------------------------------------------------------


def test_a_policy_holder_says_who_owns_and_who_talks(bus: KdbusBus) -> None:
    holder = bus.kdbus(flags=abi.HELLO_POLICY_HOLDER, chain=brought(NAME, (USER, TALK, 1)))
    owner = bus.kdbus()
    owner.acquire(NAME)
    assert fails(lambda: holder.send(owner.id, b"x")) == "ENOTSUP"  # EOPNOTSUPP
    assert fails(lambda: owner.send(holder.id, b"x")) == "ENXIO"
    again = brought(NAME, (WORLD, OWN, 0))
    assert fails(lambda: bus.kdbus(flags=abi.HELLO_POLICY_HOLDER, chain=again)) == "EEXIST"

    def stranger() -> None:
        client = bus.kdbus()
        assert fails(lambda: client.send(owner.id, b"x")) == "EPERM"
        assert fails(lambda: client.send(0, b"x", to_name(NAME))) == "EPERM"
        assert fails(lambda: client.acquire(NAME)) == "EPERM"
        client.acquire("com.example.Other")
        client.add_match()
        owner.send(abi.DST_ID_BROADCAST, b"hidden", signal_filter(), flags=abi.MSG_SIGNAL)
        assert not client.readable(0.2)

    as_nobody(stranger)
    as_nobody(lambda: bus.kdbus().send(owner.id, b"of uid 1"), uid=1)
    assert owner.recv().payload == b"of uid 1"
    holder.update(*brought(NAME, (WORLD, TALK, 0)))
    as_nobody(lambda: bus.kdbus().send(owner.id, b"of anybody"))
    assert owner.recv().payload == b"of anybody"
    assert fails(lambda: owner.update(*brought(NAME))) == "ENOTSUP"
    holder.close()

    def free() -> None:
        client = bus.kdbus()
        deadline = time.monotonic() + 5
        while client.list(abi.LIST_UNIQUE).get(holder.id) is not None:
            assert time.monotonic() < deadline
        client.send(owner.id, b"nobody says anything")

    as_nobody(free)
    assert owner.recv().payload == b"nobody says anything"


# -- monitors ----------------------------------------------------------------------------------


def test_a_monitor_sees_everything_and_is_seen_by_nobody(bus: KdbusBus) -> None:
    watcher = bus.kdbus()
    for kind in (abi.ITEM_ID_ADD, abi.ITEM_ID_REMOVE):
        watcher.add_match(items.build(kind, layout.ID_CHANGE.pack(abi.MATCH_ID_ANY, 0)))
    monitor = bus.kdbus(flags=abi.HELLO_MONITOR, recv=abi.ATTACH_ALL)
    for refused in (
        lambda: monitor.send(watcher.id, b"x"),
        lambda: monitor.acquire(NAME),
        lambda: monitor.add_match(),
        monitor.byebye,
    ):
        assert fails(refused) == "ENOTSUP"
    assert monitor.id not in watcher.list(abi.LIST_UNIQUE)
    assert not watcher.readable()
    later = bus.kdbus()
    for each in (
        watcher,
        later,
        monitor,
    ):  # all the same, as in kdbus, who knows its number is told
        found = each.info(monitor.id)
        assert each.found == monitor.id and each.found_flags & abi.HELLO_MONITOR
        assert layout.CREDS.unpack(found[abi.ITEM_CREDS])[0] == os.geteuid()
    assert fails(lambda: watcher.send(monitor.id, b"x")) == "ENXIO"
    later.close()
    a, b, d = bus.kdbus(), bus.kdbus(), bus.connect()
    d.add_match("type='signal'")
    a.send(b.id, b"no D-Bus message", cookie=99)
    a.send(int(d.name[3:]), call("FromKdbus", flags=1), cookie=1)
    d.send_call(f":1.{b.id}", "/x", "com.example.I", "FromDBus")
    b.recv(), b.recv()
    seen = {}
    deadline = time.monotonic() + 5
    while len(seen) < 3 and time.monotonic() < deadline:
        got = monitor.recv()
        for mark in (b"no D-Bus message", b"FromKdbus", b"FromDBus"):
            if mark in got.payload:
                assert mark not in seen
                seen[mark] = got.src, got.dst
                assert got.item(abi.ITEM_CREDS) is not None
    other = int(d.name[3:])
    assert seen == {
        b"no D-Bus message": (a.id, b.id),
        b"FromKdbus": (a.id, other),
        b"FromDBus": (other, b.id),
    }
    monitor.close()


# -- what is told of a connection --------------------------------------------------------------


def test_anybody_learns_what_a_connection_lets_know(bus: KdbusBus) -> None:
    description = items.string(abi.ITEM_CONN_DESCRIPTION, "the-one")
    a = bus.kdbus(send=abi.ATTACH_ALL, chain=(description,))
    b = bus.kdbus()
    a.acquire(NAME)
    found = b.info(name=NAME)
    assert b.found == a.id
    assert layout.PIDS.unpack(found[abi.ITEM_PIDS]) == (os.getpid(), os.getpid(), os.getppid())
    assert found[abi.ITEM_CONN_DESCRIPTION] == b"the-one\0"
    assert found[abi.ITEM_EXE] == os.readlink("/proc/self/exe").encode() + b"\0"
    assert found[abi.ITEM_OWNED_NAME][8:] == NAME.encode() + b"\0"
    assert abi.ITEM_TIMESTAMP not in found
    flags = items.build(abi.ITEM_ATTACH_FLAGS_SEND, layout.U64.pack(0))
    a.update(flags)
    assert abi.ITEM_EXE not in b.info(a.id)
    assert abi.ITEM_EXE not in a.info(a.id)
    assert fails(lambda: b.info(b.id, NAME)) == "ESRCH"
    assert fails(lambda: b.info(name="no.such.name")) == "ESRCH"
    assert fails(lambda: b.info(1 << 40)) == "ENXIO"
    assert fails(lambda: b.info()) == "EINVAL"


def test_the_privileged_may_pretend(bus: KdbusBus) -> None:
    creds, pids = tuple(range(1000, 1008)), (11, 12, 13)
    a = bus.kdbus(
        send=abi.ATTACH_ALL,
        chain=(
            items.build(abi.ITEM_CREDS, layout.CREDS.pack(*creds)),
            items.build(abi.ITEM_PIDS, layout.PIDS.pack(*pids)),
            items.string(abi.ITEM_SECLABEL, "a:b:c"),
        ),
    )
    b = bus.kdbus(recv=abi.ATTACH_ALL)
    a.send(b.id, b"x")
    message = b.recv()
    told = {item.type: item.data for item in message.items}
    for found in (b.info(a.id), told):
        assert layout.CREDS.unpack(found[abi.ITEM_CREDS]) == creds
        assert layout.PIDS.unpack(found[abi.ITEM_PIDS]) == pids
        assert found[abi.ITEM_SECLABEL] == b"a:b:c\0"
        assert abi.ITEM_EXE not in found and abi.ITEM_AUXGROUPS not in found


def test_capabilities_cgroup_and_audit_are_the_kernels_word(bus: KdbusBus) -> None:
    a, b = bus.kdbus(send=abi.ATTACH_ALL), bus.kdbus(recv=abi.ATTACH_ALL)
    a.send(b.id, b"x")
    told = {item.type: item.data for item in b.recv().items}
    for found in (told, b.info(a.id)):
        words = struct.unpack(f"={len(found[abi.ITEM_CAPS]) // 4}I", found[abi.ITEM_CAPS])
        assert words[0] == int(Path("/proc/sys/kernel/cap_last_cap").read_text())
        status = Path("/proc/self/status").read_text()
        caps = [int(each.split()[1], 16) for each in status.splitlines() if each[:3] == "Cap"][:4]
        assert [words[n] | words[n + 1] << 32 for n in (1, 3, 5, 7)] == caps
        cgroup = found[abi.ITEM_CGROUP].removesuffix(b"\0").decode()
        assert f":{cgroup}\n" in Path("/proc/self/cgroup").read_text()
        session, login = layout.AUDIT.unpack(found[abi.ITEM_AUDIT])
        assert session == int(Path("/proc/self/sessionid").read_text())
        assert login == int(Path("/proc/self/loginuid").read_text())
    modest = bus.kdbus()
    assert not {abi.ITEM_CAPS, abi.ITEM_CGROUP, abi.ITEM_AUDIT} & set(b.info(modest.id))


@pytest.mark.skipif(os.geteuid() != 0, reason="acts as another user")
def test_a_connection_is_the_process_that_says_hello(bus: KdbusBus) -> None:
    """Whoever has opened the file, and passed it on."""
    told = abi.ATTACH_CREDS | abi.ATTACH_PIDS | abi.ATTACH_CAPS | abi.ATTACH_AUXGROUPS
    watcher = bus.kdbus(recv=told)
    other = bus.connect()
    passed = KdbusClient(bus.node, hello=False)

    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            os.setgroups([4242])
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
            passed.hello(send=told)
            passed.send(watcher.id, b"x")
            signal.pause()
        os._exit(1)
    try:
        got = watcher.recv()
        creds, pids = got.item(abi.ITEM_CREDS), got.item(abi.ITEM_PIDS)
        caps, groups = got.item(abi.ITEM_CAPS), got.item(abi.ITEM_AUXGROUPS)
        assert creds and pids and caps and groups
        assert layout.CREDS.unpack(creds) == (65534,) * 8
        assert layout.PIDS.unpack(pids) == (pid, pid, os.getpid())
        assert struct.unpack_from("=I", groups) == (4242,)
        last, *words = struct.unpack(f"={len(caps) // 4}I", caps)
        assert last and not any(words[:6])  # nothing inheritable, permitted, effective
        name = f":1.{got.src}"
        assert other.driver("GetConnectionUnixUser", "s", [name]) == [65534]
        assert other.driver("GetConnectionUnixProcessID", "s", [name]) == [pid]
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        passed.close()


def test_a_message_tells_of_the_thread_that_sends_it(bus: KdbusBus) -> None:
    a, b = bus.kdbus(send=abi.ATTACH_ALL), bus.kdbus(recv=abi.ATTACH_ALL)
    tids: list[int] = []

    def send() -> None:
        Path("/proc/thread-self/comm").write_text("another")
        tids.append(threading.get_native_id())
        a.send(b.id, b"x")

    thread = threading.Thread(target=send)
    thread.start()
    thread.join()
    a.send(b.id, b"x")
    own = Path("/proc/self/comm").read_text().strip()
    for tid, comm in ((tids[0], "another"), (os.getpid(), own)):
        told = {item.type: item.data for item in b.recv().items}
        assert layout.PIDS.unpack(told[abi.ITEM_PIDS])[:2] == (os.getpid(), tid)
        assert told[abi.ITEM_TID_COMM] == comm.encode() + b"\0"


def in_namespace(flags: int, do: Callable[[], None], maps: str = "") -> None:
    """Do it in a process of its own, the first in new namespaces."""
    ready, go = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        try:
            assert LIBC.unshare(flags) == 0
            os.write(ready[1], b"!")
            os.read(go[0], 1)
            inner = os.fork()
            if inner == 0:
                do()
                os._exit(0)
            os._exit(os.waitpid(inner, 0)[1] != 0)
        except BaseException as error:  # noqa: BLE001  (it would run the rest of the tests)
            print(f"in the child: {error!r}", flush=True)
            os._exit(1)
    os.read(ready[0], 1)
    for name in ("uid_map", "gid_map") if maps else ():
        Path(f"/proc/{child}/{name}").write_text(maps)
    os.write(go[1], b"!")
    for fd in (*ready, *go):
        os.close(fd)
    assert os.waitpid(child, 0)[1] == 0


def test_ids_are_told_as_the_receivers_namespace_has_them(bus: KdbusBus) -> None:
    root, nobody = bus.kdbus(), bus.kdbus()
    os.seteuid(65534)
    try:
        other = bus.kdbus()
    finally:
        os.seteuid(0)
    root.acquire(NAME)

    def inside() -> None:
        client = bus.kdbus()
        for id, uid in ((root.id, 7), (other.id, 65534)):
            creds = layout.CREDS.unpack(client.info(id)[abi.ITEM_CREDS])
            assert creds[3] == uid, creds
        # And so are those of policy.
        made = {"flags": abi.HELLO_POLICY_HOLDER}
        bus.kdbus(**made, chain=brought("com.example.In", (USER, OWN, 7)))  # type: ignore[arg-type]
        again = brought("com.example.Out", (USER, OWN, 0))
        assert fails(lambda: bus.kdbus(**made, chain=again)) == "EINVAL"  # type: ignore[arg-type]
        pretend = items.build(abi.ITEM_CREDS, layout.CREDS.pack(*[7] * 8))
        fake = bus.kdbus(send=abi.ATTACH_ALL, chain=(pretend,))
        fake.send(root.id, b"of 7")
        pretend = items.build(abi.ITEM_CREDS, layout.CREDS.pack(*[0] * 8))
        assert fails(lambda: bus.kdbus(chain=(pretend,))) == "EINVAL"

    root.update(items.build(abi.ITEM_ATTACH_FLAGS_RECV, layout.U64.pack(abi.ATTACH_ALL)))
    in_namespace(CLONE_NEWUSER, inside, "7 0 1\n")
    told = {item.type: item.data for item in root.recv().items}
    assert layout.CREDS.unpack(told[abi.ITEM_CREDS]) == (0,) * 8
    assert layout.CREDS.unpack(nobody.info(root.id)[abi.ITEM_CREDS])[0] == 0


def test_one_in_another_pid_namespace_learns_pids_of_that_alone(bus: KdbusBus) -> None:
    a = bus.kdbus()

    def inside() -> None:
        client, other = bus.kdbus(), bus.kdbus()
        assert layout.PIDS.unpack(client.info(a.id)[abi.ITEM_PIDS]) == (0, 0, 0)
        assert layout.PIDS.unpack(client.info(other.id)[abi.ITEM_PIDS]) == (1, 1, 0)
        other.close()

    in_namespace(CLONE_NEWPID, inside)
    assert layout.PIDS.unpack(bus.kdbus().info(a.id)[abi.ITEM_PIDS])[0] == os.getpid()
