"""The queue against a list, and the order of kdbus's own test-message.c."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kbusd.kdbus.queue import Queue
from tests.unit.kdbus.refused import refused

PRIORITIES = st.integers(-3, 3)
STEPS = st.lists(
    st.tuples(st.just("push"), PRIORITIES)
    | st.tuples(st.just("take"), PRIORITIES)
    | st.tuples(st.just("first"), st.just(0)),
    max_size=60,
)


@given(STEPS)
def test_against_a_list(steps: list[tuple[str, int]]) -> None:
    queue: Queue[int] = Queue()
    model: list[tuple[int, int]] = []  # (priority, message), in order of arrival
    for number, (what, priority) in enumerate(steps):
        if what == "push":
            queue.push(number, priority)
            model.append((priority, number))
            continue
        candidates = model if what == "first" else [each for each in model if each[0] <= priority]
        if not candidates:
            with refused("EAGAIN"):
                queue.peek(None if what == "first" else priority)
            continue
        best = candidates[0] if what == "first" else min(candidates)
        ticket, message = queue.peek(None if what == "first" else priority)
        assert message == best[1]
        assert queue.remove(ticket) == message
        model.remove(best)
        assert len(queue) == len(model)
        assert [message for _, message in queue] == [message for _, message in model]


def test_priorities_as_the_self_test_has_them() -> None:
    queue: Queue[int] = Queue()
    for priority in (25, -600, 10, -35, -100, 20, -15, -800, -150, 10, -800, -10):
        queue.push(priority, priority)

    def receive(priority: int) -> int:
        return queue.remove(queue.peek(priority)[0])

    assert [receive(-200), receive(-100), receive(-400)] == [-800, -800, -600]
    with refused("EAGAIN"):
        receive(-400)
    assert [receive(10), receive(10)] == [-150, -100]
    assert queue.peek()[1] == 25


def test_losses_are_told_once() -> None:
    queue: Queue[str] = Queue()
    assert not queue.readable
    queue.lose()
    queue.lose()
    assert queue.readable
    assert (queue.take_lost(), queue.take_lost()) == (2, 0)
    assert not queue.readable


def test_a_queue_read_in_order_forgets_priorities() -> None:
    queue: Queue[int] = Queue()
    for number in range(5000):
        queue.push(number, -number)
        queue.remove(queue.peek()[0])
    assert len(queue._urgent) < 100
