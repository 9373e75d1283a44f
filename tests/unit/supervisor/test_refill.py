"""When the supervisor asks the zygote for workers, and for such as do not rehearse."""

from __future__ import annotations

from itertools import count
from typing import Any

import pytest

from kbusd.rings.entries import Credentials, Fork
from kbusd.rings.line import Line, pair
from kbusd.supervisor.clients import Clients
from kbusd.supervisor.supervisor import Pool, Supervisor, Worker


class Refilling(Supervisor):
    """A supervisor without processes, of whose workers some are spare, for sockets and for files."""

    def __init__(self, workers: int, spare: int, files: int | None = None) -> None:
        sock, _ = pair()
        line = Line(sock, Fork)
        who = Credentials(0, 0, 0)
        self.max_workers = 100
        sockets, opened = Pool(4, Clients()), Pool(2, Clients(), files=True)
        self.pools = [sockets] if files is None else [sockets, opened]
        self.workers = {n: Worker(n, 0, -1, line, sockets, who) for n in range(workers)}
        for pool, there in (sockets, spare), (opened, files or 0):
            pool.spare.extend(Worker(n, 0, -1, line, pool) for n in range(there))
        self.forking = {}
        self.numbers = count(1)
        self.told: list[Any] = []

    def _tell(self, module: str, message: Any, fds: Any = ()) -> None:
        self.told.append(message)


@pytest.mark.parametrize(
    ("workers", "spare", "wanted", "hurry"),
    [
        (0, 0, 4, False),  # the bus starts: no client has come
        (9, 4, 0, False),
        (9, 3, 1, False),
        (9, 2, 2, False),
        (9, 1, 3, True),  # clients come faster than workers
        (9, 0, 4, True),
        (99, 0, 1, True),
        (100, 0, 0, True),
    ],
)
def test_few_spare_workers_are_made_up_for_in_a_hurry(
    workers: int, spare: int, wanted: int, hurry: bool
) -> None:
    supervisor = Refilling(workers, spare)
    supervisor._refill()
    assert supervisor.told == [Fork(number + 1, hurry) for number in range(wanted)]
    supervisor._refill()
    assert len(supervisor.told) == wanted  # not twice


def test_each_kind_of_worker_has_its_own_hurry() -> None:
    supervisor = Refilling(9, 3, files=0)
    supervisor._refill()
    assert supervisor.told == [Fork(1, False), Fork(2, True, True), Fork(3, True, True)]
