"""Runs the installed tests of other projects on the daemon under test and reads their TAP output.

A program's metadata (`*.test` files of gnome-desktop-testing) says how it is run. Each runs under
services/reap.py, so that one which leaves a process of the bus behind is told from one which does
not. `python -m tests.peers.suites dbus|glib` runs a suite on the reference and prints the table
that is kept in expected/.
"""

from __future__ import annotations

import configparser
import os
import re
import shlex
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import NamedTuple

from tests.bus.daemon import (
    STOP_SECONDS,
    clean_environment,
    daemon_command,
    is_reference,
    path_with_daemon,
)

HERE = Path(__file__).parent
REAPER = HERE.parent / "bus" / "services" / "reap.py"
METADATA = Path("/usr/share/installed-tests")
DBUS_TESTS = Path("/usr/lib/dbus-1.0/installed-tests/dbus")
PROGRAM_SECONDS = 90
LISTED_SECONDS = 10
# What a program's end is called among its cases: its exit status, and whether it left processes.
END = "(end)"

_RESULT = re.compile(r"^(not )?ok\b\s*\d*\s*-?\s*([^#]*?)\s*(#.*)?$")


class Run(NamedTuple):
    """What a program gave: result of each case (pass, fail, skip), and all that it wrote."""

    cases: dict[str, str]
    output: str


def programs(suite: str) -> list[str]:
    """The programs of a suite that have to do with D-Bus.

    Of the dbus suite, integration/transient-services.sh is left out: it tests systemd, which does
    not run in a container or a build."""
    if suite == "dbus":
        names = {path.name for path in (METADATA / suite).glob("test-*_with_config.test")}
        return sorted(name.removesuffix("_with_config.test") for name in names)
    names = {path.stem for path in (METADATA / suite).glob("*.test")}
    wanted = re.compile(r"gdbus-.*|dbus-appinfo|.*-monitor-dbus")
    return sorted(name for name in names if wanted.fullmatch(name))


def command(suite: str, program: str) -> list[str]:
    """How the metadata says that the program is run."""
    suffix = "_with_config" if suite == "dbus" else ""
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(METADATA / suite / f"{program}{suffix}.test")
    words = shlex.split(parser["Test"]["Exec"])
    # GLib's programs in C speak TAP only when asked; those in Python find its option unknown.
    return words if "--tap" in words or words[-1].endswith(".py") else [*words, "--tap"]


def parse_tap(output: str) -> dict[str, str]:
    """The result of each case, by its name; a name given twice fails if one of them failed."""
    cases: dict[str, str] = {}
    for line in output.splitlines():
        match = _RESULT.match(line)
        if match is None:
            continue
        negative, name, directive = match.groups()
        directive = (directive or "").lower()
        if "skip" in directive:
            result = "skip"
        elif negative:
            result = "todo" if "todo" in directive else "fail"
        else:
            result = "pass"
        name = name or "(unnamed)"
        if cases.get(name) != "fail":
            cases[name] = result
    return cases


def run(
    suite: str, program: str, directory: Path, *, on_path: bool = True, listed: bool = True
) -> Run:
    """Run one program. `on_path`: the daemon is found as dbus-daemon on PATH; else it is named by
    DBUS_TEST_DAEMON, which only the dbus suite knows. `listed`: also the cases for which the list
    allows kbusd another result, to see that they still need it; most of them wait in vain for
    what does not come, LISTED_SECONDS each."""
    env = clean_environment(
        XDG_RUNTIME_DIR=str(directory), TMPDIR=str(directory), G_SLICE="always-malloc"
    )
    words = command(suite, program)
    if on_path:
        env["PATH"] = path_with_daemon(directory)
    else:
        env["DBUS_TEST_DAEMON"] = " ".join(daemon_command())
    if suite == "glib":
        words = ["dbus-run-session", "--", *words]
    excused = _excused(suite, program)
    skipped = [word for name in excused if name.startswith("/") for word in ("-s", name)]
    cases, end, output = _run_once([*words, *skipped], env, directory)
    for name, entry in excused.items():
        if not name.startswith("/"):
            continue
        cases[name] = entry["result"]
        if listed:
            one, _, more = _run_once([*words, "-p", name], env, directory, LISTED_SECONDS)
            cases[name] = one.get(name, "fail")
            output += more
    # A case that fails ends a GLib test program: run those after it one by one.
    for name in expected_cases(suite, program):
        if name.startswith("/") and name not in cases:
            one, _, more = _run_once([*words, "-p", name], env, directory)
            cases[name] = one.get(name, "fail")
            output += more
    cases[END] = end
    return Run(cases, output)


def _run_once(
    words: list[str], env: dict[str, str], directory: Path, seconds: int = PROGRAM_SECONDS
) -> tuple[dict[str, str], str, str]:
    """Cases, how it ended, output."""
    done = subprocess.run(
        [sys.executable, "-S", str(REAPER), str(seconds), str(STOP_SECONDS), *words],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        env=env,
        cwd=directory,
        text=True,
        errors="replace",
        check=False,
    )
    end = "pass" if done.returncode in (0, 77) else "fail"
    output = f"$ {shlex.join(words)}\nexit status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return parse_tap(done.stdout), end, output


def expected_cases(suite: str, program: str) -> list[str]:
    """The cases that the list has for a program; none while the list is being made."""
    try:
        return list(expected(suite)[program])
    except (KeyError, FileNotFoundError):
        return []


def expected(suite: str) -> dict[str, dict[str, str]]:
    """What each case of each program gives on the reference."""
    with (HERE / "expected" / f"{suite}.toml").open("rb") as file:
        return tomllib.load(file)["reference"]


def allowed(suite: str) -> dict[str, dict[str, dict[str, str]]]:
    """What kbusd may give instead, by program and case: {result, reason}."""
    with (HERE / "expected" / f"{suite}.toml").open("rb") as file:
        return tomllib.load(file).get("kbusd", {})


def _excused(suite: str, program: str) -> dict[str, dict[str, str]]:
    """The entries of `allowed` that count for the daemon under test."""
    if is_reference():
        return {}
    try:
        return allowed(suite).get(program, {})
    except FileNotFoundError:
        return {}


def differences(suite: str, program: str, cases: dict[str, str]) -> list[str]:
    """Where the results are worse than the reference's and no reason is listed, or better than
    the list says."""
    reference = expected(suite)[program]
    excused = _excused(suite, program)
    found = []
    for name, good in reference.items():
        got = cases.get(name, "missing")
        if name in excused:
            if got != excused[name]["result"]:
                found.append(f"{name}: {got}, but listed as {excused[name]['result']}")
        elif got != good and not (good == "skip" and got == "pass"):
            found.append(f"{name}: {got}, on the reference {good}")
    found += [
        f"{name}: fail, and not listed"
        for name in cases.keys() - reference.keys()
        if cases[name] == "fail"
    ]
    return found


def main(suite: str) -> None:
    """Print the reference's results as TOML."""
    assert is_reference(), "set KBUSD_TEST_DAEMON=/usr/bin/dbus-daemon"
    for program in programs(suite):
        with tempfile.TemporaryDirectory(prefix="kbt-", dir="/tmp") as directory:
            cases = run(suite, program, Path(directory)).cases
        print(f'\n[reference."{program}"]')
        for name, result in cases.items():
            print(f'"{name}" = "{result}"')


if __name__ == "__main__":
    os.environ.setdefault("KBUSD_TEST_DAEMON", "/usr/bin/dbus-daemon")
    main(sys.argv[1])
