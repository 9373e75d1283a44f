"""Messages between a kdbus client and D-Bus: the payload as a D-Bus message, and the other way round.

A kdbus client may write its payload in GVariant, as sd-bus did, or in the D-Bus wire format; it gets
GVariant. What is not a D-Bus message goes from one kdbus client to another, and to nobody else.
"""

from __future__ import annotations

from kbusd.kdbus import abi, bloom, bloommatch, payload
from kbusd.kdbus.gvariant import GVariantError, Order
from kbusd.kdbus.parcel import BYTES, Parcel
from kbusd.kdbus.payload import Message, PayloadError
from kbusd.rings.envelope import Envelope
from kbusd.wire import body as wire_body
from kbusd.wire import header as wire_header
from kbusd.wire.validate import WireError

NO_DEADLINE = (1 << 63) - 1
"""Of a D-Bus call, which says of no time when it is over (CLOCK_MONOTONIC, ns)."""

_MAX_SERIAL = (1 << 32) - 1


def read(parcel: Parcel, data: bytes) -> Message:
    """The D-Bus message that is the payload of a parcel, checked. Raises PayloadError."""
    if parcel.payload_type != abi.PAYLOAD_DBUS:
        raise PayloadError(f"a payload of type {parcel.payload_type:#x} is no D-Bus message")
    try:
        found = payload.read(data) if payload.version(data) == 2 else _read_wire(data)
    except (GVariantError, WireError) as error:
        raise PayloadError(str(error)) from None
    outside = parcel.flags, parcel.cookie, parcel.reply_or_timeout
    payload.check_agreement(outside, found.type, found.flags, found.cookie, found.reply_cookie)
    if found.unix_fds != parcel.fds:
        raise PayloadError(f"it counts {found.unix_fds} descriptors, {parcel.fds} are there")
    return found


def _read_wire(data: bytes) -> Message:
    """The same in the D-Bus wire format."""
    parsed = wire_header.parse(data)
    body = data[parsed.header_length :]
    if len(body) != parsed.body_length:
        raise PayloadError(f"a body of {len(body)} bytes says {parsed.body_length}")
    big = parsed.endian == "B"
    wire_body.check_body(body, parsed.signature.encode(), big, parsed.unix_fds)
    return Message(
        type=parsed.type,
        flags=parsed.flags,
        cookie=parsed.serial,
        reply_cookie=parsed.reply_serial or 0,
        path=parsed.path,
        interface=parsed.interface,
        member=parsed.member,
        error_name=parsed.error_name,
        unix_fds=parsed.unix_fds,
        signature=parsed.signature,
        body=body,
        order="big" if big else "little",
    )


def facts(message: Message, destination: str | None) -> Envelope:
    """What policy and match rules look at, for a message that goes to `destination`."""
    return Envelope(
        message.type,
        message.order == "big",
        destination,
        message.path,
        message.interface,
        message.member,
        message.error_name,
        message.signature,
    )


def opaque(parcel: Parcel, destination: str | None) -> Envelope:
    """The same for a payload that is no D-Bus message: only its destination is known."""
    kind = 4 if parcel.flags & abi.MSG_SIGNAL else 2 if parcel.is_reply else 1
    return Envelope(kind, False, destination, None, None, None, None, "")


def wire(message: Message, serial: int, destination: str | None) -> bytes:
    """A message in the D-Bus wire format, as our client would send it. Raises PayloadError."""
    if message.reply_cookie > _MAX_SERIAL:
        raise PayloadError(f"D-Bus has no reply to {message.reply_cookie}")
    try:
        header = wire_header.build(
            ord("B") if message.order == "big" else ord("l"),
            message.type,
            message.flags,
            message.path,
            message.interface,
            message.member,
            message.error_name,
            destination,
            None,
            message.signature,
            message.unix_fds,
            message.reply_cookie != 0,
            message.reply_cookie,
            serial,
            len(message.body),
        )
    except ValueError as error:
        raise PayloadError(str(error)) from None
    return header + message.body


def arrived(
    envelope: Envelope,
    flags: int,
    serial: int,
    reply_cookie: int,
    body: bytes,
    fds: int,
    sender: str,
    me: int,
    sent: tuple[int, int],
    parameter: bloom.Parameter,
) -> tuple[Parcel, bytes]:
    """What a D-Bus message is to the kdbus client `me`: its parcel, and the payload in GVariant.

    Raises GVariantError where GVariant can't say the same."""
    big: Order = "big" if envelope.big_endian else "little"
    message = Message(
        type=envelope.type,
        flags=flags,
        cookie=serial,
        reply_cookie=reply_cookie,
        path=envelope.path,
        interface=envelope.interface,
        member=envelope.member,
        error_name=envelope.error_name,
        destination=envelope.destination,
        sender=sender,
        unix_fds=fds,
        signature=envelope.signature,
        body=body,
        order=big,
    )
    data = payload.write(message)
    kdbus_flags = payload.kdbus_flags(envelope.type, flags)
    expects = bool(kdbus_flags & abi.MSG_EXPECT_REPLY)
    filter = None
    if kdbus_flags & abi.MSG_SIGNAL:
        bits = bloommatch.message_filter(
            parameter.size,
            parameter.n_hash,
            envelope.type,
            envelope.interface,
            envelope.member,
            envelope.path,
            wire_body.string_arguments(
                body, envelope.signature, envelope.big_endian, elements=bloommatch.MAX_ELEMENTS + 1
            ),
        )
        filter = 0, bits
    name = envelope.destination
    parcel = Parcel(
        kdbus_flags,
        0,
        abi.DST_ID_BROADCAST if name is None else me,
        abi.PAYLOAD_DBUS,
        serial,
        NO_DEADLINE if expects else reply_cookie,
        ((BYTES, len(data), 0),),
        fds,
        None if name is None or name.startswith(":") else name,
        filter,
        0,
        sent,
    )
    return parcel, data
