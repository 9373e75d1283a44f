cdef void ring_doorbell(int write_fd) noexcept

cdef class Doorbell:
    cdef readonly int read_fd, write_fd
    cdef void drain(self) noexcept
