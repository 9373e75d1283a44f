"""What a running bus was started with: the profiles as its supervisor had compiled them, and what of the
files says otherwise by now.

The supervisor keeps them in sealed memfds, which its children read. What of a confinement the kernel shows
of no other process (which program a filter is, securebits, Landlock) can only be told by them. The
supervisor is trusted, as it could as well have confined nobody; the bytes are checked all the same.
"""

from __future__ import annotations

import fcntl
import os

import msgspec

from kbusd.sandbox.compiled import Compiled, decode

PREFIX = "kbusd-profile-"
_LINK = f"/memfd:{PREFIX}"
_LARGEST = 1 << 20
# By fields of Compiled, the sections that say so. Not here: the user, whom the bus's configuration may
# name, whether a domain is demanded, which depends on who starts the bus, and what is told only.
_SECTIONS = {
    "title": "title",
    "apart": "user.apart",
    "groups": "groups",
    "capabilities": "capabilities",
    "bounding": "capabilities.bounding",
    "securebits": "securebits",
    "no_new_privileges": "no-new-privileges",
    "not_dumpable": "not-dumpable",
    "limits": "limits",
    "unshare": "namespaces",
    "landlock": "landlock",
    "selinux": "selinux",
    "bpf": "seccomp",
}


class Unseen(Exception):
    """What a bus was started with is not shown to us; the text says why."""


def profiles(supervisor: int) -> dict[str, Compiled]:
    """The profiles that the bus of this supervisor was started with, by name; none if it is no supervisor.

    Raises Unseen, ProcessLookupError."""
    try:
        if os.readlink(f"/proc/{supervisor}/ns/user") != os.readlink("/proc/self/ns/user"):
            raise Unseen("it has other users than we: ask inside of its container")
        found = {}
        for number in os.listdir(f"/proc/{supervisor}/fd"):
            file = f"/proc/{supervisor}/fd/{number}"
            try:
                link = os.readlink(file)
            except FileNotFoundError:
                continue  # closed meanwhile
            if link.startswith(_LINK):
                name = link.removeprefix(_LINK).removesuffix(" (deleted)")
                found[name] = decode(_sealed(file))
    except PermissionError:
        raise Unseen("only root may look") from None
    except FileNotFoundError:
        raise ProcessLookupError(f"there is no process {supervisor}") from None
    except (msgspec.DecodeError, ValueError) as error:
        raise Unseen(f"it is of another version: {error}") from None
    return found


def _sealed(file: str) -> bytes:
    """What is in it, and can't change. Raises OSError, ValueError."""
    with open(file, "rb") as opened:
        if not fcntl.fcntl(opened, fcntl.F_GET_SEALS) & fcntl.F_SEAL_WRITE:
            raise ValueError(f"{file} is not sealed")
        return opened.read(_LARGEST)


def changed(started: Compiled, now: Compiled) -> list[str]:
    """The sections that the files have otherwise by now."""
    sections = [
        section
        for field, section in _SECTIONS.items()
        if getattr(started, field) != getattr(now, field)
    ]
    if (started.uid is None) != (now.uid is None):
        sections.insert(0, "user")
    required = (started.required ^ now.required) - {"selinux", *sections}
    return [*sections, *(f"{section}.required" for section in sorted(required))]
