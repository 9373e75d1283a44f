"""A container of LXC's with the host's /usr and nothing else of it, unprivileged: its root is the host's
100000. For root.

Its first process sleeps; `run` and `start` have others beside it. All of it is gone after `stop`, or when
the test run ends, however.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.bus import procs
from tests.bus.daemon import read_line

TREE = Path(__file__).parents[2]
PACKAGING = TREE / "packaging" / "lxc"
BIN = Path(sys.executable).parent
FIRST, COUNT = 100_000, 65_536
SECONDS = 30.0
IN_GUEST = "KBUSD_GUEST" in os.environ

# Without newuidmap, which LXC prefers and which asks /etc/subuid, root writes the maps by himself.
LXC = {"PATH": "/nowhere"}
INSIDE = {"PATH": f"{BIN}:/usr/sbin:/usr/bin", "HOME": "/root"}
DEBIANS = "common", "userns"  # what its template includes for an unprivileged container
_CONTROLLERS = "devices", "freezer", "pids"
_USERS = (
    "root:x:0:0::/root:/bin/sh\nmessagebus:x:100:107::/:/bin/false\nuser:x:1000:1000::/:/bin/sh\n"
)
_GROUPS = "root:x:0:\nmessagebus:x:107:\nuser:x:1000:\n"


class Container:
    """One that runs, or will `begin` to. `config`: lines to add to its configuration; `first`: its root."""

    def __init__(self, config: str = "", *, first: int = FIRST, begin: bool = True) -> None:
        _want_cgroups()
        self.directory = Path(tempfile.mkdtemp(prefix="kbt-lxc-", dir="/tmp"))
        self.directory.chmod(0o755)
        self.name = self.directory.name
        self.root = self.directory / self.name / "rootfs"
        self.first = first
        self._make_root()
        fuse = self.directory / "fuse"
        os.mknod(fuse, 0o020666, os.makedev(10, 229))
        fuse.chmod(0o666)  # where there is no udev, the host's is root's alone
        self.config = self.directory / self.name / "config"
        self.config.write_text(self.base() + config)
        # What is included last is mounted last.
        last = f"lxc.include = {self.config}\n" + bind(fuse, "dev/fuse", "create=file,optional")
        (self.directory / "whole").write_text(last)
        self.started: list[subprocess.Popen[bytes]] = []
        self.process: subprocess.Popen[bytes] | None = None
        if begin:
            self.begin()

    def begin(self) -> None:
        """Start it."""
        command = ["/usr/bin/setpriv", "--pdeathsig", "KILL", "/usr/bin/lxc-start"]
        command += ["-F", "-n", self.name, "-P", str(self.directory)]
        command += ["-f", str(self.directory / "whole")]
        command += ["-l", "NOTICE", "-o", str(self.directory / "log")]
        null = subprocess.DEVNULL
        self.process = subprocess.Popen(command, env=LXC, stdin=null, stderr=null)
        try:
            procs.eventually(self._is_up, "the container starts", SECONDS)
        except BaseException:
            self.stop()
            raise

    def base(self) -> str:
        ids = "".join(f"lxc.idmap = {kind} 0 {self.first} {COUNT}\n" for kind in "ug")
        return (
            "".join(f"lxc.include = /usr/share/lxc/config/{each}.conf\n" for each in DEBIANS)
            + f"lxc.uts.name = box\nlxc.rootfs.path = dir:{self.root}\nlxc.init.cmd = /init\n{ids}"
            "lxc.net.0.type = empty\nlxc.mount.auto = proc:mixed\nlxc.autodev = 1\n"
            + bind("/usr", "usr", "ro")
            + bind(TREE, str(TREE)[1:], "ro")
        )

    def _make_root(self) -> None:
        places = (
            "usr",
            "etc",
            "proc",
            "sys",
            "dev",
            "tmp",
            "run/kdbus",
            "var",
            "root",
            str(TREE)[1:],
        )
        for place in places:
            (self.root / place).mkdir(parents=True, exist_ok=True)
        for link in ("bin", "lib", "lib64", "sbin"):
            (self.root / link).symlink_to(f"usr/{link}")
        (self.root / "etc/passwd").write_text(_USERS)
        (self.root / "etc/group").write_text(_GROUPS)
        shutil.copy("/etc/ld.so.cache", self.root / "etc")
        init = self.root / "init"
        init.write_text("#!/bin/sh\n: >/run/up\nexec sleep infinity\n")
        init.chmod(0o755)
        for path in [self.root, *self.root.rglob("*")]:
            os.chown(path, self.first, self.first, follow_symlinks=False)

    def _is_up(self) -> bool:
        assert self.process and self.process.poll() is None, f"it has ended: {self.log()}"
        return (self.root / "run/up").exists()

    def log(self) -> str:
        path = self.directory / "log"
        return path.read_text(errors="replace") if path.exists() else "LXC logged nothing"

    def command(self, *what: str, user: int = 0) -> list[str]:
        """What runs a command in it."""
        become = (
            [] if user == 0 else ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups"]
        )
        environment = ["env", "-i", *(f"{name}={value}" for name, value in INSIDE.items())]
        attach = ["/usr/bin/lxc-attach", "-n", self.name, "-P", str(self.directory), "--"]
        return [*attach, "/usr/bin/" + environment[0], *environment[1:], *become, *what]

    def run(self, *what: str, user: int = 0) -> subprocess.CompletedProcess[str]:
        """Run a command in it, to its end."""
        return subprocess.run(
            self.command(*what, user=user), cwd="/", env=LXC, stdin=subprocess.DEVNULL, check=False,
            capture_output=True, text=True, timeout=SECONDS,
        )  # fmt: skip

    def python(
        self, module: str, *arguments: str, user: int = 0
    ) -> subprocess.CompletedProcess[str]:
        """Run a module of the tests in it."""
        script = f"import sys; sys.path.insert(0, {str(TREE)!r}); import runpy; "
        script += (
            f"sys.argv[1:] = {list(arguments)!r}; runpy.run_module({module!r}, run_name='__main__')"
        )
        return self.run(str(BIN / "python"), "-c", script, user=user)

    def start(self, *what: str, user: int = 0) -> subprocess.Popen[bytes]:
        """Have a command run in it, until `stop`."""
        process = subprocess.Popen(
            self.command(*what, user=user), cwd="/", env=LXC, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=(self.directory / "said").open("wb"),
        )  # fmt: skip
        self.started.append(process)
        return process

    def bus(self, *options: str) -> str:
        """Have a kbusd run in it; its address."""
        process = self.start(str(BIN / "kbusd"), "--nofork", "--print-address", *options)
        assert process.stdout
        address = read_line(process.stdout, SECONDS)
        assert address, (self.directory / "said").read_text()
        return address

    def stop(self) -> None:
        """Kill it, and remove it."""
        if self.process and self.process.poll() is None:
            command = ["/usr/bin/lxc-stop", "-k", "-n", self.name, "-P", str(self.directory)]
            subprocess.run(command, env=LXC, check=False, timeout=SECONDS, capture_output=True)
            try:
                self.process.wait(SECONDS)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        for process in self.started:
            process.kill()
            process.wait()
            assert process.stdout
            process.stdout.close()
        shutil.rmtree(self.directory, ignore_errors=True)


def bind(source: Path | str, target: str, options: str) -> str:
    """A line of configuration: what is at `source` is in the container at `target`, too."""
    return f"lxc.mount.entry = {source} {target} none bind,{options} 0 0\n"


def _want_cgroups() -> None:
    """LXC does not start a container without; a machine has them mounted, the guest has not."""
    if not IN_GUEST or os.path.ismount("/sys/fs/cgroup"):
        return
    subprocess.run(["mount", "-t", "tmpfs", "cgroups", "/sys/fs/cgroup"], check=True)
    for each in _CONTROLLERS:
        os.mkdir(f"/sys/fs/cgroup/{each}")
        command = ["mount", "-t", "cgroup", "-o", each, each, f"/sys/fs/cgroup/{each}"]
        subprocess.run(command, check=True)
