"""Profiles as their authors meet them: what is read, and how mistakes are told."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from kbusd.sandbox import constants, profiles
from kbusd.sandbox.compile import compile_profile, conditions
from kbusd.sandbox.errors import ProfileError
from kbusd.sandbox.judge import judge
from kbusd.sandbox.selinux import enabled as selinux_enabled
from tests.unit.sandbox.child import run

WHY = 'why = "for the test"\n'


def test_there_is_a_profile_for_each_kind_of_process() -> None:
    assert set(profiles.names()) == {
        "broker",
        "config-reader",
        "kdbus-worker",
        "launcher",
        "supervisor",
        "worker",
        "zygote",
    }
    titles = {profiles.load(name).title for name in profiles.names()}
    assert len(titles) == 7


@pytest.mark.parametrize("name", profiles.names())
def test_each_profile_compiles_with_and_without_selinux(name: str) -> None:
    profile = profiles.load(name)
    assert profile.seccomp is not None
    for selinux in (False, True):
        compiled = compile_profile(profile, selinux=selinux)
        assert bool(compiled.bpf) == profile.seccomp.enabled
        assert len(compiled.bpf) % 8 == 0
        assert bool(compiled.selinux) == (
            selinux and bool(profile.selinux and profile.selinux.enabled)
        )


@pytest.mark.parametrize(
    ("label", "enabled"),
    [("kernel", False), ("system_u:system_r:init_t:s0", True), (None, True)],
)
def test_selinux_counts_as_soon_as_it_has_a_policy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, label: str | None, enabled: bool
) -> None:
    """Before that every process is plain `kernel`; where it does not say, it counts."""
    (tmp_path / "enforce").touch()
    current = tmp_path / "current"
    if label:
        current.write_text(f"{label}\0")
    monkeypatch.setattr("kbusd.sandbox.selinux.LABEL", str(current))
    monkeypatch.setattr("kbusd.sandbox.selinux.ROOT", str(tmp_path))
    assert selinux_enabled() == enabled
    monkeypatch.setattr("kbusd.sandbox.selinux.ROOT", str(tmp_path / "none"))
    assert not selinux_enabled()


@pytest.mark.parametrize("name", ["worker", "broker", "zygote", "config-reader"])
def test_what_parses_other_people_s_bytes_may_not_go_without_its_walls(name: str) -> None:
    required = compile_profile(profiles.load(name)).required
    assert {"seccomp", "no-new-privileges", "capabilities", "user", "groups"} <= required


def test_base_is_never_loaded_by_itself() -> None:
    with pytest.raises(ProfileError, match="never loaded by itself"):
        profiles.load("base")


@pytest.mark.parametrize("place", ["lib/python3.11/site-packages", "lib/python3/dist-packages"])
def test_an_installed_bus_finds_its_profiles_without_site(tmp_path: Path, place: str) -> None:
    package = tmp_path / place / "kbusd"
    ours = Path(profiles.__file__).parents[1]
    (package / "sandbox").mkdir(parents=True)
    for name in (
        "__init__.py",
        "sandbox/__init__.py",
        "sandbox/profiles.py",
        "sandbox/errors.py",
        "sandbox/locate.py",
    ):
        shutil.copy(ours / name, package / name)
    installed = tmp_path / "share" / "kbusd" / "profiles"
    shutil.copytree(ours.parent / "profiles", installed)
    path = [str(tmp_path / place), str(Path(msgspec.__file__).parents[1])]
    script = (
        f"import sys; sys.path += {path}; from kbusd.sandbox import profiles;"
        " print(profiles.__file__, len(profiles.names())); print(*profiles.directories())"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-s", "-P", "-c", script], capture_output=True, text=True, cwd="/"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [
        str(package / "sandbox" / "profiles.py"),
        "7",
        *map(str, [profiles.OVERRIDES, installed, "/usr/share/kbusd/profiles"]),
    ]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory in which profiles are looked for first."""
    monkeypatch.setattr(profiles, "OVERRIDES", tmp_path)
    return tmp_path


def write(folder: Path, name: str, text: str) -> Path:
    file = folder / f"{name}.toml"
    file.write_text(text)
    file.chmod(0o644)
    return file


def test_a_child_replaces_what_its_parent_says_of_a_call_and_of_a_section(folder: Path) -> None:
    write(
        folder,
        "worker",
        'extends = "base"\ntitle = "w"\n'
        + WHY
        + "[limits.nofile]\nvalue = 7\n"
        + WHY
        + "[seccomp]\n"
        + WHY
        + '[[seccomp.rules]]\ncalls = ["read"]\nerrno = "EPERM"\n'
        + WHY,
    )
    profile = profiles.load("worker")
    assert profile.seccomp is not None
    read = [rule for rule in profile.seccomp.rules if "read" in rule.calls]
    assert [rule.errno for rule in read] == ["EPERM"]
    assert profile.limits["nofile"].value == 7
    assert profile.limits["core"].value == 0
    assert any("write" in rule.calls for rule in profile.seccomp.rules)


def test_an_override_can_extend_what_it_overrides(folder: Path) -> None:
    write(folder, "worker", 'extends = "worker"\n' + WHY + "[limits.nofile]\nvalue = 7\n" + WHY)
    profile = profiles.load("worker")
    assert profile.title == "kbusd-worker"
    assert profile.limits["nofile"].value == 7
    assert profile.limits["nproc"].value == 0
    assert [Path(file).name for file in profile.files] == [
        "worker.toml",
        "worker.toml",
        "base.toml",
    ]


def test_an_override_of_base_counts_for_all_that_extend_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was passed over for the base beside our own profiles, without a word."""
    own, ours = tmp_path / "own", tmp_path / "ours"
    for folder in own, ours:
        folder.mkdir()
    base = WHY + "[limits.core]\n" + WHY
    write(ours, "base", base + "value = 0\n")
    write(ours, "worker", 'extends = "base"\n' + WHY)
    write(own, "base", 'extends = "base"\n' + base + "value = 7\n")
    monkeypatch.setattr(profiles, "directories", lambda: [own, ours])
    monkeypatch.setattr(profiles, "OVERRIDES", own)
    loaded = profiles._load(profiles.find("worker"), ())
    assert loaded.limits["core"].value == 7
    assert [Path(each).parent.name for each in loaded.files] == ["ours", "own", "ours"]


RULE = 'extends = "base"\ntitle = "w"\n' + WHY + "[seccomp]\n" + WHY + "[[seccomp.rules]]\n"

MISTAKES = [
    ("no toml", "why = ", "", ":1: is not TOML at the end: invalid value", "missing"),
    ("unknown key", WHY + "secomp = 1\n", "the file", "unknown field", "did you mean `seccomp`?"),
    (
        "unknown key in a rule",
        RULE + WHY + 'call = ["read"]\n',
        "seccomp.rules[0]",
        "unknown field `call`",
        "did you mean `calls`?",
    ),
    ("no why", "[user]\n", "user", "missing required field `why`", "says why"),
    (
        "no why in a rule",
        RULE + 'calls = ["read"]\n',
        "seccomp.rules[0]",
        "missing required field `why`",
        "every section and rule says why",
    ),
    ("an idle why", 'why = "x"\n', "why", "length >= 8", "at least eight"),
    (
        "a wrong type",
        WHY + "[user]\n" + WHY + 'names = "nobody"\n',
        "user.names",
        "expected `array`",
        "a list in brackets",
    ),
    (
        "unknown call",
        RULE + WHY + 'calls = ["reed"]\n',
        "seccomp.rules (reed)",
        "`reed` is no system call",
        "did you mean `read`?",
    ),
    (
        "unknown errno",
        RULE + WHY + 'calls = ["read"]\nerrno = "EACCESS"\n',
        "seccomp.rules (read)",
        "`EACCESS` is not known",
        "did you mean `EACCES`?",
    ),
    (
        "unknown constant",
        RULE + WHY + 'calls = ["read"]\narguments = [{ index = 0, one-of = ["F_GETFLAGS"] }]\n',
        "seccomp.rules (read).arguments",
        "`F_GETFLAGS` is not known",
        "F_GETFL",
    ),
    (
        "two conditions in one",
        RULE + WHY + 'calls = ["read"]\narguments = [{ index = 0, one-of = [], without = [] }]\n',
        "seccomp.rules (read).arguments",
        "needs exactly one of",
        "",
    ),
    (
        "two conditions on one argument",
        RULE + WHY + 'calls = ["read"]\narguments = [{ index = 0, without = ["1"] },'
        ' { index = 0, not-equals = "2" }]\n',
        "seccomp.rules (read).arguments",
        "argument 0 has two conditions",
        "two rules",
    ),
    (
        "a number without quotes",
        RULE + WHY + 'calls = ["read"]\narguments = [{ index = 0, one-of = [1] }]\n',
        "seccomp.rules[0].arguments[0].one-of[0]",
        "expected `str`, got `int`",
        "in quotes",
    ),
    (
        "an unknown section",
        WHY + "[limit.nofile]\nvalue = 1\n" + WHY,
        "the file",
        ":2: the file: object contains unknown field `limit`",
        "did you mean `limits`?",
    ),
    (
        "a rule with one bracket",
        "\n\n\n" + WHY + "[seccomp]\n" + WHY + "[seccomp.rules]\n" + WHY,
        "seccomp.rules",
        ":7: seccomp.rules: expected `array`",
        "two brackets: [[seccomp.rules]]",
    ),
    (
        "a rule that would win silently",
        RULE
        + WHY
        + 'calls = ["read"]\n[[seccomp.rules]]\n'
        + WHY
        + 'calls = ["read"]\narguments = [{ index = 0, equals = ["AF_UNIX"] }]\n',
        "seccomp.rules (read)",
        "has a rule without arguments and another one",
        "silently win",
    ),
    (
        "unknown capability",
        'extends = "base"\ntitle = "w"\n'
        + WHY
        + "[capabilities]\n"
        + WHY
        + 'keep = ["net_admn"]\n',
        "capabilities.keep",
        "`net_admn` is not known",
        "did you mean `net_admin`?",
    ),
    (
        "unknown limit",
        'extends = "base"\ntitle = "w"\n' + WHY + "[limits.nofiles]\nvalue = 1\n" + WHY,
        "limits.nofiles",
        "`nofiles` is not known",
        "did you mean `nofile`?",
    ),
    (
        "a wrong value of a limit",
        WHY + "[limits.core]\nvalue = 0\n" + WHY + "[limits.nofile]\n" + WHY + 'value = "many"\n',
        "limits.nofile.value",
        ":7: limits.nofile.value: invalid enum value",
        "see kbusd-profile(5)",
    ),
    (
        "a limit below nothing",
        WHY + "[limits.nofile]\n" + WHY + "value = -5\n",
        "limits.nofile.value",
        ":4: limits.nofile.value: expected `int` >= 0",
        "see kbusd-profile(5)",
    ),
    (
        "a domain that is no type",
        WHY + "[selinux]\n" + WHY + 'type = "a:b"\n',
        "selinux.type",
        ":4: selinux.type: expected `str` matching",
        "see kbusd-profile(5)",
    ),
    (
        "a parent elsewhere",
        WHY + 'extends = "../x"\n',
        "extends",
        ":2: extends: `../x` is not a profile name",
        "no path",
    ),
    ("a missing section", 'title = "w"\n' + WHY, "user", "section is missing", "write [user]"),
    (
        "no parent",
        WHY + 'extends = "bass"\n',
        "extends",
        ":2: extends: there is no profile `bass`",
        "did you mean base?",
    ),
    ("too deep", WHY + "title = " + "[" * 3000, "", "too deep in each other", "more than three"),
    ("a why of blanks", 'why = "        "\n', "why", ":1: why: expected `str` matching", "eight"),
    ("a title in bytes", WHY + 'title = "äöüäöüäö"\n', "title", ":2: title: has 16 bytes", "15"),
    ("a title with NUL", WHY + 'title = "a\\u0000b"\n', "title", ":2: title: has 3", "keeps"),
    (
        "a relative path",
        WHY + "[landlock]\n" + WHY + "[[landlock.paths]]\n" + WHY + 'path = "proc"\n',
        "landlock.paths",
        ":4: landlock.paths: 'proc' is no absolute path",
        "begins with /",
    ),
    (
        "a path with NUL",
        WHY + "[landlock]\n" + WHY + "[[landlock.paths]]\n" + WHY + 'path = "/a\\u0000"\n',
        "landlock.paths",
        "is no absolute path",
        "begins with /",
    ),
    *(
        (
            f"an empty {kind}",
            RULE + WHY + f'calls = ["read"]\narguments = [{{ index = 0, {kind} = [] }}]\n',
            "seccomp.rules (read).arguments",
            f"{kind} of argument 0 is empty",
            "leave the condition out",
        )
        for kind in ("one-of", "without", "including")
    ),
    (
        "no condition",
        RULE + WHY + 'calls = ["read"]\narguments = [{ index = 0 }]\n',
        "seccomp.rules (read).arguments",
        "needs exactly one of",
        "need not be named",
    ),
    (
        "an unknown call in a set that nobody uses",
        RULE + WHY + 'calls = ["read"]\n[seccomp.sets.time]\n' + WHY + 'calls = ["tmies"]\n',
        "seccomp.sets.time",
        ":9: seccomp.sets.time: `tmies` is no system call",
        "did you mean `times`?",
    ),
    (
        "no such group",
        'extends = "base"\ntitle = "w"\n' + WHY + "[groups]\n" + WHY + 'keep = ["no-such"]\n',
        "groups.keep",
        ":4: groups.keep: there is no group no-such",
        "leave it out",
    ),
    ("an origin", WHY + "[user]\n" + WHY + 'origin = "x"\n', "origin", ":4: origin", "leave it"),
    ("a value without quotes", WHY + "title = w\n", "", ":2: is not TOML at column 9", "quotes"),
    ("a bracket too few", "[[seccomp.rules]\n", "", ":1: is not TOML", "[[seccomp.rules]]"),
    ("a section twice", "[user]\n[user]\n", "", ":2: is not TOML at column 6", "already"),
    ("a text without end", WHY + 'title = "w\n', "", ":2: is not TOML", "three quotes"),
    (
        "a list without end",
        WHY + "title = [\n\n",
        "",
        ":3: is not TOML at the end",
        "end of a list",
    ),
]


@pytest.mark.parametrize(
    ("text", "key", "problem", "hint"),
    [m[1:] for m in MISTAKES],
    ids=[m[0] for m in MISTAKES],
)
def test_a_mistake_names_file_key_and_hint(
    folder: Path, text: str, key: str, problem: str, hint: str
) -> None:
    file = write(folder, "worker", text)
    with pytest.raises(ProfileError) as caught:
        compile_profile(profiles.load("worker"))
    said = str(caught.value)
    assert caught.value.key == key
    assert problem in said
    assert hint in said
    assert caught.value.file == str(file)
    if key.startswith("seccomp"):
        assert caught.value.line >= RULE.count("\n")
        assert f"{file}:{caught.value.line}: {key}" in said


REMOVE = (
    'extends = "worker"\n' + WHY + "[seccomp]\n" + WHY + "[[seccomp.remove]]\n" + WHY + "calls = "
)


def test_an_override_can_take_away_what_ours_allows(folder: Path) -> None:
    file = write(folder, "worker", REMOVE + '["splice", "read"]\n')
    profile = profiles.load("worker")
    for call, action in (("splice", "kill"), ("read", "kill"), ("sendto", "allow")):
        assert judge(profile, call, [0, 0, 0, 0, 0, 2], conditions(False)).action == action
    assert [each.origin for each in profiles.removals(profile, "read")] == [f"{file}:5"]
    assert not profiles.removals(profile, "sendto")


def test_what_is_removed_can_be_given_again_further_down(tmp_path: Path) -> None:
    write(tmp_path, "less", REMOVE + '["splice", "read"]\n')
    again = REMOVE.replace("worker", "less").replace("remove", "rules") + '["read"]\n'
    profile = profiles.load_file(write(tmp_path, "again", again))
    assert judge(profile, "read", [], conditions(False)).action == "allow"
    assert not profiles.removals(profile, "read")
    assert profiles.removals(profile, "splice")


@pytest.mark.parametrize(
    ("calls", "more", "words"),
    [
        ('["splce"]', "", ["has no rule in the profile that this", "did you mean `splice`?"]),
        ('["reboot"]', "", ["`reboot` has no rule", "nothing to remove"]),
        ('["@all"]', "", ["there is no set `@all`"]),
        (
            '["splice"]',
            "[[seccomp.rules]]\n" + WHY + 'calls = ["splice"]\n',
            ["has a rule in this file as well", "leave it out"],
        ),
    ],
)
def test_what_can_not_be_removed_is_told(
    folder: Path, calls: str, more: str, words: list[str]
) -> None:
    file = write(folder, "worker", REMOVE + calls + "\n" + more)
    with pytest.raises(ProfileError) as caught:
        profiles.load("worker")
    for each in (f"{file}:5: ", *words):
        assert each in str(caught.value)


def test_where_nothing_is_extended_nothing_can_be_removed(folder: Path) -> None:
    whole = REMOVE.replace('extends = "worker"\n', "") + '["read"]\n'
    write(folder, "worker", whole)
    with pytest.raises(ProfileError, match=r"toml:4: seccomp.remove: `read` has no rule"):
        profiles.load("worker")


def two(first: str, second: str, errno: str = "EPERM") -> str:
    """A profile with an errno for some arguments of a call, and allow for others."""
    rule = "[[seccomp.rules]]\n" + WHY + 'calls = ["getppid"]\narguments = '
    errnos = f'errno = "{errno}"\n' if errno else ""
    return RULE[: -len("[[seccomp.rules]]\n")] + f"{rule}[{first}]\n{errnos}{rule}[{second}]\n"


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ('{ index = 0, equals = ["4"] }', '{ index = 1, equals = ["1"] }'),
        ('{ index = 0, equals = ["4"] }', '{ index = 0, equals = ["4"] }'),
        ('{ index = 0, equals = ["4"] }', '{ index = 0, one-of = ["3", "4"] }'),
        ('{ index = 0, equals = ["4"] }', '{ index = 0, not-equals = "5" }'),
        ('{ index = 0, equals = ["4"] }', '{ index = 0, without = ["3"] }'),
        ('{ index = 0, not-equals = "4" }', '{ index = 0, not-equals = "5" }'),
        ('{ index = 0, not-equals = "4" }', '{ index = 0, including = ["4"] }'),
        ('{ index = 0, without = ["4"] }', '{ index = 0, including = ["3"] }'),
        (
            '{ index = 0, equals = ["4"] }, { index = 1, equals = ["1"] }',
            '{ index = 0, equals = ["4"] }, { index = 2, equals = ["1"] }',
        ),
    ],
)
def test_two_rules_that_say_different_things_of_the_same_arguments_are_refused(
    folder: Path, first: str, second: str
) -> None:
    """check passed them: test said the one, and the filter did the other."""
    for text in two(first, second), two(second, first):
        file = write(folder, "worker", text)
        with pytest.raises(ProfileError) as caught:
            compile_profile(profiles.load("worker"))
        assert f"{file}:11: seccomp.rules (getppid): some arguments fulfil" in str(caught.value)
        assert f"that of {file}:6, but they say EPERM and allow; give" in str(caught.value)
    write(folder, "worker", two(first, second, errno=""))
    compile_profile(profiles.load("worker"))  # both allow: nobody asks which


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ('{ index = 0, equals = ["4"] }', '{ index = 0, equals = ["5"] }'),
        ('{ index = 0, equals = ["4"] }', '{ index = 0, one-of = ["3", "5"] }'),
        ('{ index = 0, equals = ["4"] }', '{ index = 0, not-equals = "4" }'),
        ('{ index = 0, equals = ["4"] }', '{ index = 0, without = ["4"] }'),
        ('{ index = 0, without = ["4"] }', '{ index = 0, including = ["4", "8"] }'),
        ("{ index = 0, users = 131072 }", "{ index = 0, users = 65536 }"),
        (
            '{ index = 0, equals = ["4"] }, { index = 1, equals = ["1"] }',
            '{ index = 0, equals = ["4"] }, { index = 1, equals = ["2"] }',
        ),
    ],
)
def test_two_rules_that_exclude_each_other_may_say_different_things(
    folder: Path, first: str, second: str
) -> None:
    for text in two(first, second), two(second, first):
        write(folder, "worker", text)
        compile_profile(profiles.load("worker"))


def test_an_argument_can_be_a_number_that_has_no_name_here(folder: Path) -> None:
    argument = 'arguments = [{ index = 1, one-of = ["0x5413", "7"] }]\n'
    write(folder, "worker", RULE + WHY + 'calls = ["ioctl"]\n' + argument)
    profile = profiles.load("worker")
    compile_profile(profile)
    for value, action in ((0x5413, "allow"), (7, "allow"), (8, "kill")):
        assert judge(profile, "ioctl", [0, value], conditions(False)).action == action


def test_an_override_that_no_process_has_is_told(folder: Path) -> None:
    write(folder, "workr", WHY)
    assert not profiles.nobody("worker")
    assert profiles.nobody("workr").endswith("did you mean worker?")


@pytest.mark.parametrize(("arch", "allowed"), [("arm64", True), ("x86-64", False)])
def test_a_rule_can_be_for_one_architecture(folder: Path, arch: str, allowed: bool) -> None:
    write(folder, "worker", RULE + WHY + 'calls = ["uname"]\nwhen = "arm64"\n')
    profile = profiles.load("worker")
    said = judge(profile, "uname", [], conditions(False, arch))
    assert said.action == ("allow" if allowed else "kill")


def test_a_set_that_there_is_not_is_told(folder: Path) -> None:
    write(
        folder,
        "worker",
        RULE + WHY + 'calls = ["@tmie"]\n[seccomp.sets.time]\n' + WHY + 'calls = ["times"]\n',
    )
    with pytest.raises(ProfileError, match=r"toml:6: calls: there is no set `@tmie`; .*`@time`"):
        profiles.load("worker")


def test_a_file_that_extends_itself_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path, "worker", WHY + 'extends = "worker"\n')
    with pytest.raises(ProfileError, match="toml:2: extends: the profile extends itself"):
        profiles.load_file(file)


def test_what_is_not_utf_8_is_told_with_its_line(folder: Path) -> None:
    (folder / "worker.toml").write_bytes(WHY.encode() + b'title = "\xff"\n')
    with pytest.raises(ProfileError, match=r"toml:2: is not UTF-8; save"):
        profiles.load("worker")


def test_nobody_tells_us_where_a_rule_stands(folder: Path) -> None:
    write(folder, "worker", RULE + WHY + 'calls = ["read"]\norigin = "elsewhere:1"\n')
    with pytest.raises(ProfileError, match=r"toml:9: origin: is not yours to set"):
        profiles.load("worker")


def test_a_profile_that_does_not_exist_is_said_to(folder: Path) -> None:
    with pytest.raises(ProfileError, match=r"no profile `workers` in .*did you mean worker\?"):
        profiles.load("workers")
    with pytest.raises(ProfileError, match="not a profile name"):
        profiles.load("../worker")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a file away")
@pytest.mark.parametrize(("owner", "mode"), [(1000, 0o644), (0, 0o664), (0, 0o646)])
def test_an_override_that_others_can_write_is_not_believed(
    folder: Path, owner: int, mode: int
) -> None:
    file = write(folder, "worker", WHY)
    os.chown(file, owner, 0)
    file.chmod(mode)
    with pytest.raises(ProfileError, match="must be owned by root"):
        profiles.load("worker")


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (os.mkfifo, "is no regular file"),
        (Path.mkdir, "is no regular file"),
        (lambda file: file.symlink_to("/dev/zero"), "is no regular file"),
        (lambda file: file.write_bytes(b"#" * (1 << 20) + b"\n"), "is larger than 1048576"),
        (lambda file: file.symlink_to(file), "can't be read: Too many levels"),
    ],
    ids=["fifo", "directory", "device", "large", "loop"],
)
def test_what_is_no_file_of_a_sane_size_is_not_read(
    folder: Path, make: Callable[[Path], object], problem: str
) -> None:
    """A FIFO, or /dev/zero, had check wait, or read, for ever."""
    file = folder / "worker.toml"
    make(file)
    with pytest.raises(ProfileError, match=problem) as caught:
        profiles.load_file(file)
    assert caught.value.file == str(file)
    assert caught.value.hint


@pytest.mark.skipif(os.getuid() != 0, reason="root can become somebody who may not read")
@pytest.mark.parametrize("closed", ["file", "folder"])
def test_what_may_not_be_read_is_told_with_a_hint(folder: Path, closed: str) -> None:
    file = write(folder, "worker", WHY)
    (file if closed == "file" else folder).chmod(0o600)

    def tried() -> str:
        try:
            profiles.load("worker")
        except ProfileError as error:
            return str(error)
        return "loaded"

    for above in folder.parents[:2]:
        above.chmod(0o755)
    said = run(tried, ordinary=True).said
    assert said.startswith(f"{file}: can't be read: Permission denied; ")
    assert "chmod 644" in said


def test_the_man_page_has_all_names() -> None:
    page = Path(profiles.__file__).parents[2] / "docs/man/kbusd-profile.5"
    words = set(re.findall(r"[\w-]+", page.read_text().replace("\\-", "-")))
    tables = (constants.ARGUMENTS, constants.LIMITS, constants.SECUREBITS, constants.NAMESPACES)
    for table in tables:
        assert set(table) <= words
