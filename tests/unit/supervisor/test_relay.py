"""What passes between the kernel and a worker, with a socket in the place of /dev/fuse."""

from __future__ import annotations

import ctypes
import os
import socket
import struct
import threading
from array import array
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kbusd.cuse import abi, replies
from kbusd.rings import entries
from kbusd.rings.line import Line, pair
from kbusd.supervisor.aside import MAX_STUCK_PER_UID, Aside
from kbusd.supervisor.holder import Holder
from kbusd.supervisor.relay import Relay, Room, Wish
from tests.unit.cuse.requests_of import request

FILE, UNIQUE, COMMAND, KERNEL_HANDLE = 7, 33, 0x9501, 99
POOL_SIZE = 263_000


class Connection(Relay):
    """Says what it is asked to do in Python."""

    def __init__(self, fuse: int) -> None:
        self.said: list[Any] = []
        super().__init__(Aside(lambda: None), "a mount", fuse)

    def request(self, *what: Any) -> None:
        self.said.append(("request", *what))

    def refuse(self, end: Holder, unique: int) -> None:
        self.said.append(("refuse", unique))

    def pass_on(self, end: Holder, interrupt: bytes) -> None:
        self.said.append(("pass_on", interrupt))

    def heard(self, end: Holder, message: Any, fds: list[int]) -> None:
        self.said.append(message)

    def accuse(self, end: Holder, what: str) -> None:
        self.said.append(("accuse", what))

    def lose(self, end: Holder) -> None:
        self.said.append("lose")

    def may_push(self, end: Holder) -> None:
        assert end.pool >= 0


class Player:
    """A connection with one file, its worker's side, and the kernel's."""

    def __init__(self) -> None:
        self.kernel, fuse = pair()
        fuse.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 212_992)  # twice as much, in fact
        ours, theirs = pair()
        self.ends = fuse, ours
        self.connection = Connection(fuse.fileno())
        self.line = Line(theirs, entries.Asked)
        worker: Any = SimpleNamespace(number=FILE, line=SimpleNamespace(fileno=ours.fileno))
        self.holder = Holder(worker, entries.FromDeviceWorker, 0, 5, set())
        self.connection.files[FILE] = self.holder
        self.room = Room()

    def __enter__(self) -> Player:
        return self

    def __exit__(self, *_: object) -> None:
        self.holder.end(gone=True, released=True)
        for sock in (self.kernel, self.line.sock, *self.ends):
            sock.close()

    def hold(self, unique: int = UNIQUE, request: bytes = b"") -> None:
        self.connection.held[unique] = self.holder, request

    def says(self, record: bytes) -> list[bytes]:
        """What the kernel gets of it."""
        self.line.sock.send(record)
        self.connection.hear(self.holder, self.room)
        return self.written()

    def written(self) -> list[bytes]:
        found = []
        try:
            while True:
                found.append(self.kernel.recv(1 << 20, socket.MSG_DONTWAIT))
        except BlockingIOError:
            return found

    def asked(self) -> entries.Asked:
        received = self.line.receive()
        assert received
        asked: entries.Asked = received[0]
        return asked


def ioctl(argument: int = 0, data: bytes = b"") -> bytes:
    body = abi.IOCTL_IN.pack(FILE, 0, COMMAND, argument, len(data), 0) + data
    return request(abi.IOCTL, unique=UNIQUE, tid=os.getpid(), data=body)


def poll() -> bytes:
    return request(abi.POLL, unique=UNIQUE, data=abi.POLL_IN.pack(FILE, KERNEL_HANDLE, 0, 1))


encode = msgspec.msgpack.encode
ANSWER = replies.ioctl(UNIQUE, 5, b"data")


@pytest.mark.parametrize("size", [0, 1, 255, 256, 65_535, 65_536, 131_000])
def test_a_request_of_any_size_comes_whole(size: int) -> None:
    with Player() as player:
        player.connection.give(ioctl(data=bytes(size)))
        assert player.asked() == entries.Asked(ioctl(data=bytes(size)), ())
        who, head = player.connection.held[UNIQUE]
        assert who is player.holder and len(head) >= abi.IN_HEADER.size


def test_with_it_goes_what_is_wished_up_to_what_is_not_there() -> None:
    memory = array("B", bytes(range(200)))
    at, _ = memory.buffer_info()
    there = ((at + 100, 50), (at, 0), (at + 7, 1))
    with Player() as player:
        player.holder.ahead[COMMAND] = Wish(16, (*there, (8, 4), (at, 1)))
        player.connection.give(ioctl(at))
        asked = player.asked()
    data = memory.tobytes()
    assert asked.request == ioctl(at)
    assert asked.ahead == tuple(
        (start, data[start - at : start - at + size]) for start, size in ((at, 16), *there)
    )
    assert player.connection.copying == {}


def test_of_a_caller_that_cannot_be_seen_there_is_nothing() -> None:
    with Player() as player:
        player.holder.ahead[COMMAND] = Wish(0, ((8, 4),))
        player.connection.give(ioctl())
        assert player.asked().ahead == ()


def test_as_much_as_may_be_wished() -> None:
    memory = ctypes.create_string_buffer(8 << 10)
    at = ctypes.addressof(memory)
    with Player() as player:
        player.holder.ahead[COMMAND] = Wish(0, ((at, 1024),) * 8)
        player.connection.give(ioctl(data=bytes(131_000)))
        assert player.asked().ahead == ((at, bytes(1024)),) * 8
    for too_much in ((1, ((at, 1024),) * 8), ((8 << 10) + 1, ()), (0, ((at, 0),) * 9)):
        with pytest.raises(ValueError, match="too much"):
            Wish(*too_much)


def test_a_request_for_a_worker_that_is_gone_is_refused() -> None:
    with Player() as player:
        player.line.sock.close()
        player.connection.give(ioctl())
        assert player.connection.said == [("refuse", UNIQUE)]


@pytest.mark.parametrize("short", [ioctl()[:-1], poll()[:-1], ioctl()[:41], b""])
def test_what_no_kernel_sends_is_not_looked_at(short: bytes) -> None:
    with Player() as player:
        with pytest.raises(ValueError):
            player.connection.give(len(short).to_bytes(4, "little") + short[4:])
        with pytest.raises(ValueError):
            player.connection.give(bytes(1 << 18))
        assert (player.connection.said, player.connection.held) == ([], {})


def test_one_wake_for_each_poll() -> None:
    """Nobody waits for a second one who has not asked again."""
    nudge = encode(entries.Nudge())
    with Player() as player:
        assert player.says(nudge) == []
        player.connection.give(poll())
        assert player.says(nudge) == [replies.wake(KERNEL_HANDLE)]
        assert player.says(nudge) == []
        player.connection.give(poll())
        assert player.says(nudge) == [replies.wake(KERNEL_HANDLE)]


def test_an_answer_and_what_is_new_in_the_pool_before_it() -> None:
    data = os.urandom(POOL_SIZE)
    pushed = ((0, 3), (POOL_SIZE - 2, 100), (1 << 61, 4), (0, POOL_SIZE), *((9, 1),) * 20)
    with Player() as player:
        player.holder.pool = os.memfd_create("pool")
        os.write(player.holder.pool, data)
        player.hold()
        written = player.says(encode(entries.Answered(ANSWER, pushed)))
    most = 256 << 10
    assert written == [
        replies.store(5, 0, data[:3]),
        replies.store(5, POOL_SIZE - 2, data[-2:]),
        replies.store(5, 0, data[:most]),
        replies.store(5, most, data[most:]),
        *[replies.store(5, 9, data[9:10])] * 20,
        ANSWER,
    ]
    assert (player.connection.said, player.connection.held) == ([], {})


@given(
    st.sampled_from([(), ((0, 1),), ((1 << 40, 300), (70_000, 0))]),
    st.lists(st.tuples(st.integers(0, 70), st.integers(0, 255)), max_size=3),
    st.integers(0, 3),
)
def test_of_what_is_no_answer_nothing_reaches_the_kernel(
    pushed: tuple[tuple[int, int], ...], changes: list[tuple[int, int]], cut: int
) -> None:
    """It takes for an answer what msgspec does, and no more."""
    record = bytearray(encode(entries.Answered(ANSWER, pushed)))
    for at, byte in changes:
        if at < len(record):
            record[at] = byte
    del record[len(record) - cut :]
    with Player() as player:
        player.holder.pool = os.memfd_create("pool")
        player.hold()
        written = player.says(bytes(record))
        said = player.connection.said
    try:
        expected = msgspec.msgpack.decode(record, type=entries.Answered)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        expected = None
    if written:
        assert expected and written == [expected.reply] and said == []
    else:
        assert said, record


HEAD = encode(entries.Answered(b""))[:-3]


@pytest.mark.parametrize(
    "record",
    [
        encode(entries.Answered(ANSWER)) + b"\0",
        HEAD,
        HEAD + b"\xc4",
        HEAD + b"\xc4\xff" + ANSWER + b"\x90",
        HEAD + b"\xc6\xff\xff\xff\xff" + ANSWER,
        HEAD + b"\xc4" + bytes((len(ANSWER),)) + ANSWER,
        HEAD + b"\xc4" + bytes((len(ANSWER),)) + ANSWER + b"\x91",
        HEAD + b"\xc4" + bytes((len(ANSWER),)) + ANSWER + b"\xdd\xff\xff\xff\xff",
        HEAD + b"\xc4" + bytes((len(ANSWER),)) + ANSWER + b"\x91\x93\0\0\0",
        encode(entries.Answered(ANSWER, ((-1, 1),))),
        encode(entries.Answered(ANSWER, ((1 << 63, 1),))),
        encode(entries.Answered(ANSWER, ((0, (1 << 64) - 1),))),
        encode(entries.Answered(replies.ioctl(UNIQUE + 1, 0))),
        encode(entries.Answered(ANSWER[:15])),
        encode(entries.Answered(ANSWER + b"x")),
        encode(entries.Answered(abi.OUT_HEADER.pack(16, -512, UNIQUE))),
    ],
)
def test_who_answers_so_is_ended(record: bytes) -> None:
    with Player() as player:
        player.holder.pool = os.memfd_create("pool")
        player.hold()
        assert player.says(record) == []
        (accused, _), lost = player.connection.said
        assert (accused, lost) == ("accuse", "lose")


@pytest.mark.parametrize("opcode", [abi.OPEN, abi.OPENDIR, abi.CREATE, abi.TMPFILE])
def test_nobody_opens_a_file_by_itself(opcode: int) -> None:
    """By the number of another's worker it would be that one's file."""
    opened = abi.OUT_HEADER.pack(32, 0, UNIQUE) + struct.pack("=QQ", FILE, 0)
    with Player() as player:
        player.hold(request=request(opcode, unique=UNIQUE))
        assert player.says(encode(entries.Answered(opened))) == []
        (accused, _), lost = player.connection.said
        assert (accused, lost) == ("accuse", "lose")


def test_a_directory_is_opened_without_a_handle() -> None:
    opened = abi.OUT_HEADER.pack(32, 0, UNIQUE) + bytes(16)
    with Player() as player:
        player.hold(request=request(abi.OPENDIR, unique=UNIQUE))
        assert player.says(encode(entries.Answered(opened))) == [opened]


def test_who_comes_back_waits_till_another_has_taken_over() -> None:
    """He went on at once, and what he had dealt with was turned off for good."""
    begun, back, seen = threading.Event(), threading.Event(), threading.Event()
    found = []

    def take_over() -> None:
        begun.set()
        found.append(back.wait(0.2))
        seen.set()

    def listen() -> None:
        aside.listener = threading.get_ident()
        with aside.work(0):
            begun.wait(10)
        back.set()

    aside = Aside(take_over)
    thread = threading.Thread(target=listen)
    thread.start()
    assert seen.wait(10) and back.wait(10)
    thread.join()
    assert found == [False]


def test_so_many_may_be_stuck_for_one_user() -> None:
    aside = Aside(lambda: None)
    pieces = [aside.work(0) for _ in range(MAX_STUCK_PER_UID)]
    for piece in pieces:
        piece.__enter__()
    with pytest.raises(Exception, match="8 requests of uid 0 are stuck already"):
        aside.work(0).__enter__()
    with aside.work(1):
        pieces[0].__exit__(None, None, None)
        with aside.work(0):
            pass
