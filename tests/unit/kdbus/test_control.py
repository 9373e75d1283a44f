"""A control file, whose client gets signals while its bus is made."""

from __future__ import annotations

import errno
from typing import Any

import pytest

from kbusd.kdbus import abi, items, layout, waits
from kbusd.kdbus.commands import BusMake
from kbusd.kdbus.control import Control
from kbusd.kdbus.errors import Errno
from kbusd.kdbus.handle import State
from kbusd.kdbus.waits import Interrupted, Wait
from tests.unit.kdbus.refused import refused

AT = 0x10000


def bus_make(name: str) -> bytes:
    bloom = items.build(abi.ITEM_BLOOM_PARAMETER, layout.BLOOM_PARAMETER.pack(64, 1))
    fixed = layout.PLAIN.pack(0, 0, 0)
    return items.command(fixed, [bloom, items.string(abi.ITEM_MAKE_NAME, name)])


class Caller:
    """A thread in BUS_MAKE."""

    tid = 7
    argument = AT

    def __init__(self, control: Control, name: str = "1000-made") -> None:
        self.waits_for: Wait[Any] | None = None
        self.result: object = None
        command: Any = control.ioctl(self, abi.CMD_BUS_MAKE, AT, bus_make(name))  # type: ignore[arg-type]
        waits.start(command, self._ended)

    async def store(self, address: int, data: bytes) -> None:
        """Its struct can always be written."""

    def _ended(self, result: object) -> None:
        self.result = result

    def interrupt(self) -> None:
        assert self.waits_for is not None
        self.waits_for.fail(Interrupted())
        assert isinstance(self.result, Interrupted)

    @property
    def is_done(self) -> bool:
        if isinstance(self.result, Exception):
            raise self.result
        return self.result is not None


class Supervisor:
    """Makes buses, when it is told to."""

    def __init__(self) -> None:
        self.control = Control()
        self.control.bus = self
        self.looks: list[Wait[None]] = []
        self.orders: list[tuple[BusMake, Wait[None]]] = []

    async def look(self, _: object) -> dict[str, bytes]:
        self.looks.append(Wait())
        await self.looks[-1]
        return {}

    async def make_bus(self, _: object, __: object, order: BusMake) -> None:
        self.orders.append((order, Wait()))
        await self.orders[-1][1]

    def begin(self) -> Caller:
        caller = Caller(self.control)
        self.looks[-1].done(None)
        return caller


@pytest.fixture
def supervisor() -> Supervisor:
    return Supervisor()


def test_a_control_file_makes_one_bus(supervisor: Supervisor) -> None:
    caller = supervisor.begin()
    assert not caller.is_done
    with refused("EBADFD"):
        assert Caller(supervisor.control).is_done
    ((order, made),) = supervisor.orders
    assert order.name == "1000-made"
    made.done(None)
    assert caller.is_done and supervisor.control.state is State.BUS_OWNER
    with refused("EBADFD"):
        assert Caller(supervisor.control).is_done


@pytest.mark.parametrize("early", [False, True])
def test_bus_make_that_a_signal_interrupted_was_refused_when_it_was_begun_again(
    supervisor: Supervisor, early: bool
) -> None:
    supervisor.begin().interrupt()
    ((_, made),) = supervisor.orders
    if early:
        made.done(None)
    with refused("EBADFD"):
        assert Caller(supervisor.control, "1000-other").is_done
    again = Caller(supervisor.control)
    if not early:
        again.interrupt()
        again = Caller(supervisor.control)
        made.done(None)
    assert again.is_done and len(supervisor.orders) == 1
    with refused("EBADFD"):
        assert Caller(supervisor.control).is_done


def test_a_bus_that_could_not_be_made_can_be_tried_again(supervisor: Supervisor) -> None:
    supervisor.begin().interrupt()
    again = Caller(supervisor.control)
    supervisor.orders[0][1].fail(Errno(errno.EEXIST, "there is one"))
    with refused("EEXIST"):
        assert again.is_done
    another = supervisor.begin()
    supervisor.orders[1][1].done(None)
    assert another.is_done


def test_a_signal_while_the_maker_of_a_bus_is_looked_at(supervisor: Supervisor) -> None:
    first, again = Caller(supervisor.control), Caller(supervisor.control)
    supervisor.looks[0].fail(Errno(errno.EINTR, "a signal came"))
    with refused("EINTR"):
        assert first.is_done
    supervisor.looks[1].done(None)
    supervisor.orders[0][1].done(None)
    assert again.is_done
