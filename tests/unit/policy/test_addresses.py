"""D-Bus server addresses: what they come to, and how the wrong ones are refused."""

from __future__ import annotations

import pytest

from kbusd.policy.addresses import Address, AddressError, resolve

ENVIRONMENT = {"XDG_RUNTIME_DIR": "/run/user/7"}


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("unix:path=/run/bus", "path", "/run/bus"),
        ("unix:path=/with%20space%25", "path", "/with space%"),
        ("unix:path=/%ff", "path", "/\udcff"),
        ("unix:path=/run/bus,guid=0123", "path", "/run/bus"),
        ("unix:abstract=a/b", "abstract", "a/b"),
        ("unix:runtime=yes", "path", "/run/user/7/bus"),
        ("systemd:", "systemd", ""),
    ],
)
def test_a_place_to_listen_at(text: str, kind: str, value: str) -> None:
    assert resolve(text, "a.conf:3", ENVIRONMENT) == [Address(kind, value, text, "a.conf:3")]


@pytest.mark.parametrize("key", ["dir", "tmpdir"])
def test_a_directory_gets_another_name_each_time(key: str) -> None:
    (first, second) = resolve(f"unix:{key}=/tmp;unix:{key}=/tmp", "", ENVIRONMENT)
    assert first.kind == second.kind == "path"
    assert first.value.startswith("/tmp/dbus-")
    assert first.value != second.value


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("nonsense", "not a D-Bus address"),
        ("unix:path", "not a D-Bus address"),
        ("unix:path=/a b", "not a D-Bus address"),
        ("unix:path=/a,,", "not a D-Bus address"),
        ("unix:path=/a%0", "not a D-Bus address"),
        ("unix:path=/a%00b", "zero byte"),
        ("unix:path=/a,path=/b", "stands twice"),
        ("unix:", "exactly one of path, abstract, dir, tmpdir, runtime"),
        ("unix:path=/a,abstract=b", "exactly one of"),
        ("unix:runtime=no", "runtime must be 'yes'"),
        ("tcp:host=localhost", "transport 'tcp' is not supported"),
    ],
)
def test_what_cannot_be_listened_on(text: str, reason: str) -> None:
    with pytest.raises(AddressError, match=reason) as caught:
        resolve(text, "--address", ENVIRONMENT)
    assert str(caught.value).startswith("--address: ")


def test_no_runtime_directory() -> None:
    with pytest.raises(AddressError, match="XDG_RUNTIME_DIR is not set"):
        resolve("unix:runtime=yes", "", {})
