from libc.stdint cimport uint8_t

cdef extern from "<fcntl.h>" nogil:
    """
    #ifndef _GNU_SOURCE
    #define _GNU_SOURCE
    #endif
    #include <fcntl.h>
    #include <poll.h>
    #include <sys/stat.h>
    #include <unistd.h>
    static inline int kbusd_is_pipe(int fd)
    {
        struct stat facts;
        return fstat(fd, &facts) == 0 && S_ISFIFO(facts.st_mode);
    }
    static inline int kbusd_ready(int fd, short events)
    {
        struct pollfd one = {.fd = fd, .events = events};
        return poll(&one, 1, 0) > 0 && (one.revents & events);
    }
    """
    int kbusd_is_pipe(int fd)
    bint kbusd_ready(int fd, short events)
    short POLLIN, POLLOUT
    int O_NONBLOCK, O_CLOEXEC, F_GETFL, F_SETPIPE_SZ
    unsigned int SPLICE_F_NONBLOCK
    int pipe2(int *fds, int flags)
    ssize_t splice(int source, long long *at, int to, long long *there, size_t length, unsigned int flags)

cdef class PagePipe:
    cdef readonly int read_fd, write_fd
    cdef bint empty(self) noexcept
    cdef bint full(self) noexcept
    cdef ssize_t fill(self, int source, size_t most) noexcept
    cdef ssize_t pour(self, int to, size_t most) noexcept
    cdef bint take(self, uint8_t *to, size_t length) noexcept

cdef PagePipe make_pipe()
cdef PagePipe adopt(int fd)
