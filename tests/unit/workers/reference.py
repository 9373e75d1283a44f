"""The real dbus-daemon as a yardstick: starts a private one and speaks raw D-Bus to it.

Used by the differential tests of the driver; trusts nothing of kbusd, and uses jeepney's
low-level codec only, so that a mistake of ours cannot hide itself.
"""

from __future__ import annotations

import os
import socket
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from jeepney.low_level import (  # type: ignore[import-untyped]
    Endianness,
    Header,
    HeaderFields,
    Message,
    MessageFlag,
    MessageType,
    Parser,
)

CONFIGURATION = """<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <type>{kind}</type>
  <listen>unix:path={path}</listen>
  <auth>EXTERNAL</auth>{helper}
  <servicedir>{services}</servicedir>
  <policy context="default">
    <allow user="*"/>
    <allow send_destination="*"/>
    <allow receive_type="method_call"/>
    <allow receive_type="method_return"/>
    <allow receive_type="error"/>
    <allow receive_type="signal"/>
    <allow own="*"/>
    <deny own="com.example.Forbidden"/>
  </policy>
</busconfig>
"""
HELPER = "<servicehelper>/usr/lib/dbus-1.0/dbus-daemon-launch-helper</servicehelper>"


class Seen(NamedTuple):
    """One message as the client saw it, without the parts that differ from run to run."""

    kind: str
    member: str
    reply_serial: int | None
    signature: str
    body: tuple[Any, ...]
    destination: str | None

    @classmethod
    def of(cls, message: Message) -> Seen:
        fields = message.header.fields
        return cls(
            message.header.message_type.name,
            fields.get(HeaderFields.member) or fields.get(HeaderFields.error_name) or "",
            fields.get(HeaderFields.reply_serial),
            fields.get(HeaderFields.signature, ""),
            tuple(message.body),
            fields.get(HeaderFields.destination),
        )


class Client:
    """A connection that has authenticated and said nothing else yet."""

    def __init__(self, path: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(10)
        self.socket.connect(path)
        uid = str(os.geteuid()).encode().hex().encode()
        self.socket.sendall(b"\0AUTH EXTERNAL " + uid + b"\r\nBEGIN\r\n")
        line = b""
        while not line.endswith(b"\r\n"):
            line += self.socket.recv(1)
        assert line.startswith(b"OK "), line
        self.parser = Parser()
        self.serial = 0

    def close(self) -> None:
        self.socket.close()

    def send(
        self,
        member: str,
        signature: str = "",
        body: tuple[Any, ...] = (),
        *,
        path: str = "/org/freedesktop/DBus",
        interface: str | None = "org.freedesktop.DBus",
        destination: str | None = "org.freedesktop.DBus",
        flags: int = 0,
        message_type: MessageType = MessageType.method_call,
    ) -> int:
        """Send one message and return its serial."""
        self.serial += 1
        fields: dict[HeaderFields, Any] = {HeaderFields.path: path, HeaderFields.member: member}
        if interface is not None:
            fields[HeaderFields.interface] = interface
        if destination is not None:
            fields[HeaderFields.destination] = destination
        if signature:
            fields[HeaderFields.signature] = signature
        header = Header(
            Endianness.little, message_type, MessageFlag(flags), 1, 0, self.serial, fields
        )
        self.socket.sendall(Message(header, body).serialise())
        return self.serial

    def receive(self) -> Message | None:
        """The next message, or None at the end of the connection."""
        while True:
            message = self.parser.get_next_message()
            if message is not None:
                return message
            try:
                data = self.socket.recv(65536)
            except ConnectionResetError:
                return None
            if not data:
                return None
            self.parser.add_data(data)

    def until_reply(self, serial: int) -> list[Seen]:
        """All messages up to the reply to `serial`, that included (or the end)."""
        seen: list[Seen] = []
        while (message := self.receive()) is not None:
            seen.append(Seen.of(message))
            if seen[-1].reply_serial == serial:
                break
        return seen

    def call(self, member: str, *args: Any, **kwargs: Any) -> Seen:
        """Call the driver and return the reply, whatever came before it."""
        return self.until_reply(self.send(member, *args, **kwargs))[-1]


class ReferenceBus:
    """A private dbus-daemon; `address` is the path of its socket."""

    def __init__(self, kind: str = "session") -> None:
        self.directory = tempfile.TemporaryDirectory()
        root = Path(self.directory.name)
        self.path = str(root / "bus")
        services = root / "services"
        services.mkdir()
        for name in ("com.example.Activatable", "com.example.Failing"):
            (services / f"{name}.service").write_text(
                f"[D-BUS Service]\nName={name}\nExec=/bin/false\nUser=root\n"
            )
        configuration = root / "bus.conf"
        self.configuration = str(configuration)
        configuration.write_text(
            CONFIGURATION.format(
                kind=kind,
                path=self.path,
                services=services,
                helper=HELPER if kind == "system" else "",
            )
        )
        self.process = subprocess.Popen(
            [
                "dbus-daemon",
                "--nofork",
                "--nopidfile",
                "--print-address=1",
                f"--config-file={configuration}",
            ],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.address = self.process.stdout.readline().strip()
        self.guid = self.address.partition("guid=")[2]

    def connect(self) -> Client:
        return Client(self.path)

    def close(self) -> None:
        self.process.terminate()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()
        self.directory.cleanup()
