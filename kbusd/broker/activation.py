"""Starting the services that own names which nobody owns yet.

A name is started once, whoever asks for it meanwhile; all who asked are answered when the name
has an owner, when the service fails, or when it takes too long (then it is killed). Texts and
order of the checks are dbus-daemon's. A service that exits with status 0 may have forked, so it
is waited for until the time is up.

A name that no service file provides may have got one since the configuration was read: so it is looked
whether anything has changed (watching.py) before somebody is told so.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field

from kbusd.broker.connection import MAX_WAITING, Connection
from kbusd.broker.outside import Outside
from kbusd.broker.refusal import (
    ACCESS_DENIED,
    INVALID_ARGS,
    LIMITS_EXCEEDED,
    SERVICE_UNKNOWN,
    SPAWN_CHILD_EXITED,
    SPAWN_CHILD_SIGNALED,
    SPAWN_EXEC_FAILED,
    SPAWN_FAILED,
    SPAWN_FILE_INVALID,
    TIMED_OUT,
    Refused,
)
from kbusd.broker.watching import Watching
from kbusd.policy.configuration import Configuration
from kbusd.policy.services import Service
from kbusd.rings.entries import Failure, Launch, Reply, StartService

STARTED = 1
RUNNING = 2
MAX_LOOKING = 256
LOOK_SECONDS = 5.0  # a directory may be of a server that is gone
MAX_VARIABLES = 4096
MAX_VARIABLE_BYTES = 128 * 1024  # execve(2): MAX_ARG_STRLEN


@dataclass(frozen=True, slots=True)
class Waiter:
    """Somebody who waits for a service, and the number of its request."""

    connection: Connection
    message: StartService


@dataclass(slots=True)
class Pending:
    """A service that was started and has not taken its name yet."""

    job: int
    name: str
    deadline: float
    waiters: list[Waiter] = field(default_factory=list)


class Activation:
    """All services that are being started. `owned` tells whether a name has an owner,
    `reload` and `reading`: see Watching."""

    def __init__(
        self,
        outside: Outside,
        address: str,
        owned: Callable[[str], bool],
        reload: Callable[[], None],
        reading: Callable[[], bool],
    ) -> None:
        self._outside = outside
        self._address = address
        self._owned = owned
        self.watching = Watching(outside, reload, reading, self._retry)
        self._services: dict[str, Service] = {}
        self._environment: dict[str, str] = {}
        self._pending: dict[str, Pending] = {}
        self._jobs: dict[int, Pending] = {}
        self._next = 1
        self._looking: list[Waiter] = []
        self._to_look: list[Waiter] = []  # when that is over
        self._look_until: float | None = (
            None  # the launcher looks, though all who wanted it may be gone
        )

    def configure(self, configuration: Configuration) -> None:
        """Take up a configuration; services that are being started go on."""
        self._services = {service.name: service for service in configuration.services}
        # With a <servicehelper> services run as their own users. We need no helper for that.
        self._as_users = bool(configuration.service_helper)
        self._system = configuration.type == "system" or self._as_users
        self._timeout_ms = configuration.limits.get("service_start_timeout", 25_000)
        self._max_pending = configuration.limits.get("max_pending_service_starts", 512)
        # What a service is told of the bus that started it (dbus-daemon(1), org.freedesktop.DBus
        # .UpdateActivationEnvironment in the specification).
        self._starter = {"DBUS_STARTER_ADDRESS": self._address}
        if configuration.type in ("session", "system"):
            self._starter["DBUS_STARTER_BUS_TYPE"] = configuration.type
            self._starter[f"DBUS_{configuration.type.upper()}_BUS_ADDRESS"] = self._address

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._services)

    def start(self, connection: Connection, message: StartService) -> None:
        """StartServiceByName, or a message to a name that nobody owns. Raises Refused."""
        waiting = sum(max(len(each.waiters), 1) for each in self._pending.values())
        if waiting >= self._max_pending and not self._owned(message.name):
            raise Refused(
                LIMITS_EXCEEDED,
                "The maximum number of pending activations has been reached, activation of"
                f" {message.name} failed (max_pending_service_starts={self._max_pending})",
            )
        if connection.waiting >= MAX_WAITING:
            raise Refused(LIMITS_EXCEEDED, f"{connection} waits for too many services")
        waiter = Waiter(connection, message)
        service = self._services.get(message.name)
        if service is None:
            self._look(waiter)
        elif self._owned(message.name):
            self._outside.send(connection.worker, Reply(message.request, RUNNING))
            return
        elif (pending := self._pending.get(message.name)) is not None:
            pending.waiters.append(waiter)
        else:
            self._launch(service, waiter)
        connection.waiting += 1
        if service is not None:
            # Till it knows that there is one, its client waits.
            self._outside.wake(connection.worker)

    def update_environment(self, variables: dict[str, str]) -> None:
        """UpdateActivationEnvironment; what execve(2) cannot carry is left out. Raises Refused."""
        if self._system:
            raise Refused(ACCESS_DENIED, "Cannot change activation environment on a system bus.")
        for key, value in variables.items():
            if not key or "=" in key or "\0" in key + value:
                continue
            if len(key) + len(value) > MAX_VARIABLE_BYTES:
                raise Refused(LIMITS_EXCEEDED, f"Environment variable {key[:64]} is too long")
            if key not in self._environment and len(self._environment) >= MAX_VARIABLES:
                raise Refused(LIMITS_EXCEEDED, "Too many environment variables")
            self._environment[key] = value

    # -- what happens meanwhile ----------------------------------------------------------------

    def took_name(self, name: str) -> None:
        """A name got an owner, as the log says already."""
        pending = self._pending.get(name)
        if pending is None:
            return
        self._forget(pending)
        self._outside.say(f"service {name} started")
        for waiter in pending.waiters:
            waiter.connection.waiting -= 1
            self._outside.send(waiter.connection.worker, Reply(waiter.message.request, STARTED))

    def ended(self, job: int, status: int, error: str) -> None:
        """The launcher says that a service could not be started (`error`) or has exited."""
        pending = self._jobs.get(job)
        if pending is None:
            return
        if error:
            self._fail(
                pending, SPAWN_EXEC_FAILED, f"Failed to execute program {pending.name}: {error}"
            )
        elif os.WIFSIGNALED(status):
            number = os.WTERMSIG(status)
            self._fail(
                pending, SPAWN_CHILD_SIGNALED, f"Process {pending.name} received signal {number}"
            )
        elif (code := os.waitstatus_to_exitcode(status)) != 0:
            self._fail(
                pending, SPAWN_CHILD_EXITED, f"Process {pending.name} exited with status {code}"
            )

    def launcher_gone(self) -> None:
        """The launcher ended, and what it did not report will not be reported."""
        for pending in list(self._jobs.values()):
            self._fail(pending, SPAWN_FAILED, f"The launcher of {pending.name} ended")
        self.watching.launcher_gone()

    def gone(self, connection: Connection) -> None:
        """The connection ended; a service that it wanted is started all the same."""
        for pending in self._pending.values():
            pending.waiters = [
                each for each in pending.waiters if each.connection is not connection
            ]
        self._looking = [each for each in self._looking if each.connection is not connection]
        self._to_look = [each for each in self._to_look if each.connection is not connection]

    def deadline(self) -> float | None:
        """When `tick` has something to do."""
        deadlines = [each.deadline for each in self._pending.values()]
        if self._look_until is not None:
            deadlines.append(self._look_until)
        return min(deadlines, default=None)

    def tick(self, now: float) -> None:
        """Kill what takes too long, and let nobody wait any longer for us to look."""
        for pending in [each for each in self._pending.values() if each.deadline <= now]:
            self._outside.end_launch(pending.job)
            self._fail(
                pending,
                TIMED_OUT,
                f"Failed to activate service '{pending.name}': timed out"
                f" (service_start_timeout={self._timeout_ms}ms)",
            )
        if self._look_until is not None and self._look_until <= now:
            self._outside.say(
                f"the launcher has not said within {LOOK_SECONDS:.0f} s whether there are new services: it hangs,"
                f" as on a <servicedir> whose file server is gone; {len(self._looking)} calls are answered"
                " by what was known"
            )
            self._retry()

    # -- services that came after the configuration was read ------------------------------------

    def _look(self, waiter: Waiter) -> None:
        if len(self._looking) + len(self._to_look) >= MAX_LOOKING:
            raise unknown(waiter.message.name)
        if self._look_until is not None:
            # Who looks now may have done so before there was what this one wants.
            self._to_look.append(waiter)
        elif self.watching.look():
            self._looking.append(waiter)
            self._look_until = self._outside.now() + LOOK_SECONDS
        else:
            raise unknown(waiter.message.name)

    def _retry(self) -> None:
        """All that there was is known: those who waited for that get their answer."""
        looking, self._looking, self._to_look = self._looking, self._to_look, []
        self._look_until = None
        if self._looking and self.watching.look():
            self._look_until = self._outside.now() + LOOK_SECONDS
        else:
            looking, self._looking = looking + self._looking, []
        for waiter in looking:
            if waiter.message.name not in self._services:
                refused = unknown(waiter.message.name)
                self._answer(waiter, refused.error, refused.text)
                continue
            waiter.connection.waiting -= 1
            try:
                self.start(waiter.connection, waiter.message)
            except Refused as error:
                waiter.connection.waiting += 1
                self._answer(waiter, error.error, error.text)

    # -- the launch ----------------------------------------------------------------------------

    def _launch(self, service: Service, waiter: Waiter) -> None:
        if service.exec_error:
            text = f"Unclosed quotes in command line ({service.file}: {service.exec_error})"
            raise Refused(INVALID_ARGS, text)
        if self._as_users and not service.user:
            raise Refused(SPAWN_FILE_INVALID, "Cannot do system-bus activation with no user\n")
        job = self._next
        self._next += 1
        deadline = self._outside.now() + self._timeout_ms / 1000
        pending = Pending(job, service.name, deadline, [waiter])
        self._pending[service.name] = self._jobs[job] = pending
        self._outside.say(f"starting service {service.name}, wanted by {waiter.connection}")
        user = service.user if self._as_users else ""
        environment = self._environment | self._starter
        self._outside.launch(Launch(job, service.name, service.exec, user, environment))

    def _fail(self, pending: Pending, error: str, text: str) -> None:
        self._forget(pending)
        self._outside.say(f"service {pending.name} failed: {text}")
        for waiter in pending.waiters:
            self._answer(waiter, error, text)

    def _answer(self, waiter: Waiter, error: str, text: str) -> None:
        waiter.connection.waiting -= 1
        self._outside.send(waiter.connection.worker, Failure(waiter.message.request, error, text))

    def _forget(self, pending: Pending) -> None:
        del self._pending[pending.name]
        del self._jobs[pending.job]

    def __len__(self) -> int:
        return len(self._pending)


def unknown(name: str) -> Refused:
    """What is said of a name that no service file provides."""
    return Refused(SERVICE_UNKNOWN, f"The name {name} was not provided by any .service files")
