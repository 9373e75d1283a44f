"""Names: those of kdbus's own self-tests, and hostile ones."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kbusd.kdbus import names
from tests.unit.kdbus.refused import refused


@pytest.mark.parametrize(
    ("text", "name", "pattern"),
    [
        ("foo.bla.blaz", True, True),
        ("foo.bar-x._y", True, True),
        ("a.b", True, True),
        ("foo.bla.bl.*", False, True),
        ("foo.*", False, True),
        ("foo", False, False),
        ("", False, False),
        ("*", False, False),
        (".*", False, False),
        (".bla.blaz", False, False),
        ("foo..bar", False, False),
        ("foo.bar.", False, False),
        ("foo.*.bar", False, False),
        ("foo.b*", False, False),
        ("foo.1bar", False, False),
        ("1foo.bar", False, False),
        ("foo.bär", False, False),
        ("foo.bar\n", False, False),
        (":1.7", False, False),
        ("a." + "b" * 253, True, True),
        ("a." + "b" * 254, False, False),
    ],
)
def test_well_known_names(text: str, name: bool, pattern: bool) -> None:
    assert names.is_well_known(text) == name
    assert names.is_pattern(text) == pattern


@given(st.text(st.sampled_from("ab1_-.*/é"), max_size=8))
def test_as_the_kernel_read_them(text: str) -> None:
    """kdbus_name_is_valid, in words: elements that are not empty and begin with no digit."""
    elements = text.split(".")
    ordinary = [set(each) <= set("ab1_-") and each[:1] not in ("", "1") for each in elements]
    several = len(elements) > 1
    assert names.is_well_known(text) == (several and all(ordinary))
    assert names.is_pattern(text) == (
        several and all(ordinary[:-1]) and (ordinary[-1] or elements[-1] == "*")
    )


@pytest.mark.parametrize(
    "path", ["control", "1000-user/bus", "0-system/0-ep.1", "domain/web/1000-x/bus"]
)
def test_paths(path: str) -> None:
    assert "/".join(names.parse_path(path)) == path


@pytest.mark.parametrize(
    "path",
    [
        "",
        "/",
        "../x",
        "a/../b",
        "a//b",
        "/a",
        "a/",
        ".",
        "..",
        "a/.",
        "-a",
        "a.",
        "a b",
        "a\0b",
        "é",
    ]
    + ["a\n", "x" * 64, "y" * 4096],
)
def test_no_path_leads_out_of_the_tree(path: str) -> None:
    with refused("EINVAL"):
        names.parse_path(path)


def test_buses_bear_their_makers_uid() -> None:
    names.check_owner("1000-user", 1000)
    for name, uid in (("1000-user", 100), ("1000", 1000), ("x", 0), ("-1-x", -1), ("01-x", 1)):
        with refused("EINVAL"):
            names.check_owner(name, uid)
