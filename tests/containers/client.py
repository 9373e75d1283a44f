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
from tests.kdbusfs.kclient import KdbusClient, Message
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
        return {"called": said, "uid": uid_of(asked)}


def make(root: str, name: str) -> Any:
    """Make a bus, and send a message on it: who does receivers say that we are, and whose is the node?"""
    try:
        maker = Maker(Path(root)).make(name)
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    with maker:
        node = f"{root}/{name}/bus"
        with KdbusClient(node) as one, KdbusClient(node, recv=abi.ATTACH_CREDS) as two:
            one.send(two.id, b"hello")
            message = two.recv()
            return {
                "payload": message.payload.decode(),
                "names": sorted(each for each in os.listdir(root) if each.endswith("-mine")),
                "uid": uid_of(message),
                "owner": os.stat(node).st_uid,
            }


def uid_of(message: Message) -> int:
    """Its sender's."""
    return int.from_bytes((message.item(abi.ITEM_CREDS) or b"")[:4], sys.byteorder)


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
    print(json.dumps(outcome))
