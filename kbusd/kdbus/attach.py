"""Commands that are ours and not of 2015: a socket for what no ioctl can bring to a client.

    struct kbus_cmd_attach { __u64 size, flags, return_flags, fd; }      _IOW(0x95, 0xf0, ...)
    struct kbus_cmd_installed { __u64 size, flags, return_flags, offset, count, numbers; }
                                                                         _IOW(0x95, 0xf1, ...)

`fd`: one end of a SOCK_SEQPACKET socketpair of the client's, who keeps the other. Over it come records of
integers in the machine's byte order, with descriptors:

    1, size of the pool             + the memfd that is the pool, if return_flags has POOL
    2, offset of a slice, how many  + the descriptors of the message in this slice: those of its memfds,
                                      then those of its FDS item

The first comes before HELLO returns, or ATTACH if that is later, and again if HELLO failed and is asked
again; the second before the RECV or SEND does that shows the slice. A client attaches once.

The numbers in the message are -1 until INSTALLED says what they are: `numbers` is the address of `count`
__s32, in the same order. ENXIO: nothing of the kind was handed over for this slice, or it was freed.
Descriptors that the socket did not take (it is full, or closed) are gone, as RETURN_INCOMPLETE_FDS says.
"""

from __future__ import annotations

from struct import Struct

import msgspec

from kbusd.kdbus import layout
from kbusd.kdbus.commands import Decoded, Spec, parse
from kbusd.kdbus.errors import Poke

_LAYOUT = Struct("=4Q")
COMMAND = 1 << 30 | _LAYOUT.size << 16 | 0x95 << 8 | 0xF0
SPEC = Spec("ATTACH", _LAYOUT)
POOL = 1
"""In return_flags: the pool comes over the socket. Of a CUSE node it is to be had in no other way."""

INSTALLED = 1 << 30 | 48 << 16 | 0x95 << 8 | 0xF1
INSTALLED_SPEC = Spec("INSTALLED", Struct("=6Q"))
MAX_FDS = 253
"""Descriptors in one record, as the kernel has it (SCM_MAX_FD)."""

_POOL_RECORD, FDS = 1, 2


def decode(data: bytes) -> Decoded[int]:
    """The descriptor's number, as the client says. Raises Errno."""
    parsed = parse(SPEC, data)
    return Decoded(None if parsed.negotiated else parsed.fixed[3], parsed.pokes)


def return_flags(flags: int) -> Poke:
    """What is written back."""
    return Poke(16, layout.U64.pack(flags))


def pool_record(size: int) -> bytes:
    """With one descriptor."""
    return layout.VECTOR.pack(_POOL_RECORD, size)


def fds_record(offset: int, count: int) -> bytes:
    """With so many descriptors."""
    return Struct("=3Q").pack(FDS, offset, count)


class Numbers(msgspec.Struct, frozen=True):
    """What INSTALLED says: `count` numbers are at `address`, for the message at `offset`."""

    offset: int
    count: int
    address: int


def decode_installed(data: bytes) -> Decoded[Numbers]:
    """Raises Errno."""
    parsed = parse(INSTALLED_SPEC, data)
    return Decoded(None if parsed.negotiated else Numbers(*parsed.fixed[3:]), parsed.pokes)
