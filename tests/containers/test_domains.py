"""A domain of the host's supervisor for a container: its tree, its users, and nobody else's."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.bus import procs
from tests.bus.daemon import Bus
from tests.guest.child import Child, Say
from tests.kdbusfs.rig import errno_of
from tests.kdbusfs.test_buses import Maker

from .container import COUNT, FIRST, Container, bind

pytestmark = [] if os.geteuid() == 0 else [pytest.mark.guest]

OTHER = 300_000


class Host(Bus):
    """A bus with the domains `box` and `other`, mounted."""

    def __init__(self) -> None:
        self.place = Path(tempfile.mkdtemp(prefix="kbt-domains-", dir="/tmp"))
        self.place.chmod(0o755)
        self.wanted = self.place / "wanted"
        self.wanted.mkdir()
        self.want("box", FIRST)
        self.want("other", OTHER)
        super().__init__(options=[f"--domains={self.wanted}"])

    def want(self, name: str, first: int, count: int = COUNT) -> None:
        (self.wanted / name).write_text(f"{first} {count} {self.place}/{name}\n")

    def kill(self, others: Any = None) -> None:
        super().kill(others)
        for name in "box", "other", "third":
            if (path := self.place / name).is_dir():
                subprocess.run(["umount", "-l", path], check=False, stderr=subprocess.DEVNULL)
                path.rmdir()
        for path in self.wanted.iterdir():
            path.unlink()
        self.wanted.rmdir()
        self.place.rmdir()


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    bus = Host()
    yield bus
    bus.stop()


@pytest.fixture(scope="module")
def box(host: Host) -> Iterator[Container]:
    container = Container(bind(host.place / "box", "run/kdbus", "create=dir"))
    yield container
    container.stop()


def as_user(uid: int, do: Callable[[], Any]) -> Any:
    """What a process of another user says."""

    def work(say: Say) -> None:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
        say(do())

    child = Child(work)
    try:
        return child.hear()
    finally:
        child.kill()


def make(box: Container, name: str, user: int = 0) -> Any:
    done = box.python("tests.containers.client", "make", "/run/kdbus", name, user=user)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("user", [0, 1000])
def test_users_of_the_container_make_buses_by_the_names_that_they_have_there(
    box: Container, user: int
) -> None:
    found = make(box, f"{user}-mine", user)
    assert found == {"payload": "hello", "names": [f"{user}-mine"], "uid": user, "owner": user}


def test_what_the_host_calls_them_is_no_name_in_there(box: Container) -> None:
    assert make(box, f"{FIRST}-mine") == "EINVAL"


def test_nobody_else_gets_at_it_not_even_root(host: Host) -> None:
    control = host.place / "box" / "control"
    assert stat.S_IMODE(control.stat().st_mode) == 0o666
    for uid in 0, 1234, FIRST - 1, FIRST + COUNT, OTHER:
        assert as_user(uid, lambda: errno_of(lambda: os.open(control, os.O_RDWR))) == "EACCES"
    assert as_user(FIRST + 7, lambda: errno_of(lambda: os.open(control, os.O_RDWR))) == ""


def test_two_domains_have_buses_of_the_same_name(host: Host) -> None:
    def hold(say: Say) -> None:
        os.setresuid(OTHER, OTHER, OTHER)
        with Maker(host.place / "other").make("0-same"):
            say("made")
            signal.pause()

    def make_the_same() -> list[str]:
        with Maker(host.place / "box").make("0-same"):
            return sorted(os.listdir(host.place / "box"))

    child = Child(hold)
    try:
        assert child.hear() == "made"
        assert as_user(FIRST, make_the_same) == ["0-same", "control"]
    finally:
        child.kill()
    procs.eventually(lambda: os.listdir(host.place / "other") == ["control"], "its bus ends")


def test_domains_come_and_go_while_the_bus_runs(host: Host) -> None:
    third = host.place / "third"
    host.want("third", 500_000, 10)
    host.process.send_signal(signal.SIGHUP)
    control = third / "control"
    procs.eventually(control.exists, "it is mounted")

    def hold(say: Say) -> None:
        os.setresuid(500_009, 500_009, 500_009)
        maker = Maker(third).make("9-mine")
        say("made")
        procs.eventually(lambda: errno_of(lambda: maker.make("9-more")) == "ESHUTDOWN", "cut off")
        say("cut off")

    child = Child(hold)
    assert child.hear() == "made"
    (host.wanted / "third").unlink()
    host.process.send_signal(signal.SIGHUP)
    assert child.hear() == "cut off"
    child.wait()
    procs.eventually(lambda: not os.path.ismount(third), "it is unmounted")
    assert "taken away" not in host.log()
    assert (host.place / "box" / "control").exists()


@pytest.mark.parametrize("said", ["0 65536", "1 1 relative"])
def test_a_domain_that_can_t_be_is_refused_with_its_file(host: Host, said: str) -> None:
    (host.wanted / "bad").write_text(said)
    mark = len(host.log())
    host.process.send_signal(signal.SIGHUP)
    procs.eventually(lambda: f"{host.wanted}/bad" in host.log()[mark:], "it says so")
    (host.wanted / "bad").unlink()
    assert (host.place / "box" / "control").exists()
