"""Names owned by kdbus's rules, told as D-Bus tells them: one bus has one registry for all clients.

The registry of the bus follows the D-Bus specification (RequestName, ReleaseName). kdbus.name(7) and
ipc/kdbus/names.c mean the same with other numbers: whoever does not ask to QUEUE does in D-Bus's
terms say DO_NOT_QUEUE. What remains different:

- An asker with REPLACE_EXISTING that can't replace and queues waits at the head of the queue, as
  dbus-daemon has it; in kdbus it waited at the end.
- An activator (a connection that holds a name until somebody serves it) is not known to D-Bus: to its
  clients it is an owner like others.
- A name that a service file can start has no activator; LIST shows it as if it had one, with the id 0.
"""

from __future__ import annotations

import errno

from kbusd.kdbus import abi
from kbusd.kdbus.errors import Errno

# D-Bus Specification, "org.freedesktop.DBus.RequestName" and "ReleaseName".
_ALLOW_REPLACEMENT, _REPLACE_EXISTING, _DO_NOT_QUEUE = 1, 2, 4
_PRIMARY_OWNER, _IN_QUEUE, _EXISTS = 1, 2, 3
_RELEASED, _NON_EXISTENT, _NOT_OWNER = 1, 2, 3


def request_flags(flags: int) -> int:
    """RequestName's flags for NAME flags of NAME_ACQUIRE."""
    return (
        (_ALLOW_REPLACEMENT if flags & abi.NAME_ALLOW_REPLACEMENT else 0)
        | (_REPLACE_EXISTING if flags & abi.NAME_REPLACE_EXISTING else 0)
        | (0 if flags & abi.NAME_QUEUE else _DO_NOT_QUEUE)
    )


def claim_flags(flags: int, primary: bool) -> int:
    """The NAME flags, as lists and notifications show them, of a claim with RequestName's flags."""
    return (
        (abi.NAME_ALLOW_REPLACEMENT if flags & _ALLOW_REPLACEMENT else 0)
        | (0 if flags & _DO_NOT_QUEUE else abi.NAME_QUEUE)
        | (abi.NAME_PRIMARY if primary else abi.NAME_IN_QUEUE)
    )


def activator_flags(primary: bool) -> int:
    """The same of a name's activator."""
    return abi.NAME_ACTIVATOR | (abi.NAME_PRIMARY if primary else abi.NAME_IN_QUEUE)


def acquired(result: int, flags: int, waited: bool) -> int:
    """NAME_ACQUIRE's return flags, for RequestName's result.

    `flags` are those that were asked for; `waited`: the asker was in the queue before. A name that is
    the asker's already has the new flags, and lacks ACQUIRED; who waited and does not ask to QUEUE again
    does not wait any more. Raises Errno EEXIST if the name is another's.
    """
    if result == _EXISTS:
        if waited:
            return flags & abi.NAME_ALLOW_REPLACEMENT
        raise Errno(errno.EEXIST, "the name has an owner")
    is_new = result == _PRIMARY_OWNER or (result == _IN_QUEUE and not waited)
    return claim_flags(request_flags(flags), result != _IN_QUEUE) | (
        abi.NAME_ACQUIRED if is_new else 0
    )


def check_released(result: int) -> None:
    """Raise Errno if ReleaseName's result says so: ESRCH for no such name, EADDRINUSE for another's."""
    if result == _NON_EXISTENT:
        raise Errno(errno.ESRCH, "nobody owns the name")
    if result == _NOT_OWNER:
        raise Errno(errno.EADDRINUSE, "the name is somebody else's")
