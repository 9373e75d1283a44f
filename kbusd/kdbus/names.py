"""Which names kdbus allows: well-known names, and the nodes that make up its tree.

kdbus.name(7), kdbus.bus(7), kdbus.endpoint(7); ipc/kdbus/names.c, item.c and util.c. Only ASCII
letters count as such (the kernel's isalpha also took Latin-1's, the manual pages never did). A
node's name can't hold a "/" nor begin with a ".", so no name leads out of the tree.
"""

from __future__ import annotations

import errno
import re

from kbusd.kdbus import abi
from kbusd.kdbus.errors import Errno

_ELEMENT = r"[A-Za-z_-][A-Za-z0-9_-]*"
_WELL_KNOWN = re.compile(rf"{_ELEMENT}(?:\.{_ELEMENT})+")
_WILDCARD = re.compile(rf"{_ELEMENT}(?:\.{_ELEMENT})*\.\*")
_NODE = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?")


def is_well_known(text: str) -> bool:
    """Two or more elements between dots, none beginning with a digit, 255 characters at most."""
    return len(text) <= abi.MAX_NAME_LENGTH and _WELL_KNOWN.fullmatch(text) is not None


def is_pattern(text: str) -> bool:
    """A well-known name, or one whose last element is "*", as policies may have."""
    return is_well_known(text) or (
        len(text) <= abi.MAX_NAME_LENGTH and _WILDCARD.fullmatch(text) is not None
    )


def check_well_known(text: str) -> None:
    """Raise Errno EINVAL unless `text` is a well-known name."""
    if not is_well_known(text):
        raise Errno(errno.EINVAL, f"{text!r} is no well-known name")


def is_node_name(text: str) -> bool:
    """May be the name of a bus, an endpoint or a domain: 1 to 63 of [A-Za-z0-9_], inside also - and ."""
    return len(text) <= abi.MAX_NODE_NAME_LENGTH and _NODE.fullmatch(text) is not None


def check_owner(text: str, uid: int) -> None:
    """Raise Errno EINVAL unless a bus or custom endpoint of this name may be made by `uid`.

    `uid` is as the domain's user namespace has it; -1 if it has no such user.
    """
    if uid < 0 or not text.startswith(f"{uid}-"):
        raise Errno(errno.EINVAL, f"{text!r} does not begin with {uid}-, its maker's uid")


def parse_path(path: str) -> tuple[str, ...]:
    """The elements of a node's path such as "1000-user/bus" or "domain/web/control".

    Raises Errno EINVAL where an element is empty or no name that a node can have.
    """
    elements = tuple(path.split("/"))
    for element in elements:
        if not is_node_name(element):
            raise Errno(errno.EINVAL, f"{path!r}: {element!r} can't be the name of a node")
    return elements
