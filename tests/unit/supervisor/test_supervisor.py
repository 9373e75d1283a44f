"""What children say to the supervisor, where it must not be its end."""

from __future__ import annotations

import os
import socket

import msgspec

from kbusd.rings import entries
from kbusd.rings.line import Line
from kbusd.supervisor.journal import Journal
from kbusd.supervisor.supervisor import Supervisor, Worker

SETTINGS = {"user": "", "limits": {}, "sockets": {"": ""}}


def supervisor(**sockets: str) -> Supervisor:
    configuration = msgspec.msgpack.encode(SETTINGS | {"sockets": {"": "", **sockets}})
    journal = Journal(to_stderr=False, to_syslog=False, relays=False)
    return Supervisor(configuration, (), "0" * 32, journal, lambda _: (0, 0))


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
