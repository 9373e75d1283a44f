"""What a client has sent to names that have an activator, and the descriptors that are kept with it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from kbusd.kdbus import abi, kept
from kbusd.kdbus.kept import Kept, Sent
from kbusd.kdbus.parcel import Parcel

NAME = "com.example.Name"


class Keeper:
    """`closed`: which descriptors it has let go of, in order."""

    def __init__(self) -> None:
        self.closed: list[int] = []
        self.kept = Kept(self.closed.extend)

    def keep(self, cookie: int, data: bytes = b"", fds: Sequence[int] = ()) -> Sent:
        parcel = Parcel(0, 0, 1, abi.PAYLOAD_DBUS, cookie, 0, dst_name=NAME)
        return self.kept.keep(parcel, data, fds)

    @property
    def cookies(self) -> list[int]:
        return [sent.parcel.cookie for sent in self.kept.to(NAME)]


@pytest.fixture
def keeper() -> Keeper:
    return Keeper()


def test_what_was_read_is_forgotten_with_its_descriptors(keeper: Keeper) -> None:
    for cookie in range(3):
        keeper.keep(cookie, fds=(10 * cookie, 10 * cookie + 1))
    keeper.kept.read(1)
    assert keeper.cookies == [0, 2]
    assert keeper.closed == [10, 11] and keeper.kept.fds == 4
    keeper.kept.read(1)
    assert keeper.closed == [10, 11]


@pytest.mark.parametrize(
    ("most", "each"),
    [("MAX_MESSAGES", {}), ("MAX_BYTES", {"data": b"x"}), ("MAX_FDS", {"fds": (7,)})],
)
def test_the_oldest_goes_if_there_are_too_many(
    keeper: Keeper, monkeypatch: pytest.MonkeyPatch, most: str, each: dict[str, object]
) -> None:
    monkeypatch.setattr(kept, most, 3)
    for cookie in range(5):
        keeper.keep(cookie, **each)  # type: ignore[arg-type]
    assert keeper.cookies == [2, 3, 4]
    assert len(keeper.closed) == 2 * ("fds" in each)
