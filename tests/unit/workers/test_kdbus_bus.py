"""What another kdbus client's worker sends, which its client may have taken over."""

from __future__ import annotations

import errno
import os
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from kbusd.kdbus import abi, layout, parcel, payload
from kbusd.kdbus.errors import Errno
from kbusd.kdbus.parcel import BYTES, MEMFD, Parcel, ParcelError
from kbusd.rings import memfd
from kbusd.rings.entries import (
    ConnectionAdded,
    Credentials,
    CustomChanged,
    NameOwnerChanged,
    NamePolicyChanged,
    PolicyEntry,
)
from kbusd.workers import kdbus_coming
from kbusd.workers.kdbus_bus import Port
from kbusd.workers.replica import Replica

ME, PEER = 1, 2
NAME = "com.example.Name"
OWNER = 500


class Policy:
    """Denies what the set `denied` has of "send" and "receive"; of everybody."""

    def __init__(self, *denied: str) -> None:
        self.allows_everything_to_send = "send" not in denied
        self.allows_everything_to_receive = "receive" not in denied

    def of(self, credentials: Credentials) -> Policy:
        return self

    def can_send(self, *_: Any, **__: Any) -> Any:
        return SimpleNamespace(allowed=False, log=False, rule=None)

    can_receive = can_send


class Received:
    """A session that only takes messages."""

    kind = 0

    def __init__(self) -> None:
        self.messages: list[tuple[int, list[Any]]] = []
        self.ordered: list[str] = []

    def name_changed(self, *_: Any) -> None:
        pass

    def put_in_order(self, name: str) -> None:
        self.ordered.append(name)

    def receive(
        self, source: Any, found: Parcel, parts: list[Any], stamp: int, fds: tuple[int, ...] = ()
    ) -> None:
        self.messages.append((source.id, parts))


def port(
    policy: Policy, peer: int = 1000 + PEER, closed: bool = False, behind: int = 0
) -> tuple[Port, Received]:
    bus = SimpleNamespace(system=False, owner=OWNER, label=b"")
    context: Any = SimpleNamespace(guid="0" * 32, bus=bus, maker=None, closed=closed)
    made = Port(context, "0-test", SimpleNamespace())
    made.device = SimpleNamespace(attached=None, users=0, show_events=lambda: None)  # type: ignore[assignment]
    replica = Replica()
    replica.me = ME
    for id in (ME, PEER):
        uid = peer if id == PEER else 1000 + id
        endpoint = behind if id == PEER else 0
        replica.apply(ConnectionAdded(id, Credentials(uid, 1000, 50), 0, endpoint))
    made.make_router(replica, policy, lambda _: None)  # type: ignore[arg-type]
    session = made.session = Received()  # type: ignore[assignment]
    return made, session


def give(to: Port, found: Parcel, data: bytes = b"", *fds: int) -> int:
    peer = SimpleNamespace(id=PEER, connection=None)
    return to.parcel(peer, parcel.encode(found), data, fds, 7)


def message(*parts: tuple[int, int, int], dst: int = ME) -> Parcel:
    return Parcel(0, 0, dst, abi.PAYLOAD_DBUS, 1, 0, parts)


def test_a_parcel_is_handed_on_with_the_bytes_of_its_memfds() -> None:
    bus, session = port(Policy())
    fd = memfd.sealed("test", b"in a memfd")
    assert give(bus, message((BYTES, 2, 0), (MEMFD, 5, 5)), b"ab", fd) == 0
    assert session.messages == [(PEER, [b"ab", b"memfd"])]
    os.close(fd)


@pytest.mark.parametrize("denied", [(), ("send",), ("receive",)])
def test_a_memfd_that_is_not_what_it_should_be_is_the_senders_trouble(
    denied: tuple[str, ...],
) -> None:
    bus, session = port(Policy(*denied))
    unsealed = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    os.ftruncate(unsealed, 10)
    pipe, end = os.pipe()
    sealed = memfd.sealed("test", b"short")
    part = (MEMFD, 6, 0)
    for fd, number in ((unsealed, "ETXTBSY"), (pipe, "EMEDIUMTYPE"), (sealed, "EFAULT")):
        assert errno.errorcode[give(bus, message(part), b"", fd)] == number
    assert not session.messages
    for fd in (unsealed, pipe, end, sealed):
        os.close(fd)


@pytest.mark.parametrize("denied", ["send", "receive"])
def test_policy_of_both_sides_is_asked_whatever_the_senders_worker_did(
    denied: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kbusd.policy.decide.complaint", lambda *_, **__: "no")
    bus, session = port(Policy(denied))
    call = payload.write(payload.Message(type=1, cookie=1, path="/x", member="Do"))
    found = Parcel(
        abi.MSG_EXPECT_REPLY, 0, ME, abi.PAYLOAD_DBUS, 1, 1 << 60, ((BYTES, len(call), 0),)
    )
    assert give(bus, found, call) == errno.EPERM
    assert give(bus, message((BYTES, 3, 0)), b"raw") == errno.EPERM
    assert not session.messages


def test_a_parcel_for_somebody_else_breaks_a_rule() -> None:
    bus, _ = port(Policy())
    with pytest.raises(ParcelError):
        give(bus, message(dst=77))
    with pytest.raises(ParcelError):
        bus.parcel(SimpleNamespace(id=99, connection=None), parcel.encode(message()), b"", (), 7)


def test_what_the_session_refuses_is_told_to_the_sender() -> None:
    bus, session = port(Policy())

    def refuse(*_: Any) -> None:
        raise Errno(errno.ENOBUFS, "full")

    session.receive = refuse  # type: ignore[method-assign]
    assert give(bus, message()) == errno.ENOBUFS


def passed_on(**changes: Any) -> Parcel:
    """A message of somebody who is gone to the name a.b, of which PEER had some part."""
    given = message((BYTES, 2, 0))
    return msgspec.structs.replace(
        given, **{"origin": layout.U64.pack(77), "dst_name": "a.b"} | changes
    )


@pytest.mark.parametrize("peer", [0, OWNER, 1000])
def test_who_had_a_name_passes_on_what_was_sent_to_it_and_nothing_else(peer: int) -> None:
    bus, session = port(Policy(), peer)
    bus.engine_router.replica.apply(NameOwnerChanged("a.b", 0, ME, activator=PEER))
    assert give(bus, passed_on(), b"ab") == 0
    assert session.messages == [(77, [b"ab"])]
    changes = {"dst_name": "a.c", "reply_or_timeout": 3, "dst_id": PEER}
    for name, value in changes.items():
        with pytest.raises(ParcelError):
            give(bus, passed_on(**{name: value}), b"ab")
    assert len(session.messages) == 1


def test_who_sends_again_says_of_nobody_else_that_it_was_his() -> None:
    bus, session = port(Policy())
    bus.engine_router.replica.apply(NameOwnerChanged("a.b", 0, ME, activator=ME))
    assert give(bus, passed_on(origin=layout.U64.pack(PEER)), b"ab") == 0
    assert session.messages == [(PEER, [b"ab"])]


@pytest.mark.parametrize("activator", [0, ME])
def test_nobody_else_says_whose_a_message_was(activator: int) -> None:
    bus, session = port(Policy(), 0)
    bus.engine_router.replica.apply(NameOwnerChanged("a.b", 0, ME, activator=activator))
    with pytest.raises(ParcelError):
        give(bus, passed_on(), b"ab")
    assert not session.messages


def enter(to: Port, *changes: NameOwnerChanged) -> None:
    """What stands in the log is taken in, as the engine does it."""
    for each in changes:
        to.before_entry(msgspec.msgpack.encode(each))
        to.engine_router.replica.apply(each)
        to.after_entry()


def moved(coming: dict[int, int]) -> bytes:
    return kdbus_coming.write(kdbus_coming.Moved(NAME, coming))


def test_an_activator_waits_for_what_who_had_its_name_says_will_come() -> None:
    bus, session = port(Policy())
    enter(
        bus, NameOwnerChanged(NAME, 0, ME, (), (), ME), NameOwnerChanged(NAME, ME, PEER, (), (), ME)
    )
    assert bus.coming_back() is None
    bus.call_dropped(PEER, moved({PEER: 2}))  # its file is being closed
    assert bus.coming_back() is None
    enter(bus, NameOwnerChanged(NAME, PEER, ME, (), (), ME))
    wait = bus.coming_back()
    assert wait is not None
    bus.call_dropped(PEER, moved({}))
    for _ in range(2):
        assert not wait.settled
        give(bus, msgspec.structs.replace(message((BYTES, 1, 0)), dst_name=NAME), b"x")
    assert wait.settled
    assert bus.coming_back() is None
    assert session.ordered == [NAME]


def test_nobody_else_makes_an_activator_wait() -> None:
    bus, _ = port(Policy())
    enter(bus, NameOwnerChanged(NAME, 0, ME, (), (), ME))
    bus.call_dropped(PEER, moved({PEER: 2}))  # who never had the name
    enter(bus, NameOwnerChanged(NAME, ME, PEER, (), (), ME))
    for note in (moved({PEER: 1}), kdbus_coming.NOTE, kdbus_coming.NOTE + b"\xc1"):
        bus.call_dropped(PEER, note)
        assert bus.coming_back() is None  # and who has it does only when it is given back
    enter(bus, NameOwnerChanged(NAME, PEER, ME, (), (), ME))
    wait = bus.coming_back()
    assert wait is not None
    bus.call_dropped(ME, moved({}))
    assert not wait.settled
    enter(bus, NameOwnerChanged(NAME, ME, PEER, (), (), ME))  # it is taken once more
    assert wait.settled


def test_on_a_made_bus_whom_no_policy_lets_talk_is_refused_by_the_receiver_too() -> None:
    bus, session = port(Policy(), closed=True)
    assert give(bus, message((BYTES, 3, 0)), b"raw") == errno.EPERM
    entry = PolicyEntry("a.b", False, ((abi.POLICY_ACCESS_WORLD, abi.POLICY_TALK, 0),))
    replica = bus.engine_router.replica
    replica.apply(NamePolicyChanged(PEER, (entry,)))
    assert give(bus, message((BYTES, 3, 0)), b"raw") == errno.EPERM
    replica.apply(NameOwnerChanged("a.b", 0, ME))
    assert give(bus, message((BYTES, 3, 0)), b"raw") == 0
    assert session.messages == [(PEER, [b"raw"])]


@pytest.mark.parametrize("peer", [0, 1000 + ME, 1000 + PEER])
def test_who_is_behind_an_endpoint_that_does_not_let_it_talk_is_refused(peer: int) -> None:
    bus, session = port(Policy(), peer, behind=5)
    assert give(bus, message((BYTES, 3, 0)), b"raw") == errno.EPERM
    replica = bus.engine_router.replica
    replica.apply(NameOwnerChanged("a.b", 0, ME))
    for access, number in ((abi.POLICY_SEE, errno.EPERM), (abi.POLICY_TALK, 0)):
        entry = PolicyEntry("a.b", False, ((abi.POLICY_ACCESS_WORLD, access, 0),))
        replica.apply(CustomChanged(5, (entry,)))
        assert give(bus, message((BYTES, 3, 0)), b"raw") == number
    replica.apply(CustomChanged(5, ()))
    assert give(bus, message((BYTES, 3, 0)), b"raw") == errno.EPERM
    assert session.messages == [(PEER, [b"raw"])]


@pytest.mark.parametrize("peer", [0, OWNER])
def test_nobody_behind_an_endpoint_passes_messages_on(peer: int) -> None:
    bus, _ = port(Policy(), peer, behind=5)
    bus.engine_router.replica.apply(NameOwnerChanged("a.b", 0, ME, activator=PEER))
    passed = passed_on()
    with pytest.raises(ParcelError):
        give(bus, passed)
