"""Domains: trees of nodes of their own, each for the users of one container.

    HOST              what there is without any: /dev/kdbus/..., the mount of kdbusfs
    domain/box/...    a control node, and the buses that are made by it

Which there are, the admin says by files in one directory, one for each, named as the container: its first
uid on the host, how many it has, and if there is to be a mount of kdbusfs, where. Nobody else gets at a
domain's nodes, not even the host's root, whatever their access bits; in it, users are called by the
uids that they have in the container, so that its root makes 0-system.

Between the parts of the supervisor, the buses of a domain are called by its prefix and their name.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

import msgspec

from kbusd.rings.entries import Node, Share

MAX_CONNECTIONS = 1024  # of all users of a domain; of each there may be as many as the policy says
DOMAINS = "/etc/kbusd/domains"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,62}", re.ASCII)
_FILE = re.compile(rb"\s*(\d{1,10})\s+(\d{1,10})(?:\s+(/\S+))?\s*")


class DomainError(Exception):
    """A domain that can't be; the text says which and why."""


class Domain(msgspec.Struct, frozen=True):
    """Whose it is, and where it is mounted."""

    name: str = ""
    first: int = 0
    count: int = (1 << 32) - 1
    mount: str = ""

    @property
    def prefix(self) -> str:
        return f"domain/{self.name}/" if self.name else ""

    def inside(self, uid: int) -> int | None:
        """What its users call the host's `uid`; None: nobody in it."""
        return uid - self.first if 0 <= uid - self.first < self.count else None

    def full(self, of: Mapping[Share, int]) -> str:
        """Why its users may have no more connections, given how many each user has; "": they may."""
        users = (
            (share if isinstance(share, int) else share[0], many) for share, many in of.items()
        )
        there = sum(many for uid, many in users if self.inside(uid) is not None)
        if self.name and there >= MAX_CONNECTIONS:
            return f"domain {self.name} has {there} connections"
        return ""

    def local(self, node: Node) -> Node | None:
        """As it is called in it; None: it is not in it."""
        if not node.bus.startswith(self.prefix) or "/" in node.bus[len(self.prefix) :]:
            return None
        return msgspec.structs.replace(node, bus=node.bus[len(self.prefix) :])


HOST = Domain()


def read(directory: str) -> dict[str, Domain]:
    """Those that the admin wants, by their prefixes; none yet, if the usual directory is not there.
    Raises DomainError."""
    found: dict[str, Domain] = {}
    if directory == DOMAINS and not os.path.exists(directory):
        return found
    try:
        for name in sorted(os.listdir(directory)):
            if not name.startswith(".") and not name.endswith("~"):
                domain = _read(directory, name)
                found[domain.prefix] = domain
    except OSError as error:
        raise DomainError(f"{error.filename or directory}: {error.strerror}") from None
    return found


def _read(directory: str, name: str) -> Domain:
    path = f"{directory}/{name}"
    with open(path, "rb") as file:
        said = _FILE.fullmatch(file.read(4096))
    if said is None or not _NAME.fullmatch(name):
        raise DomainError(f"{path}: wants a first uid, a number of uids, and maybe a mount point")
    first, count = int(said[1]), int(said[2])
    if first == 0 or count == 0 or first + count >= 1 << 32:
        raise DomainError(f"{path}: {count} uids from {first} are nobody's, or the host's root's")
    return Domain(name, first, count, os.fsdecode(said[3] or b""))
