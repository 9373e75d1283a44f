"""The policy of kdbus: who may own, talk to or see which well-known name (kdbus.policy(7)).

After ipc/kdbus/policy.c and the kdbus_conn_policy_ functions of connection.c. A bus has one database,
filled by policy holders and activators; a custom endpoint has another, which narrows the first. Each
entry names an owner and is gone with it. A pattern "a.b.*" stands for names with one element more,
and only where no entry has the name itself.

What counts as allowed:
1. Behind a custom endpoint, its own database must allow it; a name that it does not let see is not
   there.
2. On the default endpoint, whoever owns the bus or is privileged may do anything.
3. Users may talk to their own connections.
4. Otherwise the bus's database must allow it. Everybody sees all names. On a bus that is not `closed`,
   as kdbus never had any, this holds for names that the database knows, and all else is allowed: it
   has another policy beside this one.
Who may talk to one of a connection's names may talk to the connection.
"""

from __future__ import annotations

import errno
from collections.abc import Hashable, Iterable

import msgspec

from kbusd.kdbus import abi, layout, names
from kbusd.kdbus.errors import Errno
from kbusd.kdbus.items import Item
from kbusd.kdbus.metadata import IdMap

NOTHING = -1
"""Less than the access rights POLICY_SEE < POLICY_TALK < POLICY_OWN."""

MAX_ID = (1 << 32) - 2
"""The highest uid or gid; one more means none."""


class Access(msgspec.Struct, frozen=True):
    """`access` is granted to a kind of user, `id` being the uid or gid."""

    kind: int
    access: int
    id: int


class Entry(msgspec.Struct, frozen=True):
    """Who may do what with `name`, or with the names directly below it."""

    name: str
    wildcard: bool
    accesses: tuple[Access, ...]

    @classmethod
    def of(cls, name: str, wildcard: bool, accesses: Iterable[tuple[int, int, int]]) -> Entry:
        """From plain numbers, as processes tell each other."""
        return cls(name, wildcard, tuple(Access(*each) for each in accesses))


class Subject(msgspec.Struct, frozen=True):
    """Who asks: effective ids, and whether it may do as it likes (rule 2 above)."""

    euid: int
    egid: int
    groups: frozenset[int] = frozenset()
    owner: bool = False

    @classmethod
    def of(cls, uid: int, gid: int, groups: Iterable[int], owner: bool = False) -> Subject:
        """From plain numbers."""
        return cls(uid, gid, frozenset(groups), owner)


def parse(items: Iterable[Item], most: int | None, wildcards: bool) -> tuple[Entry, ...]:
    """The entries that NAME items, each with the POLICY_ACCESS items after it, stand for.

    Other items are skipped. Raises Errno: E2BIG for more than `most` names (None: any number),
    EINVAL for a name, an access or an order that can't be.
    """
    found: list[tuple[str, list[Access]]] = []
    for item in items:
        if item.type == abi.ITEM_NAME:
            if most is not None and len(found) >= most:
                raise Errno(errno.E2BIG, f"policy for more than {most} name")
            if not names.is_pattern(item.text) or (item.text.endswith("*") and not wildcards):
                raise Errno(errno.EINVAL, f"policy can't be made for {item.text!r}")
            found.append((item.text, []))
        elif item.type == abi.ITEM_POLICY_ACCESS:
            if not found:
                raise Errno(errno.EINVAL, "POLICY_ACCESS before any NAME that it could be for")
            found[-1][1].append(_parse_access(item.data))
    return tuple(
        Entry(name.removesuffix(".*"), name.endswith(".*"), tuple(accesses))
        for name, accesses in found
    )


def _parse_access(data: bytes) -> Access:
    kind, access, id = layout.POLICY_ACCESS.unpack(data)
    if access not in (abi.POLICY_SEE, abi.POLICY_TALK, abi.POLICY_OWN):
        raise Errno(errno.EINVAL, f"POLICY_ACCESS grants an unknown access {access}")
    if kind == abi.POLICY_ACCESS_WORLD:
        return Access(kind, access, 0)
    if kind not in (abi.POLICY_ACCESS_USER, abi.POLICY_ACCESS_GROUP):
        raise Errno(errno.EINVAL, f"POLICY_ACCESS is for an unknown kind of user {kind}")
    if id > MAX_ID:
        raise Errno(errno.EINVAL, f"POLICY_ACCESS is for {id}, which is no uid or gid")
    return Access(kind, access, id)


def outside(entries: Iterable[Entry], uids: IdMap, gids: IdMap) -> tuple[Entry, ...]:
    """What somebody in a user namespace said, for all. Raises Errno EINVAL for an id that he has not."""

    def of(access: Access) -> Access:
        if access.kind == abi.POLICY_ACCESS_WORLD:
            return access
        ids = uids if access.kind == abi.POLICY_ACCESS_USER else gids
        id = ids.outside(access.id)
        if id is None:
            raise Errno(errno.EINVAL, f"POLICY_ACCESS is for {access.id}, whom the caller has not")
        return Access(access.kind, access.access, id)

    return tuple(Entry(each.name, each.wildcard, tuple(map(of, each.accesses))) for each in entries)


class Database:
    """The entries of a bus or of a custom endpoint."""

    def __init__(self) -> None:
        self._entries: dict[tuple[str, bool], tuple[Hashable, tuple[Access, ...]]] = {}

    def replace(self, owner: Hashable, entries: Iterable[Entry]) -> None:
        """Give `owner` these entries instead of those that it had.

        Raises Errno EEXIST if somebody else has one of them, or if one comes twice; then nothing
        has changed.
        """
        kept = {key: value for key, value in self._entries.items() if value[0] != owner}
        for entry in entries:
            key = entry.name, entry.wildcard
            if key in kept:
                pattern = entry.name + ".*" * entry.wildcard
                raise Errno(errno.EEXIST, f"there is a policy for {pattern} already")
            kept[key] = owner, entry.accesses
        self._entries = kept

    def remove(self, owner: Hashable) -> None:
        """Forget the entries of an owner that is gone."""
        self.replace(owner, ())

    def has(self, name: str) -> bool:
        """Whether there is an entry for it."""
        return self._find(name) is not None

    def __len__(self) -> int:
        return len(self._entries)

    def _find(self, name: str) -> tuple[Hashable, tuple[Access, ...]] | None:
        entry = self._entries.get((name, False))
        return entry or self._entries.get((name.rpartition(".")[0], True))

    def query(self, subject: Subject, name: str) -> int:
        """The highest access that `subject` has to `name`, or NOTHING."""
        entry = self._find(name)
        if entry is None:
            return NOTHING
        granted = (each.access for each in entry[1] if _is_for(each, subject))
        return max(granted, default=NOTHING)


def _is_for(access: Access, subject: Subject) -> bool:
    if access.kind == abi.POLICY_ACCESS_USER:
        return access.id == subject.euid
    if access.kind == abi.POLICY_ACCESS_GROUP:
        return access.id == subject.egid or access.id in subject.groups
    return True


class View:
    """What applies to connections of one endpoint: the bus's policy, and the endpoint's own if any."""

    def __init__(
        self, bus: Database, endpoint: Database | None = None, closed: bool = True
    ) -> None:
        self._bus = bus
        self._endpoint = endpoint
        self._closed = closed

    def may_own(self, subject: Subject, name: str) -> bool:
        """Whether `subject` may acquire a name."""
        endpoint = self._endpoint
        if endpoint is not None and endpoint.query(subject, name) < abi.POLICY_OWN:
            return False
        if self._is_owner(subject) or not (self._closed or self._bus.has(name)):
            return True
        return self._bus.query(subject, name) >= abi.POLICY_OWN

    def may_talk(self, subject: Subject, uid: int, owned: Iterable[str]) -> bool:
        """Whether `subject` may talk to a connection of the user `uid` that has these names."""
        owned = tuple(owned)
        if self._endpoint is not None and not _any(self._endpoint, subject, owned, abi.POLICY_TALK):
            return False
        if self._is_owner(subject) or subject.euid == uid:
            return True
        if not self._closed:
            owned = tuple(filter(self._bus.has, owned))
            if not owned:
                return True
        return _any(self._bus, subject, owned, abi.POLICY_TALK)

    def may_see_name(self, subject: Subject, name: str) -> bool:
        """Whether a name is there for `subject`: in lists, look-ups and notifications."""
        return self._endpoint is None or self._endpoint.query(subject, name) >= abi.POLICY_SEE

    def may_see(self, subject: Subject, owned: Iterable[str]) -> bool:
        """Whether a connection with these names is there for `subject`."""
        return self._endpoint is None or _any(self._endpoint, subject, owned, abi.POLICY_SEE)

    def _is_owner(self, subject: Subject) -> bool:
        return subject.owner and self._endpoint is None


def _any(database: Database, subject: Subject, owned: Iterable[str], access: int) -> bool:
    return any(database.query(subject, name) >= access for name in owned)
