"""A line between two processes, of which one ends."""

from __future__ import annotations

import pytest

from kbusd.rings import entries
from kbusd.rings.line import Line, pair


def test_what_was_said_by_one_that_left_something_unread_is_heard() -> None:
    """Linux says ECONNRESET first, and what was sent comes after that."""
    ours, theirs = (Line(each, entries.WorkerMessage) for each in pair())
    ours.send(entries.Leaving(0, "not read"))
    said = [entries.Leaving(0, "first"), entries.Leaving(0, "last")]
    for each in said:
        theirs.send(each)
    theirs.close()
    for each in said:
        assert ours.receive() == (each, [])
    with pytest.raises(EOFError):
        ours.receive()
    ours.close()
