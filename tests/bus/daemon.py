"""Starts the bus under test as a private bus, and shows that nothing of it is left at the end.

The daemon is `kbusd` beside the running Python, or what KBUSD_TEST_DAEMON says; with
KBUSD_TEST_DAEMON=/usr/bin/dbus-daemon the same tests run on the reference.
"""

from __future__ import annotations

import os
import select
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import pytest

from . import procs
from .rawclient import TIMEOUT, RawClient, socket_address

STOP_SECONDS = 8.0


def daemon_command() -> list[str]:
    """The command that starts the daemon under test, without options."""
    if given := os.environ.get("KBUSD_TEST_DAEMON"):
        return shlex.split(given)
    installed = Path(sys.executable).with_name("kbusd")
    return [str(installed)] if installed.exists() else [sys.executable, "-m", "kbusd.main"]


def is_reference() -> bool:
    """Whether the daemon under test is the reference dbus-daemon and not kbusd."""
    program = shutil.which(daemon_command()[0])
    return program is not None and Path(program).resolve().name == "dbus-daemon"


OPEN_POLICY = """
  <policy context="default">
    <allow send_destination="*" eavesdrop="true"/>
    <allow eavesdrop="true"/>
    <allow own="*"/>
  </policy>
"""

# As Debian's session.conf without eavesdrop: with eavesdrop="true" dbus-daemon lets replies pass
# that nobody asked for.
STRICT_POLICY = """
  <policy context="default">
    <allow send_destination="*"/>
    <allow receive_sender="*"/>
    <allow own="*"/>
  </policy>
"""


def configuration(
    listen: str,
    *,
    type_: str = "session",
    policy: str = OPEN_POLICY,
    limits: dict[str, int] | None = None,
    extra: str = "",
) -> str:
    """A configuration file's text. `extra` goes in before the policy."""
    lines = "".join(f'  <limit name="{name}">{n}</limit>\n' for name, n in (limits or {}).items())
    return (
        '<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"\n'
        ' "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">\n'
        f"<busconfig>\n  <type>{type_}</type>\n  <listen>{listen}</listen>\n"
        f"  <auth>EXTERNAL</auth>\n{extra}{policy}{lines}</busconfig>\n"
    )


def clean_environment(**changes: str) -> dict[str, str]:
    """Our environment without anything that points to another bus."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("DBUS_", "LISTEN_", "NOTIFY_"))}
    return env | changes


def path_with_daemon(directory: Path) -> str:
    """A PATH on which the first program called dbus-daemon is the daemon under test."""
    program = shutil.which(daemon_command()[0])
    assert program and len(daemon_command()) == 1, "needs a daemon that is one program"
    link = directory / "dbus-daemon"
    if not link.exists():
        link.symlink_to(program)
    return f"{directory}:{os.environ['PATH']}"


def read_line(pipe: IO[bytes], timeout: float = TIMEOUT) -> str:
    """One line from an unbuffered pipe; fails if it does not come, or is empty at the end."""
    deadline = time.monotonic() + timeout
    line = b""
    while not line.endswith(b"\n"):
        ready, _, _ = select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))
        assert ready, f"no whole line within {timeout} s, only {line!r}"
        data = os.read(pipe.fileno(), 4096)
        if not data:
            break
        line += data
    return line.decode().rstrip("\n")


class Bus:
    """A running private bus; its files are in `directory`."""

    def __init__(
        self,
        config: str | None = None,
        *,
        options: list[str] | None = None,
        env: dict[str, str] | None = None,
        prefix: list[str] | None = None,
        daemon: list[str] | None = None,
        **shape: Any,
    ) -> None:
        """`prefix` is a command that execs the daemon's, such as prlimit(1); `daemon`: if not the usual."""
        self.directory = Path(tempfile.mkdtemp(prefix="kbt-", dir="/tmp"))
        self.directory.chmod(0o755)
        self.services = self.directory / "services"
        self.services.mkdir()
        self.socket = self.directory / "bus"
        self.config = self.directory / "bus.conf"
        extra = f"  <servicedir>{self.services}</servicedir>\n" + shape.pop("extra", "")
        self.config.write_text(
            config or configuration(f"unix:path={self.socket}", extra=extra, **shape)
        )
        self.log_path = self.directory / "log"
        self.clients: list[RawClient] = []
        self.janitor: RawClient | None = None  # of a bus that tests share; see conftest.py
        self.log_mark = 0  # where in the log the running test began
        self.stopped = False
        reader, writer = os.pipe()
        # It does not outlive a test run that is killed.
        command = ["setpriv", "--pdeathsig", "TERM", *(prefix or []), *(daemon or daemon_command())]
        command += [f"--config-file={self.config}", "--nofork"]
        command += [f"--print-address={writer}", *(options or [])]
        with self.log_path.open("wb") as log, os.fdopen(reader, "rb", 0) as pipe:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=env or clean_environment(),
                pass_fds=[writer],
                start_new_session=True,
            )
            os.close(writer)
            try:
                self.address = read_line(pipe)
                assert self.address, "the bus ended without printing an address"
            except AssertionError as error:
                log_text = self.log()
                self.kill()
                raise AssertionError(f"{error}; its log:\n{log_text}") from None

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def guid(self) -> str:
        return self.address.rpartition("guid=")[2]

    def env(self, **changes: str) -> dict[str, str]:
        """An environment for clients of this bus."""
        return clean_environment(DBUS_SESSION_BUS_ADDRESS=self.address, **changes)

    def connect(self, **options: Any) -> RawClient:
        """A new client, closed by close_clients()."""
        client = RawClient(self.address, **options)
        self.clients.append(client)
        return client

    def close_clients(self) -> None:
        while self.clients:
            self.clients.pop().close()

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def is_alive(self) -> bool:
        return self.process.poll() is None

    def tree(self) -> list[procs.Process]:
        """The bus's processes without the services that it activated."""
        below = procs.descendants(self.pid)
        return [p for p in below if "DBUS_STARTER_ADDRESS" not in procs.environment(p.pid)]

    def workers(self) -> list[procs.Process]:
        """kbusd's worker processes, spare ones included."""
        return [process for process in self.tree() if process.comm.startswith("kbusd-worker")]

    def worker_of(self, client: RawClient) -> procs.Process:
        """The worker process that serves a client."""
        link = f"socket:[{procs.peer_inode(client.sock)}]"
        for process in self.workers():
            if link in procs.descriptors(process.pid):
                return process
        raise AssertionError(f"no worker holds the other end of {client.name}")

    def _activated(self) -> list[procs.Process]:
        def ours(process: procs.Process) -> bool:
            address = procs.environment(process.pid).get("DBUS_STARTER_ADDRESS", "")
            return address.partition(",")[0] == self.address.partition(",")[0]

        return [process for process in procs.all_processes() if ours(process)]

    def stop(self, number: int = signal.SIGTERM) -> None:
        """End the bus by a signal and check that it ends in time, cleanly, leaving nothing."""
        if self.stopped:
            return
        self.close_clients()
        if self.janitor:
            self.janitor.close()
        tree = self.tree()
        services = self._activated()
        try:
            assert self.is_alive(), f"the bus ended by itself: {self.process.returncode}"
            self.process.send_signal(number)
            try:
                status = self.process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                raise AssertionError(f"did not end within {STOP_SECONDS} s of the signal") from None
            assert status in (0, -number), f"ended with status {status}"
            procs.eventually(
                lambda: not any(procs.alive(p) for p in tree),
                f"the processes of the bus end: {[p for p in tree if procs.alive(p)]}",
                2.0,
            )
            path = socket_address(self.address)
            assert path.startswith("\0") or not os.path.exists(path), f"{path} was left behind"
            assert "Traceback" not in self.log(), f"an exception in the log:\n{self.log()}"
        finally:
            self.kill(services + tree)

    def kill(self, others: list[procs.Process] | None = None) -> None:
        """End what is left, by force, and remove the directory."""
        self.stopped = True
        self.close_clients()
        if self.janitor:
            self.janitor.close()
        left = (others or []) + procs.descendants(self.pid)
        if self.is_alive():
            self.process.kill()
        self.process.wait()
        for process in left:
            if procs.alive(process):
                os.kill(process.pid, signal.SIGKILL)
        procs.eventually(lambda: not any(procs.alive(p) for p in left), "killed processes end")
        shutil.rmtree(self.directory, ignore_errors=True)


def need_a_tree_for_all(become: Sequence[str]) -> None:
    """Skip where the tree lies in a directory that the other user may not enter (/root, say)."""
    command = [*become, "test", "-x", sys.executable]
    if subprocess.run(command, check=False).returncode != 0:
        pytest.skip(f"an ordinary user can't reach {sys.executable}")
