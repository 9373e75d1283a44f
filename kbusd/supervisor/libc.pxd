# What a device server calls in libc that Python does not offer, or not fast enough.
from libc.stdint cimport uint32_t, uint64_t
from posix.types cimport off_t

cdef extern from "<errno.h>" nogil:
    int errno
    enum: EAGAIN, ECONNRESET, EINTR, ESHUTDOWN

cdef extern from "<time.h>" nogil:
    struct timespec:
        long tv_sec
        long tv_nsec
    enum: CLOCK_MONOTONIC
    int clock_gettime(int clock, timespec *time)
    int nanosleep(const timespec *time, timespec *left)

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

cdef extern from "<poll.h>" nogil:
    enum: POLLIN

cdef extern from "<sys/socket.h>" nogil:
    struct msghdr:
        iovec *msg_iov
        size_t msg_iovlen
        void *msg_control
        size_t msg_controllen
        int msg_flags
    struct cmsghdr:
        size_t cmsg_len
        int cmsg_level
        int cmsg_type
    enum: MSG_CMSG_CLOEXEC, MSG_CTRUNC, MSG_DONTWAIT, MSG_NOSIGNAL, MSG_PEEK, MSG_TRUNC
    enum: SOL_SOCKET, SCM_RIGHTS
    ssize_t recv(int fd, void *data, size_t size, int flags)
    ssize_t recvmsg(int fd, msghdr *message, int flags)
    ssize_t send(int fd, const void *data, size_t size, int flags)
    cmsghdr *CMSG_FIRSTHDR(msghdr *message)
    cmsghdr *CMSG_NXTHDR(msghdr *message, cmsghdr *after)
    unsigned char *CMSG_DATA(cmsghdr *head)
    size_t CMSG_LEN(size_t size)

cdef extern from "<unistd.h>" nogil:
    int close(int fd)
    ssize_t pread(int fd, void *buffer, size_t size, off_t at)
    ssize_t read(int fd, void *buffer, size_t size)
    ssize_t write(int fd, const void *data, size_t size)

cdef extern from "<endian.h>" nogil:
    uint32_t htobe32(uint32_t value)
    uint64_t htobe64(uint64_t value)

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
    ssize_t writev(int fd, const iovec *parts, int count) nogil
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
