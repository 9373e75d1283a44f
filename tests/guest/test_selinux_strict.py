"""The same under the strict variant of the policy, by which workers, broker and zygote are no `domain`, as
`make install-strict` puts it into the policy in force (labelled.sh)."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from .domains import context
from .test_selinux_bus import *  # noqa: F403

del test_domains_made_by_our_interfaces_may_what_these_say  # noqa: F821  (not in that policy: labelled.sh)
pytestmark = [pytest.mark.guest("selinux-strict"), pytest.mark.slow]
SELINUX = Path("/sys/fs/selinux")


def allows(domain: str, target: str, kind: str, permission: str) -> bool:
    """What the policy in force says (selinuxfs, access)."""
    known = SELINUX / "class" / kind
    asked = f"{context(domain)} system_u:object_r:{target}:s0 {(known / 'index').read_text()}"
    fd = os.open(SELINUX / "access", os.O_RDWR)
    try:
        os.write(fd, asked.encode())
        allowed = int(os.read(fd, 4096).split()[0], 16)
    finally:
        os.close(fd)
    return bool(allowed >> int((known / "perms" / permission).read_text()) - 1 & 1)


def test_what_every_domain_may_do_is_not_for_those_that_read_what_clients_write() -> None:
    listed = subprocess.run(["semodule", "-l"], capture_output=True, text=True, check=True).stdout
    assert "kbus" in listed.split()
    for domain in ("kbusd_worker_t", "kbusd_zygote_t", "kbusd_broker_t"):
        assert not allows(domain, "etc_t", "dir", "open"), domain
    assert allows("kbusd_launcher_t", "etc_t", "dir", "open")
