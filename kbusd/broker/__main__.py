"""The broker process: `python -m kbusd.broker --guid HEX --address ADDRESS [--owner UID]`.

fd 3 is the line to the supervisor, 4 the sealed memfd with the configuration, 5 the one with the
compiled sandbox profile. Confinement comes last, when everything is imported; the first word to
the supervisor, with the control log's descriptor, comes from a confined process. Ends with 0 when
the supervisor closes the line.
"""

from __future__ import annotations

import argparse
import gc
import os
import pwd
import sys

from kbusd.broker.server import Server, read_configuration
from kbusd.rings.line import LineError, adopt
from kbusd.sandbox import apply
from kbusd.sandbox import compiled as profiles
from kbusd.sandbox.errors import SandboxError

SUPERVISOR = 3
CONFIGURATION = 4
PROFILE = 5


def main() -> int:
    parser = argparse.ArgumentParser(prog="kbusd.broker", description=__doc__)
    parser.add_argument("--guid", required=True)
    parser.add_argument("--address", required=True)
    parser.add_argument("--owner", type=int, help="uid; default: the configuration's <user>")
    options = parser.parse_args()
    for fd in (SUPERVISOR, CONFIGURATION, PROFILE):
        os.set_inheritable(fd, False)
    profile = profiles.decode(os.pread(PROFILE, os.fstat(PROFILE).st_size, 0))
    os.close(PROFILE)
    owner = options.owner
    if owner is None:
        owner = bus_owner(read_configuration(CONFIGURATION).user)
    server = Server(adopt(SUPERVISOR), CONFIGURATION, options.address, owner)
    try:
        for warning in apply.confine(profile, start_threads=server.start_threads):
            server.say(warning)
    except SandboxError as error:
        server.say(f"not started: {error}")
        return 1
    gc.collect()
    gc.freeze()
    status = 0
    try:
        server.run()
    except LineError as error:
        server.say(f"ended: {error}")
        status = 1
    sys.stderr.flush()
    os._exit(status)  # the filter lets no thread end by itself, as Python would have them


def bus_owner(user: str) -> int:
    """The uid that the bus belongs to: that of <user>, if we are root and there is one."""
    if user and os.geteuid() == 0:
        try:
            return pwd.getpwnam(user).pw_uid
        except KeyError:
            pass
    return os.geteuid()


if __name__ == "__main__":
    sys.exit(main())
