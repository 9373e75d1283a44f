"""What a bus does all day, by itself: for `kbusctl profile learn`, which watches its processes meanwhile.

Calls and replies, small and large; signals; file descriptors; names; refusals; clients that come and
go. A program of its own: `python -m kbusd.ctl.traffic SOCKET`.
"""

from __future__ import annotations

import os
import sys
import threading

from jeepney import (
    DBusAddress,
    HeaderFields,
    MessageType,
    message_bus,
    new_method_call,
    new_method_return,
    new_signal,
)
from jeepney.bus_messages import MatchRule
from jeepney.io.blocking import DBusConnection, prep_socket

_SERVICE = DBusAddress("/org/kbusd/Traffic", "org.kbusd.Traffic", "org.kbusd.Traffic")
_SECONDS = 60.0  # while somebody learns, each system call of a worker waits for him
_SIZES = (0, 8, 1_000, 5_000, 70_000, 1_000_000)
_CLIENTS = 6


def connect(path: str) -> DBusConnection:
    """A connection that takes descriptors, after its Hello. Raises OSError."""
    return DBusConnection(prep_socket(path, enable_fds=True, timeout=_SECONDS), enable_fds=True)


def _ask(connection: DBusConnection, method: str, signature: str = "", *body: object) -> None:
    """Of the driver; refusals are as good as answers."""
    message = new_method_call(message_bus, method, signature or None, body)
    connection.send_and_get_reply(message, timeout=_SECONDS)


def serve(connection: DBusConnection, ready: threading.Event) -> None:
    """Answers with what it was sent, descriptors too, and a signal first; until Quit is called."""
    _ask(connection, "RequestName", "su", _SERVICE.bus_name, 0)
    ready.set()
    while True:
        call = connection.receive(timeout=_SECONDS)
        if call.header.message_type is not MessageType.method_call:
            continue
        connection.send(new_signal(_SERVICE, "Called", "s", ("by somebody",)))
        signature = call.header.fields.get(HeaderFields.signature)
        connection.send(new_method_return(call, signature, call.body))
        if call.header.fields[HeaderFields.member] == "Quit":
            return


def use(path: str) -> None:
    """One client: subscribes, calls, passes descriptors, asks the driver, and goes."""
    with connect(path) as connection:
        rule = MatchRule(type="signal", interface=_SERVICE.interface, member="Called")
        _ask(connection, "AddMatch", "s", rule.serialise())
        with connection.filter(rule) as signals:
            for size in _SIZES:
                call = new_method_call(_SERVICE, "Echo", "ay", (bytes(size),))
                connection.send_and_get_reply(call, timeout=_SECONDS)
            connection.recv_until_filtered(signals, timeout=_SECONDS)
        with open(os.devnull, "rb") as file:
            call = new_method_call(_SERVICE, "Echo", "h", (file,))
            for given in connection.send_and_get_reply(call, timeout=_SECONDS).body:
                given.close()
        _ask(connection, "RequestName", "su", f"org.kbusd.Client{os.getpid()}", 0)
        _ask(connection, "ListNames")
        _ask(connection, "GetNameOwner", "s", "org.kbusd.Nobody")
        _ask(connection, "GetConnectionCredentials", "s", _SERVICE.bus_name)
        _ask(connection, "RemoveMatch", "s", rule.serialise())


def main() -> int:
    """All of it once."""
    path = sys.argv[1]
    ready = threading.Event()
    with connect(path) as service:
        thread = threading.Thread(target=serve, args=(service, ready), daemon=True)
        thread.start()
        ready.wait(_SECONDS)
        clients = [threading.Thread(target=use, args=(path,)) for _ in range(_CLIENTS)]
        for client in clients:
            client.start()
        for client in clients:
            client.join()
        with connect(path) as last:
            quits = new_method_call(_SERVICE, "Quit")
            last.send_and_get_reply(quits, timeout=_SECONDS)
        thread.join(_SECONDS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
