"""Filters that stand over others: a worker is forked from the zygote, whose filter stays in force.

A call must pass both. So what one of these profiles allows is of no use if the other's does not. For kbusctl;
no process of the bus imports it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyseccomp

from kbusd.sandbox import profiles
from kbusd.sandbox.compile import ARCHITECTURES
from kbusd.sandbox.errors import ProfileError
from kbusd.sandbox.judge import ALLOW, KILL, Judgement, condition, judge, telling

ABOVE = {"worker": "zygote", "kdbus-worker": "zygote"}
_MOST = 4096  # vectors tried of one rule


def above(profile: profiles.Profile) -> profiles.Profile | None:
    """Whose filter is in force as well: in a directory that is not in force, the one beside it, if there is one.

    Raises ProfileError, OSError."""
    kinds = (ABOVE[stem] for file in profile.files if (stem := Path(file).stem) in ABOVE)
    if (name := next(kinds, "")) == "":
        return None
    beside = Path(profile.files[0]).with_name(f"{name}.toml")
    if beside.parent not in profiles.directories() and beside.exists():
        return profiles.load_file(beside)
    return profiles.load(name)


def stricter(said: Judgement, over: Judgement) -> bool:
    """Whether what the profile above says is what counts (seccomp(2): the strictest does)."""
    return (over.action != ALLOW and said.action == ALLOW) or (over.action == KILL != said.action)


class Useless(ProfileError):
    """What a profile allows, and the one above it never does; or, with `partly`, not with all arguments."""

    partly = False


def useless(
    profile: profiles.Profile, over: profiles.Profile, here: frozenset[str], arch: str
) -> Iterator[Useless]:
    """The rules of `profile` that `over` keeps from having effect. `here`, `arch`: as to `judge`, and `compile_profile`."""
    if not (profile.seccomp and profile.seccomp.enabled and over.seccomp and over.seccomp.enabled):
        return
    for rule in profile.seccomp.rules:
        if rule.when not in here or rule in over.seccomp.rules:
            continue
        for call in rule.calls:
            if pyseccomp.resolve_syscall(ARCHITECTURES[arch], call) < 0:
                continue
            others = [
                each for each in over.seccomp.rules if call in each.calls and each.when in here
            ]
            passed = [
                not stricter(said, judge(over, call, vector, here))
                for vector in _vectors(rule, others)
                if (said := judge(profile, call, vector, here)).rule == rule
            ]
            if not all(passed):
                yield _told(rule, call, profile, over, others, any(passed))


def _vectors(rule: profiles.Rule, others: Sequence[profiles.Rule]) -> Iterator[list[int]]:
    """Arguments that these rules tell from each other."""
    values: list[set[int]] = [{0} for _ in range(6)]
    for each in (rule, *others):
        for argument in each.arguments:
            values[argument.index] |= telling(each, argument)
    yield from itertools.islice(map(list, itertools.product(*map(sorted, values))), _MOST)


def _told(
    rule: profiles.Rule,
    call: str,
    profile: profiles.Profile,
    over: profiles.Profile,
    others: Sequence[profiles.Rule],
    partly: bool,
) -> Useless:
    file, line = profiles.where(rule.origin)
    made = Useless(
        file,
        f"seccomp.rules ({call})",
        f"profile {over.name}, whose filter is above that of {profile.name}, {says(call, others)}",
        f"a call must pass both: say it in {profiles.OVERRIDES / over.name}.toml, too",
        line,
    )
    made.partly = partly
    return made


def says(call: str, rules: Sequence[profiles.Rule]) -> str:
    """What the rules of the profile above say of a call, in words."""
    if not rules:
        return f"has no rule for {call}"
    ways = [
        f"{rule.errno or ALLOW}{' if ' if rule.arguments else ''}"
        f"{' and '.join(map(condition, rule.arguments))} ({rule.origin})"
        for rule in rules
    ]
    return f"says of {call}: {'; '.join(ways)}"


def rules_above(
    profile: profiles.Profile, call: str, here: frozenset[str]
) -> tuple[str, list[profiles.Rule]] | None:
    """The name of the profile above, and what it says of a call; None if there is none, or it allows it always."""
    over = above(profile)
    if over is None or over.seccomp is None or not over.seccomp.enabled:
        return None
    rules = [each for each in over.seccomp.rules if call in each.calls and each.when in here]
    if any(not rule.arguments and not rule.errno for rule in rules):
        return None
    return over.name, rules
