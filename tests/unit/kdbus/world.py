"""A bus in memory with sessions on it, and a client for each that has memory and writes structs."""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import msgspec

from kbusd.kdbus import abi, bloom, items, layout, match, metadata, ownership, waits
from kbusd.kdbus.commands import SPECS, EndpointMake
from kbusd.kdbus.errors import Errno
from kbusd.kdbus.items import Item
from kbusd.kdbus.message import Memfd
from kbusd.kdbus.parcel import MEMFD, About, Parcel, decode, decode_about, encode, split
from kbusd.kdbus.policy import Entry
from kbusd.kdbus.port import Joining, Known, Looked
from kbusd.kdbus.session import Done, Session
from kbusd.kdbus.waits import Interrupted, Wait

FILTER = 8  # bytes
POOL = 1 << 16
PRIMARY = abi.NAME_PRIMARY
SECOND = 1_000_000_000
REQUEST_QUEUED = 2


class Memory:
    """A pool: `seen` is what the client sees, which is what was pushed."""

    def __init__(self, size: int) -> None:
        self.buffer = bytearray(size)
        self.seen = bytearray(size)

    def hand_over(self) -> None:
        """There is nobody to be given it."""

    def write(self, offset: int, data: bytes) -> None:
        self.buffer[offset : offset + len(data)] = data

    def push(self, offset: int, size: int) -> None:
        self.seen[offset : offset + size] = self.buffer[offset : offset + size]


class World:
    """All connections. `hold`: requests to the bus wait until `go`."""

    def __init__(self) -> None:
        self.now = SECOND
        self.ports: dict[int, Port] = {}
        self.queues: dict[str, list[int]] = {}
        self.asked: dict[tuple[str, int], int] = {}  # RequestName's flags
        self.looks: list[Wait[None]] | None = None  # at callers, which take long if this is a list
        self.services: dict[str, Client] = {}
        self.hidden: set[int] = set()  # connections that nobody sees
        self.hold = False
        self.held: list[Wait[None]] = []

    def client(self, uid: int = 1000, hello: bool = True, **how: int) -> Client:
        client = Client(self, uid)
        if hello:
            client.hello(**how)
        return client

    async def turn(self) -> None:
        if self.hold:
            wait: Wait[None] = Wait()
            self.held.append(wait)
            await wait

    def go(self) -> None:
        self.hold = False
        held, self.held = self.held, []
        for wait in held:
            wait.done(None)

    def change(self, name: str, old: int, new: int) -> None:
        for port in list(self.ports.values()):
            port.session.name_changed(
                name, old, new, PRIMARY * bool(old), self.flags(name, new) if new else 0
            )

    def flags(self, name: str, id: int) -> int:
        """NAME flags of who owns or waits."""
        return ownership.claim_flags(self.asked[name, id], self.queues[name][0] == id)

    def remove(self, id: int) -> None:
        self.ports.pop(id, None)
        for name, queue in list(self.queues.items()):
            if id in queue:
                self.drop(name, id)
        for port in list(self.ports.values()):
            port.session.id_removed(id, 0)

    def drop(self, name: str, id: int) -> None:
        queue = self.queues[name]
        was = queue[0]
        queue.remove(id)
        if not queue:
            del self.queues[name]
        if was == id:
            self.change(name, id, queue[0] if queue else 0)


class Port:
    """The bus as one session sees it."""

    name = "1000-test"
    uuid = bytes(range(16))
    bloom = bloom.Parameter(FILTER, 1)
    flags = 0

    def __init__(self, world: World, uid: int) -> None:
        self.world = world
        self.uid = uid
        self.id = 0
        self.session: Session
        self.subscribed = {True: False, False: False}
        self.open: set[int] = set()
        self.attached = False  # whether it gets descriptors,
        self.takes = True  # and whether its socket takes them
        self.stores: Wait[None] | None = None  # what to write into its memory waits for
        self.handed: list[tuple[int, tuple[int, ...]]] = []
        self.refreshes, self.comm = 0, b"thread"
        self.sees_pids, self.space = True, 0
        self.maps = metadata.SAME, metadata.SAME
        self.watched: dict[int, Callable[[], None]] = {}

    def clock(self) -> tuple[int, int]:
        return self.world.now, self.world.now + 7

    def seqnum(self) -> int:
        return self.world.now + 1

    def make_pool(self, size: int) -> Memory:
        self.memory = Memory(size)
        return self.memory

    def creator(self) -> metadata.Metadata:
        return metadata.Metadata(creds=metadata.Creds(*[1000] * 8))

    async def look(self, caller: object) -> Looked:
        if self.world.looks is not None:
            wait: Wait[None] = Wait()
            self.world.looks.append(wait)
            await wait
        return {}

    async def connect(self, caller: object, looked: Looked, who: Joining) -> tuple[int, bytes]:
        await self.world.turn()
        self.id = 1 + max(self.world.ports, default=0)
        for port in self.world.ports.values():
            port.session.id_added(self.id, 0)
        self.world.ports[self.id] = self
        about = About(9, b"thread", b"main", description=who.description, offered=who.offered)
        self.said = encode(msgspec.structs.replace(about, faked=who.faked))
        return self.id, self.said

    def is_privileged(self, who: Known) -> bool:
        return who.uid == 0

    async def make_endpoint(self, caller: object, order: EndpointMake) -> None:
        await self.world.turn()
        self.made = order

    async def set_endpoint(self, policy: tuple[Entry, ...]) -> None:
        await self.world.turn()
        self.policy = policy

    def sees(self, who: Known) -> bool:
        return who.id not in self.world.hidden

    async def set_policy(self, policy: tuple[Entry, ...]) -> None:
        await self.world.turn()
        self.policy = policy

    async def describe(self, about: bytes) -> None:
        self.said = about

    async def about(self, id: int) -> bytes:
        await self.world.turn()
        return self.world.ports[id].said

    def activator(self, name: str) -> int:
        return 0

    def expect(self, name: str, on: bool = True) -> None:
        assert not on, "nobody activates"

    async def collect(self, name: str) -> None:
        raise AssertionError("nobody activates")

    def forward(self, to: Known, parcel: Parcel, data: bytes, fds: Sequence[int]) -> None:
        raise AssertionError("nobody activates")

    def coming_back(self) -> None:
        return None

    def moved(self, to: Known, name: str, coming: dict[int, int]) -> None:
        raise AssertionError("nobody activates")

    def tell_sent_again(self, had: int, name: str) -> None:
        raise AssertionError("nobody activates")

    def tell_read(self, sender: int, cookie: int) -> None:
        raise AssertionError("nobody activates")

    async def refreshed(self, caller: Run, about: bytes) -> bytes:
        await self.world.turn()
        self.refreshes += 1
        known = decode_about(about)
        return encode(msgspec.structs.replace(known, tid=caller.tid, tid_comm=self.comm))

    def leave(self) -> None:
        self.world.remove(self.id)

    async def acquire(self, name: str, flags: int) -> int:
        await self.world.turn()
        queue = self.world.queues.setdefault(name, [])
        if not queue or queue[0] == self.id or not flags & 4:
            self.world.asked[name, self.id] = flags
        if not queue:
            queue.append(self.id)
            self.world.change(name, 0, self.id)
            return 1
        if queue[0] == self.id:
            return 4
        if flags & 4:
            return 3
        queue.append(self.id)
        return REQUEST_QUEUED

    async def release(self, name: str) -> int:
        await self.world.turn()
        queue = self.world.queues.get(name)
        if queue is None:
            return 2
        if self.id not in queue:
            return 3
        self.world.drop(name, self.id)
        return 1

    async def subscribe(self, signals: bool, on: bool) -> None:
        await self.world.turn()
        assert self.subscribed[signals] != on
        self.subscribed[signals] = on

    def owner(self, name: str) -> int | None:
        return self.world.queues.get(name, [None])[0]

    async def start_service(self, caller: object, name: str) -> int | None:
        await self.world.turn()
        if name in self.world.services:
            self.world.services[name].acquire(name)
        return self.owner(name)

    def held(self, id: int) -> tuple[metadata.OwnedName, ...]:
        return tuple(
            metadata.OwnedName(name, self.world.flags(name, id))
            for name, queue in sorted(self.world.queues.items())
            if id in queue
        )

    def find(self, id: int) -> Known | None:
        port = self.world.ports.get(id)
        if port is None:
            return None
        names = frozenset(n for n, queue in self.world.queues.items() if queue[0] == id)
        creds = metadata.Creds(*[port.uid] * 8)
        return Known(id, port.uid, names, creds, metadata.Pids(id + 100, 0, 0), (4, 5), b"label")

    def monitor(self, id: int) -> Known | None:
        return None

    def everybody(self) -> Iterable[Known]:
        return [known for id in self.world.ports if (known := self.find(id)) is not None]

    def startable(self) -> Iterable[str]:
        return ()

    async def send(
        self, to: Known, parcel: Parcel, data: bytes, fds: Sequence[int], again: bool = False
    ) -> None:
        await self.world.turn()
        self._hand(self.world.ports[to.id], parcel, data, fds)

    async def publish(self, parcel: Parcel, data: bytes, fds: Sequence[int]) -> None:
        await self.world.turn()
        for port in self.world.ports.values():
            if port.subscribed[True]:
                self._hand(port, parcel, data, fds)

    def _hand(self, port: Port, parcel: Parcel, data: bytes, fds: Sequence[int]) -> None:
        came = decode(encode(parcel), len(data), len(fds), FILTER)
        assert came == parcel
        source = self.find(self.id)
        assert source is not None
        memfds = [(start, size) for kind, size, start in came.parts if kind == MEMFD]
        if port.attached:
            filled = iter([Memfd(*each, fd) for each, fd in zip(memfds, fds, strict=False)])
            parts = [part if part != b"" else next(filled) for part in split(came, data)]
            port.session.receive(source, came, parts, 77, fds[len(memfds) :])
        else:
            parts = [part or b"memfd" for part in split(came, data)]
            port.session.receive(source, came, parts, 77)

    def forsake(self, caller: int, cookie: int) -> None:
        self.world.ports[caller].session.forsaken(self.id, cookie)

    def watch(self, fd: int, function: Callable[[], None]) -> None:
        self.watched[fd] = function

    def unwatch(self, fd: int) -> None:
        self.watched.pop(fd, None)

    def keep(self, fds: Sequence[int]) -> list[int]:
        kept = []
        for fd in fds:
            kept.append(next(n for n in range(fd + 1000, 99999, 1000) if n not in self.open))
            self.open.add(kept[-1])
        return kept

    def hand(self, offset: int, fds: Sequence[int]) -> bool:
        assert self.open >= set(fds)
        self.handed.append((offset, tuple(fds)))
        return self.takes

    def close(self, fds: Iterable[int]) -> None:
        self.open -= set(fds)


class Run:
    """A command on its way: `result` is None until it has ended."""

    def __init__(self, port: Port) -> None:
        self.tid = 9
        self.argument = Client.STRUCT
        self.waits_for: Wait[Any] | None = None
        self.port = port
        self.memory: dict[int, bytes] = {}
        self.stores = port.stores  # what writing takes, None: no time
        self.result: Done | Errno | Interrupted | None = None

    async def peek(self, address: int, least: int, most: int) -> bytes:
        found = self._at(address, most)
        if len(found) < least:
            raise Errno(errno.EFAULT, f"no memory at {address:#x}")
        return found

    async def copy(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        return [await self.peek(address, size, size) for address, size in ranges]

    async def store(self, address: int, data: bytes) -> None:
        if self.stores is not None:
            await self.stores

    async def take(self, numbers: Sequence[int]) -> list[int]:
        taken = [number + 1000 for number in numbers]
        self.port.open |= set(taken)
        return taken

    def _at(self, address: int, most: int) -> bytes:
        for start, data in self.memory.items():
            if start <= address < start + len(data):
                return data[address - start : address - start + most]
        return b""

    def ended(self, result: Done | Errno | Interrupted) -> None:
        assert self.result is None, "a command ended twice"
        self.result = result


class Message:
    """A message in a pool, as its receiver reads it."""

    def __init__(self, pool: bytes, offset: int) -> None:
        (self.size, self.flags, self.priority, self.dst_id, self.src_id, self.payload_type,
         self.cookie, self.reply) = layout.MESSAGE.unpack_from(pool, offset)  # fmt: skip
        self.items = items.split(pool[offset : offset + self.size], layout.MESSAGE.size)
        self._pool, self._offset = pool, offset

    def all(self, type: int) -> list[Item]:
        return [item for item in self.items if item.type == type]

    @property
    def payload(self) -> bytes:
        found = b""
        for item in self.all(abi.ITEM_PAYLOAD_OFF):
            size, at = layout.VECTOR.unpack(item.data)
            start = self._offset + at
            found += bytes(size) if at == abi.NO_OFFSET else self._pool[start : start + size]
        return found


class Client:
    """A program with a node open. Its structs are at STRUCT, messages at MESSAGE, payloads behind."""

    STRUCT, MESSAGE, PAYLOAD = 0x10000, 0x20000, 0x30000

    def __init__(self, world: World, uid: int) -> None:
        self.world = world
        self.port = Port(world, uid)
        self.session = self.port.session = Session(self.port)
        self.memory: dict[int, bytearray] = {}

    @property
    def pool(self) -> bytes:
        return bytes(self.port.memory.seen)

    @property
    def id(self) -> int:
        return self.session.id

    def begin(self, command: int, whole: bytes, *more: tuple[int, bytes]) -> Run:
        """Start an ioctl whose struct is `whole`."""
        run = Run(self.port)
        run.memory = {self.STRUCT: whole, **dict(more)}
        self.run = run
        fixed = SPECS[command].fixed.size if command in SPECS else 0
        first = whole[:fixed] if command >> 30 & 1 else b""  # as a restricted ioctl has it
        waits.start(self.session.ioctl(run, command, self.STRUCT, first), run.ended)
        return run

    def end(self, run: Run) -> bytes:
        """What the struct has become. Raises Errno or Interrupted if the command failed."""
        whole = bytearray(run.memory[self.STRUCT])
        result = run.result
        assert result is not None, "the command still waits"
        stores: Iterable[tuple[int, bytes]]
        if isinstance(result, Interrupted):
            raise result
        if isinstance(result, Errno):
            stores = [(self.STRUCT + poke.offset, poke.data) for poke in result.pokes]
        else:
            stores = result.stores
        for address, data in stores:
            at = address - self.STRUCT
            if 0 <= at < len(whole):
                whole[at : at + len(data)] = data
        self.left = bytes(whole)
        if isinstance(result, Errno):
            raise result
        return bytes(whole)

    def do(self, command: int, fields: bytes, *chain: bytes, flags: int = 0) -> bytes:
        """Carry out a command; `fields` follow return_flags."""
        return self.end(self.begin(command, self.struct(command, fields, *chain, flags=flags)))

    def struct(self, command: int, fields: bytes, *chain: bytes, flags: int = 0) -> bytes:
        fixed = (struct.pack("=3Q", 0, flags, 99) + fields).ljust(SPECS[command].fixed.size, b"\0")
        return items.command(fixed, chain)

    def hello(
        self, flags: int = 0, send: int = 0, recv: int = 0, pool: int = POOL, **_: int
    ) -> bytes:
        fields = struct.pack("=7Q", send, recv, 0, 0, pool, 0, 0) + bytes(16)
        return self.do(abi.CMD_HELLO, fields, flags=flags)

    def acquire(self, name: str, flags: int = 0) -> int:
        got = self.do(abi.CMD_NAME_ACQUIRE, b"", items.string(abi.ITEM_NAME, name), flags=flags)
        return int(layout.U64.unpack_from(got, 16)[0])

    def release(self, name: str) -> None:
        self.do(abi.CMD_NAME_RELEASE, b"", items.string(abi.ITEM_NAME, name))

    def add_match(self, *rules: bytes, cookie: int = 1, flags: int = 0) -> None:
        self.do(abi.CMD_MATCH_ADD, layout.U64.pack(cookie), *rules, flags=flags)

    def message(
        self, dst: int, *chain: bytes, flags: int = 0, priority: int = 0, cookie: int = 1,
        reply: int = 0, payload: bytes = b"hello",
    ) -> bytes:  # fmt: skip
        fixed = layout.MESSAGE.pack(0, flags, priority, dst, 0, abi.PAYLOAD_DBUS, cookie, reply)
        if payload:
            vector = items.build(
                abi.ITEM_PAYLOAD_VEC, layout.VECTOR.pack(len(payload), self.PAYLOAD)
            )
            chain = (vector, *chain)
        self.payload = payload
        return items.command(fixed, chain)

    def begin_send(self, message: bytes, sync: bool = False, *chain: bytes) -> Run:
        whole = self.struct(
            abi.CMD_SEND, layout.U64.pack(self.MESSAGE), *chain, flags=abi.SEND_SYNC_REPLY * sync
        )
        more = [(self.MESSAGE, message), (self.PAYLOAD, self.payload)]
        return self.begin(abi.CMD_SEND, whole, *more)

    def send(self, dst: int, *chain: bytes, **how: int | bytes) -> None:
        self.end(self.begin_send(self.message(dst, *chain, **how)))  # type: ignore[arg-type]

    def call(
        self, dst: int, *chain: bytes, cookie: int = 1, timeout: int = SECOND, sync: bool = False
    ) -> Run:
        until = self.world.now + timeout
        message = self.message(dst, flags=abi.MSG_EXPECT_REPLY, cookie=cookie, reply=until)
        return self.begin_send(message, sync, *chain)

    def recv(self, flags: int = 0, priority: int = 0) -> Message:
        got = self.do(abi.CMD_RECV, struct.pack("=q", priority), flags=flags)
        self.dropped, self.offset, self.size, self.return_flags = struct.unpack_from("=4Q", got, 32)
        return Message(self.pool, self.offset) if self.size else None  # type: ignore[return-value]

    def free(self, offset: int) -> None:
        self.do(abi.CMD_FREE, layout.U64.pack(offset))

    def list(self, flags: int) -> list[tuple[int, str]]:
        """(id, name or "") for each that LIST shows."""
        at, size = struct.unpack_from("=2Q", self.do(abi.CMD_LIST, b"", flags=flags), 24)
        found = []
        end = at + size
        while at < end:
            length, id, _ = layout.INFO.unpack_from(self.pool, at)
            names = items.split(self.pool[at : at + length], layout.INFO.size)
            found.append((id, names[0].data[8:-1].decode() if names else ""))
            at += length
        return found


def any_id(kind: int) -> bytes:
    return items.build(kind, layout.ID_CHANGE.pack(abi.MATCH_ID_ANY, 0))


def any_name(kind: int, name: str = "") -> bytes:
    change = layout.NAME_CHANGE.pack(abi.MATCH_ID_ANY, 0, abi.MATCH_ID_ANY, 0)
    return items.build(kind, change + (name.encode() + b"\0" if name else b""))


def bits(kind: int, value: int) -> bytes:
    """A bloom filter or mask of FILTER bytes."""
    head = layout.U64.pack(0) if kind == abi.ITEM_BLOOM_FILTER else b""
    return items.build(kind, head + layout.U64.pack(value))


__all__ = [
    "POOL", "SECOND", "Client", "Message", "World", "any_id", "any_name", "bits", "match"
]  # fmt: skip
