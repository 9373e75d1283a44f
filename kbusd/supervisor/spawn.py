"""Starts the other processes of the bus afresh (execve), so that none shares our heap.

Each gets just the descriptors that it is given, at the numbers that it is given them at.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from fcntl import F_DUPFD_CLOEXEC, fcntl

import kbusd
from kbusd.supervisor import start

# What its children would each have to look up, by reading symbol tables, is looked up before (ld.so(8)).
_MORE = {"kbusd.workers.zygote": {"LD_BIND_NOW": "1"}}


def spawn(module: str, arguments: Sequence[str], fds: Mapping[int, int], stderr: int = 2) -> int:
    """Run `module`'s main with `arguments` and returns its pid. Raises OSError.

    `fds`: the child's numbers -> our descriptors. Where 0 and 1 are not among them, they are
    /dev/null: whoever reads our address from our stdout waits for the end of file."""
    # Our own import path (see start.py). An editable installation is not on it by itself.
    ours = os.path.dirname(next(iter(kbusd.__path__)))
    path = [ours, *(each for each in sys.path if each and each != ours)]
    actions: list[tuple[object, ...]] = []
    with ExitStack() as held:
        null = held.enter_context(open(os.devnull, "r+b", 0)).fileno()
        # First out of the way of each other, then each to its place.
        for to, fd in {0: null, 1: null, 2: stderr, **fds}.items():
            high = fcntl(fd, F_DUPFD_CLOEXEC, max(2, *fds) + 1)
            held.callback(os.close, high)
            actions.append((os.POSIX_SPAWN_DUP2, high, to))
        return os.posix_spawn(
            sys.executable,
            [sys.executable, "-S", "-s", "-P", start.__file__, *path, "--", module, *arguments],
            os.environ | _MORE.get(module, {}),
            file_actions=actions,
            setpgroup=0,  # signals to our group, such as ^C, are ours to act on
            setsigmask=[],
            setsigdef=[signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD],
        )
