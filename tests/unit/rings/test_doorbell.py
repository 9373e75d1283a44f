"""Doorbells, and letting go of what is shared with somebody hostile."""

from __future__ import annotations

import array
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest

from kbusd.rings.doorbell import heard, part, ring
from tests.bus.lingering import lingering

SECONDS = 10


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Ours and theirs, as the broker makes them."""
    ours, theirs = socket.socketpair()
    for end in (ours, theirs):
        end.setblocking(False)
        end.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
    with ours, theirs:
        yield ours, theirs


Pair = tuple[socket.socket, socket.socket]


def rings(bell: socket.socket) -> bool:
    return bool(select.select([bell], [], [], 0)[0])


def within(does: Callable[[], object]) -> object:
    """What that returns, if it does not take for ever."""
    found: list[object] = []
    thread = threading.Thread(target=lambda: found.append(does()), daemon=True)
    thread.start()
    thread.join(SECONDS)
    assert found, "it hangs"
    return found[0]


def test_a_doorbell_wakes_and_is_quiet_again(pair: Pair) -> None:
    for bell, other in (pair, pair[::-1]):
        assert not rings(bell)
        ring(other.fileno())
        ring(other.fileno())
        assert rings(bell)
        assert heard(bell.fileno())
        assert not rings(bell) and not rings(other)
        assert heard(bell.fileno())  # for nothing


def test_a_flooded_doorbell_still_rings_and_blocks_nobody(pair: Pair) -> None:
    ours, theirs = pair
    with suppress(BlockingIOError):
        while True:
            theirs.send(bytes(4096))
    before = time.monotonic()
    for _ in range(10_000):
        ring(theirs.fileno())
    assert time.monotonic() - before < SECONDS
    assert rings(ours)
    while rings(ours):
        assert heard(ours.fileno())
    ring(theirs.fileno())
    assert rings(ours)


def test_who_is_gone_is_noticed_once_all_that_he_rang_was_heard(pair: Pair) -> None:
    ours, theirs = pair
    ring(theirs.fileno())
    theirs.close()
    assert heard(ours.fileno())
    assert not heard(ours.fileno())
    ring(ours.fileno())  # no signal, no error


def send_along(theirs: socket.socket, what: socket.socket, flags: int = 0) -> None:
    """Nobody has it then but who gets it."""
    passed = array.array("i", [what.fileno()])
    theirs.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, passed)], flags)
    what.detach()
    os.close(passed[0])


@pytest.mark.parametrize("flags", [0, socket.MSG_OOB])
def test_what_came_with_a_bell_and_takes_a_day_to_be_closed_was_closed(
    pair: Pair, flags: int
) -> None:
    ours, theirs = pair
    slow, other = lingering()
    ring(theirs.fileno())
    try:
        send_along(theirs, slow, flags)
    except OSError:
        pytest.skip("Linux before 5.15 has nothing out of band here")

    def hear() -> object:
        with pytest.raises(ValueError, match="descriptors"):
            while heard(ours.fileno()):
                pass
        return "heard"

    assert within(hear) == "heard"
    assert rings(ours), "it stays where it is"
    assert within(lambda: part(os.dup(ours.fileno()))) is False
    other.close()  # nobody has to wait for it any more


@pytest.mark.parametrize("flags", [0, socket.MSG_OOB])
def test_what_was_left_unread_and_takes_a_day_to_be_closed_stays_open(
    pair: Pair, flags: int
) -> None:
    ours, theirs = pair
    slow, other = lingering()
    theirs.send(bytes(100_000))
    try:
        send_along(theirs, slow, flags)
    except OSError:
        pytest.skip("Linux before 5.15 has nothing out of band here")
    fd = ours.detach()
    assert within(lambda: part(fd)) is False
    with pytest.raises(BrokenPipeError):
        theirs.send(b"more")
    other.close()
    os.close(fd)


def test_bytes_that_were_left_unread_keep_nothing_open(pair: Pair) -> None:
    ours, theirs = pair
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    with suppress(BlockingIOError):
        while True:
            ours.send(bytes(65536))
    fd = theirs.detach()
    assert part(fd) is True
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    with pytest.raises(BrokenPipeError):
        ours.send(b"x")


def test_what_is_no_socket_is_just_closed() -> None:
    fd = os.memfd_create("test")
    assert part(fd) is True
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
