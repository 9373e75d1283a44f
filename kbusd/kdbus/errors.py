"""How a kdbus command is refused, and what is written back into the caller's memory.

The errno is the one that the kernel gave (ipc/kdbus/*.c of 2015, kdbus(7) and friends); where two
states of that code differ, the later one counts. The sentence is for the log: a client sees the
number only.
"""

from __future__ import annotations

import os

import msgspec


class Poke(msgspec.Struct, frozen=True):
    """`data` goes into the caller's memory, `offset` bytes after the address of the struct."""

    offset: int
    data: bytes


class Errno(Exception):
    """A command fails with `errno`; `text` says which part of it is to blame.

    `pokes` are written back although it fails, as the kernel did with return_flags.
    """

    def __init__(self, errno: int, text: str, pokes: tuple[Poke, ...] = ()) -> None:
        super().__init__(errno, text)
        self.errno = errno
        self.text = text
        self.pokes = pokes

    def __str__(self) -> str:
        return f"{self.text} ({os.strerror(self.errno)})"
