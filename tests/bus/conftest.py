"""Fixtures of the tests on a running bus; see daemon.py for which daemon is under test.

`bus` is a session bus shared by the tests of one file (each with its own clients and names);
`start_bus` starts one of another shape for the test alone. Both are stopped by SIGTERM and have
to leave nothing behind. When a test fails, what the bus logged meanwhile is shown.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from . import procs
from .daemon import STRICT_POLICY, Bus, is_reference
from .rawclient import DRIVER, RawClient

_running: list[Bus] = []


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "kbusd_only: needs what only kbusd has")
    config.addinivalue_line(
        "markers", "kbusd_differs(reason): the reference passes, kbusd is known not to"
    )
    config.addinivalue_line("markers", "slow: left out of `make check`, run by `make check-all`")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not is_reference():
        for item in items:
            if marker := item.get_closest_marker("kbusd_differs"):
                item.add_marker(pytest.mark.xfail(strict=True, reason=marker.args[0]))
        return
    for item in items:
        if item.get_closest_marker("kbusd_only"):
            item.add_marker(pytest.mark.skip(reason="the daemon under test is dbus-daemon"))


def pytest_runtest_setup() -> None:
    for bus in _running:
        if not bus.stopped:
            bus.log_mark = len(bus.log())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[Any]:
    report = yield
    if report.failed:
        for bus in _running:
            if not bus.stopped and bus.log_path.exists():
                log = bus.log()[bus.log_mark :][-20000:]
                report.sections.append((f"log of the bus {bus.address}", log))
    return report


class _Shared:
    """The bus that the tests of one file share; a new one after a test that ended it."""

    def __init__(self, **shape: Any) -> None:
        self.shape = shape
        self.bus: Bus | None = None

    def get(self) -> Bus:
        if self.bus is None or not self.bus.is_alive():
            self.bus = Bus(**self.shape)
            self.bus.janitor = RawClient(self.bus.address)
            _running.append(self.bus)
        return self.bus

    def tidy(self) -> None:
        """Wait until nobody of the last test is left on the bus, so that the next sees none go."""
        assert self.bus
        janitor = self.bus.janitor
        assert janitor
        own = {DRIVER, janitor.name}
        procs.eventually(
            lambda: set(janitor.driver("ListNames")[0]) == own, "every client of the test is gone"
        )

    def stop(self) -> None:
        if self.bus is not None:
            self.bus.stop()


@pytest.fixture(scope="module")
def _shared_bus() -> Iterator[_Shared]:
    shared = _Shared()
    yield shared
    shared.stop()


@pytest.fixture(scope="module")
def _shared_strict_bus() -> Iterator[_Shared]:
    shared = _Shared(policy=STRICT_POLICY)
    yield shared
    shared.stop()


@pytest.fixture
def bus(_shared_bus: _Shared) -> Iterator[Bus]:
    """A session bus that allows everything."""
    yield from _lend(_shared_bus)


@pytest.fixture
def strict_bus(_shared_strict_bus: _Shared) -> Iterator[Bus]:
    """A session bus that allows everything but eavesdropping and replies that nobody wants."""
    yield from _lend(_shared_strict_bus)


def _lend(shared: _Shared) -> Iterator[Bus]:
    bus = shared.get()
    yield bus
    bus.close_clients()
    if not bus.is_alive():
        status = bus.process.returncode
        bus.kill()
        pytest.fail(f"the bus ended during the test with status {status}")
    shared.tidy()


@pytest.fixture
def start_bus() -> Iterator[Callable[..., Bus]]:
    """Start a bus of a given shape (arguments of daemon.Bus); stopped after the test."""
    started: list[Bus] = []

    def start(*args: Any, **options: Any) -> Bus:
        one = Bus(*args, **options)
        started.append(one)
        _running.append(one)
        return one

    yield start
    errors = []
    for one in started:
        try:
            one.stop()
        except AssertionError as error:
            errors.append(error)
    if errors:
        raise errors[0]
