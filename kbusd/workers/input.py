# cython: boundscheck=False
"""What a client has sent and we have not handled yet: bytes, and the descriptors beside them.

All of it is hostile. A buffer holds the messages as they came; the body of a large message goes
straight from the socket into the bulk area that its receiver's worker reads, or into a pipe of ours (and from there
to that worker: rings/pagepipe.py), or else by a buffer into a memfd. No memory is taken before the bytes for it have come. Nothing here blocks.
"""

import os

import cython
from cython.cimports.kbusd.rings.bulk import Bulk
from cython.cimports.kbusd.rings.memfd import (
    LARGE_SEALS,
    add_seals,
    create,
    large_map,
    large_unmap,
)
from cython.cimports.kbusd.rings.pagepipe import make_pipe
from cython.cimports.kbusd.wire.header import message_length
from cython.cimports.kbusd.workers.libc import (
    CMSG_DATA,
    CMSG_FIRSTHDR,
    CMSG_LEN,
    CMSG_NXTHDR,
    EAGAIN,
    EINTR,
    MSG_CMSG_CLOEXEC,
    MSG_CTRUNC,
    MSG_DONTWAIT,
    SCM_RIGHTS,
    SOL_SOCKET,
    cmsghdr,
    errno,
    iovec,
    msghdr,
    recvmsg,
    write,
)
from cython.cimports.libc.stdint import uint8_t
from cython.cimports.libc.stdlib import free, malloc
from cython.cimports.libc.string import memcpy, memmove, memset

BUFFER = cython.declare(cython.size_t, 131072)  # of which only the pages that are used exist
# Read of what comes first while large messages are expected: their bodies are then received where
# they are wanted, instead of being copied there.
HEAD_FIRST = cython.declare(cython.size_t, 4096)
MAX_PENDING_FDS = cython.declare(cython.size_t, 1024)
# Written into a memfd from here: that costs half of receiving into fresh pages of a mapping.
CHUNK = cython.declare(cython.size_t, 131072)


@cython.cclass
class Input:
    """The bytes from `start` to `end` of `data` are unread. If `large_need` is not 0, a body of so
    many bytes is being received: `large_have` of it have come. `peak` and `peak_fds` are the most that
    ever waited. `large_next`: the next message is
    probably a large one."""

    def __cinit__(self):
        self.capacity = BUFFER
        self.data = cython.cast(cython.pointer(uint8_t), malloc(BUFFER))
        if self.data == cython.NULL:
            raise MemoryError
        self.start = self.end = 0
        self.fds = []
        self.large = cython.NULL
        self.chunk = cython.NULL
        self.large_need = 0
        self.large_fd = -1
        self.peak = self.peak_fds = 0

    def __dealloc__(self):
        free(self.data)
        free(self.chunk)
        if self.large_fd >= 0:
            large_unmap(self.large, self.large_need)

    def feed(self, data: bytes, fds: list) -> None:
        """Take over what the authentication has read too much."""
        self.make_room(len(data))
        source: cython.p_char = data
        memcpy(self.data + self.end, source, len(data))
        self.end += len(data)
        self.fds.extend(fds)

    def receive(self, fd: cython.int) -> cython.int:
        """One recvmsg(2): 1 something came, 0 nothing now, -1 the client is gone or (`broken`) broke
        a rule of descriptor passing."""
        vector: iovec
        header: msghdr
        control: uint8_t[1064]
        got: cython.Py_ssize_t
        if self.large_need:
            left: cython.size_t = self.large_need - self.large_have
            if self.bulk is not None and self.bulk.piping and left:
                # Descriptors beside these bytes are lost: a message without any has none, and the
                # next one's may not come with the bytes of this.
                got = self.bulk.splice_from(fd, left)
                if got > 0:
                    self.large_have += got
                    self.peak = max(self.peak, self.large_have)
                    return 1
                if got == 0:
                    return -1
                if self.bulk.piping:
                    return 0
            if self.bulk is not None:
                vector.iov_base = cython.cast(cython.p_void, self.large + self.large_have)
                vector.iov_len = left
            else:
                vector.iov_base = self.chunk
                vector.iov_len = left if left < CHUNK else CHUNK
        else:
            if self.start == self.end:
                self.start = self.end = 0
            elif self.end == self.capacity and self.start:
                memmove(self.data, self.data + self.start, self.end - self.start)
                self.end -= self.start
                self.start = 0
            if self.end == self.capacity:
                return 0
            vector.iov_base = self.data + self.end
            vector.iov_len = self.capacity - self.end
            if self.large_next and self.end == 0:
                vector.iov_len = HEAD_FIRST
        memset(cython.address(header), 0, cython.sizeof(msghdr))
        header.msg_iov = cython.address(vector)
        header.msg_iovlen = 1
        header.msg_control = control
        header.msg_controllen = 1064
        got = recvmsg(fd, cython.address(header), MSG_DONTWAIT | MSG_CMSG_CLOEXEC)
        if got < 0:
            return 0 if errno == EAGAIN or errno == EINTR else -1
        if header.msg_controllen and self._take(control, header.msg_controllen) < 0:
            self.broken = True
        if header.msg_flags & MSG_CTRUNC:
            self.broken = True
        if got == 0 or self.broken:
            return -1
        if self.large_need:
            if self.bulk is None:
                self._store(self.chunk, got)
            self.large_have += got
            self.peak = max(self.peak, self.large_have)
        else:
            self.end += got
            self.peak = max(self.peak, self.end - self.start)
        return 1

    def _take(self, control: cython.pointer(uint8_t), length: cython.size_t) -> cython.int:
        header: msghdr
        block: cython.pointer(cmsghdr)
        numbers: cython.pointer(cython.int)
        count: cython.size_t
        i: cython.size_t
        header.msg_control = control
        header.msg_controllen = length
        block = CMSG_FIRSTHDR(cython.address(header))
        while block != cython.NULL:
            if block.cmsg_level == SOL_SOCKET and block.cmsg_type == SCM_RIGHTS:
                count = (block.cmsg_len - CMSG_LEN(0)) // 4
                numbers = cython.cast(cython.pointer(cython.int), CMSG_DATA(block))
                for i in range(count):
                    self.fds.append(numbers[i])
            block = CMSG_NXTHDR(cython.address(header), block)
        count = len(self.fds)
        self.peak_fds = max(self.peak_fds, count)
        return -1 if count > MAX_PENDING_FDS else 0

    def make_room(self, total: cython.size_t) -> cython.void:
        """See to it that a message of `total` bytes fits behind `start`."""
        data: cython.pointer(uint8_t)
        capacity: cython.size_t = self.capacity
        if self.capacity - self.start >= total:
            if self.start == self.end and self.capacity > BUFFER and total <= BUFFER:
                capacity = BUFFER  # a buffer that grew for one message is given back
            else:
                return
        elif total > capacity:
            capacity = total
        data = cython.cast(cython.pointer(uint8_t), malloc(capacity))
        if data == cython.NULL:
            raise MemoryError
        memcpy(data, self.data + self.start, self.end - self.start)
        free(self.data)
        self.data = data
        self.capacity = capacity
        self.end -= self.start
        self.start = 0

    def begin_bulk(
        self, header: cython.size_t, body: cython.size_t, place: cython.pointer(uint8_t), bulk: Bulk
    ) -> cython.void:
        """The message at `start` has `body` bytes behind its header: receive them at `place`, which
        is reserved in `bulk`."""
        have: cython.size_t = self.end - self.start - header
        memcpy(place, self.data + self.start + header, have)
        self.bulk = bulk
        self.large = place
        self._begun(header, body, have)

    def begin_pipe(self) -> cython.void:
        """Let the rest of the body that `begin_bulk` was about come through the pipe, if possible."""
        self.pipe_used = True
        if self.pipe is None:
            self.pipe = make_pipe()
        if self.pipe is not None:
            self.bulk.begin_pipe(self.large_have, self.pipe)

    def trim(self) -> cython.bint:
        """Give back the pipe if it was not used since the last time; True: it is left."""
        if not self.pipe_used and self.bulk is None:
            self.pipe = None
        self.pipe_used = False
        return self.pipe is not None

    def begin_large(self, header: cython.size_t, body: cython.size_t) -> cython.void:
        """The message at `start` has `body` bytes behind its header: receive them into a memfd.

        Raises OSError when there is no descriptor for it."""
        have: cython.size_t = self.end - self.start - header
        fd: cython.int = create(b"kbusd-body", body)
        if fd < 0:
            raise OSError(-fd, os.strerror(-fd))
        self.large_fd = fd
        if self.chunk == cython.NULL:
            self.chunk = cython.cast(cython.pointer(uint8_t), malloc(CHUNK))
            if self.chunk == cython.NULL:
                raise MemoryError
        self._store(self.data + self.start + header, have)
        self._begun(header, body, have)

    def _begun(
        self, header: cython.size_t, body: cython.size_t, have: cython.size_t
    ) -> cython.void:
        self.large_have = have
        self.large_need = body
        self.end = self.start + header

    def _store(self, data: cython.pointer(uint8_t), length: cython.size_t) -> cython.void:
        """Append to the memfd. Raises MemoryError."""
        wrote: cython.Py_ssize_t
        while length:
            wrote = write(self.large_fd, data, length)
            if wrote < 0:
                if errno == EINTR:
                    continue
                raise MemoryError
            data += wrote
            length -= wrote

    def whole(self) -> cython.pointer(cython.const[uint8_t]):
        """The large body, all of which has come; if in a memfd, sealed. Raises MemoryError."""
        if self.large == cython.NULL:
            if add_seals(self.large_fd, LARGE_SEALS) == 0:
                self.large = large_map(self.large_fd, self.large_need)
            if self.large == cython.NULL:
                raise MemoryError
        return self.large

    def end_large(self) -> cython.void:
        """The large body is dealt with; a memfd is still to be taken."""
        if self.large_fd >= 0:
            large_unmap(self.large, self.large_need)
        self.large = cython.NULL
        self.large_need = 0
        self.bulk = None
        free(self.chunk)
        self.chunk = cython.NULL

    def take_large(self) -> int:
        """The sealed body's descriptor, the caller's from now on; -1 if it was in the bulk area."""
        fd = self.large_fd
        self.large_fd = -1
        return fd

    def first_fds(self, count: cython.size_t) -> tuple:
        """The first `count` pending descriptors, which stay pending."""
        return tuple(self.fds[:count])

    def take_fds(self, count: cython.size_t) -> tuple:
        """The first `count` pending descriptors."""
        taken = tuple(self.fds[:count])
        del self.fds[:count]
        return taken

    def pending_fds(self) -> int:
        return len(self.fds)

    def waiting(self) -> int:
        """How many bytes wait, of whole messages and of one that has not come entire."""
        return self.end - self.start + (self.large_have if self.large_need else 0)

    def count(self) -> int:
        """How many whole messages wait. Those in `data` are not checked yet."""
        number: cython.int = 1 if self.large_need and self.large_have == self.large_need else 0
        at: cython.size_t = self.start
        if self.large_need:
            return number
        while self.end - at >= 16:
            total: cython.longlong = message_length(self.data + at)
            if total < 0 or cython.cast(cython.size_t, total) > self.end - at:
                break
            at += total
            number += 1
        return number

    def close(self) -> None:
        """Close what was never taken."""
        for fd in self.fds:
            os.close(fd)
        self.fds.clear()
        if self.large_fd >= 0:
            os.close(self.large_fd)
            self.large_fd = -1
