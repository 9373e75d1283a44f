# cython: boundscheck=False
# ruff: noqa: F821  (names without a definition here come from .pxd files)
"""What passes between the kernel's FUSE and the workers all the time, from one buffer into the other.

    IOCTL, POLL of an open file    -> Asked, on the line of the worker that serves it
    the same, if that has said so  -> what it has promised (rings/promises.py), or the events behind the pool
    Answered                       -> pages that are new, then the answer, to the kernel
    Nudge                          -> whoever polls is woken
    all else                       -> Python (connection.py)

Privileged, and reads nothing that a client wrote: of a request the head, the command of an ioctl and
where its argument is, all of which the kernel wrote. What a worker says is hostile: each number of it
is read by `_unsigned` or `_length`, which look whether it is there. Both messages stand on the line as
msgpack has them (entries.py), and are read and written here without making objects of them.
"""

import os
import threading

import cython
import msgspec
from cython.cimports.cpython.bytearray import PyByteArray_AS_STRING
from cython.cimports.cpython.bytes import PyBytes_FromStringAndSize
from cython.cimports.kbusd.cuse import routing
from cython.cimports.kbusd.cuse.routing import InHeader, IoctlIn, OutHeader, PollIn, Route
from cython.cimports.kbusd.rings.promises import Step
from cython.cimports.kbusd.supervisor.libc import (
    CMSG_DATA,
    CMSG_FIRSTHDR,
    CMSG_LEN,
    EAGAIN,
    ECONNRESET,
    EINTR,
    ESHUTDOWN,
    MSG_CMSG_CLOEXEC,
    MSG_CTRUNC,
    MSG_DONTWAIT,
    MSG_NOSIGNAL,
    MSG_PEEK,
    MSG_TRUNC,
    POLLIN,
    cmsghdr,
    errno,
    htobe32,
    htobe64,
    iovec,
    msghdr,
    pread,
    process_vm_readv,
    read,
    recv,
    recvmsg,
    send,
    write,
    writev,
)
from cython.cimports.libc.stdint import int64_t, uint8_t, uint32_t, uint64_t
from cython.cimports.libc.string import memcmp, memcpy, memset

from kbusd.cuse import abi
from kbusd.rings import entries
from kbusd.rings.line import MAX_RECORD, LineError
from kbusd.supervisor.aside import Crowded

MAX_REQUEST = (128 << 10) + 4096
MAX_AHEAD = 8 << 10  # bytes of a Wish
MAX_RANGES = 8
MAX_OWED = 1024
MAX_PUSH = 256 << 10  # in one write; more are several
# With one answer: no worker can map a larger pool (profiles/kdbus-worker.toml).
MAX_PUSHED = 16 << 30

# How the messages begin and end on a line: behind `_ASKED` come the request's length, the request and
# the parts of `ahead`; behind `_ANSWERED` the reply, the pairs of `pushed`, and whether it is the last.
_NOTHING = b"\xc4\0\x90"
_NOT_LAST = b"\xc2"
_ASKED = cython.declare(
    bytes, msgspec.msgpack.encode(entries.Asked(b"")).removesuffix(_NOTHING) + b"\xc6"
)
_ANSWERED = cython.declare(
    bytes, msgspec.msgpack.encode(entries.Answered(b"")).removesuffix(_NOTHING + _NOT_LAST)
)
_NUDGE = cython.declare(bytes, msgspec.msgpack.encode(entries.Nudge()))
_PART = cython.declare(bytes, b"\x92\xcf")  # a pair: an address, eight bytes; and
_BYTES = cython.declare(uint8_t, 0xC6)  # bytes, the length of which has four
_PART_HEAD = cython.declare(cython.size_t, 15)
_REQUEST_AT = cython.declare(cython.size_t, len(_ASKED) + 4)
_MOST = cython.declare(cython.size_t, MAX_REQUEST)
_RECORD = cython.declare(cython.size_t, MAX_RECORD)
_PUSH = cython.declare(cython.size_t, MAX_PUSH)
_MOST_PUSHED = cython.declare(uint64_t, MAX_PUSHED)
_NEVER = cython.declare(uint64_t, 1 << 62)  # no offset or size in a file is so large
_BEHIND = cython.declare(cython.size_t, cython.sizeof(InHeader))
_KEPT = cython.declare(cython.size_t, cython.sizeof(InHeader) + 16)  # up to an ioctl's command
_IOCTL = cython.declare(uint32_t, abi.IOCTL)
_POLL = cython.declare(uint32_t, abi.POLL)
_OPEN = cython.declare(uint32_t, abi.OPEN)
_CREATE = cython.declare(uint32_t, abi.CREATE)
_TMPFILE = cython.declare(uint32_t, abi.TMPFILE)
_OPENDIR = cython.declare(uint32_t, abi.OPENDIR)
_OUT = cython.declare(cython.Py_ssize_t, cython.sizeof(OutHeader))
_OPENED = cython.declare(cython.size_t, cython.sizeof(OutHeader) + 8)  # with a handle
_NOTIFY_POLL = cython.declare(cython.int, abi.NOTIFY_POLL)
_NOTIFY_STORE = cython.declare(cython.int, abi.NOTIFY_STORE)
_LEAST_ERROR = cython.declare(cython.int, -abi.ERESTARTSYS)
_NO_PARTS = cython.declare(uint8_t, 0x90)
_PAIR = cython.declare(int64_t, 0x92)
_FALSE = cython.declare(int64_t, 0xC2)
_TRUE = cython.declare(int64_t, 0xC3)


@cython.cclass
class Room:
    """For one thread: a record of a line, with the request or the answer in it, and bytes of a pool."""

    def __init__(self):
        self.bytes = bytearray(MAX_RECORD + MAX_PUSH)  # which the kernel gives when it is touched
        self.data = cython.cast(cython.pointer(uint8_t), PyByteArray_AS_STRING(self.bytes))


@cython.cclass
class Wish:
    """What a worker wants of its caller's memory with each request of one command (Ahead)."""

    def __init__(self, at_argument: cython.size_t, ranges: tuple):
        total: cython.size_t = at_argument
        address: uint64_t
        size: cython.size_t
        if at_argument > MAX_AHEAD or len(ranges) > MAX_RANGES:
            raise ValueError("too much")
        for address, size in ranges:
            if size > MAX_AHEAD - total:
                raise ValueError("too much")
            total += size
            self.addresses[self.count] = address
            self.sizes[self.count] = size
            self.count += 1
        self.at_argument = at_argument


@cython.cclass
class End:
    """Our end of the line to whoever holds requests (holder.py), and what is known of his file."""

    def __init__(self):
        self.lock = threading.Lock()  # for sending, and for closing
        self.ahead = {}
        self.fd = self.pool = -1
        self.events_at = -1

    def send(self, room: Room, size) -> cython.bint:
        """The record at the beginning of `room`, with `lock`; false if it is gone. Never waits."""
        if self.gone:
            return False
        if not self.line.queue:
            if send(self.fd, room.data, size, MSG_NOSIGNAL | MSG_DONTWAIT) >= 0:
                return True
            if errno != EAGAIN:
                return False
        data = PyBytes_FromStringAndSize(cython.cast(cython.p_char, room.data), size)
        self.line.queue.append((data, ()))
        self.late(self)
        return True

    def readable(self) -> cython.int:
        """The poll(2) events that hold, if its worker says that POLLIN is one of them; else 0."""
        events: uint8_t[4]
        if self.events_at < 0 or self.gone or self.why == ESHUTDOWN:
            return 0
        if self.promises is not None and self.promises.begun():
            return 0  # what was promised has changed them
        if pread(self.pool, events, 4, self.events_at) != 4 or not events[0] & POLLIN:
            return 0
        return events[0] | events[1] << 8


@cython.cclass
class Relay:
    """The part of a connection (connection.py) through which everything passes."""

    def __init__(self, aside: Aside, where: str, fuse: cython.int):
        self.aside = aside
        self.where = where
        self.fuse = fuse
        self.files = {}
        self.held = {}
        self.copying = {}

    # -- requests ----------------------------------------------------------------------------------

    def take(self, room: Room):
        """There is a request, or there will be none any more. Says whether to listen on."""
        size: cython.Py_ssize_t
        with cython.nogil:
            size = read(self.fuse, room.data + _REQUEST_AT, _MOST)
        if size < 0:
            return self.unread(errno)
        try:
            if not self._postponed(room, size):
                self._deal(room, size)
        except ValueError as error:
            self.warn(f"the kernel sent {error}")
        return True

    def _postponed(self, room: Room, size) -> cython.bint:
        """Whether it waits for files that were closed before (closing.py). Raises ValueError."""
        if self.closings is None or not self.closings.busy:
            return False
        text: cython.p_char = cython.cast(cython.p_char, room.data + _REQUEST_AT)
        return self.closings.postpone(self, PyBytes_FromStringAndSize(text, size))

    def give(self, request: bytes):
        """A request that was read already. Raises ValueError if no kernel sends it."""
        room: Room = Room()
        text: cython.p_char = request
        if len(request) > MAX_REQUEST:
            raise ValueError(f"a request of {len(request)} bytes")
        memcpy(room.data + _REQUEST_AT, text, len(request))
        self._deal(room, len(request))

    def _deal(self, room: Room, size) -> cython.int:
        """With the request in `room`. Raises ValueError."""
        request: cython.pointer(uint8_t) = room.data + _REQUEST_AT
        route: Route
        ioctl: IoctlIn
        poll: PollIn
        answer: PollOut
        routing.find(request, size, cython.address(route))
        opcode: uint32_t = route.head.opcode
        end: End = None
        if opcode == _IOCTL or opcode == _POLL:
            end = self.files.get(route.number)
        if end is None:
            whole = PyBytes_FromStringAndSize(cython.cast(cython.p_char, request), size)
            self.request(opcode, route.head.unique, route.number, whole)
        elif opcode == _IOCTL:
            if size < _BEHIND + cython.sizeof(IoctlIn):
                raise ValueError(f"an ioctl of {size} bytes")
            memcpy(cython.address(ioctl), request + _BEHIND, cython.sizeof(IoctlIn))
            at: cython.size_t = _BEHIND + cython.sizeof(IoctlIn)
            asks = cython.address(ioctl)
            if not self._promised(end, room, route.head.unique, asks, request + at, size - at):
                wish: Wish = end.ahead.get(ioctl.command)
                self._ask(end, room, cython.address(route), wish, asks)
        else:
            if size < _BEHIND + cython.sizeof(PollIn):
                raise ValueError(f"a poll of {size} bytes")
            memcpy(cython.address(poll), request + _BEHIND, cython.sizeof(PollIn))
            end.kernel_handle = poll.kernel_handle
            answer.events = end.readable()
            if answer.events:
                answer.head.length = cython.sizeof(PollOut)
                answer.head.error = 0
                answer.head.unique = route.head.unique
                answer.padding = 0
                self._write(cython.address(answer), cython.sizeof(PollOut))
            else:
                self._ask(end, room, cython.address(route), None, cython.NULL)
        return 0

    def _ask(self, end: End, room: Room, route, wish: Wish, ioctl) -> cython.int:
        """Pass it on, with memory of the caller if that is wished; for it we may be asked in between."""
        asked: cython.p_char = _ASKED
        head: cython.p_char = cython.cast(cython.p_char, room.data + _REQUEST_AT)
        length: uint32_t = htobe32(route.head.length)
        size: cython.size_t = _REQUEST_AT + route.head.length
        unique = route.head.unique
        sent: cython.bint = False
        memcpy(room.data, asked, _REQUEST_AT - 4)
        memcpy(room.data + _REQUEST_AT - 4, cython.address(length), 4)
        self.held[unique] = end, PyBytes_FromStringAndSize(head, _KEPT)
        if wish is None:
            room.data[size] = _NO_PARTS
            size += 1
        else:
            self.copying[unique] = True
            self.aside.let_go()
            struct: cython.pointer(uint8_t) = room.data + size + 1 + _PART_HEAD
            size = self._look(end, room, size, route.head.thread, wish, ioctl.argument)
            if struct + wish.at_argument <= room.data + size:
                if self._promised(end, room, unique, ioctl, struct, wish.at_argument):
                    return 0
        with end.lock:  # an interrupt comes before all of this, or to its worker behind the request
            if wish is not None and not self.copying.pop(unique, False):
                end.owed -= self.held.pop(unique, None) is not None  # it hears nothing of this one
                return 0
            sent = end.send(room, size)
        if not sent:
            self.refuse(end, unique)
        return 0

    def _look(self, end: End, room: Room, size, thread, wish: Wish, argument) -> cython.size_t:
        """Behind the first `size` bytes comes what there is at a thread of what is wished, up to the
        first range that is not whole. Returns how long the record is then."""
        theirs: iovec[9]
        mine: iovec[9]
        count: cython.int = 0
        parts: cython.int = 0
        at: cython.size_t = size + 1
        done: cython.Py_ssize_t
        if wish.at_argument:
            at = _part(room, at, argument, wish.at_argument, mine, theirs)
            count = 1
        for each in range(wish.count):
            at = _part(
                room,
                at,
                wish.addresses[each],
                wish.sizes[each],
                cython.address(mine[count]),
                cython.address(theirs[count]),
            )
            count += 1
        try:
            self.aside.enter(end.uid)
        except Crowded:
            # Its worker asks, and is told so.
            room.data[size] = _NO_PARTS
            return size + 1
        with cython.nogil:
            done = process_vm_readv(thread, mine, count, theirs, count, 0)
        self.aside.leave(end.uid)
        at = size + 1
        while parts < count and done >= cython.cast(cython.Py_ssize_t, mine[parts].iov_len):
            done -= mine[parts].iov_len
            at += _PART_HEAD + mine[parts].iov_len
            parts += 1
        room.data[size] = _NO_PARTS + parts
        return at

    def _promised(self, end: End, room: Room, unique, ioctl, struct, size) -> cython.bint:
        """Whether this was to be answered so and so, and now is. `size` bytes of its struct are at `struct`."""
        step: Step
        if end.promises is None or end.gone or end.why == ESHUTDOWN or ioctl.argument & 7:
            return False
        if not end.promises.find(ioctl.command, struct, size, cython.address(step)):
            return False
        held: cython.bint = unique in self.held
        self.aside.let_go()
        try:
            with self.aside.work(~end.uid):  # as for an answer's pages
                with end.lock:  # an interrupt comes before it, or too late
                    if (held and unique not in self.copying) or not end.promises.keep(step.word):
                        return False
                    self.copying.pop(unique, None)
                self._push(end, room, step.offset, step.size)
        except Crowded:
            return False
        if not held or self.held.pop(unique, None) is not None:
            head = cython.cast(cython.pointer(OutHeader), step.head)
            head.length = _OUT + step.length
            head.error = 0
            head.unique = unique
            self._write(head, head.length)
        return True

    def take_back(self, unique: uint64_t):
        """Whether a thread is stuck at the memory of this request's caller, who is interrupted: that may be for ever,
        so he is to be answered. Nothing more is done at him then, and what his worker answers is nobody's."""
        held: tuple = self.held.get(unique)
        if held is None or not self.copying.pop(unique, False):
            return False
        end: End = held[0]
        self.held[unique] = end, b""
        end.owed += 1
        if end.owed == MAX_OWED:
            self.accuse(end, f"does not answer {MAX_OWED} requests that were interrupted")
        return True

    # -- what workers say --------------------------------------------------------------------------

    def hear(self, end: End, room: Room):
        """It has said something, or is gone. Says whether to listen on; None: see `pause`."""
        try:
            return self._hear(end, room)
        except EOFError:
            self.lose(end)
            return False
        except Exception as error:  # noqa: BLE001 (whatever it is, this worker brought it about)
            if self.where:  # else it has answered what we have just answered for it
                self.accuse(end, str(error))
            self.lose(end)
            return False

    def _hear(self, end: End, room: Room) -> object:
        """The same. Raises EOFError, LineError.

        The kernel closes descriptors that come with a record and are not taken, when that is received; which may
        take for ever. So it is looked at first, and only a pool is taken. All others go with the line."""
        number: cython.int
        whole: iovec
        message: msghdr
        memset(cython.address(message), 0, cython.sizeof(msghdr))
        whole.iov_base = room.data
        whole.iov_len = _RECORD
        message.msg_iov = cython.address(whole)
        message.msg_iovlen = 1
        size: cython.Py_ssize_t = recvmsg(end.fd, cython.address(message), MSG_DONTWAIT | MSG_PEEK)
        if size < 0:
            # ECONNRESET: it ended and left something of ours unread; what it had said before comes next.
            if errno == EAGAIN or errno == EINTR or errno == ECONNRESET:
                return True
            number = errno
            raise OSError(number, os.strerror(number))
        fds: cython.bint = message.msg_flags & MSG_CTRUNC
        cut: cython.bint = message.msg_flags & MSG_TRUNC
        if size > 0 and not fds and not cut:
            try:
                if self._heard(end, room, size):
                    return True
            except Crowded:
                return self.pause(end)
            recv(end.fd, cython.NULL, 0, MSG_DONTWAIT)
        said, _ = end.line.decoded(memoryview(room.bytes)[:size], [], cut)
        if fds and (end.pool >= 0 or not isinstance(said, entries.Pool)):
            raise LineError(f"said {type(said).__name__} with descriptors")
        return self.heard(end, said, [self._taken(end)] if fds else [])

    def _taken(self, end: End):
        """The descriptor that comes with the next record; if there are more, they are closed. Raises OSError,
        Crowded."""
        control: uint64_t[3]  # for one
        number: cython.int = -1
        done: cython.Py_ssize_t
        message: msghdr
        memset(cython.address(message), 0, cython.sizeof(msghdr))
        message.msg_control = control
        message.msg_controllen = CMSG_LEN(cython.sizeof(cython.int))
        with self.aside.work(end.uid):
            with cython.nogil:
                done = recvmsg(end.fd, cython.address(message), MSG_DONTWAIT | MSG_CMSG_CLOEXEC)
        head: cython.pointer(cmsghdr) = CMSG_FIRSTHDR(cython.address(message))
        if done < 0 or head == cython.NULL:
            raise OSError("a descriptor is lost")
        memcpy(cython.address(number), CMSG_DATA(head), cython.sizeof(cython.int))
        return number

    def _heard(self, end: End, room: Room, size) -> cython.bint:
        """Whether it is one of what is said all the time, and done. Raises LineError, and Crowded, if it is to
        be heard later."""
        answered: cython.p_char = _ANSWERED
        nudge: cython.p_char = _NUDGE
        reader: Reader
        reply: cython.size_t
        length: cython.size_t
        count: cython.size_t
        pushed: uint64_t = 0
        if size == cython.cast(cython.size_t, len(_NUDGE)) and not memcmp(room.data, nudge, size):
            recv(end.fd, cython.NULL, 0, MSG_DONTWAIT)
            self.wake(end)
            return True
        reader.data = room.data
        reader.size = size
        reader.at = len(_ANSWERED)
        if size < reader.at or memcmp(room.data, answered, reader.at):
            return False
        length = _length(cython.address(reader))
        reply = reader.at
        if length > size - reply:
            raise LineError("an answer that is cut short")
        reader.at += length
        count = _count(cython.address(reader))
        if count:
            self.may_push(end)
            # A page that is being read is there as soon as some thread listens: it ends.
            self.aside.enter(~end.uid)
            try:
                recv(end.fd, cython.NULL, 0, MSG_DONTWAIT)
                for _ in range(count):
                    if _big(cython.address(reader), 1) != _PAIR:
                        raise LineError("pushed something else than pages")
                    offset: uint64_t = _unsigned(cython.address(reader))
                    more: uint64_t = _unsigned(cython.address(reader))
                    pushed += more
                    if pushed > _MOST_PUSHED:
                        raise LineError("pushed more than a pool can hold")
                    self._push(end, room, offset, more)
            finally:
                self.aside.leave(~end.uid)
        else:
            recv(end.fd, cython.NULL, 0, MSG_DONTWAIT)
        last: int64_t = _big(cython.address(reader), 1)
        if reader.at != size or not _FALSE <= last <= _TRUE:
            raise LineError("an answer with something else behind it")
        if last == _TRUE:
            self.ends(end)
        self._answered(end, room.data + reply, length)
        return True

    def _answered(self, end: End, reply, length) -> cython.int:
        """To the kernel, if it is to a request that it holds. Raises LineError."""
        head: OutHeader
        if length < cython.sizeof(OutHeader):
            raise LineError(f"an answer of {length} bytes")
        memcpy(cython.address(head), reply, cython.sizeof(OutHeader))
        if head.length != length or not _LEAST_ERROR < head.error <= 0:
            raise LineError(f"an answer of {length} bytes says {head.length}, error {head.error}")
        unique = head.unique
        held: tuple = self.held.get(unique)
        if held is None or held[0] is not end:
            raise LineError(f"meddled with request {unique}, which it does not hold")
        request: bytes = held[1]
        if head.error == 0 and len(request) >= _OUT:
            _check_opened(request, reply, length)
        del self.held[unique]
        end.owed -= not request
        self._write(reply, length)
        return 0

    def _push(self, end: End, room: Room, offset, size) -> cython.int:
        """Bytes of its pool into the page cache of its file, if there are any; it may take for ever."""
        stop: uint64_t = offset + size
        got: cython.Py_ssize_t
        store: Store
        parts: iovec[2]
        parts[0].iov_base = cython.address(store)
        parts[0].iov_len = cython.sizeof(Store)
        parts[1].iov_base = room.data + _RECORD
        store.head.error = _NOTIFY_STORE
        store.head.unique = 0
        store.node = end.node
        store.padding = 0
        with cython.nogil:
            while offset < stop and not end.released and end.why != ESHUTDOWN:
                got = pread(end.pool, room.data + _RECORD, min(stop - offset, _PUSH), offset)
                if got <= 0:
                    break  # behind the end of the pool
                store.offset = offset
                store.size = got
                store.head.length = cython.sizeof(Store) + got
                parts[1].iov_len = got
                writev(self.fuse, parts, 2)  # the file may be closed meanwhile
                offset += got
        return 0

    # -- to the kernel -----------------------------------------------------------------------------

    def wake(self, end: End):
        """Whoever polls its file is to ask again. Once is enough, till somebody has."""
        wake: Wake
        if end.kernel_handle:
            wake.head.length = cython.sizeof(Wake)
            wake.head.error = _NOTIFY_POLL
            wake.head.unique = 0
            wake.kernel_handle = end.kernel_handle
            end.kernel_handle = 0
            self._write(cython.address(wake), cython.sizeof(Wake))

    def write(self, reply: bytes):
        """An answer. False if nobody waits for it any more."""
        data: cython.p_char = reply
        return self._write(data, len(reply))

    def _write(self, data, size) -> cython.bint:
        done: cython.Py_ssize_t
        if not self.where:
            return False
        with cython.nogil:
            done = write(self.fuse, data, size)
        return done >= 0


@cython.cfunc
def _check_opened(
    request: bytes, reply: cython.pointer(cython.const[uint8_t]), length: cython.size_t
):
    """Handles of files are ours to give: by the number of another's, a file would be his. A directory's is 0.
    Raises LineError."""
    head: cython.p_char = request
    opcode: uint32_t
    handle: uint64_t = 0
    memcpy(cython.address(opcode), head + 4, 4)
    if opcode == _OPENDIR and length >= _OPENED:
        memcpy(cython.address(handle), reply + _OUT, 8)
    if opcode == _OPEN or opcode == _CREATE or opcode == _TMPFILE or handle != 0:
        raise LineError("opened a file by itself")


# -- records: msgpack, as far as it is needed ------------------------------------------------------


@cython.cfunc
def _part(
    room: Room,
    at: cython.size_t,
    address: uint64_t,
    size: cython.size_t,
    mine: cython.pointer(iovec),
    theirs: cython.pointer(iovec),
) -> cython.size_t:
    """The head of a pair (address, bytes), and where the bytes come from and go; returns where they end."""
    begin: cython.p_char = _PART
    big_address: uint64_t = htobe64(address)
    big_size: uint32_t = htobe32(size)
    data: cython.pointer(uint8_t) = room.data + at
    memcpy(data, begin, 2)
    memcpy(data + 2, cython.address(big_address), 8)
    data[10] = _BYTES
    memcpy(data + 11, cython.address(big_size), 4)
    mine.iov_base = data + _PART_HEAD
    theirs.iov_base = cython.cast(cython.p_void, address)
    mine.iov_len = theirs.iov_len = size
    return at + _PART_HEAD + size


@cython.cfunc
@cython.exceptval(-1, check=False)
def _big(reader: cython.pointer(Reader), count: cython.size_t) -> int64_t:
    """The next `count` bytes as a number. Raises LineError."""
    value: uint64_t = 0
    if count > reader.size - reader.at:
        raise LineError("an answer that is cut short")
    for _ in range(count):
        value = value << 8 | reader.data[reader.at]
        reader.at += 1
    if value > _NEVER:
        raise LineError("an answer with too large a number")
    return cython.cast(int64_t, value)


@cython.cfunc
@cython.exceptval(-1, check=False)
def _sized(
    reader: cython.pointer(Reader), kind: int64_t, least: int64_t, kinds: int64_t, shift: int64_t
) -> int64_t:
    """A number that has one byte more often doubled the more its kind is above `least`. Raises LineError."""
    if not least <= kind < least + kinds:
        raise LineError("an answer with something else in it")
    return _big(reader, cython.cast(cython.size_t, 1) << (kind - least + shift))


@cython.cfunc
@cython.exceptval(-1, check=False)
def _unsigned(reader: cython.pointer(Reader)) -> int64_t:
    """Raises LineError."""
    kind: int64_t = _big(reader, 1)
    return kind if kind < 0x80 else _sized(reader, kind, 0xCC, 4, 0)


@cython.cfunc
@cython.exceptval(-1, check=False)
def _length(reader: cython.pointer(Reader)) -> int64_t:
    """Of bytes. Raises LineError."""
    return _sized(reader, _big(reader, 1), 0xC4, 3, 0)


@cython.cfunc
@cython.exceptval(-1, check=False)
def _count(reader: cython.pointer(Reader)) -> int64_t:
    """Of the members of an array. Raises LineError."""
    kind: int64_t = _big(reader, 1)
    return kind & 15 if kind & 0xF0 == 0x90 else _sized(reader, kind, 0xDC, 2, 1)
