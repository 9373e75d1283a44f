"""The configuration of a bus: dbus-daemon's XML files, read whole and checked (dbus-daemon(1)).

`load` follows includes, reads the service directories and returns one frozen Configuration that
can be sent to other processes. It opens files named by the configuration, so it runs in a
short-lived, confined process (reader.py). Anything that dbus-daemon refuses is refused here, with
file, line and reason; so are, where dbus-daemon skips the file and goes on, faults in files of an
<includedir>: a policy file that is left out may have held the <deny> that mattered. Documents may
not declare entities, and nothing external is fetched.
"""

from __future__ import annotations

import errno
import grp
import hashlib
import os
import pwd
import re
import stat
from collections.abc import Callable, Mapping
from xml.parsers import expat

import msgspec

from kbusd.policy import addresses, services
from kbusd.policy.addresses import Address
from kbusd.policy.endpoints import Endpoint
from kbusd.policy.rules import GROUP, USER, Policy, Rule, integer, rule
from kbusd.policy.services import Directory, Service

SESSION_FILE = "/usr/share/dbus-1/session.conf"
SYSTEM_FILE = "/usr/share/dbus-1/system.conf"

MAX_FILE_SIZE = 1024 * 1024
"""Bytes; dbus-daemon's own limit for a configuration file."""

MECHANISMS = ("EXTERNAL", "DBUS_COOKIE_SHA1", "ANONYMOUS")
"""What <auth> may name."""

OFFERED = ("EXTERNAL", "ANONYMOUS")
"""Those of them that kbusd has; ANONYMOUS succeeds only with <allow_anonymous/>."""

DEFAULT_LIMITS = {
    "max_incoming_bytes": 127 << 20,
    "max_incoming_unix_fds": 64,
    "max_outgoing_bytes": 127 << 20,
    "max_outgoing_unix_fds": 64,
    "max_message_size": 32 << 20,
    "max_message_unix_fds": 16,
    "service_start_timeout": 25_000,
    "auth_timeout": 30_000,
    "pending_fd_timeout": 150_000,
    "max_completed_connections": 2048,
    "max_incomplete_connections": 64,
    "max_connections_per_user": 256,
    "max_pending_service_starts": 512,
    "max_names_per_connection": 512,
    "max_match_rules_per_connection": 512,
    "max_replies_per_connection": 128,
    "reply_timeout": -1,
    "max_containers": 512,
    "max_containers_per_user": 16,
    "max_container_metadata_bytes": 4096,
    "max_connections_per_container": 8,
}
"""dbus-daemon's limits and defaults: bytes, counts, milliseconds (-1: never)."""

_LONG_LIMITS = frozenset(
    name for name in DEFAULT_LIMITS if name.endswith(("_bytes", "_unix_fds", "_size"))
) - {"max_container_metadata_bytes"}
_MAX_INT = (1 << 31) - 1
_MAX_LONG = (1 << 63) - 1

_FLAGS = frozenset(("fork", "keep_umask", "syslog", "allow_anonymous"))
_STANDARD_DIRECTORIES = frozenset(("standard_session_servicedirs", "standard_system_servicedirs"))
_TEXTS = frozenset(
    ("type", "user", "listen", "pidfile", "auth", "servicedir", "servicehelper", "includedir")
)
_WITH_TEXT = _TEXTS | {"include", "limit"}
_OWN_FD = re.compile(r"/(?:proc/self|dev)/fd/([0-9]{1,9})")


class ConfigurationError(Exception):
    """The configuration cannot be used; str() is ``file:line: reason``."""

    def __init__(self, file: str, line: int, reason: str) -> None:
        super().__init__(f"{file}:{line}: {reason}")
        self.file = file
        self.line = line
        self.reason = reason


class File(msgspec.Struct, frozen=True, array_like=True):
    """A file or directory that was read, and the mtime in nanoseconds that it then had; 0: there was none."""

    path: str
    mtime: int


def state(path: str) -> File:
    """A file or directory as it is, before it is read."""
    path = os.path.abspath(path)
    try:
        return File(path, os.stat(path).st_mtime_ns)
    except OSError:
        return File(path, 0)


class Configuration(msgspec.Struct, frozen=True):
    """What the configuration says. Of settings given more than once the last wins.

    `listen` is in the order of the files, `listen_at` is where each of it stands, and `addresses`
    what the reader makes of it. `endpoints` are of files of their own (endpoint_files.py); each is
    where `sockets` says, by name, or else at what that has for "", with its name behind. `limits` has every name of DEFAULT_LIMITS.
    `selinux` maps a bus name to the context that owning it is checked against. `watched` are the
    directories whose files were read, as they were before. `warnings` are lines for the log, each with
    file and line. `digest` tells one from another that says something else.
    """

    type: str = ""
    user: str = ""
    fork: bool = False
    keep_umask: bool = False
    syslog: bool = False
    pidfile: str = ""
    allow_anonymous: bool = False
    listen: tuple[str, ...] = ()
    listen_at: tuple[str, ...] = ()
    addresses: tuple[Address, ...] = ()
    endpoints: tuple[Endpoint, ...] = ()
    sockets: dict[str, str] = {}
    auth: tuple[str, ...] = ()
    service_dirs: tuple[str, ...] = ()
    service_helper: str = ""
    limits: dict[str, int] = {}
    policy: Policy = Policy()
    services: tuple[Service, ...] = ()
    selinux: dict[str, str] = {}
    apparmor: str = "enabled"
    files: tuple[File, ...] = ()
    watched: tuple[File, ...] = ()
    warnings: tuple[str, ...] = ()
    digest: bytes = b""

    @property
    def lets_anonymous_in(self) -> bool:
        """Whether whoever reaches the socket may use the bus, as nobody in particular."""
        return self.allow_anonymous and (not self.auth or "ANONYMOUS" in self.auth)


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Configuration)


def digest(configuration: Configuration) -> bytes:
    """Of all but when its files were written, and what there is to say of them."""
    said = msgspec.structs.replace(configuration, files=(), watched=(), warnings=(), digest=b"")
    return hashlib.sha256(encode(said)).digest()


def encode(configuration: Configuration) -> bytes:
    """`configuration` as bytes for another process (msgpack)."""
    return _encoder.encode(configuration)


def decode(data: bytes | memoryview) -> Configuration:
    """The inverse of `encode`. Raises msgspec.ValidationError or DecodeError for anything else."""
    return _decoder.decode(data)


def load(
    path: str,
    *,
    environment: Mapping[str, str] | None = None,
    selinux_root: str | None = None,
    to_start: bool = False,
) -> Configuration:
    """The configuration that `path` and all that it includes states.

    `environment` (default: this process's) gives the XDG directories. `selinux_root` is the
    directory of the loaded SELinux policy, None where SELinux is off: see `selinux_policy_root`.
    `path` may be /proc/self/fd/N. `to_start`: also refuse what a bus cannot be started with on this
    machine, and give `user` as a login name. Raises ConfigurationError.
    """
    builder = _Builder(os.environ if environment is None else environment, selinux_root)
    data, identity = builder.read(path, path, 1)
    builder.parse(path, data, {identity: path})
    if not builder.listen:
        raise ConfigurationError(
            path, data.count(b"\n") + 1, "no <listen> address in the configuration"
        )
    if to_start:
        builder.check()
    return builder.finish()


def selinux_policy_root() -> str | None:
    """Where the files of the SELinux policy are (selinux_config(5)), None if there is none."""
    try:
        with open("/etc/selinux/config", encoding="utf-8") as stream:
            for line in stream:
                key, _, value = line.partition("=")
                if key.strip() == "SELINUXTYPE" and value.strip():
                    return f"/etc/selinux/{value.strip()}"
    except OSError:
        pass
    return None


def standard_session_directories(environment: Mapping[str, str]) -> list[Directory]:
    """What <standard_session_servicedirs/> stands for (dbus-daemon(1))."""
    directories = []
    runtime = environment.get("XDG_RUNTIME_DIR", "")
    if runtime:
        directories.append(Directory(f"{runtime}/dbus-1/services", strict=True))
    home = environment.get("XDG_DATA_HOME", "")
    if not home:
        user_home = environment.get("HOME", "")
        home = f"{user_home}/.local/share" if user_home else ""
    shared = environment.get("XDG_DATA_DIRS", "") or "/usr/local/share:/usr/share"
    for directory in (home, *shared.split(":"), "/usr/share"):
        if directory:
            directories.append(Directory(os.path.join(directory, "dbus-1/services")))
    return directories


def standard_system_directories() -> list[Directory]:
    """What <standard_system_servicedirs/> stands for (dbus-daemon(1))."""
    return [
        Directory(f"{prefix}/dbus-1/system-services")
        for prefix in ("/usr/local/share", "/usr/share", "/lib")
    ]


_Identity = tuple[int, int]
"""Device and inode: the same file by whatever path."""


class _Element:
    """An open element: where it began, its text so far, and what its attributes said."""

    __slots__ = ("attributes", "line", "name", "rules", "text")

    def __init__(self, name: str, line: int, attributes: Mapping[str, str]) -> None:
        self.name = name
        self.line = line
        self.attributes = attributes
        self.text: list[str] = []
        self.rules: _Rules | None = None


class _Rules:
    """Where the rules of an open <policy> go. `global_rules`: may hold user= and group= rules."""

    __slots__ = ("add", "global_rules", "kind")

    def __init__(self, kind: str, add: Callable[[Rule], None], global_rules: bool) -> None:
        self.kind = kind
        self.add = add
        self.global_rules = global_rules


class _Builder:
    """Collects what the files say, in the order in which they say it."""

    def __init__(self, environment: Mapping[str, str], selinux_root: str | None) -> None:
        self.environment = environment
        self.selinux_root = selinux_root
        self.settings: dict[str, str] = {}
        self.flags: set[str] = set()
        self.listen: list[str] = []
        self.listen_at: list[str] = []
        self.auth: list[str] = []
        self.directories: dict[str, Directory] = {}
        self.limits = dict(DEFAULT_LIMITS)
        self.selinux: dict[str, str] = {}
        self.apparmor = "enabled"
        self.said_at: dict[str, tuple[str, int]] = {}  # element -> the last file and line
        self.files: list[File] = []
        self.watched: dict[str, File] = {}
        self.warnings: list[str] = []
        self.default: list[Rule] = []
        self.mandatory: list[Rule] = []
        self.users: dict[int, list[Rule]] = {}
        self.groups: dict[int, list[Rule]] = {}
        self.at_console: list[Rule] = []
        self.not_at_console: list[Rule] = []

    def warn(self, file: str, line: int, text: str) -> None:
        warning = f"{file}:{line}: {text}" if line else f"{file}: {text}"
        self.warnings.append(warning.encode(errors="backslashreplace").decode())

    def read(self, path: str, by_file: str, by_line: int) -> tuple[bytes, _Identity]:
        """The file's contents, and which file it is. Raises ConfigurationError, naming who asked."""
        own = _OWN_FD.fullmatch(path)
        fd = -1
        try:
            # A descriptor of ours is read as it is: opening it anew may not be permitted.
            fd = (
                os.dup(int(own[1]))
                if own
                else os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            )
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise OSError(errno.EINVAL, "not a regular file")
            data = b""
            while len(data) <= MAX_FILE_SIZE:
                piece = os.pread(fd, MAX_FILE_SIZE + 1 - len(data), len(data))
                if not piece:
                    break
                data += piece
            if len(data) > MAX_FILE_SIZE:
                raise OSError(errno.EFBIG, f"larger than {MAX_FILE_SIZE} bytes")
        except OSError as error:
            wrapped = ConfigurationError(by_file, by_line, f"cannot read {path}: {error.strerror}")
            raise wrapped from error
        finally:
            if fd >= 0:
                os.close(fd)
        self.files.append(File(path, status.st_mtime_ns))
        return data, (status.st_dev, status.st_ino)

    def parse(self, path: str, data: bytes, including: Mapping[_Identity, str]) -> None:
        """One document; `including` are the files that led here and itself, outermost first."""
        _Document(self, path, including).parse(data)

    def check(self) -> None:
        """Refuse what is not to be had here and must not be done without."""
        if user := self.settings.get("user"):
            name = _login_name(user)
            if name is None:
                raise ConfigurationError(*self.said_at["user"], f'there is no user "{user}"')
            self.settings["user"] = name
        if self.apparmor == "required":
            raise ConfigurationError(
                *self.said_at["apparmor"], "AppArmor is required, but kbusd does not ask it"
            )
        if self.auth and not set(self.auth) & set(OFFERED):
            raise ConfigurationError(
                *self.said_at["auth"],
                f"nobody could authenticate: of {', '.join(self.auth)} kbusd has none"
                f" (it has {', '.join(OFFERED)})",
            )

    def finish(self) -> Configuration:
        system = self.settings.get("type") == "system"
        directories = [
            Directory(d.path, strict=d.strict or system)
            for d in self.directories.values()
            if services.is_told(d.path, self.warn)
        ]
        for directory in directories:
            self.watch(directory.path)
        found = services.load(directories, self.warn)
        return Configuration(
            type=self.settings.get("type", ""),
            user=self.settings.get("user", ""),
            fork="fork" in self.flags,
            keep_umask="keep_umask" in self.flags,
            syslog="syslog" in self.flags,
            pidfile=self.settings.get("pidfile", ""),
            allow_anonymous="allow_anonymous" in self.flags,
            listen=tuple(self.listen),
            listen_at=tuple(self.listen_at),
            auth=tuple(dict.fromkeys(self.auth)),
            service_dirs=tuple(d.path for d in directories),
            service_helper=self.settings.get("servicehelper", ""),
            limits=self.limits,
            policy=Policy(
                default=tuple(self.default),
                mandatory=tuple(self.mandatory),
                users={uid: tuple(rules) for uid, rules in self.users.items()},
                groups={gid: tuple(rules) for gid, rules in self.groups.items()},
                at_console=tuple(self.at_console),
                not_at_console=tuple(self.not_at_console),
            ),
            services=found,
            selinux=self.selinux,
            apparmor=self.apparmor,
            files=tuple(self.files),
            watched=tuple(self.watched.values()),
            warnings=tuple(self.warnings),
        )

    def watch(self, directory: str) -> None:
        """Whoever changes something in it from now on has it read again."""
        now = state(directory)
        self.watched.setdefault(now.path, now)

    def add_directory(self, directory: Directory) -> None:
        known = self.directories.get(directory.path)
        strict = directory.strict and (known is None or known.strict)
        self.directories[directory.path] = Directory(directory.path, strict)


class _Document:
    """One XML file on its way into the builder."""

    def __init__(self, builder: _Builder, path: str, including: Mapping[_Identity, str]) -> None:
        self.builder = builder
        self.path = path
        self.including = including
        self.directory = os.path.dirname(path) or "."
        self.stack: list[_Element] = []
        self.parser = expat.ParserCreate()
        self.parser.StartElementHandler = self.start
        self.parser.EndElementHandler = self.end
        self.parser.CharacterDataHandler = self.characters
        self.parser.EntityDeclHandler = self.entity_declaration
        self.parser.SkippedEntityHandler = self.skipped_entity

    def parse(self, data: bytes) -> None:
        try:
            self.parser.Parse(data, True)
        except expat.ExpatError as error:
            # What the included file did wrong has become a ConfigurationError by now.
            reason = f"not well-formed XML: {expat.errors.messages[error.code]}"
            raise ConfigurationError(self.path, error.lineno, reason) from error

    def fail(self, reason: str, line: int | None = None) -> ConfigurationError:
        at = self.parser.CurrentLineNumber if line is None else line
        return ConfigurationError(self.path, at, reason)

    # -- expat's calls --

    def entity_declaration(self, name: str, *_: object) -> None:
        raise self.fail(f"entity declarations are not accepted (<!ENTITY {name} ...>)")

    def skipped_entity(self, name: str, *_: object) -> None:
        raise self.fail(f"unknown entity &{name};")

    def characters(self, text: str) -> None:
        element = self.stack[-1]
        if element.name in _WITH_TEXT:
            element.text.append(text)
        elif text.strip(" \t\r\n"):
            raise self.fail(f"<{element.name}> takes no text")

    def start(self, name: str, attributes: dict[str, str]) -> None:
        line = self.parser.CurrentLineNumber
        element = _Element(name, line, attributes)
        parent = self.stack[-1].name if self.stack else ""
        match parent:
            case "":
                if name != "busconfig":
                    raise self.fail(f"the root element is <{name}>, not <busconfig>")
                self.only(element)
            case "busconfig":
                self.start_setting(element)
            case "policy":
                if name not in ("allow", "deny"):
                    raise self.fail(f"<{name}> is not allowed inside <policy>")
                self.start_rule(element)
            case "selinux":
                if name != "associate":
                    raise self.fail(f"<{name}> is not allowed inside <selinux>")
                self.only(element, "own", "context")
                if len(attributes) != 2:
                    raise self.fail("<associate> needs both own= and context=")
                self.builder.selinux[attributes["own"]] = attributes["context"]
            case _:
                raise self.fail(f"<{name}> is not allowed inside <{parent}>")
        self.stack.append(element)

    def end(self, name: str) -> None:
        element = self.stack.pop()
        if name in _WITH_TEXT:
            text = "".join(element.text)
            if not text:
                raise self.fail(f"<{name}> is empty", element.line)
            self.end_text(element, text)

    # -- what the elements mean --

    def only(self, element: _Element, *names: str) -> None:
        """Refuse attributes of `element` other than `names`."""
        for attribute in element.attributes:
            if attribute not in names:
                raise self.fail(f'attribute "{attribute}" is not known on <{element.name}>')

    def start_setting(self, element: _Element) -> None:
        builder = self.builder
        builder.said_at[element.name] = (self.path, element.line)
        match element.name:
            case "include":
                self.only(element, "ignore_missing", "if_selinux_enabled", "selinux_root_relative")
                for attribute, value in element.attributes.items():
                    if value not in ("yes", "no"):
                        raise self.fail(f'{attribute}="{value}" must be "yes" or "no"')
            case "policy":
                self.start_policy(element)
            case "limit":
                self.only(element, "name")
                name = element.attributes.get("name")
                if name is None:
                    raise self.fail("<limit> needs a name=")
                if name not in DEFAULT_LIMITS:
                    raise self.fail(f'there is no limit called "{name}"')
            case "selinux":
                self.only(element)
            case "apparmor":
                self.only(element, "mode")
                mode = element.attributes.get("mode", "enabled")
                if mode not in ("enabled", "disabled", "required"):
                    raise self.fail(f'mode="{mode}" must be "enabled", "disabled" or "required"')
                builder.apparmor = mode
            case "standard_session_servicedirs":
                self.only(element)
                for directory in standard_session_directories(builder.environment):
                    builder.add_directory(directory)
            case "standard_system_servicedirs":
                self.only(element)
                for directory in standard_system_directories():
                    builder.add_directory(directory)
            case name if name in _FLAGS:
                self.only(element)
                builder.flags.add(name)
            case name if name in _TEXTS:
                self.only(element)
            case name:
                raise self.fail(f"<{name}> is not allowed inside <busconfig>")

    def start_policy(self, element: _Element) -> None:
        builder = self.builder
        self.only(element, "context", "user", "group", "at_console")
        if len(element.attributes) != 1:
            raise self.fail("<policy> needs exactly one of context=, user=, group=, at_console=")
        ((kind, value),) = element.attributes.items()

        def ignore(_: Rule) -> None:
            """The rules of an unknown user or group: checked, then dropped."""

        match kind, value:
            case "context", "default":
                element.rules = _Rules(kind, builder.default.append, True)
            case "context", "mandatory":
                element.rules = _Rules(kind, builder.mandatory.append, True)
            case "at_console", "true":
                element.rules = _Rules(kind, builder.at_console.append, True)
            case "at_console", "false":
                element.rules = _Rules(kind, builder.not_at_console.append, True)
            case ("context", _) | ("at_console", _):
                words = "default or mandatory" if kind == "context" else "true or false"
                raise self.fail(f'{kind}="{value}" on <policy> must be {words}')
            case _:
                number = _uid_of(value) if kind == "user" else _gid_of(value)
                if number is None:
                    self.warn(f'no {kind} is called "{value}": this <policy> is ignored')
                    element.rules = _Rules(kind, ignore, True)
                else:
                    by_id = builder.users if kind == "user" else builder.groups
                    rules = by_id.setdefault(number, [])
                    element.rules = _Rules(kind, rules.append, False)

    def start_rule(self, element: _Element) -> None:
        try:
            result = rule(
                element.name,
                element.attributes,
                self.path,
                element.line,
                _uid_of,
                _gid_of,
                self.warn,
            )
        except ValueError as error:
            raise self.fail(str(error)) from error
        rules = self.stack[-1].rules
        assert rules is not None
        if result is None:
            return
        if result.kind in (USER, GROUP) and not rules.global_rules:
            raise self.fail(
                f"user= and group= rules decide who connects: not allowed in <policy {rules.kind}>"
            )
        rules.add(result)

    def warn(self, text: str) -> None:
        self.builder.warn(self.path, self.parser.CurrentLineNumber, text)

    def end_text(self, element: _Element, text: str) -> None:
        builder = self.builder
        match element.name:
            case "type" | "user" | "pidfile":
                builder.settings[element.name] = text
            case "listen":
                try:
                    addresses.split(text)
                except addresses.AddressError as error:
                    raise self.fail(str(error), element.line) from error
                builder.listen.append(text)
                builder.listen_at.append(f"{self.path}:{element.line}")
            case "auth":
                if text not in MECHANISMS:
                    known = ", ".join(MECHANISMS)
                    raise self.fail(
                        f'"{text}" is not an authentication mechanism (known: {known})',
                        element.line,
                    )
                builder.auth.append(text)
            case "servicehelper":
                builder.settings["servicehelper"] = self.full_path(text)
            case "servicedir":
                builder.add_directory(Directory(self.full_path(text)))
            case "limit":
                self.end_limit(element, text)
            case "include":
                self.end_include(element, text)
            case "includedir":
                self.end_includedir(element, text)

    def full_path(self, path: str) -> str:
        return os.path.join(self.directory, path)

    def end_limit(self, element: _Element, text: str) -> None:
        name = element.attributes["name"]
        parsed = integer(text)
        if parsed is None:
            raise self.fail(f'limit {name}: "{text}" is not a number', element.line)
        value, rest = parsed
        if value < 0:
            raise self.fail(f"limit {name}: {value} is negative", element.line)
        if value > (_MAX_LONG if name in _LONG_LIMITS else _MAX_INT):
            raise self.fail(f"limit {name}: {value} is too large", element.line)
        if rest.strip():
            self.builder.warn(
                self.path, element.line, f'limit {name} is {value}: "{rest.strip()}" is ignored'
            )
        self.builder.limits[name] = value

    def end_include(self, element: _Element, text: str) -> None:
        attributes = element.attributes
        root = self.builder.selinux_root
        if attributes.get("if_selinux_enabled") == "yes" and root is None:
            return
        path = self.full_path(text)
        if attributes.get("selinux_root_relative") == "yes":
            if root is None:
                raise self.fail("selinux_root_relative, but SELinux is not enabled", element.line)
            path = os.path.join(root, text)
        self.include(path, element.line, attributes.get("ignore_missing") == "yes")

    def end_includedir(self, element: _Element, text: str) -> None:
        directory = self.full_path(text)
        self.builder.watch(directory)
        try:
            names = sorted(os.listdir(directory))
        except FileNotFoundError:
            return
        except OSError as error:
            raise self.fail(f"cannot read {directory}: {error.strerror}", element.line) from error
        for name in names:
            if name.endswith(".conf"):
                path = os.path.join(directory, name)
                if not services.is_utf8(path):
                    raise self.fail(f"{path!a}: the name of a file must be UTF-8", element.line)
                self.include(path, element.line, True)

    def include(self, path: str, line: int, ignore_missing: bool) -> None:
        try:
            data, identity = self.builder.read(path, self.path, line)
        except ConfigurationError as error:
            if ignore_missing and isinstance(error.__cause__, FileNotFoundError):
                return
            raise
        if identity in self.including:
            chain = " -> ".join((*self.including.values(), path))
            raise self.fail(f"{path} includes itself: {chain}", line)
        self.builder.parse(path, data, {**self.including, identity: path})


def _login_name(user: str) -> str | None:
    """The name of a user who is given by name or number and is in passwd(5), else None."""
    try:
        return pwd.getpwnam(user).pw_name
    except KeyError:
        pass
    number = _number(user)
    try:
        return None if number is None else pwd.getpwuid(number).pw_name
    except KeyError:
        return None


def _uid_of(name: str) -> int | None:
    """The uid of a user name, or of a number written out; None if there is no such user."""
    try:
        return pwd.getpwnam(name).pw_uid
    except KeyError:
        return _number(name)


def _gid_of(name: str) -> int | None:
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        return _number(name)


def _number(text: str) -> int | None:
    """An id written as a number. Unlike for dbus-daemon it needs no passwd(5) entry: containers
    and directory services have users that the reader cannot look up."""
    if not (text.isascii() and text.isdigit()):
        return None
    value = int(text)
    return value if value < 0xFFFF_FFFF else None
