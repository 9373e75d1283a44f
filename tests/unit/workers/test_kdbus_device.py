"""An open file: what its worker asks the supervisor for, and what it guesses. The test is the supervisor,
and the client's memory; the bus is one in memory."""

from __future__ import annotations

import errno
import mmap
import os
import select
import struct
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kbusd.cuse import abi as fuse
from kbusd.cuse import requests
from kbusd.kdbus import abi, layout
from kbusd.kdbus.errors import Errno
from kbusd.kdbus.session import Session
from kbusd.rings import entries, promises
from kbusd.rings.line import Line, pair
from kbusd.workers.kdbus_device import Device, FileLine
from kbusd.workers.kdbus_requests import Request, Requests
from tests.unit.kdbus.world import Port, World

COMMAND, MESSAGE, PAYLOAD = 0x1000, 0x20000, 0x30000  # far apart: nothing lies near anything
POOL = 1 << 16
NOBODY = Requests(None, None)  # type: ignore[arg-type]


class File:
    """One open file, a connection, and another that gets what it sends."""

    def __init__(self) -> None:
        ours, theirs = pair()
        self.line = Line(ours, entries.FromDeviceWorker)
        self.other = World().client()
        port = Port(self.other.port.world, 1000)
        port.session = Session(port)
        self.device = Device(FileLine(theirs, entries.ToDeviceWorker), port.session, 1000, "fuse")
        port.make_pool = self.device.make_pool  # type: ignore[assignment, method-assign]
        self.memory: dict[int, bytes] = {}
        self.ahead: dict[int, entries.Ahead] = {}
        self.asked: list[entries.Copy] = []
        self.stored: list[tuple[int, bytes]] = []
        self.reply = b""
        self.unique = 0
        self.pool = -1
        hello = struct.pack("=10Q", 96, 1, 0, 0, 0, 0, 0, POOL, 0, 0) + bytes(16)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(port, "connect", self._interrupted)
            assert self.ioctl(abi.CMD_HELLO, COMMAND, hello, len(hello)) == -errno.EINTR
        assert self.ioctl(abi.CMD_HELLO, COMMAND, hello, len(hello)) == 0
        self.asked.clear()

    async def _interrupted(self, *_: Any) -> tuple[int, bytes]:
        raise Errno(errno.EINTR, "a signal came")

    def ioctl(self, command: int, address: int, data: bytes = b"", out: int = 0) -> int:
        """What it returns; what the worker asks for is answered out of `memory`."""
        self.unique += 2
        body = fuse.IOCTL_IN.pack(5, 0, command, address, len(data), out) + data
        head = fuse.IN_HEADER.pack(40 + len(body), fuse.IOCTL, self.unique, 3, 0, 0, 9, 0, 0)
        guess = self.ahead.get(command, entries.Ahead(command, 0, ()))
        ranges = [(address, guess.at_argument)] if guess.at_argument else []
        came = tuple((at, self._read(at, size)) for at, size in (*ranges, *guess.ranges))
        self.line.send(entries.Asked(head + body, came))
        for _ in range(20):
            self.device.requests(lambda: None)
            answer = None
            while (received := self.line.receive()) is not None:
                heard = self._hear(*received)
                answer = heard if answer is None else answer
            if answer is not None:
                return answer
        raise AssertionError("no answer")

    def _hear(self, message: Any, fds: list[int]) -> int | None:
        match message:
            case entries.Copy(unique, ranges):
                self.asked.append(message)
                data = [self._read(at, size) for at, size in ranges]
                sizes = tuple(map(len, data))
                self.line.send(entries.Copied(unique, 0, sizes, b"".join(data)))
            case entries.Ahead(command):
                self.ahead[command] = message
            case entries.Pool():
                assert self.pool < 0, "the supervisor takes one, and ends who offers another"
                self.pool, self.events_at = fds[0], message.events_at
            case entries.Store(unique, parts):
                self.stored += parts
                self.line.send(entries.Stored(unique, 0))
            case entries.Answered(reply):
                self.reply = reply
                result, *_ = fuse.IOCTL_OUT.unpack_from(reply, fuse.OUT_HEADER.size)
                return int(result)
        return None

    def _read(self, address: int, size: int) -> bytes:
        for start, data in self.memory.items():
            if start <= address < start + len(data):
                return data[address - start : address - start + size]
        return b""

    def send(self, payload: bytes, message: int = MESSAGE) -> int:
        item = struct.pack("=4Q", 32, abi.ITEM_PAYLOAD_VEC, len(payload), PAYLOAD)
        head = layout.MESSAGE.pack(96, 0, 0, self.other.id, 0, abi.PAYLOAD_DBUS, 1, 0)
        self.memory = {message: head + item, PAYLOAD: payload}
        return self.ioctl(abi.CMD_SEND, COMMAND, struct.pack("=7Q", 56, 0, 0, message, 0, 0, 0))


@pytest.fixture
def file() -> Iterator[File]:
    made = File()
    yield made
    made.line.close()
    made.device.line.close()


def test_what_is_looked_at_twice_comes_along_from_then_on(file: File) -> None:
    for payload in (b"one", b"two"):
        assert file.send(payload) == 0
    assert file.asked
    file.asked.clear()
    assert file.send(b"3rd") == 0
    assert not file.asked
    assert [file.other.recv().payload for _ in range(3)] == [b"one", b"two", b"3rd"]


def test_a_guess_that_is_wrong_costs_a_question_and_no_more(file: File) -> None:
    for _ in range(2):
        file.send(b"one")
    file.asked.clear()
    assert file.send(b"moved", MESSAGE + 0x8000) == 0
    assert file.send(b"a longer one", MESSAGE) == 0
    assert file.asked
    received = [file.other.recv().payload for _ in range(4)]
    assert received == [b"one", b"one", b"moved", b"a longer one"]


def test_the_struct_of_a_command_that_the_kernel_does_not_bring_is_guessed_too(file: File) -> None:
    file.memory = {COMMAND: struct.pack("=8Q", 64, 0, 0, 0, 0, 0, 0, 0)}
    for _ in range(3):
        file.asked.clear()
        assert file.ioctl(abi.CMD_RECV, COMMAND, out=64) == -11  # EAGAIN
    assert not file.asked


def test_large_payloads_are_not_guessed(file: File) -> None:
    for _ in range(4):
        file.asked.clear()
        assert file.send(bytes(9000)) == 0
        file.other.recv()
    assert file.asked and not file.ahead


def test_the_supervisor_is_shown_what_poll_is_to_say(file: File) -> None:
    def shown() -> int:
        return int.from_bytes(os.pread(file.pool, 4, file.events_at), "little")

    assert file.events_at == POOL
    assert not shown() & select.POLLIN
    file.other.send(file.device.session.id)  # type: ignore[union-attr]
    file.device.nudge()
    assert shown() & select.POLLIN
    file.memory = {COMMAND: struct.pack("=8Q", 64, 0, 0, 0, 0, 0, 0, 0)}
    assert file.ioctl(abi.CMD_RECV, COMMAND, out=64) == 0
    assert not shown() & select.POLLIN


@given(
    st.sampled_from((0, 1, 1 << 31, (1 << 64) - 1)),
    st.sampled_from((0, 1, (1 << 32) - 1)),
    st.sampled_from((0, 8, (1 << 64) - 8)),
    st.binary(max_size=9),
    st.sampled_from((0, 0, 0, 1, 8, 1 << 31)),
)
def test_an_ioctl_is_read_as_any_request_is(
    unique: int, number: int, argument: int, data: bytes, more: int
) -> None:
    body = fuse.IOCTL_IN.pack(5, 0, number, argument, len(data) + more, number) + data
    raw = fuse.IN_HEADER.pack(40 + len(body), fuse.IOCTL, unique, 3, 0, 0, number, 0, 0) + body
    if more:
        for reader in (requests.decode, lambda raw: Request(NOBODY, raw, ())):
            with pytest.raises(requests.Malformed):
                reader(raw)
        return
    quick, general = Request(NOBODY, raw, ()), requests.decode(raw)
    assert isinstance(general.body, requests.Ioctl)
    assert (quick.unique, quick.tid) == (general.header.unique, general.header.tid)
    assert (quick.command, quick.argument) == (general.body.command, general.body.argument)
    assert (quick.out_size, quick.data) == (general.body.out_size, general.body.data)


@pytest.mark.parametrize("length", [0, 39, 71, 72, 100])
def test_what_no_kernel_sends_is_not_answered(file: File, length: int) -> None:
    raw = fuse.IN_HEADER.pack(80, fuse.IOCTL, 9, 3, 0, 0, 9, 0, 0) + bytes(60)
    file.line.send(entries.Asked(raw[:length]))
    assert file.device.requests(lambda: None)
    assert file.line.receive() is None


def test_a_segment_of_what_came_along_that_wraps_around_is_not_there(file: File) -> None:
    top = (1 << 64) - 100
    item = struct.pack("=4Q", 32, abi.ITEM_PAYLOAD_VEC, 100, top)
    head = layout.MESSAGE.pack(96, 0, 0, file.other.id, 0, abi.PAYLOAD_DBUS, 1, 0)
    file.memory = {MESSAGE: head + item}
    send = struct.pack("=7Q", 56, 0, 0, MESSAGE, 0, 0, 0)
    for _ in range(3):
        assert file.ioctl(abi.CMD_SEND, COMMAND, send) == -errno.EFAULT
    assert file.asked


def test_return_flags_of_an_ordinary_command_are_written_over(file: File) -> None:
    """FREE does not bring its struct back: what is wrong in it is stored."""
    before = len(file.stored)
    file.other.send(file.device.session.id)  # type: ignore[union-attr]
    file.memory = {COMMAND: struct.pack("=8Q", 64, 0, 0, 0, 0, 0, 0, 0)}
    assert file.ioctl(abi.CMD_RECV, COMMAND, out=64) == 0
    offset = struct.unpack_from("=Q", file.reply, 32 + 40)[0]
    assert file.ioctl(abi.CMD_FREE, COMMAND, struct.pack("=4Q", 32, 0, 7, offset)) == 0
    assert file.stored[before:] == [(COMMAND + 16, bytes(8))]
    assert file.ioctl(abi.CMD_FREE, COMMAND, struct.pack("=4Q", 32, 0, 0, offset)) == -errno.ENXIO
    assert len(file.stored) == before + 1


def test_a_message_that_comes_when_the_file_was_just_closed_does_not_end_the_worker(
    file: File,
) -> None:
    """Who is woken is gone; that the file is closed is what the line says next."""
    file.line.close()
    file.other.send(file.device.session.id)  # type: ignore[union-attr]
    file.device.nudge()
    assert not file.device.requests(lambda: None)
    assert file.device.line.flush()


RECV = struct.pack("=8Q", 64, 0, 0, 0, 0, 0, 0, 0)


class Page:
    """The supervisor's side of a file's promises."""

    def __init__(self, file: File) -> None:
        self.fd = promises.make()
        self.page = mmap.mmap(self.fd, mmap.PAGESIZE)
        file.line.send(entries.Promising(), [self.fd])
        file.device.requests(lambda: None)
        os.close(self.fd)

    def steps(self) -> list[tuple[int, bytes, bytes, int, int]]:
        """What is promised now: command, request, answer, offset, size."""
        if self.page[1]:
            return []
        found = []
        for at in (64, 64 + 216)[self.page[0] :]:
            command, asked, length, _, _, offset, size = struct.unpack_from("=4I3Q", self.page, at)
            request = self.page[at + 40 : at + 40 + asked]
            answer = self.page[at + 120 : at + 120 + length]
            found.append((command, request, answer, offset, size))
        return [each for each in found if each[0]]

    def keep(self) -> tuple[int, bytes, bytes, int, int]:
        step = self.steps()[0]
        self.page[0] += 1
        return step


def messages(file: File, count: int) -> None:
    for _ in range(count):
        file.other.send(file.device.session.id)  # type: ignore[union-attr]


def receive(file: File) -> int:
    """RECV by the worker; the offset."""
    file.memory = {COMMAND: RECV}
    assert file.ioctl(abi.CMD_RECV, COMMAND, out=64) == 0
    return int.from_bytes(file.reply[32 + 40 : 32 + 48], "little")


def comes_along(file: File) -> None:
    """The struct of RECV, unasked, from now on."""
    file.memory = {COMMAND: RECV}
    while abi.CMD_RECV not in file.ahead:
        assert file.ioctl(abi.CMD_RECV, COMMAND, out=64) == -errno.EAGAIN
    assert file.ioctl(abi.CMD_RECV, COMMAND, out=64) == -errno.EAGAIN


def test_recv_and_free_are_promised_as_they_were_the_last_time(file: File) -> None:
    page = Page(file)
    box = file.device.session.box  # type: ignore[union-attr]
    messages(file, 1)
    file.device.promise()
    assert page.steps() == [], "nobody knows yet what RECV looks like"
    receive(file)
    comes_along(file)
    messages(file, 2)
    file.device.promise()
    (recv, asked, answer, at, size), (free, freed, done, *pages) = page.steps()
    assert (recv, asked, free, pages) == (abi.CMD_RECV, RECV, abi.CMD_FREE, [0, 0])
    assert freed == struct.pack("=4Q", 32, 0, 0, at) and done == bytes(16)
    used = box.pool.statistics().used
    page.keep()
    file.device.recall()
    assert len(box.queue) == 1 and page.steps() == [] and page.page[0] == 0
    assert box.pool.statistics().used == used, "it was not freed"
    assert file.ioctl(abi.CMD_FREE, COMMAND, freed) == 0
    assert receive(file) == at + size, "the next one"
    assert file.reply[32:72] == answer[16:56], "what was promised is what it answers"


def test_what_was_kept_is_done_before_all_else(file: File) -> None:
    page = Page(file)
    comes_along(file)
    messages(file, 1)
    file.device.promise()
    *_, at, _ = page.keep()
    page.keep()
    file.memory = {COMMAND: RECV}
    assert file.ioctl(abi.CMD_RECV, COMMAND, out=64) == -errno.EAGAIN
    assert file.ioctl(abi.CMD_FREE, COMMAND, struct.pack("=4Q", 32, 0, 0, at)) == -errno.ENXIO
    assert not int.from_bytes(os.pread(file.pool, 4, file.events_at), "little") & select.POLLIN
    assert page.steps() == []


def test_a_page_of_promises_that_is_none_is_done_without(file: File) -> None:
    loose = os.memfd_create("loose")
    file.line.send(entries.Promising(), [loose])
    file.line.send(entries.Promising())
    os.close(loose)
    file.device.requests(lambda: None)
    file.device.requests(lambda: None)
    comes_along(file)
    messages(file, 1)
    file.device.promise()
    file.device.recall()
    receive(file)


def test_after_byebye_nothing_is_promised(file: File) -> None:
    page = Page(file)
    comes_along(file)
    assert file.ioctl(abi.CMD_BYEBYE, COMMAND, struct.pack("=2Q", 16, 0)) in (0, -errno.EINVAL)
    file.device.promise()
    assert page.steps() == []
