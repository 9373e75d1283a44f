"""What is taken from a process that waits in a request."""

from __future__ import annotations

import errno
import os

import pytest

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


@pytest.mark.parametrize("number", [999_999, -1, 1 << 31])
def test_a_descriptor_that_is_not_there(number: int) -> None:
    with pytest.raises(OSError) as caught:
        list(caller.descriptors(os.getpid(), [number], set()))
    assert caught.value.errno == errno.EBADF
