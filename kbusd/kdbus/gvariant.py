"""D-Bus bodies from the dbus1 wire format to GVariant and back, byte by byte.

Programs of the kdbus era (sd-bus of systemd 221 to 230) wrote their bodies as GVariant. The bus
carries dbus1, so a body is converted where it enters or leaves a kdbus client. No Python values are
made on the way: each type has one small class with both directions side by side, a signature becomes
a tree of these once, and the tree copies from one form into the other.

Neither direction trusts what it reads. GVariant is taken in normal form only (each value has exactly
one), so that `to_gvariant(to_dbus1(x)) == x`; what comes out of `to_dbus1` is a valid D-Bus body. The
work is linear in the bytes, but for variants in variants, whose depth is limited as libdbus limits
it: 64 values within one another, of which an array of fixed-size elements does not count these.
This package imports nothing of ours, so the few rules that kbusd.wire has too (signatures, object
paths) stand here again; the tests compare the two on random and on mutated bytes.

Sources: "GVariant Serialisation" (Ryan Lortie; framing and padding); D-Bus Specification,
"Marshaling". Framing offsets are little-endian in either byte order; numbers are in the message's.
"""

from __future__ import annotations

import re
import struct
import sys
from array import array
from collections.abc import Iterator
from functools import lru_cache
from typing import Literal

MAX_ARRAY = 1 << 26  # bytes in dbus1, as the D-Bus specification says
MAX_BODY = 1 << 27
MAX_DEPTH = 64  # of values
MAX_NESTING = 32  # of arrays, and of structs, in a signature
MAX_SIGNATURE = 255  # bytes

Order = Literal["little", "big"]

# Possessive, or a path of 100 MB costs gigabytes.
PATH = re.compile(rb"/|(?:/[A-Za-z0-9_]++)++")
_OFFSETS = {1: "B", 2: "H", 4: "I", 8: "Q"}  # type codes of struct and array


class GVariantError(ValueError):
    """Bytes that are not what their signature says, in normal form, or a signature that is none."""


def word_size(size: int) -> int:
    """How many bytes a framing offset has in a container of `size` bytes."""
    return 1 if size <= 0xFF else 2 if size <= 0xFFFF else 4 if size <= 0xFFFFFFFF else 8


def framing_size(size: int, count: int) -> int:
    """The same for one that is to be written: `size` bytes of values, `count` offsets after them."""
    return next(word for word in (1, 2, 4, 8) if word_size(size + count * word) <= word)


def skip_padding(data: bytes, at: int, alignment: int, end: int) -> int:
    """Where the value after the padding at `at` begins. Raises GVariantError if not before `end`."""
    to = (at + alignment - 1) & -alignment
    if to != at:
        if to > end:
            raise GVariantError("padding goes beyond the end")
        if any(data[at:to]):
            raise GVariantError("padding is not zero")
    return to


def elements(data: bytes, start: int, end: int, alignment: int) -> Iterator[tuple[int, int]]:
    """Where each element of an array of variable-sized ones begins and ends.

    Raises GVariantError on the way if the framing is not as it must be in normal form.
    """
    if start == end:
        return
    word = word_size(end - start)
    framing = int.from_bytes(data[end - word : end], "little")
    count, rest = divmod(end - start - framing, word)
    if count < 1 or rest or word != framing_size(framing, count):
        raise GVariantError("the framing offsets of an array are not in normal form")
    table = start + framing
    at = start
    for (offset,) in struct.iter_unpack("<" + _OFFSETS[word], memoryview(data)[table:end]):
        at = skip_padding(data, at, alignment, table)
        stop = start + offset
        if not at <= stop <= table:
            raise GVariantError("an array element ends before it begins or outside of the array")
        yield at, stop
        at = stop


def _pad(out: bytearray, alignment: int) -> None:
    out += bytes(-len(out) & (alignment - 1))


def _length_at(data: bytes, at: int, order: Order) -> tuple[int, int]:
    """A length in dbus1 at or after `at`, and where it ends."""
    at = skip_padding(data, at, 4, len(data))
    if len(data) - at < 4:
        raise GVariantError("the body is too short")
    return int.from_bytes(data[at : at + 4], order), at + 4


def _deeper(depth: int) -> int:
    if depth >= MAX_DEPTH:
        raise GVariantError("values are nested too deeply")
    return depth + 1


class Type:
    """One complete type: how a value of it is laid out in both forms, and the way between them."""

    letter = b""
    alignment = 1  # in GVariant
    size = 0  # in GVariant, or 0 if that depends on the value
    dbus_alignment = 1

    def to_dbus1(
        self, data: bytes, start: int, end: int, out: bytearray, order: Order, depth: int
    ) -> None:
        """Append the GVariant value data[start:end]; positions in `data` are aligned as it is."""
        raise NotImplementedError

    def to_gvariant(
        self, data: bytes, at: int, out: bytearray, order: Order, swap: bool, depth: int
    ) -> int:
        """Append the dbus1 value that begins with the padding at `at`; returns where it ends.

        `order` is that of `data`; `swap` says that the other one is wanted in `out`.
        """
        raise NotImplementedError


class Number(Type):
    """A type that both forms write alike: y n q i u x t d h."""

    def __init__(self, letter: bytes, size: int) -> None:
        self.letter = letter
        self.size = self.alignment = self.dbus_alignment = size

    def to_dbus1(
        self, data: bytes, start: int, end: int, out: bytearray, order: Order, depth: int
    ) -> None:
        if end - start != self.size:
            raise GVariantError("a number has the wrong size")
        _pad(out, self.size)
        out += data[start:end]

    def to_gvariant(
        self, data: bytes, at: int, out: bytearray, order: Order, swap: bool, depth: int
    ) -> int:
        size = self.size
        at = skip_padding(data, at, size, len(data))
        if len(data) - at < size:
            raise GVariantError("the body is too short")
        _pad(out, size)
        out += data[at : at + size][::-1] if swap else data[at : at + size]
        return at + size

    def array_to_dbus1(self, data: bytes, start: int, end: int, out: bytearray, big: bool) -> None:
        if (end - start) % self.size:
            raise GVariantError("an array has a part of an element")
        out += data[start:end]

    def array_to_gvariant(
        self, data: bytes, at: int, end: int, out: bytearray, big: bool, swap: bool
    ) -> None:
        size = self.size
        if (end - at) % size:
            raise GVariantError("an array has a part of an element")
        values = data[at:end]
        if swap and size > 1:
            swapped = bytearray(len(values))
            for number in range(size):
                swapped[number::size] = values[size - 1 - number :: size]
            out += swapped
        else:
            out += values


class Boolean(Number):
    """One byte in GVariant, four in dbus1, 0 or 1 in both."""

    def __init__(self) -> None:
        self.letter = b"b"
        self.size = self.alignment = 1
        self.dbus_alignment = 4

    def to_dbus1(
        self, data: bytes, start: int, end: int, out: bytearray, order: Order, depth: int
    ) -> None:
        if end - start != 1:
            raise GVariantError("a boolean has the wrong size")
        _pad(out, 4)
        self.array_to_dbus1(data, start, end, out, order == "big")

    def to_gvariant(
        self, data: bytes, at: int, out: bytearray, order: Order, swap: bool, depth: int
    ) -> int:
        value, at = _length_at(data, at, order)
        if value > 1:
            raise GVariantError("a boolean is neither 0 nor 1")
        out.append(value)
        return at

    def array_to_dbus1(self, data: bytes, start: int, end: int, out: bytearray, big: bool) -> None:
        values = data[start:end]
        if values.count(0) + values.count(1) != len(values):
            raise GVariantError("a boolean is neither 0 nor 1")
        wide = bytearray(4 * len(values))
        wide[3 if big else 0 :: 4] = values
        out += wide

    def array_to_gvariant(
        self, data: bytes, at: int, end: int, out: bytearray, big: bool, swap: bool
    ) -> None:
        wide = data[at:end]
        if len(wide) % 4:
            raise GVariantError("an array has a part of an element")
        values = wide[3 if big else 0 :: 4]
        if wide.count(0) + values.count(1) != len(wide):
            raise GVariantError("a boolean is neither 0 nor 1")
        out += values


class Text(Type):
    """A string: bytes and a NUL, in dbus1 with the length before them."""

    letter = b"s"
    dbus_alignment = 4

    def check(self, text: bytes) -> None:
        try:
            text.decode()
        except UnicodeDecodeError:
            raise GVariantError("a string is not valid UTF-8") from None

    def to_dbus1(
        self, data: bytes, start: int, end: int, out: bytearray, order: Order, depth: int
    ) -> None:
        if start == end or data.find(0, start, end) != end - 1:
            raise GVariantError("a string does not end with its first NUL")
        text = data[start:end]
        self.check(text[:-1])
        _pad(out, 4)
        out += (len(text) - 1).to_bytes(4, order)
        out += text

    def to_gvariant(
        self, data: bytes, at: int, out: bytearray, order: Order, swap: bool, depth: int
    ) -> int:
        length, at = _length_at(data, at, order)
        return self._copy(data, at, length, out)

    def _copy(self, data: bytes, at: int, length: int, out: bytearray) -> int:
        end = at + length + 1
        if data.find(0, at, end) != end - 1:
            raise GVariantError("a string does not end with its first NUL")
        text = data[at:end]
        self.check(text[:-1])
        out += text
        return end


class Path(Text):
    """An object path."""

    letter = b"o"

    def check(self, text: bytes) -> None:
        if not PATH.fullmatch(text):
            raise GVariantError("an object path is not valid")


class Signature(Text):
    """A signature, whose length is one byte in dbus1."""

    letter = b"g"
    dbus_alignment = 1

    def check(self, text: bytes) -> None:
        types(text)

    def to_dbus1(
        self, data: bytes, start: int, end: int, out: bytearray, order: Order, depth: int
    ) -> None:
        if start == end or data.find(0, start, end) != end - 1:
            raise GVariantError("a signature does not end with its first NUL")
        text = data[start:end]
        self.check(text[:-1])
        out.append(len(text) - 1)
        out += text

    def to_gvariant(
        self, data: bytes, at: int, out: bytearray, order: Order, swap: bool, depth: int
    ) -> int:
        if at >= len(data):
            raise GVariantError("the body is too short")
        return self._copy(data, at + 1, data[at], out)


class Variant(Type):
    """A value with its type: in GVariant behind it, after a NUL; in dbus1 before it."""

    letter = b"v"
    alignment = 8

    def to_dbus1(
        self, data: bytes, start: int, end: int, out: bytearray, order: Order, depth: int
    ) -> None:
        nul = data.rfind(0, max(start, end - MAX_SIGNATURE - 1), end)
        if nul < 0:
            raise GVariantError("a variant has no signature")
        signature = data[nul + 1 : end]
        inner = _single(signature)
        out.append(len(signature))
        out += signature
        out.append(0)
        inner.to_dbus1(data, start, nul, out, order, _deeper(depth))

    def to_gvariant(
        self, data: bytes, at: int, out: bytearray, order: Order, swap: bool, depth: int
    ) -> int:
        if at >= len(data):
            raise GVariantError("the body is too short")
        nul = at + 1 + data[at]
        signature = data[at + 1 : nul]
        if nul >= len(data) or data[nul]:
            raise GVariantError("the signature of a variant does not end with a NUL")
        inner = _single(signature)
        _pad(out, 8)
        at = inner.to_gvariant(data, nul + 1, out, order, swap, _deeper(depth))
        out.append(0)
        out += signature
        return at


class Array(Type):
    """Elements of one type; in GVariant those of variable size have their ends listed behind."""

    letter = b"a"
    dbus_alignment = 4

    def __init__(self, element: Type) -> None:
        self.element = element
        self.alignment = element.alignment

    def to_dbus1(
        self, data: bytes, start: int, end: int, out: bytearray, order: Order, depth: int
    ) -> None:
        element = self.element
        _pad(out, 4)
        length_at = len(out)
        out += b"\0\0\0\0"
        _pad(out, element.dbus_alignment)
        begin = len(out)
        if isinstance(element, Number):
            element.array_to_dbus1(data, start, end, out, order == "big")
        elif start < end:
            depth = _deeper(depth)
            ranges: Iterator[tuple[int, int]]
            if element.size:
                if (end - start) % element.size:
                    raise GVariantError("an array has a part of an element")
                ranges = ((at, at + element.size) for at in range(start, end, element.size))
            else:
                ranges = elements(data, start, end, element.alignment)
            for at, stop in ranges:
                element.to_dbus1(data, at, stop, out, order, depth)
                if len(out) - begin > MAX_ARRAY:
                    break
        length = len(out) - begin
        if length > MAX_ARRAY:
            raise GVariantError(f"an array has more than {MAX_ARRAY} bytes in dbus1")
        if len(out) > MAX_BODY:
            raise GVariantError(f"the body has more than {MAX_BODY} bytes in dbus1")
        out[length_at : length_at + 4] = length.to_bytes(4, order)

    def to_gvariant(
        self, data: bytes, at: int, out: bytearray, order: Order, swap: bool, depth: int
    ) -> int:
        element = self.element
        length, at = _length_at(data, at, order)
        if length > MAX_ARRAY:
            raise GVariantError(f"an array has more than {MAX_ARRAY} bytes")
        at = skip_padding(data, at, element.dbus_alignment, len(data))
        end = at + length
        if end > len(data):
            raise GVariantError("an array goes beyond the end of the body")
        _pad(out, self.alignment)
        if isinstance(element, Number):
            element.array_to_gvariant(data, at, end, out, order == "big", swap)
        elif length:
            depth = _deeper(depth)
            begin = len(out)
            ends = array("I")
            while at < end:
                at = element.to_gvariant(data, at, out, order, swap, depth)
                if not element.size:
                    ends.append(len(out) - begin)
            if at != end:
                raise GVariantError("the last element of an array goes beyond its end")
            if ends:
                word = framing_size(len(out) - begin, len(ends))
                offsets = array(_OFFSETS[word], ends)
                if sys.byteorder == "big":
                    offsets.byteswap()
                out += offsets.tobytes()
        return end


class Struct(Type):
    """Values one after another: a struct, a dict entry, or all of a body.

    In GVariant the ends of all of variable size but the last one are listed behind, backwards.
    """

    letter = b"("
    dbus_alignment = 8

    def __init__(self, fields: tuple[Type, ...]) -> None:
        self.fields = fields
        self.alignment = max((field.alignment for field in fields), default=1)
        self.framed = tuple(not field.size for field in fields[:-1]) + (False,)
        self.offsets = sum(self.framed)
        self.unpadded = 0  # if all are of fixed size: bytes up to the end of the last one
        if all(field.size for field in fields):
            for field in fields:
                self.unpadded = -(-self.unpadded // field.alignment) * field.alignment + field.size
            self.size = -(-self.unpadded // self.alignment) * self.alignment

    def members(self, data: bytes, start: int, end: int) -> Iterator[tuple[Type, int, int]]:
        """The type of each field, and where it begins and ends in the GVariant data[start:end].

        Raises GVariantError on the way if the framing is not as it must be in normal form.
        """
        if self.size and end - start != self.size:
            raise GVariantError("a struct of fixed size has another one")
        word = word_size(end - start)
        frame = end
        table = end - word * self.offsets
        if table < start or (self.offsets and word != framing_size(table - start, self.offsets)):
            raise GVariantError("the framing offsets of a struct are not in normal form")
        at = start
        for field, framed in zip(self.fields, self.framed, strict=True):
            at = skip_padding(data, at, field.alignment, table)
            if field.size:
                stop = at + field.size
            elif framed:
                frame -= word
                stop = start + int.from_bytes(data[frame : frame + word], "little")
            else:
                stop = table
            if not at <= stop <= table:
                raise GVariantError("a field ends before it begins or outside of its struct")
            yield field, at, stop
            at = stop
        if self.size:
            at = skip_padding(data, at, self.alignment, table)
        if at != table:
            raise GVariantError("a struct has bytes after its last field")

    def to_dbus1(
        self, data: bytes, start: int, end: int, out: bytearray, order: Order, depth: int
    ) -> None:
        depth = _deeper(depth)
        _pad(out, 8)
        for field, at, stop in self.members(data, start, end):
            field.to_dbus1(data, at, stop, out, order, depth)

    def to_gvariant(
        self, data: bytes, at: int, out: bytearray, order: Order, swap: bool, depth: int
    ) -> int:
        depth = _deeper(depth)
        at = skip_padding(data, at, 8, len(data))
        _pad(out, self.alignment)
        begin = len(out)
        ends = []
        for field, framed in zip(self.fields, self.framed, strict=True):
            at = field.to_gvariant(data, at, out, order, swap, depth)
            if framed:
                ends.append(len(out) - begin)
        if self.size:
            _pad(out, self.alignment)
        elif ends:
            word = framing_size(len(out) - begin, len(ends))
            for end in reversed(ends):
                out += end.to_bytes(word, "little")
        return at


_BASIC: dict[int, Type] = {
    type.letter[0]: type
    for type in (
        *(Number(bytes((letter,)), 1) for letter in b"y"),
        *(Number(bytes((letter,)), 2) for letter in b"nq"),
        *(Number(bytes((letter,)), 4) for letter in b"iuh"),
        *(Number(bytes((letter,)), 8) for letter in b"xtd"),
        Boolean(),
        Text(),
        Path(),
        Signature(),
    )
}
_VARIANT = Variant()
_CLOSING = {ord("("): ord(")"), ord("{"): ord("}")}


def _complete(signature: bytes, at: int, arrays: int, structs: int) -> tuple[Type, int]:
    """The complete type at `at`, and where it ends."""
    letter = signature[at] if at < len(signature) else 0
    basic = _BASIC.get(letter)
    if basic is not None:
        return basic, at + 1
    if letter == ord("v"):
        return _VARIANT, at + 1
    if letter == ord("a"):
        if arrays == MAX_NESTING:
            raise GVariantError("a signature has arrays nested too deeply")
        entry = signature[at + 1 : at + 2] == b"{"
        if entry and at + 2 < len(signature) and signature[at + 2] not in _BASIC:
            raise GVariantError("the key of a dict entry is not of a basic type")
        element, at = _fields(signature, at + 1, arrays + 1, structs, entry)
        return Array(element), at
    if letter != ord("("):
        raise GVariantError(f"{signature!r} is not a signature of D-Bus")
    return _fields(signature, at, arrays, structs, True)


def _fields(
    signature: bytes, at: int, arrays: int, structs: int, enclosed: bool
) -> tuple[Type, int]:
    """What stands between the brackets that open at `at`; or any other complete type."""
    if not enclosed:
        return _complete(signature, at, arrays, structs)
    if structs == MAX_NESTING:
        raise GVariantError("a signature has structs nested too deeply")
    opening = signature[at]
    at += 1
    fields = []
    while signature[at : at + 1] != _CLOSING[opening].to_bytes():
        field, at = _complete(signature, at, arrays, structs + 1)
        fields.append(field)
    if not fields or (opening == ord("{") and len(fields) != 2):
        raise GVariantError("a struct is empty, or a dict entry has not a key and a value")
    return Struct(tuple(fields)), at + 1


@lru_cache(256)
def types(signature: bytes) -> Struct:
    """The types of a whole signature. Raises GVariantError if it is not one of D-Bus."""
    if len(signature) > MAX_SIGNATURE:
        raise GVariantError(f"a signature has more than {MAX_SIGNATURE} bytes")
    fields = []
    at = 0
    while at < len(signature):
        field, at = _complete(signature, at, 0, 0)
        fields.append(field)
    return Struct(tuple(fields))


@lru_cache(256)
def _single(signature: bytes) -> Type:
    fields = types(signature).fields
    if len(fields) != 1:
        raise GVariantError("a variant does not have one complete type")
    return fields[0]


def to_dbus1(body: bytes, signature: bytes, order: Order) -> bytes:
    """The dbus1 body of a tuple of `signature` in GVariant; both are in the byte order `order`.

    systemd up to 225 left out the padding at the end of a tuple in which all is of fixed size; that
    is accepted. Raises GVariantError.
    """
    tree = types(signature)
    if not tree.fields:
        if body != b"\0":
            raise GVariantError("an empty body is one zero byte")
        return b""
    if tree.size and len(body) == tree.unpadded:
        body += bytes(tree.size - tree.unpadded)
    out = bytearray()
    tree.to_dbus1(body, 0, len(body), out, order, -1)
    if len(out) > MAX_BODY:
        raise GVariantError(f"the body has more than {MAX_BODY} bytes in dbus1")
    return bytes(out)


def to_gvariant(body: bytes, signature: bytes, order: Order, wanted: Order) -> bytes:
    """The tuple of `signature` that a dbus1 body in the byte order `order` is, in GVariant.

    Its numbers are in the byte order `wanted`. Raises GVariantError.
    """
    tree = types(signature)
    if not tree.fields:
        if body:
            raise GVariantError("a body without a signature")
        return b"\0"
    out = bytearray()
    if tree.to_gvariant(body, 0, out, order, order != wanted, -1) != len(body):
        raise GVariantError("the body is longer than its signature says")
    return bytes(out)


def text_arguments(body: bytes, signature: bytes, upto: int = 64) -> list[tuple[int, str, str]]:
    """The strings among the first `upto` values of a GVariant tuple: (index, type, text) each.

    The type is s, o or g, or as, ao or ag for each element of such an array. `body` is what
    `to_gvariant` made. Raises GVariantError.
    """
    tree = types(signature)
    found = []
    if tree.fields:
        members = tree.members(body, 0, len(body))
        for index, (field, start, end) in zip(range(upto), members, strict=False):
            if isinstance(field, Text):
                found.append((index, field.letter.decode(), body[start : end - 1].decode()))
            elif isinstance(field, Array) and isinstance(field.element, Text):
                kind = "a" + field.element.letter.decode()
                for at, stop in elements(body, start, end, 1):
                    found.append((index, kind, body[at : stop - 1].decode()))
    return found
