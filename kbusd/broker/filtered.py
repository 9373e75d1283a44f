"""The control log as the worker of a client behind an endpoint may read it: without the names that it hides.

Whoever takes over that worker can read what it reads, so it has a log of its own, of which each entry is decided
here. It tells of all connections, as any may call its client, and of those names that the endpoint lets it see.
Match rules of others are in it if its client could send what they describe: those without a sender, whatever
else they say. When the endpoint says something else, the log tells what has come and gone by that.
Computation only. What endpoints say is theirs to know: of sockets (endpoints.py), of kdbus (custom_endpoints.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Protocol

from msgspec.structs import replace

from kbusd.broker.connection import Behind
from kbusd.policy import endpoints
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


class Shown(Protocol):
    """What an endpoint shows of names to who is behind it, now; never changed."""

    def sees(self, name: str) -> bool:
        """A name, or `org.foo.*` for those below."""

    def may_own(self, name: str) -> bool:
        """Whether the client may own it."""

    def patterns(self) -> list[tuple[str, bool]]:
        """The names that it sees, True for those below."""


class Filter:
    """What passes into the log of those behind an endpoint. `inside`: the connections that are."""

    def __init__(
        self, behind: Behind, shown: Callable[[Behind], Shown], inside: Iterable[int]
    ) -> None:
        self.behind = behind
        self._ask = shown
        self._shown = shown(behind)
        self._inside = set(inside)

    def entries(self, entry: LogEntry, whole: Callable[[], Snapshot]) -> list[LogEntry]:
        """The entry as it is to be told. `whole`: the state of the bus with it."""
        if not self.changes(entry):
            passed = self._entry(entry)
            return [] if passed is None else [passed]
        state = whole()
        before, self._shown = self.snapshot(state), self._ask(self.behind)
        passed = self._entry(entry)
        rest = _difference(before, self.snapshot(state))
        return rest if passed is None else [passed, *(each for each in rest if each != passed)]

    def changes(self, entry: LogEntry) -> bool:
        """Whether by this entry the endpoint shows something else."""
        match entry:
            case EndpointChanged(name):
                return name == self.behind.endpoint
            case CustomChanged(number):
                return number == self.behind.custom != 0
        return False

    def is_over(self, entry: LogEntry) -> bool:
        """Whether after this entry nobody reads on: the endpoint of a socket takes its clients along; those of
        kdbus, of which each user has his log, are left by the last one."""
        match entry:
            case EndpointChanged(name, policy):
                return name == self.behind.endpoint and not policy
            case ConnectionRemoved():
                return bool(self.behind.custom) and not self._inside
        return False

    def _entry(self, entry: LogEntry) -> LogEntry | None:
        match entry:
            case ConnectionAdded():
                if Behind.of(entry.credentials, entry.custom) == self.behind:
                    self._inside.add(entry.id)
            case ConnectionRemoved():
                self._inside.discard(entry.id)
            case NameOwnerChanged():
                return self._owner(entry)
            case QueueChanged():
                return entry if self._shown.sees(entry.name) else None
            case MatchAdded() | MatchRemoved():
                return entry if self._concerns(entry.id, entry.rule) else None
            case MonitorAttached():
                return replace(entry, rules=self._watched(entry.rules))
            case ActivatableChanged():
                return ActivatableChanged(tuple(filter(self._shown.sees, entry.names)))
            case NamePolicyChanged() | CustomChanged():
                return replace(entry, entries=self._policy(entry.entries))
            case EndpointChanged():
                return EndpointChanged(entry.name, self._endpoint(entry.name, entry.policy))
        return entry

    def snapshot(self, whole: Snapshot) -> Snapshot:
        """What the entries up to here have come to."""
        sees = self._shown.sees
        return replace(
            whole,
            names=tuple((name, id) for name, id in whole.names if sees(name) or id in self._inside),
            queues=tuple(each for each in whole.queues if sees(each.name)),
            matches=tuple(each for each in whole.matches if self._concerns(*each)),
            monitors=tuple((id, self._watched(rules)) for id, rules in whole.monitors),
            activatable=tuple(filter(sees, whole.activatable)),
            policies=tuple((id, self._policy(said)) for id, said in whole.policies),
            custom=tuple((number, self._policy(said)) for number, said in whole.custom),
            endpoints=tuple((name, self._endpoint(name, said)) for name, said in whole.endpoints),
        )

    def _owner(self, entry: NameOwnerChanged) -> NameOwnerChanged | None:
        """A name that is hidden, only while somebody behind the endpoint has it: it may be hidden since."""
        if self._shown.sees(entry.name):
            return entry
        old, new = (id if id in self._inside else 0 for id in (entry.old, entry.new))
        return NameOwnerChanged(entry.name, old, new) if old or new else None

    def _concerns(self, id: int, rule: str) -> bool:
        """Whether the rule is of somebody behind the endpoint, or about what such a one could send."""
        if id in self._inside:
            return True
        sender = _sender(rule)
        return not sender or sender[0] == ":" or self._shown.may_own(sender)

    def _watched(self, rules: tuple[str, ...]) -> tuple[str, ...]:
        """What a monitor wants to see of those behind the endpoint; without rules it is all."""
        return tuple(each for each in rules if self._concerns(0, each)) or (rules and (_NEVER,))

    def _policy(self, said: tuple[PolicyEntry, ...]) -> tuple[PolicyEntry, ...]:
        return tuple(each for each in said if self._shown.sees(each.name + ".*" * each.wildcard))

    def _endpoint(self, name: str, policy: bytes) -> bytes:
        """What an endpoint says: of another one, the lines that may be about names that are seen here."""
        if name == self.behind.endpoint or not policy:
            return policy
        seen = self._shown.patterns()
        lines = endpoints.decode(policy).lines
        return endpoints.encode(
            endpoints.parse(name, [line for line in lines if endpoints.meets(line, seen)])
        )


def _difference(old: Snapshot, new: Snapshot) -> list[LogEntry]:
    """What has to be told to who knows the one, for him to know the other: the same bus at the same moment,
    shown in another way."""
    before, after = dict(old.names), dict(new.names)
    queued, queues = ({each.name: each for each in state.queues} for state in (old, new))
    told: list[LogEntry] = []
    for name in sorted(before.keys() | after.keys()):
        queue = queues.get(name, QueueChanged(name, ()))
        old_owner, owner = before.get(name, 0), after.get(name, 0)
        if old_owner != owner:
            details = queue.waiting, queue.claims, queue.activator
            told.append(NameOwnerChanged(name, old_owner, owner, *details))
        elif queue != queued.get(name, QueueChanged(name, ())):
            told.append(queue)
    had, has = Counter(old.matches), Counter(new.matches)
    told += [MatchRemoved(*each) for each in (had - has).elements()]
    told += [MatchAdded(*each) for each in (has - had).elements()]
    kdbus = dict(new.kdbus)
    told += [
        MonitorAttached(*each, kdbus.get(each[0]))
        for each in new.monitors
        if each not in old.monitors
    ]
    if old.activatable != new.activatable:
        told.append(ActivatableChanged(new.activatable))
    told += [NamePolicyChanged(*each) for each in new.policies if each not in old.policies]
    told += [CustomChanged(*each) for each in new.custom if each not in old.custom]
    return told + [EndpointChanged(*each) for each in new.endpoints if each not in old.endpoints]


@lru_cache(maxsize=1024)
def _sender(rule: str) -> str:
    """Of whose messages the rule speaks, "" for anybody's. It was checked when it came."""
    return match.parse(rule).sender or ""
