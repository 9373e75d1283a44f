"""Services that everybody has, unchanged, started by the bus: polkit on a system bus under Debian's own
policy, dconf on a session bus. What they answer on dbus-daemon, they answer here."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from .clients import SECONDS, run
from .daemon import Bus, clean_environment, configuration

POLKIT = "org.freedesktop.PolicyKit1"
AUTHORITY = f"/{POLKIT.replace('.', '/')}/Authority"
NOBODY = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]


@pytest.fixture
def system(start_bus: Callable[..., Bus]) -> Bus:
    """Debian's system bus at another place. What it activates runs on the bus that started it."""
    if os.geteuid() != 0:
        pytest.skip("services run as their own users")
    bus = start_bus(
        "<busconfig><include>/usr/share/dbus-1/system.conf</include></busconfig>",
        options=["--nopidfile", "--nosyslog", "--address=unix:tmpdir=/tmp"],
    )
    return bus


def on_system(bus: Bus, *command: str) -> str:
    done = subprocess.run(
        command,
        env=clean_environment(DBUS_SYSTEM_BUS_ADDRESS=bus.address),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    return done.stdout


@pytest.mark.kbusd_only  # dbus-daemon's helper does not say where a bus at another place is
def test_polkit_answers_whom_its_policy_lets(system: Bus) -> None:
    out = on_system(system, "busctl", "introspect", POLKIT, AUTHORITY)
    assert ".CheckAuthorization" in out
    ask = ["gdbus", "call", "--system", "--dest", POLKIT, "--object-path", AUTHORITY, "--method"]
    assert "(true, false," in on_system(
        system,
        *ask,
        f"{POLKIT}.Authority.CheckAuthorization",
        f"('unix-process', {{'pid': <uint32 {os.getpid()}>, 'start-time': <uint64 0>}})",
        "org.freedesktop.policykit.exec",
        "{}",
        "0",
        "",
    )
    own = ["gdbus", "call", "--system", "-d", "org.freedesktop.DBus", "-o", "/", "-m"]
    out = on_system(system, *NOBODY, *own, "org.freedesktop.DBus.RequestName", POLKIT + "x", "0")
    assert "is not allowed to own the service" in out


def test_dconf_keeps_what_is_written(start_bus: Callable[..., Bus], tmp_path: Path) -> None:
    bus = start_bus(
        configuration("unix:tmpdir=/tmp", extra="<standard_session_servicedirs/>"),
        env=clean_environment(HOME=str(tmp_path), XDG_RUNTIME_DIR=str(tmp_path)),
    )
    env = ["env", f"HOME={tmp_path}", f"XDG_RUNTIME_DIR={tmp_path}", "dconf"]
    run(bus, *env, "write", "/test/key", "'kept'")
    assert run(bus, *env, "read", "/test/key") == "'kept'\n"
    assert "wanted by" in bus.log() or "Activating service" in bus.log()
