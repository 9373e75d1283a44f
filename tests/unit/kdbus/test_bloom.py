"""Bloom filters: parameters that a bus may have, masks with generations."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kbusd.kdbus import bloom
from tests.unit.kdbus.refused import refused


def words(*numbers: int) -> bytes:
    return struct.pack(f"={len(numbers)}Q", *numbers)


@pytest.mark.parametrize(("size", "n_hash"), [(8, 1), (64, 8), (4096, 1)])
def test_parameters(size: int, n_hash: int) -> None:
    assert bloom.parse_parameter(words(size, n_hash)) == bloom.Parameter(size, n_hash)


@pytest.mark.parametrize(
    ("size", "n_hash"), [(0, 1), (7, 1), (12, 1), (4104, 1), (1 << 63, 1), (64, 0)]
)
def test_bad_parameters(size: int, n_hash: int) -> None:
    with refused("EINVAL"):
        bloom.parse_parameter(words(size, n_hash))


def test_sizes() -> None:
    assert bloom.parse_filter(words(3, 7), 8) == bloom.Filter(3, words(7))
    with refused("EDOM"):
        bloom.parse_filter(words(3, 7, 7), 8)
    with refused("EFAULT"):
        bloom.parse_filter(words(3, 7) + b"x", 8)
    assert len(bloom.parse_mask(words(1, 2, 3), 8).blocks) == 3
    for data in (b"", words(1)[:7], words(1, 2, 3)):
        with refused("EDOM"):
            bloom.parse_mask(data, 16)


def test_the_filter_must_have_what_the_mask_asks_for() -> None:
    mask = bloom.parse_mask(words(0b0101, 1 << 63), 16)
    assert mask.matches(bloom.Filter(0, words(0b1101, 3 << 62)))
    assert not mask.matches(bloom.Filter(0, words(0b0100, 1 << 63)))
    assert not mask.matches(bloom.Filter(0, words(0b0101, 0)))
    assert bloom.parse_mask(words(0), 8).matches(bloom.Filter(0, words(0)))


@given(st.integers(0, (1 << 64) - 1), st.integers(1, 4))
def test_a_newer_generation_meets_the_last_block(generation: int, blocks: int) -> None:
    mask = bloom.parse_mask(words(*(1 << at for at in range(blocks))), 8)
    expected = min(generation, blocks - 1)
    for at in range(blocks):
        assert mask.matches(bloom.Filter(generation, words(1 << at))) == (at == expected)
