"""A mount of kdbusfs without a bus: the real Mount and tree, a client in a process of its own, and
workers that the test plays.

A process must never use a mount that it serves itself, so the client is forked before there is one.
"""

from __future__ import annotations

import atexit
import errno
import os
import select
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, TypeVar

from kbusd.cuse import abi, replies, requests
from kbusd.rings import entries
from kbusd.rings.line import MAX_RECORD, Line, pair
from kbusd.supervisor.clients import Clients
from kbusd.supervisor.cuse import Nodes
from kbusd.supervisor.device import Devices
from kbusd.supervisor.kdbusfs import Mount
from kbusd.workers import tree
from tests.guest.child import Child, Say

SECONDS = 10.0
BUS = "0-test/bus"
NODE = entries.Node("0-test", "bus", 0o666, 0, 0)

TO_WORKER = entries.Device | entries.Tree | entries.ToDeviceWorker | entries.Open

Message = TypeVar("Message")


def errno_of(do: Callable[[], Any]) -> str:
    """The name of the error that it ends with, or "" if it does not."""
    try:
        do()
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return ""


class Player:
    """A worker's side of its line."""

    def __init__(self, number: int) -> None:
        ours, theirs = pair()
        self.number = number
        self.supervisors = SimpleNamespace(number=number, pid=1, line=Line(ours, entries.Answered))
        self.line = Line(theirs, TO_WORKER, bytearray(MAX_RECORD))
        self.device: entries.Device | None = None

    def hear(self, kind: type[Message]) -> Message:
        """The next message, which has to be of this kind."""
        message, self.fds = self.receive()
        assert isinstance(message, kind), message
        return message

    def is_asked(self) -> None:
        """Wait for a request that wants an answer."""
        while isinstance(requests.decode(self.hear(entries.Asked).request).body, requests.Forget):
            pass

    def receive(self) -> tuple[Any, list[int]]:
        """Raises EOFError."""
        deadline = time.monotonic() + SECONDS
        while (received := self.line.receive()) is None:
            left = max(0.0, deadline - time.monotonic())
            assert select.select([self.line], [], [], left)[0], f"nothing is said for {SECONDS} s"
        return received

    def asked(self, kind: type[Message]) -> tuple[int, Message]:
        """The number and the body of the next request, which has to be of this kind."""
        request = requests.decode(self.hear(entries.Asked).request)
        assert isinstance(request.body, kind), request
        return request.header.unique, request.body

    def say(self, message: Any, *fds: int) -> None:
        self.line.send(message, fds)
        while not self.line.flush():
            assert select.select([], [self.line], [], SECONDS)[1], "nobody listens"

    def answer(
        self,
        unique: int,
        result: int = 0,
        data: bytes = b"",
        pushed: tuple[tuple[int, int], ...] = (),
    ) -> None:
        self.say(entries.Answered(replies.ioctl(unique, result, data), pushed))

    def serve_ioctl(self, result: int = 0) -> requests.Ioctl:
        """Answer the next request, an ioctl without data."""
        unique, body = self.asked(requests.Ioctl)
        self.answer(unique, result)
        return body

    def ends(self) -> bool:
        """Whether its line is closed, and nothing else said before."""
        try:
            self.receive()
        except EOFError:
            return True
        return False

    def die(self) -> None:
        self.line.close()


@dataclass
class Rig:
    """`client(path)` runs in a process of its own once the mount is there; `heard()` is what it returns."""

    client: Callable[[str], Any]
    limit: int = 100
    cuse: bool = False  # a node instead of a mount, which takes no tree
    warnings: list[str] = field(default_factory=list)
    killed: list[int] = field(default_factory=list)
    entered: list[entries.Facts] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.path = "/dev/kdbus/rig" if self.cuse else tempfile.mkdtemp("", "kdbusfs-", "/tmp")
        self.child = Child(self._use)
        # What is needed of the supervisor.
        self.settings = SimpleNamespace(limits={"max_connections_per_user": self.limit})
        self.openers = Clients()
        self.journal: Any = SimpleNamespace(warn=self.warnings.append)
        self.players: dict[int, Player] = {}
        self.devices = Devices(self)
        # There is no broker to say that connections are gone.
        self.devices.closings.opened = lambda number: None  # type: ignore[method-assign]
        self.devices.queues = {NODE.bus: self.openers}
        atexit.register(self.tidy)
        if self.cuse:
            self.nodes = Nodes(self.devices, "rig", (NODE,))
            self.devices.transports.append(self.nodes)
            return
        self.mount = Mount(self.devices, self.path, (NODE,))
        self.devices.transports.append(self.mount)
        self.hire()

    def _use(self, say: Say) -> None:
        os.dup2(3, 3)
        while not os.path.exists(f"{self.path}/{BUS}"):
            time.sleep(0.01)  # for the mount there is nothing to wait on
        say(self.client(f"{self.path}/{BUS}"))

    def kill(self, number: int, reason: str) -> None:
        self.killed.append(number)
        self.players[number].die()

    def enter(self, holder: Any, who: entries.Credentials, facts: entries.Facts) -> None:
        self.entered.append(facts)
        holder.say(facts)

    def attend(self) -> None:
        """What the supervisor's loop does when the bell rings."""
        assert select.select([self.devices.bell], [], [], SECONDS)[0], "the bell does not ring"
        self.devices.attend()

    def kill_tree(self, number: int = 1) -> None:
        self.players[number].line.sock.shutdown(socket.SHUT_RDWR)

    def hire(self, *, silent: bool = False) -> Player:
        """Wait until a worker is wanted, and let it begin. A tree works by itself, if not `silent`."""
        player, work, credentials = self.wanted()
        work(player.supervisors, credentials)
        message, _ = player.receive()
        if isinstance(message, entries.Device):
            player.device = message
        elif not silent:
            line = Line(player.line.sock, entries.ToTree, bytearray(MAX_RECORD))
            threading.Thread(target=tree.serve, args=(line, message), daemon=True).start()
        return player

    def hire_dead(self) -> None:
        """The same with a worker that has just ended, which nobody knows yet."""
        player, work, credentials = self.wanted()
        player.die()
        work(player.supervisors, credentials)

    def wanted(self) -> tuple[Player, Callable[..., None], entries.Credentials]:
        while (turn := self.openers.next(lambda _: True)) is None:
            self.attend()
        credentials, work = turn
        assert not isinstance(work, socket.socket)
        player = Player(len(self.players) + 1)
        self.players[player.number] = player
        return player, work, credentials

    def end(self) -> Any:
        """What the client says, which then has ended; nothing is left."""
        said = self.child.hear()
        self.child.wait()
        self.tidy()
        return said

    def tidy(self) -> None:
        """If the client is stuck in a request, it is freed when this process ends, which must not
        wait for it."""
        self.devices.stop()
        if not self.child.ended:
            self.child.signal(signal.SIGKILL)
        shutil.rmtree(self.path, ignore_errors=True)


def command(number: int, size: int = 0) -> int:
    """An ioctl's number: without data that the kernel copies, or with so much both ways."""
    return (3 << 30 if size else 0) | size << 16 | 0x95 << 8 | number


__all__ = ["BUS", "Player", "Rig", "abi", "command", "errno_of"]
