"""GLib's own test bus, GTestDBus, which runs the `dbus-daemon` first on PATH; Debian's Python."""

from __future__ import annotations

import gi

gi.require_version("Gio", "2.0")
from gi.repository import Gio, GLib  # noqa: E402

DRIVER = ("org.freedesktop.DBus", "/org/freedesktop/DBus", "org.freedesktop.DBus")


def main() -> None:
    bus = Gio.TestDBus.new(Gio.TestDBusFlags.NONE)
    bus.up()
    connection = Gio.bus_get_sync(Gio.BusType.SESSION, None)
    connection.set_exit_on_close(False)
    reply = connection.call_sync(
        *DRIVER,
        "GetConnectionUnixProcessID",
        GLib.Variant("(s)", (DRIVER[0],)),
        None,
        0,
        9000,
        None,
    )
    with open(f"/proc/{reply.unpack()[0]}/cmdline", "rb") as file:
        print("daemon:", file.read().replace(b"\0", b" ").decode())
    reply = connection.call_sync(
        *DRIVER, "RequestName", GLib.Variant("(su)", ("test.GTestDBus", 0)), None, 0, 9000, None
    )
    assert reply.unpack() == (1,)
    del connection
    bus.down()
    print("all good")


main()
