"""Runs tests of kdbusfs where there may be a mount: as root, and as root of a user namespace only.

A test marked `everywhere` runs in a process of its own, in each place; that process starts what it needs
and leaves nothing. It ends after SECONDS whatever happens, and with it, whatever hangs on its mount.
"""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SECONDS = 50
USER = 1234
TREE = Path(__file__).parents[2]

NAMESPACE = ["unshare", "--user", "--map-root-user", "--mount"]
ORDINARY = ["setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups", *NAMESPACE]
COMMANDS = {"root": [], "namespace": NAMESPACE, "guest-root": [], "guest-user": ORDINARY}

_guest = pytest.mark.guest
NATIVE = [pytest.param("root", marks=() if os.geteuid() == 0 else _guest), "namespace"]
GUEST = [pytest.param("guest-root", marks=_guest), pytest.param("guest-user", marks=_guest)]


def run(place: str, module: str, name: str) -> None:
    """Call a test's function there; what it prints is shown if it fails."""
    command = [*COMMANDS[place], sys.executable, "-m", "tests.kdbusfs.places", module, name]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, cwd=TREE, stdout=pipe, stderr=subprocess.STDOUT, text=True)
    try:
        output, _ = process.communicate(timeout=SECONDS + 5)
    except subprocess.TimeoutExpired:
        # Not to be waited for: what is stuck in its own mount can't even be killed.
        pytest.fail(f"{name} is stuck, pid {process.pid}; to free it, write 1 to its .../abort")
    assert process.returncode == 0, output


def everywhere(places: list[Any]) -> Callable[[Callable[[], None]], Callable[[str], None]]:
    """A decorator for a test without arguments."""

    def decorate(function: Callable[[], None]) -> Callable[[str], None]:
        @pytest.mark.parametrize("place", places)
        def test(place: str) -> None:
            run(place, function.__module__, function.__name__)

        test.__name__ = function.__name__
        test.__doc__ = function.__doc__
        test.inside = function  # type: ignore[attr-defined]
        return test

    return decorate


if __name__ == "__main__":
    signal.alarm(SECONDS)
    getattr(importlib.import_module(sys.argv[1]), sys.argv[2]).inside()
