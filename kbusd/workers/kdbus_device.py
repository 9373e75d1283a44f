"""The worker of one open kdbus node: its file, in the words of FUSE, and the session that the file is.

The supervisor passes on the kernel's requests as they are, and does for us what only it can do to the
process that waits in one: copy its memory, store into it, take a descriptor. What the client wrote is
hostile: it is copied, decoded by kbusd/kdbus, and checked, before it is used. The pool is a memfd of ours,
which we never read: in kdbusfs the supervisor reads it into the client's page cache; a client that
attaches a socket gets the memfd itself, as it has to where the file is a CUSE node. The other side, the bus, is
`kdbus_bus.py`.
"""

from __future__ import annotations

import errno
import mmap
import os
import select
import socket
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any

import msgspec

from kbusd.cuse import abi as fuse
from kbusd.cuse import replies, requests
from kbusd.kdbus import attach, layout, waits
from kbusd.kdbus.commands import SPECS, BusMake, EndpointMake
from kbusd.kdbus.control import Control
from kbusd.kdbus.errors import Errno
from kbusd.kdbus.metadata import SAME, IdMap
from kbusd.kdbus.parcel import About, encode
from kbusd.kdbus.port import Caller, Joining
from kbusd.kdbus.session import Done, Session, fetch
from kbusd.kdbus.waits import Interrupted, Wait
from kbusd.rings import entries, memfd
from kbusd.rings.line import Line, close_all
from kbusd.rings.memfd import RingError
from kbusd.workers import kdbus_bus
from kbusd.workers.context import Context
from kbusd.workers.dbus_socket import DBusSocket
from kbusd.workers.kdbus_attached import Attached
from kbusd.workers.kdbus_engine import DeviceEngine

MAX_COPY = 128 << 20  # bytes of one answer of the supervisor's
TAKEN_AT_ONCE = 16
NEAR = 1024  # bytes that are fetched before what is asked for
MAX_AHEAD = 8 << 10  # what the supervisor sends along with a request, unasked
MAX_AHEAD_RANGES = 8


class Request:
    """An ioctl(2) whose caller waits."""

    def __init__(
        self,
        device: Device,
        header: requests.Header,
        ioctl: requests.Ioctl,
        ahead: tuple[tuple[int, bytes], ...] = (),
    ) -> None:
        """`ahead`: memory of the caller that came along."""
        self.unique = header.unique
        self.tid = header.tid
        self.ioctl = ioctl
        self.waits_for: Wait[Any] | None = None
        self._device = device
        self._known = list(ahead)
        self._seen: tuple[int, bytes] = (0, b"")  # the beginning of the struct, as it is
        self.looked_at: list[tuple[int, int]] = []
        """Of the caller's memory: what to send along the next time."""

    async def peek(self, address: int, least: int, most: int) -> bytes:
        found = self._find(address, least)
        if found is None:
            found = await self._fetch(address, least, most)
        # What is peeked at says first how long it is (kbusd/kdbus/commands.py).
        size = min(max(int.from_bytes(found[:8], "little"), least), most)
        self.looked_at.append((address, size))
        if address == self.ioctl.argument:
            self._seen = address, found
        return found

    def _find(self, address: int, size: int) -> bytes | None:
        """What is known of the memory there, if it is so much at least."""
        for start, data in self._known:
            if start <= address and address + size <= start + len(data):
                return data[address - start :]
        return None

    async def _fetch(self, address: int, least: int, most: int) -> bytes:
        # What a program sends often lies close to the message that says so: fetched in one go, it need
        # not be asked for again. Before the address, only of the same page, which is there if it is.
        start = max(address - NEAR, address & -mmap.PAGESIZE)
        (near,) = await self._copied([(start, address - start + most)])
        found = near[address - start :]
        if len(found) < least:
            raise Errno(errno.EFAULT, f"no {least} bytes of memory at {address:#x}")
        self._known.append((start, near))
        return found

    async def copy(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        self.looked_at += ranges
        known = [self._find(at, size) for at, size in ranges]
        if None not in known:
            return [
                data[:size]
                for data, (_, size) in zip(known, ranges, strict=True)
                if data is not None
            ]
        found = await self._copied(ranges)
        if any(len(data) < size for data, (_, size) in zip(found, ranges, strict=True)):
            raise Errno(errno.EFAULT, "some of the message is not the caller's memory")
        return found

    async def _copied(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        asked = entries.Copy(self.unique, tuple(ranges))
        sizes, data = await self._device.ask(self.unique, asked)
        if len(sizes) != len(ranges) or sum(sizes) != len(data):
            raise Errno(errno.EFAULT, "the supervisor copied something else")
        found, at = [], 0
        for size in sizes:
            found.append(data[at : at + size])
            at += size
        return found

    async def take(self, numbers: Sequence[int]) -> list[int]:
        taken: list[int] = []
        try:
            for at in range(0, len(numbers), TAKEN_AT_ONCE):
                wanted = entries.Take(self.unique, tuple(numbers[at : at + TAKEN_AT_ONCE]))
                taken += await self._device.ask(self.unique, wanted)
        except Errno as error:
            close_all(taken)
            number = errno.EOPNOTSUPP if error.errno == errno.ELOOP else error.errno
            raise Errno(number, error.text) from None
        return taken

    async def about(self, who: Joining) -> About:
        """What /proc says of the caller, as far as it could have chosen that itself."""
        files = await self.facts()
        status = files.get("status", b"")
        comm = files.get("comm", b"").removesuffix(b"\n")[:15] or None
        return About(
            self.tid,
            tid_comm=comm,
            pid_comm=comm if _status(status, b"Tgid") == self.tid else None,
            exe=files.get("exe", b"")[:4096] or None,
            cmdline=files.get("cmdline", b"")[:4096] or None,
            description=who.description,
            ppid=_status(status, b"PPid"),
            offered=who.offered,
            faked=who.faked,
        )

    async def facts(self) -> dict[str, bytes]:
        """What /proc says of the caller; our client's namespaces become known by it."""
        device = self._device
        files: dict[str, bytes] = await device.ask(self.unique, entries.AskFacts(self.unique))
        device.sees_pids = _levels(files.get("status", b"")) <= 1
        space = files.get("ns/pid", b"").strip(b"pid:[]")
        device.space = int(space) if space.isdigit() else 0
        with suppress(ValueError):
            maps = [IdMap.read(files[name]) for name in ("uid_map", "gid_map") if name in files]
            device.users = int(files.get("ns/user", b"").strip(b"user:[]") or kdbus_bus.HOME)
            other = len(maps) == 2 and device.users != kdbus_bus.HOME
            device.maps = (maps[0], maps[1]) if other else (SAME, SAME)
        return files

    def answer(self, result: int, stores: Iterable[tuple[int, bytes]]) -> None:
        """End the ioctl: `stores` go into the caller's memory, if they are not there already."""
        image = bytearray(self.ioctl.out_size)
        start = self.ioctl.argument
        known = self._seen[1] if self._seen[0] == start else self.ioctl.data
        image[: len(known)] = known[: len(image)]
        left = []
        for address, data in stores:
            at = address - start
            if at >= 0 and at + len(data) <= len(image):
                image[at : at + len(data)] = data
            elif not 0 <= at <= len(known) - len(data) or known[at : at + len(data)] != data:
                left.append((address, data))
        out = bytes(image) if len(known) >= len(image) else b""
        if left:
            waits.start(self._store(tuple(left), result, out), lambda _: None)
        else:
            self._device.answered(self.unique, replies.ioctl(self.unique, result, out))

    async def _store(self, parts: tuple[tuple[int, bytes], ...], result: int, out: bytes) -> None:
        try:
            await self._device.ask(self.unique, entries.Store(self.unique, parts))
        except Errno as error:
            result = -error.errno
        self._device.answered(self.unique, replies.ioctl(self.unique, result, out))


class Device:
    """The file: what the supervisor passes on, and what goes back."""

    def __init__(self, line: Line, session: Session | Control, uid: int, transport: str) -> None:
        self.line = line
        self.session = session
        self.attached: Attached | None = None
        self.cuse = transport == "cuse"
        self._uid = uid
        self._pool: Pool | None = None
        self.held: dict[int, Request] = {}
        self._asked: dict[int, Wait[Any]] = {}
        self.sees_pids = True  # of the namespace in which the supervisor is
        self.space = 0  # the pid namespace of our client
        self.users = kdbus_bus.HOME  # and its user namespace
        self.maps = SAME, SAME  # uids and gids of its user namespace
        self._told = (0, 0)  # what who polls was told last: events, and how many had arrived
        self._pushed: list[tuple[int, int]] = []
        # By command: what, and whether it was said.
        self._guesses: dict[int, tuple[object, bool]] = {}

    def requests(self, catch_up: Callable[[], None]) -> bool:
        """Take up everything that has come; False if the file is closed. Raises LineError."""
        try:
            while (received := self.line.receive()) is not None:
                message, fds = received
                if isinstance(message, entries.Asked):
                    catch_up()  # what others have done before is to be seen by this
                    self._request(message.request, message.ahead)
                else:
                    self._given(message, fds)
        except EOFError:
            return False
        return True

    def _request(self, raw: bytes, ahead: tuple[tuple[int, bytes], ...]) -> None:
        try:
            request = requests.decode(raw)
        except requests.Malformed:
            return  # of no kernel: there is nobody to answer
        unique = request.header.unique
        match request.body:
            case requests.Ioctl() as ioctl:
                held = self.held[unique] = Request(self, request.header, ioctl, ahead)
                if ioctl.command == attach.COMMAND:
                    command = self._attach(held)
                elif ioctl.command == attach.INSTALLED:
                    command = self._installed(held)
                else:
                    command = self.session.ioctl(held, ioctl.command, ioctl.argument, _first(ioctl))
                waits.start(command, lambda result: self._ended(held, result))
            case requests.Poll():
                events = self.session.poll()
                self._told = events, self.session.arrived
                self.line.send(entries.Answered(replies.poll(unique, events)))
            case requests.Interrupt(interrupted):
                waiting = self.held.get(interrupted)
                if waiting is not None and waiting.waits_for is not None:
                    waiting.waits_for.fail(Interrupted())
            case _:
                self.line.send(entries.Answered(replies.failure(unique, errno.ENOSYS)))

    async def _attach(self, held: Request) -> Done:
        ioctl = held.ioctl
        asked = attach.decode(await fetch(held, attach.SPEC, ioctl.argument, ioctl.data))
        pokes = asked.pokes
        if asked.value is not None:
            try:
                (fd,) = await held.take([asked.value])
                if self.attached is not None:
                    os.close(fd)
                    raise Errno(errno.EALREADY, "attached a second time")
                attached = self.attached = Attached(fd, self._uid)
                if self._pool is not None:
                    self._pool.hand(attached)
                pokes += (attach.return_flags(attach.POOL),)
            except Errno as error:
                raise Errno(error.errno, error.text, pokes) from None
        return Done(tuple((ioctl.argument + poke.offset, poke.data) for poke in pokes))

    async def _installed(self, held: Request) -> Done:
        ioctl = held.ioctl
        whole = await fetch(held, attach.INSTALLED_SPEC, ioctl.argument, ioctl.data)
        told = attach.decode_installed(whole)
        said = told.value
        if said is not None:
            try:
                if not isinstance(self.session, Session):
                    raise Errno(errno.EBADFD, "INSTALLED on a control file")
                if said.count != self.session.awaits(said.offset):
                    raise Errno(errno.EINVAL, f"{said.count} numbers, which is not how many came")
                (raw,) = await held.copy([(said.address, 4 * said.count)])
                self.session.awaits(said.offset)  # another thread may have told meanwhile
                numbers = [number for (number,) in layout.I32.iter_unpack(raw)]
                self.session.installed(said.offset, numbers)
            except Errno as error:
                raise Errno(error.errno, error.text, told.pokes) from None
        return Done(tuple((ioctl.argument + poke.offset, poke.data) for poke in told.pokes))

    def hand(self, offset: int, fds: Sequence[int]) -> bool:
        """Descriptors to the client, for the message at `offset` of its pool; False if it can't be done."""
        if self.attached is None or len(fds) > attach.MAX_FDS:
            return False
        try:
            self.attached.hand(attach.fds_record(offset, len(fds)), fds)
        except OSError:
            return False  # it is full, or closed; or the user has too many descriptors on the way
        return True

    def _ended(self, held: Request, result: Done | Errno | Interrupted) -> None:
        start = held.ioctl.argument
        if isinstance(result, Interrupted):
            held.answer(-fuse.ERESTARTSYS, ())
        elif isinstance(result, Errno):
            stores = [(start + poke.offset, poke.data) for poke in result.pokes]
            held.answer(-result.errno, stores)
        else:
            held.answer(0, result.stores)

    def answered(self, unique: int, reply: bytes) -> None:
        request = self.held.pop(unique)
        self.show_events()
        pushed = tuple(self._pushed)
        self._pushed.clear()
        self.line.send(entries.Answered(reply, pushed))
        self._guess(request)

    def _guess(self, request: Request) -> None:
        """If a command looks where the one before did, the next one will: have that sent along."""
        ioctl, at_argument, ranges = request.ioctl, 0, []
        if not request.looked_at:
            return
        for address, size in request.looked_at:
            if address == ioctl.argument:
                at_argument = size
            elif size:
                ranges.append((address, size))
        total = at_argument + sum(size for _, size in ranges)
        if not 0 < total <= MAX_AHEAD or len(ranges) > MAX_AHEAD_RANGES:
            return
        guess = entries.Ahead(ioctl.command, at_argument, tuple(ranges))
        before, said = self._guesses.get(ioctl.command, (None, False))
        if before != guess:
            self._guesses[ioctl.command] = guess, False
        elif not said:
            self._guesses[ioctl.command] = guess, True
            self.line.send(guess)

    def show_events(self) -> None:
        """Let the supervisor answer who polls, as long as there is something to read."""
        if self._pool is not None:
            self._pool.show(self.session.poll())

    def ask(self, unique: int, message: msgspec.Struct) -> Wait[Any]:
        """Ask the supervisor about a request that is held; one thing at a time."""
        wait = self._asked[unique] = Wait()
        self.line.send(message)
        return wait

    def _given(self, message: Any, fds: list[int]) -> None:
        """The supervisor has done what we asked for."""
        wait = self._asked.pop(message.unique, None)
        keep = isinstance(message, entries.Given) and not message.errno and wait is not None
        try:
            if wait is None:
                return
            if isinstance(message, entries.Facts):
                wait.done(message.files)
            elif message.errno:
                wait.fail(Errno(message.errno, "the kernel or the supervisor refused"))
            elif isinstance(message, entries.Copied):
                data = memfd.read(fds[0], MAX_COPY) if fds else message.data
                wait.done((message.sizes, data))
            else:
                wait.done(fds if keep else None)
        except RingError as error:
            assert wait is not None
            wait.fail(Errno(errno.EFAULT, str(error)))
        finally:
            if not keep:
                close_all(fds)

    def make_pool(self, size: int) -> Pool:
        """Raises Errno ENOMEM."""
        self._pool = Pool(self, size)
        if self.attached is not None:
            self._pool.hand(self.attached)
        return self._pool

    async def make_endpoint(self, caller: Caller, order: EndpointMake) -> None:
        """Raises Errno."""
        assert isinstance(caller, Request)
        await caller.facts()  # policy speaks of ids of its namespace
        asked = entries.MakeEndpoint(caller.unique, order.name, order.flags)
        await self.ask(caller.unique, asked)

    async def about(self, caller: Caller, who: Joining) -> About:
        """Of the process that waits in a request that is held."""
        assert isinstance(caller, Request)
        return await caller.about(who)

    def nudge(self) -> None:
        """Wake who polls, if there is more to tell than they were told."""
        self.show_events()
        events, arrived = self.session.poll(), self.session.arrived
        if events & ~self._told[0] or arrived != self._told[1]:
            self._told = events, arrived
            self.line.send(entries.Nudge())

    def push(self, offset: int, size: int) -> None:
        self._pushed.append((offset, size))


class Pool:
    """The client's pool, in a memfd that nobody else can map writable."""

    def __init__(self, device: Device, size: int) -> None:
        self._device = device
        self._size = size
        self._events = 0
        self._fd = -1  # to be handed to the client
        try:
            # Behind the pool: which events hold. Clients of CUSE map no more than the pool.
            whole = size + mmap.PAGESIZE
            fd = memfd.make("kbusd-pool", whole)
            try:
                self._memory = mmap.mmap(fd, whole)
                memfd.seal(fd)
                self._fd = os.dup(fd)
                if not device.cuse:
                    device.line.send(entries.Pool(size), [fd])
            finally:
                os.close(fd)
        except (OSError, OverflowError, ValueError) as error:
            raise Errno(errno.ENOMEM, f"a pool of {size} bytes: {error}") from None

    def __del__(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)

    def hand(self, attached: Attached) -> None:
        """To the client. Raises Errno if its socket does not take it."""
        try:
            attached.hand(attach.pool_record(self._size), [self._fd])
        except OSError as error:
            number = error.errno or errno.EPIPE
            raise Errno(number, f"the pool can't be handed over: {error}") from None

    def write(self, offset: int, data: bytes) -> None:
        self._memory[offset : offset + len(data)] = data

    def show(self, events: int) -> None:
        """Which poll(2) events hold now."""
        if events != self._events:
            self._events = events
            self._memory[self._size : self._size + 4] = events.to_bytes(4, "little")

    def push(self, offset: int, size: int) -> None:
        if not self._device.cuse:  # else it is the client's memory
            self._device.push(offset, size)


def serve(
    context: Context, engine: DBusSocket, device: entries.Device, sock: socket.socket, broker: Line
) -> None:
    """Serve an open file until it is closed or its connection ends; then the supervisor answers what
    is left with ECONNRESET. Raises LineError if the supervisor breaks a rule of the line."""
    line = Line(sock, entries.ToDeviceWorker)
    serving = DeviceEngine(engine)
    port = kdbus_bus.Port(context, device.bus, serving)
    privileged = device.credentials.uid in (0, context.bus.owner)
    port.session = Session(port, owner=privileged, custom=device.endpoint != "bus")
    port.device = Device(line, port.session, device.credentials.uid, device.transport)
    serving.serve_device(port, line.fileno(), device.credentials)
    line.flush()  # the answer to BYEBYE


def serve_control(device: entries.Device, sock: socket.socket) -> None:
    """Serve an open control node until it is closed."""
    line = Line(sock, entries.ToDeviceWorker)
    control = Control()
    file = Device(line, control, device.credentials.uid, device.transport)
    control.bus = ControlPort(file)
    poller = select.poll()
    while file.requests(lambda: None):
        poller.register(line, select.POLLIN | (select.POLLOUT if line.queue else 0))
        poller.poll()
        line.flush()


class ControlPort:
    """The supervisor, for one control node."""

    def __init__(self, file: Device) -> None:
        self._file = file

    async def make_bus(self, caller: Caller, order: BusMake) -> None:
        """Raises Errno."""
        assert isinstance(caller, Request)
        about = encode(await caller.about(Joining()))
        bloom = order.bloom.size, order.bloom.n_hash
        asked = entries.MakeBus(
            caller.unique, order.name, order.flags, bloom, order.creator_flags, about
        )
        wait = caller.waits_for = self._file.ask(caller.unique, asked)
        try:
            await wait
        finally:
            caller.waits_for = None


def _first(ioctl: requests.Ioctl) -> bytes:
    """The beginning of a command's struct, if the kernel has brought it."""
    spec = SPECS.get(ioctl.command)
    return ioctl.data if spec is not None and len(ioctl.data) == spec.fixed.size else b""


def _status(text: bytes, key: bytes) -> int:
    """A number in /proc/PID/status; 0 if it is not there."""
    for line in text.split(b"\n"):
        name, _, value = line.partition(b":")
        if name == key and value.strip().isdigit():
            return int(value)
    return 0


def _levels(status: bytes) -> int:
    """In how many pid namespaces a process has a number, from the supervisor's on (proc(5), NSpid)."""
    for line in status.split(b"\n"):
        if line.startswith(b"NSpid:"):
            return len(line.split()) - 1
    return 1
