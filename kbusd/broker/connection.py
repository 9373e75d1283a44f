"""One worker and the connection that it serves, as the broker knows them.

A plain record: the registry, the match table, the introductions and the activation each keep
their part of it. Who the client is comes from the supervisor alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from kbusd.rings.entries import Credentials

if TYPE_CHECKING:
    from kbusd.policy.decide import ClientPolicy
    from kbusd.wire.match import MatchRule

NOT_YET = 0  # id of a connection that has not said Hello
MAX_COMPLAINTS = 16  # lines in the log about what one connection was refused
MAX_WAITING = 1024  # requests of one connection that are answered later


class Behind(NamedTuple):
    """By what a client is held back: an endpoint of a socket, or a custom one of kdbus, which shows each user
    what it shows him."""

    endpoint: str = ""
    custom: int = 0
    uid: int = 0
    gid: int = 0
    groups: tuple[int, ...] = ()

    @classmethod
    def of(cls, who: Credentials, custom: int) -> Behind:
        return cls("", custom, who.uid, who.gid, who.groups) if custom else cls(who.endpoint)


class At(NamedTuple):
    """Where in the log a snapshot was made: its position, and how many entries there were."""

    position: int
    entries: int


OPEN = Behind()
"""By nothing."""


class Connection:
    """`worker` is the supervisor's number for the process, `id` the N of the unique name :1.N."""

    __slots__ = (
        "about",
        "complaints",
        "credentials",
        "custom",
        "file",
        "id",
        "introduced",
        "introductions",
        "kdbus",
        "last_word",
        "matches",
        "monitor",
        "names",
        "peak_matches",
        "peak_names",
        "pid",
        "pidfd",
        "policy",
        "told",
        "unread",
        "waiting",
        "worker",
    )

    def __init__(self, worker: int, pid: int) -> None:
        self.worker = worker
        self.pid = pid  # the worker's
        self.pidfd = -1  # the client's process, where the kernel tells
        self.credentials: Credentials | None = None
        self.policy: ClientPolicy | None = None
        self.id = NOT_YET
        self.told: At | None = None  # the snapshot that its worker was told before Hello
        self.kdbus: int | None = None  # HELLO flags, if it came by a kdbus node
        self.file = False  # its client has opened one of kdbus
        self.custom = 0  # endpoint of kdbus that it is behind (custom_endpoints.py)
        self.about = b""  # what its worker tells others who ask
        self.monitor: tuple[str, ...] | None = None
        self.names: list[str] = []  # owned or waited for, in the order in which they were asked
        self.matches: dict[MatchRule, list[str]] = {}  # with the texts by which it was added
        self.peak_names = self.peak_matches = 0
        self.introduced: set[Connection] = set()
        self.introductions = 0  # asked by this connection and not yet answered
        self.waiting = 0  # requests that are answered later: services, configurations
        self.complaints = 0
        self.unread = False  # its worker did not take what it was told
        self.last_word: str | None = None  # why it left, if it said so

    @property
    def unique_name(self) -> str:
        return f":1.{self.id}"

    def __str__(self) -> str:
        name = self.unique_name if self.id != NOT_YET else "a client without a name"
        if self.credentials is None:
            return f"worker {self.worker}"
        return f"{name} (uid {self.credentials.uid}, pid {self.credentials.pid})"
