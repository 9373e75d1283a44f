"""What children say to the supervisor, where it must not be its end."""

from __future__ import annotations

import errno
import os
import resource
import signal
import socket
import time
from itertools import count
from typing import Any

import msgspec
import pytest

from kbusd.main import spawn_reader
from kbusd.rings import entries, memfd
from kbusd.rings.line import Line
from kbusd.supervisor.journal import Journal
from kbusd.supervisor.made import Several
from kbusd.supervisor.supervisor import LAUNCHER, STOP_SECONDS, ZYGOTE, Supervisor, Worker
from tests.unit.descriptors import descriptors

SETTINGS = {"user": "", "limits": {}, "sockets": {"": ""}}


def supervisor(**sockets: str) -> Supervisor:
    configuration = msgspec.msgpack.encode(SETTINGS | {"sockets": {"": "", **sockets}})
    journal = Journal(to_stderr=False, to_syslog=False, relays=False)
    return Supervisor(configuration, [], journal, -1, lambda _: (0, 0))


def test_a_worker_is_to_be_killed_that_has_ended_and_was_reaped() -> None:
    """By the zygote, whose word of it may be on its way."""
    one = supervisor()
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    pidfd = os.pidfd_open(pid)
    os.waitpid(pid, 0)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        one.workers[3] = Worker(3, pid, pidfd, Line(ours, entries.ToSupervisor), False)
        for number in (3, 4):
            one.said(entries.Kill(number, "it is not needed"), [])
        one.workers[3].line.close()
    os.close(pidfd)


def test_a_worker_left_descriptors_in_its_line_that_nobody_reads() -> None:
    """To close them, when it had ended, could take the supervisor for ever."""
    one = supervisor()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    brokers, other = socket.socketpair()
    with theirs, other:
        one.forking[3] = one.pools[0]
        pidfd = os.pidfd_open(os.getpid())
        one.said(entries.Forked(3, 1 << 30), [ours.detach(), brokers.detach(), pidfd])
        with pytest.raises(BrokenPipeError):
            socket.send_fds(theirs, [b"x"], [other.fileno()])
        one.workers[3].line.close()
        os.close(pidfd)


def test_a_worker_that_knows_too_much_gets_no_client_and_its_end_is_no_failure() -> None:
    one = supervisor()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    busy, _ = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pool = one.pools[0]
    for number, end in ((3, ours), (4, busy)):
        pidfd = os.pidfd_open(os.getpid())
        one.workers[number] = Worker(number, 1, pidfd, Line(end, entries.ToSupervisor), pool)
    pool.spare.append(one.workers[3])
    with theirs, busy:
        for number in (3, 4, 5):  # a spare one, one with a client, one that has ended
            one.said(entries.Discard(number), [])
        assert not pool.spare
        assert theirs.recv(1) == b""
        assert busy.fileno() >= 0
    one.said(entries.Ended(3, 0), [])
    assert list(one.workers) == [4] and one.retry_at == 0
    os.close(one.workers[4].pidfd)


def test_a_zygote_was_killed_and_both_its_line_and_the_signal_say_so_in_one_turn() -> None:
    """Which ended the bus."""
    one = supervisor()
    one.signals, writer = os.pipe2(os.O_NONBLOCK)
    one.max_workers = 0
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.close()
    one.lines[ZYGOTE] = Line(ours, entries.FromZygote)
    pid = os.fork()
    if pid == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    one.children[pid] = ZYGOTE
    os.write(writer, bytes([signal.SIGCHLD]))
    one._turn(0)
    assert one.missing == {ZYGOTE} and not one.lines
    for fd in (one.signals, writer):
        os.close(fd)


@pytest.mark.parametrize("code", [0, -9])
def test_a_launcher_whose_line_was_lost_ended_the_bus(code: int) -> None:
    one = supervisor()
    one.children[1 << 30] = LAUNCHER
    one.ended(1 << 30, code)
    assert one.missing == {LAUNCHER} and one.retry_at and one.exit_status is None


def test_a_client_can_not_be_handed_over(capfd: pytest.CaptureFixture[str]) -> None:
    """As when too many descriptors are under way (ETOOMANYREFS): nobody learnt who it was, and it waited."""
    one = supervisor()
    one.journal.to_stderr = True
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    client, other = socket.socketpair()
    theirs.close()
    with other:
        worker = Worker(3, 1 << 30, -1, Line(ours, entries.ToSupervisor), one.pools[0])
        one._give(worker, entries.Credentials(1, 7, os.getpid()), client)
        assert other.recv(1) == b""
    assert ours.fileno() < 0, "the worker waits for ever"
    said = capfd.readouterr().err
    assert f"of worker 3 (pid {1 << 30}) of pid {os.getpid()}, uid 1: Broken pipe" in said


def test_sockets_of_endpoints_are_where_the_configuration_says(tmp_path) -> None:  # type: ignore[no-untyped-def]
    """Whatever names the broker comes up with, should it have been taken over."""
    one = supervisor(fixed=str(tmp_path / "fixed"), **{"": f"{tmp_path}/bus."})
    names = ("fixed", "new", "../up", "a/b", "", "a.b", "x" * 300, "ü")
    one.said(entries.Endpoints(names), [])
    assert sorted(each.name for each in tmp_path.iterdir()) == ["bus.new", "fixed"]
    one.said(entries.Endpoints(("new",)), [])
    assert [each.name for each in tmp_path.iterdir()] == ["bus.new"]
    one.said(entries.Endpoints(()), [])
    assert not list(tmp_path.iterdir()) and not one.listeners


def test_a_bus_without_a_place_for_them_has_none() -> None:
    one = supervisor()
    one.said(entries.Endpoints(("new",)), [])
    assert not one.listeners


def test_a_worker_killed_by_a_signal_without_a_name_is_not_the_end_of_the_bus() -> None:
    one = supervisor()
    pid = os.fork()
    if pid == 0:
        os.kill(os.getpid(), signal.SIGRTMIN + 2)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        worker = Worker(3, pid, os.dup(0), Line(ours, entries.ToSupervisor), one.pools[0])
        worker.client = entries.Credentials(1, 1, 1)
        one.workers[3] = worker
        one.said(entries.Ended(3, code), [])
    assert not one.workers


@pytest.mark.parametrize("code", [0x7F, -0x7F, 1 << 62, -(1 << 62)])
def test_a_zygote_that_was_taken_over_makes_up_how_a_worker_ended(code: int) -> None:
    """A status that no process has was an exception, and the end of the bus."""
    one = supervisor()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        worker = Worker(3, 1 << 30, os.dup(0), Line(ours, entries.ToSupervisor), one.pools[0])
        worker.client = entries.Credentials(1, 1, 1)
        one.workers[3] = worker
        one.said(entries.Ended(3, code), [])
    assert not one.workers


def test_what_can_not_be_started_is_tried_later_each_time() -> None:
    one = supervisor()
    one.max_workers = 0
    tried = []

    def start() -> None:
        tried.append(one.delay)
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    one._start_zygote = start  # type: ignore[method-assign]
    one._lose(ZYGOTE)
    for _ in range(10):
        assert one.waits() and one.retry_at > time.monotonic()
        one.settle()  # too early
        one.retry_at = time.monotonic()
        one.settle()
    assert tried == [0.2, 0.4, 0.8, 1.6, 3.2] + [5.0] * 5
    one.said(entries.Joined(7), [])
    one._start_zygote = lambda: None  # type: ignore[method-assign]
    one.retry_at = time.monotonic()
    one.settle()
    assert not one.missing and not one.waits() and one.delay == 0.1


def room_for(more: int, there: set[int]) -> int:
    """The limit by which so many more descriptors can be had, as numbers may be free in between."""
    return next(end for end in count() if end - sum(fd < end for fd in there) > more)


def test_descriptors_are_not_lost_by_what_can_not_be_started() -> None:
    """Each try that failed half-way kept some, for good."""
    before = descriptors()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        for more in range(8):
            resource.setrlimit(
                resource.RLIMIT_NOFILE, (room_for(more, set(map(int, before))), hard)
            )
            with pytest.raises(OSError, match="Too many open files"):
                spawn_reader(["--session"], dict.fromkeys(range(3, 10), 0), 2)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert descriptors() == before


def test_the_end_waited_for_each_process_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """For one that a file system never answers, and then for the next, and those of each made bus."""
    journal = Journal(to_stderr=False, to_syslog=False, relays=False)
    several = Several(msgspec.msgpack.encode(SETTINGS), [], journal, -1, lambda _: (0, 0))
    made: dict[str, Any] = {name: supervisor() for name in "ab"}
    several.made = made
    pids = []
    for bus in (several, *made.values()) * 3:
        pids.append(os.fork())
        if pids[-1] == 0:
            signal.pause()
        bus.children[pids[-1]] = ZYGOTE
    waited = [0.0]

    def never(_pidfd: int, _events: int, seconds: float) -> bool:
        waited.append(seconds)
        return False

    with monkeypatch.context() as patch:
        patch.setattr(signal, "pidfd_send_signal", lambda *_: None)  # they do not end by that
        patch.setattr("kbusd.supervisor.supervisor.ready", never)
        patch.setattr(time, "monotonic", lambda: 100.0 + sum(waited))
        several.stop()
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert len(waited) == 1 + len(pids) and sum(waited) == STOP_SECONDS


def test_a_zygote_that_was_started_anew_counted_reloads_from_0(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """So that its workers each fetched a policy that they had."""
    one = supervisor()
    started: list[list[str]] = []
    monkeypatch.setattr(
        "kbusd.supervisor.supervisor.spawn",
        lambda _, arguments, *__: started.append(arguments) or len(started),
    )
    one.profiles = dict.fromkeys(("zygote", "worker", "kdbus-worker"), -1)
    for code, digest in (
        (0, b"1"),
        (1, b"2"),
        (0, b"2"),
        (0, b"2"),
    ):  # what says the same is the same
        settings = msgspec.msgpack.encode(SETTINGS | {"digest": digest})
        one.reading = memfd.sealed("test", settings)
        one._configuration_read(code)
    one._start_zygote()
    assert started == [[one.guid, str(os.getpid()), "2"]]
    one.lines[ZYGOTE].close()
