"""`kbusctl profile learn` finds what a profile lacks, from a bus at work; and our profiles have no rule
that nothing needs.

For that, each system call of a running bus is asked about (seccomp_unotify(2)), and it is noted by which rule, and
with which arguments, it is allowed. Exactly one rule allows a call with these arguments, since the rules of a
profile don't overlap (the filter and kbusd/sandbox/judge.py would not agree, tests/unit/sandbox/test_judge.py): so without
the rule this call would have ended the process. That is shown, too: each rule is dropped, and is missed.
What is not used has to say that it is "Kept", and for what.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from kbusd.ctl import learn as tool
from kbusd.ctl.main import main
from kbusd.sandbox import constants, inforce, profiles
from kbusd.sandbox.judge import ALLOW, KILL

from .daemon import Bus
from .procs import eventually

pytestmark = [
    pytest.mark.kbusd_only,
    pytest.mark.skipif(os.geteuid() != 0, reason="it fetches a descriptor from a process: root"),
]


KINDS = [
    "worker",
    "kdbus-worker",
    pytest.param("broker", marks=pytest.mark.slow),
    pytest.param("zygote", marks=pytest.mark.slow),
]
KEPT = "Kept"


@cache
def watched(kind: str, time: int = 1) -> tool.Learner:
    """What this kind of process did while there was all kinds of traffic."""
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as mount:
        os.chmod(folder, 0o711)
        learner = tool._learn(profiles.load(kind), Path(folder) / "bus", [], mount)
    assert learner.traffic == 0, "the traffic got through"
    return learner


def learn(capfd: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    status = main(["profile", "learn", *arguments])
    return status, capfd.readouterr().out


@pytest.mark.parametrize("kind", KINDS)
def test_our_profiles_lack_nothing(kind: str) -> None:
    learner = watched(kind)
    said = list(tool.report(learner))
    assert not any(action == KILL for seen in learner.seen.values() for action, _ in seen.said), (
        said
    )
    assert any(line.startswith("The profile has all that was needed") for line in said), said
    assert any(" recvmsg              allow    " in line for line in said)


def unneeded(learner: tool.Learner) -> set[tuple[str, str, int]]:
    """What the profile has, does not keep, and the processes did without: call, rule, value."""
    seccomp = learner.profile.seccomp
    assert seccomp is not None
    found = set()
    for rule in seccomp.rules:
        if rule.when not in learner.conditions or rule.why.startswith(KEPT):
            continue
        for call in rule.calls:
            seen = learner.seen.get(call)
            if seen is None or (rule.errno or ALLOW, rule.origin) not in seen.said:
                found.add((call, rule.origin, -1))
                continue
            for argument in rule.arguments:
                wanted = {constants.ARGUMENTS[each] for each in argument.one_of or ()}
                unused = wanted - {each for each in seen.values[argument.index] if each is not None}
                found |= {(call, rule.origin, value) for value in unused}
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_no_rule_is_unneeded(kind: str) -> None:
    left = unneeded(watched(kind))
    for again in (2, 3):  # some of it hangs on who is faster
        left = left and left & unneeded(watched(kind, again))
    assert not left


# What is run with less in a profile: without this call in the rule that stands there, or with one value less for
# it; "" for nothing less.
LESS = """
import sys, msgspec
from kbusd.sandbox import compile, profiles
kind, origin, call, value = sys.argv[1:5]
del sys.argv[1:5]
load, replace = profiles.load, msgspec.structs.replace
def without(argument):
    left = tuple(each for each in argument.one_of or () if each != value)
    return replace(argument, one_of=left) if value in (argument.one_of or ()) else argument
def fewer(rule):
    if rule.origin != origin or call not in rule.calls:
        yield rule
        return
    if value:
        yield replace(rule, calls=(call,), arguments=tuple(map(without, rule.arguments)))
    if others := tuple(each for each in rule.calls if each != call):
        yield replace(rule, calls=others)
def less(name):
    profiles.load = load  # those that it extends are read whole
    profile = load(name)
    profiles.load = less
    if name != kind:
        return profile
    rules = tuple(less for rule in profile.seccomp.rules for less in fewer(rule))
    return replace(profile, seccomp=replace(profile.seccomp, rules=rules))
profiles.load = less
"""


class Drop(NamedTuple):
    origin: str
    call: str
    value: str = ""

    def __str__(self) -> str:
        return f"{self.call} {self.value} ({self.origin})"


def drops(kind: str) -> list[Drop]:
    """All that can be dropped from its profile, and is not kept."""
    seccomp = profiles.load(kind).seccomp
    assert seccomp is not None
    here, found = tool.conditions(), []
    for rule in seccomp.rules:
        if rule.when in here and not rule.why.startswith(KEPT):
            for call in rule.calls:
                found.append(Drop(rule.origin, call))
                several = [each.one_of for each in rule.arguments if len(each.one_of or ()) > 1]
                found += [Drop(rule.origin, call, v) for values in several for v in values or ()]
    return found


def has_died(log: str) -> bool:
    return "SIGSYS" in log or "a worker could not be confined" in log


def is_missed(kind: str, drop: Drop) -> bool:
    """Whether something dies without it; some of it hangs on who is faster."""
    return any(dies_without(kind, drop) for _ in range(3))


def dies_without(kind: str, drop: Drop) -> bool:
    """Whether something does as the bus starts, or of the traffic."""
    run = f"{LESS}\nfrom kbusd.main import main\nsys.exit(main())"
    with tempfile.TemporaryDirectory() as mount:
        daemon = [sys.executable, "-c", run, kind, *drop]
        try:
            bus = Bus(daemon=daemon, options=[f"--kdbusfs={mount}"])
        except AssertionError as error:  # it does not even start
            return has_died(str(error))
        node = f"{mount}/{os.geteuid()}-session/bus"
        traffic = [sys.executable, "-m", "kbusd.ctl.traffic", str(bus.socket), node]
        users = subprocess.Popen(traffic, stderr=subprocess.DEVNULL)
        try:
            eventually(
                lambda: has_died(bus.log()) or users.poll() is not None,
                f"the traffic goes on without {drop}",
                60,
            )
            return has_died(bus.log())
        finally:
            users.kill()
            bus.kill()  # first: they may wait for what a node answers
            users.wait()
            subprocess.run(["umount", "-l", mount], check=False, stderr=subprocess.DEVNULL)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", ["worker", "kdbus-worker", "broker", "zygote"])
def test_each_rule_that_is_dropped_is_missed(kind: str) -> None:
    """Several at once, each by a bus of its own: they wait most of the time."""
    dropped = drops(kind)
    with ThreadPoolExecutor(4) as pool:
        missed = list(pool.map(is_missed, [kind] * len(dropped), dropped))
    assert [str(drop) for drop, found in zip(dropped, missed, strict=True) if not found] == []


# The others are for the processes that live on. It is not watched, so each is dropped here.
OWN = [drop for drop in drops("config-reader") if "config-reader" in drop.origin]
CONFIGURATION = """<busconfig><listen>unix:tmpdir=/tmp</listen><standard_session_servicedirs/>
<policy user="nobody"><allow own="a.b"/></policy><policy user="no-such-user-at-all"><allow own="a.b"/></policy>
<policy context="default"><allow own="*"/></policy></busconfig>"""


@pytest.mark.parametrize("drop", [Drop("", ""), *OWN], ids=str)
def test_the_config_reader_needs_each_of_its_rules(drop: Drop, tmp_path: Path) -> None:
    file = tmp_path / "bus.conf"
    file.write_text(CONFIGURATION)
    run = f"{LESS}\nfrom kbusd.policy.reader import main\nsys.exit(main())"
    command = [sys.executable, "-c", run, "config-reader", *drop, "--config-file", str(file)]
    done = subprocess.run(command, check=False, capture_output=True, timeout=30)
    assert done.returncode == (-signal.SIGSYS if drop.call else 0), done.stderr


def test_what_a_profile_lacks_is_proposed(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = profiles.find("base").read_text()
    (tmp_path / "base.toml").write_text(
        ours.replace('"sendmsg", ', "").replace('["PROT_EXEC"]', '["PROT_WRITE"]', 1)
    )
    worker = profiles.find("worker").read_text()
    (tmp_path / "worker.toml").write_text(worker)
    monkeypatch.setattr(profiles, "OVERRIDES", tmp_path)
    status, said = learn(capfd, "worker")
    assert status == 1
    assert 'calls = ["sendmsg"]' in said
    assert f"for {tmp_path / 'worker.toml'}, to be added to what is there" in said
    assert "# other rules name it with other arguments" in said.partition('calls = ["mmap"]')[2]
    assert '{ index = 2, equals = ["0x4040"] }' in said  # flags of sendmsg(2)
    assert "argument 2: " in said


def test_the_admin_s_own_traffic_is_watched(capfd: pytest.CaptureFixture[str]) -> None:
    command = (
        "import os, jeepney.io.blocking as j;"
        "j.open_dbus_connection(os.environ['DBUS_SESSION_BUS_ADDRESS'], auth_timeout=60).close()"
    )
    status, said = learn(capfd, "worker", "--", sys.executable, "-c", command)
    assert status == 0, said
    assert "recvmsg" in said


def test_a_bus_that_ends_is_told_and_not_taken_for_one_that_lacks_nothing(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["profile", "learn", "worker", "--kdbusfs", str(tmp_path / "none")]) == 2
    said = capfd.readouterr()
    assert "kbusctl: the bus did not start" in said.err and "cannot mount" in said.err
    assert said.out == "" and "Traceback" not in said.err
    end = (
        "import os, signal; from kbusd.sandbox import inforce;"
        "mine = inforce.family(os.getppid());"
        "os.kill(next(each for each in mine[1:] if each != os.getpid()), signal.SIGTERM);"
        "signal.pause()"
    )
    assert main(["profile", "learn", "worker", "--", sys.executable, "-c", end]) == 2
    said = capfd.readouterr()
    assert "kbusctl: the bus ended before its traffic did" in said.err
    assert said.out == ""


def test_traffic_that_fails_or_never_comes_is_no_success(capfd: pytest.CaptureFixture[str]) -> None:
    status, said = learn(capfd, "worker", "--", "false")
    assert status == 1
    assert "The traffic failed (status 1)" in said and "all that was needed" not in said
    status, said = learn(capfd, "worker", "--", "true")
    assert status == 1
    assert "all that was needed" not in said


TALKS = (
    "import os, sys, signal, jeepney.io.blocking as j;"
    "bus = j.open_dbus_connection(os.environ['DBUS_SESSION_BUS_ADDRESS'], auth_timeout=60);"
    "print('here', flush=True); signal.pause()"
)


def left_in(place: str) -> list[int]:
    """Processes of a bus whose socket is there."""
    found = []
    for entry in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if place in Path(f"/proc/{entry}/environ").read_text(errors="replace"):
                found.append(int(entry))
    return found


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_nothing_is_left_of_who_is_killed(number: signal.Signals, tmp_path: Path) -> None:
    """Not even a worker that has asked, and had the descriptor itself at which it would be answered."""
    command = [sys.executable, "-m", "kbusd.ctl.main", "profile", "learn", "worker", "--"]
    command += [sys.executable, "-c", TALKS]
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as learns:
        assert learns.stdout and learns.stdout.readline() == "here\n"
        family = inforce.family(learns.pid)
        pidfds = {each: os.pidfd_open(each) for each in family}
        assert len(family) > 5
        called = {each: Path(f"/proc/{each}/cmdline").read_text() for each in family}
        (traffic,) = [each for each in family[1:] if TALKS in called[each]]
        assert any("kbusd.workers.zygote" in each for each in called.values())
        try:
            learns.send_signal(number)
            if number == signal.SIGKILL:
                os.kill(traffic, signal.SIGKILL)
            for pid, pidfd in pidfds.items():
                assert select.select([pidfd], [], [], 20)[0], called[pid]
            eventually(lambda: not left_in(str(tmp_path)), "nor of those who came meanwhile")
        finally:
            for pidfd in pidfds.values():
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                os.close(pidfd)
            for pid in left_in(str(tmp_path)):
                os.kill(pid, signal.SIGKILL)
    assert number == signal.SIGKILL or not list(tmp_path.iterdir())
