"""Services that the bus starts from .service files when somebody needs them."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from . import wireformat as w
from .daemon import Bus, clean_environment
from .rawclient import DRIVER, DRIVER_PATH, BusError

ERROR = "org.freedesktop.DBus.Error."
REPOSITORY = Path(__file__).parents[2]


def add_service(bus: Bus, name: str, mode: str = "", *, executable: str = "") -> None:
    """Write a .service file for the echo service, or for another program."""
    command = executable or f"{sys.executable} -S -m tests.bus.services.echo {name} {mode}".strip()
    (bus.services / f"{name}.service").write_text(f"[D-BUS Service]\nName={name}\nExec={command}\n")


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    """The fifo that lets `slow` services go on."""
    path = tmp_path / "gate"
    os.mkfifo(path)
    return path


@pytest.fixture
def bus(start_bus, gate: Path) -> Iterator[Bus]:  # type: ignore[no-untyped-def]
    """A bus whose services find our modules; service files are read at ReloadConfig."""
    env = clean_environment(PYTHONPATH=str(REPOSITORY), KBUSD_TEST_GATE=str(gate))
    return start_bus(env=env)


def reload(bus: Bus) -> None:
    client = bus.connect()
    client.driver("ReloadConfig")
    client.close()
    bus.clients.remove(client)


def test_a_call_starts_the_service(bus: Bus) -> None:
    add_service(bus, "test.act.Echo")
    reload(bus)
    client = bus.connect()
    client.add_match("member='NameOwnerChanged',arg0='test.act.Echo'")
    reply = client.call("test.act.Echo", "/", "test.I", "Echo", "su", ("hello", 5))
    assert reply.args == ["hello", 5]
    changed = client.wait_signal("NameOwnerChanged")
    assert changed.args == ["test.act.Echo", "", reply.sender]


@pytest.mark.parametrize(
    ("command", "error", "text"),
    [
        (
            " ",
            "Spawn.ExecFailed",
            "Failed to execute program test.act.Odd: No such file or directory",
        ),
        ("/bin/sh -c 'exit", "InvalidArgs", "Unclosed quotes in command line"),
        ("/bin/sh \\\\", "InvalidArgs", "Unclosed quotes in command line"),
        (
            "/bin/sh -c 'exit 4' # 5'",
            "Spawn.ChildExited",
            "Process test.act.Odd exited with status 4",
        ),
    ],
)
def test_odd_command_lines_fail_as_on_dbus_daemon(
    bus: Bus, command: str, error: str, text: str
) -> None:
    add_service(bus, "test.act.Odd", executable=command)
    reload(bus)
    client = bus.connect()
    with pytest.raises(BusError) as caught:
        client.driver("StartServiceByName", "su", ("test.act.Odd", 0))
    assert caught.value.name == ERROR + error
    assert caught.value.text.startswith(text)


def test_messages_wait_in_order_for_the_service(bus: Bus) -> None:
    add_service(bus, "test.act.Echo")
    reload(bus)
    a, b = bus.connect(), bus.connect()
    serials = [a.send_call("test.act.Echo", "/", "test.I", "Echo", "u", (n,)) for n in range(10)]
    other = b.send_call("test.act.Echo", "/", "test.I", "Echo", "ay", (b"x" * 300_000,))
    assert [a.read().reply_serial for _ in range(10)] == serials
    assert b.wait_reply(other).body[4:] == b"x" * 300_000


def test_start_service_by_name(bus: Bus) -> None:
    add_service(bus, "test.act.Echo")
    reload(bus)
    client = bus.connect()
    assert client.driver("StartServiceByName", "su", ("test.act.Echo", 0)) == [1]
    assert client.driver("NameHasOwner", "s", ("test.act.Echo",)) == [True]
    assert client.driver("StartServiceByName", "su", ("test.act.Echo", 0)) == [2]


def test_concurrent_starts_start_it_once(bus: Bus, gate: Path) -> None:
    add_service(bus, "test.act.Slow", "slow")
    reload(bus)
    clients = [bus.connect() for _ in range(3)]
    args = (DRIVER, DRIVER_PATH, DRIVER, "StartServiceByName", "su", ("test.act.Slow", 0))
    serials = [client.send_call(*args) for client in clients]
    with gate.open("wb") as pipe:
        pipe.write(b"x")
    assert [c.wait_reply(s).args for c, s in zip(clients, serials, strict=True)] == [[1]] * 3


def test_a_signal_to_a_name_does_not_start_without_need(bus: Bus) -> None:
    """NO_AUTO_START: the call is refused and nothing is started."""
    add_service(bus, "test.act.Echo")
    reload(bus)
    client = bus.connect()
    with pytest.raises(BusError) as caught:
        client.call("test.act.Echo", "/", "test.I", "Echo", flags=w.NO_AUTO_START)
    assert caught.value.name == ERROR + "NameHasNoOwner"
    assert client.driver("NameHasOwner", "s", ("test.act.Echo",)) == [False]


def test_list_activatable_names(bus: Bus) -> None:
    add_service(bus, "test.act.Echo")
    add_service(bus, "test.act.Other")
    reload(bus)
    names = bus.connect().driver("ListActivatableNames")[0]
    assert sorted(names) == [DRIVER, "test.act.Echo", "test.act.Other"]


def test_reload_config_picks_up_and_drops_services(bus: Bus) -> None:
    client = bus.connect()
    client.add_match("member='ActivatableServicesChanged'")
    with pytest.raises(BusError, match="ServiceUnknown"):
        client.driver("StartServiceByName", "su", ("test.act.New", 0))
    add_service(bus, "test.act.New")
    client.driver("ReloadConfig")
    client.wait_signal("ActivatableServicesChanged")
    assert client.driver("StartServiceByName", "su", ("test.act.New", 0)) == [1]
    (bus.services / "test.act.New.service").unlink()
    client.driver("ReloadConfig")
    assert client.driver("ListActivatableNames") == [[DRIVER]]


@pytest.mark.parametrize(
    ("mode", "executable", "errors", "text"),
    [
        ("fail", "", ["Spawn.ChildExited"], "exited with status 3"),
        ("", "/bin/sh -c 'kill -9 $$'", ["Spawn.ChildSignaled"], "signal 9"),
        ("", "/no/such/program", ["Spawn.ExecFailed", "Spawn.Failed"], "test.act.Fail"),
    ],
    ids=["exit", "killed", "missing"],
)
def test_a_service_that_fails_gives_an_error_at_once(
    bus: Bus, mode: str, executable: str, errors: list[str], text: str
) -> None:
    add_service(bus, "test.act.Fail", mode, executable=executable)
    reload(bus)
    client = bus.connect()
    for attempt in (
        lambda: client.driver("StartServiceByName", "su", ("test.act.Fail", 0)),
        lambda: client.call("test.act.Fail", "/", "test.I", "M"),
    ):
        with pytest.raises(BusError) as caught:
            attempt()
        assert caught.value.name in [ERROR + error for error in errors]
        assert text in caught.value.text


def test_a_service_that_never_takes_its_name(start_bus, gate: Path) -> None:  # type: ignore[no-untyped-def]
    env = clean_environment(PYTHONPATH=str(REPOSITORY), KBUSD_TEST_GATE=str(gate))
    bus = start_bus(env=env, limits={"service_start_timeout": 1000})
    add_service(bus, "test.act.Slow", "slow")
    reload(bus)
    client = bus.connect()
    with pytest.raises(BusError) as caught:
        client.call("test.act.Slow", "/", "test.I", "M")
    assert caught.value.name == ERROR + "TimedOut"
    assert "test.act.Slow" in caught.value.text


def test_a_service_can_be_started_again(bus: Bus) -> None:
    add_service(bus, "test.act.Echo")
    reload(bus)
    client = bus.connect()
    client.add_match("member='NameOwnerChanged',arg0='test.act.Echo',arg2=''")
    first = client.call("test.act.Echo", "/", "test.I", "Quit").sender
    client.wait_signal("NameOwnerChanged")
    second = client.call("test.act.Echo", "/", "test.I", "Echo").sender
    assert first != second


def test_environment_of_a_service(bus: Bus) -> None:
    add_service(bus, "test.act.Echo")
    reload(bus)
    env = bus.connect().call("test.act.Echo", "/", "test.I", "Environment").args[0]
    assert env["DBUS_STARTER_ADDRESS"].startswith(bus.address.partition(",guid")[0])
    assert env["DBUS_STARTER_BUS_TYPE"] == "session"
    assert env["DBUS_SESSION_BUS_ADDRESS"] == env["DBUS_STARTER_ADDRESS"]
    assert env["PYTHONPATH"] == str(REPOSITORY)


def test_update_activation_environment(bus: Bus) -> None:
    add_service(bus, "test.act.Echo")
    reload(bus)
    client = bus.connect()
    variables = {"KBUSD_TEST_NEW": "set", "KBUSD_TEST_GATE": "changed"}
    client.driver("UpdateActivationEnvironment", "a{ss}", (variables,))
    env = client.call("test.act.Echo", "/", "test.I", "Environment").args[0]
    assert env["KBUSD_TEST_NEW"] == "set"
    assert env["KBUSD_TEST_GATE"] == "changed"


def test_a_service_has_none_of_the_bus_descriptors(bus: Bus) -> None:
    """What a service gets from the bus is its environment and nothing open but 0, 1 and 2."""
    listing = bus.directory / "fds"
    path = bus.directory / "list.sh"
    path.write_text(f"#!/bin/sh\nls -l /proc/self/fd > {listing}\nexit 1\n")
    path.chmod(0o755)
    add_service(bus, "test.act.Fds", executable=str(path))
    reload(bus)
    with pytest.raises(BusError):
        bus.connect().driver("StartServiceByName", "su", ("test.act.Fds", 0))
    lines = [line for line in listing.read_text().splitlines() if "->" in line]
    # `ls` itself adds its output and the directory that it lists, both with /fd in their path.
    names = {line.split(" -> ")[0].split()[-1] for line in lines if "/fd" not in line}
    assert names <= {"0", "1", "2"}


def test_quoting_in_exec(bus: Bus) -> None:
    seen = bus.directory / "seen"
    script = f"printf '%s|' \"$@\" > {seen}"
    path = bus.directory / "show.sh"
    path.write_text(f"#!/bin/sh\n{script}\nexit 1\n")
    path.chmod(0o755)
    add_service(
        bus,
        "test.act.Quote",
        executable=f"{path} plain 'with space' \"double quoted\" back\\\\slash",
    )
    reload(bus)
    with pytest.raises(BusError):
        bus.connect().driver("StartServiceByName", "su", ("test.act.Quote", 0))
    assert seen.read_text() == "plain|with space|double quoted|backslash|"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[D-BUS Service]\nExec=/bin/true\n",
        "[D-BUS Service]\nName=test.act.Broken\n",
        "[D-BUS Service]\nName=not a name\nExec=/bin/true\n",
        "nonsense\n",
    ],
    ids=["empty", "no name", "no exec", "bad name", "nonsense"],
)
def test_a_broken_service_file_is_skipped(bus: Bus, text: str) -> None:
    (bus.services / "test.act.Broken.service").write_text(text)
    add_service(bus, "test.act.Good")
    reload(bus)
    client = bus.connect()
    names = client.driver("ListActivatableNames")[0]
    assert "test.act.Good" in names
    assert client.call("test.act.Good", "/", "test.I", "Echo", "u", (1,)).args == [1]


def test_caller_that_leaves_while_the_service_starts(bus: Bus, gate: Path) -> None:
    add_service(bus, "test.act.Slow", "slow")
    reload(bus)
    leaver, stayer = bus.connect(), bus.connect()
    leaver.send_call("test.act.Slow", "/", "test.I", "Echo", "s", ("lost",))
    serial = stayer.send_call("test.act.Slow", "/", "test.I", "Echo", "s", ("kept",))
    leaver.close()
    with gate.open("wb") as pipe:
        pipe.write(b"x")
    assert stayer.wait_reply(serial).args == ["kept"]


def test_somebody_else_takes_the_name_while_the_service_starts(bus: Bus, gate: Path) -> None:
    add_service(bus, "test.act.Slow", "slow")
    reload(bus)
    caller, owner = bus.connect(), bus.connect()
    owner.add_match("member='NameOwnerChanged',arg1=''")
    owner.add_match("member='NameOwnerChanged',arg2=''")
    serial = caller.send_call("test.act.Slow", "/", "test.I", "Hello", "s", ("x",))
    service = owner.wait_signal("NameOwnerChanged").args[0]
    owner.request_name("test.act.Slow")
    call = owner.wait_call("Hello")
    owner.reply(call, "s", ("y",))
    assert caller.wait_reply(serial).args == ["y"]
    assert service != owner.name
    with gate.open("wb") as pipe:
        pipe.write(b"x")
    # It finds the name taken and ends; not before that may the bus be stopped.
    gone = [service, service, ""]
    owner.wait(lambda message: message.member == "NameOwnerChanged" and message.args == gone)
