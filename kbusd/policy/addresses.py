"""D-Bus server addresses, made ready to listen on (D-Bus Specification, "Server Addresses").

Used by the configuration reader, so that the privileged process that binds the sockets parses
nothing. Looks at the environment for `runtime=yes` and otherwise touches nothing.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

import msgspec

_VALUE = r"(?:[-0-9A-Za-z_/.\\*]|%[0-9A-Fa-f]{2})*"
_PAIR = rf"[^=,;:]+={_VALUE}"
_ADDRESS = re.compile(rf"([^:;,=]+):({_PAIR}(?:,{_PAIR})*,?)?")
_PLACES = ("path", "abstract", "dir", "tmpdir", "runtime")


class AddressError(ValueError):
    """An address that cannot be listened on; the text names it and the reason."""


class Address(msgspec.Struct, frozen=True, array_like=True):
    """One place to listen at. `kind` is "path" or "abstract", of which `value` is the name, or
    "systemd": what the service manager passes. `text` is the address as written, and `where` says
    by whom: file:line or an option. Of those with the same `entry` the first that works is listened on."""

    kind: str
    value: str
    text: str
    where: str
    entry: int = 0


def split(text: str) -> list[str]:
    """The addresses of a semicolon-separated list. Raises AddressError if one is none."""
    addresses = [each for each in text.split(";") if each]
    for each in addresses:
        if not _ADDRESS.fullmatch(each):
            raise AddressError(f'"{each}" is not a D-Bus address')
    return addresses


def resolve(text: str, where: str, environment: Mapping[str, str], entry: int = 0) -> list[Address]:
    """Every address of a semicolon-separated list. Raises AddressError, whose text has `where`."""
    try:
        return [
            Address(*_place(address, environment), text=address, where=where, entry=entry)
            for address in split(text)
        ]
    except AddressError as error:
        raise AddressError(f"{where}: {error}") from None


def _unescape(value: str) -> str:
    # urllib and secrets bring in much that a reader, which is started for each reload, has no use for.
    data = re.sub(rb"%(..)", lambda escape: bytes.fromhex(escape[1].decode()), value.encode())
    return data.decode(errors="surrogateescape")


def _place(address: str, environment: Mapping[str, str]) -> tuple[str, str]:
    """Kind and value of one address."""
    transport, _, rest = address.partition(":")
    pairs = [pair.partition("=") for pair in rest.removesuffix(",").split(",")] if rest else []
    keys = {key: _unescape(value) for key, _, value in pairs}
    places = [key for key in _PLACES if key in keys]
    match transport, places:
        case _ if len(keys) < len(pairs):
            reason = "a key stands twice"
        case "systemd", _:
            return "systemd", ""
        case "unix", [_] if "\0" in "".join(keys.values()):
            reason = "a zero byte cannot be part of a name"
        case "unix", ["path" | "abstract" as kind]:
            return kind, keys[kind]
        case "unix", ["dir" | "tmpdir" as kind]:
            return "path", f"{keys[kind]}/dbus-{os.urandom(8).hex()}"
        case "unix", ["runtime"] if keys["runtime"] != "yes":
            reason = "runtime must be 'yes'"
        case "unix", ["runtime"] if environment.get("XDG_RUNTIME_DIR"):
            return "path", f"{environment['XDG_RUNTIME_DIR']}/bus"
        case "unix", ["runtime"]:
            reason = "XDG_RUNTIME_DIR is not set"
        case "unix", _:
            reason = f"give exactly one of {', '.join(_PLACES)}"
        case _:
            reason = f"transport {transport!r} is not supported (unix:, systemd:)"
    raise AddressError(f"address {address!r}: {reason}")
