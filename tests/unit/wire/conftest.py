"""The real dbus-daemon, to compare with."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

_CONFIGURATION = """<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig><listen>unix:path={path}</listen>{more}
<policy context="default"><allow user="*"/><allow own="*"/>
<allow send_destination="*" eavesdrop="true"/><allow eavesdrop="true"/></policy></busconfig>"""


class DbusDaemon:
    """One running dbus-daemon at the socket `path`."""

    def __init__(self, path: Path, process: subprocess.Popen[bytes]) -> None:
        self.path = path
        self.process = process

    def connect(self) -> socket.socket:
        client = socket.socket(socket.AF_UNIX)
        client.settimeout(10)
        client.connect(str(self.path))
        return client


@pytest.fixture(scope="module")
def dbus_daemon(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[[str], DbusDaemon]]:
    """Starts dbus-daemons with further lines of configuration; all are gone at the end."""
    if shutil.which("dbus-daemon") is None:
        pytest.skip("needs the real dbus-daemon")
    started: dict[str, DbusDaemon] = {}

    def start(more: str) -> DbusDaemon:
        if more in started:
            return started[more]
        directory = tmp_path_factory.mktemp("bus")
        path = directory / "socket"
        file = directory / "bus.conf"
        file.write_text(_CONFIGURATION.format(path=path, more=more))
        read, write = os.pipe()
        process = subprocess.Popen(
            ["dbus-daemon", f"--config-file={file}", "--nofork", f"--print-address={write}"],
            pass_fds=(write,),
            stderr=subprocess.DEVNULL,
        )
        os.close(write)
        with open(read, "rb") as address:  # it listens once it has written its address
            assert address.readline()
        started[more] = DbusDaemon(path, process)
        return started[more]

    yield start
    for daemon in started.values():
        daemon.process.kill()
        daemon.process.wait()
