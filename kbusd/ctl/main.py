"""The `kbusctl` command. Runs with the caller's rights."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import msgspec

from kbusd.ctl import workers
from kbusd.sandbox.errors import ProfileError


def main(arguments: Sequence[str] | None = None) -> int:
    """0: all is as the profiles say; 1: something differs; 2: could not be found out."""
    parser = argparse.ArgumentParser(prog="kbusctl", description="Look at a running kbusd.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser(
        "workers", help="every process of a bus, with its confinement as the kernel has it"
    )
    which = command.add_mutually_exclusive_group()
    which.add_argument("--pid", type=int, metavar="SUPERVISOR", help="the bus by its process id")
    which.add_argument("--pidfile", metavar="FILE", help="the bus by its pid file")
    command.add_argument("--json", action="store_true", help="for programs")
    options = parser.parse_args(arguments)
    try:
        supervisor = workers.supervisor_of(options.pid, options.pidfile)
        rows = workers.survey(supervisor)
    except (workers.Unclear, ProfileError, ProcessLookupError, PermissionError) as error:
        print(f"kbusctl: {error}", file=sys.stderr)
        return 2
    print(msgspec.json.encode(rows).decode() if options.json else workers.table(rows))
    return 1 if any(row.differences for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
