"""Endpoints of the configuration: TOML files, one for each, which has its name.

    bus = "session"        # which one, for files in DIRECTORY: "session" (if left out) or "system"
    socket = "/run/..."    # where; if left out, beside the socket of the bus: PATH.NAME
    talk = ["org.freedesktop.portal.*"]
    call = ["org.example.Files=org.example.Files.Open@/org/example/*"]

The other keys are the words of endpoints.py. Runs in the configuration reader, as it opens files. Like
all of the configuration, an endpoint that has a mistake is refused: what it was to deny mattered.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Sequence
from typing import NamedTuple

from kbusd.policy import endpoints
from kbusd.policy.configuration import MAX_FILE_SIZE, ConfigurationError
from kbusd.policy.endpoints import Endpoint, EndpointError

DIRECTORY = "/etc/kbusd/endpoints.d"
SUFFIX = ".toml"
BUSES = ("session", "system")
MAX_ENDPOINTS = 256

_LISTS = (*endpoints.WORDS, *endpoints.RULE_WORDS)


class File(NamedTuple):
    """One endpoint, for which bus it is, and where; "" if that is not said."""

    endpoint: Endpoint
    bus: str
    socket: str


def directories(files: Sequence[str], directory: str = DIRECTORY) -> list[str]:
    """Where `load_all` finds what it reads; who changes something there has it read again."""
    return sorted({directory, *(os.path.dirname(os.path.abspath(file)) for file in files)})


def load_all(files: Sequence[str], bus: str, directory: str = DIRECTORY) -> tuple[File, ...]:
    """Those of `files`, and of the files in `directory` that are for a bus of this type. Raises
    ConfigurationError."""
    found: dict[str, File] = {}
    for path in files:
        _add(found, path, load(path))
    for path in _listed(directory):
        file = load(path)
        if file.bus == bus:
            _add(found, path, file)
    return tuple(found.values())


def load(path: str) -> File:
    """What a file says. Raises ConfigurationError."""
    try:
        with open(path, "rb") as stream:
            data = stream.read(MAX_FILE_SIZE + 1)
    except OSError as error:
        raise ConfigurationError(path, 1, f"cannot be read: {error.strerror}") from error
    try:
        text = data.decode()
        said = tomllib.loads(text)
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigurationError(path, _told_line(error), f"no TOML: {error}") from error
    bus = said.pop("bus", BUSES[0])
    if bus not in BUSES:
        raise ConfigurationError(path, _line(text, "bus"), f"bus is one of {', '.join(BUSES)}")
    socket = said.pop("socket", "")
    if not isinstance(socket, str) or (socket and not os.path.isabs(socket)) or "\0" in socket:
        raise ConfigurationError(path, _line(text, "socket"), "socket is an absolute path")
    lines: list[str] = []
    for word, values in said.items():
        if word not in _LISTS:
            known = ", ".join(("bus", "socket", *_LISTS))
            raise ConfigurationError(path, _line(text, word), f"{word} is not known: {known}")
        if not isinstance(values, list) or not all(isinstance(each, str) for each in values):
            raise ConfigurationError(path, _line(text, word), f"{word} is a list of strings")
        lines += [f"{word}={value}" for value in values]
        try:
            endpoints.parse("-", lines)
        except EndpointError as error:
            raise ConfigurationError(path, _line(text, word), str(error)) from error
    name = os.path.basename(path).removesuffix(SUFFIX)
    try:
        return File(endpoints.parse(name, lines), bus, socket)
    except EndpointError as error:
        raise ConfigurationError(path, 1, str(error)) from error


def _listed(directory: str) -> list[str]:
    try:
        names = sorted(name for name in os.listdir(directory) if name.endswith(SUFFIX))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ConfigurationError(directory, 0, f"cannot be read: {error.strerror}") from error
    return [os.path.join(directory, name) for name in names]


def _add(found: dict[str, File], path: str, file: File) -> None:
    name = file.endpoint.name
    if name in found:
        raise ConfigurationError(path, 1, f'there is another endpoint "{name}"')
    if len(found) >= MAX_ENDPOINTS:
        raise ConfigurationError(path, 1, f"more than {MAX_ENDPOINTS} endpoints")
    found[name] = file


def _line(text: str, key: str) -> int:
    """Where `key` stands; 1 where that is not to be seen."""
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip().strip('"').startswith(key):
            return number
    return 1


def _told_line(error: Exception) -> int:
    """The line that an error of tomllib names, as text."""
    _, _, rest = str(error).partition("at line ")
    digits = rest.partition(",")[0]
    return int(digits) if digits.isdigit() else 1
