"""Who a client is, by the kernel's word at the time when it connected (unix(7))."""

from __future__ import annotations

import errno
import socket
import struct
from array import array

from kbusd.rings.entries import Credentials
from kbusd.sandbox import kernel

_SO_PEERSEC = 31
_SO_PEERGROUPS = 59
_GROUPS_SIZE = 65536 * 4  # NGROUPS_MAX
_LABEL_SIZE = 65536


def credentials_of(client: socket.socket) -> Credentials:
    """Who is at the other end. Raises OSError."""
    fd = client.fileno()
    pid, uid, gid = struct.unpack("iII", kernel.getsockopt(fd, socket.SO_PEERCRED, 12))
    groups = array("I", kernel.getsockopt(fd, _SO_PEERGROUPS, _GROUPS_SIZE))
    label = b""
    try:
        label = kernel.getsockopt(fd, _SO_PEERSEC, _LABEL_SIZE).rstrip(b"\0")
    except OSError as error:
        if error.errno != errno.ENOPROTOOPT:  # no security module here labels sockets
            raise
    return Credentials(uid, gid, pid, tuple(groups), label)
