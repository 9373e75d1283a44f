"""The process that reads the configuration: ``python -m kbusd.policy.reader``.

The XML, the service files and the user database are read here, in a process that ends at once, so
that neither supervisor nor broker holds a parser. It confines itself first (profile
config-reader, compiled where there is a bus already that has it, which takes half of the time): from then on it can read files and ask name services, and no more. On success an encoded Configuration is on
stdout and the exit status is 0; else one line ``file:line: reason`` is on stderr, nothing on
stdout, and the status is 1 (2 for wrong usage).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

import msgspec

from kbusd.policy.addresses import Address, AddressError, resolve
from kbusd.policy.configuration import (
    SESSION_FILE,
    SYSTEM_FILE,
    ConfigurationError,
    digest,
    encode,
    load,
    selinux_policy_root,
    state,
)
from kbusd.policy.endpoint_files import directories, load_all
from kbusd.sandbox import apply, compiled
from kbusd.sandbox.errors import SandboxError
from kbusd.sandbox.selinux import enabled as selinux_enabled


def main(arguments: Sequence[str] | None = None) -> int:
    """Read, write, and return the exit status."""
    parser = argparse.ArgumentParser(prog="kbusd-config-reader", description=main.__doc__)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--session", action="store_const", dest="file", const=SESSION_FILE)
    which.add_argument("--system", action="store_const", dest="file", const=SYSTEM_FILE)
    which.add_argument("--config-file", dest="file", metavar="F")
    parser.add_argument("--address", action="append", default=[], metavar="A")
    parser.add_argument("--endpoint", action="append", default=[], metavar="F")
    parser.add_argument("--profile", type=int, metavar="FD")
    options = parser.parse_args(arguments)
    try:
        for warning in apply.confine(_profile(options.profile)):
            print(warning, file=sys.stderr)
    except SandboxError as error:
        print(error, file=sys.stderr)
        return 1
    try:
        root = selinux_policy_root() if selinux_enabled() else None
        configuration = load(options.file, selinux_root=root, to_start=True)
        listen = options.address or configuration.listen
        places = ["--address"] * len(listen) if options.address else configuration.listen_at
        addresses = [
            address
            for entry, (text, where) in enumerate(zip(listen, places, strict=True))
            for address in resolve(text, where, os.environ, entry)
        ]
        addresses, warnings = _once(addresses)
        watched = {each.path: each for each in map(state, directories(options.endpoint))}
        files = load_all(options.endpoint, configuration.type)
    except (ConfigurationError, AddressError) as error:
        # File names and text come from outside: keep it to the promised one line.
        print(" ".join(str(error).splitlines()), file=sys.stderr)
        return 1
    configuration = msgspec.structs.replace(
        configuration,
        listen=tuple(listen),
        addresses=tuple(addresses),
        warnings=(*configuration.warnings, *warnings),
        endpoints=tuple(each.endpoint for each in files),
        watched=tuple((watched | {each.path: each for each in configuration.watched}).values()),
        sockets={
            "": _beside(configuration.type, addresses),
            **{each.endpoint.name: each.socket for each in files if each.socket},
        },
    )
    configuration = msgspec.structs.replace(configuration, digest=digest(configuration))
    sys.stdout.buffer.write(encode(configuration))
    sys.stdout.buffer.flush()
    return 0


def _profile(fd: int | None) -> compiled.Compiled:
    if fd is not None:
        with open(fd, "rb") as file:
            return compiled.decode(os.pread(fd, os.fstat(file.fileno()).st_size, 0))
    from kbusd.sandbox import compile, profiles

    return compile.compile_profile(profiles.load("config-reader"))


def _once(addresses: Sequence[Address]) -> tuple[list[Address], list[str]]:
    """Each place once, and what to say of the rest: dbus-daemon starts with such a configuration, too."""
    first: dict[tuple[str, str], Address] = {}
    warnings = []
    for each in addresses:
        known = first.setdefault((each.kind, each.value), each)
        if known is not each:
            warnings.append(f"{each.where}: {each.text} is listened on already: {known.where}")
    return list(first.values()), warnings


def _beside(type_: str, addresses: Sequence[Address]) -> str:
    """What the paths of endpoints begin with: the bus's own, or if that is not ours to say, where it is
    by custom; "" if there is nothing to go by."""
    own = [each.value for each in addresses if each.kind == "path"]
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if type_ == "kdbus":
        return ""  # a bus that a program makes has no sockets
    if own:
        return f"{os.path.abspath(own[0])}."
    if type_ == "system":
        return "/run/dbus/system_bus_socket."
    return f"{runtime}/bus." if runtime else ""


if __name__ == "__main__":
    sys.exit(main())
