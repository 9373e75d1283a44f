"""The envelope of a frame: what stays the same from one message to the next of its kind.

Serial, reply serial, flags and the number of descriptors vary by message and stand in the binary
head of the frame, so that equal envelopes are equal bytes: the sender's worker encodes one once,
the receiver's decodes and judges one once, and both then find it by its bytes.
"""

from __future__ import annotations

import msgspec


class Envelope(msgspec.Struct, frozen=True, array_like=True):
    """The header of one D-Bus message without what varies; names as the client wrote them."""

    type: int
    big_endian: bool
    destination: str | None
    path: str | None
    interface: str | None
    member: str | None
    error_name: str | None
    signature: str
    answers: bool = False
    """A call or a signal that has a REPLY_SERIAL; answers always have."""


encode = msgspec.msgpack.Encoder().encode
decode = msgspec.msgpack.Decoder(Envelope).decode
