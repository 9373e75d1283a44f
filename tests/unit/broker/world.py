"""A world for the broker's core without processes: it records what the core asks for, in order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from kbusd.broker.bus import MAX_TOLD, Bus
from kbusd.broker.connection import OPEN as BY_NOTHING
from kbusd.broker.connection import At, Behind, Connection
from kbusd.policy.configuration import DEFAULT_LIMITS, Configuration
from kbusd.policy.rules import OWN, RECEIVE, SEND, USER, Policy, Rule
from kbusd.policy.services import Service
from kbusd.rings import entries as e

ADDRESS = "unix:path=/tmp/bus,guid=00"
OWNER = 500
SHARED = 3  # socketpairs that two workers get who are introduced

# What the world was asked for: ("log", entry), (worker, message) with its descriptors, ...
Event = tuple[Any, ...]

OPEN = Policy(
    default=(
        Rule(True, USER, "t.conf", 1),
        Rule(True, OWN, "t.conf", 2),
        Rule(False, OWN, "t.conf", 3, name="not.yours"),
        Rule(True, SEND, "t.conf", 4),
        Rule(True, RECEIVE, "t.conf", 5),
    )
)


class World:
    """Records the effects; descriptors are plain numbers that are counted."""

    def __init__(self, **settings: Any) -> None:
        self.events: list[Event] = []
        self.time = 1000.0
        self.next_fd = 100
        self.open_fds: set[int] = set()
        self.words: list[str] = []
        self.joined_by: list[int] = []
        self.refused: set[tuple[bytes | None, bytes | None, str]] = set()  # by SELinux
        self.told = bytes(MAX_TOLD + 1)  # the encoded state of the bus: too much to be told
        self.reach = True
        limits = DEFAULT_LIMITS | settings.pop("limits", {})
        settings = dict[str, Any](type="session", policy=OPEN) | settings
        self.configuration = Configuration(limits=limits, **settings)
        self.bus = Bus(self, self.configuration, ADDRESS, OWNER)

    # -- Outside ---------------------------------------------------------------------------------

    def stamp(self) -> int:
        return 0

    def append(self, entry: e.LogEntry) -> None:
        self.events.append(("log", entry))

    def send(self, worker: int, message: e.BrokerMessage, fds: Sequence[int] = ()) -> None:
        self.events.append((worker, message, *fds))

    def wake(self, worker: int) -> None:
        if ("wake", worker) not in self.events:
            self.events.append(("wake", worker))

    def kill(self, worker: int, reason: str) -> None:
        self.events.append(("kill", worker, reason))

    def joined(self, worker: int) -> None:
        self.joined_by.append(worker)

    def reload(self) -> None:
        self.events.append(("reload",))

    def listen(self, endpoints: tuple[str, ...]) -> None:
        self.events.append(("listen", endpoints))

    def launch(self, launch: e.Launch) -> None:
        self.events.append(("launch", launch))

    def end_launch(self, job: int) -> None:
        self.events.append(("end", job))

    def look(self, directories: tuple[str, ...]) -> None:
        self.events.append(("look", directories))

    def snapshot(self, behind: Behind) -> list[int]:
        return [77] if behind == BY_NOTHING else [77, 78]

    def state(self) -> tuple[bytes, At]:
        return self.told, At(5, 6)

    def reaches(self, at: At) -> bool:
        assert at == At(5, 6)
        return self.reach

    def policy(self) -> int:
        return 88

    def socketpairs(self) -> tuple[list[int], list[int]]:
        made = [self.next_fd + 1 + each for each in range(2 * SHARED)]
        self.next_fd = made[-1]
        self.open_fds |= set(made)
        return made[:SHARED], made[SHARED:]

    def close(self, fd: int) -> None:
        self.open_fds.remove(fd)

    def dispose(self, fds: Sequence[int], worker: int) -> None:
        for fd in fds:
            self.close(fd)

    def allows(self, subject: bytes | None, target: bytes | None, permission: str) -> bool:
        return (subject, target, permission) not in self.refused

    def now(self) -> float:
        return self.time

    def say(self, text: str) -> None:
        self.words.append(text)

    # -- what tests do ---------------------------------------------------------------------------

    def client(
        self, worker: int, uid: int = 1000, endpoint: str = "", custom: int = 0
    ) -> Connection:
        """A connection that has said Hello; its events are not kept."""
        self.bus.worker_started(worker, 9000 + worker)
        who = msgspec.structs.replace(credentials(worker, uid), endpoint=endpoint)
        self.bus.assigned(worker, who, custom=custom)
        connection = self.bus.connections[worker]
        self.ask(connection, e.Hello(1))
        return connection

    def ask(
        self, connection: Connection, request: e.Request, fds: Sequence[int] = ()
    ) -> list[Event]:
        """What happened because of the request."""
        self.events.clear()
        self.bus.handle(connection, request, fds)
        return self.taken()

    def taken(self) -> list[Event]:
        """What happened since, without the wakes."""
        events = [event for event in self.events if event[0] != "wake"]
        return events

    @property
    def woken(self) -> set[int]:
        return {event[1] for event in self.events if event[0] == "wake"}


def credentials(worker: int, uid: int = 1000) -> e.Credentials:
    return e.Credentials(uid, uid, 9000 + worker, (uid,), ipc_owner=uid == 0)


def service(name: str, *arguments: str, user: str = "") -> Service:
    return Service(name, arguments or ("/bin/true",), f"/s/{name}.service", user=user)
