"""Messages for tests: marshalled by jeepney from random types, or by hand with any part made wrong."""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

from hypothesis import strategies as st
from jeepney.low_level import Endianness, parse_signature

_TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20)
_ELEMENT = st.text("abcXYZ019_", min_size=1, max_size=6)
PATHS = st.one_of(
    st.just("/"),
    st.lists(_ELEMENT, min_size=1, max_size=4).map(lambda parts: "/" + "/".join(parts)),
)
INTERFACES = st.sampled_from(("a.b", "org.example.Interface1", "_a._b.C_3", "x" * 100 + ".y"))
MEMBERS = st.sampled_from(("M", "GetAll", "_x9", "m" * 255))
BUS_NAMES = st.sampled_from((":1.7", ":1.4294967295", "org.example-two.Name", "a.b", "-a.-b"))

BASIC: dict[str, st.SearchStrategy[Any]] = {
    "y": st.integers(0, 0xFF),
    "b": st.booleans(),
    "n": st.integers(-0x8000, 0x7FFF),
    "q": st.integers(0, 0xFFFF),
    "i": st.integers(-(2**31), 2**31 - 1),
    "u": st.integers(0, 2**32 - 1),
    "x": st.integers(-(2**63), 2**63 - 1),
    "t": st.integers(0, 2**64 - 1),
    "d": st.floats(allow_nan=False),
    "s": _TEXT,
    "o": PATHS,
    "g": st.sampled_from(("", "s", "a{sv}", "(ii)aay", "a" * 32 + "y", "(" * 32 + "y" + ")" * 32)),
    "h": st.integers(0, 3),
}


def complete_types(depth: int = 3) -> st.SearchStrategy[str]:
    """Single complete types, nested `depth` deep at most."""
    basic = st.sampled_from(sorted(BASIC))
    if not depth:
        return basic
    inner = complete_types(depth - 1)
    return st.one_of(
        basic,
        st.just("v"),
        inner.map("a{}".format),
        st.lists(inner, min_size=1, max_size=3).map(lambda fields: f"({''.join(fields)})"),
        st.tuples(basic, inner).map(lambda pair: f"a{{{pair[0]}{pair[1]}}}"),
    )


def signatures() -> st.SearchStrategy[str]:
    return st.lists(complete_types(), max_size=5).map("".join)


def split(signature: str) -> list[str]:
    """The complete types of a valid signature."""
    parts = []
    while signature:
        rest = list(signature)
        parse_signature(rest)
        end = len(signature) - len(rest)
        parts.append(signature[:end])
        signature = signature[end:]
    return parts


def values(kind: str) -> st.SearchStrategy[Any]:
    """Values of one complete type, as jeepney takes them."""
    if kind in BASIC:
        return BASIC[kind]
    if kind == "v":
        return complete_types(1).flatmap(lambda inner: st.tuples(st.just(inner), values(inner)))
    if kind.startswith("a{"):
        key, value = split(kind[2:-1])
        return st.dictionaries(values(key), values(value), max_size=3)
    if kind.startswith("a"):
        return st.lists(values(kind[1:]), max_size=3)
    return st.tuples(*map(values, split(kind[1:-1])))


def marshal(signature: str, body: tuple[Any, ...], big_endian: bool) -> bytes:
    """The body, by jeepney."""
    out = b""
    order = Endianness.big if big_endian else Endianness.little
    for kind, value in zip(split(signature), body, strict=True):
        out += parse_signature(list(kind)).serialise(value, len(out), order, fds=[])
    return out


class Body(NamedTuple):
    signature: str
    big_endian: bool
    data: bytes


@st.composite
def bodies(draw: st.DrawFn, kinds: st.SearchStrategy[str] | None = None) -> Body:
    """Valid bodies of random signatures in both byte orders."""
    signature = draw(signatures() if kinds is None else kinds)
    big_endian = draw(st.booleans())
    body = draw(st.tuples(*map(values, split(signature))))
    return Body(signature, big_endian, marshal(signature, body, big_endian))


class Field(NamedTuple):
    """One header field, with its type and its value as bytes from an offset that is 4 mod 8."""

    code: int
    kind: bytes
    value: bytes


def text_field(code: int, kind: str, text: str | bytes, big_endian: bool = False) -> Field:
    data = text if isinstance(text, bytes) else text.encode()
    if kind == "g":
        return Field(code, b"g", bytes((len(data),)) + data + b"\0")
    length = struct.pack(">I" if big_endian else "<I", len(data))
    return Field(code, kind.encode(), length + data + b"\0")


def uint32_field(code: int, value: int, big_endian: bool = False) -> Field:
    return Field(code, b"u", struct.pack(">I" if big_endian else "<I", value))


def header(
    fields: list[Field],
    *,
    type: int = 1,
    flags: int = 0,
    version: int = 1,
    serial: int = 1,
    body_length: int = 0,
    fields_length: int | None = None,
    big_endian: bool = False,
    mark: bytes = b"",
) -> bytes:
    """A header with exactly these parts, right or wrong, padded as it should be."""
    array = b""
    for code, kind, value in fields:
        array += bytes(-len(array) % 8)
        array += bytes((code, len(kind))) + kind + b"\0" + value
    if fields_length is None:
        fields_length = len(array)
    start = mark or (b"B" if big_endian else b"l")
    start += struct.pack(
        ">BBBIII" if big_endian else "<BBBIII",
        type,
        flags,
        version,
        body_length,
        serial,
        fields_length,
    )
    return start + array + bytes(-len(array) % 8)


@st.composite
def messages(draw: st.DrawFn) -> bytes:
    """Valid messages of all kinds, fields in any order, both byte orders, random bodies."""
    body = draw(bodies())
    big = body.big_endian
    type = draw(st.sampled_from((1, 2, 3, 4, 5, 77)))
    fields = {
        1: text_field(1, "o", draw(PATHS), big),
        2: text_field(2, "s", draw(INTERFACES), big),
        3: text_field(3, "s", draw(MEMBERS), big),
        4: text_field(4, "s", draw(INTERFACES), big),
        5: uint32_field(5, draw(st.integers(1, 2**32 - 1)), big),
        6: text_field(6, "s", draw(BUS_NAMES), big),
        7: text_field(7, "s", draw(BUS_NAMES), big),
        8: text_field(8, "g", body.signature, big),
    }
    needed = {1: {1, 3}, 2: {5}, 3: {4, 5}, 4: {1, 2, 3}}.get(type, set())
    if body.signature:
        needed = needed | {8}
    present = draw(st.permutations(sorted(fields)))
    optional = draw(st.sets(st.sampled_from(sorted(fields))))
    chosen = [fields[code] for code in present if code in needed or code in optional]
    for _ in range(draw(st.integers(0, 2))):
        chosen.insert(
            draw(st.integers(0, len(chosen))),
            draw(
                st.sampled_from(
                    (
                        Field(200, b"y", b"\1"),
                        text_field(11, "s", "unknown", big),
                        uint32_field(255, 7, big),
                    )
                )
            ),
        )
    return (
        header(
            chosen,
            type=type,
            flags=draw(st.integers(0, 255)),
            serial=draw(st.integers(1, 2**32 - 1)),
            body_length=len(body.data),
            big_endian=big,
        )
        + body.data
    )
