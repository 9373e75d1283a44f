"""Listening sockets from D-Bus server addresses (D-Bus Specification, "Server Addresses").

Privileged because it binds where the admin says. Trusts the configuration, not its syntax.
"""

from __future__ import annotations

import errno
import os
import secrets
import socket
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import unquote

_UNESCAPED = frozenset("-_/.\\*%0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
_FIRST_ACTIVATED_FD = 3  # sd_listen_fds(3)


class AddressError(Exception):
    """A listen address that cannot be used; the text names it and the reason."""


@dataclass(frozen=True)
class Listener:
    sock: socket.socket
    address: str  # what clients connect to, without the guid
    path: str | None  # to be removed at the end, if we made it


def escape(value: str) -> str:
    """Escape a value for an address (D-Bus Specification, "Server Addresses")."""
    return "".join(
        chr(byte) if chr(byte) in _UNESCAPED and chr(byte) not in "%*" else f"%{byte:02x}"
        for byte in os.fsencode(value)
    )


def parse(address: str) -> tuple[str, dict[str, str]]:
    """Split one address into its transport and its keys. Raises AddressError."""
    transport, colon, rest = address.partition(":")
    if not colon or not transport:
        raise AddressError(f"address {address!r} does not contain a colon after the transport")
    keys: dict[str, str] = {}
    for pair in filter(None, rest.split(",")):
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise AddressError(f"address {address!r}: {pair!r} is not of the form key=value")
        if key in keys:
            raise AddressError(f"address {address!r}: key {key!r} stands twice")
        if any(character not in _UNESCAPED for character in value):
            raise AddressError(f"address {address!r}: value of {key!r} must be percent-escaped")
        keys[key] = unquote(value, errors="surrogateescape")
    return transport, keys


def open_listeners(addresses: str, environ: Mapping[str, str]) -> list[Listener]:
    """Listen on every address of a semicolon-separated list. Raises AddressError."""
    return [
        listener
        for address in filter(None, addresses.split(";"))
        for listener in _open(address, environ)
    ]


def _open(address: str, environ: Mapping[str, str]) -> list[Listener]:
    transport, keys = parse(address)
    if transport == "systemd":
        return _activated(environ)
    if transport != "unix":
        raise AddressError(
            f"address {address!r}: transport {transport!r} is not supported (unix:, systemd:)"
        )
    kinds = [key for key in ("path", "abstract", "dir", "tmpdir", "runtime") if key in keys]
    if len(kinds) != 1:
        raise AddressError(
            f"address {address!r}: give exactly one of path, abstract, dir, tmpdir, runtime"
        )
    value = keys[kinds[0]]
    match kinds[0]:
        case "path":
            return [_bind_path(value, address)]
        case "abstract":
            return [_bind_abstract(value, address)]
        case "dir" | "tmpdir":
            return [_bind_path(f"{value}/dbus-{secrets.token_hex(8)}", address)]
        case _:
            if value != "yes":
                raise AddressError(f"address {address!r}: runtime must be 'yes'")
            directory = environ.get("XDG_RUNTIME_DIR")
            if not directory:
                raise AddressError(f"address {address!r}: XDG_RUNTIME_DIR is not set")
            return [_bind_path(f"{directory}/bus", address)]


def _bind_path(path: str, address: str) -> Listener:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        _remove_stale(path)
        sock.bind(path)
        # Who may talk is decided by policy and by the directory, as in dbus-daemon(1).
        os.chmod(path, 0o777)
    except OSError as error:
        sock.close()
        raise AddressError(f"cannot listen on {address!r}: {path}: {error.strerror}") from None
    sock.listen(socket.SOMAXCONN)
    sock.setblocking(False)
    return Listener(sock, f"unix:path={escape(path)}", path)


def _remove_stale(path: str) -> None:
    """Remove the socket of a bus that is gone; leave one that somebody answers on."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            return
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
    raise OSError(errno.EADDRINUSE, "another bus answers on this socket")


def _bind_abstract(name: str, address: str) -> Listener:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        sock.bind(b"\0" + os.fsencode(name))
    except OSError as error:
        sock.close()
        raise AddressError(f"cannot listen on {address!r}: {error.strerror}") from None
    sock.listen(socket.SOMAXCONN)
    sock.setblocking(False)
    return Listener(sock, f"unix:abstract={escape(name)}", None)


def _activated(environ: Mapping[str, str]) -> list[Listener]:
    """Sockets that the service manager passed (sd_listen_fds(3))."""
    if environ.get("LISTEN_PID") != str(os.getpid()):
        raise AddressError("address 'systemd:': no sockets were passed (LISTEN_PID is not ours)")
    count = environ.get("LISTEN_FDS", "")
    if not count.isdigit() or not 0 < int(count) < 64:
        raise AddressError(f"address 'systemd:': LISTEN_FDS={count!r} is not a usable number")
    listeners = []
    for fd in range(_FIRST_ACTIVATED_FD, _FIRST_ACTIVATED_FD + int(count)):
        os.set_inheritable(fd, False)
        sock = socket.socket(fileno=fd)
        if sock.family != socket.AF_UNIX or sock.type != socket.SOCK_STREAM:
            raise AddressError(f"address 'systemd:': descriptor {fd} is not a Unix stream socket")
        sock.setblocking(False)
        name = sock.getsockname()
        if isinstance(name, bytes):
            address = f"unix:abstract={escape(os.fsdecode(name[1:]))}"
        else:
            address = f"unix:path={escape(name)}"
        listeners.append(Listener(sock, address, None))
    return listeners
