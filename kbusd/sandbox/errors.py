"""What can go wrong on the way into a sandbox and in it, told to the admin who has to mend it."""

from __future__ import annotations

import signal


class SandboxError(Exception):
    """A process can't go into its sandbox, and so must not go on."""


class ProfileError(SandboxError):
    """A profile is wrong. The text is `file:line: key: what is wrong; hint`."""

    def __init__(self, file: str, key: str, problem: str, hint: str = "", line: int = 0) -> None:
        self.file, self.key, self.problem, self.hint, self.line = file, key, problem, hint, line
        at = f"{file}:{line}" if line else file
        super().__init__(": ".join(p for p in (at, key, problem) if p) + (hint and f"; {hint}"))


class Unavailable(SandboxError):
    """A confinement that the profile requires can't be had here."""

    def __init__(self, profile: str, feature: str, problem: str) -> None:
        self.profile, self.feature, self.problem = profile, feature, problem
        super().__init__(
            f"profile {profile}: [{feature}] is required but can't be had here: {problem}; "
            f"make it possible, or set `required = false` under [{feature}] in a copy of the "
            f"profile in /etc/kbusd/profiles"
        )


def describe(code: int) -> str:
    """The exit code of a process in words; a death by SIGSYS is what seccomp does."""
    if code >= 0:
        return f"exited with status {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:  # real-time ones have none
        name = f"signal {-code}"
    hint = ": a system call that its profile forbids" if name == "SIGSYS" else ""
    return f"was killed by {name}{hint}"
