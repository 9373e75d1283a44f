# cython: boundscheck=False
"""What monitors see of a worker: copies of what its client sends, and of what the bus says to it.

A copy says whose message it is, since it may be the bus's; the receiver's worker takes only those of
the sender itself and of the bus. Of the bus's signals a monitor's worker makes its own.
"""

import cython
from cython.cimports.kbusd.rings.frame import COPY, MESSAGE, FrameHead
from cython.cimports.kbusd.workers.peers import Peers
from cython.cimports.libc.stdint import uint8_t, uint64_t
from cython.cimports.libc.string import memset

from kbusd.rings import envelope as envelopes
from kbusd.wire import body as wire_body
from kbusd.workers.errors import ACCESS_DENIED
from kbusd.workers.replica import BUS_ID

ERROR = 3
WANTS_NO_REPLY = 1


@cython.cclass
class Monitors:
    """`serial`: of the last message from the bus to our client, or in its place to monitors."""

    def __init__(self, peers: Peers, replica):
        self.peers = peers
        self.replica = replica
        self.serial = 0

    def next_serial(self) -> int:
        """The next serial of the bus towards our client; never 0."""
        self.serial = (self.serial % 0xFFFFFFFF) + 1
        return self.serial

    def copy(self, facts, head, body, fds, sender) -> cython.void:
        """A copy for every monitor whose rules match: `facts` is the envelope, `sender` the id of
        our connection or BUS_ID. Raises Gone."""
        mine: FrameHead = head[0]
        data: cython.p_char = body
        mine.kind = COPY
        mine.aux = cython.cast(uint64_t, sender)
        ids, _ = self.replica.watching(
            facts.type,
            sender,
            facts.destination,
            facts.path,
            facts.interface,
            facts.member,
            lambda: wire_body.match_arguments(body, facts.signature, facts.big_endian),
        )
        envelope = envelopes.encode(facts)
        place = cython.cast(cython.pointer(cython.const[uint8_t]), data)
        for id in ids:
            if id != self.replica.me:
                self.peers.must_send(
                    self.peers.peer(id), cython.address(mine), envelope, place, fds
                )

    def show(self, facts, serial, reply_serial, body: bytes, fds: tuple = ()):
        """A message of the bus itself, which goes to our client too, or would have gone there. `fds` stay
        the caller's."""
        head: FrameHead
        if not self.replica.monitors:
            return
        memset(cython.address(head), 0, cython.sizeof(FrameHead))
        head.kind = MESSAGE
        head.flags = WANTS_NO_REPLY
        head.serial = serial
        head.reply_serial = reply_serial
        head.body_length = len(body)
        head.fds = len(fds)
        self.copy(facts, cython.address(head), body, fds, BUS_ID)

    def show_refusal(self, destination, serial, text):
        """Message `serial` of `destination` was kept from one whom it was not addressed to alone:
        its sender hears nothing, the monitors see the answer that it would have got."""
        if self.replica.monitors:
            body = wire_body.string(text)
            self.show(denial(destination), self.next_serial(), serial, body)


def denial(destination):
    """The envelope of the bus's answer to a message that policy refused."""
    return envelopes.Envelope(ERROR, False, destination, None, None, None, ACCESS_DENIED, "s")
