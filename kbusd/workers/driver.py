"""The bus driver, org.freedesktop.DBus, as one client sees it.

Answers the client's calls from the worker's replica, turns changes into requests to the broker,
and turns control-log entries into the signals that the client must get. Sans-IO: everything goes
in as values and comes out as a list of actions, to be carried out in their order:

    call(call)               a method call of the client to the driver (or to nobody)
    answer(token, message)   the broker's Reply or Failure to an Ask
    entry(entry)             the next entry of the control log; it is applied to the replica here
    resync(snapshot)         in place of entries that were missed

It trusts the replica (the broker's word) and nothing of the client; bodies must have been checked
against their signature before. Policy on *sending* to the driver and on *receiving* from it is
the caller's business, owning names is the broker's.

Order. While `busy`, an earlier call of the client has not taken effect yet: the caller must hold
back what the client sends to others. Calls to the driver may go on coming in until `full`: those
that read wait here until they can see what came before. StartServiceByName is never waited for,
as it may take as long as a service likes, nor is what another worker has to be asked; only whether there is
such a service, if we know of none: who is refused that has his answer before all that he asked later.

Reference: D-Bus specification, "Message Bus Messages"; texts, and what the specification leaves
open, as dbus-daemon 1.14.10 does it (tests/unit/workers/test_differential.py compares them).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import msgspec
from jeepney.low_level import (
    Endianness,
    parse_signature,
)

from kbusd.policy import endpoints
from kbusd.rings.entries import (
    ActivatableChanged,
    AddEndpoint,
    AddMatch,
    BecomeMonitor,
    ConnectionAdded,
    ConnectionRemoved,
    CountConnection,
    Credentials,
    Failure,
    Hello,
    ListEndpoints,
    LogEntry,
    MonitorAttached,
    NameOwnerChanged,
    ProcessOf,
    ReleaseName,
    ReloadConfig,
    RemoveEndpoint,
    RemoveMatch,
    Reply,
    Request,
    RequestName,
    Snapshot,
    StartService,
    Statistics,
    UpdateEnvironment,
)
from kbusd.wire import match, names
from kbusd.workers import errors, statistics
from kbusd.workers.introspection import (
    BUS,
    BUS_PATH,
    INTERFACES,
    MONITORING,
    PEER,
    STATS,
    Method,
    introspect,
)
from kbusd.workers.replica import (
    BUS_ID,
    BUS_NAME,
    NOBODY,
    SIGNAL,
    Connection,
    Replica,
    unique_name,
)

NO_REPLY_EXPECTED = 1
MAX_UNFINISHED = 128  # calls of one client; each may hold a match rule or a name

_MAX_U32 = 0xFFFFFFFF
# What says only that it was done is left out if no reply is wanted, as dbus-daemon has it: of
# ReloadConfig it is said all the same.
_UNANSWERED = frozenset(
    ("AddMatch", "BecomeMonitor", "Ping", "RemoveMatch", "UpdateActivationEnvironment")
)
_decode_snapshot = msgspec.msgpack.Decoder(Snapshot).decode


class Call(NamedTuple):
    """A method call whose header and body have been checked. `destination` None: to nobody."""

    serial: int
    flags: int
    path: str
    interface: str | None
    member: str
    signature: str
    body: bytes
    big_endian: bool
    destination: str | None


class Return(NamedTuple):
    """Send a method return (body little-endian)."""

    reply_serial: int
    signature: str = ""
    body: bytes = b""
    fds: tuple[int, ...] = ()  # the carrier's to close


class Error(NamedTuple):
    """Send an error with one string."""

    reply_serial: int
    name: str
    text: str


class Alone(NamedTuple):
    """Send an answer as the other end of any D-Bus connection would: without sender and destination,
    and seen by nobody else."""

    answer: Return | Error


class Signal(NamedTuple):
    """Send a signal of the bus (path BUS_PATH, interface BUS_NAME, body little-endian).

    Every worker makes its own client's copy of these, a monitor's worker the monitor's: they are
    not to be published or copied to others."""

    member: str
    signature: str
    body: bytes
    destination: str | None


class Token(NamedTuple):
    """What an Ask is about; give it back with the answer."""

    call: Call
    request: Request
    held: bool


class Ask(NamedTuple):
    """Send `request`, numbered by the caller, to the broker, and call `answer(token, reply)`."""

    request: Request
    token: Token


UNKNOWN_OF_PEER = f"Unknown method invoked on {PEER} interface"


def not_of_peer(serial: int) -> Alone:
    """What libdbus answers to anything of the interface Peer that goes to nobody, as it takes that for a call."""
    return Alone(Error(serial, errors.UNKNOWN_METHOD, UNKNOWN_OF_PEER))


Action = Return | Error | Alone | Signal | Ask


class Bus(NamedTuple):
    """What the driver says of the bus itself. `system`: no environment for services from clients.

    `owner` is the uid that the bus belongs to, `pid` the process that was started as the bus."""

    guid: str
    machine_id: str
    owner: int
    pid: int
    system: bool = False
    systemd_activation: bool = False
    apparmor: bool = False
    selinux: bool = False
    label: bytes = b""


class Refusal(Exception):
    """A call cannot be granted; becomes an Error."""

    def __init__(self, name: str, text: str) -> None:
        super().__init__(name, text)
        self.name = name
        self.text = text


class Seen(Protocol):
    """What the client may know of the replica: all of it, but behind an endpoint (behind.py)."""

    @property
    def names(self) -> Iterable[str]: ...
    @property
    def connections(self) -> Mapping[int, Connection]: ...
    @property
    def activatable(self) -> Iterable[str]: ...
    def owner(self, name: str) -> int | None: ...
    def owners(self, name: str) -> list[int]: ...


class Driver:
    """One client's view of org.freedesktop.DBus.

    `pending`: how many changes of the client the broker has not confirmed yet."""

    def __init__(self, replica: Replica, bus: Bus, credentials: Credentials) -> None:
        self.replica = replica
        self.seen: Seen = replica
        self.bus = bus
        self.credentials = credentials
        self.pending = 0
        self.takes_fds = False  # the client
        self._waiting: deque[Call] = deque()
        self._unknown: set[str] = set()  # names of services that are being looked for
        self._held_back: list[Action] | None = None
        self._hello_asked = False

    @property
    def me(self) -> int:
        """The client's id; 0 before Hello was answered."""
        return self.replica.me

    @property
    def name(self) -> str:
        """The client's unique name as messages to it must be addressed."""
        return unique_name(self.me) if self.me else errors.NOT_ACTIVE_YET

    @property
    def busy(self) -> bool:
        """Whether something that the client did has not taken effect yet."""
        unregistered = self._hello_asked and not self._registered
        return self.pending > 0 or bool(self._waiting or self._unknown) or unregistered

    @property
    def full(self) -> bool:
        """Whether so many calls wait that the client should not be read from for now."""
        return self.pending + len(self._waiting) >= MAX_UNFINISHED

    @property
    def _registered(self) -> bool:
        """Whether the replica knows the client, so that all calls can be judged."""
        return self.me in self.replica.connections or self.me in self.replica.monitors

    # -- calls -------------------------------------------------------------------------------

    def call(self, call: Call) -> list[Action]:
        """What to do about a method call. The replica must have caught up with the log."""
        if call.destination is None:
            (answer,) = self._finish(call, self._call_to_nobody)
            assert isinstance(answer, Return | Error)
            return [Alone(answer)]
        if self._waiting or self._unknown or (self._hello_asked and not self._registered):
            self._waiting.append(call)
            return []
        return self._start(call)

    def _start(self, call: Call) -> list[Action]:
        """Carry out a call. One that needs no broker must not overtake those that still do."""
        unconfirmed = self.pending
        actions = self._finish(call, self._carry_out)
        if unconfirmed and not (actions and isinstance(actions[0], Ask)):
            self._waiting.append(call)
            return []
        return actions

    def _finish(
        self, call: Call, function: Callable[[Call], Ask | tuple[Any, ...]]
    ) -> list[Action]:
        try:
            result = function(call)
        except Refusal as refusal:
            return self._error(call, refusal.name, refusal.text)
        if isinstance(result, Ask):
            return [result]
        return self._return(call, *result)

    def _return(self, call: Call, signature: str = "", *values: Any) -> list[Action]:
        """Values are sent to those who want no reply, too, as dbus-daemon does."""
        if call.flags & NO_REPLY_EXPECTED and call.destination and call.member in _UNANSWERED:
            return []
        return [Return(call.serial, signature, _serialise(signature, values))]

    def _error(self, call: Call, name: str, text: str) -> list[Action]:
        """Sent to those who want no reply, too, as dbus-daemon does: monitors show what failed."""
        return [Error(call.serial, name, text)]

    def _call_to_nobody(self, call: Call) -> tuple[Any, ...]:
        """A call without a destination: the bus is only the other end of the socket here."""
        if call.interface == PEER:
            if call.member == "Ping":
                return ("",)
            if call.member == "GetMachineId":
                return ("s", self.bus.machine_id)
            raise Refusal(errors.UNKNOWN_METHOD, UNKNOWN_OF_PEER)
        interface = call.interface if call.interface is not None else "(null)"
        raise Refusal(
            errors.UNKNOWN_METHOD,
            f'Method "{call.member}" with signature "{call.signature}" on interface'
            f' "{interface}" doesn\'t exist\n',
        )

    def _method(self, call: Call) -> Method:
        """The method that is called. Raises Refusal if there is none or not like this."""
        is_hello = call.member == "Hello" and call.interface in (None, BUS)
        if not self.me and not is_hello:
            raise Refusal(errors.ACCESS_DENIED, errors.NOT_REGISTERED)
        canonical = call.path == BUS_PATH
        known = False
        for name, interface in INTERFACES.items():
            if call.interface is not None and call.interface != name:
                continue
            if not (canonical or interface.anywhere):
                continue
            known = True
            method = interface.methods.get(call.member)
            if method is None:
                continue
            if method.privileged:
                self._check_privilege(call.member)
            if not (canonical or method.anywhere):
                raise Refusal(
                    errors.ACCESS_DENIED,
                    f"Method '{call.member}' is only available at the canonical object path"
                    f" '{BUS_PATH}'",
                )
            if call.signature != method.signature:
                raise Refusal(
                    errors.INVALID_ARGS,
                    f"Call to {call.member} has wrong args ({call.signature},"
                    f" expected {method.signature})\n",
                )
            return method
        raise Refusal(
            errors.UNKNOWN_METHOD if known else errors.UNKNOWN_INTERFACE,
            f"{BUS_NAME} does not understand message {call.member}",
        )

    def _check_privilege(self, member: str) -> None:
        """Raises Refusal unless the client is root's or the bus's owner's."""
        uid, pid, label = self.credentials.uid, self.credentials.pid, self.credentials.label
        anonymous = self.credentials.anonymous
        if uid in (0, self.bus.owner) and not anonymous:
            return
        who = f"pid={pid}" if anonymous else f"uid={uid} pid={pid}"
        if label and not anonymous:
            who += f' label="{_text(label)}"'
        raise Refusal(
            errors.ACCESS_DENIED,
            f"rejected attempt to call {member} by connection {self.name} ({who}) with "
            + ("unknown uid" if anonymous else f"uid {uid}"),
        )

    def _carry_out(self, call: Call) -> Ask | tuple[Any, ...]:
        """Answer from the replica, or ask the broker. Raises Refusal."""
        method = self._method(call)
        match call.member, _arguments(call, method):
            case "Hello", []:
                if self.me or self._hello_asked:
                    raise Refusal(errors.FAILED, "Already handled an Hello message")
                self._hello_asked = True
                return self._ask(call, Hello(0, anonymous=self.credentials.anonymous))
            case "RequestName", [str(name), int(flags)]:
                self._check_request(name)
                return self._ask(call, RequestName(0, name, flags))
            case "ReleaseName", [str(name)]:
                _check_release(name)
                return self._ask(call, ReleaseName(0, name))
            case "StartServiceByName", [str(name), int(_)]:
                return self._ask(call, StartService(0, name, auto=False), held=False)
            case "UpdateActivationEnvironment", [dict(variables)]:
                if self.bus.system:
                    raise Refusal(
                        errors.ACCESS_DENIED,
                        "Cannot change activation environment on a system bus.",
                    )
                return self._ask(call, UpdateEnvironment(0, variables))
            case "NameHasOwner", [str(name)]:
                return "b", self.seen.owner(name) is not None
            case "ListNames", []:
                unique = (each.name for each in self.seen.connections.values())
                return "as", [BUS_NAME, *self.seen.names, *unique]
            case "ListActivatableNames", []:
                listed = (name for name in self.seen.activatable if name != BUS_NAME)
                return "as", [BUS_NAME, *listed]
            case "AddMatch", [str(rule)]:
                if _check_rule(rule).eavesdrop:
                    self._check_privilege(call.member)
                return self._ask(call, AddMatch(0, rule))
            case "RemoveMatch", [str(rule)]:
                _check_rule(rule)
                return self._ask(call, RemoveMatch(0, rule))
            case "GetNameOwner", [str(name)]:
                owner = self.seen.owner(name)
                if owner is None:
                    raise _nobody("owner", name)
                return "s", unique_name(owner)
            case "ListQueuedOwners", [str(name)]:
                owners = self.seen.owners(name)
                if not owners:
                    raise _nobody("owners", name)
                return "as", [unique_name(each) for each in owners]
            case "GetConnectionUnixUser", [str(name)]:
                connection = self._connection(name, "UID")
                if connection and connection.credentials.anonymous:
                    raise Refusal(errors.FAILED, f"Could not determine UID for '{name}'")
                return "u", connection.credentials.uid if connection else self.bus.owner
            case "GetConnectionUnixProcessID", [str(name)]:
                connection = self._connection(name, "PID")
                pid = connection.credentials.pid if connection else self.bus.pid
                if pid <= 0:
                    raise Refusal(
                        errors.UNIX_PROCESS_ID_UNKNOWN, f"Could not determine PID for '{name}'"
                    )
                return "u", pid
            case "GetAdtAuditSessionData", [str(name)]:
                self._connection(name, "audit session data")
                raise Refusal(
                    errors.ADT_AUDIT_DATA_UNKNOWN,
                    f"Could not determine audit session data for '{name}'",
                )
            case "GetConnectionSELinuxSecurityContext", [str(name)]:
                connection = self._connection(name, "security context")
                label = connection.credentials.label if connection else self.bus.label
                if connection and connection.credentials.anonymous:
                    label = b""
                if not (self.bus.selinux and label):
                    raise Refusal(
                        errors.SELINUX_CONTEXT_UNKNOWN,
                        f"Could not determine security context for '{name}'",
                    )
                return "ay", label.rstrip(b"\0")
            case "GetConnectionCredentials", [str(name)]:
                connection = self._connection(name, "credentials")
                if connection is not None and self.takes_fds:
                    return self._ask(call, ProcessOf(0, connection.id), held=False)
                return "a{sv}", self._credentials(connection)
            case "ReloadConfig", []:
                return self._ask(call, ReloadConfig(0))
            case "GetId", []:
                return "s", self.bus.guid
            case "Get", [str(interface), str(member)]:
                return "v", self._property(interface, member)
            case "GetAll", [str(interface)]:
                return "a{sv}", self._properties(interface)
            case "Set", [str(interface), str(member)]:
                self._property(interface, member)
                raise Refusal(
                    errors.PROPERTY_READ_ONLY, f"Property '{interface}.{member}' cannot be set"
                )
            case "Introspect", []:
                return "s", introspect(call.path)
            case "BecomeMonitor", [list(rules), int(flags)]:
                if flags:
                    raise Refusal(
                        errors.INVALID_ARGS, "BecomeMonitor does not support any flags yet"
                    )
                for rule in rules:
                    _check_rule(rule)
                self._held_back = []
                return self._ask(call, BecomeMonitor(0, tuple(rules)))
            case "GetStats", []:
                return self._ask(call, Statistics(0))
            case "GetConnectionStats", [str(name)]:
                request = CountConnection(0, self._counted(name))
                return self._ask(call, request, held=False)
            case "GetAllMatchRules", []:
                return "a{sas}", statistics.match_rules(self.replica)
            case "Add", [str(name), list(lines), bool(bound)]:
                try:
                    policy = endpoints.encode(endpoints.parse(name, lines))
                except endpoints.EndpointError as error:
                    raise Refusal(errors.INVALID_ARGS, str(error)) from None
                return self._ask(call, AddEndpoint(0, name, policy, bound), held=False)
            case "Remove", [str(name)]:
                return self._ask(call, RemoveEndpoint(0, name))
            case "List", []:
                return self._ask(call, ListEndpoints(0))
            case "GetMachineId", []:
                return "s", self.bus.machine_id
            case "Ping", []:
                return ("",)
        raise AssertionError(f"{call.member} is in the table of methods, but is not done here")

    def _ask(self, call: Call, request: Request, *, held: bool = True) -> Ask | tuple[Any, ...]:
        self.pending += held
        if isinstance(request, StartService):
            self.look_for(request.name)
        return Ask(request, Token(call, request, held))

    def _check_request(self, name: str) -> None:
        if not names.is_bus_name(name):
            raise Refusal(errors.INVALID_ARGS, f'Requested bus name "{name}" is not valid')
        if name.startswith(":"):
            raise Refusal(
                errors.INVALID_ARGS,
                f"Cannot acquire a service starting with ':' such as \"{name}\"",
            )
        if name == BUS_NAME:
            raise Refusal(
                errors.INVALID_ARGS,
                f'Connection "{self.name}" is not allowed to own the service "{name}"because it'
                " is reserved for D-Bus' use only",
            )

    def _connection(self, name: str, what: str) -> Connection | None:
        """The owner of `name`, None for the bus itself. Raises Refusal if there is none."""
        owner = self.seen.owner(name)
        if owner is None:
            raise _nobody(what, name)
        return None if owner == BUS_ID else self.replica.connections[owner]

    def _credentials(self, connection: Connection | None) -> dict[str, tuple[str, Any]]:
        if connection is None:
            found: dict[str, tuple[str, Any]] = {
                "ProcessID": ("u", self.bus.pid),
                "UnixUserID": ("u", self.bus.owner),
            }
            label = self.bus.label
        else:
            credentials = connection.credentials
            found = {}
            if credentials.pid > 0:
                found["ProcessID"] = ("u", credentials.pid)
            label = b"" if credentials.anonymous else credentials.label
            if not credentials.anonymous:
                found["UnixUserID"] = ("u", credentials.uid)
                groups = sorted({credentials.gid, *credentials.groups})
                found["UnixGroupIDs"] = ("au", groups)
            if credentials.endpoint:
                found["org.kbusd.Endpoint"] = ("s", credentials.endpoint)
        if label:
            found["LinuxSecurityLabel"] = ("ay", label.rstrip(b"\0") + b"\0")
        return found

    # -- properties and statistics -----------------------------------------------------------

    def _properties(self, interface: str) -> dict[str, tuple[str, Any]]:
        if interface not in INTERFACES:
            raise Refusal(errors.UNKNOWN_INTERFACE, f'Interface "{interface}" not found')
        if interface != BUS:
            return {}
        features = ["ActivatableServicesChanged"]
        if self.bus.apparmor:
            features.append("AppArmor")
        features.append("HeaderFiltering")
        if self.bus.selinux:
            features.append("SELinux")
        if self.bus.systemd_activation:
            features.append("SystemdActivation")
        return {"Features": ("as", features), "Interfaces": ("as", [MONITORING, STATS])}

    def _property(self, interface: str, member: str) -> tuple[str, Any]:
        try:
            return self._properties(interface)[member]
        except KeyError:
            raise Refusal(
                errors.UNKNOWN_PROPERTY, f'Property "{interface}.{member}" not found'
            ) from None

    def _counted(self, name: str) -> int:
        """Whose statistics are wanted. Raises Refusal."""
        if name == BUS_NAME:
            raise Refusal(
                errors.INVALID_ARGS,
                f'GetConnectionStats is not meaningful for the message bus "{name}" itself',
            )
        connection = self._connection(name, "statistics")
        assert connection is not None
        return connection.id

    # -- the broker's answers ----------------------------------------------------------------

    def answer(
        self,
        token: Token,
        message: Reply | Failure,
        snapshot: bytes = b"",
        fds: tuple[int, ...] = (),
    ) -> list[Action]:
        """What to do when the broker has answered; `snapshot` is what came with Hello's reply, if not before; `fds`
        are what came with others, and go into a Return.

        All log entries that the request caused must have been given to `entry` before, except
        for Hello: there the log is read from the snapshot's position on, afterwards.
        Raises msgspec.MsgspecError, ReplicaError or TypeError if the broker talks nonsense."""
        self.pending -= token.held
        call = token.call
        if isinstance(token.request, StartService):
            self._unknown.discard(token.request.name)
        if isinstance(message, Failure):
            if isinstance(token.request, Hello):
                self._hello_asked = False
            actions = self._error(call, message.error, message.message)
        else:
            actions = self._confirmed(call, token.request, message.value, snapshot, fds)
        if isinstance(token.request, BecomeMonitor) and self._held_back is not None:
            actions += self._held_back
            self._held_back = None
        return actions + self._resume()

    def look_for(self, name: str) -> None:
        """The broker is asked for this service: unless we know that there is one, it will look for it."""
        if name not in self.replica.activatable:
            self._unknown.add(name)

    def found(self, name: str) -> list[Action]:
        """It has answered that."""
        self._unknown.discard(name)
        return self._resume()

    def _resume(self) -> list[Action]:
        """Start the calls that waited, as far as they may go now."""
        actions: list[Action] = []
        while (
            self._waiting
            and not (self.pending or self._unknown)
            and (self._registered or not self._hello_asked)
        ):
            actions += self._start(self._waiting.popleft())
        return actions

    def _confirmed(
        self, call: Call, request: Request, value: Any, snapshot: bytes, fds: tuple[int, ...]
    ) -> list[Action]:
        match request:
            case Hello():
                self.replica.me = _id(value)
                if snapshot:
                    self.load(snapshot)
                return [
                    *self._return(call, "s", self.name),
                    self._signal("NameAcquired", self.name, destination=self.name),
                ]
            case RequestName() | ReleaseName() | StartService():
                return self._return(call, "u", _code(value))
            case AddEndpoint():
                return self._return(call, "s", msgspec.convert(value, str))
            case ListEndpoints():
                listed = msgspec.convert(value, list[tuple[str, str, list[str]]])
                return self._return(call, "a(ssas)", listed)
            case Statistics():
                reported = msgspec.convert(value, dict[str, int])
                return self._return(call, "a{sv}", statistics.of_bus(self.replica, reported))
            case ProcessOf(id=id):
                connection = self.replica.connections.get(id)
                if connection is None:
                    return self._gone(call, "credentials", id)
                found = self._credentials(connection)
                if fds:
                    found["ProcessFD"] = ("h", 0)
                return [Return(call.serial, "a{sv}", _serialise("a{sv}", (found,)), fds)]
            case CountConnection(id=id):
                reported = msgspec.convert(value, dict[str, int])
                connection = self.replica.connections.get(id)
                if connection is None:
                    return self._gone(call, "statistics", id)
                return self._return(call, "a{sv}", statistics.of_connection(connection, reported))
            case _:
                return self._return(call)

    def load(self, snapshot: bytes) -> None:
        """Take over this state of the bus. Raises MsgspecError or ReplicaError."""
        self.replica.load(_decode_snapshot(snapshot))

    def _gone(self, call: Call, what: str, id: int) -> list[Action]:
        """Whom the call asks about has gone meanwhile."""
        refusal = _nobody(what, unique_name(id))
        return self._error(call, refusal.name, refusal.text)

    # -- the log -----------------------------------------------------------------------------

    def entry(self, entry: LogEntry) -> list[Action]:
        """Apply the entry to the replica; the signals that the client gets for it, in order.

        Raises ReplicaError if the log contradicts itself."""
        replica = self.replica
        signals: list[Signal | None] = []
        match entry:
            case NameOwnerChanged(name, old, new):
                signals = self._owner_changed(name, old, new)
            case ConnectionAdded(id):
                if id != self.me:
                    signals = self._owner_changed(unique_name(id), NOBODY, id)
            case ConnectionRemoved(id) | MonitorAttached(id):
                if id in replica.connections:
                    signals = self._owner_changed(unique_name(id), id, NOBODY)
            case ActivatableChanged():
                signals = [self._broadcast("ActivatableServicesChanged")]
        replica.apply(entry)
        sent: list[Action] = [signal for signal in signals if signal is not None]
        if isinstance(entry, ActivatableChanged):
            self._unknown.difference_update(replica.activatable)  # they are started now
        if self._held_back is not None:
            self._held_back += sent
            return []
        if isinstance(entry, ActivatableChanged) or (
            isinstance(entry, ConnectionAdded) and entry.id == self.me
        ):
            sent += self._resume()
        return sent

    def resync(self, snapshot: bytes) -> list[Action]:
        """Go on from a snapshot after entries were missed; the signals that make up for them.

        Changes that have been undone since are left out. Raises MsgspecError or ReplicaError."""
        replica = self.replica
        old_names, old_ids = dict(replica.names), set(replica.connections)
        old_activatable = replica.activatable
        state = _decode_snapshot(snapshot)
        replica.load(state)
        signals: list[Signal | None] = []
        for id in sorted(replica.connections.keys() - old_ids - {self.me}):
            signals += self._owner_changed(unique_name(id), NOBODY, id)
        for name in sorted(old_names.keys() | replica.names.keys()):
            old, new = old_names.get(name, NOBODY), replica.names.get(name, NOBODY)
            if old != new:
                signals += self._owner_changed(name, old, new)
        for id in sorted(old_ids - replica.connections.keys()):
            signals += self._owner_changed(unique_name(id), id, NOBODY)
        if replica.activatable != old_activatable:
            signals.append(self._broadcast("ActivatableServicesChanged"))
        self._unknown.difference_update(replica.activatable)
        return [signal for signal in signals if signal is not None] + self._resume()

    def _owner_changed(self, name: str, old: int, new: int) -> list[Signal | None]:
        """The order is dbus-daemon's: the loser first, then everybody, then the winner."""
        if old == self.me in self.replica.monitors:
            return [
                self._unicast("NameLost", name, old)
            ]  # of what others are told it sees none yet
        if self.replica.deaf and self.me not in (old, new):
            return []  # as most are whose log is replayed at Hello
        return [
            self._unicast("NameLost", name, old),
            self._broadcast(
                "NameOwnerChanged",
                name,
                unique_name(old) if old else "",
                unique_name(new) if new else "",
            ),
            self._unicast("NameAcquired", name, new),
        ]

    def _unicast(self, member: str, name: str, receiver: int) -> Signal | None:
        if receiver == NOBODY:
            return None
        destination = unique_name(receiver)
        if receiver == self.me or self._monitored(member, destination, (name,)):
            return self._signal(member, name, destination=destination)
        return None

    def _broadcast(self, member: str, *values: str) -> Signal | None:
        subscribed, _ = self.replica.receives(
            SIGNAL, BUS_ID, BUS_PATH, BUS_NAME, member, lambda: values
        )
        if subscribed or self._monitored(member, None, values):
            return self._signal(member, *values, destination=None)
        return None

    def _monitored(self, member: str, destination: str | None, values: Sequence[str]) -> bool:
        """Whether the client is a monitor that wants to see this signal."""
        if self.me not in self.replica.monitors:
            return False
        monitors, _ = self.replica.watching(
            SIGNAL, BUS_ID, destination, BUS_PATH, BUS_NAME, member, lambda: values
        )
        return self.me in monitors

    def _signal(self, member: str, *values: str, destination: str | None) -> Signal:
        signature = "s" * len(values)
        return Signal(member, signature, _serialise(signature, values), destination)


def _check_release(name: str) -> None:
    if not names.is_bus_name(name):
        raise Refusal(errors.INVALID_ARGS, f'Given bus name "{name}" is not valid')
    if name.startswith(":"):
        raise Refusal(
            errors.INVALID_ARGS, f"Cannot release a service starting with ':' such as \"{name}\""
        )
    if name == BUS_NAME:
        raise Refusal(
            errors.INVALID_ARGS, f"Cannot release the {name} service because it is owned by the bus"
        )


def _check_rule(text: str) -> match.MatchRule:
    try:
        return match.parse(text)
    except match.MatchError as error:
        raise Refusal(error.error, str(error)) from None


def _nobody(what: str, name: str) -> Refusal:
    return Refusal(errors.NAME_HAS_NO_OWNER, f"Could not get {what} of name '{name}': no such name")


def _text(label: bytes) -> str:
    return label.rstrip(b"\0").decode("ascii", "replace")


def _id(value: object) -> int:
    """The id in Hello's reply. Raises TypeError."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if not isinstance(value, int) or value <= NOBODY:
        raise TypeError(f"the broker answered Hello with {value!r}")
    return value


def _code(value: object) -> int:
    """A result code of the broker. Raises TypeError."""
    if not isinstance(value, int) or not 0 <= value <= _MAX_U32:
        raise TypeError(f"the broker answered with {value!r} in place of a result code")
    return value


@lru_cache(maxsize=64)
def _types(signature: str) -> tuple[Any, ...]:
    """jeepney's codec of each argument in `signature` (ours, never a client's)."""
    rest = list(signature)
    types = []
    while rest:
        types.append(parse_signature(rest))
    return tuple(types)


def _arguments(call: Call, method: Method) -> list[Any]:
    """The values in a checked body, up to the first variant: no method looks at one."""
    endianness = Endianness.big if call.big_endian else Endianness.little
    values: list[Any] = []
    position = 0
    for codec in _types(method.signature.partition("v")[0]):
        value, position = codec.parse_data(call.body, position, endianness)
        values.append(value)
    return values


def _serialise(signature: str, values: Sequence[Any]) -> bytes:
    if signature == "s":
        text: bytes = values[0].encode()
        return len(text).to_bytes(4, "little") + text + b"\0"
    body = b""
    fds: list[int] = []  # a value of type h is the index of the next
    for codec, value in zip(_types(signature), values, strict=True):
        body += codec.serialise(value, len(body), Endianness.little, fds)
    return body
