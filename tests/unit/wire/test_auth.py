"""SASL: what is answered to which lines, by the table and by the real dbus-daemon."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kbusd.wire.auth import AuthStep, ClientAuth, ServerAuth, State, aliases, usual
from tests.unit.wire.conftest import DbusDaemon

GUID = "0123456789abcdef" * 2
OK = f"OK {GUID}\r\n".encode()
UID = 1000
HEX = b"31303030"


def say(data: bytes, auth: ServerAuth | None = None) -> AuthStep:
    return (auth or ServerAuth(GUID, UID)).receive(data)


def replies(*lines: bytes, auth: ServerAuth | None = None) -> list[bytes]:
    return say(b"\0" + b"".join(line + b"\r\n" for line in lines), auth).reply.splitlines()


def test_external_with_a_uid() -> None:
    step = say(b"\0AUTH EXTERNAL " + HEX + b"\r\nNEGOTIATE_UNIX_FD\r\nBEGIN\r\nmessage")
    assert step == AuthStep(OK + b"AGREE_UNIX_FD\r\n", done=True, rest=b"message", unix_fds=True)


def test_external_as_whoever_the_kernel_says() -> None:
    assert say(b"\0AUTH EXTERNAL\r\nDATA\r\nBEGIN\r\n") == AuthStep(b"DATA\r\n" + OK, done=True)


def test_the_uid_may_come_as_data() -> None:
    assert replies(b"AUTH EXTERNAL", b"DATA " + HEX) == [b"DATA", OK.strip()]


@pytest.mark.parametrize(
    "claim",
    [
        b"0",
        b"1001",
        b"root",
        b"",
        b"-1000",
        b"1000 ",
        b"+1000",
        b"\xc2\xb2",
        b"1" * 40,
        b"01000",
        b"0x3e8",
    ],
)
def test_another_identity_is_rejected(claim: bytes) -> None:
    lines = [b"AUTH EXTERNAL " + claim.hex().encode()]
    if not claim:
        lines = [b"AUTH EXTERNAL", b"DATA", b"CANCEL"]
    auth = ServerAuth(GUID, UID)
    assert replies(*lines, auth=auth)[-1] == b"REJECTED EXTERNAL"
    assert auth.state is State.AUTH


def test_a_uid_of_the_clients_user_namespace() -> None:
    auth = ServerAuth(GUID, 100000, aliases=(0,))
    assert replies(b"AUTH EXTERNAL 30", auth=auth) == [OK.strip()]


def test_two_identities_are_one_too_many() -> None:
    # After an OK there is no more DATA; within one exchange the second identity is refused.
    assert replies(b"AUTH EXTERNAL " + HEX, b"DATA " + HEX) == [
        OK.strip(),
        b'ERROR "Sent DATA while expecting BEGIN"',
    ]


@pytest.mark.parametrize(
    ("lines", "last"),
    [
        ([b"AUTH"], b"REJECTED EXTERNAL"),
        ([b"AUTH ANONYMOUS"], b"REJECTED EXTERNAL"),
        ([b"AUTH DBUS_COOKIE_SHA1 31"], b"REJECTED EXTERNAL"),
        ([b"AUTH external"], b"REJECTED EXTERNAL"),
        ([b"AUTH EXTERNAL xy"], b'ERROR "Invalid hex encoding"'),
        ([b"AUTH EXTERNAL 31 30"], b'ERROR "Invalid hex encoding"'),
        ([b""], b'ERROR "Unknown command"'),
        ([b"begin"], b'ERROR "Unknown command"'),
        ([b"OK"], b'ERROR "Unknown command"'),
        ([b"AUTH\xc3\xa9"], b'ERROR "Command contained non-ASCII"'),
        ([b"AUTH \0"], b'ERROR "Command contained non-ASCII"'),
        ([b"CANCEL"], b'ERROR "Not currently in an auth conversation"'),
        ([b"DATA"], b'ERROR "Not currently in an auth conversation"'),
        ([b"ERROR"], b"REJECTED EXTERNAL"),
        ([b"NEGOTIATE_UNIX_FD"], b'ERROR "Need to authenticate first"'),
        ([b"AUTH EXTERNAL", b"AUTH"], b'ERROR "Sent AUTH while another AUTH in progress"'),
        ([b"AUTH EXTERNAL", b"CANCEL"], b"REJECTED EXTERNAL"),
        ([b"AUTH EXTERNAL", b"ERROR what"], b"REJECTED EXTERNAL"),
        ([b"AUTH EXTERNAL", b"NEGOTIATE_UNIX_FD"], b'ERROR "Need to authenticate first"'),
        ([b"AUTH EXTERNAL " + HEX, b"AUTH"], b'ERROR "Sent AUTH while expecting BEGIN"'),
        ([b"AUTH EXTERNAL " + HEX, b"CANCEL"], b"REJECTED EXTERNAL"),
        ([b"AUTH EXTERNAL " + HEX, b"AGREE_UNIX_FD"], b'ERROR "Unknown command"'),
    ],
)
def test_answers(lines: list[bytes], last: bytes) -> None:
    assert replies(*lines)[-1] == last


def test_begin_before_success_ends_it() -> None:
    for before in (b"", b"AUTH EXTERNAL\r\n", b"AUTH\r\n"):
        step = say(b"\0" + before + b"BEGIN\r\n")
        assert step.failed == "sent BEGIN before it was authenticated"
        assert not step.done


def test_after_a_cancel_it_can_succeed() -> None:
    step = say(b"\0AUTH EXTERNAL\r\nCANCEL\r\nAUTH EXTERNAL " + HEX + b"\r\nBEGIN\r\n")
    assert step.done and step.reply.endswith(OK)


def test_a_rejection_after_success_takes_it_back() -> None:
    auth = ServerAuth(GUID, UID)
    say(b"\0AUTH EXTERNAL " + HEX + b"\r\nCANCEL\r\n", auth)
    assert auth.receive(b"BEGIN\r\n").failed is not None


def test_six_rejections_end_it() -> None:
    auth = ServerAuth(GUID, UID)
    step = say(b"\0" + b"AUTH\r\n" * 5, auth)
    assert step.failed is None
    step = auth.receive(b"AUTH\r\nAUTH EXTERNAL " + HEX + b"\r\n")
    assert step.reply == b"REJECTED EXTERNAL\r\n", "told of the last rejection, then no more"
    assert step.failed == "was rejected 6 times"
    with pytest.raises(RuntimeError, match="over"):
        auth.receive(b"AUTH\r\n")


def test_the_first_byte_must_be_nul() -> None:
    assert say(b"AUTH EXTERNAL\r\n").failed == "the first byte was not NUL"
    assert say(b"").failed is None


def test_descriptors_only_where_they_can_pass() -> None:
    auth = ServerAuth(GUID, UID, unix_fds=False)
    step = say(b"\0AUTH EXTERNAL " + HEX + b"\r\nNEGOTIATE_UNIX_FD\r\nBEGIN\r\n", auth)
    assert b"not supported" in step.reply
    assert step.done and not step.unix_fds


def test_anonymous_where_it_is_configured() -> None:
    allowed = ServerAuth(GUID, UID, mechanisms=("ANONYMOUS",), allow_anonymous=True)
    step = say(b"\0AUTH ANONYMOUS 6d65\r\nBEGIN\r\n", allowed)
    assert step == AuthStep(OK, done=True, anonymous=True)
    assert replies(b"AUTH ANONYMOUS ff", auth=ServerAuth(GUID, 1, mechanisms=("ANONYMOUS",))) == [
        b"REJECTED ANONYMOUS"
    ]
    refused = ServerAuth(GUID, UID, mechanisms=("ANONYMOUS", "EXTERNAL"))
    step = say(b"\0AUTH ANONYMOUS\r\nBEGIN\r\n", refused)
    assert step.failed is not None and "allow_anonymous" in step.failed
    assert not step.done and not step.anonymous


def test_a_line_without_end_ends_it() -> None:
    auth = ServerAuth(GUID, UID)
    assert say(b"\0" + b"A" * 16384, auth).failed is None
    failed = auth.receive(b"A").failed
    assert failed == "sent a line of more than 16384 bytes"


def test_a_long_line_with_an_end_ends_it_too() -> None:
    assert say(b"\0" + b"A" * 20000 + b"\r\n").failed is not None


def test_what_follows_begin_has_no_limit_here() -> None:
    stream = os.urandom(100_000)
    step = say(b"\0AUTH EXTERNAL " + HEX + b"\r\nBEGIN\r\n" + stream)
    assert step.done and step.rest == stream


def test_a_flood_of_lines_ends_it() -> None:
    step = say(b"\0" + b"\r\n" * 2000)
    assert step.failed is not None and "answers" in step.failed


@given(st.lists(st.integers(1, 20), max_size=60))
def test_it_does_not_matter_how_the_bytes_arrive(sizes: list[int]) -> None:
    data = b"\0AUTH\r\nAUTH EXTERNAL\r\nDATA\r\nNEGOTIATE_UNIX_FD\r\nBEGIN\r\nl\1\0\1"
    whole = say(data)
    auth = ServerAuth(GUID, UID)
    reply = b""
    for size in [*sizes, len(data)]:
        piece, data = data[:size], data[size:]
        step = auth.receive(piece)
        reply += step.reply
        if step.done:
            break
    assert reply == whole.reply
    assert step.done and step.unix_fds
    assert step.rest + data == whole.rest


@given(
    st.lists(st.sampled_from((b"AUTH", b"EXTERNAL", b" ", b"\r\n", b"\0", b"DATA")) | st.binary())
)
def test_garbage_never_authenticates(parts: list[bytes]) -> None:
    data = b"\0" + b"".join(parts)
    if b"BEGIN" not in data:
        assert not say(data).done


# -- client ----------------------------------------------------------------------------------


@pytest.mark.parametrize("uid", [None, UID])
@pytest.mark.parametrize("fds", [True, False])
@pytest.mark.parametrize("server_fds", [True, False])
def test_client_and_server_agree(uid: int | None, fds: bool, server_fds: bool) -> None:
    client, server = ClientAuth(uid, unix_fds=fds), ServerAuth(GUID, UID, unix_fds=server_fds)
    answer = server.receive(client.start())
    for at in range(len(answer.reply) - 1):
        assert not client.receive(answer.reply[at : at + 1]).done
    step = client.receive(answer.reply[-1:] + b"first bytes")
    assert step.done and step.guid == GUID and step.unix_fds == (fds and server_fds)
    assert step.rest == b"first bytes"
    end = server.receive(step.send)
    assert end.done and end.unix_fds == (fds and server_fds)


def test_client_that_is_rejected_says_so() -> None:
    client = ClientAuth(0)
    step = client.receive(ServerAuth(GUID, UID).receive(client.start()).reply)
    assert step.failed == "the bus answered REJECTED"


# -- the real one ----------------------------------------------------------------------------

MINE = str(os.getuid()).encode().hex().encode()
OTHER = str(os.getuid() + 1).encode().hex().encode()

CONVERSATIONS = [
    [b"AUTH EXTERNAL " + MINE, b"NEGOTIATE_UNIX_FD", b"BEGIN"],
    [b"AUTH EXTERNAL", b"DATA", b"NEGOTIATE_UNIX_FD", b"NEGOTIATE_UNIX_FD"],
    [b"AUTH EXTERNAL", b"DATA " + MINE, b"FOO", b""],
    [b"AUTH EXTERNAL", b"DATA " + OTHER, b"DATA"],
    [b"AUTH EXTERNAL " + OTHER, b"AUTH EXTERNAL " + MINE],
    [b"AUTH EXTERNAL " + b"root".hex().encode()],
    [b"AUTH EXTERNAL  \t " + MINE],
    [b"AUTH\tEXTERNAL\t" + MINE],
    [b"AUTH EXTERNAL " + MINE + b" "],
    [b" AUTH EXTERNAL " + MINE],
    [b"AUTH EXTERNAL " + MINE[:-1]],
    [b"AUTH EXTERNAL " + MINE[:-1] + b"g"],
    [b"AUTH EXTERNAL zz", b"DATA", b"AUTH EXTERNAL", b"DATA zz", b"DATA"],
    [b"AUTH", b"AUTH ", b"AUTH  EXTERNAL"],
    [b"AUTH FOO", b"AUTH EXTERNALS", b"AUTH ANONYMOUS"],
    [b"CANCEL", b"DATA", b"ERROR", b"NEGOTIATE_UNIX_FD", b"OK", b"REJECTED", b"AGREE_UNIX_FD"],
    [b"AUTH EXTERNAL", b"AUTH", b"NEGOTIATE_UNIX_FD", b"OK", b"CANCEL", b"CANCEL"],
    [b"AUTH EXTERNAL", b"ERROR", b"AUTH EXTERNAL " + MINE, b"ERROR"],
    [b"AUTH EXTERNAL " + MINE, b"AUTH", b"DATA", b"OK", b"CANCEL", b"NEGOTIATE_UNIX_FD"],
    [b"AUTH"] * 7,
    [b"BEGIN"],
    [b"AUTH EXTERNAL", b"BEGIN"],
    [b"A\xc3\xa9", b"AUTH\0", b"auth"],
    [b"\r", b"\n", b"AUTH\r"],
    [b"ERROR " + b"x" * 3000, b"NEGOTIATE_UNIX_FD x"],
]


def _answers(client: socket.socket, lines: int) -> bytes:
    """What the daemon answers, `lines` long unless it hangs up before."""
    received = b""
    while received.count(b"\r\n") < lines:
        try:
            more = client.recv(4096)
        except ConnectionResetError:
            break
        if not more:
            break
        received += more
    return received


@pytest.mark.parametrize("lines", CONVERSATIONS)
@pytest.mark.parametrize("mechanisms", [("EXTERNAL",), ("ANONYMOUS", "EXTERNAL")])
def test_the_real_dbus_daemon_answers_the_same(
    dbus_daemon: Callable[[str], DbusDaemon], mechanisms: tuple[str, ...], lines: list[bytes]
) -> None:
    """Byte for byte: each line has one line for its answer, but for BEGIN, which has none."""
    daemon = dbus_daemon("".join(f"<auth>{name}</auth>" for name in mechanisms))
    data = b"\0" + b"".join(line + b"\r\n" for line in lines)
    with daemon.connect() as client:
        client.sendall(data)
        theirs = _answers(client, len(lines) - lines.count(b"BEGIN"))
    ours = ServerAuth("@", os.getuid(), mechanisms=mechanisms).receive(data).reply
    guid = next((line[3:] for line in theirs.splitlines() if line.startswith(b"OK ")), b"@")
    assert ours.replace(b"OK @", b"OK " + guid) == theirs


def test_our_client_on_the_real_dbus_daemon(
    dbus_daemon: Callable[[str], DbusDaemon],
) -> None:
    with dbus_daemon("<auth>EXTERNAL</auth>").connect() as client:
        auth = ClientAuth()
        client.sendall(auth.start())
        step = auth.receive(client.recv(4096))
        while not step.done:
            step = auth.receive(client.recv(4096))
        assert step.unix_fds and len(step.guid) == 32


def test_the_names_of_a_uid_in_a_user_namespace() -> None:
    two = b"         0     100000      65536\n     70000       1000          1\n"
    assert aliases(two, 100000) == (0,)
    assert aliases(two, 165535) == (65535,)
    assert aliases(two, 1000) == (70000,)
    assert aliases(two, 165536) == aliases(two, 0) == aliases(b"", 0) == ()


# -- the usual conversation ----------------------------------------------------------------------

USUAL = b"\0AUTH EXTERNAL " + HEX + b"\r\nNEGOTIATE_UNIX_FD\r\nBEGIN\r\n"
UNCLAIMED = b"\0AUTH EXTERNAL\r\nDATA\r\nNEGOTIATE_UNIX_FD\r\nBEGIN\r\n"


@pytest.mark.parametrize("fds", [b"NEGOTIATE_UNIX_FD\r\n", b""])
@pytest.mark.parametrize("claim", [b" " + HEX + b"\r\n", b"\r\nDATA\r\n"])
@pytest.mark.parametrize("rest", [b"", b"l\1", b"BEGIN\r\n", b"\r\n" * 9000])
def test_the_usual_conversation_is_known(claim: bytes, fds: bytes, rest: bytes) -> None:
    data = b"\0AUTH EXTERNAL" + claim + fds + b"BEGIN\r\n" + rest
    step = usual(data, GUID, UID)
    assert step is not None
    assert step == say(data)


_PIECES = st.sampled_from(
    [
        b"\0",
        b"AUTH",
        b" ",
        b"EXTERNAL",
        HEX,
        b"30",
        b"\r\n",
        b"DATA",
        b"NEGOTIATE_UNIX_FD",
        b"BEGIN",
    ]
    + [USUAL, UNCLAIMED, b"ERROR", b"CANCEL", b"\n", b"x"]
)


@given(st.lists(_PIECES, max_size=14).map(b"".join))
def test_what_is_taken_for_usual_gets_the_same_answers(data: bytes) -> None:
    step = usual(data, GUID, UID)
    assert step is None or step == say(data)


@given(st.sampled_from([USUAL, UNCLAIMED]), st.data())
def test_what_is_nearly_usual_gets_the_same_answers(text: bytes, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(text)))
    until = data.draw(st.integers(at, min(len(text), at + 3)))
    changed = text[:at] + data.draw(st.binary(max_size=3)) + text[until:]
    step = usual(changed, GUID, UID)
    assert step is None or step == say(changed)


def test_a_uid_that_is_another_one_is_not_usual() -> None:
    assert usual(USUAL, GUID, UID + 1) is None
