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
from collections.abc import Iterable, Mapping, Sequence

import pyseccomp

from kbusd.sandbox import constants, profiles
from kbusd.sandbox.compiled import Compiled, Limit, Path, decode, encode
from kbusd.sandbox.errors import ProfileError

__all__ = [
    "Compiled",
    "compile_all",
    "compile_profile",
    "decode",
    "encode",
    "selinux_enabled",
]

_SELINUX = "/sys/fs/selinux/enforce"
_LABEL = "/proc/thread-self/attr/current"
_UNKNOWN_CALL = -1  # seccomp_syscall_resolve_name(3): __NR_SCMP_ERROR


def selinux_enabled() -> bool:
    """Whether this kernel has SELinux and a policy: until one is loaded, we are plain `kernel`."""
    if not os.path.exists(_SELINUX):
        return False
    try:
        with open(_LABEL, encoding="utf-8") as file:
            return ":" in file.read()
    except OSError:
        return True  # it does not say; then what the profiles want of it is tried, and told of


def compile_all(user: str | None = None) -> dict[str, Compiled]:
    """Every profile there is, by name. Raises ProfileError. `user` as in compile_profile."""
    return {name: compile_profile(profiles.load(name), user=user) for name in profiles.names()}


def compile_profile(
    profile: profiles.Profile, *, user: str | None = None, selinux: bool | None = None
) -> Compiled:
    """Resolve all names and build the filter.

    `user`: from the bus configuration, preferred to the profile's own where that changes user at
    all. `selinux`: whether the rules for SELinux systems apply; by default found out.
    Raises ProfileError for a name that nothing has, or a required user that does not exist."""
    file = profile.files[0]
    selinux = selinux_enabled() if selinux is None else selinux
    conditions = {"always", "selinux" if selinux else "no-selinux"}
    notes: list[str] = []
    required = {
        section.replace("_", "-")
        for section in profiles._SECTIONS
        if _enabled(profile, section) and getattr(profile, section).required
    }
    uid = gid = groups = capabilities = bounding = None
    if _enabled(profile, "user") and profile.user and profile.user.names:
        wanted = (user, *profile.user.names) if user else profile.user.names
        uid, gid = _user(file, wanted, profile.user.required, notes)
    if _enabled(profile, "groups") and profile.groups:
        groups = tuple(_group(file, name) for name in profile.groups.keep)
    if _enabled(profile, "capabilities") and profile.capabilities:
        capabilities = _bits(
            file, "capabilities.keep", profile.capabilities.keep, constants.CAPABILITIES, shift=True
        )
        bounding = capabilities if profile.capabilities.bounding == "keep-only" else None
    securebits = 0
    if _enabled(profile, "securebits") and profile.securebits:
        securebits = _bits(file, "securebits.set", profile.securebits.set, constants.SECUREBITS)
    unshare = 0
    if _enabled(profile, "namespaces") and profile.namespaces:
        unshare = _bits(
            file, "namespaces.unshare", profile.namespaces.unshare, constants.NAMESPACES
        )
    landlock = None
    if _enabled(profile, "landlock") and profile.landlock:
        landlock = tuple(
            Path(p.path, p.write) for p in profile.landlock.paths if p.when in conditions
        )
    bpf = b""
    if _enabled(profile, "seccomp") and profile.seccomp:
        rules = [rule for rule in profile.seccomp.rules if rule.when in conditions]
        bpf = _filter(file, rules)
    return Compiled(
        name=profile.name,
        title=profile.title,
        files=profile.files,
        required=frozenset(required),
        notes=tuple(notes),
        uid=uid,
        gid=gid,
        groups=groups,
        capabilities=capabilities,
        bounding=bounding,
        securebits=securebits,
        no_new_privileges=_enabled(profile, "no_new_privileges"),
        not_dumpable=_enabled(profile, "not_dumpable"),
        limits=tuple(_limits(file, profile.limits)),
        unshare=unshare,
        landlock=landlock,
        selinux=profile.selinux.type
        if selinux and profile.selinux and profile.selinux.enabled
        else "",
        bpf=bpf,
    )


def _enabled(profile: profiles.Profile, section: str) -> bool:
    value = getattr(profile, section)
    return value is not None and bool(value.enabled)


def _user(
    file: str, wanted: Sequence[str], required: bool, notes: list[str]
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
        raise ProfileError(file, "user.names", problem, "add a system user kbusd")
    notes.append(problem)
    return None, None


def _group(file: str, name: str) -> int:
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        raise ProfileError(file, "groups.keep", f"there is no group {name}") from None


def _limits(file: str, limits: Mapping[str, profiles.Limit]) -> Iterable[Limit]:
    for name, limit in limits.items():
        if limit.enabled:
            number = _lookup(file, f"limits.{name}", name, constants.LIMITS)
            value = -1 if limit.value == "raise-to-hard" else int(limit.value)
            yield Limit(name, number, value, limit.required)


def _bits(
    file: str, key: str, names: Iterable[str], table: Mapping[str, int], shift: bool = False
) -> int:
    bits = 0
    for name in names:
        number = _lookup(file, key, name, table)
        bits |= 1 << number if shift else number
    return bits


def _lookup(file: str, key: str, name: str, table: Mapping[str, int]) -> int:
    try:
        return table[name]
    except KeyError:
        close = difflib.get_close_matches(name, table, 1, 0.5)
        hint = f"did you mean `{close[0]}`?" if close else f"known are {', '.join(table)}"
        raise ProfileError(file, key, f"`{name}` is not known", hint) from None


def _filter(file: str, rules: Sequence[profiles.Rule]) -> bytes:
    """The BPF program. Architecture first (libseccomp does so), default and foreign: kill."""
    program = pyseccomp.SyscallFilter(pyseccomp.KILL_PROCESS)
    program.set_attr(pyseccomp.Attr.ACT_BADARCH, pyseccomp.KILL_PROCESS)
    unconditional: dict[str, int] = {}
    seen: set[str] = set()
    for rule in rules:
        key = f"seccomp.rules ({', '.join(rule.calls)})"
        action = pyseccomp.ALLOW
        if rule.errno:
            action = pyseccomp.ERRNO(_lookup(file, key, rule.errno, constants.ERRNOS))
        choices = [_comparisons(file, key, argument) for argument in rule.arguments]
        for call in rule.calls:
            number = pyseccomp.resolve_syscall(pyseccomp.system_arch(), call)
            if number == _UNKNOWN_CALL:
                raise ProfileError(file, key, f"`{call}` is no system call that libseccomp knows")
            if call in unconditional or (call in seen and not choices):
                # libseccomp lets the unconditional rule win without a word.
                raise ProfileError(
                    file,
                    key,
                    f"`{call}` has a rule without arguments and another one",
                    "remove one: the one without arguments would silently win",
                )
            seen.add(call)
            if number < 0:
                continue  # not on this architecture: there is nothing to allow
            if not choices:
                unconditional[call] = action
                program.add_rule(action, call)
            for combination in itertools.product(*choices):
                if combination:
                    program.add_rule_exactly(action, call, *combination)
    return _export(program)


def _comparisons(file: str, key: str, argument: profiles.Argument) -> list[pyseccomp.Arg]:
    """The alternatives by which a condition holds (a filter rule is a conjunction)."""
    given = [
        kind
        for kind in ("equals", "one_of", "not_equals", "without", "including")
        if getattr(argument, kind) is not None
    ]
    if len(given) != 1:
        raise ProfileError(
            file,
            f"{key}.arguments",
            f"argument {argument.index} needs exactly one of equals, one-of, not-equals, without, including",
        )
    value = getattr(argument, given[0])
    names = (value,) if isinstance(value, str) else value
    values = [_lookup(file, f"{key}.arguments", name, constants.ARGUMENTS) for name in names]
    bits = 0
    for value in values:
        bits |= value
    index = argument.index
    match given[0]:
        case "equals":
            return [pyseccomp.Arg(index, pyseccomp.EQ, bits)]
        case "one_of":
            return [pyseccomp.Arg(index, pyseccomp.EQ, value) for value in values]
        case "not_equals":
            return [pyseccomp.Arg(index, pyseccomp.NE, bits)]
        case "without":
            return [pyseccomp.Arg(index, pyseccomp.MASKED_EQ, bits, 0)]
        case _:
            return [pyseccomp.Arg(index, pyseccomp.MASKED_EQ, bits, bits)]


def _export(program: pyseccomp.SyscallFilter) -> bytes:
    with os.fdopen(os.memfd_create("kbusd-bpf", os.MFD_CLOEXEC), "rb") as file:
        program.export_bpf(file)
        file.seek(0)
        return file.read()
