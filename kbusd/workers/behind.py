"""A client behind an endpoint: what of the bus there is for it. See kbusd/policy/endpoints.py.

`Sight` is the replica with what the client may not see left out; what is hidden is answered exactly as
what does not exist. `BehindDriver` is the bus driver on top of it. `Sight` also decides about the client's
own messages. What other workers and the broker ask once more, as this one may have been taken over, is in
routing.py and in broker/endpoints.py.

A connection is visible while it owns a visible name, and once it did, or has sent the client something,
for as long as it lives: so the client learns when its callers go.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from kbusd.policy.endpoints import OWN, SEE, TALK, Asked
from kbusd.rings.entries import (
    AddMatch,
    ConnectionRemoved,
    Credentials,
    LogEntry,
    ReleaseName,
    Request,
    RequestName,
    StartService,
)
from kbusd.rings.envelope import Envelope
from kbusd.wire.match import parse
from kbusd.workers import errors
from kbusd.workers.driver import Action, Ask, Bus, Call, Driver, Refusal, Signal
from kbusd.workers.introspection import BUS, INTROSPECTABLE, PEER, PROPERTIES
from kbusd.workers.replica import BUS_ID, BUS_NAME, NOBODY, Connection, Replica, parse_unique

RETURN, ERROR = 2, 3
NO_AUTO_START = 0x2
NON_EXISTENT, NOT_OWNER = 2, 3  # ReleaseName's answers

_METHODS = {
    BUS: frozenset(
        (
            "Hello",
            "RequestName",
            "ReleaseName",
            "StartServiceByName",
            "NameHasOwner",
            "ListNames",
            "ListActivatableNames",
            "AddMatch",
            "RemoveMatch",
            "GetNameOwner",
            "ListQueuedOwners",
            "GetConnectionUnixUser",
            "GetConnectionUnixProcessID",
            "GetAdtAuditSessionData",
            "GetConnectionSELinuxSecurityContext",
            "GetConnectionCredentials",
            "GetId",
        )
    ),
    PROPERTIES: frozenset(("Get", "GetAll", "Set")),
    INTROSPECTABLE: frozenset(("Introspect",)),
    PEER: frozenset(("Ping", "GetMachineId")),
}
"""What the bus does for such a client."""


class Sight:
    """The bus as the client sees it."""

    def __init__(self, replica: Replica, endpoint: str) -> None:
        self._replica = replica
        self._endpoint = endpoint
        self._met: set[int] = set()

    @property
    def looks_at_args(self) -> bool:
        """Whether arguments matter for what the client may send."""
        return self._replica.view(self._endpoint).looks_at_args

    # -- names -------------------------------------------------------------------------------

    def meet(self, id: int) -> None:
        """The connection has something to do with the client."""
        if id > NOBODY:
            self._met.add(id)

    def forget(self, id: int) -> None:
        self._met.discard(id)

    def sees(self, name: str) -> bool:
        """Whether the client may know of a name at all."""
        if name == BUS_NAME:
            return True
        if not name.startswith(":"):
            return self._replica.view(self._endpoint).level(name) >= SEE
        id = parse_unique(name)
        return id is not None and self._sees_connection(id)

    def _sees_connection(self, id: int) -> bool:
        if id == self._replica.me or id in self._met:
            return True
        connection = self._replica.connections.get(id)
        return connection is not None and self._level(connection) >= SEE

    def _level(self, connection: Connection) -> int:
        return self._replica.view(self._endpoint).best(connection.names)

    def level(self, name: str) -> int:
        return self._replica.view(self._endpoint).level(name)

    # -- what the driver reads (replica.py) --------------------------------------------------

    def owner(self, name: str) -> int | None:
        return self._replica.owner(name) if self.sees(name) else None

    def owners(self, name: str) -> list[int]:
        """Who waits for a name is for those to know who may have it. Raises Refusal."""
        if not self.sees(name):
            return []
        if not name.startswith(":") and name != BUS_NAME and self.level(name) < OWN:
            raise Refusal(errors.ACCESS_DENIED, f"{name} is not to be owned by this client")
        return self._replica.owners(name)

    @property
    def names(self) -> list[str]:
        return [name for name in self._replica.names if self.sees(name)]

    @property
    def connections(self) -> dict[int, Connection]:
        return {
            id: each for id, each in self._replica.connections.items() if self._sees_connection(id)
        }

    @property
    def activatable(self) -> list[str]:
        return [name for name in self._replica.activatable if self.sees(name)]

    # -- the client's messages ---------------------------------------------------------------

    def refuses(
        self,
        envelope: Envelope,
        owner: int | None,
        flags: int,
        args: Callable[[], Sequence[str | None]],
    ) -> tuple[str, str] | None:
        """Error and text, if the client may not send this to its destination, which `owner` owns."""
        name = envelope.destination
        assert name is not None
        if owner in (BUS_ID, self._replica.me):
            return None
        if not self.sees(name):
            return _nobody(name, flags)
        if envelope.type in (RETURN, ERROR):
            return None  # whether it was asked, the receiver's worker knows
        view = self._replica.view(self._endpoint)
        if owner is None:
            names: Sequence[str] = (name,)
        else:
            names = tuple(self._replica.connections[owner].names)
        asked = Asked(envelope.path, envelope.interface, envelope.member, args)
        if view.may_call(names, asked):
            return None
        return errors.ACCESS_DENIED, (
            f'Endpoint "{self._endpoint}" does not let its clients send this to {name}'
            f' (interface="{envelope.interface}" member="{envelope.member}" path="{envelope.path}")'
        )


def _nobody(name: str, flags: int) -> tuple[str, str]:
    """What is said of a name that nobody has, and no service file."""
    if flags & NO_AUTO_START:
        return errors.NAME_HAS_NO_OWNER, f'Name "{name}" does not exist'
    return errors.SERVICE_UNKNOWN, errors.no_service(name)


class BehindDriver(Driver):
    """The bus driver for such a client."""

    def __init__(self, replica: Replica, bus: Bus, credentials: Credentials, sight: Sight) -> None:
        super().__init__(replica, bus, credentials)
        self.seen = self.sight = sight

    def _carry_out(self, call: Call) -> Ask | tuple[Any, ...]:
        self._check_allowed(call)
        return super()._carry_out(call)

    def _check_allowed(self, call: Call) -> None:
        interfaces = _METHODS if call.interface is None else (call.interface,)
        if not any(call.member in _METHODS.get(each, ()) for each in interfaces):
            raise Refusal(
                errors.ACCESS_DENIED, f'Endpoint "{self.credentials.endpoint}" denies {call.member}'
            )

    def _ask(self, call: Call, request: Request, *, held: bool = True) -> Ask | tuple[Any, ...]:
        match request:
            case AddMatch(rule=rule) if parse(rule).eavesdrop:
                raise Refusal(errors.ACCESS_DENIED, "Nobody eavesdrops from behind an endpoint")
            case RequestName(name=name) if self.sight.level(name) < OWN:
                raise Refusal(
                    errors.ACCESS_DENIED,
                    f'Connection "{self.name}" is not allowed to own the service "{name}" due to'
                    " the policy of its endpoint",
                )
            case ReleaseName(name=name) if self.sight.level(name) < OWN:
                return "u", NON_EXISTENT if self.sight.owner(name) is None else NOT_OWNER
            case StartService(name=name) if self.sight.level(name) < TALK:
                if not self.sight.sees(name):
                    raise Refusal(errors.SERVICE_UNKNOWN, errors.no_service(name))
                raise Refusal(errors.ACCESS_DENIED, f"{name} may only be seen")
        return super()._ask(call, request, held=held)

    def entry(self, entry: LogEntry) -> list[Action]:
        actions = super().entry(entry)
        if isinstance(entry, ConnectionRemoved):
            self.sight.forget(entry.id)
        return actions

    def _owner_changed(self, name: str, old: int, new: int) -> list[Signal | None]:
        if not self.sight.sees(name) and self.me not in (old, new):
            return []
        if not name.startswith(":"):
            self.sight.meet(old)
            self.sight.meet(new)
        return super()._owner_changed(name, old, new)
