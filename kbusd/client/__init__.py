"""Clients of the bus, for programs and for tests."""
