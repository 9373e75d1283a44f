"""Who has which match rules, and whom the bus's own signals concern.

The rules are evaluated by the publishers' workers; the broker keeps them for the snapshot, for
the limit, and to know whom to wake: a worker that sleeps has to look at the log only if a rule
of its client may match the signal that an entry stands for. The index errs on the side of
waking.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import lru_cache

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
        if (watchers := self._watchers(rule, create=True)) is not None:
            watchers[connection, rule] += 1

    def remove(self, connection: Connection, text: str) -> str:
        """RemoveMatch: forget one rule equal to `text`, returned as written. Raises Refused."""
        rule = parse(text)
        texts = connection.matches.get(rule)
        if texts is None:
            raise Refused(
                MATCH_RULE_NOT_FOUND,
                "The given match rule wasn't found and can't be removed",
            )
        written = texts.pop()
        if not texts:
            del connection.matches[rule]
        self._forget(connection, rule)
        return written

    def remove_all(self, connection: Connection) -> list[str]:
        """Forget every rule of the connection; returns them as written."""
        removed: list[str] = []
        for rule, texts in connection.matches.items():
            for text in texts:
                self._forget(connection, rule)
                removed.append(text)
        connection.matches.clear()
        return removed

    def watching(self, member: str, args: tuple[str, ...]) -> Iterator[Connection]:
        """Whose rules match the bus's own signal `member`; a connection may come twice."""
        candidates = list(self._plain)
        if args and (exact := self._by_arg0.get(args[0])) is not None:
            candidates += exact
        for connection, rule in candidates:
            if rule.matches(_SIGNAL, (DRIVER,), None, DRIVER_PATH, DRIVER, member, args):
                yield connection

    def _forget(self, connection: Connection, rule: match.MatchRule) -> None:
        self.count -= 1
        watchers = self._watchers(rule, create=False)
        if watchers is None:
            return
        watchers[connection, rule] -= 1
        if not watchers[connection, rule]:
            del watchers[connection, rule]
            if not watchers and watchers is not self._plain:
                self._by_arg0 = {key: each for key, each in self._by_arg0.items() if each}

    def _watchers(
        self, rule: match.MatchRule, *, create: bool
    ) -> Counter[tuple[Connection, match.MatchRule]] | None:
        """Where a rule that may match a signal of the bus is filed; None if it never does."""
        if (
            rule.type not in (0, _SIGNAL)
            or rule.sender not in (None, DRIVER)
            or rule.destination is not None
            or rule.interface not in (None, DRIVER)
            or rule.member not in (None, OWNER_CHANGED, ACTIVATABLE_CHANGED)
            or rule.path not in (None, DRIVER_PATH)
        ):
            return None
        arg0 = next((value for number, value in rule.args if number == 0), None)
        if arg0 is None:
            return self._plain
        if create:
            return self._by_arg0.setdefault(arg0, Counter())
        return self._by_arg0[arg0]


def parse(text: str) -> match.MatchRule:
    """The rule in its normal form. Raises Refused."""
    try:
        return _parse(text)
    except match.MatchError as error:
        raise Refused(error.error, str(error)) from None
