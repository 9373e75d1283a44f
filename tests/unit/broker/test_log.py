"""The log of those behind an endpoint: what a snapshot shows, and how long it is kept."""

from __future__ import annotations

import os

from kbusd.broker.connection import OPEN, Behind
from kbusd.broker.filtered import Filter
from kbusd.broker.log import Logs
from kbusd.rings import entries as e
from kbusd.rings import memfd

from .test_kdbus import MADE, WORLD, endpoint, log
from .world import OWNER, World, credentials

SEES = (e.PolicyEntry("a", True, ((WORLD, 0, 0),)),)
WHO = Behind.of(credentials(1, OWNER), MADE)


class Logged:
    """A bus whose log is written."""

    def __init__(self) -> None:
        self.world = World()
        self.logs = Logs(
            lambda *at: self.world.bus.snapshot(*at),
            lambda behind: Filter(behind, self.world.bus.shown, self.world.bus.inside(behind)),
        )

    def follow(self) -> None:
        for entry in log(self.world):
            self.logs.append(entry)
        self.world.events.clear()

    def file(self) -> int:
        """Which memfd the log is in."""
        return os.fstat(self.logs.snapshot(WHO, 1)[1]).st_ino


def test_a_snapshot_that_was_made_before_an_endpoint_hid_more_is_given_to_nobody() -> None:
    bus = Logged()
    maker, other = endpoint(bus.world, *SEES), bus.world.client(2, OWNER)
    bus.world.ask(other, e.RequestName(2, "a.b", 0))
    bus.world.events.clear()
    assert b"a.b" in memfd.read(bus.logs.snapshot(WHO, 1)[0])
    bus.world.ask(maker, e.SetEndpoint(3, ()))
    bus.follow()
    assert b"a.b" not in memfd.read(bus.logs.snapshot(WHO, 1)[0])
    assert b"a.b" in memfd.read(bus.logs.snapshot(OPEN, 1)[0])


def test_the_log_behind_a_custom_endpoint_goes_with_the_last_who_is_there() -> None:
    bus = Logged()
    endpoint(bus.world, *SEES)
    bus.follow()
    first = bus.file()
    for worker in (1, 3):
        bus.world.client(worker, OWNER, custom=MADE)
        bus.follow()
    bus.world.bus.gone(1)
    bus.follow()
    assert bus.file() == first
    bus.world.bus.gone(3)
    bus.follow()
    assert bus.file() != first
