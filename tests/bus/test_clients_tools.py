"""The command line tools that people use: dbus-send, dbus-monitor, dbus-test-tool, gdbus, busctl."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from .clients import SECONDS, Program, glib_service, run
from .daemon import Bus
from .procs import eventually
from .rawclient import DRIVER, DRIVER_PATH
from .wireformat import NO_REPLY_EXPECTED

STATS = "org.freedesktop.DBus.Debug.Stats"
NAME = "test.tools.Service"
OBJECT = "/test/Object"
INTERFACE = "test.Interface"


@pytest.fixture
def service(bus: Bus) -> Iterator[str]:
    """The name of a running service."""
    with glib_service(bus, NAME):
        yield NAME


# -- dbus-send ---------------------------------------------------------------------------


def dbus_send(bus: Bus, *arguments: str, ok: bool = True) -> str:
    return run(bus, "dbus-send", "--session", *arguments, ok=ok)


def test_dbus_send_call(bus: Bus, service: str) -> None:
    out = dbus_send(
        bus, "--print-reply", f"--dest={service}", OBJECT, f"{INTERFACE}.Upper", "string:hällo"
    )
    assert 'string "HÄLLO"' in out


def test_dbus_send_to_the_driver(bus: Bus) -> None:
    out = dbus_send(bus, "--print-reply", f"--dest={DRIVER}", DRIVER_PATH, f"{DRIVER}.ListNames")
    assert f'string "{DRIVER}"' in out


def test_dbus_send_error(bus: Bus, service: str) -> None:
    out = dbus_send(
        bus, "--print-reply", f"--dest={service}", OBJECT, f"{INTERFACE}.Fail", ok=False
    )
    assert "Error test.Error.Failed: it failed" in out


def test_dbus_send_to_nobody(bus: Bus) -> None:
    out = dbus_send(bus, "--print-reply", "--dest=test.Nobody", "/", "test.I.M", ok=False)
    assert "org.freedesktop.DBus.Error.ServiceUnknown" in out


def test_dbus_send_signal(bus: Bus) -> None:
    receiver = bus.connect()
    receiver.add_match("type='signal',interface='test.Sent'")
    dbus_send(bus, "--type=signal", "/s", "test.Sent.Ping", "uint32:5", "array:string:a,b")
    assert receiver.wait_signal("Ping").args == [5, ["a", "b"]]


def test_dbus_send_without_reply(bus: Bus) -> None:
    receiver = bus.connect()
    dbus_send(
        bus,
        "--type=method_call",
        f"--dest={receiver.name}",
        "/s",
        "test.Sent.Call",
        "dict:string:int32:one,1",
    )
    call = receiver.wait_call("Call")
    assert call.args == [{"one": 1}]


# -- dbus-monitor ------------------------------------------------------------------------


def test_dbus_monitor(bus: Bus, service: str) -> None:
    with Program(bus, "dbus-monitor", "--session") as monitor:
        monitor.lines_until("NameLost")
        text = dbus_send(
            bus, "--print-reply", f"--dest={service}", OBJECT, f"{INTERFACE}.Upper", "string:seen"
        )
        assert "SEEN" in text
        seen = monitor.lines_until('"SEEN"')
    assert re.search(
        rf"method call .* destination={NAME} .*interface={INTERFACE}; member=Upper", seen
    )
    assert 'string "seen"' in seen
    assert re.search(r"method return .*reply_serial=\d+", seen)


def test_dbus_monitor_with_a_rule(bus: Bus) -> None:
    sender = bus.connect()
    with Program(bus, "dbus-monitor", "--session", "interface='test.Wanted'") as monitor:
        monitor.lines_until("NameLost")
        sender.signal("/", "test.Unwanted", "No")
        sender.signal("/", "test.Wanted", "Yes")
        assert "Unwanted" not in monitor.lines_until("member=Yes")


# -- dbus-test-tool ----------------------------------------------------------------------


def test_dbus_test_tool_spam_to_echo(bus: Bus) -> None:
    watcher = bus.connect()
    watcher.add_match("member='NameOwnerChanged',arg0='test.tools.Echo'")
    with Program(bus, "dbus-test-tool", "echo", "--session", "--name=test.tools.Echo"):
        watcher.wait_signal("NameOwnerChanged")
        run(
            bus,
            "dbus-test-tool",
            "spam",
            "--session",
            "--dest=test.tools.Echo",
            "--count=2000",
            "--queue=50",
            "--payload=some payload",
        )


def test_dbus_test_tool_spam_to_black_hole(bus: Bus) -> None:
    watcher = bus.connect()
    watcher.add_match("member='NameOwnerChanged',arg0='test.tools.Hole'")
    with Program(bus, "dbus-test-tool", "black-hole", "--session", "--name=test.tools.Hole"):
        watcher.wait_signal("NameOwnerChanged")
        run(
            bus,
            "dbus-test-tool",
            "spam",
            "--session",
            "--dest=test.tools.Hole",
            "--count=3000",
            "--flood",
            "--no-reply",
            "--payload=x",
        )
    assert watcher.wait_signal("NameOwnerChanged").args[2] == ""


def test_dbus_test_tool_black_hole_that_never_reads(bus: Bus) -> None:
    """A client that does not read is its own problem."""
    watcher, sender = bus.connect(), bus.connect()
    watcher.add_match("member='NameOwnerChanged',arg0='test.tools.Deaf'")
    tool = ("dbus-test-tool", "black-hole", "--session", "--name=test.tools.Deaf", "--no-read")
    with Program(bus, *tool):
        watcher.wait_signal("NameOwnerChanged")
        for _ in range(50):
            sender.send_call(
                "test.tools.Deaf", "/", "a.b", "C", "ay", (b"x" * 20000,), flags=NO_REPLY_EXPECTED
            )
        assert sender.driver("NameHasOwner", "s", ("test.tools.Deaf",)) == [True]


# -- gdbus -------------------------------------------------------------------------------


def gdbus(bus: Bus, command: str, *arguments: str, ok: bool = True) -> str:
    return run(bus, "gdbus", command, "--session", *arguments, ok=ok)


def test_gdbus_call(bus: Bus, service: str) -> None:
    common = ("--dest", service, "--object-path", OBJECT, "--method")
    assert gdbus(bus, "call", *common, f"{INTERFACE}.Upper", "abc").strip() == "('ABC',)"
    out = gdbus(bus, "call", *common, f"{INTERFACE}.Dict", "{'k': <uint32 5>}")
    assert out.strip() == "({'k': <uint32 5>},)"
    assert "it failed" in gdbus(bus, "call", *common, f"{INTERFACE}.Fail", ok=False)


def test_gdbus_introspect(bus: Bus, service: str) -> None:
    out = gdbus(bus, "introspect", "--dest", service, "--object-path", OBJECT)
    assert f"interface {INTERFACE} {{" in out
    assert "Tick(u " in out
    out = gdbus(bus, "introspect", "--dest", DRIVER, "--object-path", DRIVER_PATH)
    assert "RequestName(" in out


def test_gdbus_introspect_recurses_to_the_driver(bus: Bus) -> None:
    out = gdbus(bus, "introspect", "--dest", DRIVER, "--object-path", "/", "--recurse")
    assert f"node {DRIVER_PATH} {{" in out


def test_gdbus_emit(bus: Bus) -> None:
    receiver = bus.connect()
    receiver.add_match("type='signal',interface='test.Emitted'")
    gdbus(bus, "emit", "--object-path", "/e", "--signal", "test.Emitted.Now", "uint32 9")
    assert receiver.wait_signal("Now").args == [9]
    gdbus(
        bus, "emit", "--dest", receiver.name, "--object-path", "/e", "--signal", "test.Emitted.You"
    )
    assert receiver.wait_signal("You").destination == receiver.name


def test_gdbus_monitor(bus: Bus, service: str) -> None:
    """It says who the owner is, and only then has a match rule for his signals."""
    asker = bus.connect()
    (owner,) = asker.driver("GetNameOwner", "s", (service,))

    def is_ready() -> bool:
        (rules,) = asker.driver("GetAllMatchRules", interface=STATS)
        return any(f"sender='{owner}'" in rule for each in rules.values() for rule in each)

    with Program(bus, "gdbus", "monitor", "--session", "--dest", service) as monitor:
        monitor.lines_until(f"is owned by {owner}")
        eventually(is_ready, "gdbus has a match rule", SECONDS)
        gdbus(
            bus,
            "call",
            "--dest",
            service,
            "--object-path",
            OBJECT,
            "--method",
            f"{INTERFACE}.Emit",
            "3",
        )
        seen = monitor.lines_until("Tick (uint32 2,)")
    assert [int(n) for n in re.findall(r"Tick \(uint32 (\d),\)", seen)] == [0, 1, 2]


def test_gdbus_wait(bus: Bus) -> None:
    client = bus.connect()
    client.add_match("type='signal',member='NameOwnerChanged'")
    with Program(bus, "gdbus", "wait", "--session", "--timeout", "20", "test.tools.Late") as wait:
        client.wait_signal("NameOwnerChanged")
        client.request_name("test.tools.Late")
        assert wait.process.wait(20) == 0


def test_gdbus_wait_times_out(bus: Bus) -> None:
    gdbus(bus, "wait", "--timeout", "1", "test.tools.Never", ok=False)


# -- busctl (sd-bus) ---------------------------------------------------------------------


def busctl(bus: Bus, *arguments: str, ok: bool = True) -> str:
    return run(bus, "busctl", f"--address={bus.address}", "--no-pager", *arguments, ok=ok)


def test_busctl_list(bus: Bus, service: str) -> None:
    names = {line.split()[0] for line in busctl(bus, "list", "--no-legend").splitlines()}
    assert {DRIVER, service} <= names
    assert json.loads(busctl(bus, "list", "--json=short"))


def test_busctl_call(bus: Bus, service: str) -> None:
    assert busctl(bus, "call", service, OBJECT, INTERFACE, "Upper", "s", "abc").strip() == 's "ABC"'
    out = busctl(bus, "call", DRIVER, DRIVER_PATH, DRIVER, "GetNameOwner", "s", service)
    assert out.startswith('s ":1.')
    out = busctl(bus, "call", service, OBJECT, INTERFACE, "Fail", ok=False)
    assert "it failed" in out


def test_busctl_introspect_and_tree(bus: Bus, service: str) -> None:
    assert ".Upper" in busctl(bus, "introspect", service, OBJECT)
    assert ".RequestName" in busctl(bus, "introspect", DRIVER, DRIVER_PATH)
    assert "/test/Object" in busctl(bus, "tree", service)
    assert DRIVER_PATH in busctl(bus, "tree", DRIVER)


def test_busctl_get_property(bus: Bus, service: str) -> None:
    assert busctl(bus, "get-property", service, OBJECT, INTERFACE, "Level").strip() == "u 7"
    out = busctl(bus, "get-property", DRIVER, DRIVER_PATH, DRIVER, "Features")
    assert "HeaderFiltering" in out


def test_busctl_status(bus: Bus, service: str) -> None:
    out = busctl(bus, "status", service)
    assert re.search(r"^PID=\d+$", out, re.MULTILINE)
    assert re.search(r"^UniqueName=:1\.\d+$", out, re.MULTILINE)


def test_busctl_emit(bus: Bus) -> None:
    receiver = bus.connect()
    receiver.add_match("type='signal',interface='test.Emitted'")
    busctl(bus, "emit", "/e", "test.Emitted", "Now", "as", "2", "a", "b")
    assert receiver.wait_signal("Now").args == [["a", "b"]]


def test_busctl_monitor(bus: Bus, service: str, tmp_path: Path) -> None:
    with Program(bus, "busctl", f"--address={bus.address}", "--json=short", "monitor") as monitor:
        monitor.lines_until("Monitoring bus message stream")
        busctl(bus, "call", service, OBJECT, INTERFACE, "Upper", "s", "watched")
        seen = monitor.lines_until('"WATCHED"')
    assert '"watched"' in seen
    assert '"method_call"' in seen


def test_busctl_capture_is_a_pcap_file(bus: Bus, tmp_path: Path) -> None:
    output = tmp_path / "capture"
    sender = bus.connect()
    watcher = bus.connect()
    watcher.add_match("member='NameOwnerChanged',arg2=''")
    with Program(bus, "busctl", f"--address={bus.address}", "capture", output=output):
        watcher.wait_signal("NameOwnerChanged")
        sender.signal("/", "test.Captured", "Signal")
        eventually(lambda: output.stat().st_size > 0, "busctl has written something")
    assert output.read_bytes()[:4] in (b"\xd4\xc3\xb2\xa1", b"\x0a\x0d\x0d\x0a")
