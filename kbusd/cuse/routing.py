# cython: boundscheck=False
# ruff: noqa: F821  (names without a definition here come from routing.pxd)
"""Whose request is this? For the privileged process, which must not read what a client wrote.

Looks at the fixed header of a FUSE request (linux/fuse.h: fuse_in_header) and at one number behind it,
both written by the kernel. The handle is the one that the server chose when it answered OPEN.
"""

import cython
from cython.cimports.libc.stdint import uint8_t, uint64_t
from cython.cimports.libc.string import memcpy

HEADER_SIZE = 40
INTERRUPT = 36
_INTERRUPT = cython.declare(cython.uint, INTERRUPT)
# READ, WRITE, RELEASE, FLUSH, READDIR, RELEASEDIR, IOCTL and POLL begin with the handle.
_WITH_HANDLE = cython.declare(
    uint64_t, 1 << 15 | 1 << 16 | 1 << 18 | 1 << 25 | 1 << 28 | 1 << 29 | 1 << 39 | 1 << 40
)


@cython.cfunc
@cython.exceptval(-1, check=False)
def find(
    request: cython.pointer(cython.const[uint8_t]),
    size: cython.size_t,
    found: cython.pointer(Route),
) -> cython.int:
    """Copies the header, and the number behind it. Raises ValueError for what no kernel sends."""
    if size < cython.sizeof(InHeader):
        raise ValueError(f"a request of {size} bytes")
    memcpy(cython.address(found.head), request, cython.sizeof(InHeader))
    if found.head.length != size:
        raise ValueError(f"a request of {size} bytes says that it has {found.head.length}")
    opcode: cython.uint = found.head.opcode
    found.number = 0
    if opcode == _INTERRUPT or (opcode < 64 and _WITH_HANDLE >> opcode & 1):
        if size < cython.sizeof(InHeader) + cython.sizeof(uint64_t):
            raise ValueError(f"request {opcode} of {size} bytes lacks its handle")
        memcpy(
            cython.address(found.number), request + cython.sizeof(InHeader), cython.sizeof(uint64_t)
        )
    return 0


def route(request):
    """The opcode, the request's number, its node, and its file handle (0 if it has none).

    For INTERRUPT the last is the number of the request that is to be interrupted. Raises ValueError
    for what no kernel sends.
    """
    found: Route
    data: bytes = bytes(request)
    text: cython.p_uchar = data
    find(text, len(data), cython.address(found))
    return found.head.opcode, found.head.unique, found.head.node, found.number
