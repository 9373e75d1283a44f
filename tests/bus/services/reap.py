"""Runs a command and answers for everything that it starts: `reap.py LIMIT AFTER COMMAND...`.

Adopts and reaps orphans (as an init would), so that a program which waits for the end of a
daemon sees it. Ends with the command's status; LIMIT seconds after the start it kills all
and ends with status 98; when processes are left AFTER seconds after the command ended, it kills
them, names them on standard error and ends with status 99.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time

TOO_LATE = 98
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


def kill_all(why: str) -> None:
    """Kill every descendant: as one dies, its children become ours."""
    left = children()
    print(why, *(describe(pid) for pid in left), sep="\n  ", file=sys.stderr)
    while left:
        for pid in left:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        left = children()


def wait(deadline: float, wanted: int | None) -> int | None:
    """Reap until `wanted` has ended (or nobody is left); its status, or None if it is too late."""
    while time.monotonic() < deadline:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return 0
        if pid and pid == wanted:
            return os.waitstatus_to_exitcode(status)
        if pid == 0:
            time.sleep(0.01)
    return None


def main(limit: float, after: float, command: list[str]) -> int:
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    # In a session of its own: one that signals its process group must not end the whole test run.
    started = subprocess.Popen(command, start_new_session=True)
    status = wait(time.monotonic() + limit, started.pid)
    if status is None:
        kill_all("not done in time:")
        return TOO_LATE
    if wait(time.monotonic() + after, None) is None:
        kill_all("left over:")
        return LEFT_OVER
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]))
