from libc.stdint cimport uint8_t, uint32_t

# What a message or a name can break. Functions return 0, or one of these negated.
cdef enum:
    WRONG_BYTE_ORDER = 1
    WRONG_TYPE
    WRONG_VERSION
    WRONG_FIELDS_LENGTH
    WRONG_MESSAGE_LENGTH
    WRONG_SERIAL
    TRUNCATED
    PADDING_NOT_ZERO
    FIELD_CODE_ZERO
    FIELD_TWICE
    FIELD_TYPE
    FIELD_PAST_END
    REPLY_SERIAL_ZERO
    LOCAL_PATH
    LOCAL_INTERFACE
    BAD_PATH
    BAD_INTERFACE
    BAD_MEMBER
    BAD_ERROR_NAME
    BAD_DESTINATION
    BAD_SENDER
    MISSING_PATH
    MISSING_INTERFACE
    MISSING_MEMBER
    MISSING_ERROR_NAME
    MISSING_REPLY_SERIAL
    BODY_WITHOUT_SIGNATURE
    BODY_TOO_SHORT
    BODY_TOO_LONG
    BAD_BOOLEAN
    BAD_UTF8
    STRING_NOT_TERMINATED
    STRING_PAST_END
    ARRAY_TOO_LONG
    ARRAY_LENGTH
    NESTED_TOO_DEEPLY
    BAD_VARIANT_SIGNATURE
    SIGNATURE_TOO_LONG
    SIGNATURE_UNKNOWN_TYPE
    SIGNATURE_ARRAYS
    SIGNATURE_STRUCTS
    SIGNATURE_ARRAY_ELEMENT
    SIGNATURE_STRUCT_EMPTY
    SIGNATURE_STRUCT_OPEN
    SIGNATURE_STRUCT_CLOSED
    SIGNATURE_DICT_PLACE
    SIGNATURE_DICT_KEY
    SIGNATURE_DICT_FIELDS

# Alignment in bytes of the type with this code letter (1, 2, 4, 8), 0 for no type; size of a fixed
# one, else 0.
cdef uint8_t[256] ALIGNMENT
cdef uint8_t[256] FIXED_SIZE

cdef bint valid_path(const uint8_t *text, size_t size) noexcept nogil
cdef bint valid_interface(const uint8_t *text, size_t size) noexcept nogil
cdef bint valid_member(const uint8_t *text, size_t size) noexcept nogil
cdef bint valid_error_name(const uint8_t *text, size_t size) noexcept nogil
cdef bint valid_bus_name(const uint8_t *text, size_t size) noexcept nogil
cdef bint valid_utf8(const uint8_t *text, size_t size) noexcept nogil
cdef int check_signature(const uint8_t *text, size_t size) noexcept nogil
cpdef str reason(int code)
