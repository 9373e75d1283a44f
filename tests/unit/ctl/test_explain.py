"""`kbusctl explain`: from a line of the kernel log to what an admin can do."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from kbusd.ctl import explain
from kbusd.ctl.main import main
from kbusd.sandbox import profiles

from .test_profile import REMOVES


def line(
    syscall: int | str, comm: str = "kbusd-worker", arch: str = "c000003e", code: str = "0x80000000"
) -> str:
    return (
        "[ 7.1] audit: type=1326 audit(1732612345.123:45): auid=4294967295 uid=100 gid=65534"
        f' ses=4294967295 subj=unconfined pid=812 comm="{comm}" exe="/usr/bin/python3.11" sig=31'
        f" arch={arch} syscall={syscall} compat=0 ip=0x7f5d1c code={code}"
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (line(41), ["pid 812", "socket (41) is not in profile worker", 'calls = ["socket"]']),
        (line(9), ["mmap (9)", "allowed if argument 2 without PROT_EXEC: ", "other arguments"]),
        (line(9), ['arguments = [{ index = 2, without = ["PROT_EXEC"] }]']),
        (line(198, arch="c00000b7"), ["socket (198)"]),
        (line(41, "kbusd-launcher"), ["profile launcher has no filter", "from above"]),
        (line(0x40000000 | 1), ["of another architecture", "attack"]),
        (line(1, arch="40000003"), ["of another architecture (0x40000003)"]),
        (line(0), ["read (0)", "allows it now"]),
        (
            line(257, code="0x50000"),
            ["openat (257) was answered with an error", "EACCES, by ", "path"],
        ),
        (line(470), ["call 470, which is newer than this libseccomp: no profile can name it"]),
        (line("socket", arch="x86_64", code="kill-process"), ["socket (41) is not in profile"]),
        (line("socket", arch="aarch64", code="kill-process"), ["socket (198) is not in profile"]),
        (line("socketcall", arch="i386"), ["of another architecture (0x40000003)"]),
        (line("openat", arch="x86_64", code="errno"), ["openat (257) was answered with an error"]),
        (line(53, "kbusd-zygote"), ["socketpair (53) is not in profile zygote", "AF_UNIX"]),
    ],
)
def test_a_line_is_told_in_words(
    capsys: pytest.CaptureFixture[str], text: str, words: list[str]
) -> None:
    assert main(["explain", text]) == 0
    out = capsys.readouterr().out
    for each in words:
        assert each in out


def test_lines_come_by_standard_input_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "\n".join(("usb 1-1: new device", line(41, "cat"), line(56)))
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    assert main(["explain"]) == 0
    assert "clone (56)" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["hello", line(41, "cat"), "type=1326 comm=x syscall=y", ""])
def test_what_tells_of_no_process_of_ours_is_said_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    assert main(["explain"]) == 1
    assert "no line tells of a process of kbusd" in capsys.readouterr().out


def test_a_call_that_an_override_removed_is_told_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "worker.toml"
    file.write_text(REMOVES)
    file.chmod(0o644)
    monkeypatch.setattr(profiles, "OVERRIDES", tmp_path)
    assert main(["explain", line(275)]) == 0
    assert f"was removed by {file}:5: bodies are small" in capsys.readouterr().out


def test_where_a_file_of_the_admin_s_is_nothing_says_to_make_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(profiles, "OVERRIDES", tmp_path)
    file = tmp_path / "worker.toml"
    assert main(["explain", line(41)]) == 0
    said = capsys.readouterr().out
    assert f"in {file}, which may say only" in said and 'extends = "worker"' in said
    file.write_text(REMOVES)
    file.chmod(0o644)
    assert main(["explain", line(41)]) == 0
    said = capsys.readouterr().out
    assert f"in {file}, to be added to what is there" in said and "extends" not in said
    assert 'calls = ["socket"]' in said


def test_what_no_profile_can_name_is_not_proposed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", line(470)]) == 0
    assert "calls = " not in capsys.readouterr().out


def test_where_auditd_runs_its_log_is_read(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(explain, "_kernel_log", lambda: iter(()))
    monkeypatch.setattr(explain, "_AUDIT_LOG", str(tmp_path / "audit.log"))
    assert main(["explain", "--pid", "812"]) == 1
    assert "ausearch -m SECCOMP --raw -p 812 | kbusctl explain" in capsys.readouterr().out
    (tmp_path / "audit.log").write_text(line(41).replace("1326", "SECCOMP"))
    assert main(["explain", "--pid", "812"]) == 0
    assert "socket (41)" in capsys.readouterr().out
