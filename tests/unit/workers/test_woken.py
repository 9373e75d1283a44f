"""What a worker still has to do when it goes to sleep, as nothing would wake it for that."""

from __future__ import annotations

import os
import select

import msgspec
import pytest

from kbusd.policy import configuration
from kbusd.rings import entries, memfd
from kbusd.workers.context import Context
from tests.bus import wireformat as w
from tests.unit.workers.alone import ENGINE, SECONDS, Alone, alone

ONE, OTHER, MORE = 2, 3, 4
RULE = "interface='test.I'"
ELSE = "interface='test.Else'"
ROUND = 70_000  # bytes: more than the log holds
BROADCAST = 1 << 20  # bytes of the engine's


def next_said(engine: Alone, kind: type) -> msgspec.Struct:
    """What the engine says to its broker, which must be that."""
    assert select.select([engine.broker], [], [], SECONDS)[0], f"it does not say {kind}"
    received = engine.broker.receive()
    assert received is not None
    assert isinstance(received[0], kind), received
    return received[0]


def policy(engine: Alone, context: Context, generation: int, request: int) -> None:
    """Answer FetchPolicy."""
    data = configuration.encode(context.configuration)
    fd = memfd.sealed("test-policy", data)
    engine.broker.send(entries.Reply(request, generation), [fd])
    os.close(fd)


def test_what_the_broker_said_while_a_message_was_passed_on_was_left_till_something_else_came(
    context: Context,
) -> None:
    """The log says that policy is another, just as a message that had to wait is passed on. So that is fetched
    first, and what else the broker says till then is kept."""
    with alone(context, [ONE], RULE) as engine:
        serial = engine.send(w.SIGNAL, None, "First")
        engine.gather(ONE, [serial])
        for number in range(ROUND // 1000):
            engine.enter(entries.MatchAdded(ONE, f"member='{'x' * 200}{number}'"))
            engine.enter(entries.MatchAdded(ONE, f"member='{'y' * 700}{number}'"))
        serial = engine.send(
            w.SIGNAL, None, "Second"
        )  # and the engine finds that the log has gone round
        asked = next_said(engine, entries.FetchSnapshot)
        me = entries.Credentials(os.geteuid(), os.getegid(), os.getpid())
        state = entries.Snapshot(
            position=engine.log.statistics().written,
            stamp=0,
            connections=((ENGINE, me), (ONE, me)),
            names=(),
            matches=((ONE, RULE),),
            monitors=(),
            activatable=(),
            policy_generation=1,
        )
        fd = memfd.sealed("test-snapshot", msgspec.msgpack.encode(state))
        engine.broker.send(entries.Reply(asked.request), [fd])  # type: ignore[attr-defined]
        os.close(fd)
        asked = next_said(engine, entries.FetchPolicy)
        engine.enter(entries.PolicyChanged(2))
        policy(engine, context, 1, asked.request)  # type: ignore[attr-defined]
        asked = next_said(engine, entries.FetchPolicy)
        engine.broker.send(entries.Probe())
        policy(engine, context, 2, asked.request)  # type: ignore[attr-defined]
        next_said(engine, entries.Running)
        engine.gather(ONE, [serial])


@pytest.mark.parametrize("leaves", [False, True])
def test_a_signal_was_sent_by_the_rules_of_before_while_a_peer_promised_something(
    context: Context, leaves: bool
) -> None:
    """Who has heard, by whatever way, that a rule was added, and then sends what it matches, may rely on it,
    and then leave."""
    with alone(context, [ONE, OTHER], ELSE) as engine:
        for id in (ONE, OTHER):
            engine.gather(id, [engine.send(w.SIGNAL, f":1.{id}", "First")])
        promised = engine.workers[OTHER].clock.tick()
        engine.workers[OTHER].fanout.broadcast.open_many(promised)
        engine.clock.see(promised)
        engine.enter(entries.MatchAdded(ONE, RULE))
        serial = engine.send(w.SIGNAL, None, "S")
        if leaves:
            engine.client.close()
        engine.gather(ONE, [serial])


def test_who_could_not_join_for_want_of_room_read_what_was_not_kept_for_it(
    context: Context,
) -> None:
    """Then it was overrun, and what it was sent was lost."""
    with alone(context, [ONE, OTHER, MORE], RULE) as engine:
        for id in (ONE, OTHER, MORE):
            engine.gather(id, [engine.send(w.SIGNAL, f":1.{id}", "First")])
        size = 60_000
        while size > 0:  # till there is no room for 16 bytes
            before = engine.unread(ONE)
            engine.send(w.SIGNAL, f":1.{ONE}", "Fill", size)
            engine.until(lambda before=before: engine.unread(ONE) > before, "it is in the ring")
            if before == 0:
                rest = engine.unread(ONE) - size
            size = min(262144 - engine.unread(ONE) - rest - 8, 60_000)
        to_all = engine.send(w.SIGNAL, None, "S")
        for id in (OTHER, MORE):
            engine.gather(id, [to_all])
        engine.gather(ONE, [to_all])
        engine.enter(entries.MatchRemoved(ONE, RULE))
        for _ in range(2 * BROADCAST // 60_000):
            serial = engine.send(w.SIGNAL, None, "NotForOne", 60_000)
            for id in (OTHER, MORE):
                engine.gather(id, [serial])
        engine.gather(ONE, [engine.send(w.SIGNAL, f":1.{ONE}", "Last")])
