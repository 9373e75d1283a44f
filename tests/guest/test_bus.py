"""The bus in the guest: a kernel without Landlock and vDSO, with SELinux but no policy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.bus import procs
from tests.bus.daemon import Bus

pytestmark = pytest.mark.guest


@pytest.fixture(scope="module")
def bus() -> Iterator[Bus]:
    started = Bus()
    yield started
    started.stop()


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=30)


def test_root_starts_a_bus_with_the_default_profiles_and_a_client_uses_it(bus: Bus) -> None:
    destination = "org.freedesktop.DBus"
    call = [f"--bus={bus.address}", "--print-reply", f"--dest={destination}", "/"]
    done = run("dbus-send", *call, f"{destination}.ListNames")
    assert done.returncode == 0, done.stderr
    assert f'string "{destination}"' in done.stdout


def test_every_wall_but_landlock_is_up(bus: Bus) -> None:
    bus.connect().driver("GetId")
    command = [sys.executable, "-m", "kbusd.ctl.main", "workers", "--pid", str(bus.pid), "--json"]
    done = run(*command)
    assert done.returncode == 0, done.stdout + done.stderr
    found = [row["process"] for row in json.loads(done.stdout)]
    confined = [each for each in found if each["role"] not in ("supervisor", "launcher")]
    assert {each["role"] for each in confined} == {"broker", "zygote", "worker"}
    for process in confined:
        assert process["seccomp"] == 2
        assert process["no_new_privileges"]
        setuid = 1 << 7 if process["role"] == "zygote" else 0  # for its children
        assert process["permitted"] == setuid and process["bounding"] == 0
        assert 0 not in process["uids"]
        # The namespaces are not root's.
        for kind in ("net", "ipc"):
            there = os.readlink(f"/proc/{process['pid']}/ns/{kind}")
            assert there != os.readlink(f"/proc/self/ns/{kind}")


def test_a_worker_that_is_killed_costs_its_client_and_nobody_else(bus: Bus) -> None:
    one, other = bus.connect(), bus.connect()
    os.kill(bus.worker_of(one).pid, 9)
    procs.eventually(
        lambda: one.name not in other.driver("ListNames")[0], "the name of the client goes"
    )


def test_selinux_without_a_policy_counts_as_none(bus: Bus) -> None:
    """A kernel with it asks for a policy; until there is one, every process is `kernel`."""
    assert os.path.exists("/sys/fs/selinux/enforce")
    assert "selinux" not in bus.log().lower()
