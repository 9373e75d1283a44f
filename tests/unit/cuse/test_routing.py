"""Routing: it finds what the full decoder finds, without a look at anything else."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kbusd.cuse import abi, requests, routing
from tests.unit.cuse.requests_of import request
from tests.unit.cuse.test_requests import SAMPLES


@pytest.mark.parametrize("data", [data for data, _ in SAMPLES])
def test_as_the_decoder_has_it(data: bytes) -> None:
    found = requests.decode(data)
    body = found.body
    handle = getattr(body, "handle", 0)
    if isinstance(body, requests.Interrupt):
        handle = body.unique
    elif isinstance(body, requests.GetAttr):
        handle = 0  # routed by its node
    header = found.header
    assert routing.route(memoryview(data)) == (header.opcode, header.unique, header.node, handle)


@given(st.binary(max_size=60), st.booleans())
def test_raises_valueerror_only(data: bytes, honest: bool) -> None:
    if honest:
        data = len(data).to_bytes(4, "little") + data[4:]
    try:
        routing.route(data)
    except ValueError as error:
        assert str(error)


def test_too_short_for_a_handle() -> None:
    with pytest.raises(ValueError, match="lacks its handle"):
        routing.route(request(abi.RELEASE, data=bytes(7)))


def test_it_loads_nothing_that_parses() -> None:
    done = subprocess.run(
        [sys.executable, "-s", "-c", "import sys, kbusd.cuse.routing\nprint(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    ours = {name for name in done.stdout.split() if name.startswith(("kbusd", "msgspec"))}
    assert ours == {"kbusd", "kbusd.cuse", "kbusd.cuse.routing"}
