"""The `kbusd` command: takes dbus-daemon(1)'s options, so that whatever starts it can start us.

It reads its command line and its environment, has the configuration read by a confined process
of its own, listens, and then becomes the supervisor of the bus.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import re
import resource
import signal
import socket
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import msgspec
import prctl

from kbusd.rings.entries import Node
from kbusd.sandbox.errors import SandboxError
from kbusd.supervisor.domains import DOMAINS, DomainError
from kbusd.supervisor.journal import Journal
from kbusd.supervisor.listen import Listener, bind, escape
from kbusd.supervisor.made import CONFIGURATION, Several, Where
from kbusd.supervisor.mount import MountError
from kbusd.supervisor.spawn import spawn
from kbusd.supervisor.supervisor import READER, StartError, Supervisor

_FIRST_PASSED_FD = 3  # sd_listen_fds(3)
_MAX_PASSED_FDS = 64
MIN_FILES = 128  # descriptors that the supervisor may have: OTHER_FDS and those of a dozen workers
USAGE = """kbusd [--session | --system | --config-file=FILE] [--address=ADDRESS]
             [--fork | --nofork] [--print-address[=FD]] [--print-pid[=FD]] [--nopidfile]
             [--syslog | --syslog-only | --nosyslog] [--systemd-activation]
             [--endpoint=FILE ...] [--kdbusfs=MOUNTPOINT] [--cuse[=DIRECTORY]]
             [--domains[=DIRECTORY]]
             [--introspect] [--version]"""


class Settings(msgspec.Struct, frozen=True):
    """The part of the compiled configuration that is acted on once, at start."""

    type: str
    fork: bool
    keep_umask: bool
    syslog: bool
    pidfile: str
    addresses: tuple[tuple[str, str, str, str, int], ...]  # kbusd/policy/addresses.py
    warnings: tuple[str, ...]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        sys.stderr.write(f"kbusd: {message}\nusage: {USAGE}\n")
        raise SystemExit(1)


def _descriptor(text: str) -> int:
    """`--print-address=` is `--print-address`, that is standard output."""
    try:
        return int(text) if text else 1
    except ValueError:
        raise argparse.ArgumentTypeError(f"invalid file descriptor {text!r}") from None


class _Once(argparse.Action):
    """Takes a value that can't be given twice: who did so meant two different things."""

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, value: Any, option: str | None = None
    ) -> None:
        if getattr(namespace, self.dest) is not None:
            parser.error(f"{option} was given already")
        setattr(namespace, self.dest, value)


def parse_options(arguments: Sequence[str]) -> argparse.Namespace:
    """dbus-daemon(1)'s options, in the forms `--opt=V` and `--opt V`. Exits 1 on a wrong one.

    Of --fork and --nofork, and of the three about syslog, the last wins, as there."""
    parser = _Parser(prog="kbusd", usage=USAGE, allow_abbrev=False)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--session", action="store_true")
    which.add_argument("--system", action="store_true")
    which.add_argument("--config-file", action=_Once, metavar="FILE")
    parser.add_argument("--address", action=_Once, metavar="ADDRESS")
    for name in ("print-address", "print-pid"):
        parser.add_argument(
            f"--{name}", nargs="?", type=_descriptor, const=1, action=_Once, metavar="FD"
        )
    parser.add_argument("--fork", dest="fork", action="store_true", default=None)
    parser.add_argument("--nofork", dest="fork", action="store_false")
    parser.add_argument("--nopidfile", action="store_true")
    parser.add_argument("--endpoint", metavar="FILE", action="append", default=[])
    parser.add_argument("--kdbusfs", metavar="MOUNTPOINT")
    parser.add_argument("--cuse", metavar="DIRECTORY", nargs="?", const="")
    parser.add_argument("--domains", metavar="DIRECTORY", nargs="?", const=DOMAINS)
    for name in ("syslog", "syslog-only", "nosyslog"):
        parser.add_argument(f"--{name}", dest="log", action="store_const", const=name)
    parser.add_argument("--systemd-activation", action="store_true")
    parser.add_argument("--introspect", action="store_true")
    parser.add_argument("--version", action="store_true")
    options = parser.parse_args(arguments)
    if not (options.version or options.introspect) and not (
        options.session or options.system or options.config_file
    ):
        parser.error("no configuration: give --session, --system or --config-file=FILE")
    return options


class Reader:
    """Starts the confined process that reads the configuration, with these arguments and descriptors.

    `profile`: its compiled confinement, in a memfd, once there is one."""

    def __init__(self, which: list[str], keep: dict[int, int]) -> None:
        self._which, self._keep = which, keep
        self.profile = -1

    def __call__(self, stderr: int) -> tuple[int, int]:
        """Given a descriptor for its errors, returns its process id and the memfd that it writes the
        compiled outcome to. Raises OSError."""
        which, keep = self._which, self._keep
        if self.profile >= 0:
            place = 4 if 3 in keep else 3
            which, keep = [*which, "--profile", str(place)], {**keep, place: self.profile}
        return spawn_reader(which, keep, stderr)


def reader_of(options: argparse.Namespace) -> Reader:
    """What reads the configuration that the options name."""
    which = (
        ["--session"]
        if options.session
        else ["--system"]
        if options.system
        else ["--config-file", options.config_file]
    )
    if options.address:
        which += ["--address", options.address]
    for path in options.endpoint:
        which += ["--endpoint", os.path.abspath(path)]
    own = re.fullmatch(r"/proc/self/fd/(\d+)", options.config_file or "")
    return Reader(which, {int(own[1]): int(own[1])} if own else {})


def spawn_reader(which: list[str], keep: dict[int, int], stderr: int) -> tuple[int, int]:
    """Start it with these arguments and descriptors. Raises OSError."""
    outcome = os.memfd_create("kbusd-configuration-read", os.MFD_CLOEXEC)
    try:
        return spawn(READER, which, {1: outcome, **keep}, stderr), outcome
    except OSError:
        os.close(outcome)
        raise


def node_of(settings: Settings) -> Node:
    """The file of kdbusfs that is this bus: the name says whose it is, as kdbus had it. A session
    is its owner's alone; who may connect to another bus is for its policy."""
    name = settings.type if settings.type in ("system", "session") else "bus"
    uid, gid = os.geteuid(), os.getegid()
    return Node(f"{uid}-{name}", "bus", 0o600 if name == "session" else 0o666, uid, gid)


def _fail(text: str) -> NoReturn:
    sys.stderr.write(f"kbusd: {text}\n")
    raise SystemExit(1)


def _tidy_descriptors() -> None:
    """Whoever starts us may have closed 0, 1 or 2, and nothing of ours must land there; or left
    others open, which are not for our children."""
    fd = os.open("/dev/null", os.O_RDWR)
    while fd <= 2:
        fd = os.dup(fd)
    os.close(fd)
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2:
            with contextlib.suppress(OSError):  # the listing itself
                os.set_inheritable(int(name), False)


def _daemonize(keep_umask: bool) -> int:
    """Fork; the child returns the pipe on which it says that it is ready, the parent waits for it
    and exits 0, or 1 if the child ended without a word."""
    reader, writer = os.pipe2(os.O_CLOEXEC)
    if os.fork() > 0:
        os.close(writer)
        os._exit(0 if os.read(reader, 1) else 1)
    os.close(reader)
    os.setsid()
    os.chdir("/")
    if not keep_umask:
        os.umask(0o022)
    return writer


def _become_quiet() -> None:
    """A daemon in the background keeps no terminal."""
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.close(null)


def _write_pidfile(path: str) -> None:
    try:
        with open(path, "x") as file:
            file.write(f"{os.getpid()}\n")
    except FileExistsError:
        _fail(f"the pid file {path!r} exists: if no bus is running, remove it")
    except OSError as error:
        _fail(f"cannot write the pid file {path!r}: {error.strerror}")


def _remove_pidfile(path: str) -> None:
    with contextlib.suppress(OSError):  # it may be gone, or on a file system that is read-only now
        os.unlink(path)


def _print(fd: int, text: str) -> None:
    with contextlib.suppress(BrokenPipeError):
        os.write(fd, text.encode() + b"\n")


def _close_printed(fds: set[int]) -> None:
    """Readers of our address wait for the end of file; 0 to 2 must stay open to something."""
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    for fd in fds:
        if fd > 2:
            os.close(fd)
        elif fd == 1:
            os.dup2(null, 1)
    os.close(null)


def _notify_ready() -> None:
    """Tell the service manager (sd_notify(3)) if it asked to be told."""
    path = os.environ.pop("NOTIFY_SOCKET", None)
    if not path:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        with contextlib.suppress(OSError):
            sock.sendto(b"READY=1\n", "\0" + path[1:] if path[0] == "@" else path)


def _passed() -> list[Listener]:
    """Sockets that the service manager passed (sd_listen_fds(3))."""
    pid, count = os.environ.get("LISTEN_PID"), os.environ.get("LISTEN_FDS", "")
    if pid != str(os.getpid()) or not count.isdigit() or not 0 < int(count) < _MAX_PASSED_FDS:
        raise OSError(f"no sockets were passed (LISTEN_PID={pid}, LISTEN_FDS={count})")
    listeners = []
    for fd in range(_FIRST_PASSED_FD, _FIRST_PASSED_FD + int(count)):
        sock = socket.socket(fileno=fd)
        if sock.family != socket.AF_UNIX or sock.type != socket.SOCK_STREAM:
            raise OSError(f"descriptor {fd} is not a Unix stream socket")
        sock.setblocking(False)
        name = sock.getsockname()
        kind, value = ("abstract", name[1:]) if isinstance(name, bytes) else ("path", name)
        listeners.append(Listener(sock, f"unix:{kind}={escape(value)}"))
    return listeners


def _catch_signals() -> int:
    """What ends us only asks for that from now on, so that nothing of ours is left. Returns where the
    numbers of signals arrive."""
    reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
        signal.signal(number, lambda *_: None)
    return reader


def _listen(settings: Settings, listeners: list[Listener]) -> None:
    """Fills `listeners`: of each entry with the first address that works."""
    if not settings.addresses:
        _fail("the configuration has no address to listen on")
    for _, addresses in itertools.groupby(settings.addresses, lambda address: address[4]):
        failures = []
        for kind, value, text, where, _ in addresses:
            try:
                listeners += _passed() if kind == "systemd" else [bind(kind, value)]
                break
            except OSError as error:
                reason = f"{value}: {error.strerror}" if error.strerror else str(error)
                if kind == "path" and isinstance(error, FileNotFoundError):
                    reason += f"; make the directory first: mkdir -p {os.path.dirname(value)}"
                failures.append(f"{where}: cannot listen on {text!r}: {reason}")
        else:
            _fail("; ".join(failures))
    for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
        os.environ.pop(name, None)


def main() -> int:
    """Entry point of the `kbusd` command; returns its exit status."""
    _tidy_descriptors()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until there is a bus to end: no traceback
    options = parse_options(sys.argv[1:])
    if options.version:
        print(f"kbusd {version('kbusd')}")
        return 0
    if options.introspect:
        from kbusd.workers import introspection  # not needed by a running bus

        print(introspection.introspect(introspection.BUS_PATH), end="")
        return 0
    for option, fd in (("address", options.print_address), ("pid", options.print_pid)):
        if fd is not None:
            try:
                os.set_inheritable(fd, False)
            except OSError as error:
                _fail(f"--print-{option}={fd}: descriptor {fd}: {error.strerror}")
    read = reader_of(options)
    pid, outcome = read(2)
    _, status = os.waitpid(pid, 0)
    if status != 0:
        _fail("the configuration was not accepted; see the line above")
    configuration = os.pread(outcome, os.fstat(outcome).st_size, 0)
    os.close(outcome)
    settings = msgspec.msgpack.decode(configuration, type=Settings)
    return _run(options, settings, configuration, read)


def _close(listeners: list[Listener]) -> None:
    for listener in listeners:
        listener.close()


def _configuration_of_made_buses() -> bytes:
    """Compiled as any other, by the reader."""
    fd = os.memfd_create("kbusd-made-buses", os.MFD_CLOEXEC)
    os.write(fd, CONFIGURATION)
    os.lseek(fd, 0, os.SEEK_SET)
    pid, outcome = spawn_reader(["--config-file", f"/proc/self/fd/{fd}"], {fd: fd}, 2)
    os.close(fd)
    _, status = os.waitpid(pid, 0)
    try:
        if status:
            raise StartError("made buses have no configuration; see the line above")
        return os.pread(outcome, os.fstat(outcome).st_size, 0)
    finally:
        os.close(outcome)


class Directories(msgspec.Struct, frozen=True):
    """The part of the configuration that says where service files are."""

    service_dirs: tuple[str, ...]


def _make_runtime_directory(configuration: bytes) -> None:
    """Where services of this session alone go (dbus-daemon(1), <standard_session_servicedirs>):
    whoever wants to put one there expects the directory. Without it the bus works as well."""
    path = f"{os.environ.get('XDG_RUNTIME_DIR')}/dbus-1/services"
    if path in msgspec.msgpack.decode(configuration, type=Directories).service_dirs:
        for directory in (os.path.dirname(path), path):
            with contextlib.suppress(OSError):
                os.mkdir(directory, 0o700)


def _run(
    options: argparse.Namespace,
    settings: Settings,
    configuration: bytes,
    read: Reader,
) -> int:
    if resource.getrlimit(resource.RLIMIT_NOFILE)[1] < MIN_FILES:
        _fail(f"too few descriptors: limit nofile is under {MIN_FILES}")
    pidfile = None if options.nopidfile else settings.pidfile
    if pidfile and Path(pidfile).exists():
        _fail(f"the pid file {pidfile!r} exists: if no bus is running, remove it")
    forks = settings.fork if options.fork is None else options.fork
    kdbusfs = os.path.abspath(options.kdbusfs) if options.kdbusfs else None
    signals = _catch_signals()
    with contextlib.ExitStack() as held:
        listeners: list[Listener] = []
        held.callback(_close, listeners)
        _listen(settings, listeners)
        ready = _daemonize(settings.keep_umask) if forks else None
        prctl.set_name("kbusd")
        if pidfile:
            _write_pidfile(pidfile)
            held.callback(_remove_pidfile, pidfile)
        to_syslog = options.log in ("syslog", "syslog-only") or (
            options.log is None and settings.syslog
        )
        journal = Journal(
            to_stderr=options.log != "syslog-only" and not (forks and to_syslog),
            to_syslog=to_syslog,
            relays=to_syslog or forks,
        )

        _make_runtime_directory(configuration)
        where = Where(kdbusfs, options.cuse, options.domains)
        has_devices = where != Where(None, None, None)
        kind = Several if has_devices else Supervisor
        supervisor = kind(configuration, listeners, journal, signals, read)
        held.callback(supervisor.stop)
        for warning in settings.warnings:
            journal.warn(warning)
        if has_devices:
            supervisor.kinds = ("kdbus",)
        try:
            supervisor.start()
            read.profile = supervisor.profiles["config-reader"]
            if isinstance(supervisor, Several):
                supervisor.begin(_configuration_of_made_buses(), node_of(settings), where)
        except (StartError, SandboxError, MountError, DomainError, OSError) as error:
            if supervisor.exit_status == 0:
                return 0  # told to end before it was ready
            journal.warn(f"not started: {error}")
            return 1
        printed: set[int] = set()
        if options.print_address is not None:
            _print(options.print_address, supervisor.address)
            printed.add(options.print_address)
        if options.print_pid is not None:
            _print(options.print_pid, str(os.getpid()))
            printed.add(options.print_pid)
        _close_printed(printed)
        _notify_ready()
        if ready is not None:
            os.write(ready, b"1")
            os.close(ready)
            _become_quiet()
        return supervisor.run()


if __name__ == "__main__":
    sys.exit(main())
