"""A profile made ready: numbers only, so that a child can go into it without look-ups or imports.

Travels from the supervisor to its children (msgpack). Trusted: whoever could write it could as
well not apply it.
"""

from __future__ import annotations

import msgspec

USERS, FEW_USERS = 65536, 256  # of a profile's [user] apart, apart-inside


class Path(msgspec.Struct, frozen=True, array_like=True):
    """A file hierarchy that Landlock leaves reachable, to read or also to write."""

    path: str
    write: bool


class Limit(msgspec.Struct, frozen=True, array_like=True):
    """setrlimit(2) of `resource` to `value`; -1 raises the soft limit to the hard one."""

    name: str
    resource: int
    value: int
    required: bool


class Compiled(msgspec.Struct, frozen=True, kw_only=True):
    """All that `apply.confine` does, in numbers. None or "" means: leave as it is.

    `required`: the sections (by the names that they have in the profile) whose failure is an error.
    `apart`: the first user, and how many.
    `notes`: warnings from compiling. `bpf`: an array of struct sock_filter, b"" for no filter.
    `listening`: somebody answers what that filter leaves to him; only `kbusctl profile learn` says so."""

    name: str
    title: str
    files: tuple[str, ...]
    required: frozenset[str]
    notes: tuple[str, ...] = ()
    uid: int | None = None
    gid: int | None = None
    apart: tuple[int, int] | None = None
    groups: tuple[int, ...] | None = None
    capabilities: int | None = None
    bounding: int | None = None
    securebits: int = 0
    no_new_privileges: bool = False
    not_dumpable: bool = False
    limits: tuple[Limit, ...] = ()
    unshare: int = 0
    landlock: tuple[Path, ...] | None = None
    selinux: str = ""
    bpf: bytes = b""
    listening: bool = False


_encode = msgspec.msgpack.Encoder(order="deterministic").encode
_decode = msgspec.msgpack.Decoder(Compiled).decode


def encode(compiled: Compiled) -> bytes:
    """The bytes that `decode` takes."""
    return _encode(compiled)


def decode(data: bytes) -> Compiled:
    """Raises msgspec.DecodeError for anything but what `encode` made."""
    return _decode(data)
