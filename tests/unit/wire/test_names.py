"""Each kind of name: what is valid, and what the error says where it is not.

The character rules themselves are held against libdbus in test_against_libdbus.py.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kbusd.wire import names

PAIRS: list[tuple[Callable[[str], bool], Callable[[str], None]]] = [
    (names.is_path, names.check_path),
    (names.is_interface, names.check_interface),
    (names.is_error_name, names.check_error_name),
    (names.is_member, names.check_member),
    (names.is_bus_name, names.check_bus_name),
    (names.is_unique, names.check_unique),
    (names.is_well_known, names.check_well_known),
    (names.is_namespace, names.check_namespace),
]

TEXTS = st.lists(
    st.sampled_from((".", ":", "/", "-", "_", "a", "Z", "0", "é", "\n", "\ud800", "\0", "x" * 125)),
    max_size=6,
).map("".join)


@given(TEXTS | st.text(max_size=8))
def test_both_forms_agree(text: str) -> None:
    for is_valid, check in PAIRS:
        try:
            check(text)
            passed = True
        except ValueError:
            passed = False
        assert is_valid(text) == passed, check.__name__


@pytest.mark.parametrize(
    ("check", "text", "says"),
    [
        (names.check_path, "a", "object path 'a' does not begin with '/'"),
        (names.check_path, "/a/", "object path '/a/' has an empty element or ends in '/'"),
        (names.check_path, "/a-b", "element 'a-b' has a character outside [A-Za-z0-9_]"),
        (names.check_interface, "", "interface name is empty"),
        (names.check_interface, "a", "interface name 'a' has no '.'"),
        (names.check_interface, "a.b-c", "element 'b-c' has a character outside [A-Za-z0-9_]"),
        (names.check_interface, "a..b", "interface name 'a..b' has an empty element"),
        (names.check_error_name, "a.1b", "element '1b' begins with a digit"),
        (names.check_member, "a.b", "member name 'a.b' has a '.'"),
        (names.check_member, "m" * 256, "is longer than 255 bytes"),
        (names.check_well_known, ":1.2", "begins with ':', as only unique names do"),
        (names.check_well_known, "org.7zip", "element '7zip' begins with a digit"),
        (names.check_well_known, "org.a/b", "has a character outside [A-Za-z0-9_-]"),
        (names.check_unique, "a.b", "unique name 'a.b' does not begin with ':'"),
        (names.check_unique, ":1.", "unique name ':1.' has an empty element"),
        (names.check_bus_name, ":1. 2", "has a character outside [A-Za-z0-9_-]"),
        (names.check_namespace, "org.", "namespace 'org.' has an empty element"),
    ],
)
def test_the_error_names_the_rule(check: Callable[[str], None], text: str, says: str) -> None:
    with pytest.raises(ValueError) as error:
        check(text)
    assert says in str(error.value)


def test_a_namespace_may_be_one_element() -> None:
    assert names.is_namespace("org") and not names.is_bus_name("org")
    assert names.is_namespace("org.example")
    assert not names.is_namespace("0rg")
