"""What other processes of the bus start with."""

from __future__ import annotations

import os
from typing import Any

import pytest

from kbusd.supervisor import spawn


def test_the_linker_binds_at_once_in_the_zygote_and_in_no_service(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("LD_BIND_NOW", raising=False)
    started: list[dict[str, str]] = []

    def record(path: str, arguments: list[str], environment: dict[str, str], **_: Any) -> int:
        started.append(environment)
        return 1

    monkeypatch.setattr(os, "posix_spawn", record)
    for module in ("kbusd.workers.zygote", "kbusd.supervisor.launcher"):
        spawn.spawn(module, [], {3: 2})
    assert [each.get("LD_BIND_NOW") for each in started] == ["1", None]
