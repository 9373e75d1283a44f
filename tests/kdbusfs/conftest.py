"""What the tests of running kdbus buses share. A module has `shared`, its bus."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.kdbusfs.test_clients import KdbusBus


@pytest.fixture
def bus(shared: KdbusBus) -> Iterator[KdbusBus]:
    """It, with no clients left at the end."""
    yield shared
    shared.close_clients()
