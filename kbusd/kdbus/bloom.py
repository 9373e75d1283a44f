"""Bloom filters as the bus sees them: bits of a size that the bus fixes, compared and not computed.

kdbus.match(7), ipc/kdbus/match.c. A signal carries a filter with the properties that it has, a match
rule a mask with those that it asks for; each of the mask's bits must be set in the filter. Filters
have a generation, so that more properties could be added later: a mask may hold one block of bits
for each generation, and the last one serves all that are newer. How properties become bits is the
clients' own matter.
"""

from __future__ import annotations

import errno

import msgspec

from kbusd.kdbus import abi, layout
from kbusd.kdbus.errors import Errno


class Parameter(msgspec.Struct, frozen=True):
    """Of a bus: bytes of a filter, and how many bits its clients set for a property."""

    size: int
    n_hash: int


class Filter(msgspec.Struct, frozen=True):
    """What a signal has: `bits` has the bus's size."""

    generation: int
    bits: bytes


class Mask(msgspec.Struct, frozen=True):
    """What a match rule asks for: one block of bits for each generation, the oldest first."""

    blocks: tuple[bytes, ...]

    def matches(self, filter: Filter) -> bool:
        """Whether the filter has all the bits that the mask of its generation has."""
        wanted = int.from_bytes(self.blocks[min(filter.generation, len(self.blocks) - 1)])
        return wanted & ~int.from_bytes(filter.bits) == 0


def parse_parameter(data: bytes) -> Parameter:
    """What a new bus is to use. Raises Errno EINVAL if no bus can (bus.c, kdbus_bus_new)."""
    size, n_hash = layout.BLOOM_PARAMETER.unpack(data)
    if not 8 <= size <= abi.MAX_BLOOM_SIZE or size % 8:
        raise Errno(
            errno.EINVAL, f"bloom filters of {size} bytes: not 8 to {abi.MAX_BLOOM_SIZE} by eights"
        )
    if n_hash < 1:
        raise Errno(errno.EINVAL, "bloom filters with no hash function")
    return Parameter(size, n_hash)


def parse_filter(data: bytes, size: int) -> Filter:
    """A signal's filter, on a bus with filters of `size` bytes.

    Raises Errno: EFAULT if its size is no multiple of 8, EDOM if it is another (message.c).
    """
    (generation,) = layout.U64.unpack_from(data)
    bits = data[layout.U64.size :]
    if len(bits) % 8:
        raise Errno(errno.EFAULT, f"a bloom filter of {len(bits)} bytes is no multiple of 8")
    if len(bits) != size:
        raise Errno(errno.EDOM, f"a bloom filter of {len(bits)} bytes on a bus that has {size}")
    return Filter(generation, bits)


def parse_mask(data: bytes, size: int) -> Mask:
    """A match rule's mask; raises Errno EDOM unless it is one or more blocks of `size` bytes."""
    if len(data) < size or len(data) % size:
        raise Errno(errno.EDOM, f"a bloom mask of {len(data)} bytes is no multiple of {size}")
    return Mask(tuple(data[at : at + size] for at in range(0, len(data), size)))
