"""`python -m tests.guest.shell [COMMAND ...]`: a shell in the guest, or one command, for debugging.

A command's output and exit status become ours. Nothing that is done in there lasts.
"""

from __future__ import annotations

import os
import sys

from .machine import REPOSITORY, Machine, Unbootable, command_line


def main(command: list[str]) -> int:
    if not command and not sys.stdout.isatty():
        print("a shell needs a terminal; without one, give a command", file=sys.stderr)
        return 2
    try:
        return _run(command) if command else _shell()
    except Unbootable as error:
        print(error, file=sys.stderr)
        return 2


def _run(command: list[str]) -> int:
    # Both come back as files: on the console the kernel would talk in between.
    job = f'{command_line(command, REPOSITORY)} >"$KBUSD_GUEST/output" 2>&1 </dev/null\n'
    machine = Machine(job + 'echo $? >"$KBUSD_GUEST/status"\n')
    try:
        machine.wait()
        output, status = machine.directory / "output", machine.directory / "status"
        if output.exists():
            sys.stdout.write(output.read_text(errors="replace"))
        if not status.exists():
            sys.stderr.write(machine.console())
            return 2
        return int(status.read_text())
    finally:
        machine.stop()


def _shell() -> int:
    size = os.get_terminal_size()
    bash = command_line(["setsid", "--ctty", "--wait", "bash"], REPOSITORY)
    job = f"stty rows {size.lines} cols {size.columns} </dev/tty0\n"
    machine = Machine(f"{job}{bash} </dev/tty0 >/dev/tty0 2>&1\n", terminal=True)
    try:
        machine.wait()
    finally:
        machine.stop()
        os.system("stty sane")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
