"""The GVariant codec: against GLib's own, against kbusd.wire's checks, and with hostile bytes."""

from __future__ import annotations

import re
import struct
import time
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kbusd.kdbus import gvariant
from kbusd.kdbus.gvariant import GVariantError, Order
from kbusd.wire import body, validate
from kbusd.wire.validate import WireError
from tests.unit.kdbus import glib
from tests.unit.kdbus.cases import ORDERS, altered, unhurried
from tests.unit.wire import marshal


@st.composite
def typed_values(draw: st.DrawFn) -> tuple[str, tuple[Any, ...]]:
    signature = draw(marshal.signatures().filter(bool))
    return signature, draw(st.tuples(*map(marshal.values, marshal.split(signature))))


@st.composite
def altered_gvariants(draw: st.DrawFn) -> tuple[str, bytes]:
    signature, values = draw(typed_values())
    data = marshal.marshal(signature, values, False)
    return signature, altered(
        draw, gvariant.to_gvariant(data, signature.encode(), "little", "little")
    )


@st.composite
def altered_bodies(draw: st.DrawFn) -> tuple[str, bool, bytes]:
    signature, big_endian, data = draw(marshal.bodies())
    return signature, big_endian, altered(draw, data)


def refuses_gvariant(data: bytes, signature: str, why: str) -> None:
    with pytest.raises(GVariantError, match=why):
        gvariant.to_dbus1(data, signature.encode(), "little")


@glib.needed
@unhurried
@given(typed_values(), st.sampled_from(ORDERS), st.sampled_from(ORDERS))
def test_values_are_written_as_glib_writes_them(
    typed: tuple[str, tuple[Any, ...]], order: Order, wanted: Order
) -> None:
    signature, values = typed
    data = marshal.marshal(signature, values, order == "big")
    theirs = glib.serialise(signature, values, wanted == "big")
    assert gvariant.to_gvariant(data, signature.encode(), order, wanted) == theirs
    there = marshal.marshal(signature, values, wanted == "big")
    assert gvariant.to_dbus1(theirs, signature.encode(), wanted) == there


@glib.needed
@pytest.mark.parametrize(
    "length", [0, 1, 83, 84, 85, 252, 253, 254, 255, 21844, 21845, 21846, 70000]
)
def test_framing_offsets_grow_where_glib_lets_them(length: int) -> None:
    for signature, values in (
        ("sy", ("x" * length, 1)),
        ("as", (["x"] * length,)),
        ("aay", ([[1] * length, []],)),
        ("(s(ay)s)", (("x" * length, ([1],), ""),)),
    ):
        data = marshal.marshal(signature, values, False)
        written = gvariant.to_gvariant(data, signature.encode(), "little", "little")
        assert written == glib.serialise(signature, values)
        assert gvariant.to_dbus1(written, signature.encode(), "little") == data


@pytest.mark.parametrize(
    ("size", "count", "word"),
    [
        (254, 1, 1),
        (255, 1, 2),
        (0, 255, 1),
        (0, 256, 2),
        (65533, 1, 2),
        (65534, 1, 4),
        (2**32 - 5, 1, 4),
        (2**32 - 4, 1, 8),
        (2**40, 7, 8),
    ],
)
def test_a_framing_offset_is_as_large_as_its_container_needs(
    size: int, count: int, word: int
) -> None:
    assert gvariant.framing_size(size, count) == word
    assert gvariant.word_size(size + count * word) == word


@glib.needed
@unhurried
@given(altered_gvariants())
@example(("as", b"\0\1"))
@example(("ay", b""))
@example(("g", b"()aay\0"))
@example(("yay", b"\1" * 300))
def test_what_glib_calls_normal_is_taken_and_nothing_else(case: tuple[str, bytes]) -> None:
    signature, data = case
    try:
        converted = gvariant.to_dbus1(data, signature.encode(), "little")
    except GVariantError as error:
        # A struct of empty arrays is one offset for each but the last; GLib takes nothing for it too.
        # And "()" is a type of GVariant's, but none of D-Bus's.
        if not re.search("the framing offsets of a struct|a struct is empty", str(error)):
            assert not glib.is_normal_form(f"({signature})", data)
    else:
        body.check_body(converted, signature.encode(), False)
        again = gvariant.to_gvariant(converted, signature.encode(), "little", "little")
        assert again[: len(data)] == data
        if again == data:
            assert glib.is_normal_form(f"({signature})", data)
        else:  # the padding that old programs left out
            assert again == data + bytes(len(again) - len(data))


@unhurried
@given(altered_bodies())
def test_what_the_wire_check_takes_is_converted_and_nothing_else(
    case: tuple[str, bool, bytes],
) -> None:
    signature, big_endian, data = case
    order = ORDERS[big_endian]
    try:
        body.check_body(data, signature.encode(), big_endian)
    except WireError:
        with pytest.raises(GVariantError):
            gvariant.to_gvariant(data, signature.encode(), order, order)
    else:
        converted = gvariant.to_gvariant(data, signature.encode(), order, order)
        assert gvariant.to_dbus1(converted, signature.encode(), order) == data


@unhurried
@given(st.binary(max_size=60), marshal.signatures(), st.sampled_from(ORDERS))
def test_any_bytes_are_converted_or_refused(data: bytes, signature: str, order: Order) -> None:
    try:
        converted = gvariant.to_dbus1(data, signature.encode(), order)
    except GVariantError:
        return
    body.check_body(converted, signature.encode(), order == "big")


@unhurried
@given(st.text("ybnqiuxtdsoghva(){}m?*r", max_size=12))
@example("a" * 32 + "y")
@example("a" * 33 + "y")
@example("(" * 32 + "y" + ")" * 32)
@example("(" * 33 + "y" + ")" * 33)
@example("a{y" * 32 + "y" + "}" * 32)
@example("a{y" * 33 + "y" + "}" * 33)
@example("y" * 255)
@example("y" * 256)
def test_signatures_are_those_of_d_bus(text: str) -> None:
    try:
        validate.require_signature(text.encode())
    except WireError:
        with pytest.raises(GVariantError):
            gvariant.types(text.encode())
    else:
        assert len(gvariant.types(text.encode()).fields) == len(marshal.split(text))


@pytest.mark.parametrize(
    ("signature", "data", "why"),
    [
        ("", b"", "empty body"),
        ("", b"\1", "empty body"),
        ("s", b"", "NUL"),
        ("s", b"x", "NUL"),
        ("s", b"x\0y\0", "NUL"),
        ("s", b"\xff\0", "UTF-8"),
        ("o", b"x\0", "path"),
        ("g", b"m\0", "not a signature"),
        ("b", b"\2", "boolean"),
        ("ab", b"\1\2", "boolean"),
        ("u", b"\0\0\0", "fixed size"),
        ("au", b"\0\0\0", "part of an element"),
        ("a(yu)", bytes(7), "part of an element"),
        ("yu", b"\0\1\0\0\0\0\0\0", "padding"),
        ("uy", b"\0\0\0\0\0\1\0\0", "padding"),
        ("ys", b"\0", "NUL"),
        ("as", b"\0\2", "normal form"),  # the table begins after its own end
        ("as", b"a\0b\0\5\4", "outside of the array"),
        ("as", b"a\0b\0\2\1\4", "ends before it begins"),
        ("sy", b"a\0\1\4", "outside of its struct"),
        ("sy", b"a\0\1\3", "NUL"),
        ("sy", b"a\0\1\1\2", "after its last field"),
        ("sy", b"a\0\1\1", "NUL"),
        ("sy", b"\1", "outside of its struct"),
        ("ssssssss", b"\0", "normal form"),
        ("v", b"y", "no signature"),
        ("v", b"\0\0", "one complete type"),
        ("v", b"\0\0\0yy", "one complete type"),
        ("v", b"\0\0{yy}", "not a signature"),
        ("v", b"\0\0()", "empty"),
        ("v", b"\0\0my", "not a signature"),
        ("v", b"\0\0" + b"y" * 256, "no signature"),
    ],
)
def test_what_is_not_normal_is_refused(signature: str, data: bytes, why: str) -> None:
    refuses_gvariant(data, signature, why)


def u(*numbers: int) -> bytes:
    return struct.pack(f"<{len(numbers)}I", *numbers)


@pytest.mark.parametrize(
    ("signature", "data", "why"),
    [
        ("", b"\0", "without a signature"),
        ("y", b"\0\0", "longer than its signature"),
        ("y", b"", "too short"),
        ("u", b"\1\0\0", "too short"),
        ("yu", b"\1\0\1\0" + u(1), "padding is not zero"),
        ("yt", b"\1\0\0", "padding goes beyond"),
        ("b", u(2), "boolean"),
        ("ab", u(4, 2), "boolean"),
        ("ab", u(4, 256), "boolean"),
        ("ab", u(3) + bytes(3), "part of an element"),
        ("aq", u(3) + bytes(3), "part of an element"),
        ("ay", u(2) + b"x", "beyond the end of the body"),
        ("as", u(5, 1) + b"a\0", "beyond its end"),
        ("ay", u((1 << 26) + 1), "more than"),
        ("s", u(2) + b"a\0", "NUL"),
        ("s", u(1) + b"ab", "NUL"),
        ("s", u(0xFFFFFFFF) + b"a\0", "NUL"),
        ("g", b"", "too short"),
        ("g", b"\2y\0", "NUL"),
        ("v", b"", "too short"),
        ("v", b"\1y", "does not end with a NUL"),
        ("v", b"\2yy\0\1\1", "one complete type"),
    ],
)
def test_what_is_no_dbus1_body_is_refused(signature: str, data: bytes, why: str) -> None:
    with pytest.raises(GVariantError, match=why):
        gvariant.to_gvariant(data, signature.encode(), "little", "little")


def test_offsets_wider_than_needed_are_refused() -> None:
    """256 bytes have offsets of two; written with one they would have been 255."""
    refuses_gvariant(b"a" * 252 + b"\0\1" + b"\xfd\0", "sy", "normal form")
    refuses_gvariant(b"a" * 253 + b"\0" + b"\xfe\0", "as", "normal form")


@pytest.mark.parametrize("signature", ["uy", "tb", "uxn", "(ty)y"])
def test_a_body_without_the_padding_at_its_end_is_taken(signature: str) -> None:
    """As systemd before 226 wrote it."""
    tree = gvariant.types(signature.encode())
    padded = bytes(tree.size)
    short = padded[: tree.unpadded]
    assert len(short) < len(padded)
    assert gvariant.to_dbus1(short, signature.encode(), "little") == gvariant.to_dbus1(
        padded, signature.encode(), "little"
    )
    refuses_gvariant(short[:-1], signature, "fixed size")


def variants(levels: int) -> bytes:
    """A byte within `levels` variants, as a tuple with one value."""
    return b"\x2a" + b"\0y" + b"\0v" * (levels - 1)


def test_variants_nest_as_deeply_as_in_dbus1() -> None:
    converted = gvariant.to_dbus1(variants(64), b"v", "little")
    body.check_body(converted, b"v", False)
    assert gvariant.to_gvariant(converted, b"v", "little", "little") == variants(64)
    refuses_gvariant(variants(65), "v", "nested too deeply")
    refuses_gvariant(variants(30000), "v", "nested too deeply")
    with pytest.raises(GVariantError, match="nested too deeply"):
        gvariant.to_gvariant(b"\1v\0" * 64 + b"\1y\0\0", b"v", "little", "little")


def test_an_array_that_would_be_too_long_in_dbus1_is_refused() -> None:
    """A struct of one byte takes eight there."""
    refuses_gvariant(bytes(gvariant.MAX_ARRAY // 4 + 1), "ab", "an array has more than")
    nested = bytes(1 << 10)  # 8 KiB each in dbus1
    data = nested * 16
    assert len(gvariant.to_dbus1(data, b"a(y)", "little")) == 4 + 4 + 8 * len(data) - 7


def test_many_empty_values_cost_no_more_than_their_bytes() -> None:
    """Linear work: ten times the elements take about ten times as long, not a hundred."""

    def seconds(count: int) -> float:
        data = struct.pack("<I", 4 * count) + bytes(4 * count)
        began = time.process_time()
        converted = gvariant.to_gvariant(data, b"aay", "little", "little")
        assert gvariant.to_dbus1(converted, b"aay", "little") == data
        return time.process_time() - began

    assert seconds(200_000) < 40 * max(0.005, seconds(20_000), seconds(20_000))


def test_text_arguments_are_found_between_others() -> None:
    signature = "suasoga(s)v" + "y" * 60
    values = ("ä", 7, ["x", "", "yz"], "/a", "ay", [("no",)], ("s", "no"), *range(60))
    data = marshal.marshal(signature, values, False)
    converted = gvariant.to_gvariant(data, signature.encode(), "little", "little")
    assert gvariant.text_arguments(converted, signature.encode()) == [
        (0, "s", "ä"),
        (2, "as", "x"),
        (2, "as", ""),
        (2, "as", "yz"),
        (3, "o", "/a"),
        (4, "g", "ay"),
    ]
    assert gvariant.text_arguments(converted, signature.encode(), 2) == [(0, "s", "ä")]
    assert gvariant.text_arguments(b"\0", b"") == []


@unhurried
@given(marshal.bodies())
def test_text_arguments_are_those_of_the_wire_format(case: marshal.Body) -> None:
    signature, big_endian, data = case
    order = ORDERS[big_endian]
    converted = gvariant.to_gvariant(data, signature.encode(), order, order)
    found = gvariant.text_arguments(converted, signature.encode())
    single = [each for each in found if len(each[1]) == 1]
    assert tuple(single) == body.string_arguments(data, signature, big_endian)
