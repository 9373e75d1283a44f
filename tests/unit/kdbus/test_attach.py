"""ATTACH, by which a client names a socket."""

from __future__ import annotations

import errno
import struct

import pytest

from kbusd.kdbus import abi, attach
from kbusd.kdbus.errors import Errno, Poke


def command(flags: int = 0, fd: int = 7, size: int = 32) -> bytes:
    return struct.pack("=4Q", size, flags, 99, fd)


def test_its_number_is_none_of_2015() -> None:
    assert attach.COMMAND == 0x402095F0
    assert attach.COMMAND & 0xFF not in {
        value & 0xFF for name, value in vars(abi).items() if name.startswith("CMD_")
    }


def test_a_descriptor_s_number() -> None:
    decoded = attach.decode(command())
    assert decoded.value == 7
    assert decoded.pokes == (Poke(16, bytes(8)),)
    assert attach.decode(command(fd=(1 << 64) - 1)).value == (1 << 64) - 1


def test_negotiation_attaches_nothing() -> None:
    decoded = attach.decode(command(abi.FLAG_NEGOTIATE))
    assert decoded.value is None
    assert decoded.pokes == (Poke(8, bytes(8)), Poke(16, bytes(8)))


@pytest.mark.parametrize(
    "data",
    [command(flags=1), command(size=40), command(size=24), command()[:24], b"",
     command(size=48) + struct.pack("=2Q", 16, abi.ITEM_NAME)],
)  # fmt: skip
def test_what_is_no_command(data: bytes) -> None:
    with pytest.raises(Errno) as caught:
        attach.decode(data)
    assert caught.value.errno == errno.EINVAL


def test_the_record_of_a_pool() -> None:
    assert attach.pool_record(4096) == struct.pack("=2Q", 1, 4096)


def test_installed_says_where_the_numbers_are() -> None:
    assert attach.INSTALLED == 0x403095F1
    decoded = attach.decode_installed(struct.pack("=6Q", 48, 0, 99, 4096, 3, 0x1000))
    assert decoded.value == attach.Numbers(offset=4096, count=3, address=0x1000)
    assert decoded.pokes == (Poke(16, bytes(8)),)
    with pytest.raises(Errno):
        attach.decode_installed(struct.pack("=4Q", 32, 0, 0, 0))


def test_the_record_of_a_message_s_descriptors() -> None:
    assert attach.fds_record(4096, 3) == struct.pack("=3Q", 2, 4096, 3)
