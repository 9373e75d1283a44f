"""Large bodies: whole and in order by whichever way they go, and no memory is left behind.

Which way that is depends on the length and on what the two workers have sent each other before:
the ring, the bulk area of a pair and its pipe, or a sealed memfd.
"""

from __future__ import annotations

import os
import random
import select
import signal
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from . import procs
from . import wireformat as w
from .daemon import Bus
from .rawclient import BusError, RawClient
from .wireformat import Message

KIB = 1024
MIB = 1024 * KIB
# Around every threshold: the input's buffer, the bulk area's least and most, the memfd's least.
SIZES = (
    24_000,
    25_000,
    60_000,
    65_530,
    65_600,
    98_300,
    98_400,
    100 * KIB,
    300 * KIB,
    MIB,
    2 * MIB - 8,
    2 * MIB + 8,
    3 * MIB,
    16 * MIB - 4,
    16 * MIB + 4,
)
AREA = "memfd:kbusd-bulk"


def bytes_of(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def arguments(signature: str, size: int) -> tuple[Any, ...]:
    """Arguments of about `size` bytes."""
    values: dict[str, Callable[[], Any]] = {
        "ay": lambda: bytes_of(size),
        "s": lambda: "größe" * (size // 7),
        "as": lambda: ["x" * 1000] * (size // 1005),
        "at": lambda: range(size // 8),
        "a{sv}": lambda: {f"k{n}": ("ay", bytes_of(5000, n)) for n in range(size // 5000)},
        "(tay)": lambda: (size, bytes_of(size)),
        "y": lambda: 7,
    }
    return tuple(values[kind]() for kind in w.split(signature))


class Echo(threading.Thread):
    """A client that answers each call with what came, until it is told to stop or is cut off."""

    def __init__(self, client: RawClient) -> None:
        super().__init__(daemon=True)
        self.client = client

    def run(self) -> None:
        while True:
            call = self.client.read()
            if call.member == "Stop":
                return
            fields = {w.REPLY_SERIAL: call.serial, w.DESTINATION: call.sender}
            self.client.send(
                w.RETURN,
                {**fields, w.SIGNATURE: call.signature},
                body=call.body,
                endian=call.endian,
            )


@contextmanager
def echo(bus: Bus, caller: RawClient) -> Iterator[RawClient]:
    client = bus.connect()
    thread = Echo(client)
    thread.start()
    try:
        yield client
    finally:
        caller.send_call(client.name, "/", "test.I", "Stop")
        thread.join(20)
    assert not thread.is_alive()


def ask(caller: RawClient, callee: RawClient, body: bytes, **options: Any) -> Message:
    options.setdefault("signature", "ay")
    fields = {w.PATH: "/", w.INTERFACE: "test.I", w.MEMBER: "Echo", w.DESTINATION: callee.name}
    fields[w.SIGNATURE] = options.pop("signature")
    return caller.wait_reply(caller.send(w.CALL, fields, body=body, **options))


def array(size: int, seed: int = 0, endian: str = "<") -> bytes:
    return struct.pack(endian + "I", size) + bytes_of(size, seed)


# -- whole and in order ------------------------------------------------------------------


@pytest.mark.parametrize("endian", ["<", ">"])
def test_echo_of_every_size(bus: Bus, endian: str) -> None:
    caller = bus.connect()
    with echo(bus, caller) as callee:
        for turn in range(3):  # the first finds no introduction, the second no warm memory
            for size in SIZES:
                body = array(size, turn, endian)
                reply = ask(caller, callee, body, endian=endian)
                assert reply.endian == endian
                assert reply.body == body, f"{size} bytes"


@pytest.mark.parametrize("signature", ["ay", "s", "as", "at", "a{sv}", "(tay)", "yayy", "ays"])
@pytest.mark.parametrize("endian", ["<", ">"])
def test_echo_of_every_kind(bus: Bus, signature: str, endian: str) -> None:
    caller = bus.connect()
    with echo(bus, caller) as callee:
        for size in (150_000, 700_000, 2 * MIB + MIB // 2):
            body = w.marshal(signature, arguments(signature, size), endian)
            for _ in range(2):
                reply = ask(caller, callee, body, endian=endian, signature=signature)
                assert (reply.signature, reply.body == body) == (signature, True)


def test_large_and_small_keep_their_order(bus: Bus) -> None:
    caller, callee = bus.connect(), bus.connect()
    sizes = random.Random(7).choices(
        [10, 5_000, 70_000, 150_000, 600_000, 1_500_000, 2_500_000], k=60
    )
    messages = [
        w.build(
            w.CALL,
            {w.PATH: "/", w.MEMBER: f"M{n}", w.DESTINATION: callee.name, w.SIGNATURE: "ay"},
            body=array(size, n),
            serial=1000 + n,
            flags=1,
        )
        for n, size in enumerate(sizes)
    ]
    writer = threading.Thread(target=caller.write, args=(b"".join(messages),), daemon=True)
    writer.start()
    for n, size in enumerate(sizes):
        got = callee.read()
        assert got.member == f"M{n}"
        assert got.body == array(size, n)
    writer.join()


def test_many_unread_bodies_wait_in_order(bus: Bus) -> None:
    """More than the area holds, to a client that does not read meanwhile."""
    caller, callee = bus.connect(), bus.connect()
    for n in range(24):
        caller.send_call(
            callee.name, "/", "test.I", f"M{n}", "ay", (bytes_of(700_000, n),), flags=1
        )
    assert [callee.read().member for _ in range(24)] == [f"M{n}" for n in range(24)]


def test_both_send_at_once(bus: Bus) -> None:
    one, two = bus.connect(), bus.connect()
    bodies = [bytes_of(800_000, n) for n in range(10)]

    def flood(sender: RawClient, to: RawClient) -> threading.Thread:
        def run() -> None:
            for n, body in enumerate(bodies):
                sender.send_call(to.name, "/", "test.I", f"M{n}", "ay", (body,), flags=1)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        return thread

    threads = [flood(one, two), flood(two, one)]
    for client in (one, two):
        for n, body in enumerate(bodies):
            got = client.read()
            assert (got.member, got.args == [body]) == (f"M{n}", True)
    for thread in threads:
        thread.join()


def test_one_sends_to_more_peers_than_it_has_areas_for(bus: Bus) -> None:
    caller = bus.connect()
    callees = [bus.connect() for _ in range(7)]
    for turn in range(3):
        for callee in callees:
            body = bytes_of(200_000, turn)
            caller.send_call(callee.name, "/", "test.I", "M", "ay", (body,), flags=1)
            assert callee.read().args == [body]


def test_descriptors_go_with_a_large_body(bus: Bus) -> None:
    caller, callee = bus.connect(), bus.connect()
    for turn in range(3):
        read, write = os.pipe()
        caller.send_call(
            callee.name,
            "/",
            "test.I",
            "M",
            "hay",
            (0, bytes_of(300_000, turn)),
            fds=[write],
            flags=1,
        )
        os.close(write)
        got = callee.read()
        assert got.args == [0, bytes_of(300_000, turn)]
        os.write(got.fds[0], b"x")
        os.close(got.fds[0])
        assert os.read(read, 2) == b"x"
        os.close(read)


def test_a_large_signal_reaches_whom_its_argument_concerns(bus: Bus) -> None:
    sender, all_, some, none = (bus.connect() for _ in range(4))
    all_.add_match("type='signal',member='Large'")
    some.add_match("type='signal',member='Large',arg0='this'")
    none.add_match("type='signal',member='Large',arg0='that'")
    for turn in range(3):
        body = bytes_of(500_000, turn)
        sender.signal("/", "test.I", "Large", "say", ("this", body))
        for client in (all_, some):
            assert client.wait_signal("Large").args == ["this", body]
    assert [m for m in none.drain(sender) if m.member == "Large"] == []


def test_a_large_call_to_a_monitor_and_its_receiver(bus: Bus) -> None:
    caller, callee, monitor = bus.connect(), bus.connect(), bus.connect()
    for turn in range(2):
        body = bytes_of(1_000_000, turn)
        caller.send_call(callee.name, "/", "test.I", "Before", "ay", (body,), flags=1)
        assert callee.read().args == [body]
    monitor.driver("BecomeMonitor", "asu", ([], 0), interface="org.freedesktop.DBus.Monitoring")
    caller.send_call(callee.name, "/", "test.I", "Seen", "ay", (body,), flags=1)
    assert callee.wait_call("Seen").args == [body]
    assert monitor.wait_call("Seen").args == [body]


def half(member: str, to: str, size: int = MIB, seed: int = 5) -> tuple[bytes, bytes]:
    """A call in two halves."""
    fields = {w.PATH: "/", w.MEMBER: member, w.DESTINATION: to, w.SIGNATURE: "ay"}
    message = w.build(w.CALL, fields, body=array(size, seed), serial=99 + seed)
    return message[: len(message) // 2], message[len(message) // 2 :]


@pytest.mark.parametrize("piece", [100, 1000, 5000, 70_000])
def test_a_body_that_comes_in_pieces(bus: Bus, piece: int) -> None:
    caller, callee = bus.connect(), bus.connect()
    for turn in range(3):
        message = b"".join(half("M", callee.name, 300_000, turn))
        for at in range(0, len(message), piece):
            caller.write(message[at : at + piece])
        assert callee.wait_call("M").body == array(300_000, turn)


def test_a_monitor_that_comes_in_the_middle_of_a_body_sees_it(bus: Bus) -> None:
    caller, callee, monitor = bus.connect(), bus.connect(), bus.connect()
    for _ in range(2):
        caller.send_call(callee.name, "/", "test.I", "M", "ay", (bytes_of(MIB),), flags=1)
        assert callee.wait_call("M").args == [bytes_of(MIB)]
    first, second = half("Half", callee.name)
    caller.write(first)
    monitor.driver("BecomeMonitor", "asu", ([], 0), interface="org.freedesktop.DBus.Monitoring")
    caller.write(second)
    assert callee.wait_call("Half").body == array(MIB, 5)
    assert monitor.wait_call("Half").body == array(MIB, 5)


@pytest.mark.kbusd_only
def test_a_worker_killed_in_the_middle_of_a_body(bus: Bus) -> None:
    caller, callee, watcher = bus.connect(), bus.connect(), bus.connect()
    watcher.add_match(f"member='NameOwnerChanged',arg0='{caller.name}'")
    for _ in range(2):
        caller.send_call(callee.name, "/", "test.I", "M", "ay", (bytes_of(MIB),), flags=1)
        assert callee.wait_call("M").args == [bytes_of(MIB)]
    caller.write(half("Half", callee.name)[0])
    os.kill(bus.worker_of(caller).pid, signal.SIGKILL)
    watcher.wait_signal("NameOwnerChanged")
    watcher.send_call(callee.name, "/", "test.I", "Last", "ay", (bytes_of(MIB),), flags=1)
    assert callee.wait_call("Last").args == [bytes_of(MIB)]
    assert all(m.member != "Half" for m in callee.inbox)


# -- broken rules ------------------------------------------------------------------------


@pytest.mark.parametrize("size", [100 * KIB, MIB, 3 * MIB])
def test_an_invalid_large_body_ends_its_sender_alone(bus: Bus, size: int) -> None:
    callee, other = bus.connect(), bus.connect()
    bad = struct.pack("<I", size - 5) + b"x" * (size - 6) + b"\xff\0"  # not UTF-8
    for warm in (False, True):
        caller = bus.connect()
        if warm:
            body = bytes_of(size)
            caller.send_call(callee.name, "/", "test.I", "Good", "ay", (body,), flags=1)
            assert callee.wait_call("Good").args == [body]
        fields = {w.PATH: "/", w.MEMBER: "Bad", w.DESTINATION: callee.name, w.SIGNATURE: "s"}
        caller.send(w.CALL, fields, body=bad)
        caller.expect_disconnect()
    other.send_call(callee.name, "/", "test.I", "Last", flags=1)
    assert callee.wait_call("Last").sender == other.name
    assert all(m.member != "Bad" for m in callee.inbox)


def test_a_sender_that_leaves_in_the_middle_of_a_body(bus: Bus) -> None:
    caller, callee = bus.connect(), bus.connect()
    body = bytes_of(MIB)
    for _ in range(2):
        caller.send_call(callee.name, "/", "test.I", "Whole", "ay", (body,), flags=1)
        assert callee.read().args == [body]
    fields = {w.PATH: "/", w.MEMBER: "Half", w.DESTINATION: callee.name, w.SIGNATURE: "ay"}
    message = w.build(w.CALL, fields, body=array(MIB), serial=99)
    caller.write(message[: len(message) // 2])
    caller.close()
    assert callee.drain(bus.connect()) == []


def test_the_receiver_leaves_in_the_middle_of_a_body(bus: Bus) -> None:
    caller, callee = bus.connect(), bus.connect()
    for _ in range(2):
        caller.send_call(callee.name, "/", "test.I", "M", "ay", (bytes_of(MIB),), flags=1)
        callee.read()
    fields = {w.PATH: "/", w.MEMBER: "M", w.DESTINATION: callee.name, w.SIGNATURE: "ay"}
    message = w.build(w.CALL, fields, body=array(MIB), serial=99)
    caller.write(message[: len(message) // 2])
    watcher = bus.connect()
    watcher.add_match(f"member='NameOwnerChanged',arg0='{callee.name}'")
    callee.close()
    watcher.wait_signal("NameOwnerChanged")
    caller.write(message[len(message) // 2 :])
    with pytest.raises(BusError, match=r"ServiceUnknown|NoReply"):
        caller.wait_reply(99)
    assert caller.driver("GetId")


def test_the_name_moves_in_the_middle_of_a_body(bus: Bus) -> None:
    """A message goes to whoever has the name when the message is complete."""
    caller, first, second = bus.connect(), bus.connect(), bus.connect()
    name = "test.large.Moving"
    first.request_name(name, 1)  # allow replacement
    for _ in range(2):
        caller.send_call(name, "/", "test.I", "M", "ay", (bytes_of(MIB),), flags=1)
        assert first.wait_call("M").args == [bytes_of(MIB)]
    fields = {w.PATH: "/", w.MEMBER: "Half", w.DESTINATION: name, w.SIGNATURE: "ay"}
    message = w.build(w.CALL, fields, body=array(MIB, 5), serial=99)
    caller.write(message[: len(message) // 2])
    assert second.request_name(name, 2) == 1
    caller.write(message[len(message) // 2 :])
    half = second.wait_call("Half")
    assert half.body == array(MIB, 5)
    second.reply(half, "ay", (bytes_of(MIB, 6),))
    assert caller.wait_reply(99).args == [bytes_of(MIB, 6)]
    # And the area that the first half was received into is as good as before.
    caller.send_call(first.name, "/", "test.I", "Again", "ay", (bytes_of(MIB, 7),), flags=1)
    assert first.wait_call("Again").args == [bytes_of(MIB, 7)]


@pytest.mark.kbusd_only
def test_a_worker_killed_between_large_bodies(bus: Bus) -> None:
    callee = bus.connect()
    for turn in range(3):
        caller = bus.connect()
        watcher = bus.connect()
        watcher.add_match(f"member='NameOwnerChanged',arg0='{caller.name}'")
        body = bytes_of(MIB, turn)
        for n in range(3):
            caller.send_call(callee.name, "/", "test.I", f"M{n}", "ay", (body,), flags=1)
        assert callee.read().args == [body]
        os.kill(bus.worker_of(caller).pid, signal.SIGKILL)
        watcher.wait_signal("NameOwnerChanged")
        for got in callee.drain(watcher):
            assert got.args == [body]


@pytest.mark.kbusd_only
def test_a_body_that_is_lent_survives_its_sender(bus: Bus) -> None:
    """Most of it still stands in the sender's memory when that worker dies."""
    callee, caller, watcher = bus.connect(), bus.connect(), bus.connect()
    watcher.add_match(f"member='NameOwnerChanged',arg0='{caller.name}'")
    bodies = [bytes_of(2_000_000, n) for n in range(4)]
    for n, body in enumerate(bodies[:2]):
        caller.send_call(callee.name, "/", "test.I", f"M{n}", "ay", (body,), flags=1)
        assert callee.read().args == [body]
    for n, body in enumerate(bodies[2:]):
        caller.send_call(callee.name, "/", "test.I", f"M{n}", "ay", (body,), flags=1)
    assert select.select([callee.sock], [], [], 30)[0]
    os.kill(bus.worker_of(caller).pid, signal.SIGKILL)
    watcher.wait_signal("NameOwnerChanged")
    got = callee.drain(watcher)
    assert [each.args for each in got] == [[body] for body in bodies[2 : 2 + len(got)]]
    assert got


@pytest.mark.kbusd_only
def test_a_receiver_whose_worker_is_killed(bus: Bus) -> None:
    caller = bus.connect()
    for turn in range(3):
        callee = bus.connect()
        body = bytes_of(MIB, turn)
        caller.send_call(callee.name, "/", "test.I", "M", "ay", (body,), flags=1)
        assert callee.read().args == [body]
        serial = caller.send_call(callee.name, "/", "test.I", "M", "ay", (body,))
        os.kill(bus.worker_of(callee).pid, signal.SIGKILL)
        with pytest.raises(BusError, match=r"ServiceUnknown|NoReply"):
            caller.wait_reply(serial)


# -- memory ------------------------------------------------------------------------------


def mapped(pid: int, name: str = AREA) -> bool:
    return name in Path(f"/proc/{pid}/maps").read_text()


@pytest.mark.kbusd_only
@pytest.mark.parametrize("size", [2 * MIB - 8, 8 * MIB])
def test_idle_workers_give_the_memory_back(bus: Bus, size: int) -> None:
    caller = bus.connect()
    with echo(bus, caller) as callee:
        workers = [bus.worker_of(client).pid for client in (caller, callee)]
        before = [procs.pss(pid) for pid in workers]
        for turn in range(3):
            ask(caller, callee, array(size, turn))
        assert all(mapped(pid) for pid in workers)
        procs.eventually(lambda: not any(mapped(pid) for pid in workers), "no bulk area is left")
        for pid, at_first in zip(workers, before, strict=True):
            assert procs.pss(pid) < at_first + 700 * KIB
        body = array(MIB)
        for _ in range(3):  # and a new one is as good
            assert ask(caller, callee, body).body == body
        assert all(mapped(pid) for pid in workers)


@pytest.mark.kbusd_only
def test_what_was_sent_at_once_is_not_kept_account_of(bus: Bus) -> None:
    caller, callee = bus.connect(), bus.connect()
    fields = {w.PATH: "/", w.MEMBER: "M", w.DESTINATION: callee.name, w.SIGNATURE: "ay"}
    message = w.build(w.CALL, fields, body=array(140_000), serial=99, flags=1)
    pid = bus.worker_of(callee).pid

    def send(count: int) -> int:
        for _ in range(count):
            caller.write(message)
            assert callee.read().serial == 99
        return procs.pss(pid)

    before = send(300)
    assert send(4000) < before + 300 * KIB


def resident(pid: int) -> int:
    """Bytes of bulk areas that a process has touched."""
    total, ours = 0, False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            ours = AREA in line
        elif ours and line.startswith("Rss:"):
            total += int(line.split()[1]) * KIB
    return total


@pytest.mark.kbusd_only
@pytest.mark.parametrize(("signature", "copied"), [("ay", False), ("s", True)])
def test_numbers_do_not_pass_through_the_memory_of_workers(
    bus: Bus, signature: str, copied: bool
) -> None:
    caller = bus.connect()
    with echo(bus, caller) as callee:
        workers = [bus.worker_of(client).pid for client in (caller, callee)]
        warm = array(100 * KIB)
        for _ in range(2):  # from the second on, what comes first is read apart
            ask(caller, callee, warm)
        body = w.marshal(signature, arguments(signature, MIB), "<")
        for _ in range(3):
            assert ask(caller, callee, body, signature=signature).body == body
        for pid in workers:
            assert (resident(pid) > 800 * KIB) == copied


@pytest.mark.kbusd_only
@pytest.mark.parametrize("announced", [2 * MIB - 100, 100 * MIB])
def test_a_body_that_is_announced_and_never_comes_takes_no_memory(bus: Bus, announced: int) -> None:
    caller, callee = bus.connect(), bus.connect()
    for _ in range(2):
        caller.send_call(callee.name, "/", "test.I", "M", "ay", (bytes_of(100 * KIB),), flags=1)
        callee.read()
    pid = bus.worker_of(caller).pid
    before = procs.pss(pid)
    fields = {w.PATH: "/", w.MEMBER: "M", w.DESTINATION: callee.name, w.SIGNATURE: "ay"}
    message = w.build(w.CALL, fields, body=array(100), body_length=announced, serial=99)
    caller.write(message)
    callee.drain()
    assert procs.pss(pid) < before + 400 * KIB
    caller.close()
