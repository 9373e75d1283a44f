from libc.stdint cimport uint8_t

cdef extern from *:
    """
    #ifndef _GNU_SOURCE
    #define _GNU_SOURCE
    #endif
    #include <fcntl.h>
    #include <poll.h>
    #include <sys/socket.h>
    #include <unistd.h>
    #ifndef SO_PASSRIGHTS
    #if defined(__sparc__)
    #define SO_PASSRIGHTS 0x5c
    #elif defined(__hppa__)
    #define SO_PASSRIGHTS 0x4051
    #else
    #define SO_PASSRIGHTS 83  /* Linux 6.16 */
    #endif
    #endif
    static inline int kbusd_ready(int fd, short events)
    {
        struct pollfd one = {.fd = fd, .events = events};
        return poll(&one, 1, 0) > 0 && (one.revents & events);
    }
    static inline int kbusd_takes_descriptors(int fd)
    {
        int word = 1;
        socklen_t length = sizeof word;
        return getsockopt(fd, SOL_SOCKET, SO_PASSRIGHTS, &word, &length) || word;
    }
    static inline void kbusd_widen(int fd, int size)
    {
        setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &size, sizeof size);
    }
    """
    bint kbusd_ready(int fd, short events)
    bint kbusd_takes_descriptors(int fd)
    void kbusd_widen(int fd, int size)
    short POLLOUT
    int O_NONBLOCK, O_CLOEXEC, F_DUPFD_CLOEXEC, F_SETPIPE_SZ
    unsigned int SPLICE_F_NONBLOCK
    int pipe2(int *fds, int flags)
    ssize_t splice(int source, long long *at, int to, long long *there, size_t length, unsigned int flags)

cdef class PagePipe:
    cdef int read_fd, write_fd
    cdef size_t inside
    cdef bint full(self) noexcept
    cdef ssize_t fill(self, int source, size_t most) noexcept
    cdef ssize_t pour(self, int to) noexcept
    cdef void take(self, uint8_t *to) noexcept
    cdef void put(self, const uint8_t *data, size_t length) noexcept

cdef class Carrier:
    cdef readonly int fd
    cdef void widen(self) noexcept
    cdef bint take(self, uint8_t *to, size_t length) noexcept

cdef PagePipe make_pipe()
cdef bint is_guarded(int fd) noexcept
cdef Carrier make_carrier(int fd)
