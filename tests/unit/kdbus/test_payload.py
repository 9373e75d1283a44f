"""Whole messages in GVariant: against the bytes that sd-bus writes, GLib, and hostile ones."""

from __future__ import annotations

import ast
import json
import struct
from pathlib import Path

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kbusd.kdbus import abi, gvariant, payload
from kbusd.kdbus.gvariant import GVariantError
from kbusd.kdbus.payload import Message, PayloadError
from kbusd.wire import body, header, names
from tests.unit.kdbus import glib
from tests.unit.kdbus.cases import ORDERS, altered, unhurried
from tests.unit.wire import marshal

CALL = Message(
    type=1,
    cookie=7,
    path="/org/example",
    interface="org.example.I",
    member="Get",
    destination="org.example",
    signature="su",
    body=struct.pack("<I3sxI", 2, b"hi", 5),
    order="little",
)

# As sd-bus lays a message out: part by part, offsets by hand.
CALL_BYTES = b"".join(
    (
        b"l\1\0\2" + bytes(4) + struct.pack("<Q", 7),
        struct.pack("<Q", 1) + b"/org/example\0\0o" + b"\0",  # 8 + 12 + 3, padded to 24
        struct.pack("<Q", 2) + b"org.example.I\0\0s",  # 24 + 8 + 13 + 3 = 48
        struct.pack("<Q", 3) + b"Get\0\0s" + b"\0\0",  # 48 + 14 = 62, padded to 64
        struct.pack("<Q", 6) + b"org.example\0\0s",  # 64 + 8 + 11 + 3 = 86
        bytes((23, 48, 62, 86)),  # the ends of the fields
        bytes(6),  # 16 + 90 = 106, padded to 112
        b"hi\0\0" + struct.pack("<I", 5) + b"\3",  # the body, and where its string ends
        b"\0(su)",
        bytes((106,)),  # the end of the fields
    )
)


@st.composite
def messages(draw: st.DrawFn) -> Message:
    content = draw(marshal.bodies())
    type = draw(st.sampled_from((1, 2, 3, 4, 77)))
    flags = draw(st.sampled_from((0, 1, 2, 4, 7)))

    def optional(needed: bool, values: st.SearchStrategy[str]) -> str | None:
        return draw(values if needed else st.none() | values)

    return Message(
        type=type,
        flags=flags if type == 1 else flags | payload.NO_REPLY_EXPECTED,
        cookie=draw(st.integers(1, 2**64 - 1)),
        reply_cookie=draw(st.integers(1, 2**64 - 1)) if type in (2, 3) else 0,
        path=optional(type in (1, 4), marshal.PATHS),
        interface=optional(type == 4, marshal.INTERFACES),
        member=optional(type in (1, 4), marshal.MEMBERS),
        error_name=optional(type == 3, marshal.INTERFACES),
        destination=optional(False, marshal.BUS_NAMES),
        sender=optional(False, marshal.BUS_NAMES),
        unix_fds=draw(st.integers(0, 3)),
        signature=content.signature,
        body=content.data,
        order=ORDERS[content.big_endian],
    )


def test_a_message_is_written_as_sd_bus_wrote_it() -> None:
    assert payload.write(CALL, "little") == CALL_BYTES
    assert payload.read(CALL_BYTES) == CALL


# What sd-bus itself wrote: that of elogind 246, the last one in Debian with GVariant, switched to it.
RECORDED = [
    json.loads(line)
    for line in Path(__file__).with_name("sd_bus_messages.jsonl").read_text().splitlines()
]


@pytest.mark.parametrize(("kind", "signature", "values", "data"), RECORDED)
def test_what_sd_bus_wrote_is_read_and_written_the_same(
    kind: str, signature: str, values: str, data: str
) -> None:
    recorded = bytes.fromhex(data)
    message = payload.read(recorded)
    assert (message.path, message.interface) == ("/org/example", "org.example.I")
    assert message.signature == signature
    assert message.body == marshal.marshal(signature, ast.literal_eval(values), False)
    if kind == "signal":
        assert (message.type, message.flags, message.member) == (4, 1, "Changed")
        assert payload.write(message, "little") == recorded
    else:  # it has the member before the interface in method calls
        assert (message.type, message.flags, message.member) == (1, 1, "Get")
        assert payload.read(payload.write(message, "little")) == message


@unhurried
@given(messages())
def test_a_message_comes_back_as_it_was(message: Message) -> None:
    data = payload.write(message, message.order)
    assert payload.version(data) == 2
    assert payload.read(data) == message


@glib.needed
@unhurried
@given(messages(), st.sampled_from(ORDERS))
def test_glib_reads_what_is_written(message: Message, order: payload.Order) -> None:
    data = payload.write(message, order)
    assert glib.is_normal_form("(yyyyuta{tv}v)", data)
    back = payload.read(data)
    assert back.order == order
    plain = {"body": b"", "order": "little"}
    assert msgspec.structs.replace(back, **plain) == msgspec.structs.replace(message, **plain)
    body.check_body(back.body, back.signature.encode(), order == "big")


@unhurried
@given(messages(), st.data())
def test_altered_messages_are_refused_or_valid(message: Message, data: st.DataObject) -> None:
    """What is read makes a header and a body that the wire format's own checks accept."""
    hostile = altered(data.draw, payload.write(message, message.order))
    try:
        read = payload.read(hostile)
    except (PayloadError, GVariantError):
        return
    again = payload.write(read, read.order)
    assert payload.read(again) == msgspec.structs.replace(read, flags=again[2])
    big = read.order == "big"
    body.check_body(read.body, read.signature.encode(), big)
    built = header.build(
        ord("B" if big else "l"),
        read.type,
        read.flags,
        path=read.path,
        interface=read.interface,
        member=read.member,
        error_name=read.error_name,
        destination=read.destination,
        sender=read.sender,
        signature=read.signature,
        unix_fds=read.unix_fds,
        has_reply_serial=read.reply_cookie > 0,
        reply_serial=min(read.reply_cookie, 2**32 - 1),
        serial=min(read.cookie, 2**32 - 1),
        body_length=len(read.body),
    )
    assert header.parse(built).member == read.member


@unhurried
@given(st.text("aB0_-.:/ é", max_size=8))
@example(":")
@example(":.")
@example(":.a")
@example(":1.7")
@example(":1.7.")
@example("a.b")
@example("a.-b")
@example("-a.b-")
@example("a." + "b" * 253)
@example("a." + "b" * 254)
@example("m" * 255)
@example("m" * 256)
@example("/a/b")
@example("/a\n")
def test_the_rules_for_names_are_those_of_the_wire_format(text: str) -> None:
    for attribute, valid in (
        ("path", names.is_path),
        ("interface", names.is_interface),
        ("member", names.is_member),
        ("error_name", names.is_error_name),
        ("destination", names.is_bus_name),
        ("sender", names.is_bus_name),
    ):
        message = msgspec.structs.replace(CALL, **{attribute: text})
        data = payload.write(message, "little")
        if valid(text):
            assert payload.read(data) == message
        else:
            with pytest.raises(PayloadError, match=attribute):
                payload.read(data)


def with_fields(*fields: tuple[int, bytes]) -> bytes:
    """A method call with these header fields besides path and member, without a body."""
    array, ends = b"", []
    for number, variant in ((1, b"/\0\0o"), (3, b"M\0\0s"), *fields):
        array += bytes(-len(array) % 8)
        array += struct.pack("<Q", number) + variant
        ends.append(len(array))
    array += bytes(ends)
    data = b"l\1\0\2" + bytes(4) + struct.pack("<Q", 7) + array
    return data + bytes(-len(array) % 8) + b"\0" + b"\0()" + bytes((16 + len(array),))


def test_unknown_fields_are_left_out() -> None:
    expected = Message(type=1, cookie=7, path="/", member="M", order="little")
    assert payload.read(with_fields()) == expected
    assert payload.read(with_fields((77, b"x\0\0s"), (2**64 - 1, b"\1\0y"))) == expected


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ([(0, b"x\0\0s")], "number 0"),
        ([(8, b"s\0\0g")], "number 8"),
        ([(3, b"M\0\0s")], "twice"),
        ([(6, b"a.b\0\0o")], "destination is not valid"),
        ([(6, b"a.b\0s")], "destination is not valid"),
        ([(6, b"")], "destination is not valid"),
        ([(5, struct.pack("<Q", 9) + b"\0x")], "reply_cookie is not valid"),
        ([(5, struct.pack("<I", 9) + b"\0u")], "reply_cookie is not valid"),
        ([(5, struct.pack("<Q", 0) + b"\0t")], "reply_cookie is not valid"),
        ([(5, struct.pack("<Q", 9) + b"\0t")], "is a reply"),
        ([(9, b"\1\0\0\0\0i")], "unix_fds is not valid"),
        ([(77, b"x\0y\0\0s")], "NUL"),
        ([(77, b"")], "signature"),
        ([(2, b"org.freedesktop.DBus.Local\0\0s")], "reserved"),
    ],
)
def test_wrong_fields_are_refused(fields: list[tuple[int, bytes]], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        payload.read(with_fields(*fields))


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "neither"),
        (CALL_BYTES[:15], "neither"),
        (b"x" + CALL_BYTES[1:], "neither"),
        (CALL_BYTES[:3] + b"\3" + CALL_BYTES[4:], "neither"),
        (CALL_BYTES[:3] + b"\1" + CALL_BYTES[4:], "not GVariant"),
        (b"l\0" + CALL_BYTES[2:], "type or the cookie"),
        (b"l\1\0\2\1" + CALL_BYTES[5:], "reserved"),
        (CALL_BYTES[:8] + bytes(8) + CALL_BYTES[16:], "cookie"),
        (CALL_BYTES[:16], "framing offset"),
        (CALL_BYTES[:-1] + b"\x0f", "framing offset"),
        (CALL_BYTES[:-1] + b"\xff", "framing offset"),
        (CALL_BYTES[:-2] + b"]" + CALL_BYTES[-1:], "not a struct"),
        (CALL_BYTES[:-5] + b"u" + CALL_BYTES[-4:], "not a struct"),
        (b"l\2" + CALL_BYTES[2:], "without reply_cookie"),
        (b"l\3" + CALL_BYTES[2:], "without reply_cookie"),
    ],
)
def test_what_is_no_message_is_refused(data: bytes, why: str) -> None:
    with pytest.raises(PayloadError, match=why):
        payload.read(data)


def test_an_offset_wider_than_needed_is_refused() -> None:
    text = "x" * 137
    body = struct.pack("<I", len(text)) + text.encode() + b"\0"
    data = payload.write(msgspec.structs.replace(CALL, signature="s", body=body), "little")
    assert len(data) == 255
    assert payload.read(data).body == body
    with pytest.raises(PayloadError, match="framing offset"):
        payload.read(data + b"\0")


def test_replies_and_signals_expect_no_reply() -> None:
    """An sd-bus that gets one refuses it otherwise."""
    signal = msgspec.structs.replace(CALL, type=payload.SIGNAL)
    assert payload.read(payload.write(signal, "little")).flags == payload.NO_REPLY_EXPECTED
    assert payload.kdbus_flags(payload.SIGNAL, 0) == abi.MSG_SIGNAL
    assert payload.kdbus_flags(payload.METHOD_CALL, 0) == abi.MSG_EXPECT_REPLY
    assert payload.kdbus_flags(payload.METHOD_CALL, 3) == abi.MSG_NO_AUTO_START
    assert payload.kdbus_flags(payload.METHOD_RETURN, 0) == 0


@pytest.mark.parametrize(
    ("kdbus", "inside", "why"),
    [
        ((1, 7, 99), (1, 0, 7, 0), None),  # 99 is a timeout
        ((0, 7, 0), (1, 1, 7, 0), None),
        ((2, 7, 0), (1, 3, 7, 0), None),
        ((4, 7, 0), (4, 0, 7, 0), None),
        ((0, 7, 0), (4, 1, 7, 0), None),  # a signal to one receiver need not be marked
        ((0, 7, 3), (2, 1, 7, 3), None),
        ((0, 7, 0), (1, 0, 7, 0), "flags"),
        ((1, 7, 0), (1, 1, 7, 0), "flags"),
        ((1, 7, 0), (1, 2, 7, 0), "flags"),
        ((1, 8, 0), (1, 0, 7, 0), "cookie is 7"),
        ((0, 7, 3), (2, 1, 7, 4), "replies to 4"),
        ((0, 7, 3), (4, 1, 7, 0), "replies to 0"),
    ],
)
def test_payload_and_kdbus_must_agree(
    kdbus: tuple[int, int, int], inside: tuple[int, int, int, int], why: str | None
) -> None:
    if why is None:
        payload.check_agreement(kdbus, *inside)
    else:
        with pytest.raises(PayloadError, match=why):
            payload.check_agreement(kdbus, *inside)


@pytest.mark.parametrize(
    ("name", "number"),
    [
        (":1.7", 7),
        (":1.0", 0),
        (":1.18446744073709551615", 2**64 - 1),
        (":1.18446744073709551616", None),
        (":1.07", None),
        (":1.+7", None),
        (":1.٧", None),
        (":1.7\n", None),
        (":2.7", None),
        ("org.example", None),
    ],
)
def test_unique_names_are_numbers(name: str, number: int | None) -> None:
    assert payload.unique_id(name) == number


def test_the_two_versions_are_told_apart() -> None:
    assert payload.version(CALL_BYTES) == 2
    assert payload.version(header.build(ord("l"), 1, 0, path="/", member="M", serial=1)) == 1
    assert payload.version(b"B\1\0\1" + bytes(12)) == 1


@pytest.mark.parametrize(("signature", "size"), [("ay", 0), ("ay", 300), ("say", 70_000), ("", 0)])
def test_where_the_body_stands(signature: str, size: int) -> None:
    text = struct.pack("=I", 1) + b"x\0\0\0" if "s" in signature else b""
    body = (
        text + struct.pack("=I", size) + bytes(range(1, 251)) * (size // 250) if signature else b""
    )
    body += b"y" * (size % 250)
    data = payload.write(
        Message(type=1, cookie=7, path="/x", member="Do", signature=signature, body=body)
    )
    start, end = payload.body_span(data, signature)
    assert start % 8 == 0
    assert data[start:end] == gvariant.to_gvariant(body, signature.encode(), "little", "little")
    assert data[end:].startswith(b"\0(" + signature.encode() + b")")
