"""The socket that a kdbus client has named by ATTACH (kdbus/attach.py): descriptors go over it.

It is the client's, and hostile: it may be full, closed, or something else altogether. Nothing is read from
it, and nobody waits for it. Only a connected local socket whose other end was made by the client's user
will do: what is sent over it is sent by us, and must not speak to anybody else in our name.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from array import array
from collections.abc import Sequence

from kbusd.kdbus.errors import Errno

_SO_DOMAIN = 39
_FLAGS = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL


class Attached:
    """Takes over `fd`. `uid` is the client's."""

    def __init__(self, fd: int, uid: int) -> None:
        """Raises Errno ENOTSOCK, and then closes `fd`."""
        try:
            # Told what it is, it does not ask; we do.
            self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, fd)
        except OSError:
            os.close(fd)
            raise Errno(errno.ENOTSOCK, "attached what is no socket") from None
        kind = [
            self._sock.getsockopt(socket.SOL_SOCKET, each) for each in (_SO_DOMAIN, socket.SO_TYPE)
        ]
        if kind == [socket.AF_UNIX, socket.SOCK_SEQPACKET]:
            peer = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
            if struct.unpack("iII", peer)[1] == uid:
                return
        self._sock.close()
        raise Errno(errno.ENOTSOCK, "attached a socket that is not of its own socketpair")

    def hand(self, record: bytes, fds: Sequence[int]) -> None:
        """Send descriptors. Raises OSError."""
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds))
        self._sock.sendmsg([record], [rights], _FLAGS)
