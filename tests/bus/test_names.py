"""Well-known names: who owns them, who waits, and which signals say so in which order."""

from __future__ import annotations

import itertools
import os
import signal
from pathlib import Path

import pytest

from . import procs
from .daemon import Bus
from .rawclient import DRIVER, DRIVER_PATH, RawClient

ALLOW_REPLACEMENT, REPLACE_EXISTING, DO_NOT_QUEUE = 1, 2, 4
PRIMARY, IN_QUEUE, EXISTS, ALREADY = 1, 2, 3, 4
RELEASED, NON_EXISTENT, NOT_OWNER = 1, 2, 3

_numbers = itertools.count()


@pytest.fixture
def name() -> str:
    return f"test.names.N{next(_numbers)}"


@pytest.fixture
def watcher(bus: Bus, name: str) -> RawClient:
    client = bus.connect()
    client.add_match(f"type='signal',sender='{DRIVER}',member='NameOwnerChanged',arg0='{name}'")
    return client


def changes(watcher: RawClient, count: int) -> list[tuple[str, str]]:
    return [tuple(watcher.wait_signal("NameOwnerChanged").args[1:]) for _ in range(count)]


def told(client: RawClient) -> list[tuple[str | None, str]]:
    """What the bus told a client of its names so far."""
    messages = client.drain()
    assert all((m.sender, m.destination) == (DRIVER, client.name) for m in messages)
    return [(m.member, m.args[0]) for m in messages]


def test_acquire_and_release(bus: Bus, name: str, watcher: RawClient) -> None:
    client = bus.connect()
    assert client.request_name(name) == PRIMARY
    assert told(client) == [("NameAcquired", name)]
    assert client.request_name(name) == ALREADY
    assert client.driver("ReleaseName", "s", (name,)) == [RELEASED]
    assert told(client) == [("NameLost", name)]
    assert client.driver("ReleaseName", "s", (name,)) == [NON_EXISTENT]
    assert changes(watcher, 2) == [("", client.name), (client.name, "")]
    assert watcher.drain() == []


def test_reply_comes_after_name_acquired(bus: Bus, name: str) -> None:
    client = bus.connect()
    serial = client.send_call(
        DRIVER, "/org/freedesktop/DBus", DRIVER, "RequestName", "su", (name, 0)
    )
    first, second = client.read(), client.read()
    assert (first.member, first.args) == ("NameAcquired", [name])
    assert (second.reply_serial, second.args) == (serial, [PRIMARY])


def test_queue_in_order(bus: Bus, name: str, watcher: RawClient) -> None:
    a, b, c = (bus.connect() for _ in range(3))
    assert [one.request_name(name) for one in (a, b, c)] == [PRIMARY, IN_QUEUE, IN_QUEUE]
    assert b.request_name(name) == IN_QUEUE
    a.driver("ReleaseName", "s", (name,))
    assert told(b) == [("NameAcquired", name)]
    assert a.driver("ReleaseName", "s", (name,)) == [NOT_OWNER]
    b.close()
    assert c.read().args == [name]
    assert changes(watcher, 3) == [("", a.name), (a.name, b.name), (b.name, c.name)]


@pytest.mark.kbusd_only
def test_name_that_is_free_at_once_does_not_come_before_the_word_that_it_is_queued_for(
    bus: Bus, name: str
) -> None:
    a, b = bus.connect(), bus.connect()
    a.request_name(name)
    worker, others = bus.worker_of(b).pid, procs.descendants(bus.pid)
    [broker] = [
        p.pid for p in others if b"kbusd.broker" in Path(f"/proc/{p.pid}/cmdline").read_bytes()
    ]

    def stopped(*pids: int) -> bool:
        return all(process.state == "T" for process in map(procs.look, pids) if process)

    # Stopped before it has waited again it would hear `a`, whom it has heard last, before `b`.
    procs.eventually(lambda: (p := procs.look(broker)) and p.state == "S", "the broker sleeps")
    os.kill(broker, signal.SIGSTOP)
    try:
        procs.eventually(lambda: stopped(broker), "the broker stops")
        heard = Path(f"/proc/{worker}/schedstat").read_text
        before = heard()
        asked = b.send_call(DRIVER, "/org/freedesktop/DBus", DRIVER, "RequestName", "su", (name, 0))
        procs.eventually(
            lambda: heard() != before and (p := procs.look(worker)) and p.state == "S",
            "b's worker has asked the broker",
        )
        os.kill(worker, signal.SIGSTOP)
        procs.eventually(lambda: stopped(worker), "b's worker stops")
        released = a.send_call(DRIVER, "/org/freedesktop/DBus", DRIVER, "ReleaseName", "s", (name,))
    finally:
        os.kill(broker, signal.SIGCONT)
    try:
        assert a.wait_reply(released).args == [RELEASED]
    finally:
        os.kill(worker, signal.SIGCONT)
    first, second = b.read(), b.read()
    assert (first.reply_serial, first.args) == (asked, [IN_QUEUE]), second
    assert (second.member, second.args) == ("NameAcquired", [name])


def test_leaving_the_queue(bus: Bus, name: str) -> None:
    a, b, c = (bus.connect() for _ in range(3))
    for one in (a, b, c):
        one.request_name(name)
    assert b.driver("ReleaseName", "s", (name,)) == [RELEASED]
    assert told(b) == []
    assert a.driver("ListQueuedOwners", "s", (name,)) == [[a.name, c.name]]


def test_do_not_queue(bus: Bus, name: str) -> None:
    a, b = bus.connect(), bus.connect()
    a.request_name(name)
    assert b.request_name(name, DO_NOT_QUEUE) == EXISTS
    assert b.request_name(name, DO_NOT_QUEUE | REPLACE_EXISTING) == EXISTS
    assert a.driver("ListQueuedOwners", "s", (name,)) == [[a.name]]


def test_do_not_queue_leaves_the_queue(bus: Bus, name: str) -> None:
    a, b = bus.connect(), bus.connect()
    a.request_name(name)
    assert b.request_name(name) == IN_QUEUE
    assert b.request_name(name, DO_NOT_QUEUE) == EXISTS
    assert a.driver("ListQueuedOwners", "s", (name,)) == [[a.name]]


def test_replace(bus: Bus, name: str, watcher: RawClient) -> None:
    a, b = bus.connect(), bus.connect()
    assert a.request_name(name, ALLOW_REPLACEMENT) == PRIMARY
    told(a)
    assert b.request_name(name, REPLACE_EXISTING) == PRIMARY
    assert told(a) == [("NameLost", name)]
    assert told(b) == [("NameAcquired", name)]
    assert changes(watcher, 2) == [("", a.name), (a.name, b.name)]
    assert b.driver("ListQueuedOwners", "s", (name,)) == [[b.name, a.name]]
    b.close()
    assert changes(watcher, 1) == [(b.name, a.name)]


def test_replaced_owner_that_does_not_queue_is_out(bus: Bus, name: str) -> None:
    a, b = bus.connect(), bus.connect()
    a.request_name(name, ALLOW_REPLACEMENT | DO_NOT_QUEUE)
    assert b.request_name(name, REPLACE_EXISTING) == PRIMARY
    assert b.driver("ListQueuedOwners", "s", (name,)) == [[b.name]]


def test_replace_needs_both_sides(bus: Bus, name: str) -> None:
    a, b = bus.connect(), bus.connect()
    a.request_name(name)
    assert b.request_name(name, REPLACE_EXISTING) == IN_QUEUE
    assert a.driver("GetNameOwner", "s", (name,)) == [a.name]
    assert a.request_name(name, ALLOW_REPLACEMENT) == ALREADY
    assert b.request_name(name, REPLACE_EXISTING) == PRIMARY


def test_allowance_can_be_taken_back(bus: Bus, name: str) -> None:
    a, b = bus.connect(), bus.connect()
    a.request_name(name, ALLOW_REPLACEMENT)
    assert a.request_name(name, 0) == ALREADY
    assert b.request_name(name, REPLACE_EXISTING | DO_NOT_QUEUE) == EXISTS


def test_replacing_from_the_queue_overtakes_it(bus: Bus, name: str) -> None:
    a, b, c = (bus.connect() for _ in range(3))
    a.request_name(name, ALLOW_REPLACEMENT)
    b.request_name(name)
    assert c.request_name(name, REPLACE_EXISTING) == PRIMARY
    assert a.driver("ListQueuedOwners", "s", (name,)) == [[c.name, a.name, b.name]]


def test_disconnect_releases_all_names(bus: Bus, name: str) -> None:
    client, other = bus.connect(), bus.connect()
    other.add_match("type='signal',member='NameOwnerChanged'")
    names = [f"{name}.x{n}" for n in range(10)]
    for one in names:
        client.request_name(one)
    client.close()
    gone = []
    while True:
        args = other.wait_signal("NameOwnerChanged").args
        if args[2] == "":
            gone.append(args[0])
            assert args[1] == client.name
        if args == [client.name, client.name, ""]:
            break
    assert sorted(gone[:-1]) == sorted(names)


def test_a_call_follows_the_name(bus: Bus, name: str) -> None:
    a, b, caller = (bus.connect() for _ in range(3))
    a.request_name(name, ALLOW_REPLACEMENT)
    caller.send_call(name, "/", "test.I", "First")
    a.wait_call("First")
    b.request_name(name, REPLACE_EXISTING)
    caller.send_call(name, "/", "test.I", "Second")
    b.wait_call("Second")
    b.driver("ReleaseName", "s", (name,))
    caller.send_call(name, "/", "test.I", "Third")
    a.wait_call("Third")


def test_only_the_affected_client_is_told(bus: Bus, name: str) -> None:
    a, b = bus.connect(), bus.connect()
    a.request_name(name)
    assert told(b) == []


def test_unknown_flags_are_ignored(bus: Bus, name: str) -> None:
    assert bus.connect().request_name(name, 0xFFFFFFF8) == PRIMARY


def test_the_first_signals_of_two_clients_to_each_other_came_behind_the_names_they_took_next(
    bus: Bus,
) -> None:
    """Each was introduced to the other; who was asked to wrote before who had asked could read it."""
    for _ in range(40):
        pair = [bus.connect() for _ in range(2)]
        for client in pair:
            client.add_match("type='signal',interface='a.First'")
            client.add_match(f"type='signal',sender='{DRIVER}',member='NameOwnerChanged'")
        for client in pair:
            client.signal("/", "a.First", "Before")
            client.send_call(
                DRIVER, DRIVER_PATH, DRIVER, "RequestName", "su", (f"a.N{client.name[3:]}", 0)
            )
        for client, other in (pair, pair[::-1]):
            taken = f"a.N{other.name[3:]}"
            client.wait(
                lambda m, taken=taken: m.member == "NameOwnerChanged" and m.args[0] == taken
            )
            assert other.name in [m.sender for m in client.inbox if m.member == "Before"]
        bus.close_clients()
