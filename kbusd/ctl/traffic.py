"""What a bus does all day, by itself: for `kbusctl profile learn`, which watches its processes meanwhile.

Calls and replies, small and large; signals; file descriptors; names; refusals; a monitor; a configuration that is
read again; clients that come and go, and one that is told to by nobody; the same by files of kdbus. A program of its own:
`python -m kbusd.ctl.traffic SOCKET [NODE]`.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time

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

from kbusd.client import kdbus

_SERVICE = DBusAddress("/org/kbusd/Traffic", "org.kbusd.Traffic", "org.kbusd.Traffic")
_SECONDS = 60.0  # while somebody learns, each system call of a worker waits for him
_SIZES = (0, 8, 1_000, 5_000, 70_000, 1_000_000)
_CLIENTS = 6
_BEGINNING, _PAUSE = 4096, 0.1
_MONITORING = DBusAddress(
    "/org/freedesktop/DBus", "org.freedesktop.DBus", "org.freedesktop.DBus.Monitoring"
)
_POOL = 64 << 20


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


def _send_slowly(connection: DBusConnection, address: DBusAddress) -> None:
    """A large body whose beginning is there before the rest: nobody has to look at that."""
    call = new_method_call(address, "Echo", "ay", (bytes(_SIZES[-1]),))
    data = call.serialise(next(connection.outgoing_serial))
    connection.sock.sendall(data[:_BEGINNING])
    time.sleep(_PAUSE)
    connection.sock.sendall(data[_BEGINNING:])


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
        _send_slowly(connection, _SERVICE)
        with open(os.devnull, "rb") as file:
            call = new_method_call(_SERVICE, "Echo", "h", (file,))
            for given in connection.send_and_get_reply(call, timeout=_SECONDS).body:
                given.close()
        _ask(connection, "RequestName", "su", f"org.kbusd.Client{os.getpid()}", 0)
        _ask(connection, "ListNames")
        _ask(connection, "GetNameOwner", "s", "org.kbusd.Nobody")
        _ask(connection, "GetConnectionCredentials", "s", _SERVICE.bus_name)
        _ask(connection, "RemoveMatch", "s", rule.serialise())


def watch(path: str) -> DBusConnection:
    """Become a monitor."""
    connection = connect(path)
    call = new_method_call(_MONITORING, "BecomeMonitor", "asu", ([], 0))
    connection.send_and_get_reply(call, timeout=_SECONDS)
    return connection


def break_the_rules(path: str) -> None:
    """Clients that are sent away: before and after they are known, and for what they send."""
    with prep_socket(path, timeout=_SECONDS) as sock:
        sock.sendall(b"no such message" * 10)
        while sock.recv(4096):
            pass
    with connect(path) as connection:
        connection.send(new_method_call(_SERVICE, "Echo", "ay", (bytes(5_000_000),)))
    with contextlib.suppress(OSError):
        connection = connect(path)
        connection.sock.sendall(b"l\1\0\1" + b"\xff" * 12)
        connection.receive(timeout=_SECONDS)


def _open(node: str) -> kdbus.Connection:
    return kdbus.Connection(node, pool_size=_POOL)


def use_node(path: str, node: str) -> None:
    """Two clients by files of kdbus, and one by the socket that calls them."""
    deadline = time.monotonic() + _SECONDS
    while not os.path.exists(node) and time.monotonic() < deadline:
        time.sleep(0.05)  # it is mounted after the socket is there
    with _open(node) as one, _open(node) as other:
        other.acquire("org.kbusd.Node")
        for size in _SIZES:
            one.send(other.id, bytes(size or 1))
            other.receive(_SECONDS).close()
        one.names()
        one.info(other.id)
        one.add_rule(1, "type='signal',interface='org.kbusd.Traffic'")
        for size in _SIZES:
            one.call_message(new_method_call(_SERVICE, "Echo", "ay", (bytes(size),)), _SECONDS)
        with connect(path) as connection:
            address = DBusAddress("/", f":1.{one.id}", "org.kbusd.Traffic")
            _send_slowly(connection, address)
            one.receive(_SECONDS).close()
        other.release("org.kbusd.Node")


def main() -> int:
    """All of it once."""
    path, *nodes = sys.argv[1:]
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
        for node in nodes:
            use_node(path, node)
        with watch(path):
            use(path)
        break_the_rules(path)
        with connect(path) as last:
            _ask(last, "ReloadConfig")
            for _ in range(_CLIENTS):  # more than workers that were there before
                connect(path).close()
            quits = new_method_call(_SERVICE, "Quit")
            last.send_and_get_reply(quits, timeout=_SECONDS)
        thread.join(_SECONDS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
