"""Whoever asks for a service is answered, whatever happens meanwhile, and rightly if nothing fails.

Services come, by files of which the launcher is told or not; the launcher looks, dies, hangs and comes back; the
configuration is read, for the admin or because it changed, and may be broken, or never be there: one step
of one of them at a time, in any order. At the end of each life time goes on till all is quiet.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from kbusd.broker.activation import LOOK_SECONDS
from kbusd.broker.refusal import SERVICE_UNKNOWN, SPAWN_EXEC_FAILED
from kbusd.policy.configuration import Configuration, File
from kbusd.rings import entries as e
from tests.unit.broker.world import World, service

DIRECTORY = "/s"
CLIENTS = 3
# One whose look was begun for another waits for two, and for each but the last a limit is up.
LONGEST_SECONDS = 2 * LOOK_SECONDS


def name(number: int) -> str:
    return f"test.s{number}"


@dataclass
class Asked:
    """What somebody waits for. `there`: its file was, when he asked; `excused`: something failed since."""

    number: int
    there: bool
    excused: bool
    since: float


class Life(RuleBasedStateMachine):
    """`files` are numbered from 1; `time` is the directory's."""

    def __init__(self) -> None:
        super().__init__()
        self.files = self.mtime = 1
        self.world = World(services=(service(name(1)),), watched=(File(DIRECTORY, 1),))
        self.clients = [self.world.client(worker) for worker in range(1, CLIENTS + 1)]
        self.world.events.clear()
        self.asked: dict[tuple[int, int], Asked] = {}
        self.wants_reload: set[tuple[int, int]] = set()
        self.request = 1
        self.read: deque[str] = deque()  # the steps of a reading that are to come
        self.read_files = self.read_mtime = 1
        self.reader_hangs = False
        self.gave_up = False  # to wait for the launcher
        self.no_launcher()
        self.launcher_starts()
        self.launcher_takes()
        self.launcher_says()

    def no_launcher(self) -> None:
        self.alive = self.watches = self.hangs = self.news = False
        self.looks: deque[tuple[str, ...]] = deque()  # that it has not taken
        self.says: deque[e.Looked | e.FilesChanged] = deque()  # what we have not taken

    def follow(self) -> None:
        """What the core wanted."""
        while self.world.events:
            events, self.world.events = self.world.events, []
            for event in events:
                match event:
                    case ("look", directories):
                        assert self.alive
                        self.looks.append(directories)
                    case ("reload",):
                        assert not self.read
                        self.read.extend(("stat", "list", "done"))
                    case ("launch", launch):
                        self.world.bus.activation.ended(launch.job, 0, "no such program")
                    case (int(worker), e.Reply(request)) | (int(worker), e.Failure(request)):
                        self.answered(worker, request, event[1])

    def answered(self, worker: int, request: int, answer: e.Reply | e.Failure) -> None:
        if (worker, request) in self.wants_reload:
            self.wants_reload.remove((worker, request))
            return
        asked = self.asked.pop((worker, request))
        assert isinstance(answer, e.Failure)
        assert answer.error in (SERVICE_UNKNOWN, SPAWN_EXEC_FAILED)
        if answer.error == SERVICE_UNKNOWN:
            excused = asked.excused or self.gave_up
            assert excused or not asked.there, f"{asked} was called unknown"
        else:
            assert asked.number <= self.files
        assert self.world.time - asked.since <= LONGEST_SECONDS

    def excuse(self) -> None:
        """Something fails: so it is the answer of before that those get who wait."""
        for each in self.asked.values():
            each.excused = True

    # -- clients and files ---------------------------------------------------------------------

    @rule(which=st.integers(0, CLIENTS - 1), new=st.booleans())
    def ask(self, which: int, new: bool) -> None:
        if len(self.asked) > 20:
            return
        client = self.clients[which]
        number = self.files + new
        self.request += 1
        failing = not self.alive or self.reader_hangs
        self.asked[client.worker, self.request] = Asked(number, not new, failing, self.world.time)
        self.world.bus.handle(client, e.StartService(self.request, name(number), False), ())
        self.follow()

    @rule(told=st.booleans())
    def file_comes(self, told: bool) -> None:
        """Not all file systems tell of it."""
        self.files += 1
        self.mtime += 1
        self.news |= told and self.watches

    @rule()
    def something_else_is_there(self) -> None:
        """Which is no service, and is told of by nobody."""
        self.mtime += 1

    @rule(which=st.integers(0, CLIENTS - 1))
    def client_goes(self, which: int) -> None:
        client = self.clients[which]
        self.world.bus.gone(client.worker)
        self.asked = {key: each for key, each in self.asked.items() if key[0] != client.worker}
        self.wants_reload = {each for each in self.wants_reload if each[0] != client.worker}
        self.world.events = [each for each in self.world.events if each[0] not in ("log", "wake")]
        self.follow()
        self.clients[which] = self.world.client(client.worker + CLIENTS)
        self.world.events.clear()

    # -- the launcher --------------------------------------------------------------------------

    @precondition(lambda self: not self.alive)
    @rule()
    def launcher_starts(self) -> None:
        self.no_launcher()
        self.alive = True
        self.world.bus.activation.watching.launcher_ready()
        self.follow()

    @precondition(lambda self: self.alive)
    @rule()
    def launcher_dies(self) -> None:
        self.excuse()
        self.no_launcher()
        self.world.bus.activation.launcher_gone()
        self.follow()

    @precondition(lambda self: self.alive)
    @rule()
    def launcher_hangs(self) -> None:
        self.hangs = True

    @rule()
    def launcher_goes_on(self) -> None:
        self.hangs = False

    @precondition(lambda self: self.alive and not self.hangs and (self.looks or self.news))
    @rule()
    def launcher_takes(self) -> None:
        """As launcher.py has it: what it was told of, and then one look."""
        if self.news:
            self.says.append(e.FilesChanged())
            self.news = False
        elif self.looks:
            times = dict.fromkeys(self.looks.popleft(), self.mtime)
            self.watches = True
            self.says.append(e.Looked(times, False))

    @precondition(lambda self: self.alive and not self.hangs and self.looks)
    @rule()
    def launcher_looks_first(self) -> None:
        """It was told of something since it last slept."""
        times = dict.fromkeys(self.looks.popleft(), self.mtime)
        self.watches = True
        self.says.append(e.Looked(times, self.news))
        self.news = False

    @precondition(lambda self: self.says)
    @rule()
    def launcher_says(self) -> None:
        said = self.says.popleft()
        if isinstance(said, e.Looked):
            self.world.bus.activation.watching.looked(said)
        else:
            self.world.bus.activation.watching.changed()
        self.follow()

    # -- the configuration ---------------------------------------------------------------------

    @rule()
    def admin_reloads(self) -> None:
        self.world.bus.reload()
        self.follow()

    @rule(which=st.integers(0, CLIENTS - 1))
    def client_reloads(self, which: int) -> None:
        if self.clients[which].waiting < 10:
            self.request += 1
            self.wants_reload.add((self.clients[which].worker, self.request))
            self.world.bus.handle(self.clients[which], e.ReloadConfig(self.request), ())
            self.follow()

    @rule()
    def reader_hangs_for_ever(self) -> None:
        self.excuse()
        self.reader_hangs = True

    @precondition(lambda self: self.read and not self.reader_hangs)
    @rule()
    def reads(self) -> None:
        match self.read.popleft():
            case "stat":
                self.read_mtime = self.mtime
            case "list":
                self.read_files = self.files
            case "done":
                self.world.bus.reconfigure(self.configuration())
        self.follow()

    @precondition(lambda self: self.read and self.read[0] == "done" and not self.reader_hangs)
    @rule()
    def reads_what_is_broken(self) -> None:
        self.excuse()
        self.read.clear()
        self.world.bus.reconfigure(None)
        self.follow()

    def configuration(self) -> Configuration:
        services = tuple(service(name(number)) for number in range(1, self.read_files + 1))
        return World(services=services, watched=(File(DIRECTORY, self.read_mtime),)).configuration

    # -- time ----------------------------------------------------------------------------------

    @rule(seconds=st.sampled_from([0.01, 0.3, 0.6, 3.0]))
    def time_goes_on(self, seconds: float) -> None:
        end = self.world.time + seconds
        while (due := self.world.bus.deadline()) is not None and due <= end:
            self.to(due)
        self.world.time = end

    def to(self, due: float) -> None:
        self.world.time = max(due, self.world.time)
        said = len(self.world.words)
        self.world.bus.tick()
        self.gave_up = any("has not said" in word for word in self.world.words[said:])
        self.follow()
        self.gave_up = False

    def teardown(self) -> None:
        """All go on, but who hangs."""
        for _ in range(1000):
            if self.says:
                self.launcher_says()
            elif self.alive and not self.hangs and (self.looks or self.news):
                self.launcher_takes()
            elif self.read and not self.reader_hangs:
                self.reads()
            elif (due := self.world.bus.deadline()) is not None:
                self.to(due)
            else:
                break
        else:
            raise AssertionError("it never ends")
        assert not self.asked, f"never answered: {self.asked}"
        assert self.reader_hangs or not self.wants_reload
        assert sum(client.waiting for client in self.clients) == len(self.wants_reload)


Life.TestCase.settings = settings(max_examples=300, stateful_step_count=40, deadline=None)
TestLife = Life.TestCase
