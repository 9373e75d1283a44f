"""What both buses answer to the same calls of the driver, right and wrong: word for word the same.

Every method of every interface with all kinds of arguments, by its own, another and no interface, on
other paths, wanting no reply; then names, match rules, properties and flags of all kinds.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest

from . import wireformat as w
from .daemon import Bus
from .rawclient import DRIVER, DRIVER_PATH, Disconnected, RawClient
from .wireformat import Message

pytestmark = [pytest.mark.kbusd_only, pytest.mark.slow]
PROPERTIES = f"{DRIVER}.Properties"
MONITORING = f"{DRIVER}.Monitoring"
STATS = f"{DRIVER}.Debug.Stats"
METHODS = {
    DRIVER: (
        "Hello RequestName ReleaseName StartServiceByName UpdateActivationEnvironment NameHasOwner"
        " ListNames ListActivatableNames AddMatch RemoveMatch GetNameOwner ListQueuedOwners"
        " GetConnectionUnixUser GetConnectionUnixProcessID GetAdtAuditSessionData"
        " GetConnectionSELinuxSecurityContext ReloadConfig GetConnectionCredentials Nope"
    ),
    f"{DRIVER}.Introspectable": "Introspect",
    MONITORING: "BecomeMonitor",
    PROPERTIES: "Get GetAll Set",
    f"{DRIVER}.Peer": "Ping GetMachineId",
    STATS: "GetStats GetConnectionStats GetAllMatchRules",
    f"{DRIVER}.ObjectManager": "GetManagedObjects",
    "no.such.Interface": "Nope",
}
BY_NAME = [
    "GetNameOwner",
    "NameHasOwner",
    "ListQueuedOwners",
    "ReleaseName",
    "GetConnectionUnixUser",
    "GetConnectionUnixProcessID",
    "GetConnectionCredentials",
    "GetAdtAuditSessionData",
    "GetConnectionSELinuxSecurityContext",
]
ARGUMENTS: list[tuple[str, tuple[Any, ...]]] = [
    ("", ()),
    ("s", (":9.9",)),
    ("s", ("",)),
    ("su", ("a.b", 0)),
    ("su", ("a.b", 0xFFFFFFFF)),
    ("u", (1,)),
    ("ss", (DRIVER, "Features")),
    ("ss", ("", "Features")),
    ("ss", (f"{DRIVER}.Peer", "x")),
    ("ssv", (DRIVER, "Features", ("s", "x"))),
    ("asu", ([], 1)),
    ("asu", (["bogus"], 0)),
    ("a{ss}", ({"A": "b"},)),
    ("a{sv}", ({},)),
    ("sss", ("a", "b", "c")),
    ("v", (("s", "x"),)),
]
NAMES = [
    "a",
    "a..b",
    ".a",
    "a.",
    "a.1b",
    "a-b.c",
    "1.b",
    "_a.b",
    "a." + "b" * 254,
    ":9.1",
    ":x",
    "é.b",
]
NAMES += ["a.b", "a.b-", " a.b", f"{DRIVER}.x", "a." + "b" * 253]
RULES = (
    """
type='signal'|type='bogus'|type=signal|type='signal',type='signal'|sender='a b'|path='nope'
path_namespace='/a/'|path_namespace='/'|arg0='x',arg0='y'|arg64='x'|arg63='x'|arg0path='x'
arg1namespace='a.b'|arg0namespace='a'|arg0namespace=''|member='a.b'|member=''|interface='x'
path='/a',path_namespace='/a'|foo='bar'|type|=|type=|type='signal|type='signal',|'
eavesdrop='maybe'|destination=':1.5'|destination='x'|arg='x'|arg00='x'|arg99999999999999999999='x'
argx='y'| type='signal'|type='signal' |type = 'signal'|arg0=\\'|arg0='a'b'c'|type='invalid'
arg0path='/a',arg0='/a'|type='signal',,member='x'|,|arg1path='',|sender=':1.3.4'|interface=''|path=''
""".replace("\n", "|")
    .strip("|")
    .split("|")
)
RULES += ["", "x" * 1024, "arg0='" + "x" * 1100 + "'"]
END = "disconnected"
# What has to differ: process ids, what only one of the two counts, and our own interface.
DIFFERENT = {("GetStats", ""), ("Introspect", "")}


class Probe(NamedTuple):
    member: str
    signature: str = ""
    args: tuple[Any, ...] = ()
    interface: str | None = DRIVER
    path: str = DRIVER_PATH
    flags: int = 0


def probes() -> Iterator[Probe]:
    for interface, members in METHODS.items():
        for member in members.split():
            for signature, args in ARGUMENTS:
                yield Probe(member, signature, args, interface)
            for signature, args in ARGUMENTS[:4]:
                yield Probe(member, signature, args, interface, flags=w.NO_REPLY_EXPECTED)
                for path in ("/", "/org/freedesktop", "/x/y"):
                    yield Probe(member, signature, args, interface, path)
                for other in (None, DRIVER, PROPERTIES):
                    yield Probe(member, signature, args, other)
    for name in NAMES:
        yield from (Probe(member, "s", (name,)) for member in BY_NAME)
        yield Probe("GetConnectionStats", "s", (name,), STATS)
        for flags in (0, 7, 0xFFFFFFFF):
            yield Probe("RequestName", "su", (name, flags))
            yield Probe("StartServiceByName", "su", (name, flags))
    for rule in RULES:
        yield from (Probe(member, "s", (rule,)) for member in ("AddMatch", "RemoveMatch"))
        yield Probe("BecomeMonitor", "asu", ([rule], 0), MONITORING)
    for interface in (DRIVER, STATS, MONITORING, "", "a", "no.such.I"):
        yield Probe("GetAll", "s", (interface,), PROPERTIES)
        for name in ("Features", "Interfaces", "", "x"):
            yield Probe("Get", "ss", (interface, name), PROPERTIES)
            yield Probe("Set", "ssv", (interface, name, ("u", 1)), PROPERTIES)
    for path in ("/", "/org", "/org/freedesktop", "/a", f"{DRIVER_PATH}/a"):
        yield Probe("Introspect", "", (), f"{DRIVER}.Introspectable", path)
    for flags in (2, 4, 8, 0x80, 0xFE):
        yield Probe("NameHasOwner", "s", (DRIVER,), flags=flags)


def told(client: RawClient, probe: Probe) -> str:
    """All that the bus says to it, without what is another on each bus."""
    fields: dict[int, Any] = {
        w.PATH: probe.path,
        w.MEMBER: probe.member,
        w.DESTINATION: DRIVER,
    }
    if probe.interface is not None:
        fields[w.INTERFACE] = probe.interface
    got: list[Message] = []
    end = ""
    try:
        serial = client.send(w.CALL, fields, probe.signature, probe.args, flags=probe.flags)
        if not probe.flags & w.NO_REPLY_EXPECTED or probe.member == "StartServiceByName":
            client.inbox.append(client.wait(lambda m: m.reply_serial == serial))
        last = client.send_call(DRIVER, DRIVER_PATH, f"{DRIVER}.Peer", "Ping")
        while (message := client.read()).reply_serial != last:
            got.append(message)
        if message.type == w.ERROR:
            got.append(message)
    except (Disconnected, BrokenPipeError, ConnectionResetError):
        end = END
        got.sort(key=lambda m: str(m.args))  # a monitor loses its names, in whatever order
    return (
        "\n".join(
            str((m.type, m.flags, m.reply_serial, m.error_name, m.member, m.signature, m.args))
            for m in got
        ).replace(client.name, ":me")
        + end
    )


def all_told(bus: Bus, answers: list[str]) -> None:
    client = RawClient(bus.address)
    for probe in probes():
        answers.append(told(client, probe))
        if answers[-1].endswith(END):
            client.close()
            client = RawClient(bus.address)
    client.close()


def test_the_driver_answers_as_that_of_dbus_daemon(start_bus) -> None:  # type: ignore[no-untyped-def]
    answers: tuple[list[str], list[str]] = ([], [])
    buses = start_bus(daemon=["/usr/bin/dbus-daemon"]), start_bus()
    threads = [
        threading.Thread(target=all_told, args=each) for each in zip(buses, answers, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    told_by_both = list(zip(probes(), *answers, strict=True))
    assert len(told_by_both) > 1200
    different = [
        f"{probe}\n  {theirs}\n  {ours}"
        for probe, theirs, ours in told_by_both
        if theirs != ours and (probe.member, probe.signature) not in DIFFERENT
    ]
    assert not different, "\n".join(different)
