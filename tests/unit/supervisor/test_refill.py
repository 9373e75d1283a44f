"""When the supervisor asks the zygote for workers, and for such as do not rehearse."""

from __future__ import annotations

from collections import deque
from itertools import count
from types import SimpleNamespace
from typing import Any, cast

import pytest

from kbusd.rings.entries import Fork
from kbusd.supervisor.supervisor import Supervisor, Worker


class Refilling(Supervisor):
    """A supervisor without processes."""

    def __init__(self, workers: int, spare: int) -> None:
        self.max_workers = 100
        self.workers: dict[int, Worker] = dict.fromkeys(range(workers))  # type: ignore[arg-type]
        self.spare: deque[Worker] = deque(
            cast(Worker, SimpleNamespace(files=False)) for _ in range(spare)
        )
        self.forking: dict[int, bool] = {}
        self.listeners = [cast(Any, None)]
        self.kinds = ()
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
