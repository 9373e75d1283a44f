"""Who has which match rules, and whom the bus's own signals concern.

The rules are evaluated by the publishers' workers; the broker keeps them for the snapshot, for
the limit, and to know whom to wake: a worker that sleeps has to look at the log only if a rule
of its client may match the signal that an entry stands for. The index errs on the side of
waking.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import chain

from kbusd.broker.connection import Connection
from kbusd.broker.refusal import (
    LIMITS_EXCEEDED,
    MATCH_RULE_NOT_FOUND,
    Refused,
)
from kbusd.wire import match

DRIVER = "org.freedesktop.DBus"
DRIVER_PATH = "/org/freedesktop/DBus"
OWNER_CHANGED = "NameOwnerChanged"
ACTIVATABLE_CHANGED = "ActivatableServicesChanged"

_SIGNAL = 4
_parse = lru_cache(maxsize=4096)(match.parse)


class Matches:
    """The match rules of all connections, each as often as it was added."""

    def __init__(self) -> None:
        self.count = 0
        self._plain: Counter[tuple[Connection, match.MatchRule]] = Counter()
        self._by_arg0: dict[str, Counter[tuple[Connection, match.MatchRule]]] = {}
        self._naming: dict[str, set[tuple[Connection, match.MatchRule]]] = {}  # by unique name

    def add(self, connection: Connection, text: str, limit: int) -> None:
        """AddMatch. Raises Refused."""
        if sum(map(len, connection.matches.values())) >= limit:
            raise Refused(
                LIMITS_EXCEEDED,
                f'Connection "{connection.unique_name}" is not allowed to add more match rules'
                " (increase limits in configuration file if required;"
                f" max_match_rules_per_connection={limit})",
            )
        rule = parse(text)
        connection.matches.setdefault(rule, []).append(text)
        self.count += 1
        for name in _named(rule):
            self._naming.setdefault(name, set()).add((connection, rule))
        if may_match_driver(rule):
            arg0 = first_argument(rule)
            watchers = self._plain if arg0 is None else self._by_arg0.setdefault(arg0, Counter())
            watchers[connection, rule] += 1

    def remove(self, connection: Connection, text: str) -> str:
        """RemoveMatch: forget one rule equal to `text`, returned as written. Raises Refused."""
        rule = parse(text)
        if rule not in connection.matches:
            raise Refused(
                MATCH_RULE_NOT_FOUND,
                "The given match rule wasn't found and can't be removed",
            )
        return self._drop(connection, rule)

    def remove_all(self, connection: Connection) -> list[str]:
        """Forget every rule of the connection; returns them as written."""
        removed: list[str] = []
        for rule in list(connection.matches):
            while rule in connection.matches:
                removed.append(self._drop(connection, rule))
        return removed

    def remove_naming(
        self, name: str, sees: Callable[[Connection], bool]
    ) -> list[tuple[Connection, str]]:
        """Forget every rule about what the connection `name` sends or gets, as that has ended and nobody will have
        its name again; returns whose they were, and they as written. Not those of whom `sees` keeps out: they are
        not to find out that there was such a connection."""
        removed: list[tuple[Connection, str]] = []
        for connection, rule in self._naming.get(name, set()).copy():
            while rule in connection.matches and sees(connection):
                removed.append((connection, self._drop(connection, rule)))
        return sorted(removed, key=lambda each: each[0].id)

    def watching(self, member: str, args: tuple[str, ...]) -> Iterator[Connection]:
        """Whose rules match the bus's own signal `member`; a connection may come twice."""
        exact = self._by_arg0.get(args[0], ()) if args else ()
        for connection, rule in chain(self._plain, exact):
            if rule.matches(_SIGNAL, (DRIVER,), None, DRIVER_PATH, DRIVER, member, args):
                yield connection

    def _drop(self, connection: Connection, rule: match.MatchRule) -> str:
        """Forget a rule once; returns it as written."""
        texts = connection.matches[rule]
        written = texts.pop()
        self.count -= 1
        if not texts:
            del connection.matches[rule]
            for name in _named(rule):
                self._naming[name].discard((connection, rule))
                if not self._naming[name]:
                    del self._naming[name]
        if may_match_driver(rule):
            self._stop_watching(connection, rule)
        return written

    def _stop_watching(self, connection: Connection, rule: match.MatchRule) -> None:
        arg0 = first_argument(rule)
        watchers = self._plain if arg0 is None else self._by_arg0[arg0]
        watchers[connection, rule] -= 1
        if not watchers[connection, rule]:
            del watchers[connection, rule]
            if arg0 is not None and not watchers:
                del self._by_arg0[arg0]


def _named(rule: match.MatchRule) -> set[str]:
    """The unique names in a rule, of which each is given out once."""
    return {name for name in (rule.sender, rule.destination) if name and name[0] == ":"}


def may_match_driver(rule: match.MatchRule) -> bool:
    """Whether a rule may match a signal that the bus itself broadcasts."""
    return (
        rule.type in (0, _SIGNAL)
        and rule.sender in (None, DRIVER)
        and rule.destination is None
        and rule.interface in (None, DRIVER)
        and rule.member in (None, OWNER_CHANGED, ACTIVATABLE_CHANGED)
        and rule.path in (None, DRIVER_PATH)
    )


def first_argument(rule: match.MatchRule) -> str | None:
    """The value that the rule wants as argument 0."""
    return rule.args[0][1] if rule.args and rule.args[0][0] == 0 else None


def parse(text: str) -> match.MatchRule:
    """The rule in its normal form. Raises Refused."""
    try:
        return _parse(text)
    except match.MatchError as error:
        raise Refused(error.error, str(error)) from None


def listens(connection: Connection, sender: Connection) -> bool:
    """Whether the connection has asked for signals that the sender could send."""
    own = (None, sender.unique_name, *sender.names)
    return any(
        rule.type in (0, _SIGNAL) and rule.destination is None and rule.sender in own
        for rule in connection.matches
    )
