"""Changed and cut kdbus commands and FUSE requests through their decoders.

    python -m tests.fuzz.kdbus [SECONDS] [SEED]

Prints how often each command got which verdict; ends with an error and the bytes in hex at the first
exception that is not Errno or Malformed, or where what is written back is not within the command.
"""

from __future__ import annotations

import errno
import random
import struct
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator

import msgspec

from kbusd.cuse import abi as fuse
from kbusd.cuse import requests, routing
from kbusd.kdbus import abi, attach, commands, items, layout, message, policy
from kbusd.kdbus.errors import Errno
from kbusd.kdbus.mailbox import Mailbox
from tests.unit.kdbus.world import Memory

U64_MAX = (1 << 64) - 1
BOX = Mailbox(4 << 20, Memory(4 << 20))
NUMBERS = (
    0,
    1,
    2,
    7,
    8,
    9,
    15,
    16,
    17,
    64,
    4096,
    32768,
    1 << 21,
    1 << 31,
    1 << 32,
    1 << 63,
    U64_MAX,
)
STRINGS = (b"a.b", b"a.*", b"1000-x", b"../x", b"", b"x" * 300, b"\xff", b"a\0b")


def item(rng: random.Random, type: int) -> bytes:
    """An item with a payload that its type may have, mostly."""
    match rng.randrange(4):
        case 0:
            return items.string(type, rng.choice(STRINGS))
        case 1:
            numbers = [rng.choice(NUMBERS) for _ in range(rng.choice((1, 2, 3, 3, 4, 8)))]
            return items.build(type, struct.pack(f"={len(numbers)}Q", *numbers))
        case 2:
            numbers = [rng.choice(NUMBERS) for _ in range(4)]
            return items.build(type, struct.pack("=4Q", *numbers) + rng.choice(STRINGS) + b"\0")
    return items.build(type, rng.randbytes(rng.choice((0, 4, 8, 12, 16, 24, 64))))


def command(rng: random.Random, spec: commands.Spec) -> bytes:
    """A command of this kind, mostly well formed."""
    known = [*spec.once, *spec.many, abi.ITEM_NEGOTIATE]
    kinds = [*spec.needed, *(rng.choice(known) for _ in range(rng.choice((0, 0, 1, 2, 4))))]
    if rng.random() < 0.1:
        kinds.append(rng.choice(list(abi.ITEM_TYPES)))
    flags = rng.choice((0, 0, spec.flags, spec.flags & rng.randrange(16), abi.FLAG_NEGOTIATE))
    fields = [rng.choice(NUMBERS) for _ in range(spec.fixed.size // 8 - 2)]
    fixed = struct.pack(f"={len(fields) + 2}Q", 0, flags, *fields)
    return items.command(fixed, [item(rng, kind) for kind in kinds])


def change(rng: random.Random, data: bytes) -> bytes:
    """The command with up to two numbers, a byte or its end changed; its size mostly says so."""
    changed = bytearray(data)
    for _ in range(rng.choice((0, 1, 1, 2))):
        if rng.random() < 0.5:
            at = rng.randrange(len(changed) // 8) * 8
            changed[at : at + 8] = struct.pack("=Q", rng.choice(NUMBERS))
        else:
            changed[rng.randrange(len(changed))] = rng.randrange(256)
    if rng.random() < 0.2:
        del changed[rng.randrange(16, len(changed)) :]
    if rng.random() < 0.9:
        changed[:8] = struct.pack("=Q", len(changed))
    return bytes(changed)


def decode(number: int, data: bytes) -> tuple[commands.Poke, ...]:
    """All that is done with a command before anything happens; what is written back."""
    match number:
        case abi.CMD_UPDATE:
            return commands.decode_update(data, abi.HELLO_POLICY_HOLDER).pokes
        case abi.CMD_MATCH_ADD:
            return commands.decode_match_add(data, 8).pokes
        case abi.CMD_HELLO:
            hello = commands.decode_hello(data)
            if hello.value is not None:
                commands.check_hello(hello.value, owner=True, custom=False, page_size=4096)
            return hello.pokes
        case abi.CMD_ENDPOINT_UPDATE:
            update = commands.decode_endpoint_update(data)
            policy.Database().replace("owner", update.value or ())
            return update.pokes
        case 0:
            parsed = commands.parse_message(data)
            sent = message.examine(parsed, False, 7, 8)
            parts = [
                part
                if isinstance(part, message.Memfd)
                else bytes(part.size)
                if part.address
                else part.size
                for part in sent.parts
            ]
            fields = msgspec.structs.astuple(sent.header)
            entry = BOX.place(fields, parts, len(sent.fds), sent.dst_name, b"", b"", 1, False)
            at = entry.slice.offset
            size = layout.U64.unpack_from(BOX.memory.buffer, at)[0]
            items.split(bytes(BOX.memory.buffer[at : at + size]), 64)
            BOX.pool.release(entry.slice)
            return parsed.pokes
    return DECODERS[number](data).pokes


DECODERS = {
    abi.CMD_BUS_MAKE: commands.decode_bus_make,
    abi.CMD_ENDPOINT_MAKE: commands.decode_endpoint_make,
    abi.CMD_BYEBYE: commands.decode_byebye,
    abi.CMD_FREE: commands.decode_free,
    abi.CMD_CONN_INFO: commands.decode_conn_info,
    abi.CMD_BUS_CREATOR_INFO: commands.decode_bus_creator_info,
    abi.CMD_LIST: commands.decode_list,
    abi.CMD_SEND: commands.decode_send,
    abi.CMD_RECV: commands.decode_recv,
    abi.CMD_NAME_ACQUIRE: commands.decode_name_acquire,
    abi.CMD_NAME_RELEASE: commands.decode_name_release,
    abi.CMD_MATCH_REMOVE: commands.decode_match_remove,
    attach.COMMAND: attach.decode,
}
SPECS = {**commands.SPECS, 0: commands.MESSAGE, attach.COMMAND: attach.SPEC}


def judge(number: int, data: bytes) -> str:
    """ "valid" or the errno. Raises AssertionError if what is written back lies outside."""
    try:
        pokes, verdict = decode(number, data), "valid"
    except Errno as error:
        pokes, verdict = error.pokes, errno.errorcode[error.errno]
    for poke in pokes:
        assert poke.offset >= 8 and poke.offset + len(poke.data) <= len(data)
    return verdict


def judge_request(data: bytes) -> str:
    """The kind of a FUSE request, or "malformed"; the router never knows better than the decoder."""
    try:
        found = requests.decode(data)
    except requests.Malformed:
        try:
            routing.route(data)
        except ValueError:
            pass
        return "malformed"
    assert routing.route(data)[1] == found.header.unique
    return type(found.body).__name__


def request(rng: random.Random) -> bytes:
    """A FUSE request, or nearly one."""
    opcode = rng.choice((*range(1, 52), fuse.CUSE_INIT))
    content = rng.choice((b"", b"name\0", b"", rng.randbytes(3)))
    fields = b"".join(struct.pack("=I", rng.choice((0, 0, 1, 5, 8, 99))) for _ in range(rng.choice((0, 1, 2, 4, 6, 8, 10, 16, 22))))  # fmt: skip
    content = fields + content
    extra = rng.choice((0, 0, 0, 1, 5))
    length = 40 + len(content) + rng.choice((0, 0, 0, 0, 1))
    return fuse.IN_HEADER.pack(length, opcode, 1, 1, 0, 0, 0, extra, 0) + content


def run(rounds: Iterable[object], seed: int) -> Counter[tuple[str, str]]:
    """How often each command and request came to each verdict. A round is some of each."""
    rng = random.Random(seed)
    verdicts: Counter[tuple[str, str]] = Counter()
    for _ in rounds:
        for number, spec in SPECS.items():
            data = command(rng, spec)
            for each in (data, change(rng, data), change(rng, data)):
                try:
                    verdicts[spec.name, judge(number, each)] += 1
                except Exception as error:
                    raise AssertionError(f"{spec.name}: {error!r}; {each.hex()}") from error
        data = request(rng)
        try:
            verdicts["request", judge_request(data)] += 1
        except Exception as error:
            raise AssertionError(f"request: {error!r}; {data.hex()}") from error
    return verdicts


def until(end: float) -> Iterator[None]:
    """Rounds until a time.monotonic()."""
    while time.monotonic() < end:
        yield


def main(arguments: list[str]) -> None:
    seconds = float(arguments[0]) if arguments else 10.0
    seed = int(arguments[1]) if len(arguments) > 1 else random.randrange(1 << 32)
    print(f"seed {seed}, {seconds:g} s")
    for (name, verdict), count in sorted(run(until(time.monotonic() + seconds), seed).items()):
        print(f"{count:9}  {name}: {verdict}")


if __name__ == "__main__":
    main(sys.argv[1:])
