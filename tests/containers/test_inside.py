"""A bus of its own in an unprivileged container: the socket, kdbusfs, every wall, and nothing of the host's."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator

import pytest

from .container import BIN, FIRST, PACKAGING, Container

pytestmark = [] if os.geteuid() == 0 else [pytest.mark.guest]


class Inside(Container):
    """With a session bus of its own."""

    def __init__(self) -> None:
        super().__init__(f"lxc.include = {PACKAGING}/inside.conf\n")
        options = "--session", "--address=unix:path=/run/bus", "--kdbusfs=/run/kdbus"
        self.address = self.bus(*options)


@pytest.fixture(scope="module")
def box() -> Iterator[Inside]:
    container = Inside()
    yield container
    container.stop()


def test_d_bus_and_kdbus_clients_talk_on_the_container_s_own_bus(box: Inside) -> None:
    done = box.python("tests.containers.client", "both", box.address, "/run/kdbus/0-session/bus")
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout) == {"called": "pong", "uid": 0}


def test_every_process_is_confined_and_none_is_the_host_s_root(box: Inside) -> None:
    done = box.run(str(BIN / "kbusctl"), "workers", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    found = [row["process"] for row in json.loads(done.stdout)]
    roles = {each["role"] for each in found}
    assert roles >= {"supervisor", "launcher", "broker", "zygote", "worker"}
    for each in found:
        if each["role"] not in ("supervisor", "launcher"):
            assert each["seccomp"] == 2 and each["no_new_privileges"], each
            kept = 1 << 7 if each["role"] == "zygote" else 0  # CAP_SETUID, for its children
            assert (each["permitted"], each["bounding"]) == (kept, 0), each
            if each["role"] == "worker":
                assert 60928 <= each["uids"][0] < 60928 + 256, each
            assert len(set(each["uids"])) == 1, each
    workers = {each["uids"][0] for each in found if each["role"] == "worker"}
    assert len(workers) > 1, "one is not another's user"
    others = {uid for each in found if each["role"] in ("broker", "zygote") for uid in each["uids"]}
    assert others == {100}
    done = box.run(str(BIN / "kbusctl"), "security", "--json")
    rows = [row for row in json.loads(done.stdout) if row["confinement"] == "apart"]
    assert rows and all(row["on"] for row in rows), rows
    # And the host sees them as what they are.
    assert os.stat(box.root / "run/bus").st_uid == FIRST


def test_another_user_of_the_container_is_not_let_in_to_its_session(box: Inside) -> None:
    done = box.python("tests.containers.client", "open", "/run/kdbus/0-session/bus", user=1000)
    assert json.loads(done.stdout) == "EACCES", done.stderr


def test_a_user_of_the_container_makes_a_bus_of_his_own(box: Inside) -> None:
    done = box.python("tests.containers.client", "make", "/run/kdbus", "1000-mine", user=1000)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "payload": "hello",
        "names": ["1000-mine"],
        "uid": 1000,
        "owner": 1000,
    }
