"""Where in a TOML file a key stands; tomllib reads values and forgets their lines.

For messages only: a line inside a string of several lines that looks like a key is taken for one.
"""

from __future__ import annotations

import re

Place = tuple[str | int, ...]
"""Keys on the way to a value, with numbers for the tables of an array, from 0."""

_HEADER = re.compile(r"\s*(\[\[?)\s*([\w.\-\"]+)\s*\]")
_KEY = re.compile(r"\s*([\w\-]+)\s*=")


class Lines:
    """The lines of one file, by place."""

    def __init__(self, text: str) -> None:
        self._at: dict[Place, int] = {}
        counts: dict[Place, int] = {}
        table: Place = ()
        for number, line in enumerate(text.splitlines(), 1):
            if header := _HEADER.match(line):
                table = tuple(part.strip('"') for part in header[2].split("."))
                if header[1] == "[[":
                    counts[table] = counts.get(table, -1) + 1
                    table = (*table, counts[table])
                for depth in range(1, len(table) + 1):
                    self._at.setdefault(table[:depth], number)
            elif key := _KEY.match(line):
                self._at.setdefault((*table, key[1]), number)

    def of(self, *place: str | int) -> int:
        """The line of this place, or of what it is in, or 0."""
        while place and place not in self._at:
            place = place[:-1]
        return self._at.get(place, 0)
