"""What the processes of one bus say to each other: control-log entries and line messages.

Both ends treat what they decode here as hostile until checked: decoding by type is the first
check, the reader's own rules are the second. Nothing here does I/O. Unique connection ids are
integers: id 7 is the unique name ``:1.7``; 0 means "nobody" and -1 "the bus itself".
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

U32 = Annotated[int, msgspec.Meta(ge=0, le=0xFFFFFFFF)]
Share = int | tuple[int, str]
"""A user, or those of him behind one endpoint: they must not keep him from the bus."""


class Process(msgspec.Struct, frozen=True, array_like=True):
    """What /proc says of the process that says HELLO by a kdbus file, as it is then (proc(5)).

    `uids` and `gids`: real, effective, saved, of file systems. `caps`: inheritable, permitted, effective,
    bounding. `audit`: login uid and session. `space`: its pid namespace; `pids`: what that calls it and
    its parent, 0 where it does not see that. `users`: its user namespace, of which `caps` are."""

    uids: tuple[int, int, int, int]
    gids: tuple[int, int, int, int]
    caps: tuple[int, int, int, int]
    cgroup: bytes
    audit: tuple[int, int] | None
    space: int
    pids: tuple[int, int]
    users: int


class Opener(msgspec.Struct, frozen=True, array_like=True):
    """Who has opened a file by which somebody else says HELLO, or acts as another than he is. `real`: his real
    uid, whose own may talk to him."""

    uid: int
    gid: int
    groups: tuple[int, ...]
    real: int


class Credentials(msgspec.Struct, frozen=True, array_like=True):
    """What the kernel says of a client (unix(7): SO_PEERCRED, SO_PEERGROUPS, SO_PEERSEC)."""

    uid: int
    gid: int
    pid: int
    groups: tuple[int, ...] = ()
    label: bytes = b""
    parent: int = 0  # its parent's pid, where /proc was read for it anyway
    process: Process | None = None  # likewise
    endpoint: str = ""  # through which socket it came, "" the bus's own: the supervisor's word
    ipc_owner: bool = False
    """Opened its file with CAP_IPC_OWNER in the bus's user namespace; or is root by a socket, which does not tell."""
    opener: Opener | None = (
        None  # who opened its file, if that is more than `uid`, `gid` and `groups` say
    )
    anonymous: bool = (
        False  # said in SASL that it is nobody: its worker's word, so it only takes rights away
    )

    @property
    def opened_by(self) -> Opener:
        """Who opened its file; itself, if it has none."""
        return self.opener or Opener(self.uid, self.gid, self.groups, self.uid)

    def by_file_of(self, opener: Credentials) -> Credentials:
        """Of who says HELLO, with what counts of who has opened the file."""
        by = opener.opened_by
        other = None if by == Opener(self.uid, self.gid, self.groups, self.uid) else by
        return msgspec.structs.replace(self, ipc_owner=opener.ipc_owner, opener=other)

    def is_privileged(self, owner: int) -> bool:
        """Whether it is to a bus of this owner's, by the bus's own node or socket: by who opened it."""
        return not self.anonymous and (self.opened_by.uid == owner or self.ipc_owner)

    @property
    def share(self) -> Share:
        """Whose share of the bus's places it takes."""
        return (self.uid, self.endpoint) if self.endpoint else self.uid


# -- the control log -------------------------------------------------------------------------


class Entry(msgspec.Struct, frozen=True, array_like=True):
    """Base of all control-log entries."""


class ConnectionAdded(Entry, frozen=True, tag="C"):
    """A connection said Hello. Implies NameOwnerChanged(":1.id", "", ":1.id").

    `kdbus`: the HELLO flags of one that came by a kdbus node; None: it came by a D-Bus socket. `custom`: of the
    custom endpoint of kdbus that it is behind, 0 for none."""

    id: int
    credentials: Credentials
    kdbus: int | None = None
    custom: int = 0


class ConnectionRemoved(Entry, frozen=True, tag="c"):
    """A connection is gone; its well-known names changed owner in entries before this one."""

    id: int


class NameOwnerChanged(Entry, frozen=True, tag="N"):
    """A well-known name changed its primary owner; 0 is nobody. `waiting`: its queue from now on.

    `claims`: RequestName's flags of its owner, then of those who wait, if any are set. `activator`: who has the name
    when nobody else has it (kdbus.connection(7)), 0 for nobody; if it is `new`, there are no claims."""

    name: str
    old: int
    new: int
    waiting: tuple[int, ...] = ()
    claims: tuple[int, ...] = ()
    activator: int = 0


class QueueChanged(Entry, frozen=True, tag="Q"):
    """Those who wait for a well-known name while its owner stays, the next owner first; and what else
    NameOwnerChanged says of a name."""

    name: str
    waiting: tuple[int, ...]
    claims: tuple[int, ...] = ()
    activator: int = 0


class MatchAdded(Entry, frozen=True, tag="M"):
    """A connection added a match rule (the rule as the client wrote it, already validated)."""

    id: int
    rule: str


class MatchRemoved(Entry, frozen=True, tag="m"):
    """One match rule equal to `rule` was removed."""

    id: int
    rule: str


class MonitorAttached(Entry, frozen=True, tag="O"):
    """The connection became a monitor; it lost its names and its match rules before this entry.

    Implies NameOwnerChanged(":1.id", ":1.id", ""): its unique name is nobody's from here on. The
    connection stays until its ConnectionRemoved, which then implies no change of a name.

    `kdbus`: the HELLO flags of one that is a monitor from the beginning; no ConnectionAdded was before,
    and no name changes. `credentials`: whose that is; None if it was told before."""

    id: int
    rules: tuple[str, ...]
    kdbus: int | None = None
    credentials: Credentials | None = None


class ActivatableChanged(Entry, frozen=True, tag="A"):
    """The whole list of activatable names (sent at start and after ReloadConfig)."""

    names: tuple[str, ...]


class PolicyChanged(Entry, frozen=True, tag="P"):
    """A new compiled policy is in force; workers fetch it with FetchPolicy."""

    generation: int


class PolicyEntry(msgspec.Struct, frozen=True, array_like=True):
    """Who may do what with `name`, or with the names directly below it (kdbus.policy(7)): kind of
    user, access, uid or gid."""

    name: str
    wildcard: bool
    accesses: tuple[tuple[int, int, int], ...]


class NamePolicyChanged(Entry, frozen=True, tag="K"):
    """The policy that a kdbus connection brings along; it goes with it."""

    id: int
    entries: tuple[PolicyEntry, ...]


class CustomChanged(Entry, frozen=True, tag="V"):
    """The policy of a custom endpoint (kdbus.endpoint(7)); one of which nothing is said has none, which
    allows nothing. Its number is that of the worker whose client has made it."""

    endpoint: int
    entries: tuple[PolicyEntry, ...]


class LabelApart(Entry, frozen=True, tag="L"):
    """What SELinux refuses to connections of this label, in place of what was said of it before: sending
    to those of `to`, getting anything from those of `of`. The empty label is the bus's own.

    Stands before the first ConnectionAdded with the label; the labels in it are of connections that
    are there."""

    label: bytes
    to: tuple[bytes, ...] = ()
    of: tuple[bytes, ...] = ()


class EndpointChanged(Entry, frozen=True, tag="E"):
    """There is an endpoint, or it says something new (kbusd/policy/endpoints.py); b"": there is none
    any more."""

    name: str
    policy: bytes


LogEntry = (
    ConnectionAdded
    | ConnectionRemoved
    | NameOwnerChanged
    | QueueChanged
    | MatchAdded
    | MatchRemoved
    | MonitorAttached
    | ActivatableChanged
    | PolicyChanged
    | NamePolicyChanged
    | LabelApart
    | EndpointChanged
    | CustomChanged
)


class Snapshot(msgspec.Struct, frozen=True, array_like=True):
    """The state of the bus at `position` of the control log; replaying from there catches up.

    `queues` has each name that somebody owns, as QueueChanged tells it."""

    position: int
    stamp: int
    connections: tuple[tuple[int, Credentials], ...]
    names: tuple[tuple[str, int], ...]
    matches: tuple[tuple[int, str], ...]
    monitors: tuple[tuple[int, tuple[str, ...]], ...]
    activatable: tuple[str, ...]
    policy_generation: int
    queues: tuple[QueueChanged, ...] = ()
    kdbus: tuple[tuple[int, int], ...] = ()  # (id, HELLO flags)
    policies: tuple[tuple[int, tuple[PolicyEntry, ...]], ...] = ()
    behind: tuple[tuple[int, int], ...] = ()  # (id, endpoint)
    custom: tuple[tuple[int, tuple[PolicyEntry, ...]], ...] = ()
    apart: tuple[LabelApart, ...] = ()
    endpoints: tuple[tuple[str, bytes], ...] = ()


# -- worker -> broker ------------------------------------------------------------------------


class Request(msgspec.Struct, frozen=True, array_like=True):
    """Base of all requests; `request` is the worker's number, echoed in Reply or Failure."""

    request: int


class Hello(Request, frozen=True, tag="hello"):
    """Reply: [id]; fds: one sealed memfd holding an encoded Snapshot; behind an endpoint also its log.

    `kdbus` as in ConnectionAdded. With the flags of a monitor, an activator of `name`, or a holder of
    `policy` it is for the privileged only. `about` as in Describe. `anonymous` as in Credentials."""

    kdbus: int | None = None
    name: str = ""
    policy: tuple[PolicyEntry, ...] = ()
    about: bytes = b""
    anonymous: bool = False


class RequestName(Request, frozen=True, tag="request_name"):
    """Reply: the D-Bus result code 1..4."""

    name: str
    flags: int


class ReleaseName(Request, frozen=True, tag="release_name"):
    """Reply: the D-Bus result code 1..3."""

    name: str


class AddMatch(Request, frozen=True, tag="add_match"):
    """Reply: None, once MatchAdded stands in the log."""

    rule: str


class RemoveMatch(Request, frozen=True, tag="remove_match"):
    """Reply: None. Failure MatchRuleNotFound."""

    rule: str


class StartService(Request, frozen=True, tag="start"):
    """Activate. Reply: 1 started, 2 already running, once the name has an owner in the log.

    `auto` is set when a message to an unowned name caused it, and not StartServiceByName."""

    name: str
    auto: bool


class UpdateEnvironment(Request, frozen=True, tag="environment"):
    """UpdateActivationEnvironment. Reply: None."""

    variables: dict[str, str]


class ReloadConfig(Request, frozen=True, tag="reload"):
    """Reply: None."""


class BecomeMonitor(Request, frozen=True, tag="monitor"):
    """Reply: None, once MonitorAttached stands in the log."""

    rules: tuple[str, ...]


class FetchSnapshot(Request, frozen=True, tag="snapshot"):
    """For a worker that fell behind the log. Reply: None; fds: as Hello."""


class FetchPolicy(Request, frozen=True, tag="policy"):
    """Reply: generation; fds: one sealed memfd with the compiled policy."""


class Statistics(Request, frozen=True, tag="stats"):
    """The broker's own numbers for Debug.Stats. Reply: dict[str, int]."""


class ProcessOf(Request, frozen=True, tag="process"):
    """Reply: None; fds: a pidfd of the process of connection `id`, if there is one."""

    id: int


class CountConnection(Request, frozen=True, tag="count"):
    """What Debug.Stats tells of connection `id` beyond what stands in the log. Reply: dict[str, int].
    Failure NameHasNoOwner."""

    id: int


class Queued(msgspec.Struct, frozen=True, array_like=True):
    """What waits in one direction between a client and its worker, and the most that ever did."""

    messages: U32 = 0
    bytes: U32 = 0
    fds: U32 = 0
    peak_bytes: U32 = 0
    peak_fds: U32 = 0


class Counted(Request, frozen=True, tag="counted"):
    """The answer to Count: `incoming` is from the client, `outgoing` for it. No reply."""

    incoming: Queued
    outgoing: Queued


class SetPolicy(Request, frozen=True, tag="set_policy"):
    """Of a kdbus policy holder: its policy from now on. Reply: None. Failure FileExists."""

    policy: tuple[PolicyEntry, ...]


class SetEndpoint(Request, frozen=True, tag="set_endpoint"):
    """Of a client that has made a custom endpoint, and is no connection: its policy from now on. Reply:
    None. Failure FileExists: an entry comes twice."""

    policy: tuple[PolicyEntry, ...]


class Describe(Request, frozen=True, tag="describe"):
    """What the worker says of its client to whoever asks (kdbus/parcel.py, About). Reply: None."""

    about: bytes


class AskAbout(Request, frozen=True, tag="about"):
    """What the worker of a connection says of its client; it may say anything. Reply: bytes."""

    id: int


class AddEndpoint(Request, frozen=True, tag="add_endpoint"):
    """Reply: its address. `bound`: it goes when this connection does. `policy` as in EndpointChanged.
    Failure FileExists, LimitsExceeded, InvalidArgs, Failed: it can't be listened on."""

    name: str
    policy: bytes
    bound: bool


class RemoveEndpoint(Request, frozen=True, tag="remove_endpoint"):
    """Reply: None. Who came by it is disconnected. Failure Failed: there is none, or it is of the
    configuration."""

    name: str


class ListEndpoints(Request, frozen=True, tag="endpoints"):
    """Reply: of each its name, its address, "" if it can't be listened on, and what it says."""


class Introduce(Request, frozen=True, tag="introduce"):
    """Make this worker and `peer` known to each other.

    fds: ring to the peer, my status page, my Broadcast: memfds all of them.
    `slot`: the slot of my status page in which I publish my position in the peer's ring;
    `broadcast_slot`: the same for the peer's Broadcast.
    Reply: [peer's slot, peer's broadcast_slot]; fds: the peer's three, then my ends of what we
    share: bell, side socket, carrier. Failure: NameHasNoOwner, AccessDenied, LimitsExceeded, TimedOut.
    If the peer asked first and the two crossed, the Reply is None without fds: the Introduction
    by the peer came before it on this line, and is the only one."""

    peer: int
    slot: int
    broadcast_slot: int


class Introduced(Request, frozen=True, tag="introduced"):
    """The answer to an Introduction (`request` is that Introduction's); fds as in Introduce."""

    slot: int
    broadcast_slot: int


class Stuck(Request, frozen=True, tag="stuck"):
    """`peer`, to whom I was introduced, leaves much of what I send to it untaken: see whether its
    worker runs. No reply: if it does not, ConnectionRemoved follows in the log."""

    peer: int


class Running(Request, frozen=True, tag="running"):
    """The answer to Probe. No reply."""


class Leaving(Request, frozen=True, tag="leaving"):
    """The last word of a worker: why its client's connection ended (for the admin; "" if there
    is nothing to say)."""

    reason: str


WorkerMessage = (
    Hello
    | RequestName
    | ReleaseName
    | AddMatch
    | RemoveMatch
    | StartService
    | UpdateEnvironment
    | ReloadConfig
    | BecomeMonitor
    | FetchSnapshot
    | FetchPolicy
    | Statistics
    | ProcessOf
    | CountConnection
    | Counted
    | SetPolicy
    | SetEndpoint
    | Describe
    | AskAbout
    | AddEndpoint
    | RemoveEndpoint
    | ListEndpoints
    | Introduce
    | Introduced
    | Stuck
    | Running
    | Leaving
)


# -- broker -> worker ------------------------------------------------------------------------


class FromBroker(msgspec.Struct, frozen=True, array_like=True):
    """Base of what the broker says to a worker."""


class Reply(FromBroker, frozen=True, tag="reply"):
    """The answer to `request`. Log entries that it caused are in the log already.

    `stamp`: that of the log's last entry then, behind which our client hears it; 0 if any time will do."""

    request: int
    value: Any = None
    stamp: int = 0


class State(FromBroker, frozen=True, tag="state"):
    """An encoded Snapshot, before Hello, and mostly before there is a client: what the worker takes over while the broker answers that. If
    the reply comes without a snapshot, this one holds. `next`: the id that it gets if nobody else is quicker."""

    snapshot: bytes
    next: int = 1


class Failure(FromBroker, frozen=True, tag="failure"):
    """`request` failed: a D-Bus error name and its text."""

    request: int
    error: str
    message: str


class Introduction(FromBroker, frozen=True, tag="introduction"):
    """`peer` wants to reach you. fds: its ring to you, its status page, its Broadcast,
    your ends of what you share: bell, side socket, carrier. Answer with Introduced(request, ...)."""

    request: int
    peer: int
    slot: int
    broadcast_slot: int


class Withdrawn(FromBroker, frozen=True, tag="withdrawn"):
    """Introduction `request` by `peer` is void, its Introduced came too late: forget the peer's
    rings, and ask for an introduction if you need one."""

    request: int
    peer: int


class Probe(FromBroker, frozen=True, tag="probe"):
    """Somebody says that you take nothing. Answer with Running, soon, or be ended."""


class Count(FromBroker, frozen=True, tag="count"):
    """Somebody wants to know what waits between you and your client. Answer with Counted."""


class Wake(FromBroker, frozen=True, tag="wake"):
    """The log has entries that concern you (sent only to workers that may sleep through them).

    Left out when something else is on its way: whatever arrives on this line is a reason to look
    at the log."""


BrokerMessage = Reply | State | Failure | Introduction | Withdrawn | Probe | Count | Wake


# -- supervisor <-> others -------------------------------------------------------------------


class WorkerStarted(msgspec.Struct, frozen=True, array_like=True, tag="worker"):
    """supervisor -> broker. A spare worker `worker` (a number) exists; fd: broker's end of its line. `files`:
    for a client that opens a file."""

    worker: int
    pid: int
    files: bool = False


class Assigned(msgspec.Struct, frozen=True, array_like=True, tag="assigned"):
    """supervisor -> broker. `worker` now serves a client of these credentials; `hasty`: who must say
    Hello soon (limit auth_timeout); `custom`: what it is behind, as in ConnectionAdded. fd: a pidfd of its
    process, where the kernel gives one."""

    worker: int
    credentials: Credentials
    hasty: bool = True
    custom: int = 0


class WorkerGone(msgspec.Struct, frozen=True, array_like=True, tag="gone"):
    """supervisor -> broker. The worker's process has ended; `reason` is for the log."""

    worker: int
    reason: str


class LauncherLine(msgspec.Struct, frozen=True, array_like=True, tag="launcher"):
    """supervisor -> broker. fd: broker's end of the line to the launcher."""


class Reconfigured(msgspec.Struct, frozen=True, array_like=True, tag="reconfigured"):
    """supervisor -> broker. fd: a sealed memfd with a new compiled configuration; none if the files
    are faulty and the configuration in force stays. Its generation is a new one if it says something else."""

    generation: int = 0


class Entering(msgspec.Struct, frozen=True, array_like=True, tag="entering"):
    """supervisor -> broker. A process of these credentials says HELLO by the file that the worker serves; it
    need not be the one that has opened it. Before that, and never after it."""

    worker: int
    credentials: Credentials


class EndpointMade(msgspec.Struct, frozen=True, array_like=True, tag="endpoint_made"):
    """supervisor -> broker. The client of this worker has made a custom endpoint, and says its policy."""

    worker: int


class ReloadAsked(msgspec.Struct, frozen=True, array_like=True, tag="reload_asked"):
    """supervisor -> broker. The admin wants the configuration read again (SIGHUP)."""


class Listening(msgspec.Struct, frozen=True, array_like=True, tag="listening"):
    """supervisor -> broker. Answers Endpoints: the address of each that it listens on, and that of the
    bus, whose name is ""."""

    addresses: dict[str, str]


SupervisorMessage = (
    WorkerStarted
    | Assigned
    | WorkerGone
    | LauncherLine
    | Reconfigured
    | ReloadAsked
    | Listening
    | EndpointMade
    | Entering
)


class ReloadWanted(msgspec.Struct, frozen=True, array_like=True, tag="reload"):
    """broker -> supervisor. Read the configuration again; answered by Reconfigured, and not said twice
    before that."""


class Kill(msgspec.Struct, frozen=True, array_like=True, tag="kill"):
    """broker -> supervisor. End this worker (quota, protocol violation)."""

    worker: int
    reason: str


class Discard(msgspec.Struct, frozen=True, array_like=True, tag="discard"):
    """broker -> supervisor. This worker knows too much for some client that may come: give it none. If it has one,
    that is none of these."""

    worker: int


class Joined(msgspec.Struct, frozen=True, array_like=True, tag="joined"):
    """broker -> supervisor. The client of `worker` said Hello: it is complete (dbus-daemon(1),
    max_incomplete_connections)."""

    worker: int


class Left(msgspec.Struct, frozen=True, array_like=True, tag="left"):
    """broker -> supervisor. The connection of this worker, which served a file, is gone, if there was one,
    and that stands in the log."""

    worker: int


class BrokerReady(msgspec.Struct, frozen=True, array_like=True, tag="ready"):
    """broker -> supervisor, its first word. fd: the control log's memfd, sealed."""


class Endpoints(msgspec.Struct, frozen=True, array_like=True, tag="endpoints"):
    """broker -> supervisor. Listen for these endpoints, and for no others. Where, is not for the broker
    to say: where the configuration says, or beside the socket of the bus. Answered by Listening."""

    names: tuple[str, ...]


ToSupervisor = ReloadWanted | Kill | Discard | Joined | Left | BrokerReady | Endpoints


# -- broker <-> launcher ---------------------------------------------------------------------


class Launch(msgspec.Struct, frozen=True, array_like=True, tag="launch"):
    """broker -> launcher. Run a service: arguments, user ("" is the bus's own), environment."""

    job: int
    name: str
    arguments: tuple[str, ...]
    user: str
    environment: dict[str, str]


class EndLaunch(msgspec.Struct, frozen=True, array_like=True, tag="end"):
    """broker -> launcher. The service did not take its name in time: kill it."""

    job: int


class Look(msgspec.Struct, frozen=True, array_like=True, tag="look"):
    """broker -> launcher. Watch these directories from now on, instead of others. Answered by Looked."""

    directories: tuple[str, ...]


ToLauncher = Launch | EndLaunch | Look


class LaunchEnded(msgspec.Struct, frozen=True, array_like=True, tag="ended"):
    """launcher -> broker. Could not start (`error` set) or exited with `status` (waitpid's)."""

    job: int
    status: int
    error: str


class Looked(msgspec.Struct, frozen=True, array_like=True, tag="looked"):
    """launcher -> broker. When each directory was last modified, ns, 0 for what is not there; and whether
    anything changed in those that were watched, of which we have not said so yet."""

    times: dict[str, int]
    changed: bool


class FilesChanged(msgspec.Struct, frozen=True, array_like=True, tag="files"):
    """launcher -> broker. Something did in the directories that are watched."""


FromLauncher = LaunchEnded | Looked | FilesChanged


# -- supervisor <-> zygote, supervisor -> worker ---------------------------------------------


class Fork(msgspec.Struct, frozen=True, array_like=True, tag="fork"):
    """supervisor -> zygote. Fork one worker, locked down, and answer Forked; `hurry`: spare ones get
    few, and there is no time for a rehearsal; `files`: for a file of kdbus or the tree."""

    worker: int
    hurry: bool = False
    files: bool = False


class Configured(msgspec.Struct, frozen=True, array_like=True, tag="configured"):
    """supervisor -> zygote. fds: the new configuration in a sealed memfd; for workers to come."""

    generation: int


ToZygote = Fork | Configured


class Forked(msgspec.Struct, frozen=True, array_like=True, tag="forked"):
    """zygote -> supervisor. fds: supervisor's end of the worker's line, broker's end, pidfd."""

    worker: int
    pid: int


class Ended(msgspec.Struct, frozen=True, array_like=True, tag="worker_ended"):
    """zygote -> supervisor. The worker's process was reaped; `code`: its exit status, or minus the signal."""

    worker: int
    code: int


FromZygote = Forked | Ended


class Client(msgspec.Struct, frozen=True, array_like=True, tag="client"):
    """supervisor -> worker. Serve the client on this fd; it is who the kernel says it is.

    `uid_map`: of its user namespace, as the kernel has it (user_namespaces(7)); b"": it does not matter,
    or could not be read. `generation`: of the configuration in force, as the log counts them."""

    credentials: Credentials
    uid_map: bytes = b""
    generation: int = 0


class Device(msgspec.Struct, frozen=True, array_like=True, tag="device"):
    """supervisor -> worker. Serve the file that a client has opened: the node of this endpoint
    ("bus" is a bus's own) of this bus ("0-system"). Its requests come as Asked; end of file on the
    line: the file is closed.

    `flags`: open(2)'s. `transport`: "fuse" (restricted ioctls, a pool in the page cache) or "cuse"."""

    credentials: Credentials
    bus: str
    endpoint: str
    flags: int
    transport: str = "fuse"


class Node(msgspec.Struct, frozen=True, array_like=True):
    """A file in the tree of devices: the node of an endpoint, with its owner and access bits."""

    bus: str
    endpoint: str
    mode: int
    uid: int
    gid: int


class Tree(msgspec.Struct, frozen=True, array_like=True, tag="tree"):
    """supervisor -> worker. Be the tree: answer what the kernel asks of names, and decide who may
    open what. `first`: the first free number for files; a tree before may have used those below. `changed`: what it
    has said that was changed."""

    nodes: tuple[Node, ...]
    first: int
    changed: tuple[Node, ...] = ()


class Nodes(msgspec.Struct, frozen=True, array_like=True, tag="nodes"):
    """supervisor -> tree. These are the nodes from now on."""

    nodes: tuple[Node, ...]


class Open(msgspec.Struct, frozen=True, array_like=True, tag="open"):
    """supervisor -> tree. This number, which a tree before has given, is that of a file of the endpoint; it is open."""

    number: int
    bus: str
    endpoint: str


class Soon(msgspec.Struct, frozen=True, array_like=True, tag="soon"):
    """supervisor -> worker. A client is about to come, most likely to this worker."""


ToWorker = Client | Device | Tree | Soon


# -- supervisor <-> device worker, tree ------------------------------------------------------
#
# A request of the kernel is known by its number (`unique`) and is held by the process that it was
# passed to, until that answers. Nobody can do anything to a request that it does not hold: whoever
# tries is ended. What is asked for one that was answered a moment ago is not told apart from that,
# so a worker asks first and answers then.


class Asked(msgspec.Struct, frozen=True, array_like=True, tag="asked"):
    """A request as the kernel wrote it (kbusd/cuse/requests.py). To a device worker: IOCTL and
    POLL, to be answered, and INTERRUPT of one of these. To the tree: all those without a file's handle.

    READ, WRITE, FLUSH and RELEASE of a file are the supervisor's: it reads from the Pool, refuses
    writing (EINVAL), and closes the line. `ahead`: what there was of the ranges of Ahead, (address,
    bytes) each; whatever is missing is to be asked for.

    This and Answered are all that is said of most calls: supervisor/relay.py writes and reads them
    by itself, in the order in which the members stand here."""

    request: bytes
    ahead: tuple[tuple[int, bytes], ...] = ()


class Copied(msgspec.Struct, frozen=True, array_like=True, tag="copied"):
    """Answers Copy: how many bytes of each range there were, and these one after another, as `data`
    or, if it is empty, in the sealed memfd that comes with it.

    A range that is short ends at memory that the caller does not have, and those behind it are
    empty. `errno`, if not 0: the kernel refused altogether."""

    unique: int
    errno: int
    sizes: tuple[int, ...]
    data: bytes


class Stored(msgspec.Struct, frozen=True, array_like=True, tag="stored"):
    """Answers Store: it is in the caller's memory; or `errno`, and part of it may be. Answers AskFacts with EINTR:
    the caller was interrupted."""

    unique: int
    errno: int


class Given(msgspec.Struct, frozen=True, array_like=True, tag="given"):
    """Answers Take. fds: one for each number, in order; none if `errno` is not 0: EBADF if the caller
    has no such descriptor, ELOOP if it is a file of our own tree."""

    unique: int
    errno: int


class Facts(msgspec.Struct, frozen=True, array_like=True, tag="facts"):
    """Answers AskFacts: files of /proc/TID of the caller by their names ("status", "cmdline", ...),
    as the kernel has them; what can't be read is left out. Links ("exe", "root") as their target.

    `who`: the caller of HELLO, as the broker was told; None for other commands."""

    unique: int
    files: dict[str, bytes]
    who: Credentials | None = None


class Made(msgspec.Struct, frozen=True, array_like=True, tag="made"):
    """Answers MakeBus and MakeEndpoint: the node is there; or `errno`."""

    unique: int
    errno: int


class Promising(msgspec.Struct, frozen=True, array_like=True, tag="promising"):
    """supervisor -> worker, once there is a Pool. fd: a page by which it may promise answers (promises.py)."""


ToDeviceWorker = Asked | Copied | Stored | Given | Facts | Made | Promising


class Answered(msgspec.Struct, frozen=True, array_like=True, tag="answered"):
    """-> supervisor. The answer to a request that is held, as the kernel wants it
    (kbusd/cuse/replies.py). Everything sent before it is done before it, Nudge included; and so is
    `pushed`: (offset, size) of what is to be renewed in the client's page cache from the Pool.

    `last`: the connection ends with it (BYEBYE); what is asked next, by whatever file, is to see that."""

    reply: bytes
    pushed: tuple[tuple[int, int], ...] = ()
    last: bool = False


class Ahead(msgspec.Struct, frozen=True, array_like=True, tag="ahead"):
    """-> supervisor. With each ioctl of this number from now on, send along so many bytes from its
    argument on, and these ranges of the caller's memory: 8 ranges and 8 KiB, for 16 numbers. A guess, so
    that what a program does again and again need not be asked for."""

    command: int
    at_argument: int
    ranges: tuple[tuple[int, int], ...]


class Copy(msgspec.Struct, frozen=True, array_like=True, tag="copy"):
    """-> supervisor. Give me (address, bytes) of the caller's memory; as many as 1024 ranges and
    32 MiB. A range may be longer than needed: it comes back short."""

    unique: int
    ranges: tuple[tuple[int, int], ...]


class Store(msgspec.Struct, frozen=True, array_like=True, tag="store"):
    """-> supervisor. Put (address, bytes) into the caller's memory."""

    unique: int
    parts: tuple[tuple[int, bytes], ...]


class Take(msgspec.Struct, frozen=True, array_like=True, tag="take"):
    """-> supervisor. Give me copies of these descriptors of the caller; 16 at a time."""

    unique: int
    numbers: tuple[int, ...]


class AskFacts(msgspec.Struct, frozen=True, array_like=True, tag="ask_facts"):
    """-> supervisor. Who is the caller?"""

    unique: int


class Nudge(msgspec.Struct, frozen=True, array_like=True, tag="nudge"):
    """-> supervisor. Whoever polls the file is to ask again."""


class Pool(msgspec.Struct, frozen=True, array_like=True, tag="pool"):
    """-> supervisor, once. fd: a memfd; what it holds is what the client reads of its file, zeros
    behind its end. The client may have old pages in its cache, till they are pushed.

    `events_at`: where in it four bytes say which poll(2) events hold now; -1: nowhere. If POLLIN is
    among them, POLL is answered with them, and not passed on."""

    events_at: int = -1


class MakeBus(msgspec.Struct, frozen=True, array_like=True, tag="make_bus"):
    """-> supervisor, once, of a file of the control node. The caller wants a bus, which lives as long
    as the file. `flags`: of KDBUS_CMD_BUS_MAKE. The rest is for the workers of that bus alone."""

    unique: int
    name: str
    flags: int
    bloom: tuple[int, int]  # bytes, hash functions
    attach: int  # what BUS_CREATOR_INFO may tell
    about: bytes  # kbusd/kdbus/parcel.py, About


class MakeEndpoint(msgspec.Struct, frozen=True, array_like=True, tag="make_endpoint"):
    """-> supervisor, once, of a file of a bus's own node. The caller, whose the bus is, wants a custom
    endpoint of it, which lives as long as the file. `flags`: of KDBUS_CMD_ENDPOINT_MAKE."""

    unique: int
    name: str
    flags: int


FromDeviceWorker = (
    Answered | Ahead | Copy | Store | Take | AskFacts | Nudge | Pool | MakeBus | MakeEndpoint
)


class Maker(msgspec.Struct, frozen=True, array_like=True):
    """What the broker and the workers of a bus that a program has made know of it: who made it, and how
    (MakeBus)."""

    credentials: Credentials
    order: MakeBus


class Opened(msgspec.Struct, frozen=True, array_like=True, tag="opened"):
    """tree -> supervisor. The OPEN that it holds is granted: this endpoint, by way of this file."""

    unique: int
    bus: str
    endpoint: str
    flags: int


class Changed(msgspec.Struct, frozen=True, array_like=True, tag="changed"):
    """tree -> supervisor. By the SETATTR that it holds, this has other access bits or owners from now on: a file, or
    if it has no endpoint's name, a directory. To be remembered for the next tree."""

    unique: int
    node: Node


FromTree = Answered | Opened | Changed
ToTree = Asked | Nodes | Open
