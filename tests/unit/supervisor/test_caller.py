"""What is taken from a process that waits in a request."""

from __future__ import annotations

import errno
import os
import struct
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kbusd.kdbus import abi
from kbusd.supervisor import caller, calls


def test_a_device_of_our_own_is_not_even_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    """To close it again might be to wait for ourselves."""
    taken: list[int] = []

    def take(_: int, number: int) -> int:
        taken.append(number)
        return -1

    monkeypatch.setattr(calls, "pidfd_getfd", take)
    with open("/dev/null", "rb") as null, open("/dev/zero", "rb") as zero:
        ours = {os.fstat(null.fileno()).st_rdev}
        wanted = [zero.fileno(), null.fileno(), zero.fileno()]
        with pytest.raises(OSError) as caught:
            list(caller.descriptors(os.getpid(), wanted, ours))
        assert caught.value.errno == errno.ELOOP
        assert taken == [zero.fileno()]


def test_descriptors_of_a_thread_that_is_not_the_first() -> None:
    with Path("/dev/zero").open() as zero, ThreadPoolExecutor(1) as other:
        tid = other.submit(threading.get_native_id).result()
        assert tid != os.getpid()
        (fd,) = caller.descriptors(tid, [zero.fileno()], set())
        try:
            assert os.path.sameopenfile(fd, zero.fileno())
        finally:
            os.close(fd)


@pytest.mark.parametrize("number", [999_999, -1, 1 << 31])
def test_a_descriptor_that_is_not_there(number: int) -> None:
    with pytest.raises(OSError) as caught:
        list(caller.descriptors(os.getpid(), [number], set()))
    assert caught.value.errno == errno.EBADF


def test_what_proc_says_of_a_caller() -> None:
    request = bytearray(40)
    struct.pack_into("=III", request, 24, 5, 6, os.getpid())
    found = caller.credentials(bytes(request))
    assert (found.uid, found.gid, found.pid, found.parent) == (5, 6, os.getpid(), os.getppid())
    assert found.groups == tuple(os.getgroups())
    process = found.process
    assert process is not None
    uids, gids = os.getresuid(), os.getresgid()
    assert process.uids[:3] == uids and process.gids[:3] == gids
    status = Path("/proc/self/status").read_text()
    caps = [int(line.split()[1], 16) for line in status.splitlines() if line.startswith("Cap")]
    assert list(process.caps) == caps[:4]
    assert f":{process.cgroup.decode()}\n" in Path("/proc/self/cgroup").read_text()
    assert process.space == os.stat("/proc/self/ns/pid").st_ino
    assert process.pids == (os.getpid(), os.getppid())


@pytest.mark.parametrize(
    ("text", "path"),
    [
        (b"0::/a\n", b"/a"),
        (b"9:name=systemd:/b:c\n8:pids:/d\n0::/a\n", b"/b:c"),
        (b"8:pids:/d\n7:cpu:/e\n", b"/d"),
        (b"1:cpu:/" + b"x" * 5000, b"/" + b"x" * 1023),
        (b"", b"/"),
        (b"nonsense", b"/"),
    ],
)
def test_one_cgroup_of_several_is_told(text: bytes, path: bytes) -> None:
    assert caller._cgroup(text) == path


def test_hello_is_known_by_its_number() -> None:
    assert caller.HELLO == abi.CMD_HELLO
