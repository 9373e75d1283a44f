"""The benchmark itself, shortest form, on the bus that Debian always has."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import report

RUN = Path(__file__).parent / "run.py"


@pytest.mark.slow
@pytest.mark.skipif(
    not (shutil.which("dbus-daemon") and shutil.which("gcc")), reason="no dbus-daemon or no gcc"
)
def test_a_quick_run_measures_every_topology_and_leaves_nothing_behind(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, RUN, "--quick", "--rounds=1", "--seconds=0.05", "--buses=dbus-daemon"]
        + [f"--out={tmp_path}"],
        check=False,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    recording = msgspec.json.decode((tmp_path / "bench.json").read_bytes(), type=report.Recording)
    assert {row.test for row in report.FIGURES} <= {sample.test for sample in recording.samples}
    assert all(sample.metrics for sample in recording.samples)
    assert (tmp_path / "bench.svg").read_text().startswith("<svg")
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            assert "kbusd-bench-" not in file.read_text()
        except OSError:
            continue  # it ended while we looked


def test_a_bus_that_cannot_start_fails_the_run(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, RUN, "--quick", "--buses=kbusd", "--kbusd=/nonexistent/kbusd"]
        + [f"--out={tmp_path}"],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 1
    assert "kbusd IS MISSING" in result.stdout
