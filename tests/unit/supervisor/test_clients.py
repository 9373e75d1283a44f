"""What the kernel says of clients."""

from __future__ import annotations

import os
import socket

import pytest

from kbusd.rings.entries import Credentials
from kbusd.supervisor.clients import MAX_GROUPS, Clients, credentials_of


def test_who_is_at_the_other_end() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        found = credentials_of(ours)
    assert (found.uid, found.gid, found.pid) == (os.geteuid(), os.getegid(), os.getpid())
    assert set(found.groups) == set(os.getgroups())


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can change its groups")
@pytest.mark.parametrize("count", [0, 3, 256, 257, 65536])
def test_supplementary_groups(count: int) -> None:
    """As many as the kernel allows: a rule for one of them must not be missed."""
    before = os.getgroups()
    os.setgroups(range(1000, 1000 + count))
    try:
        ours, theirs = socket.socketpair()
    finally:
        os.setgroups(before)
    with ours, theirs:
        assert credentials_of(ours).groups == tuple(range(1000, 1000 + count))


class Waiting:
    """Clients with both ends of their sockets, told apart by their pid."""

    def __init__(self) -> None:
        self.clients = Clients()
        self.ends: dict[int, socket.socket] = {}

    def add(self, uid: int, *pids: int) -> None:
        for pid in pids:
            self.ends[pid], ours = socket.socketpair()
            self.clients.add(Credentials(uid, uid, pid), ours)

    def take(self, *barred: int) -> int | None:
        """The pid of the next one, if it is none of the barred uids'."""
        turn = self.clients.next(lambda uid: uid not in barred)
        if turn is None:
            return None
        turn[1].close()
        return turn[0].pid

    def take_all(self, *barred: int) -> list[int]:
        return list(iter(lambda: self.take(*barred), None))


def test_uids_take_turns() -> None:
    waiting = Waiting()
    waiting.add(1, 11, 12, 13, 14)
    assert waiting.take() == 11
    waiting.add(2, 21, 22)
    waiting.add(3, 31)
    assert waiting.take_all() == [12, 21, 31, 13, 22, 14]
    assert waiting.clients.waiting() == 0


def test_who_may_not_have_a_worker_keeps_its_place() -> None:
    waiting = Waiting()
    waiting.add(1, 11, 12)
    waiting.add(2, 21, 22)
    assert waiting.take_all(1) == [21, 22]
    assert waiting.clients.waiting() == 2
    assert waiting.take_all() == [11, 12]


def test_who_has_left_is_passed_over_and_not_counted_any_more() -> None:
    waiting = Waiting()
    waiting.add(1, 11, 12, 13)
    waiting.add(2, 21)
    waiting.ends[11].send(b"last words")
    for pid in (11, 12, 21):
        waiting.ends[pid].close()
    waiting.ends[13].shutdown(socket.SHUT_WR)  # has said all, but listens
    assert waiting.clients.of == {1: 3, 2: 1}
    assert waiting.take_all() == [13]
    assert waiting.clients.of == {1: 1, 2: 0}


def test_an_endpoint_of_a_user_takes_turns_with_him() -> None:
    """What he has locked up does not keep him waiting, nor use up what he may have."""
    clients = Clients()
    ends = []
    for pid, endpoint in ((1, "app"), (2, "app"), (3, ""), (4, "other")):
        there, ours = socket.socketpair()
        ends.append(there)
        clients.add(Credentials(1, 1, pid, endpoint=endpoint), ours)
    assert clients.of == {(1, "app"): 2, 1: 1, (1, "other"): 1}
    order = []
    while turn := clients.next(lambda _: True):
        order.append(turn[0].pid)
        assert isinstance(turn[1], socket.socket)
        turn[1].close()
    assert order == [1, 3, 4, 2]
    for end in ends:
        end.close()


def test_who_is_in_more_groups_than_can_be_passed_on_is_refused() -> None:
    """By a socket or by a file of a device alike; /proc's list of that many is cut short in a number."""
    clients = Clients()
    many = tuple(range(100_000, 100_000 + MAX_GROUPS))
    assert not clients.refusal(Credentials(1, 1, 1, many), 1)
    assert "groups" in clients.refusal(Credentials(1, 1, 1, (*many, 10)), 1)
