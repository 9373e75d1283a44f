# What the workers' hot path calls in libc (recvmsg(2), sendmsg(2), epoll_wait(2), mmap(2)).
from libc.stdint cimport uint32_t, uint64_t

cdef extern from "<sys/uio.h>" nogil:
    cdef struct iovec:
        void *iov_base
        size_t iov_len

cdef extern from "<sys/socket.h>" nogil:
    cdef struct msghdr:
        void *msg_name
        unsigned int msg_namelen
        iovec *msg_iov
        size_t msg_iovlen
        void *msg_control
        size_t msg_controllen
        int msg_flags
    cdef struct cmsghdr:
        size_t cmsg_len
        int cmsg_level
        int cmsg_type
    enum: SOL_SOCKET
    enum: SCM_RIGHTS
    enum: MSG_DONTWAIT
    enum: MSG_NOSIGNAL
    enum: MSG_CMSG_CLOEXEC
    enum: MSG_CTRUNC
    enum: MSG_PEEK
    enum: MSG_TRUNC
    enum: SO_SNDBUF
    int setsockopt(int fd, int level, int name, const void *value, unsigned int length)
    ssize_t recvmsg(int fd, msghdr *message, int flags)
    ssize_t sendmsg(int fd, const msghdr *message, int flags)
    cmsghdr *CMSG_FIRSTHDR(msghdr *message)
    cmsghdr *CMSG_NXTHDR(msghdr *message, cmsghdr *previous)
    unsigned char *CMSG_DATA(cmsghdr *control)
    size_t CMSG_SPACE(size_t length)
    size_t CMSG_LEN(size_t length)

cdef extern from "<sys/epoll.h>" nogil:
    ctypedef union epoll_data_t:
        int fd
        uint32_t u32
        uint64_t u64
    cdef struct epoll_event:
        uint32_t events
        epoll_data_t data
    enum: EPOLLIN
    enum: EPOLLOUT
    enum: EPOLLHUP
    enum: EPOLLERR
    enum: EPOLL_CTL_ADD
    enum: EPOLL_CTL_MOD
    enum: EPOLL_CTL_DEL
    enum: EPOLL_CLOEXEC
    int epoll_create1(int flags)
    int epoll_ctl(int epfd, int op, int fd, epoll_event *event)
    int epoll_wait(int epfd, epoll_event *events, int maxevents, int timeout)

cdef extern from "<sys/mman.h>" nogil:
    void *mmap(void *addr, size_t length, int prot, int flags, int fd, long offset)
    int munmap(void *addr, size_t length)
    enum: PROT_READ
    enum: PROT_WRITE
    enum: MAP_SHARED
    enum: MAP_PRIVATE
    enum: MAP_ANONYMOUS
    void *MAP_FAILED

cdef extern from "<errno.h>" nogil:
    int errno
    enum: EAGAIN
    enum: EINTR
    enum: ETOOMANYREFS

cdef extern from "<unistd.h>" nogil:
    int close(int fd)
    ssize_t write(int fd, const void *data, size_t size)

cdef extern from "<string.h>" nogil:
    char *strerror(int errnum)

cdef extern from "<sched.h>" nogil:
    int sched_yield()

cdef extern from *:
    """
    #include <malloc.h>
    static inline void give_back(void)
    {
    #ifdef __GLIBC__
        malloc_trim(0);
    #endif
    }
    """
    # The C library keeps what was freed below anything that is in use; other libraries keep less.
    void give_back() nogil
