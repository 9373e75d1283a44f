"""The processes of a running bus are confined as their profiles say; the services it starts are not."""

from __future__ import annotations

import ctypes
import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kbusd.sandbox import inforce, profiles
from kbusd.sandbox.compile import compile_profile

from .daemon import Bus, clean_environment, configuration, need_a_tree_for_all
from .rawclient import DRIVER, DRIVER_PATH

pytestmark = pytest.mark.kbusd_only

REPOSITORY = Path(__file__).parents[2]
ORDINARY_USER = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]

_PTRACE = {"seize": 0x4206, "interrupt": 0x4207, "filter": 0x420C, "about": 0x420D, "detach": 17}

PING = "org.freedesktop.DBus.Peer.Ping"


def workers(bus: Bus, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kbusd.ctl.main", "workers", "--pid", str(bus.pid), *options]
    return subprocess.run(
        command, check=False, cwd=REPOSITORY, capture_output=True, text=True, timeout=30
    )


def look(bus: Bus) -> list[dict[str, Any]]:
    """What kbusctl tells a program; fails if anything differs from the profiles."""
    told = workers(bus, "--json")
    assert told.returncode == 0, workers(bus).stdout + told.stderr
    rows: list[dict[str, Any]] = json.loads(told.stdout)
    return rows


def test_security_tells_what_is_on_and_why_not(bus: Bus) -> None:
    command = [sys.executable, "-m", "kbusd.ctl.main", "security", "--pid", str(bus.pid), "--json"]
    bus.connect().driver("GetId")
    told = subprocess.run(command, check=False, cwd=REPOSITORY, capture_output=True, timeout=30)
    rows = {(row["process"], row["confinement"]): row for row in json.loads(told.stdout)}
    worker = {name: row for (process, name), row in rows.items() if process == "kbusd-worker"}
    for name in ("user", "groups", "capabilities", "no-new-privileges", "seccomp", "nproc"):
        assert worker[name]["on"], worker[name]
    assert worker["apart"]["on"] == (os.getuid() == 0)
    assert "another user" in rows["kbusd", "user"]["detail"] or os.getuid() != 0
    if os.getuid() == 0:  # who is shown all, and can have all
        for name in ("bounding", "securebits", "namespaces"):
            assert worker[name]["on"], worker[name]
        assert not rows["kbusd", "securebits"]["on"]
    assert worker["data"]["detail"] == "at most 4294967296"
    assert worker["as"]["detail"] == "at most 17179869184"
    assert "not asked for" in rows["kbusd-broker", "as"]["detail"]
    reader = {name: row for (process, name), row in rows.items() if process == "kbusd-config"}
    assert "runs while files are read" in reader["seccomp"]["detail"]
    assert reader["seccomp"]["on"] is None, "it is not there to be asked"
    assert reader["namespaces"]["on"] is False
    of_supervisor = rows["kbusd", "seccomp"]
    assert not of_supervisor["on"]
    assert "inherited for ever" in of_supervisor["detail"]  # the reason that the profile gives


def check(rows: list[dict[str, Any]]) -> None:
    by_role: dict[str, dict[str, Any]] = {row["process"]["role"]: row["process"] for row in rows}
    assert set(by_role) == {"supervisor", "broker", "launcher", "zygote", "worker"}
    above = by_role["supervisor"]["filters"]
    for role, filters in (("broker", 1), ("zygote", 1), ("worker", 2)):
        assert by_role[role]["seccomp"] == 2
        assert by_role[role]["filters"] == above + filters
        assert by_role[role]["no_new_privileges"]
        of_root = by_role["supervisor"]["uids"][0] == 0 and by_role["zygote"]["uids"][0] != 0
        setuid = 1 << 7 if role == "zygote" and of_root else 0
        assert by_role[role]["permitted"] == setuid


def test_a_bus_with_clients_is_confined_as_its_profiles_say(bus: Bus) -> None:
    for _ in range(3):
        bus.connect().driver("GetId")
    rows = look(bus)
    check(rows)
    assert sum(row["process"]["role"] == "worker" for row in rows) >= 3
    if os.getuid() == 0:
        for row in rows:
            root = row["process"]["role"] in ("supervisor", "launcher")
            assert (0 in row["process"]["uids"]) == root
        users = [r["process"]["uids"][0] for r in rows if r["process"]["role"] == "worker"]
        assert len(set(users)) == len(users), "each worker is a user of its own"


def filters_of(pid: int) -> list[bytes]:
    """The programs that the kernel runs for a process, in the order in which they were loaded (ptrace(2))."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.restype = ctypes.c_long
    libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    assert libc.ptrace(_PTRACE["seize"], pid, None, None) == 0, os.strerror(ctypes.get_errno())
    libc.ptrace(_PTRACE["interrupt"], pid, None, None)
    os.waitpid(pid, 0x40000000)  # __WALL
    found = []
    while (length := libc.ptrace(_PTRACE["filter"], pid, len(found), None)) > 0:
        program = ctypes.create_string_buffer(length * 8)
        libc.ptrace(_PTRACE["filter"], pid, len(found), program)
        about = struct.pack("QQ", len(found), 0)  # struct seccomp_metadata
        told = ctypes.create_string_buffer(about)
        assert libc.ptrace(_PTRACE["about"], pid, len(about), told) == len(about)
        assert struct.unpack_from("QQ", told.raw)[1] == 2, "what it has fail is logged, too"
        found.append(program.raw)
    libc.ptrace(_PTRACE["detach"], pid, None, None)
    return found


@pytest.mark.skipif(os.getuid() != 0, reason="only root is shown filters")
def test_the_filters_in_force_are_those_that_the_other_tests_try(bus: Bus) -> None:
    bus.connect().driver("GetId")
    expected = {name: compile_profile(profiles.load(name)).bpf for name in profiles.names()}
    stacks = {
        "supervisor": [],
        "launcher": [],
        "broker": [expected["broker"]],
        "zygote": [expected["zygote"]],
        "worker": [expected["zygote"], expected["worker"]],
    }
    rows = look(bus)
    above = next(r["process"]["filters"] for r in rows if r["process"]["role"] == "supervisor")
    for row in rows:
        role = row["process"]["role"]
        ours = row["process"]["filters"] - (above or 0)
        found = filters_of(row["process"]["pid"])
        assert found[len(found) - ours :] == stacks[role], role


# Starts the bus with other overrides than kbusctl finds: as if the admin had changed them since.
_WITH_OVERRIDES = """
import sys
from pathlib import Path
from kbusd.sandbox import profiles
profiles.OVERRIDES = Path(sys.argv[1])
del sys.argv[:2]
from kbusd.main import main
sys.exit(main())
"""
_WEAK_BASE = """
extends = "base"
why = "walls that nobody sees are gone"
[landlock]
why = "off for the test"
enabled = false
[namespaces]
why = "off for the test"
enabled = false
[securebits]
why = "off for the test"
enabled = false
"""
_WEAK_WORKER = """
extends = "worker"
why = "more than a worker needs"
[seccomp]
why = "as ours, with any arguments"
[[seccomp.rules]]
why = "what the zygote allows"
calls = ["fcntl", "splice", "pipe2"]
"""


@pytest.mark.skipif(os.getuid() != 0, reason="only root is shown what a bus was started with")
def test_a_bus_that_was_started_with_weaker_profiles_is_not_said_to_be_right(
    start_bus: Any, tmp_path: Path
) -> None:
    """It was: filters were counted and never compared, and the rest not looked at."""
    (tmp_path / "base.toml").write_text(_WEAK_BASE)
    (tmp_path / "worker.toml").write_text(_WEAK_WORKER)
    bus = start_bus(prefix=[sys.executable, "-c", _WITH_OVERRIDES, str(tmp_path)])
    bus.connect().driver("GetId")
    told = workers(bus)
    assert told.returncode == 1, told.stdout + told.stderr
    rows = [line for line in told.stdout.splitlines() if line.split()[1] == "kbusd-worker"]
    assert rows and not any("yes*" in line for line in rows)
    weaker = [line for line in told.stdout.splitlines() if "kbusd-worker: was started" in line]
    assert weaker and "(securebits, namespaces, landlock, seccomp)" in weaker[0]
    assert "kbusd-zygote: is in the supervisor's namespaces net, ipc" in told.stdout


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_a_bus_of_an_ordinary_user_is_confined_too(start_bus: Any) -> None:
    need_a_tree_for_all(ORDINARY_USER)
    bus = start_bus(configuration("unix:tmpdir=/tmp"), prefix=ORDINARY_USER)
    ping = ["dbus-send", f"--bus={bus.address}", "--print-reply", f"--dest={DRIVER}", "/", PING]
    subprocess.run([*ORDINARY_USER, *ping], check=True, capture_output=True, timeout=30)
    rows = look(bus)
    check(rows)
    assert {row["process"]["uids"][1] for row in rows} == {65534}


def test_a_worker_holds_only_its_own_descriptors(bus: Bus) -> None:
    """Its client, two lines, what it shares, its doorbell, two sets to wait on, 0 to 2: no files."""
    bus.connect().driver("GetId")
    pids = [row["process"]["pid"] for row in look(bus) if row["process"]["role"] == "worker"]
    for pid in pids:
        held = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
        kinds = {
            name.split(":")[0] for name in held if name not in ("/dev/null", str(bus.log_path))
        }
        assert kinds <= {"socket", "pipe", "anon_inode", "/memfd"}, held
        assert not any("kbusd-profile" in name or "configuration" in name for name in held), held
        assert sum(name.startswith("socket:") for name in held) <= 3, held


def test_a_service_is_started_as_if_there_were_no_sandbox(start_bus: Any, tmp_path: Path) -> None:
    # A service that reads its own limits, capabilities and filters out of /proc and ends.
    told = tmp_path / "told"
    os.mkfifo(told)
    prefix = ["prlimit", "--nofile=777:1500", "--core=1024:4096"]
    bus = start_bus(prefix=prefix, env=clean_environment())
    (bus.services / "test.act.Look.service").write_text(
        "[D-BUS Service]\nName=test.act.Look\n"
        f'Exec=/bin/sh -c "cat /proc/self/status /proc/self/limits > {told}"\n'
    )
    client = bus.connect()
    client.driver("ReloadConfig")
    client.send_call(DRIVER, DRIVER_PATH, DRIVER, "StartServiceByName", "su", ("test.act.Look", 0))
    text = told.read_text()
    here = inforce.read(os.getpid())
    lines = {line.partition(":")[0]: line.partition(":")[2].split() for line in text.splitlines()}
    assert lines["NoNewPrivs"] == [str(int(here.no_new_privileges))]
    assert lines["Seccomp"] == [str(here.seccomp)]
    assert int(lines["CapBnd"][0], 16) == here.bounding
    assert int(lines["CapEff"][0], 16) == here.effective
    limits = {line[:26].strip(): line[26:].split()[:2] for line in text.splitlines()}
    assert limits["Max open files"] == ["777", "1500"]
    assert limits["Max core file size"] == ["1024", "4096"]
