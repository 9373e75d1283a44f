"""Boots the guest: User-Mode Linux, a kernel that runs as an ordinary process of this machine.

The guest has CUSE, FUSE and SELinux, and this machine's files under a layer of its own: it can
write everywhere and changes nothing here (init.sh). One directory is shared, by which it is
told what to do and tells what came of it. Needs no privilege, and reads what its user may read.

Whatever becomes of us, it ends: beside it a process waits for the end of a pipe that only we hold,
and then kills it. All that belongs to one guest lies in its directory, so that several can
run side by side.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
HERE = Path(__file__).parent
KERNEL = "linux.uml"
NEEDED = (KERNEL, "cc", "insmod", "mount", "pivot_root")
MEMORY = 2 << 30  # bytes; a sparse file, of which only what the guest uses becomes real
END_SECONDS = 20.0

# Descriptor 0 is the pipe. The guest makes a process group of its own, but not at once.
_WATCH = """
exec 3<&0 4<{stdin}
ulimit -c 0
"$@" <&4 3<&- &
guest=$!
end() {{ kill -s KILL -- -$guest 0 2>/dev/null; }}
(read -r gone <&3; end) &
wait $guest
end
"""


class Unbootable(Exception):
    """The guest can't be started here; says why and what would help."""


class Machine:
    """One guest, which boots, runs `job` (a shell script, as root) and powers off.

    `directory` is shared with it, and removed by `stop()`; `files` are there when it boots, by name.
    What its console says goes to a file, `console()`, or, if `terminal`, to our standard output,
    which then has to be a terminal and is also what it reads. `image`: of a file system that is its
    root instead of ours; what it writes there goes to a layer over it. Raises Unbootable."""

    def __init__(
        self,
        job: str,
        *,
        files: dict[str, str] | None = None,
        terminal: bool = False,
        image: Path | None = None,
    ) -> None:
        path = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
        for program in NEEDED:
            if not shutil.which(program, path=path):
                raise Unbootable(
                    f"there is no {program}; as root: make check installs what it needs"
                )
        for place in (tempfile.gettempdir(), str(HERE)):
            if not re.fullmatch(r"[\w./+-]+", place):
                raise Unbootable(f"{place!r} can't stand in a kernel's command line")
        memory = _room()
        self.directory = Path(tempfile.mkdtemp(prefix="kbusd-guest-"))
        self._console = self.directory / "console"
        for name, text in ((files or {}) | {"job": job}).items():
            (self.directory / name).write_text(text)
        command = [
            KERNEL,
            f"mem={MEMORY >> 20}M",
            *("root=/dev/root", "rootfstype=hostfs", "rootflags=/", "ro"),
            f"init={HERE / 'init.sh'}",
            f"KBUSD_GUEST={self.directory}",
            *(f"uml_dir={self.directory}", "umid=uml"),
            *(
                [f"ubd0={self.directory}/changes,{image}", "KBUSD_IMAGE=1", "log_buf_len=1M"]
                if image
                else []
            ),
            *("con=null", "con0=fd:0,fd:1" if terminal else "con0=null,fd:1"),
            f"loglevel={4 if terminal else 7}",
        ]
        environment = {
            "PATH": path,
            "HOME": str(self.directory),
            "TMPDIR": memory,
            "LD_PRELOAD": str(self._completion_of_xstate()),
        }
        watch = _WATCH.format(stdin="&1" if terminal else "/dev/null")
        reader, self._alive = os.pipe()
        with self._console.open("wb") as console:
            self._process = subprocess.Popen(
                ["/bin/sh", "-c", watch, "sh", *command],
                stdin=reader,
                stdout=None if terminal else console,
                stderr=console,
                env=environment,
                start_new_session=True,
            )
        os.close(reader)

    def console(self) -> str:
        """What the kernel, and what ran in it, said so far."""
        return self._console.read_text(errors="replace")

    def running(self) -> bool:
        return self._process.poll() is None

    def wait(self) -> None:
        """Until it powers off."""
        self._process.wait()

    def stop(self) -> None:
        """End it at once, and remove its directory. May be called again."""
        if self._alive >= 0:
            os.close(self._alive)
            self._alive = -1
        self._process.wait()
        # The others were killed before it, but take their time to give back their memory.
        deadline = time.monotonic() + END_SECONDS
        while processes(self.directory):
            if time.monotonic() > deadline:
                raise TimeoutError(f"can't be killed: processes {processes(self.directory)}")
            time.sleep(0.01)
        shutil.rmtree(self.directory, ignore_errors=True)

    def _completion_of_xstate(self) -> Path:
        library = self.directory / "xstate.so"
        command = ["cc", "-O2", "-shared", "-fPIC", "-o", str(library), str(HERE / "xstate.c")]
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
        if done.returncode != 0:
            shutil.rmtree(self.directory)
            raise Unbootable(f"{shlex.join(command)}: {done.stderr}")
        return library


def processes(directory: Path) -> list[int]:
    """The processes of guests whose directories lie in this one, or are it."""
    wanted = os.fsencode(f"KBUSD_GUEST={directory}")
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            if wanted in Path("/proc", name, "cmdline").read_bytes():
                found.append(int(name))
        except OSError:
            continue
    return found


def environment() -> dict[str, str]:
    """For programs in the guest: root's, with the Python that runs here first on PATH."""
    kept = {k: v for k, v in os.environ.items() if k.startswith(("KBUSD_", "PYTHON"))}
    system = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    return kept | {
        "HOME": "/root",
        "USER": "root",
        "LANG": "C.UTF-8",
        "TERM": os.environ.get("TERM", "linux"),
        "PATH": f"{Path(sys.executable).parent}:{system}",
        "PYTHONPATH": str(REPOSITORY),
    }


def command_line(command: list[str], directory: Path | str) -> str:
    """For a job: run `command` in `directory`, with `environment()`."""
    words = shlex.join(f"{name}={value}" for name, value in environment().items())
    shared = 'KBUSD_GUEST="$KBUSD_GUEST"'
    return f"cd {shlex.quote(str(directory))} && env -i {words} {shared} {shlex.join(command)}"


def _room() -> str:
    """Where the file lies that is the guest's memory: it wants room, and to be executed from."""
    places = [os.environ.get("TMPDIR"), "/dev/shm", tempfile.gettempdir(), "/var/tmp"]
    for place in filter(None, places):
        if os.path.isdir(place) and os.access(place, os.W_OK):
            found = os.statvfs(place)
            if not found.f_flag & os.ST_NOEXEC and found.f_bavail * found.f_frsize >= MEMORY:
                return place
    raise Unbootable(
        f"no {MEMORY >> 20} MiB in any of {places}; set TMPDIR to a directory with room"
    )
