"""The life of one worker: lock down, wait for a client, authenticate it, serve it, end.

Hostile: the client, every peer's shared memory, and, should it have been taken over, whatever a
line says. What the worker holds is listed in the design; after `confine` it can get no more.
"""

from __future__ import annotations

import gc
import os
import select
import socket
import time

from kbusd.policy.decide import ClientPolicy, explain
from kbusd.rings import entries
from kbusd.rings.line import Line, prepare
from kbusd.sandbox import apply
from kbusd.wire.auth import ServerAuth
from kbusd.workers.context import Context
from kbusd.workers.dbus_socket import DBusSocket
from kbusd.workers.rehearsal import Rehearsal

_SASL_READ = 16384
for each in (entries.BrokerMessage, entries.ToWorker):
    prepare(each)  # in the zygote, for every worker


def main(context: Context, supervisor: socket.socket, broker: socket.socket, locked: int) -> int:
    """Run one worker to its end; returns the process's exit status."""
    line = Line(broker, entries.BrokerMessage)
    hand_over = Line(supervisor, entries.ToWorker)
    engine = DBusSocket(context, line)
    rehearsal = Rehearsal(context)
    keep = [0, 1, 2, supervisor.fileno(), broker.fileno(), locked]
    keep += engine.descriptors() + rehearsal.descriptors()
    apply.confine(context.profile, keep_fds=keep)
    gc.set_threshold(50_000)
    os.write(locked, b"1")
    os.close(locked)
    arrived = select.poll()
    arrived.register(hand_over, select.POLLIN)
    if arrived.poll(0):
        rehearsal.close()  # the client is there already
    else:
        rehearsal.play(serve)
    del rehearsal
    serve(context, engine, hand_over, line)
    return 0


def serve(context: Context, engine: DBusSocket, hand_over: Line, line: Line) -> None:
    """Wait for a client on `hand_over` and serve it to its end."""
    assigned = _wait_for_client(hand_over)
    if assigned is None:
        return
    credentials, client = assigned
    started = _authenticate(context, credentials, client, hand_over.sock)
    if isinstance(started, str):
        line.send(entries.Leaving(0, started))
        return
    policy = ClientPolicy(context.configuration.policy, credentials, owner=context.bus.owner)
    verdict = policy.can_connect()
    if not verdict.allowed:
        line.send(entries.Leaving(0, f"may not connect: {explain(verdict)}"))
        return
    rest, fds, unix_fds = started
    engine.serve(client.fileno(), hand_over.fileno(), credentials, rest, fds, unix_fds)


def _wait_for_client(line: Line) -> tuple[entries.Credentials, socket.socket] | None:
    """The client that the supervisor hands over, None if it closes the line instead."""
    poller = select.epoll(flags=select.EPOLL_CLOEXEC)
    with poller:
        poller.register(line.fileno(), select.EPOLLIN)
        received = None
        while received is None:
            poller.poll()
            try:
                received = line.receive()
            except EOFError:
                return None
    message, (fd,) = received
    return message.credentials, socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, fd)


def _authenticate(
    context: Context,
    credentials: entries.Credentials,
    client: socket.socket,
    supervisor: socket.socket,
) -> tuple[bytes, list[int], bool] | str:
    """Do SASL. Returns what the client sent after BEGIN, or the reason why it must go."""
    anonymous = context.configuration.allow_anonymous
    # Without <auth> the configuration offers what can succeed.
    every = ("EXTERNAL", "ANONYMOUS") if anonymous else ("EXTERNAL",)
    auth = ServerAuth(
        context.guid,
        credentials.uid,
        mechanisms=context.configuration.auth or every,
        allow_anonymous=anonymous,
    )
    limit = context.configuration.limits["auth_timeout"] / 1000
    deadline = time.monotonic() + limit
    poller = select.epoll(flags=select.EPOLL_CLOEXEC)
    poller.register(client.fileno(), select.EPOLLIN)
    poller.register(supervisor.fileno(), select.EPOLLIN)
    out = b""
    with poller:
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                return f"did not authenticate within {limit:.0f} s (limit auth_timeout)"
            events = dict(poller.poll(left))
            if supervisor.fileno() in events:
                return "the bus ends"
            if client.fileno() not in events:
                continue
            try:
                data = client.recv(_SASL_READ)
            except (BlockingIOError, InterruptedError):
                data = None
            except OSError:
                data = b""
            if data == b"":
                return "disconnected before it was authenticated"
            if data is not None:
                step = auth.receive(data)
                out += step.reply
                if step.failed is not None:
                    _send(client, out)
                    return f"authentication failed: {step.failed}"
                if step.done:
                    _send(client, out)
                    return step.rest, [], step.unix_fds
            out = _send(client, out)
            poller.modify(client.fileno(), select.EPOLLIN | (select.EPOLLOUT if out else 0))


def _send(client: socket.socket, data: bytes) -> bytes:
    """Send what the socket takes; returns the rest. A client that is gone shows at the next read."""
    if not data:
        return data
    try:
        return data[client.send(data, socket.MSG_NOSIGNAL) :]
    except OSError:
        return b""
