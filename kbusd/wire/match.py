"""Match rules: parse what a client gave to AddMatch, compare two, ask whether a message matches.

D-Bus Specification, "Message Bus Message Routing: Match Rules". The text comes from a client and is
judged here; error texts are dbus-daemon 1.14's (some with the newline at their end), because
programs compare them. Two rules are equal if they ask for the same, however they are written, so
that RemoveMatch finds what AddMatch added.

Departures from dbus-daemon, each where it does not do what it was asked: all keys of a rule count
and not the first 16 only; argument numbers are decimal only, where it reads "arg010" as octal; rules
that differ in their path_namespace are not equal.
"""

from __future__ import annotations

from collections.abc import Container, Sequence

import msgspec

from kbusd.wire import names
from kbusd.wire.body import PathArgument

MAX_LENGTH = 1024  # bytes, as dbus-daemon's DBUS_MAXIMUM_MATCH_RULE_LENGTH
MAX_ARGUMENT = 63

MATCH_RULE_INVALID = "org.freedesktop.DBus.Error.MatchRuleInvalid"
LIMITS_EXCEEDED = "org.freedesktop.DBus.Error.LimitsExceeded"

TYPES = {"method_call": 1, "method_return": 2, "error": 3, "signal": 4}

_BLANK = " \t\n\r"


class MatchError(ValueError):
    """A match rule that is not valid; `error` is the D-Bus error name, str() its text."""

    def __init__(self, text: str, error: str = MATCH_RULE_INVALID) -> None:
        super().__init__(text)
        self.error = error


class MatchRule(msgspec.Struct, frozen=True, cache_hash=True):
    """What a rule asks for; None (for `type`: 0) where it does not say.

    The three kinds of arguments are (number, text), sorted by number; no number comes twice.
    """

    type: int = 0
    sender: str | None = None
    interface: str | None = None
    member: str | None = None
    path: str | None = None
    path_namespace: str | None = None
    destination: str | None = None
    args: tuple[tuple[int, str], ...] = ()
    path_args: tuple[tuple[int, str], ...] = ()
    arg0_namespace: str | None = None
    eavesdrop: bool = False

    @property
    def needs_args(self) -> bool:
        """Whether the answer can depend on the message's arguments."""
        return bool(self.args or self.path_args or self.arg0_namespace is not None)

    def matches(
        self,
        type: int,
        sender_names: Container[str],
        destination: str | None,
        path: str | None,
        interface: str | None,
        member: str | None,
        args: Sequence[str | None],
        recipient_names: Container[str] | None = None,
    ) -> bool:
        """Whether a message matches.

        `sender_names` are all names that the sender owns, unique and well-known (for the bus
        itself "org.freedesktop.DBus"); `args` are as of `body.match_arguments`, and may be empty
        if not `needs_args`; `recipient_names` are the addressee's, or None where it is not known
        or is the bus: then a rule's destination is compared with the message's as written.
        A message to one destination matches rules with eavesdrop='true' only, and monitors' rules
        if these are made so with `eavesdropping`.
        """
        if self.type and self.type != type:
            return False
        if self.interface is not None and self.interface != interface:
            return False
        if self.member is not None and self.member != member:
            return False
        if self.path is not None and self.path != path:
            return False
        if self.path_namespace is not None and not in_path_namespace(path, self.path_namespace):
            return False
        if destination is not None:
            if not self.eavesdrop:
                return False
            if self.destination is not None:
                if recipient_names is None:
                    if self.destination != destination:
                        return False
                elif self.destination not in recipient_names:
                    return False
        elif self.destination is not None:
            return False
        if self.sender is not None and self.sender not in sender_names:
            return False
        return self._arguments_match(args)

    def _arguments_match(self, args: Sequence[str | None]) -> bool:
        for number, text in self.args:
            if _string(args, number) != text:
                return False
        for number, text in self.path_args:
            actual = args[number] if number < len(args) else None
            if actual is None or not _paths_meet(actual, text):
                return False
        if self.arg0_namespace is not None:
            actual = _string(args, 0)
            if actual is None or not in_name_namespace(actual, self.arg0_namespace):
                return False
        return True


def eavesdropping(rule: MatchRule) -> MatchRule:
    """The rule as a monitor's: it matches messages to others too (BecomeMonitor)."""
    return msgspec.structs.replace(rule, eavesdrop=True)


def in_path_namespace(path: str | None, namespace: str) -> bool:
    """Whether an object path is `namespace` or below it; "/" has every path."""
    if path is None or not path.startswith(namespace):
        return False
    return len(namespace) == 1 or len(path) == len(namespace) or path[len(namespace)] == "/"


def in_name_namespace(name: str, namespace: str) -> bool:
    """Whether a bus or interface name is `namespace` or begins with it and a dot."""
    return name == namespace or name.startswith(namespace + ".")


def parse(rule: str) -> MatchRule:
    """The rule that a text stands for. Raises MatchError."""
    size = len(rule.encode(errors="surrogatepass"))
    if size > MAX_LENGTH:
        raise MatchError(
            f"Match rule text is {size} bytes, maximum is {MAX_LENGTH}", LIMITS_EXCEEDED
        )
    found: dict[str, str] = {}
    type = 0
    eavesdrop = False
    arguments: dict[int, tuple[str, str]] = {}
    for key, value in _pairs(rule):
        match key:
            case "type":
                _once(found, key, value)
                if value not in TYPES:
                    raise MatchError(f"Invalid message type ({value}) in match rule\n")
                type = TYPES[value]
            case "sender":
                _once(found, key, value)
                if not names.is_bus_name(value):
                    raise MatchError(f"Sender name '{value}' is invalid\n")
            case "interface":
                _once(found, key, value)
                if not names.is_interface(value):
                    raise MatchError(f"Interface name '{value}' is invalid\n")
            case "member":
                _once(found, key, value)
                if not names.is_member(value):
                    raise MatchError(f"Member name '{value}' is invalid\n")
            case "path" | "path_namespace":
                if "path" in found or "path_namespace" in found:
                    raise MatchError("path or path_namespace specified twice in match rule\n")
                found[key] = value
                if not names.is_path(value):
                    raise MatchError(f"Path '{value}' is invalid\n")
            case "destination":
                _once(found, key, value)
                if not names.is_bus_name(value):
                    raise MatchError(f"Destination name '{value}' is invalid\n")
            case "eavesdrop":
                # May come twice, the last one counts: monitors prepend one to a user's rule.
                if value not in ("true", "false"):
                    raise MatchError(
                        f"eavesdrop='{value}' is invalid, it should be 'true' or 'false'\n"
                    )
                eavesdrop = value == "true"
            case _ if key.startswith("arg"):
                number, kind = _argument(key, value)
                if number in arguments:
                    raise MatchError(f"Argument {key} matched more than once in match rule\n")
                arguments[number] = kind, value
            case _:
                raise MatchError(f'Unknown key "{key}" in match rule')
    numbered = sorted((number, kind, value) for number, (kind, value) in arguments.items())
    return MatchRule(
        type=type,
        sender=found.get("sender"),
        interface=found.get("interface"),
        member=found.get("member"),
        path=found.get("path"),
        path_namespace=found.get("path_namespace"),
        destination=found.get("destination"),
        args=tuple((number, value) for number, kind, value in numbered if kind == ""),
        path_args=tuple((number, value) for number, kind, value in numbered if kind == "path"),
        arg0_namespace=next((value for _, kind, value in numbered if kind == "namespace"), None),
        eavesdrop=eavesdrop,
    )


def _once(found: dict[str, str], key: str, value: str) -> None:
    if key in found:
        raise MatchError(f"Key {key} specified twice in match rule\n")
    found[key] = value


def _pairs(rule: str) -> list[tuple[str, str]]:
    """The keys and values of a rule, unquoted. As in dbus-daemon, an empty key ends the rule."""
    pairs = []
    at = 0
    while at < len(rule):
        while at < len(rule) and rule[at] in _BLANK:
            at += 1
        start = at
        while at < len(rule) and rule[at] != "=" and rule[at] not in _BLANK:
            at += 1
        key = rule[start:at]
        if not key:
            break
        while at < len(rule) and rule[at] in _BLANK:
            at += 1
        if at == len(rule) or rule[at] != "=":
            raise MatchError("Match rule has a key with no subsequent '=' character")
        value, at = _value(rule, at + 1)
        pairs.append((key, value))
    return pairs


def _value(rule: str, at: int) -> tuple[str, int]:
    """The value at `at`, and where the next key begins.

    Between apostrophes everything stands for itself; outside, a comma ends the value and a
    backslash makes an apostrophe that follows it stand for itself, and is else itself.
    """
    value = []
    while at < len(rule) and rule[at] != ",":
        if rule[at] == "'":
            end = rule.find("'", at + 1)
            if end < 0:
                raise MatchError("Unbalanced quotation marks in match rule")
            value.append(rule[at + 1 : end])
            at = end + 1
        elif rule[at] == "\\" and at + 1 < len(rule):
            # What follows is taken as it is, be it a comma.
            value.append(rule[at + 1] if rule[at + 1] == "'" else rule[at : at + 2])
            at += 2
        else:
            value.append(rule[at])
            at += 1
    return "".join(value), at + 1


def _argument(key: str, value: str) -> tuple[int, str]:
    """The number and the kind ("", "path" or "namespace") of a key that begins with "arg"."""
    if len(key) < 4:
        raise MatchError(
            f"Key '{key}' in match rule starts with 'arg' but lacks an arg number."
            " Should be 'arg0' or 'arg7' for example.\n"
        )
    kind = key[3:].lstrip("0123456789")
    digits = key[3 : len(key) - len(kind)]
    if not digits or int(digits) > 0xFFFFFFFFFFFFFFFF:
        raise MatchError(
            f"Key '{key}' in match rule starts with 'arg' but could not parse arg number."
            " Should be 'arg0' or 'arg7' for example.\n"
        )
    number = int(digits)
    if key == "arg0namespace":
        if not names.is_namespace(value):
            raise MatchError(f"arg0namespace='{value}' is not a valid prefix of a bus name")
    elif kind not in ("", "path"):
        raise MatchError(
            f"Key '{key}' in match rule contains junk after argument number ({number})."
            f" Only 'arg{number}path' (for example) or 'arg0namespace' are valid"
        )
    if number > MAX_ARGUMENT:
        raise MatchError(
            f"Key '{key}' in match rule has arg number {number}"
            f" but the maximum is {MAX_ARGUMENT}.\n"
        )
    return number, kind


def _string(args: Sequence[str | None], number: int) -> str | None:
    """The argument if it is of type STRING."""
    text = args[number] if number < len(args) else None
    return None if isinstance(text, PathArgument) else text


def _paths_meet(actual: str, wanted: str) -> bool:
    """argNpath: equal, or one ends in "/" and begins the other."""
    return (
        actual == wanted
        or (actual.endswith("/") and wanted.startswith(actual))
        or (wanted.endswith("/") and actual.startswith(wanted))
    )
