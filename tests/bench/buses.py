"""Starts and stops the buses that are compared: the same configuration, the same kind of socket.

kbusd and dbus-daemon read the same file: one listen address, a policy that allows everything,
limits that the benchmark does not touch. dbus-broker gets the equal of it from `dbus_broker`.
Two more are kbusd again: with kdbusfs, which costs its workers some memory, and without confinement, so
that what that costs is seen. All run in the foreground as children of the harness; a bus ends with `stop()`, whatever it did.
"""

from __future__ import annotations

import os
import select
import subprocess
import tempfile
import time
import tomllib
from collections.abc import Sequence
from pathlib import Path

from dbus_broker import DbusBroker

NAMES = ("kbusd", "dbus-daemon", "dbus-broker", "kdbusfs", "unconfined")
PRIVILEGED = ("kdbusfs", "unconfined")  # root's, as they mount something
START_SECONDS = 20
# kbusd reads an admin's profiles from /etc: this /etc is its own.
_OTHER_ETC = """mount -t overlay -o "lowerdir=/etc,upperdir=$0/upper,workdir=$0/work" overlay /etc
exec "$@"
"""
_OFF = ("user", "groups", "capabilities", "securebits", "no-new-privileges", "not-dumpable")
_OFF += ("namespaces", "landlock", "selinux", "seccomp")

_CONFIGURATION = """\
<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <type>session</type>
  <listen>unix:path={socket}</listen>
  <auth>EXTERNAL</auth>
  <policy context="default">
    <allow send_destination="*" eavesdrop="true"/>
    <allow eavesdrop="true"/>
    <allow own="*"/>
  </policy>
  <limit name="max_incoming_bytes">1000000000</limit>
  <limit name="max_outgoing_bytes">1000000000</limit>
  <limit name="max_message_size">134217728</limit>
  <limit name="max_completed_connections">100000</limit>
  <limit name="max_incomplete_connections">10000</limit>
  <limit name="max_connections_per_user">100000</limit>
  <limit name="max_names_per_connection">50000</limit>
  <limit name="max_match_rules_per_connection">50000</limit>
  <limit name="max_replies_per_connection">50000</limit>
</busconfig>
"""


def available() -> list[str]:
    """Those that can be had here: mounting is for root."""
    mounts = os.geteuid() == 0 and os.access("/dev/fuse", os.R_OK | os.W_OK)
    return [name for name in NAMES if mounts or name not in PRIVILEGED]


class NotStarted(Exception):
    """A bus did not come up; the text says which command and why."""


class Bus:
    """A running bus. `pid` is the root of its process tree, `socket` where clients connect, `node`
    its file in a kdbusfs, if it has one."""

    def __init__(self, name: str, directory: Path, kbusd: Sequence[str]) -> None:
        """Raises `NotStarted`. `directory` is for its socket, configuration and log."""
        self.name = name
        self.socket = directory / f"{name}.sock"
        self._log = directory / f"{name}.log"
        self.socket.unlink(missing_ok=True)
        self.node: Path | None = None
        self._broker: DbusBroker | None = None
        if name == "dbus-broker":
            try:
                self._broker = DbusBroker(self.socket)
            except (OSError, RuntimeError) as error:
                raise NotStarted(f"dbus-broker: {error}") from error
            self._process = self._broker.process
        else:
            configuration = directory / f"{name}.conf"
            configuration.write_text(_CONFIGURATION.format(socket=self.socket))
            command = ["dbus-daemon"] if name == "dbus-daemon" else list(kbusd)
            if name == "unconfined":
                command = [*_with_profiles_off(directory), *command]
            if name == "kdbusfs":
                mount = directory / "kdbusfs"
                mount.mkdir(exist_ok=True)
                command.append(f"--kdbusfs={mount}")
                self.node = mount / f"{os.geteuid()}-session" / "bus"
            self._start([*command, f"--config-file={configuration}"])
        self.pid = self._process.pid

    def _start(self, command: list[str]) -> None:
        with self._log.open("ab") as log:
            try:
                self._process = subprocess.Popen(
                    [*command, "--nofork", "--print-address=1"],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=log,
                )
            except OSError as error:
                raise NotStarted(f"{' '.join(command)}: {error}") from error
        assert self._process.stdout is not None
        line = _line_within(self._process.stdout.fileno(), START_SECONDS)
        if not line.startswith("unix:"):
            self.stop()
            raise NotStarted(
                f"{' '.join(command)}: printed {line!r} instead of an address; its log ends:\n"
                + self.log_tail()
            )

    def log_tail(self) -> str:
        """The last lines that the bus wrote to stderr."""
        if not self._log.exists():
            return ""
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-15:])

    def alive(self) -> bool:
        return self._process.poll() is None

    def stop(self) -> None:
        """SIGTERM, then SIGKILL if that does not end it in ten seconds; the socket is removed."""
        if self._broker is not None:
            self._broker.stop()
        else:
            self._process.terminate()
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            if self._process.stdout is not None:
                self._process.stdout.close()
        self.socket.unlink(missing_ok=True)


def _with_profiles_off(directory: Path) -> list[str]:
    """What to put in front of kbusd's command, so that no profile of its confines anything."""
    etc = Path(tempfile.mkdtemp(prefix="etc-", dir=directory))
    (etc / "work").mkdir()
    profiles = etc / "upper" / "kbusd" / "profiles"
    profiles.mkdir(parents=True)
    off = "".join(f'[{key}]\nwhy = "To be compared with"\nenabled = false\n' for key in _OFF)
    for shipped in Path(__file__).parents[2].glob("profiles/*.toml"):
        title = tomllib.loads(shipped.read_text()).get("title", shipped.stem)
        head = f'title = "{title}"\nwhy = "To be compared with"\n'
        (profiles / shipped.name).write_text(head + off)
    return ["unshare", "--mount", "sh", "-ec", _OTHER_ETC, str(etc)]


def _line_within(fd: int, seconds: float) -> str:
    """The first line that arrives, or what there is of it at the end of file or time."""
    data = b""
    deadline = time.monotonic() + seconds
    while not data.endswith(b"\n"):
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([fd], [], [], left)[0]:
            break
        piece = os.read(fd, 1)
        if not piece:
            break
        data += piece
    return data.decode(errors="replace")


def version(name: str, kbusd: Sequence[str]) -> str:
    """What the bus says with --version, "" if it can't be run."""
    command = list(kbusd) if name == "kbusd" else [name]
    try:
        result = subprocess.run(
            [*command, "--version"],
            check=False,
            capture_output=True,
            text=True,
            timeout=START_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    lines = result.stdout.splitlines()
    return lines[0].strip() if lines and not result.returncode else ""
