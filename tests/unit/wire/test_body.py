"""Bodies: valid ones of random types pass, each rule broken once is named, arguments are found."""

from __future__ import annotations

import struct

import pytest
from dbus_fast import Message as FastMessage
from dbus_fast import MessageType as FastType
from dbus_fast import Variant
from hypothesis import given, settings
from hypothesis import strategies as st

from kbusd.wire import body, header
from kbusd.wire.validate import WireError
from tests.unit.wire import marshal
from tests.unit.wire.marshal import Body, bodies

SHORT = "the body is shorter than its signature says"
LONG = "the body is longer than its signature says"
PADDING = "alignment padding is not zero"
ARRAY = "an array's length does not fit its elements"
PAST = "a string, object path or signature reaches past the end"
NUL = "a string, object path or signature does not end in NUL"
UTF8 = "a string is not valid UTF-8 without NUL"
VARIANT = "a variant's signature is not one single complete type"
DEEP = "values are nested more than 64 deep"


def u(*numbers: int) -> bytes:
    return struct.pack(f"<{len(numbers)}I", *numbers)


def s(text: bytes) -> bytes:
    return u(len(text)) + text + b"\0"


def variants(levels: int) -> bytes:
    """A byte within `levels` variants."""
    return b"\1v\0" * (levels - 1) + b"\1y\0\0"


VALID: list[tuple[str, bytes]] = [
    ("", b""),
    ("y", b"\xff"),
    ("yt", b"\1" + bytes(15)),
    ("b", u(1)),
    ("s", s("é€😀\U0010ffff\ufffe".encode())),
    ("s", s(b"x" * 1000)),
    ("o", s(b"/")),
    ("g", b"\0\0"),
    ("g", b"\3ayy\0"),
    ("ay", u(0)),
    ("at", u(0) + bytes(4)),
    ("ay", u(5) + b"12345"),
    ("ab", u(8, 1, 0)),
    ("a{sv}", u(0) + bytes(4)),
    ("(y)y", b"\1\2"),
    ("v", variants(64)),
    ("a" * 32 + "y", u(0)),
    ("(" * 32 + "y" + ")" * 32, b"\1"),
    ("ah", u(4, 99)),  # an index that is none: dbus-daemon leaves that to the receiver
    ("d", b"\xff" * 8),
    ("aay", u(12, 1) + b"\1\0\0\0" + u(0)),
]

INVALID: dict[str, tuple[str, bytes, str]] = {
    "nothing there": ("y", b"", SHORT),
    "number cut": ("u", b"\1\0\0", SHORT),
    "second cut": ("yt", b"\1" + bytes(14), SHORT),
    "more than said": ("y", b"\1\0", LONG),
    "something where nothing is said": ("", b"\0", LONG),
    "padding": ("yt", b"\1" + bytes(6) + b"\1" + bytes(8), PADDING),
    "padding before a string": ("ys", b"\0\0\1\0" + s(b""), PADDING),
    "padding before an array": ("yay", b"\0\0\1\0" + u(0), PADDING),
    "padding of an empty array": ("at", u(0, 1), PADDING),
    "padding of a struct": ("y(y)", b"\1" + bytes(6) + b"\1\1", PADDING),
    "boolean": ("b", u(2), "a boolean is neither 0 nor 1"),
    "boolean in an array": ("ab", u(8, 1, 256), "a boolean is neither 0 nor 1"),
    "length cut": ("s", b"\1\0\0", SHORT),
    "string cut": ("s", u(4) + b"abc\0", PAST),
    "string of 4 GiB": ("s", u(0xFFFFFFFF) + b"abc\0", PAST),
    "string without NUL": ("s", u(3) + b"abcd", NUL),
    "NUL in a string": ("s", s(b"a\0b"), UTF8),
    "NUL in a long string": ("s", s(b"a" * 20 + b"\0" + b"b" * 20), UTF8),
    "not UTF-8": ("s", s(b"\xff"), UTF8),
    "not UTF-8 after much ASCII": ("s", s(b"a" * 23 + b"\x80"), UTF8),
    "overlong 2": ("s", s(b"\xc1\xbf"), UTF8),
    "overlong 3": ("s", s(b"\xe0\x9f\xbf"), UTF8),
    "overlong 4": ("s", s(b"\xf0\x8f\xbf\xbf"), UTF8),
    "surrogate": ("s", s(b"\xed\xa0\x80"), UTF8),
    "beyond Unicode": ("s", s(b"\xf4\x90\x80\x80"), UTF8),
    "character cut": ("s", s(b"\xf0\x9f\x98"), UTF8),
    "path": ("o", s(b"/a/"), "an object path is not valid"),
    "empty path": ("o", s(b""), "an object path is not valid"),
    "signature cut": ("g", b"\2s\0", PAST),
    "signature without NUL": ("g", b"\1ss", NUL),
    "signature wrong": ("g", b"\1a\0", "an array in a signature has no element type"),
    "array past the end": ("ay", u(2) + b"1", SHORT),
    "array not a multiple": ("au", u(6, 1) + b"\1\0", ARRAY),
    "array ends within an element": ("as", u(6) + s(b"abc"), ARRAY),
    "array of structs ends within one": ("a(yy)", u(1, 0) + b"\1\2", ARRAY),
    "array too long": ("ay", u((1 << 26) + 1), "an array is longer than 64 MiB"),
    "variant of nothing": ("v", b"\0\0", VARIANT),
    "variant of two": ("v", b"\2yy\0\1\2", VARIANT),
    "variant of half a struct": ("v", b"\1(\0\1", VARIANT),
    "variant of a dict entry": ("v", b"\4{ss}\0", VARIANT),
    "variant of an unknown type": ("v", b"\1z\0\1", VARIANT),
    "variant cut": ("v", b"\5y\0", PAST),
    "variant without NUL": ("v", b"\1yy\1", NUL),
    "variant without its value": ("v", b"\1y\0", SHORT),
    "variant's padding": ("v", b"\1u\0\1" + u(1), PADDING),
    "variants nested": ("v", variants(65), DEEP),
    "signature of the body": ("a", b"", "an array in a signature has no element type"),
}


@pytest.mark.parametrize(("signature", "data"), VALID)
def test_valid(signature: str, data: bytes) -> None:
    body.check_body(data, signature.encode(), False)


@pytest.mark.parametrize("name", INVALID)
def test_invalid(name: str) -> None:
    signature, data, rule = INVALID[name]
    with pytest.raises(WireError) as error:
        body.check_body(data, signature.encode(), False)
    assert error.value.text == rule


def test_depth_counts_structs_and_variants_together() -> None:
    signature = b"(" * 32 + b"v" + b")" * 32
    body.check_body(variants(32), signature, False)
    with pytest.raises(WireError, match=DEEP):
        body.check_body(variants(33), signature, False)


@settings(max_examples=300)
@given(bodies())
def test_random_types_in_both_byte_orders(made: Body) -> None:
    body.check_body(made.data, made.signature.encode(), made.big_endian)


@given(bodies(), st.data())
def test_no_cut_or_lengthened_body_is_accepted(made: Body, data: st.DataObject) -> None:
    if made.data:
        end = data.draw(st.integers(0, len(made.data) - 1))
        with pytest.raises(WireError):
            body.check_body(made.data[:end], made.signature.encode(), made.big_endian)
    with pytest.raises(WireError, match=LONG):
        body.check_body(made.data + b"\0", made.signature.encode(), made.big_endian)


@given(st.binary(max_size=200), marshal.signatures(), st.booleans())
def test_garbage_is_judged_without_harm(data: bytes, signature: str, big: bool) -> None:
    try:
        body.check_body(data, signature.encode(), big)
    except WireError:
        return
    body.match_arguments(data, signature, big)


numbers = st.sampled_from(
    ["ay", "an", "ai", "at", "ad", "(uay)", "say", "vay", "tat", "yax", "ayay"]
)


@settings(max_examples=300)
@given(bodies(st.one_of(numbers, marshal.signatures())), st.data())
def test_in_an_opaque_tail_any_bytes_are_valid(made: Body, data: st.DataObject) -> None:
    signature = made.signature.encode()
    have = data.draw(st.integers(0, len(made.data)))
    start = body.opaque_tail(made.data, have, signature, made.big_endian)
    if start:
        assert start <= have
        rest = data.draw(
            st.binary(min_size=len(made.data) - start, max_size=len(made.data) - start)
        )
        body.check_body(made.data[:start] + rest, signature, made.big_endian)


@settings(max_examples=300)
@given(st.binary(max_size=64), numbers, st.booleans())
def test_no_tail_of_an_invalid_body_is_opaque(data: bytes, signature: str, big: bool) -> None:
    if body.opaque_tail(data, len(data), signature.encode(), big):
        body.check_body(data, signature.encode(), big)


@pytest.mark.parametrize(
    ("signature", "data", "start"),
    [
        ("ay", u(5) + b"12345", 4),
        ("sat", s(b"ab") + b"\0" + u(8) + bytes(12), 16),
        ("ab", u(4, 1), 0),
        ("ah", u(4, 1), 0),
        ("(ay)", u(1) + b"1", 0),
        ("aay", u(5, 1) + b"1", 0),
        ("ayy", u(1) + b"12", 0),
        ("ay", u(5) + b"123456", 0),
        ("an", u(3) + b"123", 0),
    ],
)
def test_only_a_last_array_of_numbers_is_opaque(signature: str, data: bytes, start: int) -> None:
    assert body.opaque_tail(data, len(data), signature.encode(), False) == start


@pytest.mark.parametrize("big", [False, True])
def test_many_empty_arrays(big: bool) -> None:
    """Where their types end is remembered, for each signature by itself."""
    element = ([], [], ("aa(ss)", [[], [("x", "y")], []] * 100), [], b"x")
    value = [element, ([], [(1, 2)], ("(ya(yy))", (1, [])), [[], []], b"")] * 100
    signature = "a(aya(yy)vaasay)"
    data = marshal.marshal(signature, (value,), big)
    body.check_body(data, signature.encode(), big)
    with pytest.raises(WireError):
        body.check_body(data[:-1] + b"\1", signature.encode(), big)


def test_what_dbus_fast_writes() -> None:
    values = [
        "x",
        {"a": Variant("as", ["ü", ""]), "b": Variant("(ib)", [-1, True])},
        b"\1\2",
        ["/"],
    ]
    data = bytes(
        FastMessage(
            path="/a",
            member="M",
            message_type=FastType.METHOD_CALL,
            signature="sa{sv}ayao",
            body=values,
            serial=3,
        )._marshall(False)
    )
    parsed = header.parse(data)
    body.check_body(data[parsed.header_length :], parsed.signature.encode(), False)


def test_a_large_array_of_bytes_is_not_looked_through() -> None:
    """64 MiB pass; one byte more does not."""
    data = u(1 << 26) + bytes(1 << 26)
    body.check_body(data, b"ay", False)
    with pytest.raises(WireError, match="64 MiB"):
        body.check_body(u((1 << 26) + 1) + data, b"ay", False)


# -- arguments -------------------------------------------------------------------------------


@pytest.mark.parametrize("big", [False, True])
def test_string_arguments(big: bool) -> None:
    values = (1, "first", "/path", ["not", "these"], "a{sv}", ("s", "nor this"), "last")
    data = marshal.marshal("ysoasgvs", values, big)
    found = ((1, "s", "first"), (2, "o", "/path"), (4, "g", "a{sv}"), (6, "s", "last"))
    assert body.string_arguments(data, "ysoasgvs", big) == found
    assert body.string_arguments(data, "ysoasgvs", big, 3) == found[:2]
    assert body.string_arguments(data, "ysoasgvs", big, 0) == ()


@pytest.mark.parametrize("big", [False, True])
def test_elements_of_arrays_of_text_are_told_if_asked_for(big: bool) -> None:
    values = (1, ["one", "", "three"], [], ["/p", "/q"], ["s", "a{sv}"], [["deep"]], "last")
    data = marshal.marshal("yasasaoagaass", values, big)
    found = (
        (1, "as", "one"), (1, "as", ""), (1, "as", "three"), (3, "ao", "/p"), (3, "ao", "/q"),
        (4, "ag", "s"), (4, "ag", "a{sv}"), (6, "s", "last"),
    )  # fmt: skip
    assert body.string_arguments(data, "yasasaoagaass", big, elements=7) == found
    assert body.string_arguments(data, "yasasaoagaass", big, elements=2) == (*found[:2], found[7])


def test_match_arguments_stand_at_their_numbers() -> None:
    data = marshal.marshal("usogsu", (1, "a", "/b", "g", "c", 2), False)
    found = body.match_arguments(data, "usogsu", False)
    assert found == (None, "a", "/b", None, "c")
    assert [isinstance(text, body.PathArgument) for text in found] == [False, False, True] + [
        False
    ] * 2


def test_match_arguments_end_after_64() -> None:
    data = marshal.marshal("s" * 70, tuple(map(str, range(70))), False)
    assert body.match_arguments(data, "s" * 70, False) == tuple(map(str, range(64)))


def test_arguments_of_a_broken_body() -> None:
    with pytest.raises(WireError, match="UTF-8"):
        body.string_arguments(s(b"\xff"), "s", False)


def test_body_of_one_string() -> None:
    assert body.string("é") == marshal.marshal("s", ("é",), False)
    assert body.string("é", big_endian=True) == marshal.marshal("s", ("é",), True)
