"""kdbus's self-tests about names (test-names.c), played on the registry that the bus has."""

from __future__ import annotations

from kbusd.broker import registry
from kbusd.broker.connection import Connection
from kbusd.kdbus import abi, ownership
from tests.unit.kdbus.refused import refused

ALLOW, REPLACE, QUEUE = (
    abi.NAME_ALLOW_REPLACEMENT,
    abi.NAME_REPLACE_EXISTING,
    abi.NAME_QUEUE,
)
PRIMARY, IN_QUEUE, ACQUIRED = abi.NAME_PRIMARY, abi.NAME_IN_QUEUE, abi.NAME_ACQUIRED
NAME = "foo.bla.blaz"


class Bus:
    """The registry, spoken to in kdbus's terms."""

    def __init__(self) -> None:
        self.registry = registry.Registry()

    def acquire(self, who: Connection, flags: int = 0) -> int:
        waited = who in self.registry.waiters(NAME)
        result, _ = self.registry.request(who, NAME, ownership.request_flags(flags))
        return ownership.acquired(result, flags, waited)

    def release(self, who: Connection) -> None:
        ownership.check_released(self.registry.release(who, NAME)[0])

    def listed(self) -> list[tuple[int, int]]:
        """Who owns and waits for the name: connection and flags as LIST shows them."""
        return [
            (claim.connection.id, ownership.claim_flags(claim.flags, primary=at == 0))
            for at, claim in enumerate(self.registry.queues.get(NAME, ()))
        ]


def connection(id: int) -> Connection:
    made = Connection(worker=id, pid=0)
    made.id = id
    return made


A, B = 1, 2


def test_basic() -> None:
    bus, a, b = Bus(), connection(A), connection(B)
    assert bus.acquire(a) == PRIMARY | ACQUIRED
    assert bus.listed() == [(A, PRIMARY)]
    assert bus.acquire(a, ALLOW) == PRIMARY | ALLOW
    assert bus.listed() == [(A, PRIMARY | ALLOW)]  # flags changed, nothing acquired
    with refused("EADDRINUSE"):
        bus.release(b)
    bus.release(a)
    with refused("ESRCH"):
        bus.release(a)


def test_conflict() -> None:
    bus, a, b = Bus(), connection(A), connection(B)
    bus.acquire(a)
    with refused("EEXIST"):
        bus.acquire(b)
    with refused("EEXIST"):
        bus.acquire(b, REPLACE)


def test_queue() -> None:
    bus, a, b = Bus(), connection(A), connection(B)
    bus.acquire(a)
    assert bus.acquire(b, QUEUE) == QUEUE | IN_QUEUE | ACQUIRED
    assert bus.acquire(b, QUEUE) == QUEUE | IN_QUEUE  # it waited already
    assert bus.listed() == [(A, PRIMARY), (B, QUEUE | IN_QUEUE)]
    bus.release(a)
    assert bus.listed() == [(B, QUEUE | PRIMARY)]


def test_who_asks_again_without_queue_waits_no_more() -> None:
    bus, a, b = Bus(), connection(A), connection(B)
    bus.acquire(a)
    bus.acquire(b, QUEUE)
    assert bus.acquire(b, ALLOW) == ALLOW
    assert bus.listed() == [(A, PRIMARY)]
    with refused("EEXIST"):
        bus.acquire(b, ALLOW)


def test_takeover() -> None:
    bus, a, b = Bus(), connection(A), connection(B)
    bus.acquire(a, ALLOW)
    assert bus.listed() == [(A, ALLOW | PRIMARY)]
    assert bus.acquire(b, REPLACE) == PRIMARY | ACQUIRED
    assert bus.listed() == [(B, PRIMARY)]


def test_who_is_replaced_waits_if_it_queues() -> None:
    bus, a, b = Bus(), connection(A), connection(B)
    bus.acquire(a, ALLOW | QUEUE)
    bus.acquire(b, REPLACE)
    assert bus.listed() == [(B, PRIMARY), (A, ALLOW | QUEUE | IN_QUEUE)]
