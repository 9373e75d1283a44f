# ruff: noqa: F821  (names without a definition here come from the .pxd)
"""The header of a D-Bus message: how long a message is, what its header says, building one.

D-Bus Specification, "Message Format", "Header Fields". `message_length` and `scan` take bytes as a
client wrote them, trust nothing, allocate nothing and read only what they are given. A header that
`scan` passed keeps every rule of the specification that does not need the body; the body is
`body.check`'s. `build` makes the header that a client sees from values that another process sent:
it passes what it made through `scan`, so that no peer can make us send a header that breaks a rule.
"""

import cython
import msgspec
from cython.cimports.kbusd.wire.body import Reader, check_variant
from cython.cimports.kbusd.wire.validate import (
    BAD_DESTINATION,
    BAD_ERROR_NAME,
    BAD_INTERFACE,
    BAD_MEMBER,
    BAD_PATH,
    BAD_SENDER,
    BODY_TOO_SHORT,
    BODY_WITHOUT_SIGNATURE,
    FIELD_CODE_ZERO,
    FIELD_PAST_END,
    FIELD_TWICE,
    FIELD_TYPE,
    LOCAL_INTERFACE,
    LOCAL_PATH,
    MISSING_ERROR_NAME,
    MISSING_INTERFACE,
    MISSING_MEMBER,
    MISSING_PATH,
    MISSING_REPLY_SERIAL,
    PADDING_NOT_ZERO,
    REPLY_SERIAL_ZERO,
    SIGNATURE_TOO_LONG,
    STRING_NOT_TERMINATED,
    STRING_PAST_END,
    TRUNCATED,
    WRONG_BYTE_ORDER,
    WRONG_FIELDS_LENGTH,
    WRONG_MESSAGE_LENGTH,
    WRONG_SERIAL,
    WRONG_TYPE,
    WRONG_VERSION,
    check_signature,
    valid_bus_name,
    valid_error_name,
    valid_interface,
    valid_member,
    valid_path,
)
from cython.cimports.libc.stdint import int64_t, uint8_t, uint32_t
from cython.cimports.libc.string import memcmp, memcpy, memset

from kbusd.wire.validate import RULES, WireError

METHOD_CALL = 1
METHOD_RETURN = 2
ERROR = 3
SIGNAL = 4

NO_REPLY_EXPECTED = 1
NO_AUTO_START = 2
ALLOW_INTERACTIVE_AUTHORIZATION = 4

MAX_FIELDS = cython.declare(uint32_t, 1 << 26)
MAX_MESSAGE = cython.declare(int64_t, 1 << 27)
HOST_IS_BIG = cython.declare(cython.bint, __import__("sys").byteorder == "big")

# Codes of the header fields.
PATH = cython.declare(cython.int, 1)
INTERFACE = cython.declare(cython.int, 2)
MEMBER = cython.declare(cython.int, 3)
ERROR_NAME = cython.declare(cython.int, 4)
REPLY_SERIAL = cython.declare(cython.int, 5)
DESTINATION = cython.declare(cython.int, 6)
SENDER = cython.declare(cython.int, 7)
SIGNATURE = cython.declare(cython.int, 8)
UNIX_FDS = cython.declare(cython.int, 9)

FIELD_TYPES = cython.declare(cython.p_const_char, b"-osssussgu")  # by code
LOCAL_PATH_TEXT = cython.declare(cython.p_const_char, b"/org/freedesktop/DBus/Local")
LOCAL_INTERFACE_TEXT = cython.declare(cython.p_const_char, b"org.freedesktop.DBus.Local")


class ParsedHeader(msgspec.Struct, frozen=True):
    """A header as Python values; None where a field is absent. Lengths are in bytes."""

    endian: str
    type: int
    flags: int
    serial: int
    reply_serial: int | None
    body_length: int
    header_length: int
    unix_fds: int
    path: str | None
    interface: str | None
    member: str | None
    error_name: str | None
    destination: str | None
    sender: str | None
    signature: str
    unknown_fields: bool


def reason(code):
    """The rule that a negative code of this package stands for, in words."""
    return RULES[-code]


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
@cython.inline
def _uint32(data: cython.pointer(cython.const[uint8_t]), swap: cython.bint) -> uint32_t:
    value: uint32_t = 0
    memcpy(cython.address(value), data, 4)
    if swap:
        value = (value >> 24) | ((value >> 8) & 0xFF00) | ((value & 0xFF00) << 8) | (value << 24)
    return value


def message_length(first16):
    """The whole message's length in bytes from its first 16, or a negated rule that they break."""
    swap: cython.bint
    fields: uint32_t
    total: int64_t
    if first16[0] != ord("l") and first16[0] != ord("B"):
        return -WRONG_BYTE_ORDER
    if first16[1] == 0:
        return -WRONG_TYPE
    if first16[3] != 1:
        return -WRONG_VERSION
    swap = (first16[0] == ord("B")) != HOST_IS_BIG
    fields = _uint32(first16 + 12, swap)
    if fields > MAX_FIELDS:
        return -WRONG_FIELDS_LENGTH
    total = 16 + ((cython.cast(int64_t, fields) + 7) & ~cython.cast(int64_t, 7))
    total += _uint32(first16 + 4, swap)
    return -WRONG_MESSAGE_LENGTH if total > MAX_MESSAGE else total


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
@cython.inline
def _field(
    data: cython.pointer(cython.const[uint8_t]),
    code: cython.int,
    at: uint32_t,
    length: uint32_t,
    out: cython.pointer(Header),
) -> cython.int:
    """Check and note the text of one string-like field."""
    text: cython.pointer(cython.const[uint8_t]) = data + at
    if code == PATH:
        if not valid_path(text, length):
            return -BAD_PATH
        if length == 27 and memcmp(text, LOCAL_PATH_TEXT, 27) == 0:
            return -LOCAL_PATH
        out.path_at = at
        out.path_len = length
    elif code == INTERFACE:
        if not valid_interface(text, length):
            return -BAD_INTERFACE
        if length == 26 and memcmp(text, LOCAL_INTERFACE_TEXT, 26) == 0:
            return -LOCAL_INTERFACE
        out.interface_at = at
        out.interface_len = length
    elif code == MEMBER:
        if not valid_member(text, length):
            return -BAD_MEMBER
        out.member_at = at
        out.member_len = length
    elif code == ERROR_NAME:
        if not valid_error_name(text, length):
            return -BAD_ERROR_NAME
        out.error_at = at
        out.error_len = length
    elif code == DESTINATION:
        if not valid_bus_name(text, length):
            return -BAD_DESTINATION
        out.destination_at = at
        out.destination_len = length
    elif code == SENDER:
        if not valid_bus_name(text, length):
            return -BAD_SENDER
        out.sender_at = at
        out.sender_len = length
    else:
        out.signature_at = at
        out.signature_len = length
        return check_signature(text, length)
    return 0


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _fields(
    data: cython.pointer(cython.const[uint8_t]), swap: cython.bint, out: cython.pointer(Header)
) -> cython.int:
    """Check the field array, an a(yv) from byte 16 on."""
    end: uint32_t = 16 + out.fields_length
    at: uint32_t = 16
    code: cython.int
    wrong: cython.int
    letter: uint8_t
    length: uint32_t
    reader: Reader
    while at < end:
        while at & 7:
            if data[at]:
                return -PADDING_NOT_ZERO
            at += 1
            if at == end:
                return -FIELD_PAST_END
        if end - at < 5:
            return -FIELD_PAST_END
        code = data[at]
        if code == 0:
            return -FIELD_CODE_ZERO
        letter = data[at + 2]
        if code > UNIX_FDS or data[at + 1] != 1 or data[at + 3]:
            reader.data = data
            reader.at = at + 1
            reader.end = end
            reader.swap = swap
            reader.ends = cython.NULL
            # The array and the struct around the variant count as levels, as in libdbus.
            wrong = check_variant(cython.address(reader), 2)
            if wrong == -BODY_TOO_SHORT or wrong == -STRING_PAST_END:
                return -FIELD_PAST_END
            if wrong:
                return wrong
            if code <= UNIX_FDS:
                return -FIELD_TYPE
            out.fields_seen |= 1
            at = reader.at
            continue
        if out.fields_seen & (1 << code):
            return -FIELD_TWICE
        out.fields_seen |= 1 << code
        at += 4
        if letter != FIELD_TYPES[code]:
            return -FIELD_TYPE
        if code == SIGNATURE:
            length = data[at]
            at += 1
        else:
            if end - at < 4:
                return -FIELD_PAST_END
            length = _uint32(data + at, swap)
            if code == UNIX_FDS:
                out.unix_fds = length
            elif code == REPLY_SERIAL:
                if length == 0:
                    return -REPLY_SERIAL_ZERO
                out.reply_serial_at = at
                out.reply_serial = length
            at += 4
            if letter == ord("u"):
                continue
        if length >= end - at:
            return -FIELD_PAST_END
        if data[at + length]:
            return -STRING_NOT_TERMINATED
        wrong = _field(data, code, at, length, out)
        if wrong:
            return wrong
        at += length + 1
    return 0


def scan(data, size, out):
    """Read and check a whole header at `data`, which has `size` bytes: 0, or a negated rule.

    Message types above 4 pass, for the caller to ignore; unknown fields pass and are noted in
    bit 0 of `fields_seen`.
    """
    swap: cython.bint
    wrong: int64_t
    at: uint32_t
    seen: uint32_t
    memset(out, 0, cython.sizeof(Header))
    if size < 16:
        return -TRUNCATED
    wrong = message_length(data)
    if wrong < 0:
        return cython.cast(cython.int, wrong)
    out.endian = data[0]
    out.type = data[1]
    out.flags = data[2]
    swap = (data[0] == ord("B")) != HOST_IS_BIG
    out.body_length = _uint32(data + 4, swap)
    out.serial = _uint32(data + 8, swap)
    out.fields_length = _uint32(data + 12, swap)
    out.header_length = (16 + out.fields_length + 7) & ~cython.cast(uint32_t, 7)
    if size < out.header_length:
        return -TRUNCATED
    if out.serial == 0:
        return -WRONG_SERIAL
    wrong = _fields(data, swap, out)
    if wrong:
        return cython.cast(cython.int, wrong)
    for at in range(16 + out.fields_length, out.header_length):
        if data[at]:
            return -PADDING_NOT_ZERO
    seen = out.fields_seen
    if out.type == 1 or out.type == 4:
        if not seen & (1 << PATH):
            return -MISSING_PATH
        if not seen & (1 << MEMBER):
            return -MISSING_MEMBER
        if out.type == 4 and not seen & (1 << INTERFACE):
            return -MISSING_INTERFACE
    elif out.type == 2 or out.type == 3:
        if not seen & (1 << REPLY_SERIAL):
            return -MISSING_REPLY_SERIAL
        if out.type == 3 and not seen & (1 << ERROR_NAME):
            return -MISSING_ERROR_NAME
    if out.body_length and out.signature_len == 0:
        return -BODY_WITHOUT_SIGNATURE
    return 0


def build(
    endian: int,
    type: int,
    flags: int,
    path: str | bytes | None = None,
    interface: str | bytes | None = None,
    member: str | bytes | None = None,
    error_name: str | bytes | None = None,
    destination: str | bytes | None = None,
    sender: str | bytes | None = None,
    signature: str | bytes | None = None,
    unix_fds: int = 0,
    has_reply_serial: bool = False,
    reply_serial: int = 0,
    serial: int = 0,
    body_length: int = 0,
) -> bytes:
    """A whole header, padded to 8, in the byte order `endian` (ord("l") or ord("B")).

    The field REPLY_SERIAL comes first, so the caller may write, in that byte order, the body
    length at byte 4, the serial at 8 and the reply serial at 20 (these may be 0 here). Texts are
    str or bytes; None, an empty signature and no descriptors make no field. Raises WireError
    where a value is not valid or one that the type needs is missing.
    """
    order = "big" if endian == ord("B") else "little"
    # Serials that are still to come count as 1 for the scan below.
    made = bytearray(16)
    made[0] = ord("B") if endian == ord("B") else ord("l")
    made[1] = type if 0 < type < 256 else 0
    made[2] = flags & 255
    made[3] = 1
    made[4:8] = body_length.to_bytes(4, order)
    made[8:12] = (serial or 1).to_bytes(4, order)
    if has_reply_serial:
        made += b"\x05\x01u\x00" + (reply_serial or 1).to_bytes(4, order)
    for start, value in (
        (b"\x01\x01o\x00", path),
        (b"\x02\x01s\x00", interface),
        (b"\x03\x01s\x00", member),
        (b"\x04\x01s\x00", error_name),
        (b"\x06\x01s\x00", destination),
        (b"\x07\x01s\x00", sender),
    ):
        if value is not None:
            text = value if isinstance(value, bytes) else value.encode()
            made += bytes(-len(made) % 8) + start + len(text).to_bytes(4, order) + text + b"\0"
    if signature:
        text = signature if isinstance(signature, bytes) else signature.encode()
        if len(text) > 255:
            raise WireError(-SIGNATURE_TOO_LONG, reason(-SIGNATURE_TOO_LONG))
        made += bytes(-len(made) % 8) + b"\x08\x01g\x00" + bytes((len(text),)) + text + b"\0"
    if unix_fds:
        made += bytes(-len(made) % 8) + b"\x09\x01u\x00" + unix_fds.to_bytes(4, order)
    made[12:16] = (len(made) - 16).to_bytes(4, order)
    made += bytes(-len(made) % 8)
    header: Header
    wrong: cython.int = scan(made, len(made), cython.address(header))
    if wrong:
        raise WireError(wrong, reason(wrong))
    made[8:12] = serial.to_bytes(4, order)
    if has_reply_serial:
        made[20:24] = reply_serial.to_bytes(4, order)
    return bytes(made)


def total_length(first16: bytes) -> int:
    """`message_length` for Python: raises WireError where those 16 bytes break a rule."""
    if len(first16) < 16:
        raise WireError(-TRUNCATED, reason(-TRUNCATED))
    length: int64_t = message_length(first16)
    if length < 0:
        wrong: cython.int = cython.cast(cython.int, length)
        raise WireError(wrong, reason(wrong))
    return length


def parse(data: bytes) -> ParsedHeader:
    """The header at the start of `data`; raises WireError where it breaks a rule."""
    header: Header
    wrong: cython.int = scan(data, len(data), cython.address(header))
    if wrong:
        raise WireError(wrong, reason(wrong))
    return ParsedHeader(
        endian=chr(header.endian),
        type=header.type,
        flags=header.flags,
        serial=header.serial,
        reply_serial=header.reply_serial if header.reply_serial_at else None,
        body_length=header.body_length,
        header_length=header.header_length,
        unix_fds=header.unix_fds,
        path=_str(data, header.path_at, header.path_len),
        interface=_str(data, header.interface_at, header.interface_len),
        member=_str(data, header.member_at, header.member_len),
        error_name=_str(data, header.error_at, header.error_len),
        destination=_str(data, header.destination_at, header.destination_len),
        sender=_str(data, header.sender_at, header.sender_len),
        signature=_str(data, header.signature_at, header.signature_len) or "",
        unknown_fields=bool(header.fields_seen & 1),
    )


@cython.cfunc
def _str(data: bytes, at: uint32_t, length: uint32_t):
    return data[at : at + length].decode() if at else None
