"""Struct layouts against linux/fuse.h, which the C compiler reads."""

from __future__ import annotations

import subprocess
from pathlib import Path
from struct import Struct

import pytest

from kbusd.cuse import abi

# Ours, fuse.h's, and its members in the order in which ours are packed. An array is its first element.
STRUCTS: list[tuple[Struct, str, str]] = [
    (abi.IN_HEADER, "fuse_in_header", "len opcode unique nodeid uid gid pid total_extlen padding"),
    (abi.OUT_HEADER, "fuse_out_header", "len error unique"),
    (abi.CUSE_INIT_IN, "cuse_init_in", "major minor unused flags"),
    (
        abi.CUSE_INIT_OUT,
        "cuse_init_out",
        "major minor unused flags max_read max_write dev_major dev_minor",
    ),
    (
        abi.INIT_OUT,
        "fuse_init_out",
        "major minor max_readahead flags max_background congestion_threshold max_write time_gran "
        "max_pages map_alignment flags2",
    ),
    (abi.FORGET_IN, "fuse_forget_in", "nlookup"),
    (abi.BATCH_FORGET_IN, "fuse_batch_forget_in", "count dummy"),
    (abi.FORGET_ONE, "fuse_forget_one", "nodeid nlookup"),
    (abi.GETATTR_IN, "fuse_getattr_in", "getattr_flags dummy fh"),
    (
        abi.SETATTR_IN,
        "fuse_setattr_in",
        "valid padding fh size lock_owner atime mtime ctime atimensec mtimensec ctimensec mode "
        "unused4 uid gid unused5",
    ),
    (abi.OPEN_IN, "fuse_open_in", "flags open_flags"),
    (abi.READ_IN, "fuse_read_in", "fh offset size read_flags lock_owner flags padding"),
    (abi.WRITE_IN, "fuse_write_in", "fh offset size write_flags lock_owner flags padding"),
    (abi.RELEASE_IN, "fuse_release_in", "fh flags release_flags lock_owner"),
    (abi.FLUSH_IN, "fuse_flush_in", "fh unused padding lock_owner"),
    (abi.ACCESS_IN, "fuse_access_in", "mask padding"),
    (abi.INTERRUPT_IN, "fuse_interrupt_in", "unique"),
    (abi.IOCTL_IN, "fuse_ioctl_in", "fh flags cmd arg in_size out_size"),
    (abi.POLL_IN, "fuse_poll_in", "fh kh flags events"),
    (
        abi.ATTR,
        "fuse_attr",
        "ino size blocks atime mtime ctime atimensec mtimensec ctimensec mode nlink uid gid rdev "
        "blksize flags",
    ),
    (abi.OPEN_OUT, "fuse_open_out", "fh open_flags padding"),
    (abi.WRITE_OUT, "fuse_write_out", "size padding"),
    (
        abi.STATFS_OUT,
        "fuse_kstatfs",
        "blocks bfree bavail files ffree bsize namelen frsize padding",
    ),
    (abi.IOCTL_OUT, "fuse_ioctl_out", "result flags in_iovs out_iovs"),
    (abi.IOCTL_IOVEC, "fuse_ioctl_iovec", "base len"),
    (abi.POLL_OUT, "fuse_poll_out", "revents padding"),
    (abi.DIRENT, "fuse_dirent", "ino off namelen type"),
    (abi.NOTIFY_POLL_OUT, "fuse_notify_poll_wakeup_out", "kh"),
    (abi.NOTIFY_INVAL_INODE_OUT, "fuse_notify_inval_inode_out", "ino off len"),
    (abi.NOTIFY_INVAL_ENTRY_OUT, "fuse_notify_inval_entry_out", "parent namelen flags"),
    (abi.NOTIFY_STORE_OUT, "fuse_notify_store_out", "nodeid offset size padding"),
]
NUMBERS = {
    **{f"FUSE_{name}": getattr(abi, name) for name in (
        "LOOKUP", "FORGET", "GETATTR", "SETATTR", "OPEN", "READ", "WRITE", "STATFS", "RELEASE",
        "FLUSH", "INIT", "OPENDIR", "READDIR", "RELEASEDIR", "ACCESS", "INTERRUPT", "DESTROY",
        "IOCTL", "POLL", "BATCH_FORGET", "ASYNC_READ", "BIG_WRITES", "MAX_PAGES", "GETATTR_FH",
        "IOCTL_COMPAT", "IOCTL_UNRESTRICTED", "IOCTL_RETRY", "IOCTL_32BIT", "IOCTL_DIR",
        "POLL_SCHEDULE_NOTIFY", "NOTIFY_POLL", "NOTIFY_INVAL_INODE", "NOTIFY_INVAL_ENTRY",
        "NOTIFY_STORE",
    )},
    **{name: getattr(abi, name) for name in (
        "CUSE_INIT", "CUSE_UNRESTRICTED_IOCTL", "FATTR_MODE", "FATTR_UID", "FATTR_GID",
        "FATTR_SIZE", "FOPEN_DIRECT_IO", "FOPEN_KEEP_CACHE", "FOPEN_NONSEEKABLE",
    )},
    "FUSE_KERNEL_VERSION": abi.MAJOR,
    "FUSE_ROOT_ID": abi.ROOT_NODE,
    "FUSE_IOCTL_MAX_IOV": abi.MAX_IOVECS,
}  # fmt: skip


def offsets(layout: Struct) -> list[int]:
    """Where each value of a Struct begins, by packing a 1 into one at a time."""
    count = len(layout.unpack(bytes(layout.size)))
    found = []
    for at in range(count):
        packed = layout.pack(*(int(each == at) for each in range(count)))
        found.append(packed.index(1))  # little-endian machines
    return found


@pytest.fixture(scope="module")
def header(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """What a C program finds in fuse.h."""
    lines = [f"sizeof(struct {name})" for _, name, _ in STRUCTS]
    for _, name, members in STRUCTS:
        lines += [f"offsetof(struct {name}, {member})" for member in members.split()]
    lines += ["offsetof(struct fuse_entry_out, attr)", "offsetof(struct fuse_attr_out, attr)"]
    lines += NUMBERS
    directory: Path = tmp_path_factory.mktemp("fuse")
    source = directory / "print.c"
    prints = "".join(f'printf("%lld\\n", (long long)({line}));\n' for line in lines)
    source.write_text(
        "#include <stdint.h>\n#include <stddef.h>\n#include <stdio.h>\n#include <linux/fuse.h>\n"
        f"int main(void) {{ {prints} return 0; }}\n"
    )
    program = directory / "print"
    subprocess.run(["gcc", "-o", program, source], check=True, timeout=60)
    done = subprocess.run([program], check=True, timeout=60, capture_output=True, text=True)
    return dict(zip(lines, map(int, done.stdout.split()), strict=True))


@pytest.mark.parametrize(("layout", "name", "members"), STRUCTS, ids=lambda each: str(each)[:30])
def test_structs(header: dict[str, int], layout: Struct, name: str, members: str) -> None:
    assert layout.size == header[f"sizeof(struct {name})"]
    theirs = [header[f"offsetof(struct {name}, {member})"] for member in members.split()]
    assert offsets(layout) == theirs


def test_what_precedes_attributes(header: dict[str, int]) -> None:
    assert header["offsetof(struct fuse_entry_out, attr)"] == abi.ENTRY_OUT.size
    assert header["offsetof(struct fuse_attr_out, attr)"] == abi.ATTR_OUT.size


def test_numbers(header: dict[str, int]) -> None:
    assert {name: header[name] for name in NUMBERS} == NUMBERS
