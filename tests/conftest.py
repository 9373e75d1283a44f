"""What all tests have in common: those marked `guest` run in a virtual machine (docs/guest.md)."""

pytest_plugins = ["tests.guest.plugin"]
