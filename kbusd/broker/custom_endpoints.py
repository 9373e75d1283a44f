"""Custom endpoints of kdbus (kdbus.endpoint(7)): the policy of each, which narrows the bus's.

Whoever is behind one owns, reaches and sees only what its policy says. That somebody has made one, and who
came by which, is the supervisor's word; the policy is the maker's. What it allows of owning and seeing is
decided here, and the rest by the workers, who learn of it by the log.
"""

from __future__ import annotations

from collections.abc import Iterable

from kbusd.broker.connection import Connection
from kbusd.broker.name_policy import check, entries_of
from kbusd.broker.refusal import FILE_EXISTS, Refused, Violation
from kbusd.kdbus import abi, policy
from kbusd.kdbus.errors import Errno
from kbusd.rings.entries import PolicyEntry

MAX_ENTRIES = 4096  # of one endpoint; a command is 32 KiB at most


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
        try:
            self._databases[maker.worker].replace(maker.worker, entries_of(entries))
        except Errno as error:
            raise Refused(FILE_EXISTS, error.text) from None
        self.entries[maker.worker] = entries

    def remove(self, worker: int) -> bool:
        """The maker is gone: nothing is allowed to who is still behind it. Whether it had made one."""
        self._databases.pop(worker, None)
        return self.entries.pop(worker, None) is not None

    def may(self, connection: Connection, access: int, names: Iterable[str]) -> bool:
        """Whether a connection has this access to one of the names, as far as what it is behind goes."""
        if not connection.custom:
            return True
        database = self._databases.get(connection.custom)
        who = connection.credentials
        if database is None or who is None:
            return False
        subject = policy.Subject.of(who.uid, who.gid, who.groups)
        return any(database.query(subject, name) >= access for name in names)

    def may_see(self, connection: Connection, other: Connection) -> bool:
        """Whether one is there for the other."""
        return connection is other or self.may(connection, abi.POLICY_SEE, other.names)
