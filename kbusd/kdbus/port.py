"""What a connection (`session.py`) asks of the process that called it and of the bus.

Whoever runs a session implements these: a worker with its lines and rings, a test in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import msgspec

from kbusd.kdbus import bloom, metadata
from kbusd.kdbus.commands import EndpointMake
from kbusd.kdbus.parcel import Faked, Parcel
from kbusd.kdbus.policy import Entry
from kbusd.kdbus.waits import Wait


class Caller(Protocol):
    """The process that waits in ioctl(2), whose struct is at `argument`."""

    tid: int

    @property
    def argument(self) -> int: ...

    waits_for: Wait[Any] | None
    """What a signal to the caller is to fail with Interrupted; None: nothing that could be given up."""

    async def peek(self, address: int, least: int, most: int) -> bytes:
        """Its memory from `address`, as much as there is. Raises Errno EFAULT if below `least`."""

    async def copy(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Its memory at each (address, bytes). Raises Errno EFAULT."""

    async def store(self, address: int, data: bytes) -> None:
        """Into its memory. Raises Errno EFAULT."""

    async def take(self, numbers: Sequence[int]) -> list[int]:
        """Copies of its descriptors, ours to close. Raises Errno: EBADF; EOPNOTSUPP for our own files."""


Looked = Mapping[str, bytes]
"""What /proc says of a caller."""


class Known(msgspec.Struct, frozen=True):
    """A connection as the bus knows it. `flags` are its HELLO flags; `kdbus`: it has a pool; `custom`: of the
    custom endpoint that it is behind, 0 for none."""

    id: int
    uid: int
    names: frozenset[str]
    creds: metadata.Creds
    pids: metadata.Pids
    groups: tuple[int, ...]
    label: bytes | None
    flags: int = 0
    kdbus: bool = True
    custom: int = 0
    caps: metadata.Caps | None = None
    cgroup: bytes | None = None
    audit: metadata.Audit | None = None
    space: int = 0  # its pid namespace, 0 if it is not known; and what that calls it
    inside: metadata.Pids = metadata.Pids(0, 0, 0)
    ipc_owner: bool = False  # who opened its file had that capability
    opener: int = -1  # his uid


class Joining(msgspec.Struct, frozen=True):
    """Who is to be a connection: HELLO flags, the name of an activator, the policy it brings along."""

    flags: int = 0
    name: str = ""
    policy: tuple[Entry, ...] = ()
    description: bytes | None = None
    offered: int = 0
    faked: Faked | None = None


class Memory(Protocol):
    """What the client maps."""

    @property
    def buffer(self) -> Any:
        """All of it, writable."""

    def hand_over(self) -> None:
        """The client has it from now on. Raises Errno if it can't be given to it."""

    def write(self, offset: int, data: bytes) -> None:
        """Into the pool; the client may not see it yet."""

    def push(self, offset: int, size: int) -> None:
        """The client is to see these bytes as soon as the command has ended."""


class Bus(Protocol):
    """The bus, as one connection sees it. What is async may wait; all may raise Errno."""

    @property
    def name(self) -> str: ...
    @property
    def uuid(self) -> bytes: ...
    @property
    def bloom(self) -> bloom.Parameter: ...
    @property
    def flags(self) -> int:
        """Those of BUS_MAKE."""

    @property
    def sees_pids(self) -> bool:
        """Whether the client's pid namespace is that of the pids which the bus knows."""

    @property
    def space(self) -> int:
        """The client's pid namespace."""

    @property
    def maps(self) -> tuple[metadata.IdMap, metadata.IdMap]:
        """The uids and gids of the client's user namespace."""

    def clock(self) -> tuple[int, int]:
        """CLOCK_MONOTONIC and CLOCK_REALTIME in nanoseconds."""

    def seqnum(self) -> int:
        """Of what is announced now: its place among all that happens on the bus."""

    def make_pool(self, size: int) -> Memory:
        """Zeroes. Raises Errno ENOMEM."""

    def creator(self) -> metadata.Metadata:
        """Who made the bus."""

    async def look(self, caller: Caller) -> Looked:
        """What there is to know of the caller. Raises Errno EINTR if it gets a signal meanwhile: it is answered, and
        may have begun the command again before we know."""

    async def connect(self, caller: Caller, looked: Looked, who: Joining) -> tuple[int, bytes]:
        """Be a connection of the bus; its id, and what its process says of itself (About).

        Raises Errno: EPERM for a kind that is for the privileged, EEXIST if another connection is
        the name's activator or has brought policy for it."""

    def is_privileged(self, who: Known) -> bool:
        """Whether who has opened it owns the bus, or had CAP_IPC_OWNER; and it is behind no custom
        endpoint."""

    async def set_policy(self, policy: tuple[Entry, ...]) -> None:
        """Of a policy holder. Raises Errno EEXIST."""

    async def make_endpoint(self, caller: Caller, order: EndpointMake) -> None:
        """Returns when the node of a custom endpoint is there; the caller was looked at. Raises Errno: EINVAL for a name that does
        not begin with the caller's uid, EEXIST for one that there is, EMFILE for too many."""

    async def set_endpoint(self, policy: tuple[Entry, ...]) -> None:
        """Of who has made one. Raises Errno EEXIST: an entry comes twice."""

    async def describe(self, about: bytes) -> None:
        """What is to be told to those who ask about this connection (About)."""

    async def about(self, id: int) -> bytes:
        """What a connection has said of itself (About); it may have said anything."""

    async def refreshed(self, caller: Caller, about: bytes) -> bytes:
        """The same (About) with what holds for this caller now."""

    def leave(self) -> None:
        """The connection ends."""

    async def acquire(self, name: str, flags: int) -> int:
        """RequestName; the result as D-Bus has it."""

    async def release(self, name: str) -> int:
        """ReleaseName; the result as D-Bus has it."""

    async def subscribe(self, signals: bool, on: bool) -> None:
        """Whether signals to all are to be handed to `receive`, or else what the bus announces."""

    def owner(self, name: str) -> int | None:
        """The id of a name's owner."""

    async def start_service(self, caller: Caller, name: str) -> int | None:
        """Have somebody started who takes an unowned name; the owner, None if nobody could be.

        May take as long as a service likes: raises Interrupted if the caller gets a signal."""

    def activator(self, name: str) -> int:
        """Who has a name when nobody else has it; 0 is nobody."""

    def expect(self, name: str, on: bool = True) -> None:
        """A name is about to be taken from its activator; or it was, or was not."""

    async def collect(self, name: str) -> None:
        """It was taken: wait until what had been sent to it has moved."""

    def forward(self, to: Known, parcel: Parcel, data: bytes, fds: Sequence[int]) -> None:
        """Pass on a message of `parcel.origin`, who is gone, to the new owner of a name, if he can have it."""

    def coming_back(self) -> Wait[None] | None:
        """The name of our client, an activator, is its own again: a wait for what others had left unread."""

    def moved(self, to: Known, name: str, coming: dict[int, int]) -> None:
        """That was all that had been sent to this name; so many will be sent again, by sender."""

    def tell_sent_again(self, had: int, name: str) -> None:
        """What that connection had of us, by this name, is on its way to who has the name now."""

    def tell_read(self, sender: int, cookie: int) -> None:
        """A message to a name that has an activator was read."""

    def held(self, id: int) -> tuple[metadata.OwnedName, ...]:
        """The names that a connection owns, waits for, or activates, sorted; with NAME flags."""

    def find(self, id: int) -> Known | None: ...
    def monitor(self, id: int) -> Known | None:
        """A monitor, whom nobody reaches, if our client may learn of it."""

    def sees(self, who: Known) -> bool:
        """Whether a connection is there for ours; names that are not are nobody's in all that is
        asked here."""

    def everybody(self) -> Iterable[Known]:
        """All that ours may know of."""

    def startable(self) -> Iterable[str]:
        """The names that a service file can start, of those that ours may see."""

    async def send(
        self, to: Known, parcel: Parcel, data: bytes, fds: Sequence[int], again: bool = False
    ) -> None:
        """Into another connection's pool; `again`: it was sent to another before, and monitors have seen it.
        Raises Errno if it is not there."""

    async def publish(self, parcel: Parcel, data: bytes, fds: Sequence[int]) -> None:
        """To all who subscribed and may receive it."""

    def forsake(self, caller: int, cookie: int) -> None:
        """A call that this connection got will not be answered."""

    def watch(self, fd: int, function: Callable[[], None]) -> None:
        """Call `function` whenever a descriptor is readable. Raises Errno EINVAL if it can't be polled."""

    def unwatch(self, fd: int) -> None:
        """No longer, if it was."""

    def keep(self, fds: Sequence[int]) -> list[int]:
        """Copies of descriptors, for `hand` and then `close`. Raises Errno EMFILE."""

    def hand(self, offset: int, fds: Sequence[int]) -> bool:
        """To the client, for the message at `offset`; False if it can't be done."""

    def close(self, fds: Iterable[int]) -> None:
        """Let go of descriptors."""
