"""The second front end: a client that has opened a file of kdbusfs.

Speaks to it by way of the supervisor, which passes on the ioctls of its file. So far it knows no command.
"""

from __future__ import annotations

import errno
import select
import socket

from kbusd.cuse import replies, requests
from kbusd.rings import entries
from kbusd.rings.line import Line
from kbusd.workers.context import Context
from kbusd.workers.dbus_socket import Engine


def serve(
    context: Context, engine: Engine, device: entries.Device, sock: socket.socket, broker: Line
) -> None:
    """Answer until the file is closed."""
    line = Line(sock, entries.ToDeviceWorker)
    poller = select.epoll(flags=select.EPOLL_CLOEXEC)
    with poller:
        poller.register(sock.fileno(), select.EPOLLIN)
        while True:
            poller.poll()
            try:
                while (received := line.receive()) is not None:
                    asked = requests.decode(received[0].request)
                    if not isinstance(asked.body, requests.Interrupt):
                        reply = replies.ioctl(asked.header.unique, -errno.ENOTTY)
                        line.send(entries.Answered(reply))
            except EOFError:
                return
