from libc.stdint cimport uint8_t

from kbusd.wire.header cimport Header

cdef bint is_hello(const uint8_t *data, Header *header) noexcept nogil
cdef bint say_hello(int line) noexcept nogil
cdef long long granted(int line) noexcept nogil
