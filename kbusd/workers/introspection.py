"""What the bus driver looks like: its interfaces as a table, and the XML made from it.

The table is also what `driver.py` dispatches by: which methods exist on which interface, with
which arguments, on which paths, and for whom. Facts: D-Bus specification, "Message Bus Messages",
and what dbus-daemon 1.14 announces in its own introspection data.
"""

from __future__ import annotations

from typing import NamedTuple

BUS_PATH = "/org/freedesktop/DBus"

BUS = "org.freedesktop.DBus"
PROPERTIES = "org.freedesktop.DBus.Properties"
INTROSPECTABLE = "org.freedesktop.DBus.Introspectable"
MONITORING = "org.freedesktop.DBus.Monitoring"
STATS = "org.freedesktop.DBus.Debug.Stats"
PEER = "org.freedesktop.DBus.Peer"
ENDPOINTS = "org.kbusd.Endpoints1"


class Method(NamedTuple):
    """`inputs` and `outputs` are signatures, one item per argument.

    `privileged`: only root and the owner of the bus may call it. `anywhere`: on any path, not
    only on BUS_PATH."""

    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    privileged: bool = False
    anywhere: bool = True

    @property
    def signature(self) -> str:
        return "".join(self.inputs)


class Signal(NamedTuple):
    arguments: tuple[tuple[str, str], ...] = ()
    """Pairs of name ("" for none) and signature."""


class Interface(NamedTuple):
    methods: dict[str, Method]
    signals: dict[str, Signal]
    properties: dict[str, str]
    anywhere: bool
    """On any path; else only on BUS_PATH."""


_ONE_NAME = ("s",)

INTERFACES: dict[str, Interface] = {
    BUS: Interface(
        {
            "Hello": Method((), ("s",)),
            "RequestName": Method(("s", "u"), ("u",)),
            "ReleaseName": Method(_ONE_NAME, ("u",)),
            "StartServiceByName": Method(("s", "u"), ("u",)),
            "UpdateActivationEnvironment": Method(("a{ss}",), privileged=True, anywhere=False),
            "NameHasOwner": Method(_ONE_NAME, ("b",)),
            "ListNames": Method((), ("as",)),
            "ListActivatableNames": Method((), ("as",)),
            "AddMatch": Method(("s",)),
            "RemoveMatch": Method(("s",)),
            "GetNameOwner": Method(_ONE_NAME, ("s",)),
            "ListQueuedOwners": Method(_ONE_NAME, ("as",)),
            "GetConnectionUnixUser": Method(_ONE_NAME, ("u",)),
            "GetConnectionUnixProcessID": Method(_ONE_NAME, ("u",)),
            "GetAdtAuditSessionData": Method(_ONE_NAME, ("ay",)),
            "GetConnectionSELinuxSecurityContext": Method(_ONE_NAME, ("ay",)),
            "ReloadConfig": Method(),
            "GetId": Method((), ("s",)),
            "GetConnectionCredentials": Method(_ONE_NAME, ("a{sv}",)),
        },
        {
            "NameOwnerChanged": Signal((("", "s"), ("", "s"), ("", "s"))),
            "NameLost": Signal((("", "s"),)),
            "NameAcquired": Signal((("", "s"),)),
            "ActivatableServicesChanged": Signal(),
        },
        {"Features": "as", "Interfaces": "as"},
        anywhere=True,
    ),
    PROPERTIES: Interface(
        {
            "Get": Method(("s", "s"), ("v",)),
            "GetAll": Method(("s",), ("a{sv}",)),
            "Set": Method(("s", "s", "v")),
        },
        {
            "PropertiesChanged": Signal(
                (
                    ("interface_name", "s"),
                    ("changed_properties", "a{sv}"),
                    ("invalidated_properties", "as"),
                )
            )
        },
        {},
        anywhere=False,
    ),
    INTROSPECTABLE: Interface({"Introspect": Method((), ("s",))}, {}, {}, anywhere=True),
    MONITORING: Interface(
        {"BecomeMonitor": Method(("as", "u"), privileged=True)}, {}, {}, anywhere=False
    ),
    STATS: Interface(
        {
            "GetStats": Method((), ("a{sv}",)),
            "GetConnectionStats": Method(("s",), ("a{sv}",)),
            "GetAllMatchRules": Method((), ("a{sas}",)),
        },
        {},
        {},
        anywhere=False,
    ),
    ENDPOINTS: Interface(
        {
            "Add": Method(("s", "as", "b"), ("s",), privileged=True),
            "Remove": Method(("s",), privileged=True),
            "List": Method((), ("a(ssas)",), privileged=True),
        },
        {},
        {},
        anywhere=False,
    ),
    PEER: Interface({"GetMachineId": Method((), ("s",)), "Ping": Method()}, {}, {}, anywhere=True),
}

_DOCTYPE = (
    '<!DOCTYPE node PUBLIC "-//freedesktop//DTD D-BUS Object Introspection 1.0//EN"\n'
    '"http://www.freedesktop.org/standards/dbus/1.0/introspect.dtd">\n'
)
_CONSTANT = '<annotation name="org.freedesktop.DBus.Property.EmitsChangedSignal" value="const"/>'


def introspect(path: str) -> str:
    """The introspection data of the driver's object at `path` (any path is one)."""
    lines = ["<node>"]
    for name, interface in INTERFACES.items():
        if not (interface.anywhere or path == BUS_PATH):
            continue
        lines.append(f'  <interface name="{name}">')
        for member, method in interface.methods.items():
            lines.append(f'    <method name="{member}">')
            lines.extend(f'      <arg direction="in" type="{s}"/>' for s in method.inputs)
            lines.extend(f'      <arg direction="out" type="{s}"/>' for s in method.outputs)
            lines.append("    </method>")
        for member, signature in interface.properties.items():
            lines.append(f'    <property name="{member}" type="{signature}" access="read">')
            lines.append(f"      {_CONSTANT}")
            lines.append("    </property>")
        for member, signal in interface.signals.items():
            lines.append(f'    <signal name="{member}">')
            for argument, signature in signal.arguments:
                attribute = f' name="{argument}"' if argument else ""
                lines.append(f'      <arg type="{signature}"{attribute}/>')
            lines.append("    </signal>")
        lines.append("  </interface>")
    parent = path.rstrip("/")
    if BUS_PATH.startswith(parent + "/"):
        lines.append(f'  <node name="{BUS_PATH[len(parent) + 1 :]}"/>')
    lines.append("</node>")
    return _DOCTYPE + "\n".join(lines) + "\n"
