"""What tests run in a container, as a program: prints what it saw, as JSON or a word."""

from __future__ import annotations

import errno
import json
import os
import sys
from pathlib import Path
from typing import Any

from kbusd.kdbus import abi
from tests.bus.rawclient import RawClient, RawSocket
from tests.kdbusfs.kclient import KdbusClient
from tests.kdbusfs.test_buses import Maker
from tests.kdbusfs.test_clients import answer, text


def both(address: str, node: str) -> Any:
    """A D-Bus client calls a kdbus client by its name."""
    with KdbusClient(node, recv=abi.ATTACH_CREDS) as server:
        server.acquire("com.example.Box")
        client = RawClient(address)
        serial = client.send_call("com.example.Box", "/test", "com.example.Test", "Ping")
        asked = server.recv()
        server.send(asked.src, answer(asked, "s", text("pong")), reply=asked.cookie)
        (said,) = client.wait_reply(serial).args
        client.close()
        creds = asked.item(abi.ITEM_CREDS) or b""
        return {"called": said, "uid": int.from_bytes(creds[:4], sys.byteorder)}


def make(root: str, name: str) -> Any:
    """Make a bus, and send a message on it."""
    with Maker(Path(root)).make(name):
        node = f"{root}/{name}/bus"
        with KdbusClient(node) as one, KdbusClient(node) as two:
            one.send(two.id, b"hello")
            names = sorted(each for each in os.listdir(root) if each.endswith("-mine"))
            return {"payload": two.recv().payload.decode(), "names": names}


def claim(address: str, identity: str) -> Any:
    """What comes of a claimed identity (hexadecimal), and who the bus says that this is."""
    raw = RawSocket(address)
    raw.write(b"\0")
    answer = raw.line(b"AUTH EXTERNAL " + identity.encode()).split()[0].decode()
    raw.close()
    if answer != "OK":
        return {"answer": answer}
    client = RawClient(address)
    (uid,) = client.driver("GetConnectionUnixUser", "s", [client.name])
    client.close()
    return {"answer": answer, "uid": uid}


def try_open(node: str) -> Any:
    """The errno of it."""
    try:
        os.close(os.open(node, os.O_RDWR))
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return "opened"


if __name__ == "__main__":
    do = {"both": both, "claim": claim, "make": make, "open": try_open}[sys.argv[1]]
    outcome = do(*sys.argv[2:])
    print(outcome if isinstance(outcome, str) else json.dumps(outcome))
