"""`kbusctl profile`: sandbox profiles as their authors need to see them.

Reads profile files and compiles them; changes nothing and talks to no process.
"""

from __future__ import annotations

import argparse
import difflib
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pyseccomp

from kbusd.ctl import export, learn
from kbusd.sandbox import above, constants, profiles
from kbusd.sandbox.compile import ARCHITECTURES, NUMBER, compile_profile, conditions, native
from kbusd.sandbox.errors import ProfileError
from kbusd.sandbox.judge import ALLOW, KILL, condition, judge

_FILLED_IN = ("origin", "name", "files")  # by the reader of a file, never by its author


def add_to(commands: Any) -> None:
    """The command `profile` and what is below it."""
    command = commands.add_parser(
        "profile", help="look at sandbox profiles, check and compare them"
    )
    below = command.add_subparsers(dest="what", required=True)
    below.add_parser("list", help="every profile, and which file is in force").set_defaults(
        run=_list
    )
    show = below.add_parser("show", help="the effective profile, and where each rule comes from")
    show.add_argument("profile", help="a name, or a file")
    show.add_argument("--json", action="store_true", help="for programs")
    show.set_defaults(run=_show)
    check = below.add_parser("check", help="whether profiles are right, for each architecture")
    check.add_argument("profiles", nargs="*", help="names or files; by default all that there are")
    check.set_defaults(run=_check)
    diff = below.add_parser("diff", help="what B allows that A does not, and the other way round")
    diff.add_argument("a", metavar="A", help="a name, or a file")
    diff.add_argument("b", metavar="B", help="a name, or a file")
    diff.set_defaults(run=_diff)
    test = below.add_parser("test", help="what a profile says of one system call")
    test.add_argument("profile", help="a name, or a file")
    test.add_argument("call", help="name or number of the call")
    test.add_argument("arguments", nargs="*", help="numbers, or names as in profiles: PROT_EXEC|2")
    _add_arch(test)
    test.set_defaults(run=_test)
    exported = below.add_parser("export", help="the system call filter for other programs")
    exported.add_argument("profile", help="a name, or a file")
    exported.add_argument("--format", choices=export.FORMATS, default="oci")
    _add_arch(exported)
    exported.set_defaults(run=_export)
    learn.add_to(below)
    schema = below.add_parser("schema", help="the JSON schema of profile files, for editors")
    schema.set_defaults(run=_schema)


def _add_arch(command: argparse.ArgumentParser) -> None:
    command.add_argument("--arch", choices=sorted(ARCHITECTURES), default=native() or None)


def load(which: str) -> profiles.Profile:
    """By name, or by file if it looks like one. Raises ProfileError, OSError."""
    if "/" in which or which.endswith(".toml"):
        return profiles.load_file(Path(which))
    return profiles.load(which)


def _list(_: argparse.Namespace) -> int:
    loaded, wrong = [], False
    for name in profiles.names():
        try:
            profile = profiles.load(name)
            loaded.append(profile)
            print(f"{name:15} {profile.files[0]}\n{'':15} {profile.why}")
        except ProfileError as error:
            wrong = True
            print(f"{name:15} {error}")
    for stray in profiles.strays(loaded) if not wrong else ():
        print(stray)
    return 1 if wrong else 0


def _show(options: argparse.Namespace) -> int:
    profile = load(options.profile)
    if options.json:
        print(msgspec.json.format(msgspec.json.encode(profile)).decode())
    else:
        print("\n".join(describe(profile)))
    return 0


def describe(profile: profiles.Profile) -> Iterator[str]:
    """The effective profile in lines, with the place where each part stands."""
    yield f"{profile.name}: {profile.title}"
    yield from _wrap(profile.why)
    yield f"  files: {', '.join(profile.files)}"
    for section in profiles.SECTIONS:
        value = getattr(profile, section)
        if section != "seccomp" and value is not None:
            yield from _section(section.replace("_", "-"), value)
    for name, limit in profile.limits.items():
        yield from _section(f"limits.{name}", limit)
    assert profile.seccomp is not None
    yield from _section("seccomp", profile.seccomp)
    for rule in profile.seccomp.rules if profile.seccomp.enabled else ():
        yield f"  {_action(rule)} {' '.join(rule.calls)}{_conditions(rule)}   {rule.origin}"
        yield from _wrap(rule.why)
    for removal in profile.seccomp.remove if profile.seccomp.enabled else ():
        yield f"  removed {' '.join(removal.calls)}   {removal.origin}"
        yield from _wrap(removal.why)


def _section(key: str, section: Any) -> Iterator[str]:
    state = "" if section.enabled else "  off"
    state += "" if section.required or not section.enabled else "  not required"
    yield f"\n[{key}]{state}   {section.origin}"
    yield from _wrap(section.why)
    for field in msgspec.structs.fields(section):
        value = getattr(section, field.name)
        if field.encode_name in ("why", "enabled", "required", "origin", "rules", "remove", "sets"):
            continue
        if field.name == "paths":
            for path in value:
                kind = "write" if path.write else "read"
                when = "" if path.when == "always" else f" ({path.when})"
                yield f"  {kind} {path.path}{when}   {path.origin}"
                yield from _wrap(path.why)
        elif section.enabled:
            shown = " ".join(value) or "none" if isinstance(value, tuple) else value
            yield f"  {field.encode_name}: {shown}"


def _wrap(why: str) -> list[str]:
    return textwrap.wrap(why, 96, initial_indent="      ", subsequent_indent="      ")


def _action(rule: profiles.Rule) -> str:
    return rule.errno or ALLOW


def _conditions(rule: profiles.Rule) -> str:
    said = [condition(argument) for argument in rule.arguments]
    if rule.when != "always":
        said.append(f"only {rule.when}")
    return f" if {' and '.join(said)}" if said else ""


def _check(options: argparse.Namespace) -> int:
    wrong = 0
    loaded = []
    for which in options.profiles or profiles.names():
        try:
            profile = profiles.load_extended(which) if which == "base" else load(which)
            loaded.append(profile)
            for arch in ARCHITECTURES:
                for selinux in (False, True):
                    compile_profile(profile, arch=arch, selinux=selinux)
            found = _useless(profile)
            if never := [str(each) for each in found if not each.partly]:
                wrong += 1
                print(*never, sep="\n")
                continue
            print(
                *(f"{each} (so not with all arguments)" for each in found),
                sep="\n",
                end="\n" * bool(found),
            )
            print(f"{which}: right, for {' and '.join(ARCHITECTURES)}, with and without SELinux")
            if "/" not in which and (note := profiles.nobody(profile.name)):
                print(f"{which}: {note}")
        except (ProfileError, OSError) as error:
            wrong += 1
            print(error)
    try:
        if not options.profiles:
            for stray in profiles.strays(loaded) if not wrong else ():
                print(stray)
            profiles.same_title(loaded)
        elif not wrong:
            given = {
                profile.name: profile for profile in loaded if profile.name in profiles.names()
            }
            others = [profiles.load(name) for name in profiles.names() if name not in given]
            profiles.same_title([*given.values(), *others])
    except ProfileError as error:
        wrong += 1
        print(error)
    return 1 if wrong else 0


def _useless(profile: profiles.Profile) -> list[above.Useless]:
    """What the filter above takes away again, on some architecture; each once."""
    over = above.above(profile)
    found = {
        str(each): each
        for arch in ARCHITECTURES
        for selinux in (False, True)
        for each in (above.useless(profile, over, conditions(selinux, arch), arch) if over else ())
    }
    return list(found.values())


def _diff(options: argparse.Namespace) -> int:
    a, b = load(options.a), load(options.b)
    changed = [
        line
        for line in difflib.unified_diff(_flat(a), _flat(b), options.a, options.b, n=0, lineterm="")
        if not line.startswith("@@")
    ]
    print("\n".join(changed) if changed else "they say the same")
    return 1 if changed else 0


def _flat(profile: profiles.Profile) -> list[str]:
    """One line for each thing that is confined or allowed, in an order of its own; no reasons."""
    lines = []
    parts = {section.replace("_", "-"): getattr(profile, section) for section in profiles.SECTIONS}
    parts |= {f"limits.{name}": limit for name, limit in profile.limits.items()}
    for key, section in parts.items():
        raw = msgspec.to_builtins(section)
        for field in ("why", "origin", "rules", "remove", "sets", "paths"):
            raw.pop(field, None)
        lines.append(f"[{key}] " + " ".join(f"{k}={_plain(v)}" for k, v in sorted(raw.items())))
    assert profile.seccomp is not None and profile.landlock is not None
    for path in profile.landlock.paths:
        lines.append(f"landlock {'write' if path.write else 'read'} {path.path} ({path.when})")
    for rule in profile.seccomp.rules:
        lines += [f"{call}: {_action(rule)}{_conditions(rule)}" for call in rule.calls]
    return sorted(lines)


def _plain(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _test(options: argparse.Namespace) -> int:
    profile = load(options.profile)
    call = call_name(options.call, options.arch)
    arguments = [number(text) for text in options.arguments]
    if len(arguments) > 6:
        raise ProfileError("", "", "a system call has at most six arguments")
    compile_profile(profile, arch=options.arch)  # tells what is wrong
    here = conditions(arch=options.arch)
    said = judge(profile, call, arguments, here)
    over = above.above(profile)
    if over and above.stricter(said, strict := judge(over, call, arguments, here)):
        print(f"{call}: {'ends the process' if strict.action == KILL else strict.action}")
        rules = [strict.rule] if strict.rule else strict.near
        print(f"  Profile {over.name}, whose filter is above, {above.says(call, rules)}")
        print(
            f"  {profile.name} by itself: {said.action}{f', by {said.rule.origin}' if said.rule else ''}"
        )
        return 1
    if said.rule is not None:
        print(f"{call}: {said.action}, by {said.rule.origin}{_conditions(said.rule)}")
        print("\n".join(_wrap(said.rule.why)))
    elif said.action == ALLOW:
        print(f"{call}: {profile.name} has no filter")
    else:
        print(f"{call}: ends the process")
        for rule in said.near:
            print(f"  {_action(rule)} only{_conditions(rule)}, {rule.origin}")
        for removal in profiles.removals(profile, call):
            print(f"  removed by {removal.origin}", *_wrap(removal.why), sep="\n")
    return 0 if said.action == ALLOW else 1


def call_name(text: str, arch: str | None) -> str:
    """Of a name or a number. Raises ProfileError."""
    which = ARCHITECTURES.get(arch or "", pyseccomp.system_arch())
    if text.isdigit():
        try:
            return bytes(pyseccomp.resolve_syscall(which, int(text))).decode()
        except ValueError:
            raise ProfileError("", "", f"{arch} has no system call {text}") from None
    number = pyseccomp.resolve_syscall(which, text)
    if number == -1:
        raise ProfileError("", "", f"{text} is no system call that libseccomp knows")
    if number < 0:
        raise ProfileError("", "", f"{arch} has no system call {text}")
    return text


def number(text: str) -> int:
    """Of an argument: a number, a name of constants.ARGUMENTS, or several with |.

    Raises ProfileError."""
    total = 0
    for part in text.split("|"):
        try:
            total |= constants.ARGUMENTS[part] if part in constants.ARGUMENTS else int(part, 0)
        except ValueError:
            close = difflib.get_close_matches(part, constants.ARGUMENTS, 1)
            hint = f"did you mean {close[0]}?" if close else "give a number"
            raise ProfileError("", "", f"{part} is no argument that is known", hint) from None
    return total


def _export(options: argparse.Namespace) -> int:
    profile = load(options.profile)
    if over := above.above(profile):
        note = f"kbusctl: {profile.name} by itself; in kbusd a call must pass {over.name} as well"
        print(note, file=sys.stderr)
    if options.format == "oci":
        for line in export.left_out(profile, options.arch):
            print(f"kbusctl: {line}", file=sys.stderr)
    print(export.FORMATS[options.format](profile, options.arch))
    return 0


def schema() -> dict[str, Any]:
    """The JSON schema of a profile file."""
    made = msgspec.json.schema(profiles.Profile)
    for definition in made["$defs"].values():
        for key in _FILLED_IN:
            definition.get("properties", {}).pop(key, None)
        definition.pop("title", None)
    made["title"] = "kbusd sandbox profile"
    _name_all(made["$defs"])
    return made


def _name_all(definitions: dict[str, Any]) -> None:
    """Add the names that are known, which the types do not have, so that an editor tells what is none."""
    for kind, key, table in (
        ("Capabilities", "keep", constants.CAPABILITIES),
        ("Securebits", "set", constants.SECUREBITS),
        ("Namespaces", "unshare", constants.NAMESPACES),
    ):
        definitions[kind]["properties"][key]["items"] = {"enum": sorted(table)}
    definitions["Profile"]["properties"]["limits"]["propertyNames"] = {
        "enum": sorted(constants.LIMITS)
    }
    definitions["Rule"]["properties"]["errno"] = {
        "enum": ["", *sorted(constants.ERRNOS)],
        "default": "",
    }
    value = {"anyOf": [{"enum": sorted(constants.ARGUMENTS)}, {"pattern": f"^({NUMBER})$"}]}
    value["type"] = "string"  # type: ignore[assignment]
    for key, said in definitions["Argument"]["properties"].items():
        for each in said.get("anyOf", ()) if not key.startswith("users") else ():
            if each.get("type") == "array":
                each["items"] = value
            elif each.get("type") == "string":
                each.clear()
                each.update(value)


def _schema(_: argparse.Namespace) -> int:
    print(msgspec.json.format(msgspec.json.encode(schema(), order="sorted")).decode())
    return 0
