# What confinement calls in libc: prctl(2), capget(2), unshare(2), syscall(2) for Landlock; and
# getsockopt(2).
from libc.stdint cimport int32_t, uint32_t, uint64_t

cdef extern from "<errno.h>" nogil:
    int errno
    int ERANGE
    int ENOENT
    int ESRCH

cdef extern from "<fcntl.h>" nogil:
    int O_RDONLY
    int O_CLOEXEC
    int open(const char *path, int flags, ...)

cdef extern from "<unistd.h>" nogil:
    ssize_t read(int fd, void *buffer, size_t size)
    int close(int fd)
    long syscall(long number, ...)

cdef extern from "<sys/prctl.h>" nogil:
    int prctl(int option, ...)

cdef extern from "<sys/syscall.h>" nogil:
    long SYS_seccomp
    long SYS_accept4

cdef extern from "<sys/socket.h>" nogil:
    int SOL_SOCKET
    int SOCK_CLOEXEC
    int SOCK_NONBLOCK
    int getsockopt(int fd, int level, int option, void *value, unsigned int *size)

cdef extern from *:
    """
    #include <stdint.h>
    #include <malloc.h>
    static int kbusd_one_heap(void) {
    #ifdef M_ARENA_MAX
        return mallopt(M_ARENA_MAX, 1);
    #else
        return 1; /* musl has one */
    #endif
    }
    /* glibc and musl have these, but declare them in no header, or under _GNU_SOURCE. */
    int capget(void *header, void *data);
    int capset(void *header, void *data);
    int unshare(int flags);
    struct kbusd_capability_header { uint32_t version; int pid; };
    struct kbusd_capability_data { uint32_t effective, permitted, inheritable; };
    struct kbusd_filter { unsigned short length; const void *filter; };
    struct kbusd_ruleset { uint64_t files, network, scopes; };
    struct kbusd_path_beneath { uint64_t access; int32_t parent; } __attribute__((packed));
    """
    int one_heap "kbusd_one_heap"()
    int capget(void *header, void *data) nogil
    int capset(void *header, void *data) nogil
    int unshare(int flags) nogil

    # struct __user_cap_header_struct, __user_cap_data_struct (capget(2))
    struct capability_header "kbusd_capability_header":
        uint32_t version
        int pid
    struct capability_data "kbusd_capability_data":
        uint32_t effective
        uint32_t permitted
        uint32_t inheritable
    # struct sock_fprog (linux/filter.h)
    struct sock_fprog "kbusd_filter":
        unsigned short length
        const void *filter
    # struct landlock_ruleset_attr (linux/landlock.h); older kernels know a part of it
    struct landlock_ruleset "kbusd_ruleset":
        uint64_t files
        uint64_t network
        uint64_t scopes
    # struct landlock_path_beneath_attr
    struct landlock_path_beneath "kbusd_path_beneath":
        uint64_t access
        int32_t parent
