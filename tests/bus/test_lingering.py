"""What a client leaves unread is closed by the bus: descriptors among it may take a day to be closed."""

from __future__ import annotations

import os
import socket
from contextlib import suppress

import pytest

from kbusd.supervisor.supervisor import NOT_AUTHENTICATED

from .daemon import Bus
from .lingering import lingering
from .procs import eventually, stopped
from .rawclient import Disconnected


def leaves_one(client: socket.socket) -> socket.socket:
    """It sends what nobody has but the bus then; returns what ends the wait."""
    slow, other = lingering()
    socket.send_fds(client, [b"\0"], [slow.fileno()])
    os.close(slow.detach())
    return other


def connected(bus: Bus) -> socket.socket:
    client = socket.socket(socket.AF_UNIX)
    client.connect(str(bus.socket))
    return client


def test_a_client_that_hangs_up_stopped_the_bus_by_what_it_left_behind() -> None:
    bus = Bus()
    try:
        with stopped(bus.pid), connected(bus) as client:
            other = leaves_one(client)
        bus.connect()
        other.close()
    finally:
        bus.stop()


def test_a_client_that_is_refused_stopped_the_bus_by_what_it_had_sent() -> None:
    bus = Bus(limits={"max_connections_per_user": 2})
    clients = []
    try:
        with stopped(bus.pid):
            clients = [connected(bus) for _ in range(2 + NOT_AUTHENTICATED)]
            refused = connected(bus)
            other = leaves_one(refused)
        with pytest.raises(ConnectionResetError):
            refused.recv(1)
        for each in clients:
            each.close()

        def comes_in() -> bool:
            with suppress(Disconnected, ConnectionError):  # those who left still count
                bus.connect()
                return True
            return False

        eventually(comes_in, "the supervisor goes on")
        other.close()
    finally:
        bus.stop()
