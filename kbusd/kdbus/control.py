"""One open file of a control node: it makes a bus, and then is what the bus lives by.

Without any I/O, as `session.py`. Source: kdbus.bus(7), ipc/kdbus/handle.c and bus.c.
"""

from __future__ import annotations

import errno
import select
from typing import Protocol

from kbusd.kdbus import abi, commands, handle
from kbusd.kdbus.commands import SPECS, BusMake
from kbusd.kdbus.errors import Errno
from kbusd.kdbus.handle import State
from kbusd.kdbus.port import Caller
from kbusd.kdbus.session import Done, fetch


class Maker(Protocol):
    """Who makes buses."""

    async def make_bus(self, caller: Caller, order: BusMake) -> None:
        """Returns when its node is there. Raises Errno: EINVAL for a name that does not begin with the
        caller's uid, EEXIST for one that there is, EMFILE for too many."""


class Control:
    """Takes BUS_MAKE, once."""

    arrived, ordinary = 0, None

    def __init__(self) -> None:
        self.state = State.CONTROL
        self.bus: Maker

    def poll(self) -> int:
        """There is nothing to wait for."""
        return select.POLLERR | select.POLLHUP

    def coming_back(self) -> None:
        """Nor for anything before that."""

    async def ioctl(self, caller: Caller, command: int, address: int, data: bytes) -> Done:
        """Carry out a command, as Session does."""
        handle.check(command, self.state)
        whole = await fetch(caller, SPECS[abi.CMD_BUS_MAKE], address, data)
        decoded = commands.decode_bus_make(whole)
        if decoded.value is not None:
            try:
                if self.state != State.CONTROL:
                    raise Errno(errno.EBADFD, "BUS_MAKE while another one is carried out")
                self.state = State.BUS_OWNER
                await self.bus.make_bus(caller, decoded.value)
            except Errno as error:
                self.state = State.CONTROL
                raise Errno(error.errno, error.text, decoded.pokes) from None
        return Done(tuple((address + poke.offset, poke.data) for poke in decoded.pokes))
