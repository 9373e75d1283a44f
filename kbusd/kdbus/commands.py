"""Commands: from the bytes of a struct in a client's memory to a checked value.

Each command is a row of `SPECS`: size, flags, items. `parse` holds for all what ipc/kdbus/handle.c
held (__kdbus_args_parse), in its order:

1. The address is a multiple of 8, else EFAULT; the size is at least that of the struct, else EINVAL,
   and at most 32 KiB, of a message 8 KiB, else EMSGSIZE (`total_size`, for what is yet to be fetched).
2. The size has not changed while it was copied; no unknown flags; every item well formed, known to
   the command, valid in itself, and there once only unless several make sense; else EINVAL.
3. NEGOTIATE: the flags that the command knows are written over those that were asked, item types
   that it does not know are set to 0 in a NEGOTIATE item, and with the flag nothing else is done.
4. Mandatory items are there, else EINVAL.
5. return_flags are 0 from step 2 on, also where a step fails.

The decode_ functions turn what `parse` found into one frozen struct per command. Checks that need
to know the connection or bus are functions too (check_): the caller has what they need to know. All
raise Errno and nothing else, whatever the bytes.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from struct import Struct
from typing import Generic, TypeVar

import msgspec

from kbusd.kdbus import abi, bloom, items, layout, match, metadata, names, policy
from kbusd.kdbus.errors import Errno, Poke
from kbusd.kdbus.items import Item

T = TypeVar("T")

_FLAGS_AT, _RETURN_FLAGS_AT = 8, 16


class Spec(msgspec.Struct, frozen=True):
    """What a command looks like. `once` and `many` are item types; `needed` are some of them."""

    name: str
    fixed: Struct
    flags: int = 0
    once: frozenset[int] = frozenset()
    many: frozenset[int] = frozenset()
    needed: tuple[int, ...] = ()
    returns_flags: bool = True
    most: int = abi.MAX_COMMAND_SIZE
    told: int = 0  # flags that mean nothing here, and are taken as they are told in an answer


_POLICY = frozenset({abi.ITEM_NAME, abi.ITEM_POLICY_ACCESS})
_ACCESS = abi.MAKE_ACCESS_GROUP | abi.MAKE_ACCESS_WORLD
_NAME = frozenset({abi.ITEM_NAME})

SPECS = {
    abi.CMD_BUS_MAKE: Spec(
        "BUS_MAKE",
        layout.PLAIN,
        _ACCESS,
        frozenset({abi.ITEM_MAKE_NAME, abi.ITEM_BLOOM_PARAMETER, abi.ITEM_ATTACH_FLAGS_SEND}),
        needed=(abi.ITEM_MAKE_NAME, abi.ITEM_BLOOM_PARAMETER),
    ),
    abi.CMD_ENDPOINT_MAKE: Spec(
        "ENDPOINT_MAKE",
        layout.PLAIN,
        _ACCESS,
        frozenset({abi.ITEM_MAKE_NAME}),
        needed=(abi.ITEM_MAKE_NAME,),
    ),
    abi.CMD_ENDPOINT_UPDATE: Spec("ENDPOINT_UPDATE", layout.PLAIN, many=_POLICY),
    abi.CMD_HELLO: Spec(
        "HELLO",
        layout.HELLO,
        abi.HELLO_ACCEPT_FD | abi.HELLO_ACTIVATOR | abi.HELLO_POLICY_HOLDER | abi.HELLO_MONITOR,
        frozenset(
            {
                abi.ITEM_NAME,
                abi.ITEM_CREDS,
                abi.ITEM_PIDS,
                abi.ITEM_SECLABEL,
                abi.ITEM_CONN_DESCRIPTION,
            }
        ),
        frozenset({abi.ITEM_POLICY_ACCESS}),
    ),
    abi.CMD_UPDATE: Spec(
        "UPDATE",
        layout.PLAIN,
        once=frozenset({abi.ITEM_ATTACH_FLAGS_SEND, abi.ITEM_ATTACH_FLAGS_RECV}),
        many=_POLICY,
    ),
    abi.CMD_BYEBYE: Spec("BYEBYE", layout.PLAIN),
    abi.CMD_FREE: Spec("FREE", layout.FREE),
    abi.CMD_CONN_INFO: Spec("CONN_INFO", layout.INFO_COMMAND, once=_NAME),
    abi.CMD_BUS_CREATOR_INFO: Spec("BUS_CREATOR_INFO", layout.INFO_COMMAND),
    abi.CMD_LIST: Spec(
        "LIST",
        layout.LIST,
        abi.LIST_UNIQUE | abi.LIST_NAMES | abi.LIST_ACTIVATORS | abi.LIST_QUEUED,
    ),
    abi.CMD_SEND: Spec("SEND", layout.SEND, abi.SEND_SYNC_REPLY, frozenset({abi.ITEM_CANCEL_FD})),
    abi.CMD_RECV: Spec("RECV", layout.RECV, abi.RECV_PEEK | abi.RECV_DROP | abi.RECV_USE_PRIORITY),
    abi.CMD_NAME_ACQUIRE: Spec(
        "NAME_ACQUIRE",
        layout.PLAIN,
        abi.NAME_REPLACE_EXISTING | abi.NAME_ALLOW_REPLACEMENT | abi.NAME_QUEUE,
        _NAME,
        needed=(abi.ITEM_NAME,),
        told=abi.NAME_IN_QUEUE | abi.NAME_PRIMARY | abi.NAME_ACQUIRED,
    ),
    abi.CMD_NAME_RELEASE: Spec("NAME_RELEASE", layout.PLAIN, once=_NAME, needed=(abi.ITEM_NAME,)),
    abi.CMD_MATCH_ADD: Spec(
        "MATCH_ADD",
        layout.MATCH,
        abi.MATCH_REPLACE,
        many=frozenset(
            {
                abi.ITEM_BLOOM_MASK,
                abi.ITEM_NAME,
                abi.ITEM_ID,
                abi.ITEM_DST_ID,
                abi.ITEM_NAME_ADD,
                abi.ITEM_NAME_REMOVE,
                abi.ITEM_NAME_CHANGE,
                abi.ITEM_ID_ADD,
                abi.ITEM_ID_REMOVE,
            }
        ),
    ),
    abi.CMD_MATCH_REMOVE: Spec("MATCH_REMOVE", layout.MATCH),
}
"""By ioctl number."""

MESSAGE = Spec(
    "message",
    layout.MESSAGE,
    abi.MSG_EXPECT_REPLY | abi.MSG_NO_AUTO_START | abi.MSG_SIGNAL,
    frozenset({abi.ITEM_FDS, abi.ITEM_BLOOM_FILTER, abi.ITEM_DST_NAME}),
    frozenset({abi.ITEM_PAYLOAD_VEC, abi.ITEM_PAYLOAD_MEMFD}),
    returns_flags=False,
    most=abi.MAX_MESSAGE_SIZE,
)
"""What SEND points to is parsed as a command is."""


class Parsed(msgspec.Struct, frozen=True):
    """A command that is well formed, or with `negotiated` a question about it that is answered.

    `fixed` are the fields of its struct, in order. `pokes` are to be written back in any case.
    """

    fixed: tuple[int, ...]
    items: tuple[Item, ...]
    pokes: tuple[Poke, ...]
    negotiated: bool

    @property
    def flags(self) -> int:
        return self.fixed[1]

    def first(self, type: int) -> Item | None:
        """The item of a type that may be there once."""
        return next((item for item in self.items if item.type == type), None)


class Decoded(msgspec.Struct, Generic[T], frozen=True):
    """A command's value, or None if it was a negotiation; `pokes` are to be written back."""

    value: T | None
    pokes: tuple[Poke, ...]


def total_size(spec: Spec, address: int, head: bytes) -> int:
    """How many bytes to copy from `address`, where the first eight are `head`.

    Raises Errno: EFAULT for a bad address, EINVAL for a size too small, EMSGSIZE for one too large.
    """
    if address % 8:
        raise Errno(errno.EFAULT, f"{spec.name} at {address:#x}, which is no multiple of 8")
    (size,) = layout.U64.unpack(head)
    if size < spec.fixed.size:
        raise Errno(errno.EINVAL, f"{spec.name} of {size} bytes, fewer than {spec.fixed.size}")
    if size > spec.most:
        raise Errno(errno.EMSGSIZE, f"{spec.name} of {size} bytes, over {spec.most}")
    return int(size)


def parse(spec: Spec, data: bytes) -> Parsed:
    """A command from all its bytes; `total_size` said how many those are. Raises Errno."""
    pokes: tuple[Poke, ...] = (Poke(_RETURN_FLAGS_AT, bytes(8)),) if spec.returns_flags else ()
    if len(data) < spec.fixed.size:
        raise Errno(errno.EINVAL, f"{spec.name} of {len(data)} bytes")
    fixed = spec.fixed.unpack_from(data)
    size, flags = fixed[:2]
    try:
        if size != len(data):
            raise Errno(errno.EINVAL, f"{spec.name}: the size changed while it was copied")
        if unknown := flags & ~(spec.flags | spec.told | abi.FLAG_NEGOTIATE):
            raise Errno(errno.EINVAL, f"{spec.name} with unknown flags {unknown:#x}")
        found = _items(spec, data)
        pokes = _negotiate(spec, flags, found) + pokes
        if not flags & abi.FLAG_NEGOTIATE:
            for type in spec.needed:
                if all(item.type != type for item in found):
                    raise Errno(errno.EINVAL, f"{spec.name} without {items.type_name(type)}")
    except Errno as error:
        raise Errno(error.errno, error.text, pokes) from None
    return Parsed(fixed, found, pokes, bool(flags & abi.FLAG_NEGOTIATE))


def _items(spec: Spec, data: bytes) -> tuple[Item, ...]:
    found = items.split(data, spec.fixed.size)
    seen: set[int] = set()
    for item in found:
        once = item.type in spec.once or item.type == abi.ITEM_NEGOTIATE
        if not once and item.type not in spec.many:
            raise Errno(errno.EINVAL, f"{spec.name} takes no {item.name}")
        items.validate(item)
        if once and item.type in seen:
            raise Errno(errno.EINVAL, f"{spec.name} has more than one {item.name}")
        seen.add(item.type)
    return found


def _negotiate(spec: Spec, flags: int, found: tuple[Item, ...]) -> tuple[Poke, ...]:
    pokes = []
    if flags & abi.FLAG_NEGOTIATE:
        pokes.append(Poke(_FLAGS_AT, layout.U64.pack(spec.flags)))
    for item in found:
        if item.type == abi.ITEM_NEGOTIATE:
            known = spec.once | spec.many | {abi.ITEM_NEGOTIATE}
            pokes += [
                Poke(item.offset + 8 * at, bytes(8))
                for at, (type,) in enumerate(layout.U64.iter_unpack(item.data))
                if type not in known
            ]
    return tuple(pokes)


def _decode(command: int, data: bytes, value: Callable[[Parsed], T]) -> Decoded[T]:
    parsed = parse(SPECS[command], data)
    if parsed.negotiated:
        return Decoded(None, parsed.pokes)
    try:
        return Decoded(value(parsed), parsed.pokes)
    except Errno as error:
        raise Errno(error.errno, error.text, parsed.pokes) from None


def _payload(parsed: Parsed, type: int) -> bytes:
    """Of an item that the command needs."""
    return next(item.data for item in parsed.items if item.type == type)


def _text(parsed: Parsed, type: int) -> str:
    """Of an item that the command needs."""
    return next(item.text for item in parsed.items if item.type == type)


def _name(parsed: Parsed) -> str | None:
    item = parsed.first(abi.ITEM_NAME)
    return None if item is None else item.text


def _number(parsed: Parsed, type: int) -> int | None:
    item = parsed.first(type)
    return None if item is None else item.number


def _string(parsed: Parsed, type: int) -> bytes | None:
    item = parsed.first(type)
    return None if item is None else item.data[:-1]


# -- making buses and endpoints --------------------------------------------------------------


class BusMake(msgspec.Struct, frozen=True):
    """A new bus; `creator_flags` is the metadata of its maker that BUS_CREATOR_INFO may give."""

    name: str
    bloom: bloom.Parameter
    flags: int
    creator_flags: int


def decode_bus_make(data: bytes) -> Decoded[BusMake]:
    """BUS_MAKE, on the control node. What follows is names.check_owner."""

    def value(parsed: Parsed) -> BusMake:
        return BusMake(
            _text(parsed, abi.ITEM_MAKE_NAME),
            bloom.parse_parameter(_payload(parsed, abi.ITEM_BLOOM_PARAMETER)),
            parsed.flags,
            metadata.attach_flags(_number(parsed, abi.ITEM_ATTACH_FLAGS_SEND) or 0),
        )

    return _decode(abi.CMD_BUS_MAKE, data, value)


class EndpointMake(msgspec.Struct, frozen=True):
    """A new custom endpoint."""

    name: str
    flags: int


def decode_endpoint_make(data: bytes) -> Decoded[EndpointMake]:
    """ENDPOINT_MAKE, on the bus's node, for who owns it. What follows is names.check_owner."""
    return _decode(
        abi.CMD_ENDPOINT_MAKE,
        data,
        lambda parsed: EndpointMake(_text(parsed, abi.ITEM_MAKE_NAME), parsed.flags),
    )


def decode_endpoint_update(data: bytes) -> Decoded[tuple[policy.Entry, ...]]:
    """ENDPOINT_UPDATE: the policy that replaces the endpoint's."""
    return _decode(
        abi.CMD_ENDPOINT_UPDATE,
        data,
        lambda parsed: policy.parse(parsed.items, most=None, wildcards=True),
    )


# -- connections -----------------------------------------------------------------------------


class Hello(msgspec.Struct, frozen=True):
    """A new connection. `creds`, `pids` and `label` are what it pretends to be, if anything.

    Attach flags are yet to be checked, and `items` to be read as policy (`check_hello`).
    """

    flags: int
    attach_send: int
    attach_recv: int
    pool_size: int
    name: str | None
    creds: metadata.Creds | None
    pids: metadata.Pids | None
    label: bytes | None
    description: bytes | None
    items: tuple[Item, ...]

    @property
    def kind(self) -> int:
        """HELLO_ACTIVATOR, HELLO_POLICY_HOLDER, HELLO_MONITOR, or 0 for an ordinary connection."""
        return self.flags & _KINDS


_KINDS = abi.HELLO_ACTIVATOR | abi.HELLO_POLICY_HOLDER | abi.HELLO_MONITOR


def decode_hello(data: bytes) -> Decoded[Hello]:
    """HELLO, on the node of a bus or of a custom endpoint."""

    def value(parsed: Parsed) -> Hello:
        creds = parsed.first(abi.ITEM_CREDS)
        pids = parsed.first(abi.ITEM_PIDS)
        return Hello(
            parsed.flags,
            parsed.fixed[3],
            parsed.fixed[4],
            parsed.fixed[7],
            _name(parsed),
            None if creds is None else metadata.Creds(*layout.CREDS.unpack(creds.data)),
            None if pids is None else metadata.Pids(*layout.PIDS.unpack(pids.data)),
            _string(parsed, abi.ITEM_SECLABEL),
            _string(parsed, abi.ITEM_CONN_DESCRIPTION),
            parsed.items,
        )

    return _decode(abi.CMD_HELLO, data, value)


class Admitted(msgspec.Struct, frozen=True):
    """What HELLO leads to: its attach flags, and the policy that the connection brings."""

    attach_send: int
    attach_recv: int
    policy: tuple[policy.Entry, ...]


def check_hello(hello: Hello, owner: bool, custom: bool, page_size: int) -> Admitted:
    """Whether a connection may be what it asks to be (connection.c, kdbus_conn_new).

    `owner`: the caller owns the bus or is privileged, and comes by no custom endpoint; `custom`: it
    does come by one. Raises Errno: EINVAL, EOPNOTSUPP, EPERM, E2BIG.
    """
    special = hello.kind & ~abi.HELLO_MONITOR
    if not hello.pool_size or hello.pool_size % page_size:
        raise Errno(errno.EINVAL, f"a pool of {hello.pool_size} bytes: not whole pages")
    if hello.kind.bit_count() > 1:
        raise Errno(errno.EINVAL, "a connection can't be of two kinds")
    if hello.name is not None and not special:
        raise Errno(errno.EINVAL, "only activators and policy holders say a name in HELLO")
    if special:
        if hello.name is None:
            raise Errno(errno.EINVAL, "an activator or policy holder without a name")
        if not names.is_pattern(hello.name):
            raise Errno(errno.EINVAL, f"{hello.name!r} is no well-known name")
    if hello.kind == abi.HELLO_MONITOR and custom:
        raise Errno(errno.EOPNOTSUPP, "a custom endpoint has no monitors")
    if not owner and hello.kind:
        raise Errno(errno.EPERM, "only who owns the bus may activate, hold policy or monitor")
    if not owner and (hello.creds or hello.pids or hello.label is not None):
        raise Errno(errno.EPERM, "only who owns the bus may pretend to be somebody else")
    send = metadata.attach_flags(hello.attach_send)
    recv = metadata.attach_flags(hello.attach_recv)
    holds = hello.kind == abi.HELLO_POLICY_HOLDER
    entries = policy.parse(hello.items, most=1, wildcards=holds) if special else ()
    return Admitted(send, recv, entries)


def hello_result(
    bus_flags: int, id: int, offset: int, items_size: int, bus_uuid: bytes
) -> tuple[Poke, ...]:
    """What a connection learns: the flags and UUID of its bus, its own id, a slice of its pool.

    The slice holds `bloom_item`; the client frees it.
    """
    return (
        Poke(40, layout.U64.pack(bus_flags) + layout.U64.pack(id)),
        Poke(64, layout.U64.pack(offset) + layout.U64.pack(items_size) + bus_uuid),
    )


def bloom_item(parameter: bloom.Parameter) -> bytes:
    """What HELLO puts into the new pool."""
    data = layout.BLOOM_PARAMETER.pack(parameter.size, parameter.n_hash)
    return items.build(abi.ITEM_BLOOM_PARAMETER, data)


class Update(msgspec.Struct, frozen=True):
    """What changes of a connection; None is left as it is."""

    attach_send: int | None
    attach_recv: int | None
    policy: tuple[policy.Entry, ...] | None


def decode_update(data: bytes, kind: int) -> Decoded[Update]:
    """UPDATE, of a connection of this kind (Hello.kind). Raises Errno EOPNOTSUPP as well."""

    def value(parsed: Parsed) -> Update:
        send = _number(parsed, abi.ITEM_ATTACH_FLAGS_SEND)
        recv = _number(parsed, abi.ITEM_ATTACH_FLAGS_RECV)
        entries = None
        if send is not None:
            _check_kind("metadata to send", kind, 0, abi.HELLO_MONITOR)
            send = metadata.attach_flags(send)
        if recv is not None:
            _check_kind("metadata to receive", kind, 0, abi.HELLO_MONITOR, abi.HELLO_ACTIVATOR)
            recv = metadata.attach_flags(recv)
        if any(item.type in _POLICY for item in parsed.items):
            _check_kind("policy", kind, abi.HELLO_POLICY_HOLDER)
            entries = policy.parse(parsed.items, most=1, wildcards=True)
        return Update(send, recv, entries)

    return _decode(abi.CMD_UPDATE, data, value)


def _check_kind(what: str, kind: int, *kinds: int) -> None:
    if kind not in kinds:
        raise Errno(errno.EOPNOTSUPP, f"this kind of connection has no {what}")


def decode_byebye(data: bytes) -> Decoded[Parsed]:
    """BYEBYE, which says nothing more."""
    return _decode(abi.CMD_BYEBYE, data, lambda parsed: parsed)


def decode_free(data: bytes) -> Decoded[int]:
    """FREE: the offset of a slice."""
    return _decode(abi.CMD_FREE, data, lambda parsed: parsed.fixed[3])


class Info(msgspec.Struct, frozen=True):
    """Which connection is asked about, by id or name or both, and what about it (ATTACH flags)."""

    id: int
    name: str | None
    attach_flags: int


def decode_conn_info(data: bytes) -> Decoded[Info]:
    """CONN_INFO. The name need not be one that could exist."""

    def value(parsed: Parsed) -> Info:
        flags = metadata.attach_flags(parsed.fixed[4])
        name = _name(parsed)
        if name is None and parsed.fixed[3] == 0:
            raise Errno(errno.EINVAL, "CONN_INFO about neither an id nor a name")
        return Info(parsed.fixed[3], name, flags)

    return _decode(abi.CMD_CONN_INFO, data, value)


def decode_bus_creator_info(data: bytes) -> Decoded[int]:
    """BUS_CREATOR_INFO: the ATTACH flags."""
    return _decode(
        abi.CMD_BUS_CREATOR_INFO, data, lambda parsed: metadata.attach_flags(parsed.fixed[4])
    )


def info_result(offset: int, size: int) -> tuple[Poke, ...]:
    """Where in the pool CONN_INFO or BUS_CREATOR_INFO put its answer."""
    return (Poke(40, layout.U64.pack(offset) + layout.U64.pack(size)),)


def decode_list(data: bytes) -> Decoded[int]:
    """LIST: the LIST flags."""
    return _decode(abi.CMD_LIST, data, lambda parsed: parsed.flags)


def list_result(offset: int, size: int) -> tuple[Poke, ...]:
    """Where in the pool LIST put its answer."""
    return (Poke(24, layout.U64.pack(offset) + layout.U64.pack(size)),)


# -- messages --------------------------------------------------------------------------------


class Send(msgspec.Struct, frozen=True):
    """What SEND says beside the message at `address`; `cancel_fd` is the client's number."""

    flags: int
    address: int
    cancel_fd: int | None


def decode_send(data: bytes) -> Decoded[Send]:
    """SEND without its message. A negotiation's message, if it has one, is in `negotiated_message`."""

    def value(parsed: Parsed) -> Send:
        cancel = parsed.first(abi.ITEM_CANCEL_FD)
        fd = None if cancel is None else layout.I32.unpack(cancel.data)[0]
        return Send(parsed.flags, parsed.fixed[3], fd)

    return _decode(abi.CMD_SEND, data, value)


def negotiated_message(data: bytes) -> int:
    """The address of the message that a SEND points to which only negotiates; 0 is none.

    That message is to be parsed and its pokes written, whether it negotiates itself or not.
    """
    return int(layout.SEND.unpack_from(data)[3])


def parse_message(data: bytes) -> Parsed:
    """The message of a SEND that does not negotiate; then message.examine. Raises Errno."""
    parsed = parse(MESSAGE, data)
    if parsed.negotiated:
        raise Errno(errno.EINVAL, "a message negotiates, its SEND does not", parsed.pokes)
    return parsed


def send_result(offset: int, size: int, return_flags: int) -> tuple[Poke, ...]:
    """Where in the pool the reply to a synchronous SEND lies; Pool.empty if there is none."""
    return (Poke(32, _three(offset, size, return_flags)),)


class Recv(msgspec.Struct, frozen=True):
    """Which message is asked for, and what is to become of it (RECV flags)."""

    flags: int
    priority: int | None  # None: the oldest


def decode_recv(data: bytes) -> Decoded[Recv]:
    """RECV."""

    def value(parsed: Parsed) -> Recv:
        by_priority = bool(parsed.flags & abi.RECV_USE_PRIORITY)
        if by_priority and parsed.flags & abi.RECV_DROP:
            raise Errno(errno.EINVAL, "RECV can't drop by priority")
        return Recv(parsed.flags, parsed.fixed[3] if by_priority else None)

    return _decode(abi.CMD_RECV, data, value)


def recv_result(offset: int, size: int, message_flags: int, dropped: int) -> tuple[Poke, ...]:
    """Where in the pool the message lies, and how many were lost since this was last told.

    Written on success and on EAGAIN, then with Pool.empty; never with another errno.
    """
    return (
        Poke(32, layout.U64.pack(dropped) + _three(offset, size, message_flags)),
        return_flags(abi.RECV_RETURN_DROPPED_MSGS if dropped else 0),
    )


def _three(*numbers: int) -> bytes:
    return b"".join(map(layout.U64.pack, numbers))


# -- names and matches -----------------------------------------------------------------------


class NameAcquire(msgspec.Struct, frozen=True):
    """A name that is asked for, with NAME flags."""

    name: str
    flags: int


def decode_name_acquire(data: bytes) -> Decoded[NameAcquire]:
    """NAME_ACQUIRE. It may bring the flags that the one before has returned: kdbus's first versions returned none that
    they did not take, and a program of theirs gives them back."""

    def value(parsed: Parsed) -> NameAcquire:
        name = _text(parsed, abi.ITEM_NAME)
        names.check_well_known(name)
        return NameAcquire(name, parsed.flags & SPECS[abi.CMD_NAME_ACQUIRE].flags)

    return _decode(abi.CMD_NAME_ACQUIRE, data, value)


def decode_name_release(data: bytes) -> Decoded[str]:
    """NAME_RELEASE. A name that can't be is for the registry not to find (ESRCH)."""
    return _decode(abi.CMD_NAME_RELEASE, data, lambda parsed: _text(parsed, abi.ITEM_NAME))


def return_flags(flags: int) -> Poke:
    """The return_flags of any command but a message; NAME_ACQUIRE's are NAME flags."""
    return Poke(_RETURN_FLAGS_AT, layout.U64.pack(flags))


class MatchAdd(msgspec.Struct, frozen=True):
    """A match; `replace` those that have its cookie."""

    cookie: int
    replace: bool
    rules: tuple[match.Rule, ...]


def decode_match_add(data: bytes, bloom_size: int) -> Decoded[MatchAdd]:
    """MATCH_ADD, on a bus with bloom filters of this size. Raises Errno EDOM as well."""

    def value(parsed: Parsed) -> MatchAdd:
        rules = tuple(
            match.parse_rule(item, bloom_size)
            for item in parsed.items
            if item.type != abi.ITEM_NEGOTIATE
        )
        return MatchAdd(parsed.fixed[3], bool(parsed.flags & abi.MATCH_REPLACE), rules)

    return _decode(abi.CMD_MATCH_ADD, data, value)


def decode_match_remove(data: bytes) -> Decoded[int]:
    """MATCH_REMOVE: the cookie."""
    return _decode(abi.CMD_MATCH_REMOVE, data, lambda parsed: parsed.fixed[3])
