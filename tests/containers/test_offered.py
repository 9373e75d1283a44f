"""A bus of the host that an unprivileged container may use: who its clients are, and what they may not do."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator

import pytest

from tests.bus.daemon import STRICT_POLICY, Bus

from .container import FIRST, Container, bind

pytestmark = [] if os.geteuid() == 0 else [pytest.mark.guest]

POLICY = f'<policy context="default"><allow user="*"/></policy>{STRICT_POLICY}'
DRIVER = "org.freedesktop.DBus"


@pytest.fixture(scope="module")
def host() -> Iterator[Bus]:
    bus = Bus(type_="system", policy=POLICY)
    yield bus
    bus.stop()


@pytest.fixture(scope="module")
def box(host: Bus) -> Iterator[Container]:
    container = Container(bind(host.directory, "run/dbus", "create=dir"))
    yield container
    container.stop()


ADDRESS = "unix:path=/run/dbus/bus"


def send(box: Container, member: str, *arguments: str, user: int = 0) -> str:
    """What dbus-send says, which claims the uid that it has in the container."""
    call = (
        f"--bus={ADDRESS}",
        "--print-reply=literal",
        f"--dest={DRIVER}",
        "/org/freedesktop/DBus",
        f"{DRIVER}.{member}",
    )
    done = box.run("dbus-send", *call, *arguments, user=user)
    return (done.stdout + done.stderr).strip()


@pytest.mark.parametrize("user", [0, 1000])
def test_a_client_may_claim_the_uid_that_it_has_in_the_container(box: Container, user: int) -> None:
    """As libdbus, GDBus and sd-bus do; the bus knows better who it is."""
    assert send(box, "GetId", user=user).isalnum()
    claims = str(user).encode().hex()
    done = box.python("tests.containers.client", "claim", ADDRESS, claims, user=user)
    assert json.loads(done.stdout) == {"answer": "OK", "uid": FIRST + user}, done.stderr


def test_a_client_may_not_claim_another_uid(box: Container) -> None:
    for uid in 1000, FIRST + 1000, 165536:
        claims = str(uid).encode().hex()
        done = box.python("tests.containers.client", "claim", ADDRESS, claims)
        assert json.loads(done.stdout) == {"answer": "REJECTED"}, done.stderr


def test_calls_and_signals_pass_between_host_and_container(host: Bus, box: Container) -> None:
    service = host.connect()
    service.request_name("com.example.Host")
    process = box.start(
        "dbus-send", f"--bus={ADDRESS}", "--print-reply=literal", "--dest=com.example.Host", "/x",
        "com.example.I.Ask", "string:from the box",
    )  # fmt: skip
    asked = service.wait_call("Ask")
    assert asked.args == ["from the box"]
    assert service.driver("GetConnectionUnixUser", "s", [asked.sender]) == [FIRST]
    service.reply(asked, "s", ("to the box",))
    out, _ = process.communicate(timeout=20)
    assert out.decode().strip() == "to the box"


def test_the_container_s_root_is_not_the_bus_s(box: Container) -> None:
    assert "AccessDenied" in send(box, "Monitoring.BecomeMonitor", "array:string:", "uint32:0")
