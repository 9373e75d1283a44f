from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from kbusd.cuse.routing cimport IoctlIn, OutHeader, Route
from kbusd.rings.promises cimport Promises
from kbusd.supervisor.aside cimport Aside
from kbusd.supervisor.libc cimport iovec

# Answers and notifications (linux/fuse.h: fuse_poll_out, fuse_notify_poll_wakeup_out, fuse_notify_store_out).
cdef struct PollOut:
    OutHeader head
    uint32_t events
    uint32_t padding

cdef struct Wake:
    OutHeader head
    uint64_t kernel_handle

cdef struct Store:
    OutHeader head
    uint64_t node
    uint64_t offset
    uint32_t size
    uint32_t padding

# A record of a line, in msgpack (entries.py), as far as it has been read.
cdef struct Reader:
    const uint8_t *data
    size_t at
    size_t size

cdef class Room:
    cdef bytearray bytes
    cdef uint8_t *data

cdef class Wish:
    cdef int count
    cdef size_t at_argument
    cdef uint64_t addresses[8]
    cdef size_t sizes[8]

cdef class End:
    cdef public object line, lock
    cdef public object late  # called with it when a message waits for it
    cdef public dict ahead  # Wishes, by command
    cdef public Promises promises  # its worker's; None: it can't make any
    cdef public int64_t uid
    cdef public uint64_t node
    cdef public uint64_t kernel_handle  # of who is to be woken; 0: nobody
    cdef public int64_t events_at
    cdef public int fd  # of the line; -1: it is closed
    cdef public int pool
    cdef public int why  # what requests get when it is gone
    cdef public int owed  # answers to requests that were interrupted, which are nobody's
    cdef public bint gone, released
    cdef bint send(self, Room room, size_t size) except -1
    cdef int readable(self) noexcept

cdef class Relay:
    cdef public int fuse
    cdef public str where
    cdef public dict files  # by handle, which is the worker's number
    cdef public dict held  # who holds a request, None for us, and its head, or all of it
    cdef public dict copying  # requests at whose caller a thread is at work, and that were not taken back
    cdef public object closings
    cdef Aside aside
    cdef bint _postponed(self, Room room, size_t size) except -1
    cdef int _deal(self, Room room, size_t size) except -1
    cdef int _ask(self, End end, Room room, Route *route, Wish wish, IoctlIn *ioctl) except -1
    cdef bint _promised(self, End end, Room room, uint64_t unique, IoctlIn *ioctl,
                        const uint8_t *struct, size_t size) except -1
    cdef size_t _look(self, End end, Room room, size_t size, int thread, Wish wish,
                      uint64_t argument) except 0
    cdef object _hear(self, End end, Room room)
    cdef _taken(self, End end)
    cdef bint _heard(self, End end, Room room, size_t size) except -1
    cdef int _answered(self, End end, const uint8_t *reply, size_t length) except -1
    cdef int _push(self, End end, Room room, uint64_t offset, uint64_t size) except -1
    cdef bint _write(self, const void *data, size_t size) noexcept
    cpdef wake(self, End end)
