"""Starts the other processes of the bus afresh (execve), so that none shares our heap.

Each gets just the descriptors that it is given, at the numbers that it is given them at.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping, Sequence
from fcntl import F_DUPFD_CLOEXEC, fcntl

import kbusd
from kbusd.supervisor import start


def spawn(module: str, arguments: Sequence[str], fds: Mapping[int, int], stderr: int = 2) -> int:
    """Run `module`'s main with `arguments` and returns its pid. Raises OSError.

    `fds`: the child's numbers -> our descriptors. Where 0 and 1 are not among them, they are
    /dev/null: whoever reads our address from our stdout waits for the end of file."""
    # Our own import path (see start.py). An editable installation is not on it by itself.
    ours = os.path.dirname(next(iter(kbusd.__path__)))
    path = [ours, *(each for each in sys.path if each and each != ours)]
    # First out of the way of each other, then each to its place.
    clear = max(2, *fds) + 1
    high = {to: fcntl(fd, F_DUPFD_CLOEXEC, clear) for to, fd in {**fds, 2: stderr}.items()}
    actions: list[tuple[object, ...]] = [
        (os.POSIX_SPAWN_OPEN, number, "/dev/null", os.O_RDWR, 0) for number in (0, 1)
    ]
    actions += [(os.POSIX_SPAWN_DUP2, fd, to) for to, fd in high.items()]
    try:
        return os.posix_spawn(
            sys.executable,
            [sys.executable, "-S", "-s", "-P", start.__file__, *path, "--", module, *arguments],
            os.environ,
            file_actions=actions,
            setpgroup=0,  # signals to our group, such as ^C, are ours to act on
            setsigmask=[],
            setsigdef=[signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD],
        )
    finally:
        for fd in high.values():
            os.close(fd)
