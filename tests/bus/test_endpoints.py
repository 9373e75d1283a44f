"""Endpoints: what a client behind one can see, call, hear and own, and that the rest does not exist for it.

After what xdg-dbus-proxy(1) promises of its policies. `app` is behind an endpoint, the others are not.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from . import procs
from . import wireformat as w
from .conftest import _running
from .daemon import Bus
from .rawclient import DRIVER, DRIVER_PATH, BusError, RawClient

pytestmark = pytest.mark.kbusd_only

ERROR = "org.freedesktop.DBus.Error."
POLICY = """
see = ["t.See.*"]
talk = ["t.Talk.*", "t.Denied"]
own = ["t.App.*"]
hide = ["t.Talk.Hidden"]
call = [
    "t.Rules=t.Face.Method@/path",
    "t.Rules=t.Sub.*@/sub/*",
    "t.Rules=@/any",
    "t.Rules=t.Args.Open arg0='yes' arg1='also'",
]
broadcast = ["t.Rules=t.Face.Signal@/path"]
deny-call = [
    "t.Denied=t.Bad.*",
    "t.Denied=t.Face.Open arg0='no'",
    "t.See=t.Secret.*",
    "t.Unseen=t.Secret.*",
]
deny-broadcast = ["t.Denied=t.Bad.*", "t.See=t.Secret.*", "t.Unseen=t.Secret.*"]
"""


class Place:
    """A bus with one endpoint."""

    def __init__(self, start: Callable[..., Bus], directory: Path) -> None:
        self.file = directory / "app.toml"
        self.file.write_text(POLICY)
        self.bus = start(options=[f"--endpoint={self.file}"])

    @property
    def address(self) -> str:
        return f"unix:path={self.bus.socket}.app"

    def app(self) -> RawClient:
        client = RawClient(self.address)
        self.bus.clients.append(client)
        return client

    def owner(self, *names: str) -> RawClient:
        client = self.bus.connect()
        for name in names:
            assert client.request_name(name) == 1
        return client


@pytest.fixture(scope="module")
def _shared_place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    one = Place(Bus, tmp_path_factory.mktemp("endpoint"))
    one.bus.janitor = RawClient(one.bus.address)
    _running.append(one.bus)  # whose log is shown when a test fails
    yield one
    one.bus.stop()


@pytest.fixture
def place(_shared_place: Place) -> Iterator[Place]:
    yield _shared_place
    bus = _shared_place.bus
    bus.close_clients()
    janitor = bus.janitor
    assert janitor
    procs.eventually(
        lambda: set(janitor.driver("ListNames")[0]) == {DRIVER, janitor.name},
        "every client of the test is gone",
    )


@pytest.fixture
def own_place(start_bus: Callable[..., Bus], tmp_path: Path) -> Place:
    """One for the test alone."""
    return Place(start_bus, tmp_path)


def refusal(client: RawClient, *args: Any, **options: Any) -> tuple[str, str]:
    """Name and text of the error that a call is answered with."""
    with pytest.raises(BusError) as caught:
        client.call(*args, **options)
    return caught.value.name.removeprefix(ERROR), caught.value.text


def served(caller: RawClient, callee: RawClient, *args: Any, **options: Any) -> None:
    """The call arrives, and its answer does."""
    serial = caller.send_call(*args, **options)
    call = callee.wait(lambda m: m.type == w.CALL and m.sender == caller.name)
    callee.reply(call, "s", ("done",))
    assert caller.wait_reply(serial).args == ["done"]


def nothing_came(client: RawClient) -> bool:
    return not [each for each in client.drain() if each.sender != DRIVER]


def ask(client: RawClient, member: str, name: str) -> list[Any]:
    return client.driver(member, "s", (name,))


# -- names -------------------------------------------------------------------------------------


def test_names_are_listed_as_far_as_they_may_be_seen(place: Place) -> None:
    see, talk = place.owner("t.See"), place.owner("t.Talk.Below")
    place.owner("t.Hidden")
    place.owner("t.Talk.Hidden")
    place.owner("t.Seen")  # not below t.See
    app = place.app()
    (names,) = app.driver("ListNames")
    assert sorted(names) == sorted([DRIVER, "t.See", "t.Talk.Below", see.name, talk.name, app.name])


@pytest.mark.parametrize(
    "member",
    [
        "GetNameOwner",
        "ListQueuedOwners",
        "GetConnectionUnixUser",
        "GetConnectionUnixProcessID",
        "GetConnectionCredentials",
        "GetAdtAuditSessionData",
        "GetConnectionSELinuxSecurityContext",
    ],
)
def test_a_hidden_name_is_one_that_nobody_owns(place: Place, member: str) -> None:
    hidden = place.owner("t.Hidden", "t.Talk.Hidden")
    app = place.app()
    call = (DRIVER, DRIVER_PATH, DRIVER, member, "s")
    for name in ("t.Hidden", "t.Talk.Hidden"):
        assert refusal(app, *call, (name,)) == (
            "NameHasNoOwner",
            refusal(app, *call, ("t.Absent",))[1].replace("t.Absent", name),
        )
    assert refusal(app, *call, (hidden.name,)) == (
        "NameHasNoOwner",
        refusal(app, *call, (":1.4711",))[1].replace(":1.4711", hidden.name),
    )
    assert ask(app, "NameHasOwner", "t.Hidden") == [False]
    assert ask(app, "NameHasOwner", hidden.name) == [False]


def test_a_name_that_may_be_seen(place: Place) -> None:
    see = place.owner("t.See.It")
    app = place.app()
    assert ask(app, "NameHasOwner", "t.See.It") == [True]
    assert ask(app, "GetNameOwner", "t.See.It") == [see.name]
    assert ask(app, "GetConnectionUnixUser", see.name) == [os.geteuid()]
    reply = app.call(DRIVER, DRIVER_PATH, DRIVER, "GetConnectionCredentials", "s", (see.name,))
    assert reply.args[0]["UnixUserID"] == ("u", os.geteuid())
    for fd in reply.fds:
        os.close(fd)
    for to in ("t.See.It", see.name):
        assert refusal(app, to, "/", "a.b", "C")[0] == "AccessDenied"
    assert nothing_came(see)


def test_others_know_who_is_behind_an_endpoint(place: Place) -> None:
    app, other = place.app(), place.owner()
    (told,) = ask(other, "GetConnectionCredentials", app.name)
    assert told["org.kbusd.Endpoint"] == ("s", "app")
    assert "org.kbusd.Endpoint" not in ask(other, "GetConnectionCredentials", other.name)[0]
    (numbers,) = other.driver(
        "GetConnectionStats", "s", (app.name,), interface=f"{DRIVER}.Debug.Stats"
    )
    assert numbers["UniqueName"] == ("s", app.name)


def test_owner_changes_are_told_as_far_as_they_may_be_seen(place: Place) -> None:
    app = place.app()
    app.add_match("type='signal',sender='org.freedesktop.DBus'")
    hidden = place.owner("t.Hidden")
    see = place.owner("t.See", "t.Hidden2")
    hidden.driver("ReleaseName", "s", ("t.Hidden",))
    hidden.close()
    see.close()
    told = [app.wait_signal("NameOwnerChanged").args for _ in range(3)]
    assert told == [
        ["t.See", "", see.name],
        ["t.See", see.name, ""],
        [see.name, see.name, ""],  # the client learns when a connection that it saw goes
    ]
    last = place.owner("t.Talk")
    assert app.wait_signal("NameOwnerChanged").args == ["t.Talk", "", last.name]


# -- calls -------------------------------------------------------------------------------------


def test_calls_to_what_is_hidden_fail_as_if_nobody_was_there(place: Place) -> None:
    hidden = place.owner("t.Hidden", "t.Talk.Hidden")
    app = place.app()
    what = ("/", "a.b", "C")
    for name in ("t.Hidden", "t.Talk.Hidden"):
        error, text = refusal(app, name, *what)
        assert (error, text.replace(name, "t.Absent")) == refusal(app, "t.Absent", *what)
        assert error == "ServiceUnknown"
        error, text = refusal(app, name, *what, flags=w.NO_AUTO_START)
        other = refusal(app, "t.Absent", *what, flags=w.NO_AUTO_START)
        assert (error, text.replace(name, "t.Absent")) == other
        assert error == "NameHasNoOwner"
    error, text = refusal(app, hidden.name, *what)
    assert (error, text.replace(hidden.name, ":1.99")) == refusal(app, ":1.99", *what)
    app.signal("/", "a.b", "Signal", to=hidden.name)
    assert nothing_came(hidden)


def test_a_reply_that_nobody_asked_for_does_not_tell_who_is_there(place: Place) -> None:
    hidden = place.owner("t.Hidden")
    app = place.app()
    answers = []
    for to in (hidden.name, ":1.4711"):
        serial = app.send(w.RETURN, {w.REPLY_SERIAL: 7, w.DESTINATION: to})
        answer = app.wait(lambda m, serial=serial: m.reply_serial == serial)  # type: ignore[misc]
        answers.append((answer.error_name, answer.args[0].replace(to, "X")))
    assert answers[0] == answers[1]
    assert nothing_came(hidden)


def test_calls_and_replies(place: Place) -> None:
    talk = place.owner("t.Talk.It", "t.Hidden")
    app = place.app()
    served(app, talk, "t.Talk.It", "/", "a.b", "C")
    served(app, talk, talk.name, "/", "a.b", "C", "s", ("x" * 300_000,))
    # The other way round there are no limits, and the client then knows its caller.
    caller = place.owner()
    served(caller, app, app.name, "/", "a.b", "C")
    assert ask(app, "GetNameOwner", caller.name) == [caller.name]
    assert refusal(app, caller.name, "/", "a.b", "C")[0] == "AccessDenied"
    app.add_match("member='NameOwnerChanged'")
    caller.close()
    assert app.wait_signal("NameOwnerChanged").args == [caller.name, caller.name, ""]
    assert ask(app, "NameHasOwner", caller.name) == [False]


def test_rules_for_calls(place: Place) -> None:
    rules = place.owner("t.Rules")
    app = place.app()
    assert ask(app, "GetNameOwner", "t.Rules") == [rules.name]
    for path, interface, member in (
        ("/path", "t.Face", "Method"),
        ("/sub", "t.Sub", "A"),
        ("/sub/x/y", "t.Sub", "B"),
        ("/any", "any.thing", "C"),
        ("/any", None, "D"),
    ):
        served(app, rules, "t.Rules", path, interface, member)
        served(app, rules, rules.name, path, interface, member)
    for path, interface, member in (
        ("/path/x", "t.Face", "Method"),
        ("/path", "t.Face", "Other"),
        ("/path", "t.Other", "Method"),
        ("/path", None, "Method"),
        ("/subway", "t.Sub", "A"),
        ("/sub", "t.Sub.Marine", "A"),
        ("/", "any.thing", "C"),
    ):
        assert refusal(app, "t.Rules", path, interface, member)[0] == "AccessDenied"
        assert refusal(app, rules.name, path, interface, member)[0] == "AccessDenied"
    assert nothing_came(rules)


@pytest.mark.parametrize("size", [10, 30_000, 400_000])
def test_rules_look_at_string_arguments(place: Place, size: int) -> None:
    """However large the message is, and whichever way it would go."""
    rules, denied = place.owner("t.Rules"), place.owner("t.Denied")
    app = place.app()
    more = "x" * size
    call = ("/", "t.Args", "Open", "sss")
    for _ in range(2):  # what was decided for one does not hold for the next
        served(app, rules, "t.Rules", *call, ("yes", "also", more))
        assert refusal(app, "t.Rules", *call, ("no", "also", more))[0] == "AccessDenied"
    assert refusal(app, "t.Rules", "/", "t.Args", "Open", "s", ("yes",))[0] == "AccessDenied"
    assert refusal(app, "t.Rules", "/", "t.Args", "Open")[0] == "AccessDenied"
    call = ("/", "t.Face", "Open", "ss")
    for _ in range(2):
        served(app, denied, "t.Denied", *call, ("yes", more))
        assert refusal(app, "t.Denied", *call, ("no", more))[0] == "AccessDenied"
    assert nothing_came(rules) and nothing_came(denied)


def test_what_is_denied_is_denied_whatever_else_is_said(place: Place) -> None:
    denied = place.owner("t.Denied", "t.Talk")
    app = place.app()
    served(app, denied, "t.Denied", "/", "t.Good", "A")
    for interface in ("t.Bad", None):  # a call that leaves out its interface is no way round
        assert refusal(app, "t.Denied", "/", interface, "A")[0] == "AccessDenied"
        assert refusal(app, denied.name, "/", interface, "A")[0] == "AccessDenied"


@pytest.mark.parametrize("other", ["t.See", "t.Unseen"])
def test_what_is_denied_of_a_name_another_name_of_its_owner_does_not_open(
    place: Place, other: str
) -> None:
    """Whether or not that name could be talked to, or seen at all."""
    both = place.owner("t.Talk", other)
    app = place.app()
    app.add_match("type='signal'")
    for to in ("t.Talk", both.name):
        served(app, both, to, "/", "t.Good", "A")
        for _ in range(2):
            assert refusal(app, to, "/", "t.Secret", "A")[0] == "AccessDenied"
    for interface in ("t.Good", "t.Secret", "t.Good"):
        both.signal("/", interface, interface.removeprefix("t."))
    assert heard(app, both) == ["Good", "Good"]
    assert nothing_came(both)
    both.driver("ReleaseName", "s", (other,))
    served(app, both, "t.Talk", "/", "t.Secret", "A")
    assert both.request_name(other) == 1
    assert refusal(app, "t.Talk", "/", "t.Secret", "A")[0] == "AccessDenied"


def test_services_are_started_for_those_who_may_call_them(own_place: Place) -> None:
    for name in ("t.Talk.Service", "t.Hidden.Service", "t.See.Service"):
        (own_place.bus.services / f"{name}.service").write_text(
            f"[D-BUS Service]\nName={name}\nExec=/bin/false\n"
        )
    own_place.owner().driver("ReloadConfig")
    app = own_place.app()
    (names,) = app.driver("ListActivatableNames")
    assert sorted(names) == [DRIVER, "t.See.Service", "t.Talk.Service"]
    assert refusal(app, "t.Talk.Service", "/", "a.b", "C")[0] == "Spawn.ChildExited"
    start = (DRIVER, DRIVER_PATH, DRIVER, "StartServiceByName", "su")
    assert refusal(app, *start, ("t.Talk.Service", 0))[0] == "Spawn.ChildExited"
    assert refusal(app, *start, ("t.See.Service", 0))[0] == "AccessDenied"
    error, text = refusal(app, *start, ("t.Hidden.Service", 0))
    assert error == "ServiceUnknown"
    assert text.replace("Hidden.Service", "Absent") == refusal(app, *start, ("t.Absent", 0))[1]
    assert refusal(app, "t.Hidden.Service", "/", "a.b", "C")[0] == "ServiceUnknown"
    assert "t.Hidden.Service" not in own_place.bus.log()


# -- signals -----------------------------------------------------------------------------------


def heard(app: RawClient, sender: RawClient) -> list[str | None]:
    """The members of the sender's signals; those of others stay to be read."""
    got = app.drain(sender)
    app.inbox[:0] = [each for each in got if each.sender != sender.name]
    return [each.member for each in got if each.sender == sender.name]


def test_broadcasts_are_heard_from_those_who_may_be_called(place: Place) -> None:
    app, open_ = place.app(), place.owner()
    for each in (app, open_):
        each.add_match("type='signal',interface='t.Face'")
    talk, see, hidden = place.owner("t.Talk"), place.owner("t.See"), place.owner("t.Hidden")
    for _ in range(3):
        for each in (talk, see, hidden):
            each.signal("/", "t.Face", "Loud", "s", ("x",))
    assert heard(app, talk) == ["Loud"] * 3
    assert heard(app, see) == []
    assert heard(app, hidden) == []
    for each in (talk, see, hidden):
        assert heard(open_, each) == ["Loud"] * 3


def test_a_name_that_is_given_away_takes_its_broadcasts_along(place: Place) -> None:
    app = place.app()
    app.add_match("type='signal',interface='t.Face'")
    talk = place.owner("t.Talk")
    talk.signal("/", "t.Face", "Before")
    talk.driver("ReleaseName", "s", ("t.Talk",))
    talk.signal("/", "t.Face", "After")
    assert heard(app, talk) == ["Before"]


def test_rules_for_broadcasts(place: Place) -> None:
    app = place.app()
    app.add_match("type='signal'")
    rules, denied = place.owner("t.Rules"), place.owner("t.Denied")
    rules.signal("/path", "t.Face", "Signal")
    rules.signal("/path", "t.Face", "Other")
    rules.signal("/other", "t.Face", "Signal")
    rules.signal("/any", "t.Face", "Signal")  # may be called, not heard
    assert heard(app, rules) == ["Signal"]
    denied.signal("/", "t.Good", "Signal")
    denied.signal("/", "t.Bad", "Signal")
    assert heard(app, denied) == ["Signal"]


def test_its_own_broadcasts_are_heard_by_all_who_want_them(place: Place) -> None:
    app, other, twin = place.app(), place.owner(), place.app()
    for each in (app, other, twin):
        each.add_match("type='signal',interface='t.Face'")
    assert app.request_name("t.App.One") == 1
    app.signal("/", "t.Face", "Loud")
    for each in (app, other, twin):  # the last of which may see t.App
        assert each.wait_signal("Loud").sender == app.name
    twin.signal("/", "t.Face", "Quiet")
    assert other.wait_signal("Quiet").sender == twin.name
    assert nothing_came(app)


def test_the_order_of_signals_by_ring_and_by_broadcast(place: Place) -> None:
    """A subscriber behind an endpoint gets what others read from shared memory by its ring alone."""
    app, others = place.app(), [place.owner() for _ in range(3)]
    for each in (app, *others):
        each.add_match("type='signal',interface='t.Face'")
    talk = place.owner("t.Talk")
    for number in range(500):
        talk.signal("/", "t.Face", "Count", "u", (number,))
        if number % 100 == 0:
            talk.signal("/", "t.Face", "Count", "us", (number, "y" * 200_000))
    for each in (app, *others):
        got = [m.args[0] for m in each.drain(talk) if m.member == "Count"]
        assert got == sorted([*range(500), *range(0, 500, 100)])


# -- the bus itself ----------------------------------------------------------------------------


def test_names_that_may_be_owned(place: Place) -> None:
    app = place.app()
    assert app.request_name("t.App") == 1
    assert app.request_name("t.App.Two") == 1
    for name in ("t.Talk", "t.See", "t.Hidden", "t.Apple"):
        call = (DRIVER, DRIVER_PATH, DRIVER, "RequestName", "su", (name, 0))
        assert refusal(app, *call)[0] == "AccessDenied"
    assert ask(app, "ReleaseName", "t.App") == [1]
    place.owner("t.Hidden")
    assert ask(app, "ReleaseName", "t.Hidden") == ask(app, "ReleaseName", "t.Absent") == [2]
    place.owner("t.See")
    assert ask(app, "ReleaseName", "t.See") == [3]
    assert ask(app, "ListQueuedOwners", "t.App.Two") == [[app.name]]
    call = (DRIVER, DRIVER_PATH, DRIVER, "ListQueuedOwners", "s", ("t.See",))
    assert refusal(app, *call)[0] == "AccessDenied"


@pytest.mark.parametrize(
    ("interface", "member", "signature", "args"),
    [
        (DRIVER, "UpdateActivationEnvironment", "a{ss}", ({"A": "b"},)),
        (DRIVER, "ReloadConfig", "", ()),
        (DRIVER, "AddMatch", "s", ("eavesdrop='true'",)),
        (f"{DRIVER}.Monitoring", "BecomeMonitor", "asu", ([], 0)),
        (f"{DRIVER}.Debug.Stats", "GetStats", "", ()),
        (f"{DRIVER}.Debug.Stats", "GetAllMatchRules", "", ()),
        (f"{DRIVER}.Debug.Stats", "GetConnectionStats", "s", (":1.1",)),
        ("org.kbusd.Endpoints1", "Add", "sasb", ("x", [], False)),
        ("org.kbusd.Endpoints1", "Remove", "s", ("app",)),
        ("org.kbusd.Endpoints1", "List", "", ()),
    ],
)
def test_what_the_bus_does_not_do_for_such_a_client(
    place: Place, interface: str, member: str, signature: str, args: tuple[Any, ...]
) -> None:
    app = place.app()
    call = (DRIVER, DRIVER_PATH, interface, member, signature, args)
    assert refusal(app, *call)[0] == "AccessDenied"
    assert app.driver("GetId") == [place.bus.guid]
    assert "app" in place.address and app.driver("Ping", interface=f"{DRIVER}.Peer") == []


# -- where endpoints come from -----------------------------------------------------------------


def test_an_endpoint_is_where_its_file_says(start_bus: Callable[..., Bus], tmp_path: Path) -> None:
    socket = tmp_path / "elsewhere"
    file = tmp_path / "some-where.toml"
    file.write_text(f'socket = "{socket}"\n')
    bus = start_bus(options=[f"--endpoint={file}"])
    client = RawClient(f"unix:path={socket}")
    assert client.driver("ListNames") == [[DRIVER, client.name]]
    client.close()
    bus.stop()
    assert not socket.exists()
    assert not (Path(f"{bus.socket}.some-where")).exists()


def test_a_file_that_is_read_again(own_place: Place) -> None:
    talk = own_place.owner("t.Talk")
    app, admin = own_place.app(), own_place.owner()
    served(app, talk, "t.Talk", "/", "a.b", "C")
    own_place.file.write_text('talk = ["t.Other"]\n')
    admin.driver("ReloadConfig")
    procs.eventually(lambda: ask(app, "NameHasOwner", "t.Talk") == [False], "it is hidden")
    assert refusal(app, "t.Talk", "/", "a.b", "C")[0] == "ServiceUnknown"
    own_place.file.write_text("talk = [7]\n")
    assert refusal(admin, DRIVER, DRIVER_PATH, DRIVER, "ReloadConfig")[0] == "Failed"
    assert f"{own_place.file}:1: talk is a list of strings" in own_place.bus.log()
    socket = own_place.file.with_name("moved")
    own_place.file.write_text(f'socket = "{socket}"\n')
    admin.driver("ReloadConfig")
    procs.eventually(socket.exists, "the socket is where it is to be now")
    assert not os.path.exists(f"{own_place.bus.socket}.app")
    assert app.driver("GetId")  # who is there already stays


def test_a_file_that_changes_is_read_again(own_place: Place) -> None:
    """Nobody has to tell the bus."""
    own_place.owner("t.Talk")
    app = own_place.app()
    assert ask(app, "NameHasOwner", "t.Talk") == [True]
    own_place.file.write_text('talk = ["t.Other"]\n')
    procs.eventually(lambda: ask(app, "NameHasOwner", "t.Talk") == [False], "it is hidden")


def test_a_mistake_keeps_the_bus_from_starting(
    start_bus: Callable[..., Bus], tmp_path: Path
) -> None:
    file = tmp_path / "bad.toml"
    file.write_text('talk = ["a.b"]\ncall = ["a.b=not a rule"]\n')
    with pytest.raises(AssertionError, match=r"bad\.toml:2: call=a\.b=not a rule: a rule is"):
        start_bus(options=[f"--endpoint={file}"])


# -- while the bus runs ------------------------------------------------------------------------


def manage(client: RawClient, member: str, signature: str = "", *args: Any) -> list[Any]:
    return client.driver(member, signature, args, interface="org.kbusd.Endpoints1")


def refused(client: RawClient, member: str, signature: str, *args: Any) -> tuple[str, str]:
    return refusal(client, DRIVER, DRIVER_PATH, "org.kbusd.Endpoints1", member, signature, args)


def test_an_endpoint_that_is_added_and_removed(place: Place) -> None:
    admin, talk = place.owner(), place.owner("t.New")
    (address,) = manage(admin, "Add", "sasb", "new", ["talk=t.New"], False)
    assert address == f"unix:path={place.bus.socket}.new"
    app = RawClient(address)
    served(app, talk, "t.New", "/", "a.b", "C")
    assert refused(admin, "Add", "sasb", "new", [], False)[0] == "FileExists"
    (listed,) = manage(admin, "List")
    assert sorted((name, where) for name, where, _ in listed) == [
        ("app", place.address),
        ("new", address),
    ]
    assert {name: lines for name, _, lines in listed}["new"] == ["talk=t.New"]
    admin.close()
    assert app.driver("GetId")  # it was not bound to who asked
    talk.add_match("member='NameOwnerChanged'")
    manage(talk, "Remove", "s", "new")
    app.expect_disconnect()
    talk.wait(lambda m: m.member == "NameOwnerChanged" and m.args[0] == app.name)
    procs.eventually(lambda: not os.path.exists(f"{place.bus.socket}.new"), "its socket is gone")
    app.close()
    assert refused(talk, "Remove", "s", "new")[0] == "Failed"
    assert "of the configuration" in refused(talk, "Remove", "s", "app")[1]


def test_an_endpoint_that_goes_with_who_asked_for_it(place: Place) -> None:
    admin, other = place.owner(), place.owner()
    (address,) = manage(admin, "Add", "sasb", "bound", [], True)
    app = RawClient(address)
    other.add_match("member='NameOwnerChanged'")
    admin.close()
    app.expect_disconnect()
    other.wait(lambda m: m.member == "NameOwnerChanged" and m.args[0] == app.name)
    procs.eventually(lambda: not os.path.exists(f"{place.bus.socket}.bound"), "its socket is gone")
    app.close()


def test_many_at_once(place: Place) -> None:
    """They are all answered, each with its own."""
    admin = place.owner()
    serials = {
        admin.send_call(
            DRIVER, DRIVER_PATH, "org.kbusd.Endpoints1", "Add", "sasb", (f"m{n}", [], True)
        ): n
        for n in range(20)
    }
    for serial, n in serials.items():
        assert admin.wait_reply(serial).args == [f"unix:path={place.bus.socket}.m{n}"]
    admin.close()
    procs.eventually(
        lambda: not list(place.bus.directory.glob("bus.m*")), "all sockets are gone with it"
    )


@pytest.mark.parametrize(
    ("name", "lines", "error"),
    [
        ("../up", [], "InvalidArgs"),
        ("", [], "InvalidArgs"),
        ("a.b", [], "InvalidArgs"),
        ("fine", ["walk=a.b"], "InvalidArgs"),
        ("fine", ["talk=org.freedesktop.DBus"], "InvalidArgs"),
        ("app", [], "FileExists"),
    ],
)
def test_endpoints_that_cannot_be_added(
    place: Place, name: str, lines: list[str], error: str
) -> None:
    assert refused(place.owner(), "Add", "sasb", name, lines, False)[0] == error


def test_a_socket_that_cannot_be_made(place: Place) -> None:
    (place.bus.directory / "bus.taken").mkdir()
    assert refused(place.owner(), "Add", "sasb", "taken", [], False)[0] == "Failed"
    assert "cannot listen for endpoint taken" in place.bus.log()
    (place.bus.directory / "bus.taken").rmdir()
    assert manage(place.owner(), "Add", "sasb", "taken", [], False)
    manage(place.owner(), "Remove", "s", "taken")


# -- kbusctl -----------------------------------------------------------------------------------


def kbusctl(place: Place, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kbusd.ctl.main", "endpoint", *arguments],
        env=place.bus.env(),
        capture_output=True,
        text=True,
        timeout=30,
    )


def test_kbusctl_adds_lists_and_removes(place: Place) -> None:
    done = kbusctl(place, "add", "cli", "--talk=t.Talk", "--deny-call=t.Talk=t.Bad.*")
    assert done.stdout == f"unix:path={place.bus.socket}.cli\n", done.stderr
    listed = json.loads(kbusctl(place, "list", "--json").stdout)
    (mine,) = [each for each in listed if each["name"] == "cli"]
    assert mine["policy"] == ["talk=t.Talk", "deny-call=t.Talk=t.Bad.*"]
    assert "cli unix:path=" in kbusctl(place, "list").stdout
    done = kbusctl(place, "add", "cli", "--file", str(place.file))
    assert (done.returncode, done.stderr) == (
        2,
        "kbusctl: There is an endpoint cli already\n",
    )
    assert kbusctl(place, "remove", "cli").returncode == 0
    assert "cli" not in kbusctl(place, "list").stdout


def test_a_command_behind_an_endpoint_of_its_own(place: Place) -> None:
    """As a sandbox runs an application: an ordinary client program, which sees what it may see."""
    place.owner("t.Talk")
    place.owner("t.Hidden")
    command = ["dbus-send", "--session", "--print-reply", f"--dest={DRIVER}", "/"]
    command.append(f"{DRIVER}.ListNames")
    done = kbusctl(place, "run", "--talk=t.Talk", "--", *command)
    assert done.returncode == 0, done.stderr
    assert '"t.Talk"' in done.stdout and "t.Hidden" not in done.stdout
    assert kbusctl(place, "run", "--", "sh", "-c", "exit 7").returncode == 7
    assert "run-" not in kbusctl(place, "list").stdout


@pytest.mark.parametrize(
    "command",
    [
        ["gdbus", "call", "--session", "--dest", DRIVER, "--object-path", "/", "--method"]
        + [f"{DRIVER}.ListNames"],
        ["busctl", "--user", "--acquired", "--no-legend", "list"],
    ],
    ids=["gdbus", "busctl"],
)
def test_other_programs_behind_one(place: Place, command: list[str]) -> None:
    place.owner("t.Talk")
    place.owner("t.Hidden")
    done = kbusctl(place, "run", "--talk=t.Talk", "--", *command)
    assert done.returncode == 0, done.stderr
    assert "t.Talk" in done.stdout and "t.Hidden" not in done.stdout
