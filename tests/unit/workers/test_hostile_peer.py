"""A worker whose peer was taken over: whatever that sends, the worker's client gets valid messages
or none, and nothing of the worker is used up.

The worker runs in a process of its own; the test plays its supervisor, its broker, its client and
the hostile peer, which was introduced as any other and then writes into its ring what it likes.
"""

from __future__ import annotations

import array
import contextlib
import os
import random
import select
import signal
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import msgspec
import pyseccomp
import pytest

from kbusd.policy import configuration, endpoints
from kbusd.rings import entries, envelope, memfd
from kbusd.rings.broadcast import Broadcast
from kbusd.rings.bulk import Bulk
from kbusd.rings.clock import Clock
from kbusd.rings.envelope import Envelope
from kbusd.rings.ring import Ring
from kbusd.rings.status import StatusPage, StatusView
from kbusd.rings.values import Frame
from tests.bus import wireformat as w
from tests.bus.lingering import lingering
from tests.bus.procs import eventually
from tests.unit import carriers
from tests.unit.workers.alone import start_worker
from tests.unit.workers.test_rehearsal import EVERYTHING, context

OPEN = EVERYTHING.replace("</policy>", '<allow receive_sender="*"/></policy>')
CALL, RETURN, ERROR, SIGNAL = 1, 2, 3, 4
MESSAGE, LOG, COPY, REFUSED, BULK, SPENT = 1, 2, 5, 6, 7, 11
VICTIM, PEER = 1, 2
HELD = 3  # descriptors of a peer: bell, side socket, carrier
FRESH = 1 << 63  # in `aux`
PIPE = 1 << 62  # was another: the body is in a pipe
AT = 100
SECONDS = 20
HELLO = {w.PATH: "/", w.DESTINATION: "org.freedesktop.DBus", w.MEMBER: "Hello"}


class Stage:
    """The worker under test, with everybody around it."""

    def __init__(
        self,
        directory: Path,
        configuration: str,
        endpoint: tuple[str, ...] | None = None,
        guarded: bool = True,
        large: bool = False,
    ) -> None:
        """`endpoint`: what the one that the peer is behind says. `guarded`: the kernel keeps
        descriptors out of the carrier, as the broker asks it to. `large`: the peer has a large area."""
        self.endpoint = endpoint
        self.guarded = guarded
        self.large = large
        self.clock = Clock()
        self.log = Broadcast(65536)
        made = msgspec.structs.replace(context(directory, configuration), log_fd=self.log.fileno())
        self.pid, self.client, served, self.supervisor, self.broker = start_worker(made)
        self.buffer = b""
        self._say_hello(served)
        self._introduce()

    def _say_hello(self, served: socket.socket) -> None:
        who = entries.Credentials(os.geteuid(), os.getegid(), os.getpid())
        self.supervisor.send(entries.Client(who), [served.fileno()])
        served.close()
        self.client.sendall(b"\0AUTH EXTERNAL\r\nDATA\r\nNEGOTIATE_UNIX_FD\r\nBEGIN\r\n")
        self.client.sendall(w.build(w.CALL, HELLO))
        request = self.asked(entries.Hello)
        theirs, said, names = who, (), ()
        if self.endpoint is not None:
            theirs = msgspec.structs.replace(who, endpoint="app")
            names = (("t.Victim", VICTIM),)
            said = (("app", endpoints.encode(endpoints.parse("app", self.endpoint))),)
        people = ((VICTIM, who), (PEER, theirs))
        state = entries.Snapshot(0, self.clock.tick(), people, names, (), (), (), 0, endpoints=said)
        snapshot = memfd.sealed("snapshot", msgspec.msgpack.encode(state))
        self.broker.send(entries.Reply(request.request, VICTIM), [snapshot])
        os.close(snapshot)
        while self.buffer.count(b"\r\n") < 3:
            self.buffer += self.client.recv(4096)
        self.buffer = self.buffer.split(b"\r\n", 3)[3]
        assert self.read().reply_serial == 1

    def asked(self, kind: type) -> entries.Request:
        """What the worker says to the broker, which must be of that kind."""
        received = self.broker.receive()
        assert received is not None and isinstance(received[0], kind), received
        self.fds = received[1]
        return received[0]

    def _introduce(self) -> None:
        """The peer's half, and what the worker answers."""
        self.ring, self.status = Ring(65536), StatusPage()
        self.broadcast = Broadcast(65536)
        shared = [socket.socketpair(), socket.socketpair(), carriers.pair(self.guarded)]
        self.bell, self.side, self.carry = (ours for ours, _ in shared)
        slots = self.status.take_slot(), self.status.take_slot()
        half = [self.ring.fileno(), self.status.fd, self.broadcast.fileno()]
        half += [theirs.fileno() for _, theirs in shared]
        self.broker.send(entries.Introduction(1, PEER, *slots), half)
        for _, theirs in shared:
            theirs.close()
        answer = self.asked(entries.Introduced)
        assert isinstance(answer, entries.Introduced)
        _, status, self.broadcast_fd = self.fds
        self.ring.connect(StatusView(status), answer.slot)
        self.bulk = Bulk(StatusView(status), answer.slot)
        self.bulk.make(self.large)

    def enter(self, entry: entries.LogEntry) -> None:
        self.log.append(2, self.clock.tick(), b"", msgspec.msgpack.encode(entry))

    # -- the peer --

    def write(
        self,
        facts: Envelope | bytes,
        kind: int = MESSAGE,
        body: bytes = b"",
        own: tuple[int, ...] = (),
        **head: int,
    ) -> None:
        """One frame, as the peer likes it; `fds` descriptors go with it, and its `own`."""
        stamp = self.clock.tick()
        if (count := head.get("fds", 0)) or own:
            null = os.open("/dev/null", os.O_RDONLY)
            passed = array.array("i", [null] * count + list(own))
            mark = stamp.to_bytes(8, "little")
            self.side.sendmsg([mark], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, passed)])
            os.close(null)
        raw = facts if isinstance(facts, bytes) else envelope.encode(facts)
        assert self.ring.write(Frame(kind, stamp, raw, body, **head))
        with contextlib.suppress(BrokenPipeError):  # it is dropped already
            self.bell.send(b"x")

    def send_carried(
        self, member: str, body: bytes, given: int, at: int = AT, count: int | None = None
    ) -> None:
        """A body of which `given` bytes from `at` on are in the carrier, and `count` are said to be."""
        assert given == 0 or self.carry.send(body[at : at + given]) == given
        aux = self.bulk.put(body)
        assert aux is not None
        own = (self.bulk.fd,) if aux & FRESH else ()
        told = struct.pack("=II", at, len(body) - at if count is None else count)
        call = Envelope(CALL, False, f":1.{VICTIM}", "/odd", "a.b", member, None, "ay")
        self.write(call, BULK, told, own, serial=3, aux=aux)

    # -- the client --

    def read(self) -> w.Message:
        """The next message that the client gets; fails if it is not a valid one."""
        while len(self.buffer) < 16 or len(self.buffer) < w.total_length(self.buffer[:16]):
            data = self.client.recv(65536)
            assert data, "the client was disconnected"
            self.buffer += data
        size = w.total_length(self.buffer[:16])
        message, self.buffer = w.parse(self.buffer[:size]), self.buffer[size:]
        assert message.serial != 0 and message.type <= 4 and "\0" not in (message.path or "")
        return message

    def member(self) -> str | None:
        """The next message that is not the bus's own."""
        while (message := self.read()).sender == "org.freedesktop.DBus":
            pass
        return message.member

    def call(self, serial: int) -> None:
        """The client calls the peer, so that a reply is waited for."""
        fields = {w.PATH: "/", w.MEMBER: "M", w.DESTINATION: f":1.{PEER}"}
        self.client.sendall(w.build(w.CALL, fields, serial=serial))

    def ping(self) -> None:
        """Everything that the client has sent was dealt with."""
        fields = {w.PATH: "/", w.DESTINATION: "org.freedesktop.DBus", w.MEMBER: "Ping"}
        fields[w.INTERFACE] = "org.freedesktop.DBus.Peer"
        self.client.sendall(w.build(w.CALL, fields, serial=9999))
        while self.read().reply_serial != 9999:
            pass

    def cpu(self) -> float:
        """Seconds that it has run."""
        with open(f"/proc/{self.pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def dropped(self) -> bool:
        """Whether the worker has closed its end of the side socket to the peer."""
        try:
            return self.side.recv(1, socket.MSG_DONTWAIT | socket.MSG_PEEK) == b""
        except BlockingIOError:
            return False

    def close(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        self.client.close()
        for end in (self.bell, self.side, self.carry):
            end.close()
        self.broker.close()
        self.supervisor.close()


Start = Callable[..., Stage]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    stages: list[Stage] = []

    def one(
        configuration: str = OPEN,
        endpoint: tuple[str, ...] | None = None,
        guarded: bool = True,
        large: bool = False,
    ) -> Stage:
        stages.append(Stage(tmp_path, configuration, endpoint, guarded, large))
        return stages[-1]

    yield one
    for stage in stages:
        stage.close()


def facts(type: int = SIGNAL, member: str = "Odd", to: str | None = f":1.{VICTIM}") -> Envelope:
    return Envelope(type, False, to, "/odd", "a.b", member, None, "")


def answering(type: int) -> Envelope:
    return msgspec.structs.replace(facts(type), answers=True)


def test_an_honest_frame_arrives(start: Start) -> None:
    stage = start()
    stage.write(facts(member="Good"), serial=1)
    assert stage.member() == "Good"


@pytest.mark.parametrize("type", [CALL, SIGNAL])
def test_a_reply_serial_does_not_spoil_a_header(start: Start, type: int) -> None:
    unasked = '<allow send_destination="*" eavesdrop="true"/><allow eavesdrop="true"/></policy>'
    stage = start(OPEN.replace("</policy>", unasked))
    stage.write(answering(type), serial=1, reply_serial=7)
    assert stage.member() == "Odd"


@pytest.mark.parametrize("type", [CALL, SIGNAL])
@pytest.mark.parametrize("answers", [False, True])
def test_a_peer_cant_hide_from_policy_that_there_is_a_reply_serial(
    start: Start, type: int, answers: bool
) -> None:
    stage = start()
    stage.write(answering(type) if answers else facts(type), serial=1, reply_serial=7 - 7 * answers)
    eventually(stage.dropped, "the peer is dropped")
    stage.ping()


def test_what_says_that_it_answers_is_judged_by_the_receiver(start: Start) -> None:
    """Its sender's worker lets it through, as it can't know what was asked."""
    stage = start()
    stage.call(5)
    stage.ping()
    for serial in (6, 5, 5):
        stage.write(answering(SIGNAL), serial=serial, reply_serial=serial)
    stage.write(facts(RETURN), serial=9, reply_serial=5)
    stage.write(facts(member="After"), serial=10)
    assert [stage.member(), stage.member()] == ["Odd", "After"]


def test_a_call_whose_answer_was_refused_is_answered(start: Start) -> None:
    """The peer's word counts for what the peer was asked."""
    stage = start()
    stage.call(5)
    stage.ping()
    for serial in (4, 5):
        stage.write(b"", kind=SPENT, reply_serial=serial)
    stage.write(facts(RETURN), serial=9, reply_serial=5)
    stage.write(facts(member="After"), serial=10)
    assert stage.member() == "After"


@pytest.mark.parametrize(
    ("what", "head"),
    [
        (facts(), {"serial": 0}),
        (facts(type=5), {"serial": 1}),
        (facts(type=0), {"serial": 1}),
        (b"not an envelope", {"serial": 1}),
        (Envelope(SIGNAL, False, ":1.1", "/a\0b", "a.b", "M", None, ""), {"serial": 1}),
        (Envelope(SIGNAL, False, ":1.1", "/", "a.b", "M", None, "s"), {"serial": 1}),
    ],
    ids=["no serial", "type 5", "type 0", "no envelope", "bad path", "no body"],
)
def test_what_is_no_message_ends_the_peer_and_not_the_client(
    start: Start, what: Envelope | bytes, head: dict[str, int]
) -> None:
    stage = start()
    stage.ping()
    before = stage.descriptors()
    stage.write(what, **head)
    stage.write(facts(member="After"), serial=2)
    eventually(
        lambda: stage.descriptors() == before - HELD, "bell, side socket and carrier are closed"
    )
    stage.ping()
    assert stage.buffer == b""


@pytest.mark.parametrize("where", ["bell", "side", "carry"])
def test_a_descriptor_that_takes_a_day_to_be_closed_hung_who_dropped_its_sender(
    start: Start, where: str
) -> None:
    """What a peer had left in a socket was closed with it, in the worker that let go of the peer."""
    stage = start(guarded=where != "carry")  # else the kernel lets none in
    stage.ping()
    slow, other = lingering()
    socket.send_fds(getattr(stage, where), [b"x"], [slow.fileno()])
    os.close(slow.detach())
    stage.write(b"not an envelope", serial=1)
    eventually(stage.dropped, "the peer is dropped")
    stage.ping()
    other.close()


def test_descriptors_in_another_number_than_announced_hung_who_closed_them(start: Start) -> None:
    stage = start()
    stage.ping()
    slow, other = lingering()
    stage.write(facts(), serial=1, fds=1, own=(slow.fileno(),))
    os.close(slow.detach())
    eventually(stage.dropped, "the peer is dropped")
    stage.ping()
    other.close()


def test_a_descriptor_that_came_with_a_bell_hung_who_heard_it(
    start: Start, capfd: pytest.CaptureFixture[str]
) -> None:
    stage = start()
    stage.ping()
    slow, other = lingering()
    stage.bell.send(b"x")
    socket.send_fds(stage.bell, [b"x"], [slow.fileno()])
    os.close(slow.detach())
    eventually(stage.dropped, "the peer is dropped")
    stage.ping()
    told = capfd.readouterr().err
    assert "dropped :1.2: it sends descriptors along with its bell" in told
    assert "1 sockets stay open: it might take for ever to close what :1.2 has sent" in told
    other.close()


def test_a_peer_that_hangs_up_its_bell_keeps_nobody_awake(start: Start) -> None:
    stage = start()
    stage.ping()
    stage.bell.shutdown(socket.SHUT_WR)
    stage.ping()
    before = stage.cpu()
    select.select([], [], [], 0.2)
    assert stage.cpu() - before < 0.1


@pytest.mark.parametrize("text", ["a\0b", "fine"])
def test_a_refusal_is_one_or_none(start: Start, text: str) -> None:
    stage = start()
    stage.call(5)
    stage.ping()
    refusal = msgspec.msgpack.encode(("org.freedesktop.DBus.Error.AccessDenied", text))
    stage.write(refusal, kind=REFUSED, reply_serial=5)
    answer = stage.read()
    while answer.reply_serial != 5:
        answer = stage.read()
    if text == "fine":
        assert answer.args == ["fine"]
    else:
        assert answer.error_name == "org.freedesktop.DBus.Error.NoReply"


def test_only_what_was_sent_to_a_peer_can_be_refused_by_it(start: Start) -> None:
    stage = start()
    fields = {w.PATH: "/", w.INTERFACE: "a.b", w.MEMBER: "S", w.DESTINATION: f":1.{PEER}"}
    stage.client.sendall(w.build(w.SIGNAL, fields, serial=6))
    stage.ping()
    refusal = msgspec.msgpack.encode(("org.freedesktop.DBus.Error.NotSupported", "no"))
    for serial in (7, 6, 6):  # 7 was not sent; and nothing is refused twice
        stage.write(refusal, kind=REFUSED, reply_serial=serial)
    stage.write(facts(member="After"), serial=1)
    answers = []
    while (message := stage.read()).member != "After":
        answers.append(message.reply_serial)
    assert answers == [6]


def test_a_call_is_said_not_to_have_arrived_once(start: Start) -> None:
    """It stays open, so that its caller is also told that the peer has gone."""
    stage = start()
    stage.call(5)
    stage.ping()
    refusal = msgspec.msgpack.encode(("org.freedesktop.DBus.Error.NotSupported", "no"))
    for _ in range(3):
        stage.write(refusal, kind=REFUSED, reply_serial=5)
    stage.write(b"not an envelope", serial=1)
    eventually(stage.dropped, "the peer is dropped")
    answers = []
    while (message := stage.read()).error_name != "org.freedesktop.DBus.Error.NoReply":
        answers.append((message.reply_serial, message.error_name))
    assert answers == [(5, "org.freedesktop.DBus.Error.NotSupported")]


@pytest.mark.parametrize(
    ("type", "to", "name", "shown"),
    [
        (RETURN, f":1.{PEER}", None, True),
        (ERROR, f":1.{PEER}", "a.b", True),
        (ERROR, "org.freedesktop.DBus", "org.freedesktop.DBus.Error.AccessDenied", True),
        (ERROR, "org.freedesktop.DBus", "a.b", False),
        (RETURN, f":1.{VICTIM}", None, False),
        (SIGNAL, f":1.{PEER}", None, False),
        (SIGNAL, None, None, False),
        (CALL, f":1.{PEER}", None, False),
    ],
)
def test_a_monitor_is_shown_as_the_buss_only_what_the_bus_may_have_told_that_peer(
    start: Start, type: int, to: str | None, name: str | None, shown: bool
) -> None:
    stage = start()
    stage.ping()
    stage.log.append(
        2, stage.clock.tick(), b"", msgspec.msgpack.encode(entries.MonitorAttached(VICTIM, ()))
    )
    path = ("/", "a.b", "M") if type in (CALL, SIGNAL) else (None, None, None)
    stage.write(Envelope(type, False, to, *path, name, ""), kind=COPY, serial=33, aux=2**64 - 1)
    stage.write(
        Envelope(SIGNAL, False, None, "/", "a.b", "Own", None, ""), kind=COPY, serial=34, aux=PEER
    )
    if not shown:
        eventually(lambda: stage.dropped(), "the peer is dropped")
        return
    seen = []
    while (message := stage.read()).member != "Own":
        seen.append((message.sender, message.serial))
    assert ("org.freedesktop.DBus", 33) in seen


NOSY = OPEN.replace(
    "</policy>",
    '<allow send_destination="*" eavesdrop="true"/><allow eavesdrop="true"/></policy>',
)


@pytest.mark.parametrize(
    ("rule", "configuration", "type", "to", "shown"),
    [
        ("eavesdrop='true'", NOSY, CALL, f":1.{PEER}", True),
        ("eavesdrop='true'", NOSY, RETURN, f":1.{PEER}", True),
        ("eavesdrop='true',interface='c.d'", NOSY, CALL, f":1.{PEER}", False),
        ("interface='a.b'", NOSY, CALL, f":1.{PEER}", False),
        # It would be a reply that nobody asked for, or a signal once more.
        ("eavesdrop='true'", NOSY, RETURN, f":1.{VICTIM}", False),
        ("eavesdrop='true'", NOSY, SIGNAL, None, False),
        ("eavesdrop='true'", OPEN, CALL, f":1.{PEER}", False),
    ],
)
def test_an_eavesdropper_is_shown_only_what_it_may_and_wants_to_see(
    start: Start, rule: str, configuration: str, type: int, to: str | None, shown: bool
) -> None:
    stage = start(configuration)
    stage.ping()
    added = entries.MatchAdded(VICTIM, rule)
    stage.log.append(2, stage.clock.tick(), b"", msgspec.msgpack.encode(added))
    path = ("/", "a.b", "M") if type in (CALL, SIGNAL) else (None, None, None)
    stage.write(Envelope(type, False, to, *path, None, ""), kind=COPY, serial=33, aux=PEER)
    stage.write(facts(member="After"), serial=34)
    seen = [stage.read()]
    while seen[-1].member != "After":
        seen.append(stage.read())
    assert [(m.sender, m.serial) for m in seen[:-1]] == ([(f":1.{PEER}", 33)] if shown else [])


@pytest.mark.parametrize("sender", [VICTIM, 2**64 - 1, 7])
def test_a_peer_copies_nobody_elses_messages(start: Start, sender: int) -> None:
    stage = start(NOSY)
    stage.ping()
    added = entries.MatchAdded(VICTIM, "eavesdrop='true'")
    stage.log.append(2, stage.clock.tick(), b"", msgspec.msgpack.encode(added))
    stage.write(facts(to=f":1.{PEER}"), kind=COPY, serial=33, aux=sender)
    eventually(stage.dropped, "the peer is dropped")


def test_descriptors_with_what_has_no_use_for_them_are_closed(start: Start) -> None:
    stage = start()
    stage.write(facts(member="Before"), serial=1)
    assert stage.member() == "Before"
    before = stage.descriptors()
    refusal = msgspec.msgpack.encode(("org.freedesktop.DBus.Error.AccessDenied", ""))
    for _ in range(20):
        stage.write(refusal, kind=REFUSED, reply_serial=5, fds=3)
        stage.write(b"", kind=BULK, fds=3)
    stage.write(facts(member="After"), serial=2)
    assert stage.member() == "After"
    assert stage.descriptors() == before


def test_what_its_client_may_not_send_is_not_taken(start: Start) -> None:
    stage = start(
        OPEN.replace("</policy>", '<deny send_interface="a.b" send_member="Odd"/></policy>')
    )
    stage.write(facts(), serial=1)
    stage.write(facts(member="Even"), serial=2)
    assert stage.member() == "Even"


# -- bodies in a carrier ---------------------------------------------------------------------


def array_of(size: int, seed: int = 0) -> bytes:
    return struct.pack("=I", size) + random.Random(seed).randbytes(size)


carrying = pytest.mark.skipif(
    not carriers.refuses_descriptors(), reason="nothing comes by carriers: no SO_PASSRIGHTS"
)


@carrying
def test_a_body_in_a_carrier_arrives(start: Start) -> None:
    stage = start()
    for n in range(3):
        body = array_of(200_000, n)
        stage.send_carried(f"M{n}", body, len(body) - AT)
        got = stage.read()
        while got.member != f"M{n}":
            got = stage.read()
        assert got.body == body


@carrying
def test_what_follows_in_the_area_is_put_behind_what_was_in_the_carrier(start: Start) -> None:
    stage = start()
    body = array_of(200_000)
    stage.send_carried("M", body, 70_000, count=70_000)
    got = stage.read()
    while got.member != "M":
        got = stage.read()
    assert got.body == body


@carrying
def test_what_a_peer_had_in_the_carrier_when_it_left_still_arrives(start: Start) -> None:
    stage = start()
    stage.ping()
    stage.carry.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 << 20)
    if stage.carry.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) < 3 << 20:
        pytest.skip("no socket here holds more than a worker's pipe and its client's socket do")
    body = array_of((2 << 20) - 4)
    stage.send_carried("Last", body, len(body) - AT)
    eventually(lambda: bool(select.select([stage.client], [], [], 0)[0]), "it begins to arrive")
    stage.bell.close()
    stage.carry.close()
    gone = msgspec.msgpack.encode(entries.ConnectionRemoved(PEER))
    stage.log.append(LOG, stage.clock.tick(), b"", gone)
    stage.client.sendall(w.build(w.CALL, HELLO, serial=77))
    eventually(stage.dropped, "the worker knows that it left")
    got = stage.read()
    while got.member != "Last":
        got = stage.read()
    assert got.body == body


@carrying
@pytest.mark.parametrize("given", [0, 70_000])
def test_who_announces_more_than_it_sends_ends_and_the_message_is_whole(
    start: Start, given: int
) -> None:
    stage = start()
    stage.ping()
    before = stage.descriptors()
    body = array_of(200_000)
    stage.send_carried("Short", body, given)
    got = stage.read()
    while got.member != "Short":
        got = stage.read()
    assert got.body == body[: AT + given].ljust(len(body), b"\0")
    eventually(lambda: stage.descriptors() == before - HELD, "nothing of the peer is left")
    stage.ping()
    assert stage.buffer == b""


@pytest.mark.parametrize(
    ("at", "count"),
    [(0, 1000), (AT, 0), (AT, 200_000), (2**32 - 1, 2**32 - 1), (3, 1000), (300_000, 1)],
)
def test_a_lie_about_what_is_in_the_carrier_ends_the_peer(
    start: Start, at: int, count: int
) -> None:
    stage = start()
    stage.ping()
    before = stage.descriptors()
    stage.send_carried("Lie", array_of(200_000), 0, at, count)
    eventually(lambda: stage.descriptors() == before - HELD, "nothing of the peer is left")
    stage.ping()
    assert stage.buffer == b""


@carrying
def test_more_than_ever_goes_by_a_carrier_was_made_up_for_by_what_was_behind_the_zeros(
    start: Start,
) -> None:
    """That is memory of the worker, which its client would have got to see."""
    stage = start(large=True)
    stage.ping()
    before = stage.descriptors()
    stage.send_carried("Lie", array_of(8 << 20), 70_000)
    eventually(lambda: stage.descriptors() == before - HELD, "nothing of the peer is left")
    stage.ping()
    assert stage.buffer == b""


def test_a_pipe_whose_lock_its_sender_holds_stopped_the_worker(start: Start) -> None:
    stage = start()
    stage.ping()
    before = stage.descriptors()
    reader, writer = os.pipe2(os.O_NONBLOCK)
    os.set_blocking(writer, True)
    silent, other = socket.socketpair()
    body = array_of(200_000)
    os.write(writer, body[AT : AT + 4096])
    holder = threading.Thread(target=os.splice, args=(silent.fileno(), writer, 1))
    holder.start()
    try:
        waits = Path(f"/proc/self/task/{holder.native_id}/syscall")
        splice = str(pyseccomp.resolve_syscall(pyseccomp.Arch.NATIVE, "splice"))
        eventually(lambda: waits.read_text().split()[0] == splice, "it holds the lock")
        aux = stage.bulk.put(body)
        assert aux is not None
        told = struct.pack("=II", AT, len(body) - AT)
        call = Envelope(CALL, False, f":1.{VICTIM}", "/odd", "a.b", "M", None, "ay")
        stage.write(call, BULK, told, (reader, stage.bulk.fd), serial=3, aux=aux | PIPE)
        # Nothing of the peer but those two, which are not closed.
        eventually(lambda: stage.descriptors() == before - HELD + 2, "the peer is let go of")
        stage.ping()
    finally:
        other.close()
        holder.join()
        silent.close()
        os.close(reader)
        os.close(writer)


@carrying
def test_a_sender_that_waits_in_the_carrier_stops_nobody(start: Start) -> None:
    """As would the client of a worker that was taken over: the pipe that it holds is its own."""
    stage = start()
    stage.ping()
    reader, writer = os.pipe()
    stage.carry.setblocking(True)
    stage.carry.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
    body = array_of(200_000)
    feeder = threading.Thread(target=os.write, args=(writer, body[AT:]))
    holder = threading.Thread(target=move, args=(reader, stage.carry.fileno(), len(body) - AT))
    feeder.start()
    holder.start()
    eventually(lambda: not select.select([], [stage.carry], [], 0)[1], "the carrier is full")
    stage.send_carried("M", body, 0, count=50_000)
    got = stage.read()
    while got.member != "M":
        got = stage.read()
    assert got.body == body
    stage.carry.shutdown(socket.SHUT_RDWR)
    feeder.join()
    holder.join()
    os.close(writer)
    stage.ping()


def move(source: int, to: int, count: int) -> None:
    """What the shutdown leaves is read, that its writer may end."""
    with suppress(OSError):
        while count > 0:
            count -= os.splice(source, to, count)
    while count > 0:
        count -= len(os.read(source, count))
    os.close(source)


def test_nothing_is_taken_from_a_carrier_by_which_descriptors_could_come(start: Start) -> None:
    stage = start(guarded=False)
    stage.ping()
    before = stage.descriptors()
    body = array_of(200_000)
    stage.send_carried("M", body, len(body) - AT)
    eventually(lambda: stage.descriptors() == before - HELD, "nothing of the peer is left")
    stage.ping()
    assert stage.buffer == b""


@carrying
def test_a_refused_body_is_taken_out_of_the_carrier(start: Start) -> None:
    stage = start(
        OPEN.replace("</policy>", '<deny send_interface="a.b" send_member="Odd"/></policy>')
    )
    odd, even = array_of(200_000, 1), array_of(200_000, 2)
    stage.send_carried("Odd", odd, len(odd) - AT)
    stage.ping()
    stage.send_carried("Even", even, len(even) - AT)
    got = stage.read()
    while got.member != "Even":
        got = stage.read()
    assert got.body == even


# -- a peer behind an endpoint -----------------------------------------------------------------


def string(text: str) -> bytes:
    return struct.pack("=I", len(text)) + text.encode() + b"\0"


def opening(interface: str | None = "t.Face") -> Envelope:
    return Envelope(CALL, False, f":1.{VICTIM}", "/odd", interface, "Open", None, "s")


def test_its_endpoint_is_asked_again(start: Start) -> None:
    """For every message where arguments matter, whatever was decided about the same envelope before."""
    stage = start(endpoint=("call=t.Victim=t.Face.Open arg0='yes'",))
    for serial, text in enumerate(("yes", "no", "yes", "no"), 2):
        stage.write(opening(), body=string(text), serial=serial)
    stage.write(opening("t.Other"), body=string("yes"), serial=9)
    stage.write(facts(member="Unicast"), serial=10)
    stage.write(facts(member="Last", to=None), serial=11)
    bodies = []
    for _ in range(2):
        while (message := stage.read()).sender == "org.freedesktop.DBus":
            pass
        bodies.append((message.member, message.args))
    assert bodies == [("Open", ["yes"])] * 2
    stage.ping()
    assert not stage.dropped()


def test_arguments_that_can_still_be_changed_are_none(start: Start) -> None:
    """An honest worker does not put where it can write to what its endpoint asks for."""
    stage = start(endpoint=("talk=t.Victim", "deny-call=t.Victim=t.Face.Open arg0='no'"))
    stage.write(opening(), body=string("no"), serial=2)
    stage.write(opening(), body=string("yes"), serial=3)
    assert stage.member() == "Open"
    aux = stage.bulk.put(string("no"))
    assert aux is not None
    own = (stage.bulk.fd,) if aux & FRESH else ()
    stage.write(opening(), BULK, b"", own, serial=4, aux=aux)
    eventually(stage.dropped, "the peer is dropped")


def test_it_is_not_given_what_others_read(start: Start) -> None:
    """What the worker's client tells those who may hear it stands in another Broadcast than the peer gets."""
    sizes = [
        os.fstat(start(endpoint=endpoint).broadcast_fd).st_size for endpoint in (None, ("see=a.b",))
    ]
    assert sizes[1] < sizes[0]


@pytest.mark.parametrize("answer", [False, True])
def test_what_came_while_a_new_policy_was_fetched_was_judged_by_the_old_one(
    start: Start, tmp_path: Path, answer: bool
) -> None:
    """With an answer of the broker's in between, for which the log had to be read on first."""
    stage = start()
    seen = Envelope(SIGNAL, False, f":1.{VICTIM}", "/", "a.b", "Seen", None, "")
    stage.write(seen, serial=1)
    assert stage.member() == "Seen"
    os.kill(stage.pid, signal.SIGSTOP)
    fields = {w.PATH: "/", w.DESTINATION: "org.freedesktop.DBus", w.MEMBER: "AddMatch"}
    if answer:
        stage.client.sendall(w.build(w.CALL, fields, "s", ("type='signal'",), serial=77))
        os.kill(stage.pid, signal.SIGCONT)
        request = stage.asked(entries.AddMatch).request
        os.kill(stage.pid, signal.SIGSTOP)
    stage.enter(entries.PolicyChanged(1))
    if answer:
        stage.enter(entries.MatchAdded(VICTIM, "type='signal'"))
        stage.broker.send(entries.Reply(request, None, stage.clock.tick()))
    stage.write(msgspec.structs.replace(seen, interface="a.c"), serial=1)
    os.kill(stage.pid, signal.SIGCONT)
    fetch = stage.asked(entries.FetchPolicy)
    denied = OPEN.replace("</policy>", '<deny receive_interface="a.c"/></policy>')
    file = tmp_path / "denied.conf"
    file.write_text(denied)
    data = memfd.sealed("test", configuration.encode(configuration.load(str(file))))
    stage.broker.send(entries.Reply(fetch.request, 1), [data])
    os.close(data)
    stage.write(seen, serial=1)
    if answer:
        assert stage.read().reply_serial == 77
    message = stage.read()
    assert (message.interface, message.member) == ("a.b", "Seen")


@pytest.mark.parametrize("writes", [False, True])
def test_an_answer_came_before_what_it_tells_the_end_of_while_a_peer_held_up_the_log(
    start: Start, writes: bool
) -> None:
    """And so did what the client sent to itself next. `writes`: what the peer sends meanwhile passes."""
    stage = start()
    assert stage.read().member == "NameAcquired"  # its unique name
    begun = stage.clock.tick()
    fields = {w.PATH: "/", w.DESTINATION: "org.freedesktop.DBus", w.MEMBER: "RequestName"}
    stage.client.sendall(w.build(w.CALL, fields, "su", ("t.Name", 0), serial=77))
    request = stage.asked(entries.RequestName)
    stage.broadcast.open_many(begun)
    stamp = stage.clock.tick()
    entry = entries.NameOwnerChanged("t.Name", 0, VICTIM)
    stage.log.append(LOG, stamp, b"", msgspec.msgpack.encode(entry))
    if writes:
        stage.write(
            Envelope(SIGNAL, False, f":1.{VICTIM}", "/x", "a.b", "Sent", None, ""), serial=1
        )
    stage.broker.send(entries.Reply(request.request, 1, stamp))
    came = [stage.read() for _ in range(3 if writes else 2)]
    assert [each.member for each in came if each.member != "Sent"] == ["NameAcquired", None]
