"""Reads sandbox profiles: who a kind of process is, and all that it may do.

A profile is a TOML file; kbusd-profile(5) describes it for its authors. Every section and rule
says `why`. A profile may extend another; a section that it gives replaces the parent's, except
that limits are merged by name, and seccomp rules by call: what a child says of a system call
replaces what its parent said of it, and `remove` withdraws that. Trusts the files that it finds (by
place and owner, never by environment), but reports every mistake in them by file, line and key.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import stat
import tomllib
from collections.abc import Container, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import msgspec

from kbusd.sandbox.errors import ProfileError
from kbusd.sandbox.locate import Lines, Place

PROCESSES = (
    "broker",
    "config-reader",
    "kdbus-worker",
    "launcher",
    "supervisor",
    "worker",
    "zygote",
)
"""The profiles that processes have; others, as base, are there to be extended."""

OVERRIDES = Path("/etc/kbusd/profiles")
"""Where an admin's own copy of a profile takes precedence, file by file."""

_PLACE = Path(__file__).resolve().parents[2]
_OURS = _PLACE / "profiles"
if _PLACE.name in ("site-packages", "dist-packages"):
    # PREFIX/lib/pythonX.Y/site-packages. Asking sysconfig for PREFIX would not do: Python without
    # `site`, as which most of our processes run, does not know of virtual environments.
    _OURS = _PLACE.parents[2] / "share" / "kbusd" / "profiles"
_PART = re.compile(r"[\w-]+")  # of `$.seccomp.rules[3].calls`
_LARGEST = 1 << 20
_TITLE_BYTES = 15  # prctl(2), PR_SET_NAME
_NAME = re.compile(r"[a-z][a-z-]{0,30}\Z")

Why = Annotated[str, msgspec.Meta(min_length=8, pattern=r"\S[\s\S]{6,}\S")]
"""Blanks at either end do not count."""
Users = Annotated[int, msgspec.Meta(ge=65536, le=0xFFFE0000, multiple_of=65536)]
"""The first of 65536 users that follow each other."""
FewUsers = Annotated[int, msgspec.Meta(ge=256, le=0xFFFFFE00, multiple_of=256)]
"""The first of 256."""
Condition = Literal["always", "selinux", "no-selinux", "x86-64", "arm64"]


class _Section(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="kebab"
):
    """What every section has: its reason, whether it is wanted, and whether one can do without.

    Here and elsewhere, `origin` is filled in by `parse`: file:line."""

    why: Why
    enabled: bool = True
    required: bool = True
    origin: str = ""


class User(_Section, frozen=True):
    """Applied by root only. `names`: the first that exists. Empty: stays who it is. `apart`: what is forked
    by a process that keeps CAP_SETUID becomes a user of its own, one of these; `apart_inside`: in a user namespace that does not have them."""

    names: tuple[str, ...] = ()
    apart: Users | None = None
    apart_inside: FewUsers | None = None


class Groups(_Section, frozen=True):
    """Supplementary groups; applied by root only."""

    keep: tuple[str, ...] = ()


class Capabilities(_Section, frozen=True):
    """`keep`: permitted and effective. `bounding`: what an execve could still bring."""

    keep: tuple[str, ...] = ()
    bounding: Literal["keep-only", "none", "all"] = "keep-only"


class Securebits(_Section, frozen=True):
    """capabilities(7); applied by whoever has CAP_SETPCAP."""

    set: tuple[str, ...] = ()


class NoNewPrivileges(_Section, frozen=True):
    """PR_SET_NO_NEW_PRIVS: no execve raises privileges."""


class NotDumpable(_Section, frozen=True):
    """PR_SET_DUMPABLE 0: no core file, no ptrace by others of the same user."""


class Limit(_Section, frozen=True):
    """setrlimit(2), soft and hard alike. `raise-to-hard`: soft up to hard, hard untouched."""

    value: Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)] | Literal["raise-to-hard"]


class Namespaces(_Section, frozen=True):
    """unshare(2); needs CAP_SYS_ADMIN."""

    unshare: tuple[str, ...] = ()


class Path_(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    rename="kebab",
    tag=False,
):
    """One file hierarchy that stays reachable. A path that does not exist is skipped."""

    why: Why
    path: str
    write: bool = False
    when: Condition = "always"
    origin: str = ""


class Landlock(_Section, frozen=True):
    """landlock(7): what of the file system stays reachable; all else, and TCP, is denied."""

    paths: tuple[Path_, ...] = ()


class Selinux(_Section, frozen=True):
    """setcon(3) to `type`, the other fields of the context kept; only where SELinux is enabled and its
    policy has the type. Required of a bus that the machine's root starts."""

    type: Annotated[str, msgspec.Meta(pattern="^([A-Za-z][A-Za-z0-9_.]*)?$")] = ""


class Argument(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="kebab"
):
    """One condition on argument `index` (from 0). Exactly one of the others is given.

    `equals`: this value or all of these flags together and no other; `one-of`: any of the
    values; `not-equals`: any other value; `without`: none of the flags; `including`: all of them;
    `users`: one of these users; with `users-inside`, for where those are not."""

    index: Annotated[int, msgspec.Meta(ge=0, le=5)]
    equals: tuple[str, ...] | None = None
    one_of: tuple[str, ...] | None = None
    not_equals: str | None = None
    without: tuple[str, ...] | None = None
    including: tuple[str, ...] | None = None
    users: Users | None = None
    users_inside: FewUsers | None = None


def written(argument: Argument) -> str:
    """As it stands in a profile."""
    given = msgspec.to_builtins(argument).items()
    return f"{{ {', '.join(f'{key} = {json.dumps(value)}' for key, value in given if value is not None)} }}"


class Rule(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="kebab"):
    """System calls that are allowed (or, with `errno`, fail softly) if all `arguments` hold.

    Of `calls`, `@NAME` stands for the calls of the set NAME."""

    why: Why
    calls: Annotated[tuple[str, ...], msgspec.Meta(min_length=1)]
    arguments: tuple[Argument, ...] = ()
    errno: str = ""
    when: Condition = "always"
    origin: str = ""


class Calls(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="kebab"):
    """A set of system calls that rules, here and in profiles that extend this one, can name."""

    why: Why
    calls: Annotated[tuple[str, ...], msgspec.Meta(min_length=1)]
    origin: str = ""


class Removal(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="kebab"
):
    """System calls of which all rules are withdrawn that the profile has which this one extends."""

    why: Why
    calls: Annotated[tuple[str, ...], msgspec.Meta(min_length=1)]
    origin: str = ""


class Seccomp(_Section, frozen=True):
    """seccomp(2). What no rule names ends the process, as does a foreign architecture."""

    rules: tuple[Rule, ...] = ()
    remove: tuple[Removal, ...] = ()
    sets: dict[str, Calls] = {}


class Profile(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="kebab"
):
    """A profile file, or several merged. `files` and `name` are filled in by `load`."""

    why: Why
    title: Annotated[str, msgspec.Meta(max_length=15)] = ""
    extends: str = ""
    user: User | None = None
    groups: Groups | None = None
    capabilities: Capabilities | None = None
    securebits: Securebits | None = None
    no_new_privileges: NoNewPrivileges | None = None
    not_dumpable: NotDumpable | None = None
    limits: dict[str, Limit] = {}
    namespaces: Namespaces | None = None
    landlock: Landlock | None = None
    selinux: Selinux | None = None
    seccomp: Seccomp | None = None
    name: str = ""
    files: tuple[str, ...] = ()


_Named = TypeVar("_Named", Rule, Removal)

SECTIONS = (
    "user",
    "groups",
    "capabilities",
    "securebits",
    "no_new_privileges",
    "not_dumpable",
    "namespaces",
    "landlock",
    "selinux",
    "seccomp",
)


def directories() -> list[Path]:
    """Where profiles are looked for, in order."""
    return [OVERRIDES, _OURS, Path("/usr/share/kbusd/profiles")]


def nobody(name: str) -> str:
    """That no process has the profile of this name, in words; "" if there is one."""
    if name in PROCESSES:
        return ""
    close = difflib.get_close_matches(name.lower(), PROCESSES, 1)
    return f"no process has a profile of this name{f'; did you mean {close[0]}?' if close else ''}"


def names() -> list[str]:
    """Every profile that a process has."""
    return list(PROCESSES)


def strays(loaded: Iterable[Profile]) -> Iterator[str]:
    """What is among the overrides and counts for nothing, in words. `loaded`: those of all processes."""
    used = {Path(file) for profile in loaded for file in profile.files}
    try:
        entries = sorted(OVERRIDES.iterdir())
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return
    for file in entries:
        if file in used or (file.suffix == ".toml" and file.stem in ("base", *PROCESSES)):
            continue
        ours = [f"{name}.toml" for name in ("base", *PROCESSES)]
        close = difflib.get_close_matches(file.name.lower(), ours, 1, 0.7)
        hint = f"; did you mean {close[0]}?" if close else ""
        yield f"{file}: has no effect: no process has a profile of this name{hint}"


def same_title(loaded: Iterable[Profile]) -> None:
    """Raises ProfileError if two of these have one title: it tells processes from each other."""
    titles: dict[str, Profile] = {}
    for profile in loaded:
        other = titles.setdefault(profile.title, profile)
        if other is not profile:
            # Ours are right: the mistake is in the file that stands first.
            file = min((profile.files[0], other.files[0]), key=lambda each: not _is_override(each))
            problem = f"`{profile.title}` is the title of both {other.name} and {profile.name}"
            raise ProfileError(
                file, "title", problem, "kbusctl tells processes by it: have another"
            )


def _is_override(file: str) -> bool:
    return Path(file).parent == OVERRIDES


def find(name: str, below: Path | None = None) -> Path:
    """The file of the profile `name`; with `below`, the one that this one overrides.

    Raises ProfileError if there is none to be trusted."""
    if not _NAME.match(name):
        raise ProfileError("profiles", name, "not a profile name", "lower-case letters and dashes")
    folders = directories()
    for folder in folders if below is None else folders[folders.index(below.parent) + 1 :]:
        file = folder / f"{name}.toml"
        try:
            status = file.stat()
        except (FileNotFoundError, NotADirectoryError):
            for link in (file, folder):
                if link.is_symlink() and not link.exists():
                    problem = f"is a symbolic link to {os.readlink(link)}, which is not there"
                    hint = "mend it, or remove it: what it is to say does not count"
                    raise ProfileError(str(link), "", problem, hint) from None
            continue
        except OSError as error:
            raise unreadable(file, error) from None
        if folder == OVERRIDES and (status.st_uid != 0 or status.st_mode & 0o022):
            raise ProfileError(
                str(file),
                "",
                f"an override must be owned by root and writable by nobody else "
                f"(owner {status.st_uid}, mode {stat.S_IMODE(status.st_mode):04o})",
                f"chown root {file} && chmod 644 {file}",
            )
        return file
    raise ProfileError(f"{name}.toml", "", *_missing(name, names()))


def unreadable(file: Path, error: OSError) -> ProfileError:
    """Why a file can't be read, and what to do."""
    hint = "whoever starts the bus, or asks, must be able to: chmod 644; and its directories 755"
    if isinstance(error, FileNotFoundError):
        hint = "kbusctl profile list tells which there are"
    return ProfileError(str(file), "", f"can't be read: {error.strerror}", hint)


def _missing(name: str, known: Iterable[str]) -> tuple[str, str]:
    """That there is no such profile, and which is meant."""
    places = ", ".join(str(folder) for folder in directories())
    close = difflib.get_close_matches(name, known, 1)
    hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}"
    return f"there is no profile `{name}` in {places}", hint


def load(name: str) -> Profile:
    """The profile `name`, merged with what it extends, complete. Raises ProfileError."""
    if name == "base":
        raise ProfileError("base.toml", "", "base is only extended, never loaded by itself")
    return msgspec.structs.replace(load_file(find(name)), name=name)


def load_file(path: Path) -> Profile:
    """The profile in this file, merged with what it extends, complete. Raises ProfileError."""
    profile = _load(path, ())
    file = profile.files[0]
    for section in SECTIONS:
        if getattr(profile, section) is None:
            key = section.replace("_", "-")
            raise ProfileError(
                file,
                key,
                "the section is missing",
                f"write [{key}], with `enabled = false` and why if it is not wanted; or extend a profile",
            )
    if not profile.title:
        raise ProfileError(file, "title", "is missing", "give the process a name, for ps(1)")
    return msgspec.structs.replace(profile, name=path.stem)


def load_extended(name: str) -> Profile:
    """One that is only extended, as base: merged with what it extends, maybe incomplete. Raises ProfileError."""
    return msgspec.structs.replace(_load(find(name), ()), name=name)


def _read(file: Path) -> bytes:
    """A regular file of a sane size. Raises ProfileError."""
    try:
        fd = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise ProfileError(str(file), "", "is no regular file", "a profile is a text file")
            with open(fd, "rb", closefd=False) as opened:
                text = opened.read(_LARGEST + 1)
        finally:
            os.close(fd)
    except OSError as error:
        raise unreadable(file, error) from None
    if len(text) > _LARGEST:
        problem = f"is larger than {_LARGEST} bytes"
        raise ProfileError(str(file), "", problem, "no profile is: is it another file?")
    return text


def _load(file: Path, below: tuple[Path, ...]) -> Profile:
    *children, profile = _chain(file, below)
    profile = _with_sets(profile)
    for child in reversed(children):
        profile = _merge(profile, child)
    return profile


def _chain(file: Path, below: tuple[Path, ...]) -> list[Profile]:
    text = _read(file)
    profile = parse(text, str(file))
    if not profile.extends:
        return [profile]

    def wrong(problem: str, hint: str) -> ProfileError:
        line = Lines(text.decode()).of("extends")
        return ProfileError(str(file), "extends", problem, hint, line)

    known = ["base", *names()]
    if not _NAME.match(profile.extends):
        hint = f"a name and no path; there are {', '.join(known)}"
        raise wrong(f"`{profile.extends}` is not a profile name", hint)
    beside = file.with_name(f"{profile.extends}.toml")
    if beside == file and file.parent in directories()[:-1]:
        parent = find(profile.extends, below=file)  # ours, of the same name
    elif beside.exists() and file.parent not in directories():
        parent = beside
    elif any((folder / beside.name).exists() for folder in directories()):
        parent = find(profile.extends)
    else:
        raise wrong(*_missing(profile.extends, known))
    if parent in (*below, file):
        raise wrong(
            "the profile extends itself", "only one in /etc/kbusd/profiles has one below it"
        )
    return [profile, *_chain(parent, (*below, file))]


def removals(profile: Profile, call: str) -> list[Removal]:
    """What withdraws the rules for this call."""
    return [
        each for each in (profile.seccomp.remove if profile.seccomp else ()) if call in each.calls
    ]


def where(origin: str) -> tuple[str, int]:
    """The file and the line of an origin."""
    file, _, line = origin.rpartition(":")
    return file, int(line or 0)


def parse(text: bytes, file: str) -> Profile:
    """One profile file as it stands. Raises ProfileError that names `file`, line and key."""
    try:
        decoded = text.decode()
        raw = tomllib.loads(decoded)
    except UnicodeDecodeError as error:
        line = text.count(b"\n", 0, error.start) + 1
        raise ProfileError(file, "", "is not UTF-8", "save it as UTF-8", line) from None
    except tomllib.TOMLDecodeError as error:
        raise _not_toml(file, str(error), decoded) from None
    except RecursionError:
        problem = "is not TOML that we read: lists or tables are too deep in each other"
        raise ProfileError(file, "", problem, "no profile needs more than three") from None
    lines = Lines(decoded)
    for key in ("name", "files"):
        if key in raw:
            hint = "leave it out: the file's name is the name"
            raise ProfileError(file, key, "is not yours to set", hint, lines.of(key))
    _mark(raw, (), file, lines)
    try:
        profile = msgspec.convert(raw, Profile, strict=True)
    except msgspec.ValidationError as error:
        raise _explain(file, _named(str(error), raw), lines) from None
    _check_texts(profile, file, lines)
    return msgspec.structs.replace(profile, files=(file,))


def _check_texts(profile: Profile, file: str, lines: Lines) -> None:
    """What the kernel could not take as it is. Raises ProfileError."""
    if len(profile.title.encode()) > _TITLE_BYTES or not profile.title.isprintable():
        problem = f"has {len(profile.title.encode())} bytes, or one that can't be seen"
        hint = f"the kernel keeps {_TITLE_BYTES} bytes"
        raise ProfileError(file, "title", problem, hint, lines.of("title"))
    for path in profile.landlock.paths if profile.landlock else ():
        if not path.path.startswith("/") or "\0" in path.path:
            problem = f"{path.path!r} is no absolute path"
            hint = "it begins with /: nobody knows in which directory a process starts"
            raise ProfileError(file, "landlock.paths", problem, hint, where(path.origin)[1])


_TOML_HINTS = {
    "Invalid value": 'text stands in "quotes"; true, false and numbers do not',
    "Expected '='": "a line is `key = value`, or a section in brackets",
    "Expected newline": "a key and its value have a line of their own",
    "Cannot declare": "it is there already; rules, paths and removals have [[two brackets]] each time",
    "Cannot overwrite": "the key is there already",
    "Unclosed": "a bracket that was opened above is not closed",
    "Unterminated": "a quote that was opened is not closed",
    "Illegal character": 'a text that goes on to the next line stands in """three quotes"""',
    "Expected ']": "a section is [name], a rule [[seccomp.rules]]",
}


def _not_toml(file: str, said: str, text: str) -> ProfileError:
    """What tomllib says, `Problem (at line 3, column 5)`, with the line where it belongs, and a hint."""
    problem, _, at = said.partition(" (at ")
    place = re.match(r"line (\d+), column (\d+)", at)
    line = int(place[1]) if place else len(text.splitlines())
    hint = next((hint for key, hint in _TOML_HINTS.items() if problem.startswith(key)), "")
    if not place:
        hint = "something is missing: a value, or the end of a list or of a text in three quotes"
    column = f" at column {place[2]}" if place else " at the end"
    problem = f"is not TOML{column}: {problem[:1].lower()}{problem[1:]}"
    return ProfileError(file, "", problem, hint or "kbusd-profile(5) has an example", line)


def _mark(table: dict[str, Any], place: Place, file: str, lines: Lines) -> None:
    """Tell every section, rule, path and set where it stands."""
    for key, value in table.items():
        inside = list(enumerate(value)) if isinstance(value, list) else [(None, value)]
        for index, item in inside:
            if isinstance(item, dict) and key != "arguments":
                here = (*place, key) if index is None else (*place, key, index)
                if "origin" in item:
                    line = lines.of(*here, "origin")
                    hint = "leave it out: it is filled in when the file is read"
                    raise ProfileError(file, "origin", "is not yours to set", hint, line)
                _mark(item, here, file, lines)
                if here not in (("limits",), ("seccomp", "sets")):
                    item["origin"] = f"{file}:{lines.of(*here)}"


def _named(text: str, raw: dict[str, Any]) -> str:
    """What msgspec says, with the key of a table in which it has found a mistake; to it all are `[...]`."""
    for place, kind in (("limits", Limit), ("seccomp.sets", Calls)):
        if f"$.{place}[...]" in text:
            table: Any = raw
            for part in place.split("."):
                table = table[part]
            for key, item in table.items():
                try:
                    msgspec.convert(item, kind, strict=True)
                except msgspec.ValidationError:
                    return text.replace("[...]", f".{key}")
    return text


def _explain(file: str, text: str, lines: Lines) -> ProfileError:
    """msgspec's `Problem - at `$.key` as file, line, key and hint."""
    problem, _, where = text.partition(" - at `$")
    key = inside = where.rstrip("`").lstrip(".")
    hint = ""
    if unknown := re.search(r"unknown field `(.+)`", problem):
        word = unknown.group(1)
        known = sorted(_fields())
        close = difflib.get_close_matches(word, known, 1)
        hint = f"did you mean `{close[0]}`?" if close else "see kbusd-profile(5) for the fields"
        inside = f"{key}.{word}"
    elif "`why`" in problem:
        hint = "every section and rule says why it is there"
    elif key.endswith("why"):
        hint = "a reason has at least eight characters"
    elif problem.startswith("Expected `array`, got `str`"):
        hint = 'a list in brackets: ["..."]'
    elif problem.startswith("Expected `array`, got `object`"):
        hint = f"one of several is written in two brackets: [[{key}]]"
    elif problem.startswith("Expected `str`, got `int`") and "arguments" in key:
        hint = 'a number stands in quotes, too: "1"'
    elif key.endswith("when"):
        hint = f"known are {', '.join(get_args(Condition))}"
    elif key.endswith("apart") or key.endswith("users"):
        hint = "the first of 65536 users, a number that 65536 divides"
    elif key.endswith("inside"):
        hint = "the first of 256 users, a number that 256 divides"
    else:
        hint = "see kbusd-profile(5)"
    line = lines.of(*(int(part) if part.isdigit() else part for part in _PART.findall(inside)))
    return ProfileError(file, key or "the file", problem[:1].lower() + problem[1:], hint, line)


def _fields() -> set[str]:
    structs = (Profile, User, Groups, Capabilities, Securebits, Limit, Namespaces, Landlock)
    more = (Path_, Selinux, Rule, Argument, Seccomp, Calls, Removal)
    return {
        field.encode_name
        for struct in (*structs, *more)
        for field in msgspec.structs.fields(struct)
    } - {"origin", "name", "files"}


def _merge(parent: Profile, child: Profile) -> Profile:
    seccomp = child.seccomp
    if seccomp is not None and seccomp.enabled and parent.seccomp is not None:
        sets = parent.seccomp.sets | seccomp.sets
        rules = [_expand(rule, sets) for rule in seccomp.rules]
        removals = [_expand(each, sets) for each in seccomp.remove]
        own = {call for rule in rules for call in rule.calls}
        gone = _removed(removals, own, parent.seccomp.rules)
        seccomp = msgspec.structs.replace(
            seccomp,
            rules=(*_without(parent.seccomp.rules, own | gone), *rules),
            remove=(*_without(parent.seccomp.remove, own), *removals),
            sets=sets,
        )
    elif seccomp is None:
        seccomp = parent.seccomp
    sections = {
        section: getattr(child, section) or getattr(parent, section)
        for section in SECTIONS
        if section != "seccomp"
    }
    return Profile(
        why=child.why,
        title=child.title or parent.title,
        limits=parent.limits | child.limits,
        seccomp=seccomp,
        files=child.files + parent.files,
        **sections,
    )


def _removed(removals: Iterable[Removal], own: Container[str], rules: tuple[Rule, ...]) -> set[str]:
    """The calls to withdraw from `rules`. Raises ProfileError for one that is not in them."""
    known = {call for rule in rules for call in rule.calls}
    calls = set()
    for each in removals:
        for call in each.calls:
            if call in own:
                problem = f"`{call}` has a rule in this file as well"
                hint = "leave it out here: that rule replaces those of the profile that this one extends"
            elif call not in known:
                problem = f"`{call}` has no rule in the profile that this one extends"
                close = difflib.get_close_matches(call, known, 1, 0.5)
                hint = f"did you mean `{close[0]}`?" if close else "there is nothing to remove"
            else:
                calls.add(call)
                continue
            file, line = where(each.origin)
            raise ProfileError(file, "seccomp.remove", problem, hint, line)
    return calls


def _with_sets(profile: Profile) -> Profile:
    if profile.seccomp is None:
        return profile
    _removed(profile.seccomp.remove, (), ())  # there is nothing below
    rules = tuple(_expand(rule, profile.seccomp.sets) for rule in profile.seccomp.rules)
    seccomp = msgspec.structs.replace(profile.seccomp, rules=rules)
    return msgspec.structs.replace(profile, seccomp=seccomp)


def _expand(rule: _Named, sets: dict[str, Calls]) -> _Named:
    """With the calls that `@NAME` stands for. Raises ProfileError."""
    calls: list[str] = []
    for call in rule.calls:
        if not call.startswith("@"):
            calls.append(call)
        elif (named := sets.get(call[1:])) is not None:
            calls += named.calls
        else:
            close = difflib.get_close_matches(call[1:], sets, 1, 0.5)
            hint = f"did you mean `@{close[0]}`?" if close else "define it in [seccomp.sets]"
            file, line = where(rule.origin)
            raise ProfileError(file, "calls", f"there is no set `{call}`", hint, line)
    return msgspec.structs.replace(rule, calls=tuple(calls))


def _without(rules: tuple[_Named, ...], calls: set[str]) -> list[_Named]:
    rest = [
        msgspec.structs.replace(rule, calls=tuple(c for c in rule.calls if c not in calls))
        for rule in rules
    ]
    return [rule for rule in rest if rule.calls]
