"""`kbusd --kdbusfs`: a mount while the bus runs, and none after it, however it ends."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.bus import procs
from tests.bus.daemon import Bus, daemon_command

from .places import GUEST, NATIVE, everywhere
from .rig import command, errno_of

NO_COMMAND = command(0x7F)
FILE = "session/bus"


@contextmanager
def mountpoint() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="kdbusfs-", dir="/tmp"))
    yield path
    path.rmdir()


def start(path: Path) -> Bus:
    return Bus(options=[f"--kdbusfs={path}"], prefix=["env"])


def file_of(path: Path) -> str:
    return f"{path}/{os.geteuid()}-{FILE}"


def workers_of(bus: Bus) -> set[int]:
    return {process.pid for process in bus.workers()}


@everywhere(NATIVE + GUEST)
def test_a_file_of_the_bus_is_served_by_a_worker_of_its_own() -> None:
    with mountpoint() as path:
        bus = start(path)
        file = file_of(path)
        status = os.stat(file)
        assert (status.st_mode, status.st_uid) == (0o100600, os.geteuid())
        assert os.listdir(path) == ["control", f"{os.geteuid()}-session"]
        fd = os.open(file, os.O_RDWR | os.O_CLOEXEC)
        other = os.open(file, os.O_RDWR | os.O_CLOEXEC)
        assert errno_of(lambda: fcntl.ioctl(fd, NO_COMMAND)) == "ENOTTY"

        # A client of the socket is served as ever.
        client = bus.connect()
        assert client.driver("GetId")

        before = workers_of(bus)
        os.close(other)
        procs.eventually(lambda: before - workers_of(bus), "its worker ends")
        assert errno_of(lambda: fcntl.ioctl(fd, NO_COMMAND)) == "ENOTTY"
        bus.stop()
        assert os.listdir(path) == []
        assert errno_of(lambda: fcntl.ioctl(fd, NO_COMMAND)) in ("ENOTCONN", "ECONNABORTED")
        os.close(fd)


@everywhere(NATIVE)
def test_a_worker_that_is_killed_takes_its_client_along_and_nobody_else() -> None:
    with mountpoint() as path:
        bus = start(path)
        spare = workers_of(bus)
        fds = [os.open(file_of(path), os.O_RDWR | os.O_CLOEXEC) for _ in range(2)]
        assert errno_of(lambda: fcntl.ioctl(fds[0], NO_COMMAND)) == "ENOTTY"
        # All that there are: the files' two, the tree, and those to spare.
        for pid in workers_of(bus) | spare:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        procs.eventually(
            lambda: errno_of(lambda: fcntl.ioctl(fds[0], NO_COMMAND)) == "ECONNRESET",
            "the client hears of it",
        )
        assert errno_of(lambda: fcntl.ioctl(fds[1], NO_COMMAND)) == "ECONNRESET"

        def served() -> bool:
            fd = os.open(file_of(path), os.O_RDWR | os.O_CLOEXEC)  # with a new tree, too
            try:
                return errno_of(lambda: fcntl.ioctl(fd, NO_COMMAND)) == "ENOTTY"
            finally:
                os.close(fd)

        # Dead ones are handed out till the supervisor knows that they are dead.
        procs.eventually(served, "new clients are served by new workers")
        for fd in fds:
            os.close(fd)
        bus.stop()
        assert os.listdir(path) == []


@everywhere(NATIVE + GUEST)
def test_the_dead_mount_of_a_killed_bus_is_taken_away_by_the_next() -> None:
    with mountpoint() as path:
        bus = start(path)
        os.kill(bus.pid, signal.SIGKILL)
        bus.process.wait()
        bus.kill()
        assert errno_of(lambda: os.listdir(path)) == "ENOTCONN"
        another = start(path)
        assert os.path.exists(file_of(path))

        # But not that of one that lives.
        done = subprocess.run(
            [*daemon_command(), f"--config-file={another.config}", f"--kdbusfs={path}"]
            + [f"--address=unix:path={another.directory}/third", "--nofork"],
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
        assert done.returncode == 1 and "another kbusd" in done.stderr, done
        assert os.path.exists(file_of(path))
        another.stop()
        assert os.listdir(path) == []


@everywhere(NATIVE)
def test_a_mount_point_that_is_none_is_refused() -> None:
    with mountpoint() as path:
        bus = Bus()
        for where, reason in [(path / "missing", errno.ENOENT), (bus.config, errno.ENOTDIR)]:
            done = subprocess.run(
                [*daemon_command(), f"--config-file={bus.config}", f"--kdbusfs={where}"]
                + [f"--address=unix:path={bus.directory}/other", "--nofork"],
                capture_output=True,
                text=True,
                timeout=20,
                check=False,
            )
            assert done.returncode == 1 and os.strerror(reason) in done.stderr, done
            assert str(where) in done.stderr
        bus.stop()
