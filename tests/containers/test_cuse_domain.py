"""A domain as CUSE nodes, in a container that may open no other device: in the guest."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.bus.daemon import Bus

from .container import COUNT, FIRST, PACKAGING, Container, bind

pytestmark = pytest.mark.guest

DENY = "lxc.cgroup.devices.deny = a\nlxc.cgroup.devices.allow = c 1:* rw\n"
NODES = bind("/dev/kdbus/domain/box", "dev/kdbus", "create=dir")


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bus]:
    wanted = tmp_path_factory.mktemp("domains")
    (wanted / "box").write_text(f"{FIRST} {COUNT}\n")
    bus = Bus(options=["--cuse", f"--domains={wanted}"])
    yield bus
    bus.stop()
    assert not os.path.exists("/dev/kdbus/domain/box")


def make(config: str) -> Any:
    """What a container's root says that makes a bus there."""
    container = Container(NODES + config)
    try:
        made = "make", "/dev/kdbus", "0-mine"
        done = container.python("tests.containers.client", *made)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)
    finally:
        container.stop()


def test_with_the_device_rule_the_container_makes_buses(host: Bus) -> None:
    found = make(f"{DENY}lxc.include = {PACKAGING}/device-rules.conf\n")
    assert found == {"payload": "hello", "names": ["0-mine"], "uid": 0, "owner": 0}
    # The host's own are elsewhere, and those of the container are gone with it.
    assert Path("/dev/kdbus/0-session/bus").is_char_device()
    assert os.listdir("/dev/kdbus/domain/box") == ["control"]


def test_without_it_the_nodes_can_t_be_opened(host: Bus) -> None:
    assert make(DENY) == "EPERM"


def test_host_users_do_not_get_at_the_container_s_nodes(host: Bus) -> None:
    with pytest.raises(PermissionError):
        os.open("/dev/kdbus/domain/box/control", os.O_RDWR)
