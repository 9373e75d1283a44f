"""The guest's kernel has SELinux, and waits for a policy."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

pytestmark = pytest.mark.guest


def test_selinux_is_among_the_security_modules() -> None:
    assert "selinux" in Path("/sys/kernel/security/lsm").read_text().split(",")


def test_a_policy_can_be_loaded() -> None:
    """Nothing is loaded here: it would hold for all tests that follow."""
    load = Path("/sys/fs/selinux/load")
    assert load.exists() and os.access(load, os.W_OK)
    assert Path("/proc/self/attr/current").read_text().rstrip("\0\n") == "kernel"
