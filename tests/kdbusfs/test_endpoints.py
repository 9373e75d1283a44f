"""Custom endpoints: how they look in the tree, what is to be seen behind one, how they end."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import stat
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kbusd.kdbus import abi, items, layout
from tests.bus import procs
from tests.kdbusfs.kclient import KdbusClient
from tests.kdbusfs.test_buses import Maker, world_bus
from tests.kdbusfs.test_clients import EXPECT, FILE, NODE, KdbusBus, answer, call, fails, to_name
from tests.kdbusfs.test_policy import as_user
from tests.kdbusfs.test_sessions import any_name, brought, signal_filter

UID = os.geteuid()
WORLD, USER = abi.POLICY_ACCESS_WORLD, abi.POLICY_ACCESS_USER
SEE, TALK, OWN = abi.POLICY_SEE, abi.POLICY_TALK, abi.POLICY_OWN
NAME, OTHER = "com.example.Shown", "com.example.Hidden"
ID_ANY = layout.ID_CHANGE.pack(abi.MATCH_ID_ANY, 0)
ENXIO, ESRCH, EPERM = "ENXIO", "ESRCH", "EPERM"


@pytest.fixture(scope="module", params=[FILE, NODE])
def shared(request: pytest.FixtureRequest) -> Iterator[KdbusBus]:
    bus = KdbusBus(request.param)
    yield bus
    bus.stop()


class Endpoint(KdbusClient):
    """An open file of a bus's node that makes a custom endpoint of it."""

    def __init__(self, node: str, name: str = f"{UID}-apps", flags: int = 0) -> None:
        super().__init__(node, hello=False)
        self.node = os.path.join(os.path.dirname(node), name)
        try:
            self.make(name, flags)
        except OSError:
            self.close()
            raise

    def make(self, name: str, flags: int = 0) -> None:
        fixed = struct.pack("=2Q", flags, 0)
        self.do(abi.CMD_ENDPOINT_MAKE, fixed, items.string(abi.ITEM_MAKE_NAME, name))

    def set(self, *policy: bytes) -> None:
        self.do(abi.CMD_ENDPOINT_UPDATE, bytes(16), *policy)


def items_of(client: KdbusClient) -> list[int]:
    """The types of what has arrived, in order: each message's first item."""
    found = []
    while client.readable():
        found.append(client.recv().items[0].type)
    return found


# -- in the tree -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "mode"),
    [(0, 0o600), (abi.MAKE_ACCESS_GROUP, 0o660), (abi.MAKE_ACCESS_WORLD, 0o666)],
)
def test_it_is_a_node_beside_the_buss_own(bus: KdbusBus, flags: int, mode: int) -> None:
    with Endpoint(bus.node, flags=flags) as made:
        found = os.stat(made.node)
        assert stat.S_IMODE(found.st_mode) == mode
        assert (found.st_uid, found.st_gid) == (UID, os.getegid())
        assert sorted(os.listdir(os.path.dirname(made.node))) == [f"{UID}-apps", "bus"]
        with KdbusClient(made.node) as client, bus.kdbus() as other:
            assert client.uuid == other.uuid
        if UID == 0 and not flags & abi.MAKE_ACCESS_WORLD:
            with pytest.raises(PermissionError):
                as_user(1, made.node)
    procs.eventually(lambda: not os.path.exists(made.node), "it goes with the file that made it")


@pytest.mark.parametrize("transport", [FILE])
def test_others_reach_it_in_a_mount_if_the_bus_was_made_for_them(transport: str) -> None:
    with world_bus(transport) as node, Endpoint(node, flags=abi.MAKE_ACCESS_WORLD) as made:
        as_user(1, made.node).close()
        os.chmod(node, 0o600)
        as_user(1, made.node).close()
        os.chmod(os.path.dirname(node), 0o500)
        with pytest.raises(PermissionError):
            as_user(1, made.node)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (f"{UID + 1}-other", "EINVAL"),
        ("apps", "EINVAL"),
        ("bus", "EINVAL"),
        (f"{UID}-", "EINVAL"),
        (f"{UID}-a/b", "EINVAL"),
        (f"../{UID}-x", "EINVAL"),
        (f"{UID}-..", "EINVAL"),
        (f"{UID}-{'X' * 63}", "ENAMETOOLONG"),
        (f"{UID}-{'X' * 4096}", "ENAMETOOLONG"),
        (f"{UID}-taken", "EEXIST"),
    ],
)
def test_a_name_that_can_not_be_is_refused(bus: KdbusBus, name: str, expected: str) -> None:
    with Endpoint(bus.node, f"{UID}-taken"), KdbusClient(bus.node, hello=False) as file:
        fixed = bytes(16)
        chain = items.string(abi.ITEM_MAKE_NAME, name)
        assert fails(lambda: file.do(abi.CMD_ENDPOINT_MAKE, fixed, chain)) == expected
        file.hello()  # the file is as good as before


def test_a_file_is_one_thing_only(bus: KdbusBus) -> None:
    with Endpoint(bus.node) as made:
        assert fails(made.hello) == "EBADFD"
        assert fails(lambda: made.make(f"{UID}-second")) == "EBADFD"
        assert fails(lambda: made.send(1, b"x")) == "EBADFD"
        with KdbusClient(made.node) as client, KdbusClient(made.node, hello=False) as file:
            for each in (client, file, bus.kdbus()):
                update = lambda each=each: each.do(abi.CMD_ENDPOINT_UPDATE, bytes(16))
                assert fails(update) == "EBADFD"
            # Who is behind one is not privileged, whoever he is.
            assert fails(lambda: Endpoint(made.node, f"{UID}-inner")) == EPERM
            for kind, number in (
                (abi.HELLO_MONITOR, "ENOTSUP"),
                (abi.HELLO_POLICY_HOLDER, EPERM),
                (abi.HELLO_ACTIVATOR, EPERM),
            ):
                chain = () if kind == abi.HELLO_MONITOR else brought(NAME)
                how = {"flags": kind, "chain": chain}
                assert fails(lambda: KdbusClient(made.node, **how)) == number  # noqa: B023


def test_a_policy_that_can_not_be_is_refused(bus: KdbusBus) -> None:
    access = items.build(abi.ITEM_POLICY_ACCESS, layout.POLICY_ACCESS.pack(WORLD, SEE, 0))
    with Endpoint(bus.node) as made:
        made.set(*brought("com.example.*", (WORLD, SEE, 0)), *brought(NAME, (USER, OWN, 7)))
        for wrong in (
            brought("example", (WORLD, SEE, 0)),
            brought(NAME, (WORLD, 7, 0)),
            brought(NAME, (9, SEE, 0)),
            brought(NAME, (USER, SEE, (1 << 32) - 1)),
            (access,),
        ):
            assert fails(lambda: made.set(*wrong)) == "EINVAL"  # noqa: B023
        assert fails(lambda: made.set(*brought(NAME), *brought(NAME))) == "EEXIST"
        made.set(*(item for n in range(400) for item in brought(f"com.e{n}.A", (WORLD, SEE, 0))))


# -- what is to be seen ------------------------------------------------------------------------


def test_nothing_is_there_that_policy_does_not_show(bus: KdbusBus) -> None:
    with Endpoint(bus.node) as made:
        owner, inside, reader = bus.kdbus(), KdbusClient(made.node), KdbusClient(made.node)
        bus.opened += [inside, reader]
        for each in (inside, reader):
            each.add_match(any_name(abi.ITEM_NAME_ADD))
            each.add_match(any_name(abi.ITEM_NAME_REMOVE))
        for name in (NAME, OTHER):
            owner.acquire(name)
        d = bus.connect()
        d.request_name("com.example.DBus")
        for hidden in (NAME, OTHER, "com.example.DBus", "no.body"):
            assert fails(lambda: inside.info(name=hidden)) == ESRCH  # noqa: B023
            assert fails(lambda: inside.send(0, b"x", to_name(hidden))) == ESRCH  # noqa: B023
        for id in (owner.id, int(d.name[3:]), 99999):
            assert fails(lambda: inside.info(id)) == ENXIO  # noqa: B023
            assert fails(lambda: inside.send(id, b"x")) == ENXIO  # noqa: B023
            assert fails(lambda: inside.send(id, b"x", reply=7)) == ENXIO  # noqa: B023
        assert set(inside.list(abi.LIST_UNIQUE | abi.LIST_NAMES)) == {inside.id, reader.id}
        assert inside.list(abi.LIST_NAMES | abi.LIST_QUEUED) == {}
        assert fails(lambda: inside.acquire("com.example.Any")) == EPERM
        owner.release(NAME)
        assert items_of(inside) == []

        made.set(*brought(NAME, (WORLD, SEE, 0)))
        owner.acquire(NAME)
        assert [items_of(each) for each in (inside, reader)] == [[abi.ITEM_NAME_ADD]] * 2
        inside.info(name=NAME)
        inside.info(owner.id)
        assert inside.list(abi.LIST_NAMES) == {owner.id: [NAME]}
        assert fails(lambda: inside.send(0, b"x", to_name(NAME))) == EPERM
        assert fails(lambda: inside.send(owner.id, b"x")) == EPERM
        assert not owner.readable()
        owner.release(NAME)
        assert items_of(inside) == [abi.ITEM_NAME_REMOVE]
        assert fails(lambda: inside.info(owner.id)) == ENXIO
        assert items_of(owner) == []


def test_connections_are_told_of_to_those_who_know_of_them(bus: KdbusBus) -> None:
    with Endpoint(bus.node) as made:
        reader, outside = KdbusClient(made.node), bus.kdbus()
        bus.opened.append(reader)
        for kind in (abi.ITEM_ID_ADD, abi.ITEM_ID_REMOVE):
            reader.add_match(items.build(kind, ID_ANY))
        bus.kdbus().close()
        bus.connect().close()
        with KdbusClient(made.node) as other:
            assert other.id
        procs.eventually(lambda: reader.readable(0.1), "the end of one is announced")
        assert reader.recv().items[0].type == abi.ITEM_ID_ADD
        procs.eventually(lambda: reader.readable(0.1), "the end of one is announced")
        gone = reader.recv().items[0]
        assert gone.type == abi.ITEM_ID_REMOVE
        assert layout.ID_CHANGE.unpack(gone.data)[0] == other.id
        outside.send(reader.id, b"now it knows of me")
        assert reader.recv().src == outside.id
        outside.close()
        procs.eventually(lambda: reader.readable(0.1), "its end is announced")
        assert layout.ID_CHANGE.unpack(reader.recv().items[0].data)[0] == outside.id


def test_who_may_talk_calls_and_is_answered(bus: KdbusBus) -> None:
    with Endpoint(bus.node) as made:
        made.set(*brought(NAME, (WORLD, TALK, 0)))
        owner, inside = bus.kdbus(), KdbusClient(made.node)
        bus.opened.append(inside)
        owner.acquire(NAME)
        until = 1 << 62
        inside.send(0, call("Do"), to_name(NAME), flags=EXPECT, reply=until)
        asked = owner.recv()
        owner.send(inside.id, answer(asked), reply=asked.cookie)
        assert inside.recv().reply == asked.cookie
        # From outside it is a connection as others are; a hidden caller gets its answer.
        hidden = bus.kdbus()
        hidden.send(inside.id, call("Do", cookie=5), flags=EXPECT, reply=until, cookie=5)
        asked = inside.recv()
        assert fails(lambda: inside.send(hidden.id, b"x")) == ENXIO
        inside.send(hidden.id, answer(asked), reply=asked.cookie)
        assert hidden.recv().reply == 5
        assert fails(lambda: inside.send(hidden.id, answer(asked), reply=asked.cookie)) == ENXIO


def test_signals_come_from_those_whom_one_may_talk_to(bus: KdbusBus) -> None:
    with Endpoint(bus.node) as made:
        made.set(*brought(NAME, (WORLD, TALK, 0)), *brought(OTHER, (WORLD, SEE, 0)))
        talks, seen, hidden, d = bus.kdbus(), bus.kdbus(), bus.kdbus(), bus.connect()
        inside, outside = KdbusClient(made.node), bus.kdbus()
        bus.opened.append(inside)
        talks.acquire(NAME)
        seen.acquire(OTHER)
        for each in (inside, outside):
            each.add_match()
        d.signal("/test", "com.example.Test", "Hidden")
        for each in (hidden, seen, talks):
            each.send(abi.DST_ID_BROADCAST, b"news", signal_filter(), flags=abi.MSG_SIGNAL)
        assert inside.recv().src == talks.id
        assert not inside.readable(0.2)
        assert not inside.readable()
        heard = {outside.recv().src for _ in range(4)}
        assert heard == {int(d.name[3:]), hidden.id, seen.id, talks.id}
        inside.send(abi.DST_ID_BROADCAST, b"news", signal_filter(), flags=abi.MSG_SIGNAL)
        assert outside.recv().src == inside.id  # who may be talked to from there


def test_signals_of_d_bus_clients_are_heard_if_policy_says_so(bus: KdbusBus) -> None:
    with Endpoint(bus.node) as made:
        made.set(*brought(NAME, (WORLD, TALK, 0)))
        shown, hidden, inside = bus.connect(), bus.connect(), KdbusClient(made.node)
        bus.opened.append(inside)
        shown.request_name(NAME)
        inside.add_match()
        for n in range(3):
            for each in (hidden, shown):
                each.signal("/test", "com.example.Test", f"News{n}")
        assert [inside.recv().src for _ in range(3)] == [int(shown.name[3:])] * 3
        assert not inside.readable(0.2)


def test_d_bus_clients_are_there_if_policy_says_so(bus: KdbusBus) -> None:
    with Endpoint(bus.node) as made:
        d, inside = bus.connect(), KdbusClient(made.node)
        bus.opened.append(inside)
        d.request_name(NAME)
        assert fails(lambda: inside.send(0, call("Do"), to_name(NAME))) == ESRCH
        made.set(*brought(NAME, (WORLD, TALK, 0)))
        inside.send(0, call("Do"), to_name(NAME), flags=EXPECT, reply=1 << 62)
        assert d.wait_call("Do").sender == f":1.{inside.id}"


def test_names_are_owned_as_policy_says(bus: KdbusBus) -> None:
    with Endpoint(bus.node) as made:
        made.set(*brought("com.example.*", (USER, OWN, UID)), *brought(OTHER, (WORLD, TALK, 0)))
        with KdbusClient(made.node) as inside:
            assert inside.acquire(NAME) & abi.NAME_ACQUIRED
            assert fails(lambda: inside.acquire(OTHER)) == EPERM
            assert fails(lambda: inside.acquire("com.example.too.Deep")) == EPERM
            outside = bus.kdbus()
            outside.send(0, b"to the name", to_name(NAME))
            assert inside.recv().payload == b"to the name"
            made.set()
            assert fails(lambda: inside.acquire("com.example.Second")) == EPERM


# -- how it ends -------------------------------------------------------------------------------


def test_who_is_behind_one_is_cut_off_when_it_ends(bus: KdbusBus) -> None:
    outside = bus.kdbus()
    with Endpoint(bus.node) as made:
        made.set(*brought(NAME, (WORLD, OWN, 0)))
        inside = KdbusClient(made.node)
        inside.acquire(NAME)
        made.close()
        assert fails(lambda: inside.send(inside.id, b"x")) in ("ESHUTDOWN", "ENOTCONN")
        inside.close()
    assert outside.list(abi.LIST_NAMES) == {}
    with Endpoint(bus.node) as again, KdbusClient(again.node) as fresh:
        assert fails(lambda: fresh.acquire(NAME)) == EPERM  # it is another one


def test_a_makers_worker_that_dies_takes_its_endpoint_along(bus: KdbusBus) -> None:
    # Nobody could say any more what it lets through.
    with Endpoint(bus.node) as made, KdbusClient(made.node) as inside:
        worker = busiest(bus, lambda: made.set(*brought(NAME, (WORLD, OWN, 0))))
        os.kill(worker, signal.SIGKILL)
        procs.eventually(lambda: not os.path.exists(made.node), "its node is gone")
        cut_off = fails(lambda: inside.send(inside.id, b"x"))
        assert cut_off in (
            "ESHUTDOWN",
            "ENOTCONN",
            "ECONNABORTED",
        )  # in a call when a CUSE node goes
        assert fails(lambda: made.set(*brought(NAME, (WORLD, OWN, 0)))) == "ECONNRESET"
    with Endpoint(bus.node):
        pass  # the name is free again


def busiest(bus: KdbusBus, do: Callable[[], object]) -> int:
    """The worker that wakes up most often while something is done: it is done by that."""

    def wakes() -> dict[int, int]:
        found = {}
        for worker in bus.workers():
            text = Path(f"/proc/{worker.pid}/status").read_text()
            found[worker.pid] = int(text.split("\nvoluntary_ctxt_switches:")[1].split()[0])
        return found

    before = wakes()
    for _ in range(50):
        do()
    after = wakes()
    return max(after, key=lambda pid: after[pid] - before.get(pid, 0))


def test_one_of_a_made_bus_ends_with_that(bus: KdbusBus) -> None:
    root = Path(bus.node).parents[1]
    maker = Maker(root).make(f"{UID}-brief")
    own = root / f"{UID}-brief" / "bus"
    with maker, Endpoint(str(own)) as made, KdbusClient(made.node) as inside:
        made.set(*brought(NAME, (WORLD, OWN, 0)))
        assert fails(lambda: inside.acquire(NAME)) == EPERM  # the bus's own policy counts, too
        maker.close()
        procs.eventually(lambda: not os.path.exists(made.node), "it is gone")


@pytest.mark.skipif(UID != 0, reason="acts as another user")
def test_who_does_not_own_the_bus_makes_none(bus: KdbusBus) -> None:
    root = Path(bus.node).parents[1]
    with Maker(root).make(f"{UID}-open", abi.MAKE_ACCESS_WORLD):
        node = str(root / f"{UID}-open" / "bus")
        with as_user(1, node, hello=False) as file:
            chain = items.string(abi.ITEM_MAKE_NAME, "1-apps")
            assert fails(lambda: file.do(abi.CMD_ENDPOINT_MAKE, bytes(16), chain)) == EPERM


def test_one_user_makes_64_at_most(bus: KdbusBus) -> None:
    with contextlib.ExitStack() as stack:

        def more(number: int) -> Callable[[], object]:
            return lambda: stack.enter_context(Endpoint(bus.node, f"{UID}-n{number}"))

        for number in range(64):
            more(number)()
        with pytest.raises(OSError) as caught:
            more(64)()
        assert caught.value.errno == errno.EMFILE
