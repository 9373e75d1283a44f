"""The harness itself: what the guest's tests do is told outside, and nothing of a guest stays."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from tests.bus import procs

from .machine import REPOSITORY, processes

CONFTEST = 'pytest_plugins = ["tests.guest.plugin"]\n'
BOOT_SECONDS = 90.0

TESTS = """
import os
import signal
import pytest

pytestmark = pytest.mark.guest

@pytest.fixture
def broken():
    yield
    raise RuntimeError("in the teardown")

@pytest.mark.parametrize("what", ["a b", "[::"])
def test_passes(what):
    assert os.uname().nodename == "guest" and os.getuid() == 0

def test_fails():
    print("words of the test")
    with open("/dev/kmsg", "w") as kmsg:
        kmsg.write("words of the kernel\\n")
    assert os.getuid() == 1

def test_has_a_broken_fixture(broken):
    pass

def test_skips():
    pytest.skip("a reason")

@pytest.mark.xfail(reason="known")
def test_is_known_to_fail():
    raise OSError

def test_writes_everywhere(request):
    for path in ("/etc/kbusd-guest-was-here", __file__):
        with open(path, "w") as file:
            file.write("# what the guest wrote")

def test_ends_the_guest():
    with open("/proc/sysrq-trigger", "w") as trigger:
        trigger.write("c")

def test_after_the_end():
    pass

@pytest.mark.timeout(1)
def test_hangs():
    signal.pause()
"""

WAITS = """
import signal
import pytest

@pytest.mark.guest
def test_waits():
    signal.pause()
"""

NATIVE = """
import os

def test_runs_here():
    assert os.uname().nodename != "guest"
"""


def start(directory: Path, *options: str, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options, str(directory)]
    env = os.environ | {"PYTHONPATH": str(REPOSITORY), "TMPDIR": str(directory)} | environment
    return subprocess.Popen(
        command, cwd=directory, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def project(directory: Path, **files: str) -> Path:
    """A tree of tests of its own; where its guests' files lie, too."""
    directory.mkdir()
    (directory / "conftest.py").write_text(CONFTEST)
    (directory / "pytest.ini").write_text("[pytest]\n")
    for name, text in files.items():
        (directory / f"{name}.py").write_text(text)
    return directory


def outcomes(directory: Path) -> dict[str, tuple[str, str]]:
    """From junit's file: what became of each test, and all that was said about it."""
    found = {}
    for case in ElementTree.parse(directory / "result.xml").iter("testcase"):
        kinds = [child.tag for child in case if child.tag in ("failure", "error", "skipped")]
        text = " ".join(case.itertext()) + " ".join(c.get("message", "") for c in case)
        found[case.get("name", "")] = (kinds[0] if kinds else "passed", text)
    return found


def test_what_becomes_of_a_test_in_the_guest_is_told_outside(tmp_path: Path) -> None:
    here = project(tmp_path / "p", test_a_native=NATIVE, test_guest=TESTS)
    run = start(here, "--junitxml=result.xml", "-o", "junit_logging=all")
    output, _ = run.communicate(timeout=BOOT_SECONDS)
    found = outcomes(here)
    assert {name: kind for name, (kind, _) in found.items()} == {
        "test_runs_here": "passed",
        "test_passes[a b]": "passed",
        "test_passes[[::]": "passed",
        "test_fails": "failure",
        "test_has_a_broken_fixture": "error",
        "test_skips": "skipped",
        "test_is_known_to_fail": "skipped",
        "test_writes_everywhere": "passed",
        "test_ends_the_guest": "failure",
        "test_after_the_end": "passed",
        "test_hangs": "failure",
    }, output
    assert "assert 0 == 1" in found["test_fails"][1]
    assert "in the teardown" in found["test_has_a_broken_fixture"][1]
    assert "the guest ended without a result" in found["test_ends_the_guest"][1]
    assert re.search(r"kernel log of the guest -+\nwords of the kernel", output)
    assert re.search(r"Captured stdout call -+\nwords of the test", output)
    assert re.search(r"console of the guest -+\n(.*\n)*.*sysrq triggered crash", output, re.I)
    # What the guest wrote is gone, and so is the guest.
    assert not Path("/etc/kbusd-guest-was-here").exists()
    assert (here / "test_guest.py").read_text() == TESTS
    assert processes(here) == []
    assert not list(here.glob("kbusd-guest-*"))


def test_without_a_guest_its_tests_fail_and_are_not_skipped(tmp_path: Path) -> None:
    here = project(tmp_path / "p", test_guest=TESTS)
    run = start(here, "-k", "passes or skips", "--junitxml=result.xml", PATH="/nowhere")
    output, _ = run.communicate(timeout=BOOT_SECONDS)
    assert run.returncode == 1
    found = outcomes(here)
    assert len(found) == 3, output
    for kind, text in found.values():
        assert kind == "failure" and "there is no linux.uml" in text


def test_runs_side_by_side_do_not_meet_and_a_killed_one_leaves_nothing(tmp_path: Path) -> None:
    one = project(tmp_path / "one", test_guest=WAITS)
    other = project(tmp_path / "other", test_guest=TESTS)
    run = start(one)
    try:
        procs.eventually(lambda: list(one.glob("*/reports")), "the first one runs", BOOT_SECONDS)
        second = start(other, "-k", "passes")
        output, _ = second.communicate(timeout=BOOT_SECONDS)
        assert second.returncode == 0, output
        assert processes(other) == []
        assert processes(one)
    finally:
        run.send_signal(signal.SIGKILL)
        run.communicate()
    procs.eventually(lambda: not processes(one), "the processes of the killed run are gone")
