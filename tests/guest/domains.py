"""Processes in a given SELinux domain, and what the kernel said it refused.

A process is put into its domain while nothing is enforced, as no policy lets a test do that; what it then
does, it does under enforcement. It has no way to tell but its exit status: what it inherits is not its.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar, NamedTuple

ENFORCE = Path("/sys/fs/selinux/enforce")
_REFUSAL = re.compile(
    r"avc: +denied +\{ (?P<what>[^}]*) \}.* scontext=(?P<who>\S+) tcontext=(?P<target>\S+)"
    r" tclass=(?P<kind>\w+)"
)
_GO = signal.SIGUSR1


class Refusal(NamedTuple):
    """One denial: who did what, to a target of which class."""

    who: str
    what: frozenset[str]
    target: str
    kind: str
    line: str


class Refusals:
    """What the kernel refuses from now on."""

    def __init__(self) -> None:
        self._log = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        os.lseek(self._log, 0, os.SEEK_END)

    def take(self) -> Iterator[Refusal]:
        """Those since the last time."""
        while True:
            try:
                line = os.read(self._log, 8192).decode(errors="replace")
            except BlockingIOError:
                return
            except BrokenPipeError as error:
                raise AssertionError("refusals were lost; take them more often") from error
            if found := _REFUSAL.search(line):
                who, what, target, kind = found.group("who", "what", "target", "kind")
                yield Refusal(_type(who), frozenset(what.split()), _type(target), kind, line)

    def close(self) -> None:
        os.close(self._log)


def _type(context: str) -> str:
    return context.split(":")[2]


def context(domain: str) -> str:
    return f"system_u:system_r:{domain}:s0"


@contextmanager
def permissive() -> Iterator[None]:
    """Nothing is enforced meanwhile."""
    before = ENFORCE.read_text()
    ENFORCE.write_text("0")
    try:
        yield
    finally:
        ENFORCE.write_text(before)


def become(label: str) -> None:
    """Change our own label; by the policy it is not for a test to choose."""
    _attribute("current", label)


def _attribute(name: str, value: str) -> None:
    fd = os.open(f"/proc/thread-self/attr/{name}", os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, value.encode())
    finally:
        os.close(fd)


class Inhabitant:
    """A process in `domain` that waits, and then does `act`."""

    everyone: ClassVar[set[int]] = set()
    """The processes of all of these that there were."""

    def __init__(self, domain: str, act: Callable[[], object]) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, [_GO])
        reader, writer = os.pipe()
        with permissive():
            self.pid = os.fork()
            if self.pid == 0:
                self._live(domain, act, writer)
            self.everyone.add(self.pid)
            os.close(writer)
            os.read(reader, 1)
            os.close(reader)

    @staticmethod
    def _live(domain: str, act: Callable[[], object], ready: int) -> None:
        status = 255
        try:
            become(context(domain))
            os.write(ready, b"1")
            os.close(ready)
            signal.sigwait([_GO])
            act()
            status = 0
        except OSError as error:
            status = error.errno or 254
        finally:
            os._exit(status)

    def go(self) -> None:
        os.kill(self.pid, _GO)

    def wait(self) -> int:
        """The errno with which the act failed; 0: it did not."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def end(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        self.wait()


def attempt(domain: str, act: Callable[[], object]) -> int:
    """Have it done in that domain; the errno."""
    process = Inhabitant(domain, act)
    process.go()
    return process.wait()


@contextmanager
def sockets_labelled(label: str) -> Iterator[None]:
    """Sockets that are made meanwhile have this label: so a client can be anybody's."""
    _attribute("sockcreate", label)
    try:
        yield
    finally:
        _attribute("sockcreate", "\n")
