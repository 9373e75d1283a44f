"""What changes in the directories of the configuration: inotify(7), for the launcher.

Watched is what dbus-daemon watches, the directories of policy files and of service files, and those of endpoints. Otherwise than
there one that is not there yet is noticed when it comes, by the nearest directory above it, and what is not
called as a file that is read, an editor's copy, say, is nothing. Nothing is opened or read: to be told
takes the right to list a directory, and who has asked learns only that something has changed.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Callable, Iterable
from contextlib import suppress

_CLOSE_WRITE, _MOVED_FROM, _MOVED_TO, _CREATE, _DELETE = 0x8, 0x40, 0x80, 0x100, 0x200
_DELETE_SELF, _MOVE_SELF = 0x400, 0x800
_UNMOUNT, _Q_OVERFLOW = 0x2000, 0x4000
_MASK_ADD = (
    0x2000_0000  # the same directory may be watched for what is in it, and for what is to come
)
_INSIDE = _CLOSE_WRITE | _MOVED_FROM | _MOVED_TO | _CREATE | _DELETE
_ITSELF = _DELETE_SELF | _MOVE_SELF | _UNMOUNT | _Q_OVERFLOW
_EVENT = struct.Struct("iIII")
_READ = (".conf", ".service", ".toml")

_libc = ctypes.CDLL(None, use_errno=True)


class Watch:
    """Watches directories. `say`: where it tells that one can't be watched."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.fd = -1
        self._say = say
        self._directories: tuple[str, ...] = ()
        self._inside: dict[int, str] = {}  # by watch: a directory whose files are read
        self._awaited: dict[int, set[str]] = {}  # what is to come in one
        self._changed = False
        self._silent: set[str] = set()

    def set(self, directories: Iterable[str]) -> None:
        """Watch these, and no others. What has happened to the others by now still counts."""
        if (wanted := tuple(directories)) != self._directories:
            self._directories = wanted
            self._changed = self.changed()
            self._renew()

    def changed(self) -> bool:
        """Whether anything has happened since this was asked last."""
        changed, self._changed = self._changed, False
        anew = False
        data = b""
        with suppress(BlockingIOError):
            while self.fd >= 0:
                data += os.read(self.fd, 65536)
        at = 0
        while at < len(data):
            watch, mask, _, size = _EVENT.unpack_from(data, at)
            at += _EVENT.size
            name = os.fsdecode(data[at : at + size].rstrip(b"\0"))
            at += size
            # Directories have come or gone, in part or as a whole.
            anew |= bool(mask & _ITSELF) or name in self._awaited.get(watch, ())
            changed |= self._matters(watch, mask, name)
        if anew:
            self._renew()
        return changed or anew

    def _matters(self, watch: int, mask: int, name: str) -> bool:
        if watch not in self._inside or not name.endswith(_READ):
            return False
        # What is created is empty, and is heard of again when it was written; a link never is.
        return mask != _CREATE or os.path.islink(os.path.join(self._inside[watch], name))

    def _renew(self) -> None:
        """From the beginning: there are few directories, and they seldom change."""
        if self.fd >= 0:
            os.close(self.fd)
        self._inside, self._awaited = {}, {}
        self.fd = _libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK)
        if self.fd < 0:
            return self._complain("", ctypes.get_errno())
        for directory in self._directories:
            self._add(directory)

    def _add(self, directory: str) -> None:
        above, awaited = directory, ""
        while True:
            mask = _MOVED_TO | _CREATE if awaited else _INSIDE
            watch = _libc.inotify_add_watch(
                self.fd, os.fsencode(above), mask | _DELETE_SELF | _MOVE_SELF | _MASK_ADD
            )
            if watch < 0:
                number = ctypes.get_errno()
                if os.path.exists(above) or above == os.path.dirname(above):
                    return self._complain(above, number)
                above, awaited = os.path.split(above)
            elif not awaited:
                self._inside[watch] = directory
                return
            else:
                self._awaited.setdefault(watch, set()).add(awaited)
                if not os.path.exists(os.path.join(above, awaited)):
                    return
                above, awaited = directory, ""  # it has come before we would have heard of it

    def _complain(self, directory: str, number: int) -> None:
        if directory not in self._silent:
            self._silent.add(directory)
            what = directory or "configuration and service directories"
            self._say(f"cannot watch {what}: {os.strerror(number)}; SIGHUP has all read again")
