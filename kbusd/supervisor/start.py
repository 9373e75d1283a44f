"""The first lines that run in a child: `python -S -s -P start.py PATH... -- MODULE ARGUMENT...`.

It takes its import path from the supervisor instead of working it out (`site` and what
virtual environments hook into it would stay in the memory of every worker), and so runs exactly
the code that the supervisor would. Imports nothing of ours before that; trusts its arguments.

Signals that reach the whole control group, such as a service manager's SIGTERM, are the supervisor's
to act on: it ends the others by closing their lines.
"""

import signal
import sys


def main() -> None:
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    end = sys.argv.index("--")
    sys.path[:] = sys.argv[1:end]
    name = sys.argv[end + 1]
    sys.argv[:] = [name, *sys.argv[end + 2 :]]
    # msgspec does without it, and it brings inspect, ast, dis and tokenize.
    sys.modules["typing_extensions"] = None  # type: ignore[assignment]
    sys.modules["_uuid"] = None  # type: ignore[assignment]  # two shared objects more
    from importlib import import_module

    module = import_module(name)
    if not hasattr(module, "main"):
        module = import_module(f"{name}.__main__")
    sys.exit(module.main())


if __name__ == "__main__":
    main()
