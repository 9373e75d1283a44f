"""What the policy says about one client: may it connect, own a name, send, receive.

Pure computation over the rules of rules.py; both the sender's worker and the receiver's ask here,
each about its own client. The last rule that matches decides, and where none matches the answer is
no. Rules apply in this order: context="default", the client's groups, its user, at_console,
context="mandatory" (dbus-daemon(1), <policy>).

Messages to the bus itself are decided with ``("org.freedesktop.DBus",)`` as the receiver's names,
messages that would activate a service with its name alone. A name in a queue counts as owned: the
caller gives every name of a peer, queued ones and the unique one too.

An anonymous client may connect whoever it is: the caller knows that <allow_anonymous/> is there. What its
groups, its user and the console are allowed it is not; what they are denied it stays denied, so that nobody
gets rid of a <deny> by not saying who he is. (dbus-daemon leaves out both.)
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable
from typing import Literal, NamedTuple, Protocol

from kbusd.policy.rules import (
    GROUP,
    MAX_FDS,
    MESSAGE_TYPES,
    OWN,
    RECEIVE,
    SEND,
    USER,
    Policy,
    Rule,
)

ACCESS_DENIED = "org.freedesktop.DBus.Error.AccessDenied"
"""The D-Bus error name of every refusal."""

DRIVER_NAME = "org.freedesktop.DBus"

_SIGNAL = MESSAGE_TYPES["signal"]
_REPLIES = (MESSAGE_TYPES["method_return"], MESSAGE_TYPES["error"])
_TYPE_NAMES = {number: name for name, number in MESSAGE_TYPES.items()}


class CredentialsLike(Protocol):
    """What the kernel says of a client."""

    @property
    def uid(self) -> int: ...
    @property
    def gid(self) -> int: ...
    @property
    def groups(self) -> Collection[int]: ...
    @property
    def anonymous(self) -> bool: ...


class Message(NamedTuple):
    """The header fields that rules may look at; an absent field is None.

    `type` is the specification's number; `destination` is as the client wrote it; `fds` counts its
    descriptors. `answers`: it is a call or a signal and has a REPLY_SERIAL. To dbus-daemon's policy that is
    a reply, and so it is here: a configuration means here what it means there. One that nobody asked for
    needs a rule for such replies; one that was asked for passes a <deny> as a reply does, once for each call.
    """

    type: int
    path: str | None = None
    interface: str | None = None
    member: str | None = None
    error_name: str | None = None
    destination: str | None = None
    fds: int = 0
    answers: bool = False

    @property
    def is_reply(self) -> bool:
        """Whether rules take it for one."""
        return self.answers or self.type in _REPLIES


class Verdict(NamedTuple):
    """The answer. `rule` decided it, None if no rule matched. `log`: the rule wants a log line.

    `matched` counts the matching rules, for the text of a refusal or log line; where neither is
    wanted it stays 0, and no rule beyond the deciding one is looked at."""

    allowed: bool
    rule: Rule | None = None
    log: bool = False
    matched: int = 0


class Depends(NamedTuple):
    """Which parts of a message can change a verdict: what the key of a cached one must hold.

    The message's type, whether a reply was requested, and the peer's names always can."""

    path: bool
    interface: bool
    member: bool
    error: bool
    fds: bool
    broadcast: bool


class _Rules:
    """The rules of one kind for one client, arranged for finding the last one that matches.

    A rule that names a peer can match only if the peer has that name, so these are looked up by
    name; the few others are tried in turn. Both are kept last first, with their place in the
    whole order.
    """

    __slots__ = ("all", "anyone", "by_name")

    def __init__(self, rules: list[Rule]) -> None:
        self.all = rules
        self.anyone: list[tuple[int, Rule]] = []
        self.by_name: dict[str, list[tuple[int, Rule]]] = {}
        for index in range(len(rules) - 1, -1, -1):
            rule = rules[index]
            if rule.name is None or rule.prefix:
                self.anyone.append((index, rule))
            else:
                self.by_name.setdefault(rule.name, []).append((index, rule))

    def last(self, names: Iterable[str], matches: Callable[[Rule], bool]) -> Rule | None:
        """The last matching rule, for a peer that has `names`."""
        best = -1
        found = None
        for index, rule in self.anyone:
            if matches(rule):
                best = index
                found = rule
                break
        by_name = self.by_name
        for name in names:
            for index, rule in by_name.get(name, ()):
                if index < best:
                    break
                if matches(rule):
                    best = index
                    found = rule
                    break
        return found

    def may_allow(self, peer: ClientPolicy, names: Collection[str]) -> bool:
        """Whether a rule could allow something between the client and `peer`, which has `names`."""
        return any(
            rule.allow
            and (
                rule.name is None
                or rule.prefix
                or rule.name.startswith(":")
                or rule.name in names
                or peer.can_own(rule.name).allowed
            )
            for rule in self.all
        )

    def count(self, names: Collection[str], matches: Callable[[Rule], bool]) -> int:
        """How many rules match."""
        return sum(
            (rule.name is None or rule.prefix or rule.name in names) and matches(rule)
            for rule in self.all
        )


class _Arranged(NamedTuple):
    """All rules for clients whom the same ones concern, and what is found out about them once."""

    connect: tuple[Rule, ...]
    own: _Rules
    send: _Rules
    receive: _Rules
    owns_all: bool
    sends_all: bool
    receives_all: bool
    send_depends: Depends
    receive_depends: Depends


# Of the last few policies; a process has one in force, and a worker's rehearsal another.
_kept: list[tuple[Policy, dict[tuple[int | None, tuple[int, ...], bool, bool], _Arranged]]] = []
_MOST_KEPT = 4


def _arranged(
    policy: Policy, uid: int, gids: Collection[int], at_console: bool, anonymous: bool = False
) -> _Arranged:
    """The same for all clients with the same named user and groups, most often none."""
    known = next((each for of, each in _kept if of is policy), None)
    if known is None:
        known = {}
        _kept.append((policy, known))
        del _kept[:-_MOST_KEPT]
    user = uid if uid in policy.users else None
    groups = tuple(sorted(policy.groups.keys() & gids)) if policy.groups else ()
    found = known.get((user, groups, at_console, anonymous))
    if found is None:
        its: list[Rule] = []
        for gid in groups:
            its += policy.groups[gid]
        its += policy.users.get(uid, ())
        its += policy.at_console if at_console else policy.not_at_console
        if anonymous:
            its = [rule for rule in its if not rule.allow]
        rules = [*policy.default, *its, *policy.mandatory]
        own, send, receive = (_effective(rules, kind) for kind in (OWN, SEND, RECEIVE))
        always = *policy.default, *policy.mandatory
        found = known[user, groups, at_console, anonymous] = _Arranged(
            tuple(rule for rule in always if rule.kind in (USER, GROUP)),
            _Rules(own),
            _Rules(send),
            _Rules(receive),
            _trivial(own),
            _trivial(send),
            _trivial(receive),
            _depends(send),
            _depends(receive),
        )
    return found


def arrange(policy: Policy) -> None:
    """Do in advance, for all who are forked later, what is the same for most clients."""
    _arranged(policy, -1, (), False)


class ClientPolicy:
    """The policy as it applies to one client.

    `owner` is the uid that the bus runs as, for `can_connect` (default: this process's).
    `allows_everything_to_own`, `..._send` and `..._receive` are True where the rules leave nothing
    to decide, as on a session bus: every such question is then answered with yes and no log line.
    """

    def __init__(
        self,
        policy: Policy,
        credentials: CredentialsLike,
        at_console: bool = False,
        owner: int | None = None,
    ) -> None:
        self._policy = policy
        self._others: dict[tuple[int, int, tuple[int, ...], bool], ClientPolicy] = {}
        self._uid = credentials.uid
        self._gids = {credentials.gid, *credentials.groups}
        self._owner = os.geteuid() if owner is None else owner
        self._anonymous = credentials.anonymous
        rules = _arranged(policy, self._uid, self._gids, at_console, self._anonymous)
        self._connect = rules.connect
        self._own, self._send, self._receive = rules.own, rules.send, rules.receive
        self.allows_everything_to_own = rules.owns_all
        self.allows_everything_to_send = rules.sends_all
        self.allows_everything_to_receive = rules.receives_all
        self.send_depends = rules.send_depends
        self.receive_depends = rules.receive_depends

    def of(self, credentials: CredentialsLike) -> ClientPolicy:
        """The same policy as it applies to another client; kept for all who are alike to it."""
        key = credentials.uid, credentials.gid, tuple(credentials.groups), credentials.anonymous
        other = self._others.get(key)
        if other is None:
            other = self._others[key] = ClientPolicy(self._policy, credentials, owner=self._owner)
        return other

    def may_reach(self, other: ClientPolicy, names: Collection[str], its: Collection[str]) -> bool:
        """Whether any message of any kind may ever pass from this client, which has `names`, to one of
        policy `other`, which has the names `its`.

        No is sure, yes is not: rules that take back what others allow are not looked at, and each may
        come to own what it is allowed to."""
        return self._send.may_allow(other, its) and other._receive.may_allow(self, names)

    def can_connect(self) -> Verdict:
        """See `can_connect`."""
        if self._anonymous:
            return _ALLOWED
        return _can_connect(self._connect, self._uid, self._gids, self._owner)

    def can_own(self, name: str) -> Verdict:
        """Whether the client may request the well-known name `name`."""
        return _verdict(self._own, (name,), lambda rule: _prefix_matches(rule, (name,)))

    def can_send(
        self, message: Message, receiver_names: Collection[str], requested_reply: bool
    ) -> Verdict:
        """Whether the client may send `message` to the owner of `receiver_names`.

        `requested_reply`: the message answers a call of that very receiver that was open."""
        if self.allows_everything_to_send:
            return _ALLOWED
        type_, path, interface, member, error, destination, fds, _ = message
        reply = message.is_reply
        broadcast = destination is None and type_ == _SIGNAL

        def matches(rule: Rule) -> bool:
            return (
                (rule.member is None or member is None or rule.member == member)
                and (rule.type == 0 or rule.type == type_)
                and (
                    not reply
                    or (
                        requested_reply or not rule.requested_reply or rule.eavesdrop
                        if rule.allow
                        else rule.requested_reply or not requested_reply
                    )
                )
                and (rule.interface is None or _interface_matches(rule, interface))
                and (rule.path is None or path is None or rule.path == path)
                and (rule.error is None or error is None or rule.error == error)
                and (rule.broadcast is None or rule.broadcast is broadcast)
                and rule.min_fds <= fds <= rule.max_fds
                and (not rule.prefix or _prefix_matches(rule, receiver_names))
            )

        return _verdict(self._send, receiver_names, matches)

    def can_receive(
        self,
        message: Message,
        sender_names: Collection[str],
        requested_reply: bool,
        eavesdropping: bool = False,
    ) -> Verdict:
        """Whether the client may be given `message` from the owner of `sender_names`.

        `requested_reply`: it answers a call of this client that was open (replies of the bus
        itself always do). `eavesdropping`: it is addressed to someone else."""
        if self.allows_everything_to_receive:
            return _ALLOWED
        type_, path, interface, member, error, _, fds, _ = message
        reply = message.is_reply

        def matches(rule: Rule) -> bool:
            return (
                (rule.member is None or member is None or rule.member == member)
                and (rule.type == 0 or rule.type == type_)
                and (
                    not eavesdropping or rule.eavesdrop
                    if rule.allow
                    else eavesdropping or not rule.eavesdrop
                )
                and (
                    not reply
                    or (
                        requested_reply or not rule.requested_reply or rule.eavesdrop
                        if rule.allow
                        else rule.requested_reply or not requested_reply
                    )
                )
                and (rule.interface is None or _interface_matches(rule, interface))
                and (rule.path is None or path is None or rule.path == path)
                and (rule.error is None or error is None or rule.error == error)
                and rule.min_fds <= fds <= rule.max_fds
            )

        return _verdict(self._receive, sender_names, matches)


_ALLOWED = Verdict(True)


def _verdict(rules: _Rules, names: Collection[str], matches: Callable[[Rule], bool]) -> Verdict:
    rule = rules.last(names, matches)
    if rule is None:
        return Verdict(False)
    if rule.allow and not rule.log:
        return Verdict(True, rule)
    return Verdict(rule.allow, rule, rule.log, rules.count(names, matches))


def _interface_matches(rule: Rule, interface: str | None) -> bool:
    """The interface of a call is optional, and a rule must not be evaded by leaving it out."""
    return not rule.allow if interface is None else rule.interface == interface


def _prefix_matches(rule: Rule, names: Collection[str]) -> bool:
    """Whether one of `names` is the rule's, or below it."""
    if not rule.prefix:
        return True
    assert rule.name is not None
    below = rule.name + "."
    return any(name == rule.name or name.startswith(below) for name in names)


def can_connect(policy: Policy, credentials: CredentialsLike, owner: int) -> Verdict:
    """Whether the client may use the bus at all: user= and group= rules of the default and
    mandatory contexts; without one only the user that the bus runs as may, not even root."""
    if credentials.anonymous:
        return _ALLOWED
    gids = {credentials.gid, *credentials.groups}
    return _can_connect(_arranged(policy, -1, (), False).connect, credentials.uid, gids, owner)


def _can_connect(rules: tuple[Rule, ...], uid: int, gids: Collection[int], owner: int) -> Verdict:
    verdict = Verdict(uid == owner)
    for rule in rules:
        if rule.id is None or (rule.id == uid if rule.kind == USER else rule.id in gids):
            verdict = Verdict(rule.allow, rule)
    return verdict


def _effective(rules: list[Rule], kind: int) -> list[Rule]:
    """The rules of `kind` that can still decide something.

    A rule that gives none of type, path, interface, member, error and name cancels all before it.
    dbus-daemon does so without looking at the other attributes, so that after
    <allow send_broadcast="true"/>, say, only later rules can allow anything else. That is stricter
    than dbus-daemon(1) says, and kept: a configuration means here what it means there.
    """
    chosen: list[Rule] = []
    for rule in rules:
        if rule.kind == kind:
            if _is_blanket(rule):
                chosen.clear()
            chosen.append(rule)
    return chosen


def _is_blanket(rule: Rule) -> bool:
    return (
        rule.type == 0
        and rule.path is None
        and rule.interface is None
        and rule.member is None
        and rule.error is None
        and rule.name is None
    )


def _trivial(rules: list[Rule]) -> bool:
    """Whether `rules` allow everything and log nothing."""
    return all(rule.allow and not rule.log for rule in rules) and any(
        _is_blanket(rule)
        and rule.broadcast is None
        and rule.min_fds == 0
        and rule.max_fds >= MAX_FDS
        # An allow rule is no use to an eavesdropper or for unrequested replies without it.
        and (rule.eavesdrop or rule.kind == OWN)
        for rule in rules
    )


def _depends(rules: list[Rule]) -> Depends:
    return Depends(
        path=any(rule.path is not None for rule in rules),
        interface=any(rule.interface is not None for rule in rules),
        member=any(rule.member is not None for rule in rules),
        error=any(rule.error is not None for rule in rules),
        fds=any(rule.min_fds > 0 or rule.max_fds < MAX_FDS for rule in rules),
        broadcast=any(rule.broadcast is not None for rule in rules),
    )


def explain(verdict: Verdict) -> str:
    """The reason for a verdict, for the log: which rule, where."""
    if verdict.rule is None:
        return "allowed by default" if verdict.allowed else "no rule allows it"
    return f"{'allowed' if verdict.allowed else 'denied'} by rule {verdict.rule.place}"


def login_info(uid: int, pid: int, command: str, label: str = "") -> str:
    """How refusals describe a connection: numbers, program, security label where there is one. A worker, which may not
    read /proc, knows no `command`; dbus-daemon, where it can't, says comm="" as well."""
    parts = [f"uid={uid}", f"pid={pid}", f'comm="{command}"']
    if label:
        parts.append(f'label="{label}"')
    return " ".join(parts)


def complaint(
    verdict: Verdict,
    message: Message,
    side: Literal["send", "receive"],
    *,
    sender: str,
    sender_info: str,
    receiver_info: str,
    requested_reply: bool,
    why: str = "",
) -> str:
    """The text of the AccessDenied error for a refused message, or the log line for an allowed one
    whose verdict has `log` set, as dbus-daemon words them, with `why` at the end, or the rule. `side`: whose
    policy it is, the sender's or the receiver's. The infos are `login_info`'s; of the bus itself
    "bus"."""
    what = "Would reject message" if verdict.allowed else f"Rejected {side} message"

    def shown(value: str | None) -> str:
        return "(unset)" if value is None else value

    return (
        f'{what}, {verdict.matched} matched rules; type="{_TYPE_NAMES[message.type]}", '
        f'sender="{sender}" ({sender_info}) interface="{shown(message.interface)}" '
        f'member="{shown(message.member)}" error name="{shown(message.error_name)}" '
        f'requested_reply="{int(requested_reply)}" '
        f'destination="{message.destination or DRIVER_NAME}" ({receiver_info}) '
        f"({why or explain(verdict)})"
    )


def own_rejection(verdict: Verdict, connection: str, name: str) -> str:
    """The text of the AccessDenied error for a RequestName that was refused."""
    return (
        f'Connection "{connection}" is not allowed to own the service "{name}" due to security '
        f"policies in the configuration file ({explain(verdict)})"
    )
