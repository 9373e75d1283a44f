"""When a spare worker is told that a client is about to come, so that it gets ready meanwhile."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from kbusd.rings.entries import Credentials, Soon, ToWorker
from kbusd.rings.line import Line, pair
from kbusd.supervisor.clients import Clients
from kbusd.supervisor.listen import Listener
from kbusd.supervisor.supervisor import SPARES, Pool, Supervisor, Worker


class Accepting(Supervisor):
    """A supervisor without processes, with so many spare workers; `first` is the other end of the first's line."""

    def __init__(self, spare: int) -> None:
        ours, theirs = pair()
        self.first = Line(theirs, ToWorker)
        self.clients = Clients()
        self.pools = [Pool(SPARES, self.clients)]
        self.ours = line = Line(ours, ToWorker)
        self.pools[0].spare.extend(Worker(n, 0, -1, line, self.pools[0]) for n in range(spare))
        self.incomplete = {}
        self.settings = type("Settings", (), {"limits": {"max_connections_per_user": 9}})()


def connect(supervisor: Supervisor, directory: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listening, socket.socket(socket.AF_UNIX) as client:
        listening.bind(str(directory / "bus"))
        listening.listen()
        client.connect(str(directory / "bus"))
        supervisor._accept(Listener(listening, "", ""))


@pytest.mark.parametrize(("spare", "told"), [(SPARES, True), (SPARES - 1, False), (0, False)])
def test_where_many_come_no_worker_gets_ready(tmp_path: Path, spare: int, told: bool) -> None:
    supervisor = Accepting(spare)
    connect(supervisor, tmp_path)
    assert supervisor.first.receive() == ((Soon(), []) if told else None)
    assert supervisor.clients.waiting() == 1


def test_nor_while_another_is_about_to_say_hello(tmp_path: Path) -> None:
    supervisor = Accepting(SPARES)
    supervisor.incomplete[1] = Credentials(0, 0, 0).share
    connect(supervisor, tmp_path)
    assert supervisor.first.receive() is None


def test_a_spare_worker_that_has_just_ended_keeps_no_client_out(tmp_path: Path) -> None:
    supervisor = Accepting(SPARES)
    supervisor.first.close()
    connect(supervisor, tmp_path)
    assert supervisor.clients.waiting() == 1
