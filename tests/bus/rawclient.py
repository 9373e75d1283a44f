"""A D-Bus client of our own on a plain socket, for tests that must see or send exact bytes.

Blocking, one thread, no event loop: a test says what it sends and what it waits for. Every wait
has a deadline and fails by an exception, never by hanging. Trusts nothing of kbusd's own code.
Uses the standard library only (activated test services import it).
"""

from __future__ import annotations

import array
import itertools
import os
import socket
import time
from collections.abc import Callable
from typing import Any

from . import wireformat as w
from .wireformat import Message

TIMEOUT = float(os.environ.get("KBUSD_TEST_TIMEOUT", "20"))
DRIVER = "org.freedesktop.DBus"
DRIVER_PATH = "/org/freedesktop/DBus"
_markers = itertools.count(1)


class Disconnected(Exception):
    """The bus closed the connection."""


class BusError(Exception):
    """A call was answered by an error."""

    def __init__(self, message: Message) -> None:
        self.name = message.error_name or ""
        self.text = message.args[0] if message.signature.startswith("s") else ""
        self.message = message
        super().__init__(f"{self.name}: {self.text}")


def socket_address(address: str) -> str:
    """What to give to connect() for an address line such as `unix:path=/x,guid=...`."""
    for one in address.split(";"):
        transport, _, rest = one.partition(":")
        pairs = dict(pair.split("=", 1) for pair in rest.split(","))
        if transport == "unix" and "path" in pairs:
            return pairs["path"]
        if transport == "unix" and "abstract" in pairs:
            return "\0" + pairs["abstract"]
    raise ValueError(f"no address of ours in {address!r}")


class RawSocket:
    """Bytes to and from the bus, before and after authentication."""

    def __init__(self, address: str) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self.sock.settimeout(TIMEOUT)
        self.sock.connect(socket_address(address))
        self.buffer = bytearray()
        self.fds: list[int] = []

    def close(self) -> None:
        self.sock.close()
        for fd in self.fds:
            os.close(fd)
        self.fds.clear()

    def write(self, data: bytes, fds: list[int] | tuple[int, ...] = ()) -> None:
        """Send all bytes; the descriptors go with the first."""
        if fds:
            ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
            data = data[self.sock.sendmsg([data], ancillary) :]
        if data:
            self.sock.sendall(data)

    def fill(self, deadline: float | None = None) -> None:
        """Read once into the buffer; raises Disconnected or TimeoutError."""
        left = TIMEOUT if deadline is None else deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("nothing came from the bus in time")
        self.sock.settimeout(left)
        try:
            data, ancillary, flags, _ = self.sock.recvmsg(262144, socket.CMSG_SPACE(4 * 253))
        except ConnectionResetError as error:
            raise Disconnected from error
        finally:
            self.sock.settimeout(TIMEOUT)
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                received = array.array("i")
                received.frombytes(payload[: len(payload) - len(payload) % 4])
                self.fds += received
        assert not flags & socket.MSG_CTRUNC, "descriptors were lost"
        if not data:
            raise Disconnected
        self.buffer += data

    def read_line(self) -> bytes:
        """One SASL line without its CR LF."""
        deadline = time.monotonic() + TIMEOUT
        while b"\r\n" not in self.buffer:
            self.fill(deadline)
        line, _, rest = bytes(self.buffer).partition(b"\r\n")
        self.buffer[:] = rest
        return line

    def line(self, command: bytes) -> bytes:
        """Send one SASL command, return the answer."""
        self.write(command + b"\r\n")
        return self.read_line()

    def expect_disconnect(self) -> bytes:
        """Wait for the bus to close; returns what it said before that."""
        deadline = time.monotonic() + TIMEOUT
        try:
            while True:
                self.fill(deadline)
        except (Disconnected, BrokenPipeError):
            return bytes(self.buffer)


class RawClient(RawSocket):
    """An authenticated connection. `name` is its unique name once hello() was answered."""

    def __init__(
        self, address: str, *, fds: bool = True, hello: bool = True, anonymous: bool = False
    ) -> None:
        super().__init__(address)
        self.name = ""
        self.inbox: list[Message] = []
        self._serials = itertools.count(1)
        self.write(b"\0")
        uid = str(os.geteuid()).encode().hex().encode()
        answer = self.line(b"AUTH ANONYMOUS" if anonymous else b"AUTH EXTERNAL " + uid)
        assert answer.startswith(b"OK "), answer
        if fds:
            answer = self.line(b"NEGOTIATE_UNIX_FD")
            assert answer == b"AGREE_UNIX_FD", answer
        self.write(b"BEGIN\r\n")
        if hello:
            self.name = self.driver("Hello")[0]
            acquired = self.read()
            assert (acquired.member, acquired.args) == ("NameAcquired", [self.name])

    def serial(self) -> int:
        return next(self._serials)

    # -- sending -------------------------------------------------------------------------

    def send(
        self,
        type_: int,
        fields: dict[int, Any],
        signature: str = "",
        args: tuple[Any, ...] | list[Any] = (),
        *,
        fds: list[int] | tuple[int, ...] = (),
        serial: int | None = None,
        **options: Any,
    ) -> int:
        """Send one message; returns its serial. `options` as in wireformat.build."""
        number = self.serial() if serial is None else serial
        if fds and w.UNIX_FDS not in fields:
            fields = {**fields, w.UNIX_FDS: len(fds)}
        self.write(w.build(type_, fields, signature, args, serial=number, **options), fds)
        return number

    def send_call(
        self,
        destination: str | None,
        path: str,
        interface: str | None,
        member: str,
        signature: str = "",
        args: tuple[Any, ...] | list[Any] = (),
        **options: Any,
    ) -> int:
        fields: dict[int, Any] = {w.PATH: path, w.MEMBER: member}
        if interface is not None:
            fields[w.INTERFACE] = interface
        if destination is not None:
            fields[w.DESTINATION] = destination
        return self.send(w.CALL, fields, signature, args, **options)

    def signal(
        self,
        path: str,
        interface: str,
        member: str,
        signature: str = "",
        args: tuple[Any, ...] | list[Any] = (),
        *,
        to: str | None = None,
        **options: Any,
    ) -> int:
        fields: dict[int, Any] = {w.PATH: path, w.INTERFACE: interface, w.MEMBER: member}
        if to is not None:
            fields[w.DESTINATION] = to
        return self.send(w.SIGNAL, fields, signature, args, **options)

    def reply(
        self, call: Message, signature: str = "", args: tuple[Any, ...] = (), **options: Any
    ) -> int:
        fields = {w.REPLY_SERIAL: call.serial, w.DESTINATION: call.sender}
        return self.send(w.RETURN, fields, signature, args, **options)

    def reply_error(self, call: Message, name: str, text: str = "") -> int:
        fields = {w.REPLY_SERIAL: call.serial, w.DESTINATION: call.sender, w.ERROR_NAME: name}
        return self.send(w.ERROR, fields, "s", (text,))

    # -- receiving -----------------------------------------------------------------------

    def _next(self, deadline: float) -> Message:
        while len(self.buffer) < 16 or len(self.buffer) < w.total_length(bytes(self.buffer[:16])):
            self.fill(deadline)
        size = w.total_length(bytes(self.buffer[:16]))
        raw = bytes(self.buffer[:size])
        del self.buffer[:size]
        message = w.parse(raw)
        count = message.fields.get(w.UNIX_FDS, 0)
        assert len(self.fds) >= count, "fewer descriptors than announced"
        message.fds = self.fds[:count]
        del self.fds[:count]
        return message

    def read(self, timeout: float = TIMEOUT) -> Message:
        """The next message, in the order in which the bus sent them."""
        if self.inbox:
            return self.inbox.pop(0)
        return self._next(time.monotonic() + timeout)

    def wait(self, wanted: Callable[[Message], bool], timeout: float = TIMEOUT) -> Message:
        """The first message that is wanted; others stay for read(), in order."""
        for i, message in enumerate(self.inbox):
            if wanted(message):
                return self.inbox.pop(i)
        deadline = time.monotonic() + timeout
        while True:
            message = self._next(deadline)
            if wanted(message):
                return message
            self.inbox.append(message)

    def wait_reply(self, serial: int, timeout: float = TIMEOUT) -> Message:
        """The answer to our message `serial`; raises BusError if it is an error."""
        message = self.wait(lambda m: m.reply_serial == serial, timeout)
        if message.type == w.ERROR:
            raise BusError(message)
        return message

    def wait_call(self, member: str) -> Message:
        return self.wait(lambda m: m.type == w.CALL and m.member == member)

    def wait_signal(self, member: str) -> Message:
        return self.wait(lambda m: m.type == w.SIGNAL and m.member == member)

    def call(self, *args: Any, timeout: float = TIMEOUT, **options: Any) -> Message:
        """send_call and wait_reply in one."""
        return self.wait_reply(self.send_call(*args, **options), timeout)

    def driver(
        self,
        member: str,
        signature: str = "",
        args: tuple[Any, ...] | list[Any] = (),
        *,
        interface: str = DRIVER,
        path: str = DRIVER_PATH,
    ) -> list[Any]:
        """Call the bus driver; returns the arguments of its reply."""
        return self.call(DRIVER, path, interface, member, signature, args).args

    def add_match(self, rule: str) -> None:
        self.driver("AddMatch", "s", (rule,))

    def request_name(self, name: str, flags: int = 0) -> int:
        return int(self.driver("RequestName", "su", (name, flags))[0])

    # -- what did not come ---------------------------------------------------------------

    def mark(self, receiver: RawClient) -> str:
        """Send `receiver` a signal of its own; whatever we sent before it arrives before it."""
        member = f"Marker{next(_markers)}"
        self.signal("/marker", "test.Marker", member, to=receiver.name)
        return member

    def drain(self, sender: RawClient | None = None) -> list[Message]:
        """All messages that reach us before a marker that `sender` (or we) sends now."""
        member = (sender or self).mark(self)
        got = []
        while (message := self.read()).member != member:
            got.append(message)
        return got
