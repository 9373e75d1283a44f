"""D-Bus messages as payloads of kdbus messages: the form that sd-bus gave them, read and written.

Two forms are in use, told apart by their fourth byte, the protocol version. Version 1 is the D-Bus
wire format as on a socket; `kbusd.wire` is for that, here is only its fixed part. Version 2 is one
GVariant of the type (yyyyuta{tv}v): byte order, type, flags, version, zero, cookie, header fields by
their D-Bus numbers, and the body as a struct in a variant. The body's length and signature are found
from the end; the total length must come with the message. No SIGNATURE field; REPLY_SERIAL is 64 bits.

`read` trusts nothing: what it returns has names and paths that D-Bus allows, the fields that its type
needs, and a valid body in dbus1. (This package imports nothing of ours, so the rules for names stand
here again; the tests compare them with kbusd.wire's.) Who sent a message and to whom is what kdbus
says, not what stands in the fields: the caller has to see to that.

Source: systemd 221 to 230, src/libsystemd/sd-bus: GVARIANT-SERIALIZATION, PORTING-DBUS1,
bus-message.c, bus-kernel.c. No sd-bus reads the byte order that is not its machine's: write for it in
the machine's.
"""

from __future__ import annotations

import re
import struct
import sys
from typing import Any

import msgspec

from kbusd.kdbus import abi, gvariant
from kbusd.kdbus.gvariant import GVariantError, Order

METHOD_CALL, METHOD_RETURN, ERROR, SIGNAL = 1, 2, 3, 4
NO_REPLY_EXPECTED, NO_AUTO_START = 1, 2  # flags in a D-Bus header

FIXED = 16  # bytes of the fixed part in both versions
MAX_SIZE = 1 << 27
MAX_NAME = 255

# As in dbus-daemon, a unique name need not have a dot, and its first element may be empty.
_BUS_NAME = re.compile(
    rb":(?:\.?[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]+)*)?"
    rb"|[A-Za-z_-][A-Za-z0-9_-]*(?:\.[A-Za-z_-][A-Za-z0-9_-]*)+"
)
_INTERFACE = re.compile(rb"[A-Za-z_][A-Za-z0-9_]*(?:\.[A-Za-z_][A-Za-z0-9_]*)+")
_MEMBER = re.compile(rb"[A-Za-z_][A-Za-z0-9_]*")
_UNIQUE_ID = re.compile(r":1\.(0|[1-9][0-9]{0,19})")

# Header fields with text: number, attribute, type, what it must be.
_TEXTS = (
    (1, "path", b"o", gvariant.PATH),
    (2, "interface", b"s", _INTERFACE),
    (3, "member", b"s", _MEMBER),
    (4, "error_name", b"s", _INTERFACE),
    (6, "destination", b"s", _BUS_NAME),
    (7, "sender", b"s", _BUS_NAME),
)
_TEXT_FIELDS = {number: (name, kind, pattern) for number, name, kind, pattern in _TEXTS}
_REPLY_SERIAL, _SIGNATURE, _UNIX_FDS = 5, 8, 9
_NUMBERS = {_REPLY_SERIAL: (b"t", 8), _UNIX_FDS: (b"u", 4)}

_NEEDED = {
    METHOD_CALL: ("path", "member"),
    METHOD_RETURN: ("reply_cookie",),
    ERROR: ("reply_cookie", "error_name"),
    SIGNAL: ("path", "interface", "member"),
}
_LOCAL_PATH = "/org/freedesktop/DBus/Local"
_LOCAL_INTERFACE = "org.freedesktop.DBus.Local"


class PayloadError(ValueError):
    """A payload that is not a message, or that says something else than the kdbus message around it."""


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """A D-Bus message; `body` is in dbus1, in the byte order that `order` says.

    Cookies are D-Bus's serials with 64 bits: what is more than 32 has no way into dbus1.
    """

    type: int
    flags: int = 0
    cookie: int
    reply_cookie: int = 0
    path: str | None = None
    interface: str | None = None
    member: str | None = None
    error_name: str | None = None
    destination: str | None = None
    sender: str | None = None
    unix_fds: int = 0
    signature: str = ""
    body: bytes = b""
    order: Order = sys.byteorder


def version(data: bytes) -> int:
    """1 or 2: how the payload that begins with `data` (16 bytes at least) is written."""
    if len(data) < FIXED or data[0] not in b"lB" or data[3] not in (1, 2):
        raise PayloadError("neither dbus1 nor GVariant begins like this")
    return data[3]


def unique_id(name: str) -> int | None:
    """N of the unique name ":1.N" as the bus writes it, else None."""
    found = _UNIQUE_ID.fullmatch(name)
    number = int(found[1]) if found else 1 << 64
    return number if number < 1 << 64 else None


def kdbus_flags(type: int, flags: int) -> int:
    """What struct kdbus_msg has in its flags, for a message with this type and these flags."""
    return (
        (abi.MSG_EXPECT_REPLY if type == METHOD_CALL and not flags & NO_REPLY_EXPECTED else 0)
        | (abi.MSG_NO_AUTO_START if flags & NO_AUTO_START else 0)
        | (abi.MSG_SIGNAL if type == SIGNAL else 0)
    )


def check_agreement(
    kdbus: tuple[int, int, int], type: int, flags: int, cookie: int, reply_cookie: int
) -> None:
    """Raise PayloadError unless a payload says what is said around it, as sd-bus demands.

    `kdbus` is flags, cookie and cookie_reply of struct kdbus_msg; the last shares its place with a
    timeout, so it counts only if no reply is expected. The other numbers are the payload's, of
    either version.
    """
    kflags, kcookie, kreply = kdbus
    if (kflags ^ kdbus_flags(type, flags)) & (abi.MSG_EXPECT_REPLY | abi.MSG_NO_AUTO_START):
        raise PayloadError(f"a message of type {type} with flags {flags} has kdbus flags {kflags}")
    if kcookie != cookie:
        raise PayloadError(f"the cookie is {cookie} in the payload and {kcookie} outside")
    if not kflags & abi.MSG_EXPECT_REPLY and kreply != reply_cookie:
        raise PayloadError(f"it replies to {reply_cookie} in the payload and to {kreply} outside")


def read(data: bytes) -> Message:
    """The message in GVariant that `data` is, all of it. Raises PayloadError or GVariantError."""
    if version(data) != 2:
        raise PayloadError(f"version {data[3]} is not GVariant")
    if len(data) > MAX_SIZE:
        raise PayloadError(f"a message of {len(data)} bytes, more than {MAX_SIZE}")
    order: Order = "big" if data[0] == ord("B") else "little"
    reserved, cookie = struct.unpack_from(">IQ" if order == "big" else "<IQ", data, 4)
    if data[1] == 0 or reserved or cookie == 0:
        raise PayloadError("the type or the cookie is 0, or the reserved number is not")
    word = gvariant.word_size(len(data))
    table = len(data) - word
    fields_end = int.from_bytes(data[table:], "little")
    if not FIXED <= fields_end <= table or word != gvariant.framing_size(table, 1):
        raise PayloadError("the framing offset at the end is not in normal form")
    start = gvariant.skip_padding(data, fields_end, 8, table)
    # "(" and ")" may stand around the longest signature of a body.
    nul = data.rfind(0, max(start, table - gvariant.MAX_SIGNATURE - 3), table)
    if nul < 0 or data[nul + 1 : nul + 2] != b"(" or data[table - 1 : table] != b")":
        raise PayloadError("the body is not a struct")
    signature = data[nul + 2 : table - 1]
    body = gvariant.to_dbus1(data[start:nul], signature, order)
    message = Message(
        type=data[1],
        flags=data[2],
        cookie=cookie,
        signature=signature.decode(),
        body=body,
        order=order,
        **_fields(data, fields_end, order),
    )
    for attribute in _NEEDED.get(message.type, ()):
        if not getattr(message, attribute):
            raise PayloadError(f"a message of type {message.type} without {attribute}")
    if message.type in (METHOD_CALL, SIGNAL) and message.reply_cookie:
        raise PayloadError("a method call or signal is a reply")
    if message.path == _LOCAL_PATH or message.interface == _LOCAL_INTERFACE:
        raise PayloadError(f"{_LOCAL_PATH} and {_LOCAL_INTERFACE} are reserved")
    return message


def _fields(data: bytes, end: int, order: Order) -> dict[str, Any]:
    """The header fields a{tv} from FIXED to `end`; unknown ones are checked and left out."""
    found: dict[str, Any] = {}
    for at, stop in gvariant.elements(data, FIXED, end, 8):
        number = int.from_bytes(data[at : at + 8], order)
        variant = data[at + 8 : stop]
        text = _TEXT_FIELDS.get(number)
        if text is not None:
            attribute, kind, pattern = text
            value = variant[:-3]
            if len(value) > MAX_NAME and attribute != "path":
                raise PayloadError(f"the header field {attribute} is too long")
            if variant[-3:] != b"\0\0" + kind or not pattern.fullmatch(value):
                raise PayloadError(f"the header field {attribute} is not valid")
            new: str | int = value.decode()
        elif number in _NUMBERS:
            attribute = "reply_cookie" if number == _REPLY_SERIAL else "unix_fds"
            kind, size = _NUMBERS[number]
            new = int.from_bytes(variant[:size], order)
            if variant[size:] != b"\0" + kind or (number == _REPLY_SERIAL and not new):
                raise PayloadError(f"the header field {attribute} is not valid")
        elif number in (0, _SIGNATURE):
            raise PayloadError(f"a header field with the number {number}")
        else:
            if stop - at < 8:
                raise PayloadError("a header field is cut off")
            gvariant.to_dbus1(variant, b"v", order)
            continue
        if attribute in found:
            raise PayloadError(f"the header field {attribute} comes twice")
        found[attribute] = new
    return found


def write(message: Message, order: Order = sys.byteorder) -> bytes:
    """The message as one GVariant, numbers in the byte order `order`. Raises GVariantError.

    What is no method call is marked as expecting no reply, as sd-bus marks it: it compares that with
    what kdbus says, and kdbus does not let a reply expect one. Names are taken as they are.
    """
    flags = message.flags if message.type == METHOD_CALL else message.flags | NO_REPLY_EXPECTED
    out = bytearray(
        struct.pack(
            ">BBBBIQ" if order == "big" else "<BBBBIQ",
            ord("B") if order == "big" else ord("l"),
            message.type,
            flags,
            2,
            0,
            message.cookie,
        )
    )
    ends = []
    for number, attribute, kind, _ in _TEXTS:
        text = getattr(message, attribute)
        if text is not None:
            out += bytes(-len(out) & 7)
            out += number.to_bytes(8, order)
            out += text.encode()
            out += b"\0\0" + kind
            ends.append(len(out) - FIXED)
    for number, value in (
        (_REPLY_SERIAL, message.reply_cookie),
        (_UNIX_FDS, message.unix_fds),
    ):
        if value:
            kind, size = _NUMBERS[number]
            out += bytes(-len(out) & 7)
            out += number.to_bytes(8, order)
            out += value.to_bytes(size, order) + b"\0" + kind
            ends.append(len(out) - FIXED)
    word = gvariant.framing_size(len(out) - FIXED, len(ends))
    for end in ends:
        out += end.to_bytes(word, "little")
    fields_end = len(out)
    out += bytes(-fields_end & 7)
    signature = message.signature.encode()
    out += gvariant.to_gvariant(message.body, signature, message.order, order)
    out += b"\0(" + signature + b")"
    out += fields_end.to_bytes(gvariant.framing_size(len(out), 1), "little")
    if len(out) > MAX_SIZE:
        raise GVariantError(f"a message of {len(out)} bytes, more than {MAX_SIZE}")
    return bytes(out)


def body_span(data: bytes, signature: str) -> tuple[int, int]:
    """Where the body stands in what `write` made of a message with this signature."""
    table = len(data) - gvariant.word_size(len(data))
    start = int.from_bytes(data[table:], "little") + 7 & ~7
    return start, table - len(signature) - 3
