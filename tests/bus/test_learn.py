"""`kbusctl profile learn` finds what a profile lacks, from a bus at work."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from kbusd.ctl.main import main
from kbusd.sandbox import profiles

pytestmark = [
    pytest.mark.kbusd_only,
    pytest.mark.skipif(os.geteuid() != 0, reason="it fetches a descriptor from a process: root"),
]


def learn(capfd: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    status = main(["profile", "learn", *arguments])
    return status, capfd.readouterr().out


def test_our_profiles_lack_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    for kind in ("worker", "broker"):
        status, said = learn(capfd, kind)
        assert status == 0, said
        assert "The profile has all that was needed" in said
        assert " recvmsg              allow    " in said


def test_what_a_profile_lacks_is_proposed(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = profiles.find("base").read_text()
    (tmp_path / "base.toml").write_text(
        ours.replace('"sendmsg", ', "").replace('["PROT_EXEC"]', '["PROT_WRITE"]', 1)
    )
    worker = profiles.find("worker").read_text()
    (tmp_path / "worker.toml").write_text(worker)
    monkeypatch.setattr(profiles, "OVERRIDES", tmp_path)
    status, said = learn(capfd, "worker")
    assert status == 1
    assert 'calls = ["sendmsg"]' in said
    assert f"for {tmp_path / 'worker.toml'}, which may say only" in said
    assert 'calls = ["mmap"]\n  # other rules name it with other arguments' in said
    assert "argument 2: " in said


def test_the_admin_s_own_traffic_is_watched(capfd: pytest.CaptureFixture[str]) -> None:
    command = (
        "import os, jeepney.io.blocking as j;"
        "j.open_dbus_connection(os.environ['DBUS_SESSION_BUS_ADDRESS']).close()"
    )
    status, said = learn(capfd, "worker", "--", sys.executable, "-c", command)
    assert status == 0, said
    assert "recvmsg" in said
