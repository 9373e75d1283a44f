"""Where the bus's words go: standard error, syslog or both (dbus-daemon(1), --syslog).

Where that is not our own standard error alone, the other processes write to a pipe of ours. Their
lines leave with every control character replaced, so that a client's words in them cannot forge
a line or drive a terminal.
"""

from __future__ import annotations

import os
import syslog
from contextlib import suppress

_PRINTABLE = dict.fromkeys([*range(32), 127], "?")
_MAX_LINE = 4096


class Journal:
    """One place to say things to the admin. `stderr` is where the others are to write."""

    def __init__(self, *, to_stderr: bool, to_syslog: bool, relays: bool) -> None:
        self.to_stderr = to_stderr
        self.to_syslog = to_syslog
        self.stderr = 2
        self.pipe = -1
        self._partial = b""
        if relays:
            self.pipe, self.stderr = os.pipe2(os.O_CLOEXEC)
            os.set_blocking(self.pipe, False)
        if to_syslog:
            syslog.openlog("kbusd", syslog.LOG_PID, syslog.LOG_DAEMON)

    def say(self, text: str, *, priority: int = syslog.LOG_INFO) -> None:
        line = text.translate(_PRINTABLE)
        if self.to_syslog:
            syslog.syslog(priority, line)
        if self.to_stderr:
            with suppress(OSError):  # nobody reads it any more
                os.write(2, f"kbusd[{os.getpid()}]: {line}\n".encode(errors="replace"))

    def warn(self, text: str) -> None:
        self.say(text, priority=syslog.LOG_WARNING)

    def relay(self) -> None:
        """Pass on what the other processes wrote to the pipe, at most what fits into one."""
        with suppress(OSError):  # there is nothing more, or no pipe
            *lines, rest = (self._partial + os.read(self.pipe, 65536)).split(b"\n")
            self._partial = rest[-_MAX_LINE:]
            for line in lines:
                self.say(line.decode(errors="replace"))
