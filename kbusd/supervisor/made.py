"""Buses that programs make, by the control node: each has a broker, a zygote and workers of its own.

    a file of the control node asks for one  -> checked, its processes are started
    a worker of it is ready                  -> its node is published, the maker may go on
    the file is closed, or its broker ends   -> its node is withdrawn, its processes are killed

A made bus has no sockets, no services and nothing to read again. Names and numbers come from a worker
that its client may have taken over: what kbusd/kdbus has checked there is checked here again as far as it
concerns anybody else. Whose the bus is, is the kernel's word.
"""

from __future__ import annotations

import errno
import os
import syslog
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from select import POLLIN, POLLOUT
from socket import socket
from typing import Any

import msgspec

from kbusd.rings import entries, memfd
from kbusd.supervisor.clients import Clients
from kbusd.supervisor.cuse import Nodes
from kbusd.supervisor.device import Devices
from kbusd.supervisor.domains import HOST, Domain, DomainError, read
from kbusd.supervisor.endpoints import Endpoints, may_be_called, node_for
from kbusd.supervisor.holder import Holder, Order
from kbusd.supervisor.journal import Journal
from kbusd.supervisor.kdbusfs import Mount
from kbusd.supervisor.mount import MountError
from kbusd.supervisor.supervisor import BROKER, STOP_SECONDS, ZYGOTE, Pool, Supervisor

CONTROL = "control"
MAX_BUSES_PER_USER = 16  # kdbus: KDBUS_USER_MAX_BUSES
MAX_BUSES = 64  # each has three processes at least, and a dozen descriptors here
MAX_BUSES_OF_A_DOMAIN = 16
FILE_SPARES = 2
MAX_ABOUT = 16 << 10
CONFIGURATION = b"""<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <type>kdbus</type>
  <listen>unix:path=/nowhere</listen>
  <policy context="default">
    <allow user="*"/>
    <allow own="*"/>
    <allow send_destination="*" eavesdrop="true"/>
    <allow receive_sender="*" eavesdrop="true"/>
  </policy>
  <limit name="max_connections_per_user">256</limit>
  <limit name="max_completed_connections">4096</limit>
  <limit name="max_names_per_connection">257</limit>
  <limit name="max_match_rules_per_connection">4096</limit>
</busconfig>
"""
"""What D-Bus's own policy says of a made bus: everything is allowed, kdbus's decides."""


class Where(msgspec.Struct, frozen=True):
    """Where devices are to be: a mount point, a directory below /dev/kdbus; and where it says which
    domains there are."""

    kdbusfs: str | None
    cuse: str | None
    domains: str | None


class Several(Supervisor):
    """The supervisor of a bus with devices, and of `made`, the buses that programs have made."""

    def __init__(self, *how: Any) -> None:
        super().__init__(*how)
        self.made: dict[str, MadeBus] = {}
        self.openers = Clients()  # of files of the configured bus, and of control
        self.devices: Devices
        self.endpoints: Endpoints
        self.begun = False

    def begin(self, configuration: bytes, node: entries.Node, where: Where) -> None:
        """When it has started: let there be devices. `configuration`: of made buses; `node`: that of the
        configured one. Raises OSError, MountError, DomainError."""
        self.made_configuration = configuration
        self.where = where
        self.devices = devices = Devices(self)
        self.begun = True
        self.openers.of = self.clients.of
        self.pools.append(Pool(FILE_SPARES, self.openers, files=True))
        devices.queues = {"": self.openers, node.bus: self.openers}
        self.endpoints = Endpoints(devices, self._tell_broker)
        nodes = node, entries.Node("", CONTROL, 0o666, node.uid, node.gid)
        if where.kdbusfs is not None:
            devices.transports.append(Mount(devices, where.kdbusfs, nodes))
        if where.cuse is not None:
            devices.transports.append(Nodes(devices, where.cuse, nodes))
        if where.domains is not None:
            for domain in read(where.domains).values():
                self._open(domain)

    def _open(self, domain: Domain) -> None:
        """Let there be this domain. Raises OSError, MountError."""
        try:
            self._try_to_open(domain)
        except (OSError, MountError):
            self._close(domain)
            raise

    def _try_to_open(self, domain: Domain) -> None:
        devices = self.devices
        node = entries.Node(domain.prefix, CONTROL, 0o666, domain.first, domain.first)
        devices.domains[domain.prefix] = domain
        devices.queues[domain.prefix] = self.openers
        if domain.mount:
            os.makedirs(domain.mount, 0o755, exist_ok=True)
            devices.transports.append(Mount(devices, domain.mount, (node,), domain))
        if self.where.cuse is not None:
            devices.transports.append(Nodes(devices, self.where.cuse, (node,), domain))

    def _close(self, domain: Domain) -> None:
        """Let there be none."""
        devices = self.devices
        del devices.domains[domain.prefix], devices.queues[domain.prefix]
        for bus in tuple(self.made.values()):
            if bus.name.startswith(domain.prefix):
                self._end(bus)
        for transport in [each for each in devices.transports if each.domain == domain]:
            transport.leave()
            devices.transports.remove(transport)

    def _reload(self) -> None:
        super()._reload()
        if self.begun and self.where.domains is not None:
            try:
                wanted = read(self.where.domains)
                there = {prefix: each for prefix, each in self.devices.domains.items() if prefix}
                for prefix, domain in there.items():
                    if wanted.get(prefix) != domain:
                        self._close(domain)
                for prefix, domain in wanted.items():
                    if there.get(prefix) != domain:
                        self._open(domain)
            except (OSError, MountError, DomainError) as error:
                self.journal.warn(f"domains not all as they should be: {error}")

    def _tell_broker(self, bus: str, message: msgspec.Struct) -> None:
        """The one of this bus."""
        self.made.get(bus, self)._tell(BROKER, message)

    def stop(self, until: float = 0.0) -> None:
        until = until or time.monotonic() + STOP_SECONDS
        for bus in tuple(self.made.values()):
            bus.stop(until)
        if self.begun:
            self.devices.stop()
        super().stop(until)

    def sources(self) -> Iterator[tuple[int, int, Callable[[], None]]]:
        yield from super().sources()
        if self.begun:
            yield self.devices.bell, POLLIN, self.devices.attend
        for bus in self.made.values():
            yield from bus.sources()

    def settle(self) -> None:
        super().settle()
        for bus in tuple(self.made.values()):
            bus.settle()

    def waits(self) -> bool:
        return super().waits() or any(bus.retry_at > 0 for bus in self.made.values())

    def ended(self, pid: int, code: int) -> None:
        super().ended(pid, code)
        for bus in self.made.values():
            bus.ended(pid, code)

    def kill(self, number: int, reason: str) -> None:
        """A worker broke a rule."""
        for bus in (self, *self.made.values()):
            bus.said(entries.Kill(number, reason), [])

    def workers_of_all(self) -> int:
        """How many there are."""
        return sum(len(bus.workers) for bus in (self, *self.made.values()))

    def enter(self, holder: Holder, who: entries.Credentials, facts: entries.Facts) -> None:
        """Somebody says HELLO by a file: the broker is told first who that is, then its worker."""
        self._tell_broker(holder.bus, entries.Entering(holder.number, who))
        with suppress(OSError):
            holder.say(facts)

    def make(self, holder: Holder, creator: entries.Credentials, order: Order) -> None:
        """Make what the worker of an open file asks for: a bus, or an endpoint of its own bus."""
        if isinstance(order, entries.MakeEndpoint):
            bus = self.made.get(holder.bus)
            owner = os.geteuid() if bus is None else bus.owner
            number = self.endpoints.make(holder, creator, order, owner)
            self._answer(holder, order.unique, number)
        else:
            self._make_bus(holder, creator, order)

    def _make_bus(
        self, holder: Holder, creator: entries.Credentials, order: entries.MakeBus
    ) -> None:
        domain = self.devices.domains.get(holder.bus)
        number = errno.ESHUTDOWN if domain is None else self._refusal(domain, creator.uid, order)
        if number:
            self._answer(holder, order.unique, number)
            return
        node = node_for(holder.bus + order.name, "bus", order.flags, creator)

        def ready(number: int) -> None:
            self._answer(holder, order.unique, number or self._publish(bus, node))

        bus = MadeBus(
            self,
            node.bus,
            self.made_configuration,
            entries.Maker(creator, order),
            ready,
            partial(self._over, node),
        )
        self.made[bus.name] = bus
        if not holder.own(partial(self.devices.call, partial(self._stop, bus))):
            return bus.stop()  # it is closed already, or has made one before
        try:
            bus.start()
        except OSError as error:
            bus.journal.warn(f"cannot be started: {error.strerror}")
            bus.stop()

    def _refusal(self, domain: Domain, uid: int, order: entries.MakeBus) -> int:
        if not may_be_called(order.name, domain.inside(uid)) or len(order.about) > MAX_ABOUT:
            return errno.EINVAL
        name = domain.prefix + order.name
        if name in self.devices.queues or name in self.made:
            return errno.EEXIST
        of = [bus for bus in self.made.values() if bus.owner == uid]
        there = [name for name in self.made if name.rpartition("/")[0] == domain.prefix[:-1]]
        most = MAX_BUSES if domain == HOST else MAX_BUSES_OF_A_DOMAIN
        return errno.EMFILE if len(of) >= MAX_BUSES_PER_USER or len(there) >= most else 0

    def _answer(self, holder: Holder, unique: int, number: int) -> None:
        with suppress(OSError):
            holder.say(entries.Made(unique, number))

    def _publish(self, bus: MadeBus, node: entries.Node) -> int:
        self.devices.queues[bus.name] = bus.clients
        for transport in self.devices.transports:
            try:
                transport.publish(node)
            except OSError as error:
                bus.journal.warn(f"has no node: {error}")
                bus.exit_status = 1
                return error.errno or errno.EIO
        return 0

    def _end(self, bus: MadeBus) -> None:
        if bus.exit_status is None:
            bus.exit_status = 0

    def _stop(self, bus: MadeBus) -> None:
        """The file that made it is closed: who asks for it next is to be told that it is not there."""
        self._end(bus)
        if self.made.get(bus.name) is bus:
            bus.stop()

    def said(self, message: msgspec.Struct, fds: list[int]) -> None:
        if isinstance(message, entries.Left) and self.begun and not fds:
            self.devices.closings.left(message.worker)
        else:
            super().said(message, fds)

    def _over(self, node: entries.Node) -> None:
        del self.made[node.bus]
        self.devices.queues.pop(node.bus, None)
        self.endpoints.end_all(node.bus)
        for transport in self.devices.transports:
            transport.withdraw(node)
        self.devices.closings.over(node.bus)


class _Journal(Journal):
    """The same, for one bus; what the other processes write is not passed on by this one."""

    def __init__(self, of: Journal, name: str) -> None:
        vars(self).update(vars(of))
        self.pipe = -1
        self.prefix = f"bus {name}: "

    def say(self, text: str, *, priority: int = syslog.LOG_INFO) -> None:
        super().say(self.prefix + text, priority=priority)


class MadeBus(Supervisor):
    """What the supervisor does for its bus, for one more; but for signals, sockets and configuration.

    `ready` is called once, with 0 when a worker waits for clients, else with an errno; `over` at the
    end."""

    def __init__(
        self,
        host: Several,
        name: str,
        configuration: bytes,
        maker: entries.Maker,
        ready: Callable[[int], None],
        over: Callable[[], None],
    ) -> None:
        journal = _Journal(host.journal, name)
        self.host = host
        super().__init__(configuration, [], journal, host.signals, host.read)
        self.name, self.owner = name, maker.credentials.uid
        self.ready: Callable[[int], None] | None = ready
        self.over = over
        self.kinds = *host.kinds, "made"
        self.profiles, self.max_workers = host.profiles, host.max_workers
        self.numbers = host.numbers  # a file's handle is the number of its worker
        self.clients.of = host.clients.of
        self.pools = [Pool(1, self.clients, files=True)]
        self.maker = memfd.sealed("kbusd-maker", msgspec.msgpack.encode(maker))

    def start(self) -> None:
        """Start its processes. Raises OSError."""
        self._start_broker()

    def _start(self, module: str, arguments: Sequence[str], *fds: int) -> socket:
        if module == ZYGOTE:
            return super()._start(module, arguments, *fds, self.maker)
        return super()._start(module, [*arguments, "--owner", str(self.owner)], *fds)

    def _start_launcher(self) -> None:
        """It has no services."""

    def _reload(self) -> None:
        self._tell(BROKER, entries.Reconfigured())

    def sources(self) -> Iterator[tuple[int, int, Callable[[], None]]]:
        for module, line in self.lines.items():
            events = POLLIN | POLLOUT if line.queue else POLLIN
            yield line.fileno(), events, partial(self._hear, module)

    def _hear(self, module: str) -> None:
        if module in self.lines and self.exit_status is None:
            self._receive(module)

    def said(self, message: msgspec.Struct, fds: list[int]) -> None:
        if isinstance(message, entries.Left):
            self.host.said(message, fds)
        else:
            super().said(message, fds)

    def _refill(self) -> None:
        if self.host.workers_of_all() < self.max_workers:
            super()._refill()

    def settle(self) -> None:
        if self.exit_status is None:
            super().settle()
            if self.pools[0].spare:
                self._say_ready(0)
            elif self.ready and self.retry_at:
                self.exit_status = 1
        if self.exit_status is not None:
            self.stop()

    def _say_ready(self, number: int) -> None:
        if self.ready:
            ready, self.ready = self.ready, None
            ready(number)

    def stop(self, until: float = 0.0) -> None:
        """End every process, and let go of what is here of them."""
        self._say_ready(errno.EIO)
        self.over()  # first, so that who has a connection hears what it is that has ended
        super().stop(until)
        while turn := self.clients.next(lambda _: True):
            credentials, client = turn
            self.clients.of[credentials.share] -= 1
            if callable(client):
                client(None, credentials)
        for worker in self.workers.values():
            worker.line.close()
            os.close(worker.pidfd)
            if worker.client is not None:
                self.clients.of[worker.client.share] -= 1
        for line in self.lines.values():
            line.close()
        for fd in (self.configuration, self.maker, self.log_fd):
            if fd >= 0:
                os.close(fd)
