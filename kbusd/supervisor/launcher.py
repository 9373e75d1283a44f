"""The launcher: runs the services that the broker activates, and tells how they ended.

`python -m kbusd.supervisor.launcher FILES`; fd 3 is the line to the broker, 4 the compiled profile,
FILES how many descriptors a service may open (the supervisor itself has raised its limit).
Privileged where the bus is root's: a service may have to run as another user, so this process
keeps the right to change to one. It reads only the broker's records, never a client's bytes; the
programs and users are those of the service files. When the line closes it ends, and the services
live on; what they say goes where the bus's own words go.

It also watches the directories that the configuration was read from (watch.py): it may look
anywhere as it is, and broker and supervisor need not be able to.

Services are started with posix_spawn(3): that reports a failing execve(2) at once. A service of
another user needs groups to be set, which posix_spawn cannot do: a fork does that, and reports
through a pipe. (This process has one thread.)
"""

from __future__ import annotations

import contextlib
import os
import pwd
import resource
import select
import signal
import socket
import sys
from collections.abc import Mapping
from errno import ENOENT

from kbusd.rings.entries import (
    EndLaunch,
    FilesChanged,
    Launch,
    LaunchEnded,
    Look,
    Looked,
    ToLauncher,
)
from kbusd.rings.line import Line, LineError, adopt, close_all
from kbusd.sandbox import apply
from kbusd.sandbox import compiled as profiles
from kbusd.sandbox.errors import SandboxError
from kbusd.supervisor.watch import Watch

BROKER = 3
PROFILE = 4
_ERRNO_BYTES = 4


class Launcher:
    """Runs services for the broker at the other end of `sock` until it closes."""

    def __init__(self, sock: socket.socket, environment: Mapping[str, str]) -> None:
        self._line = Line(sock, ToLauncher)
        self._environment = dict(environment)
        self._watch = Watch(say)
        self._jobs: dict[int, int] = {}  # pid -> job
        self._pids: dict[int, int] = {}  # job -> pid

    def run(self) -> None:
        """Serve. Returns when the broker has gone; raises LineError if it broke the rules."""
        reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        try:
            while True:
                poll = select.poll()
                poll.register(reader, select.POLLIN)
                if self._watch.fd >= 0:
                    poll.register(self._watch.fd, select.POLLIN)
                poll.register(
                    self._line.fileno(),
                    select.POLLIN | (select.POLLOUT if self._line.queue else 0),
                )
                poll.poll()
                with contextlib.suppress(BlockingIOError):
                    os.read(reader, 4096)
                self._reap()
                if self._watch.changed():
                    self._line.send(FilesChanged())
                self._line.flush()
                while (received := self._line.receive()) is not None:
                    message, fds = received
                    close_all(fds)
                    self._handle(message)
        except (EOFError, BrokenPipeError):
            return
        finally:
            signal.set_wakeup_fd(before)
            os.close(reader)
            os.close(writer)

    def _handle(self, message: ToLauncher) -> None:
        match message:
            case Launch():
                self._launch(message)
            case EndLaunch(job):
                pid = self._pids.get(job)
                if pid is not None:
                    try:
                        os.kill(pid, signal.SIGKILL)  # not reaped yet, so the pid is its own
                    except OSError as error:
                        say(f"cannot kill a late service, pid {pid}: {error.strerror}")
            case Look(directories):
                self._watch.set(directories)
                times = {directory: modified(directory) for directory in directories}
                self._line.send(Looked(times, self._watch.changed()))

    def _launch(self, launch: Launch) -> None:
        try:
            if not launch.arguments or any("\0" in each for each in launch.arguments):
                raise FileNotFoundError(ENOENT, os.strerror(ENOENT))
            if launch.user:
                pid = start_as(launch.user, launch.arguments, launch.environment)
            else:
                pid = start(launch.arguments, self._environment | launch.environment)
        except OSError as error:
            self._line.send(LaunchEnded(launch.job, 0, error.strerror or str(error)))
            return
        self._jobs[pid] = launch.job
        self._pids[launch.job] = pid

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            job = self._jobs.pop(pid, None)
            if job is not None:
                del self._pids[job]
                self._line.send(LaunchEnded(job, status, ""))


def start(arguments: tuple[str, ...], environment: Mapping[str, str]) -> int:
    """Run a program as ourselves, in a session of its own; returns its pid. Raises OSError. As dbus-daemon
    does, and we do for other users, it is searched for nowhere."""
    return os.posix_spawn(
        arguments[0],
        arguments,
        environment,
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
            (os.POSIX_SPAWN_DUP2, 2, 1),  # ours is nowhere; by 2 goes what the bus has to say
        ],
        setsid=True,
        setsigmask=(),
        setsigdef=default_signals(),
    )


def start_as(user: str, arguments: tuple[str, ...], environment: Mapping[str, str]) -> int:
    """Run a program as `user` with that environment and nothing else; returns its pid.

    Raises OSError, also where there is no such user."""
    try:
        who = pwd.getpwnam(user)
    except KeyError:
        raise OSError(2, f"there is no user {user}") from None
    groups = os.getgrouplist(user, who.pw_gid)
    reader, writer = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        try:
            os.setsid()
            null = os.open("/dev/null", os.O_RDONLY)
            os.dup2(null, 0)
            os.dup2(2, 1)
            for number in default_signals():
                signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_SETMASK, ())
            os.umask(0o022)
            os.chdir("/")
            if who.pw_uid != os.geteuid():
                os.setgroups(groups)
                os.setresgid(who.pw_gid, who.pw_gid, who.pw_gid)
                os.setresuid(who.pw_uid, who.pw_uid, who.pw_uid)
            os.execve(arguments[0], arguments, dict(environment))
        except OSError as error:
            os.write(writer, (error.errno or 1).to_bytes(_ERRNO_BYTES, "little"))
        finally:
            os._exit(127)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        failure = pipe.read(_ERRNO_BYTES)
    if failure:
        os.waitpid(pid, 0)
        number = int.from_bytes(failure, "little")
        raise OSError(number, os.strerror(number))
    return pid


def default_signals() -> list[int]:
    """The signals whose handling a service must find as it is after boot."""
    fixed = (signal.SIGKILL, signal.SIGSTOP)
    return [number for number in signal.valid_signals() if number not in fixed]


def modified(directory: str) -> int:
    """When the directory last changed, ns; 0 if there is none."""
    try:
        return os.stat(directory).st_mtime_ns
    except (OSError, ValueError):  # no path at all
        return 0


def say(text: str) -> None:
    """One line for the admin."""
    print(f"kbusd launcher: {text}", file=sys.stderr)


def main() -> int:
    files, most = int(sys.argv[1]), resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, most))
    for fd in (BROKER, PROFILE):
        os.set_inheritable(fd, False)
    profile = profiles.decode(os.pread(PROFILE, os.fstat(PROFILE).st_size, 0))
    os.close(PROFILE)
    launcher = Launcher(adopt(BROKER), os.environ)
    try:
        for warning in apply.confine(profile):
            say(warning)
        launcher.run()
    except SandboxError as error:
        say(f"ended: {error}")
        return 1  # and so would the next
    except (LineError, OSError) as error:
        say(f"ended: {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
