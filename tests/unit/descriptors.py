"""Which descriptors this process has open."""

from __future__ import annotations

import gc
import os


def descriptors() -> set[str]:
    """Those that are still in use: what an earlier test has left to the garbage collector is closed first, as it
    would be at any moment."""
    gc.collect()
    return set(os.listdir("/proc/self/fd"))
