"""Requests: each opcode decodes to its struct, and no bytes do anything but raise Malformed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kbusd.cuse import abi, requests
from kbusd.cuse.requests import Body, Malformed
from tests.unit.cuse.requests_of import request

SAMPLES: list[tuple[bytes, Body]] = [
    (
        request(abi.INIT, abi.INIT_IN, 7, 38, 65536, 5, data=bytes(48)),
        requests.Init(7, 38, 65536, 5),
    ),
    (request(abi.INIT, abi.INIT_IN, 7, 31, 0, 0), requests.Init(7, 31, 0, 0)),
    (request(abi.CUSE_INIT, abi.CUSE_INIT_IN, 7, 38, 0, 1), requests.CuseInit(7, 38, 1)),
    (request(abi.LOOKUP, data=b"control\0"), requests.Lookup(b"control")),
    (request(abi.LOOKUP, data=b"../x\0"), requests.Lookup(b"../x")),
    (request(abi.FORGET, abi.FORGET_IN, 3, node=9), requests.Forget(((9, 3),))),
    (
        request(
            abi.BATCH_FORGET,
            abi.BATCH_FORGET_IN,
            2,
            0,
            data=abi.FORGET_ONE.pack(5, 1) + abi.FORGET_ONE.pack(6, 2),
        ),
        requests.Forget(((5, 1), (6, 2))),
    ),
    (request(abi.GETATTR, abi.GETATTR_IN, 0, 0, 9), requests.GetAttr(None)),
    (request(abi.GETATTR, abi.GETATTR_IN, abi.GETATTR_FH, 0, 9), requests.GetAttr(9)),
    (
        request(
            abi.SETATTR,
            abi.SETATTR_IN,
            *(abi.FATTR_MODE | abi.FATTR_UID | 1 << 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0),
            *(0o600, 0, 5, 6, 0),
        ),
        requests.SetAttr(0o600, 5, None, None, 1 << 4),
    ),
    (
        request(
            abi.SETATTR, abi.SETATTR_IN, abi.FATTR_GID | abi.FATTR_SIZE, 0, 0, 8, *(0,) * 10, 6, 0
        ),
        requests.SetAttr(None, None, 6, 8, 0),
    ),
    (request(abi.OPEN, abi.OPEN_IN, 2, 0), requests.Open(2)),
    (request(abi.OPENDIR, abi.OPEN_IN, 2, 0), requests.OpenDir(2)),
    (request(abi.READ, abi.READ_IN, 9, 4096, 512, 0, 0, 0, 0), requests.Read(9, 4096, 512)),
    (request(abi.READDIR, abi.READ_IN, 9, 3, 512, 0, 0, 0, 0), requests.ReadDir(9, 3, 512)),
    (
        request(abi.WRITE, abi.WRITE_IN, 9, 1, 3, 0, 0, 0, 0, data=b"abc"),
        requests.Write(9, 1, b"abc"),
    ),
    (request(abi.RELEASE, abi.RELEASE_IN, 9, 0, 0, 0), requests.Release(9)),
    (request(abi.RELEASEDIR, abi.RELEASE_IN, 9, 0, 0, 0), requests.ReleaseDir(9)),
    (request(abi.FLUSH, abi.FLUSH_IN, 9, 0, 0, 0), requests.Flush(9)),
    (request(abi.STATFS), requests.StatFs()),
    (request(abi.ACCESS, abi.ACCESS_IN, 4, 0), requests.Access(4)),
    (request(abi.INTERRUPT, abi.INTERRUPT_IN, 88), requests.Interrupt(88)),
    (
        request(
            abi.IOCTL,
            abi.IOCTL_IN,
            9,
            abi.IOCTL_UNRESTRICTED,
            0x40189581,
            0x7F00,
            3,
            8,
            data=b"abc",
        ),
        requests.Ioctl(9, abi.IOCTL_UNRESTRICTED, 0x40189581, 0x7F00, b"abc", 8),
    ),
    (request(abi.POLL, abi.POLL_IN, 9, 44, 1, 5), requests.Poll(9, 44, True, 5)),
    (request(abi.POLL, abi.POLL_IN, 9, 44, 0, 5), requests.Poll(9, 44, False, 5)),
    (request(abi.DESTROY), requests.Destroy()),
    (request(46, data=b"whatever"), requests.Unknown()),
    (request(abi.STATFS, extra=bytes(16)), requests.StatFs()),
    (request(abi.LOOKUP, data=b"bus\0", extra=bytes(8)), requests.Lookup(b"bus")),
]


@pytest.mark.parametrize(("data", "body"), SAMPLES, ids=lambda each: type(each).__name__)
def test_requests(data: bytes, body: Body) -> None:
    found = requests.decode(data)
    assert found.body == body
    header = found.header
    assert (header.unique, header.uid, header.gid, header.tid) == (2, 1000, 100, 77)


def test_which_ioctls_may_ask_for_more() -> None:
    assert requests.Ioctl(9, abi.IOCTL_UNRESTRICTED, 0, 0, b"", 0).unrestricted
    assert not requests.Ioctl(9, abi.IOCTL_COMPAT, 0, 0, b"", 0).unrestricted


@pytest.mark.parametrize(
    "data",
    [
        b"",
        bytes(39),
        bytes(40),  # says 0
        request(abi.STATFS) + b"x",
        request(abi.OPEN, data=bytes(7)),
        request(abi.LOOKUP),
        request(abi.LOOKUP, data=b"\0"),
        request(abi.LOOKUP, data=b"a"),
        request(abi.LOOKUP, data=b"a\0b\0"),
        request(abi.WRITE, abi.WRITE_IN, 9, 1, 4, 0, 0, 0, 0, data=b"abc"),
        request(abi.IOCTL, abi.IOCTL_IN, 9, 0, 0, 0, 2, 8, data=b"abc"),
        request(abi.BATCH_FORGET, abi.BATCH_FORGET_IN, (1 << 32) - 1, 0, data=bytes(16)),
        abi.IN_HEADER.pack(40, abi.STATFS, 1, 1, 0, 0, 0, 0xFFFF, 0),
    ],
)
def test_malformed(data: bytes) -> None:
    with pytest.raises(Malformed):
        requests.decode(data)


@given(
    st.sampled_from([data for data, _ in SAMPLES]),
    st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), max_size=3),
    st.integers(-60, 60),
    st.booleans(),
)
def test_changed_bytes_raise_malformed_only(
    data: bytes, changes: list[tuple[int, int]], longer: int, honest: bool
) -> None:
    changed = bytearray(data[: len(data) + longer] if longer < 0 else data + bytes(longer))
    for at, byte in changes:
        if changed:
            changed[at % len(changed)] = byte
    if honest:
        changed[:4] = len(changed).to_bytes(4, "little")
    try:
        requests.decode(bytes(changed))
    except Malformed as error:
        assert str(error)
