"""A worker's line, and what is closed by threads."""

from __future__ import annotations

import os
import select
import socket
import time
from queue import SimpleQueue
from typing import Any

import pytest

from kbusd.broker import guarded
from kbusd.broker.guarded import THREADS, Closers, Guarded
from kbusd.rings import entries as e
from kbusd.rings.line import Line, LineError, close_all, pair
from kbusd.rings.unread import ready
from tests.bus.lingering import lingering
from tests.unit.descriptors import descriptors

SECONDS = 10.0


@pytest.fixture(scope="module")
def closers() -> Closers:
    closers = Closers(str, print)
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


def test_nothing_said_that_all_threads_that_close_were_held_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(guarded, "HELD_UP_SECONDS", 0.1)
    said: SimpleQueue[str] = SimpleQueue()
    closers = Closers("the client of {}".format, said.put)
    closers.start()
    others = []
    for worker in range(THREADS):
        slow, other = lingering()
        closers.close(worker, [slow.detach()])
        others.append(other)
    readers = []

    def close_more() -> None:
        reader, writer = os.pipe()
        readers.append(reader)
        closers.close(100 + len(readers), [writer])

    close_more()
    deadline = time.monotonic() + SECONDS
    while said.empty():
        assert time.monotonic() < deadline, "the admin is not told"
        ready(readers[0], select.POLLHUP, 0.01)  # it is not closed
        close_more()
    text = said.get()
    assert [f"the client of {n}" in text for n in range(THREADS)] == [True] * THREADS, text
    close_more()
    assert said.empty(), "said again of each"
    others.pop(3).close()
    assert said.get(timeout=SECONDS).endswith("the client of 3 let a thread go")
    assert all(map(hangs_up, readers))
    for other in others:
        other.close()
    assert said.empty()
    close_all(readers)


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
    before = len(descriptors())
    received = line.receive()
    assert received is not None and received[0] == e.Introduce(1, 2, 3, 4)
    assert len(descriptors()) == before + 3
    line.release(received[1])
    assert len(descriptors()) == before
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
