"""The numbers of kdbus: linux/kdbus.h of 2015, which systemd 221 to 230 also carried.

Names are those of the header without KDBUS_. The limits are those of ipc/kdbus/limits.h.
"""

from __future__ import annotations

from struct import Struct

from kbusd.kdbus import layout

SRC_ID_KERNEL = 0
DST_ID_NAME = 0
DST_ID_BROADCAST = MATCH_ID_ANY = NO_OFFSET = (1 << 64) - 1
FLAG_NEGOTIATE = 1 << 63

# -- commands --------------------------------------------------------------------------------

_WRITE, _READ = 1, 2


def _ioctl(direction: int, number: int, argument: Struct) -> int:
    """asm-generic/ioctl.h: _IOC, with the magic number of kdbus."""
    return direction << 30 | argument.size << 16 | 0x95 << 8 | number


CMD_BUS_MAKE = _ioctl(_WRITE, 0x00, layout.PLAIN)
CMD_ENDPOINT_MAKE = _ioctl(_WRITE, 0x10, layout.PLAIN)
CMD_ENDPOINT_UPDATE = _ioctl(_WRITE, 0x11, layout.PLAIN)
CMD_HELLO = _ioctl(_READ | _WRITE, 0x80, layout.HELLO)
CMD_UPDATE = _ioctl(_WRITE, 0x81, layout.PLAIN)
CMD_BYEBYE = _ioctl(_WRITE, 0x82, layout.PLAIN)
CMD_FREE = _ioctl(_WRITE, 0x83, layout.FREE)
CMD_CONN_INFO = _ioctl(_READ, 0x84, layout.INFO_COMMAND)
CMD_BUS_CREATOR_INFO = _ioctl(_READ, 0x85, layout.INFO_COMMAND)
CMD_LIST = _ioctl(_READ, 0x86, layout.LIST)
CMD_SEND = _ioctl(_WRITE, 0x90, layout.SEND)
CMD_RECV = _ioctl(_READ, 0x91, layout.RECV)
CMD_NAME_ACQUIRE = _ioctl(_WRITE, 0xA0, layout.PLAIN)
CMD_NAME_RELEASE = _ioctl(_WRITE, 0xA1, layout.PLAIN)
CMD_MATCH_ADD = _ioctl(_WRITE, 0xB0, layout.MATCH)
CMD_MATCH_REMOVE = _ioctl(_WRITE, 0xB1, layout.MATCH)

# -- flags of commands -----------------------------------------------------------------------

MAKE_ACCESS_GROUP = 1 << 0
MAKE_ACCESS_WORLD = 1 << 1

HELLO_ACCEPT_FD = 1 << 0
HELLO_ACTIVATOR = 1 << 1
HELLO_POLICY_HOLDER = 1 << 2
HELLO_MONITOR = 1 << 3

SEND_SYNC_REPLY = 1 << 0

RECV_PEEK = 1 << 0
RECV_DROP = 1 << 1
RECV_USE_PRIORITY = 1 << 2

RECV_RETURN_INCOMPLETE_FDS = 1 << 0
RECV_RETURN_DROPPED_MSGS = 1 << 1

LIST_UNIQUE = 1 << 0
LIST_NAMES = 1 << 1
LIST_ACTIVATORS = 1 << 2
LIST_QUEUED = 1 << 3

MATCH_REPLACE = 1 << 0

NAME_REPLACE_EXISTING = 1 << 0
NAME_ALLOW_REPLACEMENT = 1 << 1
NAME_QUEUE = 1 << 2
NAME_IN_QUEUE = 1 << 3
NAME_ACTIVATOR = 1 << 4
NAME_PRIMARY = 1 << 5
NAME_ACQUIRED = 1 << 6

# -- messages --------------------------------------------------------------------------------

MSG_EXPECT_REPLY = 1 << 0
MSG_NO_AUTO_START = 1 << 1
MSG_SIGNAL = 1 << 2

PAYLOAD_KERNEL = 0
PAYLOAD_DBUS = 0x4442757344427573  # "DBusDBus"

# -- metadata that a connection gives and asks for -------------------------------------------

ATTACH_TIMESTAMP = 1 << 0
ATTACH_CREDS = 1 << 1
ATTACH_PIDS = 1 << 2
ATTACH_AUXGROUPS = 1 << 3
ATTACH_NAMES = 1 << 4
ATTACH_TID_COMM = 1 << 5
ATTACH_PID_COMM = 1 << 6
ATTACH_EXE = 1 << 7
ATTACH_CMDLINE = 1 << 8
ATTACH_CGROUP = 1 << 9
ATTACH_CAPS = 1 << 10
ATTACH_SECLABEL = 1 << 11
ATTACH_AUDIT = 1 << 12
ATTACH_CONN_DESCRIPTION = 1 << 13
ATTACH_ALL = (1 << 14) - 1
ATTACH_ANY = (1 << 64) - 1

# -- policy ----------------------------------------------------------------------------------

POLICY_ACCESS_USER = 1
POLICY_ACCESS_GROUP = 2
POLICY_ACCESS_WORLD = 3

POLICY_SEE = 0
POLICY_TALK = 1
POLICY_OWN = 2

# -- items -----------------------------------------------------------------------------------

ITEM_NEGOTIATE = 1
ITEM_PAYLOAD_VEC = 2
ITEM_PAYLOAD_OFF = 3
ITEM_PAYLOAD_MEMFD = 4
ITEM_FDS = 5
ITEM_CANCEL_FD = 6
ITEM_BLOOM_PARAMETER = 7
ITEM_BLOOM_FILTER = 8
ITEM_BLOOM_MASK = 9
ITEM_DST_NAME = 10
ITEM_MAKE_NAME = 11
ITEM_ATTACH_FLAGS_SEND = 12
ITEM_ATTACH_FLAGS_RECV = 13
ITEM_ID = 14
ITEM_NAME = 15
ITEM_DST_ID = 16

ITEM_TIMESTAMP = 0x1000  # from here in the order of the ATTACH flags
ITEM_CREDS = 0x1001
ITEM_PIDS = 0x1002
ITEM_AUXGROUPS = 0x1003
ITEM_OWNED_NAME = 0x1004
ITEM_TID_COMM = 0x1005
ITEM_PID_COMM = 0x1006
ITEM_EXE = 0x1007
ITEM_CMDLINE = 0x1008
ITEM_CGROUP = 0x1009
ITEM_CAPS = 0x100A
ITEM_SECLABEL = 0x100B
ITEM_AUDIT = 0x100C
ITEM_CONN_DESCRIPTION = 0x100D

ITEM_POLICY_ACCESS = 0x2000

ITEM_NAME_ADD = 0x8000
ITEM_NAME_REMOVE = 0x8001
ITEM_NAME_CHANGE = 0x8002
ITEM_ID_ADD = 0x8003
ITEM_ID_REMOVE = 0x8004
ITEM_REPLY_TIMEOUT = 0x8005
ITEM_REPLY_DEAD = 0x8006

ITEM_TYPES = {
    number: name.removeprefix("ITEM_")
    for name, number in list(globals().items())
    if name.startswith("ITEM_")
}  # for error messages

# -- limits ----------------------------------------------------------------------------------

MAX_COMMAND_SIZE = 32 << 10  # bytes of a command with its items
MAX_MESSAGE_SIZE = 8 << 10  # bytes of a message with its items
MAX_PAYLOAD_SIZE = 2 << 20  # bytes of all vectors of one message
MAX_MEMFDS = 16  # a message
MAX_FDS_PER_USER = 16  # in flight to one connection, and in one message
MAX_MESSAGES_PER_USER = 256  # queued at one connection
MAX_BLOOM_SIZE = 4 << 10  # bytes
MAX_NAME_LENGTH = 255  # of a well-known name
MAX_NODE_NAME_LENGTH = 63  # of a bus, endpoint or domain; also of a connection's description
MAX_MATCHES = 256  # a connection
MAX_NAMES = 256  # a connection
MAX_PENDING_REPLIES = 128  # a connection
MAX_CONNECTIONS_PER_USER = 1024  # in a domain
MAX_BUSES_PER_USER = 16  # in a domain
