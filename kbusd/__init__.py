"""kbusd: a D-Bus message bus in userland, one confined process per client.

Modules that have a .pxd beside them are compiled, and all but the supervisor's own are in one shared
object (setup.py), where they are found first.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.machinery import EXTENSION_SUFFIXES, ExtensionFileLoader, ModuleSpec
from types import ModuleType

_HERE = os.path.dirname(__file__)
_NATIVE = os.path.join(_HERE, "native" + EXTENSION_SUFFIXES[0])
_APART = ("supervisor", "cuse")


class _Compiled:
    """Finds them."""

    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        ours, *within = name.split(".")
        if ours != __name__ or len(within) != 2 or within[0] in _APART:
            return None
        if not os.path.exists(os.path.join(_HERE, *within) + ".pxd"):
            return None
        return ModuleSpec(name, ExtensionFileLoader(name, _NATIVE), origin=_NATIVE)


if os.path.exists(_NATIVE):  # else it is just being built
    sys.meta_path.insert(0, _Compiled)
