"""A page of promises: what nobody has offered is not to be found."""

from __future__ import annotations

import os

from kbusd.rings import promises

RECALLED = 0x100


def test_a_step_could_be_kept_while_the_first_offer_was_being_written() -> None:
    fd = promises.make()
    assert int.from_bytes(os.pread(fd, 8, 0), "little") == RECALLED
    page = promises.Promises(fd)
    os.close(fd)
    page.offer(((1, b"request", b"reply", 0, 0),))
    assert page.recall() == 0
