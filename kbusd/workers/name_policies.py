"""What kdbus's policy says of two connections of the bus: whom one sees, whom it may talk to.

From the worker's copy of the log: who owns which name, which policy kdbus clients have brought, which custom
endpoints there are and who is behind one (kdbus/policy.py). Who may own a name is the broker's to say
(broker/name_policy.py, endpoints.py). Sans-IO.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from kbusd.kdbus import policy
from kbusd.rings.entries import PolicyEntry
from kbusd.workers.replica import Connection, Replica

_NOTHING = policy.Database()


class NamePolicies:
    """`owner`: of the bus; `closed`: what no policy allows is denied."""

    def __init__(self, replica: Replica, owner: int, closed: bool) -> None:
        self._replica = replica
        self._owner = owner
        self._closed = closed
        self._brought: Mapping[int, tuple[PolicyEntry, ...]] = {}
        self._bus = policy.Database()
        # Of custom endpoints, each with the entries from which it was made.
        self._custom: dict[int, tuple[tuple[PolicyEntry, ...], policy.Database]] = {}

    def refusal(self, asker: Connection, asked: Connection, hears: bool = False) -> str | None:
        """Why one may not talk to the other; None: it may. `hears`: that is asked because it is about to get a signal
        of the other's. Of who is talked to, and of who hears, it counts who has opened his file."""
        if not self._closed and not self._replica.policies and not asker.custom:
            return None
        uid = asked.credentials.opened_by.real
        if self._view(asker).may_talk(self._subject(asker, hears), uid, asked.names):
            return None
        whom = f"the owner of {min(asked.names)}" if asked.names else asked.name
        return f"policy does not let {asker.name} (uid {asker.credentials.uid}) talk to {whom}"

    def sees_name(self, asker: Connection, name: str) -> bool:
        """Whether a name is there for a connection."""
        if not asker.custom:
            return True
        return self._view(asker).may_see_name(self._subject(asker), name)

    def sees(self, asker: Connection, other: Connection) -> bool:
        """Whether one is there for the other."""
        if not asker.custom or asker.id == other.id:
            return True
        return self._view(asker).may_see(self._subject(asker), other.names)

    def _subject(self, connection: Connection, opener: bool = False) -> policy.Subject:
        who = connection.credentials
        by = who.opened_by if opener else who
        return policy.Subject.of(by.uid, by.gid, by.groups, who.is_privileged(self._owner))

    def _view(self, asker: Connection) -> policy.View:
        if self._brought != self._replica.policies:
            self._brought = dict(self._replica.policies)
            self._bus = policy.Database()
            for id, entries in self._brought.items():
                self._bus.replace(id, _read(entries))
        custom = self._endpoint(asker.custom) if asker.custom else None
        return policy.View(self._bus, custom, self._closed)

    def _endpoint(self, number: int) -> policy.Database:
        entries = self._replica.custom.get(number)
        if entries is None:
            self._custom.pop(number, None)
            return _NOTHING
        known = self._custom.get(number)
        if known is None or known[0] is not entries:
            known = self._custom[number] = entries, policy.Database()
            known[1].replace(number, _read(entries))
        return known[1]


def _read(entries: Iterable[PolicyEntry]) -> list[policy.Entry]:
    return [policy.Entry.of(each.name, each.wildcard, each.accesses) for each in entries]
