"""A kdbus message on its way from the sender's worker to the receiver's.

The sender's worker has read it from its client's memory and checked it; the receiver's trusts nothing
of that, since a client may have taken its worker over. Who sent it is not said here: that is whoever
owns the ring that it came by. What a receiver learns of the sender's ids, groups, label and names is
the bus's word; only what a process can choose for itself (`About`) is the sender's.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from kbusd.kdbus import abi, bloom, message, names

BYTES, ZEROES, MEMFD = 0, 1, 2

_FLAGS = abi.MSG_EXPECT_REPLY | abi.MSG_NO_AUTO_START | abi.MSG_SIGNAL
_U64 = 1 << 64


class Faked(msgspec.Struct, frozen=True, array_like=True):
    """What a privileged client pretends to be (HELLO); None is not told. Only believed of one."""

    creds: tuple[int, int, int, int, int, int, int, int] | None = None
    pids: tuple[int, int, int] | None = None
    label: bytes | None = None


class About(msgspec.Struct, frozen=True, array_like=True):
    """What the sender's process says of itself; None is not known. `offered`: ATTACH flags."""

    tid: int = 0
    tid_comm: bytes | None = None
    pid_comm: bytes | None = None
    exe: bytes | None = None
    cmdline: bytes | None = None
    description: bytes | None = None
    ppid: int = 0
    offered: int = 0
    faked: Faked | None = None


class Parcel(msgspec.Struct, frozen=True, array_like=True):
    """`parts` are (BYTES, ZEROES or MEMFD; bytes; where the segment begins in its memfd).

    The vectors' bytes travel beside it, one after another, and the descriptors of memfds and then
    those of the message. `filter`: generation and bits. `offered`: the ATTACH flags that the sender
    grants. `sent`: CLOCK_MONOTONIC and CLOCK_REALTIME in ns. `origin`: the id (u64) of who, gone by now, sent
    it to an activator or to a former owner of `dst_name`, which passes it on; or the sender's own: it is
    sent again, as `dst_name` has moved. What then has no room is lost to its receiver, as it was sent already."""

    flags: int
    priority: int
    dst_id: int
    payload_type: int
    cookie: int
    reply_or_timeout: int
    parts: tuple[tuple[int, int, int], ...] = ()
    fds: int = 0
    dst_name: str | None = None
    filter: tuple[int, bytes] | None = None
    offered: int = 0
    sent: tuple[int, int] = (0, 0)
    about: bytes = b""
    origin: bytes = b""

    @property
    def is_reply(self) -> bool:
        """Whether it answers a call: `reply_or_timeout` is the cookie of that."""
        asks = self.flags & (abi.MSG_EXPECT_REPLY | abi.MSG_SIGNAL)
        return not asks and self.reply_or_timeout != 0


encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Parcel).decode
_decode_about = msgspec.msgpack.Decoder(About).decode


class ParcelError(ValueError):
    """No honest worker sends this."""


def pack(
    found: message.Message, offered: int, sent: tuple[int, int], about: bytes, dst_id: int
) -> Parcel:
    """A message that its sender's worker has examined, addressed to a connection or to all."""
    header = found.header
    parts = tuple(
        (MEMFD, part.size, part.start)
        if isinstance(part, message.Memfd)
        else (BYTES if part.address else ZEROES, part.size, 0)
        for part in found.parts
    )
    filter = found.filter
    return Parcel(
        header.flags,
        header.priority,
        dst_id,
        header.payload_type,
        header.cookie,
        header.reply_or_timeout,
        parts,
        len(found.fds),
        found.dst_name,
        None if filter is None else (filter.generation, filter.bits),
        offered,
        sent,
        about,
    )


def decode(raw: bytes, length: int, fds: int, bloom_size: int) -> Parcel:
    """A parcel of another worker, with `length` bytes of vectors and `fds` descriptors beside it.

    Raises ParcelError if that can't be what a sender may send. (No number in msgpack is below -2**63 or
    above 2**64 - 1.)"""
    try:
        parcel = _decode(raw)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ParcelError(f"a parcel that does not decode: {error}") from None
    numbers = parcel.dst_id, parcel.payload_type, parcel.cookie, parcel.reply_or_timeout
    if parcel.flags & ~_FLAGS or min(*numbers, *parcel.sent) < 0:
        raise ParcelError("a parcel with numbers that no message has")
    if parcel.priority >= 1 << 63 or parcel.payload_type == abi.PAYLOAD_KERNEL:
        raise ParcelError("a parcel with a priority or payload that no sender may give")
    if (parcel.filter is not None) != bool(parcel.flags & abi.MSG_SIGNAL):
        raise ParcelError("a signal without a filter, or one without a signal")
    if parcel.filter is not None:
        generation, bits = parcel.filter
        if len(bits) != bloom_size or generation < 0:
            raise ParcelError("a bloom filter that the bus can't have")
    if parcel.dst_name is not None and not names.is_well_known(parcel.dst_name):
        raise ParcelError(f"a parcel to {parcel.dst_name!r}")
    memfds = vectors = beside = 0
    for kind, size, start in parcel.parts:
        if kind == BYTES:
            beside += size
        elif kind == MEMFD:
            memfds += 1
        elif kind != ZEROES:
            raise ParcelError("a parcel with a part that can't be")
        if size < 1 or start < 0 or start + size >= _U64:
            raise ParcelError("a parcel with a part that can't be, or that wraps around")
        if kind != MEMFD:
            vectors += size
    if not 0 <= parcel.fds <= abi.MAX_FDS_PER_USER or memfds > abi.MAX_MEMFDS:
        raise ParcelError("a parcel with too many descriptors")
    if memfds + parcel.fds != fds:
        raise ParcelError(f"{fds} descriptors came with a parcel for {memfds + parcel.fds}")
    if vectors > abi.MAX_PAYLOAD_SIZE:
        raise ParcelError("a parcel with too many bytes in vectors")
    if beside != length:
        raise ParcelError(f"{length} bytes came with a parcel that says another number")
    return parcel


def decode_about(raw: bytes) -> About:
    """What the sender says of itself. Raises ParcelError."""
    try:
        about = _decode_about(raw) if raw else About()
    except msgspec.MsgspecError as error:
        raise ParcelError(f"metadata that does not decode: {error}") from None
    faked = about.faked or Faked()
    numbers = (*(faked.creds or ()), *(faked.pids or ()), about.offered)
    if not 0 <= about.tid < 1 << 31 or not 0 <= about.ppid < 1 << 31:
        raise ParcelError(f"the thread {about.tid} of a child of {about.ppid}")
    if not all(0 <= each < _U64 for each in numbers):
        raise ParcelError("metadata with numbers that there are not")
    texts = (about.tid_comm, about.pid_comm, about.exe, about.description, faked.label)
    if any(text is not None and (b"\0" in text or len(text) > 4096) for text in texts):
        raise ParcelError("metadata that is no string")
    if about.cmdline is not None and len(about.cmdline) > 4096:
        raise ParcelError("a command line that is too long")
    return about


def filter_of(parcel: Parcel) -> bloom.Filter:
    """The bloom filter of a signal."""
    assert parcel.filter is not None
    return bloom.Filter(*parcel.filter)


def split(parcel: Parcel, data: bytes) -> Sequence[bytes | int]:
    """The parts in order: a vector's bytes, or the length of one of zeroes; memfds as b""."""
    found: list[bytes | int] = []
    at = 0
    for kind, size, _ in parcel.parts:
        if kind == BYTES:
            found.append(data[at : at + size])
            at += size
        else:
            found.append(size if kind == ZEROES else b"")
    return found
