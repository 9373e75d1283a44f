"""The `kbusd` command: takes dbus-daemon(1)'s options, so that whatever starts it can start us.

It reads its command line and its environment, has the configuration read by a confined process
of its own, listens, and then becomes the supervisor of the bus.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import secrets
import socket
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

import msgspec
import prctl

from kbusd.supervisor.journal import Journal
from kbusd.supervisor.listen import AddressError, Listener, open_listeners
from kbusd.supervisor.spawn import command
from kbusd.supervisor.supervisor import Settings, StartError, Supervisor

USAGE = """kbusd [--session | --system | --config-file=FILE] [--address=ADDRESS]
             [--fork | --nofork] [--print-address[=FD]] [--print-pid[=FD]] [--nopidfile]
             [--syslog | --syslog-only | --nosyslog] [--systemd-activation]
             [--introspect] [--version]"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        sys.stderr.write(f"kbusd: {message}\nusage: {USAGE}\n")
        raise SystemExit(1)


def parse_options(arguments: Sequence[str]) -> argparse.Namespace:
    """dbus-daemon(1)'s options, in the forms `--opt=V` and `--opt V`. Exits 1 on a wrong one."""
    parser = _Parser(prog="kbusd", usage=USAGE, allow_abbrev=False)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--session", action="store_true")
    which.add_argument("--system", action="store_true")
    which.add_argument("--config-file", metavar="FILE")
    parser.add_argument("--address", metavar="ADDRESS")
    parser.add_argument("--print-address", nargs="?", type=int, const=1, metavar="FD")
    parser.add_argument("--print-pid", nargs="?", type=int, const=1, metavar="FD")
    fork = parser.add_mutually_exclusive_group()
    fork.add_argument("--fork", dest="fork", action="store_true", default=None)
    fork.add_argument("--nofork", dest="fork", action="store_false")
    parser.add_argument("--nopidfile", action="store_true")
    log = parser.add_mutually_exclusive_group()
    for name in ("syslog", "syslog-only", "nosyslog"):
        log.add_argument(f"--{name}", dest="log", action="store_const", const=name)
    parser.add_argument("--systemd-activation", action="store_true")
    parser.add_argument("--introspect", action="store_true")
    parser.add_argument("--version", action="store_true")
    options = parser.parse_args(arguments)
    if not (options.version or options.introspect) and not (
        options.session or options.system or options.config_file
    ):
        parser.error("no configuration: give --session, --system or --config-file=FILE")
    return options


def start_reader(options: argparse.Namespace, stderr: int | None = None) -> subprocess.Popen[bytes]:
    """Start the confined process that reads the configuration and writes it, compiled, to stdout."""
    which = (
        ["--session"]
        if options.session
        else ["--system"]
        if options.system
        else ["--config-file", options.config_file]
    )
    keep: tuple[int, ...] = ()
    if options.config_file and options.config_file.startswith("/proc/self/fd/"):
        keep = (int(options.config_file.rsplit("/", 1)[1]),)
    return subprocess.Popen(
        command("kbusd.policy.reader", which),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=stderr,
        pass_fds=keep,
    )


def _fail(text: str) -> NoReturn:
    sys.stderr.write(f"kbusd: {text}\n")
    raise SystemExit(1)


def _ensure_standard_descriptors() -> None:
    """Whoever starts us may have closed 0, 1 or 2; nothing of ours must land there."""
    fd = os.open("/dev/null", os.O_RDWR)
    while fd <= 2:
        fd = os.dup(fd)
    os.close(fd)


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


def _listen(options: argparse.Namespace, settings: Settings) -> list[Listener]:
    addresses = options.address or ";".join(settings.listen)
    if not addresses:
        _fail("the configuration has no <listen> and there is no --address")
    try:
        listeners = open_listeners(addresses, os.environ)
    except AddressError as error:
        file = options.config_file or ("session.conf" if options.session else "system.conf")
        _fail(str(error) if options.address else f"{file}: {error}")
    for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
        os.environ.pop(name, None)
    return listeners


def main() -> int:
    """Entry point of the `kbusd` command; returns its exit status."""
    _ensure_standard_descriptors()
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
    reader = start_reader(options)
    configuration, _ = reader.communicate()
    if reader.returncode != 0:
        _fail("the configuration was not accepted; see the line above")
    settings = msgspec.msgpack.decode(configuration, type=Settings)
    return _run(options, settings, configuration)


def _run(options: argparse.Namespace, settings: Settings, configuration: bytes) -> int:
    pidfile = None if options.nopidfile else settings.pidfile
    if pidfile and Path(pidfile).exists():
        _fail(f"the pid file {pidfile!r} exists: if no bus is running, remove it")
    forks = settings.fork if options.fork is None else options.fork
    listeners = _listen(options, settings)
    ready = _daemonize(settings.keep_umask) if forks else None
    prctl.set_name("kbusd")
    if pidfile:
        _write_pidfile(pidfile)
    to_syslog = options.log in ("syslog", "syslog-only") or (
        options.log is None and settings.syslog
    )
    journal = Journal(
        to_stderr=options.log != "syslog-only" and not (forks and to_syslog),
        to_syslog=to_syslog,
        relays=to_syslog or forks,
    )

    def read_again() -> tuple[int, int]:
        process = start_reader(options, supervisor.stderr)
        assert process.stdout is not None
        with process.stdout as pipe:
            return process.pid, os.dup(pipe.fileno())

    supervisor = Supervisor(configuration, listeners, secrets.token_hex(16), journal, read_again)
    try:
        for warning in settings.warnings:
            journal.warn(warning)
        try:
            supervisor.start()
        except StartError as error:
            journal.warn(str(error))
            supervisor.stop()
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
    finally:
        if pidfile:
            with contextlib.suppress(OSError):
                os.unlink(pidfile)


if __name__ == "__main__":
    sys.exit(main())
