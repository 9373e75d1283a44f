"""Custom endpoints of kdbus (kdbus.endpoint(7)): the policy of each, which narrows the bus's.

Whoever is behind one owns, reaches and sees only what its policy says. That somebody has made one, and who
came by which, is the supervisor's word; the policy is the maker's. What it allows of owning and seeing is
decided here, and the rest by the workers, who learn of it by the log.
"""

from __future__ import annotations

from collections.abc import Iterable

from kbusd.broker.connection import Behind, Connection
from kbusd.broker.matches import listens
from kbusd.broker.name_policy import check, entries_of
from kbusd.broker.refusal import FILE_EXISTS, Refused, Violation
from kbusd.kdbus import abi, policy
from kbusd.kdbus.errors import Errno
from kbusd.rings.entries import PolicyEntry

MAX_ENTRIES = 4096  # of one endpoint; a command is 32 KiB at most


class ShownByNode:
    """What one shows a user of names (filtered.py)."""

    def __init__(
        self, database: policy.Database, patterns: list[tuple[str, bool]], who: Behind
    ) -> None:
        self._database = database
        self._patterns = patterns
        self._subject = policy.Subject.of(who.uid, who.gid, who.groups)

    def access(self, name: str) -> int:
        """The highest access to a name, or NOTHING."""
        return self._database.query(self._subject, name)

    def sees(self, name: str) -> bool:
        return self.access(name) >= abi.POLICY_SEE

    def may_own(self, name: str) -> bool:
        return self.access(name) >= abi.POLICY_OWN

    def patterns(self) -> list[tuple[str, bool]]:
        return [each for each in self._patterns if self.sees(each[0] + ".*" * each[1])]


class CustomEndpoints:
    """Policies by endpoint, whose number is that of its maker's worker."""

    def __init__(self) -> None:
        self.entries: dict[int, tuple[PolicyEntry, ...]] = {}
        self._databases: dict[int, policy.Database] = {}

    def made(self, worker: int) -> None:
        """There is one; it allows nothing yet."""
        self.entries[worker] = ()
        self._databases[worker] = policy.Database()

    def set(self, maker: Connection, entries: tuple[PolicyEntry, ...]) -> None:
        """The maker says its policy. Raises Refused if an entry comes twice; Violation."""
        if maker.worker not in self.entries:
            raise Violation("set the policy of an endpoint, and has made none")
        if len(entries) > MAX_ENTRIES:
            raise Violation(f"made an endpoint with policy for {len(entries)} names")
        check(entries)
        database = policy.Database()
        try:
            database.replace(maker.worker, entries_of(entries))
        except Errno as error:
            raise Refused(FILE_EXISTS, error.text) from None
        self._databases[maker.worker] = database
        self.entries[maker.worker] = entries

    def remove(self, worker: int) -> bool:
        """The maker is gone: nothing is allowed to who is still behind it. Whether it had made one."""
        self._databases.pop(worker, None)
        return self.entries.pop(worker, None) is not None

    def may(self, connection: Connection, access: int, names: Iterable[str]) -> bool:
        """Whether a connection has this access to one of the names, as far as what it is behind goes."""
        if not connection.custom:
            return True
        if connection.credentials is None:
            return False
        shown = self.shown(Behind.of(connection.credentials, connection.custom))
        return any(shown.access(name) >= access for name in names)

    def shown(self, behind: Behind) -> ShownByNode:
        """What one shows a user; nothing if it is gone."""
        database = self._databases.get(behind.custom, policy.Database())
        patterns = [(each.name, each.wildcard) for each in self.entries.get(behind.custom, ())]
        return ShownByNode(database, patterns, behind)

    def may_see(self, connection: Connection, other: Connection) -> bool:
        """Whether one is there for the other."""
        return connection is other or self.may(connection, abi.POLICY_SEE, other.names)

    def may_meet(self, asker: Connection, peer: Connection) -> bool:
        """Whether the asker may be made known to the peer: it may talk to it, or is listened to."""
        return self.may(asker, abi.POLICY_TALK, peer.names) or listens(peer, asker)
