"""The same policy in two places: an endpoint of kbusd, and xdg-dbus-proxy in front of dbus-daemon.

Both are asked the same things, and what a client behind them gets must be the same. Where we differ, and
why, is said beside the case.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from . import wireformat as w
from .daemon import Bus, clean_environment, configuration, read_line
from .rawclient import DRIVER, DRIVER_PATH, BusError, RawClient

pytestmark = pytest.mark.kbusd_only

POLICY = [
    "--see=t.See",
    "--see=t.SeeAll.*",
    "--talk=t.Talk",
    "--talk=t.TalkAll.*",
    "--own=t.Own",
    "--own=t.OwnAll.*",
    "--call=t.Call=t.Face.Method@/path",
    "--call=t.Call=t.Wide.*",
    "--call=t.Call=@/tree/*",
    "--call=t.CallAll.*=*",
    "--broadcast=t.Cast=t.Face.Signal@/path",
    "--broadcast=t.Cast=t.Wide.*@/tree/*",
    "--broadcast=t.CastAll.*=*",
]
OWNED = [
    "t.See",
    "t.SeeAll",
    "t.SeeAll.Below",
    "t.Talk",
    "t.Talk.Below",
    "t.TalkAll.Below.Further",
    "t.TalkAllNot",
    "t.Call",
    "t.CallAll.Below",
    "t.Cast",
    "t.CastAll.Below",
    "t.Hidden",
]
NAMES = [*OWNED, "t.Own", "t.OwnAll.Below", "t.Absent", "t.TalkAll.Absent", "t.Own.Below", DRIVER]
MESSAGES = [
    (path, interface, member)
    for path in ("/path", "/path/x", "/tree", "/tree/x/y", "/treetop")
    for interface in ("t.Face", "t.Wide", "t.Wide.Er")
    for member in ("Method", "Signal")
]


class Side:
    """A bus with an owner for each of OWNED, and `app`, which is behind the policy."""

    def __init__(self, address: str, behind: str) -> None:
        self.owners = {}
        for name in OWNED:
            self.owners[name] = RawClient(address)
            assert self.owners[name].request_name(name) == 1
        self.app = RawClient(behind)
        self.app.add_match("type='signal'")
        self._shown = {client.name: f"owner of {name}" for name, client in self.owners.items()}
        self._shown[self.app.name] = "app"

    def show(self, value: Any) -> Any:
        """With unique names, which differ, told by whose they are."""
        if isinstance(value, list):
            return sorted(map(self.show, value), key=str)
        return self._shown.get(value, value)

    def ask(self, *call: Any, **options: Any) -> Any:
        try:
            return self.show(self.app.call(*call, timeout=10, **options).args)
        except BusError as error:
            return error.name.removeprefix("org.freedesktop.DBus.Error.")

    def bus(self, member: str, signature: str = "", *args: Any) -> Any:
        return self.ask(DRIVER, DRIVER_PATH, DRIVER, member, signature, args)

    def close(self) -> None:
        for client in (*self.owners.values(), self.app):
            client.close()


@pytest.fixture(scope="module")
def sides() -> Iterator[tuple[Side, Side]]:
    with tempfile.TemporaryDirectory(prefix="kbp-") as directory:
        yield from _sides(Path(directory))


def _sides(directory: Path) -> Iterator[tuple[Side, Side]]:
    lines: dict[str, list[str]] = {}
    for option in POLICY:
        word, _, value = option.removeprefix("--").partition("=")
        lines.setdefault(word, []).append(value)
    file = directory / "app.toml"
    file.write_text("".join(f"{word} = {values!r}\n" for word, values in lines.items()))
    bus = Bus(options=[f"--endpoint={file}"])
    theirs = directory / "theirs"
    config = directory / "theirs.conf"
    config.write_text(configuration(f"unix:path={theirs}"))
    started = []
    try:
        reader, writer = os.pipe()
        daemon = ["/usr/bin/dbus-daemon", f"--config-file={config}", "--nofork", "--nopidfile"]
        started.append(
            subprocess.Popen(
                [*daemon, f"--print-address={writer}"], pass_fds=[writer], env=clean_environment()
            )
        )
        os.close(writer)
        with os.fdopen(reader, "rb", 0) as pipe:
            address = read_line(pipe)
        proxy = directory / "proxy"
        reader, writer = os.pipe()
        command = ["xdg-dbus-proxy", f"--fd={writer}", address, str(proxy), "--filter", *POLICY]
        started.append(subprocess.Popen(command, pass_fds=[writer], env=clean_environment()))
        os.close(writer)
        with os.fdopen(reader, "rb", 0) as pipe:
            assert pipe.read(1) == b"x"
            us = Side(bus.address, f"unix:path={bus.socket}.app")
            them = Side(address, f"unix:path={proxy}")
            yield us, them
            us.close()
            them.close()
    finally:
        for process in reversed(started):
            process.terminate()
            process.wait(10)
        bus.stop()


def same(sides: tuple[Side, Side], question: Callable[[Side], Any]) -> Any:
    ours, theirs = map(question, sides)
    assert ours == theirs
    return ours


def test_names_are_listed(sides: tuple[Side, Side]) -> None:
    names = same(sides, lambda side: side.bus("ListNames"))
    assert "t.See" in str(names) and "t.Hidden" not in str(names)
    same(sides, lambda side: side.bus("ListActivatableNames"))


@pytest.mark.parametrize("member", ["NameHasOwner", "GetNameOwner"])
def test_owners_are_told(sides: tuple[Side, Side], member: str) -> None:
    for name in NAMES:
        same(sides, lambda side, name=name: side.bus(member, "s", name))  # type: ignore[misc]
    for name in OWNED:
        same(sides, lambda side, name=name: side.bus(member, "s", side.owners[name].name))  # type: ignore[misc]


def test_credentials_are_told(sides: tuple[Side, Side]) -> None:
    def found(side: Side, name: str) -> Any:
        answer = side.bus("GetConnectionUnixUser", "s", name)
        # The proxy says of a hidden name what it says of a hidden destination: ServiceUnknown, where
        # the bus says NameHasNoOwner of a name that does not exist, by which one can tell them apart.
        return "nobody" if answer in ("ServiceUnknown", "NameHasNoOwner") else answer

    for name in NAMES:
        same(sides, lambda side, name=name: found(side, name))  # type: ignore[misc]
    for name in OWNED:
        same(sides, lambda side, name=name: found(side, side.owners[name].name))  # type: ignore[misc]


def called(side: Side, to: str, owner: str, message: tuple[str, str, str]) -> Any:
    """What comes of a call: its error, or "arrived" if it has."""
    app, callee = side.app, side.owners[owner]
    serial = app.send_call(to, *message)
    first = app.send_call(DRIVER, DRIVER_PATH, DRIVER, "GetId")
    got = app.wait(lambda m: m.reply_serial in (serial, first))
    if got.reply_serial == serial:
        app.wait_reply(first)
        return got.error_name
    call = callee.wait_call(message[2])
    callee.reply(call, "s", ("arrived",))
    return app.wait_reply(serial).args


def passing(owner: str, partly: str) -> int:
    """How many of MESSAGES pass, so that not all of this agrees on nothing."""
    if owner in ("t.Talk", "t.TalkAll.Below.Further", f"{partly}All.Below"):
        return len(MESSAGES)
    return {"t.Call": 19, "t.Cast": 5}[partly] if owner == partly else 0


@pytest.mark.parametrize("owner", OWNED)
@pytest.mark.parametrize("unique", [False, True])
def test_calls(sides: tuple[Side, Side], owner: str, unique: bool) -> None:
    answers = []
    for message in MESSAGES:

        def call(side: Side, message: tuple[str, str, str] = message) -> Any:
            answer = called(side, side.owners[owner].name if unique else owner, owner, message)
            # Of a unique name that does not exist dbus-daemon says ServiceUnknown, as we do of one that is
            # hidden; the proxy says NameHasNoOwner.
            return "nobody" if "ServiceUnknown" in answer or "HasNoOwner" in answer else answer

        answers.append(same(sides, call))
    assert answers.count(["arrived"]) == passing(owner, "t.Call")


def test_broadcasts(sides: tuple[Side, Side]) -> None:
    for owner in OWNED:

        def heard(
            side: Side, owner: str = owner
        ) -> list[tuple[str | None, str | None, str | None]]:
            sender = side.owners[owner]
            for message in MESSAGES:
                sender.signal(*message)
            # Signals to one are not held back by either.
            return [
                (each.path, each.interface, each.member)
                for each in side.app.drain(sender)
                if each.sender == sender.name
            ]

        got = same(sides, heard)
        assert len(got) == passing(owner, "t.Cast")


def test_names_are_owned(sides: tuple[Side, Side]) -> None:
    def owned(side: Side, name: str) -> Any:
        answer = side.bus("RequestName", "su", name, 4)
        # That a name may not be owned is no secret: the same is said whether it exists or not.
        return "no" if answer in ("ServiceUnknown", "AccessDenied") else answer

    for name in NAMES:
        if name != DRIVER:
            same(sides, lambda side, name=name: owned(side, name))  # type: ignore[misc]


@pytest.mark.parametrize(
    ("interface", "member", "signature", "args"),
    [
        (DRIVER, "UpdateActivationEnvironment", "a{ss}", ({"A": "b"},)),
        (DRIVER, "ReloadConfig", "", ()),
        (DRIVER, "AddMatch", "s", ("eavesdrop='true'",)),
        (DRIVER, "NoSuchMethod", "", ()),
        (f"{DRIVER}.Monitoring", "BecomeMonitor", "asu", ([], 0)),
        (f"{DRIVER}.Debug.Stats", "GetStats", "", ()),
        ("no.such.Interface", "Method", "", ()),
    ],
)
def test_the_bus_itself(
    sides: tuple[Side, Side], interface: str, member: str, signature: str, args: tuple[Any, ...]
) -> None:
    call = (DRIVER, DRIVER_PATH, interface, member, signature, args)
    assert same(sides, lambda side: side.ask(*call)) == "AccessDenied"


def test_a_caller_is_seen_until_it_goes(sides: tuple[Side, Side]) -> None:
    """Last, as it makes an owner known."""

    def told(side: Side) -> Any:
        caller = side.owners["t.Hidden"]
        before = side.bus("NameHasOwner", "s", caller.name)
        serial = caller.send_call(side.app.name, "/", "a.b", "C")
        side.app.reply(side.app.wait_call("C"))
        caller.wait_reply(serial)
        after = side.bus("GetNameOwner", "s", caller.name)
        caller.close()
        gone = side.app.wait(
            lambda m: m.type == w.SIGNAL and m.member == "NameOwnerChanged" and m.args[2] == ""
        )
        return before, after, side.show(gone.args)

    same(sides, told)
