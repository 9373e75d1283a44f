"""The worker's copy of what the control log says: connections, names, match rules, monitors.

Fed by the engine with a Snapshot and then with every log entry, in order; it answers all reads
of the bus driver and tells a publishing worker who subscribed to a message. Sans-IO. The log is
the broker's word: an entry that contradicts what came before raises ReplicaError, because a copy
that no longer agrees with the bus must not be used for policy.

There is one of these in every worker, so that its size counts connections times connections:
rules are kept as text, one object for all connections that wrote the same, and are parsed only
when this worker first publishes (or when they are its own client's).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import msgspec

from kbusd.policy import endpoints
from kbusd.rings.entries import (
    ActivatableChanged,
    ConnectionAdded,
    ConnectionRemoved,
    Credentials,
    CustomChanged,
    EndpointChanged,
    LabelApart,
    LogEntry,
    MatchAdded,
    MatchRemoved,
    MonitorAttached,
    NameOwnerChanged,
    NamePolicyChanged,
    PolicyChanged,
    PolicyEntry,
    QueueChanged,
    Snapshot,
)
from kbusd.wire.match import MatchRule, eavesdropping, parse

BUS_NAME = "org.freedesktop.DBus"
BUS_ID = -1
NOBODY = 0
SIGNAL = 4

Arguments = Sequence[str | None]
_K = TypeVar("_K")
_V = TypeVar("_V")

_BUS_NAMES = (BUS_NAME,)
_NO_NAMES: frozenset[str] = frozenset()


class ReplicaError(ValueError):
    """The log contradicts itself; the text says how."""


class Watch:
    """One match rule as written, and the ids that hold it (as often as they added it)."""

    __slots__ = ("_rule", "holders", "text")

    def __init__(self, text: str) -> None:
        self.text = text
        self.holders: tuple[int, ...] = ()
        self._rule: MatchRule | None = None

    @property
    def rule(self) -> MatchRule:
        """The parsed rule. Raises ReplicaError: the broker has accepted it, so it must parse."""
        if self._rule is None:
            try:
                self._rule = parse(self.text)
            except ValueError as error:
                raise ReplicaError(f"match rule {self.text!r}: {error}") from None
        return self._rule


class Connection:
    """A client that has said Hello. `names` are those that it owns, `waits_for` those in whose queue
    it is. `kdbus`: HELLO flags of one that came by a kdbus node; `custom`: endpoint of kdbus that it is behind."""

    __slots__ = ("credentials", "custom", "id", "kdbus", "matches", "name", "names", "waits_for")

    def __init__(
        self, id: int, credentials: Credentials, kdbus: int | None = None, custom: int = 0
    ) -> None:
        self.id = id
        self.name = unique_name(id)
        self.credentials = credentials
        self.kdbus = kdbus
        self.custom = custom
        self.names: frozenset[str] = _NO_NAMES
        self.waits_for: frozenset[str] = _NO_NAMES
        self.matches: tuple[Watch, ...] = ()


def unique_name(id: int) -> str:
    """The name of a connection; the bus itself is -1."""
    return f":1.{id}" if id != BUS_ID else BUS_NAME


def eavesdrops(rule: str) -> bool:
    """Whether a rule may be one with eavesdrop='true', without parsing it."""
    return "eavesdrop" in rule


def parse_unique(name: str) -> int | None:
    """The id in `:1.N`, or None for anything that this bus could not have given out."""
    digits = name[3:]
    if not name.startswith(":1.") or not digits.isascii() or not digits.isdigit():
        return None
    if len(digits) > 20 or (digits[0] == "0" and digits != "0"):
        return None
    return int(digits)


class _Bucket:
    """Rules with the same sender, path, interface and member; `arg0` splits them further."""

    __slots__ = ("arg0", "plain")

    def __init__(self) -> None:
        self.plain: list[Watch] = []
        self.arg0: dict[str | None, list[Watch]] = {}


_Key = tuple[str | None, str | None, str | None, str | None]
_Shape = tuple[bool, bool, bool, bool]


class MatchIndex:
    """Finds the rules that match a broadcast without asking each one.

    Rules are filed under what they say of sender, path, interface and member. A message can only
    match under its own values in each *shape* (which of the four are given) that is in use, so a
    search costs one dictionary look-up per shape and then the few rules filed there."""

    __slots__ = ("_buckets", "_shapes", "senders")

    def __init__(self) -> None:
        self._buckets: dict[_Key, _Bucket] = {}
        self._shapes: dict[_Shape, int] = {}
        self.senders: dict[str, int] = {}

    def __len__(self) -> int:
        """How many rules are filed."""
        return sum(
            len(bucket.plain) + sum(map(len, bucket.arg0.values()))
            for bucket in self._buckets.values()
        )

    def __bool__(self) -> bool:
        return bool(self._buckets)

    def add(self, watch: Watch) -> bool:
        """File a rule; False if it can never match a broadcast and was left out."""
        rule = watch.rule
        if not _can_match_broadcast(rule):
            return False
        key = (rule.sender, rule.path, rule.interface, rule.member)
        bucket = self._buckets.get(key)
        if bucket is None:
            bucket = self._buckets[key] = _Bucket()
        arg0 = _exact_arg0(rule)
        if arg0 is None:
            bucket.plain.append(watch)
        else:
            bucket.arg0.setdefault(arg0, []).append(watch)
        shape = _shape(key)
        self._shapes[shape] = self._shapes.get(shape, 0) + 1
        if rule.sender is not None:
            self.senders[rule.sender] = self.senders.get(rule.sender, 0) + 1
        return True

    def discard(self, watch: Watch) -> bool:
        """Take a rule out again; False if it was never filed."""
        rule = watch.rule
        if not _can_match_broadcast(rule):
            return False
        key = (rule.sender, rule.path, rule.interface, rule.member)
        bucket = self._buckets[key]
        arg0 = _exact_arg0(rule)
        if arg0 is None:
            bucket.plain.remove(watch)
        else:
            bucket.arg0[arg0].remove(watch)
            if not bucket.arg0[arg0]:
                del bucket.arg0[arg0]
        if not bucket.plain and not bucket.arg0:
            del self._buckets[key]
        _decrement(self._shapes, _shape(key))
        if rule.sender is not None:
            _decrement(self.senders, rule.sender)
        return True

    def find(
        self,
        type: int,
        sender_names: Sequence[str],
        path: str | None,
        interface: str | None,
        member: str | None,
        args: Callable[[], Arguments],
    ) -> tuple[list[Watch], bool]:
        """The rules that match, and whether other arguments could change the answer.

        `args` is called at most once, and only if some rule wants to see arguments."""
        found: list[Watch] = []
        known: Arguments | None = None
        depends = False
        for with_sender, with_path, with_interface, with_member in self._shapes:
            for sender in sender_names if with_sender else (None,):
                bucket = self._buckets.get(
                    (
                        sender,
                        path if with_path else None,
                        interface if with_interface else None,
                        member if with_member else None,
                    )
                )
                if bucket is None:
                    continue
                candidates: Iterable[Watch] = bucket.plain
                if bucket.arg0:
                    depends = True
                    if known is None:
                        known = args()
                    first = known[0] if known else None
                    if first in bucket.arg0:
                        candidates = [*bucket.plain, *bucket.arg0[first]]
                for watch in candidates:
                    rule = watch.rule
                    if rule.needs_args:
                        depends = True
                        if known is None:
                            known = args()
                    if rule.matches(type, sender_names, None, path, interface, member, known or ()):
                        found.append(watch)
        return found, depends


def _can_match_broadcast(rule: MatchRule) -> bool:
    """Broadcasts are signals without a destination."""
    return rule.destination is None and rule.type in (0, SIGNAL)


def _exact_arg0(rule: MatchRule) -> str | None:
    return next((value for number, value in rule.args if number == 0), None)


def _shape(key: _Key) -> _Shape:
    sender, path, interface, member = key
    return (sender is not None, path is not None, interface is not None, member is not None)


def _decrement(counts: dict[_K, int], key: _K) -> None:
    counts[key] -= 1
    if not counts[key]:
        del counts[key]


def _keep(where: dict[_K, _V], key: _K, value: _V) -> None:
    """What is not there takes no room."""
    if value:
        where[key] = value
    else:
        where.pop(key, None)


class Replica:
    """The state of the bus as far as the log has been read.

    `me` is the id of this worker's client, 0 before Hello. `matches_version` grows when a result
    of `subscribers` may have become stale, `my_version` likewise for `receives`,
    `monitors_version` for `watching`; all three stand still otherwise, so that the caller may
    keep results per header."""

    def __init__(self) -> None:
        self.me = NOBODY
        self.connections: dict[int, Connection] = {}
        self.names: dict[str, int] = {}
        self.given_up: dict[str, int] = {}  # names by monitors, of which the log speaks next
        self.queues: dict[str, tuple[int, ...]] = {}  # who waits, of names that somebody waits for
        self.claims: dict[str, tuple[int, ...]] = {}  # flags, of names where they are not all 0
        self.activators: dict[str, int] = {}
        self.policies: dict[int, tuple[PolicyEntry, ...]] = {}  # of kdbus policy holders
        self.custom: dict[int, tuple[PolicyEntry, ...]] = {}  # custom ones of kdbus
        self.kdbus_monitors: dict[int, Connection] = {}
        self.apart: dict[bytes, LabelApart] = {}  # labels that SELinux keeps from others
        self.restrained: frozenset[bytes] = frozenset()  # labels that may not send to some other
        self.monitors: dict[int, tuple[MatchRule, ...]] = {}
        self.eavesdroppers: dict[int, tuple[Watch, ...]] = {}  # and their rules that make them so
        self.endpoints: dict[str, bytes] = {}
        self._views: dict[str, endpoints.View] = {}
        self.activatable: tuple[str, ...] = ()
        self.policy_generation = 0
        self.position = 0  # in the log, of the snapshot that was loaded last
        self.matches_version = 0
        self.my_version = 0
        self.monitors_version = 0
        self._watches: dict[str, Watch] = {}
        self._index: MatchIndex | None = None
        self._mine = MatchIndex()
        self._group_lists: dict[tuple[int, ...], tuple[int, ...]] = {}

    # -- following the log -------------------------------------------------------------------

    def load(self, snapshot: Snapshot) -> None:
        """Forget everything and start from `snapshot`. `me` stays. Raises ReplicaError."""
        self.connections = {}
        self.names = {}
        self.given_up = {}
        self.queues = {}
        self.claims = {}
        self.activators = {}
        self.policies = dict(snapshot.policies)
        self.custom = dict(snapshot.custom)
        self.endpoints = dict(snapshot.endpoints)
        self._views = {}
        self.monitors = {}
        self.eavesdroppers = {}
        self.kdbus_monitors = {}
        self._keep_apart(*snapshot.apart)
        self.activatable = snapshot.activatable
        self.policy_generation = snapshot.policy_generation
        self.position = snapshot.position
        self._watches = {}
        self._index = None
        self._mine = MatchIndex()
        self._group_lists = {}
        kdbus, behind = dict(snapshot.kdbus), dict(snapshot.behind)
        for id, credentials in snapshot.connections:
            self._add_connection(id, credentials, kdbus.get(id), behind.get(id, 0))
        for name, owner in snapshot.names:
            self._change_owner(name, NOBODY, owner)
        for each in snapshot.queues:
            self._change_queue(each.name, each.waiting, each.claims, each.activator)
        for id, rule in snapshot.matches:
            self._add_match(id, rule)
        for id, rules in snapshot.monitors:
            self._attach_monitor(id, rules, kdbus.get(id))
        self.matches_version += 1
        self.my_version += 1
        self.monitors_version += 1

    def apply(self, entry: LogEntry) -> None:
        """Take over one log entry. Raises ReplicaError if it contradicts the state."""
        match entry:
            case ConnectionAdded(id, credentials, kdbus, custom):
                self._add_connection(id, credentials, kdbus, custom)
            case ConnectionRemoved(id):
                self._remove_connection(id)
            case NameOwnerChanged(name, old, new, waiting, claims, activator):
                self._change_owner(name, old, new)
                self._change_queue(name, waiting, claims, activator)
            case QueueChanged(name, waiting, claims, activator):
                self._change_queue(name, waiting, claims, activator)
            case MatchAdded(id, rule):
                self._add_match(id, rule)
            case MatchRemoved(id, rule):
                self._remove_match(id, rule)
            case MonitorAttached(id, rules, flags, whose):
                self._attach_monitor(id, rules, flags, whose)
            case NamePolicyChanged(id, policy):
                self._connection(id)
                self.policies[id] = policy
            case CustomChanged(number, policy):
                _keep(self.custom, number, policy)
            case LabelApart():
                self._keep_apart(*self.apart.values(), entry)
            case EndpointChanged(name, said):
                self._views.pop(name, None)
                self.endpoints.pop(name, None)
                if said:
                    self.endpoints[name] = said
            case ActivatableChanged(names):
                self.activatable = names
            case PolicyChanged(generation):
                self.policy_generation = generation

    def _keep_apart(self, *entries: LabelApart) -> None:
        """These hold, the last one of each label."""
        latest = {each.label: each for each in entries}
        self.apart = {label: each for label, each in latest.items() if each.to or each.of}
        self.restrained = frozenset(
            sender
            for label, each in self.apart.items()
            for sender in ((label, *each.of) if each.to else each.of)
        )

    def kept_apart(self, sender: int, receiver: int) -> tuple[bytes, bytes] | None:
        """The labels of two connections if SELinux does not let the one send to the other. -1 is the bus
        itself; of an id that is nobody's it says nothing."""
        if not self.apart:
            return None
        labels = []
        for id in (sender, receiver):
            connection = self.connections.get(id)
            if connection is None and id != BUS_ID:
                return None
            labels.append(connection.credentials.label if connection else b"")
        one, other = labels
        to, of = self.apart.get(one), self.apart.get(other)
        if (to and other in to.to) or (of and one in of.of):
            return one, other
        return None

    def _add_connection(
        self, id: int, credentials: Credentials, kdbus: int | None, custom: int
    ) -> None:
        if id < 0 or id in self.connections or id in self.monitors:
            raise ReplicaError(f"connection {id} was added twice")
        groups = self._group_lists.setdefault(credentials.groups, credentials.groups)
        if groups is not credentials.groups:
            credentials = msgspec.structs.replace(credentials, groups=groups)
        self.connections[id] = Connection(id, credentials, kdbus, custom)

    def _remove_connection(self, id: int) -> None:
        if id in self.monitors:
            del self.monitors[id]
            self.kdbus_monitors.pop(id, None)
            self.monitors_version += 1
            return
        connection = self._connection(id)
        if connection.names or connection.waits_for:
            raise ReplicaError(
                f"connection {id} was removed while it owned names or waited for some"
            )
        for watch in connection.matches:
            self._release(id, watch)
        del self.connections[id]
        self.eavesdroppers.pop(id, None)
        self.policies.pop(id, None)
        if self._index is not None and connection.name in self._index.senders:
            self.matches_version += 1
        if connection.name in self._mine.senders:
            self.my_version += 1

    def _change_owner(self, name: str, old: int, new: int) -> None:
        if old != NOBODY and self.given_up.get(name) == old:
            del self.given_up[name]
            old = NOBODY
        if self.names.get(name, NOBODY) != old:
            raise ReplicaError(f"{name} changed owner from {old}, who did not own it")
        if old != NOBODY:
            loser = self._connection(old)
            loser.names -= {name}
            del self.names[name]
        if new != NOBODY:
            winner = self._connection(new)
            winner.names |= {name}
            self.names[name] = new
        self._moved(name)
        if self.monitors:
            self.monitors_version += 1

    def _moved(self, name: str) -> None:
        if self._index is not None and name in self._index.senders:
            self.matches_version += 1
        if name in self._mine.senders:
            self.my_version += 1

    def _change_queue(
        self, name: str, waiting: tuple[int, ...], claims: tuple[int, ...], activator: int
    ) -> None:
        owner = self.names.get(name)
        if waiting and (owner is None or owner in waiting or len(set(waiting)) < len(waiting)):
            raise ReplicaError(f"{name} has an owner {owner} and a queue {waiting}")
        for id in self.queues.pop(name, ()):
            connection = self._connection(id)
            connection.waits_for -= {name}
        for id in waiting:
            connection = self._connection(id)
            connection.waits_for |= {name}
        if waiting:
            self.queues[name] = waiting
        _keep(self.claims, name, claims if any(claims) else ())
        _keep(self.activators, name, activator)

    def _add_match(self, id: int, text: str) -> None:
        connection = self._connection(id)
        watch = self._watches.get(text)
        if watch is None:
            watch = self._watches[text] = Watch(text)
        if id not in watch.holders:
            if self._index is not None:
                self.matches_version += 1
                if not watch.holders:
                    self._index.add(watch)
            if id == self.me and self._mine.add(watch):
                self.my_version += 1
        watch.holders += (id,)
        connection.matches += (watch,)
        # Who came by an endpoint sees what that shows him, and nothing that is for others.
        inside = connection.credentials.endpoint or connection.custom
        if eavesdrops(watch.text) and watch.rule.eavesdrop and not inside:
            self.eavesdroppers[id] = (*self.eavesdroppers.get(id, ()), watch)

    def _remove_match(self, id: int, text: str) -> None:
        connection = self._connection(id)
        watch = next((w for w in connection.matches if w.text == text), None)
        if watch is None:
            try:
                rule = parse(text)
            except ValueError as error:
                raise ReplicaError(f"match rule {text!r}: {error}") from None
            watch = next((w for w in connection.matches if w.rule == rule), None)
        if watch is None:
            raise ReplicaError(f"connection {id} lost a match rule that it did not have: {text!r}")
        self._release(id, watch)
        position = connection.matches.index(watch)
        connection.matches = connection.matches[:position] + connection.matches[position + 1 :]
        if id in self.eavesdroppers:
            left = tuple(each for each in connection.matches if each.rule.eavesdrop)
            self.eavesdroppers[id] = left
            if not left:
                del self.eavesdroppers[id]

    def _release(self, id: int, watch: Watch) -> None:
        """Undo one addition of `watch` by `id`, except in the connection's own list."""
        position = watch.holders.index(id)
        watch.holders = watch.holders[:position] + watch.holders[position + 1 :]
        if id not in watch.holders:
            if self._index is not None:
                self.matches_version += 1
            if id == self.me and self._mine.discard(watch):
                self.my_version += 1
        if not watch.holders:
            del self._watches[watch.text]
            if self._index is not None:
                self._index.discard(watch)

    def _attach_monitor(
        self,
        id: int,
        rules: tuple[str, ...],
        kdbus: int | None,
        credentials: Credentials | None = None,
    ) -> None:
        connection = self.connections.get(id)
        if connection is not None:
            if connection.waits_for or connection.matches:  # nor eavesdrops
                raise ReplicaError(
                    f"connection {id} became a monitor and waits for names or signals"
                )
            del self.connections[id]
            for name in connection.names:
                del self.names[name]
                self.given_up[name] = id
                self._moved(name)
            connection.names = _NO_NAMES
        try:
            self.monitors[id] = tuple(eavesdropping(parse(rule)) for rule in rules)
        except ValueError as error:
            raise ReplicaError(f"match rule of monitor {id}: {error}") from None
        if kdbus is not None:
            if credentials is not None:
                connection = Connection(id, credentials, kdbus)
            connection = connection or self.kdbus_monitors.get(id)
            if connection is None:
                raise ReplicaError(
                    f"connection {id} became a monitor, and whose it is was not told"
                )
            self.kdbus_monitors[id] = connection
        self.monitors_version += 1

    def _connection(self, id: int) -> Connection:
        try:
            return self.connections[id]
        except KeyError:
            raise ReplicaError(f"the log speaks of connection {id}, which does not exist") from None

    # -- reading -----------------------------------------------------------------------------

    def owner(self, name: str) -> int | None:
        """The id behind a unique or well-known name; -1 for the bus itself, None for nobody."""
        if name.startswith(":"):
            id = parse_unique(name)
            return id if id in self.connections else None
        if name == BUS_NAME:
            return BUS_ID
        return self.names.get(name)

    def connection(self, name: str) -> Connection | None:
        """The connection behind a name, None for nobody and for the bus itself."""
        id = self.owner(name)
        return None if id is None else self.connections.get(id)

    def view(self, name: str) -> endpoints.View:
        """What an endpoint lets through; read when somebody asks, as most workers never do."""
        view = self._views.get(name)
        if view is None:
            try:
                view = endpoints.View(endpoints.decode(self.endpoints[name]))
            except (KeyError, endpoints.EndpointError):
                view = endpoints.nothing(name)
            self._views[name] = view
        return view

    def sender_names(self, id: int) -> Sequence[str]:
        """All names that `sender=` in a match rule may use for the connection."""
        if id == BUS_ID:
            return _BUS_NAMES
        connection = self.connections.get(id)
        if connection is None:
            return (unique_name(id),)
        return (connection.name, *connection.names)

    def policy_names(self, id: int) -> Sequence[str]:
        """All names that a policy rule may use for the connection: those that it waits for count.

        Reference: send_destination and receive_sender in dbus-daemon(1), as dbus-daemon 1.14 has it:
        "the owner" of a name there is whoever is in its queue."""
        connection = self.connections.get(id)
        names = self.sender_names(id)
        return names if connection is None else (*names, *connection.waits_for)

    def owners(self, name: str) -> list[int]:
        """The owner of a name and those who wait for it, in order; empty if nobody owns it."""
        owner = self.owner(name)
        return [] if owner is None else [owner, *self.queues.get(name, ())]

    def claim(self, name: str, id: int) -> int:
        """The flags with which a connection asked for a name that it owns or waits for."""
        claims, owners = self.claims.get(name, ()), self.owners(name)
        if name in self.given_up:
            owners = [self.given_up[name], *self.queues.get(name, ())]
        at = owners.index(id) if id in owners else len(claims)
        return claims[at] if at < len(claims) else 0

    def match_rules(self) -> int:
        """How many match rules there are on the bus."""
        return sum(len(watch.holders) for watch in self._watches.values())

    def subscribers(
        self,
        type: int,
        sender_id: int,
        destination: str | None,
        path: str | None,
        interface: str | None,
        member: str | None,
        args: Callable[[], Arguments],
    ) -> tuple[tuple[int, ...], bool]:
        """Whom a broadcast goes to, each once, in ascending order; and whether it depends on args.

        While the second is False, the answer holds for every message with the same header until
        `matches_version` changes. A message with a destination has no subscribers."""
        if destination is not None:
            return (), False
        index = self._index
        if index is None:
            index = self._index = MatchIndex()
            for watch in self._watches.values():
                index.add(watch)
        found, depends = index.find(
            type, self.sender_names(sender_id), path, interface, member, args
        )
        if not found:
            return (), depends
        ids: set[int] = set()
        for watch in found:
            ids.update(watch.holders)
        return tuple(sorted(ids)), depends

    @property
    def deaf(self) -> bool:
        """Whether this worker's own client gets no broadcast at all."""
        return not self._mine and self.me not in self.monitors

    def receives(
        self,
        type: int,
        sender_id: int,
        path: str | None,
        interface: str | None,
        member: str | None,
        args: Callable[[], Arguments],
    ) -> tuple[bool, bool]:
        """Whether this worker's own client subscribed to a broadcast; and if it depends on args.

        While the second is False, the answer holds for the header until `my_version` changes."""
        found, depends = self._mine.find(
            type, self.sender_names(sender_id), path, interface, member, args
        )
        return bool(found), depends

    def watching(
        self,
        type: int,
        sender_id: int,
        destination: str | None,
        path: str | None,
        interface: str | None,
        member: str | None,
        args: Callable[[], Arguments],
    ) -> tuple[tuple[int, ...], bool]:
        """The monitors that want a copy of a message, and whether that depends on its arguments.

        While the second is False, the answer holds for the header until `monitors_version`
        changes. `destination` is as the sender wrote it."""
        facts = type, sender_id, destination, path, interface, member
        return self._watched_by(self.monitors, facts, args)

    def overhearing(
        self,
        type: int,
        sender_id: int,
        destination: str | None,
        path: str | None,
        interface: str | None,
        member: str | None,
        args: Callable[[], Arguments],
        only: int = NOBODY,
    ) -> tuple[tuple[int, ...], bool]:
        """Who wants to see a message that is addressed to one, by a rule with eavesdrop='true', and
        whether that depends on its arguments. `only`: whether that one does."""
        facts = type, sender_id, destination, path, interface, member
        rules = {
            id: tuple(watch.rule for watch in watches)
            for id, watches in self.eavesdroppers.items()
            if only in (NOBODY, id)
        }
        return self._watched_by(rules, facts, args)

    def _watched_by(
        self,
        watchers: dict[int, tuple[MatchRule, ...]],
        facts: tuple[int, int, str | None, str | None, str | None, str | None],
        args: Callable[[], Arguments],
    ) -> tuple[tuple[int, ...], bool]:
        type, sender_id, destination, path, interface, member = facts
        depends = any(rule.needs_args for rules in watchers.values() for rule in rules)
        known = args() if depends else ()
        sender_names = self.sender_names(sender_id)
        recipient = self.connection(destination) if destination is not None else None
        recipient_names = (recipient.name, *recipient.names) if recipient is not None else None
        found = (
            id
            for id, rules in watchers.items()
            if not rules
            or any(
                rule.matches(
                    type,
                    sender_names,
                    destination,
                    path,
                    interface,
                    member,
                    known,
                    recipient_names,
                )
                for rule in rules
            )
        )
        return tuple(sorted(found)), depends
