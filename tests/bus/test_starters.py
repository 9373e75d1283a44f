"""Programs that start a bus themselves: dbus-run-session, dbus-launch, GTestDBus, a plain symlink."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from pathlib import Path

import pytest

from . import procs
from .clients import DEBIAN_PYTHON, SECONDS, run_reaped
from .daemon import (
    STOP_SECONDS,
    clean_environment,
    daemon_command,
    is_reference,
    path_with_daemon,
)
from .rawclient import RawClient

SERVICES = Path(__file__).with_name("services")
LIST_NAMES = "dbus-send --session --print-reply --dest=org.freedesktop.DBus / " + (
    "org.freedesktop.DBus.ListNames"
)


@pytest.fixture
def path(tmp_path: Path) -> str:
    return path_with_daemon(tmp_path)


def test_dbus_run_session(path: str) -> None:
    out = run_reaped("dbus-run-session", "--", "sh", "-c", LIST_NAMES, PATH=path)
    assert 'string "org.freedesktop.DBus"' in out


def test_dbus_run_session_with_daemon_option() -> None:
    (program,) = daemon_command()
    out = run_reaped("dbus-run-session", f"--dbus-daemon={program}", "--", "sh", "-c", LIST_NAMES)
    assert 'string "org.freedesktop.DBus"' in out


def test_dbus_run_session_gives_the_exit_status_of_its_program(path: str) -> None:
    run_reaped("dbus-run-session", "--", "sh", "-c", "exit 3", status=3, PATH=path)


def test_dbus_run_session_activates_services(path: str, tmp_path: Path) -> None:
    """Through the standard service directories, found by XDG_DATA_HOME."""
    directory = tmp_path / "data" / "dbus-1" / "services"
    directory.mkdir(parents=True)
    (directory / "test.Started.service").write_text(
        "[D-BUS Service]\nName=test.Started\n"
        f"Exec={DEBIAN_PYTHON} {SERVICES / 'glib_service.py'} test.Started\n"
    )
    call = "gdbus call --session --dest test.Started --object-path /test/Object --method "
    script = f"{call} test.Interface.Upper abc"
    out = run_reaped(
        "dbus-run-session", "--", "sh", "-c", script, PATH=path, XDG_DATA_HOME=f"{tmp_path}/data"
    )
    assert "('ABC',)" in out


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts something in a namespace")
def test_dbus_launch(path: str) -> None:
    """Forks a bus into the background and says where it is. It looks on PATH only if it does not find
    the dbus-daemon that it was built with, in whose place the one under test stands here."""
    script = 'mount --bind "$(command -v dbus-daemon)" /usr/bin/dbus-daemon && exec dbus-launch --sh-syntax'
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        env=clean_environment(PATH=path),
        text=True,
        timeout=SECONDS,
        check=True,
    )
    address = re.search(r"DBUS_SESSION_BUS_ADDRESS='(.*)'", done.stdout)
    pid = re.search(r"DBUS_SESSION_BUS_PID=(\d+)", done.stdout)
    assert address
    assert pid
    tree = procs.descendants(int(pid[1]))
    main = procs.look(int(pid[1]))
    assert main
    try:
        assert is_reference() or "kbusd-broker" in {process.comm for process in tree}
        client = RawClient(address[1])
        assert client.request_name("test.Launched") == 1
        client.close()
    finally:
        os.kill(main.pid, signal.SIGTERM)
        for process in [main, *tree]:
            procs.eventually(lambda p=process: not procs.alive(p), "the bus ends", STOP_SECONDS)


def test_gtestdbus(path: str) -> None:
    out = run_reaped(DEBIAN_PYTHON, str(SERVICES / "gtestdbus.py"), PATH=path)
    assert "all good" in out
    assert "--config-file" in out


def test_symlink_called_dbus_daemon(path: str) -> None:
    """Whatever looks up `dbus-daemon` on PATH gets us; --version tells who it is."""
    out = run_reaped("sh", "-c", "dbus-daemon --version", PATH=path)
    assert out.strip()
