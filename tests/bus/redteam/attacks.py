"""What somebody tries who has taken over a worker: each function is one attack, run inside of it.

What it found out it says to the client that ordered it, one line of JSON a sentence; the test judges. Modules
that an attacker would bring are imported here, before the lock-down: afterwards nothing can be.
"""

from __future__ import annotations

import array
import ctypes
import errno
import fcntl
import json
import mmap
import os
import random
import select
import socket
import stat
import struct
import time
import typing
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any, NoReturn

import msgspec

from kbusd.cuse import replies
from kbusd.kdbus.parcel import Parcel
from kbusd.rings import entries, envelope
from kbusd.rings.broadcast import Broadcast
from kbusd.rings.clock import Clock
from kbusd.rings.envelope import Envelope
from kbusd.rings.line import Line, LineError, close_all
from kbusd.rings.ring import Ring
from kbusd.rings.status import StatusPage, StatusView
from kbusd.rings.values import Frame

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
]
_SECONDS = 20.0
_FAILED = (1 << 64) - 1
_NORESERVE = 0x4000  # of mmap(2)


def wait(what: Any, events: int = select.POLLIN, seconds: float = _SECONDS) -> bool:
    """Whether it is ready in time."""
    waiting = select.poll()
    waiting.register(what, events)
    return bool(waiting.poll(seconds * 1000))


class Taken:
    """A worker in the hands of an attacker, with all that it holds."""

    def __init__(
        self, context: Any, engine: Any, hand_over: Line, line: Line, client: socket.socket
    ) -> None:
        self.context, self.engine = context, engine
        self.hand_over, self.line, self.client = hand_over, line, client
        self.request = 0
        self.introductions: list[tuple[entries.Introduction, list[int]]] = []

    def say(self, what: Any) -> None:
        data = json.dumps(what).encode() + b"\n"
        while data:
            wait(self.client, select.POLLOUT)
            data = data[self.client.send(data) :]

    def hold(self) -> None:
        """Stay until the client leaves."""
        wait(self.client)

    def ask(self, message: Any, fds: Sequence[int] = ()) -> tuple[Any, list[int]]:
        """The broker's answer. Raises EOFError if it hangs up on us."""
        self.line.send(message, fds)
        return self.heard(message.request)

    def heard(self, request: int) -> tuple[Any, list[int]]:
        deadline = time.monotonic() + _SECONDS
        while (left := deadline - time.monotonic()) > 0:
            self.line.flush()
            wait(self.line, seconds=left)
            if (received := self.line.receive()) is None:
                continue
            message, fds = received
            if isinstance(message, entries.Reply | entries.Failure) and message.request == request:
                return received
            if isinstance(message, entries.Introduction):
                self.introductions.append((message, fds))
        raise TimeoutError("the broker does not answer")

    def hello(self, **how: Any) -> Any:
        """Say Hello; returns our id, or the error."""
        answer, fds = self.ask(entries.Hello(self.next(), **how))
        close_all(fds)
        return answer.value if isinstance(answer, entries.Reply) else answer.error

    def next(self) -> int:
        self.request += 1
        return self.request

    def introduce(self, peer: int, ring: int = -1) -> Peer | str:
        """Rings to and from a peer, as an honest worker would get them; or the error."""
        made = Peer(peer)
        half = [made.ring.fileno() if ring < 0 else ring, made.status.fd, made.broadcast.fileno()]
        answer, fds = self.ask(entries.Introduce(self.next(), peer, *made.slots), half)
        if isinstance(answer, entries.Failure):
            return answer.error
        made.begin(answer.value, fds)
        return made


class Peer:
    """Somebody else's worker, as this one is connected to it."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.clock = Clock()
        self.ring, self.status = Ring(65536), StatusPage()
        self.broadcast = Broadcast(65536)
        self.slots = self.status.take_slot(), self.status.take_slot()

    def begin(self, slots: list[int], fds: list[int]) -> None:
        self.theirs, status, self.their_broadcast, *shared = fds
        self.bell, self.side, self.carry = (
            socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, fd) for fd in shared
        )
        self.their_status = status
        self.ring.connect(StatusView(os.dup(status)), slots[0])

    def write(self, kind: int, facts: Envelope | bytes, body: bytes = b"", **head: Any) -> bool:
        """One frame, as we like it."""
        raw = facts if isinstance(facts, bytes) else envelope.encode(facts)
        written = self.ring.write(Frame(kind, self.clock.tick(), raw, body, **head))
        self.wake()
        return bool(written)

    def wake(self) -> None:
        with suppress(BlockingIOError, BrokenPipeError):
            self.bell.send(b"x", socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)

    def dropped(self) -> bool:
        """Whether it has had enough of us."""
        return wait(self.side) and self.side.recv(1, socket.MSG_PEEK) == b""


def run(
    context: Any,
    engine: Any,
    hand_over: Line,
    line: Line,
    client: socket.socket,
    order: list[Any],
) -> NoReturn:
    """Attack as ordered; the worker's process ends with it."""
    name, *arguments = order
    taken = Taken(context, engine, hand_over, line, client)
    try:
        globals()[name](taken, *arguments)
        taken.say("done")
    except (EOFError, ConnectionError, LineError) as error:
        with suppress(OSError):
            taken.say(["ended", type(error).__name__, str(error)])
    except Exception as error:  # noqa: BLE001 the test is to see it
        with suppress(OSError):
            taken.say(["error", type(error).__name__, str(error)])
    os._exit(0)


# -- the machine -------------------------------------------------------------------------------


def call(taken: Taken, number: int, *arguments: int) -> None:
    """Any system call at all."""
    path = ctypes.create_string_buffer(b"/etc/passwd")
    given = [ctypes.addressof(path) if each == "path" else each for each in arguments]
    taken.say("now")
    result = _libc.syscall(
        ctypes.c_long(number), *(ctypes.c_ulong(each & _FAILED) for each in given)
    )
    taken.say(result if result >= 0 else errno.errorcode[ctypes.get_errno()])


def open_files(taken: Taken, *paths: str) -> None:
    """Read what others have, or write what others read; says who we are, and what came of each."""
    found = []
    for path in paths:
        for flags in (os.O_RDONLY, os.O_RDWR, os.O_CREAT | os.O_WRONLY, os.O_PATH):
            try:
                found.append(str(os.open(path, flags)))
            except OSError as error:
                found.append(errno.errorcode[error.errno or 0])
    taken.say([os.getpid(), found])


def held(taken: Taken) -> None:
    """Which descriptors we have, and whether one of them can be written that others read."""
    found = []
    for fd in range(256):
        try:
            found.append([fd, os.fstat(fd).st_mode & 0o170000])
        except OSError:
            continue
    taken.say(found)


def spoil_snapshot(taken: Taken) -> None:
    """Change the broker's snapshot, which others believe, too; the log's own descriptor is closed before
    a client comes."""
    taken.say(_is_open(taken.context.log_fd))
    taken.hello()
    _, [fd] = taken.ask(entries.FetchSnapshot(taken.next()))
    taken.say(list(_spoil(fd)))


def _spoil(fd: int) -> Iterator[str]:
    """Whether we may write into memory of others', by every way."""
    size = os.fstat(fd).st_size
    where = _libc.mmap(None, size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, fd, 0)
    yield "mapped" if where not in (None, _FAILED) else errno.errorcode[ctypes.get_errno()]
    where = _libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
    changed = _libc.mprotect(ctypes.c_void_p(where), ctypes.c_size_t(size), 3)
    yield "changed" if changed == 0 else errno.errorcode[ctypes.get_errno()]
    for spoil in (
        lambda: os.write(fd, b"x" * 64),
        lambda: os.ftruncate(fd, 0),
        lambda: os.ftruncate(fd, size * 2),
        lambda: fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE),
    ):
        try:
            spoil()
            yield "done"
        except OSError as error:
            yield errno.errorcode[error.errno or 0]


# -- exhaustion --------------------------------------------------------------------------------


def exhaust_memory(taken: Taken) -> None:
    """Take memory until there is none."""
    found = []
    for kind in (mmap.MAP_PRIVATE, mmap.MAP_SHARED):
        kept, size = [], 64 << 20
        with suppress(OSError):
            while len(kept) < 1024:  # 64 GiB; untouched, as it is the limit that we look for
                kept.append(mmap.mmap(-1, size, kind | mmap.MAP_ANONYMOUS | _NORESERVE))
        found.append(len(kept) * (size >> 20))
        kept.clear()
    taken.say(found)


def exhaust_descriptors(taken: Taken) -> None:
    """Take descriptors until there are none."""
    count = 0
    try:
        while True:
            fcntl.fcntl(0, fcntl.F_DUPFD_CLOEXEC, 0)
            count += 1
    except OSError as error:
        taken.say([count, errno.errorcode[error.errno or 0]])
    taken.hold()


def flood_broker(taken: Taken, seconds: float) -> None:
    """Ask and ask, and never read an answer."""
    taken.hello()
    until = time.monotonic() + seconds
    count = 0
    taken.say("now")
    while time.monotonic() < until:
        with suppress(BlockingIOError):
            data = msgspec.msgpack.encode(entries.Statistics(1))
            taken.line.sock.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            count += 1
    taken.say(count)


def flood_supervisor(taken: Taken) -> None:
    """Say things to the supervisor, which expects nothing of a worker of a socket."""
    count = 0
    with suppress(BlockingIOError, BrokenPipeError):
        for message in (
            entries.Kill(1, "because"),
            entries.Joined(1),
            entries.BrokerReady(),
            entries.ReloadWanted(),
            entries.Forked(99, 1),
            entries.Answered(b"x" * 16),
            entries.Take(1, (0, 1, 2)),
        ):
            taken.hand_over.sock.send(msgspec.msgpack.encode(message), socket.MSG_DONTWAIT)
            count += 1
        while True:
            taken.hand_over.sock.send(b"\xff" * 60000, socket.MSG_DONTWAIT)
            count += 1
    taken.say(count)
    taken.hold()


# -- the broker --------------------------------------------------------------------------------

_NUMBERS = (0, 1, -1, 2, 1 << 31, (1 << 32) - 1, 1 << 62, (1 << 63) - 1, -(1 << 63), (1 << 64) - 1)
_TEXTS = (
    "",
    "a.b",
    ":1.1",
    "org.freedesktop.DBus",
    "a" * 70_000,
    "a.\0b",
    "é.ü",
    "\ud7ff.x",
    "../../x.y",
    "type='signal',arg0='" + "x" * 5000 + "'",
    "type='signal'",
    "a.b" + ".c" * 200,
)
_BYTES = (b"", b"\0" * 20_000, b"\xff" * 64)
_RAW = (
    b"",
    b"\xc1",
    b"\x91" * 5000,
    msgspec.msgpack.encode(["hello"]),
    msgspec.msgpack.encode(["request_name", 1, "a.b", "x"]),
    msgspec.msgpack.encode(["request_name", 1, "a.b"]),
    msgspec.msgpack.encode(["match", 1, None]),
    msgspec.msgpack.encode({"hello": 1}),
    msgspec.msgpack.encode(["no such thing", 1, 2, 3]),
    msgspec.msgpack.encode(["request_name", 1 << 63, "a.b", 1.5]),
    b"\x93\xacrequest_name\x01\xa2\xff\xfe\x00",
    b"\xdd\xff\xff\xff\xff",
)


def lies(union: Any, seed: int, each: int) -> list[Any]:
    """Messages of every kind of a union, with contents that no honest worker sends; and what is none."""
    chance = random.Random(seed)
    made: list[Any] = []
    for kind in union.__args__:
        hints = msgspec.structs.fields(kind)
        for _ in range(each):
            made.append(kind(*(_value(chance, field.type) for field in hints)))
    made += _RAW
    return made


def _value(chance: random.Random, kind: Any) -> Any:
    """Something that decodes as this type, and is as far from what is meant as that allows."""
    simple = {int: _NUMBERS, str: _TEXTS, bytes: _BYTES, bool: (False, True), type(None): (None,)}
    if kind in simple:
        return chance.choice(simple[kind])
    arguments = typing.get_args(kind)
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        return kind(*(_value(chance, each.type) for each in msgspec.structs.fields(kind)))
    if typing.get_origin(kind) is dict:
        return {_value(chance, arguments[0]): _value(chance, arguments[1]) for _ in range(3)}
    if typing.get_origin(kind) is tuple:
        if arguments[-1] is not ...:
            return tuple(_value(chance, each) for each in arguments)
        return tuple(_value(chance, arguments[0]) for _ in range(chance.choice((0, 1, 1, 20))))
    if typing.get_origin(kind) is typing.Annotated:
        return _value(chance, arguments[0])
    if arguments:  # one or the other
        return _value(chance, chance.choice(arguments))
    raise NotImplementedError(str(kind))


def break_a_rule_and_go(taken: Taken) -> None:
    """Have the broker end us, and be gone by then."""
    taken.line.send(entries.Running(1))


def hand_on(taken: Taken, how: str) -> None:
    """Have the broker be the last who holds a descriptor of the client's."""
    taken.say(taken.hello())
    while how == "in a side socket" and not taken.introductions:
        wait(taken.line)
        if (received := taken.line.receive()) is not None:
            taken.introductions.append(received)
    wait(taken.client)
    _, [fd], _, _ = socket.recv_fds(taken.client, 1, 1)
    taken.say("have it")
    wait(taken.client)  # it has closed its own, and the broker is stopped
    message = msgspec.msgpack.encode(entries.Introduce(taken.next(), 1, 0, 0))
    many = [os.memfd_create("one of many") for _ in range(100)]
    match how:
        case "with a record":
            socket.send_fds(taken.line.sock, [message], [*many[:2], fd])
        case "with a record that does not decode":
            socket.send_fds(taken.line.sock, [b"?"], [fd])
        case "with a record without bytes":
            socket.send_fds(taken.line.sock, [b""], [fd])
        case "behind a record without bytes":
            taken.line.sock.send(b"")
            socket.send_fds(taken.line.sock, [message], [fd])
        case "with more than a record may have":
            socket.send_fds(taken.line.sock, [message], [*many, fd])
        case "behind what ends us":
            taken.line.sock.send(b"?")
            socket.send_fds(taken.line.sock, [message], [fd])
        case "in a side socket":
            side = taken.introductions[0][1][4]
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, side) as sock:
                socket.send_fds(sock, [b"x"], [fd])
    os.close(fd)


def ask_to_meet(taken: Taken, peer: int) -> None:
    """Says what the broker answers."""
    taken.hello()
    taken.say(taken.introduce(peer))


def _odd_descriptors(taken: Taken, chance: random.Random) -> list[int]:
    """Of all sorts that a worker can have, or of those that may be sent; as many as a message never has, or too few."""
    loose, page, ring = os.memfd_create("loose"), StatusPage(), Ring(65536)
    sorts = [page.fd, ring.fileno(), loose]
    if chance.random() < 0.3:
        sorts += [0, 1, taken.line.fileno(), taken.hand_over.fileno(), taken.context.log_fd]
    sorts = [os.dup(fd) for fd in sorts if _is_open(fd)] + [loose]
    return [chance.choice(sorts) for _ in range(chance.choice((0, 0, 0, 1, 3, 3, 16)))]


def _say_if_it_fits(line: Line, lie: Any, fds: list[int]) -> None:
    try:
        line.send(lie, fds)
    except OSError as error:
        if error.errno != errno.EMSGSIZE:
            raise


def _is_open(fd: int) -> bool:
    with suppress(OSError):
        os.fstat(fd)
        return True
    return False


def lie_to_broker(taken: Taken, seed: int, each: int, start: int, hello: bool) -> None:
    """Say everything that can be said, from the lie number `start` on; tells how far it got."""
    all_lies = lies(entries.WorkerMessage, seed, each)
    chance = random.Random(seed + start)
    if hello and not isinstance(said := taken.hello(), int):
        raise RuntimeError(said)
    if not hello and wait(taken.line):
        taken.line.receive()  # the state of the bus
    for number, lie in enumerate(all_lies[start:], start):
        taken.say([number, type(lie).__name__])
        fds = _odd_descriptors(taken, chance)
        try:
            if isinstance(lie, bytes):
                taken.line.sock.send(lie, socket.MSG_NOSIGNAL)
            else:
                _say_if_it_fits(taken.line, lie, fds)
            # Whatever it thinks of that, this it would answer next.
            if hello:
                _, given = taken.ask(entries.Statistics(77_000_000 + number))
                close_all(given)
            else:
                wait(taken.line, seconds=0.05)
        finally:
            close_all(set(fds))
    taken.say([len(all_lies), ""])


# -- other workers -----------------------------------------------------------------------------

SIGNAL, CALL, RETURN, ERROR = 4, 1, 2, 3
COPY, PARCEL = 5, 9
_EVIL = struct.pack("<I", 8) + b"evil.own\0"


def forge_one(taken: Taken, victim: int, kind: int, sender: int | None) -> None:
    """Frames of this kind that say to be from `sender`, None is ourselves: signals, and replies that
    somebody may wait for."""
    me = taken.hello()
    taken.say(me)
    peer = taken.introduce(victim)
    assert isinstance(peer, Peer), peer
    aux = (me if sender is None else sender) & _FAILED
    for facts in (
        Envelope(SIGNAL, False, None, "/x", "evil.Forged", "Signal", None, "s"),
        Envelope(SIGNAL, False, f":1.{victim}", "/x", "evil.Forged", "Signal", None, "s"),
    ):
        peer.write(kind, facts, _EVIL, serial=7, aux=aux)
    answer = Envelope(RETURN, False, f":1.{victim}", None, None, None, None, "s")
    for serial in range(1, 6):
        peer.write(kind, answer, _EVIL, serial=8, reply_serial=serial, aux=aux)
    taken.say("written")
    taken.hold()


def answer_oneself(taken: Taken, monitor: int) -> None:
    """Show a monitor an answer of the bus to our own client."""
    me = taken.hello()
    taken.say(me)
    peer = taken.introduce(monitor)
    assert isinstance(peer, Peer), peer
    answer = Envelope(RETURN, False, f":1.{me}", None, None, None, None, "s")
    peer.write(COPY, answer, _EVIL, serial=8, reply_serial=1, aux=_FAILED)
    taken.say("written")
    taken.hold()


def forge_parcel(taken: Taken, victim: int, name: str, origin: int | None, own: bool) -> None:
    """A kdbus message to who has part in a name, which somebody else is to have sent; we may `own` the name."""
    me = taken.hello()
    if own:
        taken.ask(entries.RequestName(taken.next(), name, 0))
    peer = taken.introduce(victim)
    assert isinstance(peer, Peer), peer
    raw = b"" if origin is None else origin.to_bytes(9, "little").removesuffix(b"\0")
    sent = Parcel(0, 0, victim, 0x1234, me, 0, ((0, 4, 0),), dst_name=name, origin=raw)
    peer.write(PARCEL, msgspec.msgpack.encode(sent), b"evil", serial=7)
    taken.say(me)
    taken.hold()


def spoil_peer(taken: Taken, victim: int) -> None:
    """Change what a peer has given us to read."""
    taken.hello()
    peer = taken.introduce(victim)
    assert isinstance(peer, Peer), peer
    taken.say([list(_spoil(fd)) for fd in (peer.theirs, peer.their_status, peer.their_broadcast)])


def scribble(taken: Taken, victim: int, seed: int) -> None:
    """Write noise into our own rings while the peer reads them: heads, envelopes, positions."""
    taken.say(taken.hello())
    peer = taken.introduce(victim)
    assert isinstance(peer, Peer), peer
    chance = random.Random(seed)
    for _ in range(50):
        peer.write(
            chance.randrange(256),
            chance.randbytes(chance.choice((0, 1, 40, 300))),
            chance.randbytes(chance.choice((0, 8, 4000))),
            flags=chance.randrange(256),
            fds=chance.choice((0, 0, 1, 65535)),
            serial=chance.choice((0, 7, (1 << 32) - 1)),
            reply_serial=chance.choice((0, 1, 2, (1 << 32) - 1)),
            aux=chance.choice((0, 1, _FAILED, 1 << 63, 1 << 62)),
        )
    for slot in peer.slots:
        peer.status.publish(slot, chance.choice(_NUMBERS) & _FAILED)
        peer.status.publish_bulk(slot, chance.choice(_NUMBERS) & _FAILED)
    peer.wake()
    taken.say(peer.dropped())


def leave_behind(taken: Taken, victim: int, where: str) -> None:
    """Send a peer a descriptor of the client's that it does not wait for, and have it drop us."""
    taken.say(taken.hello())
    peer = taken.introduce(victim)
    assert isinstance(peer, Peer), peer
    _, [fd], _, _ = socket.recv_fds(taken.client, 1, 1) if wait(taken.client) else None
    try:
        socket.send_fds(getattr(peer, where), [b"x" * 8], [fd])
        taken.say("sent")
    except OSError as error:
        taken.say(errno.errorcode[error.errno or 0])
    os.close(fd)
    peer.write(1, b"no envelope")
    taken.say(peer.dropped())
    taken.hold()


def share_ends(taken: Taken, victim: int) -> None:
    """Let the client have all that we share with a peer; and always be asleep, so that it rings."""
    me = taken.hello()
    peer = taken.introduce(victim)
    assert isinstance(peer, Peer), peer
    peer.status.sleep(True)
    taken.say(me)
    if wait(taken.client):
        taken.client.recv(1)
    shared = [peer.bell.fileno(), peer.side.fileno(), peer.carry.fileno()]
    socket.send_fds(taken.client, [b"x"], shared)
    taken.hold()


def unsealed_ring(taken: Taken, victim: int) -> None:
    """Offer memory that we could cut off while the peer reads it: it would die of SIGBUS."""
    taken.hello()
    loose = os.memfd_create("loose", os.MFD_ALLOW_SEALING)
    os.ftruncate(loose, 65536 + 8192)
    peer = taken.introduce(victim, loose)
    if isinstance(peer, Peer):
        os.ftruncate(loose, 0)
        peer.wake()
        taken.say(peer.dropped())
    else:
        taken.say(peer)


def ring_all_day(taken: Taken, victim: int, seconds: float) -> None:
    """Ring a peer's bell as fast as we can."""
    taken.hello()
    peer = taken.introduce(victim)
    assert isinstance(peer, Peer), peer
    until = time.monotonic() + seconds
    taken.say("now")
    while time.monotonic() < until:
        peer.wake()
    taken.say("rang")


def hoard_descriptors_in_flight(taken: Taken) -> None:
    """Put descriptors on the way that nobody takes: the kernel counts them by user, ours and others'."""
    taken.hello()
    given = array.array("i", [0] * 253)
    count = 0
    try:
        while True:
            taken.client.sendmsg(
                [b"x"],
                [(socket.SOL_SOCKET, socket.SCM_RIGHTS, given)],
                socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL,
            )
            count += 253
    except OSError as error:  # told by the log: who reads what we say takes them
        os.write(2, f"{count} in flight: {errno.errorcode[error.errno or 0]}\n".encode())
    wait(taken.client, select.POLLHUP)


def search_log(taken: Taken, *names: str) -> None:
    """Look for names in all that there is of the control log: a snapshot, the log as it goes on, another
    snapshot."""
    _, fds = taken.ask(entries.Hello(taken.next()))
    taken.say([len(fds), os.getpid()])
    wait(taken.client)  # till there is more in it
    fds += taken.ask(entries.FetchSnapshot(taken.next()))[1]
    whole = _all_of(fds)
    taken.say([name for name in names if name.encode() in whole])


def _all_of(fds: Sequence[int]) -> bytes:
    whole = b""
    for fd in fds:
        with mmap.mmap(fd, os.fstat(fd).st_size, access=mmap.ACCESS_READ) as data:
            whole += data[:]
    return whole


def search_traffic(taken: Taken, *arguments: Any) -> None:
    """Look for what others say to each other in all memory that we have, or that they give us."""
    *victims, words = arguments
    _, fds = taken.ask(entries.Hello(taken.next()))
    for victim in victims:
        peer = taken.introduce(victim)
        assert isinstance(peer, Peer), peer
        fds += [peer.theirs, peer.their_status, peer.their_broadcast]
    taken.say("met")
    taken.client.recv(1) if wait(taken.client) else None
    for fd in range(256):
        if _is_open(fd) and stat.S_ISREG(os.fstat(fd).st_mode) and os.fstat(fd).st_size:
            with suppress(PermissionError):  # the log of the bus can be written only
                _all_of([fd])
                fds.append(fd)
    whole = _all_of(set(fds))
    taken.say([len(whole), [word for word in words if word.encode() in whole]])


def become_monitor(taken: Taken) -> None:
    """Ask to be shown everything."""
    taken.hello()
    answer, _ = taken.ask(entries.BecomeMonitor(taken.next(), ()))
    taken.say(getattr(answer, "error", "a monitor"))


def hello_as(taken: Taken, flags: int) -> None:
    """Say Hello as a kdbus client of a kind that is for the privileged, or of none."""
    taken.say(taken.hello(kdbus=flags, name="a.b" if flags == 2 else ""))


# -- the supervisor ----------------------------------------------------------------------------


def lie_of_device(line: Line, unique: int, order: list[int]) -> NoReturn:
    """One lie of the worker of an open file, in the name of the request that it holds or of none; then
    answers how many there are, if it still can."""
    _lie(line, unique, order, entries.FromDeviceWorker, lambda count: replies.ioctl(unique, count))


def search_log_by_file(
    context: Any, broker: Line, line: Line, unique: int, last: str, names: list[str]
) -> NoReturn:
    """Look for names in the log as the worker of an open file, when the `last` of them stands in it; answers
    which there are, as bits, and above them how many descriptors were given."""
    taken = Taken(context, None, line, broker, line.sock)
    said = 1 << 20
    try:
        _, fds = taken.ask(entries.Hello(taken.next(), 0))
        said = len(fds) << 10
        until = time.monotonic() + _SECONDS
        while last.encode() not in (whole := _all_of(fds)) and time.monotonic() < until:
            fds += taken.ask(entries.FetchSnapshot(taken.next()))[1]
        said += sum(1 << at for at, name in enumerate(names) if name.encode() in whole)
    finally:
        line.send(entries.Answered(replies.ioctl(unique, said)))
        line.flush()
        os._exit(0)


def lie_of_tree(line: Line, unique: int, order: list[int]) -> NoReturn:
    """The same of the tree, which answers that there is no such name."""
    _lie(line, unique, order, entries.FromTree, lambda _: replies.failure(unique, errno.ENOENT))


def _lie(line: Line, unique: int, order: list[int], union: Any, answer: Any) -> NoReturn:
    seed, each, number = order
    try:
        all_lies = lies(union, seed, each)
        lie = all_lies[number % len(all_lies)]
        chance = random.Random(number)
        fds = [chance.choice((0, 1, line.fileno())) for _ in range(chance.choice((0, 0, 1, 4)))]
        if isinstance(lie, bytes):
            line.sock.sendmsg([lie], [], socket.MSG_NOSIGNAL)
        else:
            if hasattr(lie, "unique") and chance.random() < 0.7:
                lie = msgspec.structs.replace(lie, unique=unique)
            if isinstance(lie, entries.Answered) and chance.random() < 0.7:
                made = struct.pack("=IiQ", *_head(chance, unique)) + chance.randbytes(24)
                lie = entries.Answered(made)
            if isinstance(lie, entries.Pool):
                fds = [chance.choice((0, line.fileno(), os.memfd_create("pool")))]
            _say_if_it_fits(line, lie, fds)
        line.send(entries.Answered(answer(len(all_lies))))
    finally:
        os._exit(0)


def _head(chance: random.Random, unique: int) -> tuple[int, int, int]:
    """Of an answer: its length, an errno, which request."""
    length = chance.choice((40, 40, 40, 16, 0, 1 << 20))
    number = chance.choice((0, -2, 1, -512, -(1 << 31)))
    return length, number, chance.choice((unique, unique, unique + 2, 0))
