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
from kbusd.kdbus.port import Caller, Looked
from kbusd.kdbus.session import Done, check_writable, fetch
from kbusd.kdbus.waits import Interrupted, Wait, start


class Maker(Protocol):
    """Who makes buses."""

    async def look(self, caller: Caller) -> Looked:
        """What there is to know of the caller. Raises Errno EINTR, as Bus.look."""

    async def make_bus(self, caller: Caller, looked: Looked, order: BusMake) -> None:
        """Returns when its node is there. Raises Errno: EINVAL for a name that does not begin with the
        caller's uid, EEXIST for one that there is, EMFILE for too many."""


class Control:
    """Takes BUS_MAKE, once. A signal ends only the wait for it: who asks for the same again gets what was made."""

    arrived, ordinary = 0, None

    def __init__(self) -> None:
        self.state = State.CONTROL
        self.bus: Maker
        self._order: BusMake | None = None  # what is being made, or was
        self._told: Wait[None] = Wait()  # for who asked for it last
        self._is_made = False

    def poll(self) -> int:
        """There is nothing to wait for."""
        return select.POLLERR | select.POLLHUP

    def coming_back(self) -> None:
        """Nor for anything before that."""

    async def ioctl(self, caller: Caller, command: int, address: int, data: bytes) -> Done:
        """Carry out a command, as Session does."""
        handle.check(command, self.state)
        whole = await fetch(caller, SPECS[abi.CMD_BUS_MAKE], address, data)
        await check_writable(caller, SPECS[abi.CMD_BUS_MAKE], whole)
        decoded = commands.decode_bus_make(whole)
        if decoded.value is not None:
            try:
                await self._make(caller, decoded.value)
            except Errno as error:
                raise Errno(error.errno, error.text, decoded.pokes) from None
        return Done(tuple((address + poke.offset, poke.data) for poke in decoded.pokes))

    async def _make(self, caller: Caller, order: BusMake) -> None:
        looked = {} if self._order else await self.bus.look(caller)
        if self._order is None:
            self._order, self._told = order, Wait()
            start(self.bus.make_bus(caller, looked, order), self._over)
        elif order == self._order and self._told.settled and self.state == State.CONTROL:
            self._told = Wait()
            if self._is_made:
                self._told.done(None)
        else:
            raise Errno(errno.EBADFD, "BUS_MAKE while another one is carried out")
        caller.waits_for = told = self._told
        try:
            await told
        finally:
            caller.waits_for = None
        self.state = State.BUS_OWNER

    def _over(self, result: Errno | Interrupted | None) -> None:
        """It is made, or could not be."""
        if result is None:
            self._is_made = True
            self._told.done(None)
        else:
            self._order = None
            self._told.fail(result)
