"""`kbusctl profile learn`: which system calls a kind of process makes, and what its profile says of them.

Starts a bus of its own in which that kind of process has, in place of its filter, one that asks us about
every call (seccomp_unotify(2)); we count it, look at its arguments, and let it go on. So nothing is
killed, and all that is missing is seen at once. All else of the profile stays in force. Needs root: the
descriptor at which a process asks is fetched from it (pidfd_getfd(2)), and it is not dumpable.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import errno
import fcntl
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from struct import Struct
from types import FrameType
from typing import Any

import msgspec
import pyseccomp

from kbusd.ctl.proposal import place
from kbusd.sandbox import above, inforce, profiles
from kbusd.sandbox.compile import Compiled, conditions, export_bpf
from kbusd.sandbox.errors import ProfileError
from kbusd.sandbox.judge import ALLOW, KILL, judge

_KINDS = ("worker", "kdbus-worker", "broker", "zygote")
_NOTIFICATION = Struct("=QIIiIQ6Q")  # struct seccomp_notif: id, pid, flags, nr, arch, ip, arguments
_ANSWER = Struct("=QqiI")  # struct seccomp_notif_resp: id, val, error, flags
_RECEIVE, _SEND = 0xC0502100, 0xC0182101  # SECCOMP_IOCTL_NOTIF_RECV, _SEND
_CONTINUE = 1
_LISTENER = "anon_inode:seccomp notify"
_PIDFD_GETFD = 438  # on every architecture
_SHOWN = 6  # values of an argument
_ADDRESSES = 1 << 16  # where they begin, as vm.mmap_min_addr has it
_LOOK_SECONDS = 0.01  # for new processes; until we have seen one it waits
_START_SECONDS = 60.0
_MARK = "KBUSCTL_LEARN"  # in the environment of all processes of the bus
_END_SECONDS = 10.0  # what has not ended by itself is killed then
# Run as the bus: its supervisor compiles all profiles, and so is the one to be told. It does not
# outlive us: prctl(PR_SET_PDEATHSIG).
_BUS = """
import signal, sys
from kbusd.sandbox import kernel
kernel.prctl(1, signal.SIGTERM)
from kbusd.sandbox import compile
from kbusd.ctl.learn import end_marked, listening
compile.compile_all = listening(compile.compile_all, sys.argv.pop(1))
from kbusd.main import main
try:
    status = main()
finally:
    end_marked()
sys.exit(status)
"""


def add_to(below: Any) -> None:
    """The command `profile learn`."""
    command = below.add_parser(
        "learn", help="run a bus, watch what its processes do, and propose what the profile lacks"
    )
    command.add_argument("profile", choices=_KINDS)
    command.add_argument("--kdbusfs", metavar="DIRECTORY", help="mount the bus there as well")
    command.add_argument(
        "traffic",
        nargs="*",
        metavar="COMMAND",
        help="what uses the bus (DBUS_SESSION_BUS_ADDRESS); by default some traffic of our own",
    )
    command.set_defaults(run=_run)


def listening(
    compile_all: Callable[[str], dict[str, Compiled]], kind: str
) -> Callable[[str], dict[str, Compiled]]:
    """compile_all, with the filter of `kind` asking, and none above it."""

    def changed(user: str) -> dict[str, Compiled]:
        compiled = compile_all(user)
        program = export_bpf(pyseccomp.SyscallFilter(pyseccomp.NOTIFY))
        compiled[kind] = msgspec.structs.replace(compiled[kind], bpf=program, listening=True)
        if kind.endswith("worker"):  # its children have its filter, too
            compiled["zygote"] = msgspec.structs.replace(compiled["zygote"], bpf=b"")
        return compiled

    return changed


class Ended(ProfileError):
    """The bus ended before its time."""


class Seen:
    """What one call was seen with. Of each argument some values; None among them: others too."""

    def __init__(self) -> None:
        self.count = 0
        self.said: Counter[tuple[str, str]] = Counter()  # by action and rule
        self.values: list[set[int | None]] = [set() for _ in range(6)]

    def add(self, arguments: tuple[int, ...], action: str, origin: str) -> None:
        self.count += 1
        self.said[action, origin] += 1
        for values, value in zip(self.values, arguments, strict=True):
            if value not in values:
                values.add(value if len(values) < _SHOWN else None)


class Learner:
    """Answers all processes of one kind, and keeps count."""

    def __init__(self, profile: profiles.Profile, supervisor: int) -> None:
        self.profile = profile
        self.supervisor = supervisor
        self.conditions = conditions()
        self.above = above.above(profile)
        self.kept_above: Counter[str] = Counter()  # calls that its filter would have killed
        self.seen: dict[str, Seen] = defaultdict(Seen)
        self.processes: set[int] = set()
        self.traffic: int | None = None  # its exit status
        self._poll = select.epoll()
        self._listeners: set[int] = set()

    def serve(self, seconds: float = _LOOK_SECONDS) -> None:
        """Look for new processes, and answer what is asked in this time."""
        self._adopt()
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            for fd, events in self._poll.poll(left):
                if events & select.EPOLLIN:
                    self._answer(fd)
                else:  # all who have this filter are gone
                    self._poll.unregister(fd)
                    self._listeners.discard(fd)
                    os.close(fd)

    def _adopt(self) -> None:
        for pid in inforce.family(self.supervisor):
            if pid in self.processes:
                continue
            with contextlib.suppress(OSError):
                if (number := _listener_of(pid)) is not None:
                    fd = _fetch(pid, number)
                    self.processes.add(pid)
                    self._listeners.add(fd)
                    self._poll.register(fd, select.EPOLLIN)

    def end(self, supervisor: subprocess.Popen[bytes]) -> None:
        """End the bus, and whatever of it does not end by itself: nobody is to wait for our answer then."""
        supervisor.terminate()
        deadline = time.monotonic() + _END_SECONDS
        while supervisor.poll() is None and time.monotonic() < deadline:
            self.serve()
        supervisor.kill()
        supervisor.wait()
        for fd in self._listeners:
            os.close(fd)
        self._listeners.clear()
        self._poll.close()
        end_marked()

    def _answer(self, fd: int) -> None:
        # A fork of a process has its listener as well: by the other one this may be answered already.
        still = select.poll()
        still.register(fd, select.POLLIN)
        if not still.poll(0):
            return
        asked = bytearray(_NOTIFICATION.size)
        try:
            fcntl.ioctl(fd, _RECEIVE, asked)
            number, _, _, call, _, _, *arguments = _NOTIFICATION.unpack(asked)
            self._record(call, tuple(arguments))
            fcntl.ioctl(fd, _SEND, _ANSWER.pack(number, 0, 0, _CONTINUE))
        except OSError as error:
            if error.errno != errno.ENOENT:  # it was killed meanwhile
                raise

    def _record(self, number: int, arguments: tuple[int, ...]) -> None:
        try:
            name = bytes(pyseccomp.resolve_syscall(pyseccomp.system_arch(), number)).decode()
        except ValueError:
            name = str(number)
        said = judge(self.profile, name, arguments, self.conditions)
        if self.above and judge(self.above, name, arguments, self.conditions).action == KILL:
            self.kept_above[name] += 1
        self.seen[name].add(arguments, said.action, said.rule.origin if said.rule else "")


def end_marked() -> None:
    """End what is left of the bus, for instance a worker that nobody had seen yet, and that now would wait for ever.
    Called by who has started it, and by the bus itself at its end, in case that the other is gone."""
    pid = os.getpid()
    mark = f"{_MARK}={os.environ.get(_MARK, pid)}".encode()
    for entry in filter(str.isdecimal, os.listdir("/proc")):
        if int(entry) == pid:
            continue
        with contextlib.suppress(OSError):
            pidfd = os.pidfd_open(int(entry))
            try:
                if mark in Path(f"/proc/{entry}/environ").read_bytes().split(b"\0"):
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            finally:
                os.close(pidfd)


def _listener_of(pid: int) -> int | None:
    """The number of the descriptor at which a process asks, if it does. Raises OSError."""
    for entry in os.listdir(f"/proc/{pid}/fd"):
        if os.readlink(f"/proc/{pid}/fd/{entry}") == _LISTENER:
            return int(entry)
    return None


def _fetch(pid: int, number: int) -> int:
    """A descriptor of another process. Raises OSError."""
    pidfd = os.pidfd_open(pid)
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        fd = int(libc.syscall(_PIDFD_GETFD, pidfd, number, 0))
        if fd < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return fd
    finally:
        os.close(pidfd)


def _run(options: argparse.Namespace) -> int:
    if os.geteuid() != 0:
        raise ProfileError("", "", "profile learn needs root")
    profile = profiles.load(options.profile)
    before = {each: signal.signal(each, _leave) for each in (signal.SIGTERM, signal.SIGHUP)}
    try:
        with tempfile.TemporaryDirectory(prefix="kbusctl-learn-") as folder:
            os.chmod(folder, 0o711)
            learner = _learn(profile, Path(folder) / "bus", options.traffic, options.kdbusfs)
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    print("\n".join(report(learner)))
    lacks = any(action == KILL for seen in learner.seen.values() for action, _ in seen.said)
    failed = lacks or learner.kept_above or learner.traffic or not learner.seen
    return 1 if failed else 0


def _leave(number: int, frame: FrameType | None) -> None:
    """Take along what we have started."""
    signal.signal(number, signal.SIG_IGN)
    raise SystemExit(128 + number)


def _learn(
    profile: profiles.Profile, path: Path, traffic: list[str], kdbusfs: str | None
) -> Learner:
    """Raises Ended, ProfileError, OSError."""
    address = f"unix:path={path}"
    bus = [sys.executable, "-c", _BUS, profile.name, "--session", "--nofork", "--nopidfile"]
    bus.append(f"--address={address}")
    if kdbusfs:
        bus.append(f"--kdbusfs={kdbusfs}")
    supervisor = subprocess.Popen(bus, env=os.environ | {_MARK: str(os.getpid())})
    learner = Learner(profile, supervisor.pid)
    try:
        # We don't look into the mount: that might be to wait for our own answer.
        where = os.path.abspath(kdbusfs) if kdbusfs else ""
        _until(learner, lambda: path.exists() and (not where or _mounted(where)), supervisor)
        environment = os.environ | {
            "DBUS_SESSION_BUS_ADDRESS": address,
            "DBUS_SYSTEM_BUS_ADDRESS": address,
        }
        nodes = [f"{kdbusfs}/{os.geteuid()}-session/bus"] if kdbusfs else []
        command = traffic or [sys.executable, "-m", "kbusd.ctl.traffic", str(path), *nodes]
        users = subprocess.Popen(command, env=environment)
        try:
            while users.poll() is None and supervisor.poll() is None:
                learner.serve()
            learner.traffic = users.poll()
            if supervisor.poll() is not None:
                raise Ended("", "", "the bus ended before its traffic did; see the lines above")
        finally:
            if users.poll() is None:
                for pid in inforce.family(users.pid):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            users.wait()
    finally:
        learner.end(supervisor)
    return learner


def _mounted(where: str) -> bool:
    """proc(5), mountinfo: blanks are escaped there."""
    with open("/proc/self/mountinfo", encoding="unicode_escape") as table:
        return any(line.split(" ")[4] == where for line in table)


def _until(
    learner: Learner, there: Callable[[], bool], supervisor: subprocess.Popen[bytes]
) -> None:
    """Answer until it is so. Raises Ended."""
    deadline = time.monotonic() + _START_SECONDS
    while not there():
        learner.serve()
        if supervisor.poll() is not None or time.monotonic() > deadline:
            raise Ended("", "", "the bus did not start; see the lines above")


def report(learner: Learner) -> Iterator[str]:
    """What was seen, what the profile lacks, what it has for nothing."""
    seen, profile = learner.seen, learner.profile
    total = sum(each.count for each in seen.values())
    yield f"{profile.name}: {len(learner.processes)} processes made {total} system calls of {len(seen)} kinds"
    for call, each in sorted(seen.items(), key=lambda item: -item[1].count):
        for (action, origin), count in each.said.most_common():
            yield f"  {count:8} {call:20} {action:8} {origin or 'no rule'}"
            shown = range(6) if action == KILL else _argued(profile, call)
            yield from (f"{'':11}{line}" for line in _values(each, shown))
    if learner.traffic:
        yield f"The traffic failed (status {learner.traffic}): there may be more to see."
    if not seen:
        yield "Nothing was seen: the traffic used no process of this kind."
        return
    missing = [call for call, each in seen.items() if any(a == KILL for a, _ in each.said)]
    yield ""
    yield from _proposal(profile, seen, sorted(missing), bool(learner.traffic))
    if learner.above and learner.kept_above:
        yield f"Not in profile {learner.above.name} either, whose filter is above; a call must pass both. The same"
        yield f"rules for {profiles.OVERRIDES / learner.above.name}.toml: {' '.join(sorted(learner.kept_above))}"
    unused = list(_unused(profile, seen, learner.conditions))
    if unused:
        yield "Calls that rules name and that this traffic did not make:"
        yield from (f"  {line}" for line in unused)


def _argued(profile: profiles.Profile, call: str) -> list[int]:
    """The arguments that rules about this call look at."""
    rules = profile.seccomp.rules if profile.seccomp else ()
    tests = (argument for rule in rules if call in rule.calls for argument in rule.arguments)
    return sorted({argument.index for argument in tests})


def _values(seen: Seen, indices: Iterable[int]) -> Iterator[str]:
    for index in indices:
        known = sorted(value for value in seen.values[index] if value is not None)
        if known != [0]:
            more = ", ..." if None in seen.values[index] else ""
            yield f"argument {index}: {', '.join(f'{value:#x}' for value in known)}{more}"


def _proposal(
    profile: profiles.Profile, seen: dict[str, Seen], missing: list[str], failed: bool
) -> Iterator[str]:
    if not missing:
        what = "was seen" if failed else "was needed"
        yield f"The profile has all that {what} ({profile.files[0]})."
        return
    if unnamed := [call for call in missing if call.isdecimal()]:
        yield f"Newer than this libseccomp, so no profile can name them: calls {', '.join(unnamed)}"
    if not (missing := [call for call in missing if call not in unnamed]):
        return
    file, head = place(profile)
    yield f"Not in the profile; for {file}"
    yield from (f"  {line}" for line in head)
    for call in missing:
        count = sum(n for (action, _), n in seen[call].said.items() if action == KILL)
        yield "  [[seccomp.rules]]"
        yield f'  why = "seen {count} times; say who calls it, and why that is harmless"'
        yield f'  calls = ["{call}"]'
        if narrower := list(_conditions(seen[call])):
            yield "  # As it was seen; leave out what is a descriptor, a length, or behind the last argument:"
            yield f"  # arguments = [{', '.join(narrower)}]"
        if _argued(profile, call):
            yield "  # other rules name it with other arguments: add to those, or copy them here"


def _conditions(seen: Seen) -> Iterator[str]:
    """What its arguments have in common that can be no addresses."""
    for index, values in enumerate(seen.values):
        known = [value for value in values if value is not None]
        if len(known) == len(values) and any(known) and all(each < _ADDRESSES for each in known):
            kind = "equals" if len(known) == 1 else "one-of"
            listed = ", ".join(f'"{each:#x}"' for each in sorted(known))
            yield f"{{ index = {index}, {kind} = [{listed}] }}"


def _unused(
    profile: profiles.Profile, seen: dict[str, Seen], here: frozenset[str]
) -> Iterator[str]:
    for rule in profile.seccomp.rules if profile.seccomp else ():
        used = {
            call
            for call, each in seen.items()
            if any(origin == rule.origin for _, origin in each.said)
        }
        left = [call for call in rule.calls if call not in used]
        if left and rule.when in here and (rule.errno or ALLOW) == ALLOW:
            yield f"{' '.join(left)}   {rule.origin}"
