"""A message that breaks a rule ends the connection that sent it, and nothing else.

Each row is one broken rule of the D-Bus specification; the same message without the fault is
shown to pass, so that it is the fault that ends the connection.
"""

from __future__ import annotations

import struct
from typing import Any

import pytest

from . import wireformat as w
from .daemon import Bus
from .rawclient import DRIVER, DRIVER_PATH, Disconnected

CALL = {w.PATH: "/a", w.DESTINATION: DRIVER, w.INTERFACE: "test.I", w.MEMBER: "M"}
SIGNAL = {w.PATH: "/a", w.INTERFACE: "test.I", w.MEMBER: "S"}


def call(changes: dict[int, Any] | None = None, *args: Any, **options: Any) -> bytes:
    return w.build(w.CALL, CALL | (changes or {}), *args, serial=9, **options)


def signal(*args: Any, without: int = 0, **options: Any) -> bytes:
    fields = {code: value for code, value in SIGNAL.items() if code != without}
    return w.build(w.SIGNAL, fields, *args, serial=9, **options)


def with_body(signature: str, body: bytes) -> bytes:
    return signal(signature, body=body)


def field_array(*items: bytes) -> bytes:
    data = b""
    for item in items:
        data += bytes(-len(data) % 8) + item
    return struct.pack("<I", len(data)) + data


def raw_field(code: int, signature: bytes, value: bytes) -> bytes:
    return bytes([code, len(signature)]) + signature + b"\0" + value


def string(text: bytes) -> bytes:
    return struct.pack("<I", len(text)) + text + b"\0"


PATH_FIELD = raw_field(w.PATH, b"o", string(b"/a"))
INTERFACE_FIELD = raw_field(w.INTERFACE, b"s", string(b"test.I"))
MEMBER_FIELD = raw_field(w.MEMBER, b"s", string(b"S"))


def raw_signal(*items: bytes) -> bytes:
    """A signal whose header fields are given as bytes, aligned to 8 each."""
    return w.build(w.SIGNAL, serial=9, raw_fields=field_array(*items))


def nested(depth: int, inner: str = "y") -> tuple[str, bytes]:
    """An array of arrays ... of one byte, as (signature, body)."""
    body = b"\x01"
    for _ in range(depth):
        body = struct.pack("<I", len(body)) + body
    return "a" * depth + inner, body


def variants(depth: int) -> bytes:
    """A variant in a variant ... with a byte at the end."""
    return b"\x01v\0" * (depth - 1) + b"\x01y\0\x01"


LONG = "a" * 250

BROKEN: dict[str, bytes] = {
    # the fixed part
    "byte order mark": signal(endian_byte=b"x"),
    "byte order mark, upper case": signal(endian_byte=b"L"),
    "protocol version 0": signal(version=0),
    "protocol version 2": signal(version=2),
    "message type 0": w.build(0, SIGNAL, serial=9),
    "serial 0": w.build(w.SIGNAL, SIGNAL, serial=0),
    "message over 128 MiB": signal(body_length=0x8000001, body=b""),
    "body length 2^32 - 1": signal(body_length=0xFFFFFFFF, body=b""),
    "header array over 64 MiB": w.build(
        w.SIGNAL, serial=9, raw_fields=struct.pack("<I", 0x4000001)
    ),
    "header padding not zero": w.build(
        w.SIGNAL, {w.PATH: "/a", w.INTERFACE: "test.Ix", w.MEMBER: "S"}, serial=9, padding=b"\1"
    ),
    # required fields
    "signal without path": signal(without=w.PATH),
    "signal without interface": signal(without=w.INTERFACE),
    "signal without member": signal(without=w.MEMBER),
    "call without path": w.build(w.CALL, {w.DESTINATION: DRIVER, w.MEMBER: "M"}, serial=9),
    "call without member": w.build(w.CALL, {w.DESTINATION: DRIVER, w.PATH: "/a"}, serial=9),
    "return without reply serial": w.build(w.RETURN, {w.DESTINATION: DRIVER}, serial=9),
    "error without name": w.build(w.ERROR, {w.DESTINATION: DRIVER, w.REPLY_SERIAL: 1}, serial=9),
    "error without reply serial": w.build(
        w.ERROR, {w.DESTINATION: DRIVER, w.ERROR_NAME: "test.E"}, serial=9
    ),
    "reply serial 0": w.build(w.RETURN, {w.DESTINATION: DRIVER, w.REPLY_SERIAL: 0}, serial=9),
    # header fields
    "field code 0": signal(extra_fields=((0, "s", "x"),)),
    "path as string": raw_signal(
        raw_field(w.PATH, b"s", string(b"/a")), INTERFACE_FIELD, MEMBER_FIELD
    ),
    "member as number": raw_signal(
        PATH_FIELD, INTERFACE_FIELD, raw_field(w.MEMBER, b"u", struct.pack("<I", 4))
    ),
    "reply serial as string": w.build(
        w.RETURN, {w.DESTINATION: DRIVER}, serial=9, extra_fields=((w.REPLY_SERIAL, "s", "1"),)
    ),
    "same field twice": signal(extra_fields=((w.MEMBER, "s", "T"),)),
    "field past the end of the array": w.build(
        w.SIGNAL,
        serial=9,
        raw_fields=struct.pack("<I", 8) + PATH_FIELD + bytes(8) + INTERFACE_FIELD,
    ),
    "field with two types": raw_signal(
        PATH_FIELD, INTERFACE_FIELD, MEMBER_FIELD, raw_field(200, b"yy", b"\1\1")
    ),
    "field with an empty type": raw_signal(
        PATH_FIELD, INTERFACE_FIELD, MEMBER_FIELD, raw_field(200, b"", b"")
    ),
    "string without NUL": raw_signal(
        PATH_FIELD, INTERFACE_FIELD, raw_field(w.MEMBER, b"s", b"\1\0\0\0SS")
    ),
    # names and paths
    "path empty": call({w.PATH: ""}),
    "path without slash": call({w.PATH: "a"}),
    "path with slash at the end": call({w.PATH: "/a/"}),
    "path with empty element": call({w.PATH: "/a//b"}),
    "path with bad character": call({w.PATH: "/a-b"}),
    "path not ASCII": call({w.PATH: "/ä"}),
    "interface without dot": call({w.INTERFACE: "test"}),
    "interface empty": call({w.INTERFACE: ""}),
    "interface with empty element": call({w.INTERFACE: "test..I"}),
    "interface beginning with dot": call({w.INTERFACE: ".test.I"}),
    "interface ending with dot": call({w.INTERFACE: "test."}),
    "interface element begins with digit": call({w.INTERFACE: "test.1I"}),
    "interface with hyphen": call({w.INTERFACE: "test-a.I"}),
    "interface over 255": call({w.INTERFACE: f"test.{LONG}a"}),
    "member empty": call({w.MEMBER: ""}),
    "member with dot": call({w.MEMBER: "a.b"}),
    "member begins with digit": call({w.MEMBER: "1a"}),
    "member over 255": call({w.MEMBER: "m" * 256}),
    "error name without dot": w.build(
        w.ERROR, {w.DESTINATION: DRIVER, w.REPLY_SERIAL: 1, w.ERROR_NAME: "error"}, serial=9
    ),
    "destination without dot": call({w.DESTINATION: "test"}),
    "destination empty": call({w.DESTINATION: ""}),
    "destination element begins with digit": call({w.DESTINATION: "test.1a"}),
    "destination with bad character": call({w.DESTINATION: "test.a/b"}),
    "destination over 255": call({w.DESTINATION: f"test.{LONG}a"}),
    "sender without dot": call({w.SENDER: "x"}),
    # reserved
    "reserved interface Local": w.build(
        w.SIGNAL,
        {w.PATH: "/a", w.INTERFACE: "org.freedesktop.DBus.Local", w.MEMBER: "Disconnected"},
        serial=9,
    ),
    "reserved path Local": w.build(
        w.SIGNAL,
        {w.PATH: "/org/freedesktop/DBus/Local", w.INTERFACE: "test.I", w.MEMBER: "S"},
        serial=9,
    ),
    "call to reserved interface Local": call({w.INTERFACE: "org.freedesktop.DBus.Local"}),
    # signatures
    "signature unknown type": with_body("z", b""),
    "signature array of nothing": with_body("a", b""),
    "signature struct not closed": with_body("(y", b""),
    "signature struct not opened": with_body("y)", b""),
    "signature empty struct": with_body("()", b""),
    "signature dict outside array": with_body("{yy}", b""),
    "signature dict with variant key": with_body("a{vy}", bytes(8)),
    "signature dict with three": with_body("a{yyy}", bytes(8)),
    "signature dict with one": with_body("a{y}", bytes(8)),
    "signature mis-nested": with_body("a{(y})", bytes(8)),
    "arrays nested 33 deep": with_body(*nested(33)),
    "structs nested 33 deep": with_body("(" * 33 + "y" + ")" * 33, b"\1"),
    "values nested 65 deep": with_body("v", variants(65)),
    # bodies
    "body without signature": w.build(w.SIGNAL, SIGNAL, serial=9, body=b"\1"),
    "signature without body": with_body("y", b""),
    "body too long": with_body("y", b"\1\1"),
    "body too short": with_body("u", b"\1\0\0"),
    "boolean 2": with_body("b", b"\2\0\0\0"),
    "string not UTF-8": with_body("s", b"\1\0\0\0\xff\0"),
    "string overlong UTF-8": with_body("s", b"\2\0\0\0\xc0\x80\0"),
    "string with surrogate": with_body("s", b"\3\0\0\0\xed\xa0\x80\0"),
    "string over U+10FFFF": with_body("s", b"\4\0\0\0\xf4\x90\x80\x80\0"),
    "string with NUL inside": with_body("s", b"\3\0\0\0a\0b\0"),
    "string not ended by NUL": with_body("s", b"\1\0\0\0ab"),
    "string longer than body": with_body("s", b"\xff\0\0\0a\0"),
    "string length 2^32 - 1": with_body("s", b"\xff\xff\xff\xff"),
    "object path bad": with_body("o", b"\1\0\0\0a\0"),
    "object path empty": with_body("o", b"\0\0\0\0\0"),
    "signature value bad": with_body("g", b"\1z\0"),
    "signature value not ended": with_body("g", b"\1yy"),
    "padding not zero": with_body("yu", b"\1\1\0\0\1\0\0\0"),
    "padding of a struct not zero": with_body("y(y)", b"\1\0\0\0\0\0\1\0\1"),
    "array over 64 MiB": with_body("ay", b"\1\0\0\4"),
    "array longer than body": with_body("ay", b"\5\0\0\0\1"),
    "array length splits an element": with_body("au", b"\3\0\0\0\1\0\0\0"),
    "array of strings past its length": with_body("as", b"\5\0\0\0\1\0\0\0a\0"),
    "variant with empty signature": with_body("v", b"\0\0"),
    "variant with two types": with_body("v", b"\2yy\0\1\1"),
    "variant with cut signature": with_body("v", b"\1a\0\1"),
    "variant past the end": with_body("v", b"\1u\0\0\1"),
    # descriptors
    "announces a descriptor that is not there": signal(
        "h", body=bytes(4), extra_fields=((w.UNIX_FDS, "u", 1),)
    ),
}

VALID: dict[str, bytes] = {
    "signal": signal(),
    "unknown field": signal(extra_fields=((200, "s", "x"),)),
    "unknown flags": signal(flags=0xF8),
    "arrays nested 32 deep": with_body(*nested(32)),
    "structs nested 32 deep": with_body("(" * 32 + "y" + ")" * 32, b"\1"),
    "values nested 64 deep": with_body("v", variants(64)),
    "interface of 255": call({w.INTERFACE: f"test.{LONG}"}),
    "destination with hyphen": call({w.DESTINATION: "test.a-b"}),
    "path of root": call({w.PATH: "/"}),
    "signature of 255": with_body("y" * 255, b"\1" * 255),
    "string with noncharacter": with_body("s", b"\3\0\0\0\xef\xbf\xbf\0"),
    "sender forged": call({w.SENDER: "test.forged"}),
    "empty arrays with padding": with_body("at", bytes(8)),
    "message type 77": w.build(77, SIGNAL, serial=9),
}

PROBE = w.build(
    w.CALL,
    {w.PATH: DRIVER_PATH, w.DESTINATION: DRIVER, w.INTERFACE: DRIVER, w.MEMBER: "GetId"},
    serial=1000,
)


@pytest.mark.parametrize("message", BROKEN.values(), ids=BROKEN.keys())
def test_broken_message_ends_only_its_connection(bus: Bus, message: bytes) -> None:
    witness = bus.connect()
    witness.add_match("type='signal',interface='test.I'")
    client = bus.connect()
    client.write(message)
    try:
        client.write(PROBE)
    except (BrokenPipeError, ConnectionResetError):
        pass
    got = client.expect_disconnect()
    assert got == b"", f"the bus answered: {got!r}"
    assert witness.drain() == []


@pytest.mark.parametrize("message", VALID.values(), ids=VALID.keys())
def test_unusual_message_is_accepted(bus: Bus, message: bytes) -> None:
    client = bus.connect()
    client.write(message)
    client.write(PROBE)
    assert client.wait_reply(1000).signature == "s"


def test_messages_before_the_broken_one_are_delivered(bus: Bus) -> None:
    receiver, sender = bus.connect(), bus.connect()
    fields = SIGNAL | {w.DESTINATION: receiver.name}
    good = [w.build(w.SIGNAL, fields, "u", (n,), serial=n) for n in range(1, 4)]
    sender.write(b"".join(good) + BROKEN["boolean 2"] + good[0])
    sender.expect_disconnect()
    assert [receiver.read().args for _ in range(3)] == [[1], [2], [3]]
    with pytest.raises(TimeoutError):
        receiver.read(0.1)


def test_truncated_message_is_never_delivered(bus: Bus) -> None:
    receiver, sender = bus.connect(), bus.connect()
    receiver.add_match("type='signal',member='NameOwnerChanged'")
    message = w.build(w.SIGNAL, SIGNAL | {w.DESTINATION: receiver.name}, "s", ("x" * 100,))
    sender.write(message[:-1])
    sender.close()
    assert receiver.read().args == [sender.name, sender.name, ""]


def test_garbage_after_begin(bus: Bus) -> None:
    client = bus.connect(hello=False)
    with pytest.raises((Disconnected, BrokenPipeError, ConnectionResetError)):
        for _ in range(100):
            client.write(bytes(range(256)) * 16)
        client.fill()
