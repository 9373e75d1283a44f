"""Listening sockets: at the places that the configuration reader found, or passed to us.

Privileged because it binds where the admin says. Trusts the configuration, and parses nothing
of it.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from contextlib import suppress
from dataclasses import dataclass
from socket import AF_UNIX, SOCK_NONBLOCK, SOCK_STREAM, SOMAXCONN, socket

_UNESCAPED = frozenset(b"-_/.\\0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")


@dataclass(frozen=True)
class Listener:
    sock: socket
    address: str  # what clients connect to, without the guid
    path: str = ""  # to be removed at the end, if we made it
    endpoint: str = ""  # which one its clients come by, if it is not the bus's own

    def close(self) -> None:
        self.sock.close()
        with suppress(OSError):
            os.unlink(self.path)


def open_endpoint(name: str, path: str) -> Listener:
    """Listen for an endpoint at `path`, with the name behind it if that ends with a dot. Raises OSError."""
    if not path.startswith("/") or not name.isascii() or not re.fullmatch(r"[\w-]+", name):
        raise OSError(errno.EINVAL, "not a name, or no place, for an endpoint")
    return bind("path", path + name if path.endswith(".") else path, name)


def bind(kind: str, value: str, name: str = "") -> Listener:
    """Listen on an address (kbusd/policy/addresses.py). Raises OSError."""
    sock = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK)
    if kind == "path":
        _remove_stale(value)
        sock.bind(value)
        # Who may talk is decided by policy and by the directory, as in dbus-daemon(1).
        os.chmod(value, 0o777)
    else:
        sock.bind(b"\0" + os.fsencode(value))
    sock.listen(SOMAXCONN)
    return Listener(sock, f"unix:{kind}={escape(value)}", value if kind == "path" else "", name)


def _remove_stale(path: str) -> None:
    """Remove the socket of a bus that is gone; leave one that somebody answers on."""
    with socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK) as probe:
        try:
            probe.connect(path)
        except FileNotFoundError:
            return
        except ConnectionRefusedError:
            if stat.S_ISSOCK(os.lstat(path).st_mode):  # a plain file refuses, too
                os.unlink(path)
        else:
            raise OSError(errno.EADDRINUSE, "another bus answers on this socket")


def escape(value: str | bytes) -> str:
    """Escape a value for an address (D-Bus Specification, "Server Addresses")."""
    return "".join(chr(b) if b in _UNESCAPED else f"%{b:02x}" for b in os.fsencode(value))
