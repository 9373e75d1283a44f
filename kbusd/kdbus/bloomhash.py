"""How sd-bus turned a property of a message into bits of a bloom filter, at the speed of C.

SipHash-2-4 (Aumasson and Bernstein, 2012) under fixed keys: systemd 221 to 230, PORTING-DBUS1 and
bus-bloom.c. A signal has tens of properties, and each costs two hashes, so plain Python would not do.
Reads exactly the bytes that it is given and allocates nothing.
"""

import cython
from cython.cimports.libc.stdint import uint8_t, uint64_t

KEYS = cython.declare(uint64_t[16])  # each key is two
MAX_BYTES = cython.declare(cython.int, 64)  # of hash, with eight keys
# "somepseudorandomlygeneratedbytes"
START0 = cython.declare(uint64_t, 0x736F6D6570736575)
START1 = cython.declare(uint64_t, 0x646F72616E646F6D)
START2 = cython.declare(uint64_t, 0x6C7967656E657261)
START3 = cython.declare(uint64_t, 0x7465646279746573)

_KEYS = bytes.fromhex(
    "b9660bf0467047c18875c49c54b9bd15"
    "aaa154a2e0714b39bfe1dd2e9fc54a3b"
    "63fdaebecd824812a16e4126cbfaa0c8"
    "23be452932d2462d82035228fe3717f5"
    "563bbfee5a4f4339afaa9408dff0fc10"
    "3180c873c7ea46d3aa25750f9e4c0929"
    "7df7184b7ba444d5853c06e06553966d"
    "f277e96f93b54e719a0c34883925bf35"
)
for _i in range(16):
    KEYS[_i] = int.from_bytes(_KEYS[8 * _i : 8 * _i + 8], "little")


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
@cython.inline
def _rotated(value: uint64_t, by: cython.int) -> uint64_t:
    return (value << by) | (value >> (64 - by))


def _word(data, size):
    """`size` bytes, 8 at most, as a little-endian number."""
    word: uint64_t = 0
    i: cython.size_t
    for i in range(size):
        word |= cython.cast(uint64_t, data[i]) << (8 * i)
    return word


def siphash(data, size, key0, key1):
    """SipHash-2-4 of `size` bytes at `data`."""
    v0: uint64_t = key0 ^ START0
    v1: uint64_t = key1 ^ START1
    v2: uint64_t = key0 ^ START2
    v3: uint64_t = key1 ^ START3
    word: uint64_t = 0
    at: cython.size_t = 0
    blocks: cython.size_t = size // 8
    i: cython.size_t
    rounds: cython.int
    # After the whole blocks one with the rest and the size, then the end.
    for i in range(blocks + 2):
        rounds = 2
        if i < blocks:
            word = _word(data + at, 8)
            at += 8
        elif i == blocks:
            word = _word(data + at, size - at) | (cython.cast(uint64_t, size) << 56)
        else:
            word = 0
            v2 ^= 0xFF
            rounds = 4
        v3 ^= word
        while rounds:
            v0 += v1
            v2 += v3
            v1 = _rotated(v1, 13) ^ v0
            v3 = _rotated(v3, 16) ^ v2
            v0 = _rotated(v0, 32)
            v2 += v1
            v0 += v3
            v1 = _rotated(v1, 17) ^ v2
            v3 = _rotated(v3, 21) ^ v0
            v2 = _rotated(v2, 32)
            rounds -= 1
        v0 ^= word
    return v0 ^ v1 ^ v2 ^ v3


def _width(size):
    """How many bytes of hash make the number of a bit in a filter of `size` bytes; 0 if it is empty."""
    bits: uint64_t = 8 * cython.cast(uint64_t, size)
    width: cython.int = 0
    while bits >> width > 1:
        width += 1
    return (width + 7) // 8


def usable(size: int, n_hash: int) -> bool:
    """Whether the keys suffice for `n_hash` bits a property in filters of `size` bytes."""
    width: cython.int = _width(size)
    return width > 0 and 0 < n_hash * width <= MAX_BYTES


def siphash24(key: bytes, data: bytes) -> int:
    """`siphash` for Python: `key` is 16 bytes."""
    if len(key) != 16:
        raise ValueError("a key of SipHash is 16 bytes")
    return siphash(
        data, len(data), int.from_bytes(key[:8], "little"), int.from_bytes(key[8:], "little")
    )


def add(filter: bytearray, n_hash: int, data: bytes) -> None:
    """Set the `n_hash` bits of the property `data`.

    Each bit's number takes as many bytes of the hash as the size of the filter demands; where one
    hash is used up, the next key makes another. Raises ValueError if eight of them do not suffice.
    """
    bits: uint64_t = 8 * cython.cast(uint64_t, len(filter))
    out: cython.pointer(uint8_t) = filter
    text: cython.pointer(cython.const[uint8_t]) = data
    size: cython.size_t = len(data)
    width: cython.int = _width(len(filter))
    number: uint64_t
    hashed: uint64_t = 0
    left: cython.int = 0
    key: cython.int = 0
    _bit: cython.int
    _byte: cython.int
    if not usable(len(filter), n_hash):
        raise ValueError(f"bloom filters of {len(filter)} bytes with {n_hash} hash functions")
    for _bit in range(cython.cast(cython.int, n_hash)):
        number = 0
        for _byte in range(width):
            if left == 0:
                hashed = siphash(text, size, KEYS[key], KEYS[key + 1])
                key += 2
                left = 8
            number = (number << 8) | ((hashed >> (8 * (8 - left))) & 0xFF)
            left -= 1
        number &= bits - 1
        out[number >> 3] |= cython.cast(uint8_t, 1 << (number & 7))
