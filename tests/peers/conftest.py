"""Fixtures of the tests that run other projects' suites."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: left out of `make check`, run by `make check-all`")


@pytest.fixture
def short_directory() -> Iterator[Path]:
    """A directory with a path short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="kbt-", dir="/tmp") as name:
        yield Path(name)
