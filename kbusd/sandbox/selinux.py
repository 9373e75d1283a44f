"""What SELinux says: whether it is in force, who we are, and what one label may do to another.

Asks the kernel by its own files (/sys/fs/selinux), which are what libselinux reads, too; that would abort()
where it is refused, and takes a class that the policy does not know for allowed whatever the policy says of
those. Trusts the kernel. Labels come from it as well (unix(7), SO_PEERSEC).
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable
from contextlib import suppress

ROOT = "/sys/fs/selinux"
LABEL = "/proc/thread-self/attr/current"
CLASS = "dbus"
_NETLINK_SELINUX, _GROUP_AVC = 7, 1
_PERMISSIVE_DOMAIN = 1  # flag of an answer: what is refused in this domain is only logged


def enabled() -> bool:
    """Whether this kernel has SELinux and a policy: until one is loaded, we are plain `kernel`."""
    if not os.path.exists(f"{ROOT}/enforce"):
        return False
    try:
        return b":" in _read(LABEL)
    except OSError:
        return True  # it does not say; then what the profiles want of it is tried, and told of


def label() -> bytes:
    """Our own label, empty where there is none."""
    try:
        return _read(LABEL).rstrip(b"\0\n") if enabled() else b""
    except OSError:
        return b""


def knows(kind: str) -> bool:
    """Whether the policy that is in force has this type; True if we may not ask."""
    parts = label().split(b":", 3)
    parts[1:3] = b"object_r", kind.encode()  # with which every type goes
    try:
        fd = os.open(f"{ROOT}/context", os.O_RDWR | os.O_CLOEXEC)
        try:
            os.write(fd, b":".join(parts))
        finally:
            os.close(fd)
    except OSError as error:
        return error.errno != errno.EINVAL
    return True


class AccessVectors:
    """The policy's answers about the class `dbus`, kept until the policy changes.

    `bus`: the label of the bus itself. `fileno` is readable when something has changed: `forget`."""

    def __init__(self, bus: bytes, say: Callable[[str], None]) -> None:
        """Opens what tells of changes; all else is opened when it is asked for. Raises OSError."""
        self.bus = bus
        self._say = say
        self._answers: dict[tuple[bytes, bytes], tuple[int, bool]] = {}
        self._changes = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SELINUX)
        self._changes.setblocking(False)
        self._changes.bind((0, _GROUP_AVC))
        self._load()

    def fileno(self) -> int:
        return self._changes.fileno()

    def forget(self) -> None:
        """Another policy was loaded, or another mode or boolean set: ask again. Raises OSError."""
        with suppress(BlockingIOError):
            while True:
                try:
                    self._changes.recvmsg(4096)
                except OSError as error:
                    if isinstance(error, BlockingIOError):
                        raise
        self._answers.clear()
        self._load()

    def allows(self, subject: bytes, target: bytes, permission: str) -> bool:
        """Whether `subject` may do it to `target`. What the kernel can't judge is refused."""
        bit = self._bits.get(permission)
        if bit is None:
            return self._unknown
        answer = self._answers.get((subject, target))
        if answer is None:
            try:
                answer = self._answers[subject, target] = self._ask(subject, target)
            except (OSError, ValueError) as error:
                self._say(f"SELinux does not say whether {subject!r} may {permission}: {error}")
                return False
        allowed, permissive = answer
        return bool(allowed & bit) or permissive or not self._enforcing

    def _ask(self, subject: bytes, target: bytes) -> tuple[int, bool]:
        fd = os.open(f"{ROOT}/access", os.O_RDWR | os.O_CLOEXEC)
        try:
            os.write(fd, b"%s %s %d" % (subject, target, self._class))
            allowed, _, _, _, _, flags = os.read(fd, 256).split()
        finally:
            os.close(fd)
        return int(allowed, 16), bool(int(flags, 16) & _PERMISSIVE_DOMAIN)

    def _load(self) -> None:
        place = f"{ROOT}/class/{CLASS}"
        self._enforcing = _number("enforce") != 0
        self._unknown = _number("deny_unknown") == 0 or not self._enforcing
        self._bits: dict[str, int] = {}
        self._class = 0
        with suppress(FileNotFoundError):
            self._class = int(_read(f"{place}/index"))
            for permission in ("send_msg", "acquire_svc"):
                with suppress(FileNotFoundError):
                    bit = int(_read(f"{place}/perms/{permission}")) - 1
                    self._bits[permission] = 1 << bit


def _number(name: str) -> int:
    return int(_read(f"{ROOT}/{name}"))


def _read(path: str) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, 4096)
    finally:
        os.close(fd)
