"""Further sockets of the bus, each with a policy of its own: which there are, and who may go through.

Those of the configuration come and go with it; others were added by a client, and go when it says so, or,
if they are bound to it, when it goes. The supervisor makes the sockets and says where they are; till then
whoever added one waits. What a client behind an endpoint is not to see is for its own worker to hide; here,
and in the workers of those that it talks to, that worker is taken to be hostile.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from kbusd.broker.connection import Connection
from kbusd.broker.matches import listens, parse
from kbusd.broker.outside import Outside
from kbusd.broker.refusal import (
    ACCESS_DENIED,
    FAILED,
    FILE_EXISTS,
    INVALID_ARGS,
    LIMITS_EXCEEDED,
    SERVICE_UNKNOWN,
    Refused,
)
from kbusd.policy import endpoints as policy
from kbusd.policy.endpoints import OWN, SEE, TALK, Endpoint, EndpointError, View
from kbusd.rings.entries import (
    AddEndpoint,
    AddMatch,
    Counted,
    EndpointChanged,
    Failure,
    FetchPolicy,
    FetchSnapshot,
    Hello,
    Introduce,
    Introduced,
    Leaving,
    ProcessOf,
    ReleaseName,
    RemoveMatch,
    Reply,
    Request,
    RequestName,
    Running,
    StartService,
    Stuck,
)

MAX_ENDPOINTS = 256
_ALLOWED = (
    AddMatch,
    Counted,
    FetchPolicy,
    FetchSnapshot,
    Hello,
    Introduce,
    Introduced,
    Leaving,
    ProcessOf,
    ReleaseName,
    RemoveMatch,
    RequestName,
    Running,
    StartService,
    Stuck,
)
"""What the worker of a client behind an endpoint may ask."""


@dataclass(slots=True)
class One:
    """An endpoint. `by`: who added it, None: the configuration. `asks`: the request that waits."""

    policy: Endpoint
    view: View
    by: Connection | None = None
    bound: bool = False
    asks: int | None = None
    address: str = ""


class ShownBySocket:
    """What one shows of names (filtered.py)."""

    def __init__(self, endpoint: Endpoint, view: View) -> None:
        self._endpoint = endpoint
        self._view = view

    def sees(self, name: str) -> bool:
        return self._view.level(name) >= SEE

    def may_own(self, name: str) -> bool:
        return self._view.level(name) >= OWN

    def patterns(self) -> list[tuple[str, bool]]:
        levels = [(each.name, each.below) for each in self._endpoint.levels if each.level >= SEE]
        return levels + [(each.name, each.below) for each in self._endpoint.rules if each.allow]


class Endpoints:
    """All of a bus. `existed`: there were some, once; `first` is called before anybody can come by the first."""

    def __init__(self, outside: Outside, first: Callable[[], None]) -> None:
        self._outside = outside
        self.existed = False
        self._first = first
        self._all: dict[str, One] = {}
        self._unanswered = 0

    # -- which there are ---------------------------------------------------------------------

    def configure(self, wanted: Iterable[Endpoint], moved: Iterable[str] = ()) -> list[str]:
        """Have those of the configuration; returns the names of those that went. `moved`: whose sockets
        are elsewhere now."""
        new = {each.name: each for each in wanted}
        old = [name for name, each in self._all.items() if each.by is None and name not in new]
        changed = bool(old)
        for name in old:
            del self._all[name]
            self._outside.append(EndpointChanged(name, b""))
        for name, endpoint in new.items():
            known = self._all.get(name)
            if known is None or known.by is not None:
                changed = True
                self._put(One(endpoint, View(endpoint)))
            elif known.policy != endpoint:
                known.policy, known.view = endpoint, View(endpoint)
                self._outside.append(EndpointChanged(name, policy.encode(endpoint)))
        if moved := set(moved) & self._all.keys():
            self._listen(without=moved)
        if changed or moved:
            self._listen()
        return old

    def add(self, connection: Connection, message: AddEndpoint) -> None:
        """Answered when the supervisor has made the socket. Raises Refused."""
        try:
            endpoint = policy.decode(message.policy)
        except EndpointError as error:
            raise Refused(INVALID_ARGS, str(error)) from None
        if endpoint.name != message.name:
            raise Refused(INVALID_ARGS, "An endpoint has one name")
        if message.name in self._all:
            raise Refused(FILE_EXISTS, f"There is an endpoint {message.name} already")
        if len(self._all) >= MAX_ENDPOINTS:
            raise Refused(LIMITS_EXCEEDED, f"There are {MAX_ENDPOINTS} endpoints already")
        asks = message.request
        self._put(One(endpoint, View(endpoint), connection, message.bound, asks))
        self._listen()
        self._outside.say(f"{connection} added endpoint {message.name}")

    def remove(self, name: str) -> None:
        """Raises Refused."""
        one = self._all.get(name)
        if one is None:
            raise Refused(FAILED, f"There is no endpoint {name}")
        if one.by is None:
            raise Refused(FAILED, f"Endpoint {name} is of the configuration")
        self._drop(name, "was removed")
        self._listen()

    def gone(self, connection: Connection) -> list[str]:
        """What is bound to the connection goes with it; returns the names."""
        names = [name for name, one in self._all.items() if one.bound and one.by is connection]
        for name in names:
            self._drop(name, f"went with {connection}")
        if names:
            self._listen()
        return names

    def listening(self, addresses: dict[str, str]) -> None:
        """Where the supervisor listens. Who added one that it can't listen on has to do without."""
        self._unanswered -= 1
        if self._unanswered:
            return  # it did not know of all yet
        failed = []
        for name, one in self._all.items():
            one.address = addresses.get(name, "")
            asks, one.asks = one.asks, None
            if asks is None or one.by is None:
                continue
            if one.address:
                self._outside.send(one.by.worker, Reply(asks, one.address))
            else:
                text = f"Endpoint {name} can't be listened on; see the log of the bus"
                self._outside.send(one.by.worker, Failure(asks, FAILED, text))
                failed.append(name)
        for name in failed:
            self._drop(name, "has no socket")

    def list(self) -> list[tuple[str, str, tuple[str, ...]]]:
        return [(name, one.address, one.policy.lines) for name, one in self._all.items()]

    def entries(self) -> tuple[tuple[str, bytes], ...]:
        """For a snapshot."""
        return tuple((name, policy.encode(one.policy)) for name, one in self._all.items())

    def _put(self, one: One) -> None:
        if not self.existed:
            self.existed = True
            self._first()
        self._all[one.policy.name] = one
        self._outside.append(EndpointChanged(one.policy.name, policy.encode(one.policy)))

    def _drop(self, name: str, why: str) -> None:
        del self._all[name]
        self._outside.append(EndpointChanged(name, b""))
        self._outside.say(f"endpoint {name} {why}")

    def _listen(self, without: Collection[str] = ()) -> None:
        self._unanswered += 1
        self._outside.listen(tuple(name for name in self._all if name not in without))

    # -- who may go through ------------------------------------------------------------------

    def shown(self, name: str) -> ShownBySocket:
        """What an endpoint shows of names; nothing if there is none."""
        one = self._all.get(name)
        if one is None:
            return ShownBySocket(Endpoint(name), policy.nothing(name))
        return ShownBySocket(one.policy, one.view)

    def view(self, connection: Connection) -> View | None:
        """By what the connection is held back; None: it came by the socket of the bus."""
        assert connection.credentials is not None
        name = connection.credentials.endpoint
        if not name:
            return None
        one = self._all.get(name)
        return policy.nothing(name) if one is None else one.view

    def check(self, connection: Connection, message: Request) -> None:
        """Whether the worker of a client may ask this at all. Raises Refused."""
        if connection.credentials is None or not connection.credentials.endpoint:
            return
        view = self.view(connection)
        assert view is not None
        if type(message) not in _ALLOWED:
            what = f"{type(message).__name__} is not for clients behind an endpoint"
            raise Refused(ACCESS_DENIED, what)
        match message:
            case Hello():
                if view.name not in self._all:
                    raise Refused(ACCESS_DENIED, f"There is no endpoint {view.name} any more")
            case AddMatch(rule=rule):
                if parse(rule).eavesdrop:
                    raise Refused(ACCESS_DENIED, "Nobody eavesdrops from behind an endpoint")
            case RequestName(name=name):
                if view.level(name) < OWN:
                    raise Refused(
                        ACCESS_DENIED,
                        f'Connection "{connection.unique_name}" is not allowed to own the service'
                        f' "{name}" due to the policy of its endpoint',
                    )
            case StartService(name=name):
                if view.level(name) < TALK:
                    text = f"The name {name} was not provided by any .service files"
                    raise Refused(SERVICE_UNKNOWN, text)

    def may_see(self, asker: Connection, other: Connection) -> bool:
        """Whether the asker may know of the other by its names."""
        view = self.view(asker)
        return view is None or view.best(other.names) >= SEE

    def may_meet(self, asker: Connection, peer: Connection) -> bool:
        """Whether the asker may be made known to the peer: it may call it, or is listened to."""
        view = self.view(asker)
        return view is None or view.best(peer.names) >= TALK or listens(peer, asker)
