"""Headers: each rule of the specification, broken once; what is built reads back."""

from __future__ import annotations

import struct
from typing import Any

import jeepney
import pytest
from dbus_fast import Message as FastMessage
from dbus_fast import MessageType as FastType
from hypothesis import given
from hypothesis import strategies as st

from kbusd.wire import header
from kbusd.wire.validate import WireError
from tests.unit.wire import marshal
from tests.unit.wire.marshal import Field, text_field, uint32_field

PATH = text_field(1, "o", "/a/b")
INTERFACE = text_field(2, "s", "a.b")
MEMBER = text_field(3, "s", "Member")
ERROR_NAME = text_field(4, "s", "a.Error")
REPLY = uint32_field(5, 9)
DESTINATION = text_field(6, "s", ":1.2")
SENDER = text_field(7, "s", ":1.1")
SIGNATURE = text_field(8, "g", "su")
CALL = [PATH, MEMBER]


def call(*more: Field, **parts: Any) -> bytes:
    return marshal.header([*CALL, *more], **parts)


def changed(data: bytes, at: int, to: int) -> bytes:
    return data[:at] + bytes((to,)) + data[at + 1 :]


def deep(levels: int) -> Field:
    """An unknown field whose variant holds `levels` variants within one another."""
    return Field(90, b"v", b"\1v\0" * (levels - 1) + b"\1y\0\0")


LARGEST = (1 << 27) - len(call(SIGNATURE))  # of bodies after this header

VALID = {
    "least call": call(),
    "every field": marshal.header(
        [PATH, INTERFACE, MEMBER, ERROR_NAME, REPLY, DESTINATION, SENDER, SIGNATURE],
        type=4,
    ),
    "no fields, type unknown": marshal.header([], type=5),
    "reply": marshal.header([REPLY], type=2),
    "error": marshal.header([REPLY, ERROR_NAME], type=3),
    "signal": marshal.header([PATH, INTERFACE, MEMBER], type=4),
    "unknown flags": call(flags=0xF8),
    "unknown field": call(Field(10, b"y", b"\1")),
    "unknown field twice": call(Field(99, b"y", b"\1"), Field(99, b"y", b"\1")),
    "names that only begin like reserved ones": marshal.header(
        [
            text_field(1, "o", "/org/freedesktop/DBus/Locally"),
            text_field(2, "s", "org.freedesktop.DBus.Locals"),
            MEMBER,
        ],
        type=4,
    ),
    "unknown field, nested as deep as may be": call(deep(61)),
    "signature of 255": call(text_field(8, "g", "y" * 255)),
    "empty signature": call(text_field(8, "g", "")),
    "descriptors": call(uint32_field(9, 0xFFFFFFFF)),
    "128 MiB": call(SIGNATURE, body_length=LARGEST),
    "40 arrays beside one another": call(text_field(8, "g", "ay" * 40)),
    "32 arrays in a struct in none": call(text_field(8, "g", "(ay" + "a" * 32 + "y)")),
}

INVALID = {
    "no bytes": (b"", "the header is cut off"),
    "cut": (call()[:-1], "the header is cut off"),
    "byte order": (call(mark=b"b"), "the byte order mark is neither 'l' nor 'B'"),
    "type 0": (call(type=0), "the message type is 0 (INVALID)"),
    "version": (call(version=2), "the major protocol version is not 1"),
    "serial": (call(serial=0), "the serial is 0"),
    "fields too long": (
        call(fields_length=(1 << 26) + 1),
        "the header field array is longer than 64 MiB",
    ),
    "message too long": (
        call(SIGNATURE, body_length=LARGEST + 1),
        "the message is longer than 128 MiB",
    ),
    "length overflows": (call(body_length=0xFFFFFFFF), "the message is longer than 128 MiB"),
    "field 0": (call(Field(0, b"y", b"\1")), "a header field has code 0 (INVALID)"),
    "path twice": (call(PATH), "a header field appears twice"),
    "member twice": (call(MEMBER), "a header field appears twice"),
    "signature twice": (call(SIGNATURE, SIGNATURE), "a header field appears twice"),
    "path as string": (
        marshal.header([text_field(1, "s", "/a"), MEMBER]),
        "a header field has the wrong type",
    ),
    "member as path": (
        marshal.header([PATH, text_field(3, "o", "/a")]),
        "a header field has the wrong type",
    ),
    "signature as string": (call(text_field(8, "s", "y")), "a header field has the wrong type"),
    "member as signature": (
        marshal.header([PATH, text_field(3, "g", "y")]),
        "a header field has the wrong type",
    ),
    "reply serial as int32": (
        call(Field(5, b"i", b"\1\0\0\0")),
        "a header field has the wrong type",
    ),
    "descriptors as string": (call(text_field(9, "s", "1")), "a header field has the wrong type"),
    "member in a struct": (
        marshal.header([PATH, Field(3, b"(y)", b"\0\0\1")]),
        "a header field has the wrong type",
    ),
    "reply serial 0": (marshal.header([uint32_field(5, 0)], type=2), "the reply serial is 0"),
    "local path": (
        marshal.header([text_field(1, "o", "/org/freedesktop/DBus/Local"), MEMBER]),
        "the path /org/freedesktop/DBus/Local is reserved",
    ),
    "local interface": (
        call(text_field(2, "s", "org.freedesktop.DBus.Local")),
        "the interface org.freedesktop.DBus.Local is reserved",
    ),
    "path": (
        marshal.header([text_field(1, "o", "/a/"), MEMBER]),
        "an object path is not valid",
    ),
    "interface": (
        call(text_field(2, "s", "nodot")),
        "the interface is not a valid interface name",
    ),
    "member": (
        marshal.header([PATH, text_field(3, "s", "a.b")]),
        "the member is not a valid member name",
    ),
    "error name": (call(text_field(4, "s", "1.2")), "the error name is not valid"),
    "destination": (call(text_field(6, "s", "a")), "the destination is not a valid bus name"),
    "sender": (call(text_field(7, "s", "")), "the sender is not a valid bus name"),
    "not ASCII": (
        marshal.header([PATH, text_field(3, "s", "é")]),
        "the member is not a valid member name",
    ),
    "NUL within": (
        marshal.header([PATH, text_field(3, "s", "a\0b")]),
        "the member is not a valid member name",
    ),
    "call without path": (
        marshal.header([MEMBER]),
        "a method call or signal has no path",
    ),
    "call without member": (
        marshal.header([PATH]),
        "a method call or signal has no member",
    ),
    "signal without path": (
        marshal.header([INTERFACE, MEMBER], type=4),
        "a method call or signal has no path",
    ),
    "signal without member": (
        marshal.header([PATH, INTERFACE], type=4),
        "a method call or signal has no member",
    ),
    "signal without interface": (call(type=4), "a signal has no interface"),
    "return without serial": (call(type=2), "a reply has no reply serial"),
    "error without serial": (marshal.header([ERROR_NAME], type=3), "a reply has no reply serial"),
    "error without name": (marshal.header([REPLY], type=3), "an error has no error name"),
    "body without signature": (call(body_length=1), "there is a body but no signature"),
    "body with empty signature": (
        call(text_field(8, "g", ""), body_length=1),
        "there is a body but no signature",
    ),
    "padding between fields": (changed(call(), 29, 1), "alignment padding is not zero"),
    "padding at the end": (changed(call(), -1 + len(call()), 1), "alignment padding is not zero"),
    "padding counted": (
        call(fields_length=len(call()) - 16),
        "a header field reaches past the end of the field array",
    ),
    "last field cut": (
        call(fields_length=30),
        "a header field reaches past the end of the field array",
    ),
    "no NUL": (
        changed(call(), 28, ord("x")),
        "a string, object path or signature does not end in NUL",
    ),
    "string past the end": (
        changed(call(), 36, 200),
        "a header field reaches past the end of the field array",
    ),
    "bad unknown field": (
        call(text_field(77, "s", b"\xff")),
        "a string is not valid UTF-8 without NUL",
    ),
    "unknown field of two types": (
        call(Field(77, b"yy", b"\0\0")),
        "a variant's signature is not one single complete type",
    ),
    "unknown field of no type": (
        call(Field(77, b"", b"\0\0")),
        "a variant's signature is not one single complete type",
    ),
    "unknown field too deep": (call(deep(62)), "values are nested more than 64 deep"),
    "unknown field past the end": (
        call(Field(77, b"t", b"\0\0\0\0")),
        "a header field reaches past the end of the field array",
    ),
    "unknown type in signature": (
        call(text_field(8, "g", "z")),
        "a signature has an unknown type code",
    ),
    "33 arrays": (
        call(text_field(8, "g", "a" * 33 + "y")),
        "a signature nests more than 32 arrays",
    ),
    "33 arrays, with a struct among them": (
        call(text_field(8, "g", "a" * 16 + "(y" + "a" * 17 + "y)")),
        "a signature nests more than 32 arrays",
    ),
    "33 structs": (
        call(text_field(8, "g", "(" * 33 + "y" + ")" * 33)),
        "a signature nests more than 32 structs",
    ),
    "array of nothing": (
        call(text_field(8, "g", "a")),
        "an array in a signature has no element type",
    ),
    "array of nothing in a struct": (
        call(text_field(8, "g", "(ya)")),
        "an array in a signature has no element type",
    ),
    "empty struct": (call(text_field(8, "g", "()")), "a struct in a signature has no fields"),
    "open struct": (
        call(text_field(8, "g", "(y")),
        "a struct or dict entry in a signature is not closed",
    ),
    "closed struct": (
        call(text_field(8, "g", "y)")),
        "a struct or dict entry in a signature is closed but was not opened",
    ),
    "brackets crossed": (
        call(text_field(8, "g", "a{s(y})")),
        "a struct or dict entry in a signature is closed but was not opened",
    ),
    "dict entry alone": (
        call(text_field(8, "g", "{sv}")),
        "a dict entry in a signature is not an array's element",
    ),
    "dict entry with a container as its key": (
        call(text_field(8, "g", "a{vs}")),
        "a dict entry's key in a signature is not a basic type",
    ),
    "dict entry of one": (
        call(text_field(8, "g", "a{s}")),
        "a dict entry in a signature has not exactly two fields",
    ),
    "dict entry of three": (
        call(text_field(8, "g", "a{sss}")),
        "a dict entry in a signature has not exactly two fields",
    ),
}


@pytest.mark.parametrize("name", VALID)
def test_valid(name: str) -> None:
    data = VALID[name]
    parsed = header.parse(data)
    assert parsed.header_length == len(data)
    assert header.total_length(data[:16]) == len(data) + parsed.body_length


@pytest.mark.parametrize("name", INVALID)
def test_invalid(name: str) -> None:
    data, rule = INVALID[name]
    with pytest.raises(WireError) as error:
        header.parse(data)
    assert error.value.text == str(error.value) == header.reason(error.value.code) == rule


@pytest.mark.parametrize(
    "name", ["byte order", "type 0", "version", "fields too long", "message too long"]
)
def test_the_first_16_bytes_are_enough_to_refuse(name: str) -> None:
    data, rule = INVALID[name]
    with pytest.raises(WireError, match=rule.split("(")[0]):
        header.total_length(data[:16])


def test_the_parts_are_found() -> None:
    parsed = header.parse(VALID["every field"])
    assert parsed == header.ParsedHeader(
        endian="l",
        type=4,
        flags=0,
        serial=1,
        reply_serial=9,
        body_length=0,
        header_length=len(VALID["every field"]),
        unix_fds=0,
        path="/a/b",
        interface="a.b",
        member="Member",
        error_name="a.Error",
        destination=":1.2",
        sender=":1.1",
        signature="su",
        unknown_fields=False,
    )
    assert header.parse(VALID["unknown field"]).unknown_fields
    assert header.parse(VALID["descriptors"]).unix_fds == 0xFFFFFFFF


def test_no_cut_header_is_accepted() -> None:
    data = VALID["every field"]
    for length in range(len(data)):
        with pytest.raises(WireError, match="cut off"):
            header.parse(data[:length])


@given(marshal.messages())
def test_messages_of_all_kinds(data: bytes) -> None:
    """jeepney, where it reads a header at all, reads the same from it."""
    parsed = header.parse(data)
    assert header.total_length(data[:16]) == len(data)
    if parsed.type <= 4 and not parsed.unknown_fields:
        theirs, _ = jeepney.low_level.Header.from_buffer(data)
        fields = theirs.fields
        assert parsed.serial == theirs.serial
        assert parsed.path == fields.get(jeepney.HeaderFields.path)
        assert parsed.interface == fields.get(jeepney.HeaderFields.interface)
        assert parsed.member == fields.get(jeepney.HeaderFields.member)
        assert parsed.error_name == fields.get(jeepney.HeaderFields.error_name)
        assert parsed.reply_serial == fields.get(jeepney.HeaderFields.reply_serial)
        assert parsed.destination == fields.get(jeepney.HeaderFields.destination)
        assert parsed.sender == fields.get(jeepney.HeaderFields.sender)
        assert parsed.signature == fields.get(jeepney.HeaderFields.signature, "")


def test_what_dbus_fast_writes() -> None:
    data = FastMessage(
        destination="org.example.Name",
        path="/a",
        interface="a.b",
        member="M",
        message_type=FastType.METHOD_CALL,
        signature="sa{sv}",
        body=["x", {}],
        serial=3,
    )._marshall(False)
    parsed = header.parse(bytes(data))
    assert (parsed.destination, parsed.path, parsed.member) == ("org.example.Name", "/a", "M")
    assert parsed.signature == "sa{sv}"


# -- build -----------------------------------------------------------------------------------


@given(
    big=st.booleans(),
    type=st.sampled_from((1, 2, 3, 4)),
    path=st.none() | marshal.PATHS,
    interface=st.none() | marshal.INTERFACES,
    member=st.none() | marshal.MEMBERS,
    destination=st.none() | marshal.BUS_NAMES,
    signature=st.none() | marshal.signatures(),
    fds=st.integers(0, 16),
    reply=st.booleans(),
)
def test_what_is_built_reads_back(
    big: bool,
    type: int,
    path: str | None,
    interface: str | None,
    member: str | None,
    destination: str | None,
    signature: str | None,
    fds: int,
    reply: bool,
) -> None:
    if type in (1, 4):
        path, member = path or "/", member or "M"
    if type == 4:
        interface = interface or "a.b"
    reply = reply or type in (2, 3)
    body_length = 5 if signature else 0
    made = header.build(
        ord("B") if big else ord("l"),
        type,
        3,
        path=path,
        interface=interface,
        member=member,
        error_name="a.E" if type == 3 else None,
        destination=destination,
        sender=":1.9",
        signature=signature,
        unix_fds=fds,
        has_reply_serial=reply,
        reply_serial=77 if reply else 0,
        serial=78,
        body_length=body_length,
    )
    assert header.parse(made) == header.ParsedHeader(
        endian="B" if big else "l",
        type=type,
        flags=3,
        serial=78,
        reply_serial=77 if reply else None,
        body_length=body_length,
        header_length=len(made),
        unix_fds=fds,
        path=path,
        interface=interface,
        member=member,
        error_name="a.E" if type == 3 else None,
        destination=destination,
        sender=":1.9",
        signature=signature or "",
        unknown_fields=False,
    )


@pytest.mark.parametrize("order", ["<", ">"])
def test_serials_and_lengths_are_patched_in_place(order: str) -> None:
    endian = ord("l") if order == "<" else ord("B")
    made = bytearray(
        header.build(endian, 2, 1, destination=":1.2", signature="s", has_reply_serial=True)
    )
    assert made[4:12] == bytes(8)
    struct.pack_into(order + "I", made, 4, 1000)
    struct.pack_into(order + "I", made, 8, 1001)
    struct.pack_into(order + "I", made, 20, 1002)
    parsed = header.parse(bytes(made))
    assert (parsed.body_length, parsed.serial, parsed.reply_serial) == (1000, 1001, 1002)


def test_bytes_and_str_make_the_same() -> None:
    assert header.build(ord("l"), 1, 0, b"/", b"a.b", b"M", signature=b"s") == header.build(
        ord("l"), 1, 0, "/", "a.b", "M", signature="s"
    )


@pytest.mark.parametrize(
    ("parts", "rule"),
    [
        ({"type": 0}, "the message type is 0"),
        ({"type": 300}, "the message type is 0"),
        ({"type": 1, "member": "M"}, "has no path"),
        ({"type": 1, "path": "/a//b", "member": "M"}, "an object path is not valid"),
        ({"type": 1, "path": "/", "member": "M\0"}, "not a valid member name"),
        ({"type": 2}, "a reply has no reply serial"),
        ({"type": 9, "sender": "x"}, "the sender is not a valid bus name"),
        ({"type": 9, "signature": "y" * 256}, "a signature is longer than 255 bytes"),
        ({"type": 9, "signature": "a"}, "no element type"),
        ({"type": 9, "body_length": 1}, "a body but no signature"),
        ({"type": 9, "signature": "ay", "body_length": 1 << 27}, "longer than 128 MiB"),
    ],
)
def test_nothing_is_built_that_breaks_a_rule(parts: dict[str, Any], rule: str) -> None:
    with pytest.raises(WireError, match=rule):
        header.build(ord("l"), parts.pop("type"), 0, **parts)
