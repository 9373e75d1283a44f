"""The control log as the worker of a client behind an endpoint may read it: without the names that it hides.

Whoever takes over that worker can read what it reads, so it has a log of its own, of which each entry is decided
here. It tells of all connections, as any may call its client, and of those names that the endpoint lets it see.
Match rules of others are in it if its client could send what they describe: those without a sender, whatever
else they say. Computation only; what the endpoint says is asked anew each time, and when it says something
else, its workers begin again from a snapshot.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache

from msgspec.structs import replace

from kbusd.policy import endpoints
from kbusd.policy.endpoints import OWN, SEE, Endpoint, View
from kbusd.rings.entries import (
    ActivatableChanged,
    ConnectionAdded,
    ConnectionRemoved,
    CustomChanged,
    EndpointChanged,
    LogEntry,
    MatchAdded,
    MatchRemoved,
    MonitorAttached,
    NameOwnerChanged,
    NamePolicyChanged,
    PolicyEntry,
    QueueChanged,
    Snapshot,
)
from kbusd.wire import match

_NEVER = "type='signal',sender=':1.0'"  # nobody's name


class Filter:
    """What passes into the log of the endpoint `name`. `inside`: the connections that came by it."""

    def __init__(
        self, name: str, said: Callable[[], tuple[Endpoint, View]], inside: Iterable[int]
    ) -> None:
        self._name = name
        self._said = said
        self._inside = set(inside)

    def entry(self, entry: LogEntry) -> LogEntry | None:
        """The entry as it is to be told, None if it is not."""
        match entry:
            case ConnectionAdded():
                if entry.credentials.endpoint == self._name:
                    self._inside.add(entry.id)
            case ConnectionRemoved():
                self._inside.discard(entry.id)
            case NameOwnerChanged():
                return self._owner(entry)
            case QueueChanged():
                return entry if self._sees(entry.name) else None
            case MatchAdded() | MatchRemoved():
                return entry if self._concerns(entry.id, entry.rule) else None
            case MonitorAttached():
                return replace(entry, rules=self._watched(entry.rules))
            case ActivatableChanged():
                return ActivatableChanged(tuple(filter(self._sees, entry.names)))
            case NamePolicyChanged() | CustomChanged():
                return replace(entry, entries=self._policy(entry.entries))
            case EndpointChanged():
                return EndpointChanged(entry.name, self._endpoint(entry.name, entry.policy))
        return entry

    def snapshot(self, whole: Snapshot) -> Snapshot:
        """What the entries up to here have come to."""
        return replace(
            whole,
            names=tuple(
                (name, id) for name, id in whole.names if self._sees(name) or id in self._inside
            ),
            queues=tuple(each for each in whole.queues if self._sees(each.name)),
            matches=tuple(each for each in whole.matches if self._concerns(*each)),
            monitors=tuple((id, self._watched(rules)) for id, rules in whole.monitors),
            activatable=tuple(filter(self._sees, whole.activatable)),
            policies=tuple((id, self._policy(said)) for id, said in whole.policies),
            custom=tuple((number, self._policy(said)) for number, said in whole.custom),
            endpoints=tuple((name, self._endpoint(name, said)) for name, said in whole.endpoints),
        )

    def _sees(self, name: str) -> bool:
        return self._said()[1].level(name) >= SEE

    def _owner(self, entry: NameOwnerChanged) -> NameOwnerChanged | None:
        """A name that is hidden, only while somebody behind the endpoint has it: it may be hidden since."""
        if self._sees(entry.name):
            return entry
        old, new = (id if id in self._inside else 0 for id in (entry.old, entry.new))
        return NameOwnerChanged(entry.name, old, new) if old or new else None

    def _concerns(self, id: int, rule: str) -> bool:
        """Whether the rule is of somebody behind the endpoint, or about what such a one could send."""
        if id in self._inside:
            return True
        sender = _sender(rule)
        return not sender or sender[0] == ":" or self._said()[1].level(sender) >= OWN

    def _watched(self, rules: tuple[str, ...]) -> tuple[str, ...]:
        """What a monitor wants to see of those behind the endpoint; without rules it is all."""
        return tuple(each for each in rules if self._concerns(0, each)) or (rules and (_NEVER,))

    def _policy(self, said: tuple[PolicyEntry, ...]) -> tuple[PolicyEntry, ...]:
        return tuple(
            each for each in said if self._sees(f"{each.name}.x" if each.wildcard else each.name)
        )

    def _endpoint(self, name: str, policy: bytes) -> bytes:
        """What an endpoint says: of another one, the lines that may be about names that are seen here."""
        if name == self._name or not policy:
            return policy
        ours = self._said()[0]
        seen = [(each.name, each.below) for each in ours.levels if each.level >= SEE]
        seen += [(each.name, each.below) for each in ours.rules if each.allow]
        lines = endpoints.decode(policy).lines
        return endpoints.encode(
            endpoints.parse(name, [line for line in lines if endpoints.meets(line, seen)])
        )


@lru_cache(maxsize=1024)
def _sender(rule: str) -> str:
    """Of whose messages the rule speaks, "" for anybody's. It was checked when it came."""
    return match.parse(rule).sender or ""
