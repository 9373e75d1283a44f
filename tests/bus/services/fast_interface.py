"""A dbus-fast service interface. No `from __future__ import annotations`: dbus-fast reads them."""

# mypy: ignore-errors

from dbus_fast import DBusError
from dbus_fast.service import ServiceInterface, dbus_property, method
from dbus_fast.service import signal as dbus_signal


class Fast(ServiceInterface):
    """Echoes, fails, swaps descriptors, ticks and has a property."""

    def __init__(self):
        super().__init__("test.Fast")
        self._level = 3

    @method()
    def Echo(self, value: "v") -> "v":
        return value

    @method()
    def Fail(self):
        raise DBusError("test.Error.Fast", "too fast")

    @method()
    def Swap(self, fd: "h") -> "h":
        return fd

    @dbus_signal()
    def Tick(self, number) -> "u":
        return number

    @dbus_property()
    def Level(self) -> "u":
        return self._level

    @Level.setter
    def Level(self, value: "u"):
        self._level = value
        self.emit_properties_changed({"Level": value})
