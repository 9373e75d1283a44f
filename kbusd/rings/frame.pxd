# The head of a frame: native byte order, 8-aligned, then envelope, body and padding to 8 bytes.
# A reader copies the head out of shared memory before it looks at any field.
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

cdef enum:
    MESSAGE = 1  # a D-Bus message; `aux` != 0: a copy from the Broadcast, which ends there at `aux`
    LOG = 2      # a control-log entry
    MARK = 3     # `aux`: the Broadcast position to read on from; STOP: stop reading the Broadcast
    LARGE = 4    # a D-Bus message whose body is in a sealed memfd on the side socket
    COPY = 5     # of a D-Bus message, for a monitor; `aux`: its true sender
    BULK = 7     # a D-Bus message whose body is in the bulk area; `aux`: where, see bulk.py
    PARCEL = 9   # a kdbus message (kdbus/parcel.py) for another kdbus client; `serial`: wants an ACK
    SPENT = 11   # `reply_serial`: policy has refused the answer to this call, and nobody else may answer it
    ACK = 10     # `reply_serial`: that parcel is in the pool, or (`aux`) its errno; 0: a call is dropped

cdef struct FrameHead:
    uint32_t length           # of the frame with head and padding
    uint8_t kind
    uint8_t flags             # of the D-Bus message
    uint16_t fds              # descriptors that come by the side socket
    uint64_t stamp            # hybrid logical clock, ns; rises from frame to frame of a sender
    uint32_t serial
    uint32_t reply_serial
    uint32_t envelope_length  # bytes right behind the head
    uint32_t body_length      # bytes behind the envelope
    uint64_t aux

cdef enum:
    HEAD = 40  # sizeof(FrameHead)

cdef extern from *:
    """
    #define STOP UINT64_MAX
    """
    const uint64_t STOP  # no position

cdef inline size_t frame_length(size_t envelope, size_t body) noexcept nogil:
    """Bytes that a frame takes in a ring."""
    return (HEAD + envelope + body + 7) & ~<size_t>7

cdef inline bint sound(const FrameHead *head, uint64_t available) noexcept nogil:
    """Whether a head that was copied out fits in `available` bytes, and its parts in the frame."""
    return (
        head.kind != 0
        and head.length & 7 == 0
        and head.length >= HEAD
        and head.length <= available
        and <uint64_t>HEAD + head.envelope_length + head.body_length <= head.length
    )
