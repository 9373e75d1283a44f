# What the rings call in libc: memfd_create(2), fcntl(2), mmap(2), pipe(2), clock_gettime(2).
from libc.stdint cimport int64_t, uint64_t

cdef extern from *:
    """
    #ifndef _GNU_SOURCE
    #define _GNU_SOURCE
    #endif
    #include <errno.h>
    #include <fcntl.h>
    #include <sys/mman.h>
    #include <sys/stat.h>
    #include <sys/uio.h>
    #include <time.h>
    #include <unistd.h>
    #ifndef MFD_NOEXEC_SEAL
    #define MFD_NOEXEC_SEAL 0x0008U  /* Linux 6.3 */
    #endif
    #ifndef F_SEAL_FUTURE_WRITE
    #define F_SEAL_FUTURE_WRITE 0x0010  /* Linux 5.1 */
    #endif
    """
    int errno
    enum: EAGAIN, EBUSY, EINTR, EINVAL, EOPNOTSUPP, ENOSYS
    unsigned int MFD_CLOEXEC, MFD_ALLOW_SEALING, MFD_NOEXEC_SEAL
    int F_ADD_SEALS, F_GET_SEALS
    int F_SEAL_SEAL, F_SEAL_SHRINK, F_SEAL_GROW, F_SEAL_WRITE, F_SEAL_FUTURE_WRITE
    int PROT_NONE, PROT_READ, PROT_WRITE
    int MAP_SHARED, MAP_PRIVATE, MAP_FIXED, MAP_ANONYMOUS, MAP_NORESERVE
    void *MAP_FAILED
    int _SC_PAGESIZE
    enum: CLOCK_MONOTONIC
    struct stat_t "stat":
        int64_t st_size
    struct timespec:
        long tv_sec
        long tv_nsec
    struct iovec:
        void *iov_base
        size_t iov_len

cdef extern from * nogil:
    int memfd_create(const char *name, unsigned int flags) noexcept
    int ftruncate(int fd, int64_t length) noexcept
    int fstat(int fd, stat_t *to) noexcept
    int fcntl(int fd, int command, ...) noexcept
    int close(int fd) noexcept
    ssize_t read(int fd, void *to, size_t size) noexcept
    ssize_t write(int fd, const void *data, size_t size) noexcept
    void *mmap(void *where, size_t length, int protection, int flags, int fd, int64_t offset) noexcept
    int munmap(void *where, size_t length) noexcept
    long sysconf(int name) noexcept
    int clock_gettime(int clock, timespec *to) noexcept
