"""CUSE nodes: the same files as in kdbusfs, as character devices /dev/kdbus/..., one connection for each.

The kernel makes a node with our answer to its first request, as root's alone; only then it gets its owner
and its access bits, which are the kernel's to check. There is no tree: the connection is the node.
A node goes when its connection is closed; who has it open gets ENOTCONN.

Privileged: root's devices. Never opens one of its own: to close that would wait for an answer of ours, for
ever if it is the end of this process that closes it.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable
from contextlib import suppress
from functools import partial
from itertools import count

from kbusd.cuse import abi, replies, routing
from kbusd.rings import entries
from kbusd.supervisor.connection import Connection
from kbusd.supervisor.device import Devices
from kbusd.supervisor.domains import HOST, Domain
from kbusd.supervisor.holder import Holder
from kbusd.supervisor.relay import MAX_REQUEST

CUSE = "/dev/cuse"
DEVICES = "/sys/dev/char"
MAJOR = 120  # for local use (admin-guide/devices.txt); the kernel gives it to nobody by itself
ROOT = "kdbus"


class NodeError(OSError):
    """There can be no such node; the text says which and why."""

    def __str__(self) -> str:
        return self.strerror or ""


class Nodes:
    """The nodes below /dev/kdbus, or below one of its directories, say domain/NAME."""

    def __init__(
        self,
        devices: Devices,
        below: str,
        nodes: Iterable[entries.Node],
        domain: Domain = HOST,
    ) -> None:
        """Raises NodeError."""
        self.devices = devices
        self.domain = domain
        self.root = f"{ROOT}/{below}" if below else ROOT
        self.nodes: dict[str, CuseNode] = {}
        try:
            for node in nodes:
                self.publish(node)
        except NodeError:
            self.stop()
            raise

    def publish(self, node: entries.Node) -> None:
        """Make it, if it is of this domain. Raises NodeError."""
        if (local := self.domain.local(node)) is not None:
            path = self._path(node)
            self.nodes[path] = CuseNode(self.devices, path, local, self.domain)

    def withdraw(self, node: entries.Node) -> None:
        """It goes, if it is there, and whoever has it open is cut off."""
        if (there := self.nodes.pop(self._path(node), None)) is not None:
            there.close()

    def stop(self) -> None:
        """All of them go."""
        for node in self.nodes.values():
            node.close()
        self.nodes.clear()

    leave = stop

    def _path(self, node: entries.Node) -> str:
        return "/".join(filter(None, (self.root, node.bus.strip("/"), node.endpoint)))


class CuseNode(Connection):
    """One node, /dev/`path`."""

    transport = "cuse"

    def __init__(self, devices: Devices, path: str, node: entries.Node, domain: Domain) -> None:
        """Makes it. Raises NodeError."""
        self.node = node
        where = f"/dev/{path}"
        try:
            fuse = os.open(CUSE, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            hint = "" if error.errno != errno.ENOENT else "; is the module cuse loaded?"
            hint = "; it takes root (CAP_SYS_ADMIN)" if os.geteuid() else hint
            raise NodeError(error.errno, f"{CUSE}: {error.strerror}{hint}") from None
        super().__init__(devices, where, fuse, domain)
        try:
            early = self._make(path)
            self.number = _number_of(path, where)
            os.chown(where, node.uid, node.gid, follow_symlinks=False)
            os.chmod(where, node.mode)
        except (OSError, ValueError) as error:
            self.where = ""  # it goes with the connection, which nobody refers to any more
            if isinstance(error, NodeError):
                raise
            number = getattr(error, "errno", None) or errno.EINVAL
            text = getattr(error, "strerror", None) or str(error)
            raise NodeError(number, f"cannot make {where}: {text}") from None
        devices.numbers.add(self.number)
        if early:
            self.give(early)
        devices.listen(fuse, self.take)

    def __del__(self) -> None:
        os.close(self.fuse)

    def _make(self, path: str) -> bytes:
        """Answer the kernel's first request; returns the next one, if it is there already."""
        _, unique, _, _ = routing.route(os.read(self.fuse, MAX_REQUEST))
        os.write(self.fuse, replies.cuse_init(unique, path, *_number_for(self.domain)))
        try:
            return os.read(self.fuse, MAX_REQUEST)
        except BlockingIOError:
            return b""
        except OSError:  # that is how the kernel tells
            raise NodeError(errno.EEXIST, f"{self.where} is served by another process") from None

    def other(self, opcode: int, unique: int, request: bytes) -> None:
        """There is nothing but to open it."""
        if opcode != abi.OPEN:
            self.write(replies.failure(unique, errno.ENOSYS))
            return
        flags, _ = abi.OPEN_IN.unpack_from(request, routing.HEADER_SIZE)
        self.held[unique] = None, request
        opened = entries.Opened(unique, self.node.bus, self.node.endpoint, flags)
        self.devices.call(partial(self.grant, opened))

    def closed(self, holder: Holder, unique: int) -> None:
        """close(2) waits for the answer."""
        self._release(holder, partial(self.write, replies.reply(unique)))

    def close(self) -> None:
        """The node goes; who waits in a request gets ESHUTDOWN. Others may be about to use the descriptor: its number stays taken till they are
        done, and stands for what takes everything and says nothing."""
        self.devices.forget(self.fuse)
        for unique in list(self.held):
            self.fail(unique, errno.ESHUTDOWN)
        self.where = ""
        null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
        os.dup2(null, self.fuse, inheritable=False)
        os.close(null)
        self.devices.numbers.discard(self.number)
        self.ended()


def _number_for(domain: Domain) -> tuple[int, int]:
    """Major and minor for a new node. Those of domains are of one major number, so that a container's
    device rule can name them before they are there; otherwise the kernel chooses."""
    if domain is HOST:
        return 0, 0
    taken = {name.partition(":")[2] for name in os.listdir(DEVICES) if name.startswith(f"{MAJOR}:")}
    return MAJOR, next(minor for minor in count() if str(minor) not in taken)


def _number_of(path: str, where: str) -> int:
    """The device's number, if it is what /dev shows. Raises OSError."""
    with open(f"/sys/class/cuse/{path.replace('/', '!')}/dev") as file:
        major, _, minor = file.read().partition(":")
    number = os.makedev(int(major), int(minor))
    there = None
    with suppress(FileNotFoundError):
        there = os.lstat(where)
    if there is None or not stat.S_ISCHR(there.st_mode) or there.st_rdev != number:
        raise NodeError(errno.ENOENT, f"the kernel made no {where}; is /dev a devtmpfs?")
    return number
