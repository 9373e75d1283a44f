"""The bus driver, org.freedesktop.DBus: what its methods answer, with the reference's words.

Error names and texts are those of dbus-daemon 1.14, because programs and their tests compare them.
"""

from __future__ import annotations

import os
import re
import select
import signal
import socket
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from . import procs
from . import wireformat as w
from .daemon import Bus, is_reference
from .rawclient import DRIVER, DRIVER_PATH, BusError, RawClient

ERROR = "org.freedesktop.DBus.Error."
PEER = "org.freedesktop.DBus.Peer"
PROPERTIES = "org.freedesktop.DBus.Properties"
INTROSPECTABLE = "org.freedesktop.DBus.Introspectable"
MONITORING = "org.freedesktop.DBus.Monitoring"
STATS = "org.freedesktop.DBus.Debug.Stats"


def test_list_names(bus: Bus) -> None:
    client, other = bus.connect(), bus.connect()
    other.request_name("test.driver.Listed")
    names = client.driver("ListNames")[0]
    assert {DRIVER, client.name, other.name, "test.driver.Listed"} <= set(names)
    assert len(names) == len(set(names))
    other.close()
    client.add_match("type='signal',member='NameOwnerChanged'")
    while {other.name, "test.driver.Listed"} & set(client.driver("ListNames")[0]):
        client.read()


def test_list_activatable_names_has_the_driver(bus: Bus) -> None:
    assert DRIVER in bus.connect().driver("ListActivatableNames")[0]


def test_name_has_owner(bus: Bus) -> None:
    client = bus.connect()
    client.request_name("test.driver.Owned")
    for name, owned in [
        (DRIVER, True),
        (client.name, True),
        ("test.driver.Owned", True),
        ("test.driver.Free", False),
        (":1.99999", False),
    ]:
        assert client.driver("NameHasOwner", "s", (name,)) == [owned]


def test_get_name_owner(bus: Bus) -> None:
    client, owner = bus.connect(), bus.connect()
    owner.request_name("test.driver.Owned2")
    assert client.driver("GetNameOwner", "s", (DRIVER,)) == [DRIVER]
    assert client.driver("GetNameOwner", "s", ("test.driver.Owned2",)) == [owner.name]
    assert client.driver("GetNameOwner", "s", (owner.name,)) == [owner.name]


def test_get_id_is_stable(bus: Bus) -> None:
    first, second = (bus.connect().driver("GetId") for _ in range(2))
    assert first == second
    assert re.fullmatch("[0-9a-f]{32}", first[0])


def test_list_queued_owners(bus: Bus) -> None:
    clients = [bus.connect() for _ in range(3)]
    for client in clients:
        client.request_name("test.driver.Queue")
    owners = clients[0].driver("ListQueuedOwners", "s", ("test.driver.Queue",))
    assert owners == [[client.name for client in clients]]
    assert clients[0].driver("ListQueuedOwners", "s", (DRIVER,)) == [[DRIVER]]
    name = clients[1].name
    assert clients[0].driver("ListQueuedOwners", "s", (name,)) == [[name]]


def test_who_a_client_is(bus: Bus) -> None:
    client, other = bus.connect(), bus.connect()
    other.request_name("test.driver.Someone")
    for name in (other.name, "test.driver.Someone"):
        assert client.driver("GetConnectionUnixUser", "s", (name,)) == [os.geteuid()]
        assert client.driver("GetConnectionUnixProcessID", "s", (name,)) == [os.getpid()]
        credentials = client.driver("GetConnectionCredentials", "s", (name,))[0]
        assert credentials["UnixUserID"] == ("u", os.geteuid())
        assert credentials["ProcessID"] == ("u", os.getpid())
        kind, groups = credentials["UnixGroupIDs"]
        assert kind == "au"
        assert set(groups) == {os.getegid(), *os.getgroups()}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can change its groups")
def pidfds() -> bool:
    """Whether the kernel tells sockets the process at their other end by a descriptor (since 6.5)."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs:
        try:
            os.close(ours.getsockopt(socket.SOL_SOCKET, 77))
        except OSError:
            return False
        return True


@pytest.mark.kbusd_only
@pytest.mark.skipif(not pidfds(), reason="needs SO_PEERPIDFD")
def test_the_process_of_a_client_by_descriptor(bus: Bus) -> None:
    """As newer versions of dbus-daemon and dbus-broker have it, for those who take descriptors."""
    asker, without = bus.connect(), bus.connect(fds=False)
    pid = os.fork()
    if pid == 0:
        other = RawClient(bus.address)
        other.request_name("test.driver.Process")
        signal.pause()
        os._exit(0)
    procs.eventually(
        lambda: asker.driver("NameHasOwner", "s", ("test.driver.Process",))[0], "it has its name"
    )
    where = DRIVER, DRIVER_PATH, DRIVER, "GetConnectionCredentials", "s", ("test.driver.Process",)
    reply = asker.call(*where)
    (fd,) = reply.fds
    assert reply.args[0]["ProcessFD"] == ("h", 0)
    assert reply.args[0]["ProcessID"] == ("u", pid)
    with open(f"/proc/self/fdinfo/{fd}") as info:
        assert re.search(rf"^Pid:\s+{pid}$", info.read(), re.M)
    assert "ProcessFD" not in without.call(*where).args[0]
    assert "ProcessFD" not in asker.driver("GetConnectionCredentials", "s", (DRIVER,))[0]
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert select.select([fd], [], [], 5)[0], "the descriptor is that process's"
    os.close(fd)


@pytest.mark.kbusd_only
@pytest.mark.skipif(not pidfds(), reason="needs SO_PEERPIDFD")
def test_process_descriptors_are_not_kept(bus: Bus) -> None:
    """Neither by a client's worker nor, once the client has gone, by the broker."""
    asker = bus.connect()
    broker = next(process for process in bus.tree() if process.comm.startswith("kbusd-broker"))

    def held() -> list[int]:
        """How many each has of processes; what else the broker has varies with the spare workers."""
        each = [procs.descriptors(pid) for pid in (bus.worker_of(asker).pid, broker.pid)]
        return [sum("pidfd" in link for link in links) for links in each]

    def ask(name: str) -> None:
        where = DRIVER, DRIVER_PATH, DRIVER, "GetConnectionCredentials", "s", (name,)
        for fd in asker.call(*where).fds:
            os.close(fd)

    ask(asker.name)
    # Of the asker and of the fixture's own client, once its worker has handed on what it got.
    procs.eventually(lambda: held() == [0, 2], "the worker has closed it")
    for _ in range(10):
        client = RawClient(bus.address)
        ask(client.name)
        client.close()
    procs.eventually(lambda: held() == [0, 2], "all are closed")


def test_supplementary_groups(bus: Bus) -> None:
    before = os.getgroups()
    os.setgroups([2001, 2003])
    try:
        client = bus.connect()
    finally:
        os.setgroups(before)
    credentials = client.driver("GetConnectionCredentials", "s", (client.name,))[0]
    assert credentials["UnixGroupIDs"] == ("au", [os.getegid(), 2001, 2003])


def test_who_the_driver_is(bus: Bus) -> None:
    client = bus.connect()
    assert client.driver("GetConnectionUnixUser", "s", (DRIVER,)) == [os.geteuid()]
    assert client.driver("GetConnectionUnixProcessID", "s", (DRIVER,)) == [bus.pid]
    credentials = client.driver("GetConnectionCredentials", "s", (DRIVER,))[0]
    assert credentials["UnixUserID"] == ("u", os.geteuid())
    assert credentials["ProcessID"] == ("u", bus.pid)


def test_peer(bus: Bus) -> None:
    client = bus.connect()
    machine_id = Path("/etc/machine-id")
    for path in (DRIVER_PATH, "/", "/any"):
        assert client.driver("Ping", interface=PEER, path=path) == []
        answer = client.driver("GetMachineId", interface=PEER, path=path)[0]
        assert re.fullmatch("[0-9a-f]{32}", answer)
        if machine_id.exists():
            assert answer == machine_id.read_text().strip()


def test_introspection_names_every_method(bus: Bus) -> None:
    client = bus.connect()
    xml = ElementTree.fromstring(client.driver("Introspect", interface=INTROSPECTABLE)[0])
    methods = {
        f"{interface.get('name')}.{method.get('name')}"
        for interface in xml.iter("interface")
        for method in interface.iter("method")
    }
    assert {
        *(
            f"{DRIVER}.{name}"
            for name in [
                "Hello",
                "RequestName",
                "ReleaseName",
                "StartServiceByName",
                "UpdateActivationEnvironment",
                "NameHasOwner",
                "ListNames",
                "ListActivatableNames",
                "AddMatch",
                "RemoveMatch",
                "GetNameOwner",
                "ListQueuedOwners",
                "GetConnectionUnixUser",
                "GetConnectionUnixProcessID",
                "GetAdtAuditSessionData",
                "GetConnectionSELinuxSecurityContext",
                "ReloadConfig",
                "GetId",
                "GetConnectionCredentials",
            ]
        ),
        f"{PEER}.Ping",
        f"{PEER}.GetMachineId",
        f"{INTROSPECTABLE}.Introspect",
        f"{PROPERTIES}.Get",
        f"{PROPERTIES}.GetAll",
        f"{PROPERTIES}.Set",
        f"{MONITORING}.BecomeMonitor",
        f"{STATS}.GetStats",
    } <= methods
    signals = {signal.get("name") for signal in xml.iter("signal")}
    assert {"NameOwnerChanged", "NameLost", "NameAcquired"} <= signals
    assert {p.get("name") for p in xml.iter("property")} >= {"Features", "Interfaces"}


@pytest.mark.parametrize(
    ("path", "child"), [("/", "org/freedesktop/DBus"), ("/org", "freedesktop/DBus")]
)
def test_introspection_leads_to_the_driver(bus: Bus, path: str, child: str) -> None:
    text = bus.connect().driver("Introspect", interface=INTROSPECTABLE, path=path)[0]
    children = [node.get("name") for node in ElementTree.fromstring(text).findall("node")]
    assert children == [child]


def test_properties(bus: Bus) -> None:
    client = bus.connect()
    everything = client.driver("GetAll", "s", (DRIVER,), interface=PROPERTIES)[0]
    assert set(everything) == {"Features", "Interfaces"}
    for name, value in everything.items():
        assert client.driver("Get", "ss", (DRIVER, name), interface=PROPERTIES) == [value]
    assert "HeaderFiltering" in everything["Features"][1]
    assert "SystemdActivation" not in everything["Features"][1]
    assert {MONITORING, STATS} <= set(everything["Interfaces"][1])


def test_statistics_count_connections(bus: Bus) -> None:
    client = bus.connect()
    client.add_match("type='signal',member='Nothing'")
    before = client.driver("GetStats", interface=STATS)[0]
    bus.connect()
    after = client.driver("GetStats", interface=STATS)[0]
    assert after["ActiveConnections"][1] == before["ActiveConnections"][1] + 1
    assert after["BusNames"][1] == before["BusNames"][1] + 1
    one = client.driver("GetConnectionStats", "s", (client.name,), interface=STATS)[0]
    assert one["UniqueName"] == ("s", client.name)
    assert one["MatchRules"] == ("u", 1)
    assert one["BusNames"] == ("u", 1)
    other = bus.connect()
    other.request_name("test.driver.Waited")
    client.request_name("test.driver.Waited")
    one = client.driver("GetConnectionStats", "s", (client.name,), interface=STATS)[0]
    assert one["BusNames"] == ("u", 2)  # a name that it waits for counts
    rules = client.driver("GetAllMatchRules", interface=STATS)[0]
    assert len(rules[client.name]) == 1
    assert "Nothing" in rules[client.name][0]


BUS_KEYS = {
    "Serial", "ListMemPoolUsedBytes", "ListMemPoolCachedBytes", "ListMemPoolAllocatedBytes",
    "ActiveConnections", "IncompleteConnections", "MatchRules", "PeakMatchRules",
    "PeakMatchRulesPerConnection", "BusNames", "PeakBusNames", "PeakBusNamesPerConnection",
}  # fmt: skip
CONNECTION_KEYS = {
    "Serial", "MatchRules", "PeakMatchRules", "BusNames", "PeakBusNames", "UniqueName",
    "IncomingMessages", "IncomingBytes", "IncomingFDs", "PeakIncomingBytes", "PeakIncomingFDs",
    "OutgoingMessages", "OutgoingBytes", "OutgoingFDs", "PeakOutgoingBytes", "PeakOutgoingFDs",
}  # fmt: skip


def stats_of(asker: RawClient, name: str) -> dict[str, Any]:
    found = asker.driver("GetConnectionStats", "s", (name,), interface=STATS)[0]
    assert found.keys() == CONNECTION_KEYS
    assert all(kind == "u" for key, (kind, _) in found.items() if key != "UniqueName")
    return {key: value for key, (_, value) in found.items()}


def test_statistics_remember_the_most(bus: Bus) -> None:
    client, watcher = bus.connect(), bus.connect()
    first = watcher.driver("GetStats", interface=STATS)[0]
    assert first.keys() >= BUS_KEYS
    for number in range(3):
        client.request_name(f"test.stats.N{number}")
        client.add_match(f"member='N{number}'")
    for number in range(3):
        client.driver("ReleaseName", "s", (f"test.stats.N{number}",))
        client.driver("RemoveMatch", "s", (f"member='N{number}'",))
    one = stats_of(watcher, client.name)
    assert (one["BusNames"], one["PeakBusNames"]) == (1, 4)
    assert (one["MatchRules"], one["PeakMatchRules"]) == (0, 3)
    last = watcher.driver("GetStats", interface=STATS)[0]
    assert last["Serial"][1] == first["Serial"][1] + 1
    assert last["PeakBusNames"][1] >= first["BusNames"][1] + 3
    assert last["PeakBusNamesPerConnection"][1] >= 4
    assert last["PeakMatchRulesPerConnection"][1] >= 3


def test_statistics_of_what_waits_for_a_client(bus: Bus) -> None:
    sender, receiver = bus.connect(), bus.connect()
    idle = stats_of(sender, receiver.name)
    assert (idle["OutgoingBytes"], idle["OutgoingMessages"], idle["IncomingBytes"]) == (0, 0, 0)
    for _ in range(40):
        sender.signal("/", "test.I", "Much", "ay", (bytes(100_000),), to=receiver.name)
    sender.driver("GetId")
    procs.eventually(
        lambda: stats_of(sender, receiver.name)["OutgoingBytes"] > 2_000_000, "much waits"
    )
    full = stats_of(sender, receiver.name)
    assert 10 < full["OutgoingMessages"] <= 40
    for _ in range(40):
        receiver.wait_signal("Much")
    after = stats_of(sender, receiver.name)
    assert (after["OutgoingBytes"], after["OutgoingMessages"]) == (0, 0)
    assert after["PeakOutgoingBytes"] >= full["OutgoingBytes"]
    mine = stats_of(sender, sender.name)
    assert mine["PeakIncomingBytes"] >= 100_000 or not is_reference()
    assert mine["PeakIncomingBytes"] > 0


def test_statistics_count_descriptors(bus: Bus) -> None:
    sender, receiver = bus.connect(), bus.connect()
    with open("/dev/null") as null:
        fds = [null.fileno()] * 3
        sender.signal("/", "test.I", "Three", "hhh", (0, 1, 2), to=receiver.name, fds=fds)
    for fd in receiver.wait_signal("Three").fds:
        os.close(fd)
    assert stats_of(receiver, sender.name)["PeakIncomingFDs"] == 3
    assert stats_of(receiver, receiver.name)["PeakOutgoingFDs"] == 3


@pytest.mark.kbusd_only
def test_statistics_of_a_worker_that_says_nothing(bus: Bus) -> None:
    """What the rest of the bus knows is answered all the same."""
    asker, stopped = bus.connect(), bus.connect()
    worker = bus.worker_of(stopped)
    os.kill(worker.pid, signal.SIGSTOP)
    try:
        call = asker.send_call(
            DRIVER, DRIVER_PATH, STATS, "GetConnectionStats", "s", (stopped.name,)
        )
        asker.driver("GetId")  # nothing waits for it
        one = asker.wait_reply(call).args[0]
    finally:
        os.kill(worker.pid, signal.SIGCONT)
    assert one["PeakBusNames"] == ("u", 1)
    assert "IncomingBytes" not in one
    stats_of(asker, stopped.name)


def test_every_path_is_the_drivers(bus: Bus) -> None:
    """Old clients call the driver on paths of their own."""
    client = bus.connect()
    assert client.name in client.driver("ListNames", path="/foo")[0]
    assert client.driver("RequestName", "su", ("test.driver.Path", 0), path="/") == [1]


def test_no_interface_is_enough(bus: Bus) -> None:
    client = bus.connect()
    reply = client.call(DRIVER, DRIVER_PATH, None, "NameHasOwner", "s", (client.name,))
    assert reply.args == [True]


def test_call_to_the_driver_that_wants_no_reply(bus: Bus) -> None:
    client = bus.connect()
    client.send_call(
        DRIVER,
        DRIVER_PATH,
        DRIVER,
        "AddMatch",
        "s",
        ("interface='a.b'",),
        flags=w.NO_REPLY_EXPECTED,
    )
    client.signal("/", "a.b", "C")
    assert [m.member for m in client.drain()] == ["C"]


UNANSWERED: list[tuple[str, str, str, tuple[Any, ...]]] = [
    ("", "AddMatch", "s", ("type='signal'",)),
    ("", "RemoveMatch", "s", ("type='signal'",)),
    ("", "UpdateActivationEnvironment", "a{ss}", ({},)),
    (".Peer", "Ping", "", ()),
]
ANSWERED: list[tuple[str, str, str, tuple[Any, ...]]] = [
    ("", "GetId", "", ()),
    ("", "RequestName", "su", ("test.Unwanted", 0)),
    ("", "ReleaseName", "s", ("test.Unwanted",)),
    ("", "NameHasOwner", "s", (DRIVER,)),
    ("", "GetConnectionCredentials", "s", (DRIVER,)),
    ("", "ReloadConfig", "", ()),
    (".Peer", "GetMachineId", "", ()),
    (".Introspectable", "Introspect", "", ()),
    (".Properties", "Get", "ss", (DRIVER, "Features")),
    (".Debug.Stats", "GetStats", "", ()),
]


@pytest.mark.parametrize(
    ("interface", "member", "signature", "args", "answered"),
    [(*call, False) for call in UNANSWERED] + [(*call, True) for call in ANSWERED],
)
def test_values_are_sent_to_those_who_want_no_reply(
    bus: Bus, interface: str, member: str, signature: str, args: tuple[Any, ...], answered: bool
) -> None:
    """What has no value to tell is left unanswered; ReloadConfig is not."""
    client = bus.connect()
    client.add_match("type='signal'")
    flags = w.NO_REPLY_EXPECTED
    where = DRIVER, DRIVER_PATH, DRIVER + interface
    unwanted = client.send_call(*where, member, signature, args, flags=flags)
    wanted = client.send_call(DRIVER, DRIVER_PATH, DRIVER, "GetId")
    serials = []
    while not serials or serials[-1] != wanted:
        message = client.read()
        if message.type != w.SIGNAL:
            assert message.type == w.RETURN
            serials.append(message.reply_serial)
    assert serials == ([unwanted, wanted] if answered else [wanted])


def test_reply_of_the_driver_wants_no_reply(bus: Bus) -> None:
    client = bus.connect()
    serial = client.send_call(DRIVER, DRIVER_PATH, DRIVER, "GetId")
    reply = client.wait_reply(serial)
    assert reply.flags & w.NO_REPLY_EXPECTED
    assert (reply.sender, reply.destination) == (DRIVER, client.name)


def test_signals_and_replies_to_the_driver_are_ignored(bus: Bus) -> None:
    client = bus.connect()
    client.signal("/", "a.b", "C", to=DRIVER)
    client.send(w.RETURN, {w.DESTINATION: DRIVER, w.REPLY_SERIAL: 5})
    assert client.drain() == []


# member, signature, arguments, where, error, text (None: not compared)
REFUSED: list[tuple[str, str, tuple[Any, ...], dict[str, str], str, str | None]] = [
    (
        "GetNameOwner",
        "s",
        ("x.y",),
        {},
        "NameHasNoOwner",
        "Could not get owner of name 'x.y': no such name",
    ),
    (
        "ListQueuedOwners",
        "s",
        ("x.y",),
        {},
        "NameHasNoOwner",
        "Could not get owners of name 'x.y': no such name",
    ),
    (
        "GetConnectionUnixUser",
        "s",
        ("x.y",),
        {},
        "NameHasNoOwner",
        "Could not get UID of name 'x.y': no such name",
    ),
    (
        "GetConnectionUnixProcessID",
        "s",
        (":1.99999",),
        {},
        "NameHasNoOwner",
        "Could not get PID of name ':1.99999': no such name",
    ),
    (
        "GetConnectionCredentials",
        "s",
        ("x.y",),
        {},
        "NameHasNoOwner",
        "Could not get credentials of name 'x.y': no such name",
    ),
    (
        "NameHasOwner",
        "u",
        (1,),
        {},
        "InvalidArgs",
        "Call to NameHasOwner has wrong args (u, expected s)\n",
    ),
    (
        "NameHasOwner",
        "",
        (),
        {},
        "InvalidArgs",
        "Call to NameHasOwner has wrong args (, expected s)\n",
    ),
    (
        "RequestName",
        "s",
        ("a.b",),
        {},
        "InvalidArgs",
        "Call to RequestName has wrong args (s, expected su)\n",
    ),
    (
        "ListNames",
        "s",
        ("a",),
        {},
        "InvalidArgs",
        "Call to ListNames has wrong args (s, expected )\n",
    ),
    (
        "Nope",
        "",
        (),
        {},
        "UnknownMethod",
        "org.freedesktop.DBus does not understand message Nope",
    ),
    (
        "Nope",
        "s",
        ("a",),
        {"interface": "no.such.Interface"},
        "UnknownInterface",
        "org.freedesktop.DBus does not understand message Nope",
    ),
    (
        "Get",
        "ss",
        (DRIVER, "Features"),
        {"interface": PROPERTIES, "path": "/"},
        "UnknownInterface",
        "org.freedesktop.DBus does not understand message Get",
    ),
    (
        "BecomeMonitor",
        "asu",
        ([], 0),
        {"interface": MONITORING, "path": "/"},
        "UnknownInterface",
        "org.freedesktop.DBus does not understand message BecomeMonitor",
    ),
    (
        "BecomeMonitor",
        "asu",
        ([], 1),
        {"interface": MONITORING},
        "InvalidArgs",
        "BecomeMonitor does not support any flags yet",
    ),
    (
        "Get",
        "ss",
        (DRIVER, "Nope"),
        {"interface": PROPERTIES},
        "UnknownProperty",
        'Property "org.freedesktop.DBus.Nope" not found',
    ),
    (
        "Get",
        "ss",
        ("a.b", "Nope"),
        {"interface": PROPERTIES},
        "UnknownInterface",
        'Interface "a.b" not found',
    ),
    (
        "GetAll",
        "s",
        ("a.b",),
        {"interface": PROPERTIES},
        "UnknownInterface",
        'Interface "a.b" not found',
    ),
    (
        "Set",
        "ssv",
        (DRIVER, "Features", ("as", [])),
        {"interface": PROPERTIES},
        "PropertyReadOnly",
        "Property 'org.freedesktop.DBus.Features' cannot be set",
    ),
    (
        "UpdateActivationEnvironment",
        "a{ss}",
        ({},),
        {"path": "/"},
        "AccessDenied",
        None,
    ),
    (
        "RequestName",
        "su",
        (DRIVER, 0),
        {},
        "InvalidArgs",
        None,
    ),
    (
        "RequestName",
        "su",
        (":1.5", 0),
        {},
        "InvalidArgs",
        "Cannot acquire a service starting with ':' such as \":1.5\"",
    ),
    (
        "RequestName",
        "su",
        ("x", 0),
        {},
        "InvalidArgs",
        'Requested bus name "x" is not valid',
    ),
    (
        "ReleaseName",
        "s",
        (DRIVER,),
        {},
        "InvalidArgs",
        "Cannot release the org.freedesktop.DBus service because it is owned by the bus",
    ),
    (
        "ReleaseName",
        "s",
        (":1.0",),
        {},
        "InvalidArgs",
        "Cannot release a service starting with ':' such as \":1.0\"",
    ),
    (
        "ReleaseName",
        "s",
        ("x",),
        {},
        "InvalidArgs",
        'Given bus name "x" is not valid',
    ),
    (
        "StartServiceByName",
        "su",
        ("x.y", 0),
        {},
        "ServiceUnknown",
        "The name x.y was not provided by any .service files",
    ),
    (
        "RemoveMatch",
        "s",
        ("type='signal',member='Never'",),
        {},
        "MatchRuleNotFound",
        "The given match rule wasn't found and can't be removed",
    ),
]


@pytest.mark.parametrize(
    ("member", "signature", "args", "where", "error", "text"),
    REFUSED,
    ids=[f"{row[0]}-{row[4]}-{number}" for number, row in enumerate(REFUSED)],
)
def test_refusals_use_the_references_words(
    bus: Bus,
    member: str,
    signature: str,
    args: tuple[Any, ...],
    where: dict[str, str],
    error: str,
    text: str | None,
) -> None:
    client = bus.connect()
    with pytest.raises(BusError) as caught:
        client.driver(member, signature, args, **where)
    assert caught.value.name == ERROR + error
    if text is not None:
        assert caught.value.text == text
    assert caught.value.message.sender == DRIVER


def test_audit_and_selinux_data_that_is_not_there(bus: Bus) -> None:
    client = bus.connect()
    with pytest.raises(BusError) as caught:
        client.driver("GetAdtAuditSessionData", "s", (client.name,))
    assert caught.value.name == ERROR + "AdtAuditDataUnknown"
    if not os.path.exists("/sys/fs/selinux/enforce"):
        with pytest.raises(BusError) as caught:
            client.driver("GetConnectionSELinuxSecurityContext", "s", (client.name,))
        assert caught.value.name == ERROR + "SELinuxSecurityContextUnknown"


def test_signals_of_the_driver_expect_no_reply(bus: Bus) -> None:
    client = bus.connect()
    client.add_match(f"sender='{DRIVER}'")
    client.request_name("test.driver.Flags")
    for member in ("NameOwnerChanged", "NameAcquired"):
        assert client.wait_signal(member).flags == w.NO_REPLY_EXPECTED
