"""Names of D-Bus, for code that is not on the hot path: is one valid, and if not, which rule says so.

D-Bus Specification, "Valid Names" and "Valid Object Paths". The `is_` functions answer yes or no by
the same code that judges messages; the `check_` functions raise ValueError with the rule.
"""

from __future__ import annotations

import re

from kbusd.wire import validate

MAX_LENGTH = 255  # bytes, of every name but an object path

_ELEMENT = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_PATH_ELEMENT = re.compile(r"[A-Za-z0-9_]+")
_UNIQUE_ELEMENT = re.compile(r"[A-Za-z0-9_-]+")
_WELL_KNOWN_ELEMENT = re.compile(r"[A-Za-z_-][A-Za-z0-9_-]*")


def is_path(text: str) -> bool:
    """A valid object path."""
    return validate.is_path(_encode(text))


def is_interface(text: str) -> bool:
    """A valid interface name."""
    return validate.is_interface(_encode(text))


def is_member(text: str) -> bool:
    """A valid name of a method or signal."""
    return validate.is_member(_encode(text))


def is_error_name(text: str) -> bool:
    """A valid error name."""
    return validate.is_error_name(_encode(text))


def is_bus_name(text: str) -> bool:
    """A valid bus name, unique or well-known."""
    return validate.is_bus_name(_encode(text))


def is_unique(text: str) -> bool:
    """A valid unique name such as ":1.7"."""
    return text.startswith(":") and is_bus_name(text)


def is_well_known(text: str) -> bool:
    """A valid well-known name."""
    return not text.startswith(":") and is_bus_name(text)


def is_namespace(text: str) -> bool:
    """A bus name, or one element that could begin one (as in arg0namespace)."""
    return is_bus_name(text) or (
        0 < len(text) <= MAX_LENGTH and _WELL_KNOWN_ELEMENT.fullmatch(text) is not None
    )


def check_path(text: str) -> None:
    """Raise ValueError unless `text` is an object path."""
    if not text.startswith("/"):
        raise ValueError(f"object path {text!r} does not begin with '/'")
    if text == "/":
        return
    for element in text[1:].split("/"):
        if not element:
            raise ValueError(f"object path {text!r} has an empty element or ends in '/'")
        if not _PATH_ELEMENT.fullmatch(element):
            raise ValueError(
                f"object path {text!r}: element {element!r} has a character outside [A-Za-z0-9_]"
            )


def check_interface(text: str) -> None:
    """Raise ValueError unless `text` is an interface name."""
    _check_dotted("interface name", text, _ELEMENT, "[A-Za-z0-9_]", least=2)


def check_error_name(text: str) -> None:
    """Raise ValueError unless `text` is an error name."""
    _check_dotted("error name", text, _ELEMENT, "[A-Za-z0-9_]", least=2)


def check_member(text: str) -> None:
    """Raise ValueError unless `text` is a member name."""
    if "." in text:
        raise ValueError(f"member name {text!r} has a '.'")
    _check_dotted("member name", text, _ELEMENT, "[A-Za-z0-9_]", least=1)


def check_unique(text: str) -> None:
    """Raise ValueError unless `text` is a unique name."""
    if not text.startswith(":"):
        raise ValueError(f"unique name {text!r} does not begin with ':'")
    if is_bus_name(text):
        return
    _check_length("unique name", text)
    for element in text[1:].split("."):
        if not _UNIQUE_ELEMENT.fullmatch(element):
            raise _bad_element("unique name", text, element, "[A-Za-z0-9_-]")


def check_well_known(text: str) -> None:
    """Raise ValueError unless `text` is a well-known bus name."""
    if text.startswith(":"):
        raise ValueError(f"well-known name {text!r} begins with ':', as only unique names do")
    _check_dotted("well-known name", text, _WELL_KNOWN_ELEMENT, "[A-Za-z0-9_-]", least=2)


def check_bus_name(text: str) -> None:
    """Raise ValueError unless `text` is a unique or a well-known name."""
    if text.startswith(":"):
        check_unique(text)
    else:
        check_well_known(text)


def check_namespace(text: str) -> None:
    """Raise ValueError unless `text` could begin a bus name, element by element."""
    if text.startswith(":"):
        check_unique(text)
    else:
        _check_dotted("namespace", text, _WELL_KNOWN_ELEMENT, "[A-Za-z0-9_-]", least=1)


def _encode(text: str) -> bytes:
    return text.encode(errors="surrogatepass")


def _check_length(what: str, text: str) -> None:
    if not text:
        raise ValueError(f"{what} is empty")
    if len(_encode(text)) > MAX_LENGTH:
        raise ValueError(f"{what} {text!r} is longer than {MAX_LENGTH} bytes")


def _check_dotted(
    what: str, text: str, pattern: re.Pattern[str], allowed: str, *, least: int
) -> None:
    _check_length(what, text)
    elements = text.split(".")
    for element in elements:
        if not pattern.fullmatch(element):
            raise _bad_element(what, text, element, allowed)
    if len(elements) < least:
        raise ValueError(f"{what} {text!r} has no '.'")


def _bad_element(what: str, text: str, element: str, allowed: str) -> ValueError:
    if not element:
        return ValueError(f"{what} {text!r} has an empty element")
    if element[0].isdigit():
        return ValueError(f"{what} {text!r}: element {element!r} begins with a digit")
    return ValueError(f"{what} {text!r}: element {element!r} has a character outside {allowed}")
