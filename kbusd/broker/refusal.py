"""How the broker says no: a D-Bus error name and a text, worded as dbus-daemon words it.

Programs compare some of these texts literally, so they were taken from the running program.
"""

from __future__ import annotations

_PREFIX = "org.freedesktop.DBus.Error."

ACCESS_DENIED = _PREFIX + "AccessDenied"
FAILED = _PREFIX + "Failed"
INVALID_ARGS = _PREFIX + "InvalidArgs"
LIMITS_EXCEEDED = _PREFIX + "LimitsExceeded"
MATCH_RULE_NOT_FOUND = _PREFIX + "MatchRuleNotFound"
FILE_EXISTS = _PREFIX + "FileExists"
NAME_HAS_NO_OWNER = _PREFIX + "NameHasNoOwner"
NO_MEMORY = _PREFIX + "NoMemory"
SERVICE_UNKNOWN = _PREFIX + "ServiceUnknown"
SPAWN_CHILD_EXITED = _PREFIX + "Spawn.ChildExited"
SPAWN_CHILD_SIGNALED = _PREFIX + "Spawn.ChildSignaled"
SPAWN_EXEC_FAILED = _PREFIX + "Spawn.ExecFailed"
SPAWN_FILE_INVALID = _PREFIX + "Spawn.FileInvalid"
SPAWN_FAILED = _PREFIX + "Spawn.Failed"
TIMED_OUT = _PREFIX + "TimedOut"


class Refused(Exception):
    """A request cannot be granted; `error` is the D-Bus error name, `text` its message."""

    def __init__(self, error: str, text: str) -> None:
        super().__init__(error, text)
        self.error = error
        self.text = text


class Violation(Exception):
    """A worker did what no honest worker does; it is to be ended. The text says what."""
