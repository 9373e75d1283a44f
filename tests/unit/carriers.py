"""Carriers as the broker makes them: sockets by which large bodies come, and no descriptors."""

from __future__ import annotations

import socket

from kbusd.sandbox.constants import ARGUMENTS

SO_PASSRIGHTS = ARGUMENTS["SO_PASSRIGHTS"]


def pair(guarded: bool = True) -> tuple[socket.socket, socket.socket]:
    """A carrier's two ends; `guarded`: the kernel keeps descriptors out, if it can."""
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    for end in ends if guarded and refuses_descriptors() else ():
        end.setsockopt(socket.SOL_SOCKET, SO_PASSRIGHTS, 0)
    return ends


def refuses_descriptors() -> bool:
    """Whether the kernel can keep descriptors out of a socket: Linux 6.16."""
    one, other = socket.socketpair()
    with one, other:
        try:
            one.setsockopt(socket.SOL_SOCKET, SO_PASSRIGHTS, 0)
        except OSError:
            return False
    return True
