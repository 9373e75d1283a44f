"""`kbusctl workers`: a real family of processes, some of them not confined as they should be."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import msgspec
import pytest

from kbusd.ctl import main as ctl
from kbusd.ctl.workers import Row
from kbusd.rings import memfd
from kbusd.sandbox import apply, inforce, kernel, profiles
from kbusd.sandbox.compile import compile_profile, encode

COMPILED = {name: compile_profile(profiles.load(name)) for name in profiles.names()}
Confine = Callable[[str], None]


def properly(name: str) -> None:
    apply.confine(COMPILED[name])


def kept(name: str) -> None:
    """As the supervisor, which keeps what it has started the others with."""
    for each, profile in COMPILED.items():
        memfd.sealed(f"kbusd-profile-{each}", encode(profile))
    properly(name)


def fork(say: int, hold: int, name: str, confine: Confine, *below: Callable[[], int]) -> int:
    """A process that confines itself, starts those below, says so, and sleeps until killed."""
    pid = os.fork()
    if pid:
        return pid
    try:
        held = select.epoll()
        held.register(hold, select.EPOLLIN)
        confine(name)
        for start in below:
            start()
        os.write(say, b"x")
        held.poll()  # which every profile allows
    finally:
        os._exit(1)


@contextlib.contextmanager
def bus(
    worker: Confine = properly, broker: Confine = properly, supervisor: Confine = kept
) -> Iterator[int]:
    """A supervisor with broker, zygote, two workers, launcher and a service, all asleep."""
    ready, say = os.pipe()
    hold, held = os.pipe()
    start = partial(partial, fork, say, hold)
    pid = fork(
        say,
        hold,
        "supervisor",
        supervisor,
        start("broker", broker),
        start("zygote", properly, start("worker", worker), start("worker", properly)),
        start("launcher", properly, start("service", lambda _: None)),
    )
    try:
        heard = 0
        while heard < 7:
            heard += len(os.read(ready, 7))
        yield pid
    finally:
        for process in reversed(inforce.family(pid)):
            os.kill(process, signal.SIGKILL)
        os.waitpid(pid, 0)
        for fd in (ready, say, hold, held):
            os.close(fd)


def rows(text: str) -> list[Row]:
    return msgspec.json.decode(text, type=list[Row])


def test_a_bus_as_its_profiles_want_it(capsys: pytest.CaptureFixture[str]) -> None:
    with bus() as pid:
        assert ctl.main(["workers", "--pid", str(pid)]) == 0
        text = capsys.readouterr().out
        assert ctl.main(["workers", "--pid", str(pid), "--json"]) == 0
        found = rows(capsys.readouterr().out)
    roles = [row.process.role for row in found]
    assert sorted(roles) == ["broker", "launcher", "supervisor", "worker", "worker", "zygote"]
    by_role = {row.process.role: row for row in found}
    above = by_role["supervisor"].process.filters or 0
    assert by_role["broker"].process.filters == above + 1
    assert by_role["worker"].process.filters == above + 2
    assert by_role["worker"].process.seccomp == 2
    assert by_role["supervisor"].process.seccomp in (0, 2)
    assert by_role["worker"].process.no_new_privileges
    assert by_role["launcher"].landlock is False
    assert text.splitlines()[0].split()[:3] == ["PID", "PROCESS", "USER"]
    assert text.count("kbusd-worker") == 2
    assert "DIFFERS" not in text


def test_in_a_namespace_of_one_user_nobody_is_asked_to_be_another() -> None:
    """Each process was said to differ, as it stays root, as whom nobody there can help."""
    test = f"{__file__}::{test_a_bus_as_its_profiles_want_it.__name__}"
    alone = ["unshare", "--user", "--map-root-user", sys.executable, "-m", "pytest", "-q"]
    done = subprocess.run(
        [*alone, "-p", "no:cacheprovider", test], capture_output=True, text=True, timeout=60
    )
    if "unshare failed" in done.stderr:
        pytest.skip("no user namespaces here")
    assert done.returncode == 0, done.stdout + done.stderr


def test_landlock_is_shown_as_deduced(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        kernel.landlock_abi()
    except OSError:
        pytest.skip("this kernel has no Landlock")
    with bus() as pid:
        ctl.main(["workers", "--pid", str(pid)])
    out = capsys.readouterr().out
    assert "yes*" in out
    assert "* deduced" in out


def test_landlock_is_not_said_to_be_there_by_the_filter_alone(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It was: of a bus whose profile had none when it was started."""

    def without(name: str) -> None:
        for each, profile in COMPILED.items():
            weaker = msgspec.structs.replace(profile, landlock=None)
            memfd.sealed(f"kbusd-profile-{each}", encode(weaker))
        properly(name)

    with bus(supervisor=without) as pid:
        assert ctl.main(["workers", "--pid", str(pid)]) == (os.getuid() == 0)
    out = capsys.readouterr().out
    assert "yes*" not in out
    assert (out.count("(landlock): start the bus again") == 4) == (os.getuid() == 0)


def test_a_process_that_keeps_the_supervisor_s_namespaces_or_another_s_user_is_shown(
    capsys: pytest.CaptureFixture[str],
) -> None:
    if os.getuid() != 0:
        pytest.skip("only root can have others")

    def together(name: str) -> None:
        apply.confine(msgspec.structs.replace(COMPILED[name], unshare=0, apart=None))

    with bus(broker=together, worker=together) as pid:
        assert ctl.main(["workers", "--pid", str(pid)]) == 1
    lines = [each for each in capsys.readouterr().out.splitlines() if each.startswith("DIFFERS")]
    assert len(lines) == 2
    assert "kbusd-broker: is in the supervisor's namespaces net, ipc" in lines[0]
    assert "want one of 65536 from 2013265920 on" in lines[1]


def bare(name: str) -> None:
    """Takes the name and nothing else."""
    kernel.set_name(COMPILED[name].title)


def unfiltered(name: str) -> None:
    apply.confine(msgspec.structs.replace(COMPILED[name], bpf=b""))


def test_a_broker_that_is_not_confined_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with bus(broker=bare) as pid:
        assert ctl.main(["workers", "--pid", str(pid)]) == 1
    out = capsys.readouterr().out
    wrong = [line for line in out.splitlines() if line.startswith("DIFFERS")]
    assert all("kbusd-broker" in line for line in wrong)
    assert any(
        "seccomp mode is none" in line or "no more than its parent" in line for line in wrong
    )
    assert any("no_new_privs is not set" in line for line in wrong)
    assert any("limit core" in line for line in wrong)
    if os.getuid() == 0:
        assert any("user ids are (0, 0, 0, 0)" in line for line in wrong)


def test_a_thread_that_started_before_the_lock_down_is_shown(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def started(early: bool, name: str) -> None:
        threads = [threading.Thread(target=threading.Event().wait, daemon=True) for _ in range(3)]
        if early:
            threads.pop().start()
        apply.confine(COMPILED[name], start_threads=lambda: [each.start() for each in threads])

    for early in (True, False):
        with bus(broker=partial(started, early)) as supervisor:
            assert ctl.main(["workers", "--pid", str(supervisor)]) == early
        found = capsys.readouterr().out
        assert ("1 of its threads are not confined as the first" in found) == early


def test_a_worker_with_the_zygote_s_filter_only_is_shown(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with bus(worker=unfiltered) as pid:
        assert ctl.main(["workers", "--pid", str(pid), "--json"]) == 1
    wrong = [row for row in rows(capsys.readouterr().out) if row.differences]
    assert len(wrong) == 1
    assert "no more than its parent" in wrong[0].differences[0]
    assert wrong[0].landlock is not True


def test_a_process_by_an_unknown_name_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    def stranger(name: str) -> None:
        kernel.set_name("intruder")

    with bus(broker=stranger) as pid:
        assert ctl.main(["workers", "--pid", str(pid)]) == 1
    assert "no profile is for a process named intruder" in capsys.readouterr().out


def test_the_pid_file_says_which_bus(
    tmp_path: os.PathLike[str], capsys: pytest.CaptureFixture[str]
) -> None:
    file = os.path.join(tmp_path, "pid")
    with bus() as pid:
        with open(file, "w") as out:
            out.write(f"{pid}\n")
        assert ctl.main(["workers", "--pidfile", file]) == 0
    assert ctl.main(["workers", "--pidfile", file + "x"]) == 2
    assert "No such file" in capsys.readouterr().err


def test_what_is_no_bus_is_said_to_be_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert ctl.main(["workers", "--pid", str(os.getpid())]) == 2
    assert "not the supervisor of a bus" in capsys.readouterr().err
    assert ctl.main(["workers", "--pid", "4194304"]) == 2
    assert "no process 4194304" in capsys.readouterr().err


def test_a_process_that_has_ended_is_not_one_that_differs() -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # a zombie from now on
    try:
        with pytest.raises(ProcessLookupError, match="has ended"):
            inforce.read(pid)
    finally:
        os.waitpid(pid, 0)


def test_capabilities_are_told_by_what_is_shorter() -> None:
    assert inforce.capability_names(0) == "-"
    assert inforce.capability_names(0b11 << 6) == "setgid,setuid"
    everything = (1 << 41) - 1
    assert inforce.capability_names(everything) == "all"
    assert inforce.capability_names(everything & ~(1 << 24)) == "all but sys_resource"


def test_the_configuration_is_read_by_a_confined_process(tmp_path: Path) -> None:
    file = tmp_path / "bus.conf"
    rules = "".join(f'<allow own="a.b{number}"/>' for number in range(2000))
    file.write_text(
        "<busconfig><listen>unix:tmpdir=/tmp</listen>"
        f'<policy context="default">{rules}</policy></busconfig>'
    )
    command = [sys.executable, "-m", "kbusd.policy.reader", "--config-file", str(file)]
    titles = {compiled.title: name for name, compiled in COMPILED.items()}
    # It has more to write than the pipe holds: after the first byte it is there until we read on.
    with subprocess.Popen(command, stdout=subprocess.PIPE, pipesize=4096) as reader:
        assert reader.stdout is not None
        assert os.read(reader.stdout.fileno(), 1)
        found = inforce.read(reader.pid, titles)
        assert len(reader.stdout.read()) > 16384
    assert reader.returncode == 0
    assert found.role == "config-reader"
    us = inforce.read(os.getpid())
    wanted = COMPILED["config-reader"]
    assert inforce.differences(found, wanted, supervisor=us, parent=us) == []
