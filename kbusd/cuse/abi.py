"""Numbers and struct layouts of FUSE and CUSE: linux/fuse.h, version 7.38, as far as they are used.

Kernels since 5.10 (7.32) speak it; they understand older and newer minor versions (see `INIT`).
"""

from __future__ import annotations

from struct import Struct

MAJOR = 7
MINOR = 31
"""What we answer to INIT: structs are as in 7.38, and nothing newer than 5.4 is asked for."""

ROOT_NODE = 1
MAX_IOVECS = 256  # in and out together, in one answer to IOCTL
MAX_TRANSFER = 128 << 10  # bytes in, and bytes out, of one round of an ioctl (32 pages)
ERESTARTSYS = 512
"""As the result of an interrupted ioctl: start it again, or EINTR, as the caller's handler has it."""

# -- opcodes ---------------------------------------------------------------------------------

LOOKUP = 1
FORGET = 2
GETATTR = 3
SETATTR = 4
OPEN = 14
READ = 15
WRITE = 16
STATFS = 17
RELEASE = 18
FLUSH = 25
INIT = 26
OPENDIR = 27
READDIR = 28
RELEASEDIR = 29
ACCESS = 34
CREATE = 35
INTERRUPT = 36
DESTROY = 38
IOCTL = 39
POLL = 40
BATCH_FORGET = 42
TMPFILE = 51
CUSE_INIT = 4096

NOTIFY_POLL = 1
NOTIFY_INVAL_INODE = 2
NOTIFY_INVAL_ENTRY = 3
NOTIFY_STORE = 4

# -- flags -----------------------------------------------------------------------------------

FATTR_MODE = 1 << 0
FATTR_UID = 1 << 1
FATTR_GID = 1 << 2
FATTR_SIZE = 1 << 3

FOPEN_DIRECT_IO = 1 << 0
FOPEN_KEEP_CACHE = 1 << 1
FOPEN_NONSEEKABLE = 1 << 2

ASYNC_READ = 1 << 0
BIG_WRITES = 1 << 5
MAX_PAGES = 1 << 22

GETATTR_FH = 1 << 0

IOCTL_COMPAT = 1 << 0
IOCTL_UNRESTRICTED = 1 << 1
IOCTL_RETRY = 1 << 2
IOCTL_32BIT = 1 << 3
IOCTL_DIR = 1 << 4

POLL_SCHEDULE_NOTIFY = 1 << 0

CUSE_UNRESTRICTED_IOCTL = 1 << 0

# -- structs of requests ---------------------------------------------------------------------

IN_HEADER = Struct("=IIQQIIIHH")
"""len, opcode, unique, nodeid, uid, gid, pid, total_extlen (in units of 8 bytes), padding"""
INIT_IN = Struct("=4I")  # major, minor, max_readahead, flags; newer kernels append more
CUSE_INIT_IN = Struct("=4I")  # major, minor, unused, flags
FORGET_IN = Struct("=Q")  # nlookup
BATCH_FORGET_IN = Struct("=II")  # count, dummy
FORGET_ONE = Struct("=QQ")  # nodeid, nlookup
GETATTR_IN = Struct("=IIQ")  # flags, dummy, fh
SETATTR_IN = Struct("=II6Q8I")
"""valid, padding, fh, size, lock_owner, atime, mtime, ctime, three nanoseconds, mode, unused, uid, gid,
unused"""
OPEN_IN = Struct("=II")  # flags, open_flags
READ_IN = Struct("=QQIIQII")  # fh, offset, size, read_flags, lock_owner, flags, padding
WRITE_IN = Struct("=QQIIQII")  # fh, offset, size, write_flags, lock_owner, flags, padding
RELEASE_IN = Struct("=QIIQ")  # fh, flags, release_flags, lock_owner
FLUSH_IN = Struct("=QIIQ")  # fh, unused, padding, lock_owner
ACCESS_IN = Struct("=II")  # mask, padding
INTERRUPT_IN = Struct("=Q")  # unique
IOCTL_IN = Struct("=QIIQII")  # fh, flags, cmd, arg, in_size, out_size
POLL_IN = Struct("=QQII")  # fh, kh, flags, events

# -- structs of replies and notifications ----------------------------------------------------

OUT_HEADER = Struct("=IiQ")  # len, error, unique
ATTR = Struct("=6Q10I")
"""ino, size, blocks, atime, mtime, ctime, three nanoseconds, mode, nlink, uid, gid, rdev, blksize,
flags"""
ENTRY_OUT = Struct(
    "=4QII"
)  # nodeid, generation, entry_valid, attr_valid, two nanoseconds; then ATTR
ATTR_OUT = Struct("=QII")  # attr_valid, nanoseconds, dummy; then ATTR
OPEN_OUT = Struct("=QII")  # fh, open_flags, padding
WRITE_OUT = Struct("=II")  # size, padding
STATFS_OUT = Struct(
    "=5Q4I24x"
)  # blocks, bfree, bavail, files, ffree, bsize, namelen, frsize, padding
INIT_OUT = Struct("=4IHHIIHHI28x")
"""major, minor, max_readahead, flags, max_background, congestion_threshold, max_write, time_gran,
max_pages, map_alignment, flags2"""
CUSE_INIT_OUT = Struct("=8I40x")
"""major, minor, unused, flags, max_read, max_write, dev_major, dev_minor"""
IOCTL_OUT = Struct("=iIII")  # result, flags, in_iovs, out_iovs
IOCTL_IOVEC = Struct("=QQ")  # base, len
POLL_OUT = Struct("=II")  # revents, padding
DIRENT = Struct("=QQII")  # ino, off, namelen, type; then the name, padded to 8

NOTIFY_POLL_OUT = Struct("=Q")  # kh
NOTIFY_INVAL_INODE_OUT = Struct("=Qqq")  # ino, off, len
NOTIFY_INVAL_ENTRY_OUT = Struct("=QII")  # parent, namelen, flags; then the name
NOTIFY_STORE_OUT = Struct("=QQII")  # nodeid, offset, size, padding; then the bytes
