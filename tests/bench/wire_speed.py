"""How long header and body checks take in C, for a call of about 200 bytes and some others.

    python -m tests.bench.wire_speed

Compiles a small loop against the .pxd files first, so that no Python call is in the figures. Prints
nanoseconds per message, the best of five rounds: a lower bound, on warm caches, which says what the
code costs and not what a bus under load sees. Exits 1 if the call of 200 bytes takes over 400 ns.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.unit.wire import marshal

LIMIT = 400.0

_LOOP = """
from libc.stdint cimport int64_t, uint8_t
from kbusd.wire.header cimport Header, message_length, scan
from kbusd.wire.body cimport check
import time

def measure(bytes data, long rounds):
    cdef Header header
    cdef const uint8_t *at = data
    cdef size_t size = len(data)
    cdef long i, wrong = 0
    start = time.perf_counter_ns()
    for i in range(rounds):
        wrong |= message_length(at) != <int64_t>size
        wrong |= scan(at, size, &header)
    middle = time.perf_counter_ns()
    for i in range(rounds):
        wrong |= check(at + header.header_length, header.body_length, at + header.signature_at,
                       header.signature_len, header.endian == b'B', 0)
    end = time.perf_counter_ns()
    assert not wrong
    return (middle - start) / rounds, (end - middle) / rounds
"""

CALL = ("org.freedesktop.DBus.Properties", "Get", "ss", ("org.example.Interface", "Property"))
CHANGED = (
    "org.freedesktop.DBus.Properties",
    "PropertiesChanged",
    "sa{sv}as",
    (
        "org.example.Interface",
        {"Volume": ("u", 3), "Name": ("s", "naïve"), "On": ("b", True)},
        ["X"],
    ),
)
BYTES = ("org.example.Store", "Put", "ay", (bytes(65536),))
STRINGS = ("org.example.Store", "Names", "as", (["a name of some length"] * 1000,))


def message(interface: str, member: str, signature: str, values: tuple[Any, ...]) -> bytes:
    data = marshal.marshal(signature, values, False)
    fields = [
        marshal.text_field(1, "o", "/org/example/Object"),
        marshal.text_field(3, "s", member),
        marshal.text_field(2, "s", interface),
        marshal.text_field(6, "s", "org.example.Name"),
        marshal.text_field(8, "g", signature),
    ]
    return marshal.header(fields, body_length=len(data)) + data


def main() -> int:
    from Cython.Build import cythonize
    from setuptools import Extension, setup

    with tempfile.TemporaryDirectory() as directory:
        source = Path(directory, "wire_loop.pyx")
        source.write_text(_LOOP)
        with contextlib.redirect_stdout(io.StringIO()):
            setup(
                script_args=[
                    "-q",
                    "build_ext",
                    f"--build-lib={directory}",
                    f"--build-temp={directory}",
                ],
                ext_modules=cythonize(
                    [Extension("wire_loop", [str(source)], extra_compile_args=["-O2"])],
                    include_path=[str(Path(__file__).parents[2])],
                    language_level=3,
                    quiet=True,
                ),
            )
        (built,) = Path(directory).glob("wire_loop*.so")
        spec = importlib.util.spec_from_file_location("wire_loop", built)
        assert spec is not None and spec.loader is not None
        loop = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loop)
    print("message                bytes   header     body    total  (ns)")
    slow = False
    for name, parts, rounds in (
        ("call", CALL, 200_000),
        ("properties changed", CHANGED, 100_000),
        ("64 KiB of bytes", BYTES, 100_000),
        ("1000 strings", STRINGS, 200),
    ):
        data = message(*parts)
        head, body = min((loop.measure(data, rounds) for _ in range(5)), key=sum)
        print(f"{name:20} {len(data):7} {head:8.0f} {body:8.0f} {head + body:8.0f}")
        slow |= name == "call" and head + body > LIMIT
    return int(slow)


if __name__ == "__main__":
    sys.exit(main())
