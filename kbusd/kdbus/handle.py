"""Which commands an open node takes, by what it is and what was done with it (ipc/kdbus/handle.c).

A handle is fresh until one set-up command succeeds, which fixes what it is for good:

    node of            set-up command    then a               which takes
    a domain (control) BUS_MAKE          bus owner            nothing; closing it ends the bus
    a bus or endpoint  ENDPOINT_MAKE     endpoint owner       ENDPOINT_UPDATE; closing it ends it
    a bus or endpoint  HELLO             connection           all others, by its kind

A negotiation is no success: the handle stays fresh.
"""

from __future__ import annotations

import enum
import errno

from kbusd.kdbus import abi
from kbusd.kdbus.commands import SPECS
from kbusd.kdbus.errors import Errno


class State(enum.Enum):
    """What an open node is."""

    CONTROL = "a fresh control node"
    ENDPOINT = "a fresh endpoint"
    BUS_OWNER = "the owner of a bus"
    ENDPOINT_OWNER = "the owner of an endpoint"
    CONNECTION = "a connection"
    GONE = "a connection that has ended"


_SET_UP = {
    abi.CMD_BUS_MAKE: State.CONTROL,
    abi.CMD_ENDPOINT_MAKE: State.ENDPOINT,
    abi.CMD_HELLO: State.ENDPOINT,
}
_ORDINARY, _ACTIVATOR, _MONITOR = 0, abi.HELLO_ACTIVATOR, abi.HELLO_MONITOR
_ALL = (_ORDINARY, _ACTIVATOR, _MONITOR, abi.HELLO_POLICY_HOLDER)
# Commands that not every kind of connection has; decode_update judges UPDATE by what it changes.
_KINDS = {
    abi.CMD_RECV: (_ORDINARY, _MONITOR, _ACTIVATOR),
    abi.CMD_FREE: (_ORDINARY, _MONITOR, _ACTIVATOR),
    abi.CMD_BYEBYE: (_ORDINARY,),
    abi.CMD_SEND: (_ORDINARY,),
    abi.CMD_NAME_ACQUIRE: (_ORDINARY,),
    abi.CMD_NAME_RELEASE: (_ORDINARY,),
    abi.CMD_MATCH_ADD: (_ORDINARY,),
    abi.CMD_MATCH_REMOVE: (_ORDINARY,),
}


def check(command: int, state: State, kind: int = 0, owner: bool = False) -> None:
    """Raise Errno unless an ioctl makes sense here; its argument is looked at only after this.

    `kind` is a connection's (Hello.kind); `owner`: the caller owns the bus or is privileged. ENOTTY: no
    command of kdbus; EBADFD: not for this handle; EPERM: not for this caller; ECONNRESET: the
    connection has ended; EOPNOTSUPP: not for this kind of connection.
    """
    spec = SPECS.get(command)
    if spec is None:
        raise Errno(errno.ENOTTY, f"ioctl {command:#x} is not one of kdbus")
    if command in _SET_UP:
        wanted = _SET_UP[command]
    elif command == abi.CMD_ENDPOINT_UPDATE:
        wanted = State.ENDPOINT_OWNER
    else:
        wanted = State.CONNECTION
    if state != wanted:
        gone = state == State.GONE and command not in _SET_UP
        number = errno.ECONNRESET if gone else errno.EBADFD
        raise Errno(number, f"{spec.name} on {state.value}")
    if command == abi.CMD_ENDPOINT_MAKE and not owner:
        raise Errno(errno.EPERM, "only who owns the bus may make custom endpoints")
    if kind not in _KINDS.get(command, _ALL):
        raise Errno(errno.EOPNOTSUPP, f"{spec.name} on this kind of connection")
