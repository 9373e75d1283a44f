"""What a client that came by an endpoint may see, call, hear and own: one more policy, that only takes away.

An endpoint is a further socket of the bus. Its policy is said in the words of xdg-dbus-proxy(1), as lines
`WORD=NAME` and `WORD=NAME=RULE`, and read by `parse`:

    see, talk, own           how far the client may go with a name; each includes those before it
    hide                     takes the name out again, whatever else is said of it
    call, broadcast          what it may call or hear of a name that it may otherwise only see
    deny-call, deny-broadcast    what it may not, whatever else is said, of this name or of its owner's others

NAME is a well-known name; `org.foo.*` is org.foo and all names below it. RULE is
`[INTERFACE.MEMBER][@PATH]`, either of which may end in `*`, and then ` argN='TEXT'` as often as needed.

A connection is treated by all the names that it owns: who has one that may be called, may be called by
any. Pure computation; workers and broker ask here, each for itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Sequence

import msgspec

from kbusd.policy.decide import DRIVER_NAME

NONE, SEE, TALK, OWN = range(4)
WORDS = {"hide": NONE, "see": SEE, "talk": TALK, "own": OWN}
RULE_WORDS = ("call", "broadcast", "deny-call", "deny-broadcast")

MAX_LINES = 512
MAX_LINE = 1024
MAX_TEXT = 16 << 10  # every worker has it of every endpoint
MAX_ARGS = 64  # as many as match rules can ask for, and so all that are looked at

_NAME = re.compile(r"[A-Za-z_-][A-Za-z0-9_-]*(\.[A-Za-z_-][A-Za-z0-9_-]*)*")
_MEMBER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*")
_PATH = re.compile(r"/|(/[A-Za-z0-9_]+)+")
_RULE = re.compile(r"([^@\s]*)(?:@(\S*))?((?:\s+arg[0-9]{1,2}='[^']*')*)")
_ARG = re.compile(r"arg([0-9]{1,2})='([^']*)'")
_ENDPOINT = re.compile(r"[A-Za-z0-9_-]{1,64}")

Args = Callable[[], Sequence[str | None]]
"""The message's arguments, as match rules see them; looked at only where a rule asks for them."""


class EndpointError(ValueError):
    """What was said of an endpoint makes no sense; the text says which line and why."""


class Rule(msgspec.Struct, frozen=True, array_like=True):
    """One `call` or `broadcast` line. A field that is empty does not matter."""

    broadcast: bool
    allow: bool
    name: str
    below: bool
    interface: str = ""
    member: str = ""
    path: str = ""
    subtree: bool = False
    args: tuple[tuple[int, str], ...] = ()


class Level(msgspec.Struct, frozen=True, array_like=True):
    """One `hide`, `see`, `talk` or `own` line."""

    level: int
    name: str
    below: bool


class Endpoint(msgspec.Struct, frozen=True, array_like=True):
    """An endpoint: what is said of names, and `lines`, the words in which that was said."""

    name: str
    lines: tuple[str, ...] = ()
    levels: tuple[Level, ...] = ()
    rules: tuple[Rule, ...] = ()


class Asked(msgspec.Struct, frozen=True):
    """The part of a message that rules look at."""

    path: str | None
    interface: str | None
    member: str | None
    args: Args


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Endpoint)


def encode(endpoint: Endpoint) -> bytes:
    """For another process."""
    return _encoder.encode(endpoint)


def decode(data: bytes) -> Endpoint:
    """What an endpoint says, from another process: read again from its words, so that no other can have
    been said. Raises EndpointError."""
    try:
        told = _decoder.decode(data)
    except msgspec.MsgspecError as error:
        raise EndpointError(str(error)) from None
    return parse(told.name, told.lines)


def parse(name: str, lines: Sequence[str]) -> Endpoint:
    """An endpoint from its words. Raises EndpointError."""
    if not _ENDPOINT.fullmatch(name):
        raise EndpointError(f'"{name}" cannot be the name of an endpoint: letters, digits, _ and -')
    if len(lines) > MAX_LINES or sum(map(len, lines)) > MAX_TEXT:
        raise EndpointError(f"more than {MAX_LINES} lines, or {MAX_TEXT} characters")
    levels: list[Level] = []
    rules: list[Rule] = []
    for line in lines:
        word, _, rest = line.partition("=")
        if len(line) > MAX_LINE:
            raise EndpointError(f"{line[:32]}...: longer than {MAX_LINE} characters")
        if word in WORDS:
            levels.append(Level(WORDS[word], *_pattern(line, rest)))
        elif word in RULE_WORDS:
            rules.append(_rule(line, word, rest))
        else:
            known = ", ".join([*WORDS, *RULE_WORDS])
            raise EndpointError(f"{line}: begins with none of {known}")
    return Endpoint(name, tuple(lines), tuple(levels), tuple(rules))


def _pattern(line: str, name: str) -> tuple[str, bool]:
    """A well-known name, and whether those below it are meant, too."""
    below = name.endswith(".*")
    name = name.removesuffix(".*")
    if not _NAME.fullmatch(name) or len(name) > 255:
        raise EndpointError(f'{line}: "{name}" is not a well-known name')
    if name == DRIVER_NAME:
        raise EndpointError(f"{line}: what the bus itself does for its clients is fixed")
    if "." not in name and not below:
        raise EndpointError(f'{line}: "{name}" is not a well-known name')
    return name, below


def _rule(line: str, word: str, text: str) -> Rule:
    name, _, what = text.partition("=")
    found = _RULE.fullmatch(what)
    if found is None:
        raise EndpointError(
            f"{line}: a rule is [INTERFACE.MEMBER][@PATH], and then argN='TEXT' as often as needed"
        )
    method, path, args = found[1], found[2], found[3]
    interface = member = ""
    if method not in ("", "*"):
        interface, _, member = method.rpartition(".")
        member = "" if member == "*" else member
        if not _MEMBER.fullmatch(interface) or (member and not _MEMBER.fullmatch(member)):
            raise EndpointError(f'{line}: "{method}" is neither INTERFACE.MEMBER nor INTERFACE.*')
    subtree = path is not None and path.endswith("/*")
    if path is None or path == "/*":
        path, subtree = "", False
    else:
        path = path.removesuffix("/*")
        if not _PATH.fullmatch(path):
            raise EndpointError(f'{line}: "{path}" is not an object path')
    if any(int(number) >= MAX_ARGS for number, _ in _ARG.findall(args)):
        raise EndpointError(f"{line}: arguments are arg0 to arg{MAX_ARGS - 1}")
    return Rule(
        word.endswith("broadcast"),
        not word.startswith("deny"),
        *_pattern(line, name),
        interface,
        member,
        path,
        subtree,
        tuple((int(number), value) for number, value in _ARG.findall(args)),
    )


class View:
    """An endpoint's policy, ready to be asked."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.name = endpoint.name
        self._levels = endpoint.levels
        self._rules = endpoint.rules
        self._known: dict[str, int] = {}
        self.looks_at_args = any(rule.args for rule in endpoint.rules)

    def level(self, name: str) -> int:
        """How far the client may go with a well-known name, in the best case."""
        known = self._known.get(name)
        if known is None:
            if len(self._known) >= 4096:
                self._known.clear()
            known = self._known[name] = self._level(name)
        return known

    def _level(self, name: str) -> int:
        said = [each.level for each in self._levels if _covers(each.name, each.below, name)]
        if NONE in said:
            return NONE
        by_rule = any(rule.allow and _covers(rule.name, rule.below, name) for rule in self._rules)
        return max([*said, TALK if by_rule else NONE])

    def best(self, names: Iterable[str]) -> int:
        """The same for whoever owns `names`."""
        return max(map(self.level, names), default=NONE)

    def may_call(self, names: Collection[str], asked: Asked) -> bool:
        """Whether the client may send a call, or a signal, to the owner of `names`."""
        return self._may(False, names, asked)

    def may_hear(self, names: Collection[str], asked: Asked) -> bool:
        """Whether the client may be given a broadcast by the owner of `names`."""
        return self._may(True, names, asked)

    def _may(self, broadcast: bool, names: Collection[str], asked: Asked) -> bool:
        reached = [name for name in names if self.level(name) >= TALK]
        rules = [rule for rule in self._rules if rule.broadcast is broadcast]
        # What is denied of one name, no other name of the same owner makes good: so of all that it has.
        if not reached or any(
            not rule.allow
            and any(_covers(rule.name, rule.below, name) for name in names)
            and _matches(rule, asked, False)
            for rule in rules
        ):
            return False
        if any(
            each.level >= TALK and _covers(each.name, each.below, name)
            for each in self._levels
            for name in reached
        ):
            return True
        return any(
            rule.allow
            and any(_covers(rule.name, rule.below, name) for name in reached)
            and _matches(rule, asked, True)
            for rule in rules
        )


def nothing(name: str) -> View:
    """The view by an endpoint that is there no more."""
    return View(Endpoint(name))


def _covers(pattern: str, below: bool, name: str) -> bool:
    return name == pattern or (below and name.startswith(pattern + "."))


def meets(line: str, patterns: Iterable[tuple[str, bool]]) -> bool:
    """Whether a line may be about a name that one of the patterns (name, and those below it) covers, too."""
    said = line.partition("=")[2].partition("=")[0]
    name, below = said.removesuffix(".*"), said.endswith(".*")
    return any(_covers(each, too, name) or _covers(name, below, each) for each, too in patterns)


def _matches(rule: Rule, asked: Asked, allow: bool) -> bool:
    """A call may leave out its interface: it is not allowed by a rule that names one, and denied."""
    if rule.interface and rule.interface != asked.interface:
        if allow or asked.interface is not None:
            return False
    if rule.member and rule.member != asked.member:
        return False
    if rule.path and rule.path != asked.path:
        if not rule.subtree or not (asked.path or "").startswith(rule.path + "/"):
            return False
    if not rule.args:
        return True
    args = asked.args()
    return all(number < len(args) and args[number] == value for number, value in rule.args)
