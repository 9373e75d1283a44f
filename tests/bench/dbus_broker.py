"""Starts dbus-broker without systemd: a controller that hands it one listening socket.

dbus-broker opens no socket and reads no configuration by itself; its launcher does, and tells it
over a socketpair on which both speak D-Bus (`--controller FD`; we are the client of its SASL
server, there is no Hello). One call is needed: `AddListener(o path, h socket, v policy)` of
`org.bus1.DBus.Broker` on `/org/bus1/DBus/Broker`. The policy given here allows everything, and
the limits are far above what the benchmark needs. Nothing is ever activated.

    python tests/bench/dbus_broker.py SOCKET      runs one in the foreground until SIGTERM or ^C
"""

from __future__ import annotations

import array
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from jeepney import DBusAddress, HeaderFields, MessageType, new_method_call
from jeepney.low_level import Parser

INTERFACE = "org.bus1.DBus.Broker"
CONTROLLER = DBusAddress("/org/bus1/DBus/Broker", INTERFACE, INTERFACE)
ANY_UID = 0xFFFFFFFF
MOST = 2**64 - 1
PRIORITY = 1
# Of dbus-broker 33. A batch is: may connect (verdict, priority); rules for owning (verdict,
# priority, is a prefix, name); for sending and receiving (verdict, priority, name, path,
# interface, member, message type, broadcast, fewest fds, most fds).
_TRANSMISSION = "a(btssssuutt)"
_BATCH = f"bta(btbs){_TRANSMISSION}{_TRANSMISSION}"
# Batches by uid, by range of gids; SELinux contexts by name; AppArmor; the bus's type.
POLICY_SIGNATURE = f"(a(u({_BATCH}))a(buu({_BATCH}))a(ss)bs)"


def allow_everything() -> tuple[str, object]:
    """The policy variant: one batch for every uid, with one rule of each kind that allows."""
    anything = (True, PRIORITY, "", "", "", "", 0, 0, 0, MOST)
    batch = (True, PRIORITY, [(True, PRIORITY, True, "")], [anything], [anything])
    return POLICY_SIGNATURE, ([(ANY_UID, batch)], [], [], False, "session")


class DbusBroker:
    """A running dbus-broker that listens on `path`; it ends when the controller's line closes."""

    def __init__(self, path: Path) -> None:
        """Raises `OSError` or `RuntimeError` when it can't be started or refuses the listener."""
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        self._listener.bind(str(path))
        self._listener.listen(4096)
        self._line, theirs = socket.socketpair()
        self._line.settimeout(10)
        self.process = subprocess.Popen(
            [
                "dbus-broker",
                f"--controller={theirs.fileno()}",
                f"--machine-id={machine_id()}",
                f"--max-bytes={2**32 - 1}",  # 32 bits, or it is cut to them
                f"--max-fds={2**20}",
                f"--max-matches={2**20}",
                f"--max-objects={2**20}",
            ],
            pass_fds=[theirs.fileno()],
        )
        theirs.close()
        try:
            self._authenticate()
            self._add_listener()
        except BaseException:
            self.stop()
            raise

    def _authenticate(self) -> None:
        self._line.sendall(b"\0AUTH EXTERNAL\r\nDATA\r\nNEGOTIATE_UNIX_FD\r\nBEGIN\r\n")
        answer = b""
        while answer.count(b"\n") < 3:
            piece = self._line.recv(4096)
            if not piece:
                raise RuntimeError(f"dbus-broker closed its controller line after {answer!r}")
            answer += piece
        if b"OK " not in answer or b"AGREE_UNIX_FD" not in answer:
            raise RuntimeError(f"dbus-broker did not authenticate its controller: {answer!r}")

    def _add_listener(self) -> None:
        call = new_method_call(
            CONTROLLER,
            "AddListener",
            "ohv",
            ("/org/bus1/DBus/Listener/0", self._listener, allow_everything()),
        )
        del call.header.fields[HeaderFields.destination]  # the line has one other end
        fds = array.array("i")
        data = call.serialise(serial=1, fds=fds)
        self._line.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
        parser = Parser()
        while True:
            piece = self._line.recv(4096)
            if not piece:
                raise RuntimeError("dbus-broker ended when it was given its listener")
            parser.add_data(piece)
            while (message := parser.get_next_message()) is not None:
                if message.header.message_type is MessageType.error:
                    raise RuntimeError(f"dbus-broker refused its listener: {message.body}")
                if message.header.message_type is MessageType.method_return:
                    return

    def stop(self) -> None:
        """Ends the process and waits for it."""
        self._line.close()
        self._listener.close()
        self.process.terminate()
        self.process.wait()


def machine_id() -> str:
    """32 hexadecimal digits; where the machine has none, any will do."""
    for file in ("/etc/machine-id", "/var/lib/dbus/machine-id"):
        with suppress(OSError):
            text = Path(file).read_text().strip()
            if len(text) == 32:
                return text
    return "0" * 31 + "1"


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: dbus_broker.py SOCKET")
    path = Path(sys.argv[1])
    broker = DbusBroker(path)
    print(f"unix:path={path}", flush=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        broker.process.wait()
    except KeyboardInterrupt:
        pass
    finally:
        broker.stop()
        path.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
