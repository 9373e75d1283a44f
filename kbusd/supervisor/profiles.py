"""The sandbox profiles, compiled once at start (libseccomp by way of pyseccomp), as memfds.

Each process gets the one that it is to confine itself by; what it may do is decided here, before
it exists.
"""

from __future__ import annotations

import os

from kbusd.sandbox import apply
from kbusd.sandbox import compile as sandbox
from kbusd.supervisor.spawn import sealed_memfd


def compile_all(user: str | None) -> dict[str, int]:
    """A sealed memfd for each profile by its name. Raises ProfileError, which names the culprit."""
    return {
        name: sealed_memfd(f"kbusd-profile-{name}", sandbox.encode(compiled))
        for name, compiled in sandbox.compile_all(user).items()
    }


def confine(fd: int) -> list[str]:
    """Confine this process by the compiled profile in `fd`; returns warnings. Raises SandboxError."""
    return apply.confine(sandbox.decode(os.pread(fd, os.fstat(fd).st_size, 0)))
