"""What the kernel's CUSE does, as far as the kdbus device relies on it."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import select
import signal
import stat
import threading
from collections.abc import Iterator

import pytest

from .child import Child, Say
from .cuse_device import HOLD, MOST, POINTER, REVERSE, WAIT, Device, serve

pytestmark = pytest.mark.guest

NAME = "kdbus-test/x"
LIBC = ctypes.CDLL(None, use_errno=True)


def ioctl(fd: int, command: int, argument: int = 0) -> int:
    """ioctl(2) with a pointer, and without trying again when it is interrupted."""
    result = LIBC.ioctl(fd, ctypes.c_ulong(command), ctypes.c_void_p(argument))
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return int(result)


@pytest.fixture
def device() -> Iterator[Device]:
    made = Device(NAME)
    yield made
    made.stop()


@pytest.fixture
def client(device: Device) -> Iterator[int]:
    """An open handle, the server's number 1."""
    fd = os.open(device.path, os.O_RDWR | os.O_CLOEXEC)
    assert device.request("open")["handle"] == 1
    yield fd
    os.close(fd)


def test_a_node_is_there_at_once_and_is_root_s_alone(device: Device) -> None:
    found = device.path.stat()
    assert stat.S_ISCHR(found.st_mode)
    assert stat.S_IMODE(found.st_mode) == 0o600
    assert (found.st_uid, found.st_gid) == (0, 0)


def test_a_name_is_served_once(device: Device) -> None:
    second = Child(serve, NAME)
    assert second.hear() == {"is": "ready"}  # its reply was taken; only the read after it fails
    assert f"[Errno {errno.ENODEV}]" in second.hear()
    second.wait()
    os.close(os.open(device.path, os.O_RDWR))
    device.request("open")


def test_what_is_written_and_read_arrives_in_pieces_of_32_pages(
    device: Device, client: int
) -> None:
    # Aligned to pages; else a piece is shorter by what its first page lacks.
    with mmap.mmap(-1, MOST + 4096) as memory, memoryview(memory) as view:
        for size, pieces in ((1, [1]), (MOST, [MOST]), (MOST + 1, [MOST, 1])):
            view[:size] = data = os.urandom(size)
            assert os.write(client, view[:size]) == size
            assert [device.request("write")["size"] for _ in pieces] == pieces
            view[:] = bytes(len(view))
            assert os.readv(client, [view[:MOST]]) == pieces[-1]
            assert view[: pieces[-1]] == data[-pieces[-1] :]
            assert device.request("read")["size"] == MOST


@pytest.mark.parametrize("size", [1, 4096, MOST - POINTER.size])
def test_an_ioctl_follows_pointers_by_retries(device: Device, client: int, size: int) -> None:
    data = os.urandom(size)
    memory = ctypes.create_string_buffer(data, size)
    argument = ctypes.create_string_buffer(POINTER.pack(ctypes.addressof(memory), size))
    assert ioctl(client, REVERSE, ctypes.addressof(argument)) == size
    assert memory.raw == data[::-1]
    rounds = [device.request("ioctl") for _ in range(3)]
    assert [(r["in"], r["out"]) for r in rounds] == [(0, 0), (16, 0), (16 + size, size)]


def test_more_than_a_round_takes_is_the_client_s_error(device: Device, client: int) -> None:
    memory = ctypes.create_string_buffer(MOST + 1)
    argument = ctypes.create_string_buffer(POINTER.pack(ctypes.addressof(memory), MOST + 1))
    with pytest.raises(OSError) as caught:
        ioctl(client, REVERSE, ctypes.addressof(argument))
    assert caught.value.errno == errno.ENOMEM


def test_a_pointer_to_nowhere_is_efault_and_the_server_is_not_told(
    device: Device, client: int
) -> None:
    with pytest.raises(OSError) as caught:
        ioctl(client, REVERSE, 8)
    assert caught.value.errno == errno.EFAULT
    assert device.request("ioctl")["in"] == 0
    os.write(client, b"x")
    device.request("write")


def test_a_request_names_the_thread_and_user_that_made_it(device: Device, client: int) -> None:
    def write(told: list[int]) -> None:
        told.append(threading.get_native_id())
        LIBC.setfsuid(1234)
        LIBC.setfsgid(5678)
        os.write(client, b"x")

    told: list[int] = []
    thread = threading.Thread(target=write, args=(told,))
    thread.start()
    thread.join()
    request = device.request("write")
    assert (request["pid"], request["uid"], request["gid"]) == (told[0], 1234, 5678)
    assert told[0] != os.getpid()


def test_who_polls_sleeps_until_the_server_wakes_it(device: Device, client: int) -> None:
    found: list[tuple[int, int]] = []
    poll = select.poll()
    poll.register(client, select.POLLIN)
    thread = threading.Thread(target=lambda: found.extend(poll.poll(20_000)))
    thread.start()
    device.request("poll")  # it found nothing, and sleeps or is about to
    os.write(client, b"x")
    thread.join()
    assert found == [(client, select.POLLIN)]


def test_an_edge_is_seen_once_a_wake_up(device: Device, client: int) -> None:
    with select.epoll() as epoll:
        epoll.register(client, select.EPOLLIN | select.EPOLLET)
        for data in (b"one", b"two"):
            assert epoll.poll(0) == []
            os.write(client, data)
            assert epoll.poll(20) == [(client, select.EPOLLIN)]


def test_close_returns_when_the_server_released_the_handle(device: Device) -> None:
    fd = os.open(device.path, os.O_RDWR)
    device.request("open")
    copy = os.dup(fd)
    os.close(fd)
    os.write(copy, b"x")
    device.request("write")  # and no release, as there is a copy
    os.close(copy)
    assert device.request("release")["handle"] == 1


def _hold(say: Say, path: str, command: int, restart: bool) -> None:
    """Open the device, call ioctl twice, and tell how each went; a signal interrupts."""
    signal.signal(signal.SIGUSR1, lambda *_: None)
    signal.siginterrupt(signal.SIGUSR1, not restart)
    fd = os.open(path, os.O_RDWR)
    for _ in range(2):
        try:
            say(ioctl(fd, command))
        except OSError as error:
            say(errno.errorcode[error.errno or 0])


def test_a_killed_client_s_handles_are_released(device: Device) -> None:
    def sleep(say: Say) -> None:
        say(os.open(device.path, os.O_RDWR))
        signal.pause()

    client = Child(sleep)
    client.hear()
    client.kill()
    assert device.request("open")["handle"] == device.request("release")["handle"]


@pytest.mark.parametrize("restart", [False, True], ids=["EINTR", "SA_RESTART"])
def test_a_signal_interrupts_an_ioctl_that_the_server_holds(device: Device, restart: bool) -> None:
    client = Child(_hold, str(device.path), WAIT, restart)
    device.request("open")
    device.request("ioctl")
    client.signal(signal.SIGUSR1)
    device.request("interrupt")
    if not restart:
        assert client.hear() == "EINTR"
    device.request("ioctl")  # the same call again, or the second one
    client.signal(signal.SIGKILL)
    device.request("interrupt")
    assert client.wait() == -signal.SIGKILL
    device.request("release")


def test_when_the_server_dies_its_clients_are_told_and_the_name_is_free(device: Device) -> None:
    client = Child(_hold, str(device.path), HOLD, False)
    device.request("open")
    device.request("ioctl")
    old = os.open(device.path, os.O_RDWR)
    device.stop()
    assert client.hear() == "ECONNABORTED"
    assert client.hear() == "ENOTCONN"
    client.wait()
    assert not device.path.exists()
    again = Device(NAME)
    try:
        new = os.open(again.path, os.O_RDWR)
        again.request("open")
        assert os.write(new, b"x") == 1
        with pytest.raises(OSError) as caught:
            os.write(old, b"x")
        assert caught.value.errno == errno.ENOTCONN
        os.close(new)
    finally:
        os.close(old)
        again.stop()


def test_there_is_no_mmap(client: int) -> None:
    with pytest.raises(OSError) as caught:
        mmap.mmap(client, 4096, mmap.MAP_SHARED, mmap.PROT_READ)
    assert caught.value.errno == errno.ENODEV
