from libc.stdint cimport uint8_t, uint32_t

from kbusd.rings.bulk cimport BulkView
from kbusd.rings.frame cimport FrameHead
from kbusd.wire.header cimport Header
from kbusd.workers.decisions cimport Template
from kbusd.workers.engine cimport Engine
from kbusd.workers.input cimport Input
from kbusd.workers.output cimport Output

cdef class DBusSocket(Engine):
    cdef Input input
    cdef Output output
    cdef object shares
    cdef bint reading, writing, widened
    cdef bint begun
    cdef uint32_t hello_serial  # of a Hello that was asked for early
    cdef bint put_off  # that Hello is still to be passed on
    cdef bytes draft  # what is to be told if it is granted, with the id `next_id`
    cdef bytes told   # what was told early, and is not said once more
    cdef size_t max_message, max_outgoing, max_outgoing_fds, uncounted, fd_cost
    cdef uint32_t max_fds
    cdef void _begin(self) except *
    cdef void _ask_early(self) except *
    cdef bint _receive(self) except -1
    cdef void _stay(self) except *
    cdef void _messages(self) except *
    cdef bint _begin_large(self, uint8_t *data, size_t total, size_t have) except -1
    cdef void _try_pipe(self, uint8_t *data, Header *header, uint8_t *place) except *
    cdef bint _message(self, uint8_t *data, size_t size, bint large) except -1
    cdef void _emit(self, Template template, FrameHead *head, const uint8_t *body, tuple fds, BulkView view) except *
    cdef void _widen(self) noexcept
    cdef bint _crowded(self) noexcept
    cdef bint _over_the_limit(self) except -1
