"""Profile -> Compiled: names to numbers, seccomp rules to BPF (libseccomp by way of pyseccomp).

Done once by the supervisor at start, and by kbusctl to know what to expect. Reads the profile
files and the user database; trusts both. Changes nothing of the calling process.
"""

from __future__ import annotations

import difflib
import grp
import itertools
import os
import pwd
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress

import pyseccomp

from kbusd.sandbox import constants, profiles
from kbusd.sandbox.compiled import USERS, Compiled, Limit, Path, decode, encode
from kbusd.sandbox.errors import ProfileError
from kbusd.sandbox.selinux import enabled as selinux_enabled
from kbusd.sandbox.selinux import knows as selinux_knows
from kbusd.sandbox.users import there

__all__ = [
    "Compiled",
    "compile_all",
    "compile_profile",
    "decode",
    "encode",
]

ARCHITECTURES = {"x86-64": pyseccomp.Arch.X86_64, "arm64": pyseccomp.Arch.AARCH64}
_NATIVE = pyseccomp.system_arch()
_TREE = 2  # seccomp_attr_set(3): SCMP_FLTATR_CTL_OPTIMIZE
_UNKNOWN_CALL = -1  # seccomp_syscall_resolve_name(3): __NR_SCMP_ERROR
_MOST_CALLS = 600  # numbers are below it
_ALL = (1 << 64) - 1
NUMBER = "0x[0-9a-fA-F]{1,16}|[0-9]{1,19}"
"""A value of an argument that has no name here."""


def compile_all(user: str | None = None) -> dict[str, Compiled]:
    """Every profile that a process has, by name. Raises ProfileError. `user` as in compile_profile."""
    loaded = [profiles.load(name) for name in profiles.names()]
    profiles.same_title(loaded)
    return {profile.name: compile_profile(profile, user=user) for profile in loaded}


def conditions(selinux: bool | None = None, arch: str = "") -> frozenset[str]:
    """What a rule's `when` may say to apply here: by default on this system and architecture."""
    selinux = selinux_enabled() if selinux is None else selinux
    return frozenset({"always", "selinux" if selinux else "no-selinux", arch or native()})


def native() -> str:
    """The architecture of this machine, as profiles name it; "" if they do not."""
    return next((name for name, number in ARCHITECTURES.items() if number == _NATIVE), "")


def compile_profile(
    profile: profiles.Profile,
    *,
    user: str | None = None,
    selinux: bool | None = None,
    arch: str = "",
) -> Compiled:
    """Resolve all names and build the filter.

    `user`: from the bus configuration, preferred to the profile's own where that changes user at
    all. `selinux`: whether the rules for SELinux systems apply; by default found out. `arch`: what
    the filter is for, of ARCHITECTURES; by default this machine.
    Raises ProfileError for a name that nothing has, or a required user that does not exist."""
    found_out = selinux is None
    selinux = selinux_enabled() if selinux is None else selinux
    here = conditions(selinux, arch)
    notes: list[str] = []
    required = {
        section.replace("_", "-")
        for section in profiles.SECTIONS
        if _enabled(profile, section) and getattr(profile, section).required
    }
    uid = gid = apart = groups = capabilities = bounding = None
    if _enabled(profile, "user") and profile.user and profile.user.names:
        wanted = (user, *profile.user.names) if user else profile.user.names
        uid, gid = _user(profile.user.origin, wanted, profile.user.required, notes)
        if profile.user.apart and not (
            apart := there(profile.user.apart, profile.user.apart_inside)
        ):
            missing = profile.user.apart_inside or profile.user.apart
            notes.append(f"its children share a user: there is no user {missing} in this namespace")
    if _enabled(profile, "groups") and profile.groups:
        groups = tuple(_group(profile.groups.origin, name) for name in profile.groups.keep)
    if _enabled(profile, "capabilities") and profile.capabilities:
        at = profile.capabilities.origin
        capabilities = _bits(
            at, "capabilities.keep", profile.capabilities.keep, constants.CAPABILITIES, shift=True
        )
        if profile.user and profile.user.apart and not apart:
            capabilities &= ~(1 << constants.CAPABILITIES["setuid"])  # kept for that
        bounding = {"keep-only": capabilities, "none": 0}.get(profile.capabilities.bounding)
    securebits = 0
    if _enabled(profile, "securebits") and profile.securebits:
        at = profile.securebits.origin
        securebits = _bits(at, "securebits.set", profile.securebits.set, constants.SECUREBITS)
    unshare = 0
    if _enabled(profile, "namespaces") and profile.namespaces:
        at = profile.namespaces.origin
        unshare = _bits(at, "namespaces.unshare", profile.namespaces.unshare, constants.NAMESPACES)
    landlock = None
    if _enabled(profile, "landlock") and profile.landlock:
        landlock = tuple(Path(p.path, p.write) for p in profile.landlock.paths if p.when in here)
    domain = ""
    if selinux and _enabled(profile, "selinux") and profile.selinux:
        domain = profile.selinux.type
        if found_out and not selinux_knows(domain):
            notes.append(f"SELinux's policy has no domain {domain}: install the module kbus.pp")
            domain = ""
        if not _of_the_machine():
            required.discard("selinux")
    bpf = b""
    if _enabled(profile, "seccomp") and profile.seccomp:
        for name, calls in profile.seccomp.sets.items():  # used or not
            file, line = profiles.where(calls.origin)
            for call in calls.calls:
                _refuse_unknown(call, file, f"seccomp.sets.{name}", line)
        rules = [rule for rule in profile.seccomp.rules if rule.when in here]
        bpf = _filter(rules, ARCHITECTURES.get(arch, _NATIVE))
    return Compiled(
        name=profile.name,
        title=profile.title,
        files=profile.files,
        required=frozenset(required),
        notes=tuple(notes),
        uid=uid,
        gid=gid,
        apart=apart,
        groups=groups,
        capabilities=capabilities,
        bounding=bounding,
        securebits=securebits,
        no_new_privileges=_enabled(profile, "no_new_privileges"),
        not_dumpable=_enabled(profile, "not_dumpable"),
        limits=tuple(_limits(profile.limits)),
        unshare=unshare,
        landlock=landlock,
        selinux=domain,
        bpf=bpf,
    )


def _enabled(profile: profiles.Profile, section: str) -> bool:
    value = getattr(profile, section)
    return value is not None and bool(value.enabled)


def _of_the_machine() -> bool:
    """Whether we are its root, whom a policy can give domains; not a user, nor a container's root."""
    with open("/proc/self/uid_map") as users:
        return os.geteuid() == 0 and users.read().split() == ["0", "0", str((1 << 32) - 1)]


def _user(
    origin: str, wanted: Sequence[str], required: bool, notes: list[str]
) -> tuple[int | None, int | None]:
    for name in wanted:
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        if entry.pw_uid == 0:
            continue
        if name == "nobody":
            notes.append("runs as nobody, whom other services may share: add a system user kbusd")
        return entry.pw_uid, entry.pw_gid
    problem = f"none of the users {', '.join(wanted)} exists (root does not count)"
    if required:
        file, line = profiles.where(origin)
        raise ProfileError(file, "user.names", problem, "add a system user kbusd", line)
    notes.append(problem)
    return None, None


def _group(origin: str, name: str) -> int:
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        file, line = profiles.where(origin)
        hint = "add it (groupadd(8)), or leave it out"
        raise ProfileError(file, "groups.keep", f"there is no group {name}", hint, line) from None


def _limits(limits: Mapping[str, profiles.Limit]) -> Iterable[Limit]:
    for name, limit in limits.items():
        if limit.enabled:
            file, line = profiles.where(limit.origin)
            number = _lookup(file, f"limits.{name}", name, constants.LIMITS, line)
            value = -1 if limit.value == "raise-to-hard" else int(limit.value)
            yield Limit(name, number, value, limit.required)


def _bits(
    origin: str, key: str, names: Iterable[str], table: Mapping[str, int], shift: bool = False
) -> int:
    bits = 0
    file, line = profiles.where(origin)
    for name in names:
        number = _lookup(file, key, name, table, line)
        bits |= 1 << number if shift else number
    return bits


def _lookup(file: str, key: str, name: str, table: Mapping[str, int], line: int = 0) -> int:
    try:
        return table[name]
    except KeyError:
        close = difflib.get_close_matches(name, table, 1, 0.5)
        hint = f"did you mean `{close[0]}`?" if close else f"known are {', '.join(table)}"
        if table is constants.ARGUMENTS and not close:
            hint = 'kbusd-profile(5) has the names; a number does as well: "0x5401"'
        raise ProfileError(file, key, f"`{name}` is not known", hint, line) from None


def _argument(file: str, key: str, name: str, line: int) -> int:
    """A name of the C headers, or a number that has none here."""
    if re.fullmatch(NUMBER, name):
        return int(name, 0)
    return _lookup(file, key, name, constants.ARGUMENTS, line)


def _all_calls() -> list[str]:
    """Every system call of this machine, for hints."""
    found = []
    for number in range(_MOST_CALLS):
        with suppress(ValueError):  # there is none
            name = pyseccomp.resolve_syscall(_NATIVE, number)
            found.append(name.decode() if isinstance(name, bytes) else name)
    return found


def _refuse_unknown(call: str, file: str, key: str, line: int) -> None:
    """Raises ProfileError if no architecture has this call."""
    if pyseccomp.resolve_syscall(_NATIVE, call) == _UNKNOWN_CALL:
        problem = f"`{call}` is no system call that libseccomp knows"
        close = difflib.get_close_matches(call, _all_calls(), 1, 0.5)
        hint = f"did you mean `{close[0]}`?" if close else "see syscalls(2)"
        raise ProfileError(file, key, problem, hint, line)


def _filter(rules: Sequence[profiles.Rule], arch: int) -> bytes:
    """The BPF program. Architecture first (libseccomp does so), default and foreign: kill.

    A tree by the call's number and no list: when a filter is loaded, the kernel runs it once for every call there
    is, to find those that it need not ask about later. With a list that took most of the time."""
    program = pyseccomp.SyscallFilter(pyseccomp.KILL_PROCESS)
    program.set_attr(pyseccomp.Attr.ACT_BADARCH, pyseccomp.KILL_PROCESS)
    program.set_attr(pyseccomp.Attr.CTL_OPTIMIZE, _TREE)
    if arch != _NATIVE:
        program.add_arch(arch)
        program.remove_arch(_NATIVE)
    _refuse_two_answers(rules)
    unconditional: dict[str, int] = {}
    seen: set[str] = set()
    for rule in rules:
        key = f"seccomp.rules ({', '.join(rule.calls)})"
        file, line = profiles.where(rule.origin)
        action = pyseccomp.ALLOW
        if rule.errno:
            action = pyseccomp.ERRNO(_lookup(file, key, rule.errno, constants.ERRNOS, line))
        tests = [comparisons(rule, argument) for argument in rule.arguments]
        indices = [argument.index for argument in rule.arguments]
        if twice := {index for index in indices if indices.count(index) > 1}:
            problem = f"argument {twice.pop()} has two conditions"
            hint = "a rule has one condition for each argument; say it in one, or have two rules"
            raise ProfileError(file, f"{key}.arguments", problem, hint, line)
        choices = [[pyseccomp.Arg(*each) for each in alternatives] for alternatives in tests]
        for call in rule.calls:
            _refuse_unknown(call, file, key, line)
            if call in unconditional or (call in seen and not choices):
                # libseccomp lets the unconditional rule win without a word.
                raise ProfileError(
                    file,
                    key,
                    f"`{call}` has a rule without arguments and another one",
                    "remove one: the one without arguments would silently win",
                    line,
                )
            seen.add(call)
            if pyseccomp.resolve_syscall(arch, call) < 0:
                continue  # not on this architecture: there is nothing to allow
            if not choices:
                unconditional[call] = action
                program.add_rule(action, call)
            for combination in itertools.product(*choices):
                if combination:
                    try:
                        program.add_rule_exactly(action, call, *combination)
                    except OSError as error:
                        problem = (
                            f"libseccomp does not take the rule for `{call}`: {error.strerror}"
                        )
                        hint = "is there one with the same conditions?"
                        raise ProfileError(file, key, problem, hint, line) from None
    return export_bpf(program)


def _refuse_two_answers(rules: Sequence[profiles.Rule]) -> None:
    """Raises ProfileError if for some arguments two rules of a call say different things: which counts, nobody said."""
    of: dict[str, list[profiles.Rule]] = {}
    for rule in rules:
        for call in rule.calls:
            for other in of.setdefault(call, []):
                if other.errno != rule.errno and rule.arguments and other.arguments:
                    _refuse_if_both_hold(call, other, rule)
            of[call].append(rule)


def _refuse_if_both_hold(call: str, a: profiles.Rule, b: profiles.Rule) -> None:
    conditions = {each.index: comparisons(a, each) for each in a.arguments}
    for argument in b.arguments:
        others = conditions.get(argument.index)
        ways = itertools.product(others or (), comparisons(b, argument))
        if others is not None and not any(_both(one, two) for one, two in ways):
            return
    file, line = profiles.where(b.origin)
    said = " and ".join(rule.errno or "allow" for rule in (a, b))
    raise ProfileError(
        file,
        f"seccomp.rules ({call})",
        f"some arguments fulfil this rule and that of {a.origin}, but they say {said}",
        "give one argument conditions in both that exclude each other: equals here, not-equals there",
        line,
    )


def _both(one: Comparison, two: Comparison) -> bool:
    """Whether there is a value for which both hold."""
    (mask, value, unlike), (other_mask, other, other_unlike) = map(_masked, (one, two))
    if unlike and other_unlike:
        return True
    if unlike or other_unlike:
        return (mask & other_mask) != _ALL or value != other
    return (value ^ other) & mask & other_mask == 0


def _masked(comparison: Comparison) -> tuple[int, int, bool]:
    """Mask and value, and whether these must differ."""
    if len(comparison) == 4:
        return comparison[2], comparison[3], False
    return _ALL, comparison[2], comparison[1] == pyseccomp.NE


Comparison = tuple[int, int, int] | tuple[int, int, int, int]
"""As seccomp_rule_add(3) has it: argument, operator, and a value, or a mask and a value."""


def comparisons(rule: profiles.Rule, argument: profiles.Argument) -> list[Comparison]:
    """The alternatives by which a condition holds (a filter rule is a conjunction).

    Raises ProfileError."""
    key = f"seccomp.rules ({', '.join(rule.calls)}).arguments"
    file, line = profiles.where(rule.origin)
    given = [
        kind
        for kind in ("equals", "one_of", "not_equals", "without", "including", "users")
        if getattr(argument, kind) is not None
    ]
    if len(given) != 1:
        problem = (
            f"argument {argument.index} needs exactly one of equals, one-of, not-equals, without,"
            " including, users"
        )
        hint = "without any the argument need not be named; of two, make two rules"
        raise ProfileError(file, key, problem, hint, line)
    if argument.users is not None:
        first, count = there(argument.users, argument.users_inside) or (argument.users, USERS)
        return [(argument.index, pyseccomp.MASKED_EQ, (1 << 64) - count, first)]
    value = getattr(argument, given[0])
    names = (value,) if isinstance(value, str) else value
    if not names and given[0] != "equals":
        problem = f"{given[0].replace('_', '-')} of argument {argument.index} is empty"
        hint = "it would hold never, or always: name what it is about, or leave the condition out"
        raise ProfileError(file, key, problem, hint, line)
    values = [_argument(file, key, name, line) for name in names]
    bits = 0
    for value in values:
        bits |= value
    index = argument.index
    match given[0]:
        case "equals":
            return [(index, pyseccomp.EQ, bits)]
        case "one_of":
            return [(index, pyseccomp.EQ, value) for value in values]
        case "not_equals":
            return [(index, pyseccomp.NE, bits)]
        case "without":
            return [(index, pyseccomp.MASKED_EQ, bits, 0)]
        case _:
            return [(index, pyseccomp.MASKED_EQ, bits, bits)]


def export_bpf(program: pyseccomp.SyscallFilter) -> bytes:
    """An array of struct sock_filter."""
    with os.fdopen(os.memfd_create("kbusd-bpf", os.MFD_CLOEXEC), "rb") as file:
        program.export_bpf(file)
        file.seek(0)
        return file.read()
