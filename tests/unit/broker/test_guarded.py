"""A worker's line, and what is closed by threads."""

from __future__ import annotations

import os
import select
import socket
from typing import Any

import pytest

from kbusd.broker.guarded import THREADS, Closers, Guarded
from kbusd.rings import entries as e
from kbusd.rings.line import Line, LineError, close_all, pair
from kbusd.rings.unread import ready
from tests.bus.lingering import lingering

SECONDS = 10.0


@pytest.fixture(scope="module")
def closers() -> Closers:
    closers = Closers()
    closers.start()
    return closers


def hangs_up(fd: int) -> bool:
    return ready(fd, select.POLLHUP, SECONDS)


def test_one_worker_held_up_all_threads_that_close(closers: Closers) -> None:
    others = []
    for _ in range(THREADS + 1):
        slow, other = lingering()
        closers.close(1, [slow.detach()])
        others.append(other)
    reader, writer = os.pipe()
    closers.close(2, [writer])
    assert hangs_up(reader), "nobody closes what is another's fault"
    os.close(reader)
    reader, writer = os.pipe()
    closers.close(1, [writer])
    for other in others:
        other.close()
    assert hangs_up(reader), "what waited for its turn is not closed"
    os.close(reader)


class Ending:
    """A socket whose other end ends just after the next record was looked at, and has left something unread."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.ended = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.sock, name)

    def recvmsg(self, *arguments: int) -> Any:
        if not self.ended:
            self.ended = True
            raise ConnectionResetError
        return self.sock.recvmsg(*arguments)


def test_descriptors_of_a_record_were_lost_when_its_worker_ended_meanwhile(
    closers: Closers,
) -> None:
    ours, theirs = pair()
    memory = [os.memfd_create("test") for _ in range(3)]
    Line(theirs, e.BrokerMessage).send(e.Introduce(1, 2, 3, 4), memory)
    sock: Any = Ending(ours)
    line = Guarded(sock, e.WorkerMessage, closers, 1)
    before = len(os.listdir("/proc/self/fd"))
    received = line.receive()
    assert received is not None and received[0] == e.Introduce(1, 2, 3, 4)
    assert len(os.listdir("/proc/self/fd")) == before + 3
    line.release(received[1])
    assert len(os.listdir("/proc/self/fd")) == before
    assert line.receive() is None
    close_all(memory)
    theirs.close()


@pytest.mark.parametrize("memory", [0, 2])
def test_what_is_no_memory_is_not_taken(closers: Closers, memory: int) -> None:
    """One such descriptor was let through, as a doorbell: it came to whoever the worker wanted."""
    ours, theirs = pair()
    reader, writer = os.pipe()
    made = [os.memfd_create("test") for _ in range(memory)]
    line = Guarded(ours, e.WorkerMessage, closers, 1)
    Line(theirs, e.BrokerMessage).send(e.Introduce(1, 2, 3, 4), [*made, writer])
    with pytest.raises(LineError, match="no memfd"):
        line.receive()
    line.close()
    theirs.close()
    close_all([writer, *made])
    assert hangs_up(reader)
    os.close(reader)
