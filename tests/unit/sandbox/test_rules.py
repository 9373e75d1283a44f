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

import pytest

from kbusd.sandbox import constants, profiles
from kbusd.sandbox.compile import compile_profile, conditions
from kbusd.sandbox.judge import ALLOW, KILL, judge
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
# A worker's filter is loaded over the zygote's: a call must pass both.
UNDER = {"worker": "zygote", "kdbus-worker": "zygote"}


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
        for each in (name, UNDER.get(name, name))
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

    before = COMPILED[UNDER[name], selinux] if name in UNDER else None
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


def test_supervisor_and_launcher_have_no_filter_and_say_why() -> None:
    for name in set(profiles.names()) - set(FILTERED):
        seccomp = profiles.load(name).seccomp
        assert name in ("supervisor", "launcher") and seccomp is not None
        assert not seccomp.rules and len(seccomp.why) > 40
