"""KBUS_CMD_ATTACH, which is ours and not of 2015: a socket for what no ioctl can bring to a client.

    struct kbus_cmd_attach { __u64 size, flags, return_flags, fd; }      _IOW(0x95, 0xf0, ...)

`fd`: one end of a SOCK_SEQPACKET socketpair of the client's, who keeps the other. Over it come records of
integers in the machine's byte order, with descriptors:

    1, size of the pool             + the memfd that is the pool, if return_flags has POOL
    2, offset of a slice, how many  + the descriptors of the message in this slice

The first comes before HELLO returns, or ATTACH if that is later, and again if HELLO failed and is asked
again; the second before the RECV or SEND does that shows the slice. A client attaches once.
"""

from __future__ import annotations

from struct import Struct

from kbusd.kdbus import layout
from kbusd.kdbus.commands import Decoded, Spec, parse
from kbusd.kdbus.errors import Poke

_LAYOUT = Struct("=4Q")
COMMAND = 1 << 30 | _LAYOUT.size << 16 | 0x95 << 8 | 0xF0
SPEC = Spec("ATTACH", _LAYOUT)
POOL = 1
"""In return_flags: mmap(2) is not to be had, the pool comes over the socket."""

_POOL_RECORD = 1


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
