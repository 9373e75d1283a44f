"""The guest with SELinux in force: its root is a disk on which every file has its label.

What lies on the disk are the files of Debian packages that are installed here, at their places, each
labelled as the real Debian policy has it. In the guest kbusd is copied to where a package of it would put it
(labelled.sh), and the policy is loaded, which is Debian's and selinux/kbus.pp.

Both are kept in build/guest, and made anew when something that they are made of changes. Needs no
privilege but for reading Debian's compiled policy modules, which only root may; others compile them anew.

`python -m tests.guest.labelled` writes anew what a worker may do by either variant of the policy
(selinux/worker*.rules), for you to look at what has changed.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .machine import HERE, REPOSITORY, Machine, Unbootable

KIND, STRICT = "selinux", "selinux-strict"  # of a test's marker
KEPT = REPOSITORY / "build" / "guest"
SOURCES = REPOSITORY / "selinux"
CLIENTS = HERE / "clients.te"  # clients' domains, made by our interfaces
RULES = {"worker.rules": False, "worker-strict.rules": True}
DEBIAN = "default"  # the name of Debian's policy
PACKAGES = (
    "checkpolicy", "coreutils", "dash", "dbus-bin", "dbus-system-bus-common", "findutils", "gawk", "grep", "libc-bin", "libcap2",
    "libglib2.0-bin", "libseccomp2", "m4", "make", "mount", "policycoreutils", "python3", "sed", "selinux-policy-default",
    "semodule-utils", "util-linux",
)  # fmt: skip
ALONE = ("selinux-policy-dev",)  # without what it depends on
BESIDES = ("/etc/passwd", "/etc/group", "/etc/nsswitch.conf", "/etc/machine-id", "/etc/ld.so.cache")
EMPTY = ("dev", "mnt", "proc", "root", "run", "sys", "tmp", "var/lib", "var/tmp")
LEFT_OUT = (
    "/usr/share/doc/",
    "/usr/share/man/",
    "/usr/share/locale/",
    "/usr/share/selinux/default/",
)
DISK_BYTES = 600 << 20  # sparse
TOOLS = ("mke2fs", "debugfs", "semodule", "make", "checkmodule", "sesearch")


def machine(job: str, files: dict[str, str], strict: bool = False) -> Machine:
    """Boots it, to run `job` as an unconfined root. Raises Unbootable."""
    for tool in TOOLS:
        if not shutil.which(tool, path=_path()):
            raise Unbootable(f"there is no {tool}; as root: make check installs what it needs")
    disk, store = _disk(), debian() if strict else policy()
    _run(sys.executable, "-m", "compileall", "-q", str(REPOSITORY / "kbusd"))
    words = (REPOSITORY, sysconfig.get_path("platlib"), store, "install-strict" if strict else "")
    files = files | {"set-up": (HERE / "labelled.sh").read_text()}
    before = " ".join(["/bin/sh", '"$KBUSD_GUEST/set-up"', *map(str, words)])
    return Machine(f"{before} || exit\n{job}", files=files, image=disk)


def policy(strict: bool = False) -> Path:
    """The root of a policy store with Debian's policy, ours, and that of some clients. Every assertion of the policy is checked; of
    the strict variant only what can't be asserted is (selinux/Makefile)."""
    sources = [SOURCES / name for name in ("Makefile", "kbus.te", "kbus.fc", "kbus.if")]
    sources.append(CLIENTS)
    key = _key([_policy_versions(), *(each.read_text() for each in (*sources, Path(__file__)))])
    kind = STRICT if strict else KIND
    place = KEPT / f"{kind}-policy-{key}"
    with _making(f"{kind}-policy-", place) as new:
        if new:
            _run("cp", *map(str, sources), str(new))
            _run("make", "-sC", str(new), "strict" if strict else "all")
            modules = _copy_store(new / "root")
            (new / "root/etc/selinux/semanage.conf").write_text(
                f"module-store = direct\nexpand-check = {int(not strict)}\n"
            )
            _run("make", "-sC", str(new), "-f", "/usr/share/selinux/devel/Makefile", "clients.pp")
            ours = "strict/kbus.cil" if strict else "kbus.pp"
            wanted = [new / ours, new / "clients.pp", *modules]
            _semodule(new / "root", "-i", *map(str, wanted))
            shutil.rmtree(new / "root/var")
    return place / "root"


def debian() -> Path:
    """The root of a policy store with Debian's policy alone, as Debian has configured it, and all of its
    modules, so that another can be installed."""
    place = KEPT / f"debian-{_key([_policy_versions(), Path(__file__).read_text()])}"
    with _making("debian-", place) as new:
        if new:
            modules = _copy_store(new / "root")
            _run("cp", "/etc/selinux/semanage.conf", str(new / "root/etc/selinux"))
            _semodule(new / "root", "-B", *(["-i", *map(str, modules)] if modules else []))
    return place / "root"


def _policy_versions() -> str:
    return _versions(["selinux-policy-default", "selinux-policy-dev"])


def _copy_store(root: Path) -> list[Path]:
    """This machine's, to `root`; returns the modules that are still to be installed in it."""
    for each in ("etc/selinux", "var/lib/selinux"):
        (root / each).mkdir(parents=True)
    _run("cp", "-a", f"/etc/selinux/{DEBIAN}", "/etc/selinux/config", f"{root}/etc/selinux")
    if os.access(f"/var/lib/selinux/{DEBIAN}", os.X_OK):
        _run("cp", "-a", f"/var/lib/selinux/{DEBIAN}", f"{root}/var/lib/selinux")
        return []
    return sorted(Path("/usr/share/selinux", DEBIAN).glob("*.pp.bz2"))


def _semodule(root: Path, *what: str) -> None:
    # -D: refusals that a policy keeps quiet about are told, too.
    _run("semodule", "-p", str(root), "-s", DEBIAN, "-n", "-D", *what)


def rules(strict: bool) -> str:
    """All that a worker may do, a rule a line."""
    (binary,) = policy(strict).glob("etc/selinux/default/policy/policy.*")
    found = _run("sesearch", "-A", "-s", "kbusd_worker_t", str(binary)).splitlines()
    return "".join(f"{line}\n" for line in sorted(found) if line)


def _disk() -> Path:
    """A disk that all guests of this kind begin with."""
    wanted = sorted({*_closure(PACKAGES), *ALONE})
    key = _key([_versions(wanted), Path(__file__).read_text()])
    place = KEPT / f"disk-{key}"
    with _making("disk-", place) as new:
        if new:
            _make_disk(new, wanted)
    return place / "disk"


def _make_disk(new: Path, packages: list[str]) -> None:
    tree = new / "tree"
    listed = _run("dpkg-query", "-L", *packages).splitlines()
    paths = [each for each in dict.fromkeys(listed) if each.startswith("/")]
    paths = [each for each in paths if not each.startswith(LEFT_OUT) and each != "/."]
    paths += [each for each in BESIDES if os.path.exists(each)]
    # Debian's directories are merged: /bin is a link to /usr/bin, and so on.
    tree.mkdir()
    for each in ("bin", "sbin", "lib", "lib64"):
        (tree / "usr" / each).mkdir(parents=True)
        (tree / each).symlink_to(f"usr/{each}")
    (tree / "var").mkdir()
    (tree / "var/run").symlink_to("/run")
    for name in EMPTY:
        (tree / name).mkdir(parents=True, exist_ok=True)
    for source in {os.path.dirname(each) for each in paths if each.endswith(".py")}:
        if os.path.isdir(compiled := f"{source}/__pycache__"):
            paths += [compiled, *(f"{compiled}/{name}" for name in os.listdir(compiled))]
    # So that each comes once, and at its place in there.
    paths = [
        f"{os.path.realpath(os.path.dirname(each))}/{os.path.basename(each)}" for each in paths
    ]
    found = [each for each in dict.fromkeys(paths) if os.path.lexists(each)]
    archive = new / "archive"
    taken = ("-cf", str(archive), "--no-recursion", "-C", "/", "--null", "-T", "-")
    _run("tar", *taken, text="\0".join(each[1:] for each in found if not each.startswith("//")))
    _run("tar", "-xf", str(archive), "-C", str(tree), "--keep-directory-symlink")
    archive.unlink()
    labels = _labels(tree)
    disk = new / "disk"
    with disk.open("wb") as file:
        file.truncate(DISK_BYTES)
    _run("mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-m", "0", "-d", str(tree), str(disk))
    commands = "".join(
        f'ea_set "{path}" security.selinux {label}\nsif "{path}" uid 0\nsif "{path}" gid 0\n'
        for path, label in labels
    )
    _run("debugfs", "-w", "-f", "-", str(disk), text=commands)
    shutil.rmtree(tree)


def _labels(tree: Path) -> Iterator[tuple[str, str]]:
    """Each path below `tree` with the label that Debian's policy has for it."""
    paths = [
        "/" + os.path.relpath(os.path.join(directory, name), tree)
        for directory, directories, files in os.walk(tree)
        for name in (*directories, *files)
    ]
    contexts = f"/etc/selinux/{DEBIAN}/contexts/files/file_contexts"
    command = ("xargs", "-0", "matchpathcon", "-f", contexts, "/")
    for line in _run(*command, text="\0".join(paths)).splitlines():
        path, _, label = line.partition("\t")
        if ":object_r:" in label:
            yield path, label


def _closure(packages: Iterable[str]) -> list[str]:
    """Those that are installed here of these packages and of all that they depend on."""
    form = "${Package}\t${db:Status-Status}\t${Provides}\t${Pre-Depends},${Depends}\n"
    depends: dict[str, set[str]] = {}
    for line in _run("dpkg-query", "-W", "-f", form).splitlines():
        name, status, provides, needs = line.split("\t")
        if status == "installed":
            for each in (name, *_names(provides)):
                depends.setdefault(each, set()).update({name, *_names(needs)})
    found: set[str] = set()
    todo = list(packages)
    while todo:
        if (name := todo.pop()) not in found:
            found.add(name)
            todo += depends.get(name, ())
    installed = _run("dpkg-query", "-W", "-f", "${Package}\n").splitlines()
    return sorted(found.intersection(installed))


def _names(relation: str) -> Iterator[str]:
    for each in relation.replace("|", ",").split(","):
        if words := each.split():
            yield words[0].partition(":")[0]


def _versions(packages: list[str]) -> str:
    return _run("dpkg-query", "-W", "-f", "${Package} ${Version}\n", *packages)


def _key(parts: Iterable[str]) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


@contextmanager
def _making(prefix: str, place: Path) -> Iterator[Path | None]:
    """None if `place` is there; else a new directory that becomes it if all goes well, when older ones
    with that prefix go. One at a time, whoever else runs tests in this tree."""
    KEPT.mkdir(parents=True, exist_ok=True)
    with (KEPT / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if place.exists():
            yield None
            return
        new = Path(tempfile.mkdtemp(dir=KEPT, prefix="new-"))
        try:
            yield new
            for old in KEPT.glob(f"{prefix}*"):
                shutil.rmtree(old)
            new.rename(place)
        finally:
            shutil.rmtree(new, ignore_errors=True)


def _path() -> str:
    return f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"


def _run(*command: str, text: str = "") -> str:
    done = subprocess.run(
        command,
        check=False,
        input=text,
        capture_output=True,
        text=True,
        env=os.environ | {"PATH": _path(), "LC_ALL": "C.UTF-8"},
    )
    if done.returncode:
        words = " ".join(command)[:200]
        raise Unbootable(f"{words}: status {done.returncode}: {done.stderr[-2000:]}")
    return done.stdout


if __name__ == "__main__":
    for name, strict in RULES.items():
        (SOURCES / name).write_text(rules(strict))
