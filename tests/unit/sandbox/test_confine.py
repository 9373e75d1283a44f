"""What `confine` leaves a process with, as the kernel tells it and as attempts show."""

from __future__ import annotations

import errno
import os
import resource
import socket
from functools import partial
from pathlib import Path

import msgspec
import pytest

from kbusd.sandbox import apply, compile, inforce, kernel, profiles
from kbusd.sandbox.compile import compile_profile, decode, encode
from kbusd.sandbox.compiled import Compiled
from kbusd.sandbox.errors import ProfileError, SandboxError, Unavailable
from tests.unit.sandbox.child import NOBODY, run

COMPILED = {name: compile_profile(profiles.load(name)) for name in profiles.names()}
as_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can change users")
CONFINED = ["worker", "broker", "zygote"]


def without_filter(name: str) -> Compiled:
    """All of a profile but the filter, so that the child can look at itself."""
    return msgspec.structs.replace(COMPILED[name], bpf=b"", landlock=None)


def look() -> str:
    return msgspec.json.encode(inforce.read(os.getpid())).decode()


def looked(said: str) -> inforce.InForce:
    return msgspec.json.decode(said, type=inforce.InForce)


@as_root
@pytest.mark.parametrize("name", CONFINED)
def test_root_becomes_somebody_without_any_privilege(name: str) -> None:
    found = looked(run(look, without_filter(name)).said)
    uid, gid = COMPILED[name].uid, COMPILED[name].gid
    assert found.uids == (uid,) * 4 and uid != 0
    assert found.gids == (gid,) * 4
    assert found.groups == ()
    kept = COMPILED[name].capabilities
    assert kept == (1 << 7 if name == "zygote" else 0)  # CAP_SETUID, for its children
    assert found.effective == found.permitted == kept
    assert found.bounding == found.inheritable == found.ambient == 0
    assert found.no_new_privileges
    assert found.dumpable is False
    assert found.limits["core"] == (0, 0)


@as_root
def test_a_worker_becomes_a_user_of_its_own_and_can_be_no_other() -> None:
    zygote = without_filter("zygote")
    found = [looked(run(look, without_filter("worker"), before=zygote).said) for _ in range(2)]
    first, count = COMPILED["worker"].apart or (0, 1)
    for each in found:
        assert each.uids == (first + each.pid % count,) * 4
        assert each.gids == (COMPILED["zygote"].gid,) * 4
        assert each.permitted == each.bounding == 0
    assert found[0].uids != found[1].uids
    assert run(lambda: os.setresuid(0, 0, 0), COMPILED["zygote"]).by_filter


def test_users_that_this_namespace_does_not_have_are_not_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert COMPILED["worker"].apart
    monkeypatch.setattr(compile, "there", lambda *_: None)
    compiled = compile_profile(profiles.load("worker"))
    assert compiled.apart is None
    assert "its children share a user" in " ".join(compiled.notes)
    assert compile_profile(profiles.load("zygote")).capabilities == 0


@pytest.mark.parametrize("name", CONFINED)
def test_an_ordinary_user_stays_who_he_is_and_is_confined_all_the_same(name: str) -> None:
    uid = NOBODY if os.getuid() == 0 else os.getuid()
    found = looked(run(look, without_filter(name), ordinary=True).said)
    assert found.uids == (uid,) * 4
    assert found.effective == found.permitted == 0
    assert found.no_new_privileges
    assert found.dumpable is False
    assert found.limits["core"] == (0, 0)
    outcome = run(lambda: socket.socket(), COMPILED[name], ordinary=True)
    assert outcome.by_filter


@as_root
def test_root_cannot_come_back() -> None:
    def work() -> list[str]:
        said = []
        for attempt in (
            partial(os.setresuid, 0, 0, 0),
            partial(os.setgroups, [0]),
            partial(kernel.set_capabilities, 1 << 7),
            partial(resource.setrlimit, resource.RLIMIT_CORE, (1, 1)),
        ):
            try:
                attempt()
                said.append("done")
            except (OSError, ValueError):
                said.append("refused")
        return said

    assert run(work, without_filter("worker")).said == str(["refused"] * 4)


@as_root
def test_the_config_reader_stays_root_without_powers() -> None:
    found = looked(run(look, without_filter("config-reader")).said)
    assert found.uids == (0, 0, 0, 0)
    assert found.effective == found.permitted == found.bounding == 0


@as_root
def test_the_supervisor_and_launcher_keep_what_their_profiles_say_and_services_lose_nothing() -> (
    None
):
    before = inforce.read(os.getpid())
    for name in ("supervisor", "launcher"):
        found = looked(run(look, COMPILED[name]).said)
        assert found.effective == found.permitted == COMPILED[name].capabilities & before.permitted  # type: ignore[operator]
        assert found.bounding == before.bounding
        assert not found.no_new_privileges
        assert found.seccomp == 0


@as_root
def test_confined_processes_see_no_network_interface() -> None:
    names = run(lambda: Path("/proc/self/net/dev").read_text(), without_filter("zygote")).said
    assert [line.split(":")[0].strip() for line in names.splitlines()[2:]] == ["lo"]


@pytest.mark.parametrize("ordinary", [False, True])
def test_landlock_denies_every_path_without_the_filter_s_help(ordinary: bool) -> None:
    try:
        kernel.landlock_abi()
    except OSError:
        pytest.skip("this kernel has no Landlock")
    profile = msgspec.structs.replace(COMPILED["worker"], bpf=b"")

    def work() -> list[int | None]:
        said: list[int | None] = []
        for path in ("/etc/passwd", "/", "/proc/self/status", "/dev/null"):
            try:
                os.close(os.open(path, os.O_RDONLY))
                said.append(0)
            except OSError as error:
                said.append(error.errno)
        return said

    assert run(work, profile, ordinary=ordinary).said == str([errno.EACCES] * 4)


def _open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


@pytest.mark.parametrize("keep", [[], [0], [5], [0, 1, 2], [2, 1, 0, 9, 9]])
def test_keeping_descriptors_from_zero_on_keeps_them(keep: list[int]) -> None:
    pid = os.fork()
    if pid == 0:
        for fd in (5, 9, 30):
            os.dup2(2, fd)
        os.dup2(2, 0)
        apply.close_all_but(keep)
        right = [fd for fd in range(40) if _open(fd)] == sorted(set(keep))
        os._exit(0 if right else 1)
    assert os.waitpid(pid, 0)[1] == 0


def test_a_required_feature_that_cannot_be_had_stops_the_process() -> None:
    profile = msgspec.structs.replace(
        COMPILED["worker"],
        unshare=0x40000000,
        required=COMPILED["worker"].required | {"namespaces"},
    )

    def work() -> None:
        apply.confine(profile)

    outcome = run(work, ordinary=True)
    assert outcome.said.startswith(
        "Unavailable: profile worker: [namespaces] is required but can't be had here: "
        "Operation not permitted (errno 1)"
    )
    assert "/etc/kbusd/profiles" in outcome.said


def test_landlock_where_there_is_none_is_a_warning_or_an_error_as_the_profile_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def missing(_paths: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(kernel, "landlock", missing)
    optional = COMPILED["worker"]
    warned = run(lambda: apply.confine(optional), ordinary=True)
    assert warned.said == str(["profile worker: no landlock: Function not implemented (errno 38)"])
    required = msgspec.structs.replace(optional, required=optional.required | {"landlock"})
    refused = run(lambda: apply.confine(required), ordinary=True)
    assert refused.status == 1
    assert "[landlock] is required" in refused.said


def test_a_filter_that_the_kernel_refuses_stops_the_process() -> None:
    broken = msgspec.structs.replace(COMPILED["worker"], bpf=b"\xff" * 8)
    outcome = run(lambda: apply.confine(broken))
    assert "[seccomp] is required but can't be had here: Invalid argument" in outcome.said


def test_a_worker_is_confined_twice_once_by_the_zygote() -> None:
    nested = msgspec.structs.replace(COMPILED["zygote"], landlock=None)
    opens = msgspec.structs.replace(COMPILED["worker"], bpf=b"", landlock=None)
    # The worker's own filter off, the zygote's still kills what it does not name.
    assert run(lambda: socket.socket(), opens, before=nested).by_filter


def test_what_is_compiled_survives_the_way_to_a_child() -> None:
    for compiled in COMPILED.values():
        assert decode(encode(compiled)) == compiled
    with pytest.raises(msgspec.DecodeError):
        decode(b"\x80")


def test_the_bus_s_configured_user_is_preferred_and_root_never_taken() -> None:
    profile = profiles.load("worker")
    assert compile_profile(profile, user="nobody").uid == NOBODY
    assert compile_profile(profile, user="root").uid not in (0, None)
    assert compile_profile(profile, user="no-such-user").uid not in (0, None)
    assert profile.user is not None
    nobody = msgspec.structs.replace(profile.user, names=("no-such-user",))
    with pytest.raises(ProfileError, match=r"user\.names: none of the users no-such-user exists"):
        compile_profile(msgspec.structs.replace(profile, user=nobody))


def test_sandbox_errors_say_which_and_why() -> None:
    error = Unavailable("worker", "landlock", "Function not implemented")
    assert isinstance(error, SandboxError)
    assert issubclass(ProfileError, SandboxError)  # whoever starts a process catches one
    assert (error.profile, error.feature) == ("worker", "landlock")
    assert "required = false" in str(error)


@pytest.mark.parametrize("name", [*CONFINED, "config-reader"])
def test_a_log_file_of_any_size_can_be_written_to(name: str, tmp_path: Path) -> None:
    # Standard error can be a file that is large already: no limit of file size may cut it off.
    fd = os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.ftruncate(fd, 1 << 40)
    try:
        assert run(lambda: os.write(fd, b"a line\n"), COMPILED[name]).said == "7"
    finally:
        os.close(fd)


def test_a_demanded_domain_that_can_not_be_had_stops_the_process() -> None:
    worker = msgspec.structs.replace(COMPILED["worker"], selinux="no_such_t")
    demanded = msgspec.structs.replace(worker, required=worker.required | {"selinux"})
    assert "[selinux] is required but can't be had" in run(lambda: apply.confine(demanded)).said
    wanted = msgspec.structs.replace(worker, required=worker.required - {"selinux"})
    assert "profile worker: no selinux:" in run(lambda: apply.confine(wanted)).said
