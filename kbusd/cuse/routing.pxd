from libc.stdint cimport uint8_t, uint32_t, uint64_t

# What the kernel writes and wants (linux/fuse.h), as far as the supervisor looks at it.
cdef struct InHeader:
    uint32_t length
    uint32_t opcode
    uint64_t unique
    uint64_t node
    uint32_t uid
    uint32_t gid
    uint32_t thread
    uint32_t more

cdef struct IoctlIn:
    uint64_t handle
    uint32_t flags
    uint32_t command
    uint64_t argument
    uint32_t in_size
    uint32_t out_size

cdef struct PollIn:
    uint64_t handle
    uint64_t kernel_handle
    uint32_t flags
    uint32_t events

cdef struct OutHeader:
    uint32_t length
    int error
    uint64_t unique

cdef struct Route:
    InHeader head
    uint64_t number

cdef int find(const uint8_t *request, size_t size, Route *found) except -1
