"""Lines for the admin: whose they are, that a client's words can't forge one, and how many."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from kbusd.rings import journal
from kbusd.rings.journal import MAX_LINE, Journal


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for fd in ends:
        os.close(fd)


def said(journal: Journal, reader: int, *texts: str) -> list[str]:
    for text in texts:
        journal.say(text)
    return os.read(reader, 65536).decode().splitlines()


def test_a_line_is_one_line(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    lines = said(Journal("who", writer), reader, "a\nkbusd: b\x1b[2J", "c" * 5000)
    assert lines == ["who: a?kbusd: b?[2J", "who: " + "c" * MAX_LINE]


def test_only_so_many_in_a_second(pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(journal.time, "monotonic", lambda: now)
    reader, writer = pipe
    limited = Journal("who", writer, per_second=3)
    assert said(limited, reader, *"abcde") == ["who: a", "who: b", "who: c"]
    now = 101.0
    assert said(limited, reader, "f", "g") == [
        "who: f (2 lines before this one were lost)",
        "who: g",
    ]


def test_it_never_waits_for_a_reader(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    full = Journal("who", writer)
    for _ in range(200):
        full.say("x" * MAX_LINE)
    assert len(os.read(reader, 1 << 20)) <= 65536
    (line,) = said(full, reader, "y")
    assert line.startswith("who: y (") and line.endswith(" lines before this one were lost)")
