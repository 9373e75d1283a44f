# cython: boundscheck=False
"""What a client that says Hello waits for, told to the other side before Python has thought it through.

On cold caches it is Python that a new client waits for, so the usual Hello is known by its bytes: the broker
is asked for it at once, and what it grants is told to the client at once. All that is otherwise done for
these two is done afterwards, as for a Hello that is not known here, and finds said what it was about to
say. No rule is only here: what could be refused, or is anybody else's to see, is not early.
"""

import cython
import msgspec
from cython.cimports.kbusd.wire.header import Header
from cython.cimports.kbusd.workers.libc import (
    MSG_CTRUNC,
    MSG_DONTWAIT,
    MSG_NOSIGNAL,
    MSG_PEEK,
    iovec,
    msghdr,
    recvmsg,
    sendmsg,
)
from cython.cimports.libc.stdint import uint8_t
from cython.cimports.libc.string import memcmp, memset

from kbusd.rings import entries

CALL = cython.declare(cython.int, 1)
# Fields 1, 2, 3 and 6, and no other: path, interface, member, destination.
FIELDS = cython.declare(cython.uint, 0b1001110)
PATH = cython.declare(cython.p_char, b"/org/freedesktop/DBus")
NAME = cython.declare(cython.p_char, b"org.freedesktop.DBus")
MEMBER = cython.declare(cython.p_char, b"Hello")

_asked: bytes = msgspec.msgpack.encode(entries.Hello(1))
_granted: bytes = msgspec.msgpack.encode(entries.Reply(1, 0))[
    :-2
]  # up to the id, which a stamp follows
ASKED = cython.declare(cython.p_char, _asked)
ASKED_LENGTH = cython.declare(cython.size_t, len(_asked))
GRANTED = cython.declare(cython.p_char, _granted)
GRANTED_LENGTH = cython.declare(cython.size_t, len(_granted))


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _is(
    data: cython.pointer(cython.const[uint8_t]),
    length: cython.size_t,
    text: cython.p_char,
    text_length: cython.size_t,
) -> cython.bint:
    return length == text_length and memcmp(data, text, length) == 0


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def is_hello(
    data: cython.pointer(cython.const[uint8_t]), header: cython.pointer(Header)
) -> cython.bint:
    """Whether a message, whose header was scanned, is Hello as nearly every client says it."""
    return (
        header.type == CALL
        and header.flags == 0
        and header.body_length == 0
        and header.fields_seen == FIELDS
        and _is(data + header.path_at, header.path_len, PATH, 21)
        and _is(data + header.interface_at, header.interface_len, NAME, 20)
        and _is(data + header.member_at, header.member_len, MEMBER, 5)
        and _is(data + header.destination_at, header.destination_len, NAME, 20)
    )


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def say_hello(line: cython.int) -> cython.bint:
    """Ask the broker for it, as the first request on this line; False if it takes nothing now."""
    vector: iovec
    header: msghdr
    vector.iov_base = ASKED
    vector.iov_len = ASKED_LENGTH
    memset(cython.address(header), 0, cython.sizeof(msghdr))
    header.msg_iov = cython.address(vector)
    header.msg_iovlen = 1
    return sendmsg(line, cython.address(header), MSG_DONTWAIT | MSG_NOSIGNAL) > 0


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def granted(line: cython.int) -> cython.longlong:
    """The id that the broker gives us, if that is what it says next and there is nothing with it; else 0.
    It stays to be received."""
    vector: iovec
    header: msghdr
    data: uint8_t[32]
    size: cython.Py_ssize_t
    at: cython.size_t = GRANTED_LENGTH
    count: cython.size_t = 0
    id: cython.longlong = 0
    vector.iov_base = data
    vector.iov_len = 32
    memset(cython.address(header), 0, cython.sizeof(msghdr))
    header.msg_iov = cython.address(vector)
    header.msg_iovlen = 1
    size = recvmsg(line, cython.address(header), MSG_DONTWAIT | MSG_PEEK)
    # Descriptors beside it, for which there is no room here, are said to be cut off.
    if (
        size < cython.cast(cython.Py_ssize_t, at) + 2
        or size == 32
        or header.msg_flags & MSG_CTRUNC
        or memcmp(data, GRANTED, at)
    ):
        return 0
    if data[at] < 128:
        id = data[at]
    elif 0xCC <= data[at] <= 0xCE:  # one, two or four bytes follow
        count = 1 << (data[at] - 0xCC)
    at += 1
    if cython.cast(cython.size_t, size) != at + count + 1 or data[at + count] != 0:
        return 0  # it has a stamp, or is something else
    while count:
        id = id << 8 | data[at]
        at += 1
        count -= 1
    return id
