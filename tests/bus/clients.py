"""Runs other people's programs against a bus, with deadlines, and ends what still runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Self

from . import aftermath
from .daemon import STOP_SECONDS, Bus, clean_environment, read_line

REPOSITORY = Path(__file__).parents[2]
DEBIAN_PYTHON = "/usr/bin/python3"
SECONDS = 40


def run(bus: Bus, *command: str, text: str | None = None, ok: bool = True) -> str:
    """Run a program to its end; returns what it wrote to both outputs."""
    done = subprocess.run(
        command,
        env=bus.env(),
        input=text,
        stdin=None if text is not None else subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert (done.returncode == 0) == ok, f"{command} ended with {done.returncode}: {done.stdout}"
    return done.stdout


def run_reaped(*command: str, status: int = 0, stdin: int = subprocess.DEVNULL, **env: str) -> str:
    """Run a program that starts daemons itself; fails if a process of it is left at the end."""
    reaper = str(Path(__file__).with_name("services") / "reap.py")
    done = subprocess.run(
        [sys.executable, "-S", reaper, str(SECONDS), str(STOP_SECONDS), *command],
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=clean_environment(**env),
        text=True,
        check=False,
    )
    assert done.returncode == status, done.stdout
    return done.stdout


class Program:
    """A program that runs meanwhile; a context manager that ends it."""

    def __init__(self, bus: Bus, *command: str, output: Path | None = None) -> None:
        self.bus = bus
        out = output.open("wb") if output else subprocess.PIPE
        self.process = subprocess.Popen(
            command,
            env=bus.env(PYTHONPATH=str(REPOSITORY)),
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=subprocess.STDOUT,
            bufsize=0,
        )
        if output:
            out.close()  # type: ignore[union-attr]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.communicate(timeout=SECONDS)

    def line(self) -> str:
        """The next line (or lines) that it writes."""
        return self._line("")

    def _line(self, seen: str) -> str:
        assert self.process.stdout
        try:
            return read_line(self.process.stdout, SECONDS)
        except AssertionError as error:
            error.add_note(f"after {seen!r}; {aftermath.of_program(self.bus, self.process.pid)}")
            raise

    def lines_until(self, text: str) -> str:
        """What it writes until a line that contains `text`."""
        seen = ""
        while text not in seen:
            line = self._line(seen)
            assert line or self.process.poll() is None, f"ended after {seen!r}"
            seen += line + "\n"
        return seen


def glib_service(bus: Bus, name: str) -> Program:
    """Start the dbus-python service; it owns its name when this returns."""
    script = str(Path(__file__).with_name("services") / "glib_service.py")
    program = Program(bus, DEBIAN_PYTHON, script, name)
    line = program.line()
    assert line == "ready", line
    return program


def echo_service(bus: Bus, name: str) -> Program:
    """Start our own echo service and wait until it owns its name."""
    watcher = bus.connect()
    watcher.add_match(f"member='NameOwnerChanged',arg0='{name}'")
    program = Program(
        bus,
        "env",
        f"DBUS_STARTER_ADDRESS={bus.address}",
        sys.executable,
        "-S",
        "-m",
        "tests.bus.services.echo",
        name,
    )
    watcher.wait_signal("NameOwnerChanged")
    return program
