"""The whole bus in its SELinux domains, enforced, under Debian's policy and with labels by path.

It is started as init starts it. Nothing that it does is refused; what each of its domains must not do, is.
"""

from __future__ import annotations

import ctypes
import errno
import json
import mmap
import os
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.bus import procs
from tests.bus.rawclient import BusError, RawClient

from . import domains
from .domains import Inhabitant, Refusal, Refusals, context, sockets_labelled

pytestmark = pytest.mark.guest("selinux")

SOCKET = "/run/dbus/system_bus_socket"
ADDRESS = f"unix:path={SOCKET}"
PID_FILE = Path("/run/dbus/pid")
LOG = Path("/run/kbusd-test-log")
OURS = ("kbusd_t", "kbusd_config_t", "kbusd_broker_t", "kbusd_launcher_t", "kbusd_zygote_t", "kbusd_worker_t")
CONFIGURATION = """<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig><policy context="default">
  <allow own="*"/> <allow send_destination="*"/> <allow receive_sender="*"/>
</policy></busconfig>
"""
libc = ctypes.CDLL(None, use_errno=True)


def _init() -> None:
    """What init does: run it with a log."""
    log = os.open(LOG, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    null = os.open("/dev/null", os.O_RDWR)
    for to, fd in ((0, null), (1, null), (2, log)):
        os.dup2(fd, to)
    os.closerange(3, 256)
    command = ["/usr/bin/kbusd", "--system", "--nofork", "--cuse", "--kdbusfs", "/run/kbusd/fs"]
    os.execve(command[0], command, {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"})


class System:
    """The running bus."""

    def __init__(self) -> None:
        Path("/etc/dbus-1/system.d/test.conf").write_text(CONFIGURATION)
        os.makedirs("/run/kbusd/fs", exist_ok=True)
        subprocess.run(["restorecon", "-RF", "/etc/dbus-1", "/run/kbusd"], check=True)
        self.refusals = Refusals()
        self.process = Inhabitant("init_t", _init)
        self.process.go()
        domains.ENFORCE.write_text("1")
        procs.eventually(lambda: self.ready(), "the bus is ready", 50)

    def ready(self) -> bool:
        fs = Path("/proc/self/mountinfo").read_text()
        return os.path.exists(SOCKET) and "fuse.kbusd" in fs and Path("/dev/kdbus/0-system/bus").exists()

    def stop(self) -> None:
        os.kill(self.process.pid, signal.SIGTERM)
        self.process.wait()
        domains.ENFORCE.write_text("0")

    def connect(self, domain: str = "unconfined_t") -> RawClient:
        with sockets_labelled(context(domain)):
            return RawClient(ADDRESS)

    def processes(self) -> dict[str, list[int]]:
        """By domain."""
        found: dict[str, list[int]] = {}
        for pid in filter(str.isdigit, os.listdir("/proc")):
            try:
                label = Path("/proc", pid, "attr/current").read_text()
            except OSError:
                continue
            found.setdefault(label.split(":")[2] if ":" in label else "", []).append(int(pid))
        return found


@pytest.fixture(scope="module")
def system() -> Iterator[System]:
    started = System()
    try:
        yield started
    finally:
        started.stop()


def test_each_process_is_in_its_domain(system: System) -> None:
    client = system.connect()
    found = system.processes()
    for domain in OURS:
        if domain != "kbusd_config_t":  # it has read, and is gone
            assert found.get(domain), domain
    done = subprocess.run(
        ["kbusctl", "workers", "--pid", str(system.process.pid), "--json"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    rows = json.loads(done.stdout)
    differ = {text for row in rows for text in row["differences"] if "SELinux" in text}
    assert rows and not differ
    client.close()


def test_debug(system: System) -> None:
    seen = set()
    for each in system.refusals.take():
        if each[:4] not in seen:
            seen.add(each[:4])
            print(each.line)
    print(LOG.read_text())
    assert 0
