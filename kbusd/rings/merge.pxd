from libc.stdint cimport int64_t, uint8_t, uint64_t

from kbusd.rings.clock cimport Clock
from kbusd.rings.frame cimport FrameHead

cdef struct Stream:
    const uint64_t *head_at
    uint64_t position
    uint64_t seen       # the head in the first scan
    uint64_t newer      # the head in the second
    uint64_t last       # stamp of the last frame delivered

cdef struct Source:
    void *reader        # what add was given
    void *ring          # RingReader, or NULL for the log
    void *cast          # BroadcastReader, or NULL
    void *held          # CatchUp, or NULL until it was overrun once
    Stream unicast
    Stream broadcast
    int state
    int turn            # where its next frame comes from
    uint64_t stamp      # of its next frame
    int doorbell        # the producer's, or -1
    int slot            # where its Broadcast position is published, or -1
    bint distrusted     # its budget is spent: what it publishes now does not hold up others
    bint bad
    bint overdrawn      # its budget ran out and is not half full again
    bint excluded       # its next frame has to wait for others
    bint waits          # frames wait at the producer; as of the first scan
    bint waits_newer    # the same as of the second
    bint unpublished
    int64_t budget      # ns that it may still make us wait; below 0: it has done so for longer
    uint64_t refilled   # when the budget was last topped up

cdef class Merge:
    cdef Clock clock
    cdef Source *table
    cdef int *ready
    cdef int sources, room, count, current
    cdef size_t length
    cdef uint64_t aux, cut, blocked
    cdef uint64_t begun, begun_next  # the two lowest stamps at which peers have begun something
    cdef int beginner   # whose the lowest is
    cdef int64_t patience
    cdef bint again, lowered
    cdef readonly bint holding
    cdef uint8_t *buffer
    cdef size_t capacity
    cdef list readers, broken
    cdef object kept
    cdef int gather(self) except -1
    cdef object next(self, FrameHead *head, const uint8_t **payload)
    cdef int publish(self) except -1
    cdef bint pending(self) except -1
    cdef uint64_t _promised(self, Source *source) except 0
    cdef void _has_begun(self, int i, uint64_t stamp) noexcept
    cdef bint _holds(self, Source *source) except -1
    cdef list take_broken(self)
    cdef void _grow(self) except *
    cdef int _index(self, object reader) except -2
    cdef void _break(self, Source *source, int code) except *
    cdef void _settle(self) except *
    cdef int _scan(self, Source *source) except -1
    cdef int _overrun(self, Source *source) except -1
    cdef int _catch_up(self, Source *source) except -1
    cdef int _mark(self, Source *source, uint64_t aux) except -1
    cdef void _skip(self, Source *source, size_t length) noexcept
    cdef bint _first(self, Source *source) except -1
    cdef bint _ahead(self, Source *source, uint64_t aux) except -1
    cdef int _first_copy(self, Source *source, uint64_t *stamp) except -1
    cdef int _first_unicast(self, Source *source, uint64_t *stamp) except -1
    cdef bint _wait_for(self, Source *source) noexcept
    cdef void _publish_one(self, Source *source) except *
    cdef int _take(self, Source *source, FrameHead *head, const uint8_t **payload) except -9
