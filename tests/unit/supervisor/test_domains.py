"""Which domains there are, whose they are, and which buses are in which."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kbusd.rings.entries import Node, Share
from kbusd.supervisor import domains
from kbusd.supervisor.clients import Clients
from kbusd.supervisor.device import Devices
from kbusd.supervisor.domains import HOST, MAX_CONNECTIONS, Domain, DomainError, read

BOX = Domain("box", 100_000, 65_536)


def node(bus: str) -> Node:
    return Node(bus, "bus", 0o600, 0, 0)


def test_its_users_are_called_as_in_the_container() -> None:
    found = [BOX.inside(uid) for uid in (0, 99_999, 100_000, 165_535, 165_536)]
    assert found == [None, None, 0, 65_535, None]
    assert HOST.inside(0) == 0 and HOST.inside((1 << 32) - 2) == (1 << 32) - 2


def test_its_users_together_have_a_limit() -> None:
    of: dict[Share, int] = {0: 5000, 99_999: 5000, 100_000: MAX_CONNECTIONS - 2}
    of[100_001, "behind an endpoint"] = 1
    assert BOX.full(of) == HOST.full(of) == ""
    of[165_535] = 1
    assert "domain box has 1024 connections" in BOX.full(of)
    assert HOST.full(of) == ""


def test_a_bus_is_in_one_domain_and_has_its_own_name_there() -> None:
    assert BOX.local(node("domain/box/0-mine")) == node("0-mine")
    assert BOX.local(node("domain/box/")) == node("")
    assert HOST.local(node("0-mine")) == node("0-mine")
    for elsewhere in "0-mine", "domain/boxes/0-mine", "domain/other/0-mine", "":
        assert BOX.local(node(elsewhere)) is None
    assert HOST.local(node("domain/box/0-mine")) is None


def test_who_says_what_was_opened_can_t_lead_into_another_domain() -> None:
    """It is a tree, which may have been taken over."""
    here, there = Clients(), Clients()
    devices: Any = SimpleNamespace(queues={"0-host": here, "domain/box/0-mine": there})

    def found(domain: Domain, bus: str) -> Clients | None:
        return Devices.clients_of(devices, domain, bus)

    assert found(HOST, "0-host") is here and found(BOX, "0-mine") is there
    assert found(HOST, "domain/box/0-mine") is None
    assert found(BOX, "../../0-host") is None and found(BOX, "0-host") is None


def test_before_the_first_container_was_added_there_are_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(domains, "DOMAINS", str(tmp_path / "not-made-yet"))
    assert read(domains.DOMAINS) == {}
    with pytest.raises(DomainError, match="elsewhere: No such file or directory"):
        read(str(tmp_path / "elsewhere"))


def test_the_admin_says_it_by_files(tmp_path: Path) -> None:
    (tmp_path / "box").write_text("100000 65536\n")
    (tmp_path / "a.b").write_text(" 1 1\t/run/x \n")
    for ignored in (".box.new", "box~"):
        (tmp_path / ignored).write_text("rubbish")
    assert read(str(tmp_path)) == {
        "domain/box/": BOX,
        "domain/a.b/": Domain("a.b", 1, 1, "/run/x"),
    }


@pytest.mark.parametrize(
    ("name", "said"),
    [
        *[("box", said) for said in ("", "1", "0 1", "1 0", "x 1", "1 1 here", "1 1 /a b", "-1 1")],
        ("box", "100000 4294967295"),
        ("b x", "1 1"),
        ("ü", "1 1"),
        ("x" * 64, "1 1"),
    ],
)
def test_a_file_that_says_something_else_is_named(tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / name).write_text(said)
    with pytest.raises(DomainError, match=r"wants a first uid|root's"):
        read(str(tmp_path))


def test_a_directory_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DomainError, match="nowhere: No such file"):
        read(str(tmp_path / "nowhere"))
