"""What the rings cost. One number per operation, best of several rounds; the bound is generous.

It shows the cost of the code with everything in the cache and nobody else on the ring; what a hop
between two processes costs, it can't show: that is `make bench`.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]

SOURCE = """
# cython: language_level=3, boundscheck=False, wraparound=False
from libc.stdint cimport uint8_t, uint64_t
from libc.string cimport memcpy, memset
from kbusd.rings.clock cimport Clock, monotonic
from kbusd.rings.frame cimport FrameHead, frame_length
from kbusd.rings.merge cimport Merge
from kbusd.rings.ring cimport Ring, RingReader
from kbusd.rings.status cimport StatusPage, StatusView

cdef enum:
    ROUNDS = 200
    BATCH = 500

def measure(int idle):
    cdef StatusPage page = StatusPage()
    cdef int slot = page.take_slot()
    cdef Ring ring = Ring(262144)
    cdef Ring silent = Ring(4096)
    cdef RingReader reader = RingReader(ring.fd, page, slot)
    cdef Clock clock = Clock()
    cdef Merge merge = Merge(clock)
    cdef FrameHead head
    cdef const uint8_t *payload
    cdef uint8_t *place
    cdef uint8_t message[200]
    cdef uint64_t start, write = 1 << 62, read = 1 << 62, merged = 1 << 62, scan = 1 << 62
    cdef uint64_t upto
    cdef int i, r
    memset(message, 1, 200)
    memset(&head, 0, sizeof(head))
    ring.attach(StatusView(page.fd), slot)
    head.kind = 1
    head.length = frame_length(0, 200)
    head.body_length = 200
    for r in range(ROUNDS):
        start = monotonic()
        for i in range(BATCH):
            place = ring.reserve(head.length)
            head.stamp += 1
            memcpy(place, &head, 40)
            memcpy(place + 40, message, 200)
            ring.commit()
        write = min(write, monotonic() - start)
        start = monotonic()
        upto = reader.head()
        for i in range(BATCH):
            reader.peek(upto, &head, &payload)
            reader.advance()
            reader.publish()
        read = min(read, monotonic() - start)
    for i in range(idle // 2):
        merge.add(RingReader(silent.fd, page, page.take_slot()))
    merge.add(reader)
    for i in range(idle - idle // 2):
        merge.add(RingReader(silent.fd, page, page.take_slot()))
    for r in range(ROUNDS):
        for i in range(BATCH):
            place = ring.reserve(head.length)
            head.stamp += 1
            memcpy(place, &head, 40)
            ring.commit()
        start = monotonic()
        merge.gather()
        scan = min(scan, monotonic() - start)
        start = monotonic()
        while merge.next(&head, &payload) is not None:
            pass
        merge.publish()
        merged = min(merged, monotonic() - start)
    return write / BATCH, read / BATCH, merged / BATCH, float(scan)
"""

BUILD = """
import sys
from Cython.Build import cythonize
from setuptools import Extension, setup
setup(
    script_args=["-q", "build_ext", "--inplace"],
    ext_modules=cythonize(
        [Extension("speed", ["speed.pyx"], include_dirs=[sys.argv[1] + "/kbusd/rings"])],
        include_path=[sys.argv[1]],
        quiet=True,
    ),
)
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_frame_costs_less_than_a_tenth_of_a_microsecond(tmp_path: Path) -> None:
    (tmp_path / "speed.pyx").write_text(SOURCE)
    subprocess.run(
        [sys.executable, "-c", BUILD, str(ROOT)],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        check=True,
    )
    for idle in (0, 300):
        output = subprocess.run(
            [sys.executable, "-c", f"import speed; print(*speed.measure({idle}))"],
            cwd=tmp_path,
            env={"PYTHONPATH": f"{tmp_path}:{ROOT}"},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        write, read, merged, scan = map(float, output.split())
        print(
            f"{idle} idle rings: write {write:.0f} ns, read {read:.0f} ns,"
            f" merge {merged:.0f} ns a frame, scan {scan:.0f} ns"
        )
        assert write < 100
        assert read < 100
        assert merged < 200
        assert scan < 1000 + 100 * idle
