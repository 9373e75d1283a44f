"""The supervisor's side of kdbusfs: what reaches a worker, what is done for it, and what is not."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import glob
import mmap
import os
import select
import signal
import socket
import struct
import sys
import threading
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import msgspec
import pytest

from kbusd.cuse import abi, replies, requests
from kbusd.rings import entries, memfd
from kbusd.supervisor import caller, kdbusfs, reach
from kbusd.supervisor.aside import MAX_STUCK_PER_UID, Crowded
from kbusd.supervisor.device import Devices
from kbusd.supervisor.kdbusfs import MAX_TREES
from tests.bus.lingering import lingering

from .kclient import Buffer, ioctl
from .places import NATIVE, everywhere
from .rig import BUS, NODE, SECONDS, Player, Rig, command, errno_of

PAGE = mmap.PAGESIZE
PLAIN = command(1)
EINVAL, ENOENT = "EINVAL", "ENOENT"


@contextmanager
def opened(path: str) -> Iterator[int]:
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def address(of: array[int]) -> int:
    return of.buffer_info()[0]


def maps(fragment: str) -> list[tuple[int, int]]:
    """Where in our memory something is mapped: beginning and end."""
    found = []
    with open("/proc/self/maps") as file:
        for line in file:
            if fragment in line:
                start, _, end = line.split()[0].partition("-")
                found.append((int(start, 16), int(end, 16)))
    return found


@everywhere(NATIVE)
def test_a_tree_with_one_file() -> None:
    def client(path: str) -> Any:
        root = os.path.dirname(os.path.dirname(path))
        told: dict[str, Any] = {
            "names": [os.listdir(root), os.listdir(f"{root}/0-test")],
            "stat": [os.stat(path).st_mode, os.stat(root).st_mode],
            "wrong": [errno_of(partial(os.stat, f"{root}/{name}")) for name in WRONG],
            "made": errno_of(lambda: os.mkdir(f"{root}/new")),
            "removed": errno_of(lambda: os.unlink(path)),
        }
        with opened(path) as fd, opened(path) as other:
            told["read"] = errno_of(lambda: os.read(fd, 10))
            told["write"] = errno_of(lambda: os.write(fd, b"x"))
            told["again"] = errno_of(lambda: os.open(f"/proc/self/fd/{fd}", os.O_RDWR))
            told["same"] = os.fstat(fd).st_ino == os.fstat(other).st_ino
        os.chmod(path, 0o640)
        told["changed"] = os.stat(path).st_mode
        return told

    rig = Rig(client)
    one, two = rig.hire(), rig.hire()
    assert one.device and (one.device.bus, one.device.endpoint) == ("0-test", "bus")
    assert one.device.credentials.pid == rig.child.pid
    assert one.device.credentials.uid == os.geteuid()
    assert one.ends() and two.ends()
    told = rig.end()
    assert told == {
        "names": [["0-test"], ["bus"]],
        "stat": [0o100666, 0o40555],
        "wrong": [ENOENT, ENOENT, "ENAMETOOLONG", "ENOTDIR"],
        "made": told["made"],
        "removed": told["removed"],
        "read": EINVAL,
        "write": EINVAL,
        "again": "ESTALE",
        "same": False,
        "changed": 0o100640,
    }
    assert told["made"] and told["removed"]
    assert (rig.killed, rig.warnings, os.path.exists(rig.path)) == ([], [], False)


WRONG = ["1-test", "0-test/\udcff\x01", "x" * 4095, f"{BUS}/x"]


@everywhere(NATIVE)
def test_what_was_changed_in_the_tree_was_forgotten_when_its_worker_was_killed() -> None:
    def client(path: str) -> Any:
        bus = os.path.dirname(path)
        os.chmod(path, 0o640)
        os.chmod(bus, 0o550)
        os.chown(path, os.geteuid(), os.getegid())
        with opened(path) as fd:
            fcntl.ioctl(fd, PLAIN)
        return [os.stat(each).st_mode & 0o777 for each in (path, bus)]

    rig = Rig(client)
    player = rig.hire()
    unique, _ = player.asked(requests.Ioctl)
    for tree in (1, 3):
        rig.kill_tree(tree)
        rig.hire()
    assert rig.mount.changed.keys() == {("0-test", ""), ("0-test", "bus")}
    player.answer(unique)
    assert rig.end() == [0o640, 0o550]
    rig.mount.withdraw(NODE)  # who makes a bus of this name later need not be the same
    assert rig.mount.changed == {}


@everywhere(NATIVE)
def test_a_file_that_was_open_when_its_tree_died_was_stale() -> None:
    def client(path: str) -> Any:
        with opened(path) as fd:
            before = os.fstat(fd)
            fcntl.ioctl(fd, PLAIN)
            after = os.fstat(fd)
            os.fchmod(fd, 0o640)
            again = errno_of(lambda: os.open(f"/proc/self/fd/{fd}", os.O_RDWR))
            return before == after, os.fstat(fd).st_mode, os.stat(path).st_mode, again

    rig = Rig(client)
    player = rig.hire()
    unique, _ = player.asked(requests.Ioctl)
    for tree in (1, 3):
        rig.kill_tree(tree)
        rig.hire()
    player.answer(unique)
    assert rig.end() == [True, 0o100640, 0o100640, "ESTALE"]


@everywhere(NATIVE)
def test_an_ioctl_goes_to_the_worker_of_its_file() -> None:
    def client(path: str) -> Any:
        with opened(path) as fd, opened(path) as other:
            buffer = array("B", b"question")
            number = fcntl.ioctl(fd, command(2, 8), buffer)
            return number, buffer.tobytes().decode(), errno_of(lambda: fcntl.ioctl(other, PLAIN))

    rig = Rig(client)
    one, two = rig.hire(), rig.hire()
    unique, body = one.asked(requests.Ioctl)
    assert (body.command, body.data, body.out_size) == (command(2, 8), b"question", 8)
    assert not body.unrestricted
    one.answer(unique, 5, b"response")
    assert two.serve_ioctl(-errno.ENOTTY).command == PLAIN
    assert rig.end() == [5, "response", "ENOTTY"]


@everywhere(NATIVE)
def test_what_two_workers_say_at_the_same_time_is_not_mixed_up() -> None:
    turns = 400
    sys.setswitchinterval(1e-6)  # threads take turns wherever they can

    def client(path: str) -> Any:
        right = []

        def ask(fd: int, number: int) -> None:
            for turn in range(turns):
                buffer = array("Q", [number, turn])
                assert fcntl.ioctl(fd, command(2, 16), buffer) == number
                assert buffer.tolist() == [number + turn, turn]
            right.append(number)

        with opened(path) as one, opened(path) as two:
            threads = [
                threading.Thread(target=ask, args=(fd, number))
                for number, fd in enumerate((one, two, one, two), 1)
            ]
            for each in threads:
                each.start()
            for each in threads:
                each.join()
        return sorted(right)

    rig = Rig(client)

    def work(player: Player) -> None:
        while True:
            try:
                unique, body = player.asked(requests.Ioctl)
            except EOFError:
                return
            number, turn = array("Q", body.data)
            player.answer(unique, number, array("Q", [number + turn, turn]).tobytes())

    workers = [threading.Thread(target=work, args=(rig.hire(),)) for _ in range(2)]
    for each in workers:
        each.start()
    assert rig.end() == [1, 2, 3, 4]
    for each in workers:
        each.join()
    assert not rig.killed


@everywhere(NATIVE)
def test_a_worker_gets_memory_of_the_caller_and_changes_it() -> None:
    def client(path: str) -> Any:
        large = array("B", bytes(range(256)) * 8192)
        small = array("B", b"small thing")
        # The end of a mapping with nothing behind it.
        ends = [end for _, end in maps("")]
        hole = next(end for end in ends if all(start != end for start, _ in maps("")))
        where = array("Q", [address(large), address(small), hole])
        with opened(path) as fd:
            fcntl.ioctl(fd, command(3, 24), where)
        return small.tobytes().decode(), large[:4].tolist()

    rig = Rig(client)
    player = rig.hire()
    unique, body = player.asked(requests.Ioctl)
    large, small, hole = array("Q", body.data)
    size = 256 * 8192

    player.say(entries.Copy(unique, ((small, 5), (large + 1, 3), (small + 6, 5))))
    assert player.hear(entries.Copied) == entries.Copied(unique, 0, (5, 3, 5), b"small\1\2\3thing")
    player.say(entries.Copy(unique, ((large, size),)))
    copied = player.hear(entries.Copied)
    assert (copied.errno, copied.sizes, copied.data) == (0, (size,), b"")
    assert memfd.read(player.fds[0], size) == bytes(range(256)) * 8192
    os.close(player.fds[0])

    # What is not there: behind the end, at 0, of the kernel.
    player.say(entries.Copy(unique, ((hole - 8, 16), (small, 5))))
    copied = player.hear(entries.Copied)
    assert copied.errno == 0 and copied.sizes in ((8, 0), (0, 0))
    for nowhere in (0, 1 << 63, (1 << 64) - 8):
        player.say(entries.Copy(unique, ((nowhere, 8),)))
        assert player.hear(entries.Copied) == entries.Copied(unique, 0, (0,), b"")
    player.say(entries.Copy(unique, ()))
    assert player.hear(entries.Copied) == entries.Copied(unique, 0, (), b"")

    player.say(entries.Store(unique, ((small, b"great"), (large + 2, b"\7"))))
    assert player.hear(entries.Stored) == entries.Stored(unique, 0)
    player.say(entries.Store(unique, ((small, b"great"), (0, b"\7"))))
    assert player.hear(entries.Stored) == entries.Stored(unique, errno.EFAULT)
    player.answer(unique, 0, body.data)
    assert rig.end() == ["great thing", [0, 1, 7, 3]]


@everywhere(NATIVE)
def test_a_worker_gets_descriptors_of_the_caller_but_none_of_our_own_files() -> None:
    def client(path: str) -> Any:
        reader, writer = os.pipe()
        with opened(path) as fd:
            directory = os.open(os.path.dirname(path), os.O_RDONLY)
            fcntl.ioctl(fd, command(4, 16), array("i", [writer, fd, directory, 9999]))
            os.close(writer)
            return os.read(reader, 100).decode()

    rig = Rig(client)
    player = rig.hire()
    unique, body = player.asked(requests.Ioctl)
    writer, own, directory, nothing = array("i", body.data)
    player.say(entries.Take(unique, (writer, writer)))
    assert player.hear(entries.Given) == entries.Given(unique, 0)
    one, other = player.fds
    os.write(one, b"by both ")
    os.write(other, b"of them")
    os.close(one)
    os.close(other)
    for numbers, number in [
        ((own,), errno.ELOOP),
        ((writer, directory), errno.ELOOP),
        ((writer, nothing), errno.EBADF),
        ((-1,), errno.EBADF),
        ((writer,) * 17, errno.EBADF),
    ]:
        player.say(entries.Take(unique, numbers))
        assert player.hear(entries.Given) == entries.Given(unique, number), numbers
        assert not player.fds
    player.say(entries.AskFacts(unique))
    facts = player.hear(entries.Facts).files
    assert f"Tgid:\t{rig.child.pid}\n".encode() in facts["status"]
    assert b"tests.kdbusfs.places" in facts["cmdline"] and b"python" in facts["exe"]
    player.answer(unique, 0, body.data)
    assert rig.end() == "by both of them"


@everywhere(NATIVE)
def test_a_worker_that_does_not_listen_leaves_no_descriptors_here() -> None:
    def client(path: str) -> Any:
        reader, _ = os.pipe()
        told = []
        for _ in range(2):
            with opened(path) as fd:
                block = array("Q", [reader, os.fstat(reader).st_ino, 0])
                memory = array("B", bytes(100_000))
                block[2] = memory.buffer_info()[0]
                told.append(errno_of(lambda: fcntl.ioctl(fd, command(4, 24), block)))  # noqa: B023
        return told

    rig = Rig(client)
    for wish in ("take", "copy"):
        player = rig.hire()
        unique, body = player.asked(requests.Ioctl)
        number, inode, memory = array("Q", body.data)
        player.line.sock.shutdown(socket.SHUT_RD)
        if wish == "take":
            player.say(entries.Take(unique, (number,)))
        else:
            player.say(entries.Copy(unique, ((memory, 100_000),)))
        while player.number not in rig.killed:
            rig.attend()
        links = [os.readlink(each) for each in glob.glob("/proc/self/fd/*") if os.path.islink(each)]
        assert not [link for link in links if "kbusd-copy" in link or f"pipe:[{inode}]" == link]
    assert rig.end() == ["ECONNRESET", "ECONNRESET"]


@everywhere(NATIVE[:1])
def test_closing_what_a_hostile_worker_has_sent_held_up_everybody() -> None:
    def client(path: str) -> Any:
        told: list[Any] = []
        with opened(path) as good:
            for _ in RECORDS:
                with opened(path) as fd:
                    told.append(errno_of(lambda: fcntl.ioctl(fd, PLAIN)))
                told.append(fcntl.ioctl(good, PLAIN))
        return told

    rig = Rig(client)
    good = rig.hire()
    others = []
    for record in RECORDS:
        bad = rig.hire()
        bad.asked(requests.Ioctl)
        slow, other = lingering()
        others.append(other)
        ears = rig.mount.files[bad.number].fd
        handler = rig.devices.handlers[ears]
        rig.devices.turn(ears, handler, on=False)  # or we would be the last to close it
        socket.send_fds(bad.line.sock, [record], [slow.fileno()] * 3)
        os.close(slow.detach())
        rig.devices.turn(ears, handler, on=True)
        if record:  # else it is taken for the end
            while bad.number not in rig.killed:
                rig.attend()
        good.serve_ioctl(5)
    assert sum(rig.devices.aside.stuck.values()) == len(RECORDS)
    for other in others:
        other.close()
    assert rig.end() == ["ECONNRESET", 5] * len(RECORDS)


RECORDS = [b"\xc1", b"", msgspec.msgpack.encode(entries.Nudge())]


@everywhere(NATIVE)
def test_who_leaves_behind_what_cannot_be_closed_gets_no_more_files_till_it_is() -> None:
    def client(path: str) -> Any:
        told = []
        for _ in range(3):
            try:
                with opened(path) as fd:
                    told.append(errno_of(lambda: fcntl.ioctl(fd, PLAIN)))
            except OSError as error:
                told.append(errno.errorcode[error.errno or 0])
        return told

    rig = Rig(client)
    aside, uid = rig.devices.aside, os.geteuid()
    bad = rig.hire()
    bad.asked(requests.Ioctl)
    for _ in range(MAX_STUCK_PER_UID):
        aside.enter(uid)
    bad.die()
    rig.attend()
    assert aside.owes(uid)
    for _ in range(MAX_STUCK_PER_UID):
        aside.leave(uid)
    deadline = time.monotonic() + SECONDS
    while aside.owes(uid):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    good = rig.hire()
    good.serve_ioctl()
    assert rig.end() == ["ECONNRESET", "EMFILE", ""]
    assert "can't be closed" in rig.warnings[0]


@everywhere(NATIVE)
def test_who_asked_for_something_while_all_threads_were_stuck_was_ended() -> None:
    def client(path: str) -> Any:
        memory = array("B", b"memory")
        with opened(path) as fd:
            fcntl.ioctl(fd, command(4, 8), array("Q", [address(memory)]))
        return True

    rig = Rig(client)
    player = rig.hire()
    player.say(entries.Pool(), memfd.make("pool", PAGE))
    unique, body = player.asked(requests.Ioctl)
    deadline = time.monotonic() + SECONDS
    while rig.mount.files[player.number].pool < 0 or rig.devices.aside.stuck:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    for uid in range(10_000, 10_040):
        with suppress(Crowded):
            while True:
                rig.devices.aside.enter(uid)
    (at,) = array("Q", body.data)
    player.say(entries.Copy(unique, ((at, 6),)))
    assert player.hear(entries.Copied) == entries.Copied(unique, errno.EAGAIN, (), b"")
    player.say(entries.Store(unique, ((at, b"M"),)))
    assert player.hear(entries.Stored) == entries.Stored(unique, errno.ENOMEM)
    player.say(entries.Take(unique, (0,)))
    assert player.hear(entries.Given) == entries.Given(unique, errno.EAGAIN)
    player.say(entries.AskFacts(unique))
    assert player.hear(entries.Facts) == entries.Facts(unique, {})
    player.answer(unique, 0, body.data, pushed=((0, PAGE),))
    assert rig.end() is True
    assert rig.killed == []


@everywhere(NATIVE)
def test_what_the_supervisor_said_to_a_full_line_waited_for_somebody_to_ask_something() -> None:
    def client(path: str) -> Any:
        with opened(path) as fd:
            return errno_of(lambda: fcntl.ioctl(fd, PLAIN))

    rig = Rig(client)
    player = rig.hire()
    unique, _ = player.asked(requests.Ioctl)
    holder = rig.mount.files[player.number]
    count = 0
    while not holder.line.queue:
        holder.say(entries.Made(unique, count))
        count += 1
    for number in range(count):
        assert player.hear(entries.Made) == entries.Made(unique, number)
    player.answer(unique)
    assert rig.end() == ""


@everywhere(NATIVE)
def test_a_worker_that_orders_without_end_kept_the_supervisor_from_all_else() -> None:
    def client(path: str) -> Any:
        block = array("B", bytes(96))
        with opened(path) as fd:
            return errno_of(lambda: fcntl.ioctl(fd, 0xC0609580, block))

    rig = Rig(client)
    player = rig.hire()
    unique, body = player.asked(requests.Ioctl)
    for _ in range(50):
        player.say(entries.AskFacts(unique))
    for number in range(50):
        while len(rig.entered) == number:
            rig.attend()
        assert len(rig.entered) == number + 1
    for _ in range(50):
        assert player.hear(entries.Facts).who is not None
    player.answer(unique, 0, body.data)
    assert rig.end() == ""


@everywhere(NATIVE)
def test_the_pool_is_what_the_client_maps_and_reads() -> None:
    def client(path: str) -> Any:
        told = []
        with opened(path) as fd:
            fcntl.ioctl(fd, PLAIN)
            with mmap.mmap(fd, 4 * PAGE, mmap.MAP_SHARED, mmap.PROT_READ) as pool:
                told.append(pool[PAGE - 3 : PAGE + 3].decode())
                fcntl.ioctl(fd, PLAIN)  # not pushed, so not seen
                told.append(pool[PAGE - 3 : PAGE + 3].decode())
                fcntl.ioctl(fd, PLAIN)
                told.append(pool[PAGE - 3 : PAGE + 3].decode())
                told.append(any(pool[2 * PAGE :]))
            fcntl.ioctl(fd, PLAIN)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            told.append(os.pread(fd, 6, PAGE - 3).decode())
        return told

    rig = Rig(client)
    player = rig.hire()
    pool = memfd.make("pool", 2 * PAGE)
    os.pwrite(pool, b"abcdef", PAGE - 3)
    player.say(entries.Pool(), pool)
    player.serve_ioctl()
    for text, pushed in [(b"ABCDEF", False), (b"ghijkl", True), (b"GHIJKL", False)]:
        unique, _ = player.asked(requests.Ioctl)
        os.pwrite(pool, text, PAGE - 3)
        # To the end and no further.
        player.answer(unique, pushed=((PAGE - 3, 6), (0, 4 * PAGE)) if pushed else ())
    assert player.ends()
    assert rig.end() == ["abcdef", "abcdef", "ghijkl", False, "GHIJKL"]


@everywhere(NATIVE)
def test_pushing_what_is_being_read_never_gets_stuck() -> None:
    """A store waits for the page, and the page for a read that only this process answers."""

    def client(path: str) -> Any:
        with opened(path) as fd:
            fcntl.ioctl(fd, PLAIN)
            stop = threading.Event()

            def read() -> None:
                while not stop.is_set():
                    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                    os.pread(fd, 8 * PAGE, 0)

            readers = [threading.Thread(target=read) for _ in range(3)]
            for each in readers:
                each.start()
            fcntl.ioctl(fd, PLAIN)
            stop.set()
            for each in readers:
                each.join()
            return True

    rig = Rig(client)
    player = rig.hire()
    player.say(entries.Pool(), memfd.make("pool", 8 * PAGE))
    player.serve_ioctl()
    unique, _ = player.asked(requests.Ioctl)
    player.answer(unique, pushed=tuple((turn % 8 * PAGE, PAGE) for turn in range(1500)))
    assert rig.end() is True


@everywhere(NATIVE)
def test_a_message_out_of_the_clients_own_pool() -> None:
    """Copying it reads a page of a file of ours, while we copy; and of many at once."""

    def client(path: str) -> Any:
        def send(fd: int) -> None:
            at = next(start for start, _ in maps(BUS))
            for _ in range(20):
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                fcntl.ioctl(fd, command(5, 8), array("Q", [at]))

        with opened(path) as fd:
            fcntl.ioctl(fd, PLAIN)
            with mmap.mmap(fd, PAGE, mmap.MAP_SHARED, mmap.PROT_READ):
                threads = [threading.Thread(target=send, args=(fd,)) for _ in range(4)]
                for each in threads:
                    each.start()
                for each in threads:
                    each.join()
            return True

    rig = Rig(client)
    player = rig.hire()
    pool = memfd.make("pool", PAGE)
    os.pwrite(pool, b"pool", 0)
    player.say(entries.Pool(), pool)
    player.serve_ioctl()
    asked = {}
    copied = 0
    while copied < 80:
        match player.receive()[0]:
            case entries.Asked(raw, _):
                request = requests.decode(raw)
                assert isinstance(request.body, requests.Ioctl)
                unique, data = request.header.unique, request.body.data
                asked[unique] = data
                player.say(entries.Copy(unique, ((array("Q", data)[0], 4),)))
            case entries.Copied(unique, _, _, data):
                assert data == b"pool"
                player.answer(unique, 0, asked.pop(unique))
                copied += 1
    assert rig.end() is True


@everywhere(NATIVE)
def test_who_polls_is_woken() -> None:
    def client(path: str) -> Any:
        with opened(path) as fd:
            poll = select.poll()
            poll.register(fd, select.POLLIN)
            first = [events for _, events in poll.poll(0)]
            return first, [events for _, events in poll.poll(10_000)]

    rig = Rig(client)
    player = rig.hire()
    player.say(entries.Nudge())  # nobody polls: nothing happens
    for _ in range(2):  # the first poll, which does not wait, and the second
        unique, _ = player.asked(requests.Poll)
        player.say(entries.Answered(replies.poll(unique, 0)))
    player.say(entries.Nudge())
    unique, _ = player.asked(requests.Poll)
    player.say(entries.Answered(replies.poll(unique, select.POLLIN)))
    assert rig.end() == [[], [select.POLLIN]]


@everywhere(NATIVE)
def test_memory_that_a_worker_has_guessed_comes_along() -> None:
    def client(path: str) -> Any:
        near = array("B", b"what is near")
        ends = [end for _, end in maps("")]
        hole = next(end for end in ends if all(start != end for start, _ in maps("")))
        told = array("Q", [address(near), hole])
        with opened(path) as fd:
            fcntl.ioctl(fd, command(5, 16), told)
            for _ in range(2):
                fcntl.ioctl(fd, command(6, 16), told)
            fcntl.ioctl(fd, PLAIN)
        return True

    rig = Rig(client)
    player = rig.hire()
    unique, body = player.asked(requests.Ioctl)
    near, hole = array("Q", body.data)
    number = command(6, 16)
    player.say(entries.Ahead(number, 16, ((near, 4), (near + 5, 7))))
    player.answer(unique, 0, body.data)

    asked = player.hear(entries.Asked)
    request = requests.decode(asked.request)
    assert isinstance(request.body, requests.Ioctl)
    argument = request.body.argument
    assert asked.ahead == ((argument, body.data), (near, b"what"), (near + 5, b"is near"))
    # What is not there does not come, nor what is behind it; the next guess is instead of the last.
    player.say(entries.Ahead(number, 0, ((near, 4), (hole, 8), (near, 4))))
    player.answer(request.header.unique, 0, body.data)
    asked = player.hear(entries.Asked)
    assert asked.ahead == ((near, b"what"),)
    player.answer(requests.decode(asked.request).header.unique, 0, body.data)

    asked = player.hear(entries.Asked)  # another command
    assert asked.ahead == ()
    player.answer(requests.decode(asked.request).header.unique)
    assert rig.end() is True


@everywhere(NATIVE)
def test_what_a_worker_had_answered_counts_though_it_ended_before_it_was_heard() -> None:
    """Two threads say BYEBYE; while what one has written is copied, the other's is carried out. Both were told ECONNRESET."""

    def client(path: str) -> Any:
        said = []
        with opened(path) as fd:
            threads = [
                threading.Thread(
                    target=lambda: said.append(errno_of(lambda: fcntl.ioctl(fd, PLAIN)))
                )
                for _ in range(2)
            ]
            for each in threads:
                each.start()
            for each in threads:
                each.join()
        return sorted(said)

    ended, attend = threading.Event(), reach.attend

    def late(*order: Any) -> None:
        assert ended.wait(SECONDS)
        attend(*order)

    reach.attend = late
    rig = Rig(client)
    player = rig.hire()
    (one, _), (other, _) = player.asked(requests.Ioctl), player.asked(requests.Ioctl)
    player.say(entries.Copy(other, ((PAGE, 8),)))
    player.answer(one)
    player.die()
    ended.set()
    assert rig.end() == ["", "ECONNRESET"]
    assert rig.killed == []


@everywhere(NATIVE)
def test_guessed_memory_may_be_the_clients_own_pool() -> None:
    """To look there, we must answer a read of our own file meanwhile."""

    def client(path: str) -> Any:
        with opened(path) as fd, mmap.mmap(fd, PAGE, mmap.MAP_SHARED, mmap.PROT_READ):
            fcntl.ioctl(fd, command(5, 8), array("Q", [maps(BUS)[0][0]]))
            for _ in range(20):
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                fcntl.ioctl(fd, PLAIN)
        return True

    rig = Rig(client)
    player = rig.hire()
    pool = memfd.make("pool", PAGE)
    os.pwrite(pool, b"pool", 0)
    player.say(entries.Pool(), pool)
    unique, body = player.asked(requests.Ioctl)
    at = array("Q", body.data)[0]
    player.say(entries.Ahead(PLAIN, 0, ((at, 4),)))
    player.answer(unique, 0, body.data)
    for _ in range(20):
        asked = player.hear(entries.Asked)
        assert asked.ahead == ((at, b"pool"),)
        player.answer(requests.decode(asked.request).header.unique)
    assert rig.end() is True


class Unanswered:
    """A page of memory that is not there until `answer`, for whoever touches it (userfaultfd(2))."""

    _API = struct.Struct("=3Q")
    _REGISTER = struct.Struct("=4Q")

    def __init__(self) -> None:
        self.page = mmap.mmap(-1, PAGE)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.page))
        self.fd = ctypes.CDLL(None).syscall(323, os.O_CLOEXEC | os.O_NONBLOCK)
        assert self.fd >= 0
        fcntl.ioctl(self.fd, 0xC018AA3F, self._API.pack(0xAA, 0, 0))
        fcntl.ioctl(self.fd, 0xC020AA00, self._REGISTER.pack(self.address, PAGE, 1, 0))

    def wanted(self) -> bool:
        """Whether somebody waits for it."""
        return bool(select.select([self.fd], [], [], 0)[0])

    def answer(self) -> None:
        """It is there, and full of zeros."""
        fcntl.ioctl(self.fd, 0xC020AA04, self._REGISTER.pack(self.address, PAGE, 0, 0))


@everywhere(NATIVE[:1])
def test_while_guessed_memory_does_not_come_others_are_served_and_a_signal_ends_it() -> None:
    def client(path: str) -> Any:
        signal.signal(signal.SIGALRM, lambda *_: None)
        memory = Unanswered()
        with opened(path) as fd, opened(path) as other:
            fcntl.ioctl(fd, command(5, 8), array("Q", [memory.address]))
            told = []

            def meanwhile() -> None:
                told.append(fcntl.ioctl(other, PLAIN))  # once the first is stuck
                signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)

            thread = threading.Thread(target=meanwhile)
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
            thread.start()
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
            told.append(errno_of(lambda: fcntl.ioctl(fd, PLAIN)))
            signal.setitimer(signal.ITIMER_REAL, 0)
            thread.join()
            memory.answer()
            told.append(fcntl.ioctl(fd, PLAIN))
            return told

    rig = Rig(client)
    one, two = rig.hire(), rig.hire()
    unique, body = one.asked(requests.Ioctl)
    at = array("Q", body.data)[0]
    one.say(entries.Ahead(PLAIN, 0, ((at, 4),)))
    one.answer(unique, 0, body.data)
    others, _ = two.asked(requests.Ioctl)
    deadline = time.monotonic() + SECONDS
    while not rig.mount.copying:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    two.answer(others, 7)
    asked = one.hear(entries.Asked)  # what the client asks next: of the other it hears nothing
    assert asked.ahead == ((at, bytes(4)),)
    one.answer(requests.decode(asked.request).header.unique, 5)
    assert rig.end() == [7, "EINTR", 5]


def interrupted_in(ioctl: Callable[[], Any], other: int) -> Any:
    """What it returns if it gets a signal once somebody answers an ioctl of `other`."""
    signal.signal(signal.SIGUSR1, lambda *_: None)
    here = threading.get_ident()

    def interrupt() -> None:
        fcntl.ioctl(other, PLAIN)
        signal.pthread_kill(here, signal.SIGUSR1)

    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        return ioctl()
    finally:
        thread.join()


@everywhere(NATIVE[:1])
def test_what_was_carried_out_was_told_as_not_done_if_a_signal_came_while_it_was_stored() -> None:
    """And what was stored afterwards could have been stored into another process."""

    def client(path: str) -> Any:
        memory = Unanswered()
        with opened(path) as fd, opened(path) as other, opened(path) as third:
            fcntl.ioctl(fd, command(5, 8), array("Q", [memory.address]))

            def come() -> None:
                fcntl.ioctl(third, PLAIN)
                memory.answer()

            thread = threading.Thread(target=come)
            thread.start()
            told = interrupted_in(lambda: fcntl.ioctl(fd, PLAIN), other)
            thread.join()
            return [told, memory.page[:7].decode()]

    rig = Rig(client)
    one, two, three = rig.hire(), rig.hire(), rig.hire()
    unique, body = one.asked(requests.Ioctl)
    at = array("Q", body.data)[0]
    one.answer(unique, 0, body.data)
    unique, _ = one.asked(requests.Ioctl)
    one.say(entries.Store(unique, ((at, b"message"),)))
    deadline = time.monotonic() + SECONDS
    while not rig.devices.aside.stuck:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    two.serve_ioctl()
    _, interrupt = one.asked(requests.Interrupt)
    assert interrupt.unique == unique
    three.serve_ioctl()
    assert one.hear(entries.Stored) == entries.Stored(unique, 0)
    one.answer(unique, 5)
    assert rig.end() == [5, "message"]


@everywhere(NATIVE[:1])
def test_who_meddled_with_what_it_was_not_asked_yet_left_its_client_without_an_answer() -> None:
    """For good, not even to be killed: its request was given up, as if it had been interrupted."""

    def client(path: str) -> Any:
        told = []
        for _ in range(3):
            memory = Unanswered()
            with opened(path) as fd:
                fcntl.ioctl(fd, command(5, 8), array("Q", [memory.address]))
                told.append(errno_of(lambda: fcntl.ioctl(fd, PLAIN)))
                memory.answer()
        return told

    rig = Rig(client)
    for meddle in (
        lambda unique: entries.Copy(unique, ()),
        lambda unique: entries.Store(unique, ()),
        entries.AskFacts,
    ):
        one = rig.hire()
        unique, body = one.asked(requests.Ioctl)
        at = array("Q", body.data)[0]
        one.say(entries.Ahead(PLAIN, 0, ((at, 4),)))
        one.answer(unique, 0, body.data)
        deadline = time.monotonic() + SECONDS
        while not rig.mount.copying:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        one.say(meddle(next(iter(rig.mount.copying))))
        while one.number not in rig.killed:
            rig.attend()
        while rig.mount.copying:  # its memory came
            assert time.monotonic() < deadline
            time.sleep(0.001)
    assert rig.end() == ["ECONNRESET"] * 3
    assert rig.mount.held == {}


@everywhere(NATIVE[:1])
def test_a_worker_whose_client_got_a_signal_while_it_was_looked_up_was_accused_and_ended() -> None:
    def client(path: str) -> Any:
        with opened(path) as fd, opened(path) as other:
            told = errno_of(lambda: interrupted_in(lambda: fcntl.ioctl(fd, PLAIN), other))
            fcntl.ioctl(other, PLAIN)
            return [told, fcntl.ioctl(fd, PLAIN)]

    rig = Rig(client)
    one, two = rig.hire(), rig.hire()
    unique, _ = one.asked(requests.Ioctl)

    def facts(_: int) -> dict[str, bytes]:
        two.serve_ioctl()
        deadline = time.monotonic() + SECONDS
        while rig.mount.copying and time.monotonic() < deadline:  # till the signal comes
            time.sleep(0.001)
        return {"comm": b"by now another's"}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(caller, "facts", facts)
        one.say(entries.AskFacts(unique))
        assert one.hear(entries.Stored) == entries.Stored(unique, errno.EINTR)
    one.say(entries.AskFacts(unique))
    assert one.hear(entries.Stored) == entries.Stored(unique, errno.EINTR)
    one.answer(unique, -errno.EINTR)
    two.serve_ioctl()
    one.serve_ioctl(5)
    assert rig.end() == ["EINTR", 5]
    assert rig.killed == [] and rig.mount.held == {}


@everywhere(NATIVE)
def test_who_polls_what_can_be_read_is_answered_without_the_worker() -> None:
    def client(path: str) -> Any:
        def events(fd: int) -> list[int]:
            poll = select.poll()
            poll.register(fd, select.POLLIN | select.POLLOUT)
            return [events for _, events in poll.poll(0)]

        with opened(path) as fd:
            told: list[Any] = []
            for _ in range(3):
                told.append(errno_of(lambda: fcntl.ioctl(fd, PLAIN)))
                told.append(events(fd))
            return told

    rig = Rig(client)
    player = rig.hire()
    pool = memfd.make("pool", 2 * PAGE)
    player.say(entries.Pool(PAGE), os.dup(pool))
    both = select.POLLIN | select.POLLOUT
    for events in (both, select.POLLOUT):
        unique, _ = player.asked(requests.Ioctl)
        os.pwrite(pool, events.to_bytes(4, "little"), PAGE)
        player.answer(unique)
    unique, _ = player.asked(requests.Poll)
    player.say(entries.Answered(replies.poll(unique, select.POLLIN)))
    unique, _ = player.asked(requests.Ioctl)
    os.pwrite(pool, both.to_bytes(4, "little"), PAGE)
    player.die()
    both, dead = select.POLLIN | select.POLLOUT, select.POLLERR
    assert rig.end() == ["", [both], "", [select.POLLIN], "ECONNRESET", [dead]]


@everywhere(NATIVE)
def test_what_a_worker_has_promised_is_answered_without_it_and_nonsense_is_its_clients() -> None:
    def client(path: str) -> Any:
        told: list[Any] = []
        asks = Buffer(b"eight by")
        with opened(path) as fd, opened(path) as other:
            fcntl.ioctl(fd, PLAIN)
            with mmap.mmap(fd, PAGE, mmap.MAP_SHARED, mmap.PROT_READ) as pool:
                told.append(pool[:4].decode())
                fcntl.ioctl(fd, PLAIN)
                told.append(ioctl(fd, WRITES, asks.address))
                told.append(pool[:4].decode())
            for _ in NONSENSE:
                fcntl.ioctl(fd, PLAIN)
                told.append(errno_of(lambda: ioctl(fd, WRITES, asks.address)))
            told.append(fcntl.ioctl(other, PLAIN))
        return told

    rig = Rig(client)
    player, other = rig.hire(), rig.hire()
    pool = memfd.make("pool", PAGE)
    os.pwrite(pool, b"old.", 0)
    player.say(entries.Pool(), os.dup(pool))
    player.serve_ioctl()
    unique, _ = player.asked(requests.Ioctl)
    os.pwrite(pool, b"new!", 0)
    answer = abi.IOCTL_OUT.pack(5, 0, 0, 0)
    player.promises.offer(((WRITES, b"eight by", answer, 0, 4),))
    player.answer(unique)
    for reply, offset, size in NONSENSE:
        unique, _ = player.asked(requests.Ioctl)
        kept = player.promises.recall()
        assert kept == 1
        player.promises.offer(((WRITES, b"eight by", reply, offset, size),))
        player.answer(unique)
    other.serve_ioctl(7)
    told = rig.end()
    assert told[:3] == ["old.", 5, "new!"] and told[-1] == 7, told
    assert set(told[3:-1]) <= {"", "EIO", "EINVAL", "ENOMEM"}
    assert (rig.killed, rig.warnings) == ([], [])


WRITES = 1 << 30 | 8 << 16 | 0x95 << 8 | 2  # _IOW
NONSENSE = [
    (bytes(96), 0, 0),
    (b"\xff" * 96, 0, 0),
    (b"", 0, 0),
    (abi.IOCTL_OUT.pack(0, 1, 9, 9), 0, 0),  # begin again, with other memory
    (abi.IOCTL_OUT.pack(0, 0, 0, 0), 1 << 33, 16 << 30),
    (abi.IOCTL_OUT.pack(0, 0, 0, 0), 0, 16 << 30),
]


@everywhere(NATIVE)
def test_an_interrupted_ioctl_ends_when_its_worker_says_so() -> None:
    def client(path: str) -> Any:
        signal.signal(signal.SIGALRM, lambda *_: None)
        with opened(path) as fd:
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            return errno_of(lambda: fcntl.ioctl(fd, PLAIN))

    rig = Rig(client)
    player = rig.hire()
    unique, _ = player.asked(requests.Ioctl)
    _, interrupt = player.asked(requests.Interrupt)
    assert interrupt.unique == unique
    player.answer(unique, -abi.ERESTARTSYS)
    assert rig.end() == "EINTR"


@everywhere(NATIVE)
def test_a_client_that_is_killed_in_an_ioctl_ends_when_its_worker_says_so() -> None:
    def client(path: str) -> Any:
        with opened(path) as fd:
            fcntl.ioctl(fd, PLAIN)

    rig = Rig(client)
    player = rig.hire()
    player.asked(requests.Ioctl)
    rig.child.signal(signal.SIGKILL)
    _, interrupt = player.asked(requests.Interrupt)
    player.answer(interrupt.unique, -abi.ERESTARTSYS)
    assert rig.child.wait() == -signal.SIGKILL
    assert player.ends()
    rig.tidy()


@everywhere(NATIVE)
def test_an_open_that_waits_for_a_worker_can_be_interrupted() -> None:
    def client(path: str) -> Any:
        def interrupted(*_: Any) -> None:
            raise InterruptedError(errno.EINTR, "by a signal")

        signal.signal(signal.SIGALRM, interrupted)
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        first = errno_of(lambda: os.open(path, os.O_RDWR))
        with opened(path) as fd:
            fcntl.ioctl(fd, PLAIN)
        return first

    rig = Rig(client)
    rig.attend()
    rig.attend()  # the second open comes when the first has ended
    one, two = rig.hire(), rig.hire()
    assert one.ends()
    two.serve_ioctl()
    assert rig.end() == "EINTR"


@everywhere(NATIVE)
def test_a_uid_with_too_many_files_gets_no_more() -> None:
    def client(path: str) -> Any:
        with opened(path), opened(path):
            return errno_of(lambda: os.open(path, os.O_RDWR))

    rig = Rig(client, limit=3)  # one is the tree's
    rig.hire()
    rig.hire()
    rig.attend()
    assert rig.end() == "EMFILE"
    assert "has 3 connections" in rig.warnings[0]


@everywhere(NATIVE)
def test_the_death_of_a_worker_is_its_clients_alone() -> None:
    def client(path: str) -> Any:
        with opened(path) as fd, opened(path) as other:
            poll = select.poll()
            poll.register(fd, select.POLLIN)
            return [
                errno_of(lambda: fcntl.ioctl(fd, PLAIN)),
                errno_of(lambda: fcntl.ioctl(fd, PLAIN)),
                [events for _, events in poll.poll(0)],
                os.pread(fd, 4, 0).decode(),
                fcntl.ioctl(other, PLAIN),
            ]

    rig = Rig(client)
    one, two = rig.hire(), rig.hire()
    pool = memfd.make("pool", PAGE)
    os.pwrite(pool, b"left", 0)
    one.say(entries.Pool(), pool)
    one.asked(requests.Ioctl)
    one.die()
    two.serve_ioctl(7)
    assert rig.end() == ["ECONNRESET", "ECONNRESET", [select.POLLERR], "left", 7]


@everywhere(NATIVE)
def test_who_polls_a_dead_workers_file_is_woken() -> None:
    def client(path: str) -> Any:
        with opened(path) as fd:
            poll = select.poll()
            poll.register(fd, select.POLLIN)
            return [events for _, events in poll.poll(10_000)]

    rig = Rig(client)
    player = rig.hire()
    for _ in range(2):
        unique, body = player.asked(requests.Poll)
        player.say(entries.Answered(replies.poll(unique, 0)))
        if body.notify:
            break
    player.die()
    assert rig.end() == [select.POLLERR]


@everywhere(NATIVE)
def test_a_worker_that_breaks_a_rule_is_ended_and_nobody_else_notices() -> None:
    def client(path: str) -> Any:
        told: list[str] = []
        late: list[
            int
        ] = []  # what comes back at last may do so before the last of them has its error
        with opened(path) as other:
            thread = threading.Thread(target=lambda: late.append(fcntl.ioctl(other, PLAIN)))
            thread.start()
            for _ in range(len(MISCHIEF)):
                with opened(path) as fd:
                    told.append(errno_of(lambda: fcntl.ioctl(fd, PLAIN)))
            thread.join()
        return [told, late]

    rig = Rig(client)
    good = rig.hire()
    others, _ = good.asked(requests.Ioctl)
    for does in MISCHIEF:
        bad = rig.hire()
        mine, _ = bad.asked(requests.Ioctl)
        does(bad, mine, others)
        while bad.number not in rig.killed:
            rig.attend()
    good.answer(others, 3)
    assert rig.end() == [["ECONNRESET"] * len(MISCHIEF), [3]]
    assert len(rig.killed) == len(MISCHIEF)


def _say(make: Any) -> Any:
    return lambda bad, mine, others: bad.say(make(mine, others))


def _with_descriptor(make: Any) -> Any:
    def do(bad: Any, mine: int, others: int) -> None:
        fd = os.open("/dev/null", os.O_RDONLY)
        bad.say(make(mine, others), fd)
        os.close(fd)

    return do


MISCHIEF = [
    _say(lambda mine, others: entries.Answered(replies.ioctl(others, 0))),
    _say(lambda mine, others: entries.Answered(replies.wake(1))),
    _say(lambda mine, others: entries.Answered(replies.store(2, 0, b"x"))),
    _say(lambda mine, others: entries.Answered(b"short")),
    _say(lambda mine, others: entries.Answered(replies.ioctl(mine, 0)[:-1])),
    _say(lambda mine, others: entries.Answered(abi.OUT_HEADER.pack(16, -9999, mine))),
    _say(lambda mine, others: entries.Answered(abi.OUT_HEADER.pack(16, 1, mine))),
    _say(lambda mine, others: entries.Copy(others, ((4096, 1),))),
    _say(lambda mine, others: entries.Copy(mine, ((-1, 1),))),
    _say(lambda mine, others: entries.Copy(mine, ((0, -1),))),
    _say(lambda mine, others: entries.Copy(mine, ((0, 1 << 40),))),
    _say(lambda mine, others: entries.Copy(mine, ((0, 1),) * 1025)),
    _say(lambda mine, others: entries.Store(others, ((4096, b"x"),))),
    _say(lambda mine, others: entries.Take(others, (0,))),
    _say(lambda mine, others: entries.AskFacts(others)),
    _say(lambda mine, others: entries.Opened(mine, "0-test", "bus", 0)),
    _say(lambda mine, others: entries.Answered(replies.ioctl(mine, 0), ((0, 1),))),
    _say(lambda mine, others: entries.Ahead(1, -1, ())),
    _say(lambda mine, others: entries.Ahead(1, 8 << 10, ((0, 1),))),
    _say(lambda mine, others: entries.Ahead(1, 0, ((0, 1),) * 9)),
    _with_descriptor(lambda mine, others: entries.Ahead(1, 8, ())),
    _with_descriptor(lambda mine, others: entries.Pool()),
    _with_descriptor(lambda mine, others: entries.Nudge()),
    lambda bad, mine, others: bad.line.sock.send(b"\xc1"),
]


@everywhere(NATIVE)
def test_a_tree_that_dies_is_followed_by_another() -> None:
    def client(path: str) -> Any:
        with opened(path) as fd:
            fcntl.ioctl(fd, PLAIN)
            with opened(path) as other:
                return fcntl.ioctl(other, PLAIN) + fcntl.ioctl(fd, PLAIN)

    rig = Rig(client)
    one = rig.hire()
    unique, _ = one.asked(requests.Ioctl)
    rig.kill_tree()
    tree = rig.hire(silent=True)
    one.answer(unique)
    tree.is_asked()
    tree.die()
    rig.hire()  # the tree again, which is asked again
    two = rig.hire()
    two.serve_ioctl(5)
    one.serve_ioctl(6)
    assert rig.end() == 11


class Slow:
    """An epoll whose `register` returns only after what is there to hear has been heard."""

    def __init__(self, devices: Devices) -> None:
        self.devices, self.real = devices, devices.epoll

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def register(self, fd: int, events: int) -> None:
        self.real.register(fd, events)
        deadline = time.monotonic() + SECONDS
        while fd in self.devices.handlers:
            assert time.monotonic() < deadline, "nobody hears that the tree is gone"
            time.sleep(0.001)


@everywhere(NATIVE)
def test_a_tree_that_was_dead_when_it_was_chosen_is_followed_by_another() -> None:
    def client(path: str) -> Any:
        with opened(path) as fd:
            fcntl.ioctl(fd, PLAIN)
            return os.stat(path).st_mode

    rig = Rig(client)
    player = rig.hire()
    unique, _ = player.asked(requests.Ioctl)
    rig.kill_tree()
    epoll = rig.devices.epoll
    rig.devices.epoll = Slow(rig.devices)  # type: ignore[assignment]
    rig.hire_dead()
    rig.devices.epoll = epoll
    player.answer(unique)
    rig.hire()
    assert rig.end() == 0o100666


@everywhere(NATIVE)
def test_what_trees_die_of_is_not_asked_for_ever() -> None:
    def client(path: str) -> Any:
        with opened(path) as fd:
            fcntl.ioctl(fd, PLAIN)
        first = errno_of(lambda: os.stat(path))
        return first, os.stat(path).st_mode

    rig = Rig(client)
    player = rig.hire()
    unique, _ = player.asked(requests.Ioctl)
    rig.kill_tree()
    for turn in range(MAX_TREES):
        tree = rig.hire(silent=True)
        if turn == 0:
            player.answer(unique)
        tree.is_asked()
        tree.die()
    rig.hire()
    assert rig.end() == ["ECONNRESET", 0o100666]


@everywhere(NATIVE)
def test_requests_for_a_worker_that_does_not_listen_wait() -> None:
    """More than its line holds; it gets all of them."""

    def client(path: str) -> Any:
        size = 1024
        with opened(path) as fd:

            def ask() -> None:
                fcntl.ioctl(fd, command(6, size), array("B", bytes(size)))

            threads = [threading.Thread(target=ask) for _ in range(150)]
            for each in threads:
                each.start()
            for each in threads:
                each.join()
        return True

    rig = Rig(client)
    player = rig.hire()
    holder = rig.mount.files[player.number]
    deadline = time.monotonic() + 10
    while not holder.line.queue:
        assert time.monotonic() < deadline, "the line holds everything"
        time.sleep(0.01)
    for _ in range(150):
        unique, body = player.asked(requests.Ioctl)
        player.answer(unique, 0, body.data)
    assert rig.end() is True


@everywhere(NATIVE)
def test_a_tree_that_was_taken_over_gave_two_clients_the_same_pages() -> None:
    """Then one's worker could write what the other reads."""

    def client(path: str) -> Any:
        told: list[Any] = []
        with opened(path) as fd:
            fcntl.ioctl(fd, PLAIN)
            told.append(os.pread(fd, 4, 0).decode())
            told.append(errno_of(lambda: os.open(path, os.O_RDWR)))
            told.append(os.pread(fd, 4, 0).decode())
        with opened(path) as fd:
            fcntl.ioctl(fd, PLAIN)
            told.append(os.pread(fd, 4, 0).decode())
        return told

    rig = Rig(client)
    rig.kill_tree()
    liar = rig.hire(silent=True)
    threading.Thread(target=lie_of_nodes, args=(liar,), daemon=True).start()
    one = rig.hire()
    pool = memfd.make("pool", PAGE)
    os.pwrite(pool, b"mine", 0)
    one.say(entries.Pool(), pool)
    one.serve_ioctl()
    for _ in range(2):  # after ESTALE the kernel looks once more
        assert rig.hire().ends()
    three = rig.hire()
    pool = memfd.make("pool", PAGE)
    os.pwrite(pool, b"next", 0)
    three.say(entries.Pool(), pool)
    three.serve_ioctl()
    assert rig.end() == ["mine", "ESTALE", "mine", "next"]


def lie_of_nodes(liar: Player) -> None:
    """Every file is the same, number 2."""
    file = replies.Attributes(2, 0o100666, 0, 0, size=PAGE)
    folder = replies.Attributes(1, 0o40755, 0, 0)
    while True:
        try:
            message = liar.receive()[0]
        except EOFError:
            return
        if isinstance(message, entries.Open):
            continue
        request = requests.decode(message.request)
        unique = request.header.unique
        match request.body:
            case requests.Init():
                body = request.body
                reply = replies.init(unique, body.flags, body.max_readahead, 4096)
            case requests.Lookup(name):
                directory = name == b"0-test"
                at = msgspec.structs.replace(folder, node=3) if directory else file
                reply = replies.entry(unique, at, 0)
            case requests.GetAttr():
                reply = replies.attributes(unique, file if request.header.node == 2 else folder)
            case requests.Open():
                liar.say(entries.Opened(unique, "0-test", "bus", request.body.flags))
                continue
            case requests.Forget():
                continue
            case _:
                reply = replies.failure(unique, errno.ENOSYS)
        liar.say(entries.Answered(reply))


@everywhere(NATIVE)
def test_a_tree_that_was_taken_over_held_up_everybody_by_saying_nothing() -> None:
    def client(path: str) -> Any:
        with opened(path) as fd:
            return fcntl.ioctl(fd, PLAIN)

    kdbusfs.PATIENCE = 0.0
    rig = Rig(client)
    rig.kill_tree()
    tree = rig.hire(silent=True)
    tree.is_asked()
    while tree.number not in rig.killed:
        rig.attend()
    kdbusfs.PATIENCE = SECONDS
    rig.hire()
    rig.hire().serve_ioctl(3)
    assert rig.end() == 3
