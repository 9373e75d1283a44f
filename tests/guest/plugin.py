"""Runs the tests that are marked `guest` in the guest, and reports them as if they had run here.

They come first, in one boot: nothing of other tests is set up then, and their guest is gone before
others start. Those that are marked `guest("selinux")` have a guest of their own, whose root has labels
and whose kernel has a policy (labelled.py). Here they are only collected; neither they nor their fixtures
run. In the guest (KBUSD_GUEST is set) this does nothing, and they are tests like any other.

A guest that dies takes one test with it, and another is booted for those that are left; one that
does not come up, or dies again and again, fails all of them. None is skipped for lack of a guest.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from typing import Any

import pytest

from . import inside, labelled
from .machine import Machine, Unbootable, command_line

BOOT_SECONDS = 60.0  # and for collecting; on an idle machine it is 3
KINDS = ("", labelled.KIND, labelled.STRICT)
SLACK_SECONDS = 30.0  # beyond a test's own limit, after which it ends itself
DEATHS = 3  # so many guests may die
POLL_SECONDS = 0.02
CONSOLE_CHARACTERS = 20_000

in_guest = "KBUSD_GUEST" in os.environ


class Lost(Exception):
    """The guest did not report a test; says what happened instead."""


class Guest:
    """A guest of this run; boots when the first report is wanted. `kind`: of the marker."""

    def __init__(self, config: pytest.Config, kind: str) -> None:
        self.config = config
        self.kind = kind
        self.machine: Machine | None = None
        self.lost = 0
        self.hopeless = ""

    def reports(self, items: list[pytest.Item]) -> list[pytest.TestReport]:
        """Those of the first of `items`; the others are what is to run after it. Raises Lost."""
        if self.hopeless:
            raise Lost(self.hopeless)
        try:
            if self.machine is None:
                self._boot(items)
            return self._await(items[0])
        except (Lost, Unbootable) as error:
            self.lost += 1
            if self.lost == DEATHS or not self.begun:
                self.hopeless = f"no guest: {error}"
            raise Lost(str(error)) from None

    def console(self) -> str:
        return self.machine.console()[-CONSOLE_CHARACTERS:] if self.machine else ""

    def stop(self) -> None:
        if self.machine:
            self.machine.stop()
            self.machine = None

    def _boot(self, items: list[pytest.Item]) -> None:
        self.begun = False
        self.found: dict[str, list[pytest.TestReport]] = {}
        self.finished: set[str] = set()
        self.rest = b""
        self.read = 0
        root = str(self.config.rootpath)
        job = command_line(["python", "-m", "tests.guest.inside", root], root)
        files = {inside.TESTS: json.dumps([item.nodeid for item in items])}
        if self.kind:
            strict = self.kind == labelled.STRICT
            self.machine = labelled.machine(job + " </dev/null\n", files, strict)
        else:
            self.machine = Machine(job + " </dev/null\n", files=files)

    def _await(self, item: pytest.Item) -> list[pytest.TestReport]:
        assert self.machine
        limit = _limit(item) + SLACK_SECONDS + (0 if self.begun else BOOT_SECONDS)
        deadline = time.monotonic() + limit
        while item.nodeid not in self.finished:
            running = self.machine.running()
            if self._news():
                deadline = time.monotonic() + limit
                continue
            if not running:
                raise Lost(f"the guest ended without a result of {item.nodeid}")
            if time.monotonic() > deadline:
                raise Lost(f"no result of {item.nodeid} from the guest within {limit:.0f} s")
            time.sleep(POLL_SECONDS)
        return self.found[item.nodeid]

    def _news(self) -> bool:
        assert self.machine
        path = self.machine.directory / inside.REPORTS
        if not path.exists():
            return False
        with path.open("rb") as file:
            file.seek(self.read)
            new = file.read()
        self.read += len(new)
        *lines, self.rest = (self.rest + new).split(b"\n")
        for line in lines:
            self._take(json.loads(line))
        return bool(new)

    def _take(self, value: Any) -> None:
        match value:
            case "begin":
                self.begun = True
            case {"report": data}:
                report = self.config.hook.pytest_report_from_serializable(
                    config=self.config, data=data
                )
                if isinstance(report.longrepr, list):
                    report.longrepr = tuple(report.longrepr)  # a skip's; JSON has no tuples
                self.found.setdefault(report.nodeid, []).append(report)
            case {"finish": nodeid}:
                self.finished.add(nodeid)


_GUESTS = pytest.StashKey[dict[str, Guest]]()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "guest: runs in a virtual machine (docs/guest.md)")
    if not in_guest:
        config.stash[_GUESTS] = {kind: Guest(config, kind) for kind in KINDS}


def pytest_unconfigure(config: pytest.Config) -> None:
    for guest in config.stash.get(_GUESTS, {}).values():
        guest.stop()


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> None:
    if not in_guest:
        session.items.sort(key=lambda item: (not _is_guests(item), _kind(item)))


@pytest.hookimpl(optionalhook=True)
def pytest_timeout_set_timer(item: pytest.Item) -> bool | None:
    """pytest-timeout's limit holds in the guest; here the guest as a whole has one."""
    return True if not in_guest and _is_guests(item) else None


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    if in_guest or not _is_guests(item):
        return None
    guest = item.config.stash[_GUESTS][_kind(item)]
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in _reports(guest, item):
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    if nextitem is None or not _is_guests(nextitem) or _kind(nextitem) != guest.kind:
        guest.stop()
    return True


def _reports(guest: Guest, item: pytest.Item) -> Iterator[pytest.TestReport]:
    items = item.session.items
    behind = items[items.index(item) :]
    following = [each for each in behind if _is_guests(each) and _kind(each) == guest.kind]
    try:
        yield from guest.reports(following)
    except Lost as error:
        shape: dict[str, Any] = {"nodeid": item.nodeid, "location": item.location}
        shape |= {"keywords": dict.fromkeys(item.keywords, 1)}
        lost = pytest.TestReport(**shape, outcome="failed", longrepr=str(error), when="call")
        lost.sections.append(("console of the guest", guest.console()))
        yield lost
        yield pytest.TestReport(**shape, outcome="passed", longrepr=None, when="teardown")
        guest.stop()


def _is_guests(item: pytest.Item) -> bool:
    return item.get_closest_marker("guest") is not None


def _kind(item: pytest.Item) -> str:
    marker = item.get_closest_marker("guest")
    return str(marker.args[0]) if marker and marker.args else ""


def _limit(item: pytest.Item) -> float:
    marker = item.get_closest_marker("timeout")
    return float(marker.args[0]) if marker and marker.args else inside.TIMEOUT
