"""What every worker of a bus has in common, made once in the zygote and shared by forking."""

from __future__ import annotations

import os
import pwd
import resource
from typing import TYPE_CHECKING

import msgspec

from kbusd.policy.decide import arrange
from kbusd.policy.rules import Policy
from kbusd.rings.entries import Maker
from kbusd.sandbox import selinux
from kbusd.sandbox.compiled import Compiled
from kbusd.workers.driver import Bus
from kbusd.workers.replica import Replica

if TYPE_CHECKING:
    from kbusd.workers.name_policies import NamePolicies

_MACHINE_ID_FILES = ("/etc/machine-id", "/var/lib/dbus/machine-id")


def read_all(fd: int) -> bytes:
    """The whole content of a memfd, from its beginning."""
    return os.pread(fd, os.fstat(fd).st_size, 0)


def machine_id() -> str:
    """This machine's id (machine-id(5)); zeros where there is none."""
    for path in _MACHINE_ID_FILES:
        try:
            with open(path) as file:
                text = file.read().strip()
        except OSError:
            continue
        if len(text) == 32:
            return text
    return "0" * 32


def bus_owner(user: str | None) -> int:
    """The uid that the bus belongs to: that of <user>, if we were started as root."""
    if user and os.geteuid() == 0:
        try:
            return pwd.getpwnam(user).pw_uid
        except KeyError:
            pass
    return os.geteuid()


def most_files(profile: Compiled) -> int:
    """How many descriptors a process that this profile confines may have."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    limits = [each.value for each in profile.limits if each.resource == resource.RLIMIT_NOFILE]
    return min(each for each in (hard, *limits) if each >= 0)


class Settings(msgspec.Struct, frozen=True):
    """The part of the compiled configuration that a worker acts on."""

    type: str
    user: str
    auth: tuple[str, ...]
    allow_anonymous: bool
    limits: dict[str, int]
    policy: Policy

    @property
    def mechanisms(self) -> tuple[str, ...]:
        """What clients may authenticate by. Without <auth>, what can succeed."""
        return self.auth or (("EXTERNAL", "ANONYMOUS") if self.allow_anonymous else ("EXTERNAL",))


_decode = msgspec.msgpack.Decoder(Settings).decode


def _settings(configuration: bytes) -> Settings:
    decoded = _decode(configuration)
    arrange(decoded.policy)
    return decoded


class Context(msgspec.Struct, frozen=True):
    """`configuration` is replaced when the bus reads it again; workers keep theirs. `maker`: of a bus
    that a program has made; `kdbus`: there may be clients of kdbus. `generation` is the configuration's, as
    the log counts them. `files`: how many descriptors a worker may have."""

    guid: str
    bus: Bus
    configuration: Settings
    profile: Compiled
    log_fd: int
    files: int
    maker: Maker | None = None
    kdbus: bool = False
    generation: int = 0

    @classmethod
    def make(
        cls,
        guid: str,
        pid: int,
        configuration: bytes,
        profile: Compiled,
        log_fd: int,
        maker: bytes = b"",
        kdbus: bool = False,
    ) -> Context:
        """`pid` is the supervisor's, which is the bus's to the outside."""
        decoded = _settings(configuration)
        made = msgspec.msgpack.decode(maker, type=Maker) if maker else None
        bus = Bus(
            guid,
            machine_id(),
            bus_owner(decoded.user) if made is None else made.credentials.uid,
            pid,
            system=decoded.type == "system",
            selinux=selinux.enabled(),
            label=selinux.label(),
        )
        return cls(guid, bus, decoded, profile, log_fd, most_files(profile), made, kdbus)

    @property
    def closed(self) -> bool:
        """Whether nothing but kdbus's policy allows anything, as on buses that programs make."""
        return self.configuration.type == "kdbus"

    def name_policies(self, replica: Replica) -> NamePolicies | None:
        """What the policy that kdbus clients bring says, if there may be any."""
        if not self.kdbus:
            return None  # which saves memory
        # The zygote has imported it: after lock-down no file can be opened.
        from kbusd.workers.name_policies import NamePolicies

        return NamePolicies(replica, self.bus.owner, self.closed)

    def with_configuration(self, configuration: bytes, generation: int) -> Context:
        return msgspec.structs.replace(
            self, configuration=_settings(configuration), generation=generation
        )
