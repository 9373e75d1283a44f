"""The registry against dbus-daemon itself: the same requests, the same answers and queues."""

from __future__ import annotations

import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from jeepney import DBusAddress, Message, MessageType, new_method_call
from jeepney.io.blocking import DBusConnection, open_dbus_connection

from kbusd.broker.connection import Connection
from kbusd.broker.registry import Registry

DRIVER = DBusAddress("/org/freedesktop/DBus", "org.freedesktop.DBus", "org.freedesktop.DBus")
CONFIGURATION = """<busconfig><type>session</type><listen>unix:dir={directory}</listen>
<policy context="default"><allow send_destination="*" eavesdrop="true"/>
<allow eavesdrop="true"/><allow own="*"/></policy></busconfig>"""

pytestmark = pytest.mark.skipif(
    shutil.which("dbus-daemon") is None, reason="dbus-daemon is not installed"
)


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    file = tmp_path / "bus.conf"
    file.write_text(CONFIGURATION.format(directory=tmp_path))
    with subprocess.Popen(
        ["dbus-daemon", f"--config-file={file}", "--nofork", "--print-address=1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.terminate()


def ask(connection: DBusConnection, message: Message) -> object:
    reply = connection.send_and_get_reply(message)
    return reply.body[0] if reply.header.message_type is MessageType.method_return else None


def test_same_codes_and_queues_as_dbus_daemon(address: str) -> None:
    chance = random.Random(1)
    clients = [open_dbus_connection(address) for _ in range(4)]
    registry = Registry()
    ours = [Connection(n, 0) for n in range(len(clients))]
    for each, client in zip(ours, clients, strict=True):
        each.id = int(client.unique_name.removeprefix(":1."))
    names = ["a.b", "c.d"]
    for _ in range(1500):
        who, name = chance.randrange(4), chance.choice(names)
        if chance.random() < 0.8:
            flags = chance.randrange(8)
            call = new_method_call(DRIVER, "RequestName", "su", (name, flags))
            code, _ = registry.request(ours[who], name, flags)
        else:
            call = new_method_call(DRIVER, "ReleaseName", "s", (name,))
            code, _ = registry.release(ours[who], name)
        assert ask(clients[who], call) == code
        queue = ask(clients[0], new_method_call(DRIVER, "ListQueuedOwners", "s", (name,)))
        assert [each.unique_name for each in registry.waiters(name)] == (queue or [])
    for client in clients:
        client.close()
