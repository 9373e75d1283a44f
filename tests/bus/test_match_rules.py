"""Match rules: every key, with signals that match and signals that do not."""

from __future__ import annotations

from typing import Any

import pytest

from . import wireformat as w
from .daemon import Bus
from .rawclient import DRIVER, BusError

# What a signal of the table has where the row says nothing else.
PATH, INTERFACE, MEMBER = "/t/one", "test.One", "First"
Signal = tuple[dict[str, str], str, tuple[Any, ...]]


def sig(signature: str = "", *args: Any, **header: str) -> Signal:
    return header, signature, args


MATCHES: list[tuple[str, Signal]] = [
    ("", sig()),
    ("type='signal'", sig()),
    ("interface='test.One'", sig()),
    ("member='First'", sig()),
    ("path='/t/one'", sig()),
    ("path_namespace='/t'", sig()),
    ("path_namespace='/t/one'", sig()),
    ("path_namespace='/'", sig()),
    ("path_namespace='/'", sig(path="/")),
    ("type='signal',interface='test.One',member='First',path='/t/one'", sig()),
    ("type='signal',", sig()),
    ("member=First,interface=test.One", sig()),
    ("member='Fir'st", sig()),
    ("member=First,path='/t/one'", sig()),
    ("arg0='it'\\''s'", sig("s", "it's")),
    ("arg0=it\\'s", sig("s", "it's")),
    ("arg0='a\\b'", sig("s", "a\\b")),
    ("arg0='a,b=c'", sig("s", "a,b=c")),
    ("arg0=''", sig("s", "")),
    ("arg0='x'", sig("s", "x")),
    ("arg1='x'", sig("us", 5, "x")),
    ("arg0='a',arg2='c'", sig("sss", "a", "b", "c")),
    ("arg63='x'", sig("y" * 63 + "s", *[0] * 63, "x")),
    ("arg0='ü'", sig("s", "ü")),
    ("arg3='x'", sig("(ss)asa{sv}s", ("p", "q"), ["r"], {"k": ("s", "v")}, "x")),
    ("arg0path='/a/b'", sig("s", "/a/b")),
    ("arg0path='/a/'", sig("s", "/a/b")),
    ("arg0path='/a/'", sig("o", "/a/b")),
    ("arg0path='/a/b'", sig("s", "/a/")),
    ("arg0path='/'", sig("s", "/a/b")),
    ("arg0path='/a/b'", sig("o", "/a/b")),
    ("arg1path='/a/'", sig("us", 1, "/a/b/c")),
    ("arg0namespace='com.a'", sig("s", "com.a")),
    ("arg0namespace='com.a'", sig("s", "com.a.b.c")),
    ("arg0namespace='com'", sig("s", "com.a")),
    ("eavesdrop='true'", sig()),
    ("eavesdrop='false'", sig()),
]

DOES_NOT_MATCH: list[tuple[str, Signal]] = [
    ("type='method_call'", sig()),
    ("type='method_return'", sig()),
    ("type='error'", sig()),
    ("interface='test.On'", sig()),
    ("interface='test.One.More'", sig()),
    ("member='first'", sig()),
    ("path='/t'", sig()),
    ("path='/t/one/two'", sig()),
    ("path_namespace='/t/on'", sig()),
    ("path_namespace='/t/one/two'", sig()),
    ("sender='org.freedesktop.DBus'", sig()),
    ("sender='test.match.Nobody'", sig()),
    ("sender=':1.99999'", sig()),
    ("destination=':1.99999'", sig()),
    ("type='signal',interface='test.One',member='Other'", sig()),
    ("arg0='x'", sig()),
    ("arg0='x'", sig("s", "y")),
    ("arg0='x'", sig("s", "xx")),
    ("arg0='xx'", sig("s", "x")),
    ("arg0='/a'", sig("o", "/a")),
    ("arg0='1'", sig("u", 1)),
    ("arg1='x'", sig("s", "x")),
    ("arg0='x',arg1='y'", sig("ss", "x", "z")),
    ("arg63='x'", sig("y" * 62 + "s", *[0] * 62, "x")),
    ("arg0path='/a/b'", sig("s", "/a/bc")),
    ("arg0path='/a/b'", sig("s", "/a/b/c")),
    ("arg0path='/a/b'", sig("s", "/a")),
    ("arg0path='/a/'", sig("s", "/ab")),
    ("arg0path='/a/'", sig("s", "/a")),
    ("arg0path='/a/'", sig("u", 1)),
    ("arg0namespace='com.a'", sig("s", "com.ab")),
    ("arg0namespace='com.a'", sig("s", "com")),
    ("arg0namespace='com.a'", sig("o", "/com/a")),
    ("arg0namespace='com.a'", sig()),
    ("arg0='x'", sig("as", ["x"])),
    ("arg0='x'", sig("v", ("s", "x"))),
]

INVALID = [
    "nonsense",
    "type='x'",
    "type=''",
    "foo='x'",
    "type='signal',type='signal'",
    "member='a',member='b'",
    "type='signal",
    "interface='no dots'",
    "interface='test'",
    "member='a.b'",
    "path='no/slash'",
    "path='/a/'",
    "path_namespace='/a/'",
    "path='/a',path_namespace='/a'",
    "sender='x'",
    "destination='x'",
    "arg='x'",
    "arg64='x'",
    "arg-1='x'",
    "argx='x'",
    "arg0foo='x'",
    "arg0='x',arg0='y'",
    "arg1namespace='com.a'",
    "arg0namespace='com..a'",
    "arg0namespace=''",
    "eavesdrop='maybe'",
    "a" * 2000,
]


def emit(client: Any, one: Signal, **options: Any) -> None:
    header, signature, args = one
    client.signal(
        header.get("path", PATH),
        header.get("interface", INTERFACE),
        header.get("member", MEMBER),
        signature,
        args,
        **options,
    )


@pytest.mark.parametrize(("rule", "one"), MATCHES, ids=[row[0] or "empty" for row in MATCHES])
def test_matches(bus: Bus, rule: str, one: Signal) -> None:
    sender, receiver = bus.connect(), bus.connect()
    receiver.add_match(rule)
    emit(sender, one)
    got = [m for m in receiver.drain(sender) if m.sender == sender.name]
    assert [m.args for m in got] == [list(one[2])]


@pytest.mark.parametrize(("rule", "one"), DOES_NOT_MATCH, ids=[row[0] for row in DOES_NOT_MATCH])
def test_does_not_match(bus: Bus, rule: str, one: Signal) -> None:
    sender, receiver = bus.connect(), bus.connect()
    receiver.add_match(rule)
    emit(sender, one)
    assert [m for m in receiver.drain(sender) if m.sender == sender.name] == []


@pytest.mark.parametrize("rule", INVALID, ids=[rule[:30] for rule in INVALID])
def test_invalid_rule_is_refused(bus: Bus, rule: str) -> None:
    client = bus.connect()
    with pytest.raises(BusError) as caught:
        client.add_match(rule)
    assert caught.value.name.rpartition(".")[2] in ("MatchRuleInvalid", "LimitsExceeded")


def test_sender_by_unique_name(bus: Bus) -> None:
    sender, other, receiver = (bus.connect() for _ in range(3))
    receiver.add_match(f"sender='{sender.name}'")
    emit(other, sig("s", "other"))
    emit(sender, sig("s", "sender"))
    assert [m.args for m in receiver.drain(sender)] == [["sender"]]


def test_sender_by_well_known_name(bus: Bus) -> None:
    a, b, receiver = (bus.connect() for _ in range(3))
    receiver.add_match("type='signal',sender='test.match.Sender'")
    emit(a, sig("s", "before"))
    a.request_name("test.match.Sender")
    emit(a, sig("s", "owner"))
    assert [m.args for m in receiver.drain(a)] == [["owner"]]
    b.request_name("test.match.Sender")
    emit(b, sig("s", "queued"))
    assert receiver.drain(b) == []
    a.driver("ReleaseName", "s", ("test.match.Sender",))
    emit(a, sig("s", "after"))
    assert receiver.drain(a) == []
    emit(b, sig("s", "inherited"))
    assert [m.args for m in receiver.drain(b)] == [["inherited"]]


def test_driver_signals_by_sender(bus: Bus) -> None:
    receiver = bus.connect()
    receiver.add_match(f"sender='{DRIVER}',member='NameOwnerChanged',arg0namespace='test.match'")
    owner = bus.connect()
    owner.request_name("test.match.Driver")
    assert receiver.wait_signal("NameOwnerChanged").args == ["test.match.Driver", "", owner.name]


def test_name_owner_changed_rule_with_args(bus: Bus) -> None:
    """The rule of a client that waits for a peer to go: arg0 its name, arg2 empty."""
    peer, receiver = bus.connect(), bus.connect()
    receiver.add_match(f"member='NameOwnerChanged',arg0='{peer.name}',arg2=''")
    bus.connect().close()
    peer.close()
    assert receiver.read().args == [peer.name, peer.name, ""]


def test_remove_match(bus: Bus) -> None:
    sender, receiver = bus.connect(), bus.connect()
    rule = "type='signal',interface='test.One'"
    receiver.add_match(rule)
    receiver.add_match(rule)
    receiver.driver("RemoveMatch", "s", (rule,))
    emit(sender, sig("s", "one left"))
    receiver.driver("GetId")
    assert [m.args for m in receiver.drain(sender)] == [["one left"]]
    receiver.driver("RemoveMatch", "s", (rule,))
    emit(sender, sig("s", "none left"))
    assert receiver.drain(sender) == []
    with pytest.raises(BusError, match="MatchRuleNotFound"):
        receiver.driver("RemoveMatch", "s", (rule,))


def test_remove_match_compares_meaning_not_spelling(bus: Bus) -> None:
    client = bus.connect()
    client.add_match("type='signal',member='M',arg0='x'")
    client.driver("RemoveMatch", "s", ("arg0=x,member=M,type=signal",))
    with pytest.raises(BusError, match="MatchRuleNotFound"):
        client.driver("RemoveMatch", "s", ("type='signal',member='M',arg0='x'",))


def test_rules_of_one_client_do_not_concern_another(bus: Bus) -> None:
    a, b = bus.connect(), bus.connect()
    a.add_match("interface='test.One'")
    with pytest.raises(BusError, match="MatchRuleNotFound"):
        b.driver("RemoveMatch", "s", ("interface='test.One'",))
    emit(b, sig())
    assert len(a.drain(b)) == 1


def test_calls_are_not_broadcast(bus: Bus) -> None:
    """A rule for calls shows nobody the calls to another."""
    caller, callee, nosy = (bus.connect() for _ in range(3))
    nosy.add_match("type='method_call'")
    caller.send_call(callee.name, "/", "test.I", "Secret", flags=w.NO_REPLY_EXPECTED)
    callee.wait_call("Secret")
    assert nosy.drain(caller) == []


STATS, MONITORING = f"{DRIVER}.Debug.Stats", f"{DRIVER}.Monitoring"


@pytest.mark.parametrize("how", ["ends", "ends without rules", "becomes a monitor"])
@pytest.mark.parametrize(
    "text",
    ["sender='{}'", "destination='{}'", "sender='{}',member='M',arg0='x',destination=':1.9'"],
)
def test_a_rule_that_names_a_connection_goes_with_it(bus: Bus, text: str, how: str) -> None:
    """Nobody will have the name again. As dbus-daemon has it, it stays if the other has no rules itself."""
    client, other, named = bus.connect(), bus.connect(), bus.connect()
    for one in (client, other):
        one.add_match("member='NameOwnerChanged',arg2=''")
    rule = text.format(named.name)
    for one, times in ((client, 2), (other, 1)):
        for _ in range(times):
            one.add_match(rule)
    client.add_match("sender='test.Kept'")
    if how == "ends":
        named.add_match("member='M'")
    if how == "becomes a monitor":
        named.driver("BecomeMonitor", "asu", (["type='error'"], 0), interface=MONITORING)
    else:
        named.close()
    for one in (client, other):
        one.wait(lambda m: bool(m.args) and m.args[0] == named.name)
    stay = how == "ends without rules"
    listed = client.driver("GetAllMatchRules", interface=STATS)[0][client.name]
    assert len(listed) == (4 if stay else 2) and "sender='test.Kept'" in listed
    if not stay:
        for one in (client, other):
            with pytest.raises(BusError) as caught:
                one.driver("RemoveMatch", "s", (rule,))
            assert caught.value.name == f"{DRIVER}.Error.MatchRuleNotFound"
        client.add_match(rule)  # it may be added once more
    client.driver("RemoveMatch", "s", (rule,))
