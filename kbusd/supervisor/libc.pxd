# What a device server calls in libc that Python does not offer, or not fast enough.
from libc.stdint cimport uint32_t, uint64_t

cdef extern from "<errno.h>" nogil:
    int errno
    enum: EINTR

cdef extern from "<time.h>" nogil:
    struct timespec:
        long tv_sec
        long tv_nsec
    enum: CLOCK_MONOTONIC
    int clock_gettime(int clock, timespec *time)

cdef extern from "<sched.h>" nogil:
    int sched_yield()

cdef extern from "<sys/epoll.h>" nogil:
    ctypedef union epoll_data_t:
        int fd
        uint64_t u64
    struct epoll_event:
        uint32_t events
        epoll_data_t data
    int epoll_wait(int epoll, epoll_event *events, int count, int timeout)

cdef extern from *:
    """
    #define _GNU_SOURCE 1
    #include <fcntl.h>
    #include <stdint.h>
    #include <string.h>
    #include <sys/mount.h>
    #include <sys/stat.h>
    #include <sys/syscall.h>
    #include <sys/uio.h>
    #include <unistd.h>
    #ifndef SYS_pidfd_getfd
    #define SYS_pidfd_getfd 438
    #endif
    """
    struct iovec:
        void *iov_base
        size_t iov_len
    struct statx_t "statx":
        uint32_t stx_dev_major
        uint32_t stx_dev_minor
        uint32_t stx_rdev_major
        uint32_t stx_rdev_minor
    long SYS_pidfd_getfd
    int AT_EMPTY_PATH, AT_STATX_DONT_SYNC
    ssize_t process_vm_readv(
        int pid, const iovec *ours, unsigned long n, const iovec *theirs, unsigned long m,
        unsigned long flags
    ) nogil
    ssize_t process_vm_writev(
        int pid, const iovec *ours, unsigned long n, const iovec *theirs, unsigned long m,
        unsigned long flags
    ) nogil
    int mount(
        const char *source, const char *target, const char *kind, unsigned long flags,
        const void *data
    ) nogil
    int umount2(const char *target, int flags) nogil
    int statx(int fd, const char *path, int flags, unsigned int mask, statx_t *buffer) nogil
    long syscall(long number, ...) nogil
