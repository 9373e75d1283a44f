"""The same random session on kbusd and on dbus-daemon: every client gets the same messages in the same order.

Names and their queues, match rules, signals, calls, replies, descriptors, connections that end. After each
step all that each client got is compared, with other names for the unique names, which differ.
What the bus says in errors is compared elsewhere.
"""

from __future__ import annotations

import os
import random
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest

from . import wireformat as w
from .daemon import STRICT_POLICY, Bus, configuration
from .rawclient import DRIVER, DRIVER_PATH, RawClient
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
KINDS |= {"call": 3, "reply": 2, "error": 1, "ask": 2, "fds": 1, "leave": 1}  # how often
TEXTS = ["", "t", "t.A", "t.A.B", "/", "/t", "/t/", "/t/u", "x'y"]
NO_REPLY = f"'{DRIVER}.Error.NoReply'"
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
                rules.append((actor, rule(dice, someone)))
                yield Step("AddMatch", actor, (rules[-1][1],))
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
                    (*header, dice.choice([None, to]), dice.randrange(1, 3)),
                )
            case "leave":
                yield Step("leave", actor, ())


def _one(pair: tuple[int, str]) -> tuple[int, tuple[str]]:
    return pair[0], (pair[1],)


class Stage:
    """One bus with its clients."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.known: dict[str, str] = {}  # unique name -> what it is called here
        self.clients: list[RawClient] = []
        self.calls: list[list[Message]] = [[] for _ in range(CLIENTS)]
        self.answered: list[list[Message]] = [[] for _ in range(CLIENTS)]
        self.janitor = RawClient(address)
        self.janitor.add_match("member='NameOwnerChanged',arg2=''")
        for n in range(CLIENTS):
            self.clients.append(self._enter(n))
        self.monitor = RawClient(address)
        self.known |= {self.janitor.name: "<janitor>", self.monitor.name: "<monitor>"}
        self.monitor.driver("BecomeMonitor", "asu", ([], 0), interface=f"{DRIVER}.Monitoring")

    def _enter(self, n: int) -> RawClient:
        client = RawClient(self.address, fds=n != CLIENTS - 1)
        self.known[client.name] = f"<{n}.{len(self.known)}>"
        return client

    def play(self, step: Step) -> None:
        client = self.clients[step.actor]
        filled = self._filled(step.args)
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
                path, interface, member, to, count = filled
                read, write = os.pipe()
                args = tuple(range(count))
                client.signal(
                    path, interface, member, "h" * count, args, to=to, fds=[write] * count
                )
                os.close(read)
                os.close(write)
            case "reply" | "error" as what:
                self._answer(client, step.actor, what, *filled)
            case "leave":
                client.close()
                self.janitor.wait(lambda m: bool(m.args) and m.args[0] == client.name)
                self.calls[step.actor].clear()
                self.answered[step.actor].clear()
                self.clients[step.actor] = self._enter(step.actor)

    def _answer(self, client: RawClient, n: int, what: str, which: str, body: Any) -> None:
        if which == "known" and self.calls[n]:
            call = self.calls[n].pop(0)
            self.answered[n].append(call)
        elif which == "again" and self.answered[n]:
            call = self.answered[n][-1]
        else:
            other = self.clients[(n + 1) % CLIENTS]
            call = Message(w.CALL, {w.SENDER: other.name}, b"", 0, 4_000_000)
        if what == "error":
            client.reply_error(call, "t.Error", "no")
        else:
            client.reply(call, "s" * len(body), body)

    def _driver(
        self, client: RawClient, member: str, signature: str, args: tuple[Any, ...]
    ) -> None:
        client.send_call(DRIVER, DRIVER_PATH, DRIVER, member, signature, args)

    def _filled(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(
            re.sub(r"\{(\d)\}", lambda m: self.clients[int(m[1])].name, each)
            if isinstance(each, str)
            else each
            for each in args
        )

    def seen(self, actor: int) -> list[list[str]]:
        """What each client got of a step of `actor`, who may be told by the receivers' workers that
        they refused it."""
        got = [client.drain(self.clients[actor]) for client in self.clients]
        for client in self.clients:
            got[actor] += self.clients[actor].drain(client)
        for n, messages in enumerate(got):
            self.calls[n] += [m for m in messages if m.type == w.CALL and m.destination]
        got.append(self._overheard(actor))
        # Eavesdroppers see the markers of others, too.
        return [
            [self._told(m) for m in messages if m.fields.get(w.INTERFACE) != "test.Marker"]
            for messages in got
        ]

    def _overheard(self, actor: int) -> list[Message]:
        """What the monitor got since the last step."""
        self.clients[actor].signal("/", "test.Marker", "End")
        got = []
        while (message := self.monitor.read()).member != "End":
            got.append(message)
        return got

    def _told(self, m: Message) -> str:
        for fd in m.fds:
            os.close(fd)
        args = ["..."] if m.type == w.ERROR and m.sender == DRIVER else m.args
        text = str(
            (
                m.type,
                m.flags,
                m.sender,
                m.destination,
                m.fields.get(w.PATH),
                m.fields.get(w.INTERFACE),
            )
            + (m.member, m.error_name, m.reply_serial, m.signature, args, len(m.fds))
        )
        return re.sub(r":1\.\d+", lambda name: self.known.get(name[0], name[0]), text)

    def close(self) -> None:
        for client in [*self.clients, self.janitor, self.monitor]:
            client.close()


def comparable(seen: list[list[str]]) -> list[list[str]]:
    """Without what is left open: in which order several unanswered calls fail, and in which a monitor
    sees what several clients do. dbus-daemon also shows monitors the refusals of eavesdroppers and
    of descriptors in broadcasts, which nobody else is told."""
    *clients, monitor = seen
    told = []
    for messages in clients:
        failed = iter(sorted(m for m in messages if NO_REPLY in m))
        told.append([next(failed) if NO_REPLY in m else m for m in messages])
    return [*told, sorted(m for m in monitor if not REFUSED.match(m))]


@pytest.mark.parametrize("seed", range(3))
def test_the_same_session_on_dbus_daemon(start_bus: Callable[..., Bus], seed: int) -> None:
    # No directory for services: where there is one, we look into it before we say that a name is unknown.
    shape = configuration("unix:tmpdir=/tmp", policy=STRICT_POLICY)
    buses = start_bus(shape), start_bus(shape, daemon=["/usr/bin/dbus-daemon"])
    ours, theirs = stages = [Stage(bus.address) for bus in buses]
    for number, step in enumerate(session(random.Random(SEED + seed))):
        for stage in stages:
            stage.play(step)
        got, expected = (comparable(stage.seen(step.actor)) for stage in (ours, theirs))
        assert got == expected, f"step {number}, {step}"
    for stage in stages:
        stage.close()
