"""Which bus is meant by who does not say so."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from kbusd.ctl import workers
from kbusd.sandbox import inforce, kernel
from kbusd.sandbox.profiles import load
from tests.bus.procs import eventually


@pytest.fixture
def zombie() -> Iterator[int]:
    """A supervisor that has ended, and of whom nobody has asked."""
    pid = os.fork()
    if pid == 0:
        try:
            kernel.set_name(load("supervisor").title)
        finally:
            os._exit(0)
    status = Path(f"/proc/{pid}/status")
    eventually(lambda: "\nState:\tZ" in status.read_text(), "it has ended")
    yield pid
    os.waitpid(pid, 0)


def test_a_bus_that_has_ended_is_none_of_those_that_run(zombie: int) -> None:
    assert Path(f"/proc/{zombie}/comm").read_text().strip() == "kbusd"
    assert zombie not in workers.running()


def test_of_several_each_is_told_with_how_it_was_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "running", lambda: [])
    with pytest.raises(workers.Unclear, match="no kbusd is running"):
        workers.supervisor_of(None, None)
    monkeypatch.setattr(workers, "running", lambda: [os.getpid(), os.getppid()])
    with pytest.raises(
        workers.Unclear, match=f"--pidfile; these are running:\n  {os.getpid()}  kbusd "
    ):
        workers.supervisor_of(None, None)


def test_one_in_a_container_is_not_taken_for_the_one_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "running", lambda: [7, 8])
    monkeypatch.setattr(inforce, "in_our_namespace", lambda pid: pid == 8)
    assert workers.supervisor_of(None, None) == 8
