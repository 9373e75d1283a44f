"""Whom a message goes to, and whether it may: the part of routing that is decided once per kind.

Plain Python, off the hot path: the engine keeps each answer under the bytes of the header until
names, match rules or policy change. The sender's worker asks the policy of both sides in `decide`,
so that its client and the monitors hear of a refusal at its place among what the client sends; the
receiver's worker asks both again in `admit`, as the sender's may have been taken over. Every refusal
names the rule with its file and line.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from kbusd.policy import decide as policy
from kbusd.policy.endpoints import Asked
from kbusd.rings.envelope import Envelope
from kbusd.workers.behind import Sight
from kbusd.workers.introspection import PEER
from kbusd.workers.replica import (
    BUS_ID,
    BUS_NAME,
    NOBODY,
    Connection,
    Replica,
    unique_name,
)

if TYPE_CHECKING:
    from kbusd.workers.name_policies import NamePolicies

CALL, RETURN, ERROR, SIGNAL = 1, 2, 3, 4
NO_AUTO_START = 0x2

Args = Callable[[], Sequence[str | None]]

UNKNOWN_TYPE_TEXT = "Message bus will not accept messages of unknown type\n"

ACCESS_DENIED = "org.freedesktop.DBus.Error.AccessDenied"
NAME_HAS_NO_OWNER = "org.freedesktop.DBus.Error.NameHasNoOwner"
SERVICE_UNKNOWN = "org.freedesktop.DBus.Error.ServiceUnknown"


class Decision(NamedTuple):
    """`targets`: connection ids (-1 the bus itself). `error`: name and text of a refusal.
    `activate`: the name to be started first. `depends`: on the message's arguments, or each is logged.
    `refusals`: why subscribers do not get a broadcast; only monitors are told. `eavesdroppers`: who
    sees a message that is addressed to another. `spends`: whose call is answered by what policy refuses: as on
    dbus-daemon, no other answer to it is let through then."""

    targets: tuple[int, ...] = ()
    broadcast: bool = False
    depends: bool = False
    error: tuple[str, str] | None = None
    activate: str | None = None
    refusals: tuple[str, ...] = ()
    eavesdroppers: tuple[int, ...] = ()
    spends: int | None = None


class Router:
    """Decides for one client (the replica's `me`); `say` gets what the admin is to read: refusals,
    and what a rule with log="true" allows.

    `sight`: what our client sees of the bus, if it came by an endpoint. `looked`: whether the last answer
    depends on the message's arguments. `names`: the policy of kdbus, which must allow it, too."""

    def __init__(
        self,
        replica: Replica,
        client_policy: policy.ClientPolicy,
        say: Callable[[str], None],
        bus_label: str = "",
        names: NamePolicies | None = None,
    ) -> None:
        self.replica = replica
        self.policy = client_policy
        self.bus_label = bus_label
        self.names = names
        self._say = say
        self._noted = False
        self.sight: Sight | None = None
        self.looked = False

    def decide(self, envelope: Envelope, flags: int, fds: int, args: Args) -> Decision:
        """For a message of our own client."""
        self._noted = False
        decision = self._decide(envelope, flags, fds, self._watched(args))
        if decision.error is not None and decision.error[0] == ACCESS_DENIED:
            self._say(decision.error[1])
        for refusal in decision.refusals:
            self._say(refusal)
        if self.replica.eavesdroppers and decision.targets and envelope.destination is not None:
            decision = self._overheard(decision, envelope, fds, args)
        return decision._replace(depends=True) if self._noted or self.looked else decision

    def _watched(self, args: Args) -> Args:
        """The same, and `looked` tells whether they were looked at."""
        self.looked = False

        def look() -> Sequence[str | None]:
            self.looked = True
            return args()

        return look

    def _decide(self, envelope: Envelope, flags: int, fds: int, args: Args) -> Decision:
        if envelope.destination is None:
            if envelope.type == SIGNAL and not self._is_for_the_bus_alone(envelope):
                return self._broadcast(envelope, fds, args)
            return Decision(targets=(BUS_ID,))
        id = self.replica.owner(envelope.destination)
        if self.sight is not None:
            refused = self.sight.refuses(envelope, id, flags, args)
            if refused is not None:
                return Decision(error=refused)
        if id is None:
            return self._unowned(envelope, flags, fds)
        if not CALL <= envelope.type <= SIGNAL:
            return Decision(error=(ACCESS_DENIED, UNKNOWN_TYPE_TEXT))
        if id == BUS_ID and not self.replica.me:
            return Decision(targets=(id,))  # who may connect may say Hello; the driver sees to it
        names = self.replica.policy_names(id)
        refusal = self._may_send(envelope, id, names, fds) or self._may_receive(envelope, id, fds)
        if refusal is not None:
            spends = id if _carries(envelope) and id != BUS_ID else None
            return Decision(error=(ACCESS_DENIED, refusal), spends=spends)
        return Decision(targets=(id,))

    def _is_for_the_bus_alone(self, envelope: Envelope) -> bool:
        """Whether libdbus keeps a signal to itself: all that is of this interface and has no destination it takes for
        calls. kdbus has no libdbus."""
        me = self.replica.connections.get(self.replica.me)
        return envelope.interface == PEER and (me is None or me.kdbus is None)

    def _broadcast(self, envelope: Envelope, fds: int, args: Args) -> Decision:
        ids, depends = self.replica.subscribers(
            SIGNAL,
            self.replica.me,
            None,
            envelope.path,
            envelope.interface,
            envelope.member,
            args,
        )
        targets: list[int] = []
        refusals: list[str] = []
        for id in ids:
            if not self._may_hear(self.replica.connections[id], self.replica.me, envelope, args):
                continue
            refusal = self._may_send(
                envelope, id, self.replica.policy_names(id), fds
            ) or self._may_receive(envelope, id, fds)
            if refusal is None:
                targets.append(id)
            else:
                refusals.append(refusal)
        return Decision(tuple(targets), broadcast=True, depends=depends, refusals=tuple(refusals))

    def _overheard(
        self,
        decision: Decision,
        envelope: Envelope,
        fds: int,
        args: Callable[[], Sequence[str | None]],
    ) -> Decision:
        """With those who see a message besides the one whom it goes to. What policy keeps from them is
        not logged: nobody sent it to them."""
        replica = self.replica
        ids, depends = replica.overhearing(
            envelope.type,
            replica.me,
            envelope.destination,
            envelope.path,
            envelope.interface,
            envelope.member,
            args,
        )
        ids = tuple(
            id
            for id in ids
            if id not in decision.targets
            and self._may_overhear(replica.connections[id], self.policy, envelope, replica.me, fds)
        )
        return decision._replace(eavesdroppers=ids, depends=decision.depends or depends)

    def _may_overhear(
        self,
        eavesdropper: Connection,
        senders: policy.ClientPolicy,
        envelope: Envelope,
        sender: int,
        fds: int,
    ) -> bool:
        """Whether policy lets it see what `sender` sends to another. A reply is none that it asked for."""
        message = as_message(envelope, fds)
        receivers = self.policy.of(eavesdropper.credentials)
        names = self.replica.policy_names(eavesdropper.id)
        return (
            senders.can_send(message, names, requested_reply=False).allowed
            and receivers.can_receive(
                message, self.replica.policy_names(sender), False, eavesdropping=True
            ).allowed
        )

    def admit_overheard(
        self,
        envelope: Envelope,
        sender: Connection,
        fds: int,
        args: Callable[[], Sequence[str | None]],
    ) -> tuple[bool, bool]:
        """Whether our client may see what `sender` sends to another, and wants to; and whether that
        depends on its arguments."""
        replica = self.replica
        me = replica.connections.get(replica.me)
        if (
            me is None
            or envelope.destination is None
            or replica.owner(envelope.destination) == me.id
        ):
            return False, False
        ids, depends = replica.overhearing(
            envelope.type,
            sender.id,
            envelope.destination,
            envelope.path,
            envelope.interface,
            envelope.member,
            args,
            only=me.id,
        )
        senders = self.policy.of(sender.credentials)
        return bool(ids) and self._may_overhear(me, senders, envelope, sender.id, fds), depends

    def _unowned(self, envelope: Envelope, flags: int, fds: int) -> Decision:
        name = envelope.destination
        assert name is not None
        if flags & NO_AUTO_START:
            return Decision(error=(NAME_HAS_NO_OWNER, f'Name "{name}" does not exist'))
        if name.startswith(":"):
            text = f"The name {name} was not provided by any .service files"
            return Decision(error=(SERVICE_UNKNOWN, text))
        if name in self.replica.activatable:
            if not CALL <= envelope.type <= SIGNAL:
                return Decision(error=(ACCESS_DENIED, UNKNOWN_TYPE_TEXT))
            refusal = self._may_send(envelope, NOBODY, (name,), fds)
            if refusal is not None:
                return Decision(error=(ACCESS_DENIED, refusal))
        return Decision(activate=name)

    def _may_send(
        self, envelope: Envelope, receiver: int, names: Sequence[str], fds: int
    ) -> str | None:
        """None if our client may send this to the owner of `names`, else why not."""
        me = self.replica.me
        connections = self.replica.connections
        return self._sent(self.policy, envelope, me, receiver, names, fds) or self._may_talk(
            envelope, connections.get(me), connections.get(receiver)
        )

    def _may_talk(
        self, envelope: Envelope, sender: Connection | None, receiver: Connection | None
    ) -> str | None:
        """Of a signal, its receiver must be allowed to talk to its sender, of a call the other way
        round; a reply was asked for. None is the bus."""
        if self.names is None or sender is None or receiver is None:
            return None
        if envelope.type in (RETURN, ERROR):
            return None
        if envelope.type == SIGNAL:
            return self.names.refusal(receiver, sender, hears=True)
        return self.names.refusal(sender, receiver)

    def _sent(
        self,
        senders: policy.ClientPolicy,
        envelope: Envelope,
        sender: int,
        receiver: int,
        names: Sequence[str],
        fds: int,
        asked: bool = True,
    ) -> str | None:
        """What its sender's policy says. `asked`: if it is an answer, its receiver waits for it. Only the receiver's
        worker knows that; the sender's takes it for granted."""
        if self.replica.apart and (labels := self.replica.kept_apart(sender, receiver)):
            return self._kept_apart(envelope, sender, receiver, labels)
        if senders.allows_everything_to_send:
            return None
        message = as_message(envelope, fds)
        requested = asked and _may_be_asked_for(envelope, receiver)
        verdict = senders.can_send(message, names, requested_reply=requested)
        logged = verdict.log and sender == self.replica.me  # once, by the sender's worker
        if verdict.allowed and not logged:
            return None
        text = policy.complaint(
            verdict,
            message,
            "send",
            sender=unique_name(sender),
            sender_info=self._info(sender),
            receiver_info=self._info(receiver),
            requested_reply=requested,
        )
        if not verdict.allowed:
            return text
        self._noted = True
        self._say(text)
        return None

    def _kept_apart(
        self, envelope: Envelope, sender: int, receiver: int, labels: tuple[bytes, bytes]
    ) -> str:
        """Why SELinux refuses this, in words that audit2allow(1) knows."""
        one, other = (each.decode(errors="replace") or self.bus_label for each in labels)
        what = envelope.member or envelope.error_name or "a reply"
        return (
            f"An SELinux policy prevents {unique_name(sender)} ({self._info(sender)}) from sending"
            f" {what} to {unique_name(receiver)} ({self._info(receiver)}): avc:  denied  {{ send_msg }}"
            f" for scontext={one} tcontext={other} tclass=dbus"
        )

    def _may_receive(self, envelope: Envelope, receiver: int, fds: int) -> str | None:
        """None if the receiver may get this from our client, else why not."""
        other = self.replica.connections.get(receiver)
        if other is None:  # the bus itself
            return None
        requested = _may_be_asked_for(envelope, receiver)
        return self._received(
            self.policy.of(other.credentials), envelope, self.replica.me, receiver, fds, requested
        )

    def _may_hear(self, receiver: Connection, sender: int, envelope: Envelope, args: Args) -> bool:
        """Whether the endpoint of a subscriber lets a broadcast through."""
        endpoint = receiver.credentials.endpoint
        if not endpoint or receiver.id == sender:
            return True
        asked = Asked(envelope.path, envelope.interface, envelope.member, args)
        names = self.replica.connections[sender].names
        return self.replica.view(endpoint).may_hear(names, asked)

    def _passes(self, envelope: Envelope, sender: Connection, args: Args) -> bool:
        """What the endpoints of the sender and of our client say. Ours has met whoever sent it something."""
        mine = self.replica.connections[self.replica.me]
        if envelope.destination is None:
            return self._may_hear(mine, sender.id, envelope, args)
        if envelope.type in (RETURN, ERROR):
            return True
        endpoint = sender.credentials.endpoint
        if endpoint and sender is not mine:
            asked = Asked(envelope.path, envelope.interface, envelope.member, args)
            if not self.replica.view(endpoint).may_call(mine.names, asked):
                return False
        if self.sight is not None:
            self.sight.meet(sender.id)
        return True

    def admit(
        self, envelope: Envelope, sender: Connection, fds: int, args: Args = tuple
    ) -> str | None:
        """None if `sender` may send us this and our client may get it, else why not.

        Replies come here only if our client asked for them."""
        me = self.replica.me
        if (self.sight is not None or sender.credentials.endpoint) and not self._passes(
            envelope, sender, self._watched(args)
        ):
            text = f"an endpoint does not let this through from {sender.name}"
            self._say(text)
            return text
        refusal = (
            self._sent(
                self.policy.of(sender.credentials),
                envelope,
                sender.id,
                me,
                self.replica.policy_names(me),
                fds,
            )
            or self._received(
                self.policy, envelope, sender.id, me, fds, _may_be_asked_for(envelope, me)
            )
            or self._may_talk(envelope, sender, self.replica.connections.get(me))
        )
        if refusal is not None:
            self._say(refusal)
        return refusal

    def refuses_unasked(self, envelope: Envelope, sender: Connection, fds: int) -> str | None:
        """Why our client does not get a call or a signal that says that it answers one of our client's, but does not.
        Its policy is that for replies which nobody has asked for."""
        me = self.replica.me
        names, senders = self.replica.policy_names(me), self.policy.of(sender.credentials)
        return self._sent(
            senders, envelope, sender.id, me, names, fds, asked=False
        ) or self._received(self.policy, envelope, sender.id, me, fds, requested=False)

    def unasked(self, envelope: Envelope, sender: Connection, fds: int) -> str:
        """Why our client does not get a reply of `sender`: it asked for none. dbus-daemon says so
        where no rule lets such replies pass; here none does."""
        message = as_message(envelope, fds)
        verdict = self.policy.of(sender.credentials).can_send(
            message, self.replica.policy_names(self.replica.me), requested_reply=False
        )
        text = policy.complaint(
            policy.Verdict(False, matched=verdict.matched),
            message,
            "send",
            sender=sender.name,
            sender_info=self._info(sender.id),
            receiver_info=self._info(self.replica.me),
            requested_reply=False,
            why="nobody waits for it",
        )
        self._say(text)
        return text

    def admit_from_bus(self, envelope: Envelope) -> str | None:
        """The same for a message of the bus itself to our client."""
        return self._received(self.policy, envelope, BUS_ID, self.replica.me, 0, _carries(envelope))

    def refused_from_bus(self, envelope: Envelope, args: Args) -> list[str]:
        """Why clients do not get a signal of the bus that our client, a monitor, sees; nothing if it
        does not watch errors."""
        watching, _ = self.replica.watching(ERROR, BUS_ID, BUS_NAME, None, None, None, tuple)
        if self.replica.me not in watching:
            return []
        if envelope.destination is not None:
            id = self.replica.owner(envelope.destination)
            ids: Sequence[int] = () if id is None else (id,)
        else:
            ids, _ = self.replica.subscribers(
                SIGNAL, BUS_ID, None, envelope.path, envelope.interface, envelope.member, args
            )
        receivers = [self.replica.connections[id] for id in ids]
        texts = [
            self._received(self.policy.of(each.credentials), envelope, BUS_ID, each.id, 0, False)
            for each in receivers
        ]
        return [text for text in texts if text is not None]

    def _received(
        self,
        receivers: policy.ClientPolicy,
        envelope: Envelope,
        sender: int,
        receiver: int,
        fds: int,
        requested: bool,
    ) -> str | None:
        if sender == BUS_ID and (labels := self.replica.kept_apart(sender, receiver)):
            return self._kept_apart(envelope, sender, receiver, labels)
        if receivers.allows_everything_to_receive:
            return None
        message = as_message(envelope, fds)
        names = self.replica.policy_names(sender)
        verdict = receivers.can_receive(message, names, requested_reply=requested)
        if verdict.allowed:
            return None
        from_bus = sender == BUS_ID
        return policy.complaint(
            verdict,
            message,
            "receive",
            sender="(unset)" if from_bus else unique_name(sender),
            sender_info="(bus)" if from_bus else self._info(sender),
            receiver_info=self._info(receiver),
            requested_reply=requested,
        )

    def _info(self, id: int) -> str:
        connection = self.replica.connections.get(id)
        if connection is None:
            return "bus"
        credentials = connection.credentials
        label = credentials.label.decode(errors="replace")
        return policy.login_info(credentials.uid, credentials.pid, "", label)


def _carries(envelope: Envelope) -> bool:
    """Whether it has a REPLY_SERIAL."""
    return envelope.answers or envelope.type in (RETURN, ERROR)


def _may_be_asked_for(envelope: Envelope, receiver: int) -> bool:
    """Whether it may answer a call of the receiver's. The bus itself calls nobody, nor does who is not there yet, and
    what goes to all is no answer."""
    return (
        _carries(envelope) and envelope.destination is not None and receiver not in (BUS_ID, NOBODY)
    )


def as_message(envelope: Envelope, fds: int) -> policy.Message:
    return policy.Message(
        envelope.type,
        envelope.path,
        envelope.interface,
        envelope.member,
        envelope.error_name,
        envelope.destination,
        fds,
        envelope.answers,
    )
