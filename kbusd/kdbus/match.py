"""Match rules: which signals and notifications a connection gets (kdbus.match(7), ipc/kdbus/match.c).

A match has a cookie and any number of rules, which must all be satisfied; one match is enough. A
match without rules lets everything through. Rules about messages are never satisfied by a
notification, and the other way round.
"""

from __future__ import annotations

import errno
from collections.abc import Container

import msgspec

from kbusd.kdbus import abi, bloom, layout, names
from kbusd.kdbus.errors import Errno
from kbusd.kdbus.items import Item


class Signal(msgspec.Struct, frozen=True):
    """What a connection sent: rules look at nothing else."""

    src_id: int
    dst_id: int
    src_names: Container[str]
    filter: bloom.Filter


class NameChange(msgspec.Struct, frozen=True):
    """A notification NAME_ADD, NAME_REMOVE or NAME_CHANGE; as a rule None is any name."""

    type: int
    name: str | None
    old_id: int
    new_id: int


class IdChange(msgspec.Struct, frozen=True):
    """A notification ID_ADD or ID_REMOVE, or a rule for it."""

    type: int
    id: int


class Source(msgspec.Struct, frozen=True):
    """A rule: the sender has this id."""

    id: int


class SourceName(msgspec.Struct, frozen=True):
    """A rule: the sender owns this name."""

    name: str


class Destination(msgspec.Struct, frozen=True):
    """A rule: the signal was sent to this id."""

    id: int


Rule = bloom.Mask | Source | SourceName | Destination | NameChange | IdChange
Notification = NameChange | IdChange

_NAME_CHANGES = (abi.ITEM_NAME_ADD, abi.ITEM_NAME_REMOVE, abi.ITEM_NAME_CHANGE)


def parse_rule(item: Item, bloom_size: int) -> Rule:
    """The rule that an item of MATCH_ADD stands for; its size has been checked.

    Raises Errno: EDOM for a bloom mask of another size than the bus's, EINVAL for a bad name.
    """
    match item.type:
        case abi.ITEM_BLOOM_MASK:
            return bloom.parse_mask(item.data, bloom_size)
        case abi.ITEM_NAME:
            names.check_well_known(item.text)
            return SourceName(item.text)
        case abi.ITEM_ID:
            return Source(item.number)
        case abi.ITEM_DST_ID:
            return Destination(item.number)
        case abi.ITEM_ID_ADD | abi.ITEM_ID_REMOVE:
            return IdChange(item.type, layout.ID_CHANGE.unpack(item.data)[0])
        case type if type in _NAME_CHANGES:
            old_id, _, new_id, _ = layout.NAME_CHANGE.unpack_from(item.data)
            # A name that can't be is no error here; it matches nothing.
            text = item.text[layout.NAME_CHANGE.size :] if _has_name(item) else None
            return NameChange(item.type, text, old_id, new_id)
    raise Errno(errno.EINVAL, f"{item.name} is no match rule")


def _has_name(item: Item) -> bool:
    return len(item.data) > layout.NAME_CHANGE.size


def _is(wanted: int, id: int) -> bool:
    return wanted == id or wanted == abi.MATCH_ID_ANY


def _admits(rule: Rule, signal: Signal) -> bool:
    match rule:
        case bloom.Mask():
            return rule.matches(signal.filter)
        case Source():
            return _is(rule.id, signal.src_id)
        case SourceName():
            return rule.name in signal.src_names
        case Destination():
            return _is(rule.id, signal.dst_id)
    return False


def _announces(rule: Rule, notification: Notification) -> bool:
    if isinstance(rule, IdChange) and isinstance(notification, IdChange):
        return rule.type == notification.type and _is(rule.id, notification.id)
    if isinstance(rule, NameChange) and isinstance(notification, NameChange):
        return (
            rule.type == notification.type
            and _is(rule.old_id, notification.old_id)
            and _is(rule.new_id, notification.new_id)
            and rule.name in (None, notification.name)
        )
    return False


class Matches:
    """The matches of one connection."""

    def __init__(self) -> None:
        self._matches: list[tuple[int, tuple[Rule, ...]]] = []

    def __len__(self) -> int:
        return len(self._matches)

    def add(self, cookie: int, rules: tuple[Rule, ...], replace: bool) -> None:
        """Add a match; with `replace` those with its cookie go first. Raises Errno EMFILE."""
        kept = [each for each in self._matches if not replace or each[0] != cookie]
        if len(kept) < abi.MAX_MATCHES:
            kept.append((cookie, rules))
            self._matches = kept
            return
        raise Errno(errno.EMFILE, f"the connection has {len(kept)} matches")

    def remove(self, cookie: int) -> None:
        """Remove all matches with a cookie. Raises Errno EBADSLT if there are none."""
        kept = [each for each in self._matches if each[0] != cookie]
        if len(kept) == len(self._matches):
            raise Errno(errno.EBADSLT, f"no match has the cookie {cookie:#x}")
        self._matches = kept

    def admits(self, signal: Signal) -> bool:
        """Whether a signal is to be delivered, as far as matches go."""
        return any(all(_admits(rule, signal) for rule in rules) for _, rules in self._matches)

    def announces(self, notification: Notification) -> bool:
        """Whether a notification is to be delivered, as far as matches go."""
        return any(
            all(_announces(rule, notification) for rule in rules) for _, rules in self._matches
        )
