"""GLib's gdbus tests (libglib2.0-tests), with the daemon under test as dbus-daemon on PATH."""

from __future__ import annotations

from pathlib import Path

import pytest

from . import suites

# A program that fails is run again case by case.
pytestmark = pytest.mark.timeout(10 * suites.PROGRAM_SECONDS)


@pytest.mark.parametrize("program", suites.expected("glib"))
def test_program(program: str, short_directory: Path) -> None:
    result = suites.run("glib", program, short_directory)
    found = suites.differences("glib", program, result.cases)
    assert not found, "\n".join(found) + "\n\n" + result.output


def test_every_installed_program_is_listed() -> None:
    assert set(suites.expected("glib")) == set(suites.programs("glib"))
