"""The `kbusctl` command. Runs with the caller's rights."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from kbusd.ctl import container, endpoint, explain, profile, security, workers
from kbusd.sandbox.errors import ProfileError


def main(arguments: Sequence[str] | None = None) -> int:
    """0: all is well; 1: something is not as it should be; 2: could not be found out."""
    parser = argparse.ArgumentParser(
        prog="kbusctl",
        description="Look at a running kbusd, its sandbox profiles and endpoints; give containers a bus.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for module in (workers, security, profile, explain, endpoint, container):
        module.add_to(commands)
    options = parser.parse_args(arguments)
    try:
        return int(options.run(options))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # nobody reads on, and Python would flush
        return 0
    except (workers.Unclear, container.Wrong, ProfileError, OSError) as error:
        print(f"kbusctl: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
