"""Takes the calling process into its sandbox. Privileged where it drops privileges, by nature.

Order, and why: close descriptors (what is not ours must not even be held) -> name -> namespaces ->
bounding set, groups, uid, capabilities (each needs a privilege that a later one gives up) -> not
dumpable (a change of uid resets it) -> rlimits -> setcon (so that the domain needs none of the rights of the
above; it writes under /proc, which the following forbid) -> no_new_privs -> Landlock (needs it) -> seccomp
last, as it forbids most of the above. For processes of one thread; those that it is to have later start between the
last two, as all but seccomp is a thread's own. Imports nothing at the time of use, and opens nothing
but what Landlock leaves reachable and /proc/thread-self/attr/current.
"""

from __future__ import annotations

import os
import resource
import stat
from collections.abc import Callable, Iterable
from functools import partial

from kbusd.sandbox import kernel
from kbusd.sandbox.compiled import Compiled, Limit
from kbusd.sandbox.errors import Unavailable

_SETPCAP = 1 << 8
_SETUID = 1 << 7
_SYS_ADMIN = 1 << 21
_ATTRIBUTE = "/proc/thread-self/attr/current"


def confine(
    compiled: Compiled,
    *,
    keep_fds: Iterable[int] | None = None,
    start_threads: Callable[[], object] | None = None,
) -> list[str]:
    """Confine the calling process by `compiled`; returns warnings (what could not be had).

    `keep_fds`: close all descriptors but these (None: close none). Root changes user and groups;
    anybody else, root of a user namespace without others too, stays who he is and only gives up
    what he has. `start_threads`: called when nothing but the filter, and the limit on processes, is missing,
    and they hold for what it starts. May be called again in a forked
    child with a tighter profile. Raises Unavailable (a SandboxError) if a required feature can't be had: the
    process is then half confined and must exit."""
    warnings: list[str] = []

    def step(feature: str, action: Callable[[], object], required: bool | None = None) -> None:
        try:
            action()
        except OSError as error:
            if feature in compiled.required if required is None else required:
                raise Unavailable(compiled.name, feature, _reason(error)) from error
            warnings.append(f"profile {compiled.name}: no {feature}: {_reason(error)}")

    if keep_fds is not None:
        close_all_but(keep_fds)
    kernel.set_name(compiled.title)
    capable = kernel.effective()
    root = os.geteuid() == 0 and not ALONE
    if compiled.unshare and (capable & _SYS_ADMIN or "namespaces" in compiled.required):
        step("namespaces", lambda: kernel.unshare(compiled.unshare))
    if compiled.bounding is not None and (capable & _SETPCAP or root):
        step("capabilities", lambda: kernel.drop_bounding(compiled.bounding or 0))
    if root:
        warnings += (f"profile {compiled.name}: {note}" for note in compiled.notes)
        _change_user(compiled, step)
    elif compiled.apart is not None and capable & _SETUID:
        # Live processes differ in their numbers; most so differ in this.
        first, count = compiled.apart
        own = first + os.getpid() % count
        step("user", lambda: os.setresuid(own, own, own))
    if compiled.capabilities is not None:
        _settle_capabilities(compiled, capable, root, step)
    if compiled.not_dumpable:
        step("not-dumpable", lambda: kernel.prctl(kernel.PR_SET_DUMPABLE, 0))
    for limit in compiled.limits:
        if start_threads is None or limit.resource != resource.RLIMIT_NPROC:
            step(f"limits.{limit.name}", partial(_limit, limit), limit.required)
    if compiled.selinux:
        step("selinux", lambda: _setcon(compiled.selinux))
    if compiled.no_new_privileges:
        step("no-new-privileges", lambda: kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1))
    if compiled.landlock is not None:
        step("landlock", lambda: _landlock(compiled))
    if start_threads is not None:
        step("threads", start_threads, True)
        for limit in compiled.limits:
            if limit.resource == resource.RLIMIT_NPROC:
                step(f"limits.{limit.name}", partial(_limit, limit), limit.required)
    if compiled.bpf:
        load = _listen if compiled.listening else kernel.load_filter
        step("seccomp", lambda: load(compiled.bpf, start_threads is not None))
    return warnings


def _listen(bpf: bytes, threads: bool) -> None:
    """The filter asks, from now on; so this close(2) waits till somebody has fetched the descriptor at which it
    does, and answers. We must not keep it: who holds it himself waits for ever once that somebody is gone."""
    os.close(kernel.load_listening_filter(bpf, threads))


def _alone() -> bool:
    """Whether we are in a user namespace that an ordinary user made for himself: it has nobody whom
    to become, and groups can't be changed (user_namespaces(7))."""
    try:
        with open("/proc/self/setgroups") as groups, open("/proc/self/uid_map") as users:
            return groups.read() == "deny\n" and users.read().split()[2:] == ["1"]
    except OSError:
        return False


ALONE = _alone()  # now, as nothing can be opened later


def close_all_but(keep: Iterable[int]) -> None:
    """Close every descriptor that is not in `keep` (close_range(2) where there is one)."""
    low = 0
    for fd in sorted(set(keep)):
        if low < fd:  # closerange(0, 0) of Python 3.11 closes everything
            os.closerange(low, fd)
        low = fd + 1
    os.closerange(low, 0x7FFFFFFF)


def _change_user(compiled: Compiled, step: Callable[[str, Callable[[], object]], None]) -> None:
    if compiled.groups is not None:
        groups = list(compiled.groups)
        step("groups", lambda: os.setgroups(groups))
    if compiled.gid is not None and compiled.uid is not None:
        uid, gid = compiled.uid, compiled.gid
        step("user", lambda: os.setresgid(gid, gid, gid))
        # What is kept is settled at once by capset; until then securebits need CAP_SETPCAP.
        step("capabilities", lambda: kernel.prctl(kernel.PR_SET_KEEPCAPS, 1))
        step("user", lambda: os.setresuid(uid, uid, uid))


def _settle_capabilities(
    compiled: Compiled,
    capable: int,
    root: bool,
    step: Callable[[str, Callable[[], object]], None],
) -> None:
    keep = (compiled.capabilities or 0) & capable
    step(
        "capabilities", lambda: kernel.prctl(kernel.PR_CAP_AMBIENT, kernel.PR_CAP_AMBIENT_CLEAR_ALL)
    )
    if compiled.securebits and (capable & _SETPCAP or root):

        def lock() -> None:
            kernel.set_capabilities(keep | _SETPCAP)
            kernel.prctl(kernel.PR_SET_SECUREBITS, compiled.securebits)

        step("securebits", lock)
    step("capabilities", lambda: kernel.set_capabilities(keep))


def _limit(limit: Limit) -> None:
    """At most its value; what is lower already stays, as only root could raise it."""
    hard = resource.getrlimit(limit.resource)[1]
    if limit.value < 0 or limit.value > hard != resource.RLIM_INFINITY:
        resource.setrlimit(limit.resource, (hard, hard))
    else:
        resource.setrlimit(limit.resource, (limit.value, limit.value))


def _landlock(compiled: Compiled) -> None:
    opened: list[tuple[int, bool, bool]] = []
    try:
        for entry in compiled.landlock or ():
            try:
                fd = os.open(entry.path, os.O_PATH | os.O_CLOEXEC)
            except FileNotFoundError:
                continue
            opened.append((fd, entry.write, stat.S_ISDIR(os.fstat(fd).st_mode)))
        kernel.landlock(opened)
    finally:
        for fd, _, _ in opened:
            os.close(fd)


def _setcon(kind: str) -> None:
    """setcon(3): our own context with the type replaced; written in one piece, at the beginning."""
    fd = os.open(_ATTRIBUTE, os.O_RDWR | os.O_CLOEXEC)
    try:
        parts = os.pread(fd, 4096, 0).rstrip(b"\0\n").split(b":", 3)
        if len(parts) < 3:
            raise OSError(0, f"the kernel gives no SELinux context but {parts!r}")
        parts[2] = kind.encode()
        os.write(fd, b":".join(parts))
    finally:
        os.close(fd)


def _reason(error: OSError) -> str:
    return f"{error.strerror or error}" + (f" (errno {error.errno})" if error.errno else "")
