"""The configuration that dbus-daemon reads, compiled to a value, and the decisions made by it."""
