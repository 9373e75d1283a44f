"""What the kernel says of clients."""

from __future__ import annotations

import os
import socket

import pytest

from kbusd.supervisor.clients import credentials_of


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
