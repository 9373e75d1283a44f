"""The launcher as a process: what it runs, what it reports, what it leaves."""

from __future__ import annotations

import fcntl
import os
import pwd
import select
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kbusd.rings import entries as e
from kbusd.rings import memfd
from kbusd.rings.line import Line, pair
from kbusd.sandbox.compile import compile_all
from kbusd.sandbox.compiled import encode

SECONDS = 10.0
FILES = "234"
PROFILE = encode(compile_all()["launcher"])


class Launcher:
    """The process, and the broker's end of its line."""

    def __init__(self, stderr: int | None = None) -> None:
        ours, theirs = pair()
        with theirs:
            self.process = start(theirs, memfd.sealed("profile", PROFILE), stderr)
        self.line = Line(ours, e.FromLauncher)

    def ask(self, message: Any) -> None:
        self.line.send(message)

    def answer(self) -> Any:
        assert select.select([self.line], [], [], SECONDS)[0], "the launcher does not answer"
        received = self.line.receive()
        assert received is not None
        return received[0]

    def run(self, *arguments: str, user: str = "", **environment: str) -> Any:
        self.ask(e.Launch(1, "a.b", arguments, user, environment))
        return self.answer()

    def end(self) -> int:
        self.line.close()
        return self.process.wait(SECONDS)


def start(line: socket.socket, profile: int, stderr: int | None) -> subprocess.Popen[bytes]:
    """`python -m kbusd.supervisor.launcher` with the line as 3 and the profile as 4."""
    high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 200) for fd in (line.fileno(), profile)]
    command = 'exec "$@" 3<&{0} 4<&{1} {0}<&- {1}<&-'.format(*high)
    try:
        return subprocess.Popen(
            ["bash", "-c", command, "sh", sys.executable, "-m", "kbusd.supervisor.launcher", FILES],
            pass_fds=high,
            stderr=stderr,
            env=os.environ | {"KBUSD_TEST": "inherited"},
        )
    finally:
        for fd in (*high, profile):
            os.close(fd)


@pytest.fixture
def launcher() -> Iterator[Launcher]:
    launcher = Launcher()
    try:
        yield launcher
    finally:
        launcher.line.close()
        try:
            launcher.process.wait(SECONDS)
        finally:
            launcher.process.kill()


def test_reports_how_a_service_ended(launcher: Launcher) -> None:
    assert launcher.run("/bin/sh", "-c", "exit 3") == e.LaunchEnded(1, 3 << 8, "")
    ended = launcher.run("/bin/sh", "-c", "kill -9 $$")
    assert os.WTERMSIG(ended.status) == signal.SIGKILL


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("/nonexistent", "No such file or directory"),
        ("/etc/passwd", "Permission denied"),
        ("/tmp", "Permission denied"),
        ("sh", "No such file or directory"),  # it is on PATH
        ("a\0b", "No such file or directory"),
    ],
)
def test_reports_at_once_what_cannot_be_executed(
    launcher: Launcher, program: str, reason: str
) -> None:
    assert launcher.run(program) == e.LaunchEnded(1, 0, reason)


def test_a_service_inherits_environment_and_nothing_else(
    launcher: Launcher, tmp_path: Path
) -> None:
    script = (
        f'cd {tmp_path}; echo "$KBUSD_TEST $EXTRA" > env; ls /proc/$$/fd > fds;'
        ' grep -E "^Sig(Blk|Ign)" /proc/self/status > signals; readlink /proc/$$/fd/0 > stdin;'
        ' cut -d" " -f1,6 /proc/$$/stat > session; ulimit -n > files'
    )
    assert launcher.run("/bin/sh", "-c", script, EXTRA="given").status == 0
    assert (tmp_path / "env").read_text() == "inherited given\n"
    assert set((tmp_path / "fds").read_text().split()) <= {"0", "1", "2", "10"}
    for line in (tmp_path / "signals").read_text().splitlines():
        # posix_spawn of glibc leaves its own two signals, 32 and 33, ignored.
        assert int(line.split()[1], 16) & ~(3 << 31) == 0, line
    assert (tmp_path / "stdin").read_text() == "/dev/null\n"
    assert (tmp_path / "files").read_text().strip() == FILES
    pid, session = (tmp_path / "session").read_text().split()
    assert pid == session


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can run a service as another user")
def test_a_service_of_another_user(launcher: Launcher, tmp_path: Path) -> None:
    user = pwd.getpwnam("daemon")
    os.chown(tmp_path, user.pw_uid, user.pw_gid)
    for parent in tmp_path.parents:
        if parent.stat().st_mode & 0o777 == 0o700:
            parent.chmod(0o711)
    script = f"cd {tmp_path}; id -u > id; id -G >> id; env > env; pwd -P >/dev/null"
    assert launcher.run("/bin/sh", "-c", script, user="daemon", ONLY="this").status == 0
    uid, groups = (tmp_path / "id").read_text().splitlines()
    assert int(uid) == user.pw_uid
    assert {int(group) for group in groups.split()} == set(os.getgrouplist("daemon", user.pw_gid))
    environment = (tmp_path / "env").read_text()
    assert "ONLY=this\n" in environment
    assert "KBUSD_TEST" not in environment


def test_a_user_that_does_not_exist(launcher: Launcher) -> None:
    ended = launcher.run("/bin/true", user="no such user")
    assert ended == e.LaunchEnded(1, 0, "there is no user no such user")


@pytest.mark.parametrize("user", ["", "daemon"] if os.geteuid() == 0 else [""])
def test_a_late_service_is_killed(launcher: Launcher, user: str) -> None:
    launcher.ask(e.Launch(5, "a.b", ("/bin/sleep", "1000"), user, {}))
    launcher.ask(e.EndLaunch(5))
    ended = launcher.answer()
    assert ended.job == 5
    assert os.WTERMSIG(ended.status) == signal.SIGKILL


def test_looks_when_directories_changed(launcher: Launcher, tmp_path: Path) -> None:
    missing = str(tmp_path / "missing")
    launcher.ask(e.Look((str(tmp_path), missing)))
    times = {str(tmp_path): tmp_path.stat().st_mtime_ns, missing: 0}
    assert launcher.answer() == e.Looked(times, False)


@pytest.mark.parametrize("path", ["", "relative/missing", "//missing", "/\0"])
def test_what_is_no_absolute_path_kept_it_busy_for_ever(launcher: Launcher, path: str) -> None:
    """An honest broker asks for no such path."""
    launcher.ask(e.Look((path,)))
    assert launcher.answer() == e.Looked({path: 0}, False)


def test_services_outlive_the_launcher(launcher: Launcher, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    script = f"echo $$ > {tmp_path}/pid; read line < {tmp_path}/fifo"
    launcher.ask(e.Launch(1, "a.b", ("/bin/sh", "-c", script), "", {}))
    launcher.ask(e.Look(()))
    launcher.answer()
    assert launcher.end() == 0
    with open(tmp_path / "fifo", "w") as fifo:  # waits until the service reads
        fifo.write("go on\n")
    os.kill(int((tmp_path / "pid").read_text()), 0)


def test_a_record_that_does_not_decode_ends_it(launcher: Launcher) -> None:
    """Not as what another would end by as well: then it is started anew."""
    launcher.line.sock.send(b"\xc1")
    assert launcher.process.wait(SECONDS) == 0


@pytest.mark.parametrize("user", ["", "daemon"] if os.geteuid() == 0 else [""])
def test_what_services_wrote_to_their_stdout_was_lost(user: str, tmp_path: Path) -> None:
    with (tmp_path / "log").open("w+") as log:
        launcher = Launcher(stderr=log.fileno())
        assert launcher.run("/bin/sh", "-c", "echo said; echo loudly >&2", user=user).status == 0
        assert launcher.end() == 0
        log.seek(0)
        assert log.read() == "said\nloudly\n"


# -- what it watches -------------------------------------------------------------------------------


def watched(launcher: Launcher, *directories: Path) -> None:
    launcher.ask(e.Look(tuple(map(str, directories))))
    assert not launcher.answer().changed


def write(path: Path) -> None:
    path.write_text("new")


CHANGES = {
    "written": lambda path: write(path / "old.conf"),
    "new": lambda path: write(path / "a.b.service"),
    "removed": lambda path: (path / "old.conf").unlink(),
    "renamed over": lambda path: (path / "temporary").rename(path / "old.conf"),
    "renamed away": lambda path: (path / "old.conf").rename(path / "old.conf.bak"),
    "linked": lambda path: (path / "b.conf").symlink_to("/dev/null"),
    "directory moved": lambda path: path.rename(path.with_name("elsewhere")),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_tells_of_a_change(launcher: Launcher, tmp_path: Path, change: Any) -> None:
    directory = tmp_path / "watched"
    directory.mkdir()
    write(directory / "old.conf")
    write(directory / "temporary")
    watched(launcher, directory)
    change(directory)
    assert launcher.answer() == e.FilesChanged()


def test_what_is_not_read_is_no_change(launcher: Launcher, tmp_path: Path) -> None:
    watched(launcher, tmp_path)
    for name in (".old.conf.swp", "README", "a.conf.dpkg-new"):
        write(tmp_path / name)
    (tmp_path / "a.conf.dpkg-new").unlink()
    launcher.ask(e.Look((str(tmp_path),)))
    assert not launcher.answer().changed


def test_a_directory_that_appears_later(launcher: Launcher, tmp_path: Path) -> None:
    directory = tmp_path / "dbus-1" / "services"
    watched(launcher, directory, tmp_path)
    write(tmp_path / "other")
    directory.parent.mkdir()
    assert launcher.answer() == e.FilesChanged()
    directory.mkdir()
    assert launcher.answer() == e.FilesChanged()
    write(directory / "a.b.service")
    assert launcher.answer() == e.FilesChanged()
    shutil.rmtree(directory.parent)
    assert launcher.answer() == e.FilesChanged()
    directory.mkdir(parents=True)
    write(directory / "a.b.service")
    while True:  # it may have been told of the removal in two parts
        launcher.ask(e.Look((str(directory), str(tmp_path))))
        while isinstance(answer := launcher.answer(), e.FilesChanged):
            pass
        if not answer.changed:
            break
    write(directory / "a.b.service")
    assert launcher.answer() == e.FilesChanged()


def test_what_is_watched_no_more_is_no_change(launcher: Launcher, tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    new.mkdir()
    watched(launcher, old)
    watched(launcher, new)
    write(old / "a.conf")
    watched(launcher, new)
