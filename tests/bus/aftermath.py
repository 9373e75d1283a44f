"""What a test that waited in vain tells of the processes that it waited for. Reads only."""

from __future__ import annotations

import os
import struct
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress

from . import procs
from .daemon import Bus
from .rawclient import BusError, Disconnected, RawClient

SECONDS = 5.0  # for the bus to answer
STATS = "org.freedesktop.DBus.Debug.Stats"


def of_program(bus: Bus, pid: int) -> str:
    """The program, the bus's processes, and what the bus says of its clients and their match rules."""
    lines = ["the program:", *_threads(pid), "processes of the bus:"]
    lines += [line for each in bus.tree() for line in _threads(each.pid)]
    return "\n".join([*lines, "what the bus says:", *_said(bus)])


def _threads(pid: int) -> Iterator[str]:
    """What each thread of a process waits for, if it is there and we may know; those alike are counted."""
    process = procs.look(pid)
    if process is None:
        yield f"  {pid} is gone"
        return
    alike: Counter[str] = Counter()
    with suppress(OSError):
        for thread in sorted(os.listdir(f"/proc/{pid}/task"), key=int):
            where = f"/proc/{pid}/task/{thread}"
            state = procs.look(int(thread))
            waits, call = _read(f"{where}/wchan"), _read(f"{where}/syscall").split(" ")[0]
            alike[f"{state.state if state else '?'} in {waits}, system call {call}"] += 1
    for text, count in alike.items():
        yield f"  {pid} {process.comm} {count} x {text}{_sleeps(pid)}"


def _sleeps(pid: int) -> str:
    """Whether a worker's status page says to its peers that it sleeps (rings/status.py)."""
    with suppress(OSError):
        for number in os.listdir(f"/proc/{pid}/fd"):
            link = f"/proc/{pid}/fd/{number}"
            if "kbusd-status" in os.readlink(link):
                with open(link, "rb") as page:
                    return f", status page: sleeping={struct.unpack('=I', page.read(4))[0]}"
    return ""


def _read(path: str) -> str:
    with suppress(OSError), open(path, encoding="utf-8", errors="replace") as file:
        return file.read().strip()
    return ""


def _said(bus: Bus) -> Iterator[str]:
    try:
        asker = RawClient(bus.address)
    except (AssertionError, Disconnected, OSError) as error:
        yield f"  nothing: {error!r}"
        return
    try:
        asker.sock.settimeout(SECONDS)
        (names,) = asker.driver("ListNames")
        (rules,) = asker.driver("GetAllMatchRules", interface=STATS)
        for name in names:
            with suppress(BusError):
                (owner,) = asker.driver("GetNameOwner", "s", (name,))
                (process,) = asker.driver("GetConnectionUnixProcessID", "s", (name,))
                yield f"  {name} is {owner}, process {process}, rules: {rules.get(name, [])}"
    except (AssertionError, BusError, Disconnected, OSError) as error:
        yield f"  no more: {error!r}"
    finally:
        asker.close()
