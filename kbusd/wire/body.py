# ruff: noqa: F821  (names without a definition here come from the .pxd)
"""Whether a message body is what its signature says: the check before anything is passed on.

D-Bus Specification, "Marshaling (Wire Format)". `check` trusts neither the body nor the
signature; it reads within `size` and allocates nothing. Alignment counts from the start of the
body, which a message keeps at a multiple of 8. Depth is limited as in libdbus: 64 values within
one another, of which an array of fixed-size elements or an empty one does not count its elements.
"""

import cython
from cython.cimports.kbusd.wire.validate import (
    ALIGNMENT,
    ARRAY_LENGTH,
    ARRAY_TOO_LONG,
    BAD_BOOLEAN,
    BAD_PATH,
    BAD_UTF8,
    BAD_VARIANT_SIGNATURE,
    BODY_TOO_LONG,
    BODY_TOO_SHORT,
    FIXED_SIZE,
    NESTED_TOO_DEEPLY,
    PADDING_NOT_ZERO,
    STRING_NOT_TERMINATED,
    STRING_PAST_END,
    check_signature,
    reason,
    valid_path,
    valid_utf8,
)
from cython.cimports.libc.stdint import uint8_t, uint32_t
from cython.cimports.libc.string import memcpy, memset

from kbusd.wire.validate import WireError

MAX_ARRAY = cython.declare(uint32_t, 1 << 26)
MAX_DEPTH = cython.declare(cython.int, 64)
HOST_IS_BIG = cython.declare(cython.bint, __import__("sys").byteorder == "big")


def check(body, size, signature, signature_length, big_endian, fds):
    """0 if `body` is exactly the values that `signature` names, else the negated rule.

    `fds` is the number of descriptors that came along. Indices of type 'h' are not compared
    with it, as dbus-daemon does not: a receiver that looks at one has to.
    """
    reader: Reader
    at: cython.int = check_signature(signature, signature_length)
    if at:
        return at
    reader.data = body
    reader.at = 0
    reader.end = size
    reader.swap = big_endian != HOST_IS_BIG
    reader.ends = cython.NULL
    while at < cython.cast(cython.int, signature_length):
        at = _value(cython.address(reader), signature, at, 0)
        if at < 0:
            return at
    return 0 if reader.at == size else -BODY_TOO_LONG


def opaque_from(body, have, size, signature, signature_length, big_endian):
    """Where the elements begin of a last argument "ay" or another array of numbers: of those, any
    bytes are valid. 0 if the body does not end so, or breaks a rule before.

    Of the body's `size` bytes only the first `have` are looked at."""
    reader: Reader
    length: uint32_t
    at: cython.int = check_signature(signature, signature_length)
    last: cython.int = cython.cast(cython.int, signature_length) - 2
    if at or last < 0 or signature[last] != ord("a"):
        return 0
    element: uint8_t = signature[last + 1]
    if FIXED_SIZE[element] == 0 or element == ord("b") or element == ord("h"):
        return 0
    reader.data = body
    reader.at = 0
    reader.end = have
    reader.swap = big_endian != HOST_IS_BIG
    reader.ends = cython.NULL
    while at < last:
        at = _value(cython.address(reader), signature, at, 0)
        if at < 0:
            return 0
    if at != last or _align(cython.address(reader), 4) or reader.end - reader.at < 4:
        return 0
    length = _uint32(cython.address(reader), reader.at)
    reader.at += 4
    if length > MAX_ARRAY or length & (FIXED_SIZE[element] - 1):
        return 0
    if _align(cython.address(reader), ALIGNMENT[element]) or size - reader.at != length:
        return 0
    return reader.at


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
@cython.inline
def _align(reader: cython.pointer(Reader), alignment: cython.size_t) -> cython.int:
    to: cython.size_t = (reader.at + alignment - 1) & ~(alignment - 1)
    if to > reader.end:
        return -BODY_TOO_SHORT
    while reader.at < to:
        if reader.data[reader.at]:
            return -PADDING_NOT_ZERO
        reader.at += 1
    return 0


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
@cython.inline
def _uint32(reader: cython.pointer(Reader), at: cython.size_t) -> uint32_t:
    value: uint32_t = 0
    memcpy(cython.address(value), reader.data + at, 4)
    if reader.swap:
        value = (value >> 24) | ((value >> 8) & 0xFF00) | ((value & 0xFF00) << 8) | (value << 24)
    return value


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
@cython.inline
def _text(reader: cython.pointer(Reader), length: cython.size_t) -> cython.int:
    """`length` bytes and a NUL are there; the caller moves on by length + 1."""
    if length >= reader.end - reader.at:
        return -STRING_PAST_END
    if reader.data[reader.at + length]:
        return -STRING_NOT_TERMINATED
    return 0


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _skip(signature: cython.pointer(cython.const[uint8_t]), at: cython.int) -> cython.int:
    """Where the complete type at `at` of a valid signature ends."""
    depth: cython.int = 0
    while True:
        letter: uint8_t = signature[at]
        at += 1
        if letter == ord("(") or letter == ord("{"):
            depth += 1
        elif letter == ord(")") or letter == ord("}"):
            depth -= 1
        if depth == 0 and letter != ord("a"):
            return at


def _value(reader, signature, at, depth):
    """Check one value of the complete type at `at`: where that type ends, or a negated rule."""
    letter: uint8_t = signature[at]
    size: cython.size_t = FIXED_SIZE[letter]
    code: cython.int
    length: cython.size_t
    if depth > MAX_DEPTH:
        return -NESTED_TOO_DEEPLY
    if size:
        if size > 1:
            code = _align(reader, size)
            if code:
                return code
        if reader.end - reader.at < size:
            return -BODY_TOO_SHORT
        if letter == ord("b") and _uint32(reader, reader.at) > 1:
            return -BAD_BOOLEAN
        reader.at += size
        return at + 1
    if letter == ord("s") or letter == ord("o"):
        code = _align(reader, 4)
        if code:
            return code
        if reader.end - reader.at < 4:
            return -BODY_TOO_SHORT
        length = _uint32(reader, reader.at)
        reader.at += 4
        code = _text(reader, length)
        if code:
            return code
        if letter == ord("s"):
            if not valid_utf8(reader.data + reader.at, length):
                return -BAD_UTF8
        elif not valid_path(reader.data + reader.at, length):
            return -BAD_PATH
        reader.at += length + 1
        return at + 1
    if letter == ord("a"):
        return _array(reader, signature, at + 1, depth)
    if letter == ord("v"):
        code = check_variant(reader, depth)
        return code if code else at + 1
    if letter == ord("g"):
        if reader.at == reader.end:
            return -BODY_TOO_SHORT
        length = reader.data[reader.at]
        reader.at += 1
        code = _text(reader, length)
        if code == 0:
            code = check_signature(reader.data + reader.at, length)
        if code:
            return code
        reader.at += length + 1
        return at + 1
    # A struct or a dict entry.
    code = _align(reader, 8)
    if code:
        return code
    at += 1
    while signature[at] != ord(")") and signature[at] != ord("}"):
        at = _value(reader, signature, at, depth + 1)
        if at < 0:
            return at
    return at + 1


def check_variant(reader, depth):
    """A variant at `reader.at`: 0, or the negated rule. Its value counts one level deeper."""
    length: cython.size_t
    code: cython.int
    signature: cython.pointer(cython.const[uint8_t])
    outside: cython.pointer(uint8_t) = reader.ends
    if reader.at == reader.end:
        return -BODY_TOO_SHORT
    length = reader.data[reader.at]
    reader.at += 1
    code = _text(reader, length)
    if code:
        return code
    signature = reader.data + reader.at
    reader.at += length + 1
    if length != 1 or signature[0] == ord("a") or ALIGNMENT[signature[0]] == 0:
        if length == 0 or check_signature(signature, length):
            return -BAD_VARIANT_SIGNATURE
        if cython.cast(cython.size_t, _skip(signature, 0)) != length:
            return -BAD_VARIANT_SIGNATURE
    elif signature[0] == ord("(") or signature[0] == ord("{"):
        return -BAD_VARIANT_SIGNATURE
    reader.ends = cython.NULL
    code = _value(reader, signature, 0, depth + 1)
    reader.ends = outside
    return min(0, code)


def _array(reader, signature, at, depth):
    """An array whose element type is at `at`: where that ends, or a negated rule."""
    element: uint8_t = signature[at]
    size: cython.size_t = FIXED_SIZE[element]
    length: uint32_t
    end: cython.size_t
    ends: uint8_t[256]
    after: cython.int = 0
    code: cython.int = _align(reader, 4)
    if code:
        return code
    if reader.end - reader.at < 4:
        return -BODY_TOO_SHORT
    length = _uint32(reader, reader.at)
    reader.at += 4
    if length > MAX_ARRAY:
        return -ARRAY_TOO_LONG
    code = _align(reader, ALIGNMENT[element])
    if code:
        return code
    if length > reader.end - reader.at:
        return -BODY_TOO_SHORT
    if length == 0:
        if reader.ends == cython.NULL:
            return _skip(signature, at)
        if reader.ends[at] == 0:
            reader.ends[at] = _skip(signature, at)
        return reader.ends[at]
    end = reader.at + length
    if size:
        if length & (size - 1):
            return -ARRAY_LENGTH
        if element == ord("b"):
            while reader.at < end:
                if _uint32(reader, reader.at) > 1:
                    return -BAD_BOOLEAN
                reader.at += 4
        reader.at = end
        return at + 1
    if length > 255 and reader.ends == cython.NULL:
        # Millions of empty arrays may follow: skip over the type of their elements only once.
        memset(ends, 0, 256)
        reader.ends = ends
    while reader.at < end:
        after = _value(reader, signature, at, depth + 1)
        if after < 0:
            return after
    if reader.ends == ends:
        reader.ends = cython.NULL
    return after if reader.at == end else -ARRAY_LENGTH


def strings(body, size, signature, signature_length, big_endian, upto, elements):
    """The arguments of types s, o and g among the first `upto`: (index, type, text) each. Of arrays
    of these, as, ao and ag, the first `elements` in all are told in the same way.

    Checks what it walks over; raises WireError where that breaks a rule.
    """
    reader: Reader
    found: list = []
    start: cython.size_t
    index: cython.int = 0
    letter: uint8_t
    inner: uint8_t
    length: cython.size_t
    at: cython.int = check_signature(signature, signature_length)
    if at:
        raise WireError(at, reason(at))
    reader.data = body
    reader.at = 0
    reader.end = size
    reader.swap = big_endian != HOST_IS_BIG
    reader.ends = cython.NULL
    while at < cython.cast(cython.int, signature_length) and index < upto:
        letter = signature[at]
        inner = signature[at + 1] if letter == ord("a") else 0
        start = reader.at
        at = _value(cython.address(reader), signature, at, 0)
        if at < 0:
            raise WireError(at, reason(at))
        if inner == ord("s") or inner == ord("o") or inner == ord("g"):
            start = ((start + 3) & ~cython.cast(cython.size_t, 3)) + 4
            while start < reader.at and elements > 0:
                if inner == ord("g"):
                    length = body[start]
                    start += 1
                else:
                    start = (start + 3) & ~cython.cast(cython.size_t, 3)
                    length = int.from_bytes(
                        body[start : start + 4], "big" if big_endian else "little"
                    )
                    start += 4
                found.append((index, "a" + chr(inner), body[start : start + length].decode()))
                start += length + 1
                elements -= 1
        elif letter == ord("s") or letter == ord("o"):
            start = ((start + 3) & ~cython.cast(cython.size_t, 3)) + 4
            found.append((index, chr(letter), body[start : reader.at - 1].decode()))
        elif letter == ord("g"):
            found.append((index, "g", body[start + 1 : reader.at - 1].decode()))
        index += 1
    return tuple(found)


class PathArgument(str):
    """An argument of type OBJECT_PATH, which only some match rules look at."""

    __slots__ = ()


def match_arguments(body: bytes, signature: str, big_endian: bool) -> tuple:
    """What match rules see of a body: one entry for each of its first 64 arguments, up to the
    last one with text: a str for a string, a PathArgument for an object path, else None.

    Raises WireError where what it walks over breaks a rule.
    """
    found: list = []
    for index, kind, text in string_arguments(body, signature, big_endian):
        if kind != "g":
            found.extend([None] * (index - len(found)))
            found.append(text if kind == "s" else PathArgument(text))
    return tuple(found)


def string(text: str, big_endian: bool = False) -> bytes:
    """A body of the signature "s"."""
    data = text.encode()
    return len(data).to_bytes(4, "big" if big_endian else "little") + data + b"\0"


def check_body(body: bytes, signature: bytes, big_endian: bool, fds: int = 0) -> None:
    """`check` for Python: raise WireError unless `body` is what `signature` says."""
    code: cython.int = check(body, len(body), signature, len(signature), big_endian, fds)
    if code:
        raise WireError(code, reason(code))


def opaque_tail(body: bytes, have: int, signature: bytes, big_endian: bool) -> int:
    """`opaque_from` for Python."""
    return opaque_from(body, have, len(body), signature, len(signature), big_endian)


def string_arguments(
    body: bytes, signature: str, big_endian: bool, upto: int = 64, elements: int = 0
) -> tuple:
    """`strings` for Python: what match rules on arg0..arg63 look at."""
    types: bytes = signature.encode()
    return strings(body, len(body), types, len(types), big_endian, upto, elements)
