"""A forked process that a test talks with: servers and clients of one device have to be two.

A process that holds both ends of a CUSE device hangs for good when it ends. So a child keeps
no descriptor but its own, and ends without any of Python's clean-up.
"""

from __future__ import annotations

import json
import os
import select
import signal
import time
import traceback
from collections.abc import Callable
from typing import Any

SECONDS = 20.0

Say = Callable[[Any], None]


class Child:
    """Runs `function(say, *arguments)`; what it says (JSON) is heard here, in order."""

    def __init__(self, function: Callable[..., None], *arguments: Any) -> None:
        self._pipe, writer = os.pipe()
        self._text = b""
        self._status: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            os.dup2(writer, 3)
            os.closerange(4, 65536)
            try:
                function(self._say, *arguments)
            except BaseException:  # noqa: BLE001 (the test that forked us is to be told)
                self._say(traceback.format_exc())
            finally:
                os._exit(0)
        os.close(writer)

    @staticmethod
    def _say(value: Any) -> None:
        os.write(3, json.dumps(value).encode() + b"\n")

    def hear(self) -> Any:
        """The next thing that it says. Raises EOFError when it has ended."""
        deadline = time.monotonic() + SECONDS
        while b"\n" not in self._text:
            ready, _, _ = select.select([self._pipe], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"the child says nothing for {SECONDS} s"
            new = os.read(self._pipe, 65536)
            if not new:
                raise EOFError
            self._text += new
        line, _, self._text = self._text.partition(b"\n")
        return json.loads(line)

    def speaks(self) -> bool:
        """Whether there is something to hear now."""
        return b"\n" in self._text or bool(select.select([self._pipe], [], [], 0)[0])

    @property
    def ended(self) -> bool:
        """Whether it was waited for."""
        return self._status is not None

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self) -> int:
        """Its exit status, negative for a signal, as soon as it ends."""
        if self._status is None:
            with open(os.pidfd_open(self.pid), "rb", 0) as pidfd:
                ready, _, _ = select.select([pidfd], [], [], SECONDS)
                assert ready, f"the child does not end within {SECONDS} s"
            self._status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
            os.close(self._pipe)
        return self._status

    def kill(self) -> None:
        if self._status is None:
            self.signal(signal.SIGKILL)
            self.wait()
