"""What org.freedesktop.DBus.Debug.Stats says of the bus, of a connection and of match rules.

The numbers carry the names that dbus-daemon gives them. What waits between a client and its worker,
that worker alone knows: it is left out if it does not say. Match rules are shown in dbus-daemon's normal
form.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kbusd.wire.match import TYPES, MatchRule
from kbusd.workers.replica import Connection, Replica

Values = dict[str, tuple[str, Any]]

_MAX_U32 = 0xFFFFFFFF
_TYPE_NAMES = {number: name for name, number in TYPES.items()}


def of_bus(replica: Replica, reported: Mapping[str, int]) -> Values:
    """GetStats: what the replica knows, and above that what the broker `reported`."""
    numbers: dict[str, int] = {
        # dbus-daemon's pool of list nodes, of which this bus has none.
        "ListMemPoolUsedBytes": 0,
        "ListMemPoolCachedBytes": 0,
        "ListMemPoolAllocatedBytes": 0,
        "ActiveConnections": len(replica.connections) + len(replica.monitors),
        "BusNames": len(replica.connections) + len(replica.names),
        "MatchRules": replica.match_rules(),
    }
    numbers.update(reported)
    return {key: _number(value) for key, value in numbers.items()}


def of_connection(connection: Connection, reported: Mapping[str, int]) -> Values:
    """GetConnectionStats: what the replica knows, and what broker and worker `reported`."""
    numbers = {
        "MatchRules": len(connection.matches),
        "BusNames": 1 + len(connection.names) + len(connection.waits_for),
        **reported,
    }
    return {"UniqueName": ("s", connection.name)} | {
        key: _number(value) for key, value in numbers.items()
    }


def match_rules(replica: Replica) -> dict[str, list[str]]:
    """GetAllMatchRules: the rules of every connection, each as often as it was added."""
    return {
        connection.name: [rule_text(watch.rule) for watch in connection.matches]
        for connection in replica.connections.values()
    }


def rule_text(rule: MatchRule) -> str:
    """A match rule as text, the keys in dbus-daemon's order; parsing it gives an equal rule."""
    pairs: list[tuple[str, str]] = []
    if rule.type:
        pairs.append(("type", _TYPE_NAMES[rule.type]))
    for key, value in (
        ("interface", rule.interface),
        ("member", rule.member),
        ("path", rule.path),
        ("path_namespace", rule.path_namespace),
        ("sender", rule.sender),
        ("destination", rule.destination),
    ):
        if value is not None:
            pairs.append((key, value))
    if rule.eavesdrop:
        pairs.append(("eavesdrop", "true"))
    arguments = [(number, "", value) for number, value in rule.args]
    arguments += [(number, "path", value) for number, value in rule.path_args]
    if rule.arg0_namespace is not None:
        arguments.append((0, "namespace", rule.arg0_namespace))
    pairs += [(f"arg{number}{kind}", value) for number, kind, value in sorted(arguments)]
    return ",".join(f"{key}={_quote(value)}" for key, value in pairs)


def _quote(value: str) -> str:
    return "'" + value.replace("'", "'\\''") + "'"


def _number(value: int) -> tuple[str, int]:
    return ("u", value) if 0 <= value <= _MAX_U32 else ("t", max(value, 0))
