"""Classic BPF as the kernel runs seccomp filters (linux/filter.h, seccomp(2)), to see what one says."""

from __future__ import annotations

import struct
from collections.abc import Sequence

_DATA = struct.Struct("<iIQ6Q")
_INSTRUCTION = struct.Struct("<HBBI")
KILL = 0x80000000
ALLOW = 0x7FFF0000
ERRNO = 0x00050000


def run(program: bytes, arch: int, number: int, arguments: Sequence[int]) -> int:
    """What the filter returns for this call; raises ValueError for an instruction it can't have."""
    return follow(program, arch, number, arguments)[0]


def follow(program: bytes, arch: int, number: int, arguments: Sequence[int]) -> tuple[int, int]:
    """And after how many instructions."""
    data = _DATA.pack(number, arch, 0, *arguments)
    at = a = x = steps = 0
    memory = [0] * 16
    while True:
        code, yes, no, k = _INSTRUCTION.unpack_from(program, at * 8)
        at += 1
        steps += 1
        match code:
            case 0x20:  # ld [k]
                (a,) = struct.unpack_from("<I", data, k)
            case 0x00:  # ld #k
                a = k
            case 0x01:  # ldx #k
                x = k
            case 0x60:  # ld M[k]
                a = memory[k]
            case 0x02:  # st M[k]
                memory[k] = a
            case 0x07:  # tax
                x = a
            case 0x87:  # txa
                a = x
            case 0x54:  # and #k
                a &= k
            case 0x05:  # ja
                at += k
            case 0x15:  # jeq
                at += yes if a == k else no
            case 0x25:  # jgt
                at += yes if a > k else no
            case 0x35:  # jge
                at += yes if a >= k else no
            case 0x45:  # jset
                at += yes if a & k else no
            case 0x06:  # ret #k
                return int(k), steps
            case _:
                raise ValueError(f"instruction {code:#x} at {at - 1}")
