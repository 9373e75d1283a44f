"""The policy database: the cases of kdbus's self-tests, and each rule of the module's head."""

from __future__ import annotations

import struct

import pytest

from kbusd.kdbus import abi, items, policy
from kbusd.kdbus.items import Item
from kbusd.kdbus.metadata import IdMap
from kbusd.kdbus.policy import Access, Database, Entry, Subject, View
from tests.unit.kdbus.refused import refused

SEE, TALK, OWN = abi.POLICY_SEE, abi.POLICY_TALK, abi.POLICY_OWN
USER, GROUP, WORLD = abi.POLICY_ACCESS_USER, abi.POLICY_ACCESS_GROUP, abi.POLICY_ACCESS_WORLD
ALICE = Subject(1000, 100, frozenset({200}))
BOB = Subject(1001, 101)
OWNER = Subject(0, 0, owner=True)


def name(text: str) -> Item:
    return Item(abi.ITEM_NAME, text.encode() + b"\0")


def access(kind: int, access: int, id: int = 0) -> Item:
    return Item(abi.ITEM_POLICY_ACCESS, struct.pack("=3Q", kind, access, id))


def database(*chain: Item) -> Database:
    made = Database()
    made.replace("holder", policy.parse(chain, None, wildcards=True))
    return made


def test_parse() -> None:
    chain = (
        Item(abi.ITEM_CONN_DESCRIPTION, b"x\0"),
        name("a.b"),
        access(USER, OWN, 1000),
        access(WORLD, SEE, 7),
        name("c.*"),
    )
    assert policy.parse(chain, 2, wildcards=True) == (
        Entry("a.b", False, (Access(USER, OWN, 1000), Access(WORLD, SEE, 0))),
        Entry("c", True, ()),
    )


@pytest.mark.parametrize(
    ("chain", "errno"),
    [
        ((name("a.b"), name("c.d")), "E2BIG"),
        ((access(WORLD, SEE), name("a.b")), "EINVAL"),
        ((name(".example.a"),), "EINVAL"),
        ((name("example"),), "EINVAL"),
        ((name("a.*"),), "EINVAL"),
        ((name("a.b"), access(0, SEE)), "EINVAL"),
        ((name("a.b"), access(4, SEE)), "EINVAL"),
        ((name("a.b"), access(WORLD, 3)), "EINVAL"),
        ((name("a.b"), access(USER, SEE, (1 << 32) - 1)), "EINVAL"),
        ((name("a.b"), access(GROUP, SEE, 1 << 32)), "EINVAL"),
    ],
)
def test_refusals(chain: tuple[Item, ...], errno: str) -> None:
    with refused(errno):
        policy.parse(chain, 1, wildcards=False)


def test_a_name_has_one_policy() -> None:
    """As kdbus_test_policy has it."""
    base = Database()

    def put(owner: str, pattern: str) -> None:
        base.replace(owner, policy.parse((name(pattern), access(USER, SEE, 1000)), 1, True))

    put("a", "com.example.a")
    with refused("EEXIST", "com.example.a"):
        put("b", "com.example.a")
    put("b", "com.example.a.*")
    with refused("EEXIST", "com.example.a.*"):
        put("a", "com.example.a.*")
    assert base.query(ALICE, "com.example.a") == SEE  # what failed changed nothing
    put("a", "com.example.*")
    put("b", "com.example.a")
    with refused("EEXIST"):
        put("b", "com.example.*")
    base.remove("a")
    assert base.query(ALICE, "com.example.x") == policy.NOTHING
    with refused("EEXIST"):
        base.replace("c", policy.parse((name("x.y"), name("x.y")), None, True))
    assert base.query(ALICE, "com.example.a") == SEE


def test_the_highest_access_counts() -> None:
    base = database(
        name("a.b"), access(WORLD, SEE), access(GROUP, TALK, 200), access(USER, OWN, 1001)
    )
    assert base.query(ALICE, "a.b") == TALK
    assert base.query(BOB, "a.b") == OWN
    assert base.query(Subject(5, 200), "a.b") == TALK
    assert base.query(Subject(5, 5), "a.b") == SEE
    assert base.query(ALICE, "a.c") == policy.NOTHING


def test_a_pattern_stands_for_one_element() -> None:
    base = database(name("foo.bar.*"), access(WORLD, OWN), name("foo.bar.own"), access(WORLD, SEE))
    assert base.query(BOB, "foo.bar.baz") == OWN
    assert base.query(BOB, "foo.bar.baz.baz") == policy.NOTHING
    assert base.query(BOB, "foo.bar") == policy.NOTHING
    assert base.query(BOB, "foo.bar.own") == SEE


def test_the_default_endpoint() -> None:
    view = View(
        database(name("a.b"), access(USER, TALK, 1000), name("c.d"), access(USER, OWN, 1000))
    )
    assert view.may_own(OWNER, "x.y") and view.may_own(ALICE, "c.d")
    assert not view.may_own(ALICE, "a.b") and not view.may_own(BOB, "c.d")
    assert view.may_talk(ALICE, 0, ["z.z", "a.b"])
    assert not view.may_talk(BOB, 0, ["a.b"])
    assert view.may_talk(BOB, 1001, [])
    assert view.may_talk(OWNER, 1000, [])
    assert not view.may_talk(ALICE, 0, [])
    assert view.may_see_name(BOB, "a.b") and view.may_see(BOB, [])


def test_a_bus_with_another_policy_beside_this_one() -> None:
    view = View(database(name("a.b"), access(USER, OWN, 1000)), None, closed=False)
    assert view.may_own(BOB, "c.d") and not view.may_own(BOB, "a.b")
    assert view.may_talk(BOB, 0, []) and view.may_talk(BOB, 0, ["c.d"])
    assert not view.may_talk(BOB, 0, ["c.d", "a.b"])
    assert view.may_talk(ALICE, 0, ["c.d", "a.b"])


def test_a_custom_endpoint_only_takes_away() -> None:
    bus = database(name("a.b"), access(WORLD, OWN))
    own = database(
        name("a.b"),
        access(WORLD, TALK),
        name("c.d"),
        access(WORLD, OWN),
        name("e.f"),
        access(WORLD, SEE),
    )
    view = View(bus, own)
    assert not view.may_own(ALICE, "a.b")  # the endpoint says talk only
    assert not view.may_own(ALICE, "c.d")  # the bus says nothing
    assert not view.may_own(OWNER, "c.d")  # nobody is an owner here
    assert view.may_talk(ALICE, 0, ["a.b"])
    assert not view.may_talk(ALICE, 1000, [])  # not even to oneself
    assert view.may_talk(ALICE, 1000, ["c.d"])
    assert not view.may_talk(ALICE, 0, ["e.f"])
    assert view.may_see_name(ALICE, "e.f") and not view.may_see_name(ALICE, "g.h")
    assert view.may_see(ALICE, ["g.h", "e.f"]) and not view.may_see(ALICE, ["g.h"])
    assert not view.may_see(ALICE, [])


def test_items_of_a_command_are_read() -> None:
    data = items.build(abi.ITEM_NAME, b"a.b\0") + items.build(
        abi.ITEM_POLICY_ACCESS, struct.pack("=3Q", WORLD, TALK, 0)
    )
    assert policy.parse(items.split(data, 0), None, True)[0].accesses == (Access(WORLD, TALK, 0),)


def test_ids_are_those_of_the_namespace_of_whoever_says_them() -> None:
    said = policy.parse((name("a.b"), access(USER, OWN, 0), access(GROUP, TALK, 5)), None, True)
    uids, gids = IdMap(((0, 100000, 10),)), IdMap(((5, 7, 1),))
    (entry,) = policy.outside(said, uids, gids)
    assert entry.accesses == (Access(USER, OWN, 100000), Access(GROUP, TALK, 7))
    for wrong in (IdMap(()), IdMap(((1, 1, 1),))):
        with refused("EINVAL"):
            policy.outside(said, wrong, gids)
    (world,) = policy.outside(
        policy.parse((name("a.b"), access(WORLD, SEE)), None, True), uids, gids
    )
    assert world.accesses == (Access(WORLD, SEE, 0),)
