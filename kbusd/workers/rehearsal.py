"""A worker's life before there is a client: connect, authenticate, say Hello, leave.

The zygote plays it before it forks: what Python makes on the way (caches of types' methods,
specialised code, tables made at first use) is then shared by all workers. A spare worker plays it
before it locks itself down: the pages that serving a client writes to are then its own already, and a client
does not wait while they are copied. Everybody in the play is this process; it touches nothing else.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable

import msgspec
from jeepney.low_level import (
    Endianness,
    Header,
    HeaderFields,
    Message,
    MessageType,
)

from kbusd.policy.decide import ClientPolicy, can_connect
from kbusd.policy.rules import RECEIVE, SEND, USER, Policy, Rule
from kbusd.rings import entries
from kbusd.rings.broadcast import Broadcast
from kbusd.rings.clock import Clock
from kbusd.rings.line import Line, pair
from kbusd.wire.auth import usual
from kbusd.workers.context import Context
from kbusd.workers.dbus_socket import DBusSocket

_LOG = 2  # kind of frame
_LOG_SIZE = 65536
_ME = 1
_LIMITS = {"auth_timeout": 60_000, "max_message_size": 65536}
_POLICY = Policy(
    default=(Rule(True, USER, "", 0), Rule(True, SEND, "", 0), Rule(True, RECEIVE, "", 0))
)
_OTHER = 2  # has come and gone since the snapshot
_STREAM = socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC

_NOBODY = entries.Credentials(0, 0, 0)

Serve = Callable[[Context, DBusSocket, Line, Line], None]


class Rehearsal:
    """The lines and sockets of one play."""

    def __init__(self, context: Context) -> None:
        supervisors, ours = pair()
        brokers, theirs = pair()
        self._log = Broadcast(_LOG_SIZE)
        settings = context.configuration
        # The player must get through, whatever real clients are allowed.
        settings = msgspec.structs.replace(
            settings, auth=("EXTERNAL",), limits=settings.limits | _LIMITS, policy=_POLICY
        )
        self._context = msgspec.structs.replace(
            context, log_fd=self._log.fileno(), configuration=settings, generation=0
        )
        self._supervisors = Line(supervisors, entries.ToWorker)
        self._ours = Line(ours, entries.ToWorker)
        self._brokers = Line(brokers, entries.ToWorker)
        self._theirs = Line(theirs, entries.BrokerMessage)
        self._client, self._served = socket.socketpair(socket.AF_UNIX, _STREAM)
        self._engine = DBusSocket(self._context, self._theirs)

    def play(self, serve: Serve) -> bytes:
        """Play it once, and close everything; returns what the client got."""
        clock = Clock()
        who = entries.Credentials(os.geteuid(), os.getegid(), os.getpid())
        for entry in (
            entries.ConnectionAdded(_OTHER, who),
            entries.NameOwnerChanged("a.b", 0, _OTHER),
            entries.NameOwnerChanged("a.b", _OTHER, 0),
            entries.ConnectionRemoved(_OTHER),
            entries.ConnectionAdded(_ME, who),
        ):
            self._log.append(_LOG, clock.tick(), b"", msgspec.msgpack.encode(entry))
        state = entries.Snapshot(0, 0, (), (), (), (), (), 0)
        # All that is said to the worker is there when it looks, so that nobody ever waits.
        self._supervisors.send(entries.Soon())
        self._supervisors.send(entries.Client(who), [self._served.fileno()])
        self._served.close()
        self._client.send(_SCRIPT)
        self._client.shutdown(socket.SHUT_WR)
        self._brokers.send(entries.State(msgspec.msgpack.encode(state)))
        self._brokers.send(entries.Reply(1, _ME))
        serve(self._context, self._engine, self._ours, self._theirs)
        got = self._client.recv(4096)
        self._close()
        return got

    def _close(self) -> None:
        epoll, *_ = self._engine.descriptors()  # the others are closed with what they are part of
        os.close(epoll)
        del self._engine
        self._client.close()
        for line in (self._supervisors, self._ours, self._brokers, self._theirs):
            line.close()


def get_ready(context: Context) -> None:
    """Do without any client what comes first with one. It takes time only because the processor's
    caches hold other things; so it's done while the supervisor looks who it is."""
    usual(_SCRIPT, context.guid, _NOBODY.uid)
    can_connect(context.configuration.policy, _NOBODY, _NOBODY.uid)
    ClientPolicy(context.configuration.policy, _NOBODY)


def _script() -> bytes:
    """What a client sends up to Hello, in one piece."""
    fields = {
        HeaderFields.path: "/org/freedesktop/DBus",
        HeaderFields.destination: "org.freedesktop.DBus",
        HeaderFields.interface: "org.freedesktop.DBus",
        HeaderFields.member: "Hello",
    }
    header = Header(Endianness.little, MessageType.method_call, 0, 1, 0, 1, fields)
    return b"\0AUTH EXTERNAL\r\nDATA\r\nNEGOTIATE_UNIX_FD\r\nBEGIN\r\n" + bytes(
        Message(header, ()).serialise()
    )


_SCRIPT = _script()
