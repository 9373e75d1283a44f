"""An ordinary message of a sender, read in one go: vectors and memfds to one connection, by its id or by a name.

Whatever else it may be, wrong or only rare, is for `commands.parse_message` and `message.examine`, which
say what of it is wrong; what this reads, they read as the same.
"""

import cython
from cython.cimports.cpython.bytes import PyBytes_AS_STRING
from cython.cimports.libc.stdint import int32_t, int64_t, uint8_t, uint64_t
from cython.cimports.libc.string import memchr

from kbusd.kdbus import abi, layout, names
from kbusd.kdbus.message import Header, Memfd, Message, Vector

HEAD = cython.declare(uint64_t, layout.MESSAGE.size)
ITEM = cython.declare(uint64_t, layout.ITEM.size)
VECTOR = cython.declare(uint64_t, layout.ITEM.size + layout.VECTOR.size)
PAYLOAD_VEC = cython.declare(uint64_t, abi.ITEM_PAYLOAD_VEC)
MEMFD = cython.declare(uint64_t, layout.ITEM.size + layout.MEMFD.size)
PAYLOAD_MEMFD = cython.declare(uint64_t, abi.ITEM_PAYLOAD_MEMFD)
MAX_MEMFDS = cython.declare(cython.int, abi.MAX_MEMFDS)
DST_NAME = cython.declare(uint64_t, abi.ITEM_DST_NAME)
BROADCAST = cython.declare(uint64_t, abi.DST_ID_BROADCAST)
KERNEL = cython.declare(uint64_t, abi.PAYLOAD_KERNEL)
EXPECT_REPLY = cython.declare(uint64_t, abi.MSG_EXPECT_REPLY)
FLAGS = cython.declare(uint64_t, abi.MSG_EXPECT_REPLY | abi.MSG_NO_AUTO_START)
MAX_PAYLOAD = cython.declare(uint64_t, abi.MAX_PAYLOAD_SIZE)


def scan(data, sender):
    """The message that `data` is, of the connection `sender`; None if it is not an ordinary one."""
    begin = cython.cast(cython.pointer(uint8_t), PyBytes_AS_STRING(data))
    head = cython.cast(cython.pointer(uint64_t), begin)
    end: uint64_t = len(data)
    if end < HEAD or head[0] != end or head[1] & ~FLAGS or head[3] == BROADCAST:
        return None
    if (head[4] != 0 and head[4] != sender) or head[5] == KERNEL:
        return None
    if head[1] & EXPECT_REPLY and (head[6] == 0 or head[7] == 0):
        return None
    name = None
    parts: list = []
    total: uint64_t = 0
    memfds: cython.int = 0
    size: uint64_t
    at: uint64_t = HEAD
    while at < end:
        item = cython.cast(cython.pointer(uint64_t), begin + at)
        if end - at < ITEM or item[0] < ITEM or item[0] > end - at:
            return None
        size = item[0]
        if item[1] == PAYLOAD_VEC:
            if size != VECTOR or item[2] == 0 or item[2] > MAX_PAYLOAD:
                return None
            total += item[2]
            if total > MAX_PAYLOAD or (item[3] and item[2] - 1 > ~item[3]):  # or wraps around
                return None
            parts.append(Vector(item[2], item[3]))
        elif item[1] == PAYLOAD_MEMFD:
            if size != MEMFD or item[3] == 0 or item[3] > ~item[2] or memfds == MAX_MEMFDS:
                return None
            number = cython.cast(cython.pointer(int32_t), item)[8]
            if number < 0:
                return None
            memfds += 1
            parts.append(Memfd(item[2], item[3], number))
        elif item[1] == DST_NAME and name is None and size > ITEM:
            text = begin + at + ITEM
            size -= ITEM
            if memchr(text, 0, size) != text + size - 1:
                return None
            name = cython.cast(cython.p_char, text)[: size - 1].decode("latin-1")
            if not names.is_well_known(name):
                return None
            size += ITEM
        else:
            return None
        at += (size + 7) & ~cython.cast(uint64_t, 7)
    if head[3] == 0 and name is None:
        return None
    priority = cython.cast(cython.pointer(int64_t), begin)[2]
    header = Header(head[1], priority, head[3], sender, head[5], head[6], head[7])
    return Message(header, tuple(parts), (), None, name)
