"""Debian's dbus-tests: the reference's own suite, with the daemon under test in its place."""

from __future__ import annotations

from pathlib import Path

import pytest

from . import suites

# A program that fails is run again case by case.
pytestmark = pytest.mark.timeout(10 * suites.PROGRAM_SECONDS)


@pytest.mark.parametrize("program", suites.expected("dbus"))
@pytest.mark.parametrize(
    "on_path",
    [False, pytest.param(True, marks=pytest.mark.slow)],
    ids=["DBUS_TEST_DAEMON", "PATH"],
)
def test_program(program: str, on_path: bool, short_directory: Path) -> None:
    result = suites.run("dbus", program, short_directory, on_path=on_path, listed=on_path)
    found = suites.differences("dbus", program, result.cases)
    assert not found, "\n".join(found) + "\n\n" + result.output


def test_every_installed_program_is_listed() -> None:
    assert set(suites.expected("dbus")) == set(suites.programs("dbus"))
