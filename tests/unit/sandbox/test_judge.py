"""Two readings of each profile agree: of its rules one by one, and of the filter made of them."""

from __future__ import annotations

import errno

import pyseccomp  # type: ignore[import-untyped]
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kbusd.sandbox import constants, profiles
from kbusd.sandbox.compile import ARCHITECTURES, compile_profile, conditions
from kbusd.sandbox.judge import judge
from tests.unit.sandbox import bpf

AUDIT = {"x86-64": 0xC000003E, "arm64": 0xC00000B7}
FILTERED = [n for n in profiles.names() if profiles.load(n).seccomp.enabled]  # type: ignore[union-attr]
MOST = 470  # numbers of calls are below, as of Linux 6.18
KINDS = [
    (name, arch, selinux)
    for name in FILTERED
    for arch in ARCHITECTURES
    for selinux in (False, True)
]
FILTERS = {
    (name, arch, selinux): compile_profile(profiles.load(name), arch=arch, selinux=selinux).bpf
    for name, arch, selinux in KINDS
}

# Values that rules speak of, together and with a bit too many, and anything else.
words = st.lists(st.sampled_from(sorted(set(constants.ARGUMENTS.values()))), max_size=3).map(
    lambda values: sum(set(values)) & 0xFFFF_FFFF_FFFF_FFFF
)
values = st.one_of(words, words.map(lambda v: v | 1 << 40), st.integers(0, (1 << 64) - 1))


def name_of(arch: str, number: int) -> str:
    try:
        return bytes(pyseccomp.resolve_syscall(ARCHITECTURES[arch], number)).decode()
    except ValueError:
        return "?"


def agree(name: str, arch: str, selinux: bool, number: int, arguments: list[int]) -> None:
    profile = profiles.load(name)
    said = judge(profile, name_of(arch, number), arguments, conditions(selinux, arch)).action
    expected = {
        "allow": bpf.ALLOW,
        "kill": bpf.KILL,
    }.get(said) or bpf.ERRNO | getattr(errno, said)
    returned = bpf.run(FILTERS[name, arch, selinux], AUDIT[arch], number, arguments)
    assert returned == expected, f"{name_of(arch, number)} {arguments}: {said}, but {returned:#x}"


@pytest.mark.parametrize(("name", "arch", "selinux"), KINDS)
def test_every_call_without_arguments(name: str, arch: str, selinux: bool) -> None:
    for number in range(MOST):
        agree(name, arch, selinux, number, [0] * 6)


@pytest.mark.parametrize(("name", "arch", "selinux"), KINDS)
def test_calls_that_rules_name_with_any_arguments(name: str, arch: str, selinux: bool) -> None:
    seccomp = profiles.load(name).seccomp
    assert seccomp is not None
    named = {call for rule in seccomp.rules if rule.arguments for call in rule.calls}
    numbers = sorted(
        number
        for call in named
        if (number := pyseccomp.resolve_syscall(ARCHITECTURES[arch], call)) >= 0
    )

    @settings(max_examples=200, deadline=None)
    @given(st.sampled_from(numbers), st.lists(values, min_size=6, max_size=6))
    def agreed(number: int, arguments: list[int]) -> None:
        agree(name, arch, selinux, number, arguments)

    agreed()


@pytest.mark.parametrize(("name", "arch", "selinux"), KINDS)
def test_a_call_of_another_architecture_kills(name: str, arch: str, selinux: bool) -> None:
    for other in (0x40000003, *(AUDIT[each] for each in AUDIT if each != arch)):
        for number in range(MOST):
            assert bpf.run(FILTERS[name, arch, selinux], other, number, [0] * 6) == bpf.KILL


@pytest.mark.parametrize(("name", "arch", "selinux"), KINDS)
def test_no_call_takes_long_to_judge(name: str, arch: str, selinux: bool) -> None:
    """The kernel asks about each call there is when it loads a filter: as a list that took 0.2 ms."""
    program = FILTERS[name, arch, selinux]
    steps = [bpf.follow(program, AUDIT[arch], each, [0] * 6)[1] for each in range(MOST)]
    assert sum(steps) / len(steps) < 16
    assert max(steps) < 40
