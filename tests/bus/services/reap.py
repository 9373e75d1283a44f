"""Runs a command and answers for everything that it starts: `python reap.py SECONDS COMMAND...`.

Adopts and reaps orphans (as an init would), so that a program which waits for the end of a
daemon sees it. Ends with the command's status; when processes are left SECONDS after the command
ended, it kills them, names them on standard error and ends with status 99.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time

LEFT_OVER = 99
_PR_SET_CHILD_SUBREAPER = 36


def children() -> list[int]:
    with open(f"/proc/self/task/{os.getpid()}/children", encoding="ascii") as file:
        return [int(pid) for pid in file.read().split()]


def describe(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return f"{pid}: {file.read().replace(bytes(1), b' ').decode(errors='replace')}"
    except OSError:
        return f"{pid}: gone"


def main(seconds: float, command: list[str]) -> int:
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    main_pid = subprocess.Popen(command).pid
    status = 0
    while True:
        pid, code = os.waitpid(-1, 0)
        if pid == main_pid:
            status = os.waitstatus_to_exitcode(code)
            break
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return status if status >= 0 else 128 - status
        if pid == 0:
            time.sleep(0.01)
    left = children()
    print("left over:", *(describe(pid) for pid in left), sep="\n  ", file=sys.stderr)
    while left:
        for pid in left:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        left = children()
    return LEFT_OVER


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), sys.argv[2:]))
