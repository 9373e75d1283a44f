# cython: boundscheck=False
"""What the kernel asks of one open kdbus file: from the supervisor's line to the session and back.

The supervisor passes on the kernel's requests as they are, and does for us what only it can do to the
process that waits in one: copy its memory, store into it, take a descriptor. What the client wrote is
hostile: it is copied, decoded by kbusd/kdbus, and checked, before it is used. An ordinary RECV or FREE is
answered at once (kdbus/mailbox.py); all else is a command of the session.
"""

import errno
import mmap
import select

import cython
from cython.cimports.cpython.bytes import PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cython.cimports.kbusd.kdbus.mailbox import Mailbox
from cython.cimports.kbusd.kdbus.scan import scan
from cython.cimports.kbusd.rings.promises import Promises
from cython.cimports.libc.stdint import int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from cython.cimports.libc.string import memcpy, memset

from kbusd.cuse import abi as fuse
from kbusd.cuse import replies, requests
from kbusd.kdbus import abi, layout, waits
from kbusd.kdbus.commands import SPECS
from kbusd.kdbus.errors import Errno
from kbusd.kdbus.handle import State
from kbusd.kdbus.message import Vector
from kbusd.kdbus.session import PEEK as _PEEK
from kbusd.kdbus.session import READABLE as _READABLE
from kbusd.kdbus.waits import Interrupted, Wait
from kbusd.rings import entries, memfd
from kbusd.rings.line import close_all
from kbusd.rings.memfd import RingError

MAX_COPY = 128 << 20  # bytes of one answer of the supervisor's
TAKEN_AT_ONCE = 16
PEEK = cython.declare(uint64_t, _PEEK)
READABLE = cython.declare(cython.int, _READABLE)
NEAR = cython.declare(uint64_t, 1024)  # bytes that are fetched before what is asked for
PAGE = cython.declare(uint64_t, mmap.PAGESIZE)
MAX_AHEAD = 8 << 10  # what the supervisor sends along with a request, unasked
MAX_AHEAD_RANGES = 8
IOCTL = cython.declare(uint32_t, fuse.IOCTL)
HEAD = cython.declare(cython.Py_ssize_t, fuse.IN_HEADER.size)
IOCTL_HEAD = cython.declare(cython.Py_ssize_t, fuse.IN_HEADER.size + fuse.IOCTL_IN.size)
REPLY_HEAD = cython.declare(cython.Py_ssize_t, fuse.OUT_HEADER.size + fuse.IOCTL_OUT.size)
RECV = cython.declare(uint32_t, abi.CMD_RECV)
FREE = cython.declare(uint32_t, abi.CMD_FREE)
SEND = cython.declare(uint32_t, abi.CMD_SEND)
SEND_SIZE = cython.declare(cython.Py_ssize_t, layout.SEND.size)
MESSAGE_SIZE = cython.declare(uint64_t, layout.MESSAGE.size)
RECV_SIZE = cython.declare(cython.Py_ssize_t, layout.RECV.size)
FREE_SIZE = cython.declare(cython.Py_ssize_t, layout.FREE.size)
GONE = State.GONE
NO_RESULT = bytes(fuse.IOCTL_OUT.size)
_SIZES = {command: spec.fixed.size for command, spec in SPECS.items()}


@cython.cclass
class Request:
    """An ioctl(2) whose caller waits (kdbus/port.py: Caller)."""

    def __init__(self, device: Requests, raw: bytes, ahead: tuple):
        """`raw` is an IOCTL, at least its fixed part, and is of the length that it says. `ahead`: memory of
        the caller that came along. Raises requests.Malformed."""
        at = cython.cast(cython.pointer(uint8_t), PyBytes_AS_STRING(raw))
        long = cython.cast(cython.pointer(uint64_t), at)
        word = cython.cast(cython.pointer(uint32_t), at)
        self._device = device
        self.unique = long[1]
        self.tid = word[8]
        self.command = word[13]
        self.argument = long[7]
        self.out_size = word[17]
        self.data = raw[IOCTL_HEAD:]
        if word[16] != cython.cast(uint64_t, len(self.data)):
            raise requests.Malformed("an ioctl whose data are not as long as it says")
        self._known = list(ahead)
        self._seen = self.data
        self.looked_at = []

    @property
    def waits_for(self):
        """What a signal to the caller ends; one that came before there was anything counts, too."""
        return self._waits_for

    @waits_for.setter
    def waits_for(self, wait):
        self._waits_for = wait
        if wait is not None and self._interrupted:
            wait.fail(Interrupted())

    def interrupt(self):
        """The kernel says so, once."""
        self._interrupted = True
        if self._waits_for is not None:
            self._waits_for.fail(Interrupted())

    async def peek(self, address, least, most):
        found = self._find(address, least)
        if found is None:
            found = await self._fetch(address, least, most)
        # What is peeked at says first how long it is (kbusd/kdbus/commands.py).
        size = min(max(int.from_bytes(found[:8], "little"), least), most)
        self._looked(address, size, found)
        return found

    def _looked(self, address, size, found):
        self.looked_at.append((address, size))
        if address == self.argument:
            self._seen = found

    def _find(self, address, size) -> bytes:
        """What is known of the memory there, if it is so much at least."""
        data: bytes
        start: uint64_t
        length: uint64_t
        for start, data in self._known:
            length = len(data)
            if start <= address and size <= length and address - start <= length - size:
                return data if start == address else data[address - start :]
        return None

    async def _fetch(self, address, least, most):
        # What a program sends often lies close to the message that says so: fetched in one go, it need
        # not be asked for again. Before the address, only of the same page, which is there if it is.
        start = max(address - NEAR, address - address % PAGE)
        (near,) = await self._copied([(start, address - start + most)])
        found = near[address - start :]
        if len(found) < least:
            raise Errno(errno.EFAULT, f"no {least} bytes of memory at {address:#x}")
        self._known.append((start, near))
        return found

    async def copy(self, ranges):
        self.looked_at += ranges
        known = [self._find(at, size) for at, size in ranges]
        if None not in known:
            return [data[:size] for data, (_, size) in zip(known, ranges, strict=True)]
        found = await self._copied(ranges)
        for data, (_, size) in zip(found, ranges, strict=True):
            if len(data) < size:
                raise Errno(errno.EFAULT, "some of the message is not the caller's memory")
        return found

    async def _copied(self, ranges):
        sizes, data = await self._device.ask(self.unique, entries.Copy(self.unique, tuple(ranges)))
        if len(sizes) != len(ranges) or sum(sizes) != len(data):
            raise Errno(errno.EFAULT, "the supervisor copied something else")
        if len(sizes) == 1:
            return [data]
        found, at = [], 0
        for size in sizes:
            found.append(data[at : at + size])
            at += size
        return found

    async def store(self, address, data):
        await self._device.ask(self.unique, entries.Store(self.unique, ((address, data),)))

    async def take(self, numbers):
        taken = []
        try:
            for at in range(0, len(numbers), TAKEN_AT_ONCE):
                wanted = entries.Take(self.unique, tuple(numbers[at : at + TAKEN_AT_ONCE]))
                taken += await self._device.ask(self.unique, wanted)
        except Errno as error:
            close_all(taken)
            number = errno.EOPNOTSUPP if error.errno == errno.ELOOP else error.errno
            raise Errno(number, error.text) from None
        return taken

    def answer(self, result, stores):
        """End the ioctl: `stores`, (offset from its argument, bytes) each, go into the caller's memory, if
        they are not there already."""
        reply: bytes = PyBytes_FromStringAndSize(cython.NULL, REPLY_HEAD + self.out_size)
        image = cython.cast(cython.pointer(uint8_t), PyBytes_AS_STRING(reply)) + REPLY_HEAD
        known: bytes = self._seen
        size: int64_t = self.out_size
        length: int64_t = len(known)
        at: int64_t
        data: bytes
        left: list = None
        memcpy(image, PyBytes_AS_STRING(known), min(length, size))
        if length < size:
            memset(image + length, 0, size - length)
        for at, data in stores:
            if at >= 0 and at + len(data) <= size:
                memcpy(image + at, PyBytes_AS_STRING(data), len(data))
            elif not 0 <= at <= length - len(data) or known[at : at + len(data)] != data:
                left = left or []
                left.append((self.argument + at, data))
        if length < size:  # it was not all looked at, so that the rest stays as it is
            reply = reply[:REPLY_HEAD]
        if left is None:
            self._end(result, reply)
        else:
            waits.start(self._store(tuple(left), result, reply), lambda _: None)

    async def _store(self, parts, result, reply):
        self._device.storing += 1
        try:
            await self._device.ask(self.unique, entries.Store(self.unique, parts))
        except Errno as error:
            result = -error.errno
        self._device.storing -= 1
        self._end(result, reply)

    def _end(self, result, reply):
        """As kbusd.cuse.replies.ioctl: `reply` has room for the heads."""
        place = PyBytes_AS_STRING(reply)
        memset(place, 0, REPLY_HEAD)
        cython.cast(cython.pointer(uint32_t), place)[0] = len(reply)
        cython.cast(cython.pointer(uint64_t), place)[1] = self.unique
        cython.cast(cython.pointer(int32_t), place)[4] = result
        self._device.answered(self.unique, reply)


@cython.cclass
class Requests:
    """Takes up what comes by `line`; kbusd/workers/kdbus_device.py is the rest of it.

    `session` is a Session, or the Control of a control node."""

    def __init__(self, line, session):
        self.line = line
        self.session = session
        self.held = {}
        self._asked = {}
        self._pushed = []
        self._guesses = {}  # by command: what, and whether it was said

    def requests(self, catch_up):
        """Take up the next thing that has come; False if the file is closed. Raises LineError."""
        self.recall()
        try:
            received = self.line.receive()
        except EOFError:
            return False
        if received is not None:
            message, fds = received
            if type(message) is entries.Promising:
                self._may_promise(fds)
            elif type(message) is entries.Asked:
                catch_up()  # what others have done before is to be seen by this
                try:
                    self._request(message.request, message.ahead)
                except requests.Malformed:
                    pass  # of no kernel: there is nobody to answer
            else:
                self._given(message, fds)
        return True

    def settle(self):
        """The connection has ended: say the rest, which is answers, some of them yet to be stored. What comes
        now is answered by the supervisor, once we have ended. Raises LineError, OSError."""
        poller = select.poll()
        while self.storing or self.line.queue:
            poller.register(self.line, select.POLLIN | (select.POLLOUT if self.line.queue else 0))
            poller.poll()
            self.line.flush()
            try:
                received = self.line.receive()
            except EOFError:
                return
            if received is not None:
                message, fds = received
                if type(message) is entries.Stored:
                    self._given(message, fds)
                else:
                    close_all(fds)

    def _request(self, raw: bytes, ahead: tuple):
        held: Request
        head = cython.cast(cython.pointer(uint32_t), PyBytes_AS_STRING(raw))
        extra = cython.cast(cython.pointer(uint16_t), head)  # extensions, which stand at the end
        if (
            len(raw) < IOCTL_HEAD
            or head[1] != IOCTL
            or head[0] != cython.cast(uint32_t, len(raw))
            or extra[18]
        ):
            self._other(requests.decode(raw))
            return
        held = Request(self, raw, ahead)
        self.held[held.unique] = held
        done = self._at_once(held)
        if done is not None:
            number, stores = done
            held.answer(-number, stores)
            return
        command = self._send(held)
        if command is None:
            command = self.own_command(held)
        first: bytes = held.data if len(held.data) == _SIZES.get(held.command, -1) else b""
        if command is None:
            command = self.session.ioctl(held, held.command, held.argument, first)
        waits.start(command, lambda result: self._ended(held, result))

    def refused(self, held, error):
        """A command fails that was not carried out at once."""
        raise NotImplementedError

    def own_command(self, held):
        """A command that is not the session's, but the file's; None if this is none of those."""
        raise NotImplementedError

    def _at_once(self, held):
        """An ordinary RECV or FREE: its errno and what it stores; None if it is none, or not all known."""
        box: Mailbox
        if (held.command != RECV and held.command != FREE) or held.argument & 7:
            return None
        if self.session.ordinary is None:
            return None
        box = self.session.ordinary
        size: cython.Py_ssize_t = RECV_SIZE if held.command == RECV else FREE_SIZE
        data: bytes = held.data
        came: cython.bint = len(data) == size
        if not came:
            data = held._find(held.argument, size)
            if data is None:
                return None
            data = data[:size]
        done = box.recv(data) if held.command == RECV else box.free(data)
        if held.command == RECV and done is not None:
            self._recv = data
        if done is not None and not came:
            held._looked(held.argument, size, data)
        return done

    def _send(self, held):
        """An ordinary SEND as a command, if all that it sends has come along; else None."""
        part: bytes
        if held.command != SEND or held.argument & 7 or len(held.data) != SEND_SIZE:
            return None
        fields = cython.cast(cython.pointer(uint64_t), PyBytes_AS_STRING(held.data))
        if fields[0] != cython.cast(uint64_t, SEND_SIZE) or fields[1] != 0 or fields[3] & 7:
            return None
        session = self.session
        if session.ordinary is None or session.kind != 0:
            return None
        at: uint64_t = fields[3]
        part = held._find(at, MESSAGE_SIZE)
        if part is None:
            return None
        size: uint64_t = cython.cast(cython.pointer(uint64_t), PyBytes_AS_STRING(part))[0]
        if size > PEEK or size > cython.cast(uint64_t, len(part)):
            return None
        found = scan(part[:size], session.id)
        if found is None:
            return None
        looked: list = [(at, size)]
        pieces: list = []
        for vector in found.parts:
            if type(vector) is Vector and vector.address:
                part = held._find(vector.address, vector.size)
                if part is None:
                    return None
                pieces.append(part[: vector.size])
                looked.append((vector.address, vector.size))
        held.looked_at += looked
        return session.send(held, found, pieces[0] if len(pieces) == 1 else b"".join(pieces))

    def _other(self, request):
        """Of the kernel, and no ioctl."""
        unique = request.header.unique
        body = request.body
        if isinstance(body, requests.Poll):
            wait = None if self.session.poll() & READABLE else self.session.coming_back()
            if wait is None:
                self._tell(unique)
            else:
                wait.then(lambda: self._tell(unique))
        elif isinstance(body, requests.Interrupt):
            waiting = self.held.get(body.unique)
            if waiting is not None:
                waiting.interrupt()
        else:
            self.line.send(entries.Answered(replies.failure(unique, errno.ENOSYS)))

    def _tell(self, unique):
        """Answer a poll(2)."""
        events = self.session.poll()
        self._told, self._told_of = events, self.session.arrived
        self.line.send(entries.Answered(replies.poll(unique, events)))

    def _ended(self, held, result):
        if isinstance(result, Interrupted):
            held.answer(-fuse.ERESTARTSYS, ())
        elif isinstance(result, Errno):
            self.refused(held, result)
            held.answer(-result.errno, [(poke.offset, poke.data) for poke in result.pokes])
        else:
            held.answer(0, [(at - held.argument, data) for at, data in result.stores])

    def answered(self, unique, reply):
        request: Request = self.held.pop(unique)
        self.show_events()
        pushed = tuple(self._pushed)
        self._pushed.clear()
        last = getattr(self.session, "state", None) is GONE
        self.line.send(entries.Answered(reply, pushed, last))
        if request.looked_at:
            self._guess(request)

    def _guess(self, request):
        """If a command looks where the one before did, the next one will: have that sent along."""
        at_argument = 0
        ranges = []
        total = 0
        for address, size in request.looked_at:
            if address == request.argument:
                at_argument = size
            elif size:
                ranges.append((address, size))
                total += size
        if not 0 < total + at_argument <= MAX_AHEAD or len(ranges) > MAX_AHEAD_RANGES:
            return
        guess = at_argument, tuple(ranges)
        before, said = self._guesses.get(request.command, (None, False))
        if before != guess:
            self._guesses[request.command] = guess, False
        elif not said:
            self._guesses[request.command] = guess, True
            self.line.send(entries.Ahead(request.command, *guess))

    def show_events(self):
        """Let the supervisor answer who polls, as long as there is something to read."""
        events: uint32_t = self.session.poll()
        if events != self._shown and self.pool is not None:
            self._shown = events
            self.pool.show(events)
        return events

    def nudge(self):
        """Wake who polls, if there is more to tell than they were told."""
        arrived = self.session.arrived
        events: uint32_t = self.show_events()
        if events & ~self._told or arrived != self._told_of:
            self._told, self._told_of = events, arrived
            self.line.send(entries.Nudge())

    def _may_promise(self, fds):
        """A page for promises has come."""
        try:
            for fd in fds:
                self._promises = Promises(fd)
        except RingError:
            pass  # no memory: it goes without
        finally:
            close_all(fds)

    def promise(self):
        """Nothing is done till something comes: what RECV and FREE will be answered with till then, if they are
        as they were the last time."""
        box: Mailbox
        if self._promises is None or self._recv is None or self.session.ordinary is None:
            return
        box = self.session.ordinary
        found = box.promise(self._recv)
        if found is not None:
            offset, size, struct = found
            self._promises.offer(
                (
                    (RECV, self._recv, NO_RESULT + struct, offset, size),
                    (FREE, layout.FREE.pack(FREE_SIZE, 0, 0, offset), NO_RESULT, 0, 0),
                )
            )

    def recall(self):
        """Something has come: what was promised is not any more, and what was kept of it is done."""
        if self._promises is None or not self._promises.offered:
            return
        kept = self._promises.recall()
        if kept:
            self.session.box.received(kept > 1)
            self.show_events()
            self._promises.settle()

    def push(self, offset, size):
        self._pushed.append((offset, size))

    def ask(self, unique, message):
        """Ask the supervisor about a request that is held; one thing at a time."""
        wait = self._asked[unique] = Wait()
        self.line.send(message)
        return wait

    def _given(self, message, fds):
        """The supervisor has done what we asked for."""
        wait = self._asked.pop(message.unique, None)
        keep = isinstance(message, entries.Given) and not message.errno and wait is not None
        try:
            if wait is None:
                return
            if isinstance(message, entries.Facts):
                if message.who is not None and self.entering is not None:
                    self.entering(message.who)
                wait.done(message.files)
            elif message.errno:
                wait.fail(Errno(message.errno, "the kernel or the supervisor refused"))
            elif isinstance(message, entries.Copied):
                data = memfd.read(fds[0], MAX_COPY) if fds else message.data
                wait.done((message.sizes, data))
            else:
                wait.done(fds if keep else None)
        except RingError as error:
            wait.fail(Errno(errno.EFAULT, str(error)))
        finally:
            if not keep:
                close_all(fds)
