from libc.stdint cimport int64_t, uint8_t, uint32_t

# What callers of this module need beside it, under one roof.
from kbusd.wire.validate cimport (
    valid_bus_name, valid_error_name, valid_interface, valid_member, valid_path, valid_utf8,
)

cdef struct Header:
    uint8_t endian  # ord('l') or ord('B')
    uint8_t type
    uint8_t flags
    uint32_t serial
    uint32_t reply_serial
    uint32_t body_length
    uint32_t fields_length
    uint32_t header_length  # 16 + fields_length, padded to 8
    uint32_t unix_fds
    uint32_t fields_seen  # bit n: field code n (1..9) is there; bit 0: unknown fields are
    # Where the text of each field stands, from the start of the message, without its NUL; 0, 0
    # where the field is absent.
    uint32_t path_at, path_len
    uint32_t interface_at, interface_len
    uint32_t member_at, member_len
    uint32_t error_at, error_len
    uint32_t destination_at, destination_len
    uint32_t sender_at, sender_len
    uint32_t signature_at, signature_len
    uint32_t reply_serial_at  # of its 4 value bytes; 0 where absent

cdef int64_t message_length(const uint8_t *first16) noexcept nogil
cdef int scan(const uint8_t *data, size_t size, Header *out) noexcept nogil
cpdef str reason(int code)
