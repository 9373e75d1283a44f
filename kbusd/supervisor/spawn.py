"""Starts the other processes of the bus afresh (execve), so that none shares our heap.

Each gets just the descriptors that it is given, from 3 on, in the order given.
"""

from __future__ import annotations

import fcntl
import os
import signal
import sys
from collections.abc import Sequence

import kbusd
from kbusd.supervisor import start

_FIRST_FD = 3
_CLEAR_OF = 64  # above every number that a child's descriptors are placed at


def spawn(module: str, arguments: Sequence[str], fds: Sequence[int], stderr: int = 2) -> int:
    """Run `module`'s main with `arguments`; `fds` become its 3, 4, 5, ... Returns its pid."""
    high = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _CLEAR_OF) for fd in (stderr, *fds)]
    # Not our stdin and stdout: whoever reads our address from there waits for the end of file.
    actions: list[tuple[object, ...]] = [
        (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDWR, 0),
        (os.POSIX_SPAWN_DUP2, 0, 1),
        (os.POSIX_SPAWN_DUP2, high[0], 2),
    ]
    actions += [(os.POSIX_SPAWN_DUP2, fd, _FIRST_FD + n) for n, fd in enumerate(high[1:])]
    try:
        return os.posix_spawn(
            sys.executable,
            command(module, arguments),
            os.environ,
            file_actions=actions,
            setsigmask=[],
            setsigdef=[signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD],
        )
    finally:
        for fd in high:
            os.close(fd)


def command(module: str, arguments: Sequence[str]) -> list[str]:
    """The command line that runs `module` with our own import path (see start.py)."""
    # An editable installation of kbusd is not on the path by itself.
    ours = os.path.dirname(next(iter(kbusd.__path__)))
    path = [ours, *(each for each in sys.path if each and each != ours)]
    return [sys.executable, "-S", "-s", "-P", start.__file__, *path, "--", module, *arguments]


def sealed_memfd(name: str, data: bytes) -> int:
    """A memfd that holds `data` and can never change again (memfd_create(2), sealing)."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.write(fd, data)
    fcntl.fcntl(
        fd,
        fcntl.F_ADD_SEALS,
        fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL,
    )
    return fd
