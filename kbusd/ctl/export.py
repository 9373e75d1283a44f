"""The system call filter of a profile in the words of other programs.

What another format can't say is said in a comment, never left out without a word; JSON has none, so of OCI's
`left_out` says it.
"""

from __future__ import annotations

import errno
import itertools
from collections.abc import Callable, Iterator

import msgspec
import pyseccomp

from kbusd.sandbox import profiles
from kbusd.sandbox.compile import Comparison, comparisons, conditions
from kbusd.sandbox.judge import condition

_OCI_ARCHITECTURES = {"x86-64": "SCMP_ARCH_X86_64", "arm64": "SCMP_ARCH_AARCH64"}
_LXC_ARCHITECTURES = {"x86-64": "x86_64", "arm64": "aarch64"}
# As lxc 5 makes filters (seccomp.c): nothing in its format says no to these.
_COMPAT = {
    "x86-64": (
        "LXC adds the same rules for programs of i386 and x32, which our own filter kills. To keep them out,",
        "have a kernel without CONFIG_IA32_EMULATION and CONFIG_X86_X32_ABI (or boot it with ia32_emulation=0)",
    ),
    "arm64": ("LXC adds the same rules for programs of 32-bit arm, which our own filter kills",),
}
_SYSTEMD_ARCHITECTURES = {"x86-64": "x86-64", "arm64": "arm64"}
_OPERATORS = {
    pyseccomp.EQ: "SCMP_CMP_EQ",
    pyseccomp.NE: "SCMP_CMP_NE",
    pyseccomp.MASKED_EQ: "SCMP_CMP_MASKED_EQ",
}


def _rules(profile: profiles.Profile, arch: str) -> Iterator[profiles.Rule]:
    here = conditions(arch=arch)
    seccomp = profile.seccomp
    if seccomp is not None and seccomp.enabled:
        yield from (rule for rule in seccomp.rules if rule.when in here)


def left_out(profile: profiles.Profile, arch: str) -> Iterator[str]:
    """In words: rules that hold with SELinux only, or without it only, and not on this machine."""
    here, seccomp = conditions(arch=arch), profile.seccomp
    for rule in seccomp.rules if seccomp is not None and seccomp.enabled else ():
        if rule.when not in here and rule.when not in _OCI_ARCHITECTURES:
            yield f"Not said here: {' '.join(rule.calls)}, only when {rule.when}: {rule.why}"


def _cases(rule: profiles.Rule) -> Iterator[tuple[Comparison, ...]]:
    """What must hold together; one of these is enough."""
    yield from itertools.product(*(comparisons(rule, argument) for argument in rule.arguments))


def oci(profile: profiles.Profile, arch: str) -> str:
    """linux.seccomp of the OCI runtime specification, as podman and runc take it."""
    syscalls = []
    for rule in _rules(profile, arch):
        for case in _cases(rule):
            said: dict[str, object] = {"names": list(rule.calls), "action": "SCMP_ACT_ALLOW"}
            if rule.errno:
                said |= {"action": "SCMP_ACT_ERRNO", "errnoRet": getattr(errno, rule.errno)}
            if case:
                said["args"] = [
                    {
                        "index": index,
                        "value": value,
                        "valueTwo": under[0] if under else 0,
                        "op": _OPERATORS[operator],
                    }
                    for index, operator, value, *under in case
                ]
            syscalls.append(said | {"comment": rule.why})
    made = {
        "defaultAction": "SCMP_ACT_KILL_PROCESS" if syscalls else "SCMP_ACT_ALLOW",
        "architectures": [_OCI_ARCHITECTURES[arch]],
        "syscalls": syscalls,
    }
    return msgspec.json.format(msgspec.json.encode(made)).decode()


def lxc(profile: profiles.Profile, arch: str) -> str:
    """For lxc.seccomp.profile (lxc.container.conf(5)), version 2."""
    lines = ["2", "allowlist kill", f"[{_LXC_ARCHITECTURES[arch]}]"]
    rules = list(_rules(profile, arch))
    if not rules:
        lines[1:] = ["denylist"]
    else:
        lines[2:2] = map("# {}".format, (*_COMPAT.get(arch, ()), *left_out(profile, arch)))
    for rule in rules:
        lines.append(f"# {rule.why}")
        action = f"errno {getattr(errno, rule.errno)}" if rule.errno else "allow"
        for call, case in itertools.product(rule.calls, list(_cases(rule))):
            tests = [
                f"[{index},{under[0]},{_OPERATORS[operator]},{value}]"
                if under
                else f"[{index},{value},{_OPERATORS[operator]}]"
                for index, operator, value, *under in case
            ]
            lines.append(" ".join((call, action, *tests)))
    return "\n".join(lines)


def systemd(profile: profiles.Profile, arch: str) -> str:
    """Lines for a unit (systemd.exec(5)). It knows no arguments, and one errno for all."""
    rules = list(_rules(profile, arch))
    lines = [f"SystemCallArchitectures={_SYSTEMD_ARCHITECTURES[arch]}"]
    lines += map("# {}".format, left_out(profile, arch))
    for rule in rules:
        lines.append(f"# {rule.why}")
        if rule.arguments:
            lines.append(f"# Not said here: only if {' and '.join(map(condition, rule.arguments))}")
        if rule.errno:
            lines.append(f"# Not said here: {rule.errno} for {' '.join(rule.calls)}")
        else:
            lines.append(f"SystemCallFilter={' '.join(rule.calls)}")
    return "\n".join(lines if rules else ["# no filter"])


FORMATS: dict[str, Callable[[profiles.Profile, str], str]] = {
    "oci": oci,
    "lxc": lxc,
    "systemd": systemd,
}
