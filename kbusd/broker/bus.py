"""The broker's core: every change of the bus's state, in one thread, without I/O.

Takes what workers, supervisor and launcher say, checks it, and makes it so by the calls of
`outside.py`. The order is always: change the state, write it to the log, wake whom it concerns,
answer. What a worker says is hostile: what an honest one never does raises Violation, what a
client may try and not get raises Refused.

    Hello            policy and limits, next id, ConnectionAdded, snapshot
    RequestName ...  registry.py      AddMatch ...  matches.py
    StartService ... activation.py    Introduce ... introductions.py    Stuck ... probes.py
    end of a worker  names pass on, ConnectionRemoved, peers are woken
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from msgspec import structs

from kbusd.broker.activation import Activation
from kbusd.broker.connection import (
    MAX_COMPLAINTS,
    MAX_WAITING,
    NOT_YET,
    OPEN,
    Behind,
    Connection,
)
from kbusd.broker.counts import Counts
from kbusd.broker.custom_endpoints import CustomEndpoints
from kbusd.broker.endpoints import Endpoints
from kbusd.broker.filtered import Shown
from kbusd.broker.introductions import RING_FDS, Introductions
from kbusd.broker.labels import Labels
from kbusd.broker.matches import ACTIVATABLE_CHANGED, OWNER_CHANGED, Matches, parse
from kbusd.broker.name_policy import NamePolicy
from kbusd.broker.outside import Outside
from kbusd.broker.probes import Probes
from kbusd.broker.refusal import (
    ACCESS_DENIED,
    FAILED,
    FILE_EXISTS,
    INVALID_ARGS,
    LIMITS_EXCEEDED,
    NAME_HAS_NO_OWNER,
    NO_MEMORY,
    Refused,
    Violation,
)
from kbusd.broker.registry import Change, Registry
from kbusd.kdbus.abi import POLICY_OWN, POLICY_TALK
from kbusd.policy.configuration import Configuration
from kbusd.policy.decide import ClientPolicy, explain
from kbusd.rings.entries import (
    ActivatableChanged,
    AddEndpoint,
    AddMatch,
    AskAbout,
    BecomeMonitor,
    ConnectionAdded,
    ConnectionRemoved,
    CountConnection,
    Counted,
    Credentials,
    CustomChanged,
    Describe,
    Failure,
    FetchPolicy,
    FetchSnapshot,
    Hello,
    Introduce,
    Introduced,
    Leaving,
    ListEndpoints,
    MatchAdded,
    MatchRemoved,
    MonitorAttached,
    NameOwnerChanged,
    NamePolicyChanged,
    PolicyChanged,
    PolicyEntry,
    ProcessOf,
    QueueChanged,
    ReleaseName,
    ReloadConfig,
    RemoveEndpoint,
    RemoveMatch,
    Reply,
    Request,
    RequestName,
    Running,
    SetEndpoint,
    SetPolicy,
    Share,
    Snapshot,
    StartService,
    State,
    Statistics,
    Stuck,
    UpdateEnvironment,
)
from kbusd.wire import names

BUS_NAME = "org.freedesktop.DBus"
NOBODY = 0
CLOSED = "kdbus"  # <type> of a bus on which nothing but kdbus's policy allows anything
MAX_MONITOR_RULES = 512
MAX_HELLO_FLAGS = 15  # kdbus.connection(7): four flags
ACTIVATOR, HOLDER, KDBUS_MONITOR = 2, 4, 8  # three of them
MAX_ABOUT = 16 << 10
MAX_TOLD = 16 << 10
FAULTY = (FAILED, "The configuration is faulty, the one in force stays; see the log of the bus")
GRACE_SECONDS = 1.0  # for the worker to say first that its client did not authenticate
_FDS = {Introduce: RING_FDS, Introduced: RING_FDS}
_BEFORE_HELLO = (Hello, Leaving, SetEndpoint, FetchPolicy)
_FOR_MONITORS = (
    Describe,
    AskAbout,
    Leaving,
    FetchSnapshot,
    FetchPolicy,
    Introduce,
    Introduced,
    Stuck,
    Running,
    Counted,
)
_FOR_ORDINARY = (RequestName, ReleaseName, AddMatch, BecomeMonitor)


class Bus:
    """One bus. `owner` is the uid that the bus belongs to (beside root), `address` is for services.

    `connections` is by worker number and holds spare workers too, `by_id` those that said Hello."""

    def __init__(
        self, outside: Outside, configuration: Configuration, address: str, owner: int
    ) -> None:
        self._outside = outside
        self._owner = owner
        self.registry = Registry()
        self.matches = Matches()
        self.introductions = Introductions(outside)
        self.probes = Probes(outside)
        self.counts = Counts(outside)
        self.activation = Activation(
            outside, address, self._is_owned, self.reload, lambda: self._reload_asked
        )
        self.connections: dict[int, Connection] = {}
        self.by_id: dict[int, Connection] = {}
        self.monitors: set[Connection] = set()
        self.name_policy = NamePolicy(owner, closed=configuration.type == CLOSED)
        self.custom = CustomEndpoints()
        self.labels = Labels(outside)
        self.endpoints = Endpoints(outside, self._discard_knowing)
        self.generation = 0
        self._missed = False  # the one of this generation could not be had
        self._reloading: list[tuple[Connection, int]] = []  # answered by the next configuration
        self._reload_next: list[tuple[Connection, int]] = []  # asked while that was being read
        self._reload_asked = False
        self._reload_again = False
        self._next_id = 1  # 0 is nobody
        self._per_uid: Counter[Share] = Counter()
        self._incomplete: dict[int, float] = {}  # worker -> until when its client may say Hello
        self._policies: dict[tuple[int, int, tuple[int, ...], bytes, bool], ClientPolicy] = {}
        self._peaks = {"names": 0, "matches": 0, "names_each": 0, "matches_each": 0}
        self._asked = {"bus": 0, "connection": 0}  # for statistics, so often
        self._configure(configuration)

    # -- the supervisor's word ------------------------------------------------------------------

    def worker_started(self, worker: int, pid: int, files: bool = False) -> None:
        connection = self.connections[worker] = Connection(worker, pid)
        if not files and not self.endpoints.existed:
            self._tell_state(connection)

    def _discard_knowing(self) -> None:
        """No worker of a client who comes by an endpoint may know what there is on the bus, as the spare ones do."""
        for connection in self.connections.values():
            if connection.credentials is None and connection.told is not None:
                connection.told = None
                self._outside.discard(connection.worker)

    def assigned(
        self,
        worker: int,
        credentials: Credentials,
        hasty: bool = True,
        custom: int = 0,
        pidfd: int = -1,
    ) -> None:
        """The worker serves a client of these credentials from now on, who is to say Hello in time
        if it is `hasty`, and may be behind a custom endpoint. `pidfd` is ours to close, -1 for none."""
        connection = self.connections.get(worker)
        if connection is None:
            if pidfd >= 0:
                self._outside.close(pidfd)
        else:
            connection.credentials = credentials
            connection.custom = custom
            connection.file = not hasty
            connection.pidfd = pidfd
            patience = self._limits["auth_timeout"] / 1000 + GRACE_SECONDS
            if hasty:
                self._incomplete[worker] = self._outside.now() + patience
                old = connection.told is None or not self._outside.reaches(connection.told)
                if old and self._behind(connection) == OPEN:
                    self._tell_state(connection)

    def _tell_state(self, connection: Connection) -> None:
        """What its worker needs to know at Hello, as long as that makes a short record: it waits in the
        worker's line, maybe for ever, until a client comes and has authenticated."""
        state, at = self._outside.state()
        if len(state) <= MAX_TOLD:
            self._outside.send(connection.worker, State(state, self._next_id))
            connection.told = at

    def entering(self, worker: int, credentials: Credentials) -> None:
        """Who says HELLO by a file need not be who has opened it."""
        connection = self.connections.get(worker)
        if connection is not None and connection.file and connection.id == NOT_YET:
            connection.credentials = credentials

    def endpoint_made(self, worker: int) -> None:
        """Its client has made a custom endpoint."""
        if worker in self.connections:
            self.custom.made(worker)

    def ready(self) -> None:
        """The supervisor hears us from now on."""
        self.endpoints.configure(self._configured.endpoints)

    def reload(self) -> None:
        """The configuration is to be read again, as it is from now on: the admin wants it, or it has changed."""
        self._reload_again = self._reload_asked
        self._read_configuration()

    def reconfigure(self, configuration: Configuration | None, generation: int = 0) -> None:
        """A configuration was read (None: it was no good); who asked for it is answered. If it says what the one in
        force says, it has the same generation, and nobody has to fetch it."""
        if configuration is None:
            self._missed = self._missed or generation > self.generation
            self.generation = max(self.generation, generation)
        else:
            sockets = self._configured.sockets
            self._configure(configuration)
            moved = [
                each.name
                for each in configuration.endpoints
                if sockets.get(each.name) != configuration.sockets.get(each.name)
            ]
            self._close(self.endpoints.configure(configuration.endpoints, moved))
            if self._missed or generation != self.generation:
                self._missed, self.generation = False, generation
                self._outside.append(PolicyChanged(generation))
            self._activatable_changed()  # said each time, as dbus-daemon does
        waiting, self._reloading, self._reload_next = self._reloading, self._reload_next, []
        self._reload_asked = False
        again, self._reload_again = self._reload_again, False
        if self._reloading or again:
            self._read_configuration()
        for connection, request in waiting:
            connection.waiting -= 1
            answer = Reply(request) if configuration is not None else Failure(request, *FAULTY)
            self._outside.send(connection.worker, answer)
        self.activation.watching.read(bool(self._reloading or again))

    def leaves_unread(self, worker: int) -> None:
        """A worker does not take what it is told; the admin hears of it once."""
        connection = self.connections.get(worker)
        if connection is not None and not connection.unread:
            connection.unread = True
            self._outside.say(
                f"{connection} leaves what it is told unread, and is not heard till it reads"
            )

    def labels_changed(self) -> None:
        """Another SELinux policy, or mode, is in force."""
        if self.labels.policy_changed():
            self._outside.say("SELinux keeps other clients apart from now on")

    def gone(self, worker: int, reason: str = "") -> None:
        """The worker has ended or its line is closed. What it held passes on."""
        connection = self.connections.pop(worker, None)
        self._incomplete.pop(worker, None)
        if connection is None:
            return
        if connection.pidfd >= 0:
            self._outside.close(connection.pidfd)
        self.probes.gone(connection)
        if self.custom.remove(worker):
            self._outside.append(CustomChanged(worker, ()))
        self.counts.gone(connection)
        said = connection.last_word if connection.last_word is not None else reason
        if said:
            self._outside.say(f"disconnected {connection}: {said}")
        if connection.id == NOT_YET:
            return
        del self.by_id[connection.id]
        assert connection.credentials is not None
        self._leave_user(connection.credentials)
        self._reloading = [each for each in self._reloading if each[0] is not connection]
        self._reload_next = [each for each in self._reload_next if each[0] is not connection]
        self.activation.gone(connection)
        if self.matches.remove_all(connection):  # else dbus-daemon does not look for any
            self._forget_rules_naming(connection)
        self._close(self.endpoints.gone(connection))
        self.name_policy.remove(connection)
        self._release(connection, reversed(connection.names.copy()))
        was_monitor = connection in self.monitors
        self.monitors.discard(connection)
        self._outside.append(ConnectionRemoved(connection.id))
        self.labels.leave(connection.credentials.label)
        self._wake(self.introductions.gone(connection))
        if not was_monitor:
            name = connection.unique_name
            self._wake(self.matches.watching(OWNER_CHANGED, (name, name, "")))
        self._wake(self.monitors)

    # -- a worker's requests -------------------------------------------------------------------

    def handle(self, connection: Connection, message: Request, fds: Sequence[int]) -> None:
        """Do what a worker asks; `fds` stay the caller's. Raises Violation."""
        try:
            self._check(connection, message, len(fds))
            self._dispatch(connection, message, fds)
        except Refused as refused:
            self._refuse(connection, message, refused.error, refused.text)
        except OSError as error:  # of making a snapshot or a side socket, before anything changed
            self._outside.say(f"{connection} got no {type(message).__name__}: {error.strerror}")
            self._refuse(connection, message, NO_MEMORY, f"The bus is short of: {error.strerror}")

    def _refuse(self, connection: Connection, message: Request, error: str, text: str) -> None:
        self._outside.send(connection.worker, Failure(message.request, error, text))

    def _check(self, connection: Connection, message: Request, fds: int) -> None:
        kind = type(message)
        if fds != _FDS.get(kind, 0):
            raise Violation(f"sent {fds} descriptors with {kind.__name__}")
        if connection.id == NOT_YET and kind not in _BEFORE_HELLO:
            raise Violation(f"sent {kind.__name__} before Hello")
        if (connection.kdbus or 0) & (ACTIVATOR | HOLDER) and kind in _FOR_ORDINARY:
            raise Violation(f"is no ordinary connection of kdbus and sent {kind.__name__}")
        if connection.monitor is not None and kind not in _FOR_MONITORS:
            raise Violation(f"is a monitor and sent {kind.__name__}")
        try:
            self.endpoints.check(connection, message)
        except Refused as refused:  # an honest worker does not ask
            self._complain(connection, f"the worker of {connection}: {refused.text}")
            raise

    def _dispatch(self, connection: Connection, message: Request, fds: Sequence[int]) -> None:
        value: object = None
        match message:
            case Hello():
                self._hello(connection, message)
                return
            case RequestName():
                value = self._request_name(connection, message.name, message.flags)
            case ReleaseName():
                value = self._release_name(connection, message.name)
            case AddMatch():
                self._add_match(connection, message.rule)
            case RemoveMatch():
                written = self.matches.remove(connection, message.rule)
                self._outside.append(MatchRemoved(connection.id, written))
            case StartService():
                if not self.custom.may(connection, POLICY_TALK, (message.name,)):
                    raise Refused(ACCESS_DENIED, f"{connection} may not talk to {message.name}")
                self.activation.start(connection, message)
                return
            case Introduce():
                peer = self.by_id.get(message.peer)
                self._check_introduction(connection, peer)
                self.introductions.introduce(connection, message, fds, peer)
                return
            case Introduced():
                self.introductions.introduced(connection, message, fds)
                return
            case FetchSnapshot():
                snapshot = self._snapshot(connection)
                self._outside.send(connection.worker, Reply(message.request), snapshot)
                return
            case FetchPolicy():
                reply = Reply(message.request, self.generation)
                self._outside.send(connection.worker, reply, [self._outside.policy()])
                return
            case BecomeMonitor():
                self._become_monitor(connection, message.rules)
            case UpdateEnvironment():
                self._privileged(connection, "UpdateActivationEnvironment")
                self.activation.update_environment(message.variables)
            case ReloadConfig():
                self._reload(connection, message.request)
                return
            case Statistics():
                value = self.statistics()
            case Stuck():
                accused = self.by_id.get(message.peer)
                if accused is not None and self.introductions.know(connection, accused):
                    self.probes.stuck(accused)
                return
            case Running():
                self.probes.running(connection)
                return
            case ProcessOf():
                asked = self._seen(connection, message.id)
                pidfds = [asked.pidfd] if asked is not None and asked.pidfd >= 0 else []
                self._outside.send(connection.worker, Reply(message.request), pidfds)
                return
            case CountConnection():
                self._count(connection, message)
                return
            case Counted():
                self.counts.counted(connection, message)
                return
            case SetPolicy():
                self._set_policy(connection, message.policy)
            case SetEndpoint():
                self.custom.set(connection, message.policy)
                self._outside.append(CustomChanged(connection.worker, message.policy))
            case AddEndpoint():
                self._privileged(connection, "Add")
                self.endpoints.add(connection, message)
                return
            case RemoveEndpoint():
                self._privileged(connection, "Remove")
                self.endpoints.remove(message.name)
                self._close([message.name])
            case ListEndpoints():
                self._privileged(connection, "List")
                value = self.endpoints.list()
            case Describe():
                connection.about = _about(message.about)
            case AskAbout():
                asked = self.by_id.get(message.id)
                seen = asked is not None and self.custom.may_see(connection, asked)
                value = asked.about if asked is not None and seen else b""
            case Leaving():
                connection.last_word = message.reason[:512]
                return
        answer = Reply(message.request, value, self._outside.stamp())
        self._outside.send(connection.worker, answer)

    def _hello(self, connection: Connection, message: Hello) -> None:
        credentials = connection.credentials
        if credentials is None:
            raise Violation("said Hello without a client")
        if connection.id != NOT_YET:
            raise Refused(FAILED, "Already handled an Hello message")
        if message.kdbus is not None and not 0 <= message.kdbus <= MAX_HELLO_FLAGS:
            raise Violation(f"said Hello with the kdbus flags {message.kdbus}")
        if message.anonymous:
            # Anybody may be: so all that a worker gets by claiming it, its client would have got by asking.
            if message.kdbus is not None or connection.file:
                raise Violation("said that a client of kdbus is anonymous")
            if not self._configured.lets_anonymous_in:
                raise Refused(ACCESS_DENIED, "Anonymous clients are not allowed (allow_anonymous)")
            credentials = structs.replace(credentials, anonymous=True)
        policy = self._policy_for(credentials)
        verdict = policy.can_connect()
        if not verdict.allowed:
            self._outside.say(f"refused {connection}: {explain(verdict)}")
            raise Refused(
                ACCESS_DENIED,
                f"A client of uid {credentials.uid} is not allowed to connect to this bus",
            )
        if not self.labels.may_join(credentials.label):
            label = credentials.label.decode(errors="replace")
            self._outside.say(f"refused {connection}: SELinux (dbus send_msg) of label {label!r}")
            raise Refused(ACCESS_DENIED, "An SELinux policy does not let it talk to this bus")
        if full := self._full(credentials):
            self._outside.say(f"refused {connection}: {full}")
            raise Refused(LIMITS_EXCEEDED, full)
        kind = (message.kdbus or 0) & (ACTIVATOR | HOLDER | KDBUS_MONITOR)
        self._check_kind(connection, message, kind)
        # Before the entry, which its replay shows; and before anything changes, as it may fail.
        told = connection.told
        knows = told is not None and self._outside.reaches(told)
        snapshot = [] if knows else self._snapshot(connection)
        if message.policy:
            self.name_policy.set(connection, self._next_id, message.policy)
        connection.about = _about(message.about)
        connection.credentials, connection.policy = credentials, policy
        connection.kdbus = message.kdbus
        connection.id = self._next_id
        self._next_id += 1
        for each in {credentials.uid, credentials.share}:
            self._per_uid[each] += 1
        self.by_id[connection.id] = connection
        self.labels.join(credentials.label)
        if kind == KDBUS_MONITOR:  # nobody hears of it
            connection.monitor = ()
            self.monitors.add(connection)
            self._outside.append(MonitorAttached(connection.id, (), message.kdbus, credentials))
            self._outside.say(f"{connection} is a monitor")
        else:
            self._outside.append(
                ConnectionAdded(connection.id, credentials, message.kdbus, connection.custom)
            )
        if message.policy:
            self._outside.append(NamePolicyChanged(connection.id, message.policy))
        if kind == ACTIVATOR:
            self._owner_changed(self.registry.activate(connection, message.name))
        self._outside.send(connection.worker, Reply(message.request, connection.id), snapshot)
        # What its client need not wait for.
        self._peak_names(connection)
        self._incomplete.pop(connection.worker, None)
        self._outside.joined(connection.worker)
        if kind != KDBUS_MONITOR:
            name = connection.unique_name
            self._wake(self.matches.watching(OWNER_CHANGED, (name, "", name)))
            self._wake(self.monitors)

    def _full(self, credentials: Credentials) -> str:
        """Which limit keeps one more client of these credentials out; "": none."""
        most, uid = self._limits["max_connections_per_user"], credentials.uid
        if len(self.by_id) >= self._limits["max_completed_connections"]:
            return "The maximum number of active connections has been reached"
        if self._per_uid[uid] >= most:
            return f"The maximum number of active connections for UID {uid} has been reached"
        if credentials.endpoint and self._per_uid[credentials.share] >= most // 2:
            return f"Half of the connections that UID {uid} may have came by one endpoint already"
        return ""

    def _check_kind(self, connection: Connection, message: Hello, kind: int) -> None:
        """Whether a client may be a kdbus connection of this kind."""
        if kind:
            self._privileged(connection, "HELLO of this kind")
        if kind not in (0, ACTIVATOR, HOLDER, KDBUS_MONITOR):
            raise Violation(f"said Hello with the kdbus flags {message.kdbus}")
        if message.policy and kind not in (ACTIVATOR, HOLDER):
            raise Violation("brought policy, and is of no kind to do so")
        if kind == ACTIVATOR:
            if not names.is_bus_name(message.name) or message.name[0] == ":":
                raise Violation(f"said Hello as the activator of {message.name!r}")
            if message.name == BUS_NAME:
                raise Refused(INVALID_ARGS, f"{BUS_NAME} is the bus's own")
            if message.name in self.registry.activators:
                raise Refused(FILE_EXISTS, f"{message.name} has an activator already")

    def _set_policy(self, connection: Connection, policy: tuple[PolicyEntry, ...]) -> None:
        if connection.kdbus is None or not connection.kdbus & HOLDER:
            raise Violation("set policy, and is no policy holder")
        self.name_policy.set(connection, connection.id, policy)
        self._outside.append(NamePolicyChanged(connection.id, policy))

    def _request_name(self, connection: Connection, name: str, flags: int) -> int:
        if not names.is_bus_name(name):
            raise Refused(INVALID_ARGS, f'Requested bus name "{name}" is not valid')
        if name.startswith(":"):
            raise Refused(
                INVALID_ARGS, f"Cannot acquire a service starting with ':' such as \"{name}\""
            )
        refusal = f'Connection "{connection.unique_name}" is not allowed to own '
        if name == BUS_NAME:
            raise Refused(
                INVALID_ARGS,
                f'{refusal}the service "{name}"because it is reserved for D-Bus\' use only',
            )
        assert connection.policy is not None
        verdict = connection.policy.can_own(name)
        if not verdict.allowed:
            self._complain(connection, f"{connection} may not own {name}: {explain(verdict)}")
            raise Refused(
                ACCESS_DENIED,
                f'{refusal}the service "{name}" due to security policies in the configuration file',
            )
        assert connection.credentials is not None
        custom = connection.custom != 0
        allowed = self.custom.may(connection, POLICY_OWN, (name,))
        if not allowed or not self.name_policy.may_own(connection.credentials, name, custom):
            self._complain(connection, f"{connection} may not own {name}: policy of a kdbus client")
            raise Refused(ACCESS_DENIED, f'{refusal}the service "{name}" due to its policy')
        context = self._contexts.get(name)
        target = None if context is None else context.encode()
        if not self._outside.allows(connection.credentials.label, target, "acquire_svc"):
            label = connection.credentials.label.decode(errors="replace")
            why = f"SELinux does not let {label} acquire_svc of {context or 'the bus'}"
            self._complain(connection, f"{connection} may not own {name}: {why}")
            raise Refused(ACCESS_DENIED, f'{refusal}the service "{name}" due to an SELinux policy')
        limit = self._limits["max_names_per_connection"]
        if len(connection.names) + 1 >= limit:  # the unique name counts
            raise Refused(
                LIMITS_EXCEEDED,
                f"{refusal}more services (increase limits in configuration file if required;"
                f" max_names_per_connection={limit})",
            )
        code, change = self.registry.request(connection, name, flags)
        self._owner_changed(change)
        self._peak_names(connection)
        return code

    def _release_name(self, connection: Connection, name: str) -> int:
        if not names.is_bus_name(name):
            raise Refused(INVALID_ARGS, f'Given bus name "{name}" is not valid')
        if name.startswith(":"):
            raise Refused(
                INVALID_ARGS, f"Cannot release a service starting with ':' such as \"{name}\""
            )
        if name == BUS_NAME:
            raise Refused(
                INVALID_ARGS,
                f"Cannot release the {name} service because it is owned by the bus",
            )
        code, change = self.registry.release(connection, name)
        self._owner_changed(change)
        return code

    def _add_match(self, connection: Connection, rule: str) -> None:
        limit = self._limits["max_match_rules_per_connection"]
        if parse(rule).eavesdrop:
            self._privileged(connection, "AddMatch")
        self.matches.add(connection, rule, limit)
        self._outside.append(MatchAdded(connection.id, rule))
        self._peak("matches", self.matches.count)
        mine = sum(map(len, connection.matches.values()))
        connection.peak_matches = max(connection.peak_matches, mine)
        self._peak("matches_each", mine)

    def _become_monitor(self, connection: Connection, rules: tuple[str, ...]) -> None:
        self._privileged(connection, "BecomeMonitor")
        if len(rules) > MAX_MONITOR_RULES:
            raise Refused(LIMITS_EXCEEDED, f"A monitor has {MAX_MONITOR_RULES} rules at most")
        for rule in rules:
            parse(rule)
        for rule in self.matches.remove_all(connection):
            self._outside.append(MatchRemoved(connection.id, rule))
        self._forget_rules_naming(connection)
        held = connection.names.copy()
        owned = [each for each in held if self.registry.owner(each) is connection]
        self._release(connection, [each for each in held if each not in owned])
        self._outside.append(MonitorAttached(connection.id, rules))  # and it loses its names
        self._release(connection, owned)
        connection.monitor = rules
        self.monitors.add(connection)
        name = connection.unique_name
        self._wake(self.matches.watching(OWNER_CHANGED, (name, name, "")))
        self._wake(self.monitors)
        self._wake(connection.introduced)
        self._outside.say(f"{connection} became a monitor")

    def _forget_rules_naming(self, gone: Connection) -> None:
        """Nobody will hear from it any more, nor see what is sent to it."""
        for owner, rule in self.matches.remove_naming(
            gone.unique_name, lambda asker: self._may_know(asker, gone)
        ):
            self._outside.append(MatchRemoved(owner.id, rule))

    def _check_introduction(self, asker: Connection, peer: Connection | None) -> None:
        """Who may never send anything to the peer gets no ring to it, whatever its worker says. An
        honest worker never asks for one. Monitors see what is not sent to them. Raises Refused."""
        if peer is None or peer.monitor is not None or self.introductions.know(asker, peer):
            return
        assert asker.policy is not None and peer.policy is not None
        assert asker.credentials is not None and peer.credentials is not None
        reaches = asker.policy.may_reach(peer.policy, asker.names, peer.names)
        meets = self.endpoints.may_meet(asker, peer) and self.custom.may_meet(asker, peer)
        if not reaches or not meets:
            why = "no rule allows it"
        elif not self.labels.may_ever_send(asker.credentials.label, peer.credentials.label):
            why = "SELinux does not allow it"
        else:
            return
        text = f"{asker} may not send anything to {peer}: {why}"
        self._complain(asker, text)
        raise Refused(ACCESS_DENIED, text)

    def _reload(self, connection: Connection, request: int) -> None:
        if connection.waiting >= MAX_WAITING:
            raise Refused(LIMITS_EXCEEDED, f"{connection} waits for too much at once")
        connection.waiting += 1
        if self._reload_asked:
            self._reload_next.append((connection, request))
        else:
            self._reloading.append((connection, request))
            self._read_configuration()

    def _read_configuration(self) -> None:
        if not self._reload_asked:
            self._reload_asked = True
            self._outside.reload()

    def _privileged(self, connection: Connection, what: str) -> None:
        assert connection.credentials is not None
        uid, pid = connection.credentials.uid, connection.credentials.pid
        if not connection.credentials.is_privileged(self._owner) or connection.custom:
            text = (
                f"rejected attempt to call {what} by connection {connection.unique_name}"
                f" (uid={uid} pid={pid}) with uid {uid}"
            )
            self._complain(connection, text)
            raise Refused(ACCESS_DENIED, text)

    def _complain(self, connection: Connection, text: str) -> None:
        """Tell the admin, but let no client fill the log by asking again and again."""
        connection.complaints += 1
        if connection.complaints < MAX_COMPLAINTS:
            self._outside.say(text)
        elif connection.complaints == MAX_COMPLAINTS:
            self._outside.say(f"{text} (what else it is refused is not logged)")

    # -- time ----------------------------------------------------------------------------------

    def deadline(self) -> float | None:
        """When `tick` is to be called (CLOCK_MONOTONIC, seconds), None for never."""
        each = (
            self.introductions.deadline(),
            self.probes.deadline(),
            self.counts.deadline(),
            self.activation.deadline(),
            self.activation.watching.deadline(),
            self._hello_deadline(),
        )
        return min((deadline for deadline in each if deadline is not None), default=None)

    def _hello_deadline(self) -> float | None:
        return next(iter(self._incomplete.values()), None)

    def tick(self) -> None:
        """End what has waited too long."""
        now = self._outside.now()
        self.introductions.tick(now)
        self.probes.tick(now)
        self.counts.tick(now)
        self.activation.tick(now)
        self.activation.watching.tick(now)
        while (deadline := self._hello_deadline()) is not None and deadline <= now:
            worker = next(iter(self._incomplete))
            del self._incomplete[worker]
            limit = self._limits["auth_timeout"] // 1000
            self._outside.kill(worker, f"did not say Hello within {limit} s (limit auth_timeout)")

    # -- state ---------------------------------------------------------------------------------

    def snapshot(self, position: int, stamp: int) -> Snapshot:
        """The state of the bus; everything in it stands in the log before `position`."""
        connections: list[tuple[int, Credentials]] = []
        matches: list[tuple[int, str]] = []
        monitors: list[tuple[int, tuple[str, ...]]] = []
        names = tuple(self.registry.states())
        for id, connection in self.by_id.items():
            assert connection.credentials is not None
            connections.append((id, connection.credentials))
            if connection.monitor is not None:
                monitors.append((id, connection.monitor))
            for texts in connection.matches.values():
                matches += [(id, text) for text in texts]
        return Snapshot(
            position=position,
            stamp=stamp,
            connections=tuple(connections),
            names=tuple((each.name, each.new.id) for each in names if each.new is not None),
            matches=tuple(matches),
            monitors=tuple(monitors),
            activatable=self.activation.names,
            policy_generation=self.generation,
            queues=tuple(each for each in map(_queue, names) if any(_details(each))),
            kdbus=tuple(
                (id, each.kdbus) for id, each in self.by_id.items() if each.kdbus is not None
            ),
            policies=tuple(self.name_policy.entries.items()),
            behind=tuple((id, each.custom) for id, each in self.by_id.items() if each.custom),
            custom=tuple(each for each in self.custom.entries.items() if each[1]),
            apart=tuple(self.labels.apart.values()),
            endpoints=self.endpoints.entries(),
        )

    def _snapshot(self, connection: Connection) -> list[int]:
        return self._outside.snapshot(self._behind(connection))

    def _behind(self, connection: Connection) -> Behind:
        assert connection.credentials is not None
        return Behind.of(connection.credentials, connection.custom)

    def shown(self, behind: Behind) -> Shown:
        """What those behind an endpoint are shown of names."""
        return self.custom.shown(behind) if behind.custom else self.endpoints.shown(behind.endpoint)

    def inside(self, behind: Behind) -> list[int]:
        """The connections that are behind it."""
        return [
            id
            for id, each in self.by_id.items()
            if each.credentials and Behind.of(each.credentials, each.custom) == behind
        ]

    def size(self) -> int:
        """About how many entries a snapshot has."""
        return len(self.by_id) + len(self.registry) + self.matches.count

    def statistics(self) -> dict[str, int]:
        """Numbers for Debug.Stats; the first are named as dbus-daemon names them."""
        return {
            "Serial": self._serial("bus"),
            "ActiveConnections": len(self.by_id),
            "IncompleteConnections": sum(
                each.id == NOT_YET and each.credentials is not None
                for each in self.connections.values()
            ),
            "BusNames": self._names(),
            "PeakBusNames": self._peaks["names"],
            "PeakBusNamesPerConnection": self._peaks["names_each"],
            "MatchRules": self.matches.count,
            "PeakMatchRules": self._peaks["matches"],
            "PeakMatchRulesPerConnection": self._peaks["matches_each"],
            "SpareWorkers": sum(each.credentials is None for each in self.connections.values()),
            "Monitors": len(self.monitors),
            "Introductions": self.introductions.made,
            "PendingIntroductions": len(self.introductions),
            "PendingActivations": len(self.activation),
        }

    def _count(self, asker: Connection, message: CountConnection) -> None:
        asked = self._seen(asker, message.id)
        if asked is None or asked.monitor is not None:
            name = f":1.{message.id}"
            raise Refused(
                NAME_HAS_NO_OWNER, f"Could not get statistics of name '{name}': no such name"
            )
        known = {
            "Serial": self._serial("connection"),
            "PeakMatchRules": asked.peak_matches,
            "PeakBusNames": asked.peak_names,
        }
        self.counts.ask(asker, message.request, asked, known)

    def _seen(self, asker: Connection, id: int) -> Connection | None:
        """A connection that is not hidden from the asker by an endpoint of either."""
        other = self.by_id.get(id)
        if other is None or other is asker:
            return other
        return other if self._may_know(asker, other) else None

    def _may_know(self, asker: Connection, other: Connection) -> bool:
        seen = self.endpoints.may_see(asker, other) or self.introductions.know(asker, other)
        return seen and self.custom.may_see(asker, other)

    def _serial(self, what: str) -> int:
        self._asked[what] += 1
        return self._asked[what] - 1

    # -- inside --------------------------------------------------------------------------------

    def _is_owned(self, name: str) -> bool:
        return self.registry.owner(name) is not None

    def _close(self, endpoints: Iterable[str]) -> None:
        """End the connections of those who came by these."""
        for connection in self.connections.values():
            credentials = connection.credentials
            if credentials is not None and credentials.endpoint in endpoints:
                reason = f"its endpoint {credentials.endpoint} is gone"
                self._outside.kill(connection.worker, reason)

    def _configure(self, configuration: Configuration) -> None:
        self._configured = configuration
        self._limits = configuration.limits
        self._policy = configuration.policy
        self._contexts = configuration.selinux
        self._policies.clear()
        self.activation.configure(configuration)
        self.activation.watching.configure(configuration)
        for connection in self.by_id.values():
            assert connection.credentials is not None
            connection.policy = self._policy_for(connection.credentials)

    def _policy_for(self, credentials: Credentials) -> ClientPolicy:
        who = credentials
        key = (who.uid, who.gid, who.groups, who.label, who.anonymous)
        policy = self._policies.get(key)
        if policy is None:
            policy = self._policies[key] = ClientPolicy(
                self._policy, credentials, owner=self._owner
            )
        return policy

    def _leave_user(self, credentials: Credentials) -> None:
        uid = credentials.uid
        for each in {uid, credentials.share}:
            self._per_uid[each] -= 1
            if not self._per_uid[each]:
                del self._per_uid[each]
        if uid not in self._per_uid:
            self._policies = {key: each for key, each in self._policies.items() if key[0] != uid}

    def _release(self, connection: Connection, names: Iterable[str]) -> None:
        for name in names:
            self._owner_changed(self.registry.release(connection, name)[1])

    def _owner_changed(self, change: Change | None) -> None:
        if change is None:
            return
        name, old, new = change.name, change.old, change.new
        after = _queue(change)
        if old is new:
            self._outside.append(after)
            return
        self._outside.append(
            NameOwnerChanged(
                name, old.id if old else NOBODY, new.id if new else NOBODY, *_details(after)
            )
        )
        self._wake(each for each in (old, new) if each is not None)
        if old is not None and new is not None and change.activator in (old, new):
            self._wake(old.introduced)  # who has sent it something that is for the new one now
        args = (name, old.unique_name if old else "", new.unique_name if new else "")
        self._wake(self.matches.watching(OWNER_CHANGED, args))
        self._wake(self.monitors)
        if new is not None and new is not change.activator:
            self.activation.took_name(name)

    def _activatable_changed(self) -> None:
        self._outside.append(ActivatableChanged(self.activation.names))
        self._wake(self.matches.watching(ACTIVATABLE_CHANGED, ()))
        self._wake(self.monitors)

    def _wake(self, connections: Iterable[Connection]) -> None:
        for connection in connections:
            self._outside.wake(connection.worker)

    def _names(self) -> int:
        """How many names there are, unique ones included."""
        return len(self.registry) + len(self.by_id) - len(self.monitors)

    def _peak_names(self, connection: Connection) -> None:
        mine = 1 + len(connection.names)
        connection.peak_names = max(connection.peak_names, mine)
        self._peak("names", self._names())
        self._peak("names_each", mine)

    def _peak(self, what: str, value: int) -> None:
        self._peaks[what] = max(self._peaks[what], value)


def _queue(change: Change) -> QueueChanged:
    """A name as it is now, for the log."""
    waiting = tuple(each.id for each in change.waiting)
    activator = NOBODY if change.activator is None else change.activator.id
    claims = change.claims if any(change.claims) else ()
    return QueueChanged(change.name, waiting, claims, activator)


def _details(queue: QueueChanged) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    return queue.waiting, queue.claims, queue.activator


def _about(about: bytes) -> bytes:
    if len(about) > MAX_ABOUT:
        raise Violation(f"says {len(about)} bytes of its client")
    return about
