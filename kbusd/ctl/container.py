"""`kbusctl container`: what a bus and an LXC container need of each other's configuration.

    inside   the container runs a kbusd of its own, with kdbusfs; it needs /dev/fuse
    domain   the host's kbusd has a tree for it (kbusd --domains), bound to /dev/kdbus in there
    socket   the D-Bus socket of a bus of the host, bound to /dev/kbusd in there

Writes NAME/kbusd.conf beside the container's configuration and a line there that includes it, and for a
domain /etc/kbusd/domains/NAME; then tells the kbusd that runs. All of it can be done by an editor as well
(docs/containers.md). Of the container it believes what LXC says of its configuration.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from kbusd.ctl import workers

DOMAINS = Path("/etc/kbusd/domains")
MOUNTS = Path("/run/kbusd/domain")
NODES = "/dev/kdbus/domain"
SOCKET = "/run/dbus/system_bus_socket"
_PLACE = Path(__file__).resolve().parents[2]
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,62}", re.ASCII)
_HEAD = "NAME", "UIDS", "WITH", "CONFIGURATION"


class Wrong(Exception):
    """It can't be done; the text says why, and what to do."""


class Wanted(msgspec.Struct, frozen=True):
    """What a container is to have."""

    inside: bool = False
    domain: bool = False
    cuse: bool = False
    socket: str = ""
    mounts: Path = MOUNTS


def add_to(commands: Any) -> None:
    """The command `container`."""
    command = commands.add_parser("container", help="LXC containers and the buses that they use")
    actions = command.add_subparsers(dest="action", required=True)
    add = actions.add_parser("add", help="let a container have a bus")
    add.add_argument("name", metavar="NAME")
    add.add_argument("--inside", action="store_true", help="a kbusd of its own")
    add.add_argument("--domain", action="store_true", help="a domain of the host's kbusd")
    add.add_argument("--cuse", action="store_true", help="that domain by CUSE, not kdbusfs")
    add.add_argument("--socket", metavar="PATH", nargs="?", const=SOCKET, default="",
                     help="the socket of a bus of the host's")  # fmt: skip
    add.add_argument("--mounts", metavar="DIRECTORY", type=Path, default=MOUNTS,
                     help="below which domains are mounted on the host")  # fmt: skip
    add.set_defaults(run=_add)
    remove = actions.add_parser("remove", help="take back what add has done")
    remove.add_argument("name", metavar="NAME")
    remove.set_defaults(run=_remove)
    listing = actions.add_parser("list", help="containers for which add was used")
    listing.set_defaults(run=_list)
    for each in add, remove, listing:
        each.add_argument("--lxcpath", "-P", metavar="DIRECTORY", help="where containers are")
        each.add_argument("--domains", metavar="DIRECTORY", type=Path, default=DOMAINS,
                          help="where it says which domains there are (kbusd --domains)")  # fmt: skip
    for each in add, remove:
        which = each.add_mutually_exclusive_group()
        which.add_argument("--pid", type=int, metavar="SUPERVISOR", help="the kbusd to tell")
        which.add_argument("--pidfile", metavar="FILE", help="the same by its pid file")


# -- LXC -------------------------------------------------------------------------------------------


def _ask_lxc(*command: str) -> str:
    """Raises Wrong."""
    if shutil.which(command[0]) is None:
        raise Wrong(f"LXC is not there: no {command[0]} on PATH; on Debian: apt-get install lxc")
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    if done.returncode != 0:
        said = (done.stderr + done.stdout).strip() or f"status {done.returncode}"
        raise Wrong(f"{' '.join(command)}: {said}")
    return done.stdout.strip()


def _lxcpath(options: argparse.Namespace) -> Path:
    return Path(options.lxcpath or _ask_lxc("lxc-config", "lxc.lxcpath")).absolute()


def _setting(lxcpath: Path, name: str, key: str) -> str:
    """What is in force of a container's configuration, includes and all."""
    said = _ask_lxc("lxc-info", "-P", str(lxcpath), "-n", name, "-c", key)
    return said.removeprefix(f"{key} =").strip()


def uids(idmap: str) -> tuple[int, int]:
    """The host's uids of a container, root's first, and how many. Raises Wrong."""
    for line in idmap.splitlines():
        if found := re.fullmatch(r"[ub] 0 (\d+) (\d+)", line.strip()):
            return int(found[1]), int(found[2])
    raise Wrong("it has no lxc.idmap for its root, who would be the host's: no domain for it")


def denies_all(said: str) -> bool:
    """Whether one of the values of lxc.cgroup(2).devices.deny takes all devices away."""
    return any(line.split()[:1] == ["a"] for line in said.splitlines())


# -- what is written -------------------------------------------------------------------------------


def shipped(name: str) -> Path:
    """A file of packaging/lxc, wherever we are installed."""
    ours = _PLACE / "packaging" / "lxc"
    if not ours.is_dir():
        ours = _PLACE.parents[2] / "share" / "kbusd" / "lxc"
    return (ours if ours.is_dir() else Path("/usr/share/kbusd/lxc")) / name


def configuration(name: str, wanted: Wanted, rules: bool) -> str:
    """Lines for a container's configuration. `rules`: it denies all devices that are not named."""
    lines = [f"# Made by: kbusctl container add {name}"]
    if wanted.inside:
        lines.append(f"lxc.include = {shipped('inside.conf')}")
    if wanted.domain:
        tree = f"{NODES}/{name}" if wanted.cuse else str(wanted.mounts / name)
        lines.append(f"lxc.mount.entry = {tree} dev/kdbus none bind,create=dir,optional 0 0")
    if wanted.socket:
        there = f"dev/kbusd/{os.path.basename(wanted.socket)}"
        lines.append(
            f"lxc.mount.entry = {wanted.socket} {there} none bind,create=file,optional 0 0"
        )
    if rules:
        lines.append(f"lxc.include = {shipped('device-rules.conf')}")
    return "\n".join(lines) + "\n"


def _add(options: argparse.Namespace) -> int:
    lxcpath, name = _lxcpath(options), options.name
    if not _NAME.fullmatch(name):
        raise Wrong(f"{name!r} is no name for a domain: letters, digits, dashes, dots")
    place = lxcpath / name
    everything = not (options.inside or options.domain or options.socket)
    domain = options.domain or options.cuse or everything
    mounts = options.mounts.absolute()
    wanted = Wanted(options.inside or everything, domain, options.cuse, options.socket, mounts)
    for path in filter(None, [wanted.socket, str(mounts)]):
        if re.search(r"\s", path) or not os.path.isabs(path):
            raise Wrong(f"{path!r} can't stand in LXC's configuration: an absolute path, no blanks")
    idmap = _setting(lxcpath, name, "lxc.idmap")
    rules = any(
        denies_all(_setting(lxcpath, name, f"lxc.{group}.devices.deny"))
        for group in ("cgroup", "cgroup2")
    )
    if wanted.domain:
        first, count = uids(idmap)
        mount = "" if wanted.cuse else f" {mounts / name}"
        options.domains.mkdir(mode=0o755, parents=True, exist_ok=True)
        _write(options.domains / name, f"{first} {count}{mount}\n")
    _write(place / "kbusd.conf", configuration(name, wanted, rules))
    config = place / "config"
    include = _include(place)
    text = config.read_text()
    if include not in text.splitlines():
        _write(config, text.rstrip("\n") + f"\n{include}\n")
    print(f"{place}/kbusd.conf is in force when {name} starts again")
    if wanted.domain:
        _tell(options)
        print("it will have the domain at /dev/kdbus, whose control file makes buses")
    if wanted.inside:
        print("a bus inside: kbusd --system --kdbusfs=DIRECTORY, in the container")
    if wanted.socket:
        there = f"/dev/kbusd/{os.path.basename(wanted.socket)}"
        print(f"the host's bus: DBUS_SYSTEM_BUS_ADDRESS=unix:path={there}")
    return 0


def _remove(options: argparse.Namespace) -> int:
    place = _lxcpath(options) / options.name
    files = [place / "kbusd.conf", options.domains / options.name]
    if not any(path.exists() for path in files) or not _NAME.fullmatch(options.name):
        raise Wrong(f"nothing was added for {options.name}: {files[0]} is not there")
    with suppress(FileNotFoundError):  # the container was destroyed before
        config = place / "config"
        lines = [line for line in config.read_text().splitlines() if line != _include(place)]
        _write(config, "\n".join(lines) + "\n")
    had_domain = files[1].exists()
    for path in files:
        path.unlink(missing_ok=True)
    if had_domain:
        _tell(options)
    return 0


def _list(options: argparse.Namespace) -> int:
    lxcpath = _lxcpath(options)
    rows = [_HEAD]
    names = {path.parent.name for path in lxcpath.glob("*/kbusd.conf")}
    with suppress(FileNotFoundError):
        names |= {path.name for path in options.domains.iterdir()}
    for name in sorted(names):
        path = lxcpath / name / "kbusd.conf"
        text = path.read_text() if path.exists() else ""
        signs = {"inside": "inside.conf", "domain": " dev/kdbus ", "socket": " dev/kbusd/"}
        having = ",".join(what for what, sign in signs.items() if sign in text)
        domain = options.domains / name
        first, count, *_ = (domain.read_text() if domain.exists() else "").split() or ["", ""]
        uids_of = f"{first}+{count}" if first else "-"
        rows.append((name, uids_of, having or "-", str(path) if text else "no container"))
    print("\n".join(workers.columns(rows)))
    return 0


def _include(place: Path) -> str:
    return f"lxc.include = {place}/kbusd.conf"


def _write(path: Path, text: str) -> None:
    """All of it or nothing, with the mode that the file had."""
    new = path.with_name(f".{path.name}.new")
    new.write_text(text)
    with suppress(FileNotFoundError):
        shutil.copystat(path, new)
        os.chown(new, path.stat().st_uid, path.stat().st_gid)
    new.replace(path)


def _tell(options: argparse.Namespace) -> None:
    """Have the domains read again by the kbusd that runs with them."""
    if options.pid is None and options.pidfile is None:
        running = [pid for pid in workers.running() if _has_domains(pid)]
    else:
        running = [workers.supervisor_of(options.pid, options.pidfile)]
    for pid in running:
        os.kill(pid, signal.SIGHUP)
    if not running:
        print("kbusctl: no kbusd runs with --domains; start it so", file=sys.stderr)


def _has_domains(pid: int) -> bool:
    try:
        arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return any(each.partition(b"=")[0] == b"--domains" for each in arguments)
