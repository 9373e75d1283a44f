# ruff: noqa: F821  (names without a definition here come from the .pxd)
"""Which names, strings and signatures D-Bus allows, at the speed of C; and a text for each rule.

D-Bus Specification, "Valid Names", "Valid Object Paths", "Type System". Where the specification
leaves room, this accepts what dbus-daemon 1.14 accepts, so that no program is shut out. The
functions read exactly `size` bytes at `text`, touch nothing else and allocate nothing: they may
be given whatever a hostile client wrote.
"""

import cython
from cython.cimports.libc.stdint import uint8_t, uint64_t
from cython.cimports.libc.string import memcpy

INITIAL = cython.declare(cython.int, 1)  # may begin an element of an interface or be a member's
INNER = cython.declare(cython.int, 2)  # may follow there, and stand in a path
BUS_INITIAL = cython.declare(cython.int, 4)  # may begin an element of a well-known bus name
BUS_INNER = cython.declare(cython.int, 8)
BASIC = cython.declare(cython.int, 16)  # code letter of a basic type
MAX_NAME = cython.declare(cython.size_t, 255)

KIND = cython.declare(uint8_t[256])

RULES = {
    WRONG_BYTE_ORDER: "the byte order mark is neither 'l' nor 'B'",
    WRONG_TYPE: "the message type is 0 (INVALID)",
    WRONG_VERSION: "the major protocol version is not 1",
    WRONG_FIELDS_LENGTH: "the header field array is longer than 64 MiB",
    WRONG_MESSAGE_LENGTH: "the message is longer than 128 MiB",
    WRONG_SERIAL: "the serial is 0",
    TRUNCATED: "the header is cut off",
    PADDING_NOT_ZERO: "alignment padding is not zero",
    FIELD_CODE_ZERO: "a header field has code 0 (INVALID)",
    FIELD_TWICE: "a header field appears twice",
    FIELD_TYPE: "a header field has the wrong type",
    FIELD_PAST_END: "a header field reaches past the end of the field array",
    REPLY_SERIAL_ZERO: "the reply serial is 0",
    LOCAL_PATH: "the path /org/freedesktop/DBus/Local is reserved",
    LOCAL_INTERFACE: "the interface org.freedesktop.DBus.Local is reserved",
    BAD_PATH: "an object path is not valid",
    BAD_INTERFACE: "the interface is not a valid interface name",
    BAD_MEMBER: "the member is not a valid member name",
    BAD_ERROR_NAME: "the error name is not valid",
    BAD_DESTINATION: "the destination is not a valid bus name",
    BAD_SENDER: "the sender is not a valid bus name",
    MISSING_PATH: "a method call or signal has no path",
    MISSING_INTERFACE: "a signal has no interface",
    MISSING_MEMBER: "a method call or signal has no member",
    MISSING_ERROR_NAME: "an error has no error name",
    MISSING_REPLY_SERIAL: "a reply has no reply serial",
    BODY_WITHOUT_SIGNATURE: "there is a body but no signature",
    BODY_TOO_SHORT: "the body is shorter than its signature says",
    BODY_TOO_LONG: "the body is longer than its signature says",
    BAD_BOOLEAN: "a boolean is neither 0 nor 1",
    BAD_UTF8: "a string is not valid UTF-8 without NUL",
    STRING_NOT_TERMINATED: "a string, object path or signature does not end in NUL",
    STRING_PAST_END: "a string, object path or signature reaches past the end",
    ARRAY_TOO_LONG: "an array is longer than 64 MiB",
    ARRAY_LENGTH: "an array's length does not fit its elements",
    NESTED_TOO_DEEPLY: "values are nested more than 64 deep",
    BAD_VARIANT_SIGNATURE: "a variant's signature is not one single complete type",
    SIGNATURE_TOO_LONG: "a signature is longer than 255 bytes",
    SIGNATURE_UNKNOWN_TYPE: "a signature has an unknown type code",
    SIGNATURE_ARRAYS: "a signature nests more than 32 arrays",
    SIGNATURE_STRUCTS: "a signature nests more than 32 structs",
    SIGNATURE_ARRAY_ELEMENT: "an array in a signature has no element type",
    SIGNATURE_STRUCT_EMPTY: "a struct in a signature has no fields",
    SIGNATURE_STRUCT_OPEN: "a struct or dict entry in a signature is not closed",
    SIGNATURE_STRUCT_CLOSED: "a struct or dict entry in a signature is closed but was not opened",
    SIGNATURE_DICT_PLACE: "a dict entry in a signature is not an array's element",
    SIGNATURE_DICT_KEY: "a dict entry's key in a signature is not a basic type",
    SIGNATURE_DICT_FIELDS: "a dict entry in a signature has not exactly two fields",
}


class WireError(ValueError):
    """Bytes that break a rule of the D-Bus specification: `code` (negative) and `text` name it."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code
        self.text = text


def reason(code):
    """The rule that a negative `code` of this package stands for, in words."""
    return RULES[-code]


@cython.cfunc
def _fill_tables() -> cython.void:
    c: cython.int
    for c in range(256):
        KIND[c] = ALIGNMENT[c] = FIXED_SIZE[c] = 0
    for c in b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz_":
        KIND[c] = INITIAL | INNER | BUS_INITIAL | BUS_INNER
    for c in b"0123456789":
        KIND[c] = INNER | BUS_INNER
    KIND[ord("-")] = BUS_INITIAL | BUS_INNER
    for c in b"ybnqiuxtdsogh":
        KIND[c] |= BASIC
    for c, size in zip(b"ybnqiuxtdh", (1, 4, 2, 2, 4, 4, 8, 8, 8, 4), strict=True):
        ALIGNMENT[c] = FIXED_SIZE[c] = size
    for c, size in zip(b"sogva({", (4, 4, 1, 1, 4, 8, 8), strict=True):
        ALIGNMENT[c] = size


_fill_tables()


def valid_path(text, size):
    """An object path: "/" or elements of [A-Za-z0-9_]+ each after a "/"; no length limit."""
    at: cython.size_t
    slash: cython.bint = True
    if size == 0 or text[0] != ord("/"):
        return False
    for at in range(1, size):
        if text[at] == ord("/"):
            if slash:
                return False
            slash = True
        elif KIND[text[at]] & INNER:
            slash = False
        else:
            return False
    return size == 1 or not slash


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
@cython.inline
def _dotted(
    text: cython.pointer(cython.const[uint8_t]),
    size: cython.size_t,
    initial: cython.int,
    inner: cython.int,
) -> cython.int:
    """The number of dots between elements that begin with `initial`, or -1 where one does not."""
    at: cython.size_t
    dots: cython.int = 0
    first: cython.bint = True
    if size == 0 or size > MAX_NAME:
        return -1
    for at in range(size):
        if first:
            if not KIND[text[at]] & initial:
                return -1
            first = False
        elif text[at] == ord("."):
            dots += 1
            first = True
        elif not KIND[text[at]] & inner:
            return -1
    return -1 if first else dots


def valid_interface(text, size):
    """Two or more elements of [A-Za-z_][A-Za-z0-9_]* with dots between, at most 255 bytes."""
    return _dotted(text, size, INITIAL, INNER) > 0


def valid_error_name(text, size):
    """As an interface name."""
    return _dotted(text, size, INITIAL, INNER) > 0


def valid_member(text, size):
    """[A-Za-z_][A-Za-z0-9_]*, at most 255 bytes."""
    return _dotted(text, size, INITIAL, INNER) == 0


def valid_bus_name(text, size):
    """A unique name (":" and elements that may begin with digits) or a well-known one.

    As in dbus-daemon, a unique name need not have a dot, and its first element may be empty.
    """
    if size == 0 or size > MAX_NAME:
        return False
    if text[0] == ord(":"):
        if size == 1:
            return True
        if text[1] == ord("."):
            return _dotted(text + 2, size - 2, BUS_INNER, BUS_INNER) >= 0
        return _dotted(text + 1, size - 1, BUS_INNER, BUS_INNER) >= 0
    return _dotted(text, size, BUS_INITIAL, BUS_INNER) > 0


def valid_utf8(text, size):
    """UTF-8 of Unicode scalar values (RFC 3629), without NUL. Eight bytes at a time where ASCII."""
    at: cython.size_t = 0
    word: uint64_t = 0
    ones: uint64_t = ~cython.cast(uint64_t, 0) // 255  # 01 in every byte
    lead: uint8_t
    second: uint8_t
    while at < size:
        while size - at >= 8:
            memcpy(cython.address(word), text + at, 8)
            # The top bit of a byte ends up set if that byte was NUL or not ASCII.
            if (((word - ones) & ~word) | word) & (ones << 7):
                break
            at += 8
        if at == size:
            break
        lead = text[at]
        if lead < 0x80:
            if lead == 0:
                return False
            at += 1
            continue
        if lead < 0xC2 or lead > 0xF4 or size - at < 2:
            return False
        second = text[at + 1]
        if lead < 0xE0:
            if second & 0xC0 != 0x80:
                return False
            at += 2
        elif lead < 0xF0:
            # E0 must not be overlong, ED must not be a surrogate.
            if (
                size - at < 3
                or second < (0xA0 if lead == 0xE0 else 0x80)
                or second > (0x9F if lead == 0xED else 0xBF)
                or text[at + 2] & 0xC0 != 0x80
            ):
                return False
            at += 3
        else:
            # F0 must not be overlong, F4 must not be beyond U+10FFFF.
            if (
                size - at < 4
                or second < (0x90 if lead == 0xF0 else 0x80)
                or second > (0x8F if lead == 0xF4 else 0xBF)
                or text[at + 2] & 0xC0 != 0x80
                or text[at + 3] & 0xC0 != 0x80
            ):
                return False
            at += 4
    return True


def check_signature(text, size):
    """0 if `text` is a signature (zero or more complete types), else the negated rule.

    One pass with a stack of the open brackets: for each, how many arrays were open outside it
    and how many fields it has so far.
    """
    arrays_outside: uint8_t[65]
    fields: uint8_t[65]
    closing: uint8_t[65]
    depth: cython.int = 0  # open brackets
    structs: cython.int = 0  # of these, structs
    arrays: cython.int = 0  # open arrays, in all enclosing brackets too
    pending: cython.bint = False  # an array waits for its element type
    at: cython.size_t
    letter: uint8_t
    if size > 255:
        return -SIGNATURE_TOO_LONG
    arrays_outside[0] = fields[0] = closing[0] = 0
    for at in range(size):
        letter = text[at]
        if KIND[letter] & BASIC or letter == ord("v"):
            if closing[depth] == ord("}") and fields[depth] == 0 and letter == ord("v"):
                return -SIGNATURE_DICT_KEY
        elif letter == ord("a"):
            if closing[depth] == ord("}") and fields[depth] == 0:
                return -SIGNATURE_DICT_KEY
            arrays += 1
            if arrays > 32:
                return -SIGNATURE_ARRAYS
            pending = True
            continue
        elif letter == ord("(") or letter == ord("{"):
            if closing[depth] == ord("}") and fields[depth] == 0:
                return -SIGNATURE_DICT_KEY
            if letter == ord("("):
                structs += 1
                if structs > 32:
                    return -SIGNATURE_STRUCTS
            elif not pending:
                return -SIGNATURE_DICT_PLACE
            # At most 32 structs and, each within an array, 32 dict entries: depth stays within 64.
            depth += 1
            arrays_outside[depth] = arrays
            fields[depth] = 0
            closing[depth] = ord(")") if letter == ord("(") else ord("}")
            pending = False
            continue
        elif letter == ord(")") or letter == ord("}"):
            if pending:
                return -SIGNATURE_ARRAY_ELEMENT
            if depth == 0 or closing[depth] != letter:
                return -SIGNATURE_STRUCT_CLOSED
            if letter == ord("}"):
                if fields[depth] != 2:
                    return -SIGNATURE_DICT_FIELDS
            else:
                if fields[depth] == 0:
                    return -SIGNATURE_STRUCT_EMPTY
                structs -= 1
            depth -= 1
        else:
            return -SIGNATURE_UNKNOWN_TYPE
        # A complete type ends here, and with it the arrays whose element it is.
        arrays = arrays_outside[depth]
        pending = False
        fields[depth] += 1
    if pending:
        return -SIGNATURE_ARRAY_ELEMENT
    if depth:
        return -SIGNATURE_STRUCT_OPEN
    return 0


def is_path(text: bytes) -> bool:
    """`valid_path` for Python."""
    return valid_path(text, len(text))


def is_interface(text: bytes) -> bool:
    """`valid_interface` for Python."""
    return valid_interface(text, len(text))


def is_member(text: bytes) -> bool:
    """`valid_member` for Python."""
    return valid_member(text, len(text))


def is_error_name(text: bytes) -> bool:
    """`valid_error_name` for Python."""
    return valid_error_name(text, len(text))


def is_bus_name(text: bytes) -> bool:
    """`valid_bus_name` for Python."""
    return valid_bus_name(text, len(text))


def is_utf8(text: bytes) -> bool:
    """`valid_utf8` for Python."""
    return valid_utf8(text, len(text))


def require_signature(text: bytes) -> None:
    """Raise WireError unless `text` is a valid signature."""
    code: cython.int = check_signature(text, len(text))
    if code:
        raise WireError(code, reason(code))
