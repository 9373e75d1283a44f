"""When the files of the configuration are to be read again, because they have changed.

The launcher watches their directories and says so (`changed`). One change seldom comes alone, so it is
waited for till there are no more, but not for ever. Who asks for a service that we do not know can't wait
for that: the launcher looks (`look`), at the directories too, as not all file systems tell of changes; if there is something new it is read at
once, at most every `READ_SECONDS`, as that costs a process.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from kbusd.broker.outside import Outside
from kbusd.policy.configuration import Configuration
from kbusd.rings.entries import Looked

READ_SECONDS = 0.5
QUIET_SECONDS = 0.25  # after the last change
CHANGING_SECONDS = 2.0  # after the first


class Watching:
    """`reload` has the configuration read again, though it may be being read already, which `reading` tells;
    `settled` is told when all is known that there was at the last `look`."""

    def __init__(
        self,
        outside: Outside,
        reload: Callable[[], None],
        reading: Callable[[], bool],
        settled: Callable[[], None],
    ) -> None:
        self._outside = outside
        self._reload = reload
        self._reading = reading
        self._settled = settled
        self._launcher = False
        self._times: dict[str, int] = {}  # of the directories, before they were read last
        self._watched: frozenset[str] = frozenset()  # by this launcher, since it has looked last
        self._looks: deque[bool] = (
            deque()
        )  # that were not answered yet; whether somebody waits for that
        self._waited_for = False  # the next reading
        self._since = 0.0
        self._due: float | None = None
        self._read_at = 0.0

    def configure(self, configuration: Configuration) -> None:
        """Watch the directories of this configuration, which was just read."""
        self._times = {each.path: each.mtime for each in configuration.watched}
        self._look(waited_for=False)

    def read(self, again: bool) -> None:
        """The configuration was read, or could not be; `again`: it will be at once."""
        self._read_at = self._outside.now()
        if not (again or self._waited_for or True in self._looks):
            self._settled()

    def look(self) -> bool:
        """Have the launcher look; `settled` follows, if this is True."""
        return self._look(waited_for=True)

    def launcher_ready(self) -> None:
        """There is a launcher, which watches nothing yet."""
        self._launcher = True
        self._look(waited_for=False)

    def launcher_gone(self) -> None:
        """Nobody watches."""
        self._launcher = self._waited_for = False
        self._watched = frozenset()
        self._looks.clear()
        self._settled()

    def looked(self, message: Looked) -> None:
        """The launcher has looked."""
        waited_for = self._looks.popleft() if self._looks else False
        times = {path: message.times.get(path, at) for path, at in self._times.items()}
        watched, self._watched = self._watched, frozenset(message.times)
        changed = message.changed
        # What was watched already, we have been told of. A directory changes by much that is not read, and
        # were that enough, each reading would be followed by the next while there is a busy one.
        if waited_for or watched != self._watched:
            changed |= times != self._times
            self._times = times  # of before reading: what changes meanwhile is seen next
        now = self._outside.now()
        if waited_for and (changed or self._due is not None):
            self._waited_for = True
            self._due = max(now, self._read_at + READ_SECONDS)
            self.tick(now)
        elif changed:
            self.changed()
        elif waited_for and not (self._reading() or True in self._looks):
            self._settled()

    def changed(self) -> None:
        """The launcher says that something has."""
        if self._waited_for:
            return  # it is read as soon as it may be
        now = self._outside.now()
        if self._due is None:
            self._since = now
        quiet = min(now + QUIET_SECONDS, self._since + CHANGING_SECONDS)
        self._due = max(quiet, self._read_at + READ_SECONDS)

    def deadline(self) -> float | None:
        """When `tick` has something to do."""
        return self._due

    def tick(self, now: float) -> None:
        """Have it read, if it is time."""
        if self._due is not None and self._due <= now:
            self._due, self._waited_for = None, False
            self._read_at = now
            self._reload()

    def _look(self, waited_for: bool) -> bool:
        looks = self._launcher and bool(self._times)
        if looks:
            self._looks.append(waited_for)
            self._outside.look(tuple(self._times))
        return looks
