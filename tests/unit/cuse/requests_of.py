"""Requests as a kernel would send them."""

from __future__ import annotations

from struct import Struct

from kbusd.cuse import abi


def request(
    opcode: int,
    layout: Struct | None = None,
    *fields: int,
    data: bytes = b"",
    unique: int = 2,
    node: int = 1,
    extra: bytes = b"",
    tid: int = 77,
    uid: int = 1000,
) -> bytes:
    """A request of this user, group 100."""
    content = (layout.pack(*fields) if layout else b"") + data + extra
    length = abi.IN_HEADER.size + len(content)
    head = abi.IN_HEADER.pack(length, opcode, unique, node, uid, 100, tid, len(extra) // 8, 0)
    return head + content
