# cython: boundscheck=False
"""What a client is still to be sent: bytes, descriptors and mapped payloads, in order.

Small messages are written side by side into one buffer and leave with one sendmsg(2). A message
with descriptors starts a segment of its own, since descriptors travel with a first byte. A large
payload is sent from its mapping, without a copy, or from a peer's bulk area, which lends it, or by a pipe of ours
from the peer's carrier (rings/pagepipe.py). Owns what is put into it; nothing here blocks. One large segment is kept for the next large message, since fresh pages cost more than the copy
into them, until `trim` finds that nobody has used it for a while.
"""

import os

import cython
from cython.cimports.kbusd.rings.bulk import BULK_LARGE, BULK_MOST, Area, BulkView
from cython.cimports.kbusd.rings.pagepipe import make_pipe
from cython.cimports.kbusd.workers.libc import (
    CMSG_DATA,
    CMSG_FIRSTHDR,
    CMSG_LEN,
    CMSG_SPACE,
    EAGAIN,
    EINTR,
    ETOOMANYREFS,
    MAP_ANONYMOUS,
    MAP_FAILED,
    MAP_PRIVATE,
    MSG_DONTWAIT,
    MSG_NOSIGNAL,
    PROT_READ,
    PROT_WRITE,
    SCM_RIGHTS,
    SOL_SOCKET,
    cmsghdr,
    errno,
    iovec,
    mmap,
    msghdr,
    munmap,
    sendmsg,
)
from cython.cimports.libc.stdint import uint8_t
from cython.cimports.libc.stdlib import free, malloc
from cython.cimports.libc.string import memcpy, memset

SEGMENT = cython.declare(cython.size_t, 32768)
# Messages above SEGMENT get a segment of the first size in which they fit, of which only the pages that are
# used exist; still larger ones (only by their headers) one of their own.
LARGE_SEGMENT = cython.declare(cython.size_t, BULK_MOST + 131072)
LARGEST_SEGMENT = cython.declare(cython.size_t, BULK_LARGE + 131072)
# What is before a body that goes through the pipe goes with it if it is no more than this.
TOGETHER = cython.declare(cython.size_t, 16384)
MAX_FDS = 253  # SCM_MAX_FD of the kernel


@cython.cclass
class Segment:
    """A run of bytes to send; `fds` go with its first byte. `mapped`: by mmap(2), `full`: nothing
    may be added, `lender`: whose `area` the bytes are in, or (`piped`) its peer's carrier."""

    def __cinit__(self):
        self.data = cython.NULL
        self.mapped = False
        self.full = self.piped = False
        self.fds = ()

    def __dealloc__(self):
        if self.data != cython.NULL and self.lender is None:
            if self.mapped:
                munmap(self.data, self.capacity)
            else:
                free(self.data)


@cython.cfunc
def _segment(capacity: cython.size_t) -> Segment:
    segment: Segment = Segment()
    if capacity > SEGMENT:
        # By mmap: given back as a whole, and not to the heap's free list.
        where = mmap(
            cython.NULL, capacity, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0
        )
        if where == MAP_FAILED:
            raise MemoryError
        segment.data = cython.cast(cython.pointer(uint8_t), where)
        segment.mapped = True
    else:
        segment.data = cython.cast(cython.pointer(uint8_t), malloc(capacity))
        if segment.data == cython.NULL:
            raise MemoryError
    segment.capacity = capacity
    segment.start = segment.end = 0
    return segment


@cython.cclass
class Output:
    """The queue to one client. `pending` counts the bytes in it, `fds` the descriptors, `sent` the
    bytes that have left it since the beginning; `peak` and `peak_fds` are the most that ever waited,
    `messages` those put in since it was last empty. `cheat`: who took back what it had announced. `refused`: the kernel
    lets our user have no more descriptors in flight, till somebody takes some out of a socket."""

    def __init__(self):
        self.tail = _segment(SEGMENT)
        self.segments = [self.tail]
        self.pending = 0
        self.spare = None
        self.spare_used = False

    def reserve(self, length: cython.size_t) -> cython.pointer(uint8_t):
        """Room for `length` bytes in a row; write there, then `commit`."""
        tail: Segment = self.tail
        if tail.full or tail.capacity - tail.end < length:
            tail = self._large(length) if length > SEGMENT else _segment(SEGMENT)
            if self.tail.start == self.tail.end and not self.tail.full:
                tail.fds = self.tail.fds
                self.segments.pop()
            self.segments.append(tail)
            self.tail = tail
        return tail.data + tail.end

    def commit(self, length: cython.size_t) -> cython.void:
        self.tail.end += length
        self.pending += length

    def begin_with_fds(self, fds: tuple) -> cython.void:
        """What is reserved next is the first byte of a message with these descriptors."""
        self.fds += len(fds)
        self.peak_fds = max(self.peak_fds, self.fds)
        if self.tail.start == self.tail.end and not self.tail.full and not self.tail.fds:
            self.tail.fds = fds
            return
        tail = _segment(SEGMENT)
        tail.fds = fds
        self.segments.append(tail)
        self.tail = tail

    def drop_fds(self) -> cython.void:
        """The message that was begun with descriptors is not committed after all."""
        if self.tail.start == self.tail.end:
            self._close(self.tail)

    def add_mapping(
        self,
        data: cython.pointer(uint8_t),
        length: cython.size_t,
        mapped_length: cython.size_t,
    ) -> cython.void:
        """Send `length` bytes at `data` from there, then unmap it."""
        segment: Segment = Segment()
        segment.data = data
        segment.mapped = True
        segment.full = True
        segment.start = 0
        segment.end = length
        segment.capacity = mapped_length
        self.segments.append(segment)
        self.tail = segment
        self.pending += length

    def add_lent(
        self,
        data: cython.pointer(cython.const[uint8_t]),
        length: cython.size_t,
        lender: BulkView,
        area: Area,
    ) -> cython.void:
        """Send `length` bytes at `data` in a peer's bulk area from there, then give them back."""
        segment: Segment = Segment()
        segment.lender = lender
        segment.area = area
        segment.data = cython.cast(cython.pointer(uint8_t), data)
        segment.full = True
        segment.start = 0
        segment.end = segment.capacity = length
        self.segments.append(segment)
        self.tail = segment
        self.pending += length

    def add_piped(self, length: cython.size_t, lender: BulkView, area: Area) -> cython.void:
        """Send `length` bytes out of the peer's carrier, then give its bulk area back."""
        self.add_lent(cython.NULL, length, lender, area)
        self.tail.piped = True

    def _pour(self, fd: cython.int) -> cython.int:
        """Send what is in the pipe, with which the queue begins: as `flush`."""
        sent: cython.Py_ssize_t = self.pipe.pour(fd)
        if sent > 0:
            self._sent(sent)
            return 0
        return 1 if sent == -EAGAIN else -1

    def _fill(self, which: cython.Py_ssize_t) -> cython.void:
        """Get of that segment, which is in a carrier, as much as the pipe takes into that. Nothing of
        it is in there, but what is before it.

        The header is sent, so as many bytes as it says must follow: what the peer has not put into
        the carrier, although it said so, is made up for by zeros."""
        segment: Segment = cython.cast(Segment, self.segments[which])
        length: cython.size_t = segment.end - segment.start
        self.pipe_used = True
        if self.pipe is None:
            self.pipe = make_pipe()
        if self.pipe is None:
            if not self._copy(which):
                self._make_up(which)
        elif self.pipe.fill(segment.area.carrier.fd, length) <= 0:
            self._make_up(which)

    def _copy(self, which: cython.Py_ssize_t) -> cython.bint:
        """There is no pipe: the rest of that segment is sent as others are. False if it is not there."""
        segment: Segment = cython.cast(Segment, self.segments[which])
        length: cython.size_t = segment.end - segment.start
        copied: Segment = _segment(max(length, LARGE_SEGMENT))
        if not segment.area.carrier.take(copied.data, length):
            return False
        copied.end = length
        self._replace(which, copied)
        return True

    def _make_up(self, which: cython.Py_ssize_t) -> cython.void:
        """Zeros for the rest of that segment, which its peer has announced and not sent."""
        segment: Segment = cython.cast(Segment, self.segments[which])
        length: cython.size_t = segment.end - segment.start
        zeros: Segment = _segment(max(length, LARGE_SEGMENT))
        zeros.end = length
        self.cheat = segment.lender
        self._replace(which, zeros)

    def _replace(self, which, other: Segment):
        segment: Segment = self.segments[which]
        other.full = True
        segment.lender.back(segment.area)
        if self.tail is segment:
            self.tail = other
        self.segments[which] = other

    def _together(self, segment: Segment) -> cython.void:
        """Let the first segment, the header of a message whose body is in a carrier, go through the
        pipe with that: the client is woken once."""
        if self.pipe is None:
            self.pipe = make_pipe()
        if self.pipe is not None:
            self.pipe.put(segment.data + segment.start, segment.end - segment.start)
            if self.pipe.inside == segment.end - segment.start:
                self._fill(1)

    def flush(self, fd: cython.int) -> cython.int:
        """Send what the socket takes: 0 all is sent, 1 some is left, -1 the client is gone."""
        vector: iovec[16]
        control: uint8_t[1064]
        header: msghdr
        block: cython.pointer(cmsghdr)
        segment: Segment
        count: cython.size_t
        sent: cython.Py_ssize_t
        wanted: cython.size_t
        self.refused = False
        if self.pending > self.peak:
            self.peak = self.pending
        while self.pending:
            if self.pipe is not None and self.pipe.inside:
                code: cython.int = self._pour(fd)
                if code:
                    return code
                continue
            segment = cython.cast(Segment, self.segments[0])
            if segment.piped:
                self._fill(0)
                continue
            count = 0
            wanted = 0
            memset(cython.address(header), 0, cython.sizeof(msghdr))
            for item in self.segments:
                segment = cython.cast(Segment, item)
                if count == 16 or (count and segment.fds) or segment.piped:
                    break
                vector[count].iov_base = segment.data + segment.start
                vector[count].iov_len = segment.end - segment.start
                wanted += segment.end - segment.start
                count += 1
            first: Segment = cython.cast(Segment, self.segments[0])
            if segment.piped and count == 1 and wanted <= TOGETHER and not first.fds:
                self._together(first)
                if self.pipe is not None and self.pipe.inside:
                    continue
            header.msg_iov = vector
            header.msg_iovlen = count
            if first.fds:
                self._attach(cython.address(header), control, first.fds)
            sent = sendmsg(fd, cython.address(header), MSG_DONTWAIT | MSG_NOSIGNAL)
            if sent < 0:
                if errno == EINTR:
                    continue
                self.refused = errno == ETOOMANYREFS
                return 1 if errno == EAGAIN or self.refused else -1
            self._sent(sent)
            if cython.cast(cython.size_t, sent) < wanted:
                return 1
        return 0

    def _attach(
        self, header: cython.pointer(msghdr), control: cython.pointer(uint8_t), fds: tuple
    ) -> cython.void:
        count: cython.size_t = len(fds)
        numbers: cython.int[253]
        i: cython.size_t
        if count > 253:
            raise ValueError("more than 253 descriptors in one message")
        for i in range(count):
            numbers[i] = fds[i]
        memset(control, 0, 1064)
        header.msg_control = control
        header.msg_controllen = CMSG_SPACE(count * 4)
        block = CMSG_FIRSTHDR(header)
        block.cmsg_level = SOL_SOCKET
        block.cmsg_type = SCM_RIGHTS
        block.cmsg_len = CMSG_LEN(count * 4)
        memcpy(CMSG_DATA(block), numbers, count * 4)

    def _sent(self, sent: cython.size_t) -> cython.void:
        self.pending -= sent
        self.sent += sent
        while True:
            segment: Segment = cython.cast(Segment, self.segments[0])
            if sent and segment.fds:
                self._close(segment)
            here: cython.size_t = segment.end - segment.start
            if sent < here:
                segment.start += sent
                return
            sent -= here
            if len(self.segments) == 1:
                self.messages = 0
                break
            del self.segments[0]
            self._retire(segment)
        if segment.full or segment.capacity > SEGMENT:
            self.tail = _segment(SEGMENT)
            self.segments[0] = self.tail
            self._retire(segment)
        else:
            segment.start = segment.end = 0

    def _large(self, length: cython.size_t) -> Segment:
        """A segment for a message above SEGMENT; the spare one, if it is large enough."""
        segment: Segment = self.spare
        if segment is None or length > segment.capacity:
            if length <= LARGE_SEGMENT:
                return _segment(LARGE_SEGMENT)
            return _segment(max(length, LARGEST_SEGMENT))
        self.spare = None
        return segment

    def _retire(self, segment: Segment) -> cython.void:
        """All of a segment is sent."""
        if segment.lender is not None:
            segment.lender.back(segment.area)
            return
        if segment.full or not LARGE_SEGMENT <= segment.capacity <= LARGEST_SEGMENT:
            return
        if self.spare is None or self.spare.capacity < segment.capacity:
            segment.start = segment.end = 0
            self.spare = segment
            self.spare_used = True

    def take_cheat(self) -> object:
        """Who took back what it had announced, if nobody dealt with it yet."""
        cheat = self.cheat
        self.cheat = None
        return cheat

    def trim(self) -> cython.bint:
        """Give the spare segment and the pipe back if they were not used since the last time; True: one is
        left."""
        if not self.spare_used:
            self.spare = None
        if not self.pipe_used and self.pipe is not None and self.pipe.inside == 0:
            self.pipe = None
        self.spare_used = self.pipe_used = False
        return self.spare is not None or self.pipe is not None

    def close(self) -> None:
        """Close the descriptors that were never sent."""
        for item in self.segments:
            self._close(item)

    def _close(self, segment: Segment):
        self.fds -= len(segment.fds)
        for number in segment.fds:
            os.close(number)
        segment.fds = ()
