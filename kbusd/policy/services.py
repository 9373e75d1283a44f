"""Service files: which program provides a bus name that nobody owns yet.

Reads directories of ``*.service`` files (D-Bus specification, "Message Bus Starting Services";
desktop entry specification for the syntax). A file that is wrong is skipped with a warning and
never stops the bus. Runs in the configuration reader only: everyone else sees the result.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

import msgspec

MAX_FILE_SIZE = 128 * 1024
"""Bytes; dbus-daemon's own limit for a service file."""

_SECTION = "D-BUS Service"
_ESCAPES = {"s": " ", "t": "\t", "n": "\n", "r": "\r", "\\": "\\"}
_KEY = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-")


class Service(msgspec.Struct, frozen=True, array_like=True):
    """How to start the owner of `name`.

    `exec` is the argument vector, empty where there is none; when its quoting is broken `exec_error`
    says why (the name stays activatable, starting it fails). Absent keys are "".
    """

    name: str
    exec: tuple[str, ...]
    file: str
    exec_error: str = ""
    user: str = ""
    systemd_service: str = ""
    assumed_apparmor_label: str = ""


class Directory(msgspec.Struct, frozen=True):
    """A directory of service files; `strict` ones must be called NAME.service."""

    path: str
    strict: bool = False


Warn = Callable[[str, int, str], None]
"""Takes file, line (0: the whole file) and text."""


def load(directories: Iterable[Directory], warn: Warn) -> tuple[Service, ...]:
    """All services, by name. The first directory that has a name wins; in one directory the
    file that is called like its name. A directory that does not exist is empty."""
    services: dict[str, Service] = {}
    for directory in directories:
        found: dict[str, Service] = {}
        for path in _files(directory.path, warn):
            service = _load_file(path, warn)
            if service is None:
                continue
            proper = os.path.basename(path) == f"{service.name}.service"
            if directory.strict and not proper:
                warn(path, 0, f"skipped: it must be called {service.name}.service here")
            elif service.name in found and not proper:
                warn(path, 0, f"skipped: {found[service.name].file} provides the same name")
            else:
                if service.name in found:
                    warn(found[service.name].file, 0, f"skipped: {path} provides the same name")
                found[service.name] = service
        services = found | services
    return tuple(services[name] for name in sorted(services))


def _files(directory: str, warn: Warn) -> list[str]:
    try:
        names = sorted(os.listdir(directory))
    except FileNotFoundError:
        return []
    except OSError as error:
        warn(directory, 0, f"service directory skipped: {error.strerror}")
        return []
    paths = [os.path.join(directory, name) for name in names if name.endswith(".service")]
    return [path for path in paths if is_told(path, warn)]


def is_utf8(path: str) -> bool:
    """As all must be that is said of it."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_told(path: str, warn: Warn) -> bool:
    """Whether the bus can be told of it; else its admin is."""
    told = is_utf8(path)
    if not told:
        warn(path, 0, "skipped: its name is not UTF-8")
    return told


def _load_file(path: str, warn: Warn) -> Service | None:
    try:
        with open(path, "rb") as stream:
            data = stream.read(MAX_FILE_SIZE + 1)
        if len(data) > MAX_FILE_SIZE:
            raise ValueError(f"larger than {MAX_FILE_SIZE} bytes", 0)
        keys = parse(data.decode())
    except OSError as error:
        warn(path, 0, f"skipped: {error.strerror}")
        return None
    except UnicodeDecodeError:
        warn(path, 0, "skipped: not UTF-8")
        return None
    except ValueError as error:
        reason, line = error.args
        warn(path, line, f"skipped: {reason}")
        return None
    for key in ("Name", "Exec"):
        if key not in keys:
            warn(path, 0, f"skipped: no {key} in section [{_SECTION}]")
            return None
    if not _plausible_name(keys["Name"]):
        warn(path, 0, f'skipped: "{keys["Name"]}" is not a well-known bus name')
        return None
    exec_error = ""
    arguments: tuple[str, ...] = ()
    try:
        arguments = split(keys["Exec"])
    except ValueError as error:
        exec_error = str(error)
        warn(path, 0, f"cannot be started: Exec: {exec_error}")
    return Service(
        name=keys["Name"],
        exec=arguments,
        file=path,
        exec_error=exec_error,
        user=keys.get("User", ""),
        systemd_service=keys.get("SystemdService", ""),
        assumed_apparmor_label=keys.get("AssumedAppArmorLabel", ""),
    )


def parse(text: str) -> dict[str, str]:
    """Keys and values of the section [D-BUS Service]; of a repeated key or section the first.

    Raises ValueError(reason, line) for what is not a key file.
    """
    section: str | None = None
    seen_service = False
    keys: dict[str, str] = {}
    for number, raw in enumerate(text.split("\n"), 1):
        line = raw.removesuffix("\r")
        if line.startswith("["):
            if len(line) <= 2 or not line.endswith("]"):
                raise ValueError("malformed section header", number)
            name = line[1:-1]
            if any(not " " <= c <= "~" or c in "[]" for c in name):
                raise ValueError("section name has forbidden characters", number)
            section = "" if name == _SECTION and seen_service else name
            seen_service = seen_service or name == _SECTION
        elif not line.strip(" \t\r\f") or line.startswith("#"):
            continue
        elif section is None:
            raise ValueError("key before the first [section]", number)
        else:
            entry = _key_value(line, number)
            if entry is not None and section == _SECTION:
                keys.setdefault(*entry)
    return keys


def _key_value(line: str, number: int) -> tuple[str, str] | None:
    end = 0
    while end < len(line) and line[end] in _KEY:
        end += 1
    if end == 0:
        raise ValueError("line has no key", number)
    key, rest = line[:end], line[end:]
    if rest.startswith("["):  # a translation: Key[de]=...
        return None
    rest = rest.lstrip(" ")
    if not rest.startswith("="):
        raise ValueError(f'no "=" after key {key}', number)
    value: list[str] = []
    characters = iter(rest[1:].lstrip(" "))
    for c in characters:
        if c == "\0":
            raise ValueError("NUL in a value", number)
        if c == "\\":
            c = next(characters, "")
            if c not in _ESCAPES:
                raise ValueError(f'unknown escape "\\{c}"', number)
            c = _ESCAPES[c]
        value.append(c)
    return key, "".join(value)


def split(command: str) -> tuple[str, ...]:
    """`command` as an argument vector, by the quoting rules of sh(1), nothing expanded.

    Raises ValueError with the reason: unfinished quotes or escapes.
    """
    words: list[str] = []
    word: list[str] | None = None
    quote = ""
    characters = iter(command)
    for c in characters:
        if quote == "'":
            assert word is not None
            if c == quote:
                quote = ""
            else:
                word.append(c)
        elif quote == '"':
            assert word is not None
            if c == quote:
                quote = ""
            elif c == "\\":
                c = next(characters, "")
                if c == "":
                    break
                # Inside double quotes a backslash is literal except before these.
                if c != "\n":
                    word.append(c if c in '$`"\\' else "\\" + c)
            else:
                word.append(c)
        elif c in " \t\n":
            if word is not None:
                words.append("".join(word))
                word = None
        elif c == "#" and word is None:
            for c in characters:
                if c == "\n":
                    break
        else:
            word = [] if word is None else word
            if c in "'\"":
                quote = c
            elif c == "\\":
                c = next(characters, "")
                if c == "":
                    raise ValueError("ends in a backslash")
                if c != "\n":
                    word.append(c)
            else:
                word.append(c)
    if quote:
        raise ValueError(f"unfinished {quote} quote")
    if word is not None:
        words.append("".join(word))
    return tuple(words)


def _plausible_name(name: str) -> bool:
    """Whether `name` could ever be requested (D-Bus specification, "Valid Names", bus names)."""
    elements = name.split(".")
    return (
        len(name) <= 255
        and name.isascii()
        and len(elements) >= 2
        and all(
            e != "" and not e[0].isdigit() and e.replace("_", "a").replace("-", "a").isalnum()
            for e in elements
        )
    )
