"""The zygote's loop, with workers that are none: which it forks when, and with a rehearsal or without.

It runs in a process of its own, the test plays the supervisor.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import pytest

from kbusd.rings import entries
from kbusd.rings.line import Line, pair
from kbusd.workers import worker, zygote
from tests.unit.workers.test_rehearsal import context

SECONDS = 20


class Stage:
    """A zygote whose workers say whether they rehearsed, and end with their line to the supervisor."""

    def __init__(self, directory: Path, quiet: float) -> None:
        made = context(directory)
        sock, ours = pair()
        self.said, says = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.said.settimeout(SECONDS)

        def main(
            _: object, supervisor: socket.socket, __: object, locked: int, rehearse: bool = False
        ) -> NoReturn:
            signal.alarm(2 * SECONDS)
            says.send(b"rehearsed" if rehearse else b"in a hurry")
            os.write(locked, b"1")
            own = supervisor.fileno()
            os.closerange(3, own)  # as a worker's lock-down does
            os.closerange(own + 1, 1024)
            supervisor.setblocking(True)
            supervisor.recv(1)
            os._exit(0)

        self.pid = os.fork()
        if self.pid == 0:
            try:
                signal.alarm(2 * SECONDS)
                sock.close()
                self.said.close()
                worker.main = main
                zygote.QUIET_SECONDS = quiet
                zygote.Zygote(made, made.profile, Line(ours, entries.ToZygote)).run()
            finally:
                os._exit(0)  # by EOFError, when the supervisor is gone
        ours.close()
        says.close()
        self.line = Line(sock, entries.FromZygote)
        sock.settimeout(SECONDS)
        self.workers: list[socket.socket] = []
        self.pidfds: list[int] = []

    def want(self, *numbers: int, hurry: bool = False) -> None:
        for number in numbers:
            self.line.send(entries.Fork(number, hurry))

    def forked(self) -> int:
        """The number of the next worker that is ready."""
        received = self.line.receive()
        assert received is not None
        message, fds = received
        assert isinstance(message, entries.Forked)
        self.workers.append(socket.socket(fileno=fds[0]))
        os.close(fds[1])
        self.pidfds.append(fds[2])
        return message.worker

    def close(self) -> None:
        for sock in self.workers:
            sock.close()
        self.line.close()
        os.waitpid(self.pid, 0)
        self.said.close()
        for pidfd in self.pidfds:
            ended = select.poll()
            ended.register(pidfd, select.POLLIN)
            assert ended.poll(SECONDS * 1000), "a worker is left"
            os.close(pidfd)


Start = Callable[[float], Stage]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    stages: list[Stage] = []

    def one(quiet: float) -> Stage:
        stages.append(Stage(tmp_path, quiet))
        return stages[-1]

    yield one
    for stage in stages:
        stage.close()


def test_workers_rehearse_if_there_is_time(start: Start) -> None:
    stage = start(0.01)
    stage.want(1, 2)
    assert {stage.forked(), stage.forked()} == {1, 2}
    assert [stage.said.recv(99), stage.said.recv(99)] == [b"rehearsed"] * 2


def test_forking_waits_till_nobody_wants_anything(start: Start) -> None:
    stage = start(0.2)
    asked = time.monotonic()
    stage.want(1)
    assert stage.forked() == 1
    assert time.monotonic() - asked >= 0.2


def test_in_a_hurry_all_are_forked_at_once_and_none_rehearses(start: Start) -> None:
    stage = start(SECONDS + 5)  # or no worker would come in time
    stage.want(1, 2)
    stage.want(3, hurry=True)
    assert {stage.forked(), stage.forked(), stage.forked()} == {1, 2, 3}
    assert [stage.said.recv(99) for _ in range(3)] == [b"in a hurry"] * 3


def test_the_hurry_is_over_with_the_workers_that_it_was_for(start: Start) -> None:
    stage = start(0.01)
    stage.want(1, hurry=True)
    assert stage.forked() == 1
    stage.want(2)
    assert stage.forked() == 2
    assert [stage.said.recv(99), stage.said.recv(99)] == [b"in a hurry", b"rehearsed"]


def test_the_supervisor_hears_of_a_worker_that_ends(start: Start) -> None:
    stage = start(0.01)
    stage.want(7)
    stage.forked()
    stage.workers.pop().close()
    assert stage.line.receive() == (entries.Ended(7, 0), [])


def test_a_worker_that_is_ready_when_nobody_asks_any_more_says_nothing_of_it() -> None:
    """A traceback at the end of a bus."""
    asks, locked = os.pipe()
    os.close(asks)
    worker.say_locked(locked)
    with pytest.raises(OSError):
        os.fstat(locked)


FILLED = """
from kbusd.workers import zygote
zygote._fill_holes()
print(all(id(bytes(size - 33)) % 16384 < 4096 for size in range(64, 513, 16)))
"""


def test_what_a_worker_makes_first_of_each_size_lies_beside_the_head_of_its_pool() -> None:
    words = [sys.executable, "-c", FILLED]
    assert subprocess.run(words, capture_output=True, text=True, check=True).stdout == "True\n"
