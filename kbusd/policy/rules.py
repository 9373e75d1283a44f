"""The rules of a bus: what one <allow> or <deny> says, and in which contexts they stand.

A value module: no I/O, no decisions (those are in decide.py). `rule` turns the attributes of one
element into a Rule and refuses the combinations that dbus-daemon(1) refuses. What comes in was
written by an admin or a package: it is trusted to state policy, not to be well-formed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import msgspec

SEND, RECEIVE, OWN, USER, GROUP = range(5)
"""Rule.kind: what a rule is asked about."""

MESSAGE_TYPES = {"method_call": 1, "method_return": 2, "error": 3, "signal": 4}
"""The D-Bus specification's message types, by the names that send_type and receive_type use."""

MAX_FDS = (1 << 27) // 4
"""More descriptors than any message can carry: 128 MiB of body with nothing but UNIX_FD in it."""

_SEND = (
    "send_destination",
    "send_destination_prefix",
    "send_broadcast",
    "send_path",
    "send_type",
    "send_interface",
    "send_member",
    "send_error",
    "send_requested_reply",
)
_RECEIVE = (
    "receive_sender",
    "receive_path",
    "receive_type",
    "receive_interface",
    "receive_member",
    "receive_error",
    "receive_requested_reply",
)
_MODIFIERS = ("eavesdrop", "max_fds", "min_fds")
_ALONE = ("own", "own_prefix", "user", "group")
_ATTRIBUTES = frozenset((*_SEND, *_RECEIVE, *_MODIFIERS, *_ALONE, "log"))

# What strtol(3) with base 0 takes: dbus-daemon reads its numbers so, and ignores what follows.
_INTEGER = re.compile(r"\s*([+-]?)(0[xX][0-9a-fA-F]+|0[0-7]*|[1-9][0-9]*)")


class Rule(msgspec.Struct, frozen=True, array_like=True):
    """One <allow> or <deny>. A field that is None (type: 0) matches anything.

    `name` is the destination of a send rule, the sender of a receive rule, the bus name of an own
    rule; with `prefix` also every name below it. `id` is the uid or gid of a user or group rule.
    """

    allow: bool
    kind: int
    file: str
    line: int
    type: int = 0
    path: str | None = None
    interface: str | None = None
    member: str | None = None
    error: str | None = None
    name: str | None = None
    prefix: bool = False
    broadcast: bool | None = None
    requested_reply: bool = False
    eavesdrop: bool = False
    min_fds: int = 0
    max_fds: int = MAX_FDS
    log: bool = False
    id: int | None = None

    @property
    def place(self) -> str:
        """Where the rule stands, as ``file:line``."""
        return f"{self.file}:{self.line}"


class Policy(msgspec.Struct, frozen=True, array_like=True):
    """All rules, per context, each list in the order of the configuration."""

    default: tuple[Rule, ...] = ()
    mandatory: tuple[Rule, ...] = ()
    users: dict[int, tuple[Rule, ...]] = {}
    groups: dict[int, tuple[Rule, ...]] = {}
    at_console: tuple[Rule, ...] = ()
    not_at_console: tuple[Rule, ...] = ()


def integer(text: str) -> tuple[int, str] | None:
    """The number at the start of `text` and what follows it, or None (strtol(3), base 0)."""
    found = _INTEGER.match(text)
    if found is None:
        return None
    digits = found[2]
    base = 16 if digits[:2] in ("0x", "0X") else 8 if digits[0] == "0" else 10
    return int(found[1] + digits, base), text[found.end() :]


def rule(
    element: str,
    attributes: Mapping[str, str],
    file: str,
    line: int,
    uid_of: Callable[[str], int | None],
    gid_of: Callable[[str], int | None],
    warn: Callable[[str], None],
) -> Rule | None:
    """The Rule that <element attributes...> states.

    `uid_of` and `gid_of` resolve a name to an id; a rule about a name that they do not know is
    dropped with a warning, and None returned. Raises ValueError with the reason for what
    dbus-daemon refuses too.
    """
    for attribute in attributes:
        if attribute not in _ATTRIBUTES:
            raise ValueError(f'attribute "{attribute}" is not known on <{element}>')
    get = attributes.get
    sends = any(name in attributes for name in _SEND)
    # <allow eavesdrop="true"/> alone is about receiving.
    receives = any(name in attributes for name in _RECEIVE) or (
        not sends and "eavesdrop" in attributes
    )
    alone = [name for name in _ALONE if name in attributes]
    _check_combination(element, attributes, sends, receives, alone)

    allow = element == "allow"
    if alone:
        return _rule_alone(
            element, alone[0], attributes[alone[0]], file, line, uid_of, gid_of, warn
        )

    side = "send" if sends else "receive"

    def text(field: str) -> str | None:
        value = get(f"{side}_{field}")
        return None if value == "*" else value

    type_name = text("type")
    if type_name is not None and type_name not in MESSAGE_TYPES:
        raise ValueError(f'"{type_name}" is not a message type')
    eavesdrop = _boolean(attributes, "eavesdrop")
    broadcast = _boolean(attributes, "send_broadcast")
    requested_reply = _boolean(attributes, f"{side}_requested_reply")
    name = text("destination") if sends else text("sender")
    prefix = get("send_destination_prefix")
    if name is not None and broadcast:
        raise ValueError(
            f'send_broadcast="true" with send_destination="{name}" can match nothing: '
            "a broadcast has no destination"
        )
    return Rule(
        allow=allow,
        kind=SEND if sends else RECEIVE,
        file=file,
        line=line,
        type=0 if type_name is None else MESSAGE_TYPES[type_name],
        path=text("path"),
        interface=text("interface"),
        member=text("member"),
        error=text("error"),
        name=name if prefix is None else prefix,
        prefix=prefix is not None,
        broadcast=broadcast,
        # An allow covers requested replies only, a deny unrequested ones only, unless it says else.
        requested_reply=allow if requested_reply is None else requested_reply,
        eavesdrop=bool(eavesdrop),
        min_fds=_fds(attributes, "min_fds", 0),
        max_fds=_fds(attributes, "max_fds", MAX_FDS),
        log=sends and get("log") == "true",
    )


def _check_combination(
    element: str, attributes: Mapping[str, str], sends: bool, receives: bool, alone: list[str]
) -> None:
    if not (sends or receives or alone):
        raise ValueError(f"<{element}> says nothing: it needs an attribute to match on")
    for side in ("send", "receive"):
        if f"{side}_member" in attributes and not (
            f"{side}_interface" in attributes or f"{side}_path" in attributes
        ):
            raise ValueError(
                f"{side}_member on <{element}> needs {side}_interface or {side}_path beside it"
            )
    messages = sends or receives or any(name in attributes for name in _MODIFIERS)
    if messages + len(alone) > 1:
        raise ValueError(
            f"<{element}> mixes {', '.join(name for name in attributes if name != 'log')}: "
            "own, own_prefix, user and group each stand alone"
        )
    if sends and receives:
        raise ValueError(f"<{element}> mixes send_ and receive_ attributes")
    for side in ("send", "receive"):
        if f"{side}_error" in attributes and (
            f"{side}_interface" in attributes or f"{side}_member" in attributes
        ):
            raise ValueError(
                f"{side}_error on <{element}> cannot stand beside {side}_interface or {side}_member"
            )
    if "send_destination" in attributes and "send_destination_prefix" in attributes:
        raise ValueError(
            f"send_destination and send_destination_prefix exclude each other on <{element}>"
        )


def _rule_alone(
    element: str,
    attribute: str,
    value: str,
    file: str,
    line: int,
    uid_of: Callable[[str], int | None],
    gid_of: Callable[[str], int | None],
    warn: Callable[[str], None],
) -> Rule | None:
    """A rule about owning a name or about who may connect."""
    allow = element == "allow"
    if attribute == "own":
        return Rule(allow, OWN, file, line, name=None if value == "*" else value)
    if attribute == "own_prefix":
        return Rule(allow, OWN, file, line, name=value, prefix=True)
    kind = USER if attribute == "user" else GROUP
    if value == "*":
        return Rule(allow, kind, file, line)
    number = uid_of(value) if kind == USER else gid_of(value)
    if number is None:
        warn(f'no {attribute} is called "{value}": this <{element}> rule is ignored')
        return None
    return Rule(allow, kind, file, line, id=number)


def _boolean(attributes: Mapping[str, str], name: str) -> bool | None:
    value = attributes.get(name)
    if value is None:
        return None
    if value not in ("true", "false"):
        raise ValueError(f'{name}="{value}" must be "true" or "false"')
    return value == "true"


def _fds(attributes: Mapping[str, str], name: str, default: int) -> int:
    value = attributes.get(name)
    if value is None:
        return default
    parsed = integer(value)
    if parsed is None or not 0 <= parsed[0] <= MAX_FDS:
        raise ValueError(f'{name}="{value}" must be a number from 0 to {MAX_FDS}')
    return parsed[0]
