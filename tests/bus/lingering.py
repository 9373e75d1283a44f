"""A socket that close(2) waits for."""

from __future__ import annotations

import socket
import struct
from contextlib import suppress


def lingering() -> tuple[socket.socket, socket.socket]:
    """Whoever closes it last waits a day; or till the other one is closed."""
    server = socket.create_server(("127.0.0.1", 0))
    slow = socket.create_connection(server.getsockname())
    other, _ = server.accept()
    server.close()
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 86_400))
    slow.setblocking(False)
    with suppress(BlockingIOError):
        while True:
            slow.send(bytes(1 << 20))
    return slow, other
