"""The same random session on kbusd and on dbus-daemon: every client gets the same messages in the same order.

Names and their queues, match rules, also malformed ones, signals, calls, replies, calls and signals that say that
they are replies, descriptors, headers that are odd but valid, all that the bus itself can be asked, connections
that end, or become monitors; with a policy that allows
everything and with random ones. After each step all that each client got is compared, with the texts of
errors, and with other names for the unique names, which differ.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, NamedTuple
from xml.sax.saxutils import quoteattr

import pytest

from . import wireformat as w
from .daemon import STRICT_POLICY, Bus, configuration
from .rawclient import DRIVER, DRIVER_PATH, BusError, RawClient
from .wireformat import Message

pytestmark = [pytest.mark.kbusd_only, pytest.mark.slow]

SEED = 20261126
CLIENTS = 5
STEPS = 400
NAMES = ["t.A", "t.A.B", "t.C"]
PATHS = ["/", "/t", "/t/u", "/tt"]
INTERFACES = ["t.I", "t.I.J", "t.K"]
MEMBERS = ["M", "N"]
KINDS = {"request": 2, "release": 1, "match": 2, "unmatch": 1, "signal": 3, "unicast": 1}
KINDS |= {"call": 3, "reply": 2, "error": 1, "ask": 2, "fds": 2, "leave": 1}  # how often
KINDS |= {"driver": 2, "odd": 1, "broken": 1, "rules": 1, "back": 2, "monitor": 1}
TEXTS = ["", "t", "t.A", "t.A.B", "/", "/t", "/t/", "/t/u", "x'y"]
NO_REPLY = f"'{DRIVER}.Error.NoReply'"
STATS = f"{DRIVER}.Debug.Stats"
PROPERTIES, MONITORING = f"{DRIVER}.Properties", f"{DRIVER}.Monitoring"
PEER, INTROSPECTABLE = f"{DRIVER}.Peer", f"{DRIVER}.Introspectable"
ABOUT = ["NameHasOwner", "GetNameOwner", "ListQueuedOwners", "GetConnectionUnixUser"]
ABOUT += ["GetConnectionUnixProcessID", "GetAdtAuditSessionData", "GetConnectionCredentials"]
ABOUT += ["GetConnectionSELinuxSecurityContext", "ReleaseName", "StartServiceByName", "Nothing"]
PLAIN = ["ListNames", "ListActivatableNames", "Hello", "Ping", "GetMachineId"]
BAD_NAMES = [
    "",
    "t",
    "t..A",
    ".t.A",
    "t.A.",
    "t.9",
    ":1",
    ":1.x-_",
    ":",
    "t.\u00e9",
    "t." + "x" * 254,
]
# What only we say in refusals: which rule; what only dbus-daemon does: the name of the program.
OURS = re.compile(
    r" \((?:(?:denied|allowed) by rule [^)]*|no rule allows it|nobody waits for it)\)"
)
THEIRS = re.compile(r'comm="[^"]*"')
REFUSED_TEXT = r'Rejected .* message, \d+ matched rules; type="(?:{})"'
REFUSED = re.compile(rf"\(3, 1, '{DRIVER}', .*'{DRIVER}\.Error\.(AccessDenied|NotSupported)'")


class Step(NamedTuple):
    what: str
    actor: int
    args: tuple[Any, ...]


def quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


def rule(dice: random.Random, names: list[str]) -> str:
    kinds = {
        "type": ["signal", "method_call", "method_return", "error"],
        "sender": [*names, DRIVER],
        "interface": [*INTERFACES, DRIVER],
        "member": [*MEMBERS, "NameOwnerChanged"],
        "path": PATHS,
        "path_namespace": PATHS,
        "destination": [name for name in names if name.startswith("{")],
        "arg0": TEXTS,
        "arg1": TEXTS,
        "arg0path": TEXTS,
        "arg1path": TEXTS,
        "arg0namespace": ["t", "t.A", "t.A.B"],
        "eavesdrop": ["true", "false"],
    }
    keys = dice.sample(list(kinds), dice.choice([0, 1, 1, 1, 2, 2, 3]))
    if "path" in keys and "path_namespace" in keys:
        keys.remove("path")
    return ",".join(f"{key}={quoted(dice.choice(kinds[key]))}" for key in keys)


def broken(dice: random.Random, text: str) -> str:
    """A match rule that has lost or got something somewhere."""
    for _ in range(dice.randrange(1, 3)):
        at = dice.randrange(len(text) + 1)
        text = (
            text[:at]
            + dice.choice(["", "'", ",", "=", "\\", " ", "\t", "x", "0"])
            + text[at + dice.randrange(2) :]
        )
    return text


def driver_call(dice: random.Random, names: list[str]) -> tuple[Any, ...]:
    """Path, interface, member, signature and arguments of something that the bus is asked."""
    path = dice.choice([DRIVER_PATH] * 4 + ["/", "/t", "/org/freedesktop"])
    interface = dice.choice(
        [DRIVER] * 4 + [None, PEER, PROPERTIES, INTROSPECTABLE, MONITORING, "t.I"]
    )
    name = dice.choice([*names, *names, *BAD_NAMES, DRIVER])
    match dice.randrange(6):
        case 0:
            return (
                path,
                interface,
                dice.choice(PLAIN),
                *dice.choice([("", ()), ("", ()), ("s", (name,))]),
            )
        case 1:
            member = dice.choice(["RequestName", "StartServiceByName"])
            return (
                path,
                interface,
                member,
                "su",
                (name, dice.choice([0, 1, 2, 4, 7, 8, 0xFFFF_FFFF])),
            )
        case 2:
            of, what = (
                dice.choice([DRIVER, PEER, "t.I", ""]),
                dice.choice(["Features", "Interfaces", "No", ""]),
            )
            args = dice.choice(
                [
                    ("Get", "ss", (of, what)),
                    ("GetAll", "s", (of,)),
                    ("Set", "ssv", (of, what, ("s", "x"))),
                ]
            )
            return path, dice.choice([PROPERTIES] * 4 + [None, DRIVER]), *args
        case 3:
            args = dice.choice([("", ()), ("u", (1,)), ("ss", (name, name)), ("as", ([name],))])
            return path, interface, dice.choice(ABOUT), *args
        case _:
            return path, interface, dice.choice(ABOUT), "s", (name,)


def odd_message(dice: random.Random, names: list[str]) -> tuple[Any, ...]:
    """Type, header fields, signature, arguments and options of a message that is unusual, and valid."""
    fields: dict[int, Any] = {w.PATH: dice.choice(PATHS), w.MEMBER: dice.choice(MEMBERS)}
    if dice.randrange(2):
        fields[w.DESTINATION] = dice.choice([*names, *names, DRIVER, "t.Nobody"])
    if dice.randrange(2):
        fields[w.INTERFACE] = dice.choice([*INTERFACES, PEER])
    if w.DESTINATION in fields and dice.randrange(2):  # it is what libdbus answers to, else
        fields[w.SENDER] = dice.choice([*names, DRIVER])
    if dice.randrange(4) == 0:
        fields[w.ERROR_NAME] = "t.Error"
    if fields.get(w.PATH) == "/" and dice.randrange(2):
        fields[w.MEMBER] = dice.choice(["Ping", "GetMachineId"])
    type_ = dice.choice([w.CALL, w.CALL, w.SIGNAL, w.RETURN, w.ERROR, 5, 77, 255])
    needed = {w.SIGNAL: w.INTERFACE, w.RETURN: w.REPLY_SERIAL, w.ERROR: w.REPLY_SERIAL}
    if type_ in needed:
        fields.setdefault(needed[type_], {w.INTERFACE: "t.I"}.get(needed[type_], 99))
    if type_ == w.ERROR:
        fields[w.ERROR_NAME] = "t.Error"
    if dice.randrange(4) == 0:
        fields.setdefault(w.REPLY_SERIAL, 99)
    extra = dice.choice([(), (), ((11, "s", "x"),), ((200, "u", 7), (255, "as", ["y"]))])
    options = {
        "endian": dice.choice("<<>"),
        "flags": dice.choice([0, 0, 1, 2, 4, 7, 0x10, 0xF8]),
        "extra_fields": extra,
    }
    signature, args = dice.choice(
        [("", ()), ("s", ("t.A",)), ("su", ("/t/u", 5)), ("a{sv}", ({"k": ("i", 3)},))]
    )
    return type_, fields, signature, args, options


def monitored(dice: random.Random) -> list[str]:
    """Two valid rules of a monitor: none that asks for an argument twice."""
    names = [*NAMES, *(f"{{{n}}}" for n in range(CLIENTS))]
    rules = (rule(dice, names) for _ in iter(int, 1))
    twice = re.compile(r"\barg(\d).*\barg\1")
    return list(islice((each for each in rules if not twice.search(each)), 2))


def session(dice: random.Random) -> Iterator[Step]:
    """What happens; `{n}` is the unique name of client n."""
    someone = [*NAMES, *(f"{{{n}}}" for n in range(CLIENTS))]
    rules: list[tuple[int, str]] = []
    for _ in range(STEPS):
        actor = dice.randrange(CLIENTS)
        body = tuple(dice.choice(TEXTS) for _ in range(dice.randrange(3)))
        to = dice.choice([*someone, *someone, *someone, DRIVER, "t.Nobody", ":1.99999"])
        header = (dice.choice(PATHS), dice.choice(INTERFACES), dice.choice(MEMBERS))
        match dice.choices(list(KINDS), list(KINDS.values()))[0]:
            case "request":
                yield Step("request", actor, (dice.choice(NAMES), dice.randrange(8)))
            case "release":
                yield Step("release", actor, (dice.choice(NAMES),))
            case "match":
                text = rule(dice, someone)
                if "path_namespace" not in text:  # to dbus-daemon any two of these are equal
                    rules.append((actor, text))
                yield Step("AddMatch", actor, (text,))
            case "unmatch" if rules:
                yield Step("RemoveMatch", *_one(dice.choice(rules)))
            case "signal":
                yield Step("signal", actor, (*header, None, body))
            case "unicast":
                yield Step("signal", actor, (*header, to, body))
            case "call":
                flags = dice.choice([0, 0, 0, 1, 2, 3, 4])
                yield Step("call", actor, (*header, to, body, flags))
            case "reply" | "error" as what:
                yield Step(what, actor, (dice.choice(["known", "known", "again", "unasked"]), body))
            case "ask":
                member = dice.choice(["GetNameOwner", "ListQueuedOwners", "NameHasOwner"])
                yield Step("ask", actor, (member, to))
            case "fds":
                yield Step(
                    "fds",
                    actor % (CLIENTS - 1),
                    (
                        dice.choice([w.CALL, w.CALL, w.SIGNAL, w.RETURN, w.ERROR]),
                        *header,
                        dice.choice([None, to]),
                        dice.randrange(1, 3),
                    ),
                )
            case "rules":
                yield Step("rules", actor, ())
            case "leave":
                yield Step("leave", actor, ())
            case "back":
                which = dice.choice(["known", "known", "again", "unasked"])
                yield Step("back", actor, (which, dice.choice([w.CALL, w.SIGNAL]), header, body))
            case "monitor":
                yield Step("monitor", actor, tuple(monitored(dice)))
            case "driver":
                yield Step("driver", actor, driver_call(dice, someone))
            case "odd":
                yield Step("odd", actor, odd_message(dice, someone))
            case "broken":
                text = broken(dice, rule(dice, someone))
                removes = "path_namespace" not in text and dice.randrange(2)
                yield Step("RemoveMatch" if removes else "AddMatch", actor, (text,))


def _one(pair: tuple[int, str]) -> tuple[int, tuple[str]]:
    return pair[0], (pair[1],)


class Stage:
    """One bus with its clients."""

    def __init__(self, bus: Bus, rules: list[str]) -> None:
        self.address, self.pid = bus.address, re.compile(rf"\b{bus.pid}\b")
        self.known: dict[str, str] = {}  # unique name -> what it is called here
        self.clients: list[RawClient] = []
        self.calls: list[list[Message]] = [[] for _ in range(CLIENTS)]
        self.answered: list[list[Message]] = [[] for _ in range(CLIENTS)]
        self.watches = True
        self.answers = False  # whether the last step may have done so
        self.former: RawClient | None = None  # a client that has become a monitor
        self.janitor = RawClient(self.address)
        self.janitor.add_match("member='NameOwnerChanged',arg2=''")
        for n in range(CLIENTS):
            self.clients.append(self._enter(n))
        self.monitor, self.watcher = RawClient(self.address), RawClient(self.address)
        self.known |= {self.janitor.name: "<janitor>", self.monitor.name: "<monitor>"}
        self.known[self.watcher.name] = "<watcher>"
        end = "member='End'"
        for monitor, wanted in (
            (self.monitor, []),
            (self.watcher, [*map(self._filled, rules), end]),
        ):
            monitor.driver("BecomeMonitor", "asu", (wanted, 0), interface=MONITORING)
        # The second of them sees, on dbus-daemon, how its own name goes.
        self.janitor.signal("/", "test.Marker", "End")
        for monitor in (self.monitor, self.watcher):
            self._overheard(monitor)

    def _enter(self, n: int) -> RawClient:
        client = RawClient(self.address, fds=n != CLIENTS - 1)
        self.known[client.name] = f"<{n}.{len(self.known)}>"
        return client

    def play(self, step: Step) -> None:
        client = self.clients[step.actor]
        filled = self._filled(step.args)
        self.answers = step.what == "back" or (step.what == "odd" and w.REPLY_SERIAL in filled[1])
        match step.what:
            case "request":
                self._driver(client, "RequestName", "su", filled)
            case "release":
                self._driver(client, "ReleaseName", "s", filled)
            case "AddMatch" | "RemoveMatch":
                self._driver(client, step.what, "s", filled)
            case "ask":
                self._driver(client, filled[0], "s", filled[1:])
            case "signal":
                path, interface, member, to, body = filled
                client.signal(path, interface, member, "s" * len(body), body, to=to)
            case "call":
                path, interface, member, to, body, flags = filled
                client.send_call(to, path, interface, member, "s" * len(body), body, flags=flags)
            case "fds":
                self._send_fds(client, step.actor, *filled)
            case "rules":
                client.send_call(DRIVER, DRIVER_PATH, STATS, "GetAllMatchRules")
            case "driver":
                client.send_call(DRIVER, *filled)
            case "odd":
                type_, fields, signature, args, options = filled
                client.send(type_, fields, signature, args, **options)
            case "reply" | "error" as what:
                self._answer(client, step.actor, what, *filled)
            case "back":
                self._answer(client, step.actor, "back", *filled)
            case "leave" | "monitor":
                if step.what == "leave":
                    client.close()
                else:
                    self._watch(client, filled)
                self.janitor.wait(lambda m: bool(m.args) and m.args[0] == client.name)
                self.calls[step.actor].clear()
                self.answered[step.actor].clear()
                self.clients[step.actor] = self._enter(step.actor)

    def _watch(self, client: RawClient, rules: tuple[str, ...]) -> None:
        """It becomes a monitor, and the last one that did so ends."""
        if self.former is not None:
            self.former.close()
        client.drain()  # the markers of others that it has got
        self.former, self.watches = client, False
        client.driver("BecomeMonitor", "asu", ([*rules, "member='End'"], 0), interface=MONITORING)

    def _send_fds(
        self,
        client: RawClient,
        n: int,
        type_: int,
        path: str,
        interface: str,
        member: str,
        to: str | None,
        count: int,
    ) -> None:
        """A signal to anybody, a call or the answer to one, with descriptors."""
        read, write = os.pipe()
        args = tuple(range(count))
        options: dict[str, Any] = {"fds": [write] * count}
        if type_ == w.SIGNAL:
            client.signal(path, interface, member, "h" * count, args, to=to, **options)
        elif type_ == w.CALL or not self.calls[n]:
            client.send_call(to or DRIVER, path, interface, member, "h" * count, args, **options)
        else:
            call = self.calls[n].pop(0)
            self.answered[n].append(call)
            fields = {w.REPLY_SERIAL: call.serial, w.DESTINATION: call.sender}
            if type_ == w.ERROR:
                fields[w.ERROR_NAME] = "t.Error"
            client.send(type_, fields, "h" * count, args, **options)
        os.close(read)
        os.close(write)

    def _answer(self, client: RawClient, n: int, what: str, which: str, *how: Any) -> None:
        if which == "known" and self.calls[n]:
            call = self.calls[n].pop(0)
            self.answered[n].append(call)
        elif which == "again" and self.answered[n]:
            call = self.answered[n][-1]
        else:
            other = self.clients[(n + 1) % CLIENTS]
            call = Message(w.CALL, {w.SENDER: other.name}, b"", 0, 4_000_000)
        *_, body = how
        if what == "error":
            client.reply_error(call, "t.Error", "no")
        elif what == "back":
            type_, (path, interface, member), _ = how
            fields = {w.PATH: path, w.INTERFACE: interface, w.MEMBER: member}
            fields |= {w.REPLY_SERIAL: call.serial, w.DESTINATION: call.sender}
            client.send(type_, fields, "s" * len(body), body)
        else:
            client.reply(call, "s" * len(body), body)

    def _driver(
        self, client: RawClient, member: str, signature: str, args: tuple[Any, ...]
    ) -> None:
        client.send_call(DRIVER, DRIVER_PATH, DRIVER, member, signature, args)

    def _filled(self, value: Any) -> Any:
        match value:
            case str():
                return re.sub(r"\{(\d)\}", lambda m: self.clients[int(m[1])].name, value)
            case tuple():
                return tuple(self._filled(each) for each in value)
            case dict():
                return {key: self._filled(each) for key, each in value.items()}
        return value

    def seen(self, actor: int) -> list[list[str]]:
        """What each client got of a step of `actor`, who may be told by the receivers' workers that
        they refused it."""
        # Of a name that nobody owns our broker says that it is unknown, and nobody waits for that.
        with contextlib.suppress(BusError):
            self.clients[actor].driver("RemoveMatch", "s", ("member='Never'",))
        got = [client.drain(self.clients[actor]) for client in self.clients]
        for client in self.clients:
            got[actor] += self.clients[actor].drain(client)
        for n, messages in enumerate(got):
            self.calls[n] += [m for m in messages if m.type == w.CALL and m.destination]
        self.clients[actor].signal("/", "test.Marker", "End")
        former = self._overheard(self.former) if self.former is not None else []
        # dbus-daemon shows it how its names go by the rules that it has lost by then as well.
        got.append(former if self.watches else [])
        self.watches = True
        got += [self._overheard(self.watcher), self._overheard(self.monitor)]
        # Eavesdroppers see the markers of others, too.
        return [
            [self._told(m) for m in messages if m.fields.get(w.INTERFACE) != "test.Marker"]
            for messages in got
        ]

    def _overheard(self, monitor: RawClient) -> list[Message]:
        """What a monitor got since the last step."""
        got = []
        while (message := monitor.read()).member != "End":
            got.append(message)
        return got

    def _told(self, m: Message) -> str:
        for fd in m.fds:
            os.close(fd)
        args = m.args
        if m.type == w.ERROR and m.sender == DRIVER:
            args = [THEIRS.sub('comm=""', OURS.sub("", each)) for each in args]
            args = [each.replace("descriptorsto", "descriptors to") for each in args]
            answers = r"\w+" if self.answers else "method_return|error"
            # They know at once whether it answers a call, our sender's worker takes it for granted.
            if args and re.match(REFUSED_TEXT.format(answers), args[0]):
                args = ["..."]
        if m.sender == DRIVER and m.signature == "a{sv}":  # dbus-daemon 1.14 has no such thing
            args[0].pop("ProcessFD", None)
        if m.sender == DRIVER and m.signature == "as":  # in no order
            args = sorted(self.known.get(each, each) for each in args[0])
        if m.sender == DRIVER and m.signature == "a{sas}":
            args = sorted(
                (
                    self.known.get(each, each),
                    sorted(map(self._named, rules)),
                )
                for each, rules in args[0].items()
            )
        text = str(
            (
                m.type,
                m.flags,
                m.sender,
                m.destination,
                m.fields.get(w.PATH),
                m.fields.get(w.INTERFACE),
            )
            + (m.member, m.error_name, m.reply_serial, m.signature)
            + (self.pid.sub("<bus>", str(args)),)
            + (len(m.fds) if m.sender != DRIVER else 0,)
        )
        return self._named(text)

    def _named(self, text: str) -> str:
        return re.sub(r":1\.\d+", lambda name: self.known.get(name[0], ":1.?"), text)

    def close(self) -> None:
        for client in [*self.clients, self.janitor, self.watcher, self.monitor, self.former]:
            if client is not None:
                client.close()


def comparable(seen: list[list[str]]) -> list[list[str]]:
    """Without what is left open: in which order several unanswered calls fail, and in which a monitor
    sees what several clients do. dbus-daemon also shows monitors the refusals of eavesdroppers and
    of descriptors in broadcasts, which nobody else is told."""
    *clients, former, watcher, monitor = seen
    told = []
    for messages in clients:
        failed = iter(sorted(m for m in messages if NO_REPLY in m))
        told.append([next(failed) if NO_REPLY in m else m for m in messages])
    return [
        *told,
        *(sorted(m for m in each if not REFUSED.match(m)) for each in (former, watcher, monitor)),
    ]


def random_policy(dice: random.Random) -> str:
    """Rules of all kinds, and in the end what the test itself needs."""
    lines = list(_rules(dice))
    needed = [
        f'send_destination="{DRIVER}" send_member="{each}" send_interface="{DRIVER}"'
        for each in ("Hello", "AddMatch", "RemoveMatch", "NameHasOwner")
    ]
    needed += [
        f'send_destination="{DRIVER}" send_interface="{MONITORING}"',
        f'receive_sender="{DRIVER}"',
    ]
    needed += ['send_interface="test.Marker"', 'receive_interface="test.Marker" eavesdrop="true"']
    rules = "".join(f"<allow {each}/>" for each in needed)
    half = len(lines) // 2
    return (
        STRICT_POLICY.replace("</policy>", "".join(lines[:half]) + "</policy>")
        + f'<policy user="0">{"".join(lines[half:])}</policy>'
        + f'<policy context="mandatory">{rules}</policy>'
    )


def _rules(dice: random.Random) -> Iterator[str]:
    for _ in range(dice.randrange(2, 9)):
        what = dice.choice(["allow", "deny"])
        side = dice.choice(["send", "send", "receive", "own"])
        if side == "own":
            owned = ['own="t.A"', 'own_prefix="t"', 'own_prefix="t.A"', 'own="*"', 'own="t.C"']
            yield f"<{what} {dice.choice(owned)}/>"
            continue
        peer = "send_destination" if side == "send" else "receive_sender"
        kinds: dict[str, list[str]] = {
            peer: [*NAMES, "*", DRIVER],
            f"{side}_interface": [*INTERFACES, DRIVER],
            f"{side}_path": PATHS,
            f"{side}_type": ["signal", "method_call", "method_return", "error", "*"],
            f"{side}_requested_reply": ["true", "false"],
            f"{side}_error": ["t.Error"],
            "eavesdrop": ["true", "false"],
            "max_fds": ["0", "1"],
            "min_fds": ["1", "2"],
        }
        if side == "send":
            kinds |= {"send_destination_prefix": ["t", "t.A"], "send_broadcast": ["true", "false"]}
        keys = dice.sample(list(kinds), dice.randrange(1, 4))
        chosen = {key: dice.choice(kinds[key]) for key in keys}
        if f"{side}_interface" in chosen:
            chosen.pop(f"{side}_error", None)
            if dice.randrange(2):
                chosen[f"{side}_member"] = dice.choice(MEMBERS)
        if "send_destination_prefix" in chosen:
            chosen.pop("send_destination", None)
        if "send_destination" in chosen:
            chosen.pop("send_broadcast", None)
        if not any(key.startswith(side) for key in chosen):
            chosen[peer] = "*"
        if what == "allow":  # with these dbus-daemon lets replies pass that nobody asked for
            chosen.pop("eavesdrop", None)
            chosen.pop(f"{side}_requested_reply", None)
            chosen.setdefault(f"{side}_type", "*")
        yield f"<{what} {' '.join(f'{key}={quoteattr(value)}' for key, value in chosen.items())}/>"


SEEDS = [int(each) for each in os.environ.get("KBUSD_TEST_SEEDS", "0 1 2").split()]


@pytest.mark.parametrize("seed", SEEDS)
def test_the_same_session_under_a_random_policy(start_bus: Callable[..., Bus], seed: int) -> None:
    dice = random.Random(SEED + seed)
    compare(start_bus, random_policy(dice), dice)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_same_session_on_dbus_daemon(start_bus: Callable[..., Bus], seed: int) -> None:
    compare(start_bus, STRICT_POLICY, random.Random(SEED + seed))


def compare(start_bus: Callable[..., Bus], policy: str, dice: random.Random) -> None:
    # With a directory for services: it is looked into before a name is said to be unknown.
    extra = "  <servicedir>services</servicedir>\n"
    shape = configuration("unix:tmpdir=/tmp", policy=policy, extra=extra)
    buses = start_bus(shape), start_bus(shape, daemon=["/usr/bin/dbus-daemon"])
    rules = monitored(dice)
    ours, theirs = stages = [Stage(bus, rules) for bus in buses]
    for number, step in enumerate(session(dice)):
        for stage in stages:
            stage.play(step)
        got, expected = (comparable(stage.seen(step.actor)) for stage in (ours, theirs))
        assert got == expected, f"step {number}, {step}, policy {policy}, a monitor of {rules}"
    for stage in stages:
        stage.close()
