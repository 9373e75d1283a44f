"""What processes there are, read from /proc: to find a bus's processes and show that none is left.

Reads only; the caller decides what to end. A process is told from a later one with the same id
by its start time (proc_pid_stat(5), field 22, in clock ticks since boot).
"""

from __future__ import annotations

import os
import re
import signal
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple


class Process(NamedTuple):
    pid: int
    ppid: int
    start: int
    state: str
    comm: str


def look(pid: int) -> Process | None:
    """The process of this id, or None if there is none."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            text = file.read()
    except OSError:
        return None
    comm, rest = text[text.index("(") + 1 : text.rindex(")")], text[text.rindex(")") + 2 :].split()
    return Process(pid, int(rest[1]), int(rest[19]), rest[0], comm)


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """While it does not run, so that it sees later what came meanwhile."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def all_processes() -> list[Process]:
    found = (look(int(name)) for name in os.listdir("/proc") if name.isdigit())
    return [process for process in found if process is not None]


def descendants(pid: int) -> list[Process]:
    """All processes below `pid`, without itself."""
    children: dict[int, list[Process]] = {}
    for process in all_processes():
        children.setdefault(process.ppid, []).append(process)
    found, pending = [], [pid]
    while pending:
        for child in children.get(pending.pop(), []):
            found.append(child)
            pending.append(child.pid)
    return found


def alive(process: Process) -> bool:
    """Whether this very process still runs; a zombie of ours is reaped and does not count."""
    now = look(process.pid)
    if now is None or now.start != process.start:
        return False
    if now.state in "ZX":
        if now.ppid == os.getpid():
            os.waitpid(now.pid, os.WNOHANG)
        return False
    return True


def environment(pid: int) -> dict[str, str]:
    """The environment a process was started with; empty if it may not be read."""
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            items = file.read().decode(errors="replace").split("\0")
    except OSError:
        return {}
    return dict(item.split("=", 1) for item in items if "=" in item)


def descriptors(pid: int) -> list[str]:
    """What the open descriptors of a process are, as /proc names them."""
    found = []
    for name in os.listdir(f"/proc/{pid}/fd"):
        try:
            found.append(os.readlink(f"/proc/{pid}/fd/{name}"))
        except OSError:
            continue
    return found


def peer_inode(sock: socket.socket) -> int:
    """The inode of the other end of a connected Unix socket (sock_diag(7), UNIX_DIAG_PEER)."""
    inode = os.fstat(sock.fileno()).st_ino
    # struct nlmsghdr, then struct unix_diag_req for this one inode, any cookie, showing the peer.
    body = struct.pack(
        "=BBHIIIII", socket.AF_UNIX, 0, 0, 0xFFFFFFFF, inode, 4, 0xFFFFFFFF, 0xFFFFFFFF
    )
    head = struct.pack("=IHHII", 16 + len(body), 20, 1, 1, 0)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 4) as netlink:
        netlink.settimeout(5)
        netlink.send(head + body)
        answer = netlink.recv(65536)
    assert struct.unpack_from("=H", answer, 4)[0] == 20, "sock_diag knows no such socket"
    at = 16 + 16
    while at + 4 <= len(answer):
        length, kind = struct.unpack_from("=HH", answer, at)
        if kind == 2:
            return int(struct.unpack_from("=I", answer, at + 4)[0])
        at += (length + 3) & ~3
    raise AssertionError("the socket has no peer")


def pss(pid: int) -> int:
    """Proportional set size in bytes; 0 for a process that is gone."""
    try:
        with open(f"/proc/{pid}/smaps_rollup", encoding="ascii") as file:
            match = re.search(r"^Pss:\s+(\d+) kB", file.read(), re.MULTILINE)
    except OSError:
        return 0
    return int(match[1]) * 1024 if match else 0


def eventually(condition: Callable[[], object], what: str, timeout: float = 10.0) -> None:
    """Wait until `condition` holds, for what has no descriptor to wait on; fail naming `what`."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout} s: {what}"
        time.sleep(0.01)
