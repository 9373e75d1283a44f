cdef extern from "<sys/socket.h>" nogil:
    struct msghdr:
        pass
    enum: MSG_DONTWAIT, MSG_NOSIGNAL, SHUT_RDWR
    ssize_t send(int fd, const void *data, size_t size, int flags) noexcept
    ssize_t recv(int fd, void *to, size_t size, int flags) noexcept
    int shutdown(int fd, int how) noexcept

cdef extern from * nogil:
    """
    #include <sys/socket.h>
    /* How many of `size` bytes could be received now; `gifts`: whether descriptors are with them. */
    static inline ssize_t kbusd_look(int fd, void *to, size_t size, int *gifts)
    {
        struct iovec part = {.iov_base = to, .iov_len = size};
        struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};
        ssize_t found = recvmsg(fd, &message, MSG_PEEK | MSG_DONTWAIT);
        *gifts = found > 0 && (message.msg_flags & MSG_CTRUNC);
        return found;
    }
    """
    ssize_t kbusd_look(int fd, void *to, size_t size, int *gifts) noexcept

cdef enum Heard:
    RUNG
    OVER    # nobody will ring any more
    GIFTS   # descriptors are with what comes next: it stays where it is

cdef void ring_doorbell(int bell) noexcept
cdef Heard hear(int bell) noexcept
