"""The system calls of confinement that Python does not offer, by ctypes, prepared at import.

Nothing here decides anything. Every function raises OSError as the kernel says. All ctypes types
are made at import: making one in a forked child costs it a hundred copied pages. Landlock's
system call numbers are the same on every architecture (uapi asm-generic/unistd.h).
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable

_libc = ctypes.CDLL(None, use_errno=True)


class _Header(ctypes.Structure):
    """struct __user_cap_header_struct (capget(2))."""

    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Data(ctypes.Structure):
    """struct __user_cap_data_struct[2]: the low 32 capabilities, then the high ones."""

    _fields_ = tuple(
        (f"{name}_{half}", ctypes.c_uint32)
        for half in ("low", "high")
        for name in ("effective", "permitted", "inheritable")
    )


class _Program(ctypes.Structure):
    """struct sock_fprog (linux/filter.h)."""

    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


class _Ruleset(ctypes.Structure):
    """struct landlock_ruleset_attr (linux/landlock.h); older kernels know a part of it."""

    _fields_ = (
        ("files", ctypes.c_uint64),
        ("network", ctypes.c_uint64),
        ("scopes", ctypes.c_uint64),
    )


class _PathBeneath(ctypes.Structure):
    """struct landlock_path_beneath_attr."""

    _pack_ = 1
    _fields_ = (("access", ctypes.c_uint64), ("parent", ctypes.c_int32))


def _function(name: str, result: type, *arguments: type) -> ctypes._NamedFuncPointer:
    function = _libc[name]
    function.argtypes, function.restype = arguments, result
    return function


_int, _long, _ulong = ctypes.c_int, ctypes.c_long, ctypes.c_ulong
_prctl = _function("prctl", _int, _int, _ulong, _ulong, _ulong, _ulong)
_prctl_text = _function("prctl", _int, _int, ctypes.c_char_p, _ulong, _ulong, _ulong)
_prctl_filter = _function("prctl", _int, _int, _ulong, ctypes.POINTER(_Program), _ulong, _ulong)
_unshare = _function("unshare", _int, _int)
_capget = _function("capget", _int, ctypes.POINTER(_Header), ctypes.POINTER(_Data))
_capset = _function("capset", _int, ctypes.POINTER(_Header), ctypes.POINTER(_Data))
_create_ruleset = _function(
    "syscall", _long, _long, ctypes.POINTER(_Ruleset), ctypes.c_size_t, _ulong
)
_add_rule = _function("syscall", _long, _long, _long, _long, ctypes.POINTER(_PathBeneath), _ulong)
_restrict_self = _function("syscall", _long, _long, _long, _ulong)

_HEADER = _Header(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, the calling thread

PR_SET_DUMPABLE = 4
PR_SET_KEEPCAPS = 8
PR_SET_NAME = 15
PR_SET_SECCOMP = 22
PR_CAPBSET_READ = 23
PR_CAPBSET_DROP = 24
PR_SET_SECUREBITS = 28
PR_SET_NO_NEW_PRIVS = 38
PR_CAP_AMBIENT = 47
PR_CAP_AMBIENT_CLEAR_ALL = 4

_SECCOMP_MODE_FILTER = 2
_LANDLOCK_CREATE_RULESET, _LANDLOCK_ADD_RULE, _LANDLOCK_RESTRICT_SELF = 444, 445, 446
_LANDLOCK_CREATE_RULESET_VERSION = 1
_LANDLOCK_PATH_BENEATH = 1
_READ = 1 << 2 | 1 << 3  # READ_FILE, READ_DIR
_WRITE = 1 << 1 | 0b1_1111_1111 << 4 | 1 << 14  # WRITE_FILE, REMOVE_* and MAKE_*, TRUNCATE
# Access rights that exist from each ABI version on (uapi landlock.h).
_FS_RIGHTS = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}
_ON_FILES = 1 | 1 << 1 | 1 << 2 | 1 << 14 | 1 << 15  # the rights that a rule on a file may have
_TCP = 0b11
_SCOPES = 0b11  # abstract Unix sockets, signals


def _check(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def prctl(option: int, a: int = 0, b: int = 0) -> int:
    """prctl(2)."""
    return _check(_prctl(option, a, b, 0, 0))


def set_name(name: str) -> None:
    """What ps(1) shows as comm; at most 15 bytes are kept."""
    _check(_prctl_text(PR_SET_NAME, name.encode(), 0, 0, 0))


def unshare(flags: int) -> None:
    """unshare(2)."""
    _check(_unshare(flags))


def effective() -> int:
    """The effective capabilities of the calling thread, as bits."""
    data = _Data()
    _check(_capget(_HEADER, data))
    return int(data.effective_low | data.effective_high << 32)


def set_capabilities(bits: int) -> None:
    """Effective and permitted to `bits`, inheritable to none (capset(2))."""
    low, high = bits & 0xFFFFFFFF, bits >> 32
    _check(_capset(_HEADER, _Data(low, low, 0, high, high, 0)))


def drop_bounding(keep: int) -> None:
    """Everything but `keep` leaves the bounding set. Needs CAP_SETPCAP."""
    for capability in range(64):
        if keep >> capability & 1:
            continue
        if _prctl(PR_CAPBSET_READ, capability, 0, 0, 0) < 0:
            return  # past the last one that this kernel has
        prctl(PR_CAPBSET_DROP, capability)


def load_filter(bpf: bytes) -> None:
    """seccomp(2) SECCOMP_SET_MODE_FILTER with an array of struct sock_filter (8 bytes each).

    By prctl(2), whose number needs no table per architecture; there is one thread only."""
    program = _Program(len(bpf) // 8, bpf)
    _check(_prctl_filter(PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, program, 0, 0))


def landlock_abi() -> int:
    """The Landlock ABI version. Raises OSError: ENOSYS not built in, EOPNOTSUPP not enabled."""
    version = _LANDLOCK_CREATE_RULESET_VERSION
    return _check(_create_ruleset(_LANDLOCK_CREATE_RULESET, None, 0, version))


def landlock(paths: Iterable[tuple[int, bool, bool]]) -> None:
    """Deny all of the file system, TCP and what else this kernel's Landlock can, but `paths`.

    `paths`: descriptor, writable, is a directory. Needs no_new_privs or CAP_SYS_ADMIN."""
    abi = landlock_abi()
    files = max(rights for since, rights in _FS_RIGHTS.items() if since <= abi)
    size = 24 if abi >= 6 else 16 if abi >= 4 else 8
    attributes = _Ruleset(files, _TCP if abi >= 4 else 0, _SCOPES if abi >= 6 else 0)
    ruleset = _check(_create_ruleset(_LANDLOCK_CREATE_RULESET, attributes, size, 0))
    try:
        for fd, writable, directory in paths:
            rights = (_READ | (_WRITE if writable else 0)) & files
            rights &= files if directory else _ON_FILES
            rule = _PathBeneath(rights, fd)
            _check(_add_rule(_LANDLOCK_ADD_RULE, ruleset, _LANDLOCK_PATH_BENEATH, rule, 0))
        _check(_restrict_self(_LANDLOCK_RESTRICT_SELF, ruleset, 0))
    finally:
        os.close(ruleset)
