"""D-Bus messages as bytes, for tests: written by hand so that it shares no mistake with kbusd.

Builds and reads messages in both byte orders, and lets a test build a wrong one: every header
field, the serial, the version and the lengths can be given as wished. Sizes are bytes. Uses the
standard library only, so that activated test services start fast and need no virtual environment.
Source: D-Bus specification, "Message Protocol" and "Marshaling".
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Any

CALL, RETURN, ERROR, SIGNAL = 1, 2, 3, 4
NO_REPLY_EXPECTED, NO_AUTO_START, ALLOW_INTERACTIVE = 1, 2, 4
(
    PATH,
    INTERFACE,
    MEMBER,
    ERROR_NAME,
    REPLY_SERIAL,
    DESTINATION,
    SENDER,
    SIGNATURE,
    UNIX_FDS,
) = range(1, 10)

_FIELD_TYPES = {
    PATH: "o",
    INTERFACE: "s",
    MEMBER: "s",
    ERROR_NAME: "s",
    REPLY_SERIAL: "u",
    DESTINATION: "s",
    SENDER: "s",
    SIGNATURE: "g",
    UNIX_FDS: "u",
}
_FIXED = {"y": "B", "n": "h", "q": "H", "i": "i", "u": "I", "b": "I", "h": "I"}
_FIXED |= {"x": "q", "t": "Q", "d": "d"}
_ALIGN = {"y": 1, "g": 1, "v": 1, "n": 2, "q": 2, "x": 8, "t": 8, "d": 8, "(": 8, "{": 8}


def alignment(code: str) -> int:
    """The alignment of a type by the first character of its signature."""
    return _ALIGN.get(code, 4)


def split(signature: str) -> list[str]:
    """The single complete types of a signature."""
    types, start = [], 0
    while start < len(signature):
        end = _end_of_type(signature, start)
        types.append(signature[start:end])
        start = end
    return types


def _end_of_type(signature: str, at: int) -> int:
    while signature[at] == "a":
        at += 1
    if signature[at] not in "({":
        return at + 1
    depth = 0
    for i in range(at, len(signature)):
        depth += (signature[i] in "({") - (signature[i] in ")}")
        if depth == 0:
            return i + 1
    raise ValueError(f"unbalanced signature {signature!r}")


def marshal(signature: str, values: tuple[Any, ...] | list[Any], endian: str = "<") -> bytes:
    """The bytes of `values`; a variant is a pair (signature, value), a dict is a mapping."""
    out = bytearray()
    for kind, value in zip(split(signature), values, strict=True):
        _put(out, kind, value, endian)
    return bytes(out)


def _pad(out: bytearray, size: int) -> None:
    out.extend(bytes(-len(out) % size))


def _put(out: bytearray, kind: str, value: Any, endian: str) -> None:
    code = kind[0]
    _pad(out, alignment(code))
    if code in _FIXED:
        out += struct.pack(endian + _FIXED[code], value)
    elif code in "so":
        data = value if isinstance(value, bytes) else value.encode()
        out += struct.pack(endian + "I", len(data)) + data + b"\0"
    elif code == "g":
        data = value if isinstance(value, bytes) else value.encode()
        out += bytes([len(data)]) + data + b"\0"
    elif code == "v":
        _put(out, "g", value[0], endian)
        _put(out, value[0], value[1], endian)
    elif code == "a":
        start = len(out)
        out += bytes(4)
        _pad(out, alignment(kind[1]))
        first = len(out)
        if kind[1] == "y":
            out += bytes(value)
        else:
            for item in value.items() if kind[1] == "{" else value:
                _put(out, kind[1:], item, endian)
        out[start : start + 4] = struct.pack(endian + "I", len(out) - first)
    else:
        for inner, item in zip(split(kind[1:-1]), value, strict=True):
            _put(out, inner, item, endian)


def unmarshal(signature: str, data: bytes, endian: str = "<") -> list[Any]:
    """The values in `data`; variants come out as pairs (signature, value)."""
    reader = _Reader(data, endian)
    return [reader.get(kind) for kind in split(signature)]


class _Reader:
    def __init__(self, data: bytes, endian: str) -> None:
        self.data, self.endian, self.at = data, endian, 0

    def align(self, size: int) -> None:
        end = self.at + -self.at % size
        assert not any(self.data[self.at : end]), "padding that is not zero"
        self.at = end

    def take(self, size: int) -> bytes:
        assert self.at + size <= len(self.data), "value runs past the end"
        self.at += size
        return self.data[self.at - size : self.at]

    def get(self, kind: str) -> Any:
        code = kind[0]
        self.align(alignment(code))
        if code in _FIXED:
            form = self.endian + _FIXED[code]
            (value,) = struct.unpack(form, self.take(struct.calcsize(form)))
            return bool(value) if code == "b" else value
        if code in "sog":
            size = self.take(1)[0] if code == "g" else self.get("u")
            data = self.take(size + 1)
            assert data[-1] == 0
            return data[:-1].decode()
        if code == "v":
            inner = self.get("g")
            return inner, self.get(inner)
        if code == "a":
            size = self.get("u")
            self.align(alignment(kind[1]))
            end = self.at + size
            if kind[1] == "y":
                return self.take(size)
            items = []
            while self.at < end:
                items.append(self.get(kind[1:]))
            assert self.at == end, "array elements run past its length"
            return dict(items) if kind[1] == "{" else items
        return tuple(self.get(inner) for inner in split(kind[1:-1]))


@dataclass
class Message:
    """One message; `fields` maps header field codes to values, `raw` is all of it as read."""

    type: int
    fields: dict[int, Any] = field(default_factory=dict)
    body: bytes = b""
    flags: int = 0
    serial: int = 0
    endian: str = "<"
    fds: list[int] = field(default_factory=list)
    raw: bytes = b""

    @property
    def sender(self) -> str | None:
        return self.fields.get(SENDER)

    @property
    def destination(self) -> str | None:
        return self.fields.get(DESTINATION)

    @property
    def path(self) -> str | None:
        return self.fields.get(PATH)

    @property
    def interface(self) -> str | None:
        return self.fields.get(INTERFACE)

    @property
    def member(self) -> str | None:
        return self.fields.get(MEMBER)

    @property
    def error_name(self) -> str | None:
        return self.fields.get(ERROR_NAME)

    @property
    def reply_serial(self) -> int | None:
        return self.fields.get(REPLY_SERIAL)

    @property
    def signature(self) -> str:
        return self.fields.get(SIGNATURE, "")

    @property
    def args(self) -> list[Any]:
        return unmarshal(self.signature, self.body, self.endian)


def build(
    type_: int,
    fields: dict[int, Any] | None = None,
    signature: str = "",
    args: tuple[Any, ...] | list[Any] = (),
    *,
    serial: int = 1,
    flags: int = 0,
    endian: str = "<",
    version: int = 1,
    endian_byte: bytes | None = None,
    body: bytes | None = None,
    body_length: int | None = None,
    raw_fields: bytes | None = None,
    extra_fields: tuple[tuple[int, str, Any], ...] = (),
    padding: bytes = b"\0",
) -> bytes:
    """A message as bytes. What is given is written as it is, right or wrong."""
    payload = marshal(signature, args, endian) if body is None else body
    all_fields = dict(fields or {})
    if signature and SIGNATURE not in all_fields:
        all_fields[SIGNATURE] = signature
    array = [(code, (_FIELD_TYPES[code], value)) for code, value in all_fields.items()]
    array += [(code, (kind, value)) for code, kind, value in extra_fields]
    out = bytearray(endian_byte or (b"l" if endian == "<" else b"B"))
    out += bytes([type_, flags, version])
    out += struct.pack(endian + "II", len(payload) if body_length is None else body_length, serial)
    if raw_fields is None:
        _put(out, "a(yv)", array, endian)
    else:
        out += raw_fields
    out += padding * (-len(out) % 8)
    return bytes(out) + payload


def total_length(head: bytes) -> int:
    """The length in bytes of the message that begins with these 16 bytes."""
    endian = "<" if head[:1] == b"l" else ">"
    body, _serial, array = struct.unpack(endian + "III", head[4:16])
    return 16 + array + -array % 8 + body


def parse(raw: bytes, fds: list[int] | None = None) -> Message:
    """The message in `raw`, which must hold exactly one."""
    assert raw[:1] in (b"l", b"B"), f"bad byte order mark {raw[:1]!r}"
    endian = "<" if raw[:1] == b"l" else ">"
    assert raw[3] == 1, "protocol version"
    reader = _Reader(raw, endian)
    reader.at = 4
    length, serial = reader.get("u"), reader.get("u")
    pairs = reader.get("a(yv)")
    reader.align(8)
    fields = {}
    for code, (kind, value) in pairs:
        assert code not in fields, f"header field {code} given twice"
        assert _FIELD_TYPES.get(code, kind) == kind
        fields[code] = value
    assert len(raw) == reader.at + length
    return Message(raw[1], fields, raw[reader.at :], raw[2], serial, endian, list(fds or []), raw)
