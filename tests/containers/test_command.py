"""`kbusctl container`: one command, and the container has a bus, or three."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kbusd.ctl import container as ctl
from tests.bus import procs
from tests.bus.daemon import Bus

from .container import BIN, COUNT, FIRST, PACKAGING, Container
from .test_offered import POLICY

pytestmark = [] if os.geteuid() == 0 else [pytest.mark.guest]


@pytest.fixture
def host(box: Container) -> Iterator[Bus]:
    (box.directory / "domains").mkdir()
    options = [f"--domains={box.directory}/domains"]
    bus = Bus(type_="system", policy=POLICY, options=options)
    yield bus
    bus.stop()


@pytest.fixture
def box() -> Iterator[Container]:
    container = Container(begin=False)
    yield container
    container.stop()


def kbusctl(*command: str, **how: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(BIN / "kbusctl"), "container", *command],
        check=False, capture_output=True, text=True, timeout=30, **how,
    )  # fmt: skip


def test_add_gives_a_container_all_three_and_remove_takes_them_back(
    host: Bus, box: Container
) -> None:
    place = box.directory
    where = [box.name, f"--lxcpath={place}", f"--domains={place}/domains"]
    here = f"--pid={host.pid}"
    with_all = ["--inside", "--domain", f"--socket={host.socket}", f"--mounts={place}/mounts"]
    before = box.config.read_text()
    for _ in range(2):  # the second changes nothing
        done = kbusctl("add", *where, here, *with_all)
        assert done.returncode == 0, done.stderr
    assert box.config.read_text().count("kbusd.conf") == 1
    mount = place / "mounts" / box.name
    procs.eventually((mount / "control").exists, "the running kbusd has the domain")

    box.begin()
    made = box.python("tests.containers.client", "make", "/dev/kdbus", "0-mine")
    assert json.loads(made.stdout)["payload"] == "hello", made.stderr
    claims = "claim", "unix:path=/dev/kbusd/bus", b"0".hex()
    claimed = box.python("tests.containers.client", *claims)
    assert json.loads(claimed.stdout) == {"answer": "OK", "uid": FIRST}, claimed.stderr
    address = box.bus("--session", "--address=unix:path=/run/bus", "--kdbusfs=/run/kdbus")
    both = "both", address, "/run/kdbus/0-session/bus"
    assert json.loads(box.python("tests.containers.client", *both).stdout)["called"] == "pong"

    listed = kbusctl("list", *where[1:]).stdout.splitlines()
    assert listed[1].split() == [
        box.name, f"{FIRST}+{COUNT}", "inside,domain,socket", f"{box.config.parent}/kbusd.conf"
    ]  # fmt: skip
    assert kbusctl("remove", *where, here).returncode == 0
    procs.eventually(lambda: not os.path.ismount(mount), "the running kbusd has no domain")
    assert box.config.read_text() == before
    assert sorted(os.listdir(box.config.parent)) == ["config", "rootfs"]
    assert os.listdir(place / "domains") == []
    gone = kbusctl("remove", *where)
    assert gone.returncode == 2 and "nothing was added" in gone.stderr


def test_without_a_kbusd_that_has_domains_it_says_so(box: Container, tmp_path: Path) -> None:
    """Unless this machine has one of its own."""
    if any(ctl._has_domains(pid) for pid in ctl.workers.running()):
        pytest.skip("a kbusd of this machine has domains")
    options = f"--lxcpath={box.directory}", f"--domains={tmp_path}", f"--mounts={tmp_path}/mounts"
    rules = f"lxc.include = {PACKAGING}/device-rules.conf"
    made = box.config.parent / "kbusd.conf"
    done = kbusctl("add", box.name, *options)
    assert done.returncode == 0 and rules not in made.read_text()
    plain = box.config.read_text()
    one, all_ = "c 1:7 rwm", "a"
    for group, *values in (
        ("cgroup2", one), ("cgroup2", all_), ("cgroup", all_), ("cgroup", all_, one), ("cgroup2", one, all_),
    ):  # fmt: skip
        denied = "".join(f"lxc.{group}.devices.deny = {each}\n" for each in values)
        box.config.write_text(plain + denied)
        done = kbusctl("add", box.name, *options)
        assert done.returncode == 0
        assert (rules in made.read_text().splitlines()) == (all_ in values), denied
    assert "start it so" in done.stderr
    assert (tmp_path / box.name).read_text() == f"{FIRST} {COUNT} {tmp_path}/mounts/{box.name}\n"


def test_what_can_t_be_is_refused_with_a_reason(box: Container, tmp_path: Path) -> None:
    options = f"--lxcpath={box.directory}", f"--domains={tmp_path}"
    done = kbusctl("add", "nobody", *options)
    assert done.returncode == 2 and "nobody doesn't exist" in done.stderr
    done = kbusctl("add", "../x", *options)
    assert done.returncode == 2 and "no name for a domain" in done.stderr
    done = kbusctl("add", box.name, *options, "--socket=bus")
    assert done.returncode == 2 and "an absolute path" in done.stderr
    privileged = [line for line in box.base().splitlines() if "idmap" not in line]
    box.config.write_text("\n".join(privileged))
    done = kbusctl("add", box.name, *options)
    assert done.returncode == 2 and "no lxc.idmap" in done.stderr
    assert os.listdir(tmp_path) == [] and "kbusd" not in box.config.read_text()


def test_without_lxc_it_says_what_to_install() -> None:
    done = kbusctl("add", "box", env={"PATH": "/nowhere"})
    assert done.returncode == 2
    assert "LXC is not there" in done.stderr and "apt-get install lxc" in done.stderr


def test_the_example_is_what_the_command_writes() -> None:
    wanted = ctl.Wanted(inside=True, domain=True, socket=ctl.SOCKET)
    said = ctl.configuration("box", wanted, rules=True)
    example = (PACKAGING / "example.conf").read_text()
    assert example.endswith(said.replace(str(PACKAGING), "/usr/share/kbusd/lxc"))
