"""Bloom filters and masks: SipHash's own test vectors, sd-bus's algorithm, and D-Bus's semantics."""

from __future__ import annotations

import struct
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kbusd.kdbus import bloom, bloomhash, bloommatch
from kbusd.kdbus import match as kernel
from kbusd.kdbus.items import Item
from kbusd.wire import match
from kbusd.wire.body import PathArgument
from tests.unit.kdbus.cases import unhurried

SIZE, N_HASH = 64, 8  # what systemd made its buses with
SIGNAL = 4
ANY = 2**64 - 1

# The first outputs of the reference implementation (vectors_sip64), for the inputs of 0, 1, 2, ...
# bytes 00, 01, 02, ... under the key 00 .. 0f; and the example of 15 bytes in the paper.
VECTORS = {
    0: "310e0edd47db6f72",
    1: "fd67dc93c539f874",
    2: "5a4fa9d909806c0d",
    3: "2d7efbd796666785",
    7: "37d1018bf50002ab",
    8: "6224939a79f5f593",
    15: "e545be4961ca29a1",
}


@pytest.mark.parametrize("size", VECTORS)
def test_siphash_gives_the_reference_values(size: int) -> None:
    key, data = bytes(range(16)), bytes(range(size))
    assert bloomhash.siphash24(key, data).to_bytes(8, "little").hex() == VECTORS[size]


def test_a_key_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="16 bytes"):
        bloomhash.siphash24(bytes(15), b"")


def bits_by_the_book(size: int, n_hash: int, text: bytes) -> set[int]:
    """PORTING-DBUS1, read literally: full bytes of one hash after the other for each bit's number."""
    keys = [
        "b9660bf0467047c18875c49c54b9bd15",
        "aaa154a2e0714b39bfe1dd2e9fc54a3b",
        "63fdaebecd824812a16e4126cbfaa0c8",
        "23be452932d2462d82035228fe3717f5",
        "563bbfee5a4f4339afaa9408dff0fc10",
        "3180c873c7ea46d3aa25750f9e4c0929",
        "7df7184b7ba444d5853c06e06553966d",
        "f277e96f93b54e719a0c34883925bf35",
    ]
    stream = b"".join(
        bloomhash.siphash24(bytes.fromhex(key), text).to_bytes(8, "little") for key in keys
    )
    width = -(-((8 * size).bit_length() - 1) // 8)
    return {
        int.from_bytes(stream[width * i : width * i + width], "big") % (8 * size)
        for i in range(n_hash)
    }


def bits_of(filter: bytes) -> set[int]:
    return {8 * at + bit for at, byte in enumerate(filter) for bit in range(8) if byte >> bit & 1}


@pytest.mark.parametrize(("size", "n_hash"), [(64, 8), (8, 1), (32, 64), (64, 32), (4096, 16)])
def test_the_bits_of_a_property_are_those_of_the_document(size: int, n_hash: int) -> None:
    filter = bytearray(size)
    bloomhash.add(filter, n_hash, b"interface:org.example.I")
    assert bits_of(filter) == bits_by_the_book(size, n_hash, b"interface:org.example.I")


@pytest.mark.parametrize(("size", "n_hash"), [(0, 8), (64, 0), (64, 33), (8, 65), (64, -1)])
def test_parameters_that_need_more_than_the_keys_give_are_refused(size: int, n_hash: int) -> None:
    with pytest.raises(ValueError, match=f"{size} bytes with {n_hash} hash"):
        bloomhash.add(bytearray(size), n_hash, b"x")
    # Nobody can say what masks mean on such a bus, so a signal passes all.
    filter = bloommatch.message_filter(size, n_hash, SIGNAL, "a.b", "M", "/", [])
    assert filter == b"\xff" * size


def filter_of(*properties: bytes) -> bytes:
    filter = bytearray(SIZE)
    for each in properties:
        bloomhash.add(filter, N_HASH, each)
    return bytes(filter)


def test_a_signal_has_the_properties_that_sd_bus_gave_it() -> None:
    arguments = [(0, "s", "a.b.c"), (2, "o", "/x/y"), (3, "as", "one"), (10, "g", "ay")]
    assert bloommatch.message_filter(
        SIZE, N_HASH, SIGNAL, "org.example.I", "Changed", "/org/example", arguments
    ) == filter_of(
        b"message-type:signal",
        b"interface:org.example.I",
        b"member:Changed",
        b"path:/org/example",
        *(b"path-slash-prefix:" + each for each in (b"/org/example", b"/org/", b"/org", b"/")),
        b"arg0:a.b.c",
        *(b"arg0-dot-prefix:" + each for each in (b"a.b.c", b"a.b.", b"a.b", b"a.", b"a")),
        b"arg0-slash-prefix:a.b.c",
        b"arg2:/x/y",
        b"arg2-dot-prefix:/x/y",
        *(b"arg2-slash-prefix:" + each for each in (b"/x/y", b"/x/", b"/x", b"/")),
        b"arg3-has:one",
        b"arg10:ay",
        b"arg10-dot-prefix:ay",
        b"arg10-slash-prefix:ay",
    )


def test_a_mask_has_what_a_rule_asks_for() -> None:
    rule = match.parse(
        "type='signal',interface='a.b',member='M',path_namespace='/p',arg0namespace='x.y',arg12='z'"
    )
    assert bloommatch.mask(SIZE, N_HASH, rule) == filter_of(
        b"message-type:signal",
        b"interface:a.b",
        b"member:M",
        b"path-slash-prefix:/p",
        b"arg0-dot-prefix:x.y",
        b"arg12:z",
    )
    for text in ("", "sender=':1.7'", "destination='a.b'", "arg3path='/a/'", "eavesdrop=true"):
        assert bloommatch.mask(SIZE, N_HASH, match.parse(text)) is None
    assert bloommatch.mask(SIZE, N_HASH, match.parse("path='/'")) == filter_of(b"path:/")


PATHS = st.sampled_from(("/", "/a", "/a/b", "/a/b/c", "/ab"))
NAMES = st.sampled_from(("a.b", "a.b.c", "a.bc", "b.a"))
TEXTS = st.sampled_from(("", "a", "a.b", "a.b.c", "a.bc", "/a/", "/a/b", "."))
ARGUMENTS = st.lists(st.none() | TEXTS | PATHS.map(PathArgument), max_size=4)
RULES = st.builds(
    match.MatchRule,
    type=st.sampled_from((0, 4)),
    interface=st.none() | NAMES,
    member=st.none() | st.sampled_from(("M", "N")),
    path=st.none() | PATHS,
    path_namespace=st.none() | PATHS,
    args=st.dictionaries(st.integers(0, 3), TEXTS, max_size=2).map(lambda d: (*sorted(d.items()),)),
    path_args=st.dictionaries(st.integers(0, 3), TEXTS, max_size=1).map(lambda d: (*d.items(),)),
    arg0_namespace=st.none() | st.sampled_from(("a", "a.b", "a.b.c")),
)


@settings(unhurried, max_examples=200)
@given(RULES, NAMES, PATHS, ARGUMENTS)
@example(match.MatchRule(args=((1, "a"),)), "a.b", "/", [None, "a"])
@example(match.MatchRule(path_namespace="/"), "a.b", "/a/b", [])
@example(match.MatchRule(arg0_namespace="a"), "a.b", "/", ["a.b"])
def test_no_rule_misses_a_signal(
    rule: match.MatchRule, interface: str, path: str, arguments: list[str | None]
) -> None:
    """And a mask with bits that a filter lacks is of a rule that does not match."""
    filter = bloommatch.message_filter(
        SIZE,
        N_HASH,
        SIGNAL,
        interface,
        "M",
        path,
        [
            (index, "o" if isinstance(text, PathArgument) else "s", text)
            for index, text in enumerate(arguments)
            if text is not None
        ],
    )
    mask = bloommatch.mask(SIZE, N_HASH, rule) or b""
    passes = all(bits & ~has == 0 for bits, has in zip(mask, filter, strict=False))
    if rule.matches(SIGNAL, {":1.1"}, None, path, interface, "M", arguments):
        assert passes


def test_a_signal_does_not_pass_for_another() -> None:
    filter = bloommatch.message_filter(SIZE, N_HASH, SIGNAL, "a.b", "M", "/a", [(0, "s", "x")])
    for text in (
        "interface='a.c'",
        "member='N'",
        "path='/b'",
        "arg0='y'",
        "arg1='x'",
        "type='error'",
    ):
        mask = bloommatch.mask(SIZE, N_HASH, match.parse(text))
        assert mask is not None
        assert bits_of(mask) - bits_of(filter), text


def test_long_arguments_do_not_cost_the_square_of_their_length() -> None:
    began = time.process_time()
    for separator in "./":
        bloommatch.message_filter(
            SIZE, N_HASH, SIGNAL, "a.b", "M", "/a" * 500_000, [(0, "s", separator * 1_000_000)]
        )
    assert time.process_time() - began < 2


def test_more_elements_than_are_looked_at_pass_every_mask() -> None:
    elements = [(0, "as", str(number)) for number in range(bloommatch.MAX_ELEMENTS + 1)]
    few, all_ = (
        bloommatch.message_filter(4096, 1, SIGNAL, "a.b", "M", "/", each)
        for each in (elements[1:], elements)
    )
    assert few != all_ == b"\xff" * 4096


def ids(*numbers: int) -> bytes:
    return struct.pack(f"={len(numbers)}Q", *numbers)


def test_a_rule_becomes_items() -> None:
    def items(text: str) -> list[tuple[bloommatch.Item, ...]]:
        return bloommatch.matches(SIZE, N_HASH, match.parse(text))

    mask = filter_of(b"interface:a.b")
    assert items("interface='a.b'") == [((9, mask),)]
    assert items("interface='a.b',sender=':1.7'") == [((14, ids(7)), (9, mask))]
    assert items("interface='a.b',sender='c.d'") == [((9, mask), (15, b"c.d\0"))]
    assert items("interface='a.b',destination=':1.9'") == [((16, ids(9)), (9, mask))]
    assert items("interface='a.b',destination='c.d'") == [((9, mask),)]
    assert items("member='M',arg3path='/a/'") == [((9, filter_of(b"member:M")),)]


ADD, REMOVE, CHANGE, ID_ADD, ID_REMOVE = range(0x8000, 0x8005)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (
            "",
            [
                (ADD, ids(ANY, 0, ANY, 0)),
                (REMOVE, ids(ANY, 0, ANY, 0)),
                (CHANGE, ids(ANY, 0, ANY, 0)),
                (ID_ADD, ids(ANY, 0)),
                (ID_REMOVE, ids(ANY, 0)),
            ],
        ),
        (
            "arg0='a.b'",
            [(each, ids(ANY, 0, ANY, 0) + b"a.b\0") for each in (ADD, REMOVE, CHANGE)],
        ),
        ("arg0=':1.7'", [(ID_ADD, ids(7, 0)), (ID_REMOVE, ids(7, 0))]),
        ("arg0=':1.7',arg2=''", [(ID_ADD, ids(7, 0)), (ID_REMOVE, ids(7, 0))]),
        ("arg0=':1.7',arg1=':1.7'", [(ID_REMOVE, ids(7, 0))]),
        ("arg0=':1.7',arg1=':1.8'", []),
        (
            "arg0='a.b',arg1=''",
            [
                (ADD, ids(ANY, 0, ANY, 0) + b"a.b\0"),
                (REMOVE, ids(ANY, 0, ANY, 0) + b"a.b\0"),
                (CHANGE, ids(ANY, 0, ANY, 0) + b"a.b\0"),
            ],
        ),
        (
            "arg1=':1.8'",
            [
                (REMOVE, ids(8, 0, ANY, 0)),
                (CHANGE, ids(8, 0, ANY, 0)),
                (ID_REMOVE, ids(8, 0)),
            ],
        ),
        ("arg1='a.b'", []),
        ("type='error'", []),
        ("interface='a.b'", []),
        ("member='NameAcquired'", []),
        ("path='/a'", []),
        ("sender=':1.7'", []),
        ("destination=':1.7'", []),
    ],
)
def test_a_rule_for_name_owner_changed_asks_for_notifications(
    rule: str, expected: list[bloommatch.Item]
) -> None:
    found = bloommatch.matches(SIZE, N_HASH, match.parse(rule))[1:]
    assert found == [(each,) for each in expected]


def test_the_usual_rule_for_name_owner_changed_asks_for_notifications() -> None:
    rule = match.parse(
        "type='signal',sender='org.freedesktop.DBus',interface='org.freedesktop.DBus',"
        "member='NameOwnerChanged',path='/org/freedesktop/DBus',arg0='a.b'"
    )
    assert len(bloommatch.matches(SIZE, N_HASH, rule)) == 4


@pytest.mark.parametrize(
    ("rule", "found"),
    [
        ("type='signal',interface='a.b',path_namespace='/a',arg0='x'", True),
        ("sender=':1.7',member='M'", True),
        ("sender='c.d',arg0namespace='x'", True),
        ("", True),
        ("sender=':1.8',member='M'", False),
        ("sender='c.e'", False),
        ("member='N'", False),
        ("arg0='y'", False),
    ],
)
def test_the_bus_finds_who_asked_for_a_signal(rule: str, found: bool) -> None:
    """What this module computes, by way of the ABI, in the bus's own matching."""
    matches = kernel.Matches()
    for number, items in enumerate(bloommatch.matches(SIZE, N_HASH, match.parse(rule))):
        rules = tuple(kernel.parse_rule(Item(*each), SIZE) for each in items)
        matches.add(number, rules, False)
    bits = bloommatch.message_filter(SIZE, N_HASH, SIGNAL, "a.b", "M", "/a/b", [(0, "s", "x")])
    signal = kernel.Signal(7, ANY, ("c.d",), bloom.Filter(0, bits))
    assert matches.admits(signal) == found
