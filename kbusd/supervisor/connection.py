"""A connection to the kernel's FUSE: passes each request to whom it concerns, and back.

    request with a file's handle  -> the worker that serves this open file
    any other                     -> `other`: the tree (kdbusfs.py), or an OPEN of a node (cuse.py)
    READ, WRITE, FLUSH, RELEASE   -> answered here: from the pool, with an errno, by closing the line
    a worker asks                 -> memory or descriptors of the caller of a request that it holds

Privileged, and reads nothing that a client wrote: of a request the head that kbusd/cuse/routing.py
gives, of an answer the head. What workers say is hostile; one that breaks the rules is ended. Nobody
gets at a request, a page or a poller but by the request or the file that is his: numbers of requests are a
connection's own, and a worker serves one file of one connection.
"""

from __future__ import annotations

import errno
import os
import select
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from struct import Struct
from typing import Any

from kbusd.cuse import abi, replies, routing
from kbusd.rings import entries
from kbusd.rings.line import LineError, close_all
from kbusd.supervisor import caller, reach
from kbusd.supervisor.device import Devices
from kbusd.supervisor.domains import Domain
from kbusd.supervisor.holder import Holder, Opening, Worker

_HUNG_UP = select.POLLERR | select.POLLHUP
_NUMBER = Struct("=Q")
_READ = Struct("=QI")  # offset, size; behind the handle
_IOCTL = Struct("=4xIQ")  # command, argument
_BEHIND_HANDLE = routing.HEADER_SIZE + 8
# Of a file; FLUSH is not asked for again after ENOSYS.
_REFUSALS = {abi.WRITE: errno.EINVAL, abi.FLUSH: errno.ENOSYS}


class Connection:
    """What every transport has in common. `where`: for the admin; "" once it was taken away by us."""

    transport = "fuse"
    open_flags = 0  # FOPEN
    taken_away = False  # by us

    def __init__(self, devices: Devices, where: str, fuse: int, domain: Domain) -> None:
        self.devices = devices
        self.domain = domain
        self.host = devices.host
        self.where = where
        self.fuse = fuse
        self.files: dict[int, Holder] = {}  # by handle, which is the worker's number
        self.held: dict[int, tuple[Holder | None, bytes]] = {}  # None: by us, for want of a worker
        self.copying: dict[int, bytes] = {}  # not passed on yet; and what has interrupted it
        self.lock = threading.Lock()  # for `copying`

    # -- what the transports do differently --------------------------------------------------------

    def other(self, opcode: int, unique: int, request: bytes) -> None:
        """A request that is of no open file."""
        raise NotImplementedError

    def left(self, holder: Holder, uniques: list[int]) -> list[int]:
        """Of the requests that a dead worker held, those that its callers can't have answered."""
        return uniques

    def push(self, holder: Holder, pushed: tuple[tuple[int, int], ...]) -> None:
        """Renew pages of its file from the pool. Raises LineError."""
        raise LineError("pushed pages, of which there are none")

    # -- the supervisor's thread -------------------------------------------------------------------

    def grant(self, opened: entries.Opened) -> None:
        """Whoever made this OPEN may wait for a worker."""
        _, request = self.held.get(opened.unique, (None, b""))
        if not request:
            return  # it was interrupted meanwhile
        clients = self.devices.clients_of(self.domain, opened.bus)
        endpoint = self.devices.endpoint(self.domain, opened)
        credentials = caller.credentials(request, whole=False)
        if clients is None or endpoint is None:
            self.fail(opened.unique, errno.ESHUTDOWN)
            return
        if self.domain.inside(credentials.uid) is None:
            self.fail(opened.unique, errno.EACCES)
            return
        limit = self.host.settings.limits["max_connections_per_user"]
        why = self.domain.full(clients.of)
        if not why and (refusal := clients.refusal(credentials, limit)):
            why = f"uid {credentials.uid} {refusal}"
        if not why:
            clients.add(credentials, Opening(partial(self._employ, opened), endpoint))
            return
        self.host.journal.warn(f"refused a file to pid {credentials.pid}: {why}")
        self.fail(opened.unique, errno.EMFILE)

    def _employ(
        self, opened: entries.Opened, worker: Worker | None, credentials: entries.Credentials
    ) -> None:
        """This worker is to serve the file; None: there will be none."""
        if worker is None:
            self.fail(opened.unique, errno.ESHUTDOWN)
            return
        file = Holder(
            worker, entries.FromDeviceWorker, credentials.uid, opened.node, self.devices.slow
        )
        file.bus, file.endpoint = self.domain.prefix + opened.bus, opened.endpoint
        self.files[file.number] = file
        self.devices.closings.opened(file.number)
        device = entries.Device(
            credentials, opened.bus, opened.endpoint, opened.flags, self.transport
        )
        with suppress(OSError):
            file.send(device)
        self.hear(file)
        if self.devices.endpoint(self.domain, opened) is None:
            file.cut()  # it went while the client waited
        reply = replies.opened(opened.unique, file.number, self.open_flags)
        if self.held.pop(opened.unique, None) is None or not self.write(reply):
            self._release(file)  # nobody waits for it any more

    def hear(self, holder: Holder) -> None:
        """Listen to what it says."""
        self.devices.listen(holder.line.fileno(), partial(self._hear, holder))

    # -- requests ----------------------------------------------------------------------------------

    def take(self, buffer: bytearray) -> bool:
        """There is a request, or there will be none any more."""
        try:
            size = os.readv(self.fuse, [buffer])
            self.request(bytes(memoryview(buffer)[:size]))
        except OSError as error:
            if error.errno == errno.ENODEV and self.where:
                if not self.taken_away:
                    self.host.journal.warn(f"{self.where} was taken away; restart to have it back")
                self.ended()
                return False
            # ENOENT, EAGAIN: it was taken back.
        except ValueError as error:
            if self.where:
                self.host.journal.warn(f"{self.where}: the kernel sent {error}")
        return True

    def ended(self) -> None:
        """No request comes any more: none of its files is of use."""
        for holder in tuple(self.files.values()):
            self._release(holder)

    def request(self, request: bytes) -> None:
        """Deal with one, or have it wait. Raises ValueError if no kernel sends it."""
        closings = self.devices.closings
        if not (closings.busy and closings.postpone(self, request)):
            self.deal(request)

    def deal(self, request: bytes) -> None:
        """Deal with one now. Raises ValueError if no kernel sends it."""
        opcode, unique, _, number = routing.route(request)
        if opcode == routing.INTERRUPT:
            self._interrupt(number, request)
        elif number == 0:
            self.other(opcode, unique, request)
        elif (holder := self.files.get(number)) is None:
            self.write(replies.failure(unique, errno.ENOTCONN))
        elif opcode == abi.IOCTL:
            command, argument = _IOCTL.unpack_from(request, _BEHIND_HANDLE)
            if (wish := holder.ahead.get(command)) is not None:
                self._ask_ahead(holder, unique, request, wish, argument)
            else:
                self._ask(holder, unique, request)
        elif opcode == abi.POLL:
            (holder.kernel_handle,) = _NUMBER.unpack_from(request, _BEHIND_HANDLE)
            if events := holder.readable():
                self.write(replies.poll(unique, events))
            else:
                self._ask(holder, unique, request)
        elif opcode == abi.READ:
            data = holder.read(*_READ.unpack_from(request, _BEHIND_HANDLE))
            self.write(
                replies.reply(unique, data) if data else replies.failure(unique, errno.EINVAL)
            )
        elif opcode == abi.RELEASE:
            self.closed(holder, unique)
        else:
            self.write(replies.failure(unique, _REFUSALS.get(opcode, errno.ENOTDIR)))

    def _ask(self, holder: Holder, unique: int, request: bytes) -> None:
        self.held[unique] = holder, request
        if not self.pass_on(holder, request):
            self._refuse(holder, unique)

    def _ask_ahead(
        self, holder: Holder, unique: int, request: bytes, wish: entries.Ahead, argument: int
    ) -> None:
        """The same with memory of the caller, for which we may be asked in between."""
        self.held[unique] = holder, request
        self.copying[unique] = b""
        self.devices.let_go()
        found: reach.Parts = ()
        try:
            with self.devices.aside.work(holder.uid):
                found = reach.look(caller.ids(request)[2], wish, argument)
        except LineError:
            pass  # too much is stuck already: its worker asks, and is told so
        sent = self.pass_on(holder, request, found)
        with self.lock:
            interrupt = self.copying.pop(unique)
        if not sent:
            self._refuse(holder, unique)
        elif interrupt:
            self.pass_on(holder, interrupt)

    def _refuse(self, holder: Holder, unique: int) -> None:
        """Nobody answers this one any more."""
        _, request = self.held.get(unique, (None, b""))
        if holder.why == errno.ESHUTDOWN and request and routing.route(request)[0] == abi.POLL:
            if self.held.pop(unique, None) is not None:  # by another thread meanwhile
                self.write(replies.poll(unique, _HUNG_UP))
        else:
            self.fail(unique, holder.why)

    def pass_on(self, holder: Holder, request: bytes, ahead: reach.Parts = ()) -> bool:
        """False if it is gone."""
        try:
            if not holder.gone:
                holder.send(entries.Asked(request, ahead))
                return True
        except OSError:
            pass
        return False

    def _interrupt(self, unique: int, request: bytes) -> None:
        holder, _ = self.held.get(unique, (None, b""))
        with self.lock:
            if unique in self.copying:
                self.copying[unique] = request  # its worker does not have it yet
                return
        if holder is not None:
            self.pass_on(holder, request)
        else:
            self.fail(unique, errno.EINTR)  # if it is there, it waits for a worker

    def closed(self, holder: Holder, unique: int) -> None:
        """The RELEASE of a file, which nobody waits for."""
        self._release(holder)
        self.write(replies.reply(unique))

    def _release(self, holder: Holder, done: Callable[[], object] | None = None) -> None:
        self.files.pop(holder.number, None)
        self.devices.closings.close(holder, self.domain, done)

    def write(self, reply: bytes) -> bool:
        """False if nobody waits for it any more."""
        if not self.where:
            return False
        try:
            os.write(self.fuse, reply)
        except OSError:
            return False
        return True

    def fail(self, unique: int, number: int) -> None:
        """Answer a request with an errno, if it was not answered yet."""
        if self.held.pop(unique, None) is not None:
            self.write(replies.failure(unique, number))

    # -- what workers say --------------------------------------------------------------------------

    def _hear(self, holder: Holder, buffer: bytearray) -> bool:
        try:
            received = holder.line.receive(buffer)
            if received is not None:
                self._heard(holder, *received)
        except EOFError:
            self._lose(holder)
            return False
        except Exception as error:  # noqa: BLE001 (whatever it is, this worker brought it about)
            if self.where:  # else it has answered what we have just answered for it
                self.devices.kill(holder, str(error))
            self._lose(holder)
            return False
        return True

    def _heard(self, holder: Holder, message: Any, fds: list[int]) -> None:
        if type(message) is entries.Answered and not fds:
            if message.pushed:
                self.push(holder, message.pushed)
            if message.last:
                self.devices.closings.last(holder, self.domain)
            self._answered(holder, message.reply)
            return
        try:
            self.said(holder, message, fds)
        finally:
            if fds:
                with self.devices.aside.work(holder.uid):
                    close_all(fds)

    def _lose(self, holder: Holder) -> None:
        """Its process is gone, or as good as; whoever waits for it must not do so for ever."""
        self.devices.forget(holder.line.fileno())
        holder.end(gone=True)
        uniques = [unique for unique, (who, _) in list(self.held.items()) if who is holder]
        for unique in self.left(holder, uniques):
            self._refuse(holder, unique)
        if holder.kernel_handle:
            self.write(replies.wake(holder.kernel_handle))

    def _answered(self, holder: Holder, reply: bytes) -> None:
        if len(reply) < abi.OUT_HEADER.size:
            raise LineError(f"an answer of {len(reply)} bytes")
        length, error, unique = abi.OUT_HEADER.unpack_from(reply)
        if length != len(reply) or not -512 < error <= 0:
            raise LineError(f"an answer of {len(reply)} bytes says {length}, error {error}")
        self.request_of(holder, unique)
        del self.held[unique]
        self.write(reply)

    def request_of(self, holder: Holder, unique: int, opcode: int | None = None) -> bytes:
        """The request of this number, if it holds it. Raises LineError."""
        who, request = self.held.get(unique, (None, b""))
        if who is not holder or (opcode is not None and routing.route(request)[0] != opcode):
            raise LineError(f"meddled with request {unique}, which it does not hold")
        return request

    def _is_hello(self, holder: Holder, unique: int) -> bool:
        request = self.request_of(holder, unique, abi.IOCTL)
        command: int = _IOCTL.unpack_from(request, _BEHIND_HANDLE)[0]
        return command == caller.HELLO

    def said(self, holder: Holder, message: Any, fds: list[int]) -> None:
        """What is left of `fds` is closed. Raises LineError if it may not say that."""
        match message, fds:
            case entries.Nudge(), []:
                if holder.kernel_handle:
                    self.write(replies.wake(holder.kernel_handle))
            case entries.Ahead(), []:
                reach.check_ahead(message, holder.ahead)
                holder.ahead[message.command] = message
            case entries.AskFacts(unique), [] if self._is_hello(holder, unique):
                request = self.request_of(holder, unique)
                with self.devices.aside.work(holder.uid):
                    who, files = caller.credentials(request), caller.facts(caller.ids(request)[2])
                facts = entries.Facts(unique, files, who)
                self.devices.call(partial(self.host.enter, holder, who, facts))
            case ((entries.Copy() | entries.Store() | entries.Take() | entries.AskFacts()), []):
                request = self.request_of(holder, message.unique, abi.IOCTL)
                with self.devices.aside.work(holder.uid):
                    reach.serve(holder, message, caller.ids(request)[2], self.devices.numbers)
            case ((entries.MakeBus() | entries.MakeEndpoint()), []) if holder.may_make(
                message, self.domain.prefix
            ):
                creator = caller.credentials(self.request_of(holder, message.unique, abi.IOCTL))
                self.devices.call(partial(self.host.make, holder, creator, message))
            case _:
                raise LineError(f"said {type(message).__name__} with {len(fds)} descriptors")
