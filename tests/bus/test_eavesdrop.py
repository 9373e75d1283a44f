"""Match rules with eavesdrop='true': who sees what is addressed to another.

Only root and the bus's owner may have such rules, and policy must let them: its receive rules by
eavesdrop="true", which Debian's session bus has and its system bus has not. What the bus itself says
to one client is for monitors only.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest

from . import wireformat as w
from .daemon import Bus
from .rawclient import DRIVER, DRIVER_PATH, BusError, RawClient

OPEN_TO_ALL = """
  <policy context="default">
    <allow user="*"/>
    <allow send_destination="*" eavesdrop="true"/>
    <allow eavesdrop="true"/>
    <allow own="*"/>
  </policy>
"""


@pytest.fixture
def nosy(bus: Bus) -> Iterator[RawClient]:
    """Overhears everything, from the moment at which the test begins."""
    client = bus.connect()
    client.add_match("eavesdrop='true'")
    client.drain()
    yield client


def test_sees_calls_replies_errors_and_signals_to_others(bus: Bus, nosy: RawClient) -> None:
    client, service = bus.connect(), bus.connect()
    service.request_name("test.Overheard")
    nosy.drain(service)
    asked = client.send_call("test.Overheard", "/p", "test.I", "Ask", "s", ("for",))
    service.reply(service.wait_call("Ask"), "s", ("this",))
    client.wait_reply(asked)
    failing = client.send_call(service.name, "/p", "test.I", "Fail")
    service.reply_error(service.wait_call("Fail"), "test.Error", "no")
    with pytest.raises(BusError):
        client.wait_reply(failing)
    client.signal("/p", "test.I", "Told", to=service.name)
    seen = nosy.drain(client)
    facts = [(m.type, m.sender, m.destination, m.member or m.error_name, m.args) for m in seen]
    assert facts == [
        (w.CALL, client.name, "test.Overheard", "Ask", ["for"]),
        (w.RETURN, service.name, client.name, None, ["this"]),
        (w.CALL, client.name, service.name, "Fail", []),
        (w.ERROR, service.name, client.name, "test.Error", ["no"]),
        (w.SIGNAL, client.name, service.name, "Told", []),
    ]
    assert (seen[0].serial, seen[1].reply_serial) == (asked, asked)


def test_sees_calls_to_the_bus_but_not_what_it_says_to_one(bus: Bus, nosy: RawClient) -> None:
    client = bus.connect()
    nosy.drain(client)
    client.driver("GetId")
    client.request_name("test.Overheard.Name")
    seen = nosy.drain(client)
    assert {m.member for m in seen} == {"GetId", "RequestName", "NameOwnerChanged"}
    assert len(seen) == 3
    with pytest.raises(BusError):
        client.driver("NoSuchMethod")
    assert nosy.drain(client) == []
    newcomer = bus.connect()
    assert nosy.wait_call("Hello").sender == newcomer.name


def test_does_not_see_what_the_bus_refuses(bus: Bus, nosy: RawClient) -> None:
    """It saw what only the broker refuses."""
    client = bus.connect()
    nosy.drain(client)
    for member, args in (
        ("RemoveMatch", ("member='Unheard'",)),
        ("GetNameOwner", ("test.Nobody",)),
    ):
        client.send_call(DRIVER, DRIVER_PATH, DRIVER, member, "s", args)
    client.request_name("test.Overheard.Granted")
    client.driver("AddMatch", "s", ("member='Heard'",))
    seen = [m.member for m in nosy.drain(client) if m.sender == client.name]
    assert seen == ["RequestName", "AddMatch"]


def test_a_hello_that_was_said_again_after_a_refusal_was_seen_twice(
    start_bus: Callable[..., Bus],
) -> None:
    bus = start_bus(limits={"max_completed_connections": 2})
    nosy, other, late = bus.connect(), bus.connect(), bus.connect(hello=False)
    nosy.add_match("eavesdrop='true'")
    with pytest.raises(BusError, match="LimitsExceeded"):
        late.call(DRIVER, DRIVER_PATH, None, "Hello")  # another header: nothing of it is kept
    other.close()
    nosy.wait(lambda m: m.member == "NameOwnerChanged" and m.args == [other.name, other.name, ""])
    late.name = late.driver("Hello")[0]
    assert [m.member for m in nosy.drain(late)].count("Hello") == 1


def test_gets_what_is_its_own_once(bus: Bus, nosy: RawClient) -> None:
    client = bus.connect()
    nosy.drain(client)
    client.signal("/p", "test.I", "Broadcast")
    client.signal("/p", "test.I", "ForIt", to=nosy.name)
    assert [m.member for m in nosy.drain(client)] == ["Broadcast", "ForIt"]
    nosy.signal("/p", "test.I", "ItSaid", to=client.name)
    assert client.wait_signal("ItSaid").sender == nosy.name
    assert [m.member for m in nosy.drain()] == ["ItSaid"]


def test_sees_what_its_rules_match(bus: Bus) -> None:
    """By all names of the addressee, and by arguments."""
    sender, receiver, other = (bus.connect() for _ in range(3))
    receiver.request_name("test.Addressee")
    by_name, by_argument = bus.connect(), bus.connect()
    by_name.add_match("eavesdrop='true',destination='test.Addressee'")
    by_argument.add_match("eavesdrop='true',type='method_call',arg0='this'")
    for to in (receiver.name, "test.Addressee", other.name):
        for argument in ("this", "that"):
            flags = w.NO_REPLY_EXPECTED
            sender.send_call(to, "/", "test.I", "Call", "s", (argument,), flags=flags)
    calls = [(m.destination, m.args[0]) for m in by_name.drain(sender) if m.type == w.CALL]
    assert calls == [
        (to, args) for to in (receiver.name, "test.Addressee") for args in ("this", "that")
    ]
    calls = [(m.destination, m.args[0]) for m in by_argument.drain(sender)]
    assert calls == [(to, "this") for to in (receiver.name, "test.Addressee", other.name)]


def test_hears_no_more_without_the_rule(bus: Bus, nosy: RawClient) -> None:
    sender, receiver = bus.connect(), bus.connect()
    nosy.add_match("eavesdrop='true'")
    nosy.driver("RemoveMatch", "s", ("eavesdrop='true'",))
    nosy.drain(sender)
    sender.signal("/", "test.I", "Heard", to=receiver.name)
    assert [m.member for m in nosy.drain(sender)] == ["Heard"]
    nosy.driver("RemoveMatch", "s", ("eavesdrop='true'",))
    nosy.drain()
    sender.signal("/", "test.I", "Unheard", to=receiver.name)
    assert receiver.wait_signal("Unheard")
    assert nosy.drain(sender) == []


@pytest.mark.parametrize("size", [1000, 60_000, 200_000, 3_000_000])
def test_sees_large_messages(bus: Bus, nosy: RawClient, size: int) -> None:
    sender, receiver = bus.connect(), bus.connect()
    body = bytes(range(256)) * (size // 256)
    for member in ("First", "Second"):
        sender.signal("/", "test.I", member, "ay", (body,), to=receiver.name)
    for client in (receiver, nosy):
        for member in ("First", "Second"):
            assert bytes(client.wait_signal(member).args[0]) == body


def test_descriptors_go_to_whoever_takes_them(bus: Bus, nosy: RawClient) -> None:
    sender, receiver = bus.connect(), bus.connect()
    without = bus.connect(fds=False)
    without.add_match("eavesdrop='true',member='Descriptor'")
    reader, writer = os.pipe()
    sender.signal("/", "test.I", "Descriptor", "h", (0,), to=receiver.name, fds=[writer])
    os.close(writer)
    for client in (receiver, nosy):
        (fd,) = client.wait_signal("Descriptor").fds
        os.write(fd, b"x")
        os.close(fd)
    assert without.drain(sender) == []
    assert os.read(reader, 10) == b"xx"
    os.close(reader)


def test_sees_what_is_sent_to_a_service_once_it_runs(start_bus: Callable[..., Bus]) -> None:
    bus = start_bus()
    (bus.services / "late.service").write_text("[D-BUS Service]\nName=test.Late\nExec=/bin/false\n")
    client, nosy, service = bus.connect(), bus.connect(), bus.connect()
    service.driver("ReloadConfig")
    nosy.add_match("eavesdrop='true',interface='test.I'")
    # It fails to start: the call goes to nobody, and nobody overhears it.
    with pytest.raises(BusError):
        client.call("test.Late", "/", "test.I", "Early")
    service.request_name("test.Late")
    client.send_call("test.Late", "/", "test.I", "Late", flags=w.NO_REPLY_EXPECTED)
    assert [m.member for m in nosy.drain(client)] == ["Late"]


def test_policy_must_let_it(strict_bus: Bus) -> None:
    """Rules that do not say eavesdrop="true" are about one's own messages."""
    sender, receiver, nosy = (strict_bus.connect() for _ in range(3))
    nosy.add_match("eavesdrop='true'")
    sender.signal("/", "test.I", "Private", to=receiver.name)
    asked = sender.send_call(receiver.name, "/", "test.I", "Ask")
    receiver.reply(receiver.wait_call("Ask"))
    sender.wait_reply(asked)
    sender.signal("/", "test.I", "Public")
    assert [m.member for m in nosy.drain(sender)] == ["Public"]


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
def test_only_for_the_privileged(start_bus: Callable[..., Bus]) -> None:
    bus = start_bus(policy=OPEN_TO_ALL)
    os.chmod(bus.directory, 0o755)
    os.seteuid(65534)
    try:
        nobody = bus.connect()
    finally:
        os.seteuid(0)
    with pytest.raises(BusError, match="rejected attempt to call AddMatch") as refused:
        nobody.add_match("eavesdrop='true'")
    assert refused.value.name == "org.freedesktop.DBus.Error.AccessDenied"
    nobody.add_match("eavesdrop='false',member='Private'")
    root, other = bus.connect(), bus.connect()
    root.signal("/", "test.I", "Private", to=other.name)
    assert nobody.drain(root) == []


def test_one_that_does_not_read_disturbs_nobody(start_bus: Callable[..., Bus]) -> None:
    bus = start_bus(limits={"max_outgoing_bytes": 1_000_000})
    sender, receiver, nosy = (bus.connect() for _ in range(3))
    nosy.add_match("eavesdrop='true',member='Much'")
    for _ in range(200):
        sender.signal("/", "test.I", "Much", "ay", (b"x" * 20_000,), to=receiver.name)
        receiver.wait_signal("Much")
    assert sender.driver("GetId")
