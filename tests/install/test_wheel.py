"""What `pip install` gives: a source archive of this tree, a wheel made of that alone, and a bus that runs
from it in an environment of its own, with all files that go with it."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.bus.daemon import Bus

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
TREE = Path(__file__).parents[2]
MADE = (".venv", ".git", "guest", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis")


def run(*command: object, cwd: Path | None = None) -> str:
    """What a program prints; fails if it does."""
    words = [str(each) for each in command]
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where it is installed, by pip, without anything of this tree."""
    place = tmp_path_factory.mktemp("install")
    shutil.copytree(TREE, copy := place / "copy", ignore=shutil.ignore_patterns(*MADE))
    build = "from setuptools import build_meta; print(build_meta.build_sdist('..'))"
    name = run(sys.executable, "-W", "ignore", "-c", build, cwd=copy).split()[-1]
    shutil.unpack_archive(place / name, place)
    source = place / name.removesuffix(".tar.gz")
    # Compiling all of it once more takes minutes. What was made of the same sources is as good.
    if (copy / "build").exists():
        shutil.copytree(copy / "build", source / "build")
    shutil.rmtree(copy)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    run(*pip, "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", place, source)
    shutil.rmtree(source)
    environment = place / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", environment)
    (wheel,) = place.glob("*.whl")
    run(*pip, "--python", environment / "bin/python", "install", "-q", "--no-deps", wheel)
    # What it depends on is here; as a line of a .pth file, without what this environment runs at start.
    (packages,) = environment.glob("lib/python*/site-packages")
    (packages / "depends.pth").write_text(sysconfig.get_path("platlib") + "\n")
    return environment


def test_a_bus_runs_from_the_wheel(prefix: Path) -> None:
    place = run(prefix / "bin/python", "-c", "import kbusd; print(kbusd.__file__)", cwd=Path("/"))
    assert Path(place).is_relative_to(prefix)
    bus = Bus(daemon=[str(prefix / "bin/kbusd")])
    try:
        client = bus.connect()
        assert client.driver("GetNameOwner", "s", ("org.freedesktop.DBus",))
        rows = json.loads(run(prefix / "bin/kbusctl", "workers", "--pid", bus.pid, "--json"))
        assert rows and not [row for row in rows if row["differences"]]
    finally:
        bus.stop()


def overridden(name: str) -> bool:
    """Whether an admin of this machine has a profile of his own."""
    return os.path.exists(f"/etc/kbusd/profiles/{name}")


def test_its_profiles_are_those_that_were_installed(prefix: Path) -> None:
    ours = prefix / "share/kbusd/profiles"
    listed = run(prefix / "bin/kbusctl", "profile", "list", cwd=Path("/"))
    for profile in (TREE / "profiles").iterdir():
        assert (ours / profile.name).read_text() == profile.read_text()
        if profile.stem not in ("base", "profile.schema") and not overridden(profile.name):
            assert str(ours / profile.name) in listed


def test_all_that_its_documents_speak_of_is_there(prefix: Path) -> None:
    share = prefix / "share"
    for page in (TREE / "docs/man").iterdir():
        assert (share / f"man/man{page.suffix[1:]}" / page.name).exists(), page
    for page in (TREE / "docs").glob("*.md"):
        assert (share / "doc/kbusd" / page.name).exists(), page
    for each in (TREE / "packaging/lxc").iterdir():
        assert (share / "kbusd/lxc" / each.name).exists(), each
    for name in ("Makefile", "kbus.te", "kbus.fc", "kbus.if"):
        assert (share / "kbusd/selinux" / name).exists(), name
    (library,) = prefix.glob("lib/python*/site-packages/kbusd/preload/libkbus-preload.so")
    assert ctypes.CDLL(str(library))
