"""The system calls of confinement and identity that Python does not offer, straight from libc (libc.pxd).

Nothing here decides anything. Every function raises OSError as the kernel says. Landlock's
system call numbers are the same on every architecture (uapi asm-generic/unistd.h).
"""

import math
import os
from array import array

import cython
from cython.cimports.kbusd.sandbox.libc import (
    ENOENT,
    ERANGE,
    ESRCH,
    O_CLOEXEC,
    O_RDONLY,
    SOCK_CLOEXEC,
    SOCK_NONBLOCK,
    SOL_SOCKET,
    SYS_accept4,
    SYS_seccomp,
    capability_data,
    capability_header,
    errno,
    landlock_path_beneath,
    landlock_ruleset,
    sock_fprog,
    syscall,
)
from cython.cimports.kbusd.sandbox.libc import capget as c_capget
from cython.cimports.kbusd.sandbox.libc import capset as c_capset
from cython.cimports.kbusd.sandbox.libc import close as c_close
from cython.cimports.kbusd.sandbox.libc import getsockopt as c_getsockopt
from cython.cimports.kbusd.sandbox.libc import one_heap as c_one_heap
from cython.cimports.kbusd.sandbox.libc import open as c_open
from cython.cimports.kbusd.sandbox.libc import prctl as c_prctl
from cython.cimports.kbusd.sandbox.libc import read as c_read
from cython.cimports.kbusd.sandbox.libc import unshare as c_unshare
from cython.cimports.libc.stdint import uint64_t
from cython.cimports.libc.stdlib import free, malloc

SO_PEERCRED = cython.declare(cython.int, 17)
SO_PEERSEC = cython.declare(cython.int, 31)
SO_PEERGROUPS = cython.declare(cython.int, 59)
PEER_MOST = cython.declare(cython.uint, 65536 * 4)  # bytes: NGROUPS_MAX groups; a label is shorter

PR_SET_DUMPABLE = 4
PR_SET_KEEPCAPS = 8
PR_SET_NAME = 15
PR_CAPBSET_READ = 23
PR_CAPBSET_DROP = 24
PR_SET_SECUREBITS = 28
PR_SET_CHILD_SUBREAPER = 36
PR_SET_NO_NEW_PRIVS = 38
PR_CAP_AMBIENT = 47
PR_CAP_AMBIENT_CLEAR_ALL = 4

_CAPABILITY_VERSION_3 = cython.declare(cython.uint, 0x20080522)
_SET_MODE_FILTER = cython.declare(cython.ulong, 1)
_FILTER_TSYNC = cython.declare(cython.ulong, 1)
_FILTER_LOG = cython.declare(cython.ulong, 2)
_FILTER_NEW_LISTENER = cython.declare(cython.ulong, 8)
_FILTER_TSYNC_ESRCH = cython.declare(cython.ulong, 16)
_FILTER_WAIT_KILLABLE = cython.declare(cython.ulong, 32)
_LANDLOCK_CREATE_RULESET = cython.declare(cython.long, 444)
_LANDLOCK_ADD_RULE = cython.declare(cython.long, 445)
_LANDLOCK_RESTRICT_SELF = cython.declare(cython.long, 446)
_LANDLOCK_CREATE_RULESET_VERSION = cython.declare(cython.ulong, 1)
_LANDLOCK_PATH_BENEATH = cython.declare(cython.ulong, 1)
_READ = cython.declare(uint64_t, 1 << 2 | 1 << 3)  # READ_FILE, READ_DIR
# WRITE_FILE, REMOVE_* and MAKE_*, TRUNCATE
_WRITE = cython.declare(uint64_t, 1 << 1 | 0b1_1111_1111 << 4 | 1 << 14)
# Access rights that exist from each ABI version on (uapi landlock.h).
_FS_RIGHTS = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}
# The rights that a rule on a file may have.
_ON_FILES = cython.declare(uint64_t, 1 | 1 << 1 | 1 << 2 | 1 << 14 | 1 << 15)
_TCP = cython.declare(uint64_t, 0b11)
_SCOPES = cython.declare(uint64_t, 0b11)  # abstract Unix sockets, signals
_NONE = cython.declare(cython.ulong, 0)  # prctl(2) wants what it does not use to be 0, as long


@cython.cfunc
def _check(result: cython.long) -> cython.long:
    number: cython.int = errno
    if result < 0:
        raise OSError(number, os.strerror(number))
    return result


def prctl(option: cython.int, a: cython.ulong = 0, b: cython.ulong = 0):
    """prctl(2)."""
    return _check(c_prctl(option, a, b, _NONE, _NONE))


def set_name(name: str):
    """What ps(1) shows as comm; at most 15 bytes are kept."""
    text: bytes = name.encode()
    _check(c_prctl(PR_SET_NAME, cython.cast(cython.p_char, text), _NONE, _NONE, _NONE))


def unshare(flags: cython.int):
    """unshare(2)."""
    _check(c_unshare(flags))


def effective():
    """The effective capabilities of the calling thread, as bits."""
    header: capability_header
    data: capability_data[2]
    header.version = _CAPABILITY_VERSION_3
    header.pid = 0
    _check(c_capget(cython.address(header), data))
    return data[0].effective | cython.cast(uint64_t, data[1].effective) << 32


def set_capabilities(bits: uint64_t):
    """Effective and permitted to `bits`, inheritable to none (capset(2))."""
    header: capability_header
    data: capability_data[2]
    header.version = _CAPABILITY_VERSION_3
    header.pid = 0
    data[0].effective = data[0].permitted = bits & 0xFFFFFFFF
    data[1].effective = data[1].permitted = bits >> 32
    data[0].inheritable = data[1].inheritable = 0
    _check(c_capset(cython.address(header), data))


def drop_bounding(keep: uint64_t):
    """Everything but `keep` leaves the bounding set. Needs CAP_SETPCAP."""
    capability: cython.ulong
    for capability in range(64):
        if keep >> capability & 1:
            continue
        if c_prctl(PR_CAPBSET_READ, capability, _NONE, _NONE, _NONE) < 0:
            return  # past the last one that this kernel has
        _check(c_prctl(PR_CAPBSET_DROP, capability, _NONE, _NONE, _NONE))


def one_heap():
    """All threads take memory from the same. Else one that begins to asks first how many processors there are, from a
    file, which is denied (mallopt(3), M_ARENA_MAX)."""
    c_one_heap()


def load_filter(bpf: bytes, threads: cython.bint = False):
    """seccomp(2) SECCOMP_SET_MODE_FILTER with an array of struct sock_filter (8 bytes each).

    `threads`: for all of them. The kernel logs calls that it has fail, too, not only those that kill."""
    program: sock_fprog
    program.length = len(bpf) // 8
    program.filter = cython.cast(cython.p_char, bpf)
    flags: cython.ulong = _FILTER_LOG | (_FILTER_TSYNC if threads else _NONE)
    if _check(syscall(SYS_seccomp, _SET_MODE_FILTER, flags, cython.address(program))):
        raise OSError(0, "a thread has a filter of its own")


def load_listening_filter(bpf: bytes, threads: cython.bint = False):
    """The same; returns the descriptor at which somebody answers what the filter leaves to him.

    Every such call waits for that (seccomp_unotify(2))."""
    program: sock_fprog
    program.length = len(bpf) // 8
    program.filter = cython.cast(cython.p_char, bpf)
    flags: cython.ulong = _FILTER_NEW_LISTENER
    if threads:
        flags |= _FILTER_TSYNC | _FILTER_TSYNC_ESRCH
    fd: cython.long = syscall(
        SYS_seccomp, _SET_MODE_FILTER, flags | _FILTER_WAIT_KILLABLE, cython.address(program)
    )
    if fd >= 0:
        return fd
    # Before Linux 5.19 a signal interrupts a call that waits for an answer.
    return _check(syscall(SYS_seccomp, _SET_MODE_FILTER, flags, cython.address(program)))


def landlock_abi():
    """The Landlock ABI version. Raises OSError: ENOSYS not built in, EOPNOTSUPP not enabled."""
    return _check(
        syscall(_LANDLOCK_CREATE_RULESET, cython.NULL, _NONE, _LANDLOCK_CREATE_RULESET_VERSION)
    )


def landlock(paths):
    """Deny all of the file system, TCP and what else this kernel's Landlock can, but `paths`.

    `paths`: descriptor, writable, is a directory. Needs no_new_privs or CAP_SYS_ADMIN."""
    attributes: landlock_ruleset
    rule: landlock_path_beneath
    ruleset: cython.long
    size: cython.size_t
    abi: cython.int = landlock_abi()
    attributes.files = max(rights for since, rights in _FS_RIGHTS.items() if since <= abi)
    attributes.network = _TCP if abi >= 4 else 0
    attributes.scopes = _SCOPES if abi >= 6 else 0
    size = 24 if abi >= 6 else 16 if abi >= 4 else 8
    ruleset = _check(syscall(_LANDLOCK_CREATE_RULESET, cython.address(attributes), size, _NONE))
    try:
        for fd, writable, directory in paths:
            rule.access = (_READ | (_WRITE if writable else 0)) & attributes.files
            rule.access &= attributes.files if directory else _ON_FILES
            rule.parent = fd
            _check(
                syscall(
                    _LANDLOCK_ADD_RULE,
                    ruleset,
                    _LANDLOCK_PATH_BENEATH,
                    cython.address(rule),
                    _NONE,
                )
            )
        _check(syscall(_LANDLOCK_RESTRICT_SELF, ruleset, _NONE))
    finally:
        os.close(ruleset)


def getsockopt(fd: cython.int, option: cython.int, most: cython.uint):
    """getsockopt(2) at level SOL_SOCKET, for values above the 1024 bytes that Python's own takes."""
    value: cython.p_char = cython.cast(
        cython.p_char, malloc(most)
    )  # of a large one, only what is used exists
    if value == cython.NULL:
        raise MemoryError
    try:
        _check(c_getsockopt(fd, SOL_SOCKET, option, value, cython.address(most)))
        return value[:most]
    finally:
        free(value)


def uid_map(pid):
    """How the user namespace of a process has the uids (user_namespaces(7)); b"" if it has gone. Another
    may be in its place by now: good enough to compare with what it says of itself."""
    return _of(pid, b"uid_map")


def delayed(pid):
    """For how many seconds a process that could run has waited for a processor, up to when it last got one
    (schedstat, proc(5)); no end of it, if it has ended itself. And how long it has run, ns, or -1 if it sleeps now.
    0 and -1 if that is not known. Another may be in its place by now."""
    stat: bytes = _of(pid, b"stat")
    if not stat:
        return math.inf if errno == ENOENT or errno == ESRCH else 0.0, -1
    state = stat[stat.rfind(b")") + 2 : stat.rfind(b")") + 3]
    if state in (b"Z", b"X"):
        return math.inf, -1
    times = _of(pid, b"schedstat").split()
    if len(times) < 2:
        return 0.0, -1
    return int(times[1]) / 1e9, int(times[0]) if state == b"R" else -1


@cython.cfunc
def _of(pid, name: bytes) -> bytes:
    """What /proc has of a process; b"" if nothing, and why in errno."""
    buffer: cython.char[4096]
    size: cython.Py_ssize_t
    path: bytes = b"/proc/%d/%b" % (pid, name)
    fd: cython.int = c_open(path, O_RDONLY | O_CLOEXEC)
    if fd < 0:
        return b""
    size = c_read(fd, buffer, 4096)
    c_close(fd)
    return buffer[:size] if size > 0 else b""


def accept(fd: cython.int):
    """accept4(2): the next who connects to a listening socket, as a descriptor that never blocks."""
    return _check(syscall(SYS_accept4, fd, _NONE, _NONE, SOCK_CLOEXEC | SOCK_NONBLOCK))


def peer(fd: cython.int):
    """(pid, uid, gid, groups, label) of who is at the other end of a Unix socket, as he connected (unix(7)); the
    label is empty where no security module gives one to sockets."""
    who: cython.uint[3]
    groups: cython.uint[64]
    label: cython.char[256]
    size: cython.uint = 12
    i: cython.uint
    _check(c_getsockopt(fd, SOL_SOCKET, SO_PEERCRED, who, cython.address(size)))
    size = 256
    if c_getsockopt(fd, SOL_SOCKET, SO_PEERGROUPS, groups, cython.address(size)) == 0:
        his = tuple([groups[i] for i in range(size // 4)])
    else:
        _check(0 if errno == ERANGE else -1)  # they are more
        his = tuple(array("I", getsockopt(fd, SO_PEERGROUPS, PEER_MOST)))
    size = 256
    if c_getsockopt(fd, SOL_SOCKET, SO_PEERSEC, label, cython.address(size)) == 0:
        text = label[:size]
    else:
        text = getsockopt(fd, SO_PEERSEC, PEER_MOST) if errno == ERANGE else b""
    return cython.cast(cython.int, who[0]), who[1], who[2], his, text.rstrip(b"\0")
