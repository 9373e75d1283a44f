"""`kbusctl profile`, as an author of policy meets it."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from kbusd.ctl.main import main
from kbusd.ctl.profile import schema
from kbusd.sandbox import compile, constants, profiles
from kbusd.sandbox.compile import compile_all, compile_profile
from kbusd.sandbox.errors import ProfileError
from tests.unit.sandbox.child import run
from tests.unit.sandbox.test_filters import raw

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
        (["epoll_wait", "--arch", "arm64"], "arm64 has no system call epoll_wait"),
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
    assert len(commands) == 4  # an entry for each of one-of
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
        "fcntl allow [1,1030,SCMP_CMP_EQ]",
    } <= set(lines)
    unit = said(capsys, "export", "worker", "--format", "systemd").splitlines()
    assert "SystemCallFilter=mmap" in unit
    assert "# Not said here: only if argument 2 without PROT_EXEC" in unit
    assert not any("openat" in line for line in unit if line.startswith("SystemCallFilter"))
    assert said(capsys, "export", "supervisor", "--format", "systemd").endswith("no filter\n")


@pytest.mark.parametrize("format_", ["oci", "lxc", "systemd"])
def test_an_export_says_which_rules_of_other_machines_it_leaves_out(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, format_: str
) -> None:
    for here, other in (False, "selinux"), (True, "no-selinux"):
        monkeypatch.setattr(compile, "selinux_enabled", lambda here=here: here)
        assert main(["profile", "export", "broker", "--format", format_]) == 0
        output = capsys.readouterr()
        lines = (output.err if format_ == "oci" else output.out).splitlines()
        left = [line for line in lines if "Not said here: " in line]
        assert any(f", only when {other}: " in line for line in left), here
        assert not any("only when x86-64" in line or "only when arm64" in line for line in left)


def test_the_schema_beside_the_profiles_is_that_of_the_types() -> None:
    kept = json.loads((OURS / "profile.schema.json").read_text())
    now = json.loads(json.dumps(schema()))
    assert kept == now, "kbusctl profile schema > profiles/profile.schema.json"


def example() -> list[str]:
    """The profiles of the man page's EXAMPLE: a worker's, and the zygote's."""
    text = (OURS.parent / "docs/man/kbusd-profile.5").read_text().partition(".SH EXAMPLE")[2]
    return [part.partition("\n.EE")[0] for part in text.split(".EX\n")[1:]]


def test_a_call_that_the_filter_above_forbids_is_not_said_to_be_allowed(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The man page's own example was right, and allowed, and ended the process: nothing knew of the zygote's filter."""
    worker, zygote = example()
    (tmp_path / "worker.toml").write_text(worker)
    monkeypatch.setattr(profiles, "OVERRIDES", tmp_path)
    told = said(capsys, "check", "worker", status=1)
    assert (
        f"{tmp_path / 'worker.toml'}:7: seccomp.rules (sched_getaffinity): profile zygote" in told
    )
    assert (
        f"has no rule for sched_getaffinity; a call must pass both: say it in {tmp_path}/zygote"
        in told
    )
    told = said(capsys, "test", "worker", "sched_getaffinity", status=1)
    assert "sched_getaffinity: ends the process\n  Profile zygote" in told
    assert main(["explain", "type=1326 pid=1 comm=kbusd-worker arch=c000003e syscall=204"]) == 0
    assert "is in profile worker" in (told := capsys.readouterr().out)
    assert f"say it in {tmp_path / 'zygote.toml'}, too" in told
    (tmp_path / "zygote.toml").write_text(zygote)
    assert "worker: right" in said(capsys, "check", "worker")
    assert "sched_getaffinity: allow, by" in said(capsys, "test", "worker", "sched_getaffinity")
    loaded = [compile_profile(profiles.load(name)) for name in ("zygote", "worker")]
    assert run(lambda: raw("sched_getaffinity", 0, 0, 0), loaded[1], before=loaded[0]).said == "-22"


def test_a_rule_that_the_filter_above_narrows_is_told(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "own.toml"
    file.write_text(example()[0].replace("sched_getaffinity", "splice"))
    told = said(capsys, "check", str(file))
    assert "allow if argument 5 is SPLICE_F_NONBLOCK" in told
    assert "not with all arguments" in told
    assert "splice: ends the process" in said(capsys, "test", str(file), "splice", status=1)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Overrides, in force."""
    monkeypatch.setattr(profiles, "OVERRIDES", tmp_path)
    return tmp_path


def test_a_draft_beside_the_overrides_changes_nothing(
    capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    """It was loaded as well: workers and explain took it for the worker's, and kbusd did not start for its mistakes."""
    (folder / "worker-draft.toml").write_text(REMOVES)
    (folder / "draft.toml").write_text("why = 1")
    (folder / "Worker.toml").write_text(REMOVES)
    (folder / "worker.tml").write_text(REMOVES)
    assert set(compile_all()) == set(profiles.PROCESSES)
    for command in "check", "list":
        told = said(capsys, command)
        assert f"{folder / 'draft.toml'}: has no effect" in told
        assert f"{folder / 'worker-draft.toml'}: has no effect" in told
        for name in "Worker.toml", "worker.tml":
            assert f"{folder / name}: has no effect: no process" in told
        assert told.count("did you mean worker.toml?") >= 2


def test_what_an_override_extends_is_no_stray(
    capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    (folder / "common.toml").write_text(OWN)
    (folder / "base.toml").write_text('extends = "base"\nwhy = "ours, for all of us"\n')
    (folder / "worker.toml").write_text('extends = "common"\nwhy = "by way of another"\n')
    assert "has no effect" not in said(capsys, "list")


@pytest.mark.parametrize("which", ["file", "folder"])
def test_an_override_that_is_a_link_to_nothing_is_an_error(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    """It was ignored, and what the admin forbids was allowed."""
    link = tmp_path / "worker.toml" if which == "file" else tmp_path / "none"
    link.symlink_to(tmp_path / "gone")
    monkeypatch.setattr(profiles, "OVERRIDES", tmp_path if which == "file" else link)
    told = said(capsys, "check", "worker", status=1)
    assert f"{link}: is a symbolic link to {tmp_path / 'gone'}, which is not there; mend" in told


@pytest.mark.parametrize("title", ["kbusd", "kbusd-broker"])
def test_two_profiles_with_one_title_are_refused(
    capsys: pytest.CaptureFixture[str], folder: Path, title: str
) -> None:
    file = folder / "worker.toml"
    file.write_text(f'extends = "worker"\nwhy = "under another name"\ntitle = "{title}"\n')
    for arguments in ["check"], ["check", "worker"]:
        told = said(capsys, *arguments, status=1)
        assert f"{file}: title: `{title}` is the title of both" in told
    with pytest.raises(ProfileError, match="is the title of both"):
        compile_all()


def test_an_override_of_base_can_be_checked(
    capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    file = folder / "base.toml"
    file.write_text('extends = "base"\nwhy = "for all of ours"\n')
    assert "base: right" in said(capsys, "check", "base")
    file.write_text(
        'extends = "base"\nwhy = "for all of ours"\n[limits.nofil]\nvalue = 1\nwhy = "one too few"\n'
    )
    assert f"{file}:3: limits.nofil: " in said(capsys, "check", "base", status=1)


def test_the_schema_knows_the_names() -> None:
    """It said "a string": no editor told EACES from EACCES, as the documents say."""
    known = schema()["$defs"]
    assert "EACCES" in known["Rule"]["properties"]["errno"]["enum"]
    assert "EACES" not in known["Rule"]["properties"]["errno"]["enum"]
    assert known["Securebits"]["properties"]["set"]["items"]["enum"] == sorted(constants.SECUREBITS)
    assert "net_admin" in known["Capabilities"]["properties"]["keep"]["items"]["enum"]
    assert "mount" in known["Namespaces"]["properties"]["unshare"]["items"]["enum"]
    assert "nofile" in known["Profile"]["properties"]["limits"]["propertyNames"]["enum"]
    arguments = known["Argument"]["properties"]
    one = next(each for each in arguments["not-equals"]["anyOf"] if each["type"] == "string")
    several = [
        next(each["items"] for each in arguments[kind]["anyOf"] if each["type"] == "array")
        for kind in ("equals", "one-of", "without", "including")
    ]
    for value in (one, *several):
        names, number = value["anyOf"]
        assert "F_GETFL" in names["enum"]
        assert "F_GETFLAGS" not in names["enum"]
        for text, right in (("0x5401", True), ("7", True), ("F_GETFLAGS", False), ("", False)):
            assert bool(re.search(number["pattern"], text)) == right


def strings(profile: dict[str, object]) -> Iterator[tuple[str, str]]:
    """What rules of a profile file name: kind, and name."""
    seccomp = profile.get("seccomp")
    for rule in seccomp.get("rules", ()) if isinstance(seccomp, dict) else ():
        yield "errno", rule.get("errno", "")
        for argument in rule.get("arguments", ()):
            for key, value in argument.items():
                if key not in ("index", "users", "users-inside"):
                    yield from (
                        ("argument", each) for each in ([value] if key == "not-equals" else value)
                    )


@pytest.mark.parametrize("file", sorted(OURS.glob("*.toml")), ids=lambda file: str(file.stem))
def test_the_schema_has_all_that_our_profiles_name(file: Path) -> None:
    known = schema()["$defs"]
    names, _ = known["Argument"]["properties"]["equals"]["anyOf"][0]["items"]["anyOf"]
    of = {"errno": known["Rule"]["properties"]["errno"]["enum"], "argument": names["enum"]}
    for kind, name in strings(tomllib.loads(file.read_text())):
        assert name in of[kind]
