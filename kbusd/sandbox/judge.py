"""What a profile says of one system call with these arguments, and by which rule.

Reads rules as their author does, one by one, and builds no filter; the tests hold it against the filter
that libseccomp makes of the same rules. So it shares nothing with `compile.py` that says what a condition means.
For kbusctl; no process of the bus imports it.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from kbusd.sandbox import constants, profiles
from kbusd.sandbox.compiled import USERS
from kbusd.sandbox.errors import ProfileError
from kbusd.sandbox.users import there

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
        if all(_holds(rule, argument, given[argument.index]) for argument in rule.arguments):
            return Judgement(rule.errno or ALLOW, rule, ())
        near.append(rule)
    return Judgement(KILL, None, tuple(near))


def _holds(rule: profiles.Rule, argument: profiles.Argument, given: int) -> bool:
    """Whether a condition holds of this value."""
    match argument:
        case profiles.Argument(equals=tuple(names)):
            flags = 0
            for each in names:
                flags |= _number(rule, each)
            return given == flags
        case profiles.Argument(one_of=tuple(names)):
            return any(given == _number(rule, each) for each in names)
        case profiles.Argument(not_equals=str(name)):
            return given != _number(rule, name)
        case profiles.Argument(without=tuple(names)):
            return not any(given & _number(rule, each) for each in names)
        case profiles.Argument(including=tuple(names)):
            return all(given & (flag := _number(rule, each)) == flag for each in names)
        case profiles.Argument(users=int(many)):
            first, count = there(many, argument.users_inside) or (many, USERS)
            return first <= given < first + count
    raise _wrong(rule, f"argument {argument.index} has no condition")


def telling(rule: profiles.Rule, argument: profiles.Argument) -> set[int]:
    """Values for which a condition holds, and some close to it for which it does not."""
    if argument.users is not None:
        first, count = there(argument.users, argument.users_inside) or (argument.users, USERS)
        return {first - 1, first, first + count}
    given = (argument.equals, argument.one_of, argument.without, argument.including)
    names = [each for names in (*given, (argument.not_equals or "0",)) for each in names or ()]
    values = {_number(rule, each) for each in names}
    together = 0
    for each in values:
        together |= each
    return {*values, together, together ^ 1}


def _number(rule: profiles.Rule, name: str) -> int:
    """Of a name, or of a number as it is written. Raises ProfileError."""
    if name in constants.ARGUMENTS:
        return constants.ARGUMENTS[name]
    try:
        return int(name, 16 if name.startswith("0x") else 10)
    except ValueError:
        raise _wrong(rule, f"`{name}` is not known") from None


def _wrong(rule: profiles.Rule, problem: str) -> ProfileError:
    file, line = profiles.where(rule.origin)
    key = f"seccomp.rules ({', '.join(rule.calls)}).arguments"
    return ProfileError(file, key, problem, "kbusctl profile check tells more", line)


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
