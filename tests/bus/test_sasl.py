"""Authentication on the wire, before the first message (D-Bus specification, "Authentication").

Answers are compared byte for byte with what dbus-daemon 1.14 says, because clients pipeline and
count on them.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator

import pytest

from . import procs
from . import wireformat as w
from .daemon import OPEN_POLICY, Bus, configuration
from .rawclient import DRIVER, DRIVER_PATH, BusError, Disconnected, RawClient, RawSocket

UID = str(os.geteuid()).encode().hex().encode()
HELLO = w.build(
    w.CALL,
    {w.PATH: DRIVER_PATH, w.DESTINATION: DRIVER, w.INTERFACE: DRIVER, w.MEMBER: "Hello"},
    serial=1,
)


@pytest.fixture
def raw(bus: Bus) -> Iterator[RawSocket]:
    """A connected socket that has said nothing but the NUL byte."""
    sock = RawSocket(bus.address)
    sock.write(b"\0")
    yield sock
    sock.close()


def ok(bus: Bus) -> bytes:
    return b"OK " + bus.guid.encode()


def assert_hello_works(raw: RawSocket) -> None:
    raw.write(b"BEGIN\r\n" + HELLO)
    while len(raw.buffer) < 16 or len(raw.buffer) < w.total_length(bytes(raw.buffer[:16])):
        raw.fill()
    reply = w.parse(bytes(raw.buffer[: w.total_length(bytes(raw.buffer[:16]))]))
    assert (reply.type, reply.reply_serial) == (w.RETURN, 1)


def test_external_with_uid(bus: Bus, raw: RawSocket) -> None:
    assert raw.line(b"AUTH EXTERNAL " + UID) == ok(bus)
    assert_hello_works(raw)


def test_external_with_empty_data(bus: Bus, raw: RawSocket) -> None:
    """No initial response: the server asks for data; empty data means whoever the kernel says."""
    assert raw.line(b"AUTH EXTERNAL") == b"DATA"
    assert raw.line(b"DATA") == ok(bus)
    assert_hello_works(raw)


def test_external_data_after_challenge(bus: Bus, raw: RawSocket) -> None:
    assert raw.line(b"AUTH EXTERNAL") == b"DATA"
    assert raw.line(b"DATA " + UID) == ok(bus)
    assert_hello_works(raw)


def test_pipelined_in_one_write(bus: Bus) -> None:
    """As systemd's sd-bus does: everything to the first message at once."""
    sock = RawSocket(bus.address)
    sock.write(b"\0AUTH EXTERNAL\r\nDATA\r\nNEGOTIATE_UNIX_FD\r\nBEGIN\r\n" + HELLO)
    expected = b"DATA\r\n" + ok(bus) + b"\r\nAGREE_UNIX_FD\r\n"
    while len(sock.buffer) < len(expected) + 16:
        sock.fill()
    assert bytes(sock.buffer[: len(expected)]) == expected
    assert sock.buffer[len(expected) : len(expected) + 2] == b"l\x02"
    sock.close()


def test_byte_by_byte(bus: Bus) -> None:
    sock = RawSocket(bus.address)
    for byte in b"\0AUTH EXTERNAL " + UID + b"\r\n":
        sock.write(bytes([byte]))
    assert sock.read_line() == ok(bus)
    for byte in b"BEGIN\r\n" + HELLO:
        sock.write(bytes([byte]))
    sock.fill()
    assert sock.buffer[:2] == b"l\x02"
    sock.close()


def test_auth_without_mechanism_lists_mechanisms(raw: RawSocket) -> None:
    assert raw.line(b"AUTH") == b"REJECTED EXTERNAL"


@pytest.mark.parametrize("mechanism", [b"ANONYMOUS", b"DBUS_COOKIE_SHA1 30", b"NONSENSE"])
def test_other_mechanisms_are_rejected(bus: Bus, raw: RawSocket, mechanism: bytes) -> None:
    assert raw.line(b"AUTH " + mechanism) == b"REJECTED EXTERNAL"
    assert raw.line(b"AUTH EXTERNAL " + UID) == ok(bus)


@pytest.mark.parametrize(
    "claimed", [str(os.geteuid() + 1), "-1", "99999999999999999999", "root ", "no-such-user"]
)
def test_claim_to_be_another_is_rejected(bus: Bus, raw: RawSocket, claimed: str) -> None:
    assert raw.line(b"AUTH EXTERNAL " + claimed.encode().hex().encode()) == b"REJECTED EXTERNAL"
    assert raw.line(b"AUTH EXTERNAL " + UID) == ok(bus)


def test_user_name_instead_of_uid_is_rejected(raw: RawSocket) -> None:
    assert raw.line(b"AUTH EXTERNAL " + b"root".hex().encode()) == b"REJECTED EXTERNAL"


@pytest.mark.parametrize("command", [b"NONSENSE", b"nonsense", b"", b"OK 1234", b"AUTHX EXTERNAL"])
def test_unknown_command_is_an_error(bus: Bus, raw: RawSocket, command: bytes) -> None:
    assert raw.line(command).startswith(b"ERROR")
    assert raw.line(b"AUTH EXTERNAL " + UID) == ok(bus)


@pytest.mark.parametrize("data", [b"xyz", b"30 30", b"3g"])
def test_bad_hexadecimal_is_an_error(bus: Bus, raw: RawSocket, data: bytes) -> None:
    assert raw.line(b"AUTH EXTERNAL " + data).startswith(b"ERROR")
    assert raw.line(b"AUTH EXTERNAL " + UID) == ok(bus)


def test_cancel_while_waiting_for_data(bus: Bus, raw: RawSocket) -> None:
    assert raw.line(b"AUTH EXTERNAL") == b"DATA"
    assert raw.line(b"CANCEL") == b"REJECTED EXTERNAL"
    assert raw.line(b"AUTH EXTERNAL " + UID) == ok(bus)


def test_cancel_after_ok(bus: Bus, raw: RawSocket) -> None:
    assert raw.line(b"AUTH EXTERNAL " + UID) == ok(bus)
    assert raw.line(b"CANCEL") == b"REJECTED EXTERNAL"
    assert raw.line(b"AUTH EXTERNAL " + UID) == ok(bus)


def test_error_from_client_rejects(bus: Bus, raw: RawSocket) -> None:
    assert raw.line(b"ERROR something") == b"REJECTED EXTERNAL"
    assert raw.line(b"AUTH EXTERNAL") == b"DATA"
    assert raw.line(b"ERROR") == b"REJECTED EXTERNAL"
    assert raw.line(b"AUTH EXTERNAL " + UID) == ok(bus)


def test_data_without_auth_is_an_error(raw: RawSocket) -> None:
    assert raw.line(b"DATA").startswith(b"ERROR")


def test_second_auth_is_an_error(bus: Bus, raw: RawSocket) -> None:
    assert raw.line(b"AUTH EXTERNAL " + UID) == ok(bus)
    assert raw.line(b"AUTH EXTERNAL " + UID).startswith(b"ERROR")
    assert_hello_works(raw)


def test_negotiate_unix_fd_only_after_ok(bus: Bus, raw: RawSocket) -> None:
    assert raw.line(b"NEGOTIATE_UNIX_FD").startswith(b"ERROR")
    assert raw.line(b"AUTH EXTERNAL " + UID) == ok(bus)
    assert raw.line(b"NEGOTIATE_UNIX_FD") == b"AGREE_UNIX_FD"
    assert_hello_works(raw)


def test_begin_before_ok_disconnects(raw: RawSocket) -> None:
    raw.write(b"BEGIN\r\n")
    assert raw.expect_disconnect() == b""


def test_too_many_failures_disconnect(raw: RawSocket) -> None:
    """A client that is rejected again and again does not get to try for ever."""
    raw.write(b"AUTH NONSENSE\r\n" * 30)
    assert raw.expect_disconnect().count(b"REJECTED") < 30


def test_first_byte_must_be_nul(bus: Bus) -> None:
    sock = RawSocket(bus.address)
    sock.write(b"AUTH EXTERNAL " + UID + b"\r\n")
    assert sock.expect_disconnect() == b""
    sock.close()


def test_endless_line_disconnects(raw: RawSocket) -> None:
    """A line that never ends is not collected for ever: the limit is some tens of KiB."""
    with pytest.raises((BrokenPipeError, ConnectionResetError)):
        for _ in range(10_000):
            raw.write(b"A" * 1024)


def test_non_ascii_line_does_not_authenticate(bus: Bus, raw: RawSocket) -> None:
    raw.write("AUTH EXTERNÄL\r\n".encode())
    answer = raw.read_line()
    assert answer.startswith((b"ERROR", b"REJECTED"))


def test_disconnect_in_the_middle_hurts_nobody(bus: Bus) -> None:
    other = bus.connect()
    for part in (
        b"",
        b"\0",
        b"\0AUTH",
        b"\0AUTH EXTERNAL\r\n",
        b"\0AUTH EXTERNAL " + UID + b"\r\n",
    ):
        sock = RawSocket(bus.address)
        if part:
            sock.write(part)
        sock.close()
    assert other.driver("GetNameOwner", "s", (other.name,)) == [other.name]


def test_unauthenticated_client_is_dropped_in_time(start_bus) -> None:  # type: ignore[no-untyped-def]
    bus = start_bus(limits={"auth_timeout": 300})
    sock = RawSocket(bus.address)
    sock.write(b"\0AUTH EXTERNAL\r\n")
    assert sock.expect_disconnect() == b"DATA\r\n"
    sock.close()


STRANGER = 12345
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be several users")


@pytest.fixture
def start_for_anybody(start_bus: Callable[..., Bus]) -> Callable[[str], Bus]:
    """Starts a bus on which EXTERNAL is for its owner, ANONYMOUS for all; with more rules."""

    def start(rules: str = "") -> Bus:
        shape = configuration(
            "unix:tmpdir=/tmp", policy=OPEN_POLICY + rules, extra="<allow_anonymous/>"
        )
        return start_bus(config=shape.replace("<auth>EXTERNAL</auth>", ""))

    return start


@contextlib.contextmanager
def somebody(uid: int) -> Iterator[None]:
    """The kernel keeps who a client is when it connects."""
    mine = os.geteuid()
    if uid != mine:
        os.seteuid(uid)
    try:
        yield
    finally:
        if uid != mine:
            os.seteuid(mine)


def anonymous(bus: Bus, uid: int = os.geteuid()) -> RawClient:
    with somebody(uid):
        return RawClient(bus.address, anonymous=True)


ANONYMOUS_UIDS = pytest.mark.parametrize(
    "uid", [os.geteuid(), pytest.param(STRANGER, marks=as_root)]
)


@ANONYMOUS_UIDS
def test_whoever_reaches_the_socket_may_use_the_bus_where_anonymous_is_allowed(
    start_for_anybody: Callable[[str], Bus], uid: int
) -> None:
    bus = start_for_anybody("")
    other, client = bus.connect(), anonymous(bus, uid)
    assert client.request_name("test.sasl.Anonymous") == 1
    client.add_match("type='signal',interface='test.sasl'")
    other.signal("/", "test.sasl", "Seen")
    assert client.wait_signal("Seen").sender == other.name
    serial = other.send_call("test.sasl.Anonymous", "/", "test.sasl", "Ask")
    client.reply(client.wait_call("Ask"))
    assert other.wait_reply(serial).sender == client.name
    client.close()


@ANONYMOUS_UIDS
def test_nobody_is_told_who_an_anonymous_client_is_but_for_its_process(
    start_for_anybody: Callable[[str], Bus], uid: int
) -> None:
    bus = start_for_anybody("")
    client = anonymous(bus, uid)
    for asker in (bus.connect(), client):
        (found,) = asker.driver("GetConnectionCredentials", "s", (client.name,))
        found.pop("ProcessFD", None)
        assert found == {"ProcessID": ("u", os.getpid())}
        assert asker.driver("GetConnectionUnixProcessID", "s", (client.name,)) == [os.getpid()]
        with pytest.raises(BusError, match="Failed: Could not determine UID for"):
            asker.driver("GetConnectionUnixUser", "s", (client.name,))
        with pytest.raises(BusError, match="SecurityContextUnknown"):
            asker.driver("GetConnectionSELinuxSecurityContext", "s", (client.name,))
    client.close()


def test_the_owner_of_the_bus_has_no_privileges_as_an_anonymous_client(
    start_for_anybody: Callable[[str], Bus],
) -> None:
    bus = start_for_anybody(f'<policy user="{os.geteuid()}"><allow own="test.sasl.Mine"/></policy>')
    text = bus.config.read_text().replace('<allow own="*"/>', "")
    bus.config.write_text(text)
    owner = bus.connect()
    owner.driver("ReloadConfig")
    client = anonymous(bus)
    for member, signature, args in (
        ("AddMatch", "s", ("eavesdrop=true",)),
        ("UpdateActivationEnvironment", "a{ss}", ({"A": "B"},)),
    ):
        with pytest.raises(BusError, match=r"AccessDenied: .* with unknown uid"):
            client.driver(member, signature, args)
    with pytest.raises(BusError, match=r"AccessDenied: .* with unknown uid"):
        client.driver("BecomeMonitor", "asu", ([], 0), interface=f"{DRIVER}.Monitoring")
    with pytest.raises(BusError, match="AccessDenied"):
        client.request_name("test.sasl.Mine")
    assert owner.request_name("test.sasl.Mine") == 1
    client.close()


@as_root
def test_a_stranger_may_not_connect_by_external_where_anonymous_is_allowed(
    start_for_anybody: Callable[[str], Bus],
) -> None:
    bus = start_for_anybody("")
    with somebody(STRANGER), pytest.raises((Disconnected, BrokenPipeError)):
        RawClient(bus.address)


@as_root
@pytest.mark.parametrize("extra", ["", "<auth>ANONYMOUS</auth>", "<auth>EXTERNAL</auth>"])
def test_a_stranger_may_not_connect_by_anonymous_where_it_is_not_allowed(
    start_bus: Callable[..., Bus], extra: str
) -> None:
    shape = configuration("unix:tmpdir=/tmp", extra=extra)
    bus = start_bus(config=shape.replace("<auth>EXTERNAL</auth>", "", 1))
    with somebody(STRANGER):
        client = RawSocket(bus.address)
    client.write(b"\0AUTH ANONYMOUS\r\nBEGIN\r\n" + HELLO)
    assert b"NameAcquired" not in client.expect_disconnect()
    client.close()


@pytest.mark.kbusd_only
def test_nobody_gets_rid_of_what_he_is_denied_by_not_saying_who_he_is(
    start_for_anybody: Callable[[str], Bus],
) -> None:
    """(On dbus-daemon he does.)"""
    rules = '<deny own="test.sasl.Mine"/><deny send_interface="test.sasl" send_member="No"/>'
    bus = start_for_anybody(f'<policy user="{os.geteuid()}">{rules}</policy>')
    client = anonymous(bus)
    with pytest.raises(BusError, match="AccessDenied"):
        client.request_name("test.sasl.Mine")
    with pytest.raises(BusError, match="AccessDenied"):
        client.call(client.name, "/", "test.sasl", "No")
    client.close()


@pytest.mark.kbusd_only
def test_anonymous_clients_count_for_their_users(start_bus: Callable[..., Bus]) -> None:
    """(On dbus-daemon for nobody.)"""
    shape = configuration(
        "unix:tmpdir=/tmp",
        extra="<allow_anonymous/><auth>ANONYMOUS</auth>",
        limits={"max_connections_per_user": 1},
    )
    bus = start_bus(config=shape)
    client = anonymous(bus)
    with pytest.raises(BusError, match="LimitsExceeded"):
        anonymous(bus)
    client.close()


def test_message_size_before_auth_is_not_trusted(bus: Bus) -> None:
    """Bytes that look like a message are a broken SASL line until BEGIN."""
    sock = RawSocket(bus.address)
    sock.write(b"\0" + HELLO + b"\r\n")
    answer = sock.read_line()
    assert answer.startswith(b"ERROR")
    sock.close()


def test_fd_sent_with_auth_is_not_kept(bus: Bus) -> None:
    """Descriptors before BEGIN are closed: the other end of the pipe sees it."""
    reader, writer = os.pipe()
    client = RawSocket(bus.address)
    client.write(b"\0", [writer])
    os.close(writer)
    client.close()
    with os.fdopen(reader, "rb") as pipe:
        assert pipe.read() == b""


def test_client_without_negotiation_gets_no_fds(bus: Bus) -> None:
    client = RawClient(bus.address, fds=False)
    assert client.name.startswith(":1.")
    client.close()


@pytest.mark.kbusd_only
def test_a_client_that_came_after_a_reload_was_authenticated_by_the_auth_from_before(
    start_bus: Callable[..., Bus],
) -> None:
    """By workers that were made before it. (dbus-daemon keeps the <auth> that it was started with.)"""
    bus = start_bus()
    admin = bus.connect()
    procs.eventually(lambda: len(bus.workers()) >= 4, "there are spare workers")
    text = bus.config.read_text()
    new = text.replace("EXTERNAL", "ANONYMOUS").replace("<auth>", "<allow_anonymous/><auth>")
    bus.config.write_text(new)
    admin.driver("ReloadConfig")
    for _ in range(6):
        late = RawSocket(bus.address)
        late.write(b"\0")
        assert late.line(b"AUTH EXTERNAL " + UID) == b"REJECTED ANONYMOUS"
        late.close()
    bus.config.write_text(text)
    admin.driver("ReloadConfig")
    for _ in range(6):
        assert bus.connect().name
