"""Metadata as items: each is as the ABI has it, ids are those of the receiver's namespace."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kbusd.kdbus import abi, items, metadata
from kbusd.kdbus.metadata import NO_ID, OVERFLOW_ID, IdMap, Metadata
from tests.unit.kdbus.refused import refused

ALL = Metadata(
    creds=metadata.Creds(1, 2, 3, 4, 5, 6, 7, NO_ID),
    pids=metadata.Pids(10, 11, 12),
    groups=(20, 21),
    tid_comm=b"thread",
    pid_comm=b"program",
    exe=b"/bin/\xff",
    cmdline=b"program\0-x\0\0",
    cgroup=b"/user",
    caps=metadata.Caps(40, 0, (1 << 64) - 1, 1 << 32, 3),
    label=b"u:r:t:s0",
    audit=metadata.Audit(5, NO_ID),
    names=(metadata.OwnedName("a.b", abi.NAME_PRIMARY), metadata.OwnedName("c.d", 0)),
    description=b"me",
    timestamp=metadata.Timestamp(1, 2, 3),
)


def shown(mask: int, **maps: IdMap) -> list[tuple[int, bytes]]:
    data = metadata.build_items(ALL, mask, **maps)
    assert len(data) % 8 == 0
    found = items.split(data, 0)
    for item in found:
        if item.type != abi.ITEM_CMDLINE:  # an array of strings is not one
            items.validate(item)
    return [(item.type, item.data) for item in found]


def test_all() -> None:
    assert shown(abi.ATTACH_ALL) == [
        (abi.ITEM_CREDS, struct.pack("=8Q", 1, 2, 3, 4, 5, 6, 7, NO_ID)),
        (abi.ITEM_PIDS, struct.pack("=3Q", 10, 11, 12)),
        (abi.ITEM_AUXGROUPS, struct.pack("=2Q", 20, 21)),
        (abi.ITEM_TID_COMM, b"thread\0"),
        (abi.ITEM_PID_COMM, b"program\0"),
        (abi.ITEM_EXE, b"/bin/\xff\0"),
        (abi.ITEM_CMDLINE, b"program\0-x\0\0"),
        (abi.ITEM_CGROUP, b"/user\0"),
        (abi.ITEM_CAPS, struct.pack("=9I", 40, 0, 0, NO_ID, 0x1FF, 0, 1, 3, 0)),
        (abi.ITEM_SECLABEL, b"u:r:t:s0\0"),
        (abi.ITEM_AUDIT, struct.pack("=2I", 5, NO_ID)),
        (abi.ITEM_OWNED_NAME, struct.pack("=Q", abi.NAME_PRIMARY) + b"a.b\0"),
        (abi.ITEM_OWNED_NAME, struct.pack("=Q", 0) + b"c.d\0"),
        (abi.ITEM_CONN_DESCRIPTION, b"me\0"),
        (abi.ITEM_TIMESTAMP, struct.pack("=3Q", 1, 2, 3)),
    ]


@given(st.integers(0, abi.ATTACH_ALL))
def test_only_what_the_mask_has(mask: int) -> None:
    everything = shown(abi.ATTACH_ALL)
    assert shown(mask) == [each for each in everything if mask >> (each[0] & 0xFF) & 1]


def test_nothing_known_is_nothing_said() -> None:
    assert metadata.build_items(Metadata(), abi.ATTACH_ALL) == b""


def test_ids_are_the_receivers() -> None:
    uids = IdMap(((0, 1, 3), (100, 50, 1)))
    found = dict(
        shown(abi.ATTACH_CREDS | abi.ATTACH_AUXGROUPS, uids=uids, gids=IdMap(((0, 20, 1),)))
    )
    assert struct.unpack("=8Q", found[abi.ITEM_CREDS]) == (
        (0, 1, 2, OVERFLOW_ID) + (OVERFLOW_ID, OVERFLOW_ID, OVERFLOW_ID, NO_ID)
    )
    assert struct.unpack("=2Q", found[abi.ITEM_AUXGROUPS]) == (0, OVERFLOW_ID)


@pytest.mark.parametrize(("login_uid", "told"), [(1, 0), (77, NO_ID), (NO_ID, NO_ID)])
def test_a_login_uid_that_the_receiver_does_not_have_is_none(login_uid: int, told: int) -> None:
    """kdbus_meta_write: from_kuid, where creds have from_kuid_munged."""
    data = Metadata(audit=metadata.Audit(5, login_uid))
    (item,) = items.split(metadata.build_items(data, abi.ATTACH_AUDIT, IdMap(((0, 1, 3),))), 0)
    assert struct.unpack("=2I", item.data) == (5, told)


@given(st.integers(0, NO_ID - 1))
def test_maps_go_both_ways(id: int) -> None:
    assert metadata.SAME.inside(id) == metadata.SAME.outside(id) == id
    shifted = IdMap(((0, 100000, 65536),))
    inside = shifted.inside(id)
    assert (inside is not None) == (100000 <= id < 165536)
    if inside is not None:
        assert shifted.outside(inside) == id
    outside = shifted.outside(id)
    assert (outside is not None) == (id < 65536)


@pytest.mark.parametrize(("flags", "result"), [(0, 0), (abi.ATTACH_ANY, abi.ATTACH_ALL), (5, 5)])
def test_attach_flags(flags: int, result: int) -> None:
    assert metadata.attach_flags(flags) == result


@pytest.mark.parametrize("flags", [abi.ATTACH_ALL + 1, abi.ATTACH_ANY - 1, 1 << 63])
def test_unknown_attach_flags(flags: int) -> None:
    with refused("EINVAL"):
        metadata.attach_flags(flags)


def test_what_is_granted() -> None:
    wanted = abi.ATTACH_CREDS | abi.ATTACH_EXE | abi.ATTACH_CAPS
    assert metadata.granted(0, wanted, in_proc=False) == abi.ATTACH_CREDS
    assert metadata.granted(abi.ATTACH_EXE, wanted, in_proc=False) == (
        abi.ATTACH_CREDS | abi.ATTACH_EXE
    )
    assert metadata.granted(0, wanted, in_proc=True) == wanted
    assert metadata.granted(abi.ATTACH_ALL, 0, in_proc=True) == 0


def test_a_map_is_read_as_the_kernel_writes_it() -> None:
    text = b"         0     100000      65536\n     65536       1000          1\n"
    ids = IdMap.read(text)
    assert ids.ranges == ((0, 100000, 65536), (65536, 1000, 1))
    assert (ids.inside(1000), ids.outside(5)) == (65536, 100005)
    assert IdMap.read(b"").shown(0) == OVERFLOW_ID
    with pytest.raises(ValueError):
        IdMap.read(b"no numbers here")
