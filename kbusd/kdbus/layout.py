"""The structs of linux/kdbus.h (2015; systemd 221 to 230 carried the same), without their items.

All integers are in the machine's byte order and structs are aligned to 8 bytes. Every command begins
with size (of all of it, items included), flags and return_flags, so those are not repeated below.
"""

from __future__ import annotations

from struct import Struct

U64 = Struct("=Q")
I32 = Struct("=i")

# -- commands
PLAIN = Struct("=3Q")
HELLO = Struct("=10Q16s")
"""attach_flags_send, attach_flags_recv, bus_flags, id, pool_size, offset, items_size, id128"""
SEND = Struct("=7Q")  # msg_address, then the reply: offset, msg_size, return_flags
RECV = Struct("=3Qq4Q")  # priority, dropped_msgs, then the message: offset, msg_size, return_flags
FREE = Struct("=4Q")  # offset
LIST = Struct("=5Q")  # offset, list_size
INFO_COMMAND = Struct("=7Q")  # id, attach_flags, offset, info_size
MATCH = Struct("=4Q")  # cookie

# -- what lies in a pool, and what a sender hands in
MESSAGE = Struct("=2Qq5Q")
"""size, flags, priority, dst_id, src_id, payload_type, cookie, timeout_ns or cookie_reply"""
INFO = Struct("=3Q")  # size, id, flags

# -- items
ITEM = Struct("=2Q")  # size (of the whole item, without the padding that follows it), type
VECTOR = Struct("=2Q")  # size, address (sent) or offset from the head of the message (received)
MEMFD = Struct("=QQiI")  # start, size, fd, padding
BLOOM_PARAMETER = Struct("=2Q")  # size, n_hash
CREDS = Struct("=8Q")  # uid, euid, suid, fsuid, gid, egid, sgid, fsgid
PIDS = Struct("=3Q")  # pid, tid, ppid
AUDIT = Struct("=2I")  # sessionid, loginuid
TIMESTAMP = Struct("=3Q")  # seqnum, monotonic_ns, realtime_ns
POLICY_ACCESS = Struct("=3Q")  # type, access, id
ID_CHANGE = Struct("=2Q")  # id, flags
NAME_CHANGE = Struct("=4Q")  # old id, old flags, new id, new flags; then the name


def align8(size: int) -> int:
    """The next multiple of 8."""
    return (size + 7) & ~7
