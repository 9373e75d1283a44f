"""The SASL conversation that opens a D-Bus connection: the server's side as a table, the client's.

D-Bus Specification, "Authentication Protocol". Sans-IO: bytes in; bytes to send and the outcome
out. The rules:

1. The first byte is NUL, then come lines of ASCII that end in CR LF.
2. What a state does with a command stands in _TABLE. A text there is the ERROR that is answered;
   a command that is not there is unknown. Answers are dbus-daemon 1.14's, byte for byte.
3. EXTERNAL: the client is who the kernel says it is. The user id that it claims must be that one,
   or one by which it may know itself (`aliases`: in its user namespace it may be another number).
   Claiming none is right; a user name is rejected.
4. Six rejections, 16 KiB without an end of line or in one line, as many of answers at once, or BEGIN
   before success end the conversation.
5. What follows BEGIN is the message stream and is handed back untouched.

The client is hostile until `done`: `failed` says why it must be disconnected, once `reply` is sent.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from enum import StrEnum

import msgspec

MAX_LINE = 16 * 1024
MAX_FAILURES = 6


class AuthStep(msgspec.Struct, frozen=True):
    """What to do now: send `reply`; then, if `failed` is set, disconnect; if `done`, `rest` is the
    start of the message stream and descriptors may pass if `unix_fds`."""

    reply: bytes = b""
    done: bool = False
    rest: bytes = b""
    failed: str | None = None
    unix_fds: bool = False
    anonymous: bool = False


class State(StrEnum):
    """Of the server's side, as the specification names them."""

    AUTH = "waiting for AUTH"
    DATA = "waiting for DATA"
    BEGIN = "waiting for BEGIN"
    DONE = "authenticated"
    FAILED = "failed"


class ServerAuth:
    """The server's side of one conversation with a client whose user id is `uid`."""

    def __init__(
        self,
        guid: str,
        uid: int,
        *,
        mechanisms: Collection[str] = ("EXTERNAL",),
        unix_fds: bool = True,
        allow_anonymous: bool = False,
        aliases: Collection[int] = (),
    ) -> None:
        self.state = State.AUTH
        self._guid = guid.encode()
        self._uids = (uid, *aliases)
        self._mechanisms = tuple(each for name, each in _MECHANISMS.items() if name in mechanisms)
        self._fds_possible = unix_fds
        self._fds = False
        self._allow_anonymous = allow_anonymous
        self._mechanism = b""
        self._identity = b""
        self._asked = False  # an empty DATA was sent, to ask for an identity
        self._failures = 0
        self._failed: str | None = None
        self._begun = False  # the NUL byte has come
        self._input = b""
        self._reply = b""

    def receive(self, data: bytes) -> AuthStep:
        """Take what the client sent. Not to be called again once it was done or failed."""
        if self.state in _OVER:
            raise RuntimeError(f"the conversation is over: {self.state}")
        self._input += data
        if not self._begun and self._input:
            if self._input[0]:
                self._fail("the first byte was not NUL")
            self._begun = True
            self._input = self._input[1:]
        while self.state not in _OVER:
            end = self._input.find(b"\r\n", 0, MAX_LINE + 2)
            if end < 0:
                if len(self._input) > MAX_LINE:
                    self._fail(f"sent a line of more than {MAX_LINE} bytes")
                break
            line = self._input[:end]
            self._input = self._input[end + 2 :]
            self._line(line)
            if len(self._reply) > MAX_LINE:
                self._fail(f"asked for more than {MAX_LINE} bytes of answers at once")
        if self.state is State.DONE and self._anonymous and not self._allow_anonymous:
            self._fail("anonymous clients are not allowed (allow_anonymous)")
        reply, self._reply = self._reply, b""
        done = self.state is State.DONE
        return AuthStep(
            reply=reply,
            done=done,
            rest=self._input if done else b"",
            failed=self._failed,
            unix_fds=done and self._fds,
            anonymous=done and self._anonymous,
        )

    @property
    def _anonymous(self) -> bool:
        return self._mechanism == b"ANONYMOUS"

    def _line(self, line: bytes) -> None:
        if not line.isascii() or b"\0" in line:
            self._error("Command contained non-ASCII")
            return
        command, arguments = _word(line)
        action = _TABLE[self.state].get(command, "Unknown command")
        if isinstance(action, str):
            self._error(action)
        else:
            action(self, arguments)

    # -- what the table refers to ------------------------------------------------------------

    def _auth(self, arguments: bytes) -> None:
        name, response = _word(arguments)
        if name not in self._mechanisms:
            self._reject(arguments)
            return
        self._mechanism = name
        self._data(response)

    def _data(self, arguments: bytes) -> None:
        try:
            data = _unhex(arguments)
        except ValueError:
            self._error("Invalid hex encoding")
            return
        if self._anonymous:
            self._trace(data)
        else:
            self._external(data)

    def _external(self, data: bytes) -> None:
        if data:
            if self._identity:
                self._reject(data)
                return
            self._identity = data
        elif not self._identity and not self._asked:
            self._asked = True
            self._reply += b"DATA\r\n"
            self.state = State.DATA
            return
        if self._identity and not self._is_client(self._identity):
            self._reject(data)
        else:
            self._accept()

    def _is_client(self, identity: bytes) -> bool:
        # In decimal, as the specification has it and every client does. dbus-daemon takes what strtoul(3)
        # does, in which 0100 is 64; dbus-broker does not.
        return identity.decode("latin-1") in map(str, self._uids)

    def _trace(self, data: bytes) -> None:
        """ANONYMOUS: the data says what it likes, in UTF-8."""
        try:
            data.decode()
        except UnicodeDecodeError:
            self._reject(data)
        else:
            self._accept()

    def _accept(self) -> None:
        self._reply += b"OK " + self._guid + b"\r\n"
        self.state = State.BEGIN

    def _reject(self, arguments: bytes) -> None:
        self._reply += b" ".join((b"REJECTED", *self._mechanisms)) + b"\r\n"
        self._mechanism = self._identity = b""
        self._asked = False
        self._failures += 1
        self.state = State.AUTH
        if self._failures == MAX_FAILURES:
            self._fail(f"was rejected {MAX_FAILURES} times")

    def _agree(self, arguments: bytes) -> None:
        if self._fds_possible:
            self._fds = True
            self._reply += b"AGREE_UNIX_FD\r\n"
        else:
            self._error(
                "Unix FD passing not supported, not authenticated or otherwise not possible"
            )

    def _begin(self, arguments: bytes) -> None:
        self.state = State.DONE

    def _begin_too_early(self, arguments: bytes) -> None:
        self._fail("sent BEGIN before it was authenticated")

    def _error(self, text: str) -> None:
        self._reply += f'ERROR "{text}"\r\n'.encode()

    def _fail(self, reason: str) -> None:
        self._failed = reason
        self.state = State.FAILED


_OVER = State.DONE, State.FAILED
# In the order in which REJECTED lists them.
_MECHANISMS = {"EXTERNAL": b"EXTERNAL", "ANONYMOUS": b"ANONYMOUS"}

_Action = str | Callable[[ServerAuth, bytes], None]

# A command to be added later (say, to negotiate rings) is one more line under State.BEGIN.
_TABLE: dict[State, dict[bytes, _Action]] = {
    State.AUTH: {
        b"AUTH": ServerAuth._auth,
        b"CANCEL": "Not currently in an auth conversation",
        b"DATA": "Not currently in an auth conversation",
        b"BEGIN": ServerAuth._begin_too_early,
        b"ERROR": ServerAuth._reject,
        b"NEGOTIATE_UNIX_FD": "Need to authenticate first",
    },
    State.DATA: {
        b"AUTH": "Sent AUTH while another AUTH in progress",
        b"CANCEL": ServerAuth._reject,
        b"ERROR": ServerAuth._reject,
        b"DATA": ServerAuth._data,
        b"BEGIN": ServerAuth._begin_too_early,
        b"NEGOTIATE_UNIX_FD": "Need to authenticate first",
    },
    State.BEGIN: {
        b"AUTH": "Sent AUTH while expecting BEGIN",
        b"CANCEL": ServerAuth._reject,
        b"ERROR": ServerAuth._reject,
        b"DATA": "Sent DATA while expecting BEGIN",
        b"BEGIN": ServerAuth._begin,
        b"NEGOTIATE_UNIX_FD": ServerAuth._agree,
    },
}


_UNCLAIMED, _CLAIMED = b"\0AUTH EXTERNAL\r\nDATA\r\n", b"\0AUTH EXTERNAL "
_NEGOTIATE, _BEGIN = b"NEGOTIATE_UNIX_FD\r\n", b"BEGIN\r\n"


def usual(data: bytes, guid: str, uid: int) -> AuthStep | None:
    """The step of a new `ServerAuth` that offers EXTERNAL and descriptors, if `data` is a whole conversation as
    most clients have it who do not wait for answers; else None. Far less for a processor that does it for the first time."""
    opening, begin, rest = data.partition(_BEGIN)
    unix_fds = opening.endswith(_NEGOTIATE)
    if unix_fds:
        opening = opening[: -len(_NEGOTIATE)]
    if opening == _UNCLAIMED:
        reply = b"DATA\r\nOK "
    elif opening.startswith(_CLAIMED) and opening == _claim(uid):
        reply = b"OK "
    else:
        return None
    if not begin:
        return None
    reply += guid.encode() + (b"\r\nAGREE_UNIX_FD\r\n" if unix_fds else b"\r\n")
    return AuthStep(reply, True, rest, None, unix_fds)


def _claim(uid: int) -> bytes:
    return _CLAIMED + str(uid).encode().hex().encode() + b"\r\n"


class ClientStep(msgspec.Struct, frozen=True):
    """What to do now: send `send`; if `done`, the bus's `guid` is known, messages may follow and
    `rest` is the start of what the bus sent; if `failed`, disconnect."""

    send: bytes = b""
    done: bool = False
    rest: bytes = b""
    failed: str | None = None
    guid: str = ""
    unix_fds: bool = False


class ClientAuth:
    """The client's side: EXTERNAL, and descriptors if `unix_fds` is asked for and granted.

    `uid` None claims nothing, so that the kernel's word counts: what to do in a user namespace.
    """

    def __init__(self, uid: int | None = None, *, unix_fds: bool = True) -> None:
        self._uid = uid
        self._want_fds = unix_fds
        self._input = b""
        self._guid: str | None = None
        self._over = False

    def start(self) -> bytes:
        """What the client sends first."""
        first = _UNCLAIMED if self._uid is None else _claim(self._uid)
        return first + (_NEGOTIATE if self._want_fds else b"")

    def receive(self, data: bytes) -> ClientStep:
        """Take what the bus answered. Not to be called again once it was done or failed."""
        if self._over:
            raise RuntimeError("the conversation is over")
        self._input += data
        while (end := self._input.find(b"\r\n")) >= 0:
            command, arguments = _word(self._input[:end])
            self._input = self._input[end + 2 :]
            if self._guid is not None:
                if command not in (b"AGREE_UNIX_FD", b"ERROR"):
                    return self._fail(command)
                return self._done(command == b"AGREE_UNIX_FD")
            if command == b"DATA" and self._uid is None and not arguments:
                continue
            if command != b"OK":
                return self._fail(command)
            self._guid = arguments.decode(errors="replace")
            if not self._want_fds:
                return self._done(False)
        if len(self._input) > MAX_LINE:
            return self._fail(b"a line that does not end")
        return ClientStep()

    def _done(self, fds: bool) -> ClientStep:
        self._over = True
        return ClientStep(
            send=_BEGIN, done=True, rest=self._input, guid=self._guid or "", unix_fds=fds
        )

    def _fail(self, what: bytes) -> ClientStep:
        self._over = True
        return ClientStep(failed=f"the bus answered {what[:64].decode(errors='replace')}")


def aliases(uid_map: bytes, uid: int) -> tuple[int, ...]:
    """By which user ids a client knows itself in a user namespace of which /proc/PID/uid_map says so."""
    found = []
    for line in uid_map.splitlines():
        first, outside, count = map(int, line.split())
        if 0 <= uid - outside < count:
            found.append(first + uid - outside)
    return tuple(found)


def _word(line: bytes) -> tuple[bytes, bytes]:
    """Up to the first blank (space or tab), and what follows the blanks."""
    word, _, rest = line.replace(b"\t", b" ").partition(b" ")
    return word, rest.lstrip(b" ")


def _unhex(text: bytes) -> bytes:
    """As libdbus decodes: digits of both cases, an odd last one is the high half of a byte."""
    if not text:
        return b""
    if text.strip(b"0123456789abcdefABCDEF"):
        raise ValueError("not hexadecimal")
    if len(text) % 2:
        text += b"0"
    return bytes.fromhex(text.decode())
