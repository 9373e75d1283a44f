"""`kbusctl profile`, as an author of policy meets it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kbusd.ctl.main import main
from kbusd.ctl.profile import schema
from kbusd.sandbox import compile, profiles

OURS = Path(__file__).parents[3] / "profiles"
OWN = """extends = "base"
title = "kbusd-worker"
why = "a copy with one call more"
[limits.nproc]
why = "forks nothing"
value = 0
[seccomp]
why = "as ours, and one call more"
[[seccomp.rules]]
why = "the new library asks for it"
calls = ["uname", "@time"]
[seccomp.sets.time]
why = "what tells the time"
calls = ["times", "sysinfo"]
"""


def said(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> str:
    assert main(["profile", *arguments]) == status
    return capsys.readouterr().out


@pytest.fixture
def own(tmp_path: Path) -> str:
    file = tmp_path / "worker.toml"
    file.write_text(OWN)
    return str(file)


def test_list_tells_which_file_is_in_force(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, own: str
) -> None:
    assert f"worker          {OURS / 'worker.toml'}" in said(capsys, "list")
    monkeypatch.setattr(profiles, "OVERRIDES", Path(own).parent)
    assert f"worker          {own}" in said(capsys, "list")
    Path(own).write_text("why = 1")
    assert "why: expected `str`" in said(capsys, "list", status=1)


REMOVES = """extends = "worker"
why = "nobody passes large bodies here"
[seccomp]
why = "as ours, without the pipes for large bodies"
[[seccomp.remove]]
why = "bodies are small; nothing splices"
calls = ["splice", "pipe2"]
"""


def test_what_an_override_removes_is_told(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    which = str(tmp_path / "mine.toml")
    Path(which).write_text(REMOVES)
    shown = said(capsys, "show", which)
    assert f"removed splice pipe2   {which}:5\n      bodies are small" in shown
    changed = said(capsys, "diff", "worker", which, status=1).splitlines()
    assert [line for line in changed if line.startswith("+")] == [f"+++ {which}"]
    assert any(line.startswith("-splice: allow if") for line in changed)
    assert f"removed by {which}:5\n      bodies" in said(capsys, "test", which, "splice", status=1)


def test_show_tells_where_each_rule_comes_from(
    capsys: pytest.CaptureFixture[str], own: str
) -> None:
    shown = said(capsys, "show", own)
    assert f"allow uname times sysinfo   {own}:9" in shown
    base = OURS / "base.toml"
    line = 1 + base.read_text().splitlines().index('calls = ["close"]')
    assert f"allow close   {base}:{line - 2}" in shown
    assert "allow mmap if argument 2 without PROT_EXEC" in shown
    assert f"[limits.nproc]   {own}:4" in shown
    assert json.loads(said(capsys, "show", own, "--json"))["limits"]["nproc"]["value"] == 0


def test_check_finds_what_is_wrong_on_any_architecture(
    capsys: pytest.CaptureFixture[str], own: str
) -> None:
    assert said(capsys, "check").count("right, for x86-64 and arm64") == len(profiles.names())
    Path(own).write_text(OWN.replace('"uname"', '"unam"'))
    assert f"{own}:9: seccomp.rules (unam, times, sysinfo): `unam` is no" in said(
        capsys, "check", own, status=1
    )
    assert "No such file" in said(capsys, "check", "./none.toml", status=1)


def test_diff_shows_what_one_allows_more(capsys: pytest.CaptureFixture[str], own: str) -> None:
    lines = said(capsys, "diff", "worker", own, status=1).splitlines()[2:]
    assert "+uname: allow" in lines
    assert [line for line in lines if "sysinfo" in line or "mmap" in line] == ["+sysinfo: allow"]
    assert said(capsys, "diff", "worker", "worker") == "they say the same\n"


@pytest.mark.parametrize(
    ("call", "status", "words"),
    [
        (["read"], 0, "read: allow, by "),
        (["0", "--arch", "x86-64"], 0, "read: allow"),
        (["socket"], 1, "socket: ends the process"),
        (["openat"], 1, "openat: EACCES, by "),
        (["mmap", "0", "4096", "PROT_EXEC"], 1, "allow only if argument 2 without PROT_EXEC"),
        (["newfstatat", "1", "0", "0", "AT_EMPTY_PATH"], 0, "if argument 3 is AT_EMPTY_PATH"),
        (["newfstatat", "1", "0", "0", "AT_EMPTY_PATH|0x100"], 1, "ends the process"),
    ],
)
def test_test_tells_what_becomes_of_a_call(
    capsys: pytest.CaptureFixture[str], call: list[str], status: int, words: str
) -> None:
    assert words in said(capsys, "test", "worker", *call, status=status)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (["reed"], "reed is no system call"),
        (["read", "PROT_EXECUTE"], "did you mean PROT_EXEC?"),
        (["read", *"1234567"], "at most six"),
        (["9999"], "has no system call 9999"),
    ],
)
def test_a_call_that_there_is_not_is_told(
    capsys: pytest.CaptureFixture[str], call: list[str], words: str
) -> None:
    assert main(["profile", "test", "worker", *call]) == 2
    assert words in capsys.readouterr().err


def test_export_to_oci_says_arguments_and_errnos(capsys: pytest.CaptureFixture[str]) -> None:
    made = json.loads(said(capsys, "export", "worker", "--format", "oci", "--arch", "arm64"))
    assert made["defaultAction"] == "SCMP_ACT_KILL_PROCESS"
    assert made["architectures"] == ["SCMP_ARCH_AARCH64"]
    of = {name: each for each in made["syscalls"] for name in each["names"]}
    assert of["read"]["action"] == "SCMP_ACT_ALLOW"
    assert of["openat"] | {"comment": "", "names": []} == {
        "names": [],
        "action": "SCMP_ACT_ERRNO",
        "errnoRet": 13,
        "comment": "",
    }
    assert of["mmap"]["args"] == [
        {"index": 2, "value": 4, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ"}
    ]
    commands = [each["args"] for each in made["syscalls"] if "fcntl" in each["names"]]
    assert len(commands) == 5  # an entry for each of one-of
    assert all([each["index"] for each in args] == [1] for args in commands)


def test_export_to_lxc_and_systemd(capsys: pytest.CaptureFixture[str]) -> None:
    lines = said(capsys, "export", "worker", "--format", "lxc", "--arch", "x86-64").splitlines()
    assert lines[:2] == ["2", "allowlist kill"]
    head = lines[2 : lines.index("[x86_64]")]
    assert all(line.startswith("# ") for line in head)
    assert "i386 and x32" in head[0], "lxc opens these, too"
    assert {
        "read allow",
        "openat errno 13",
        "mmap allow [2,0,SCMP_CMP_MASKED_EQ,4]",
        "fcntl allow [1,3,SCMP_CMP_EQ]",
    } <= set(lines)
    unit = said(capsys, "export", "worker", "--format", "systemd").splitlines()
    assert "SystemCallFilter=mmap" in unit
    assert "# Not said here: only if argument 2 without PROT_EXEC" in unit
    assert not any("openat" in line for line in unit if line.startswith("SystemCallFilter"))
    assert said(capsys, "export", "supervisor", "--format", "systemd").endswith("no filter\n")


@pytest.mark.parametrize("format_", ["lxc", "systemd"])
def test_an_export_says_which_rules_of_other_machines_it_leaves_out(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, format_: str
) -> None:
    for here, other in (False, "selinux"), (True, "no-selinux"):
        monkeypatch.setattr(compile, "selinux_enabled", lambda here=here: here)
        lines = said(capsys, "export", "broker", "--format", format_).splitlines()
        left = [line for line in lines if line.startswith("# Not said here: ")]
        assert any(f", only when {other}: " in line for line in left), here
        assert not any("only when x86-64" in line or "only when arm64" in line for line in left)


def test_the_schema_beside_the_profiles_is_that_of_the_types() -> None:
    kept = json.loads((OURS / "profile.schema.json").read_text())
    now = json.loads(json.dumps(schema()))
    assert kept == now, "kbusctl profile schema > profiles/profile.schema.json"
