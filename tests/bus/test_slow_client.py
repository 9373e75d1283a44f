"""A client that does not read: who sends to it pays, each for itself; signals unread end it.

With the limit here, some messages of 50,000 bytes are a sender's share of the client's queue.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from . import procs
from . import wireformat as w
from .daemon import Bus
from .rawclient import DRIVER, DRIVER_PATH, BusError, RawClient

pytestmark = pytest.mark.kbusd_only  # dbus-daemon knows no shares

LIMIT = 4_000_000
COUNT = 50
EXCEEDED = "org.freedesktop.DBus.Error.LimitsExceeded"


@pytest.fixture
def small(start_bus: Callable[..., Bus]) -> Bus:
    return start_bus(limits={"max_outgoing_bytes": LIMIT, "max_outgoing_unix_fds": 64})


def call(sender: RawClient, to: RawClient, member: str, size: int = 50_000, **options: int) -> int:
    return sender.send_call(to.name, "/", "test.I", member, "ay", (b"x" * size,), **options)


def is_refused(sender: RawClient, serial: int) -> bool:
    """Wait for the answer to a call that is sure to be refused."""
    with pytest.raises(BusError) as caught:
        sender.wait_reply(serial)
    return caught.value.name == EXCEEDED and "max_outgoing_bytes" in caught.value.text


def flood(sender: RawClient, stuck: RawClient, member: str = "Flood") -> int:
    """Call until calls are refused; how many were not."""
    serials = [call(sender, stuck, member) for _ in range(COUNT)]
    assert is_refused(sender, serials[-1])
    refused = [message.reply_serial for message in sender.inbox]
    assert refused == serials[-1 - len(refused) : -1], "once over the share, all are refused"
    sender.inbox.clear()
    return COUNT - 1 - len(refused)


def logged(bus: Bus, *texts: str) -> list[str]:
    """The lines of the log that hold all the texts; waits until there is one."""

    def lines() -> list[str]:
        return [each for each in bus.log().splitlines() if all(text in each for text in texts)]

    procs.eventually(lines, f"a line of the log with {texts}")
    return lines()


def is_connected(client: RawClient, witness: RawClient) -> bool:
    return bool(witness.driver("NameHasOwner", "s", (client.name,))[0])


def test_a_flood_uses_up_its_own_share_and_others_get_through(small: Bus) -> None:
    flooder, other, late, stuck = (small.connect() for _ in range(4))
    taken = flood(flooder, stuck)
    assert LIMIT / 4 <= taken * 50_000 <= LIMIT / 2
    serials = [call(other, stuck, "Other", 1000) for _ in range(20)]
    again = flood(late, stuck, "Late")
    assert again * 50_000 >= LIMIT / 20
    assert is_refused(flooder, call(flooder, stuck, "Again", 10))
    # All that was not refused is there, each sender's in its order; then everybody may send again.
    got = [stuck.read() for _ in range(taken + 20 + again)]
    for sender, count in ((flooder, taken), (other, 20), (late, again)):
        numbers = [message.serial for message in got if message.sender == sender.name]
        assert len(numbers) == count
        assert numbers == sorted(numbers)
    stuck.reply(next(message for message in got if message.sender == other.name))
    assert other.wait_reply(serials[0])
    serial = call(flooder, stuck, "Again")
    stuck.reply(stuck.wait_call("Again"))
    assert flooder.wait_reply(serial)
    assert len(logged(small, stuck.name, flooder.name, "over its share")) == 1


def test_many_connections_of_one_user_leave_room_for_one_more(small: Bus) -> None:
    stuck, *flooders = (small.connect() for _ in range(9))
    for flooder in flooders:
        flood(flooder, stuck)
    last = small.connect()
    call(last, stuck, "Last", 1000)
    assert stuck.wait_call("Last").sender == last.name


@pytest.mark.parametrize("kind", ["signals to it", "calls without reply"])
def test_what_nobody_asked_for_does_not_end_a_slow_client(small: Bus, kind: str) -> None:
    flooder, other, stuck = (small.connect() for _ in range(3))
    stuck.add_match("interface='test.Wanted'")
    for n in range(200):
        args = ("uay", (n, b"x" * 50_000))
        if kind == "signals to it":
            flooder.signal("/", "test.I", "Flood", *args, to=stuck.name)
        else:
            flooder.send_call(stuck.name, "/", "test.I", "Flood", *args, flags=w.NO_REPLY_EXPECTED)
    assert is_refused(flooder, call(flooder, stuck, "Call", 10))
    for n in range(20):
        other.signal("/", "test.Wanted", "S", "uay", (n, b"x" * 50_000))
    other.driver("GetId")
    assert is_connected(stuck, other)
    assert len(logged(small, stuck.name, flooder.name, "over its share")) == 1
    assert stuck.wait_signal("S").args[0] == 0
    taken = [message.args[0] for message in stuck.inbox]
    assert taken == list(range(len(taken))), "what was taken of the flood is its beginning"
    assert [stuck.wait_signal("S").args[0] for _ in range(19)] == list(range(1, 20))


def test_signals_unread_end_a_client_however_many_senders_share_them(small: Bus) -> None:
    senders = [small.connect() for _ in range(4)]
    stuck = small.connect()
    stuck.add_match("interface='test.Wanted'")
    for n in range(LIMIT // 50_000 + 10):
        senders[n % 4].signal("/", "test.Wanted", "S", "uay", (n, b"x" * 50_000))
    procs.eventually(lambda: not is_connected(stuck, senders[0]), "it is disconnected")
    logged(small, stuck.name, "does not read its signals", f"max_outgoing_bytes={LIMIT}")


def test_a_client_that_does_not_read_the_answers_of_the_bus_is_disconnected(
    start_bus: Callable[..., Bus],
) -> None:
    bus = start_bus(limits={"max_outgoing_bytes": 500_000})
    witness, stuck = bus.connect(), bus.connect()
    try:
        for _ in range(20_000):
            stuck.send_call(DRIVER, DRIVER_PATH, DRIVER, "ListNames")
    except (BrokenPipeError, ConnectionResetError):
        pass
    procs.eventually(lambda: not is_connected(stuck, witness), "it is disconnected")
    logged(bus, stuck.name, "does not read")


def test_replies_over_a_share_become_errors(small: Bus) -> None:
    """A callee that floods its caller with what it asked for does not end it either."""
    caller, callee = small.connect(), small.connect()
    serials = [caller.send_call(callee.name, "/", "test.I", "M") for _ in range(COUNT)]
    for _ in serials:
        callee.reply(callee.read(), "ay", (b"x" * 50_000,))
    assert is_refused(callee, call(callee, caller, "Fence", 10))
    answers = [caller.read() for _ in serials]
    assert [answer.reply_serial for answer in answers] == serials
    good = sum(answer.type == w.RETURN for answer in answers)
    assert LIMIT / 4 <= good * 50_000 <= LIMIT / 2
    assert {answer.error_name for answer in answers[good:]} == {EXCEEDED}


def test_descriptors_count_too(small: Bus) -> None:
    """A flood of them is refused before the worker has none left for others'."""
    flooder, other, stuck = (small.connect() for _ in range(3))
    read, write = os.pipe()
    # As much as its socket takes goes out at once; from there on its worker has to keep them.
    filling = [call(flooder, stuck, "Fill", 60_000) for _ in range(8)]
    serials = [
        flooder.send_call(stuck.name, "/", "test.I", "M", "h", (0,), fds=[write]) for _ in range(40)
    ]
    assert is_refused(flooder, serials[-1])
    refused = len(flooder.inbox)
    assert 8 <= 39 - refused <= 20
    serial = other.send_call(stuck.name, "/", "test.I", "M", "h", (0,), fds=[write])
    got = [stuck.read() for _ in range(len(filling) + 39 - refused + 1)]
    assert (got[-1].serial, len(got[-1].fds)) == (serial, 1)
    os.close(read)
    os.close(write)


def test_a_client_that_reads_slowly_gets_everything(small: Bus) -> None:
    """Ten times the limit passes through, as long as each waits for what it has sent."""
    sender, slow = small.connect(), small.connect()
    for n in range(LIMIT * 10 // 250_000):
        serial = sender.send_call(slow.name, "/", "test.I", "M", "uay", (n, b"x" * 250_000))
        message = slow.read()
        assert message.args[0] == n
        slow.reply(message)
        sender.wait_reply(serial)


def test_what_waited_for_a_slow_client_leaves_no_memory_behind(bus: Bus) -> None:
    """The heap was kept as it was at its largest."""
    sender, slow = bus.connect(), bus.connect()
    worker = bus.worker_of(slow).pid
    sender.signal("/", "t.I", "S", to=slow.name)
    slow.wait_signal("S")
    before = procs.pss(worker)
    for n in range(40_000):
        sender.signal("/", "t.I", "S", "uay", (n, b"x" * 200), to=slow.name)
    procs.eventually(lambda: procs.pss(worker) > before + 5_000_000, "much waits")
    for n in range(40_000):
        assert slow.read().args[0] == n
    procs.eventually(lambda: procs.pss(worker) < before + 1_000_000, "it is given back")
