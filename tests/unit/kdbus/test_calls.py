"""Pending calls: who may answer, what a deadline and an interruption do."""

from __future__ import annotations

from kbusd.kdbus import abi
from kbusd.kdbus.calls import Call, Calls
from tests.unit.kdbus.refused import refused


def test_only_who_was_asked_may_answer_and_once() -> None:
    calls = Calls()
    calls.add(Call(callee=5, cookie=1, deadline=100, sync=False))
    with refused("EBADSLT"):
        calls.take(6, 1)
    with refused("EBADSLT"):
        calls.take(5, 2)
    assert calls.take(5, 1).deadline == 100
    with refused("EBADSLT"):
        calls.take(5, 1)


def test_of_equal_cookies_the_latest_is_answered() -> None:
    calls = Calls()
    for deadline in (1, 2):
        calls.add(Call(5, 1, deadline, sync=False))
    assert [calls.take(5, 1).deadline for _ in range(2)] == [2, 1]


def test_there_is_a_limit() -> None:
    calls = Calls()
    for cookie in range(abi.MAX_PENDING_REPLIES):
        calls.add(Call(5, cookie, 100, sync=False))
    with refused("EMLINK"):
        calls.add(Call(5, 999, 100, sync=False))
    calls.take(5, 3)
    calls.add(Call(5, 999, 100, sync=False))
    assert len(calls) == abi.MAX_PENDING_REPLIES


def test_deadlines() -> None:
    calls = Calls()
    assert calls.next_deadline() is None
    late, later, waiting = Call(5, 1, 10, False), Call(5, 2, 20, False), Call(5, 3, 5, True)
    for call in (late, later, waiting):
        calls.add(call)
    assert calls.next_deadline() == 10  # who waits in SEND looks after itself
    assert calls.expire(9) == []
    assert calls.expire(10) == [late]
    assert calls.next_deadline() == 20 and len(calls) == 2


def test_an_interrupted_call_goes_on_or_is_forgotten() -> None:
    calls = Calls()
    call = Call(5, 1, 10, sync=True)
    calls.add(call)
    assert calls.resume(1) is None  # it still waits: this is another call
    call.interrupted = True
    assert calls.resume(2) is None
    assert calls.resume(1) is call
    assert calls.resume(1) is None
    call.interrupted = True
    assert calls.next_deadline() == 10
    assert calls.expire(10) == []  # nobody is told
    assert len(calls) == 0
    calls.remove(call)


def test_who_is_gone_does_not_answer() -> None:
    calls = Calls()
    first, other, second = Call(5, 1, 10, False), Call(6, 2, 10, False), Call(5, 3, 10, True)
    for call in (first, other, second):
        calls.add(call)
    assert calls.drop(5) == [second, first]
    assert calls.drop(5) == []
    assert len(calls) == 1


def test_calls_go_where_their_name_goes() -> None:
    calls = Calls()
    calls.add(Call(6, 1, 10, False, name="a.b"))
    calls.add(Call(6, 2, 10, False, name="c.d"))
    calls.add(Call(6, 3, 10, False))
    calls.pass_on("a.b", 1, 7)
    calls.pass_on("a.b", 2, 7)
    assert calls.take(7, 1).name == "a.b"
    assert [calls.take(6, cookie).cookie for cookie in (2, 3)] == [2, 3]
