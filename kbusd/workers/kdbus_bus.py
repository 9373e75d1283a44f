"""The bus as one kdbus session sees it, carried out by the engine of its worker.

What a session asks of names, matches and activation are calls to the bus driver, as a D-Bus client
would make them. A message for a D-Bus client becomes D-Bus wire format and goes the way of all of those;
one for another kdbus client goes as it is, in a parcel. What comes by a ring is another worker's, which
its client may have taken over: parcels are decoded and checked here, policy is asked again.
"""

from __future__ import annotations

import errno
import mmap
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from fcntl import F_GET_SEALS, fcntl
from typing import TYPE_CHECKING, Any

import msgspec

from kbusd.kdbus import abi, bloom, layout, message, metadata, ownership, parcel, payload
from kbusd.kdbus import policy as policies
from kbusd.kdbus.commands import EndpointMake
from kbusd.kdbus.errors import Errno
from kbusd.kdbus.gvariant import GVariantError
from kbusd.kdbus.parcel import MEMFD, Parcel, ParcelError
from kbusd.kdbus.payload import Message, PayloadError
from kbusd.kdbus.port import Caller, Joining, Known, Looked, Memory
from kbusd.kdbus.session import Part, Session
from kbusd.kdbus.waits import Wait
from kbusd.policy.decide import ClientPolicy
from kbusd.rings import entries, memfd
from kbusd.rings.envelope import Envelope
from kbusd.rings.line import close_all
from kbusd.rings.memfd import RingError
from kbusd.wire import body as wire_body
from kbusd.wire.validate import WireError
from kbusd.workers import errors, kdbus_coming, kdbus_payload
from kbusd.workers.context import Context
from kbusd.workers.kdbus_coming import Coming, Moved
from kbusd.workers.name_policies import NamePolicies
from kbusd.workers.replica import BUS_ID, BUS_NAME, Connection, Replica
from kbusd.workers.routing import SIGNAL, Decision, Router

if TYPE_CHECKING:
    from kbusd.workers.kdbus_device import Device

BLOOM = bloom.Parameter(64, 8)
"""Of the configured bus: what sd-bus and systemd used."""
LARGE = 512 << 10
"""Bytes of a D-Bus message above which its body does not go through the pool,"""
SMALL_POOL = 12
"""or above the pool's size by this: a sixth is what one user may have in it at most."""
MAX_PAYLOAD = 128 << 20  # bytes of a message's memfds
MAX_KEPT = 4096
"""Descriptors in the queue, above which memfds are kept as their bytes."""
STALLED_NS = 2_000_000_000
"""How long a SEND waits to be told of what became of its message by a worker that does not run."""
_NO_IDS = (metadata.NO_ID, (1 << 64) - 1)
READ = b"read:"  # and the cookie: a note that a message to a name that has an activator was read
AGAIN = b"again:"  # and a name: a note that what was sent to that is sent again, to who has it now
SIGNALS = "type='signal'"
OWNERS = "type='signal',sender='org.freedesktop.DBus',member='NameOwnerChanged'"


def _last_cap() -> int:
    """The highest capability that the kernel has (capabilities(7)); read before lock-down."""
    try:
        with open("/proc/sys/kernel/cap_last_cap") as file:
            return min(int(file.read()), 63)
    except (OSError, ValueError):
        return 40


LAST_CAP = _last_cap()
HOME = int(os.readlink("/proc/self/ns/user").strip("user:[]"))
"""The bus's user namespace; asked now, as nothing can be opened later."""

_ERRNOS = {
    errors.ACCESS_DENIED: errno.EPERM,
    errors.LIMITS_EXCEEDED: errno.EMFILE,
    errors.SERVICE_UNKNOWN: errno.ESRCH,
    errors.NAME_HAS_NO_OWNER: errno.ESRCH,
    errors.NO_REPLY: errno.ECONNRESET,
    errors.TIMED_OUT: errno.ETIMEDOUT,
    errors.FILE_EXISTS: errno.EEXIST,
}
_NAMES = {errors.LIMITS_EXCEEDED: errno.E2BIG}
_decode_entry = msgspec.msgpack.Decoder(entries.LogEntry).decode
_encode = parcel.encode


class DeviceRouter(Router):
    """As every worker's; but kdbus subscribers of a broadcast get it as a parcel."""

    names: NamePolicies

    def _broadcast(
        self, envelope: Envelope, fds: int, args: Callable[[], Sequence[str | None]]
    ) -> Decision:
        decision = super()._broadcast(envelope, fds, args)
        others = tuple(id for id in decision.targets if not self.is_kdbus(id))
        return decision._replace(targets=others)

    def is_kdbus(self, id: int) -> bool:
        connection = self.replica.connections.get(id)
        return connection is not None and connection.kdbus is not None

    def kdbus_subscribers(self, envelope: Envelope, fds: int) -> list[int]:
        """The kdbus connections that a signal is to be offered to; their sessions ask their matches."""
        ids, _ = self.replica.subscribers(SIGNAL, self.replica.me, None, None, None, None, tuple)
        return [id for id in ids if self.is_kdbus(id) and not self.refusal(envelope, id, fds)]

    def refusal(self, envelope: Envelope, receiver: int, fds: int) -> str | None:
        """Why our client may not send this to another kdbus connection; None: it may."""
        names = self.replica.policy_names(receiver)
        refusal = self._may_send(envelope, receiver, names, fds) or self._may_receive(
            envelope, receiver, fds
        )
        if refusal is not None:
            self._say(refusal)
        return refusal

    def is_open(self, sender: Connection, receiver: Connection) -> bool:
        """Whether policy allows all that one may send to the other, so that nobody need look at it."""
        return (
            self.names.refusal(sender, receiver) is None
            and self.names.refusal(receiver, sender, hears=True) is None
            and not self.replica.kept_apart(sender.id, receiver.id)
            and self.policy.of(sender.credentials).allows_everything_to_send
            and self.policy.of(receiver.credentials).allows_everything_to_receive
        )


class Port:
    """The bus, for one session."""

    flags = 0

    def __init__(self, context: Context, name: str, engine: Any) -> None:
        self.engine = engine
        self.name = name
        self.uuid = bytes.fromhex(context.guid)
        self.bloom = BLOOM
        self.hello = entries.Hello(0, 0)
        if context.bus.system:
            self.flags = abi.MAKE_ACCESS_WORLD
        if context.maker is not None:
            self.flags = context.maker.order.flags
            self.bloom = bloom.Parameter(*context.maker.order.bloom)
        self._context = context
        self._serial = 0
        self._bus_calls: dict[int, Wait[bytes]] = {}  # to the driver, by serial
        self._parcels: dict[int, tuple[int, Wait[None], int]] = {}  # by token: to, until when
        self._collecting: dict[
            str, Coming
        ] = {}  # by name, which our client takes from its activator
        self._back: Coming | None = None  # to our client, an activator, from who had its name
        self._early: tuple[int, Moved] | None = None  # who still has it has said what will come
        self._owned_by: dict[str, int] = {}  # names that have an activator: who had them before
        self._met: set[int] = set()  # kdbus connections that have answered a parcel of ours
        self._sending: dict[int, Wait[None]] = {}  # D-Bus messages in the engine's input
        self._sent: dict[int, tuple[int, int, int]] = {}  # D-Bus calls: callee, cookie, deadline
        self._watched: dict[int, Callable[[], None]] = {}
        self._entry: entries.LogEntry | None = None
        self._went: Connection | None = None
        self._had = 0  # NAME flags of the owner before the entry
        self._heard: set[int] = set()  # connections that our client knows of, behind its endpoint
        self._until = 0  # when something that waits has waited too long, at the earliest; 0: never
        # What is told of a connection, as long as it has the same names.
        self._known: dict[int, tuple[Connection, frozenset[str], int, Known]] = {}
        self.device: Device
        self.session: Session

    # -- the session's side (kbusd/kdbus/port.py) ----------------------------------------------

    @property
    def sees_pids(self) -> bool:
        return self.device.sees_pids

    @property
    def space(self) -> int:
        return self.device.space

    @property
    def maps(self) -> tuple[metadata.IdMap, metadata.IdMap]:
        return self.device.maps

    def clock(self) -> tuple[int, int]:
        return time.monotonic_ns(), time.time_ns()

    def seqnum(self) -> int:
        return int(self.engine.stamp())

    def make_pool(self, size: int) -> Memory:
        return self.device.make_pool(size)

    def creator(self) -> metadata.Metadata:
        bus = self._context.bus
        if (maker := self._context.maker) is not None:
            return _creator(maker, self.device.users)
        return metadata.Metadata(
            creds=metadata.Creds(*[bus.owner] * 4, *[metadata.NO_ID] * 4),
            pids=metadata.Pids(bus.pid, bus.pid, 0),
        )

    async def look(self, caller: Caller) -> Looked:
        return await self.device.facts(caller)

    async def connect(self, caller: Caller, looked: Looked, who: Joining) -> tuple[int, bytes]:
        found = self.device.about(caller, looked, who)
        faked = found.faked and msgspec.structs.replace(found.faked, creds=self._faked(found.faked))
        about = parcel.encode(msgspec.structs.replace(found, faked=faked))
        brought = as_brought(policies.outside(who.policy, *self.maps))
        self.hello = entries.Hello(0, who.flags, who.name, brought, about)
        await self._call_bus("Hello", "", b"")
        return self._replica.me, about

    def is_privileged(self, who: Known) -> bool:
        return not who.custom and (who.opener == self._context.bus.owner or who.ipc_owner)

    def _faked(self, who: parcel.Faked) -> tuple[int, int, int, int, int, int, int, int] | None:
        """Ids that our client pretends to have, which are of its namespace. Raises Errno EINVAL."""
        if who.creds is None:
            return None
        ids = [
            id if id in _NO_IDS else self.maps[at >= 4].outside(id)
            for at, id in enumerate(who.creds)
        ]
        a, b, c, d, e, f, g, h = ids
        if None in ids:
            raise Errno(errno.EINVAL, "pretends to be who its namespace does not have")
        return a, b, c, d, e, f, g, h  # type: ignore[return-value]

    async def refreshed(self, caller: Caller, about: bytes) -> bytes:
        before = parcel.decode_about(about)
        who = Joining(description=before.description, offered=before.offered, faked=before.faked)
        return parcel.encode(self.device.about(caller, await self.device.facts(caller), who))

    async def set_policy(self, policy: tuple[policies.Entry, ...]) -> None:
        policy = policies.outside(policy, *self.maps)
        await self._ask(entries.SetPolicy(0, as_brought(policy)))

    async def make_endpoint(self, caller: Caller, order: EndpointMake) -> None:
        await self.device.make_endpoint(caller, order)

    async def set_endpoint(self, policy: tuple[policies.Entry, ...]) -> None:
        policy = policies.outside(policy, *self.maps)
        await self._ask(entries.SetEndpoint(0, as_brought(policy)))

    async def describe(self, about: bytes) -> None:
        await self._ask(entries.Describe(0, about))

    async def about(self, id: int) -> bytes:
        said = await self._ask(entries.AskAbout(0, id))
        return said if isinstance(said, bytes) else b""

    async def _ask(self, request: entries.Request) -> Any:
        """Ask the broker. Raises Errno."""
        wait: Wait[Any] = Wait()

        def then(answer: entries.Reply | entries.Failure, _: list[int]) -> None:
            if isinstance(answer, entries.Failure):
                wait.fail(_Refused(answer.error, answer.message))
            else:
                wait.done(answer.value)

        self.engine.ask(request, then)
        return await wait

    def activator(self, name: str) -> int:
        return self._replica.activators.get(name, 0)

    def expect(self, name: str, on: bool = True) -> None:
        if on:
            self._collecting[name] = Coming(
                self.activator(name), self._stalls_at(), lambda: self.session.put_in_order(name)
            )
        else:
            self._collecting.pop(name, None)

    async def collect(self, name: str) -> None:
        await self._collecting[name].wait()

    def coming_back(self) -> Wait[None] | None:
        return None if self._back is None else self._back.wait()

    def forward(self, to: Known, parcel: Parcel, data: bytes, fds: Sequence[int]) -> None:
        if to.kdbus:
            self.engine.send_parcel(to.id, 0, _encode(parcel), data, tuple(fds))

    def moved(self, to: Known, name: str, coming: dict[int, int]) -> None:
        if to.kdbus:
            self.engine.send_ack(to.id, 0, 0, kdbus_coming.write(Moved(name, coming)))

    def tell_sent_again(self, had: int, name: str) -> None:
        who = self._replica.connections.get(had)
        if who is not None and who.kdbus is not None and had != self._replica.me:
            self.engine.send_ack(had, 0, 0, AGAIN + name.encode())

    def tell_read(self, sender: int, cookie: int) -> None:
        if sender == self._replica.me:
            self.session.read(cookie)
        elif sender in self._replica.connections:
            self.engine.send_ack(sender, 0, 0, READ + layout.U64.pack(cookie))

    def leave(self) -> None:
        self.engine.end()

    async def acquire(self, name: str, flags: int) -> int:
        text = wire_body.string(name)
        body = text + bytes(-len(text) % 4) + flags.to_bytes(4, "little")
        return int.from_bytes(await self._call_bus("RequestName", "su", body, _NAMES), "little")

    async def release(self, name: str) -> int:
        body = wire_body.string(name)
        return int.from_bytes(await self._call_bus("ReleaseName", "s", body, _NAMES), "little")

    async def subscribe(self, signals: bool, on: bool) -> None:
        rule = wire_body.string(SIGNALS if signals else OWNERS)
        await self._call_bus("AddMatch" if on else "RemoveMatch", "s", rule)

    def owner(self, name: str) -> int | None:
        id = self._replica.owner(name)
        return None if id == BUS_ID or not self._sees_name(name) else id

    async def start_service(self, caller: Caller, name: str) -> int | None:
        if name not in self._replica.activatable or not self._sees_name(name):
            return None
        text = wire_body.string(name)
        body = text + bytes(-len(text) % 4) + bytes(4)
        try:
            await self._call_bus("StartServiceByName", "su", body, caller=caller)
        except Errno as error:
            raise Errno(errno.ESRCH, error.text) from None
        return self.owner(name)

    def held(self, id: int) -> tuple[metadata.OwnedName, ...]:
        replica = self._replica
        connection = replica.connections.get(id)
        if connection is None:
            return ()
        if not (connection.names or connection.waits_for or replica.activators):
            return ()
        names = {*connection.names, *connection.waits_for}
        names.update(name for name, activator in replica.activators.items() if activator == id)
        if id != replica.me:
            names = set(filter(self._sees_name, names))
        return tuple(metadata.OwnedName(name, self._flags(name, id)) for name in sorted(names))

    def _flags(self, name: str, id: int) -> int:
        """NAME flags of a name that this connection has some part in."""
        replica = self._replica
        primary = replica.given_up.get(name, replica.names.get(name)) == id
        if replica.activators.get(name) == id:
            return ownership.activator_flags(primary)
        return ownership.claim_flags(replica.claim(name, id), primary)

    def find(self, id: int) -> Known | None:
        connection = self._replica.connections.get(id)
        return None if connection is None else self._told_of(connection)

    def monitor(self, id: int) -> Known | None:
        found = self._replica.kdbus_monitors.get(id)
        behind = self._mine is not None and self._mine.custom
        return None if found is None or behind else _known(found, self.device.users)

    def _told_of(self, connection: Connection) -> Known:
        """`_known`, which is not made anew for each message."""
        names, users = connection.names, self.device.users
        kept = self._known.get(connection.id)
        if kept is not None and kept[0] is connection and kept[1] is names and kept[2] == users:
            return kept[3]
        known = _known(connection, users)
        self._known[connection.id] = connection, names, users, known
        return known

    def sees(self, who: Known) -> bool:
        mine, other = self._mine, self._replica.connections.get(who.id)
        if mine is None or other is None:
            return True
        return self.engine_router.names.sees(mine, other)

    def everybody(self) -> Iterable[Known]:
        everybody = list(self._replica.connections.values())
        return (_known(each, self.device.users) for each in everybody if self._knows(each))

    def startable(self) -> Iterable[str]:
        return (
            name for name in self._replica.activatable if name != BUS_NAME and self._sees_name(name)
        )

    @property
    def _mine(self) -> Connection | None:
        return self._replica.connections.get(self._replica.me)

    def _sees_name(self, name: str) -> bool:
        mine = self._mine
        return mine is None or self.engine_router.names.sees_name(mine, name)

    def _knows(self, who: Connection) -> bool:
        """Whether our client may be told of a connection: behind a custom endpoint, of those that are
        there, too, of those that it sees, and of those that it has heard of."""
        mine = self._mine
        if mine is None or not mine.custom or mine.custom == who.custom:
            return True
        return who.id in self._heard or self.engine_router.names.sees(mine, who)

    async def send(
        self, to: Known, parcel: Parcel, data: bytes, fds: Sequence[int], again: bool = False
    ) -> None:
        memfds = []
        if fds:
            memfds = _memfds(parcel, fds)
            _refuse_sockets(fds[len(memfds) :])
        router: DeviceRouter = self.engine_router
        replica = router.replica
        if replica.kdbus_monitors and not again:
            self._show(parcel, data, fds)
        if not to.kdbus:
            whole = _join(parcel, data, memfds)
            await self._send_dbus(to, parcel, whole, fds[len(memfds) :], again)
            return
        connections = replica.connections
        is_open = router.is_open(connections[replica.me], connections[to.id])
        if not is_open or replica.monitors:
            what = _Lazy(parcel, lambda: _join(parcel, data, memfds))
            if not is_open:
                refusal = router.refusal(what.facts(_destination(to, parcel)), to.id, parcel.fds)
                if refusal is not None:
                    if parcel.flags & abi.MSG_SIGNAL:
                        return  # nobody hears of it (kdbus_conn_unicast)
                    raise Errno(errno.EPERM, refusal)
            if not again:
                self._copy_to_monitors(what, _destination(to, parcel))
        if to.id == replica.me:
            own = connections[to.id]
            try:
                self._receive(to, own, parcel, data, tuple(fds), time.monotonic_ns())
            finally:
                self._came_to(parcel.dst_name, to.id)
            return
        await self._await_parcel(self._send_parcel(to.id, _encode(parcel), data, fds))

    def _send_parcel(self, id: int, raw: bytes, data: bytes, fds: Sequence[int]) -> int:
        """Returns the token that its answer will have; to be awaited."""
        token = self._next()
        self._parcels[token] = id, Wait(), self._stalls_at()
        self.engine.send_parcel(id, token, raw, data, tuple(fds))
        return token

    def _stalls_at(self) -> int:
        """When what begins to wait now has waited too long."""
        until = time.monotonic_ns() + STALLED_NS
        self._until = self._until or until
        return until

    async def _await_parcel(self, token: int) -> None:
        """Raises Errno, if the receiver's worker does not take it, or Interrupted."""
        try:
            await self._parcels[token][1]
        finally:
            del self._parcels[token]

    async def publish(self, parcel: Parcel, data: bytes, fds: Sequence[int]) -> None:
        memfds = _memfds(parcel, fds)
        what = _Lazy(parcel, lambda: _join(parcel, data, memfds))
        facts = what.facts(None)
        raw = _encode(parcel)
        self._show(parcel, data, fds)
        first = []
        for id in self.engine_router.kdbus_subscribers(facts, 0):
            if id in self._met:
                self.engine.send_parcel(id, 0, raw, data, tuple(fds))
            elif id != self._replica.me:
                # Rings are not there yet: without an answer, SEND would end before it can be received.
                first.append(self._send_parcel(id, raw, data, fds))
            else:
                own = self._replica.connections[id]
                self._receive(
                    self._told_of(own), own, parcel, data, tuple(fds), time.monotonic_ns()
                )
        if what.message is not None:
            await self._feed(kdbus_payload.wire(what.message, self._next(), None), ())
        try:
            while first:
                with suppress(Errno):  # a signal that somebody does not get is no error
                    await self._await_parcel(first.pop())
        finally:
            for token in first:
                del self._parcels[token]

    def _show(self, parcel: Parcel, data: bytes, fds: Sequence[int]) -> None:
        """To kdbus monitors, which see it even if nobody else does."""
        for id in self._replica.kdbus_monitors:
            self.engine.send_parcel(id, 0, _encode(parcel), data, tuple(fds))

    async def _send_dbus(
        self, to: Known, parcel: Parcel, data: bytes, fds: Sequence[int], again: bool
    ) -> None:
        """To a D-Bus client, or to nobody if the payload is not a D-Bus message."""
        try:
            message = kdbus_payload.read(parcel, data)
            serial = self._next()
            wire = kdbus_payload.wire(message, serial, _destination(to, parcel))
        except PayloadError as error:
            raise Errno(errno.EBADMSG, f"no message for a D-Bus client: {error}") from None
        if parcel.flags & abi.MSG_EXPECT_REPLY:
            self._sent[serial] = to.id, parcel.cookie, parcel.reply_or_timeout
        if again:
            self.engine.sends_again(serial, True)
        try:
            await self._feed(wire, fds, serial)
        except Errno:
            self._sent.pop(serial, None)
            raise
        finally:
            self.engine.sends_again(serial, False)

    async def _feed(self, wire: bytes, fds: Sequence[int], serial: int = 0) -> None:
        """Hand a D-Bus message to the engine, and wait until it is on its way."""
        wait: Wait[None] = Wait()
        serial = serial or self._serial
        self._sending[serial] = wait
        try:
            self.engine.feed(wire, [os.dup(fd) for fd in fds])
            await wait
        finally:
            del self._sending[serial]

    def forsake(self, caller: int, cookie: int) -> None:
        connection = self._replica.connections.get(caller)
        if connection is None:
            return
        if connection.kdbus is not None:
            self.engine.send_ack(caller, 0, 0, layout.U64.pack(cookie))
        else:
            text = "The destination dropped the call without an answer"
            self.engine.refuse_call(caller, cookie, errors.LIMITS_EXCEEDED, text)

    def watch(self, fd: int, function: Callable[[], None]) -> None:
        try:
            self.engine.watch(fd)
        except OSError as error:
            raise Errno(errno.EINVAL, f"a descriptor that can't be polled: {error}") from None
        self._watched[fd] = function

    def unwatch(self, fd: int) -> None:
        if self._watched.pop(fd, None) is not None:
            self.engine.unwatch(fd)

    def readable(self, fd: int) -> None:
        """The engine says so of a descriptor that is watched."""
        function = self._watched.get(fd)
        if function is not None:
            function()

    def keep(self, fds: Sequence[int]) -> list[int]:
        kept: list[int] = []
        try:
            for fd in fds:
                kept.append(os.dup(fd))
        except OSError as error:
            close_all(kept)
            raise Errno(errno.EMFILE, f"{len(fds)} descriptors can't be kept: {error}") from None
        return kept

    def hand(self, offset: int, fds: Sequence[int]) -> bool:
        return self.device.hand(offset, fds)

    def close(self, fds: Iterable[int]) -> None:
        close_all(list(fds))

    # -- the engine's side ---------------------------------------------------------------------

    @property
    def _replica(self) -> Replica:
        return self.engine_router.replica

    def make_router(
        self, replica: Replica, policy: ClientPolicy, say: Callable[[str], None]
    ) -> DeviceRouter:
        context = self._context
        label = context.bus.label.decode(errors="replace")
        names = NamePolicies(replica, context.bus.owner, context.closed)
        self.engine_router = DeviceRouter(replica, policy, say, label, names)
        return self.engine_router

    def requests(self) -> bool:
        return self.device.requests(self._catch_up)

    def _catch_up(self) -> None:
        self.engine.catch_up()
        self.session.send_again()

    def recall(self) -> None:
        """The engine is about to do something."""
        self.device.recall()

    def closed(self) -> None:
        """The file is closed."""
        if self._replica.me:
            self.session.give_back()

    def turn(self, drained: bool) -> None:
        """Once in a round of the engine; `drained`: nothing of ours waits in its input."""
        self.device.recall()  # of the round before, if this one took in nothing
        if drained and self._sending:
            for wait in list(self._sending.values()):
                wait.done(None)
        self.session.send_again()
        self.engine.take_descriptors(self.session.accepts_fds)
        deadline = self.session.deadline()
        if deadline is not None or self._until:
            self._expire(deadline)
        self.device.nudge()
        self.device.promise()
        self.device.line.flush()

    def _expire(self, deadline: int | None) -> None:
        """What has waited too long: `deadline` is the session's."""
        now = time.monotonic_ns()
        if deadline is not None and deadline <= now:
            self.session.tick()
            for serial, (_, _, until) in list(self._sent.items()):
                if until <= now:
                    del self._sent[serial]
                    self.engine.forget(serial)
        if not 0 < self._until <= now:
            return
        for each in self._all_coming():
            if each.until <= now:
                each.end()
        for token, (_, wait, until) in list(self._parcels.items()):
            if until <= now:  # it is in the receiver's ring, and will be looked at
                self.engine.forget(token)
                wait.done(None)
        untils = [until for _, _, until in self._parcels.values()]
        untils += [each.until for each in self._all_coming()]
        self._until = min(untils, default=0)

    def timeout(self) -> int:
        """Milliseconds until `turn` has something to do by itself; -1: nothing."""
        if self.device.line.queue:
            return 1
        deadline = self.session.deadline()
        if deadline is None or 0 < self._until < deadline:
            deadline = self._until
        if not deadline:
            return -1
        left = (deadline - time.monotonic_ns()) // 1_000_000 + 1
        return max(0, min(left, 60_000))

    def bus_answered(self, serial: int, error: str | None, body: bytes) -> None:
        """The bus answers a call to itself, or says why a message was not delivered."""
        called = self._bus_calls.pop(serial, None)
        if called is not None:
            if error is None:
                called.done(body)
            else:
                called.fail(_failure(error, body))
            return
        if serial in self._parcels:
            self._parcels[serial][1].fail(_failure(error or "", body))
            return
        sending = self._sending.get(serial)
        if sending is not None:
            sending.fail(_failure(error or "", body))
            return
        sent = self._sent.pop(serial, None)
        if sent is None:
            return
        callee, cookie, _ = sent
        known = self.find(callee)
        if error is None or error == errors.NO_REPLY or known is None:
            self.session.forsaken(callee, cookie)
            return
        facts = Envelope(3, False, None, None, None, None, error, "s")
        self._arrived(known, facts, 1, self._next(), cookie, body, (), time.monotonic_ns())

    def parcel_answered(self, token: int, code: int) -> None:
        waiting = self._parcels.get(token)
        if waiting is None:
            return
        id, wait, _ = waiting
        if id in self._replica.connections:
            self._met.add(id)
        if code:
            wait.fail(Errno(code, "the receiver's worker refused it"))
        else:
            wait.done(None)

    def call_dropped(self, peer: int, note: bytes) -> None:
        if note.startswith(kdbus_coming.NOTE):
            if (moved := kdbus_coming.read(note)) is not None:
                self._has_moved(peer, moved)
        elif note.startswith(AGAIN):
            self.session.others_sent_again(peer, note[len(AGAIN) :].decode("latin-1"))
        elif note.startswith(READ) and len(note) == len(READ) + layout.U64.size:
            self.session.read(layout.U64.unpack_from(note, len(READ))[0])
        elif len(note) == layout.U64.size:
            self.session.forsaken(peer, layout.U64.unpack(note)[0])

    def parcel(self, peer: Any, raw: bytes, data: bytes, fds: tuple[int, ...], stamp: int) -> int:
        """A message of another kdbus client: 0 it is taken, else the errno for its sender.

        Raises ParcelError or RingError if its worker broke a rule."""
        found = parcel.decode(raw, len(data), len(fds), self.bloom.size)
        me, connections = self._replica.me, self._replica.connections
        connection: Connection | None = peer.connection or connections.get(peer.id)
        if connection is None:
            raise ParcelError("a parcel that is older than its connection")
        if connection.credentials.endpoint:
            raise ParcelError("a parcel of a D-Bus client, past its endpoint")
        if self.session.kind == abi.HELLO_MONITOR:
            self._receive(self._told_of(connection), connection, found, data, fds, stamp)
            return 0
        if found.origin and found.origin != layout.U64.pack(connection.id):
            return self._forwarded(connection, found, data, fds, stamp)
        if found.dst_id not in (me, abi.DST_ID_BROADCAST):
            raise ParcelError(f"a parcel for {found.dst_id} came to {me}")
        try:
            return self._take_in(connection, found, data, fds, stamp)
        finally:
            self._came_to(found.dst_name, connection.id)

    def _take_in(
        self, connection: Connection, found: Parcel, data: bytes, fds: tuple[int, ...], stamp: int
    ) -> int:
        """`parcel`, of a message that is for us."""
        router, me, name = self.engine_router, self._replica.me, found.dst_name
        if name is not None and self.activator(name) and self._replica.owner(name) != me:
            return 0  # it has moved meanwhile, and comes to the new owner as well
        try:
            if not found.is_reply and not router.is_open(connection, self._replica.connections[me]):
                memfds = _memfds(found, fds)
                what = _Lazy(found, lambda: _join(found, data, memfds))
                all = found.dst_id == abi.DST_ID_BROADCAST
                sent_to = None if all else found.dst_name or f":1.{me}"
                if router.admit(what.facts(sent_to), connection, found.fds) is not None:
                    return errno.EPERM
            self._receive(self._told_of(connection), connection, found, data, fds, stamp)
            self.device.show_events()  # whoever has sent it may look when it returns
        except Errno as error:
            return error.errno
        return 0

    def _forwarded(
        self, connection: Connection, found: Parcel, data: bytes, fds: tuple[int, ...], stamp: int
    ) -> int:
        """A message that somebody who is gone sent to a name of which we are the new owner, or the activator.
        Whose it was we have from whoever had the name: so nothing is told of the sender."""
        me, name = self._replica.me, found.dst_name or ""
        activator, owner = self.activator(name), self._replica.owner(name)
        source = int.from_bytes(found.origin, "little")
        had_part = connection.id in (activator, owner, self._owned_by.get(name))
        had_part = had_part and not connection.custom
        gone = 0 < source < 1 << 64 and source not in self._replica.connections
        if not (activator and had_part and gone) or found.dst_id != me or found.is_reply:
            raise ParcelError(f"passes on a message of {source} that was sent to {name!r}")
        if me not in (owner, activator):
            return 0  # it has moved once more, which is not known everywhere yet
        untold = msgspec.structs.replace(found, about=NOTHING)
        try:
            who = msgspec.structs.replace(NOBODY, id=source)
            self._take(who, untold, data, fds, stamp)
        except Errno as error:
            return error.errno
        return 0

    def copied(
        self,
        sender: int,
        envelope: Envelope,
        flags: int,
        serial: int,
        reply_serial: int,
        body: bytes,
        stamp: int,
    ) -> None:
        """A copy for our client as a monitor, of what a D-Bus client or the bus sends."""
        connection = self._replica.connections.get(sender)
        if connection is not None and connection.kdbus is not None:
            return  # its worker sends us the parcel
        known = THE_BUS if connection is None else _known(connection, self.device.users)
        try:
            wire_body.check_body(body, envelope.signature.encode(), envelope.big_endian, 0)
        except WireError:
            return
        to = self._replica.owner(envelope.destination) if envelope.destination else 0
        self._arrived(known, envelope, flags, serial, reply_serial, body, (), stamp, to)

    def _receive(
        self,
        source: Known,
        connection: Connection,
        found: Parcel,
        data: bytes,
        fds: tuple[int, ...],
        stamp: int,
    ) -> None:
        self._take(source, found, data, fds, stamp)
        self._hear(source.id)

    def _take(
        self, source: Known, found: Parcel, data: bytes, fds: tuple[int, ...], stamp: int
    ) -> None:
        """A message with its descriptors; whose client has no socket sees memfds as bytes, but what may move
        on keeps its descriptors."""
        if not fds:
            self.session.receive(source, found, parcel.split(found, data), stamp)
            return
        attached = self.device.attached is not None
        memfds = _memfds(found, fds)
        as_they_are = attached and self.session.kept + len(memfds) <= MAX_KEPT
        filled = iter(memfds)
        whole: list[Part] = []
        for (kind, _, _), part in zip(found.parts, parcel.split(found, data), strict=True):
            if kind == MEMFD:
                memfd = next(filled)
                whole.append(memfd if as_they_are else _read(memfd))
            else:
                whole.append(part)
        moves = found.dst_name is not None and self.activator(found.dst_name)
        own = fds[len(memfds) :] if attached or moves else ()
        self.session.receive(source, found, whole, stamp, own)

    def dbus_message(
        self,
        peer: Any,
        envelope: Envelope,
        flags: int,
        serial: int,
        reply_serial: int,
        body: bytes,
        fds: tuple[int, ...],
        stamp: int,
    ) -> None:
        """A message of a D-Bus client, which was checked and is ours by policy and matches."""
        connection: Connection | None = peer.connection
        if connection is None:
            return
        name = envelope.destination
        if name is not None and self.activator(name):
            if self._replica.owner(name) != self._replica.me:
                return  # it has moved meanwhile, and comes to the new owner as well
        cookie = 0
        if reply_serial and envelope.type in (2, 3):  # others may carry the field, too
            sent = self._sent.pop(reply_serial, None)
            if sent is None:
                return
            cookie = sent[1]
        known = self._told_of(connection)
        error = self._arrived(known, envelope, flags, serial, cookie, body, fds, stamp)
        self._came_to(name, known.id)
        if error is not None and envelope.type == 1 and not flags & 1:
            self.engine.refuse_call(known.id, serial, errors.LIMITS_EXCEEDED, error)

    def _arrived(
        self,
        known: Known,
        envelope: Envelope,
        flags: int,
        serial: int,
        cookie: int,
        body: bytes,
        fds: tuple[int, ...],
        stamp: int,
        to: int | None = None,
    ) -> str | None:
        """Into the pool as kdbus has it, as sent to us or `to` another. Returns why not, if not."""
        try:
            found, data = kdbus_payload.arrived(
                envelope,
                flags,
                serial,
                cookie,
                body,
                len(fds),
                f":1.{known.id}",
                self._replica.me if to is None else max(to, 0),
                self.clock(),
                self.bloom,
            )
            moves = found.dst_name is not None and self.activator(found.dst_name)
            own = fds if self.device.attached is not None or moves else ()
            with self._as_parts(data, envelope.signature) as parts:
                self.session.receive(known, found, parts, stamp, own)
            self._hear(known.id)
        except Errno as error:
            return f"The destination's queue does not take it: {error.text}"
        except GVariantError as error:
            return f"The message can't be given to a kdbus client: {error}"
        return None

    @contextmanager
    def _as_parts(self, data: bytes, signature: str) -> Iterator[list[Part]]:
        """The payload of a D-Bus message for our client's pool; as sd-bus did, a large body goes beside it in a
        memfd, between the header and what follows, if our client can have one."""
        most = min(LARGE, self.session.box.pool.size // SMALL_POOL)
        if len(data) <= most or self.device.attached is None or self.session.kept >= MAX_KEPT:
            yield [data]
            return
        start, end = payload.body_span(data, signature)
        try:
            fd = memfd.sealed("kbusd-body", data[start:end])
        except OSError:
            yield [data]
            return
        try:
            yield [data[:start], message.Memfd(0, end - start, fd), data[end:]]
        finally:
            os.close(fd)

    def before_entry(self, raw: bytes) -> None:
        """The engine is about to take in an entry of the log."""
        self._entry = _decode_entry(raw)
        self._went = None
        match self._entry:
            case entries.ConnectionRemoved(id):
                self._went = self._replica.connections.get(id)
                self._met.discard(id)
                self._known.pop(id, None)
            case entries.MonitorAttached(id):
                self._went = self._replica.connections.get(id)
            case entries.NameOwnerChanged(name, old):
                self._had = self._flags(name, old) if old else 0
                if self._replica.activators.get(name) == self._replica.me:
                    self._owned_by[name] = old

    def after_entry(self) -> None:
        """It has: tell the session what that means."""
        match self._entry:
            case entries.NameOwnerChanged(name, old, new):
                if self.activator(name) == self._replica.me:
                    self._moves_back(name, old, new)
                has = self._flags(name, new) if new else 0
                seen = self._sees_name(name)
                self.session.name_changed(name, old, new, self._had, has, seen)
                if seen and new:
                    self._hear(new)
            case entries.ConnectionAdded(id, _, kdbus):
                if id != self._replica.me and self._knows(self._replica.connections[id]):
                    self.session.id_added(id, kdbus or 0)
            case entries.ConnectionRemoved(id) if self._went is not None:
                self.session.id_removed(id, self._went.kdbus or 0, self._knows(self._went))
                self._heard.discard(id)
                for each in self._all_coming():
                    each.gone(id)
            case entries.MonitorAttached(id) if self._went is not None:
                self.session.id_removed(id, 0, self._knows(self._went))

    def _came_to(self, name: str | None, sender: int) -> None:
        """Something did that was sent to this name."""
        if name is None:
            return
        if (coming := self._collecting.get(name)) is not None:
            coming.came(sender)
        if self._back is not None and self.activator(name) == self._replica.me:
            self._back.came(sender)

    def _has_moved(self, peer: int, moved: Moved) -> None:
        """Who had a name says what will come of what was sent to it."""
        name = moved.name
        if (coming := self._collecting.get(name)) is not None and coming.source == peer:
            coming.told(moved.coming)
        elif self.activator(name) != self._replica.me:
            return
        elif self._back is not None and self._back.source == peer:
            self._back.told(moved.coming)
        elif self._replica.owner(name) == peer:
            self._early = peer, moved

    def _moves_back(self, name: str, old: int, new: int) -> None:
        """The name of which our client is the activator went from one to the other, maybe to it."""
        early, self._early = self._early, None
        if self._back is not None:
            self._back.end()
        had = self._replica.connections.get(old)
        if new != self._replica.me or had is None or had.kdbus is None:
            return
        self._back = Coming(old, self._stalls_at(), lambda: self._is_back(name))
        if early is not None and early[0] == old:
            self._back.told(early[1].coming)

    def _is_back(self, name: str) -> None:
        self._back = None
        self.session.put_in_order(name)

    def _all_coming(self) -> list[Coming]:
        """What is still on its way."""
        all = [*self._collecting.values(), *([] if self._back is None else [self._back])]
        return [each for each in all if not each.settled]

    def _hear(self, id: int) -> None:
        """Our client learns that there is this connection."""
        if (mine := self._mine) is not None and mine.custom:
            self._heard.add(id)

    # -- inside --------------------------------------------------------------------------------

    def _next(self) -> int:
        """A serial or token that is not in use."""
        self._serial = self._serial % 0xFFFFFFFF + 1
        return self._serial

    async def _call_bus(
        self,
        member: str,
        signature: str,
        body: bytes,
        errnos: dict[str, int] | None = None,
        caller: Caller | None = None,
    ) -> bytes:
        """Call a method of the bus driver, which a signal to the `caller` may interrupt.

        Raises Errno where it answers with an error."""
        serial = self._next()
        wait = self._bus_calls[serial] = Wait()
        self.engine.call_bus(serial, member, signature, body)
        if caller is not None:
            caller.waits_for = wait
        try:
            return await wait
        except _Refused as refused:
            number = (errnos or {}).get(refused.error) or _ERRNOS.get(refused.error, errno.EINVAL)
            raise Errno(number, refused.text) from None
        finally:
            if caller is not None:
                caller.waits_for = None

    def _copy_to_monitors(self, what: _Lazy, destination: str) -> None:
        if not self._replica.monitors:
            return
        facts = what.facts(destination)
        message = what.message
        if message is not None:
            serial, reply = message.cookie & 0xFFFFFFFF, message.reply_cookie & 0xFFFFFFFF
            self.engine.copy_to_monitors(facts, message.flags, serial, reply, message.body)


class _Refused(Errno):
    """The bus driver answers with an error."""

    def __init__(self, error: str, text: str) -> None:
        super().__init__(_ERRNOS.get(error, errno.EINVAL), text)
        self.error = error


class _Lazy:
    """A parcel's payload as a D-Bus message, which is only looked for if somebody wants to know."""

    def __init__(self, found: Parcel, data: Callable[[], bytes]) -> None:
        self._parcel = found
        self._data = data
        self._read = False
        self._message: Message | None = None

    @property
    def message(self) -> Message | None:
        """None if it is not one."""
        if not self._read:
            self._read = True
            try:
                self._message = kdbus_payload.read(self._parcel, self._data())
            except PayloadError:
                self._message = None
        return self._message

    def facts(self, destination: str | None) -> Envelope:
        """What policy looks at."""
        message = self.message
        if message is None:
            return kdbus_payload.opaque(self._parcel, destination)
        return kdbus_payload.facts(message, destination)


def _creator(maker: entries.Maker, users: int) -> metadata.Metadata:
    """What a program that has made a bus lets others know of itself."""
    who, about = maker.credentials, parcel.decode_about(maker.order.about)
    known: dict[int, tuple[str, object]] = {
        abi.ATTACH_CREDS: ("creds", metadata.Creds(*[who.uid] * 4, *[who.gid] * 4)),
        abi.ATTACH_PIDS: ("pids", metadata.Pids(who.pid, about.tid, about.ppid)),
        abi.ATTACH_AUXGROUPS: ("groups", who.groups),
        abi.ATTACH_TID_COMM: ("tid_comm", about.tid_comm),
        abi.ATTACH_PID_COMM: ("pid_comm", about.pid_comm),
        abi.ATTACH_EXE: ("exe", about.exe),
        abi.ATTACH_CMDLINE: ("cmdline", about.cmdline),
        abi.ATTACH_SECLABEL: ("label", who.label or None),
    }
    process = who.process
    if process is not None:
        known |= {
            abi.ATTACH_CREDS: ("creds", metadata.Creds(*process.uids, *process.gids)),
            abi.ATTACH_CAPS: ("caps", _caps(process, users)),
            abi.ATTACH_CGROUP: ("cgroup", process.cgroup or None),
            abi.ATTACH_AUDIT: ("audit", _audit(process)),
        }
    told = {name: value for flag, (name, value) in known.items() if maker.order.attach & flag}
    return msgspec.structs.replace(metadata.Metadata(), **told)


NOBODY = Known(
    0,
    metadata.NO_ID,
    frozenset(),
    metadata.Creds(*[metadata.NO_ID] * 8),
    metadata.Pids(0, 0, 0),
    (),
    None,
    kdbus=True,
)
NOTHING = parcel.encode(parcel.About())
THE_BUS = Known(
    0, metadata.NO_ID, frozenset(), metadata.Creds(*[0] * 8), metadata.Pids(0, 0, 0), (), None
)


def as_brought(policy: Iterable[policies.Entry]) -> tuple[entries.PolicyEntry, ...]:
    """Policy, as the broker takes it."""
    return tuple(
        entries.PolicyEntry(
            each.name,
            each.wildcard,
            tuple((access.kind, access.access, access.id) for access in each.accesses),
        )
        for each in policy
    )


def _caps(process: entries.Process, users: int) -> metadata.Caps:
    """What it may do in the user namespace `users`, of our client: what it may do in its own, if that is the same
    or the bus's, which is above all others. In a namespace of its own anybody may do anything."""
    counts = process.users in (users, HOME)
    return metadata.Caps(LAST_CAP, *(process.caps if counts else (0, 0, 0, 0)))


def _known(connection: Connection, users: int) -> Known:
    """`users`: our client's user namespace."""
    credentials = connection.credentials
    uid, gid = credentials.uid, credentials.gid
    label = credentials.label.rstrip(b"\0")
    process = credentials.process
    if process is not None:
        return Known(
            connection.id,
            uid,
            connection.names,
            metadata.Creds(*process.uids, *process.gids),
            metadata.Pids(credentials.pid, credentials.pid, credentials.parent),
            credentials.groups,
            label or None,
            connection.kdbus or 0,
            connection.kdbus is not None,
            connection.custom,
            _caps(process, users),
            process.cgroup or None,
            _audit(process),
            process.space,
            metadata.Pids(process.pids[0], process.pids[0], process.pids[1]),
            credentials.ipc_owner,
            credentials.opened_by.uid,
        )
    return Known(
        connection.id,
        uid,
        connection.names,
        metadata.Creds(uid, uid, uid, uid, gid, gid, gid, gid),
        metadata.Pids(credentials.pid, credentials.pid, credentials.parent),
        credentials.groups,
        label or None,
        connection.kdbus or 0,
        connection.kdbus is not None,
        connection.custom,
        opener=credentials.opened_by.uid,
    )


def _audit(process: entries.Process) -> metadata.Audit | None:
    if process.audit is None:
        return None
    login, session = process.audit
    return metadata.Audit(session, login)


def _destination(to: Known, parcel: Parcel) -> str:
    return parcel.dst_name or f":1.{to.id}"


def _memfds(found: Parcel, fds: Sequence[int]) -> list[message.Memfd]:
    """A parcel's memfds; the descriptors behind those are the message's own.

    Raises Errno, for the sender: a memfd must be sealed, and hold what is said of it."""
    segments = [(size, start) for kind, size, start in found.parts if kind == MEMFD]
    total = sum(size for size, _ in segments)
    if total > MAX_PAYLOAD:
        raise Errno(errno.EMSGSIZE, f"memfds of {total} bytes, over {MAX_PAYLOAD}")
    memfds = [
        message.Memfd(start, size, fd) for (size, start), fd in zip(segments, fds, strict=False)
    ]
    for each in memfds:
        _check(each)
    return memfds


def _refuse_sockets(fds: Sequence[int]) -> None:
    """Local ones, as kdbus did. Raises Errno EOPNOTSUPP."""
    for fd in fds:
        try:
            # Told what it is, it does not ask; we do.
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, fd)
        except OSError:
            continue  # it is none
        domain = sock.getsockopt(socket.SOL_SOCKET, socket.SO_DOMAIN)
        sock.detach()
        if domain == socket.AF_UNIX:
            raise Errno(errno.EOPNOTSUPP, "a local socket in a message")


def _check(segment: message.Memfd) -> None:
    """After ipc/kdbus/message.c. Raises Errno: EBADF (of O_PATH), EMEDIUMTYPE, ETXTBSY, EFAULT."""
    try:
        size = memfd.check_sealed(segment.fd, 0)
    except RingError as error:
        raise Errno(_unsealed(segment.fd), str(error)) from None
    if segment.start + segment.size > size:
        raise Errno(errno.EFAULT, "a segment that ends behind its memfd")


def _unsealed(fd: int) -> int:
    """What the kernel said of a descriptor that is no sealed memfd."""
    try:
        fcntl(fd, F_GET_SEALS)
    except OSError as error:
        return errno.EBADF if error.errno == errno.EBADF else errno.EMEDIUMTYPE
    return errno.ETXTBSY


def _read(segment: message.Memfd) -> bytes:
    """Its bytes, which nobody can change any more. Raises Errno ENOMEM."""
    page = segment.start % mmap.ALLOCATIONGRANULARITY
    try:
        # Private: a write-sealed memfd could not be mapped shared before Linux 6.7.
        mapped = mmap.mmap(
            segment.fd,
            segment.size + page,
            mmap.MAP_PRIVATE,
            mmap.PROT_READ,
            offset=segment.start - page,
        )
    except (OSError, ValueError, OverflowError) as error:
        raise Errno(errno.ENOMEM, f"a memfd that can't be mapped: {error}") from None
    with mapped:
        return mapped[page : page + segment.size]


def _join(found: Parcel, data: bytes, memfds: Sequence[message.Memfd]) -> bytes:
    """The whole payload. Raises Errno."""
    filled = iter(memfds)
    parts = zip(found.parts, parcel.split(found, data), strict=True)
    return b"".join(
        _read(next(filled)) if kind == MEMFD else bytes(part) for (kind, _, _), part in parts
    )


def _failure(error: str, body: bytes) -> _Refused:
    try:
        text = str(wire_body.match_arguments(body, "s", False)[0])
    except (WireError, IndexError):
        text = error
    return _Refused(error, text)
