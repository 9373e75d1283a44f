"""Match rules: which item makes which rule, and what each lets through."""

from __future__ import annotations

import struct

import pytest

from kbusd.kdbus import abi, bloom, match
from kbusd.kdbus.items import Item
from kbusd.kdbus.match import (
    Destination,
    IdChange,
    Matches,
    NameChange,
    Rule,
    Signal,
    Source,
    SourceName,
)
from tests.unit.kdbus.refused import refused

ANY = abi.MATCH_ID_ANY


def u64(*numbers: int) -> bytes:
    return struct.pack(f"={len(numbers)}Q", *numbers)


SIGNAL = Signal(7, ANY, {"a.b"}, bloom.Filter(0, u64(0b1100)))


@pytest.mark.parametrize(
    ("item", "rule"),
    [
        (Item(abi.ITEM_BLOOM_MASK, u64(1, 2)), bloom.Mask((u64(1), u64(2)))),
        (Item(abi.ITEM_NAME, b"a.b\0"), SourceName("a.b")),
        (Item(abi.ITEM_ID, u64(7)), Source(7)),
        (Item(abi.ITEM_DST_ID, u64(7)), Destination(7)),
        (Item(abi.ITEM_ID_ADD, u64(7, 1)), IdChange(abi.ITEM_ID_ADD, 7)),
        (
            Item(abi.ITEM_NAME_ADD, u64(1, 0, 2, 0)),
            NameChange(abi.ITEM_NAME_ADD, None, 1, 2),
        ),
        (
            Item(abi.ITEM_NAME_CHANGE, u64(1, 0, 2, 0) + b"a.b\0"),
            NameChange(abi.ITEM_NAME_CHANGE, "a.b", 1, 2),
        ),
    ],
)
def test_items_are_rules(item: Item, rule: Rule) -> None:
    assert match.parse_rule(item, 8) == rule


def test_refusals() -> None:
    with refused("EDOM"):
        match.parse_rule(Item(abi.ITEM_BLOOM_MASK, u64(1)), 16)
    with refused("EINVAL"):
        match.parse_rule(Item(abi.ITEM_NAME, b"a.*\0"), 8)


@pytest.mark.parametrize(
    ("rules", "passes"),
    [
        ((), True),
        ((Source(7),), True),
        ((Source(ANY),), True),
        ((Source(8),), False),
        ((Source(7), SourceName("a.b")), True),
        ((Source(7), SourceName("a.c")), False),
        ((Destination(ANY),), True),
        ((Destination(9),), False),
        ((bloom.Mask((u64(0b0100),)),), True),
        ((bloom.Mask((u64(0b0110),)),), False),
        ((IdChange(abi.ITEM_ID_ADD, ANY),), False),
    ],
)
def test_signals(rules: tuple[Rule, ...], passes: bool) -> None:
    matches = Matches()
    assert not matches.admits(SIGNAL)
    matches.add(1, rules, replace=False)
    assert matches.admits(SIGNAL) == passes
    if not passes:
        matches.add(2, (Source(7),), replace=False)
        assert matches.admits(SIGNAL)  # one match is enough


ADDED = NameChange(abi.ITEM_NAME_ADD, "a.b", 0, 7)


@pytest.mark.parametrize(
    ("rules", "what", "passes"),
    [
        ((), ADDED, True),
        ((NameChange(abi.ITEM_NAME_ADD, None, ANY, ANY),), ADDED, True),
        ((NameChange(abi.ITEM_NAME_ADD, "a.b", 0, 7),), ADDED, True),
        ((NameChange(abi.ITEM_NAME_ADD, "a.c", ANY, ANY),), ADDED, False),
        ((NameChange(abi.ITEM_NAME_ADD, None, 1, ANY),), ADDED, False),
        ((NameChange(abi.ITEM_NAME_ADD, None, ANY, 8),), ADDED, False),
        ((NameChange(abi.ITEM_NAME_REMOVE, None, ANY, ANY),), ADDED, False),
        ((IdChange(abi.ITEM_ID_ADD, ANY),), IdChange(abi.ITEM_ID_ADD, 7), True),
        ((IdChange(abi.ITEM_ID_ADD, 7),), IdChange(abi.ITEM_ID_ADD, 7), True),
        ((IdChange(abi.ITEM_ID_ADD, 8),), IdChange(abi.ITEM_ID_ADD, 7), False),
        ((IdChange(abi.ITEM_ID_ADD, ANY),), IdChange(abi.ITEM_ID_REMOVE, 7), False),
        ((Source(ANY),), ADDED, False),
        ((bloom.Mask((u64(0),)),), ADDED, False),
        ((IdChange(abi.ITEM_ID_ADD, ANY),), ADDED, False),
    ],
)
def test_notifications(rules: tuple[Rule, ...], what: match.Notification, passes: bool) -> None:
    matches = Matches()
    matches.add(1, rules, replace=False)
    assert matches.announces(what) == passes


def test_cookies() -> None:
    matches = Matches()
    with refused("EBADSLT"):
        matches.remove(5)
    matches.add(5, (Source(1),), replace=False)
    matches.add(5, (Source(2),), replace=False)
    assert len(matches) == 2
    matches.add(5, (Source(3),), replace=True)
    assert len(matches) == 1
    matches.remove(5)
    assert not matches.admits(Signal(3, ANY, (), SIGNAL.filter))


def test_there_is_a_limit() -> None:
    matches = Matches()
    for cookie in range(abi.MAX_MATCHES):
        matches.add(cookie, (), replace=False)
    with refused("EMFILE"):
        matches.add(999, (), replace=True)
    matches.add(3, (), replace=True)
    assert len(matches) == abi.MAX_MATCHES
