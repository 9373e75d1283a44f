# ruff: noqa: F821  (names without a definition here come from the .pxd)
"""What a worker tells beforehand: how the next requests of its client are to be answered, byte for byte.

A *promise* is steps, one after the other: a request as it will be, and its answer. The worker of a file of kdbus
offers one when a message has come (RECV of it, then FREE); the supervisor compares a request with the next
step without knowing what it means, and answers it at once if they are the same (supervisor/relay.py). The worker learns
of it when it does something the next time: before anything else it recalls the promise, and then does
what was answered meanwhile (workers/kdbus_requests.py).

One page, which both may write. The first word says how many steps were kept, whether more may be, and which
offer it is; both change it by compare-and-swap only, so that a step is kept or was recalled, never both. The
worker writes the steps, while they are recalled. Either may be hostile to the other, or dead: the supervisor copies a
step and then looks at the word again; what it has copied is bounded and goes to this worker's own client only, who gets
from it what it says anyhow. The page is made by the supervisor and sealed, so that nobody can shrink it.

    word: bits 0 to 7 steps kept, bit 8 recalled, from bit 16 on the number of the offer
"""

from __future__ import annotations

import os

import cython
from cython.cimports.kbusd.rings.atomics import (
    copy_words,
    exchange_if,
    load_acquire,
    store_release,
)
from cython.cimports.kbusd.rings.libc import F_SEAL_GROW, F_SEAL_SHRINK
from cython.cimports.kbusd.rings.memfd import PAGE, add_seals, map_whole, sealed_size, unmap_whole
from cython.cimports.libc.stdint import int64_t, uint32_t, uint64_t
from cython.cimports.libc.string import memcmp, memcpy, memset

from kbusd.rings import memfd
from kbusd.rings.memfd import RingError

KEPT = cython.declare(uint64_t, 0xFF)
RECALLED = cython.declare(uint64_t, 0x100)
OFFER = cython.declare(uint64_t, 0x10000)
STEPS_AT = cython.declare(cython.int, 64)
# With one answer, and where: no worker can map a larger pool.
MAX_RANGE = cython.declare(uint64_t, 16 << 30)
SEALS = cython.declare(cython.int, F_SEAL_SHRINK | F_SEAL_GROW)


def make() -> int:
    """A page for promises, for both sides to map. Raises OSError."""
    fd: cython.int = memfd.make("kbusd-promises", PAGE)
    # Else a step could be found, and kept, while the first offer is being written.
    recalled: uint64_t = RECALLED
    os.pwrite(fd, recalled.to_bytes(8, "little"), 0)
    code: cython.int = add_seals(fd, SEALS)
    if code < 0:
        os.close(fd)
        raise OSError(-code, f"sealing a memfd: {os.strerror(-code)}")
    return fd


@cython.cclass
class Promises:
    """The page, mapped; the descriptor stays the caller's. Raises RingError."""

    def __init__(self, fd: cython.int):
        if sealed_size(fd, SEALS) < cython.cast(int64_t, PAGE):
            raise RingError("a page of promises that is not sealed, or too small")
        self.page = map_whole(fd, PAGE, True)
        if self.page == cython.NULL:
            raise RingError("a page of promises could not be mapped")
        self.word = cython.cast(cython.pointer(uint64_t), self.page)
        self.steps = cython.cast(cython.pointer(Step), self.page + STEPS_AT)

    def __dealloc__(self):
        unmap_whole(self.page, PAGE)

    # -- the worker's ------------------------------------------------------------------------------

    def offer(self, steps: tuple) -> None:
        """Promise this: (command, request, reply, offset, size) each. There is none, or it was recalled."""
        at: cython.pointer(Step) = self.steps
        command: uint32_t
        offset: uint64_t
        size: uint64_t
        request: bytes
        reply: bytes
        if not 0 < len(steps) <= STEPS:
            raise ValueError(f"a promise of {len(steps)} steps")
        memset(at, 0, STEPS * cython.sizeof(Step))
        for command, request, reply, offset, size in steps:
            if len(request) > MAX_REQUEST or len(reply) > MAX_REPLY:
                raise ValueError("a step that is too long")
            at.command = command
            at.asked = len(request)
            at.length = len(reply)
            at.offset = offset
            at.size = size
            memcpy(at.request, cython.cast(cython.p_char, request), len(request))
            memcpy(at.reply, cython.cast(cython.p_char, reply), len(reply))
            at += 1
        self.offered = True
        # Pairs with `find`: who sees this offer sees its steps.
        store_release(self.word, (load_acquire(self.word) & ~(KEPT | RECALLED)) + OFFER)

    def recall(self) -> int:
        """From here on no more steps are kept. Returns how many were."""
        seen: uint64_t = load_acquire(self.word)
        self.offered = False
        # Pairs with `keep`: one of both comes first.
        while not exchange_if(self.word, seen, seen | RECALLED):
            seen = load_acquire(self.word)
        return min(seen & KEPT, cython.cast(uint64_t, STEPS))

    def settle(self) -> None:
        """What was kept is done, and can be seen: `begun` says so no more."""
        # Pairs with `begun`: what poll(2) is told was written before.
        store_release(self.word, load_acquire(self.word) & ~KEPT)

    # -- the supervisor's --------------------------------------------------------------------------

    def find(self, command, request, size, step) -> cython.bint:
        """Whether that is the next request of a promise: its step, and the word as `keep` needs it."""
        word: uint64_t = load_acquire(self.word)
        at: uint64_t = word & KEPT
        if word & RECALLED or at >= STEPS or self.steps[at].command != command:
            return False
        # A worker that writes meanwhile has recalled it before: then `keep` fails.
        copy_words(step, cython.address(self.steps[at]), cython.sizeof(Step) // 8)
        step.word = word
        return (
            step.command == command
            and 0 < size == step.asked
            and step.asked <= MAX_REQUEST
            and step.length <= MAX_REPLY
            and step.offset <= MAX_RANGE
            and step.size <= MAX_RANGE
            and memcmp(step.request, request, size) == 0
        )

    def keep(self, seen) -> cython.bint:
        """Whether the step that was found is kept: then it is to be answered so."""
        return exchange_if(self.word, seen, seen + 1)

    def begun(self) -> cython.bint:
        """Whether something was kept that the worker has not done yet."""
        return load_acquire(self.word) & KEPT != 0
