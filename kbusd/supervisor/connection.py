"""A connection to the kernel's FUSE: passes each request to whom it concerns, and back.

    IOCTL, POLL and their answers -> relay.py, from one buffer into the other
    request without a handle      -> `other`: the tree (kdbusfs.py), or an OPEN of a node (cuse.py)
    READ, WRITE, FLUSH, RELEASE   -> answered here: from the pool, with an errno, by closing the line
    a worker asks                 -> memory or descriptors of the caller of a request that it holds

Privileged, and reads nothing that a client wrote: of a request the head that kbusd/cuse/routing.py
gives, of an answer the head. What workers say is hostile; one that breaks the rules is ended. Nobody
gets at a request, a page or a poller but by the request or the file that is his: numbers of requests are a
connection's own, and a worker serves one file of one connection.
"""

from __future__ import annotations

import errno
import select
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from struct import Struct
from typing import Any

from kbusd.cuse import abi, replies, routing
from kbusd.rings import entries
from kbusd.rings.line import LineError
from kbusd.supervisor import caller, reach
from kbusd.supervisor.device import Devices
from kbusd.supervisor.domains import Domain
from kbusd.supervisor.holder import Holder, Opening, Worker
from kbusd.supervisor.relay import Relay

_HUNG_UP = select.POLLERR | select.POLLHUP
_OPCODE = Struct("=4xI")
_IOCTL = Struct("=4xI")  # command
_READ = Struct("=QI")  # offset, size; behind the handle
_BEHIND_HANDLE = routing.HEADER_SIZE + 8
# Of a file; FLUSH is not asked for again after ENOSYS.
_REFUSALS = {abi.WRITE: errno.EINVAL, abi.FLUSH: errno.ENOSYS}


class Connection(Relay):
    """What every transport has in common. `where`: for the admin; "" once it was taken away by us."""

    transport = "fuse"
    open_flags = 0  # FOPEN
    taken_away = False  # by us

    def __init__(self, devices: Devices, where: str, fuse: int, domain: Domain) -> None:
        super().__init__(devices.aside, where, fuse)
        self.devices = devices
        self.closings = devices.closings
        self.domain = domain
        self.host = devices.host

    # -- what the transports do differently --------------------------------------------------------

    def other(self, opcode: int, unique: int, request: bytes) -> None:
        """A request that is of no open file."""
        raise NotImplementedError

    def inode(self, unique: int, number: int) -> int:
        """Of which of the kernel's an OPEN is, if that has pages; else 0. `number`: of the file that it is to
        be."""
        return 0

    def left(self, holder: Holder, uniques: list[int]) -> list[int]:
        """Of the requests that a dead worker held, those that its callers can't have answered."""
        return uniques

    def may_push(self, holder: Holder) -> None:
        """Whether it has pages that can be renewed. Raises LineError if not."""
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
        if self.devices.aside.owes(credentials.uid):
            why = f"uid {credentials.uid} has left behind what can't be closed"
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
        inode = self.inode(opened.unique, worker.number)
        file = Holder(worker, entries.FromDeviceWorker, credentials.uid, inode, self.devices.late)
        file.bus, file.endpoint = self.domain.prefix + opened.bus, opened.endpoint
        file.opener = credentials
        self.files[file.number] = file
        self.devices.closings.opened(file.number)
        device = entries.Device(
            credentials, opened.bus, opened.endpoint, opened.flags, self.transport
        )
        with suppress(OSError):
            file.say(device)
        self.listen_to(file)
        if self.devices.endpoint(self.domain, opened) is None:
            file.cut()  # it went while the client waited
        reply = replies.opened(opened.unique, file.number, self.open_flags)
        if self.held.pop(opened.unique, None) is None or not self.write(reply):
            self._release(file)  # nobody waits for it any more

    def listen_to(self, holder: Holder) -> None:
        """Listen to what it says."""
        self.devices.listen(holder.line.fileno(), partial(self.hear, holder))

    # -- requests ----------------------------------------------------------------------------------

    def unread(self, number: int) -> bool:
        """There was nothing to read, for this reason; says whether to listen on."""
        if number == errno.ENODEV and self.where:
            if not self.taken_away:
                self.host.journal.warn(f"{self.where} was taken away; restart to have it back")
            self.ended()
            return False
        return True  # ENOENT, EAGAIN: it was taken back.

    def warn(self, text: str) -> None:
        """Something is odd."""
        if self.where:
            self.host.journal.warn(f"{self.where}: {text}")

    def ended(self) -> None:
        """No request comes any more: none of its files is of use."""
        for holder in tuple(self.files.values()):
            self._release(holder)

    def request(self, opcode: int, unique: int, number: int, request: bytes) -> None:
        """What is not passed on to a file's worker. `number`: of the file, or what is interrupted."""
        if opcode == routing.INTERRUPT:
            self._interrupt(number, request)
        elif number == 0:
            self.other(opcode, unique, request)
        elif (holder := self.files.get(number)) is None:
            self.write(replies.failure(unique, errno.ENOTCONN))
        elif opcode == abi.READ:
            data = holder.read(*_READ.unpack_from(request, _BEHIND_HANDLE))
            self.write(
                replies.reply(unique, data) if data else replies.failure(unique, errno.EINVAL)
            )
        elif opcode == abi.RELEASE:
            self.closed(holder, unique)
        else:
            self.write(replies.failure(unique, _REFUSALS.get(opcode, errno.ENOTDIR)))

    def refuse(self, holder: Holder, unique: int) -> None:
        """Nobody answers this one any more."""
        _, request = self.held.get(unique, (None, b""))
        if holder.why == errno.ESHUTDOWN and request and _opcode(request) == abi.POLL:
            if self.held.pop(unique, None) is not None:  # by another thread meanwhile
                self.write(replies.poll(unique, _HUNG_UP))
        else:
            self.fail(unique, holder.why)

    def pass_on(self, holder: Holder, request: bytes) -> bool:
        """False if it is gone."""
        try:
            if not holder.gone:
                holder.say(entries.Asked(request))
                return True
        except OSError:
            pass
        return False

    def _interrupt(self, unique: int, request: bytes) -> None:
        holder, _ = self.held.get(unique, (None, b""))
        if self.take_back(unique):
            self.write(replies.ioctl(unique, -abi.ERESTARTSYS))
        elif holder is not None:
            self.pass_on(holder, request)
        else:
            self.fail(unique, errno.EINTR)  # if it is there, it waits for a worker

    def closed(self, holder: Holder, unique: int) -> None:
        """The RELEASE of a file, which nobody waits for."""
        self._release(holder)
        self.write(replies.reply(unique))

    def _release(self, holder: Holder, done: Callable[[], object] | None = None) -> None:
        if self.files.pop(holder.number, None) is not None:
            self.devices.closings.close(holder, self.domain, done)
        elif done is not None:
            done()

    def fail(self, unique: int, number: int) -> None:
        """Answer a request with an errno, if it was not answered yet."""
        if self.held.pop(unique, None) is not None:
            self.write(replies.failure(unique, number))

    # -- what workers say --------------------------------------------------------------------------

    def heard(self, holder: Holder, message: Any, fds: list[int]) -> bool | None:
        """What is not said all the time. As `hear`. Raises LineError if it may not say that."""
        try:
            # To one that has ended nothing can be said any more; what it had said before still counts.
            with suppress(ConnectionError):
                self.said(holder, message, fds)
        finally:
            for fd in fds:
                self.devices.aside.close(holder.uid, fd)
        return True if holder.may_be_heard() else self.pause(holder)

    def pause(self, holder: Holder) -> bool | None:
        """Leave what it says next till it may be heard again."""
        self.devices.pause(holder)
        return None

    def ends(self, holder: Holder) -> None:
        """Its connection has, by BYEBYE."""
        self.devices.closings.last(holder, self.domain)

    def accuse(self, holder: Holder, what: str) -> None:
        """It broke a rule."""
        self.devices.kill(holder, what)

    def lose(self, holder: Holder) -> None:
        """Its process is gone, or as good as; whoever waits for it must not do so for ever."""
        self.devices.forget(holder.line.fileno())
        line = holder.end(gone=True)
        uniques = [unique for unique, (who, _) in list(self.held.items()) if who is holder]
        for unique in self.left(holder, uniques):
            self.refuse(holder, unique)
        self.wake(holder)
        self.devices.aside.close(holder.uid, line)

    def request_of(self, holder: Holder, unique: int, opcode: int | None = None) -> bytes:
        """The request of this number, or its head, if it holds it. Raises LineError."""
        who, request = self.held.get(unique, (None, b""))
        if who is not holder or (opcode is not None and request and _opcode(request) != opcode):
            raise LineError(f"meddled with request {unique}, which it does not hold")
        return request

    def _order(self, holder: Holder, job: Callable[[], None]) -> None:
        """Have something done for it in the supervisor's thread. Till that is done, it is not heard."""
        holder.has_ordered = True

        def do() -> None:
            job()
            holder.has_ordered = False
            self.devices.late(holder)

        self.devices.call(do)

    def said(self, holder: Holder, message: Any, fds: list[int]) -> None:
        """What is left of `fds` is closed. Raises LineError if it may not say that."""
        match message, fds:
            case entries.Ahead(), []:
                holder.ahead[message.command] = reach.check_ahead(message, holder.ahead)
            case entries.AskFacts(unique), []:
                request = self.request_of(holder, unique, abi.IOCTL)
                tid = caller.ids(request)[2] if request else -1
                facts = reach.facts(self.devices.aside, holder, tid, unique, self.copying)
                hello = request and _IOCTL.unpack_from(request, _BEHIND_HANDLE) == (caller.HELLO,)
                if isinstance(facts, entries.Facts) and hello:
                    who = caller.credentials(request).by_file_of(holder.opener)
                    facts = entries.Facts(unique, facts.files, who)
                    self._order(holder, partial(self.host.enter, holder, who, facts))
                else:
                    holder.say(facts)
            case ((entries.Copy() | entries.Store() | entries.Take()), []):
                request = self.request_of(holder, message.unique, abi.IOCTL)
                tid = caller.ids(request)[2] if request else -1
                going, ours = self.copying, self.devices.numbers
                reach.attend(self.devices.aside, holder, message, tid, ours, going)
            case ((entries.MakeBus() | entries.MakeEndpoint()), []) if holder.may_make(
                message, self.domain.prefix
            ):
                creator = caller.credentials(self.request_of(holder, message.unique, abi.IOCTL))
                self._order(holder, partial(self.host.make, holder, creator, message))
            case _:
                raise LineError(f"said {type(message).__name__} with {len(fds)} descriptors")


def _opcode(request: bytes) -> int:
    number: int = _OPCODE.unpack_from(request)[0]
    return number
