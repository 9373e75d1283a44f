"""Where the bus's words go: standard error, syslog or both (dbus-daemon(1), --syslog).

Lines of the other processes come through as bytes and leave with every control character
replaced, so that a client's words in them cannot forge a line or drive a terminal.
"""

from __future__ import annotations

import os
import sys
import syslog

_PRINTABLE = dict.fromkeys([*range(32), 127], "?")


class Journal:
    """One place to say things to the admin."""

    def __init__(self, *, to_stderr: bool, to_syslog: bool, relays: bool) -> None:
        self.to_stderr = to_stderr
        self.to_syslog = to_syslog
        self.relays = relays  # the other processes write to us, and not to our standard error
        self._partial = b""
        if to_syslog:
            syslog.openlog("kbusd", syslog.LOG_PID, syslog.LOG_DAEMON)

    def say(self, text: str, *, priority: int = syslog.LOG_INFO) -> None:
        line = text.translate(_PRINTABLE)
        if self.to_syslog:
            syslog.syslog(priority, line)
        if self.to_stderr:
            try:
                os.write(
                    sys.__stderr__.fileno() if sys.__stderr__ else 2,
                    f"kbusd[{os.getpid()}]: {line}\n".encode(errors="replace"),
                )
            except OSError:
                self.to_stderr = False  # nobody reads it any more

    def warn(self, text: str) -> None:
        self.say(text, priority=syslog.LOG_WARNING)

    def relay(self, data: bytes) -> None:
        """Pass on what another process of the bus wrote to its standard error."""
        *lines, self._partial = (self._partial + data).split(b"\n")
        self._partial = self._partial[-4096:]
        for line in lines:
            self.say(line.decode(errors="replace"))
