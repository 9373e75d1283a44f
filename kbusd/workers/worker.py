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
from contextlib import suppress
from typing import NoReturn

from msgspec import structs

from kbusd.policy.decide import can_connect, explain
from kbusd.rings import entries
from kbusd.rings.doorbell import part
from kbusd.rings.line import Line, prepare
from kbusd.sandbox import apply
from kbusd.wire.auth import AuthStep, ServerAuth, aliases, usual
from kbusd.workers.context import Context
from kbusd.workers.dbus_socket import DBusSocket
from kbusd.workers.errors import Gone
from kbusd.workers.rehearsal import Rehearsal, get_ready

_SASL_READ = 16384
_LOOKS = 100  # for a client after Soon, some 0.1 ms
for each in (entries.BrokerMessage, entries.ToWorker):
    prepare(each)  # in the zygote, for every worker


def main(
    context: Context,
    supervisor: socket.socket,
    broker: socket.socket,
    locked: int,
    rehearse: bool = False,
) -> NoReturn:
    """Run one worker to its end, and its process; with a rehearsal first if there is time for one."""
    gc.set_threshold(50_000)
    line = Line(broker, entries.BrokerMessage)
    hand_over = Line(supervisor, entries.ToWorker)
    engine = DBusSocket(context, line)
    if rehearse:
        Rehearsal(context).play(serve)
    keep = [0, 1, 2, supervisor.fileno(), broker.fileno(), locked, *engine.descriptors()]
    apply.confine(context.profile, keep_fds=keep)
    say_locked(locked)
    serve(context, engine, hand_over, line)
    # The kernel takes it all back at once, and copies no page to find out what there is.
    os._exit(0)


def say_locked(fd: int) -> None:
    """We are locked down; whoever waits for that may be gone, as the bus ends."""
    with suppress(BrokenPipeError):
        os.write(fd, b"1")
    os.close(fd)


def serve(context: Context, engine: DBusSocket, hand_over: Line, line: Line) -> None:
    """Wait for what is to be done, from `hand_over`, and do it to its end."""
    # What is imported here, the zygote has imported: after lock-down no file can be opened.
    match _wait_for_work(hand_over, line, context, engine):
        case entries.Client() as handed_over, [fd]:
            if handed_over.credentials.endpoint:
                engine.leave_log()
            client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, fd)
            _serve_socket(context, engine, hand_over, line, handed_over, client)
        case entries.Device() as device, []:
            from kbusd.workers import kdbus_device

            if device.bus:
                if device.endpoint != "bus":
                    engine.leave_log()
                kdbus_device.serve(context, engine, device, hand_over.sock, line)
            else:
                line.close()  # it has nothing to say to the broker
                kdbus_device.serve_control(device, hand_over.sock)
        case entries.Tree() as start, []:
            from kbusd.workers import tree

            line.close()  # it has nothing to say to the broker
            tree.serve(Line(hand_over.sock, entries.ToTree), start)


def _serve_socket(
    context: Context,
    engine: DBusSocket,
    hand_over: Line,
    line: Line,
    handed_over: entries.Client,
    client: socket.socket,
) -> None:
    credentials = handed_over.credentials
    try:
        context = engine.in_force(handed_over.generation)
    except EOFError:
        return  # the bus ends
    except Gone as error:
        line.send(entries.Leaving(0, str(error)))
        return
    try:
        started = _authenticate(context, handed_over, client, hand_over.sock)
        if isinstance(started, str):
            line.send(entries.Leaving(0, started))
            return
        if started.anonymous:
            credentials = structs.replace(credentials, anonymous=True)
        verdict = can_connect(context.configuration.policy, credentials, context.bus.owner)
        if not verdict.allowed:
            line.send(entries.Leaving(0, f"may not connect: {explain(verdict)}"))
            return
        engine.serve(
            client.fileno(), hand_over.fileno(), credentials, started.rest, [], started.unix_fds
        )
    finally:
        # What it has left unread may take for ever to be closed: it need not wait for that.
        part(client.detach())


def _wait_for_work(
    line: Line, brokers: Line, context: Context, engine: DBusSocket
) -> tuple[entries.Client | entries.Device | entries.Tree, list[int]] | None:
    """What the supervisor wants of us, None if it closes the line instead. Meanwhile the broker may tell us the
    state of the bus."""
    arrived = select.poll()
    arrived.register(line, select.POLLIN)
    arrived.register(brokers, select.POLLIN)
    received = None
    while received is None:
        if all(fd != line.fileno() for fd, _ in arrived.poll()):
            arrived.unregister(brokers)
            engine.get_ready()
            continue
        try:
            received = line.receive()
        except EOFError:
            return None
        if received is not None and isinstance(received[0], entries.Soon):
            get_ready(context)
            received = None
            for _ in range(_LOOKS):  # it is about to come, and to be woken takes both of us longer
                if arrived.poll(0):
                    break
    return received


def _authenticate(
    context: Context,
    who: entries.Client,
    client: socket.socket,
    supervisor: socket.socket,
) -> AuthStep | str:
    """Do SASL. Returns its last step, or the reason why the client must go."""
    offered = context.configuration.mechanisms
    data = _receive(client)  # most clients have sent it all by now
    if data and "EXTERNAL" in offered:
        step = usual(data, context.guid, who.credentials.uid)
        if step is not None:
            _send(client, step.reply)
            return step
    auth = ServerAuth(
        context.guid,
        who.credentials.uid,
        mechanisms=offered,
        allow_anonymous=context.configuration.allow_anonymous,
        aliases=aliases(who.uid_map, who.credentials.uid),
    )
    limit = context.configuration.limits["auth_timeout"] / 1000
    deadline = time.monotonic() + limit
    out = b""
    while True:
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
                return step
        out = _send(client, out)
        left = deadline - time.monotonic()
        if left <= 0:
            return f"did not authenticate within {limit:.0f} s (limit auth_timeout)"
        poller = select.poll()
        poller.register(client, select.POLLIN | (select.POLLOUT if out else 0))
        poller.register(supervisor, select.POLLIN)
        if any(fd == supervisor.fileno() for fd, _ in poller.poll(left * 1000)):
            return "the bus ends"
        data = _receive(client)


def _receive(client: socket.socket) -> bytes | None:
    """What has come, None if that is nothing, b"" if the client is gone."""
    try:
        return client.recv(_SASL_READ)
    except (BlockingIOError, InterruptedError):
        return None
    except OSError:
        return b""


def _send(client: socket.socket, data: bytes) -> bytes:
    """Send what the socket takes; returns the rest. A client that is gone shows at the next read."""
    if not data:
        return data
    try:
        return data[client.send(data, socket.MSG_NOSIGNAL) :]
    except OSError:
        return b""
