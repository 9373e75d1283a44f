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
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from typing import Any

from kbusd.kdbus import attach, layout
from kbusd.kdbus.commands import BusMake, EndpointMake
from kbusd.kdbus.control import Control
from kbusd.kdbus.errors import Errno
from kbusd.kdbus.metadata import SAME, IdMap
from kbusd.kdbus.parcel import About, encode
from kbusd.kdbus.port import Caller, Joining, Looked
from kbusd.kdbus.session import Done, Session, fetch
from kbusd.kdbus.waits import Wait
from kbusd.rings import entries, memfd
from kbusd.rings.doorbell import part
from kbusd.rings.journal import Journal
from kbusd.rings.line import Line
from kbusd.workers import kdbus_bus
from kbusd.workers.context import Context
from kbusd.workers.dbus_socket import DBusSocket
from kbusd.workers.kdbus_attached import Attached
from kbusd.workers.kdbus_engine import DeviceEngine
from kbusd.workers.kdbus_requests import Request, Requests

MAX_COMPLAINTS = 16  # lines in the log about one file
LINGER_MS = 100
BAD_INPUT = {
    errno.EINVAL, errno.EFAULT, errno.EBADF, errno.EBADFD, errno.EBADMSG, errno.EDOM, errno.EMSGSIZE,
    errno.EMEDIUMTYPE, errno.ENAMETOOLONG, errno.ENOTUNIQ, errno.EOPNOTSUPP, errno.ETXTBSY,
}  # fmt: skip
"""What no client is refused with that knows the ABI: the rest is for it to handle, and nobody else's business."""


class FileLine(Line):
    """The line to the supervisor about one file. It goes with the file, at any moment: then that is what
    `receive` says next, and what we say meanwhile is said to nobody."""

    __slots__ = ()

    def _try(self, data: bytes, fds: Sequence[int]) -> bool:
        try:
            return super()._try(data, fds)
        except BrokenPipeError:
            return True


class Device(Requests):
    """The file: what the supervisor passes on, and what goes back."""

    def __init__(self, line: Line, session: Session | Control, uid: int, transport: str) -> None:
        super().__init__(line, session)
        self.attached: Attached | None = None
        self.entering: Callable[[entries.Credentials], None] | None = None  # called at HELLO
        self.cuse = transport == "cuse"
        self._uid = uid
        self._journal = Journal("kbusd-worker")
        self._complaints = 0
        self.sees_pids = True  # of the namespace in which the supervisor is
        self.space = 0  # the pid namespace of our client
        self.users = kdbus_bus.HOME  # and its user namespace
        self.maps = SAME, SAME  # uids and gids of its user namespace

    def refused(self, held: Request, error: Errno) -> None:
        """What is wrong with what the client wrote leaves a line in the log; so many at most."""
        if error.errno not in BAD_INPUT or self._complaints >= MAX_COMPLAINTS:
            return
        self._complaints += 1
        last = " (what else is wrong is not logged)" * (self._complaints == MAX_COMPLAINTS)
        who = f"thread {held.tid} of uid {self._uid}"
        self._journal.say(f"{who}, a kdbus client: {error}{last}")

    def own_command(self, held: Request) -> Coroutine[Wait[Any], None, Done] | None:
        if held.command == attach.COMMAND:
            return self._attach(held)
        if held.command == attach.INSTALLED:
            return self._installed(held)
        return None

    async def _attach(self, held: Request) -> Done:
        asked = attach.decode(await fetch(held, attach.SPEC, held.argument, held.data))
        pokes = asked.pokes
        if asked.value is not None:
            try:
                (fd,) = await held.take([asked.value])
                if self.attached is not None:
                    os.close(fd)
                    raise Errno(errno.EALREADY, "attached a second time")
                attached = self.attached = Attached(fd, self._uid)
                if self.pool is not None:
                    self.pool.hand(attached)
                pokes += (attach.return_flags(attach.POOL),)
            except Errno as error:
                raise Errno(error.errno, error.text, pokes) from None
        return Done(tuple((held.argument + poke.offset, poke.data) for poke in pokes))

    async def _installed(self, held: Request) -> Done:
        whole = await fetch(held, attach.INSTALLED_SPEC, held.argument, held.data)
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
        return Done(tuple((held.argument + poke.offset, poke.data) for poke in told.pokes))

    def hand(self, offset: int, fds: Sequence[int]) -> bool:
        """Descriptors to the client, for the message at `offset` of its pool; False if it can't be done."""
        if self.attached is None or len(fds) > attach.MAX_FDS:
            return False
        try:
            self.attached.hand(attach.fds_record(offset, len(fds)), fds)
        except OSError:
            return False  # it is full, or closed; or the user has too many descriptors on the way
        return True

    def make_pool(self, size: int) -> Pool:
        """Raises Errno ENOMEM."""
        return Pool(self, size)

    async def make_endpoint(self, caller: Caller, order: EndpointMake) -> None:
        """Raises Errno."""
        assert isinstance(caller, Request)
        asked = entries.MakeEndpoint(caller.unique, order.name, order.flags)
        await self.ask(caller.unique, asked)

    def about(self, caller: Caller, files: Looked, who: Joining) -> About:
        """What /proc says of the process that waits in a request that is held, as far as it could have
        chosen that itself."""
        status = files.get("status", b"")
        comm = files.get("comm", b"").removesuffix(b"\n")[:15] or None
        return About(
            caller.tid,
            tid_comm=comm,
            pid_comm=comm if _status(status, b"Tgid") == caller.tid else None,
            exe=files.get("exe", b"")[:4096] or None,
            cmdline=files.get("cmdline", b"")[:4096] or None,
            description=who.description,
            ppid=_status(status, b"PPid"),
            offered=who.offered,
            faked=who.faked,
        )

    async def facts(self, caller: Caller) -> dict[str, bytes]:
        """What /proc says of it; our client's namespaces become known by it."""
        assert isinstance(caller, Request)
        files: dict[str, bytes] = await self.ask(caller.unique, entries.AskFacts(caller.unique))
        self.sees_pids = _levels(files.get("status", b"")) <= 1
        space = files.get("ns/pid", b"").strip(b"pid:[]")
        self.space = int(space) if space.isdigit() else 0
        with suppress(ValueError):
            maps = [IdMap.read(files[name]) for name in ("uid_map", "gid_map") if name in files]
            self.users = int(files.get("ns/user", b"").strip(b"user:[]") or kdbus_bus.HOME)
            other = len(maps) == 2 and self.users != kdbus_bus.HOME
            self.maps = (maps[0], maps[1]) if other else (SAME, SAME)
        return files


class Pool:
    """The client's pool, in a memfd that nobody else can map writable."""

    def __init__(self, device: Device, size: int) -> None:
        self._device = device
        self.size = size
        self._fd = -1  # to be handed to the client, and to the supervisor
        try:
            # Behind the pool: which events hold. Clients of CUSE map no more than the pool.
            whole = size + mmap.PAGESIZE
            fd = memfd.make("kbusd-pool", whole)
            try:
                self.buffer = mmap.mmap(fd, whole)
                memfd.seal(fd)
                self._fd, fd = fd, -1
            finally:
                if fd >= 0:
                    os.close(fd)
        except (OSError, OverflowError, ValueError) as error:
            raise Errno(errno.ENOMEM, f"a pool of {size} bytes: {error}") from None

    def __del__(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)

    def hand_over(self) -> None:
        """It is the file's from now on, which has but one. Raises Errno."""
        device = self._device
        if device.attached is not None:
            self.hand(device.attached)
        if not device.cuse:
            device.line.send(entries.Pool(self.size), [self._fd])
        device.pool = self

    def hand(self, attached: Attached) -> None:
        """To the client. Raises Errno if its socket does not take it."""
        try:
            attached.hand(attach.pool_record(self.size), [self._fd])
        except OSError as error:
            number = error.errno or errno.EPIPE
            raise Errno(number, f"the pool can't be handed over: {error}") from None

    def write(self, offset: int, data: bytes) -> None:
        self.buffer[offset : offset + len(data)] = data

    def show(self, events: int) -> None:
        """Which poll(2) events hold now."""
        self.buffer[self.size : self.size + 4] = events.to_bytes(4, "little")

    def push(self, offset: int, size: int) -> None:
        if not self._device.cuse:  # else it is the client's memory
            self._device.push(offset, size)


def serve(
    context: Context, engine: DBusSocket, device: entries.Device, sock: socket.socket, broker: Line
) -> None:
    """Serve an open file until it is closed or its connection ends; then the supervisor answers what
    is left with ECONNRESET. Raises LineError if the supervisor breaks a rule of the line."""
    line = FileLine(sock, entries.ToDeviceWorker)
    serving = DeviceEngine(engine)
    port = kdbus_bus.Port(context, device.bus, serving)
    privileged = device.credentials.is_privileged(context.bus.owner)
    port.session = Session(port, owner=privileged, custom=device.endpoint != "bus")
    port.device = Device(line, port.session, device.credentials.uid, device.transport)
    port.device.entering = serving.entering
    serving.serve_device(port, line.fileno(), device.credentials)
    port.device.settle()  # what answers BYEBYE
    # The supervisor answers what else there is from here on; our end may take a while longer.
    line.discard()
    part(line.sock.detach())
    # It takes a processor as long as all that was done before. Of many files that are closed at once, all are to be
    # told as gone first: somebody waits for that. But what others have sent is let go now.
    if not port.session.has_descriptors:
        select.poll().poll(LINGER_MS)


def serve_control(device: entries.Device, sock: socket.socket) -> None:
    """Serve an open control node until it is closed."""
    line = FileLine(sock, entries.ToDeviceWorker)
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

    async def look(self, caller: Caller) -> Looked:
        """Raises Errno."""
        return await self._file.facts(caller)

    async def make_bus(self, caller: Caller, looked: Looked, order: BusMake) -> None:
        """Raises Errno."""
        assert isinstance(caller, Request)
        about = encode(self._file.about(caller, looked, Joining()))
        bloom = order.bloom.size, order.bloom.n_hash
        asked = entries.MakeBus(
            caller.unique, order.name, order.flags, bloom, order.creator_flags, about
        )
        await self._file.ask(caller.unique, asked)


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
