"""The reference implementation's judgement, by way of its shared library (libdbus-1.so.3)."""

from __future__ import annotations

import ctypes
import ctypes.util

import pytest


class _Error(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("message", ctypes.c_char_p),
        ("bits", ctypes.c_uint),
        ("padding", ctypes.c_void_p),
    )


def _load() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL("libdbus-1.so.3")
    except OSError:
        return None
    library.dbus_message_demarshal.restype = ctypes.c_void_p
    library.dbus_message_demarshal.argtypes = (ctypes.c_char_p, ctypes.c_int, ctypes.c_void_p)
    library.dbus_message_unref.argtypes = (ctypes.c_void_p,)
    return library


_library = _load()
present = _library is not None

needed = pytest.mark.skipif(not present, reason="needs libdbus-1.so.3")


def accepts_message(data: bytes) -> tuple[bool, str]:
    """Whether libdbus takes these bytes for a message, and else what it says."""
    assert _library is not None
    error = _Error()
    _library.dbus_error_init(ctypes.byref(error))
    message = _library.dbus_message_demarshal(data, len(data), ctypes.byref(error))
    if message:
        _library.dbus_message_unref(message)
        return True, ""
    text = (error.message or b"").decode()
    _library.dbus_error_free(ctypes.byref(error))
    return False, text


def accepts(kind: str, text: bytes) -> bool:
    """Whether libdbus finds `text` valid as a path, interface, member, error_name, bus_name, utf8
    or signature. It takes C strings, so there must be no NUL in it."""
    assert _library is not None
    assert b"\0" not in text
    function = "dbus_signature_validate" if kind == "signature" else f"dbus_validate_{kind}"
    return bool(_library[function](text, None))
