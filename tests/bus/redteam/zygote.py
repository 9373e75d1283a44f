"""kbusd's own zygote, but whose workers do what a client tells them to that begins with WORD.

That stands for a bug in whatever parses the client's bytes: the same process, at the same point of its
life, behind the same walls, with the same descriptors. All other clients are served as ever. The bus of
the tests starts it by COMMAND.
"""

from __future__ import annotations

import ctypes
import json
import re
import select
import socket
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import msgspec

from kbusd.cuse import requests
from kbusd.rings import entries
from kbusd.rings.line import MAX_RECORD, Line
from kbusd.workers import worker, zygote

WORD = b"\0RED "
IOCTL = 0xD0009BED  # both ways, 4096 bytes: orders one attack of the worker of a file
NAME = re.compile(rb"red-(\d+)-(\d+)-(\d+)")  # to look one up orders one attack of the tree
COMMAND = [
    sys.executable,
    "-c",
    "import sys; from kbusd.supervisor import supervisor, made; from kbusd.main import main;"
    f"supervisor.ZYGOTE = made.ZYGOTE = {__name__!r};"
    "sys.exit(main())",
]
PLACE = Path(__file__).parents[3]


def main() -> None:
    """As the real one, with what attackers would bring along imported."""
    from tests.bus.redteam import attacks

    ctypes.CDLL(None).syscall  # noqa: B018 looked up before nothing can be opened any more
    worker._serve_socket = _taken_over(worker._serve_socket, attacks.run)
    if "kdbus" in sys.argv:
        device: Any = import_module("kbusd.workers.kdbus_device")
        tree: Any = import_module("kbusd.workers.tree")
        device.serve = _device_taken_over(
            device.serve, attacks.lie_of_device, attacks.search_log_by_file
        )
        _take_tree_over(tree, attacks.lie_of_tree)
    zygote.main()


def _taken_over(real: Callable[..., None], run: Callable[..., None]) -> Callable[..., None]:
    def serve(
        context: Any, engine: Any, hand_over: Any, line: Any, who: Any, client: socket.socket
    ) -> None:
        ready = select.poll()
        ready.register(client, select.POLLIN)
        ready.poll()
        if client.recv(len(WORD), socket.MSG_PEEK) != WORD:
            real(context, engine, hand_over, line, who, client)
            return
        order = b""
        while not order.endswith(b"\n"):
            ready.poll()
            order += client.recv(65536)
        run(context, engine, hand_over, line, client, json.loads(order[len(WORD) :]))

    return serve


def _device_taken_over(
    real: Callable[..., None], run: Callable[..., None], search: Callable[..., None]
) -> Callable[..., None]:
    decode = msgspec.msgpack.Decoder(entries.ToDeviceWorker).decode

    def serve(context: Any, engine: Any, device: Any, sock: socket.socket, broker: Line) -> None:
        ready = select.poll()
        ready.register(sock, select.POLLIN)
        ready.poll()
        if said := sock.recvmsg(MAX_RECORD, 0, socket.MSG_PEEK)[0]:
            asked = requests.decode(decode(said).request)
            if isinstance(asked.body, requests.Ioctl) and asked.body.command == IOCTL:
                sock.recvmsg(MAX_RECORD)
                order = json.loads(asked.body.data.rstrip(b"\0"))
                to_us, unique = Line(sock, entries.ToDeviceWorker), asked.header.unique
                if isinstance(order[0], str):
                    search(context, broker, to_us, unique, *order[1:])
                run(to_us, unique, order)
        real(context, engine, device, sock, broker)

    return serve


def _take_tree_over(tree: Any, run: Callable[..., None]) -> None:
    serve, answer, lines = tree.serve, tree.Tree.answer, []

    def serve_on(line: Line, start: Any) -> None:
        lines.append(line)
        serve(line, start)

    def answer_or_lie(self: Any, request: bytes) -> Any:
        asked = requests.decode(request)
        if isinstance(asked.body, requests.Lookup) and (order := NAME.match(asked.body.name)):
            run(lines[0], asked.header.unique, [int(each) for each in order.groups()])
        return answer(self, request)

    tree.serve, tree.Tree.answer = serve_on, answer_or_lie
