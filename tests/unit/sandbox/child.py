"""Runs a function in a forked child under a profile, and tells how that went."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass

from kbusd.sandbox import apply
from kbusd.sandbox.compiled import Compiled

NOBODY = 65534


@dataclass(frozen=True)
class Outcome:
    """`said`: what the function returned, as text. `killed`: the signal that ended the child."""

    said: str
    killed: int
    status: int

    @property
    def by_filter(self) -> bool:
        return self.killed == signal.SIGSYS


def run(
    function: Callable[[], object],
    profile: Compiled | None = None,
    *,
    ordinary: bool = False,
    before: Compiled | None = None,
) -> Outcome:
    """Fork; become an ordinary user if wanted; confine by `before` and `profile`; call."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 99
        try:
            if ordinary and os.getuid() == 0:
                os.setgroups([])
                os.setresgid(NOBODY, NOBODY, NOBODY)
                os.setresuid(NOBODY, NOBODY, NOBODY)
            for one in (before, profile):
                if one is not None:
                    apply.confine(one)
            os.write(writer, str(function()).encode())
            status = 0
        except BaseException as error:  # noqa: BLE001 the child ends here
            os.write(writer, f"{type(error).__name__}: {error}".encode())
            status = 1
        finally:
            os._exit(status)
    os.close(writer)
    said = b""
    while part := os.read(reader, 65536):
        said += part
    os.close(reader)
    _, status = os.waitpid(pid, 0)
    sys.stdout.flush()
    killed = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    return Outcome(said.decode(), killed, 0 if killed else os.WEXITSTATUS(status))
