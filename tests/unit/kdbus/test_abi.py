"""The numbers that programs of 2015 were compiled with."""

from __future__ import annotations

from kbusd.kdbus import abi, layout
from kbusd.kdbus.commands import SPECS

NUMBERS = {
    "BUS_MAKE": 0x40189500,
    "ENDPOINT_MAKE": 0x40189510,
    "ENDPOINT_UPDATE": 0x40189511,
    "HELLO": 0xC0609580,
    "UPDATE": 0x40189581,
    "BYEBYE": 0x40189582,
    "FREE": 0x40209583,
    "CONN_INFO": 0x80389584,
    "BUS_CREATOR_INFO": 0x80389585,
    "LIST": 0x80289586,
    "SEND": 0x40389590,
    "RECV": 0x80409591,
    "NAME_ACQUIRE": 0x401895A0,
    "NAME_RELEASE": 0x401895A1,
    "MATCH_ADD": 0x402095B0,
    "MATCH_REMOVE": 0x402095B1,
}


def test_ioctl_numbers() -> None:
    assert {spec.name: number for number, spec in SPECS.items()} == NUMBERS
    for name, number in NUMBERS.items():
        assert getattr(abi, f"CMD_{name}") == number


def test_sizes() -> None:
    assert layout.MESSAGE.size == 64
    assert layout.INFO.size == 24
    assert layout.MEMFD.size == 24
    assert layout.CREDS.size == 64
    assert layout.NAME_CHANGE.size == 32


def test_metadata_items_stand_in_the_order_of_their_flags() -> None:
    flags = sorted(
        (number, name.removeprefix("ATTACH_"))
        for name, number in vars(abi).items()
        if name.startswith("ATTACH_") and name not in ("ATTACH_ALL", "ATTACH_ANY")
    )
    assert len(flags) == 14
    for at, (number, name) in enumerate(flags):
        assert number == 1 << at
        wanted = "OWNED_NAME" if name == "NAMES" else name
        assert abi.ITEM_TYPES[0x1000 + at] == wanted
    assert sum(number for number, _ in flags) == abi.ATTACH_ALL
