"""What a profile says of one system call with these arguments, and by which rule.

Reads rules as their author does, one by one, and builds no filter; the tests hold it against the filter
that libseccomp makes of the same rules. For kbusctl; no process of the bus imports it.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import pyseccomp

from kbusd.sandbox import profiles
from kbusd.sandbox.compile import Comparison, comparisons

KILL = "kill"
ALLOW = "allow"
_ALL = (1 << 64) - 1


class Judgement(msgspec.Struct, frozen=True):
    """`action`: allow, kill, or the name of an errno. `rule`: which says so; None if none does.

    `near`: the rules that name the call, but with other arguments."""

    action: str
    rule: profiles.Rule | None
    near: tuple[profiles.Rule, ...]


def judge(
    profile: profiles.Profile, call: str, arguments: Sequence[int], conditions: frozenset[str]
) -> Judgement:
    """`arguments`: up to six, those left out are 0. `conditions`: compile.conditions().

    Raises ProfileError for a rule that is wrong."""
    if profile.seccomp is None or not profile.seccomp.enabled:
        return Judgement(ALLOW, None, ())
    given = [number & _ALL for number in (*arguments, *[0] * (6 - len(arguments)))]
    near = []
    for rule in profile.seccomp.rules:
        if call not in rule.calls or rule.when not in conditions:
            continue
        if all(_holds(comparisons(rule, argument), given) for argument in rule.arguments):
            return Judgement(rule.errno or ALLOW, rule, ())
        near.append(rule)
    return Judgement(KILL, None, tuple(near))


def _holds(alternatives: Sequence[Comparison], given: Sequence[int]) -> bool:
    return any(_compare(given[each[0]], *each[1:]) for each in alternatives)


def _compare(value: int, operator: int, datum: int, under: int = 0) -> bool:
    match operator:
        case pyseccomp.EQ:
            return value == datum
        case pyseccomp.NE:
            return value != datum
        case pyseccomp.MASKED_EQ:
            return value & datum == under
    raise ValueError(f"comparison {operator} is none of a profile's")


def condition(argument: profiles.Argument) -> str:
    """One condition in words, with the names of its author."""
    for kind, word in (
        ("equals", "is"),
        ("one_of", "is one of"),
        ("not_equals", "is not"),
        ("without", "without"),
        ("including", "with"),
        ("users", "is a user from"),
    ):
        if (value := getattr(argument, kind)) is not None:
            names = (str(value),) if isinstance(value, str | int) else value
            between = ", " if kind == "one_of" else "|"
            return f"argument {argument.index} {word} {between.join(names) or '0'}"
    return f"argument {argument.index}"
