"""What the tests of conversions have in common."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from kbusd.kdbus.gvariant import Order

ORDERS: tuple[Order, Order] = ("little", "big")

# For tests with large random values, on machines that have more to do.
unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


def altered(draw: st.DrawFn, data: bytes) -> bytes:
    """Bytes that differ from `data` in a place or two."""
    for _ in range(draw(st.integers(1, 2))):
        at = draw(st.integers(0, len(data)))
        middle = draw(st.sampled_from((b"", b"\0", b"\1", b"\xff", b"y", b"(", data[at : at + 3])))
        data = data[:at] + middle + data[at + draw(st.integers(0, 2)) :]
    return data
