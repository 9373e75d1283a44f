"""A service as people write them with dbus-python and GLib; run with Debian's own Python.

`python3 glib_service.py NAME`: owns NAME, exports /test/Object, prints "ready" when it is there.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import dbus
import dbus.mainloop.glib
import dbus.service
from gi.repository import GLib

INTERFACE = "test.Interface"


class Object(dbus.service.Object):  # type: ignore[misc]
    level = 7

    @dbus.service.method(INTERFACE, in_signature="s", out_signature="s")
    def Upper(self, text: str) -> str:
        return text.upper()

    @dbus.service.method(INTERFACE, in_signature="a{sv}", out_signature="a{sv}")
    def Dict(self, values: Any) -> Any:
        return values

    @dbus.service.method(INTERFACE, in_signature="", out_signature="")
    def Fail(self) -> None:
        raise dbus.DBusException("it failed", name="test.Error.Failed")

    @dbus.service.method(INTERFACE, in_signature="h", out_signature="t")
    def Size(self, fd: Any) -> int:
        number = fd.take()
        try:
            return os.fstat(number).st_size
        finally:
            os.close(number)

    @dbus.service.method(INTERFACE, in_signature="s", out_signature="h")
    def Open(self, text: str) -> Any:
        number = os.memfd_create("test")
        os.write(number, text.encode())
        os.lseek(number, 0, os.SEEK_SET)
        try:
            return dbus.types.UnixFd(number)
        finally:
            os.close(number)

    @dbus.service.method(INTERFACE, in_signature="u", out_signature="")
    def Emit(self, count: int) -> None:
        for number in range(count):
            self.Tick(number)

    @dbus.service.signal(INTERFACE, signature="u")
    def Tick(self, number: int) -> None:
        pass

    @dbus.service.method(dbus.PROPERTIES_IFACE, in_signature="ss", out_signature="v")
    def Get(self, _interface: str, _name: str) -> Any:
        return dbus.UInt32(self.level)

    @dbus.service.method(dbus.PROPERTIES_IFACE, in_signature="s", out_signature="a{sv}")
    def GetAll(self, _interface: str) -> Any:
        return {"Level": dbus.UInt32(self.level)}


def main(name: str) -> None:
    dbus.mainloop.glib.DBusGMainLoop(set_as_default=True)
    connection = dbus.SessionBus()
    owned = dbus.service.BusName(name, connection, do_not_queue=True)
    Object(owned, "/test/Object")
    print("ready", flush=True)
    GLib.MainLoop().run()


if __name__ == "__main__":
    main(*sys.argv[1:])
