"""A dbus-python client with GLib's main loop, in Debian's own Python: `glib_client.py SERVICE`.

Calls, fails, reads properties, subscribes, follows a name and passes a descriptor both ways; prints
"all good" at the end.
"""

from __future__ import annotations

import os
import sys

import dbus
import dbus.mainloop.glib
from gi.repository import GLib


def main(name: str) -> None:
    dbus.mainloop.glib.DBusGMainLoop(set_as_default=True)
    bus = dbus.SessionBus()
    proxy = bus.get_object(name, "/test/Object")
    service = dbus.Interface(proxy, "test.Interface")

    assert service.Upper("abc") == "ABC"
    assert service.Dict({"a": dbus.UInt32(1), "b": "two"}) == {"a": 1, "b": "two"}
    assert proxy.Get("test.Interface", "Level", dbus_interface=dbus.PROPERTIES_IFACE) == 7
    try:
        service.Fail()
        raise AssertionError("Fail did not fail")
    except dbus.DBusException as error:
        assert error.get_dbus_name() == "test.Error.Failed"

    reader, writer = os.pipe()
    os.write(writer, b"x")
    os.close(writer)
    assert service.Size(dbus.types.UnixFd(reader)) == 0
    os.close(reader)
    taken = service.Open("from the service").take()
    assert os.read(taken, 100) == b"from the service"
    os.close(taken)

    loop = GLib.MainLoop()
    ticks: list[int] = []
    bus.add_signal_receiver(
        lambda number: (ticks.append(int(number)), number == 99 and loop.quit()),
        "Tick",
        "test.Interface",
        name,
        "/test/Object",
    )
    owners: list[str] = []
    bus.watch_name_owner(name, owners.append)
    service.Emit(dbus.UInt32(100), reply_handler=lambda: None, error_handler=lambda _: loop.quit())
    GLib.timeout_add_seconds(20, loop.quit)
    loop.run()
    assert ticks == list(range(100)), ticks
    assert owners
    assert owners[0].startswith(":1.")
    print("all good")


if __name__ == "__main__":
    main(*sys.argv[1:])
