"""The system calls of confinement that Python does not offer, by ctypes, prepared at import.

Nothing here decides anything. Every function raises OSError as the kernel says. Landlock's
numbers are the same on every architecture (uapi asm-generic/unistd.h).
"""

from __future__ import annotations

import ctypes
import os
import struct

_libc = ctypes.CDLL(None, use_errno=True)

_prctl = _libc.prctl
_prctl.argtypes = [ctypes.c_int] + [ctypes.c_ulong] * 4
_syscall = _libc.syscall
_syscall.argtypes = [ctypes.c_long] * 6
_syscall.restype = ctypes.c_long
_unshare = _libc.unshare
_unshare.argtypes = [ctypes.c_int]
_capget = _libc.capget
_capset = _libc.capset

_CAPABILITY_VERSION_3 = 0x20080522

PR_SET_DUMPABLE = 4
PR_SET_KEEPCAPS = 8
PR_SET_NAME = 15
PR_SET_SECCOMP = 22
PR_CAPBSET_READ = 23
PR_CAPBSET_DROP = 24
PR_GET_SECUREBITS = 27
PR_SET_SECUREBITS = 28
PR_SET_NO_NEW_PRIVS = 38
PR_CAP_AMBIENT = 47
PR_CAP_AMBIENT_CLEAR_ALL = 4

_LANDLOCK_CREATE_RULESET, _LANDLOCK_ADD_RULE, _LANDLOCK_RESTRICT_SELF = 444, 445, 446
_LANDLOCK_PATH_BENEATH = 1
_READ = 1 << 2 | 1 << 3  # READ_FILE, READ_DIR
_WRITE = 1 << 1 | 0b11111111_0000 | 1 << 14  # WRITE_FILE, REMOVE_* and MAKE_*, TRUNCATE
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


def prctl(option: int, a: int = 0, b: int = 0, c: int = 0, d: int = 0) -> int:
    """prctl(2)."""
    return _check(_prctl(option, a, b, c, d))


def set_name(name: str) -> None:
    """What ps(1) shows as comm; at most 15 bytes are kept."""
    buffer = ctypes.create_string_buffer(name.encode())
    prctl(PR_SET_NAME, ctypes.addressof(buffer))


def unshare(flags: int) -> None:
    """unshare(2)."""
    _check(_unshare(flags))


def effective() -> int:
    """The effective capabilities of the calling thread, as bits."""
    header = ctypes.create_string_buffer(struct.pack("=Ii", _CAPABILITY_VERSION_3, 0))
    data = ctypes.create_string_buffer(24)
    _check(_capget(header, data))
    low, _, _, high, _, _ = struct.unpack("=6I", data.raw)
    return int(low | high << 32)


def set_capabilities(bits: int) -> None:
    """Effective and permitted to `bits`, inheritable to none (capset(2))."""
    header = struct.pack("=Ii", _CAPABILITY_VERSION_3, 0)
    low, high = bits & 0xFFFFFFFF, bits >> 32
    _check(_capset(header, struct.pack("=6I", low, low, 0, high, high, 0)))


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
    code = ctypes.create_string_buffer(bpf, len(bpf))
    program = ctypes.create_string_buffer(struct.pack("@HP", len(bpf) // 8, ctypes.addressof(code)))
    prctl(PR_SET_SECCOMP, 2, ctypes.addressof(program))


def landlock_abi() -> int:
    """The Landlock ABI version. Raises OSError: ENOSYS not built in, EOPNOTSUPP not enabled."""
    return _check(_syscall(_LANDLOCK_CREATE_RULESET, 0, 0, 1, 0, 0))


def landlock(paths: list[tuple[int, bool, bool]]) -> None:
    """Deny all of the file system, TCP and what else this kernel's Landlock can, but `paths`.

    `paths`: descriptor, writable, is a directory. Needs no_new_privs or CAP_SYS_ADMIN."""
    abi = landlock_abi()
    files = max(rights for since, rights in _FS_RIGHTS.items() if since <= abi)
    attributes = struct.pack("=Q", files)
    if abi >= 4:
        attributes += struct.pack("=Q", _TCP)
    if abi >= 6:
        attributes += struct.pack("=Q", _SCOPES)
    buffer = ctypes.create_string_buffer(attributes, len(attributes))
    ruleset = _check(
        _syscall(_LANDLOCK_CREATE_RULESET, ctypes.addressof(buffer), len(attributes), 0, 0, 0)
    )
    try:
        for fd, writable, directory in paths:
            rights = (_READ | (_WRITE if writable else 0)) & files
            rights &= files if directory else _ON_FILES
            rule = ctypes.create_string_buffer(struct.pack("=Qi", rights, fd), 12)
            _check(
                _syscall(
                    _LANDLOCK_ADD_RULE,
                    ruleset,
                    _LANDLOCK_PATH_BENEATH,
                    ctypes.addressof(rule),
                    0,
                    0,
                )
            )
        _check(_syscall(_LANDLOCK_RESTRICT_SELF, ruleset, 0, 0, 0, 0))
    finally:
        os.close(ruleset)
