"""Floods of another user, which no test with one user's clients can send."""

from __future__ import annotations

import os

import pytest

from kbusd.workers.context import Context
from tests.bus import wireformat as w
from tests.unit.workers.alone import Alone, alone

LIMIT = 2_000_000
SENDER = 2
REFUSED = 6  # kind of frame
RULE = "interface='test.I'"


@pytest.fixture
def small(context: Context) -> Context:
    context.configuration.limits["max_outgoing_bytes"] = LIMIT
    return context


def broadcast(engine: Alone) -> None:
    """Twice as much as the engine's client, which does not read, may have waiting."""
    engine.gather(SENDER, [engine.send(w.SIGNAL, f":1.{SENDER}", "First")])
    for _ in range(2 * LIMIT // 20_000):
        engine.put(SENDER, w.SIGNAL, None, "S", 20_000)


def test_another_user_cannot_broadcast_a_client_off_the_bus(small: Context) -> None:
    with alone(small, [SENDER], RULE, uid=os.geteuid() + 1) as engine:
        broadcast(engine)
        engine.put(SENDER, w.CALL, ":1.1", "M", 10, serial=4711)
        answers = []

        def refused() -> bool:
            answers.extend(frame for _, frame in engine.take(SENDER))
            return any((each.kind, each.reply_serial) == (REFUSED, 4711) for each in answers)

        engine.until(refused, "its call is refused, since it has used up its share")
        assert engine.left is None


def test_signals_of_its_own_user_unread_end_a_client(small: Context) -> None:
    with alone(small, [SENDER], RULE) as engine:
        broadcast(engine)
        with pytest.raises(AssertionError, match="does not read its signals"):
            engine.until(lambda: False, "")
