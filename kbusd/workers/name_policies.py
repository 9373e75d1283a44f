"""What kdbus's policy says of two connections of the bus: may one talk to the other (kdbus/policy.py).

From the worker's copy of the log: who owns which name, and which policy kdbus clients have brought. Who
may own a name is the broker's to say (broker/name_policy.py). Sans-IO.
"""

from __future__ import annotations

from kbusd.kdbus import policy
from kbusd.rings.entries import PolicyEntry
from kbusd.workers.replica import Connection, Replica


class NamePolicies:
    """`owner`: of the bus; `closed`: what no policy allows is denied."""

    def __init__(self, replica: Replica, owner: int, closed: bool) -> None:
        self._replica = replica
        self._owner = owner
        self._closed = closed
        self._read: dict[int, tuple[PolicyEntry, ...]] = {}
        self._database = policy.Database()

    def refusal(self, asker: Connection, asked: Connection) -> str | None:
        """Why one may not talk to the other; None: it may."""
        if not self._closed and not self._replica.policies:
            return None
        uid = asked.credentials.uid
        if self._view().may_talk(self._subject(asker), uid, asked.names):
            return None
        whom = f"the owner of {min(asked.names)}" if asked.names else asked.name
        return f"policy does not let {asker.name} (uid {asker.credentials.uid}) talk to {whom}"

    def _subject(self, connection: Connection) -> policy.Subject:
        who = connection.credentials
        return policy.Subject.of(who.uid, who.gid, who.groups, who.uid in (0, self._owner))

    def _view(self) -> policy.View:
        if self._read != self._replica.policies:
            self._read = dict(self._replica.policies)
            self._database = database(self._read)
        return policy.View(self._database, None, self._closed)


def database(brought: dict[int, tuple[PolicyEntry, ...]]) -> policy.Database:
    """The policy that connections have brought."""
    made = policy.Database()
    for id, each in brought.items():
        made.replace(id, [policy.Entry.of(e.name, e.wildcard, e.accesses) for e in each])
    return made
