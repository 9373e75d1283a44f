"""Messages between clients: who gets what, in which order, with which header."""

from __future__ import annotations

import socket

import pytest

from . import wireformat as w
from .daemon import STRICT_POLICY, Bus
from .rawclient import DRIVER, DRIVER_PATH, BusError, RawSocket

ERROR = "org.freedesktop.DBus.Error."
MONITORING = "org.freedesktop.DBus.Monitoring"


@pytest.fixture(params=["strict", pytest.param("open", marks=pytest.mark.kbusd_only)])
def any_bus(request: pytest.FixtureRequest) -> Bus:
    """kbusd drops replies that nobody asked for whatever the policy says, dbus-daemon if it may."""
    return request.getfixturevalue("strict_bus" if request.param == "strict" else "bus")


# -- calls and replies -------------------------------------------------------------------


def test_call_and_reply(bus: Bus) -> None:
    caller, callee = bus.connect(), bus.connect()
    serial = caller.send_call(callee.name, "/obj", "test.I", "Echo", "si", ("hällo", -5))
    call = callee.read()
    assert (call.type, call.serial, call.flags) == (w.CALL, serial, 0)
    assert (call.path, call.interface, call.member) == ("/obj", "test.I", "Echo")
    assert (call.sender, call.destination) == (caller.name, callee.name)
    assert call.args == ["hällo", -5]
    callee.reply(call, "s", ("done",))
    reply = caller.read()
    assert (reply.type, reply.reply_serial) == (w.RETURN, serial)
    assert (reply.sender, reply.destination) == (callee.name, caller.name)
    assert reply.args == ["done"]


def test_error_reply(bus: Bus) -> None:
    caller, callee = bus.connect(), bus.connect()
    serial = caller.send_call(callee.name, "/obj", "test.I", "Fail")
    callee.reply_error(callee.read(), "test.Error.Broken", "it broke")
    with pytest.raises(BusError) as caught:
        caller.wait_reply(serial)
    assert (caught.value.name, caught.value.text) == ("test.Error.Broken", "it broke")


def test_call_by_well_known_name_arrives_as_written(bus: Bus) -> None:
    caller, callee = bus.connect(), bus.connect()
    assert callee.request_name("test.messages.Named") == 1
    caller.send_call("test.messages.Named", "/", "test.I", "M")
    call = callee.wait_call("M")
    assert call.destination == "test.messages.Named"
    assert call.sender == caller.name


def test_call_to_oneself(bus: Bus) -> None:
    client = bus.connect()
    serial = client.send_call(client.name, "/", "test.I", "M")
    call = client.read()
    assert (call.member, call.sender) == ("M", client.name)
    client.reply(call, "u", (7,))
    assert client.wait_reply(serial).args == [7]


@pytest.mark.parametrize("endian", ["<", ">"])
def test_a_reply_serial_goes_with_a_call_or_a_signal(bus: Bus, endian: str) -> None:
    """It is valid there, and was dropped on the way."""
    sender, receiver, eavesdropper, monitor = (bus.connect() for _ in range(4))
    receiver.add_match("interface='test.Odd'")
    eavesdropper.add_match("interface='test.Odd',eavesdrop='true'")
    monitor.driver("BecomeMonitor", "asu", (["interface='test.Odd'"], 0), interface=MONITORING)
    fields = {w.PATH: "/odd", w.INTERFACE: "test.Odd", w.MEMBER: "M"}
    to = {**fields, w.DESTINATION: receiver.name}
    large = "x" * 300_000
    for type_, to_whom in ((w.SIGNAL, fields), (w.SIGNAL, to), (w.CALL, to)):
        for text, reply_serial in (("", 0xFFFF_FFFE), (large, 7), ("", None)):
            odd = {} if reply_serial is None else {w.REPLY_SERIAL: reply_serial}
            flags = w.NO_REPLY_EXPECTED
            sender.send(type_, {**to_whom, **odd}, "s", (text,), flags=flags, endian=endian)
            for client in (receiver, eavesdropper, monitor):
                got = client.wait(lambda m: m.interface == "test.Odd")
                assert (got.type, got.reply_serial, got.sender) == (
                    type_,
                    reply_serial,
                    sender.name,
                )
                assert (got.path, got.args) == ("/odd", [text])


def test_a_message_of_unknown_type_is_not_passed_on(bus: Bus) -> None:
    sender, receiver = bus.connect(), bus.connect()
    fields = {w.PATH: "/", w.MEMBER: "M", w.DESTINATION: receiver.name}
    with pytest.raises(BusError) as caught:
        sender.wait_reply(sender.send(5, fields))
    assert caught.value.name == ERROR + "AccessDenied"
    assert receiver.drain(sender) == []


def test_a_message_of_unknown_type_to_nobody_is_told_that_there_is_nobody(bus: Bus) -> None:
    """It was told that its type is unknown; dbus-daemon looks for the receiver first."""
    sender = bus.connect()
    fields = {w.PATH: "/", w.MEMBER: "M", w.DESTINATION: "test.messages.Nobody"}
    for flags, error in ((0, "ServiceUnknown"), (w.NO_AUTO_START, "NameHasNoOwner")):
        with pytest.raises(BusError) as caught:
            sender.wait_reply(sender.send(5, fields, flags=flags))
        assert caught.value.name == ERROR + error


def test_a_reply_to_the_bus_itself_is_refused(strict_bus: Bus) -> None:
    """It calls nobody. Such a reply was dropped without a word."""
    client = strict_bus.connect()
    fields = {w.REPLY_SERIAL: 7, w.DESTINATION: DRIVER}
    with pytest.raises(BusError) as caught:
        client.wait_reply(client.send(w.RETURN, fields))
    assert caught.value.name == ERROR + "AccessDenied"
    assert 'requested_reply="0"' in caught.value.text


@pytest.mark.parametrize("interface", ["org.freedesktop.DBus.Peer", "test.I"])
def test_a_call_without_destination_stays_between_client_and_bus(bus: Bus, interface: str) -> None:
    """Monitors saw it, and the answer had a sender; libdbus answers it as it does without a bus."""
    client, monitor = bus.connect(), bus.connect()
    monitor.driver("BecomeMonitor", "asu", ([], 0), interface=MONITORING)
    serial = client.send_call(None, "/", interface, "Ping")
    answer = client.wait(lambda m: m.reply_serial == serial)
    assert answer.type == (w.ERROR if interface == "test.I" else w.RETURN)
    assert (answer.sender, answer.destination) == (None, None)
    client.signal("/", "test.I", "End")
    seen = iter(monitor.read, None)
    assert next(m for m in seen if m.sender == client.name and m.type != w.ERROR).member == "End"


def test_call_without_interface(bus: Bus) -> None:
    caller, callee = bus.connect(), bus.connect()
    caller.send_call(callee.name, "/", None, "M")
    call = callee.read()
    assert (call.interface, call.member) == (None, "M")


def test_many_calls_in_flight_answered_in_reverse(bus: Bus) -> None:
    caller, callee = bus.connect(), bus.connect()
    serials = [caller.send_call(callee.name, "/", "test.I", "M", "u", (n,)) for n in range(50)]
    calls = [callee.read() for _ in range(50)]
    assert [call.args[0] for call in calls] == list(range(50))
    for call in reversed(calls):
        callee.reply(call, "u", tuple(call.args))
    replies = [caller.read() for _ in range(50)]
    assert [reply.reply_serial for reply in replies] == serials[::-1]
    assert [reply.args[0] for reply in replies] == list(range(50))[::-1]


def test_reply_that_nobody_asked_for_is_dropped(any_bus: Bus) -> None:
    victim, liar = any_bus.connect(), any_bus.connect()
    liar.send(w.RETURN, {w.DESTINATION: victim.name, w.REPLY_SERIAL: 1}, "s", ("lie",))
    liar.send(w.ERROR, {w.DESTINATION: victim.name, w.REPLY_SERIAL: 2, w.ERROR_NAME: "a.b"})
    assert victim.drain(liar) == []


@pytest.mark.parametrize("type_", [w.RETURN, w.ERROR])
@pytest.mark.parametrize("flags", [0, w.NO_REPLY_EXPECTED])
def test_who_replies_unasked_is_told_so(any_bus: Bus, type_: int, flags: int) -> None:
    victim, liar = any_bus.connect(), any_bus.connect()
    fields = {w.DESTINATION: victim.name, w.REPLY_SERIAL: 77}
    if type_ == w.ERROR:
        fields[w.ERROR_NAME] = "a.b"
    serial = liar.send(type_, fields, flags=flags)
    with pytest.raises(BusError) as caught:
        liar.wait_reply(serial)
    assert caught.value.name == ERROR + "AccessDenied"
    assert caught.value.text.startswith("Rejected send message, 0 matched rules; type=")
    assert 'requested_reply="0"' in caught.value.text
    assert caught.value.text.split(" (nobody waits for it)")[0] in any_bus.log()
    assert victim.drain(liar) == []


def test_reply_from_another_than_the_callee_is_dropped(any_bus: Bus) -> None:
    caller, callee, liar = any_bus.connect(), any_bus.connect(), any_bus.connect()
    serial = caller.send_call(callee.name, "/", "test.I", "M")
    call = callee.read()
    liar.send(w.RETURN, {w.DESTINATION: caller.name, w.REPLY_SERIAL: serial}, "s", ("lie",))
    assert caller.drain(liar) == []
    callee.reply(call, "s", ("truth",))
    assert caller.wait_reply(serial).args == ["truth"]


def test_second_reply_is_dropped(any_bus: Bus) -> None:
    caller, callee = any_bus.connect(), any_bus.connect()
    caller.send_call(callee.name, "/", "test.I", "M")
    call = callee.read()
    callee.reply(call, "u", (1,))
    callee.reply(call, "u", (2,))
    callee.reply_error(call, "a.b")
    assert [message.args for message in caller.drain(callee)] == [[1]]


def test_reply_to_a_call_that_wants_none_is_dropped(any_bus: Bus) -> None:
    caller, callee = any_bus.connect(), any_bus.connect()
    caller.send_call(callee.name, "/", "test.I", "M", flags=w.NO_REPLY_EXPECTED)
    call = callee.read()
    assert call.flags == w.NO_REPLY_EXPECTED
    callee.reply(call, "u", (1,))
    assert caller.drain(callee) == []


def test_callee_that_disconnects_gives_no_reply_error(bus: Bus) -> None:
    caller, callee = bus.connect(), bus.connect()
    serial = caller.send_call(callee.name, "/", "test.I", "M")
    callee.read()
    callee.close()
    with pytest.raises(BusError) as caught:
        caller.wait_reply(serial)
    assert caught.value.name == ERROR + "NoReply"
    assert caught.value.text == ("Message recipient disconnected from message bus without replying")
    assert caught.value.message.sender == DRIVER
    assert caught.value.message.destination == caller.name


def test_every_open_call_gets_one_no_reply_error(bus: Bus) -> None:
    callers, callee = [bus.connect() for _ in range(3)], bus.connect()
    serials = [
        (caller, caller.send_call(callee.name, "/", "test.I", "M"))
        for caller in callers
        for _ in range(4)
    ]
    calls = [callee.read() for _ in serials]
    callee.reply(next(c for c in calls if (c.sender, c.serial) == (callers[0].name, serials[0][1])))
    callers[0].wait_reply(serials[0][1])
    callee.close()
    for caller, serial in serials[1:]:
        with pytest.raises(BusError, match="NoReply"):
            caller.wait_reply(serial)
    assert [caller.drain() for caller in callers] == [[], [], []]


def test_no_error_for_a_lost_call_that_wants_no_reply(bus: Bus) -> None:
    caller, callee = bus.connect(), bus.connect()
    caller.add_match(f"type='signal',member='NameOwnerChanged',arg0='{callee.name}'")
    caller.send_call(callee.name, "/", "test.I", "M", flags=w.NO_REPLY_EXPECTED)
    callee.read()
    callee.close()
    assert caller.read().member == "NameOwnerChanged"
    assert caller.drain() == []


def test_reply_timeout_of_the_bus(start_bus) -> None:  # type: ignore[no-untyped-def]
    bus = start_bus(limits={"reply_timeout": 200}, policy=STRICT_POLICY)
    caller, callee = bus.connect(), bus.connect()
    serial = caller.send_call(callee.name, "/", "test.I", "M")
    call = callee.read()
    with pytest.raises(BusError) as caught:
        caller.wait_reply(serial)
    assert caught.value.name == ERROR + "NoReply"
    assert caught.value.text == "Message did not receive a reply (timeout by message bus)"
    callee.reply(call)
    assert caller.drain(callee) == []


# -- to nobody ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "test.messages.Nobody",
            "The name test.messages.Nobody was not provided by any .service files",
        ),
        (":1.99999", "The name :1.99999 was not provided by any .service files"),
        (":77.1", "The name :77.1 was not provided by any .service files"),
    ],
)
def test_call_to_nobody(bus: Bus, name: str, text: str) -> None:
    client = bus.connect()
    with pytest.raises(BusError) as caught:
        client.call(name, "/", "test.I", "M")
    assert caught.value.name == ERROR + "ServiceUnknown"
    assert caught.value.text == text


def test_call_to_nobody_without_auto_start(bus: Bus) -> None:
    client = bus.connect()
    with pytest.raises(BusError) as caught:
        client.call("test.messages.Nobody", "/", "test.I", "M", flags=w.NO_AUTO_START)
    assert caught.value.name == ERROR + "NameHasNoOwner"
    assert caught.value.text == 'Name "test.messages.Nobody" does not exist'


def test_signal_to_nobody_is_silent(bus: Bus) -> None:
    client = bus.connect()
    client.signal("/", "test.I", "S", to=":1.99999")
    assert [m.type for m in client.drain()] in ([], [w.ERROR])


def test_call_after_the_callee_left(bus: Bus) -> None:
    caller, callee = bus.connect(), bus.connect()
    caller.add_match(f"type='signal',member='NameOwnerChanged',arg0='{callee.name}'")
    callee.close()
    caller.wait_signal("NameOwnerChanged")
    with pytest.raises(BusError, match="ServiceUnknown"):
        caller.call(callee.name, "/", "test.I", "M")


# -- signals -----------------------------------------------------------------------------


def test_unicast_signal_needs_no_match_rule(bus: Bus) -> None:
    sender, receiver, other = bus.connect(), bus.connect(), bus.connect()
    sender.signal("/s", "test.I", "Private", "s", ("psst",), to=receiver.name)
    signal = receiver.read()
    assert (signal.type, signal.member, signal.args) == (w.SIGNAL, "Private", ["psst"])
    assert (signal.sender, signal.destination) == (sender.name, receiver.name)
    assert other.drain(sender) == []


def test_unicast_signal_is_not_seen_by_others_with_a_matching_rule(bus: Bus) -> None:
    sender, receiver, other = bus.connect(), bus.connect(), bus.connect()
    other.add_match("type='signal',interface='test.I'")
    sender.signal("/s", "test.I", "Private", to=receiver.name)
    assert receiver.read().member == "Private"
    assert other.drain(sender) == []


def test_broadcast_reaches_every_subscriber_in_order(bus: Bus) -> None:
    sender = bus.connect()
    receivers = [bus.connect() for _ in range(5)]
    stranger = bus.connect()
    for receiver in receivers:
        receiver.add_match("type='signal',interface='test.Fan'")
    for n in range(100):
        sender.signal("/s", "test.Fan", "Tick", "u", (n,))
    for receiver in receivers:
        got = receiver.drain(sender)
        assert [message.args[0] for message in got] == list(range(100))
        assert {(m.sender, m.destination, m.path) for m in got} == {(sender.name, None, "/s")}
    assert stranger.drain(sender) == []


def test_two_rules_that_match_give_one_copy(bus: Bus) -> None:
    sender, receiver = bus.connect(), bus.connect()
    receiver.add_match("type='signal',interface='test.I'")
    receiver.add_match("type='signal',path='/s'")
    receiver.add_match("type='signal',path='/s'")
    sender.signal("/s", "test.I", "Once")
    assert [message.member for message in receiver.drain(sender)] == ["Once"]


def test_unicast_with_matching_rule_gives_one_copy(bus: Bus) -> None:
    sender, receiver = bus.connect(), bus.connect()
    receiver.add_match("type='signal',interface='test.I'")
    sender.signal("/s", "test.I", "Once", to=receiver.name)
    assert [message.member for message in receiver.drain(sender)] == ["Once"]


def test_sender_gets_its_own_signal_if_it_asks(bus: Bus) -> None:
    client = bus.connect()
    client.signal("/s", "test.I", "Before")
    client.add_match("type='signal',interface='test.I'")
    client.signal("/s", "test.I", "After")
    assert [message.member for message in client.drain()] == ["After"]


def test_last_words_are_delivered(bus: Bus) -> None:
    """What a client sent before it closed its socket arrives, broadcast or not."""
    receiver = bus.connect()
    receiver.add_match("interface='test.Last'")
    for n in range(30):
        sender = bus.connect()
        sender.signal("/", "test.Last", f"Broadcast{n}")
        sender.signal("/", "test.Last", f"Unicast{n}", "ay", (b"x" * 1000 * n,), to=receiver.name)
        sender.close()
        assert [receiver.read().member, receiver.read().member] == [f"Broadcast{n}", f"Unicast{n}"]


def test_last_words_of_a_client_that_had_just_come(bus: Bus) -> None:
    """Authentication, Hello, a signal and the end, all without waiting for any answer."""
    receiver = bus.connect()
    receiver.add_match("interface='test.Last'")
    hello = {w.PATH: DRIVER_PATH, w.DESTINATION: DRIVER, w.INTERFACE: DRIVER, w.MEMBER: "Hello"}
    signal = {w.PATH: "/", w.INTERFACE: "test.Last", w.MEMBER: "Gone"}
    for _ in range(10):
        sender = RawSocket(bus.address)
        sender.write(
            b"\0AUTH EXTERNAL\r\nDATA\r\nBEGIN\r\n"
            + w.build(w.CALL, hello, serial=1)
            + w.build(w.SIGNAL, signal, serial=2)
        )
        sender.sock.shutdown(socket.SHUT_WR)
        assert receiver.read().member == "Gone"
        sender.close()


# -- order -------------------------------------------------------------------------------


def test_order_of_one_sender_across_kinds(bus: Bus) -> None:
    """Calls, unicast and broadcast signals, small and large, arrive as they were sent."""
    sender, receiver = bus.connect(), bus.connect()
    receiver.add_match("type='signal',interface='test.Order'")
    for n in range(300):
        payload = b"x" * (200_000 if n % 60 == 7 else 5 * n)
        fields = {w.PATH: "/o", w.INTERFACE: "test.Order", w.MEMBER: f"M{n}"}
        if n % 3 == 0:
            kind, flags = w.SIGNAL, 0
        else:
            fields[w.DESTINATION] = receiver.name
            kind, flags = (w.SIGNAL, 0) if n % 3 == 1 else (w.CALL, w.NO_REPLY_EXPECTED)
        sender.send(kind, fields, "uay", (n, payload), flags=flags)
    assert [message.args[0] for message in receiver.drain(sender)] == list(range(300))


def test_signal_before_reply_arrives_before_it(bus: Bus) -> None:
    caller, callee = bus.connect(), bus.connect()
    caller.add_match("type='signal',interface='test.Order'")
    for n in range(50):
        serial = caller.send_call(callee.name, "/", "test.I", "M")
        call = callee.wait_call("M")
        callee.signal("/", "test.Order", f"S{n}")
        callee.reply(call)
        first, second = caller.read(), caller.read()
        assert (first.member, second.reply_serial) == (f"S{n}", serial)


def test_causal_order_over_a_third_party(bus: Bus) -> None:
    """A signals C, then calls B, which on that signals C: C sees A's signal first."""
    a, b, c = bus.connect(), bus.connect(), bus.connect()
    c.add_match("type='signal',interface='test.Order'")
    for n in range(50):
        a.signal("/", "test.Order", f"A{n}")
        a.send_call(b.name, "/", "test.I", "Go", flags=w.NO_REPLY_EXPECTED)
        b.read()
        b.signal("/", "test.Order", f"B{n}")
        assert [c.read().member, c.read().member] == [f"A{n}", f"B{n}"]


def test_name_owner_changed_comes_before_the_new_owners_signal(bus: Bus) -> None:
    watcher = bus.connect()
    watcher.add_match("type='signal',member='NameOwnerChanged',arg0='test.order.Name'")
    watcher.add_match("type='signal',interface='test.Order'")
    for _ in range(20):
        owner = bus.connect()
        owner.send_call(DRIVER, DRIVER_PATH, DRIVER, "RequestName", "su", ("test.order.Name", 0))
        owner.signal("/", "test.Order", "Mine")
        owner.send_call(DRIVER, DRIVER_PATH, DRIVER, "ReleaseName", "s", ("test.order.Name",))
        got = [watcher.read() for _ in range(3)]
        assert [m.member for m in got] == ["NameOwnerChanged", "Mine", "NameOwnerChanged"]


# -- header ------------------------------------------------------------------------------


def test_forged_sender_is_replaced(bus: Bus) -> None:
    victim, liar, receiver = bus.connect(), bus.connect(), bus.connect()
    fields = {w.PATH: "/", w.INTERFACE: "test.I", w.MEMBER: "M", w.SENDER: victim.name}
    receiver.add_match("type='signal',interface='test.I'")
    liar.send(w.CALL, fields | {w.DESTINATION: receiver.name})
    liar.send(w.SIGNAL, fields | {w.DESTINATION: receiver.name})
    liar.send(w.SIGNAL, fields | {w.SENDER: DRIVER})
    assert [receiver.read().sender for _ in range(3)] == [liar.name] * 3


def test_unknown_header_fields_are_filtered(bus: Bus) -> None:
    sender, receiver = bus.connect(), bus.connect()
    sender.signal(
        "/", "test.I", "S", to=receiver.name, extra_fields=((100, "s", "x"), (255, "ay", b"yy"))
    )
    assert set(receiver.read().fields) == {
        w.PATH,
        w.INTERFACE,
        w.MEMBER,
        w.DESTINATION,
        w.SENDER,
    }


def test_flags_arrive(bus: Bus) -> None:
    sender, receiver = bus.connect(), bus.connect()
    for flags in range(8):
        sender.send_call(receiver.name, "/", "test.I", "M", flags=flags)
        assert receiver.wait_call("M").flags == flags


def test_extreme_serials(bus: Bus) -> None:
    caller, callee = bus.connect(), bus.connect()
    for serial in (1 << 31, 0xFFFFFFFF, 0x7FFFFFFF, 100):
        caller.send_call(callee.name, "/", "test.I", "M", serial=serial)
        call = callee.read()
        assert call.serial == serial
        callee.reply(call)
        assert caller.read().reply_serial == serial


@pytest.mark.parametrize("first", "<>")
@pytest.mark.parametrize("second", "<>")
def test_byte_orders_meet(bus: Bus, first: str, second: str) -> None:
    """The body is not touched: its bytes arrive in the order of its writer."""
    caller, callee = bus.connect(), bus.connect()
    args = (7, "text", [1, 2, 3], {"key": ("u", 5)}, -1.5)
    signature = "usaua{sv}d"
    serial = caller.send_call(callee.name, "/", "test.I", "M", signature, args, endian=first)
    call = callee.read()
    assert call.body == w.marshal(signature, args, call.endian)
    assert call.endian == first
    assert call.args == list(args)
    callee.reply(call, signature, args, endian=second)
    reply = caller.wait_reply(serial)
    assert reply.endian == second
    assert reply.args == list(args)


def test_big_endian_client_uses_the_driver(bus: Bus) -> None:
    client = bus.connect()
    serial = client.send_call(
        DRIVER, DRIVER_PATH, DRIVER, "RequestName", "su", ("test.big.Endian", 0), endian=">"
    )
    assert client.wait_reply(serial).args == [1]
    serial = client.send_call(
        DRIVER, DRIVER_PATH, DRIVER, "GetNameOwner", "s", ("test.big.Endian",), endian=">"
    )
    assert client.wait_reply(serial).args == [client.name]


def test_big_endian_signal_is_matched_by_its_arguments(bus: Bus) -> None:
    sender, receiver = bus.connect(), bus.connect()
    receiver.add_match("type='signal',interface='test.I',arg1='yes'")
    sender.signal("/", "test.I", "S", "us", (1, "no"), endian=">")
    sender.signal("/", "test.I", "S", "ss", ("a", "yes"), endian=">")
    assert [message.args for message in receiver.drain(sender)] == [["a", "yes"]]


# -- size --------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 4096, 65536, 1 << 20, 8 << 20, 20 << 20])
def test_payload_there_and_back(bus: Bus, size: int) -> None:
    caller, callee = bus.connect(), bus.connect()
    payload = bytes(range(256)) * (size // 256) + b"z" * (size % 256)
    serial = caller.send_call(callee.name, "/", "test.I", "M", "ay", (payload,))
    call = callee.read()
    assert call.body == len(payload).to_bytes(4, "little") + payload
    callee.reply(call, "ay", (payload,))
    assert caller.wait_reply(serial).body == call.body


def test_large_broadcast(bus: Bus) -> None:
    sender, receivers = bus.connect(), [bus.connect() for _ in range(3)]
    for receiver in receivers:
        receiver.add_match("type='signal',interface='test.Large'")
    payload = b"payload!" * 200_000
    sender.signal("/", "test.Large", "S", "ay", (payload,))
    for receiver in receivers:
        assert receiver.read().body[4:] == payload


def test_message_over_the_limit_disconnects(start_bus) -> None:  # type: ignore[no-untyped-def]
    bus = start_bus(limits={"max_message_size": 10_000})
    client, other = bus.connect(), bus.connect()
    client.send_call(other.name, "/", "test.I", "M", "ay", (b"x" * 9_000,))
    assert other.read().member == "M"
    client.send_call(other.name, "/", "test.I", "M", "ay", (b"x" * 10_100,))
    client.expect_disconnect()
    assert other.drain() == []


def test_calls_of_one_serial_to_two_lost_a_reply(bus: Bus) -> None:
    caller, one, other = (bus.connect() for _ in range(3))
    for callee in (one, other):
        caller.send_call(callee.name, "/", "test.I", "M", serial=77)
    for callee in (one, other):
        callee.reply(callee.read(), "s", (callee.name,))
    assert sorted([caller.read().args[0], caller.read().args[0]]) == sorted([one.name, other.name])


def test_a_call_of_the_serial_of_one_that_is_not_answered_is_refused(bus: Bus) -> None:
    caller, callee = bus.connect(), bus.connect()
    caller.send_call(callee.name, "/", "test.I", "M", serial=77)
    call = callee.read()
    caller.send_call(callee.name, "/", "test.I", "M", serial=77)
    refusal = caller.read()
    assert refusal.args == [
        "Message has the same reply serial as a currently-outstanding existing method call"
    ]
    assert refusal.error_name == "org.freedesktop.DBus.Error.AccessDenied"
    callee.reply(call, "s", ("yes",))
    assert caller.read().args == ["yes"]
    assert callee.drain(caller) == []
    caller.send_call(callee.name, "/", "test.I", "M", serial=77)
    assert callee.read().serial == 77
