"""`make demo`: a private bus, real programs on it, and every process with its confinement.

Starts kbusd, connects a service, three subscribers and clients (dbus-send, gdbus, dbus-fast), has
them call, answer, signal and pass a descriptor, prints what each saw, then what the kernel says
of every process of the bus. Exits 0 only if everybody saw what he should.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from dbus_fast import Message, MessageType
from dbus_fast.aio import MessageBus
from dbus_fast.service import ServiceInterface, dbus_method, dbus_signal

BIN = Path(sys.executable).parent
NAME, PATH, INTERFACE = "org.example.Demo", "/org/example/Demo", "org.example.Demo"
CONFIGURATION = """<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig><type>session</type><listen>unix:path={path}</listen><auth>EXTERNAL</auth>
<policy context="default"><allow send_destination="*" eavesdrop="true"/><allow eavesdrop="true"/>
<allow own="*"/></policy></busconfig>
"""


class Demo(ServiceInterface):
    """The service: greets, reads from a descriptor, tells the news."""

    def __init__(self) -> None:
        super().__init__(INTERFACE)

    @dbus_method()
    def Greet(self, who: "s") -> "s":  # type: ignore[name-defined]
        return f"Hello, {who}!"

    @dbus_method()
    def Read(self, fd: "h") -> "s":  # type: ignore[name-defined]
        with open(fd) as file:
            return file.read()

    @dbus_signal()
    def News(self) -> "s":  # type: ignore[name-defined]
        return "a signal, written once, for all"


def start_bus(directory: str) -> tuple[subprocess.Popen[str], str]:
    config = Path(directory, "bus.conf")
    config.write_text(CONFIGURATION.format(path=f"{directory}/socket"))
    bus = subprocess.Popen(
        [BIN / "kbusd", "--nofork", "--print-address=1", f"--config-file={config}"],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert bus.stdout is not None
    address = bus.stdout.readline().strip()
    if not address:
        raise SystemExit(f"the bus did not start: exit status {bus.wait()}")
    return bus, address


def see(who: str, what: object, wanted: object) -> None:
    ok = what == wanted
    print(f"  {who:<28} {what!r}{'' if ok else f'   WRONG, wanted {wanted!r}'}")
    if not ok:
        raise SystemExit(1)


async def run(command: list[str], address: str) -> str:
    process = await asyncio.create_subprocess_exec(
        *command,
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "DBUS_SESSION_BUS_ADDRESS": address},
    )
    out, _ = await process.communicate()
    return out.decode().strip()


def note_news(future: asyncio.Future[str]) -> Callable[[Message], None]:
    def note(message: Message) -> None:
        if message.message_type is MessageType.SIGNAL and message.member == "News":
            future.set_result(message.body[0])

    return note


async def show(address: str) -> list[MessageBus]:
    service = await MessageBus(address, negotiate_unix_fd=True).connect()
    demo = Demo()
    service.export(PATH, demo)
    await service.request_name(NAME)
    print(f"a service owns {NAME}; it is {service.unique_name}")

    print("calls and replies:")
    reply = await run(
        [
            "dbus-send",
            "--session",
            "--print-reply=literal",
            f"--dest={NAME}",
            PATH,
            f"{INTERFACE}.Greet",
            "string:dbus-send",
        ],
        address,
    )
    see("dbus-send saw", reply, "Hello, dbus-send!")
    reply = await run(
        ["gdbus", "call", "--session", "-d", NAME, "-o", PATH, "-m", f"{INTERFACE}.Greet", "gdbus"],
        address,
    )
    see("gdbus saw", reply, "('Hello, gdbus!',)")
    client = await MessageBus(address, negotiate_unix_fd=True).connect()
    answer = await client.call(
        Message(NAME, PATH, INTERFACE, "Greet", signature="s", body=["dbus-fast"])
    )
    assert answer is not None
    see("dbus-fast saw", answer.body, ["Hello, dbus-fast!"])

    print("a signal to several subscribers:")
    subscribers = [await MessageBus(address).connect() for _ in range(3)]
    seen = [asyncio.get_running_loop().create_future() for _ in subscribers]
    for subscriber, future in zip(subscribers, seen, strict=True):
        await subscriber.call(
            Message(
                "org.freedesktop.DBus",
                "/org/freedesktop/DBus",
                "org.freedesktop.DBus",
                "AddMatch",
                signature="s",
                body=[f"type='signal',interface='{INTERFACE}'"],
            )
        )

        subscriber.add_message_handler(note_news(future))
    demo.News()
    for subscriber, future in zip(subscribers, seen, strict=True):
        news = await asyncio.wait_for(future, 5)
        see(f"subscriber {subscriber.unique_name} saw", news, "a signal, written once, for all")

    print("a file descriptor:")
    reader, writer = os.pipe()
    os.write(writer, b"words from a pipe")
    os.close(writer)
    answer = await client.call(
        Message(NAME, PATH, INTERFACE, "Read", signature="h", body=[0], unix_fds=[reader])
    )
    assert answer is not None
    see("the service read from it", answer.body, ["words from a pipe"])
    os.close(reader)
    return [service, client, *subscribers]


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="kbusd-demo-") as directory:
        bus, address = start_bus(directory)
        print(f"kbusd runs as pid {bus.pid} at {address}")
        try:
            connections = asyncio.run(show_and_table(address, bus.pid))
        finally:
            bus.send_signal(signal.SIGTERM)
            status = bus.wait(10)
        print(f"the bus ended with status {status}; {connections} clients were connected")
        return status


async def show_and_table(address: str, pid: int) -> int:
    connections = await show(address)
    print("every process of the bus, as the kernel describes it:", flush=True)
    table = await asyncio.create_subprocess_exec(BIN / "kbusctl", "workers", "--pid", str(pid))
    if await table.wait() != 0:
        raise SystemExit("a process is not confined as its profile says")
    for connection in connections:
        connection.disconnect()
    return len(connections)


if __name__ == "__main__":
    sys.exit(main())
