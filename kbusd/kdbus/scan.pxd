from libc.stdint cimport uint64_t

cpdef scan(bytes data, uint64_t sender)
