"""Changed and cut messages through the wire checks, judged beside libdbus where it is there.

    python -m tests.fuzz.wire [SECONDS] [SEED]

Prints how many were accepted, refused and by which rule; ends with an error and the bytes in hex
at the first crash, unexpected exception or disagreement. Run under a build with -fsanitize=address
(LD_PRELOAD=libasan.so) to see reads outside the bytes too: every input is a heap block of its own.
"""

from __future__ import annotations

import random
import struct
import sys
import time
from collections import Counter
from collections.abc import Iterator

from kbusd.wire import body, header, validate
from tests.unit.wire import libdbus, marshal

INTERESTING = b"\0\1\2\4\7\x08\x20\x7f\x80\xc0\xff/.:-_aZ9lBybnqiuxtdsoghv(){}"
SIGNATURES = (
    "", "s", "ss", "su", "ay", "as", "a{sv}", "sa{sv}as", "(ii)", "a(sa{sv})", "v", "av", "b", "ab",
    "g", "o", "ao", "h", "d", "at", "aas", "a{s(iv)}", "ya{yv}n", "aaay", "a(yv)",
)  # fmt: skip


def value(kind: str, rng: random.Random) -> object:
    """A random value of one complete type, as jeepney takes it."""
    few = range(rng.choice((0, 1, 2, 3, 3, 70)))
    match kind[0]:
        case "y":
            return rng.randrange(256)
        case "b":
            return rng.random() < 0.5
        case "n":
            return rng.randrange(-0x8000, 0x8000)
        case "q" | "i" | "u" | "x" | "t" | "h":
            return rng.randrange(0x8000)
        case "d":
            return rng.random()
        case "s":
            return rng.choice(("", "text", "äöü€😀" * 3, "x" * 40, "a.b", "/"))
        case "o":
            return rng.choice(("/", "/a/b_9", "/org/freedesktop/DBus"))
        case "g":
            return rng.choice(SIGNATURES)
        case "v":
            inner = rng.choice(("s", "u", "b", "v" if rng.random() < 0.3 else "y", "as", "(ib)"))
            return inner, value(inner, rng)
        case "(":
            return tuple(value(part, rng) for part in marshal.split(kind[1:-1]))
    if kind[1] == "{":
        key, inner = marshal.split(kind[2:-1])
        return {value(key, rng): value(inner, rng) for _ in few}
    return [value(kind[1:], rng) for _ in few]


def message(rng: random.Random) -> bytes:
    """A valid message."""
    big = rng.random() < 0.3
    signature = rng.choice(SIGNATURES)
    data = marshal.marshal(
        signature, tuple(value(kind, rng) for kind in marshal.split(signature)), big
    )
    fields = [
        marshal.text_field(1, "o", "/org/example/Object", big),
        marshal.text_field(2, "s", "org.example.Interface", big),
        marshal.text_field(3, "s", "Member", big),
        marshal.text_field(4, "s", "org.example.Error", big),
        marshal.uint32_field(5, rng.randrange(1, 99), big),
        marshal.text_field(6, "s", rng.choice((":1.7", "org.example.Name")), big),
        marshal.text_field(8, "g", signature, big),
    ]
    rng.shuffle(fields)
    type = rng.choice((1, 2, 3, 4, 4, 1, 9))
    return (
        marshal.header(
            fields, type=type, serial=rng.randrange(1, 99), body_length=len(data), big_endian=big
        )
        + data
    )


def change(data: bytes, rng: random.Random) -> bytes:
    """The message with one to three things wrong; its lengths still add up to what there is."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        at = rng.randrange(len(changed))
        match rng.randrange(5):
            case 0:
                changed[at] ^= 1 << rng.randrange(8)
            case 1 | 2:
                changed[at] = rng.choice(INTERESTING)
            case 3:
                at &= ~3
                changed[at : at + 4] = struct.pack(
                    rng.choice("<>") + "I", rng.choice((0, 1, 4, 8, 64, 1 << 26, 0xFFFFFFFF))
                )
            case 4:
                # Cut or lengthen, and say so in the body length.
                end = rng.randrange(16, len(changed) + 1)
                changed = changed[:end] + bytes(rng.choice((0, 0, 1, 8)))
                order = ">" if changed[0] == ord("B") else "<"
                fields = struct.unpack_from(order + "I", changed, 12)[0]
                length = len(changed) - 16 - -(-fields // 8) * 8
                if length >= 0:
                    struct.pack_into(order + "I", changed, 4, length)
    return bytes(changed)


def judge(data: bytes) -> str:
    """ "" if we accept the message, else the rule that it breaks. Raises nothing else."""
    try:
        total = header.total_length(data[:16])
        if total > len(data):
            header.parse(data)
            return "incomplete"
        parsed = header.parse(data[:total])
        content = data[parsed.header_length : total]
        signature = parsed.signature
        body.check_body(content, signature.encode(), parsed.endian == "B")
        body.match_arguments(content, signature, parsed.endian == "B")
    except validate.WireError as error:
        return error.text
    return ""


def excepted(data: bytes) -> bool:
    """Where libdbus judges by more than the bytes, or not by the specification."""
    fields = data[16:]
    return b"DBus.Local" in data or any(
        fields[at] in (9, 10) and fields[at + 1 : at + 2] == b"\1"
        for at in range(0, len(fields), 8)
    )


def run(seconds: float, seed: int) -> Counter[str]:
    """How often each verdict came. Raises AssertionError with the bytes at a disagreement."""
    rng = random.Random(seed)
    verdicts: Counter[str] = Counter()
    compare = libdbus.present
    for data in inputs(seconds, rng):
        verdict = judge(data)
        verdicts[verdict] += 1
        if compare and verdict != "incomplete" and len(data) >= 16 and not excepted(data):
            total = len(data)
            if not verdict:
                total = header.total_length(data[:16])
            theirs, text = libdbus.accepts_message(data[:total])
            if not theirs and not text:
                continue
            assert theirs == (not verdict), (
                f"we: {verdict or 'valid'}; libdbus: {text or 'valid'}; seed {seed}: {data.hex()}"
            )
    return verdicts


def inputs(seconds: float, rng: random.Random) -> Iterator[bytes]:
    """Changed messages, cut ones, and some that are only random, until the time is up."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        data = message(rng)
        yield data
        for _ in range(30):
            yield change(data, rng)
        yield data[: rng.randrange(len(data))]
        yield b"l\1\0\1" + rng.randbytes(rng.randrange(64))


def main(arguments: list[str]) -> None:
    seconds = float(arguments[0]) if arguments else 10.0
    seed = int(arguments[1]) if len(arguments) > 1 else random.randrange(1 << 32)
    print(f"seed {seed}, {seconds:g} s, libdbus {'beside' if libdbus.present else 'not there'}")
    verdicts = run(seconds, seed)
    for verdict, count in verdicts.most_common():
        print(f"{count:9}  {verdict or 'valid'}")
    never = set(validate.RULES.values()) - set(verdicts)
    print("rules that no input broke:", "; ".join(sorted(never)) or "none")


if __name__ == "__main__":
    main(sys.argv[1:])
