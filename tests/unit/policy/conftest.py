"""`pytest -m slow tests/unit/policy` runs the long comparison with dbus-daemon; nothing else does."""

from __future__ import annotations

import pytest


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes minutes; runs only when asked for with -m")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "slow" not in config.getoption("markexpr"):
        skip = pytest.mark.skip(reason="slow: ask for it with -m slow")
        for item in items:
            # pytest gives every conftest the items of the whole run.
            if "slow" in item.keywords and "policy" in item.path.parts:
                item.add_marker(skip)
