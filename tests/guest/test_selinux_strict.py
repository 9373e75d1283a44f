"""The same under the strict variant of the policy, by which workers, broker and zygote are no `domain`."""

from __future__ import annotations

import pytest

from .test_selinux_bus import *  # noqa: F403

pytestmark = [pytest.mark.guest("selinux-strict"), pytest.mark.slow]
