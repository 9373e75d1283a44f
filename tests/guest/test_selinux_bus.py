"""The whole bus in its SELinux domains, enforced, under Debian's policy and with labels by path.

It is started as init starts it. Nothing that it does is refused; what each of its domains must not do, is.
"""

from __future__ import annotations

import ctypes
import errno
import json
import mmap
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from kbusd.client import kdbus
from kbusd.sandbox import selinux
from tests.bus import procs
from tests.bus.rawclient import BusError, RawClient

from . import domains
from .domains import Inhabitant, Refusal, Refusals, context, sockets_labelled

pytestmark = pytest.mark.guest("selinux")

SOCKET = "/run/dbus/system_bus_socket"
ADDRESS = f"unix:path={SOCKET}"
PID_FILE = Path("/run/dbus/pid")
LOG = Path("/run/kbusd-test-log")
SECOND = "unix:path=/run/kbusd/second"
OURS = (
    "kbusd_t",
    "kbusd_config_t",
    "kbusd_broker_t",
    "kbusd_launcher_t",
    "kbusd_zygote_t",
    "kbusd_worker_t",
)
OF_EXEC = frozenset(("noatsecure", "rlimitinh", "siginh"))  # asked for at each change of domain
TEST_SERVICE = "kbusd-test-service"
CONFIGURATION = """<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig><policy context="default">
  <allow own="*"/> <allow send_destination="*"/> <allow receive_sender="*"/>
</policy></busconfig>
"""
libc = ctypes.CDLL(None, use_errno=True)


def _init(log_file: Path = LOG, *options: str) -> None:
    """What init does: run it, and take what it says."""
    log = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    null = os.open("/dev/null", os.O_RDWR)
    reader, writer = os.pipe()
    if os.fork():
        os.close(writer)
        while said := os.read(reader, 4096):
            os.write(log, said)
        os.wait()
        return
    for to, fd in ((0, null), (1, null), (2, writer)):
        os.dup2(fd, to)
    os.closerange(3, 256)
    options = options or ("--system", "--nofork", "--cuse", "--kdbusfs", "/run/kbusd/fs")
    command = ["/usr/bin/kbusd", *options]
    os.execve(command[0], command, {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"})


class System:
    """The running bus."""

    def __init__(self) -> None:
        Path("/etc/dbus-1/system.d/test.conf").write_text(CONFIGURATION)
        os.makedirs("/run/kbusd/fs", exist_ok=True)
        subprocess.run(["restorecon", "-RF", "/etc/dbus-1", "/run/kbusd"], check=True)
        self.refusals = Refusals()
        self.noted: list[str] = []
        self.process = Inhabitant("init_t", _init)
        self.process.go()
        domains.become("unconfined_u:unconfined_r:unconfined_t:s0-s0:c0.c1023")
        domains.ENFORCE.write_text("1")
        try:
            procs.eventually(lambda: self.ready(), "the bus is ready", 50)
        except (AssertionError, OSError) as error:
            self.process.end()
            domains.ENFORCE.write_text("0")
            raise AssertionError(f"{error}; its log:\n{LOG.read_text()}") from None

    @property
    def pid(self) -> int:
        return int(PID_FILE.read_text())

    def note(self, but: str = "nothing") -> None:
        """What was refused to the bus, but not to those who tried it on purpose."""
        for each in self.refusals.take():
            if but in each.line:
                continue
            pid = int(each.line.split(" pid=")[1].split()[0])
            if each.who not in OURS or pid in Inhabitant.everyone or each.what <= OF_EXEC:
                continue
            if TEST_SERVICE not in each.line:  # that it does not start is looked at by a test
                self.noted.append(each.line)

    def ready(self) -> bool:
        fs = Path("/proc/self/mountinfo").read_text()
        return os.path.exists(SOCKET) and "fuse.kbusd" in fs and "kdbus" in os.listdir("/dev")

    def stop(self) -> None:
        pid = self.pid
        os.kill(pid, signal.SIGTERM)
        procs.eventually(lambda: not os.path.exists(f"/proc/{pid}"), "it ends")
        self.process.end()
        domains.ENFORCE.write_text("0")

    def connect(self, domain: str = "unconfined_t") -> RawClient:
        with sockets_labelled(context(domain)):
            return RawClient(ADDRESS)

    def processes(self) -> dict[str, list[int]]:
        """By domain."""
        found: dict[str, list[int]] = {}
        for pid in filter(str.isdigit, os.listdir("/proc")):
            try:
                label = Path("/proc", pid, "attr/current").read_text()
            except OSError:
                continue
            found.setdefault(label.split(":")[2] if ":" in label else "", []).append(int(pid))
        return found


@pytest.fixture(scope="module")
def system() -> Iterator[System]:
    started = System()
    try:
        yield started
    finally:
        started.stop()


@pytest.fixture(autouse=True)
def _noting(system: System) -> Iterator[None]:
    yield
    system.note()


def test_each_process_is_in_its_domain(system: System) -> None:
    client = system.connect()
    found = system.processes()
    for domain in OURS:
        if domain != "kbusd_config_t":  # it has read, and is gone
            assert found.get(domain), domain
    done = subprocess.run(
        ["kbusctl", "workers", "--pid", str(system.pid), "--json"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    rows = json.loads(done.stdout)
    differ = {text for row in rows for text in row["differences"] if "SELinux" in text}
    assert rows and not differ
    client.close()


def test_a_bus_that_can_not_be_in_its_domains_does_not_start(system: System) -> None:
    """Root starts it from a shell: what it then is, may not become what the others are."""
    command = ["/usr/bin/python3", "/usr/bin/kbusd", "--system", "--nofork", "--address", SECOND]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=40)
    assert done.returncode == 1
    assert "profile config-reader: [selinux] is required but can't be had here" in done.stderr


def test_a_worker_that_can_not_be_in_its_domain_serves_nobody(system: System) -> None:
    """An admin has named one that the zygote may not become."""
    override, log = Path("/etc/kbusd/profiles/worker.toml"), Path("/run/kbusd-second-log")
    override.parent.mkdir()
    why = 'why = "for the test"'
    override.write_text(f'extends = "worker"\n{why}\n[selinux]\n{why}\ntype = "kbusd_launcher_t"\n')
    subprocess.run(["restorecon", "-RF", "/etc/kbusd"], check=True)
    options = ("--system", "--nofork", "--nopidfile", "--address", SECOND)
    second = Inhabitant("init_t", lambda: _init(log, *options))
    try:
        second.go()
        assert second.wait() == 0  # the bus has ended
    finally:
        shutil.rmtree(override.parent)
    said = log.read_text()
    assert "profile worker: [selinux] is required but can't be had here: Permission denied" in said
    assert "a worker could not be confined" in said
    system.note(but="dyntransition")


def test_where_the_policy_has_no_such_domain_none_is_demanded(system: System) -> None:
    assert selinux.knows("kbusd_worker_t")
    assert not selinux.knows("no_such_t")


@contextmanager
def boolean(name: str) -> Iterator[None]:
    """It is true meanwhile."""
    for value in "10":
        Path("/sys/fs/selinux/booleans", name).write_text(value)
        Path("/sys/fs/selinux/commit_pending_bools").write_text("1")
        if value == "1":
            yield


def run(*command: str, domain: str = "unconfined_t") -> str:
    """What a program prints whose sockets have that label."""
    with sockets_labelled(context(domain)):
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=40)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_d_bus_programs_work(system: System) -> None:
    call = ("--system", "--print-reply", "--dest=org.freedesktop.DBus", "/")
    assert "org.freedesktop.DBus" in run("dbus-send", *call, "org.freedesktop.DBus.ListNames")
    tree = run("gdbus", "introspect", "--system", "--dest=org.freedesktop.DBus", "--object-path=/")
    assert "interface" in tree


def test_calls_signals_large_bodies_and_descriptors_pass(system: System) -> None:
    one, other = system.connect(), system.connect()
    other.request_name("org.example.Echo")
    other.add_match("interface='org.example.I'")
    for size in (10, 3_000_000):
        serial = one.send_call("org.example.Echo", "/", "org.example.I", "M", "ay", (b"x" * size,))
        call = other.wait_call("M")
        other.reply(call, "ay", (call.args[0],))
        assert len(one.wait_reply(serial).args[0]) == size
    one.signal("/", "org.example.I", "Changed", "s", ("text",))
    assert other.wait_signal("Changed").args == ["text"]
    with sockets_labelled(context("unconfined_t")):
        ours, theirs = socket.socketpair()
    one.signal("/", "org.example.I", "Socket", "h", (0,), to=other.name, fds=[theirs.fileno()])
    (passed,) = other.wait_signal("Socket").fds
    os.write(passed, b"hello")
    assert ours.recv(10) == b"hello"
    os.close(passed)
    one.close()
    other.close()


def test_a_service_is_started_if_the_admin_lets_it(system: System) -> None:
    """It has no domain of its own: a boolean says whether such ones run."""
    program = Path("/usr/bin", TEST_SERVICE)
    program.write_text(SERVICE)
    program.chmod(0o755)
    Path("/usr/share/dbus-1/system-services/org.example.Started.service").write_text(
        f"[D-BUS Service]\nName=org.example.Started\nExec={program}\nUser=root\n"
    )
    run("restorecon", "-RF", str(program), "/usr/share/dbus-1")
    client = system.connect()
    client.driver("ReloadConfig")
    client.add_match("type='signal'")
    with pytest.raises(BusError, match="Permission denied"):
        client.driver("StartServiceByName", "su", ("org.example.Started", 0))
    with boolean("kbusd_run_any_service"):
        assert client.driver("StartServiceByName", "su", ("org.example.Started", 0)) == [1]
    label = bytes(
        client.driver("GetConnectionSELinuxSecurityContext", "s", ("org.example.Started",))[0]
    )
    assert label.split(b":")[2] == b"initrc_t"
    (pid,) = client.driver("GetConnectionUnixProcessID", "s", ("org.example.Started",))
    os.kill(pid, signal.SIGKILL)
    client.close()


SERVICE = """#!/usr/bin/python3
import os, socket, sys
sock = socket.socket(socket.AF_UNIX)
sock.connect("/run/dbus/system_bus_socket")
sys.path.insert(0, "/usr/lib/python3/dist-packages")
from jeepney import DBusAddress, new_method_call
from jeepney.io.blocking import open_dbus_connection
bus = open_dbus_connection("SYSTEM")
driver = DBusAddress("/org/freedesktop/DBus", "org.freedesktop.DBus", "org.freedesktop.DBus")
bus.send_and_get_reply(new_method_call(driver, "RequestName", "su", ("org.example.Started", 0)))
while True:
    bus.receive()
"""


def _kdbus(path: str) -> Callable[[], None]:
    """A client that has two connections there, and passes a message, and a memfd, from one to the other."""

    def act() -> None:
        with kdbus.Connection(path) as one, kdbus.Connection(path) as other:
            one.send(other.id, b"hello")
            with other.receive() as got:
                if got.payload != b"hello":
                    raise OSError(errno.EBADMSG, "another message")

    return act


@pytest.mark.parametrize("path", ["/dev/kdbus/0-system/bus", "/run/kbusd/fs/0-system/bus"])
def test_kdbus_clients_work(system: System, path: str) -> None:
    assert domains.attempt("NetworkManager_t", _kdbus(path)) == errno.EACCES
    with boolean("kbusd_any_client_by_kdbus"):
        assert domains.attempt("NetworkManager_t", _kdbus(path)) == 0


# -- what is refused ---------------------------------------------------------------------------------


def opens(path: str, flags: int = os.O_RDONLY) -> Callable[[], object]:
    return lambda: os.open(path, flags)


def makes_socket() -> None:
    socket.socket(socket.AF_INET, socket.SOCK_STREAM)


def connects() -> None:
    socket.socket(socket.AF_UNIX).connect(SOCKET)


def executes() -> None:
    os.execv("/usr/bin/true", ["true"])


def becomes(domain: str) -> Callable[[], object]:
    return lambda: domains.become(context(domain))


def call(name: str, *arguments: int | bytes | None) -> Callable[[], object]:
    def act() -> None:
        if getattr(libc, name)(*arguments) < 0:
            raise OSError(ctypes.get_errno(), name)

    return act


def stops_enforcing() -> None:
    domains.ENFORCE.write_text("0")


def maps_code() -> None:
    fd = os.memfd_create("code")
    os.ftruncate(fd, 4096)
    mmap.mmap(fd, 4096, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_EXEC)


def on(domain: str, act: Callable[[int], object]) -> Callable[[], object]:
    """Something done to a process in that domain."""
    return lambda: act(TARGETS[domain])


TARGETS: dict[str, int] = {}
PTRACE_ATTACH = 16


def signals(pid: int) -> None:
    os.kill(pid, signal.SIGUSR2)


def traces(pid: int) -> None:
    call("ptrace", PTRACE_ATTACH, pid, None, None)()


def looks(pid: int) -> None:
    os.open(f"/proc/{pid}/mem", os.O_RDONLY)


# The act, and the AVC: permission, type and class of the target.
Act = tuple[str, Callable[[], object], str, str, str]
EVERYBODY: tuple[Act, ...] = (
    ("shadow", opens("/etc/shadow"), "read", "shadow_t", "file"),
    ("program", executes, "", "bin_t", ""),
    ("cuse", opens("/dev/cuse", os.O_RDWR), "read write", "kbus_cuse_device_t", "chr_file"),
    ("fuse", opens("/dev/fuse", os.O_RDWR), "read write", "fuse_device_t", "chr_file"),
    ("selinux", stops_enforcing, "", "security_t", ""),
    ("module", call("init_module", None, 0, b""), "sys_module", "", "capability"),
    ("mount", call("mount", b"none", b"/tmp", b"tmpfs", 0, None), "mounton", "tmp_t", "dir"),
    ("trace", on("kbusd_broker_t", traces), "ptrace", "kbusd_broker_t", "process"),
    ("signal", on("init_t", signals), "signal", "init_t", "process"),
    ("domain", becomes("unconfined_t"), "", "", "process"),
    ("code", maps_code, "execute write", "", "file"),
)
INSIDE: tuple[Act, ...] = (
    ("file", opens("/etc/passwd"), "read", "etc_t", "file"),
    ("network", makes_socket, "create", "", "tcp_socket"),
    ("bus", connects, "search", "system_dbusd_runtime_t", "dir"),
    ("node", opens("/dev/kdbus/0-system/bus", os.O_RDWR), "search", "kbus_device_t", "dir"),
    ("setuid", call("setresuid", 65534, 65534, 65534), "setuid", "", "capability"),
    ("memory", on("kbusd_t", looks), "", "kbusd_t", ""),
    ("its-sibling", on("kbusd_worker_t", traces), "ptrace", "kbusd_worker_t", "process"),
)
FORBIDDEN: dict[str, tuple[Act, ...]] = {
    "kbusd_worker_t": (
        *EVERYBODY,
        *INSIDE,
        ("signal-sibling", on("kbusd_worker_t", signals), "signal", "kbusd_worker_t", "process"),
        ("supervisor", on("kbusd_t", signals), "signal", "kbusd_t", "process"),
        ("setcon", becomes("kbusd_t"), "setcurrent", "kbusd_worker_t", "process"),
        ("ask-policy", opens("/sys/fs/selinux/access", os.O_RDWR), "search", "security_t", "dir"),
        ("devices", opens("/dev/mem"), "read", "memory_device_t", "chr_file"),
    ),
    "kbusd_broker_t": (
        *EVERYBODY,
        *INSIDE,
        ("setcon", becomes("kbusd_t"), "setcurrent", "kbusd_broker_t", "process"),
        ("zygote", on("kbusd_zygote_t", signals), "signal", "kbusd_zygote_t", "process"),
    ),
    "kbusd_zygote_t": (
        *EVERYBODY,
        *(act for act in INSIDE[:-1] if act[0] != "setuid"),  # its filter says to whom
        ("setcon", becomes("kbusd_broker_t"), "dyntransition", "kbusd_broker_t", "process"),
        ("worker", on("kbusd_worker_t", traces), "ptrace", "kbusd_worker_t", "process"),
    ),
    "kbusd_launcher_t": (
        *EVERYBODY,
        ("setcon", becomes("kbusd_t"), "setcurrent", "kbusd_launcher_t", "process"),
        ("memory", on("kbusd_t", looks), "", "kbusd_t", ""),
        ("worker", on("kbusd_worker_t", traces), "ptrace", "kbusd_worker_t", "process"),
        ("node", opens("/dev/kdbus/0-system/bus", os.O_RDWR), "search", "kbus_device_t", "dir"),
    ),
    "kbusd_config_t": (
        *EVERYBODY,
        ("setcon", becomes("kbusd_t"), "setcurrent", "kbusd_config_t", "process"),
        ("write", opens("/etc/passwd", os.O_WRONLY), "write", "etc_t", "file"),
        ("setuid", call("setresuid", 65534, 65534, 65534), "setuid", "", "capability"),
        ("node", opens("/dev/kdbus/0-system/bus", os.O_RDWR), "search", "kbus_device_t", "dir"),
    ),
    "kbusd_t": (
        EVERYBODY[0],
        *EVERYBODY[4:],
        ("write", opens("/etc/passwd", os.O_WRONLY), "write", "etc_t", "file"),
        ("setcon", becomes("init_t"), "dyntransition", "init_t", "process"),
        ("devices", opens("/dev/mem"), "read", "memory_device_t", "chr_file"),
    ),
}


def _is(each: Refusal, permission: str, target: str, kind: str, strict: bool) -> bool:
    """Whether it is the one expected. A strict domain does not come as far: it may not look into a directory
    on the way there, or make the socket."""
    if strict and (each.what == {"search"} or each.kind == "unix_stream_socket"):
        return True
    return (
        (not permission or bool(each.what & set(permission.split())))
        and each.target == (target or each.target)
        and each.kind == (kind or each.kind)
    )


def _heard(
    refusals: Refusals, who: str, wanted: Callable[[Refusal], bool]
) -> tuple[list[Refusal], bool]:
    """What was refused to that domain, and whether the one that is wanted is among it: the kernel tells a
    moment later."""
    found: list[Refusal] = []
    deadline = time.monotonic() + 5
    while not any(map(wanted, found)):
        found += [each for each in refusals.take() if each.who == who]
        if time.monotonic() > deadline:
            return found, False
        time.sleep(0.01)
    return found, True


@pytest.mark.parametrize("domain", FORBIDDEN)
def test_what_a_domain_must_not_do_is_refused(
    system: System, domain: str, request: pytest.FixtureRequest
) -> None:
    marker = request.node.get_closest_marker("guest")
    strict = marker.args[0] == "selinux-strict"
    TARGETS.update({each: pids[0] for each, pids in system.processes().items()})
    wrong = []
    with domains.permissive():
        # Of root, as those who act are: else another user's processes are out of reach by that.
        idle = {each: Inhabitant(each, signal.pause) for each in OURS}
        TARGETS.update({each: process.pid for each, process in idle.items()})
        acting = [(each, Inhabitant(domain, each[1])) for each in FORBIDDEN[domain]]
    for (name, _, permission, target, kind), process in acting:
        refusals = Refusals()
        process.go()
        status = process.wait()
        found, expected = _heard(
            refusals,
            domain,
            partial(_is, permission=permission, target=target, kind=kind, strict=strict),
        )
        refusals.close()
        system.note()
        if status not in (errno.EACCES, errno.EPERM) or not expected:
            wrong.append((name, status, [each[1:4] for each in found]))
    for process in idle.values():
        process.end()
    assert not wrong


# -- who may send to whom ----------------------------------------------------------------------------


def test_selinux_decides_who_sends_to_whom(system: System) -> None:
    """By Debian's policy: NetworkManager_t and avahi_t may talk, bluetooth_t and avahi_t may not."""
    avahi = system.connect("avahi_t")
    network = system.connect("NetworkManager_t")
    blue = system.connect("bluetooth_t")
    avahi.add_match("interface='org.example.I'")
    serial = network.send_call(avahi.name, "/", "org.example.I", "M")
    avahi.reply(avahi.wait_call("M"))
    network.wait_reply(serial)
    with pytest.raises(BusError) as caught:
        blue.call(avahi.name, "/", "org.example.I", "M")
    assert caught.value.name.endswith(".AccessDenied")
    said = "denied  { send_msg } for scontext=system_u:system_r:bluetooth_t:s0"
    assert f"{said} tcontext=system_u:system_r:avahi_t:s0 tclass=dbus" in caught.value.text
    procs.eventually(lambda: said in LOG.read_text(), "the log says so, too")
    blue.signal("/", "org.example.I", "Secret")
    network.signal("/", "org.example.I", "Public")
    assert avahi.wait_signal("Public")
    assert not [each for each in avahi.drain(network) if each.member == "Secret"]
    label = bytes(network.driver("GetConnectionSELinuxSecurityContext", "s", (blue.name,))[0])
    assert label == b"system_u:system_r:bluetooth_t:s0"
    with domains.permissive():
        procs.eventually(lambda: _may(blue, avahi), "in permissive mode it is let through")
    procs.eventually(lambda: _refused(blue, avahi), "enforced again")
    for client in (avahi, network, blue):
        client.close()


def test_domains_made_by_our_interfaces_may_what_these_say(system: System) -> None:
    """kbus_client, kbus_service and kbus_chat, by clients.te."""
    asker, server, stranger = map(system.connect, ("asker_t", "server_t", "stranger_t"))
    server.request_name("org.example.Server")
    with pytest.raises(BusError, match="is not allowed to own"):
        asker.request_name("org.example.Asker")
    serial = asker.send_call("org.example.Server", "/", "org.example.I", "M")
    server.reply(server.wait_call("M"))
    asker.wait_reply(serial)
    with pytest.raises(BusError) as caught:
        stranger.call("org.example.Server", "/", "org.example.I", "M")
    assert "denied  { send_msg }" in caught.value.text
    for client in (asker, server, stranger):
        client.close()


def _may(one: RawClient, other: RawClient) -> bool:
    serial = one.send_call(other.name, "/", "org.example.I", "Try")
    other.driver("GetId")  # catches up with the log
    try:
        one.driver("GetId")
        if _answer(one, serial):
            return False
        other.reply(other.wait_call("Try"))
        other.driver("GetId")  # whether the reply may pass has been judged
        one.driver("GetId")
    except BusError:
        return False
    return _answer(one, serial)


def _refused(one: RawClient, other: RawClient) -> bool:
    """Whether a call is. (Both ways change one after the other: a reply may be refused before it.)"""
    serial = one.send_call(other.name, "/", "org.example.I", "Try")
    one.driver("GetId")
    return _answer(one, serial)


def _answer(one: RawClient, serial: int) -> bool:
    """Whether there is one; takes it."""
    answers = [each for each in one.inbox if each.reply_serial == serial]
    for each in answers:
        one.inbox.remove(each)
    return bool(answers)


def test_who_is_no_client_can_not_even_connect(system: System) -> None:
    with pytest.raises(PermissionError):
        system.connect("ping_t")


# -- at last -----------------------------------------------------------------------------------------


def test_nothing_that_the_bus_does_was_refused(system: System) -> None:
    """While all the above ran; but for what was tried in its domains on purpose."""
    marker = Refusals()
    domains.attempt("ping_t", stops_enforcing)
    assert _heard(marker, "ping_t", lambda _: True)[1]  # so everything before it was told, too
    marker.close()
    system.note()
    assert not system.noted
