"""Asserts with which errno something is refused."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from kbusd.kdbus.errors import Errno


@contextmanager
def refused(name: str, says: str = "") -> Iterator[None]:
    """What is done inside raises Errno with this name, and a text that has `says` in it."""
    with pytest.raises(Errno) as caught:
        yield
    assert caught.value.errno == getattr(errno, name), f"{caught.value}, not {name}"
    assert says in caught.value.text
