"""Every rule of every profile, in a real process: with arguments that it allows the call is made, with
altered ones the process dies, or gets what another rule says of those.

Vectors are made from the rules, so that a new rule is tested as soon as it is written. All else of a call
is -1: no descriptor, no address, no process, too long; so calls that are made do nothing.
"""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import pyseccomp  # type: ignore[import-untyped]
import pytest

from kbusd.sandbox import constants, profiles
from kbusd.sandbox.above import ABOVE
from kbusd.sandbox.compile import ARCHITECTURES, compile_profile, conditions
from kbusd.sandbox.judge import ALLOW, KILL, judge
from tests.unit.sandbox import bpf
from tests.unit.sandbox.child import run
from tests.unit.sandbox.test_filters import FILTERED, number, raw

ALL = (1 << 64) - 1
HIGH = 1 << 32
# What would do something with -1 for all else, or what would get the rule's errno from anybody.
INSTEAD: dict[str, tuple[int, ...]] = {
    "clone": (17, 0, 0, 0, 0, 0),
    "fork": (0,) * 6,
    "prctl": (3, 0, 0, 0, 0, 0),  # PR_GET_DUMPABLE
}
# By itself it returns to anywhere, and what is called there next is chance; the zygote makes it properly each
# time that a worker ends.
NOWHERE = "rt_sigreturn"
FORKS = ("clone", "fork", "vfork")


COMPILED = {
    (name, selinux): compile_profile(profiles.load(name), selinux=selinux)
    for name in FILTERED
    for selinux in (False, True)
}


def rules(name: str) -> Iterator[tuple[profiles.Rule, str, bool]]:
    """Those for this architecture, call by call; and whether as on a system with SELinux."""
    seccomp = profiles.load(name).seccomp
    assert seccomp is not None
    for rule in seccomp.rules:
        selinux = rule.when == "selinux"
        if rule.when in conditions(selinux):
            calls = (call for call in rule.calls if number(call) >= 0 and call != NOWHERE)
            yield from ((rule, call, selinux) for call in calls)


def bits(names: tuple[str, ...]) -> int:
    whole = 0
    for each in names:
        whole |= constants.ARGUMENTS[each]
    return whole


def satisfying(argument: profiles.Argument) -> list[int]:
    if argument.equals is not None:
        return [bits(argument.equals)]
    if argument.one_of is not None:
        return [constants.ARGUMENTS[each] for each in argument.one_of]
    if argument.without is not None:
        return [0, ALL & ~bits(argument.without) & 0x7F]
    if argument.including is not None:
        return [bits(argument.including)]
    if argument.users is not None:
        return [argument.users, argument.users + 65535]
    assert argument.not_equals is not None
    return [constants.ARGUMENTS[argument.not_equals] ^ 1]


def altered(argument: profiles.Argument) -> set[int]:
    """Values close to what the condition wants, with too many bits, or that mean something else."""
    near = set()
    for value in satisfying(argument):
        near |= {value ^ 1, value | HIGH, value + 1, (value | 0x80) & ALL}
    names = argument.equals or argument.one_of or argument.without or argument.including or ()
    near |= {constants.ARGUMENTS[each] for each in names}
    if argument.not_equals is not None:
        near.add(constants.ARGUMENTS[argument.not_equals])
    return near | {0, 1, 4, 8, 0x1000, ALL}


def vectors(rule: profiles.Rule, call: str) -> tuple[list[list[int]], list[list[int]]]:
    """Arguments that the rule is for, and others."""
    base = list(INSTEAD.get(call, (ALL,) * 6))
    good = []
    for values in itertools.product(*map(satisfying, rule.arguments)):
        vector = base.copy()
        for argument, value in zip(rule.arguments, values, strict=True):
            vector[argument.index] = value | (17 if call == "clone" else 0)
        good.append(vector)
    bad = []
    for argument in rule.arguments:
        for value in sorted(altered(argument)):
            bad.append([*good[0][: argument.index], value, *good[0][argument.index + 1 :]])
    return good, bad


def expected(name: str, selinux: bool, call: str, vector: list[int]) -> str:
    """What the rules say, those of all filters that are in force together: the strictest."""
    said = [
        judge(profiles.load(each), call, vector, conditions(selinux)).action
        for each in (name, ABOVE.get(name, name))
    ]
    if KILL in said:
        return KILL
    return next((each for each in said if each != ALLOW), ALLOW)


def attempt(name: str, selinux: bool, call: str, vector: list[int]) -> str:
    """What becomes of it: kill, allow, or the errno (which an allowed call may have, too)."""

    def work() -> int:
        result = raw(call, *vector)
        if call in FORKS and result == 0:
            os._exit(0)  # the child
        return result

    before = COMPILED[ABOVE[name], selinux] if name in ABOVE else None
    outcome = run(work, COMPILED[name, selinux], before=before)
    if outcome.by_filter:
        return KILL
    value = int(outcome.said) if outcome.said.lstrip("-").isdigit() else 0
    return errno.errorcode.get(-value, ALLOW) if value < 0 else ALLOW


CASES = [(name, *each) for name in FILTERED for each in rules(name)]


def _label(value: object) -> str:
    if isinstance(value, profiles.Rule):
        return os.path.basename(value.origin)
    return str(value)


@pytest.mark.parametrize(("name", "rule", "call", "selinux"), CASES, ids=_label)
def test_a_rule_does_what_it_says_and_nothing_more(
    name: str, rule: profiles.Rule, call: str, selinux: bool
) -> None:
    good, bad = vectors(rule, call)
    for vector in good:
        said, found = (each(name, selinux, call, vector) for each in (expected, attempt))
        assert said == (rule.errno or ALLOW), "no other rule says otherwise, nor the filter above"
        assert found == said if rule.errno else found != KILL, (vector, found)
    refused = 0
    for vector in bad:
        said = expected(name, selinux, call, vector)
        if said == ALLOW:
            continue  # some way of being altered is within the rule, or another's
        refused += 1
        assert attempt(name, selinux, call, vector) == said, vector
    assert refused or not rule.arguments, "some altered arguments are refused"


# Of each kind of condition: what it allows, and what ends the process. Numbers as they are, so that no code of
# ours says what is right.
KINDS = [
    ('equals = ["O_NONBLOCK"]', [0o4000], [0, 0o4001, 0o4000 | HIGH, 0o6000, 0o3777, ALL]),
    ('equals = ["0x10", "0x2"]', [0x12], [0, 0x10, 2, 0x13, 0x16, 0x12 | HIGH, ALL]),
    ('one-of = ["0x10", "0x2"]', [0x10, 2], [0, 0x12, 1, 3, 0x11, 0x10 | HIGH, 2 | 1 << 63, ALL]),
    ('not-equals = "0x10"', [0, 0x11, 0x10 | HIGH, ALL], [0x10]),
    ('without = ["0x10", "0x2"]', [0, 1, HIGH, ALL & ~0x12], [0x10, 2, 0x12, 3, 0x10 | HIGH, ALL]),
    ('including = ["0x10", "0x2"]', [0x12, 0x13, 0x12 | HIGH, ALL], [0, 0x10, 2, 0x11, HIGH]),
    ("users = 131072", [131072, 196607], [0, 131071, 196608, 65536, 131072 | HIGH, ALL]),
]


@pytest.mark.parametrize(("condition", "good", "bad"), KINDS, ids=[kind[0] for kind in KINDS])
@pytest.mark.parametrize("index", [0, 5])
def test_of_each_kind_of_condition_altered_values_die(
    tmp_path: Path, condition: str, good: list[int], bad: list[int], index: int
) -> None:
    """What was expected came from the code that made the filter: compiled wrongly, a condition passed all tests."""
    file = tmp_path / "own.toml"
    file.write_text(
        'extends = "worker"\nwhy = "one call more"\n[seccomp]\nwhy = "one call more"\n'
        # Which looks at no arguments.
        '[[seccomp.rules]]\nwhy = "for the test"\ncalls = ["getppid"]\n'
        f"arguments = [{{ index = {index}, {condition} }}]\n"
    )
    profile = profiles.load_file(file)
    compiled = compile_profile(profile, selinux=False)
    elsewhere = compile_profile(profile, selinux=False, arch="arm64").bpf
    for value, allowed in [*((each, True) for each in good), *((each, False) for each in bad)]:
        vector = [0] * 6
        vector[index] = value
        outcome = run(lambda vector=vector: raw("getppid", *vector), compiled)  # type: ignore[misc]
        assert outcome.by_filter != allowed, hex(value)
        number = pyseccomp.resolve_syscall(ARCHITECTURES["arm64"], "getppid")
        said = bpf.run(elsewhere, 0xC00000B7, number, vector)
        assert (said == bpf.ALLOW) == allowed, hex(value)
        judged = judge(profile, "getppid", vector, conditions(False)).action
        assert (judged == ALLOW) == allowed, hex(value)


# What libc calls on arm64 in place of what that has not, as the kernel's generic table of calls leaves out what
# a newer call does as well.
GENERIC = {"epoll_wait": "epoll_pwait", "poll": "ppoll"}


@pytest.mark.parametrize("selinux", [False, True])
@pytest.mark.parametrize("name", FILTERED)
def test_what_our_traffic_needs_is_allowed_on_arm64(name: str, selinux: bool) -> None:
    """Rules that are not kept for others are those that it uses (tests/bus/test_learn.py); by these calls, or theirs."""
    program = compile_profile(profiles.load(name), selinux=selinux, arch="arm64").bpf
    seccomp = profiles.load(name).seccomp
    assert seccomp is not None
    tried = set()
    for rule in seccomp.rules:
        if rule.why.startswith("Kept") or rule.errno or rule.when not in conditions(selinux):
            continue
        for call in rule.calls:
            there = pyseccomp.resolve_syscall(ARCHITECTURES["arm64"], call)
            if there < 0:
                there = pyseccomp.resolve_syscall(ARCHITECTURES["arm64"], GENERIC[call])
            for vector in vectors(rule, call)[0]:
                said = bpf.run(program, 0xC00000B7, there, vector)
                assert said == bpf.ALLOW, (call, vector, hex(said))
            tried.add(call)
    assert {"recvmsg", "epoll_wait", "close", "mmap"} <= tried


def test_supervisor_and_launcher_have_no_filter_and_say_why() -> None:
    for name in set(profiles.names()) - set(FILTERED):
        seccomp = profiles.load(name).seccomp
        assert name in ("supervisor", "launcher") and seccomp is not None
        assert not seccomp.rules and len(seccomp.why) > 40
