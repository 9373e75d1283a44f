"""Service files: which are taken, which skipped and why, and how Exec lines are split."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kbusd.policy import services
from kbusd.policy.services import Directory, Service


class Directories:
    """Directories of service files, and what loading them said."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.warnings: list[tuple[str, int, str]] = []

    def add(self, directory: str, file: str, text: str | bytes) -> Path:
        path = self.root / directory / file
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    def load(self, *directories: str, strict: bool = False) -> dict[str, Service]:
        found = services.load(
            [Directory(str(self.root / name), strict) for name in directories],
            lambda file, line, text: self.warnings.append((Path(file).name, line, text)),
        )
        assert [service.name for service in found] == sorted(service.name for service in found)
        return {service.name: service for service in found}


@pytest.fixture
def directories(tmp_path: Path) -> Directories:
    return Directories(tmp_path)


def text(name: str, command: str = "/bin/true", more: str = "") -> str:
    return f"[D-BUS Service]\nName={name}\nExec={command}\n{more}"


def test_every_key_is_read(directories: Directories) -> None:
    path = directories.add(
        "d",
        "a.b.service",
        "# comment\n\n[Other]\nName=no.no\n[D-BUS Service]\r\nName = a.b\r\nName=second.one\n"
        "Name[de]=x.y\nExec=/bin/prog 'one two'\nUser=daemon\nSystemdService=a.service\n"
        "AssumedAppArmorLabel=/usr/bin/a\n",
    )
    assert directories.load("d")["a.b"] == Service(
        name="a.b",
        exec=("/bin/prog", "one two"),
        file=str(path),
        user="daemon",
        systemd_service="a.service",
        assumed_apparmor_label="/usr/bin/a",
    )
    assert directories.warnings == []


@pytest.mark.parametrize(
    ("content", "line", "reason"),
    [
        ("[D-BUS Service]\nExec=/bin/true\n", 0, "no Name"),
        ("[D-BUS Service]\nName=a.b\n", 0, "no Exec"),
        ("[Desktop Entry]\nName=a.b\nExec=/bin/true\n", 0, "no Name"),
        ("Name=a.b\n[D-BUS Service]\n", 1, "key before the first [section]"),
        ("\n[D-BUS Service\n", 2, "malformed section header"),
        ("[]\n", 1, "malformed section header"),
        ("[a[b]\n", 1, "section name has forbidden characters"),
        ("[D-BUS Service]\nName\n", 2, 'no "=" after key Name'),
        ("[D-BUS Service]\n=x\n", 2, "line has no key"),
        ("[D-BUS Service]\nNa me=x\n", 2, 'no "=" after key Na'),
        ("[D-BUS Service]\nName=a\\q\n", 2, 'unknown escape "\\q"'),
        ("[D-BUS Service]\nName=a\\", 2, 'unknown escape "\\"'),
        ("[D-BUS Service]\nName=a\0b\n", 2, "NUL"),
        (b"[D-BUS Service]\nName=\xff\n", 0, "not UTF-8"),
        (text("nodots"), 0, "not a well-known bus name"),
        (text(":1.5"), 0, "not a well-known bus name"),
        (text("a.5"), 0, "not a well-known bus name"),
        (text("a..b"), 0, "not a well-known bus name"),
        (text("a." + "b" * 254), 0, "not a well-known bus name"),
        (text("a.b\u00e9"), 0, "not a well-known bus name"),
        (" " * (services.MAX_FILE_SIZE + 1), 0, "larger than"),
    ],
)
def test_a_wrong_file_is_skipped(
    directories: Directories, content: str | bytes, line: int, reason: str
) -> None:
    directories.add("d", "wrong.service", content)
    directories.add("d", "x.y.service", text("x.y"))
    assert list(directories.load("d")) == ["x.y"]
    ((file, where, why),) = directories.warnings
    assert (file, where) == ("wrong.service", line)
    assert why.startswith("skipped: ") and reason in why


def test_an_unreadable_file_is_skipped(directories: Directories) -> None:
    (directories.root / "d").mkdir()
    (directories.root / "d" / "a.service").symlink_to("nowhere")
    assert directories.load("d") == {}
    assert directories.warnings == [("a.service", 0, "skipped: No such file or directory")]


def test_a_name_that_is_not_utf8_ended_the_reader(directories: Directories) -> None:
    """None but its own service is lost, and nothing else that is read."""
    directories.add("d", "\udcff.service", "[D-BUS Service]\nName=a.a\nExec=x\n")
    directories.add("d", "b.service", "[D-BUS Service]\nName=a.b\nExec=x\n")
    assert list(directories.load("d")) == ["a.b"]
    assert directories.warnings == [("\udcff.service", 0, "skipped: its name is not UTF-8")]


def test_broken_quoting_leaves_the_name_activatable(directories: Directories) -> None:
    directories.add("d", "a.b.service", text("a.b", "/bin/prog 'oops"))
    service = directories.load("d")["a.b"]
    assert service.exec == ()
    assert service.exec_error == "unfinished ' quote"


def test_the_first_directory_wins(directories: Directories) -> None:
    directories.add("one", "a.b.service", text("a.b", "/one"))
    directories.add("two", "a.b.service", text("a.b", "/two"))
    directories.add("two", "c.d.service", text("c.d", "/two"))
    found = directories.load("one", "absent", "two")
    assert {name: service.exec for name, service in found.items()} == {
        "a.b": ("/one",),
        "c.d": ("/two",),
    }
    assert directories.warnings == []


@pytest.mark.parametrize("other", ["0.service", "z.service"])
def test_the_properly_named_file_wins_in_one_directory(
    directories: Directories, other: str
) -> None:
    directories.add("d", other, text("a.b", "/other"))
    directories.add("d", "a.b.service", text("a.b", "/proper"))
    assert directories.load("d")["a.b"].exec == ("/proper",)
    ((file, _, why),) = directories.warnings
    assert file == other and "provides the same name" in why


def test_strict_directories_want_the_file_called_like_the_name(directories: Directories) -> None:
    directories.add("d", "other.service", text("a.b"))
    assert list(directories.load("d")) == ["a.b"]
    assert directories.load("d", strict=True) == {}
    assert directories.warnings == [
        ("other.service", 0, "skipped: it must be called a.b.service here")
    ]


def test_other_files_are_not_looked_at(directories: Directories) -> None:
    directories.add("d", "a.b.service.bak", "garbage")
    assert directories.load("d") == {} and directories.warnings == []


# -- Exec -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("/bin/a  b\tc", ["/bin/a", "b", "c"]),
        ("a 'b \"c\\' d", ["a", 'b "c\\', "d"]),
        ('a "b\'c" d', ["a", "b'c", "d"]),
        ('a "\\$x \\` \\" \\\\ \\n"', ["a", '$x ` " \\ \\n']),
        ("a\\ b c\\\\", ["a b", "c\\"]),
        ("a'b'\"c\"d", ["abcd"]),
        ("a '' \"\"", ["a", "", ""]),
        ("a # b", ["a"]),
        ("a b#c", ["a", "b#c"]),
        ("a $HOME *", ["a", "$HOME", "*"]),
    ],
)
def test_split(command: str, arguments: list[str]) -> None:
    assert list(services.split(command)) == arguments


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("a 'b", "unfinished ' quote"),
        ('a "b', 'unfinished " quote'),
        ('a "b\\', 'unfinished " quote'),
        ("a\\", "ends in a backslash"),
    ],
)
def test_split_refuses(command: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        services.split(command)


@given(st.lists(st.text(st.characters(blacklist_characters="\0")), min_size=1))
def test_split_undoes_quoting(arguments: list[str]) -> None:
    assert services.split(shlex.join(arguments)) == tuple(arguments)


@given(st.text())
def test_parsing_never_fails_in_another_way(content: str) -> None:
    try:
        services.parse(content)
    except ValueError as error:
        reason, line = error.args
        assert reason and 1 <= line <= content.count("\n") + 1
