"""`kbusctl explain`: why the kernel ended a process, or told it no, from its line in the kernel log.

The line (audit type 1326, seccomp(2)) tells the process, the architecture and the number of the call; not
the arguments.
"""

from __future__ import annotations

import argparse
import errno
import os
import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import msgspec
import pyseccomp

from kbusd.ctl.proposal import place
from kbusd.sandbox import above, profiles
from kbusd.sandbox.compile import ARCHITECTURES, conditions
from kbusd.sandbox.judge import condition

_LINE = re.compile(r"\btype=(?:1326|SECCOMP)\b")
_FIELD = re.compile(r"\b(pid|comm|arch|syscall|code)=(\"[^\"]*\"|\S+)")
_AUDIT_LOG = "/var/log/audit/audit.log"
# As ausearch -i says it.
_INTERPRETED = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7, "i386": 0x40000003}
_AUDIT = {0xC000003E: "x86-64", 0xC00000B7: "arm64"}  # AUDIT_ARCH_* of linux/audit.h
_X32 = 0x40000000
_ERRNO = 0x00050000  # SECCOMP_RET_ERRNO of linux/seccomp.h


class Refused(msgspec.Struct, frozen=True):
    """What one line tells. `arch`: as in audit.h. `softly`: with an errno, and the process lives."""

    pid: int
    comm: str
    arch: int
    number: int
    softly: bool = False


def add_to(commands: Any) -> None:
    """The command `explain`."""
    command = commands.add_parser(
        "explain",
        help="why a process died by SIGSYS, or was told no, from the line in the kernel log",
    )
    command.add_argument(
        "line", nargs="*", help="the line; by default standard input, or the kernel log"
    )
    command.add_argument("--pid", type=int, help="only what this process was refused")
    command.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    if options.line:
        lines = [" ".join(options.line)]
    elif sys.stdin.isatty() or options.pid is not None:
        lines = list(_logs())
    else:
        lines = list(sys.stdin)
    refusals = [refusal for line in lines if (refusal := parse(line)) is not None]
    refusals = [refusal for refusal in refusals if options.pid in (None, refusal.pid)]
    titles = {profiles.load(name).title: name for name in profiles.names()}
    ours = [refusal for refusal in refusals if refusal.comm in titles]
    alike: dict[tuple[str, int, int, bool], list[Refused]] = {}
    for refusal in ours:
        kind = (refusal.comm, refusal.arch, refusal.number, refusal.softly)
        alike.setdefault(kind, []).append(refusal)
    for refusals in alike.values():
        more = f" and {len(refusals) - 1} more like it" if len(refusals) > 1 else ""
        profile = profiles.load(titles[refusals[0].comm])
        print("\n".join(explain(refusals[-1], profile, more)))
    if not ours:
        if options.pid is not None:
            print(
                f"no line of what process {options.pid} was refused in the kernel log (any more) or"
                f" {_AUDIT_LOG}; the log of the bus says how it ended. If auditd writes elsewhere:"
                f" ausearch -m SECCOMP --raw -p {options.pid} | kbusctl explain"
            )
            return 1
        of_others = ", ".join(sorted({refusal.comm for refusal in refusals}))
        print(
            f"no line tells of a process of kbusd{f', but of {of_others}' if of_others else ''};"
            " a line has type=1326, comm= and syscall="
        )
    return 0 if ours else 1


def parse(line: str) -> Refused | None:
    """None if it is not such a line."""
    fields = {key: value.strip('"') for key, value in _FIELD.findall(line)}
    if not _LINE.search(line) or not {"comm", "syscall"} <= fields.keys():
        return None
    try:
        arch, call, code = fields.get("arch", "0"), fields["syscall"], fields.get("code", "0")
        known = _INTERPRETED.get(arch)
        return Refused(
            int(fields.get("pid", "0")),
            fields["comm"],
            int(arch, 16) if known is None else known,
            int(call) if call.isdecimal() else _number(call, known),
            code == "errno" or (code.startswith("0x") and int(code, 16) == _ERRNO),
        )
    except ValueError:
        return None


def _number(call: str, arch: int | None) -> int:
    """Of a call that is told by name. Raises ValueError."""
    if arch not in _AUDIT:
        return 0  # what it is called there does not matter
    number = int(pyseccomp.resolve_syscall(ARCHITECTURES[_AUDIT[arch]], call))
    if number < 0:
        raise ValueError(call)
    return number


def explain(refusal: Refused, profile: profiles.Profile, more: str = "") -> Iterator[str]:
    """In words, with what to do. `more`: how many were refused the same."""
    arch = _AUDIT.get(refusal.arch, "")
    who = f"{refusal.comm} (pid {refusal.pid}{more})"
    if not arch or (arch == "x86-64" and refusal.number & _X32):
        yield f"{who} made call {refusal.number} of another architecture ({refusal.arch:#x})."
        yield "  No library does so by itself: it is an attack, or a program for another machine."
        return
    try:
        call = bytes(pyseccomp.resolve_syscall(ARCHITECTURES[arch], refusal.number)).decode()
    except ValueError:
        yield f"{who} made call {refusal.number}, which is newer than this libseccomp: no profile can name it."
        yield "  A newer libseccomp can. Till then, have the library that makes it do without, if it can."
        return
    if refusal.softly:
        yield f"{who}: {call} ({refusal.number}) was answered with an error, and the process went on."
        for rule in profile.seccomp.rules if profile.seccomp else ():
            if rule.errno and call in rule.calls and rule.when in conditions(arch=arch):
                yield f"  {rule.errno}, by {rule.origin}: {rule.why}"
        yield "  A library that probes does no harm. A worker that asks again and again may be taken over."
        return
    here = conditions(arch=arch)
    seccomp = profile.seccomp
    if seccomp is None or not seccomp.enabled:
        yield f"{who}: {call} ({refusal.number}) was refused, but profile {profile.name} has no filter."
        yield "  It was one from above: of a container, or of the service manager (SystemCallFilter=)."
        return
    over = above.rules_above(profile, call, here)
    if over and any(call in rule.calls and not rule.arguments for rule in seccomp.rules):
        yield f"{who}: {call} ({refusal.number}) is in profile {profile.name} ({profile.files[0]}),"
        yield f"  but profile {over[0]}, whose filter is above, {above.says(call, over[1])}."
        yield f"  A call must pass both: say it in {profiles.OVERRIDES / over[0]}.toml, too, and start the bus again."
        return
    yield f"{who}: {call} ({refusal.number}) is not in profile {profile.name} ({profile.files[0]})."
    near = [rule for rule in seccomp.rules if call in rule.calls and rule.when in here]
    for rule in near:
        tests = " and ".join(map(condition, rule.arguments)) or "always"
        yield (
            f"  allowed if {tests}: {rule.origin}"
            if not rule.errno
            else (f"  {rule.errno} if {tests}: {rule.origin}")
        )
    if any(not rule.arguments for rule in near):
        yield "  The profile allows it now: it was changed since, or a filter above this one killed."
        return
    if removals := profiles.removals(profile, call):
        for removal in removals:
            yield f"  Its rule was removed by {removal.origin}: {removal.why}"
        yield "  If a library has reason to call it, take that out, or have a rule in its place, with"
        yield '  errno = "EACCES" if it only probes. Without such a reason it is a bug or an attack.'
        return
    file, head = place(profile)
    if near:
        yield "  It came with other arguments; the kernel does not say which. `kbusctl profile learn` does."
        yield f"  If they are right, replace the rules for {call} in {file}"
    else:
        yield f"  If a library has reason to call it, add it in {file}"
    yield from (f"      {line}" for line in head)
    for arguments in [rule.arguments for rule in near if not rule.errno] or [()]:
        yield "      [[seccomp.rules]]"
        yield '      why = "who calls it, when, and why that is harmless"'
        yield f'      calls = ["{call}"]'
        if arguments:
            yield "      # As it is now: add what is right. Without it, any arguments would be."
            yield f"      arguments = [{', '.join(map(profiles.written, arguments))}]"
    yield '  with errno = "EACCES" if it only probes. Without such a reason it is a bug or an attack.'
    if over:
        yield f"  Profile {over[0]}, whose filter is above, {above.says(call, over[1])}."
        yield f"  A call must pass both: the same for {profiles.OVERRIDES / over[0]}.toml."


def _logs() -> Iterator[str]:
    """Where auditd runs, the kernel tells it, and not its own log. Raises OSError."""
    yield from _kernel_log()
    with suppress(OSError), open(_AUDIT_LOG, errors="replace") as log:
        yield from log


def _kernel_log() -> Iterator[str]:
    """Lines of the kernel log, all that there are. Raises OSError."""
    log = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        while True:
            try:
                yield os.read(log, 8192).decode(errors="replace")
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno != errno.EPIPE:  # overwritten meanwhile; what follows is there
                    raise
    finally:
        os.close(log)
