"""Files of the configuration that change while the bus runs: nobody has to tell it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from . import procs
from .daemon import Bus, is_reference
from .rawclient import DRIVER, DRIVER_PATH, BusError, RawClient
from .test_activation import add_service

ERROR = "org.freedesktop.DBus.Error."
DENY = """<busconfig><policy context="mandatory">
  <deny own="test.watch.Denied"/>
</policy></busconfig>"""


@pytest.fixture
def bus(start_bus) -> Bus:  # type: ignore[no-untyped-def]
    bus: Bus = start_bus(extra="  <includedir>more.d</includedir>\n")
    return bus


def listens(bus: Bus) -> RawClient:
    client = bus.connect()
    client.add_match("member='ActivatableServicesChanged'")
    return client


def may_own(client: RawClient) -> bool:
    try:
        client.driver("RequestName", "su", ("test.watch.Denied", 0))
    except BusError as error:
        assert error.name == ERROR + "AccessDenied"
        return False
    client.driver("ReleaseName", "s", ("test.watch.Denied",))
    return True


def test_services_that_come_change_and_go(bus: Bus) -> None:
    client = listens(bus)
    add_service(bus, "test.watch.New", executable="/nonexistent")
    client.wait_signal("ActivatableServicesChanged")
    assert "test.watch.New" in client.driver("ListActivatableNames")[0]
    with pytest.raises(BusError, match="No such file"):
        client.driver("StartServiceByName", "su", ("test.watch.New", 0))
    (bus.directory / "other").write_text(
        "[D-BUS Service]\nName=test.watch.New\nExec=/bin/sh -c 'exit 7'\n"
    )
    (bus.directory / "other").rename(bus.services / "test.watch.New.service")

    def is_the_new_one() -> bool:
        with pytest.raises(BusError) as caught:
            client.driver("StartServiceByName", "su", ("test.watch.New", 0))
        return "status 7" in caught.value.text

    procs.eventually(is_the_new_one, "the file that was put in its place counts")
    (bus.services / "test.watch.New.service").unlink()
    procs.eventually(
        lambda: client.driver("ListActivatableNames") == [[DRIVER]], "there is none any more"
    )


@pytest.mark.skipif(is_reference(), reason="dbus-daemon watches only directories that are there")
def test_policy_in_a_directory_that_appears_later(bus: Bus) -> None:
    client = bus.connect()
    assert may_own(client)
    (bus.directory / "more.d").mkdir()
    (bus.directory / "more.d" / "deny.conf").write_text(DENY)
    procs.eventually(lambda: not may_own(client), "the new policy is in force")
    (bus.directory / "more.d" / "deny.conf").unlink()
    procs.eventually(lambda: may_own(client), "it is no more")


@pytest.mark.skipif(is_reference(), reason="dbus-daemon leaves a broken file out")
def test_a_broken_file_that_appears_changes_nothing(bus: Bus) -> None:
    client = bus.connect()
    directory = bus.directory / "more.d"
    directory.mkdir()
    (directory / "10-deny.conf").write_text(DENY)
    procs.eventually(lambda: not may_own(client), "the policy is in force")
    allow = DENY.replace("deny own", "allow own")
    (directory / "20-allow.conf").write_text(allow)
    procs.eventually(lambda: may_own(client), "the other one is")
    (directory / "30-broken.conf").write_text(DENY.replace("own=", "owns="))
    (directory / "20-allow.conf").unlink()
    # Which of both is read first is open, but not that the file with its line is named, and no policy is lost.
    procs.eventually(lambda: "30-broken.conf:2: " in bus.log(), "the log says where")
    procs.eventually(lambda: "the one in force stays" in bus.log(), "and what becomes of it")
    assert may_own(client)
    (directory / "30-broken.conf").unlink()
    procs.eventually(lambda: not may_own(client), "what remains is in force")


def test_a_service_that_is_called_as_soon_as_it_is_there(bus: Bus) -> None:
    client = bus.connect()
    for number in range(20):
        add_service(bus, f"test.watch.S{number}", executable="/nonexistent")
        with pytest.raises(BusError) as caught:
            client.call(f"test.watch.S{number}", "/", "test.I", "M")
        assert caught.value.name == ERROR + "Spawn.ExecFailed"


@pytest.mark.parametrize("changing", [False, True], ids=["still", "changing"])
def test_a_name_that_nobody_has_was_refused_after_later_calls_were_answered(
    bus: Bus, changing: bool
) -> None:
    client = bus.connect()
    serials = []
    for number in range(20):
        if changing and number % 10 == 5:
            add_service(bus, f"test.watch.Other{number}")
        serials += [
            client.send_call(f"test.watch.N{number}", "/", "test.I", "M"),
            client.send_call(DRIVER, DRIVER_PATH, DRIVER, "GetId"),
            client.send_call(
                DRIVER,
                DRIVER_PATH,
                DRIVER,
                "StartServiceByName",
                "su",
                (f"test.watch.N{number}", 0),
            ),
            client.send_call(DRIVER, DRIVER_PATH, DRIVER, "AddMatch", "s", ("member='M'",)),
        ]
    assert [client.read().reply_serial for _ in serials] == serials


def test_a_service_that_was_looked_for_and_starts_slowly_holds_up_nothing(
    start_bus,
    tmp_path: Path,  # type: ignore[no-untyped-def]
) -> None:
    bus: Bus = start_bus()
    os.mkfifo(tmp_path / "gate")
    client = bus.connect()
    add_service(bus, "test.watch.Slow", executable=f"/bin/cat {tmp_path}/gate")
    call = client.send_call("test.watch.Slow", "/", "test.I", "M")
    asked = client.send_call(DRIVER, DRIVER_PATH, DRIVER, "GetId")
    assert client.wait_reply(asked).signature == "s"
    client.send_call(DRIVER, DRIVER_PATH, DRIVER, "RequestName", "su", ("test.watch.Slow", 0))
    assert client.wait_call("M").serial == call
    with (tmp_path / "gate").open("wb"):
        pass  # it ends


def test_what_a_service_writes_to_its_stdout_is_in_the_log(bus: Bus) -> None:
    add_service(bus, "test.watch.Words", executable="/bin/sh -c 'echo words of a service; exit 1'")
    with pytest.raises(BusError):
        bus.connect().driver("StartServiceByName", "su", ("test.watch.Words", 0))
    procs.eventually(lambda: "words of a service\n" in bus.log(), "they are")


@pytest.mark.kbusd_only
def test_files_that_say_the_same_are_announced_and_what_comes_then_counts(bus: Bus) -> None:
    client = listens(bus)
    for _ in range(2):  # the second time it is the same file
        add_service(bus, "test.watch.Same")
        client.wait_signal("ActivatableServicesChanged")
    assert may_own(client)
    (bus.directory / "more.d").mkdir()
    (bus.directory / "more.d" / "deny.conf").write_text(DENY)
    procs.eventually(lambda: not may_own(client), "the new policy is in force")


def test_a_reload_is_announced_though_nothing_has_changed(bus: Bus) -> None:
    client = listens(bus)
    for _ in range(2):
        client.driver("ReloadConfig")
        client.wait_signal("ActivatableServicesChanged")
