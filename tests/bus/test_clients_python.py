"""Libraries that Python programs use: dbus-python with GLib, jeepney, dbus-fast, python-dbusmock."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest

from .clients import DEBIAN_PYTHON, Program, glib_service, run, run_reaped
from .daemon import Bus, path_with_daemon

SERVICES = Path(__file__).with_name("services")


# -- dbus-python -------------------------------------------------------------------------


def test_dbus_python_service_and_client(bus: Bus) -> None:
    with glib_service(bus, "test.python.Glib"):
        out = run(bus, DEBIAN_PYTHON, str(SERVICES / "glib_client.py"), "test.python.Glib")
    assert "all good" in out


# -- jeepney -----------------------------------------------------------------------------


def test_jeepney_blocking(bus: Bus) -> None:
    from jeepney import DBusAddress, MatchRule, MessageType, message_bus, new_method_call
    from jeepney.io.blocking import Proxy, open_dbus_connection

    with glib_service(bus, "test.python.Jeepney"), open_dbus_connection(bus.address) as connection:
        assert connection.unique_name.startswith(":1.")
        address = DBusAddress(
            "/test/Object", bus_name="test.python.Jeepney", interface="test.Interface"
        )
        call = new_method_call(address, "Upper", "s", ("abc",))
        reply = connection.send_and_get_reply(call, timeout=20)
        assert reply.body == ("ABC",)
        failed = connection.send_and_get_reply(new_method_call(address, "Fail"), timeout=20)
        assert failed.header.message_type == MessageType.error
        rule = MatchRule(type="signal", interface="test.Interface", member="Tick")
        Proxy(message_bus, connection, timeout=20).AddMatch(rule)
        with connection.filter(rule, bufsize=10) as queue:
            connection.send_and_get_reply(new_method_call(address, "Emit", "u", (5,)), timeout=20)
            assert [message.body[0] for message in queue] == [0, 1, 2, 3, 4]


def test_jeepney_passes_descriptors(bus: Bus) -> None:
    from jeepney import DBusAddress, new_method_call
    from jeepney.io.blocking import open_dbus_connection

    with (
        glib_service(bus, "test.python.Jeepney2"),
        open_dbus_connection(bus.address, enable_fds=True) as connection,
    ):
        address = DBusAddress(
            "/test/Object", bus_name="test.python.Jeepney2", interface="test.Interface"
        )
        fd = os.memfd_create("x")
        os.write(fd, b"12345")
        reply = connection.send_and_get_reply(
            new_method_call(address, "Size", "h", (fd,)), timeout=20
        )
        os.close(fd)
        assert reply.body == (5,)
        reply = connection.send_and_get_reply(
            new_method_call(address, "Open", "s", ("text",)), timeout=20
        )
        with reply.body[0].to_file("rb") as file:
            assert file.read() == b"text"


# -- dbus-fast ---------------------------------------------------------------------------


def test_dbus_fast_service_and_client(bus: Bus) -> None:
    asyncio.run(asyncio.wait_for(_dbus_fast(bus.address), 60))


async def _dbus_fast(address: str) -> None:
    from dbus_fast import DBusError, NameFlag, RequestNameReply, Variant
    from dbus_fast.aio import MessageBus

    from .services.fast_interface import Fast

    server = await MessageBus(bus_address=address, negotiate_unix_fd=True).connect()
    client = await MessageBus(bus_address=address, negotiate_unix_fd=True).connect()
    service = Fast()
    server.export("/test/fast", service)
    reply = await server.request_name("test.python.Fast", NameFlag.DO_NOT_QUEUE)
    assert reply == RequestNameReply.PRIMARY_OWNER

    introspection = await client.introspect("test.python.Fast", "/test/fast")
    proxy: Any = client.get_proxy_object("test.python.Fast", "/test/fast", introspection)
    fast = proxy.get_interface("test.Fast")
    assert (await fast.call_echo(Variant("a{sv}", {"k": Variant("t", 5)}))).value["k"].value == 5
    with pytest.raises(DBusError, match="too fast"):
        await fast.call_fail()

    ticks: list[int] = []
    arrived = asyncio.Event()

    def on_tick(number: int) -> None:
        ticks.append(number)
        if number == 199:
            arrived.set()

    fast.on_tick(on_tick)
    await fast.call_echo(Variant("s", "the match rule is in place"))
    for number in range(200):
        service.Tick(number)
    await arrived.wait()
    assert ticks == list(range(200))

    changed: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    properties = proxy.get_interface("org.freedesktop.DBus.Properties")
    properties.on_properties_changed(lambda *args: changed.done() or changed.set_result(args))
    await fast.set_level(9)
    assert await fast.get_level() == 9
    assert (await changed)[1]["Level"].value == 9

    reader, writer = os.pipe()
    returned = await fast.call_swap(writer)
    os.write(returned, b"through two buses' worth of sockets")
    assert os.read(reader, 100) == b"through two buses' worth of sockets"
    for fd in {reader, writer, returned}:
        os.close(fd)

    many = await asyncio.gather(*(fast.call_echo(Variant("u", n)) for n in range(100)))
    assert [one.value for one in many] == list(range(100))
    for one in (client, server):
        one.disconnect()
        await one.wait_for_disconnect()


# -- python-dbusmock ---------------------------------------------------------------------


def test_dbusmock_service(bus: Bus) -> None:
    client = bus.connect()
    client.add_match("member='NameOwnerChanged',arg0='test.python.Mock'")
    command = (DEBIAN_PYTHON, "-m", "dbusmock", "test.python.Mock", "/mock", "test.Mock")
    with Program(bus, *command):
        client.wait_signal("NameOwnerChanged")
        client.call(
            "test.python.Mock",
            "/mock",
            "org.freedesktop.DBus.Mock",
            "AddMethod",
            "sssss",
            ("test.Mock", "Double", "i", "i", "ret = args[0] * 2"),
        )
        assert client.call("test.python.Mock", "/mock", "test.Mock", "Double", "i", (21,)).args == [
            42
        ]


def test_dbusmock_starts_its_own_bus(tmp_path: Path) -> None:
    """DBusTestCase starts what is called dbus-daemon on PATH, and finds the pid it printed."""
    script = """
import dbus, dbusmock
class T(dbusmock.DBusTestCase): pass
T.start_session_bus()
bus = T.get_dbus()
server = T.spawn_server("test.Mock", "/", "test.Mock", stdout=None)
obj = bus.get_object("test.Mock", "/")
obj.AddMethod("test.Mock", "Hi", "", "s", "ret = 'hello'", dbus_interface="org.freedesktop.DBus.Mock")
assert obj.Hi(dbus_interface="test.Mock") == "hello"
server.terminate(); server.wait()
T.start_system_bus()
system = T.get_dbus(True)
assert system.get_name_owner("org.freedesktop.DBus") == "org.freedesktop.DBus"
T.tearDownClass()
print("all good")
"""
    path = path_with_daemon(tmp_path)
    assert "all good" in run_reaped(DEBIAN_PYTHON, "-c", script, PATH=path)
