"""What the kernel is asked about labels, with a directory in place of /sys/fs/selinux."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from kbusd.sandbox import compile, profiles, selinux
from kbusd.sandbox.selinux import AccessVectors

SEND, OWN = 4, 1  # bits as a policy may have them


class Changes:
    """In place of the socket by which the kernel tells of another policy."""

    def setblocking(self, _: bool) -> None:
        pass

    def bind(self, _: object) -> None:
        pass

    def recvmsg(self, _: int) -> bytes:
        raise BlockingIOError


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    place = tmp_path / "class/dbus/perms"
    place.mkdir(parents=True)
    for path, text in {
        "enforce": "1",
        "deny_unknown": "0",
        "class/dbus/index": "77",
        "class/dbus/perms/send_msg": "3",
        "class/dbus/perms/acquire_svc": "1",
    }.items():
        (tmp_path / path).write_text(text)
    monkeypatch.setattr(selinux, "ROOT", str(tmp_path))
    monkeypatch.setattr(selinux.socket, "socket", lambda *_: Changes())
    return tmp_path


class Kernel:
    """Answers what is written to `access`; counts how often."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.allowed: dict[str, int] = {}
        self.permissive = False
        self.asked: list[str] = []
        read = os.read

        def written(fd: int, data: bytes) -> int:
            self.asked.append(data.decode())
            return len(data)

        def answered(fd: int, size: int) -> bytes:
            if not os.readlink(f"/proc/self/fd/{fd}").endswith("/access"):
                return read(fd, size)
            bits = self.allowed.get(self.asked[-1], 0)
            return b"%x ffffffff 0 ffffffff 1 %x" % (bits, self.permissive)

        monkeypatch.setattr(selinux.os, "write", written)
        monkeypatch.setattr(selinux.os, "read", answered)


@pytest.fixture
def kernel(root: Path, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    (root / "access").touch()
    return Kernel(monkeypatch)


def vectors(said: list[str] | None = None) -> AccessVectors:
    return AccessVectors(b"bus_t", (said if said is not None else []).append)


def test_a_permission_is_its_bit_and_is_asked_once(kernel: Kernel) -> None:
    kernel.allowed = {"a_t b_t 77": SEND, "b_t a_t 77": OWN}
    of = vectors()
    assert of.allows(b"a_t", b"b_t", "send_msg")
    assert not of.allows(b"a_t", b"b_t", "acquire_svc")
    assert not of.allows(b"b_t", b"a_t", "send_msg")
    assert of.allows(b"b_t", b"a_t", "acquire_svc")
    assert kernel.asked == ["a_t b_t 77", "b_t a_t 77"]
    kernel.allowed = {}
    of.forget()
    assert not of.allows(b"a_t", b"b_t", "send_msg")


def test_what_is_not_enforced_is_allowed(root: Path, kernel: Kernel) -> None:
    kernel.permissive = True
    assert vectors().allows(b"a_t", b"b_t", "send_msg")  # a permissive domain
    kernel.permissive = False
    of = vectors()
    assert not of.allows(b"a_t", b"b_t", "send_msg")
    (root / "enforce").write_text("0")
    of.forget()
    assert of.allows(b"a_t", b"b_t", "send_msg")


def test_a_policy_without_the_class_says_what_becomes_of_it(root: Path, kernel: Kernel) -> None:
    (root / "class/dbus/perms/send_msg").unlink()
    assert vectors().allows(b"a_t", b"b_t", "send_msg")
    (root / "deny_unknown").write_text("1")
    assert not vectors().allows(b"a_t", b"b_t", "send_msg")


def test_a_label_that_the_kernel_does_not_know_may_nothing(root: Path) -> None:
    """Here it is a file that is not there; the kernel says EINVAL."""
    said: list[str] = []
    assert not vectors(said).allows(b"", b"b_t", "send_msg")
    assert "does not say" in said[0]


def test_whether_the_policy_has_a_domain_is_asked_with_a_label_like_ours(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / "current").write_text("system_u:system_r:init_t:s0-s0:c0.c9\0")
    monkeypatch.setattr(selinux, "LABEL", str(root / "current"))
    assert selinux.knows("kbusd_worker_t")  # there is no such file: who may not ask, tries
    (root / "context").touch()
    assert selinux.knows("kbusd_worker_t")
    assert (root / "context").read_text() == "system_u:object_r:kbusd_worker_t:s0-s0:c0.c9"

    def refuses(*_: object) -> int:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(selinux.os, "write", refuses)
    assert not selinux.knows("kbusd_worker_t")


@pytest.mark.parametrize("of_the_machine", [True, False])
def test_a_domain_is_demanded_of_root_s_bus_if_the_policy_has_it(
    monkeypatch: pytest.MonkeyPatch, of_the_machine: bool
) -> None:
    monkeypatch.setattr(compile, "selinux_enabled", lambda: True)
    monkeypatch.setattr(compile, "selinux_knows", lambda _: True)
    monkeypatch.setattr(compile, "_of_the_machine", lambda: of_the_machine)
    compiled = compile.compile_profile(profiles.load("worker"))
    assert ("selinux" in compiled.required) == of_the_machine
    assert compiled.selinux == "kbusd_worker_t"


def test_a_policy_without_our_module_is_told_and_no_domain_tried(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compile, "selinux_enabled", lambda: True)
    monkeypatch.setattr(compile, "selinux_knows", lambda _: False)
    compiled = compile.compile_profile(profiles.load("worker"))
    assert not compiled.selinux
    assert "SELinux's policy has no domain kbusd_worker_t" in " ".join(compiled.notes)
