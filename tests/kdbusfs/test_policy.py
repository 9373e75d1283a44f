"""A bus that a program has made: what its policy does not allow is denied."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kbusd.kdbus import abi, items
from tests.kdbusfs.kclient import KdbusClient
from tests.kdbusfs.rig import errno_of
from tests.kdbusfs.test_buses import Maker, world_bus
from tests.kdbusfs.test_clients import FILE, NODE, fails, to_name
from tests.kdbusfs.test_sessions import brought, in_a_child, set_capabilities, signal_filter

UID = os.geteuid()
WORLD, USER = abi.POLICY_ACCESS_WORLD, abi.POLICY_ACCESS_USER
TALK, OWN = abi.POLICY_TALK, abi.POLICY_OWN
NAME = "com.example.Made"

# Other users are who it is about.
pytestmark = [] if UID == 0 else [pytest.mark.guest]


@pytest.fixture(scope="module", params=[FILE, NODE])
def made(request: pytest.FixtureRequest) -> Iterator[str]:
    """The node of a bus that the world may open."""
    with world_bus(request.param) as node:
        yield node


def test_who_made_it_may_do_anything(made: str) -> None:
    with KdbusClient(made) as one, KdbusClient(made) as two:
        one.acquire(NAME)
        two.send(0, b"to the name", to_name(NAME))
        assert one.recv().payload == b"to the name"


@contextlib.contextmanager
def acting_as(uid: int) -> Iterator[None]:
    """What is done meanwhile, another user does."""
    os.setresgid(uid, uid, 0)
    os.setresuid(uid, uid, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)
        os.setresgid(0, 0, 0)


def as_user(uid: int, node: str, **how: Any) -> KdbusClient:
    """A connection of another user: he is who opened the file."""
    with acting_as(uid):
        return KdbusClient(node, **how)


@pytest.mark.parametrize("capable", [True, False])
def test_root_is_privileged_on_anothers_bus_by_its_capability_alone(
    made: str, capable: bool
) -> None:
    root = Path(made).parents[1]
    with Maker(root) as maker:
        with acting_as(1):
            maker.make("1-theirs", abi.MAKE_ACCESS_WORLD)
        theirs = str(root / "1-theirs" / "bus")
        with as_user(1, theirs, flags=abi.HELLO_MONITOR), as_user(1, theirs) as peer:

            def child() -> None:
                ipc_owner = 1 << 15
                set_capabilities(ipc_owner * capable, ipc_owner)
                client = KdbusClient(theirs)
                refused = "" if capable else "EPERM"
                assert errno_of(lambda: client.send(peer.id, b"x")) == refused
                assert errno_of(lambda: client.acquire(NAME)) == refused
                assert errno_of(lambda: KdbusClient(theirs, flags=abi.HELLO_MONITOR)) == refused
                chain = items.string(abi.ITEM_MAKE_NAME, f"{UID}-apps")
                file = KdbusClient(theirs, hello=False)
                make = abi.CMD_ENDPOINT_MAKE
                assert errno_of(lambda: file.do(make, bytes(16), chain)) == refused

            in_a_child(child)
            assert peer.readable() == capable


@pytest.mark.parametrize("opens", [1, 2])
@pytest.mark.parametrize("made", [FILE], indirect=True)  # to a node his own socket is attached
def test_who_opens_the_file_owns_the_bus_or_not_whoever_says_hello(made: str, opens: int) -> None:
    root = Path(made).parents[1]
    refused = "" if opens == 1 else "EPERM"
    with Maker(root) as maker:
        with acting_as(1):
            maker.make("1-theirs", abi.MAKE_ACCESS_WORLD)
        theirs = str(root / "1-theirs" / "bus")
        with as_user(opens, theirs, hello=False) as file, acting_as(3 - opens):
            file.hello()
            assert errno_of(lambda: file.acquire(NAME)) == refused
        with as_user(opens, theirs, hello=False) as file, acting_as(3 - opens):
            assert errno_of(lambda: file.hello(flags=abi.HELLO_MONITOR)) == refused
        with as_user(opens, theirs, hello=False) as file, acting_as(3 - opens):
            chain = items.string(abi.ITEM_MAKE_NAME, f"{3 - opens}-apps")
            make = abi.CMD_ENDPOINT_MAKE
            assert errno_of(lambda: file.do(make, bytes(16), chain)) == refused


@pytest.mark.parametrize("made", [FILE], indirect=True)  # to a node his own socket is attached
def test_whose_a_connection_is_for_his_own_is_who_opened_the_file(made: str) -> None:
    """And what he may hear. What he may send is for who says HELLO."""
    with as_user(1, made, hello=False) as file, as_user(1, made) as one, as_user(2, made) as two:
        with acting_as(2):
            file.hello()
        one.send(file.id, b"to my own")
        assert fails(lambda: two.send(file.id, b"x")) == "EPERM"
        file.send(two.id, b"of my own")
        assert fails(lambda: file.send(one.id, b"x")) == "EPERM"
        assert [each.recv().payload for each in (file, two)] == [b"to my own", b"of my own"]
        for each in (file, one, two):
            each.add_match()
        for each, said in ((one, b"one's"), (two, b"two's"), (file, b"the file's")):
            each.send(abi.DST_ID_BROADCAST, said, signal_filter(), flags=abi.MSG_SIGNAL)
        assert heard(file) == heard(one) == [b"one's", b"the file's"]
        assert heard(two) == [b"two's"]


def test_ones_own_are_those_that_he_really_is(made: str) -> None:
    """kdbus asks for the real uid of who has opened the file, whomever he acts as."""

    def child() -> None:
        os.setresuid(2, 1, 0)
        with KdbusClient(made) as mine:
            os.setresuid(-1, 0, -1)
            with as_user(1, made) as effective, as_user(2, made) as real:
                assert fails(lambda: effective.send(mine.id, b"x")) == "EPERM"
                real.send(mine.id, b"to my own")
            assert mine.recv().payload == b"to my own"

    in_a_child(child)


def heard(client: KdbusClient) -> list[bytes]:
    got = []
    while client.readable():
        got.append(client.recv_now().payload)
    return got


def test_others_own_and_reach_nothing_but_what_policy_allows(made: str) -> None:
    with KdbusClient(made) as owner, as_user(1, made) as client, as_user(1, made) as own:
        owner.acquire(NAME)
        assert client.list(abi.LIST_NAMES) == {owner.id: [NAME]}  # seen it may be
        client.info(name=NAME)
        assert fails(lambda: client.acquire("com.example.Any")) == "EPERM"
        assert fails(lambda: client.send(owner.id, b"x")) == "EPERM"
        assert fails(lambda: client.send(0, b"x", to_name(NAME))) == "EPERM"
        assert fails(lambda: client.call(owner.id, b"x")) == "EPERM"
        owner.send(client.id, b"the maker talks to anybody")
        assert client.recv().payload == b"the maker talks to anybody"
        client.send(own.id, b"to the same user")
        assert own.recv().payload == b"to the same user"
        for each in (client, own):
            each.add_match()
        owner.send(abi.DST_ID_BROADCAST, b"not for those", signal_filter(), flags=abi.MSG_SIGNAL)
        client.send(abi.DST_ID_BROADCAST, b"for one's own", signal_filter(), flags=abi.MSG_SIGNAL)
        assert own.recv().payload == b"for one's own"
        assert not owner.readable()


def test_a_policy_holder_opens_what_it_says_and_no_more(made: str) -> None:
    holds = abi.HELLO_POLICY_HOLDER
    entry = brought(NAME, (USER, OWN, 1), (WORLD, TALK, 0))
    with (
        KdbusClient(made, flags=holds, chain=entry) as holder,
        as_user(1, made) as owner,
        as_user(2, made) as other,
    ):
        owner.acquire(NAME)
        assert fails(lambda: owner.acquire(NAME + "2")) == "EPERM"
        assert fails(lambda: other.acquire(NAME)) == "EPERM"
        other.send(0, b"to the name", to_name(NAME))
        other.send(owner.id, b"to its owner")
        assert [owner.recv().payload for _ in range(2)] == [b"to the name", b"to its owner"]
        assert fails(lambda: owner.send(other.id, b"x")) == "EPERM"
        other.add_match()
        owner.send(abi.DST_ID_BROADCAST, b"news", signal_filter(), flags=abi.MSG_SIGNAL)
        assert other.recv().payload == b"news"
        holder.update(*brought(NAME, (USER, OWN, 1)))
        assert fails(lambda: other.send(owner.id, b"x")) == "EPERM"
        owner.release(NAME)
        assert fails(lambda: other.send(owner.id, b"x")) == "EPERM"
