"""A real dbus-daemon and a model of ours with the same configuration."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from kbusd.policy import configuration
from kbusd.rings.entries import Credentials
from kbusd.sandbox.compiled import Compiled
from kbusd.workers import driver
from kbusd.workers.context import Context
from tests.unit.workers.model import Model
from tests.unit.workers.reference import ReferenceBus


def machine_id() -> str:
    return Path("/etc/machine-id").read_text().strip()


def my_credentials() -> Credentials:
    groups = tuple(sorted({os.getegid(), *os.getgroups()}))
    return Credentials(os.geteuid(), os.getegid(), os.getpid(), groups)


@pytest.fixture
def reference() -> Iterator[ReferenceBus]:
    yield from start("session")


@pytest.fixture
def system() -> Iterator[ReferenceBus]:
    yield from start("system")


def start(kind: str) -> Iterator[ReferenceBus]:
    if shutil.which("dbus-daemon") is None:
        pytest.skip("dbus-daemon is not installed")
    bus = ReferenceBus(kind)
    yield bus
    bus.close()


@pytest.fixture
def model(reference: ReferenceBus) -> Model:
    """Ours, with the reference's configuration, pid and id."""
    facts = driver.Bus(reference.guid, machine_id(), os.geteuid(), reference.process.pid)
    return Model(configuration.load(reference.configuration), facts)


EVERYTHING = """<busconfig><listen>unix:tmpdir=/tmp</listen><policy context="default">
<allow user="*"/><allow send_destination="*" eavesdrop="true"/><allow eavesdrop="true"/>
<allow own="*"/></policy></busconfig>"""


def everything(tmp_path: Path, but: str = "") -> bytes:
    """A configuration that allows everything else."""
    file = tmp_path / "bus.conf"
    file.write_text(EVERYTHING.replace("</policy>", f"{but}</policy>"))
    return configuration.encode(configuration.load(str(file)))


@pytest.fixture
def context(tmp_path: Path) -> Context:
    """A bus that allows everything, without confinement."""
    data = everything(tmp_path)
    nothing = Compiled(name="none", title="none", files=(), required=frozenset())
    return Context.make("0" * 32, os.getpid(), data, nothing, log_fd=-1)
