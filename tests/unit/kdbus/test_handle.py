"""Which ioctl an open node takes: the whole table of states and commands."""

from __future__ import annotations

import errno

import pytest

from kbusd.kdbus import abi, handle
from kbusd.kdbus.commands import SPECS
from kbusd.kdbus.errors import Errno
from kbusd.kdbus.handle import State
from tests.unit.kdbus.refused import refused

ACTIVATOR, HOLDER, MONITOR = abi.HELLO_ACTIVATOR, abi.HELLO_POLICY_HOLDER, abi.HELLO_MONITOR


def taken(state: State, kind: int = 0) -> set[str]:
    found = set()
    for command, spec in SPECS.items():
        try:
            handle.check(command, state, kind, owner=True)
        except Errno as error:
            assert error.errno in (errno.EBADFD, errno.EOPNOTSUPP, errno.ECONNRESET)
            assert spec.name in error.text
        else:
            found.add(spec.name)
    return found


QUERIES = {"UPDATE", "CONN_INFO", "BUS_CREATOR_INFO", "LIST"}
READS = QUERIES | {"RECV", "FREE"}


@pytest.mark.parametrize(
    ("state", "kind", "commands"),
    [
        (State.CONTROL, 0, {"BUS_MAKE"}),
        (State.ENDPOINT, 0, {"ENDPOINT_MAKE", "HELLO"}),
        (State.BUS_OWNER, 0, set()),
        (State.ENDPOINT_OWNER, 0, {"ENDPOINT_UPDATE"}),
        (
            State.CONNECTION,
            0,
            READS | {"BYEBYE", "SEND", "NAME_ACQUIRE", "NAME_RELEASE", "MATCH_ADD", "MATCH_REMOVE"},
        ),
        (State.CONNECTION, MONITOR, READS),
        (State.CONNECTION, ACTIVATOR, READS),
        (State.CONNECTION, HOLDER, QUERIES),
        (State.GONE, 0, set()),
    ],
)
def test_table(state: State, kind: int, commands: set[str]) -> None:
    assert taken(state, kind) == commands


def test_errors() -> None:
    with refused("ENOTTY"):
        handle.check(0x40049500, State.CONTROL)
    with refused("EBADFD"):
        handle.check(abi.CMD_BUS_MAKE, State.BUS_OWNER)
    with refused("EBADFD"):
        handle.check(abi.CMD_HELLO, State.CONTROL)
    with refused("EBADFD"):
        handle.check(abi.CMD_HELLO, State.GONE)
    with refused("ECONNRESET"):
        handle.check(abi.CMD_BYEBYE, State.GONE)
    with refused("EOPNOTSUPP"):
        handle.check(abi.CMD_SEND, State.CONNECTION, MONITOR)
    with refused("EPERM"):
        handle.check(abi.CMD_ENDPOINT_MAKE, State.ENDPOINT)
