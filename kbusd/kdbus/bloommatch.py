"""D-Bus match rules and signals in kdbus's terms: bloom masks and filters, as sd-bus computed them.

kdbus does not look into payloads. A sender puts a bloom filter with all that one may ask about into
its signal, a receiver a mask with all that its rule asks for into a match; the bus compares bits. So
for a signal of a D-Bus client that goes to kdbus clients, its worker computes `message_filter`; a
kdbus client that has a D-Bus rule installs what `matches` says.

A filter has what PORTING-DBUS1 of systemd 221 to 230 lists, and a little more, so that no rule of
D-Bus ever misses a signal: sd-bus ended at the first argument that is no text (and by a slip, after
the first one that is), here all texts among the first 64 are in it. More bits only mean that a
receiver is handed a signal which its rules refuse. Left out are prefixes longer than any rule.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

from kbusd.kdbus import abi, bloomhash, layout
from kbusd.kdbus.payload import unique_id

MAX_ELEMENTS = 1024  # of arrays in one message; more would fill most filters, and cost as much
MAX_PREFIX = 1024  # bytes: as long as a match rule may be; more would cost the square of the length

_TYPES = {1: "method_call", 2: "method_return", 3: "error", 4: "signal"}
_DRIVER = "org.freedesktop.DBus"
_DRIVER_PATH = "/org/freedesktop/DBus"

Item = tuple[int, bytes]  # the type, and what follows an item's head


class Rule(Protocol):
    """What is needed of a match rule; kbusd.wire.match.MatchRule has it."""

    @property
    def type(self) -> int: ...
    @property
    def sender(self) -> str | None: ...
    @property
    def interface(self) -> str | None: ...
    @property
    def member(self) -> str | None: ...
    @property
    def path(self) -> str | None: ...
    @property
    def path_namespace(self) -> str | None: ...
    @property
    def destination(self) -> str | None: ...
    @property
    def args(self) -> tuple[tuple[int, str], ...]: ...
    @property
    def arg0_namespace(self) -> str | None: ...


def message_filter(
    size: int,
    n_hash: int,
    type: int,
    interface: str | None,
    member: str | None,
    path: str | None,
    arguments: Iterable[tuple[int, str, str]],
) -> bytes:
    """The filter of a message, `size` bytes with `n_hash` bits a property, as the bus has it.

    `arguments` are (index, type, text) as `gvariant.text_arguments` or kbusd.wire.body give them.
    If the bus's parameters are none that sd-bus could use, nobody knows what its clients' masks mean:
    then the filter has all bits, so that everyone who may see the signal gets it. So it has for more
    than MAX_ELEMENTS elements of arrays.
    """
    if not bloomhash.usable(size, n_hash):
        return b"\xff" * size
    filter = bytearray(size)

    def add(kind: str, value: bytes) -> None:
        bloomhash.add(filter, n_hash, kind.encode() + b":" + value)

    if type in _TYPES:
        add("message-type", _TYPES[type].encode())
    if interface is not None:
        add("interface", interface.encode())
    if member is not None:
        add("member", member.encode())
    if path is not None:
        value = path.encode()
        add("path", value)
        for prefix in _prefixes(value, b"/"):
            add("path-slash-prefix", prefix)
    elements = 0
    for index, kind, text in arguments:
        value = text.encode()
        if kind.startswith("a"):
            elements += 1
            if elements > MAX_ELEMENTS:
                return b"\xff" * size
            add(f"arg{index}-has", value)
            continue
        add(f"arg{index}", value)
        for prefix in _prefixes(value, b"."):
            add(f"arg{index}-dot-prefix", prefix)
        for prefix in _prefixes(value, b"/"):
            add(f"arg{index}-slash-prefix", prefix)
    return bytes(filter)


def _prefixes(text: bytes, separator: bytes) -> Iterator[bytes]:
    """`text`, and its beginnings up to and before each separator."""
    if len(text) <= MAX_PREFIX:
        yield text
    end = text.rfind(separator, 0, MAX_PREFIX)
    while end >= 0:
        yield text[: end + 1]
        if end:
            yield text[:end]
        end = text.rfind(separator, 0, end)


def mask(size: int, n_hash: int, rule: Rule) -> bytes | None:
    """The bits that a signal's filter must have for the rule to match, or None if it asks for none.

    argNpath asks for none: it goes both ways, so no set of bits says it. Nor do names of senders and
    receivers, which are no bits. Raises ValueError if sd-bus could not use the bus's parameters.
    """
    properties = [
        (f"{kind}:{value}")
        for kind, value in (
            ("message-type", _TYPES.get(rule.type)),
            ("interface", rule.interface),
            ("member", rule.member),
            ("path", rule.path),
            ("path-slash-prefix", rule.path_namespace),
            ("arg0-dot-prefix", rule.arg0_namespace),
            *((f"arg{index}", value) for index, value in rule.args),
        )
        if value is not None
    ]
    if not properties:
        return None
    bits = bytearray(size)
    for each in properties:
        bloomhash.add(bits, n_hash, each.encode())
    return bytes(bits)


def matches(size: int, n_hash: int, rule: Rule) -> list[tuple[Item, ...]]:
    """The matches that a kdbus client installs for a rule, each with all its items.

    The first is for messages. Others follow if the rule can match NameOwnerChanged, which kdbus tells
    by notifications. What comes may be more than the rule asks for: the client looks at it again.
    """
    items: list[Item] = []
    name: Item | None = None
    if rule.sender is not None:
        sender = unique_id(rule.sender)
        if sender is None:
            name = abi.ITEM_NAME, rule.sender.encode() + b"\0"
        else:
            items.append((abi.ITEM_ID, layout.U64.pack(sender)))
    if rule.destination is not None:
        destination = unique_id(rule.destination)
        if destination is not None:
            items.append((abi.ITEM_DST_ID, layout.U64.pack(destination)))
    bits = mask(size, n_hash, rule)
    if bits is not None:
        items.append((abi.ITEM_BLOOM_MASK, bits))
    if name is not None:
        items.append(name)
    found = [tuple(items)]
    if _may_be_name_owner_changed(rule):
        wanted = dict(rule.args)
        found += _name_changes(wanted.get(0), wanted.get(1), wanted.get(2))
    return found


def _may_be_name_owner_changed(rule: Rule) -> bool:
    return (
        rule.type in (0, 4)
        and rule.sender in (None, _DRIVER)
        and rule.interface in (None, _DRIVER)
        and rule.member in (None, "NameOwnerChanged")
        and rule.path in (None, _DRIVER_PATH)
        and rule.destination is None
    )


def _name_changes(name: str | None, old: str | None, new: str | None) -> list[tuple[Item, ...]]:
    """Matches for notifications: the arguments of NameOwnerChanged, None where any will do.

    A name comes (no old owner), goes (no new one) or moves, and a unique name comes or goes; there is
    no other NameOwnerChanged. That a name moves is asked for in any case, because kdbus also says so
    where a name goes from an activator to its service, which for D-Bus is a name that comes.
    """
    id = None if name is None else unique_id(name)
    old_id, new_id = (unique_id(owner) if owner else abi.MATCH_ID_ANY for owner in (old, new))
    if old_id is None or new_id is None or (old == "" and new == ""):
        return []
    if id is not None and not {old_id, new_id} <= {id, abi.MATCH_ID_ANY}:
        return []
    found: list[tuple[Item, ...]] = []
    if id is None:
        owners = layout.NAME_CHANGE.pack(old_id, 0, new_id, 0)
        content = owners + (b"" if name is None else name.encode() + b"\0")
        if not old:
            found.append(((abi.ITEM_NAME_ADD, content),))
        if not new:
            found.append(((abi.ITEM_NAME_REMOVE, content),))
        found.append(((abi.ITEM_NAME_CHANGE, content),))
    if name is None or id is not None:
        anyone = abi.MATCH_ID_ANY if id is None else id
        if not old:
            found.append(((abi.ITEM_ID_ADD, layout.ID_CHANGE.pack(new_id if new else anyone, 0)),))
        if not new:
            found.append(
                ((abi.ITEM_ID_REMOVE, layout.ID_CHANGE.pack(old_id if old else anyone, 0)),)
            )
    return found
