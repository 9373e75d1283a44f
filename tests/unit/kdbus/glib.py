"""GLib's own GVariant, by way of its shared library, to compare with."""

from __future__ import annotations

import ctypes
import itertools
import re
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import reject

from tests.unit.wire.marshal import split


def _load() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL("libglib-2.0.so.0")
    except OSError:
        return None
    pointer = ctypes.c_void_p
    for name, result, arguments in (
        ("g_variant_type_new", pointer, (ctypes.c_char_p,)),
        ("g_variant_type_free", None, (pointer,)),
        ("g_bytes_new", pointer, (ctypes.c_char_p, ctypes.c_size_t)),
        ("g_bytes_unref", None, (pointer,)),
        ("g_variant_new_from_bytes", pointer, (pointer, pointer, ctypes.c_int)),
        ("g_variant_parse", pointer, (pointer, ctypes.c_char_p, pointer, pointer, pointer)),
        ("g_variant_ref_sink", pointer, (pointer,)),
        ("g_variant_unref", None, (pointer,)),
        ("g_variant_is_normal_form", ctypes.c_int, (pointer,)),
        ("g_variant_byteswap", pointer, (pointer,)),
        ("g_variant_get_size", ctypes.c_size_t, (pointer,)),
        ("g_variant_store", None, (pointer, ctypes.c_char_p)),
    ):
        library[name].restype = result
        library[name].argtypes = arguments
    return library


_library: Any = _load()

needed = pytest.mark.skipif(_library is None, reason="needs libglib-2.0.so.0")


def is_normal_form(type: str, data: bytes) -> bool:
    """Whether GLib takes these bytes for the normal form of a value of the type."""
    kind = _library.g_variant_type_new(type.encode())
    content = _library.g_bytes_new(data, len(data))
    value = _library.g_variant_ref_sink(_library.g_variant_new_from_bytes(kind, content, 0))
    normal = bool(_library.g_variant_is_normal_form(value))
    _library.g_variant_unref(value)
    _library.g_bytes_unref(content)
    _library.g_variant_type_free(kind)
    return normal


def serialise(signature: str, values: tuple[Any, ...], big_endian: bool = False) -> bytes:
    """A tuple of what jeepney takes, as GLib writes it. Descriptors are numbered as `marshal` does."""
    kind = _library.g_variant_type_new(f"({signature})".encode())
    text = _tuple(
        _text(each, value, itertools.count())
        for each, value in zip(split(signature), values, strict=True)
    )
    parsed = _library.g_variant_parse(kind, text.encode(), None, None, None)
    _library.g_variant_type_free(kind)
    if not parsed and re.search(r"e-3\d\d", text):
        reject()  # GLib reads no subnormal numbers
    assert parsed, text
    if big_endian != (sys.byteorder == "big"):
        swapped = _library.g_variant_byteswap(parsed)
        _library.g_variant_unref(parsed)
        parsed = swapped
    out = ctypes.create_string_buffer(_library.g_variant_get_size(parsed) + 1)
    _library.g_variant_store(parsed, out)
    _library.g_variant_unref(parsed)
    return out.raw[:-1]


def _text(type: str, value: Any, handles: Iterator[int]) -> str:
    """A value in the text format of GVariant."""
    if type == "h":
        return str(next(handles))
    if type in ("s", "o", "g"):
        return "'" + "".join(f"\\U{ord(letter):08x}" for letter in value) + "'"
    if type == "b":
        return "true" if value else "false"
    if type == "v":
        return f"<@{value[0]} {_text(*value, handles)}>"
    if type.startswith("a{"):
        key, inner = split(type[2:-1])
        pairs = (
            f"{_text(key, each, handles)}: {_text(inner, value[each], handles)}" for each in value
        )
        return "{" + ", ".join(pairs) + "}"
    if type.startswith("a"):
        return "[" + ", ".join(_text(type[1:], each, handles) for each in value) + "]"
    if type.startswith("("):
        pairs = zip(split(type[1:-1]), value, strict=True)
        return _tuple(_text(kind, each, handles) for kind, each in pairs)
    return repr(value)


def _tuple(fields: Iterator[str]) -> str:
    each = [*fields]
    return f"({', '.join(each)}{',' * (len(each) == 1)})"
