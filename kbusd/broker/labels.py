"""Which labels of clients SELinux keeps apart: the permission `send_msg` of its class `dbus`.

The label of a connection never changes. So it is asked once for each two labels that are there, in both
directions, and what is refused stands in the log before the first connection of a label does; every
worker knows from that to whom its client may send, and can't ask for itself. The bus is a party like any
other: the empty label stands for its own.
"""

from __future__ import annotations

from collections import Counter

from kbusd.broker.outside import Outside
from kbusd.rings.entries import LabelApart

SEND = "send_msg"
BUS = b""


class Labels:
    """The labels of all connections, and those of them that are kept apart."""

    def __init__(self, outside: Outside) -> None:
        self._outside = outside
        self._of: Counter[bytes] = Counter()
        self.apart: dict[bytes, LabelApart] = {}

    def may_join(self, label: bytes) -> bool:
        """Whether a client of this label and the bus may talk to each other."""
        return self._may(label, None) and self._may(None, label)

    def join(self, label: bytes) -> None:
        """One more connection has it."""
        self._of[label] += 1
        if self._of[label] == 1:
            self._tell(label)

    def leave(self, label: bytes) -> None:
        """One less has it."""
        self._of[label] -= 1
        if not self._of[label]:
            del self._of[label]
            if self.apart.pop(label, None) is not None:
                self._outside.append(LabelApart(label))

    def policy_changed(self) -> bool:
        """Ask again; whether anything is different."""
        before = dict(self.apart)
        for label in self._of:
            self._tell(label)
        return before != self.apart

    def may_ever_send(self, one: bytes, other: bytes) -> bool:
        """Whether any message may pass between the two, in either direction."""
        return self._may(one, other) or self._may(other, one)

    def _tell(self, label: bytes) -> None:
        """To the log, if it is news."""
        others = sorted({BUS, *self._of})
        to = tuple(each for each in others if not self._may(label, each or None))
        of = tuple(each for each in others if not self._may(each or None, label))
        entry = LabelApart(label, to, of)
        known = self.apart.get(label, LabelApart(label))
        if entry != known:
            self._outside.append(entry)
        self.apart.pop(label, None)
        if to or of:
            self.apart[label] = entry

    def _may(self, sender: bytes | None, receiver: bytes | None) -> bool:
        return self._outside.allows(sender, receiver, SEND)
