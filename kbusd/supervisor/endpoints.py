"""Custom endpoints of buses: nodes beside the bus's own, behind which its clients see less of it.

    a file of a bus's node asks for one  -> checked, the bus's broker is told, the node is published
    a client opens that node             -> the broker is told that it comes by this endpoint
    the file is closed, or the bus ends  -> the node is withdrawn, who has it open is cut off; and if the
                                            file's worker ends, as its policy goes with that

What an endpoint lets through is between its maker and the broker. An endpoint's number is that of the worker
of the file that made it, so that none is taken for another of the same name.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Callable
from functools import partial

from kbusd.rings import entries
from kbusd.supervisor.device import Devices
from kbusd.supervisor.holder import Holder

MAX_NAME = 63
MAX_PER_USER = 64
MAX_ENDPOINTS = 512


class Endpoints:
    """Those of all buses. `tell` says something to the broker of a bus."""

    def __init__(self, devices: Devices, tell: Callable[[str, entries.EndpointMade], None]) -> None:
        self._devices = devices
        self._tell = tell
        self._nodes: dict[int, entries.Node] = {}  # by number

    def make(
        self, holder: Holder, maker: entries.Credentials, order: entries.MakeEndpoint, owner: int
    ) -> int:
        """Make the one that the worker of a file of the bus of `owner` asks for; 0 or an errno."""
        if number := self._refusal(holder, maker.uid, order, owner):
            return number
        node = node_for(holder.bus, order.name, order.flags, maker)
        end = partial(self._devices.call, partial(self.end, holder.number))
        if not holder.own(end, bound=True):
            return errno.EBADFD  # it is closed already, or has made one before
        self._nodes[holder.number] = node
        self._devices.endpoints[node.bus, node.endpoint] = holder.number
        self._tell(holder.bus, entries.EndpointMade(holder.number))
        for transport in self._devices.transports:
            try:
                transport.publish(node)
            except OSError as error:
                self.end(holder.number)
                return error.errno or errno.EIO
        return 0

    def _refusal(self, holder: Holder, uid: int, order: entries.MakeEndpoint, owner: int) -> int:
        domain = self._devices.domain_of(holder.bus)
        if domain is None:
            return errno.ESHUTDOWN
        if holder.uid not in (domain.first, owner) and not holder.opener.ipc_owner:
            return errno.EPERM
        if not may_be_called(order.name, domain.inside(uid)):
            return errno.EINVAL
        if (holder.bus, order.name) in self._devices.endpoints:
            return errno.EEXIST
        of = [node for node in self._nodes.values() if node.uid == uid]
        too_many = len(of) >= MAX_PER_USER or len(self._nodes) >= MAX_ENDPOINTS
        return errno.EMFILE if too_many else 0

    def end(self, number: int) -> None:
        """The file that made it is closed."""
        if (node := self._nodes.pop(number, None)) is not None:
            del self._devices.endpoints[node.bus, node.endpoint]
            for transport in self._devices.transports:
                transport.withdraw(node)

    def end_all(self, bus: str) -> None:
        """The bus ends."""
        for number in [each for each, node in self._nodes.items() if node.bus == bus]:
            self.end(number)


def may_be_called(name: str, uid: int | None) -> bool:
    """Whether a bus or an endpoint of this user may have that name; the uid is that of its domain."""
    good = re.fullmatch(rf"{uid}-[A-Za-z0-9_.-]*[A-Za-z0-9_]", name, re.ASCII)
    return good is not None and len(name) <= MAX_NAME


_GROUP, _WORLD = 1, 2  # flags of KDBUS_CMD_BUS_MAKE and _ENDPOINT_MAKE


def node_for(bus: str, endpoint: str, flags: int, owner: entries.Credentials) -> entries.Node:
    """The node of a bus or an endpoint that its owner may use, and others as its flags say."""
    others = 0o066 if flags & _WORLD else 0o060 if flags & _GROUP else 0
    return entries.Node(bus, endpoint, 0o600 | others, owner.uid, owner.gid)
