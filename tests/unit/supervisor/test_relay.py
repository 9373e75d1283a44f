"""What passes between the kernel and a worker, with a socket in the place of /dev/fuse."""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import struct
import threading
from array import array
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kbusd.cuse import abi, replies
from kbusd.rings import entries
from kbusd.rings.line import Line, pair
from kbusd.supervisor import reach
from kbusd.supervisor.aside import MAX_STUCK_PER_UID, MAX_THREADS, Aside, Crowded
from kbusd.supervisor.holder import MAX_LENT, Holder
from kbusd.supervisor.relay import MAX_OWED, Relay, Room, Wish
from tests.unit.cuse.requests_of import request

FILE, UNIQUE, COMMAND, KERNEL_HANDLE = 7, 33, 0x9501, 99
POOL_SIZE = 263_000


class Connection(Relay):
    """Says what it is asked to do in Python."""

    def __init__(self, fuse: int) -> None:
        self.said: list[Any] = []
        self.stuck = Aside(lambda: None, lambda: None)
        super().__init__(self.stuck, "a mount", fuse)

    def request(self, *what: Any) -> None:
        self.said.append(("request", *what))

    def refuse(self, end: Holder, unique: int) -> None:
        self.said.append(("refuse", unique))

    def pass_on(self, end: Holder, interrupt: bytes) -> None:
        self.said.append(("pass_on", interrupt))

    def heard(self, end: Holder, message: Any, fds: list[int]) -> bool:
        self.said.append(message)
        self.came = fds
        return True

    def pause(self, end: Holder) -> None:
        self.said.append("pause")

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
        self.fuse = fuse
        self.connection = Connection(fuse.fileno())
        self.line = Line(theirs, entries.Asked)
        worker: Any = SimpleNamespace(number=FILE, pid=1, line=Line(ours, entries.FromDeviceWorker))
        self.late: list[Holder] = []
        self.holder = Holder(worker, entries.FromDeviceWorker, 0, 5, self.late.append)
        self.connection.files[FILE] = self.holder
        self.room = Room()

    def __enter__(self) -> Player:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.holder.end(gone=True, released=True))
        for sock in (self.kernel, self.line.sock, self.fuse):
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


def test_an_interrupt_could_reach_the_worker_before_its_request() -> None:
    """Which then knew of no such request, and the client's signal was lost."""
    with Player() as player:
        player.holder.ahead[COMMAND] = Wish(0, ((8, 4),))

        class Lock:
            """Another thread says something first."""

            def __enter__(self) -> None:
                interrupted.append(player.connection.take_back(UNIQUE))

            def __exit__(self, *_: object) -> None:
                pass

        interrupted: list[bool] = []
        lock, player.holder.lock = player.holder.lock, Lock()  # type: ignore[assignment]
        player.connection.give(ioctl())
        player.holder.lock = lock
        assert interrupted == [True]
        assert player.line.receive() is None
        assert player.connection.held == player.connection.copying == {}
        assert player.holder.owed == 0


def test_an_interrupt_of_what_its_lost_worker_had_looked_at_ended_in_a_bug() -> None:
    with Player() as player:
        player.connection.copying[UNIQUE] = True
        assert not player.connection.take_back(UNIQUE)


def test_a_worker_that_answers_nothing_that_was_interrupted_made_the_supervisor_grow() -> None:
    with Player() as player:

        def interrupted(unique: int) -> None:
            player.hold(unique, ioctl())
            player.connection.copying[unique] = True
            assert player.connection.take_back(unique)

        for _ in range(2 * MAX_OWED):
            interrupted(UNIQUE)
            assert player.says(encode(entries.Answered(ANSWER))) == [ANSWER]
        for unique in range(1, MAX_OWED):
            interrupted(unique)
        assert player.connection.said == []
        interrupted(MAX_OWED)
        ((accused, _),) = player.connection.said
        assert accused == "accuse"


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

    aside = Aside(take_over, lambda: None)
    thread = threading.Thread(target=listen)
    thread.start()
    assert seen.wait(10) and back.wait(10)
    thread.join()
    assert found == [False]


def test_so_many_may_be_stuck_for_one_user() -> None:
    aside = Aside(lambda: None, lambda: None)
    pieces = [aside.work(0) for _ in range(MAX_STUCK_PER_UID)]
    for piece in pieces:
        piece.__enter__()
    with pytest.raises(Exception, match="8 requests of uid 0 are stuck already"):
        aside.work(0).__enter__()
    with aside.work(1):
        pieces[0].__exit__(None, None, None)
        with aside.work(0):
            pass


def test_four_users_could_take_every_thread() -> None:
    """Whose requests were stuck; then whoever asked for something was ended."""
    aside = Aside(lambda: None, lambda: None)
    for uid in range(4):
        for _ in range(MAX_STUCK_PER_UID):
            with suppress(Crowded):
                aside.work(uid).__enter__()
    assert sum(aside.stuck.values()) < MAX_THREADS - 1
    with aside.work(9):
        pass
    assert 9 not in aside.stuck, "it kept count of everybody that it ever saw"


def test_what_is_sure_to_end_goes_on_though_the_rest_is_stuck() -> None:
    aside = Aside(lambda: None, lambda: None)
    for uid in range(MAX_THREADS):
        with suppress(Crowded):
            aside.work(uid).__enter__()
    with pytest.raises(Crowded):
        aside.work(77).__enter__()
    with aside.work(~77):
        pass


def test_without_a_thread_to_take_over_nobody_listened_any_more() -> None:
    tried = []
    listens = threading.Event()

    def start() -> None:
        tried.append(True)
        if len(tried) < 4:
            raise RuntimeError("can't start new thread")
        listens.set()

    def listen() -> None:
        aside.listener = threading.get_ident()
        with aside.work(0):
            listens.wait(10)

    aside = Aside(lambda: None, start)
    thread = threading.Thread(target=listen)
    thread.start()
    assert listens.wait(10)
    thread.join()


def test_what_could_not_be_closed_yet_is_closed_when_there_is_room() -> None:
    aside = Aside(lambda: None, lambda: None)
    reader, writer = os.pipe2(os.O_NONBLOCK)
    pieces = [aside.work(5) for _ in range(MAX_STUCK_PER_UID)]
    for piece in pieces:
        piece.__enter__()
    aside.close(5, writer)
    aside.close_left()
    assert aside.owes(5) and not aside.owes(6)
    with pytest.raises(BlockingIOError):
        os.read(reader, 1)
    pieces.pop().__exit__(None, None, None)
    aside.close_left()
    assert not aside.owes(5) and os.read(reader, 1) == b""
    os.close(reader)


@pytest.mark.parametrize(
    "record",
    [
        b"\xc1",
        b"",
        encode(entries.Nudge()),
        encode(entries.Answered(ANSWER)),
        encode(entries.Copy(UNIQUE, ())),
        encode(entries.Pool()),
    ],
)
def test_descriptors_that_nobody_wants_were_closed_by_who_listens(record: bytes) -> None:
    """To close one may take for ever. They are left in the line, to be closed with it."""
    reader, writer = os.pipe2(os.O_NONBLOCK)
    with Player() as player:
        player.hold()
        player.holder.pool = os.memfd_create("pool")
        socket.send_fds(player.line.sock, [record], [writer] * 20)
        os.close(writer)
        player.connection.hear(player.holder, player.room)
        assert player.connection.said[-1] == "lose"
        assert player.written() == []
        with pytest.raises(BlockingIOError):
            os.read(reader, 1)
        line = player.holder.end(gone=True)
        os.close(line)
        assert os.read(reader, 1) == b""
        player.holder.end = lambda **_: os.dup(reader)  # type: ignore[method-assign]
    os.close(reader)


def test_of_what_comes_with_a_pool_one_is_taken() -> None:
    before = set(os.listdir("/proc/self/fd"))
    with Player() as player:
        pool = os.memfd_create("pool")
        socket.send_fds(player.line.sock, [encode(entries.Pool())], [pool] * 200)
        os.close(pool)
        player.connection.hear(player.holder, player.room)
        assert player.connection.said == [entries.Pool()]
        (taken,) = player.connection.came
        os.close(taken)
        assert player.connection.stuck.stuck == {}
    assert set(os.listdir("/proc/self/fd")) == before


def test_a_sparse_pool_could_be_pushed_for_years() -> None:
    with Player() as player:
        player.holder.pool = os.memfd_create("pool")
        os.ftruncate(player.holder.pool, 1 << 45)
        player.hold()
        assert player.says(encode(entries.Answered(ANSWER, ((0, 1 << 45),)))) == []
        assert player.connection.said == [("accuse", "pushed more than a pool can hold"), "lose"]


def test_pages_that_cannot_be_pushed_yet_are_not_forgotten() -> None:
    with Player() as player:
        player.holder.pool = os.memfd_create("pool")
        os.write(player.holder.pool, b"x")
        player.hold()
        aside = player.connection.stuck
        pieces = [aside.work(~0) for _ in range(MAX_STUCK_PER_UID)]
        for piece in pieces:
            piece.__enter__()
        assert player.says(encode(entries.Answered(ANSWER, ((0, 1),)))) == []
        assert player.connection.said == ["pause"]
        pieces[0].__exit__(None, None, None)
        player.connection.hear(player.holder, player.room)
        assert player.written() == [replies.store(5, 0, b"x"), ANSWER]


def test_descriptors_waited_here_for_a_worker_that_does_not_read() -> None:
    """And were closed by who listens, when the worker was gone."""
    own = os.pipe()
    with Player() as player:
        while not player.holder.line.queue:
            player.connection.give(ioctl(data=bytes(16_000)))
        assert player.late == [player.holder]
        order = entries.Take(UNIQUE, own)
        reach.serve(player.holder, order, os.getpid(), set(), {UNIQUE: True})
        memory = ctypes.create_string_buffer(100_000)
        copy = entries.Copy(UNIQUE, ((ctypes.addressof(memory), 100_000),))
        reach.serve(player.holder, copy, os.getpid(), set(), {UNIQUE: True})
        waiting = list(player.holder.line.queue)
        assert [fds for _, fds in waiting] == [()] * len(waiting)
        said = [data for data, _ in waiting[-2:]]
        assert said == [
            encode(entries.Given(UNIQUE, errno.EAGAIN)),
            encode(entries.Copied(UNIQUE, errno.EAGAIN, (), b"")),
        ]
        assert not player.holder.may_be_heard()
    for fd in own:
        os.close(fd)


def test_memory_for_a_worker_that_does_not_read_grew_without_bounds() -> None:
    memory = ctypes.create_string_buffer(8 << 20)
    copy = entries.Copy(UNIQUE, ((ctypes.addressof(memory), 8 << 20),))
    with Player() as player:
        player.line = Line(player.line.sock, entries.ToDeviceWorker)
        count = 0
        while player.holder.may_be_heard():
            reach.serve(player.holder, copy, os.getpid(), set(), {UNIQUE: True})
            count += 1
        assert player.holder.lent == (count << 23) <= MAX_LENT + (8 << 20)
        for _ in range(count):
            assert not player.holder.may_be_heard()
            received = player.line.receive()
            assert received
            os.close(received[1][0])
        assert player.holder.may_be_heard()


def test_what_a_file_had_made_was_ended_twice() -> None:
    """By then, its name may have been another's."""
    with Player() as player:
        ended: list[bool] = []
        assert player.holder.own(lambda: ended.append(True), bound=True)
        player.holder.end(released=True)
        player.holder.end(released=True)
        os.close(player.holder.end(gone=True))
        assert ended == [True]
        player.holder.end = lambda **_: os.dup(0)  # type: ignore[method-assign]
