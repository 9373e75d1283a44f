"""D-Bus error names, the texts that programs are known to compare literally, and how a client ends.

Names and meanings: D-Bus specification, "Standard error names"; the texts are those that
dbus-daemon 1.14 gives, since clients in the field look for them.
"""

from __future__ import annotations

ACCESS_DENIED = "org.freedesktop.DBus.Error.AccessDenied"
ADT_AUDIT_DATA_UNKNOWN = "org.freedesktop.DBus.Error.AdtAuditDataUnknown"
FAILED = "org.freedesktop.DBus.Error.Failed"
FILE_EXISTS = "org.freedesktop.DBus.Error.FileExists"
INCONSISTENT_MESSAGE = "org.freedesktop.DBus.Error.InconsistentMessage"
INVALID_ARGS = "org.freedesktop.DBus.Error.InvalidArgs"
LIMITS_EXCEEDED = "org.freedesktop.DBus.Error.LimitsExceeded"
MATCH_RULE_INVALID = "org.freedesktop.DBus.Error.MatchRuleInvalid"
MATCH_RULE_NOT_FOUND = "org.freedesktop.DBus.Error.MatchRuleNotFound"
NAME_HAS_NO_OWNER = "org.freedesktop.DBus.Error.NameHasNoOwner"
NO_REPLY = "org.freedesktop.DBus.Error.NoReply"
NOT_SUPPORTED = "org.freedesktop.DBus.Error.NotSupported"
PROPERTY_READ_ONLY = "org.freedesktop.DBus.Error.PropertyReadOnly"
SELINUX_CONTEXT_UNKNOWN = "org.freedesktop.DBus.Error.SELinuxSecurityContextUnknown"
SERVICE_UNKNOWN = "org.freedesktop.DBus.Error.ServiceUnknown"
TIMED_OUT = "org.freedesktop.DBus.Error.TimedOut"
UNIX_PROCESS_ID_UNKNOWN = "org.freedesktop.DBus.Error.UnixProcessIdUnknown"
UNKNOWN_INTERFACE = "org.freedesktop.DBus.Error.UnknownInterface"
UNKNOWN_METHOD = "org.freedesktop.DBus.Error.UnknownMethod"
UNKNOWN_PROPERTY = "org.freedesktop.DBus.Error.UnknownProperty"

NO_REPLY_DISCONNECTED = "Message recipient disconnected from message bus without replying"
NO_REPLY_TIMEOUT = "Message did not receive a reply (timeout by message bus)"
SAME_SERIAL = "Message has the same reply serial as a currently-outstanding existing method call"
NOT_REGISTERED = "Client tried to send a message other than Hello without being registered"

NOT_ACTIVE_YET = ":not.active.yet"
"""The destination in errors to a client that has no unique name yet."""


def no_service(name: str) -> str:
    """ServiceUnknown: nobody owns `name` and nothing can be started for it."""
    return f"The name {name} was not provided by any .service files"


def no_such_name(name: str) -> str:
    """NameHasNoOwner: nobody owns `name`, and the sender asked not to start anything."""
    return f'Name "{name}" does not exist'


class Gone(Exception):
    """A client's connection ends here; the text is for the log."""
