"""Holds the tree to its own rules: who may import whom, what the supervisor may contain.

Imports are read from the source, Cython's `cimport`s in .py and .pxd included, and not from what
happens to be loaded. For what the privileged process really loads, a fresh one is asked.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tokenize
import tomllib
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import pytest

TREE = Path(__file__).parents[2]
KBUSD = TREE / "kbusd"
MODULES = sorted(KBUSD.rglob("*.py"))
SOURCES = sorted([*MODULES, *KBUSD.rglob("*.pxd")])

# The layers, from the top; a package imports from those below its own. The sans-IO packages, which
# are the lowest, import nothing of ours.
LAYERS = (
    {"main"},
    {"ctl", "supervisor", "broker", "workers"},
    {"client"},
    {"policy", "sandbox", "rings"},
    {"wire", "kdbus", "cuse"},
)
# What goes sideways or up, and why it may.
EXCEPTIONS = {
    ("kbusd/policy/reader.py", "sandbox"),  # a process of its own, which confines itself
    ("kbusd/ctl/learn.py", "main"),  # what runs in another process, a bus that is watched
}
PARSERS = {
    "xml",
    "pyexpat",
    "jeepney",
    "kbusd.wire",
    "kbusd.kdbus",
    "kbusd.cuse.requests",
    "kbusd.policy",
    "kbusd.workers",
}

# The supervisor, at start and later, in lines of code (blank lines, comments and docstrings not
# counted).
SUPERVISOR = ("__init__.py", "clients.py", "journal.py", "listen.py", "spawn.py", "supervisor.py")
# Devices, counted apart: nothing of it runs without --kdbusfs or --cuse.
DEVICES = (
    "aside.py", "caller.py", "calls.py", "closing.py", "connection.py", "cuse.py", "device.py", "domains.py", "endpoints.py",
    "holder.py", "kdbusfs.py", "made.py", "mount.py", "reach.py", "ready.py", "relay.py",
)  # fmt: skip
CHILDREN = ("launcher.py", "start.py", "watch.py")  # run in processes of their own, after execve
MAX_LINES = 500
MAX_CONNECTION_LINES = 220  # connection.py, what becomes of a request; and all of them:
# 210 of them for what is closed, 290 for buses and endpoints that programs make, 150 for domains, 550 so that all of it is quick,
# 200 so that whoever was taken over holds up nobody else, 25 so that a client whose memory never comes can be killed,
# 10 so that access bits that somebody has set outlive the process that knew them, 10 so that what a worker has said counts
# though it has ended, 5 so that an open file outlives the process that knew it, 50 so that RECV and FREE wait for no worker
# (a message takes a quarter less, one to 64 two fifths).
MAX_DEVICES_LINES = 2550


def layer(package: str) -> int:
    return next(number for number, packages in enumerate(LAYERS) if package in packages)


def package_of(path: Path) -> str:
    return path.relative_to(KBUSD).parts[0].removesuffix(".py")


def our_imports(source: str) -> Iterator[str]:
    """The packages of ours that a source names in an import or cimport."""
    pattern = re.compile(
        r"^\s*(?:from|import|cimport)\s+(?:cython\.cimports\.)?kbusd(?:\.(\w+)|\s+c?import\s+(.+))",
        re.MULTILINE,
    )
    for found in pattern.finditer(source):
        if found[1]:
            yield found[1]
        else:
            yield from re.findall(r"\w+", re.sub(r"\bas\s+\w+", "", found[2]))


def relative(path: Path) -> str:
    return str(path.relative_to(TREE))


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_imports_go_one_way(path: Path) -> None:
    ours = package_of(path)
    if ours == "__init__":
        return
    for other in our_imports(path.read_text()):
        allowed = (
            other == ours or layer(other) > layer(ours) or (relative(path), other) in EXCEPTIONS
        )
        assert allowed, f"{relative(path)} imports kbusd.{other}, which is not below kbusd.{ours}"


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("from kbusd.rings import entries", ["rings"]),
        ("import kbusd.wire.names", ["wire"]),
        ("    from kbusd import wire, policy as p", ["wire", "policy"]),
        ("from cython.cimports.kbusd.rings.ring import Ring", ["rings"]),
        ("from kbusd.rings.ring cimport Ring", ["rings"]),
        ("import kbusdish", []),
    ],
)
def test_every_form_of_an_import_is_seen(line: str, found: list[str]) -> None:
    assert list(our_imports(f'"""A module."""\n{line}\n')) == found


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_every_module_says_what_it_is_for(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text())), f"{relative(path)} has no docstring"


def test_the_way_in_names_every_module() -> None:
    """docs/architecture.md, in the part about the module's package."""
    text = (TREE / "docs" / "architecture.md").read_text()
    parts = dict(
        re.findall(r"^\*\*kbusd/(\w*)/?\*\*(.*?)(?=^\*\*kbusd|^## |\Z)", text, re.S | re.M)
    )
    for path in MODULES:
        package = path.parent.name if path.parent != KBUSD else ""
        if path.name != "__init__.py":
            assert f"`{path.name}`" in parts[package], f"{relative(path)} is missing"


def test_mypy_knows_which_modules_are_compiled() -> None:
    """All that have a .pxd beside them are left to Cython, but for those with a stub."""
    compiled = {
        path
        for path in MODULES
        if path.with_suffix(".pxd").exists() and not path.with_suffix(".pyi").exists()
    }
    settings = tomllib.loads((TREE / "pyproject.toml").read_text())["tool"]["mypy"]
    skipped = {
        TREE.joinpath(*module.split(".")).with_suffix(".py")
        for override in settings["overrides"]
        if override.get("follow_imports") == "skip"
        for module in override["module"]
    }
    excluded = re.compile("|".join(settings["exclude"]))
    assert skipped == compiled
    assert {path for path in MODULES if excluded.search(relative(path))} == compiled


def code_lines(source: bytes) -> int:
    """Lines with code on them: blank lines, comments and docstrings don't count."""
    lines: set[int] = set()
    for token in tokenize.tokenize(BytesIO(source).readline):
        if token.type not in (
            tokenize.COMMENT,
            tokenize.NL,
            tokenize.NEWLINE,
            tokenize.INDENT,
            tokenize.DEDENT,
            tokenize.ENCODING,
            tokenize.ENDMARKER,
        ):
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            lines.difference_update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(lines)


def test_the_supervisor_can_be_read_in_one_sitting() -> None:
    supervisor = KBUSD / "supervisor"
    assert {path.name for path in supervisor.glob("*.py")} == {
        *SUPERVISOR,
        *DEVICES,
        *CHILDREN,
    }
    sizes = {name: code_lines((supervisor / name).read_bytes()) for name in SUPERVISOR}
    assert sum(sizes.values()) < MAX_LINES, sizes
    devices = {name: code_lines((supervisor / name).read_bytes()) for name in DEVICES}
    assert devices["connection.py"] < MAX_CONNECTION_LINES, devices
    assert sum(devices.values()) < MAX_DEVICES_LINES, devices
    plain = (supervisor / "supervisor.py").read_bytes().count(b"\n")
    assert plain < MAX_LINES, "supervisor.py, with its comments"


def test_lines_of_code_are_told_from_words() -> None:
    source = b'''"""Words
of two lines."""

# more words
X = """text
that counts"""


def f() -> None:
    """Words."""
    return  # to the caller
'''
    assert code_lines(source) == 4


def test_a_privileged_process_loads_no_parser() -> None:
    """Which modules a fresh process has after importing all that the supervisor consists of."""
    names = (Path(name).stem for name in (*SUPERVISOR, *DEVICES) if name != "__init__.py")
    modules = ", ".join(["kbusd.main", *(f"kbusd.supervisor.{name}" for name in names)])
    done = subprocess.run(
        [sys.executable, "-s", "-c", f"import sys, {modules}\nprint(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
        cwd=TREE,
    )
    loaded = set(done.stdout.split())
    assert "kbusd.supervisor.supervisor" in loaded
    assert not {name for name in loaded if name.startswith(tuple(PARSERS))}


def silent(value: object, where: str) -> Iterator[str]:
    """The sections and rules of a profile that do not say why."""
    match value:
        case dict():
            # [limits.core] is a section, [limits] only holds such.
            if where != ".limits" and not isinstance(value.get("why"), str):
                yield where or "the file"
            for key, each in value.items():
                if isinstance(each, dict) or key in ("rules", "paths"):
                    yield from silent(each, f"{where}.{key}")
        case list():
            for number, each in enumerate(value):
                yield from silent(each, f"{where}[{number}]")


@pytest.mark.parametrize("path", sorted((TREE / "profiles").glob("*.toml")), ids=relative)
def test_every_rule_of_a_profile_says_why(path: Path) -> None:
    assert not list(silent(tomllib.loads(path.read_text()), ""))
