"""Whose request is this? For the privileged process, which must not read what a client wrote.

Looks at the fixed header of a FUSE request (linux/fuse.h: fuse_in_header) and at one number behind it,
both written by the kernel. The handle is the one that the server chose when it answered OPEN.
"""

from __future__ import annotations

from struct import Struct

HEADER_SIZE = 40
_HEADER = Struct("=IIQQ")  # length, opcode, unique, node; then uid, gid, pid, ...
_NUMBER = Struct("=Q")

INTERRUPT = 36
# READ, WRITE, RELEASE, FLUSH, READDIR, RELEASEDIR, IOCTL and POLL begin with the handle.
_WITH_HANDLE = frozenset({15, 16, 18, 25, 28, 29, 39, 40})


def route(request: bytes | memoryview) -> tuple[int, int, int, int]:
    """The opcode, the request's number, its node, and its file handle (0 if it has none).

    For INTERRUPT the last is the number of the request that is to be interrupted. Raises ValueError
    for what no kernel sends.
    """
    if len(request) < HEADER_SIZE:
        raise ValueError(f"a request of {len(request)} bytes")
    length, opcode, unique, node = _HEADER.unpack_from(request)
    if length != len(request):
        raise ValueError(f"a request of {len(request)} bytes says that it has {length}")
    if opcode not in _WITH_HANDLE and opcode != INTERRUPT:
        return opcode, unique, node, 0
    if length < HEADER_SIZE + _NUMBER.size:
        raise ValueError(f"request {opcode} of {length} bytes lacks its handle")
    return opcode, unique, node, _NUMBER.unpack_from(request, HEADER_SIZE)[0]
