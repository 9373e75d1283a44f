"""The policy that kdbus's policy holders and activators bring along (kdbus.policy(7)): who has which.

Only the privileged may bring any, and what their workers say of it is checked here: a worker can do no
more with it than its client could. Who may own a name is decided here; who may talk to its owner is
decided by the workers, who learn of it by the log. On a `closed` bus, one that a program has made, nothing
else says who may own a name.
"""

from __future__ import annotations

from collections.abc import Iterable

from kbusd.broker.connection import Connection
from kbusd.broker.refusal import FILE_EXISTS, Refused, Violation
from kbusd.kdbus import abi, policy
from kbusd.kdbus.errors import Errno
from kbusd.kdbus.names import is_pattern
from kbusd.rings.entries import Credentials, PolicyEntry

MAX_ACCESSES = 2048  # of one entry; a command is 32 KiB at most


class NamePolicy:
    """Entries by connection."""

    def __init__(self, owner: int, closed: bool = False) -> None:
        self._owner = owner
        self._closed = closed
        self._database = policy.Database()
        self.entries: dict[int, tuple[PolicyEntry, ...]] = {}  # by connection

    def set(self, connection: Connection, id: int, entries: tuple[PolicyEntry, ...]) -> None:
        """Give a connection, which is to be known as `id`, these entries instead of those it had.

        Raises Refused if somebody else has one of them; Violation."""
        check(entries)
        if len(entries) > 1:
            raise Violation(f"brought policy for {len(entries)} names")
        try:
            self._database.replace(connection, entries_of(entries))
        except Errno as error:
            raise Refused(FILE_EXISTS, error.text) from None
        self.entries.pop(id, None)
        if entries:
            self.entries[id] = entries

    def remove(self, connection: Connection) -> None:
        """The connection is gone."""
        if self.entries.pop(connection.id, None) is not None:
            self._database.remove(connection)

    def may_own(self, credentials: Credentials, name: str, custom: bool = False) -> bool:
        """Whether a client may own a name; on a bus that is not closed, anybody may for which nobody
        brings policy. `custom`: it comes by a custom endpoint, where nobody is privileged."""
        owner = not custom and credentials.is_privileged(self._owner)
        who = policy.Subject.of(credentials.uid, credentials.gid, credentials.groups, owner)
        return policy.View(self._database, None, self._closed).may_own(who, name)


def entries_of(entries: Iterable[PolicyEntry]) -> list[policy.Entry]:
    """What was said, as the database has it."""
    return [policy.Entry.of(each.name, each.wildcard, each.accesses) for each in entries]


def check(entries: Iterable[PolicyEntry]) -> None:
    """Raise Violation for what kdbus does not have."""
    for entry in entries:
        kinds = (abi.POLICY_ACCESS_USER, abi.POLICY_ACCESS_GROUP, abi.POLICY_ACCESS_WORLD)
        sane = all(
            kind in kinds
            and abi.POLICY_SEE <= access <= abi.POLICY_OWN
            and 0 <= id <= policy.MAX_ID
            for kind, access, id in entry.accesses
        )
        text = entry.name + ".*" * entry.wildcard
        if not is_pattern(text) or not sane or len(entry.accesses) > MAX_ACCESSES:
            raise Violation(f"brought policy for {text!r} that kdbus does not have")
