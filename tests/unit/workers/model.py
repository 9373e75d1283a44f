"""A bus without processes: the broker's core, and for each client a replica and a driver.

Entries and answers are passed by hand and at once, in the order that the engine guarantees: the
log before the answer. What a client would see on its socket is collected in `seen`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from jeepney.low_level import (  # type: ignore[import-untyped]
    Endianness,
    parse_signature,
)

from kbusd.broker.bus import Bus
from kbusd.broker.connection import At
from kbusd.policy.configuration import Configuration
from kbusd.rings.entries import (
    BrokerMessage,
    Count,
    Counted,
    Credentials,
    Hello,
    Launch,
    LogEntry,
    Queued,
    State,
)
from kbusd.workers import behind, driver
from kbusd.workers.replica import Replica
from tests.unit.workers.reference import Seen


class Model:
    """Implements broker/outside.py for the broker's core; every service that starts exits with 1."""

    def __init__(self, configuration: Configuration, bus: driver.Bus) -> None:
        self.configuration = configuration
        self.facts = bus
        self.log: list[LogEntry] = []
        self.sent: list[tuple[int, BrokerMessage, Sequence[int]]] = []
        self.snapshots: list[bytes] = []
        self.launches: list[int] = []
        self.reloading = False
        self.listening: list[tuple[str, ...]] = []
        self.clients: list[ModelClient] = []
        self.broker = Bus(self, configuration, "unix:path=/nowhere", bus.owner)

    def connect(self, credentials: Credentials) -> ModelClient:
        client = ModelClient(self, len(self.clients) + 1, credentials)
        self.clients.append(client)
        return client

    def run(self) -> None:
        """Pass everything on until nothing is left to do."""
        while self.sent or self.launches or self.reloading or self.listening:
            if self.listening:
                names = self.listening.pop(0)
                self.broker.endpoints.listening({name: f"unix:path=/{name}" for name in names})
            if self.reloading:
                self.reloading = False
                self.broker.reconfigure(self.configuration, self.broker.generation + 1)
            while self.launches:
                self.broker.activation.ended(self.launches.pop(), 256, "")
            if not self.sent:
                break
            worker, message, fds = self.sent.pop(0)
            for client in self.clients:
                client.catch_up()
            client = self.clients[worker - 1]
            if isinstance(message, Count):
                counted = Counted(0, Queued(peak_bytes=worker), Queued())
                if worker in self.broker.connections:
                    self.broker.handle(self.broker.connections[worker], counted, ())
                continue
            if isinstance(message, State):
                client.told = message.snapshot
                continue
            token = client.asked.pop(message.request)  # type: ignore[union-attr]
            snapshot = self.snapshots[fds[0]] if fds else b""
            if isinstance(token.request, Hello) and not fds:
                snapshot = client.told
            client.act(client.driver.answer(token, message, snapshot))  # type: ignore[arg-type]
            if snapshot:
                client.position = msgspec.msgpack.decode(snapshot)[0]
        for client in self.clients:
            client.catch_up()

    # -- outside.py ------------------------------------------------------------------------------

    def append(self, entry: LogEntry) -> None:
        self.log.append(entry)

    def stamp(self) -> int:
        return 0

    def send(self, worker: int, message: BrokerMessage, fds: Sequence[int] = ()) -> None:
        self.sent.append((worker, message, fds))

    def wake(self, worker: int) -> None:
        pass

    def joined(self, worker: int) -> None:
        pass

    def kill(self, worker: int, reason: str) -> None:
        raise AssertionError(f"worker {worker} was killed: {reason}")

    def reload(self) -> None:
        self.reloading = True

    def listen(self, endpoints: tuple[str, ...]) -> None:
        self.listening.append(endpoints)

    def launch(self, launch: Launch) -> None:
        self.launches.append(launch.job)

    def end_launch(self, job: int) -> None:
        pass

    def look(self, directories: tuple[str, ...]) -> None:
        pass

    def snapshot(self, endpoint: str) -> list[int]:
        state = self.broker.snapshot(len(self.log), 0)
        self.snapshots.append(msgspec.msgpack.encode(state))
        return [len(self.snapshots) - 1]

    def state(self) -> tuple[bytes, At]:
        return msgspec.msgpack.encode(self.broker.snapshot(len(self.log), 0)), At(0, 0)

    def reaches(self, at: At) -> bool:
        return True

    def policy(self) -> int:
        return 0

    def socketpairs(self) -> tuple[list[int], list[int]]:
        raise AssertionError("nobody is introduced here")

    def close(self, fd: int) -> None:
        raise AssertionError("nobody is introduced here")

    def allows(self, subject: bytes | None, target: bytes | None, permission: str) -> bool:
        return True

    def now(self) -> float:
        return 0.0

    def say(self, text: str) -> None:
        pass


class ModelClient:
    """Speaks like reference.Client; what comes back is in `seen`."""

    def __init__(self, model: Model, worker: int, credentials: Credentials) -> None:
        self.model = model
        self.worker = worker
        self.serial = 0
        self.requests = 0
        self.position: int | None = None
        self.told = b""
        self.asked: dict[int, driver.Token] = {}
        self.seen: list[Seen] = []
        model.broker.worker_started(worker, 1)
        model.broker.assigned(worker, credentials)
        replica = Replica()
        if credentials.endpoint:
            sight = behind.Sight(replica, credentials.endpoint)
            self.driver: driver.Driver = behind.BehindDriver(
                replica, model.facts, credentials, sight
            )
        else:
            self.driver = driver.Driver(replica, model.facts, credentials)

    def catch_up(self) -> None:
        while self.position is not None and self.position < len(self.model.log):
            self.position += 1
            self.act(self.driver.entry(self.model.log[self.position - 1]))

    def call(
        self,
        member: str,
        signature: str = "",
        body: tuple[Any, ...] = (),
        *,
        path: str = "/org/freedesktop/DBus",
        interface: str | None = "org.freedesktop.DBus",
        destination: str | None = "org.freedesktop.DBus",
        flags: int = 0,
        big_endian: bool = False,
    ) -> list[Seen]:
        """Call the driver; all that the client sees until everybody is idle."""
        self.send(
            member,
            signature,
            body,
            path=path,
            interface=interface,
            destination=destination,
            flags=flags,
            big_endian=big_endian,
        )
        self.model.run()
        return self.taken()

    def send(
        self,
        member: str,
        signature: str = "",
        body: tuple[Any, ...] = (),
        *,
        path: str = "/org/freedesktop/DBus",
        interface: str | None = "org.freedesktop.DBus",
        destination: str | None = "org.freedesktop.DBus",
        flags: int = 0,
        big_endian: bool = False,
    ) -> int:
        """Call the driver without letting the broker answer yet; the call's serial."""
        self.catch_up()
        self.serial += 1
        endianness = Endianness.big if big_endian else Endianness.little
        data = (
            parse_signature(list(f"({signature})")).serialise(body, 0, endianness)
            if signature
            else b""
        )
        self.act(
            self.driver.call(
                driver.Call(
                    self.serial,
                    flags,
                    path,
                    interface,
                    member,
                    signature,
                    data,
                    big_endian,
                    destination,
                )
            )
        )
        return self.serial

    def taken(self) -> list[Seen]:
        seen, self.seen = self.seen, []
        return seen

    def act(self, actions: list[driver.Action]) -> None:
        name = self.driver.name
        for action in actions:
            match action:
                case driver.Return(serial, signature, body):
                    self._see("method_return", "", serial, signature, body, name)
                case driver.Error(serial, error, text):
                    self.seen.append(Seen("error", error, serial, "s", (text,), name))
                case driver.Alone(driver.Return(serial, signature, body)):
                    self._see("method_return", "", serial, signature, body, None)
                case driver.Alone(driver.Error(serial, error, text)):
                    self.seen.append(Seen("error", error, serial, "s", (text,), None))
                case driver.Signal(member, signature, body, destination):
                    self._see("signal", member, None, signature, body, destination)
                case driver.Ask(request, token):
                    self.requests += 1
                    self.asked[self.requests] = token
                    numbered = msgspec.structs.replace(request, request=self.requests)
                    broker = self.model.broker
                    broker.handle(broker.connections[self.worker], numbered, ())

    def _see(
        self,
        kind: str,
        member: str,
        serial: int | None,
        signature: str,
        body: bytes,
        destination: str | None,
    ) -> None:
        values: tuple[Any, ...] = ()
        if signature:
            codec = parse_signature(list(f"({signature})"))
            values, end = codec.parse_data(body, 0, Endianness.little)
            assert end == len(body), "the body is longer than its signature"
        self.seen.append(Seen(kind, member, serial, signature, tuple(values), destination))
