from libc.stdint cimport uint8_t, uint32_t

cdef struct Reader:
    const uint8_t *data
    size_t at
    size_t end
    bint swap  # the bytes are in the other order than this machine's
    # NULL, or where each complete type of the signature at hand ends (0: not known yet), by where
    # it begins. Begin with NULL.
    uint8_t *ends

cdef int check(const uint8_t *body, size_t size, const uint8_t *signature,
               size_t signature_length, bint big_endian, uint32_t fds) noexcept nogil
cdef size_t opaque_from(const uint8_t *body, size_t have, size_t size, const uint8_t *signature,
                        size_t signature_length, bint big_endian) noexcept nogil
cdef int check_variant(Reader *reader, int depth) noexcept nogil
cdef tuple strings(const uint8_t *body, size_t size, const uint8_t *signature,
                   size_t signature_length, bint big_endian, int upto, int elements)
cdef int _value(Reader *reader, const uint8_t *signature, int at, int depth) noexcept nogil
cdef int _array(Reader *reader, const uint8_t *signature, int at, int depth) noexcept nogil
