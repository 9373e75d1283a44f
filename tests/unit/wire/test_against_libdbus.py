"""What the reference takes we take, what it refuses we refuse; the exceptions are listed here."""

from __future__ import annotations

import struct

from hypothesis import example, given, settings
from hypothesis import strategies as st

from kbusd.wire import body, header, validate
from tests.unit.wire import libdbus, marshal

pytestmark = libdbus.needed


def accepted(data: bytes) -> bool:
    """Whether we take `data` for a whole message and nothing after it."""
    try:
        if header.total_length(data[:16]) != len(data):
            return False
        parsed = header.parse(data)
        body.check_body(
            data[parsed.header_length :], parsed.signature.encode(), parsed.endian == "B"
        )
    except validate.WireError:
        return False
    return True


def excepted(data: bytes) -> bool:
    """Where libdbus and the specification part ways, we follow the specification."""
    if b"org.freedesktop.DBus.Local" in data or b"/org/freedesktop/DBus/Local" in data:
        return True  # libdbus refuses what merely begins so, too
    # It counts arrays that follow one another only, so that with structs among them more than the
    # specification's 32 may nest. Random types never get there.
    # It counts descriptors, which the bytes alone do not bring; that is the worker's job.
    # It knows field 10, which never was in the specification.
    fields = data[16:]
    return any(
        fields[at] in (9, 10) and fields[at + 1 : at + 2] == b"\1"
        for at in range(0, len(fields), 8)
    )


def agree(data: bytes) -> None:
    if len(data) >= 16 and not excepted(data):
        theirs, text = libdbus.accepts_message(data)
        assert accepted(data) == theirs, f"libdbus: {text or 'valid'}"


@given(marshal.messages())
def test_both_accept_valid_messages(data: bytes) -> None:
    assert accepted(data)
    if not excepted(data):
        assert libdbus.accepts_message(data) == (True, "")


@settings(max_examples=400)
@given(marshal.messages(), st.data())
def test_both_agree_on_a_changed_message(data: bytes, draw: st.DataObject) -> None:
    changed = bytearray(data)
    for _ in range(draw.draw(st.integers(1, 3))):
        at = draw.draw(st.integers(1, len(changed) - 1))
        changed[at] = draw.draw(
            st.one_of(st.integers(0, 255), st.sampled_from(b"\0\1/.:ybsogvah({)}ul"))
        )
    if len(changed) > 16:
        order = ">" if changed[0] == ord("B") else "<"
        total = 16 + -(-struct.unpack_from(order + "I", changed, 12)[0] // 8) * 8
        total += struct.unpack_from(order + "I", changed, 4)[0]
        if total > len(changed):  # to libdbus that is merely not all of it yet
            return
        changed = changed[:total]
    agree(bytes(changed))


@given(
    st.text("ybnqiuxtdsoghva(){}z", max_size=24).map(str.encode)
    | marshal.signatures().map(str.encode)
)
@example(b"a" * 32 + b"y")
@example(b"a" * 33 + b"y")
@example(b"(" * 32 + b"y" + b")" * 32)
@example(b"(" * 33 + b"y" + b")" * 33)
@example(b"a{sa{sa{s(ii)}}}")
@example(b"a{vs}")
@example(b"a{s(i}")
@example(b"y" * 255)
@example(b"y" * 256)
def test_signatures(text: bytes) -> None:
    try:
        validate.require_signature(text)
        ours = True
    except validate.WireError:
        ours = False
    assert ours == libdbus.accepts("signature", text)


NAME_PARTS = st.lists(
    st.sampled_from((".", ":", "/", "-", "_", "a", "Z", "0", "9", "é", " ", "org", "x" * 120)),
    max_size=8,
).map("".join)


@settings(max_examples=300)
@given(NAME_PARTS)
@example("/")
@example("//")
@example("/a/")
@example(":")
@example(":.")
@example(":.a")
@example(":a.")
@example(":1.2")
@example(".a.b")
@example("a.b" + "c" * 252)
@example("a.b" + "c" * 253)
@example("m" * 255)
@example("m" * 256)
def test_names(text: str) -> None:
    data = text.encode()
    assert validate.is_path(data) == libdbus.accepts("path", data)
    assert validate.is_interface(data) == libdbus.accepts("interface", data)
    assert validate.is_member(data) == libdbus.accepts("member", data)
    assert validate.is_error_name(data) == libdbus.accepts("error_name", data)
    assert validate.is_bus_name(data) == libdbus.accepts("bus_name", data)


UTF8_PARTS = st.lists(
    st.one_of(
        st.binary(min_size=1, max_size=4),
        st.text(min_size=1, max_size=3).map(lambda text: text.encode(errors="surrogatepass")),
        st.just(b"abcdefgh"),
        st.sampled_from((b"\xc0\x80", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xef\xbf\xbf")),
    ),
    max_size=6,
).map(b"".join)


@settings(max_examples=500)
@given(UTF8_PARTS)
def test_utf8(data: bytes) -> None:
    try:
        data.decode()
        valid = b"\0" not in data
    except UnicodeDecodeError:
        valid = False
    assert validate.is_utf8(data) == valid
    if b"\0" not in data:
        assert libdbus.accepts("utf8", data) == valid
