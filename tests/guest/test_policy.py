"""The policy module builds with Debian's headers, keeps every assertion of Debian's policy, and lets a
worker do what it did when somebody last looked at that."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from . import labelled

GRANTING = {"create", "open", "execute", "connectto", "bind", "transition", "ptrace", "relabelto"}


@pytest.mark.parametrize(
    "name", ["worker.rules", pytest.param("worker-strict.rules", marks=pytest.mark.slow)]
)
@pytest.mark.timeout(120)
def test_a_worker_may_do_what_is_written_down(name: str) -> None:
    """If it is meant: python -m tests.guest.labelled, and look at the difference."""
    assert labelled.rules(labelled.RULES[name]) == (labelled.SOURCES / name).read_text()


def test_by_the_strict_variant_a_worker_opens_and_makes_nothing() -> None:
    for line in (labelled.SOURCES / "worker-strict.rules").read_text().splitlines():
        may = set(line.replace("{", "").replace("}", "").replace(";", "").split()[3:])
        assert not may & GRANTING, line


def test_interfaces_for_clients_compile(tmp_path: Path) -> None:
    """What docs/selinux.md tells policy authors to write."""
    module = """policy_module(mine, 1.0)
type mine_t; type mine_exec_t; type other_t; type mine_file_t;
init_daemon_domain(mine_t, mine_exec_t)
domain_type(other_t)
files_type(mine_file_t)
kbus_service(mine_t)
kbus_client(other_t)
kbus_chat(other_t, mine_t)
kbus_passed_file(mine_file_t)
type started_t; type started_exec_t;
kbus_service_domain(started_t, started_exec_t)
kbus_admin(other_t, system_r)
"""
    headers = tmp_path / "usr/share/selinux/devel"
    shutil.copytree("/usr/share/selinux/devel", headers)
    (headers / "include/services/kbus.if").unlink(missing_ok=True)
    _make(labelled.SOURCES, "install-interfaces", f"DESTDIR={tmp_path}")
    mine, ours = tmp_path / "mine", tmp_path / "ours"
    mine.mkdir()
    (mine / "mine.te").write_text(module)
    there = f"HEADERDIR={headers}/include"
    _make(mine, "-f", f"{headers}/Makefile", there, "mine.pp")
    assert (mine / "mine.pp").exists()
    # Ours once more, which is an upgrade.
    shutil.copytree(labelled.SOURCES, ours, ignore=shutil.ignore_patterns("tmp", "strict", "*.pp"))
    _make(ours, there, f"HEADERS={headers}", "kbus.pp")
    assert (ours / "kbus.pp").exists()


def _make(place: Path, *arguments: str) -> None:
    done = subprocess.run(
        ("make", "-s", *arguments), cwd=place, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "uplicate" not in done.stdout + done.stderr
