"""What a connection has received: how messages lie in its pool, and RECV and FREE as programs write them.

After ipc/kdbus/message.c. In a pool a message is its header, its items, the metadata items, and then
the bytes of its vectors, each behind the other. PAYLOAD_OFF items say where those are, counted from
the header; a vector of zeroes has no bytes, only a length and NO_OFFSET. After a vector of zeroes and
after a memfd, length % 8 bytes are left free, so that each later byte stands in memory as it stands
in the payload, modulo 8. BLOOM_FILTER is for the bus alone and is left out. Numbers of descriptors are
-1 until they are known.

The pool is written here and never read, since the client may see it already. What RECV and FREE
say beyond the ordinary (flags, items, sizes) is for `session.py`: `recv` and `free` leave it alone.
"""

import errno

import cython
from cython.cimports.cpython.buffer import PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cython.cimports.cpython.bytes import PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cython.cimports.kbusd.kdbus.pool import Pool, Quota, Slice
from cython.cimports.kbusd.kdbus.queue import Queue
from cython.cimports.libc.stdint import int32_t, int64_t, uint8_t, uint64_t
from cython.cimports.libc.string import memcpy, memset

from kbusd.kdbus import abi, layout
from kbusd.kdbus.errors import Errno

HEAD = cython.declare(cython.int, layout.MESSAGE.size)
ITEM = cython.declare(cython.int, layout.ITEM.size)
PAYLOAD_OFF = cython.declare(uint64_t, abi.ITEM_PAYLOAD_OFF)
PAYLOAD_MEMFD = cython.declare(uint64_t, abi.ITEM_PAYLOAD_MEMFD)
FDS = cython.declare(uint64_t, abi.ITEM_FDS)
DST_NAME = cython.declare(uint64_t, abi.ITEM_DST_NAME)
NO_OFFSET = cython.declare(uint64_t, abi.NO_OFFSET)
DROPPED = cython.declare(uint64_t, abi.RECV_RETURN_DROPPED_MSGS)
EAGAIN = cython.declare(cython.int, errno.EAGAIN)
RETURN_FLAGS_AT, RESULT_AT = 16, 32  # in RECV
NO_FLAGS = bytes(8)


@cython.cclass
class Entry:
    """A message in the pool. `expects` is what its sender waits for: (id, cookie); `answers`, the same of
    an interrupted call of ours; `no_reply`: it tells that there will be none.

    `fds` are its descriptors in the order of its items, `fds_at` where their numbers belong in the slice, and
    `counted` those that its sender answers for; `incomplete`: it had some that were not kept. `kept`: all of
    it, if it was sent to a name that may go from or to an activator."""

    def __init__(self, slice: Slice, user: int64_t, counted: int64_t = 0):
        self.slice = slice
        self.user = user
        self.memory = slice.size
        self.counted = counted
        self.fds = self.fds_at = ()


@cython.cclass
class Mailbox:
    """Of a connection with a pool of `size` bytes; `memory` is what its client maps (port.Memory). `hand`, if
    it is there, gives an entry's descriptors to the client, and returns RETURN flags."""

    def __init__(self, size, memory):
        self.pool = Pool(size)
        self.quota = Quota(self.pool)
        self.queue = Queue()
        self.memory = memory
        self.installing = {}
        PyObject_GetBuffer(memory.buffer, cython.address(self.view), PyBUF_WRITABLE)
        if self.view.len < size:
            raise ValueError("a pool that is larger than its memory")

    def __dealloc__(self):
        PyBuffer_Release(cython.address(self.view))

    def place(self, header, parts, fds, dst_name, notice, attached, user, accounted) -> Entry:
        """Lay a message of `user` with `fds` descriptors out in the pool; it is not in the queue yet.

        `header` is flags to cookie_reply; `parts` are bytes, numbers of zeroes, and memfds; `notice` is the
        item of a notification and `attached` are metadata items, all padded. Raises Errno."""
        name: bytes = None if dst_name is None else dst_name.encode("latin-1") + b"\0"
        head: uint64_t = HEAD + len(notice) + len(attached)
        length: uint64_t = 0  # of the bytes that follow the items
        size: uint64_t
        for part in parts:
            if isinstance(part, bytes):
                head += 32
                length += len(cython.cast(bytes, part))
            elif isinstance(part, int):
                head += 32
                size = part
                length += size % 8
            else:
                head += 40
                size = part.size
                length += size % 8
        if fds:
            head += ITEM + _aligned(4 * fds)
        if name is not None:
            head += ITEM + _aligned(len(name))
        size = _aligned(head + length)
        if accounted:
            self.quota.add(user, size, fds)
        try:
            slice: Slice = self.pool.alloc(size, accounted)
        except Errno:
            if accounted:
                self.quota.remove(user, size, fds)
            raise
        entry: Entry = Entry(slice, user, fds if accounted else 0)
        begin: cython.pointer(uint8_t) = cython.cast(cython.pointer(uint8_t), self.view.buf)
        begin += slice.offset
        flags, priority, dst_id, src_id, payload_type, cookie, reply = header
        place = cython.cast(cython.pointer(uint64_t), begin)
        place[0] = head
        place[1] = flags
        cython.cast(cython.pointer(int64_t), place)[2] = priority
        place[3] = dst_id
        place[4] = src_id
        place[5] = payload_type
        place[6] = cookie
        place[7] = reply
        at: cython.pointer(uint8_t) = _put(begin + HEAD, notice)
        data: cython.pointer(uint8_t) = begin + head
        numbers: list = []
        for part in parts:
            place = cython.cast(cython.pointer(uint64_t), at)
            if isinstance(part, bytes):
                place[0] = 32
                place[1] = PAYLOAD_OFF
                place[2] = len(cython.cast(bytes, part))
                place[3] = data - begin
                data = _put(data, part)
                at += 32
            elif isinstance(part, int):
                size = part
                place[0] = 32
                place[1] = PAYLOAD_OFF
                place[2] = size
                place[3] = NO_OFFSET
                data = _gap(data, size % 8)
                at += 32
            else:
                size = part.size
                place[0] = 40
                place[1] = PAYLOAD_MEMFD
                place[2] = part.start
                place[3] = size
                cython.cast(cython.pointer(int32_t), place)[8] = -1
                cython.cast(cython.pointer(int32_t), place)[9] = 0
                numbers.append(at + 32 - begin)
                data = _gap(data, size % 8)
                at += 40
        if fds:
            at = _item(at, FDS, 4 * fds)
            numbers += [at + 4 * i - begin for i in range(fds)]
            memset(at, 0xFF, 4 * fds)
            at = _gap(at + 4 * fds, _aligned(4 * fds) - 4 * fds)
        if name is not None:
            at = _item(at, DST_NAME, len(name))
            at = _gap(_put(at, name), _aligned(len(name)) - len(name))
        _put(at, attached)
        _gap(data, slice.size - (data - begin))
        if numbers:
            entry.fds_at = tuple(numbers)
        return entry

    def unqueue(self, ticket) -> Entry:
        """Take a message out of the queue; it stays in the pool."""
        entry: Entry = self.queue.remove(ticket)
        self.quota.remove(entry.user, entry.memory, entry.counted)
        self.untold -= entry.no_reply
        return entry

    def recv(self, command):
        """An ordinary RECV: its errno or 0, and what it writes into its struct, (offset, bytes) each. None if
        it is not one."""
        entry: Entry = None
        if not _is_plain(command, 64):
            return None
        number: cython.int = EAGAIN
        offset: uint64_t = self.pool.size
        size: uint64_t = 0
        incomplete: uint64_t = 0
        has_fds: cython.bint = False
        if len(self.queue):
            ticket, entry = self.queue.peek()
            has_fds = entry.incomplete or entry.fds
            if entry.kept is not None or (has_fds and self.hand is None):
                return None
        lost: uint64_t = self.queue.take_lost()
        if entry is not None:
            number = 0
            offset = entry.slice.offset
            size = entry.slice.size
            if has_fds:
                incomplete = self.hand(entry)
            self.memory.push(offset, size)
            self._read(ticket, entry)
        result: bytes = PyBytes_FromStringAndSize(cython.NULL, 32)
        place = cython.cast(cython.pointer(uint64_t), PyBytes_AS_STRING(result))
        place[0] = lost
        place[1] = offset
        place[2] = size
        place[3] = incomplete
        flags = DROPPED.to_bytes(8, "little") if lost else NO_FLAGS
        return number, ((RETURN_FLAGS_AT, flags), (RESULT_AT, result))

    def _read(self, ticket, entry: Entry):
        self.unqueue(ticket)
        self.pool.publish(entry.slice)
        self.pool.release(entry.slice)

    def promise(self, command):
        """The slice that an ordinary RECV would get now, and the struct as it leaves that behind; None if more
        would have to be done for it than `received`."""
        entry: Entry
        if not len(self.queue) or self.queue.lost:
            return None
        _, entry = self.queue.peek()
        if entry.kept is not None or entry.incomplete or entry.fds:
            return None
        result: bytes = PyBytes_FromStringAndSize(PyBytes_AS_STRING(command), 64)
        place = cython.cast(cython.pointer(uint64_t), PyBytes_AS_STRING(result))
        place[2] = 0
        place[4] = 0
        place[5] = entry.slice.offset
        place[6] = entry.slice.size
        place[7] = 0
        return entry.slice.offset, entry.slice.size, result

    def received(self, freed: cython.bint):
        """What was promised was kept: the message was received, and its slice freed, or not."""
        entry: Entry
        ticket, entry = self.queue.peek()
        self._read(ticket, entry)
        if freed:
            self.pool.free(entry.slice.offset)

    def free(self, command):
        """The same for FREE."""
        if not _is_plain(command, 32):
            return None
        offset = cython.cast(cython.pointer(uint64_t), PyBytes_AS_STRING(command))[3]
        number: cython.int = 0
        try:
            self.pool.free(offset)
        except Errno as error:
            number = error.errno
        else:
            if self.installing:
                self.installing.pop(offset, None)
        return number, ((RETURN_FLAGS_AT, NO_FLAGS),)


@cython.cfunc
@cython.exceptval(check=False)
def _is_plain(command: bytes, size: cython.Py_ssize_t) -> cython.bint:
    """Whether a command's struct has neither flags nor items."""
    fields = cython.cast(cython.pointer(uint64_t), PyBytes_AS_STRING(command))
    return len(command) == size and fields[0] == cython.cast(uint64_t, size) and fields[1] == 0


@cython.cfunc
@cython.exceptval(check=False)
def _aligned(size: uint64_t) -> uint64_t:
    return (size + 7) & ~cython.cast(uint64_t, 7)


@cython.cfunc
def _put(at: cython.pointer(uint8_t), data: bytes) -> cython.pointer(uint8_t):
    """Write; returns what is behind it."""
    memcpy(at, PyBytes_AS_STRING(data), len(data))
    return at + len(data)


@cython.cfunc
@cython.exceptval(check=False)
def _gap(at: cython.pointer(uint8_t), size: uint64_t) -> cython.pointer(uint8_t):
    """Leave room; returns what is behind it."""
    memset(at, 0, size)
    return at + size


@cython.cfunc
@cython.exceptval(check=False)
def _item(at: cython.pointer(uint8_t), type: uint64_t, size: uint64_t) -> cython.pointer(uint8_t):
    """The head of an item of `size` bytes; returns where those belong."""
    fields = cython.cast(cython.pointer(uint64_t), at)
    fields[0] = ITEM + size
    fields[1] = type
    return at + ITEM
