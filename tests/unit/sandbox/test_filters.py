"""Each filter in a real process: what it allows works, all else ends the process.

Raw system calls, so that no libc wrapper hides what the filter sees.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import socket
import sys
import termios
import threading
from collections.abc import Callable

import pyseccomp  # type: ignore[import-untyped]
import pytest

from kbusd.sandbox import profiles
from kbusd.sandbox.compile import compile_profile
from tests.unit.sandbox.child import run

FILTERED = [n for n in profiles.names() if profiles.load(n).seccomp.enabled]  # type: ignore[union-attr]
COMPILED = {name: compile_profile(profiles.load(name)) for name in profiles.names()}
_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def named(call: int) -> bool:
    try:
        pyseccomp.resolve_syscall(pyseccomp.system_arch(), call)
    except ValueError:
        return False
    return True


# uretprobe and uprobe of x86_64: the kernel lets no filter see them, and kills whoever calls them
# from anywhere but a trampoline that it made itself.
UNSEEN = {335, 336} if os.uname().machine == "x86_64" else set()
# All numbers that libseccomp has a name for on this architecture, and some that nobody has.
TABLE = sorted(n for n in range(1024) if named(n))
BEYOND = (1024, 0xFFFF, 0x7FFFFFFF)
HIGH = 0x1_0000_0000  # a bit that the kernel ignores in an int argument


def number(call: str) -> int:
    return int(pyseccomp.resolve_syscall(pyseccomp.system_arch(), call))


def raw(call: str | int, *arguments: int) -> int:
    """The result, or the negated errno."""
    which = number(call) if isinstance(call, str) else call
    result = _libc.syscall(ctypes.c_long(which), *(ctypes.c_ulong(a) for a in arguments))
    return -ctypes.get_errno() if result < 0 else int(result)


def calls_of(name: str) -> set[str]:
    """What the profile's rules name, and this architecture has."""
    seccomp = profiles.load(name).seccomp
    assert seccomp is not None
    return {
        call
        for rule in seccomp.rules
        if rule.when != "selinux"
        for call in rule.calls
        if number(call) >= 0
    }


@pytest.mark.parametrize("name", FILTERED)
def test_every_call_that_no_rule_names_ends_the_process(name: str) -> None:
    named = {number(call) for call in calls_of(name)}
    assert named <= set(TABLE)
    survivors = []
    for call in [*range(TABLE[-1] + 32), *BEYOND]:
        if call in named | UNSEEN:
            continue
        if not run(lambda call=call: raw(call, 0, 0, 0, 0, 0, 0), COMPILED[name]).by_filter:  # type: ignore[misc]
            survivors.append(call)
    assert survivors == []


@pytest.mark.parametrize("name", FILTERED)
def test_a_call_by_another_architecture_s_number_ends_the_process(name: str) -> None:
    if os.uname().machine != "x86_64":
        pytest.skip("x32 calls exist on x86_64 only")
    assert run(lambda: raw(0x40000000 | number("read"), 0, 0, 0), COMPILED[name]).by_filter


def memfd() -> int:
    fd = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 8192)
    return fd


def message_round_trip() -> bytes:
    """What a worker does all day, with what Python and libc make of it."""
    a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    return _traffic(a, b)


def _traffic(a: socket.socket, b: socket.socket) -> bytes:
    fd = memfd()
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    socket.send_fds(a, [b"with a ring"], [fd])
    data, fds, _, _ = socket.recv_fds(b, 100, 4)
    with mmap.mmap(fds[0], 8192) as ring:
        ring[:5] = b"frame"
        found = ring[:5]
    os.close(fd)
    os.close(fds[0])
    return data + b" " + found


@pytest.mark.parametrize("ordinary", [False, True])
def test_a_worker_moves_messages_descriptors_and_memory(ordinary: bool) -> None:
    a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with a, b:
        outcome = run(
            lambda: _traffic(a, b),
            COMPILED["worker"],
            before=COMPILED["zygote"],
            ordinary=ordinary,
        )
    assert outcome.said == "b'with a ring frame'"
    assert outcome.status == 0


def test_a_worker_allocates_much_and_gives_it_back() -> None:
    def work() -> int:
        blocks = [bytes(size) for size in range(1, 300_000, 1_000)]
        big = bytearray(64 << 20)
        big.extend(bytes(1 << 20))
        return len(blocks) + len(big)

    assert run(work, COMPILED["worker"]).status == 0


def test_a_worker_that_opens_a_file_or_imports_is_told_no_and_lives() -> None:
    def work() -> list[str]:
        said = []
        for attempt in (
            lambda: os.open("/etc/passwd", os.O_RDONLY),
            lambda: os.stat("/etc/passwd"),
            lambda: os.listdir("/"),
            lambda: os.access("/", os.R_OK) or os.readlink("/proc/self/exe"),
            lambda: __import__("this"),
        ):
            try:
                attempt()
                said.append("done")
            except (OSError, ImportError) as error:
                said.append(type(error).__name__)
        return said

    sys.modules.pop("this", None)
    assert run(work, COMPILED["worker"]).said == str(
        ["PermissionError"] * 4 + ["ModuleNotFoundError"]
    )


def test_a_worker_that_exits_the_ordinary_way_exits_with_its_status() -> None:
    # Py_FinalizeEx sets signal handlers back and unmaps; the filter must let it.
    code = (
        "import sys; from kbusd.sandbox import apply, compile, profiles;"
        "apply.confine(compile.compile_profile(profiles.load('worker'))); sys.exit(7)"
    )
    assert os.spawnv(os.P_WAIT, sys.executable, [sys.executable, "-c", code]) == 7


FORBIDDEN: dict[str, Callable[[], object]] = {
    "a socket": lambda: socket.socket(),
    "a process": os.fork,
    "another program": lambda: os.execv("/bin/true", ["true"]),
    "a signal": lambda: os.kill(os.getppid(), 0),
    "a signal to oneself": lambda: os.kill(os.getpid(), 0),
    "a thread": lambda: threading.Thread(target=lambda: None).start(),
    "ptrace": lambda: raw("ptrace", 16, os.getpid()),
    "another's memory": lambda: raw("process_vm_readv", 1, 0, 0, 0, 0, 0),
    "another's descriptor": lambda: raw("pidfd_getfd", 0, 0, 0),
    "executable memory": lambda: mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_EXEC),
    "making memory executable": lambda: raw("mprotect", 0, 4096, mmap.PROT_EXEC),
    "a listening socket": lambda: raw("listen", 0, 1),
    "connecting": lambda: raw("connect", 0, 0, 0),
    "an inotify": lambda: raw("inotify_init1", 0),
    "io_uring": lambda: raw("io_uring_setup", 1, 0),
    "bpf": lambda: raw("bpf", 0, 0, 0),
    "a user namespace": lambda: raw("unshare", 0x10000000),
    "a higher limit": lambda: raw("prlimit64", 0, 7, 0, 0),
    "another filter": lambda: raw("seccomp", 0, 0, 0),
    "prctl": lambda: raw("prctl", 38, 1, 0, 0, 0),
}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_a_worker_that_wants_more_is_killed(what: str) -> None:
    outcome = run(FORBIDDEN[what], COMPILED["worker"], before=COMPILED["zygote"])
    assert outcome.by_filter, outcome


# call, arguments that are allowed, arguments that are not. F_SETFL and FIONBIO matter most: they
# change an open file that peers share.
ALTERED = [
    ("fcntl", (0, fcntl.F_ADD_SEALS, 0), (0, fcntl.F_SETFL, os.O_NONBLOCK)),
    ("fcntl", (0, fcntl.F_GET_SEALS), (0, fcntl.F_SETOWN, 1)),
    ("fcntl", (0, fcntl.F_DUPFD_CLOEXEC, 100), (0, fcntl.F_DUPFD, 100)),
    ("fcntl", (0, fcntl.F_GET_SEALS), (0, fcntl.F_NOTIFY, 1)),
    ("fcntl", (0, fcntl.F_GET_SEALS), (0, fcntl.F_GET_SEALS | HIGH)),
    ("mmap", (0, 4096, 3, 0x22, HIGH - 1, 0), (0, 4096, 7, 0x22, HIGH - 1, 0)),
    ("mmap", (0, 4096, 0, 0x22, HIGH - 1, 0), (0, 4096, 4, 0x22, HIGH - 1, 0)),
    ("mprotect", (0, 0, 1), (0, 0, 5)),
    ("newfstatat", (HIGH - 1, 0, 0, 0x1000), (HIGH - 1, 0, 0, 0x1100)),
]


@pytest.mark.parametrize(("call", "allowed", "altered"), ALTERED)
def test_a_call_with_altered_arguments_is_killed(
    call: str, allowed: tuple[int, ...], altered: tuple[int, ...]
) -> None:
    if number(call) < 0:
        pytest.skip(f"no {call} on this architecture")
    assert not run(lambda: raw(call, *allowed), COMPILED["worker"]).killed
    assert run(lambda: raw(call, *altered), COMPILED["worker"]).by_filter


@pytest.mark.parametrize("name", ["worker", "broker"])
def test_nobody_can_change_a_doorbell_that_others_ring(name: str) -> None:
    reader, writer = os.pipe2(os.O_NONBLOCK)

    def work() -> str:
        try:
            fcntl.ioctl(writer, termios.FIONBIO, b"\0\0\0\0")
        except OSError as error:
            return f"errno {error.errno}"
        return "changed"

    try:
        assert run(work, COMPILED[name]).said == "errno 25"
        assert not os.get_blocking(writer)
    finally:
        os.close(reader)
        os.close(writer)


def test_the_broker_makes_side_sockets_but_none_to_the_network() -> None:
    assert run(message_round_trip, COMPILED["broker"]).status == 0
    inet = lambda: raw("socketpair", socket.AF_INET, 1, 0, 0)
    assert run(inet, COMPILED["broker"]).by_filter
    assert run(lambda: socket.socket(), COMPILED["broker"]).by_filter
    assert run(os.fork, COMPILED["broker"]).by_filter


def test_the_zygote_forks_and_reaps_but_runs_no_program_and_no_thread() -> None:
    def work() -> int:
        pid = os.fork()
        if pid == 0:
            os._exit(5)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    assert run(work, COMPILED["zygote"]).said == "5"
    execute = lambda: os.execv("/bin/true", ["true"])
    assert run(execute, COMPILED["zygote"]).by_filter
    spawn = lambda: os.posix_spawn("/bin/true", ["true"], {})
    assert run(spawn, COMPILED["zygote"]).by_filter
    assert run(threading.Thread(target=int).start, COMPILED["zygote"]).by_filter
    namespace = lambda: raw("clone", 0x10000000 | 17, 0, 0, 0, 0)
    assert run(namespace, COMPILED["zygote"]).by_filter
    assert run(lambda: os.kill(os.getppid(), 0), COMPILED["zygote"]).by_filter


def test_the_config_reader_reads_but_writes_nothing(tmp_path: os.PathLike[str]) -> None:
    def work() -> list[object]:
        with open("/etc/passwd") as file:
            found: list[object] = ["root" in file.read(), len(os.listdir("/etc")) > 0]
        for flags in (os.O_WRONLY, os.O_RDWR, os.O_WRONLY | os.O_CREAT):
            try:
                os.open(os.path.join(tmp_path, "new"), flags)
                found.append("opened")
            except OSError as error:
                found.append(error.errno)
        return found

    assert run(work, COMPILED["config-reader"]).said == "[True, True, 13, 13, 13]"
    assert run(lambda: socket.socket(), COMPILED["config-reader"]).by_filter
    assert run(os.fork, COMPILED["config-reader"]).by_filter


def test_the_config_reader_looks_up_users() -> None:
    import pwd

    def work() -> str:
        return pwd.getpwnam("root").pw_dir

    assert run(work, COMPILED["config-reader"]).said == pwd.getpwnam("root").pw_dir
