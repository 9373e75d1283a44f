"""`kbusctl endpoint`: further sockets of a running bus, each with a policy of its own.

Asks the bus itself, by org.kbusd.Endpoints1, as any client may that is root or the bus's owner.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from jeepney import DBusAddress, HeaderFields, MessageType, new_method_call
from jeepney.bus import get_bus
from jeepney.io.blocking import DBusConnection, prep_socket

from kbusd.ctl.workers import Unclear
from kbusd.policy import endpoint_files
from kbusd.policy.configuration import ConfigurationError
from kbusd.policy.endpoints import RULE_WORDS, WORDS

_BUS = DBusAddress("/org/freedesktop/DBus", "org.freedesktop.DBus", "org.kbusd.Endpoints1")
_SECONDS = 25.0
_HELP = {
    "hide": "know nothing of it, whatever another line says; NAME.* is all names below",
    "see": "see who has the name",
    "talk": "and call him, hear his broadcasts, have him started",
    "own": "and have the name",
    "call": "send him what RULE says: [INTERFACE.MEMBER][@PATH][ arg0='TEXT']",
    "broadcast": "hear of his broadcasts what RULE says",
    "deny-call": "not send him this, whatever another line allows",
    "deny-broadcast": "not hear this",
}


def add_to(commands: Any) -> None:
    """The command `endpoint`."""
    command = commands.add_parser(
        "endpoint", help="sockets of the bus with a policy of their own, as xdg-dbus-proxy has them"
    )
    which = command.add_mutually_exclusive_group()
    for bus in "session", "system":
        address = f"the bus of DBUS_{bus.upper()}_BUS_ADDRESS"
        which.add_argument(
            f"--{bus}", dest="bus", action="store_const", const=bus.upper(), help=address
        )
    which.add_argument("--address", dest="bus", help="of the bus; by default the session bus")
    actions = command.add_subparsers(dest="action", required=True)
    add = actions.add_parser("add", help="make one, which stays until it is removed")
    add.add_argument("name", metavar="NAME", help="of the endpoint; its socket is the bus's, .NAME")
    _take_policy(add)
    add.set_defaults(run=_add)
    remove = actions.add_parser("remove", help="remove one; its clients are disconnected")
    remove.add_argument("name", metavar="NAME")
    remove.set_defaults(run=_remove)
    listing = actions.add_parser("list", help="each with its address and its policy")
    listing.add_argument("--json", action="store_true", help="for programs")
    listing.set_defaults(run=_list)
    run = actions.add_parser("run", help="run a command behind one that goes with it")
    run.add_argument("--name", default="", help="of the endpoint; by default a random one")
    _take_policy(run)
    run.add_argument("program", nargs="+", metavar="COMMAND")
    run.set_defaults(run=_run)


def _take_policy(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--file", help="take the policy from a file as in /etc/kbusd/endpoints.d")
    for kind, metavar in ((WORDS, "NAME"), (RULE_WORDS, "NAME=RULE")):
        for word in kind:
            parser.add_argument(
                f"--{word}", action="append", default=[], metavar=metavar, help=_HELP[word]
            )


def _policy(options: argparse.Namespace) -> list[str]:
    """What the options say, as lines. Raises Unclear."""
    lines: list[str] = []
    if options.file:
        try:
            lines += endpoint_files.load(options.file).endpoint.lines
        except ConfigurationError as error:
            raise Unclear(str(error)) from None
    for word in (*WORDS, *RULE_WORDS):
        lines += [f"{word}={value}" for value in getattr(options, word.replace("-", "_"))]
    return lines


def _connect(options: argparse.Namespace) -> DBusConnection:
    """To the bus that is meant. Raises Unclear, OSError."""
    try:
        path = get_bus(options.bus or "SESSION")
    except KeyError as error:
        raise Unclear(f"say which bus by --system or --address: {error} is not set") from None
    except (RuntimeError, ValueError) as error:
        raise Unclear(f"an address that makes no sense: {error}") from None
    connection = DBusConnection(prep_socket(path, timeout=_SECONDS))
    hello = new_method_call(_BUS.with_interface("org.freedesktop.DBus"), "Hello")
    connection.send_and_get_reply(hello, timeout=_SECONDS)
    return connection


def _ask(connection: DBusConnection, method: str, signature: str = "", *body: object) -> Any:
    """Raises Unclear if the bus says no."""
    message = new_method_call(_BUS, method, signature or None, body)
    reply = connection.send_and_get_reply(message, timeout=_SECONDS)
    if reply.header.message_type is MessageType.error:
        name = reply.header.fields[HeaderFields.error_name]
        raise Unclear(f"{reply.body[0] if reply.body else name}")
    return reply.body[0] if reply.body else None


def _add(options: argparse.Namespace) -> int:
    lines = _policy(options)
    with _connect(options) as connection:
        print(_ask(connection, "Add", "sasb", options.name, lines, False))
    return 0


def _remove(options: argparse.Namespace) -> int:
    with _connect(options) as connection:
        _ask(connection, "Remove", "s", options.name)
    return 0


def _list(options: argparse.Namespace) -> int:
    with _connect(options) as connection:
        listed: Sequence[tuple[str, str, list[str]]] = _ask(connection, "List")
    if options.json:
        keys = ("name", "address", "policy")
        print(json.dumps([dict(zip(keys, each, strict=True)) for each in listed], indent=2))
        return 0
    for name, address, lines in listed:
        print(name, address or "(can't be listened on)")
        for line in lines:
            print(f"    {line}")
    return 0


def _run(options: argparse.Namespace) -> int:
    """Its exit status is the command's."""
    lines = _policy(options)
    name = options.name or f"run-{secrets.token_hex(4)}"
    variable = "DBUS_SYSTEM_BUS_ADDRESS" if options.bus == "SYSTEM" else "DBUS_SESSION_BUS_ADDRESS"
    with _connect(options) as connection:
        address = _ask(connection, "Add", "sasb", name, lines, True)
        try:
            done = subprocess.run(options.program, env={**os.environ, variable: address})
        except OSError as error:
            print(f"kbusctl: {options.program[0]}: {error.strerror}", file=sys.stderr)
            return 127
    return done.returncode if done.returncode >= 0 else 128 - done.returncode
