"""The command itself: options, addresses, files it writes, signals, and how it refuses to start."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from . import procs
from .daemon import (
    STOP_SECONDS,
    Bus,
    clean_environment,
    configuration,
    daemon_command,
    is_reference,
    need_a_tree_for_all,
    read_line,
)
from .rawclient import DRIVER, BusError, Disconnected, RawClient, socket_address

NOBODY = 65534
ASK = f"{DRIVER}.GetConnectionUnixUser"
ADDRESS = re.compile(r"unix:(path|abstract)=[^,;]+,guid=[0-9a-f]{32}")


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory with a short path, for sockets; its processes' files must be gone by the end."""
    with tempfile.TemporaryDirectory(prefix="kbt-", dir="/tmp") as name:
        yield Path(name)


@pytest.fixture
def config(place: Path) -> Path:
    path = place / "bus.conf"
    path.write_text(configuration(f"unix:path={place}/bus"))
    return path


def start(*options: str, pipes: int = 0, **env: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [*daemon_command(), *options],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=clean_environment(**env),
        bufsize=0,
        pass_fds=[pipes] if pipes else [],
    )


def end(process: subprocess.Popen[bytes], number: int = signal.SIGTERM) -> str:
    """Stop a daemon that runs in the foreground; returns what it had logged."""
    tree = procs.descendants(process.pid)
    process.send_signal(number)
    try:
        _, errors = process.communicate(timeout=STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    assert process.returncode in (0, -number)
    procs.eventually(lambda: not any(procs.alive(p) for p in tree), "its processes end")
    return errors.decode(errors="replace")


def refused(*options: str, **env: str) -> str:
    """Run a daemon that must not start; returns what it said."""
    done = subprocess.run(
        [*daemon_command(), *options],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        env=clean_environment(**env),
        timeout=20,
        check=False,
    )
    assert done.returncode == 1
    assert done.stdout == b""
    return done.stderr.decode()


def works(address: str) -> RawClient:
    """Connect and call; the caller closes the client."""
    client = RawClient(address)
    assert client.driver("NameHasOwner", "s", (client.name,)) == [True]
    return client


# -- options -----------------------------------------------------------------------------


def test_address_line(config: Path, place: Path) -> None:
    process = start(f"--config-file={config}", "--nofork", "--print-address=1")
    assert process.stdout
    line = read_line(process.stdout)
    assert ADDRESS.fullmatch(line)
    assert line.startswith(f"unix:path={place}/bus,")
    works(line).close()
    end(process)
    assert not (place / "bus").exists()


def test_print_address_without_number_means_standard_output(config: Path) -> None:
    process = start(f"--config-file={config}", "--nofork", "--print-address")
    assert process.stdout
    assert ADDRESS.fullmatch(read_line(process.stdout))
    end(process)


def test_options_with_a_space(config: Path) -> None:
    process = start(
        "--config-file", str(config), "--nofork", "--print-address", "1", "--print-pid", "1"
    )
    assert process.stdout
    lines = []
    while len(lines) < 2:
        lines += read_line(process.stdout).split("\n")
    assert ADDRESS.fullmatch(lines[0])
    assert lines[1] == str(process.pid)
    end(process)


def test_descriptor_is_closed_after_the_address(config: Path) -> None:
    """A starter that reads to the end of file goes on."""
    reader, writer = os.pipe()
    process = start(
        f"--config-file={config}", "--nofork", f"--print-address={writer}", pipes=writer
    )
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        assert ADDRESS.fullmatch(pipe.read().decode().strip())
    assert process.poll() is None
    end(process)


def test_print_pid_is_the_pid_of_the_process_started(config: Path) -> None:
    process = start(f"--config-file={config}", "--nofork", "--print-pid=1")
    assert process.stdout
    assert read_line(process.stdout) == str(process.pid)
    procs.eventually(lambda: (config.parent / "bus").exists(), "the socket is there")
    end(process)


def test_of_contradicting_options_the_last_wins(config: Path) -> None:
    process = start(
        f"--config-file={config}",
        "--fork",
        "--nofork",
        "--syslog",
        "--nosyslog",
        "--print-address=",
    )
    assert process.stdout
    works(read_line(process.stdout)).close()
    assert process.poll() is None
    end(process)


@pytest.mark.kbusd_only
def test_too_few_descriptors_are_named(config: Path) -> None:
    done = subprocess.run(
        ["prlimit", "--nofile=64", *daemon_command(), f"--config-file={config}", "--nofork"],
        capture_output=True,
        timeout=20,
        check=False,
        env=clean_environment(),
    )
    assert done.returncode == 1
    assert b"too few descriptors: limit nofile is under 128" in done.stderr


def test_session(place: Path) -> None:
    process = start("--session", "--nofork", "--print-address=1", TMPDIR=str(place))
    assert process.stdout
    client = works(read_line(process.stdout))
    assert client.driver("RequestName", "su", ("test.daemon.Session", 0)) == [1]
    client.close()
    end(process)


def test_services_of_this_session_alone(place: Path) -> None:
    process = start(
        "--session",
        "--nofork",
        "--print-address=1",
        TMPDIR=str(place),
        XDG_RUNTIME_DIR=str(place),
    )
    assert process.stdout
    client = works(read_line(process.stdout))
    directory = place / "dbus-1/services"
    assert directory.stat().st_mode & 0o777 == 0o700
    text = "[D-BUS Service]\nName=test.Late\nExec=/bin/false\n"
    (directory / "test.Late.service").write_text(text)
    client.driver("ReloadConfig")
    assert "test.Late" in client.driver("ListActivatableNames")[0]
    client.close()
    end(process)


def test_address_overrides_the_configuration(config: Path, place: Path) -> None:
    process = start(
        f"--config-file={config}",
        "--nofork",
        "--print-address=1",
        f"--address=unix:path={place}/other",
    )
    assert process.stdout
    line = read_line(process.stdout)
    assert line.startswith(f"unix:path={place}/other,guid=")
    works(line).close()
    assert not (place / "bus").exists()
    end(process)


def test_version() -> None:
    done = subprocess.run([*daemon_command(), "--version"], capture_output=True, check=True)
    assert re.search(rb"\d+\.\d+", done.stdout)


def test_introspect() -> None:
    done = subprocess.run([*daemon_command(), "--introspect"], capture_output=True, check=True)
    assert b'<interface name="org.freedesktop.DBus">' in done.stdout


@pytest.mark.parametrize(
    "options",
    [
        ["--no-such-option"],
        ["--session", "--system"],
        ["--session", "--config-file=/dev/null"],
        [],
        ["--config-file"],
        ["--print-address=x", "--session"],
        ["--address=unix:path=/tmp/kbusd-a", "--address=unix:path=/tmp/kbusd-b", "--session"],
        ["--config-file=/dev/null", "--config-file=/dev/zero"],
        ["--session", "--print-address=1", "--print-address=1"],
    ],
    ids=[
        "unknown",
        "two buses",
        "bus and file",
        "none",
        "missing value",
        "bad number",
        "two addresses",
        "two files",
        "printed twice",
    ],
)
def test_wrong_options_are_refused(options: list[str]) -> None:
    assert refused(*options) != ""


# -- configuration that is refused -------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "",
        "<busconfig>",
        "not XML",
        "<busconfig></busconfig>",
        "<busconfig><listen>unix:path=/tmp/kbusd-no-such-bus</listen><nonsense/></busconfig>",
        "<busconfig><listen>nonsense:x=y</listen></busconfig>",
        "<busconfig><listen>unix:</listen></busconfig>",
        "<busconfig><listen>unix:path=/no/such/directory/bus</listen></busconfig>",
        "<busconfig><listen>unix:path=/tmp/kbusd-no-such-bus</listen><policy><allow/></policy></busconfig>",
        '<busconfig><listen>unix:path=/tmp/kbusd-no-such-bus</listen><limit name="nonsense">1</limit></busconfig>',
        "<busconfig><listen>unix:path=/tmp/kbusd-no-such-bus</listen><include>/no/such/file</include></busconfig>",
    ],
    ids=[
        "empty",
        "not closed",
        "not XML",
        "no listen address",
        "unknown element",
        "unknown transport",
        "address without key",
        "socket cannot be made",
        "policy without context",
        "unknown limit",
        "missing include",
    ],
)
def test_broken_configuration_is_refused(place: Path, text: str) -> None:
    path = place / "broken.conf"
    path.write_text(text.replace("{place}", str(place)))
    message = refused(f"--config-file={path}", "--nofork")
    assert message.strip() != ""
    if not is_reference():
        assert str(path) in message
    assert not Path("/tmp/kbusd-no-such-bus").exists()


def test_missing_configuration_file_is_named(place: Path) -> None:
    assert f"{place}/none.conf" in refused(f"--config-file={place}/none.conf", "--nofork")


@pytest.mark.kbusd_only
def test_broken_configuration_names_file_and_line(place: Path) -> None:
    path = place / "broken.conf"
    path.write_text(
        "<busconfig>\n  <listen>unix:path=/tmp/kbusd-no-such-bus</listen>\n  <nonsense/>\n</busconfig>"
    )
    message = refused(f"--config-file={path}", "--nofork")
    assert f"{path}:3" in message
    assert "nonsense" in message


@pytest.mark.kbusd_only
@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("tcp:host=localhost", "transport 'tcp' is not supported"),
        ("unix:path=/no/such/directory/bus", "No such file or directory"),
        ("systemd:", "no sockets were passed"),
    ],
)
def test_whoever_gave_a_bad_address_is_named(place: Path, address: str, reason: str) -> None:
    path = place / "bus.conf"
    path.write_text(f"<busconfig>\n\n<listen>{address}</listen></busconfig>")
    message = refused(f"--config-file={path}", "--nofork")
    assert f"{path}:3: " in message
    assert reason in message
    path.write_text(configuration(f"unix:path={place}/bus"))
    message = refused(f"--config-file={path}", "--nofork", f"--address={address}")
    assert "--address: " in message
    assert reason in message
    assert not (place / "bus").exists()


@pytest.mark.kbusd_only
def test_a_socket_that_somebody_answers_on_is_left_alone(config: Path, place: Path) -> None:
    process = start(f"--config-file={config}", "--nofork", "--print-address=1")
    assert process.stdout
    address = read_line(process.stdout)
    assert "another bus answers on this socket" in refused(f"--config-file={config}", "--nofork")
    works(address).close()
    end(process)


def test_a_file_in_the_place_of_the_socket_is_left_alone(config: Path, place: Path) -> None:
    (place / "bus").write_text("not a socket")
    assert f"{place}/bus" in refused(f"--config-file={config}", "--nofork")
    assert (place / "bus").read_text() == "not a socket"


@pytest.mark.kbusd_only
def test_descriptors_of_the_starter_are_not_handed_on(config: Path) -> None:
    reader, writer = os.pipe()
    process = start(f"--config-file={config}", "--nofork", "--print-address=1", pipes=writer)
    os.close(writer)
    assert process.stdout
    read_line(process.stdout)
    link = os.readlink(f"/proc/self/fd/{reader}")
    for child in procs.descendants(process.pid):
        assert link not in procs.descriptors(child.pid)
    end(process)
    os.close(reader)


# -- addresses ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("listen", "expected"),
    [
        ("unix:path={place}/a", r"unix:path={place}/a,"),
        ("unix:path={place}/with%20space", r"unix:path={place}/with%20space,"),
        ("unix:abstract=kbusd-test-{pid}", r"unix:abstract=kbusd-test-{pid},"),
        ("unix:dir={place}", r"unix:path={place}/dbus-[A-Za-z0-9_-]+,"),
        ("unix:tmpdir={place}", r"unix:(path|abstract)={place}/dbus-[A-Za-z0-9_-]+,"),
        ("unix:runtime=yes", r"unix:path={place}/bus,"),
    ],
)
def test_listen_addresses(place: Path, listen: str, expected: str) -> None:
    values = {"place": str(place), "pid": str(os.getpid())}
    path = place / "bus.conf"
    path.write_text(configuration(listen.format(**values)))
    process = start(
        f"--config-file={path}", "--nofork", "--print-address=1", XDG_RUNTIME_DIR=str(place)
    )
    assert process.stdout
    line = read_line(process.stdout)
    assert re.match(expected.format(**values), line)
    works(line.replace("%20", " ")).close()
    end(process)
    assert [one.name for one in place.iterdir()] == ["bus.conf"]


def test_a_bus_listened_on_all_addresses_of_a_list_not_on_the_first_that_works(place: Path) -> None:
    path = place / "bus.conf"
    path.write_text(
        configuration(f"unix:path={place}/no/x;unix:path={place}/a;unix:path={place}/b")
    )
    process = start(f"--config-file={path}", "--nofork", "--print-address=1")
    assert process.stdout
    address = read_line(process.stdout)
    assert [socket_address(one) for one in address.split(";")] == [f"{place}/a"]
    works(address).close()
    end(process)


def test_two_listen_addresses(place: Path) -> None:
    path = place / "bus.conf"
    listen = f"unix:path={place}/a</listen><listen>unix:path={place}/b"
    path.write_text(configuration(listen))
    process = start(f"--config-file={path}", "--nofork", "--print-address=1")
    assert process.stdout
    addresses = read_line(process.stdout).split(";")
    # Clients try them in this order: as dbus-daemon says them, the last first.
    assert [socket_address(one) for one in addresses] == [f"{place}/b", f"{place}/a"]
    a, b = works(addresses[0]), works(addresses[1])
    a.signal("/", "test.I", "S", to=b.name)
    assert b.read().member == "S"
    a.close()
    b.close()
    end(process)


def test_an_address_that_stands_twice_was_another_bus(place: Path) -> None:
    path = place / "bus.conf"
    path.write_text(configuration(f"unix:path={place}/a,</listen>\n<listen>unix:path={place}/a"))
    process = start(f"--config-file={path}", "--nofork", "--print-address=1")
    assert process.stdout
    works(read_line(process.stdout).split(";")[0]).close()
    end(process)


def test_socket_permissions(config: Path, place: Path) -> None:
    """Everybody may reach the socket; who may stay is policy's business."""
    process = start(f"--config-file={config}", "--nofork", "--print-address=1")
    assert process.stdout
    read_line(process.stdout)
    assert (place / "bus").stat().st_mode & 0o222 == 0o222
    end(process)


def test_socket_left_by_a_crashed_bus_is_replaced(config: Path, place: Path) -> None:
    process = start(f"--config-file={config}", "--nofork", "--print-address=1")
    assert process.stdout
    read_line(process.stdout)
    tree = procs.descendants(process.pid)
    process.kill()
    process.communicate()
    procs.eventually(lambda: not any(procs.alive(p) for p in tree), "its processes end with it")
    assert (place / "bus").exists()
    process = start(f"--config-file={config}", "--nofork", "--print-address=1")
    assert process.stdout
    works(read_line(process.stdout)).close()
    end(process)


# -- background, pid file ----------------------------------------------------------------


@pytest.fixture
def system_config(place: Path) -> Path:
    """A bus as an init script starts it: forks, writes its pid."""
    path = place / "system.conf"
    extra = f"<fork/><pidfile>{place}/pid</pidfile>"
    path.write_text(
        configuration(f"unix:path={place}/bus", type_="system", extra=extra).replace(
            "<allow own", '<allow user="*"/><allow own'
        )
    )
    return path


def wait_gone(pid: int) -> None:
    """Wait for a background process, which as our orphan is ours to reap."""
    process = procs.look(pid)
    if process is not None:
        procs.eventually(lambda: not procs.alive(process), f"process {pid} ends", STOP_SECONDS)


def test_fork_with_pid_file(system_config: Path, place: Path) -> None:
    done = subprocess.run(
        [*daemon_command(), f"--config-file={system_config}", "--print-pid", "--print-address"],
        capture_output=True,
        env=clean_environment(),
        timeout=20,
        check=True,
    )
    # The parent has ended: by now the socket is live and the pid file there.
    pid = int((place / "pid").read_text())
    tree = procs.descendants(pid)
    try:
        address, printed = sorted(done.stdout.decode().split(), key=str.isdigit)
        assert int(printed) == pid
        client = works(address)
        assert client.driver("GetConnectionUnixProcessID", "s", (DRIVER,)) == [pid]
        client.close()
        assert os.getsid(pid) != os.getsid(0)
        # A second one is refused as long as the pid file is there.
        message = refused(f"--config-file={system_config}")
        assert f"{place}/pid" in message
        works(address).close()
    finally:
        os.kill(pid, signal.SIGTERM)
        wait_gone(pid)
        for process in tree:
            wait_gone(process.pid)
    assert not (place / "pid").exists()
    assert not (place / "bus").exists()


def test_an_orderly_end_failed_as_the_pid_file_could_not_be_removed(
    system_config: Path, place: Path
) -> None:
    """As on a file system that is read-only by then."""
    process = start(f"--config-file={system_config}", "--nofork", "--print-address=1")
    assert process.stdout and read_line(process.stdout)
    (place / "pid").unlink()
    (place / "pid").mkdir()
    assert "Traceback" not in end(process)
    assert process.returncode == 0


def test_fork_with_standard_descriptors_closed(system_config: Path, place: Path) -> None:
    """As an init may start it: 0, 1 and 2 are closed, and nothing of ours lands in a socket."""
    script = f"exec {' '.join(daemon_command())} --config-file={system_config} <&- >&- 2>&-"
    subprocess.run(["sh", "-c", script], env=clean_environment(), timeout=20, check=True)
    pid = int((place / "pid").read_text())
    try:
        works(f"unix:path={place}/bus").close()
        for number in range(3):
            assert os.readlink(f"/proc/{pid}/fd/{number}") == "/dev/null"
    finally:
        os.kill(pid, signal.SIGTERM)
        wait_gone(pid)


def test_nofork_and_nopidfile_override_the_configuration(system_config: Path, place: Path) -> None:
    process = start(
        f"--config-file={system_config}", "--nofork", "--nopidfile", "--print-address=1"
    )
    assert process.stdout
    works(read_line(process.stdout)).close()
    assert not (place / "pid").exists()
    assert process.poll() is None
    end(process)


# -- systemd's ways ----------------------------------------------------------------------


def test_socket_activation_and_readiness(place: Path) -> None:
    """LISTEN_FDS gives the listening socket, NOTIFY_SOCKET hears READY=1."""
    config = place / "bus.conf"
    config.write_text(configuration(f"unix:path={place}/unused"))
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{place}/activated")
    listener.listen()
    notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    notify.bind(f"{place}/notify")
    notify.settimeout(20)
    command = [
        *daemon_command(),
        f"--config-file={config}",
        "--address=systemd:",
        "--nofork",
        "--nopidfile",
    ]
    starter = (
        "import os,sys\n"
        f"os.dup2({listener.fileno()}, 3)\n"
        "os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS='1')\n"
        "os.execvp(sys.argv[1], sys.argv[1:])\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-S", "-c", starter, *command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=clean_environment(NOTIFY_SOCKET=f"{place}/notify"),
        pass_fds=[listener.fileno()],
    )
    # A client may connect before the bus is up: the socket is there.
    client = RawClient(f"unix:path={place}/activated")
    seen = b""
    while b"READY=1" not in seen:
        seen += notify.recv(4096) + b"\n"
    works(f"unix:path={place}/activated").close()
    client.close()
    end(process)
    assert (place / "activated").exists(), "the socket belongs to who made it"
    assert not (place / "unused").exists()
    listener.close()
    notify.close()


def test_configuration_from_a_descriptor(place: Path) -> None:
    fd = os.memfd_create("config")
    os.write(fd, configuration(f"unix:path={place}/bus").encode())
    os.lseek(fd, 0, os.SEEK_SET)
    process = start(f"--config-file=/proc/self/fd/{fd}", "--nofork", "--print-address=1", pipes=fd)
    os.close(fd)
    assert process.stdout
    works(read_line(process.stdout)).close()
    end(process)


# -- an ordinary user ---------------------------------------------------------------------


def test_as_an_ordinary_user(place: Path, config: Path) -> None:
    """A session bus needs no privilege."""
    if os.geteuid() != 0:
        pytest.skip("needs root to become somebody else; without it every test here is this one")
    os.chown(place, NOBODY, NOBODY)
    become = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--"]
    need_a_tree_for_all(become)
    process = subprocess.Popen(
        [*become, *daemon_command(), f"--config-file={config}", "--nofork", "--print-address=1"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=clean_environment(HOME=str(place)),
        bufsize=0,
    )
    assert process.stdout
    address = read_line(process.stdout)
    owners = {Path(f"/proc/{p.pid}").stat().st_uid for p in procs.descendants(process.pid)}
    assert owners <= {NOBODY}
    done = subprocess.run(
        [
            *become,
            "dbus-send",
            f"--bus={address}",
            "--print-reply",
            f"--dest={DRIVER}",
            "/",
            ASK,
            f"string:{DRIVER}",
        ],
        capture_output=True,
        timeout=20,
        check=True,
    )
    assert f"uint32 {NOBODY}".encode() in done.stdout
    end(process)


# -- signals -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.kbusd_only)]
)
def test_signals_end_it_cleanly(start_bus, number: int) -> None:  # type: ignore[no-untyped-def]
    bus: Bus = start_bus()
    clients = [RawClient(bus.address) for _ in range(3)]
    bus.stop(number)
    for client in clients:
        client.expect_disconnect()
        client.close()


@pytest.mark.kbusd_only
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_told_to_end_while_it_starts(config: Path, number: int) -> None:
    """It was a failure, of workers that did not get ready."""
    process = start(f"--config-file={config}", "--nofork")
    socket = config.with_name("bus")  # is there after the configuration was read
    procs.eventually(lambda: socket.exists() and procs.descendants(process.pid), "it starts")
    assert "not started" not in end(process, number)
    assert process.returncode == 0
    assert not socket.exists()


@pytest.mark.kbusd_only
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_told_to_end_before_anything_was_started(system_config: Path, number: int) -> None:
    """Just after it had begun to listen: socket and pid file were left."""
    kill = f"kbusd.main._make_runtime_directory = lambda _: os.kill(os.getpid(), {int(number)})"
    script = f"import os, kbusd.main\n{kill}\nraise SystemExit(kbusd.main.main())"
    done = subprocess.run(
        [sys.executable, "-c", script, f"--config-file={system_config}", "--nofork"],
        capture_output=True,
        env=clean_environment(),
        timeout=20,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert os.listdir(system_config.parent) == [system_config.name]


@pytest.mark.kbusd_only
def test_a_bus_that_can_not_listen_everywhere_leaves_no_socket(place: Path) -> None:
    path = place / "two.conf"
    two = f"unix:path={place}/one</listen><listen>unix:path={place}/none/two"
    path.write_text(configuration(two))
    assert "none/two" in refused(f"--config-file={path}")
    assert os.listdir(place) == ["two.conf"]


@pytest.mark.kbusd_only
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_to_the_whole_group(config: Path, number: int) -> None:
    """Control-C at a terminal, or a service manager, reaches every process of the bus at once."""
    process = subprocess.Popen(
        [*daemon_command(), f"--config-file={config}", "--nofork", "--print-address=1"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=clean_environment(),
        process_group=0,
        bufsize=0,
    )
    assert process.stdout
    client = works(read_line(process.stdout))
    tree = procs.descendants(process.pid)
    os.killpg(process.pid, signal.SIGHUP)  # a terminal that goes; it reloads
    assert client.driver("ReloadConfig") == []
    os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=STOP_SECONDS)
    assert process.returncode == 0
    assert b"Traceback" not in errors and b"killed" not in errors
    client.expect_disconnect()
    client.close()
    procs.eventually(lambda: not any(procs.alive(p) for p in tree), "its processes end")
    assert not config.with_name("bus").exists()


def test_sighup_reloads(start_bus) -> None:  # type: ignore[no-untyped-def]
    bus: Bus = start_bus()
    client = bus.connect()
    client.add_match("member='ActivatableServicesChanged'")
    text = "[D-BUS Service]\nName=test.daemon.New\nExec=/bin/false\n"
    (bus.services / "test.daemon.New.service").write_text(text)
    bus.process.send_signal(signal.SIGHUP)
    client.wait_signal("ActivatableServicesChanged")
    assert "test.daemon.New" in client.driver("ListActivatableNames")[0]


def test_closing_standard_input_does_not_end_it(start_bus) -> None:  # type: ignore[no-untyped-def]
    bus: Bus = start_bus()
    works(bus.address).close()
    assert bus.is_alive()


def test_connection_refused_while_nobody_listens(place: Path) -> None:
    with pytest.raises((FileNotFoundError, Disconnected, BusError)):
        RawClient(f"unix:path={place}/bus")


def test_starts_quickly(config: Path) -> None:
    """Programs wait for the bus when they start: it is up well within a few seconds."""
    begin = time.monotonic()
    process = start(f"--config-file={config}", "--nofork", "--print-address=1")
    assert process.stdout
    works(read_line(process.stdout)).close()
    elapsed = time.monotonic() - begin
    end(process)
    assert elapsed < 5.0
