"""A service to be activated: `python echo.py NAME [MODE]`, run with the repository as its PYTHONPATH.

Owns NAME on the bus at DBUS_STARTER_ADDRESS and answers every call with its arguments; `Environment`
with its environment, `Quit` by ending. MODE `slow` waits for a byte on the fifo named by
KBUSD_TEST_GATE before it takes the name; `fail` ends with status 3; `no-name` connects, never takes
the name and ends.
"""

from __future__ import annotations

import os
import sys

from tests.bus import wireformat as w
from tests.bus.rawclient import Disconnected, RawClient


def main(name: str, mode: str = "") -> int:
    """Serve until the bus ends, at whatever moment it does."""
    try:
        return serve(name, mode)
    except (Disconnected, ConnectionError):
        return 0


def serve(name: str, mode: str) -> int:
    if mode == "fail":
        return 3
    client = RawClient(os.environ["DBUS_STARTER_ADDRESS"])
    if mode == "no-name":
        return 0
    if mode == "slow":
        with open(os.environ["KBUSD_TEST_GATE"], "rb") as gate:
            gate.read(1)
    if client.request_name(name, 4) != 1:
        return 4
    while True:
        message = client.read(timeout=100.0)
        if message.type != w.CALL:
            continue
        if message.member == "Environment":
            client.reply(message, "a{ss}", (dict(os.environ),))
        elif message.member == "Quit":
            client.reply(message)
            return 0
        elif not message.flags & w.NO_REPLY_EXPECTED:
            fields = {w.REPLY_SERIAL: message.serial, w.DESTINATION: message.sender}
            if message.signature:
                fields[w.SIGNATURE] = message.signature
            client.send(w.RETURN, fields, body=message.body, endian=message.endian)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
