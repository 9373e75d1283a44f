"""kbusd's own zygote, but whose workers do what a client tells them to that begins with WORD.

That stands for a bug in whatever parses the client's bytes: the same process, at the same point of its
life, behind the same walls, with the same descriptors. All other clients are served as ever. The bus of
the tests starts it by COMMAND.
"""

from __future__ import annotations

import ctypes
import json
import select
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kbusd.workers import worker, zygote

WORD = b"\0RED "
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
