"""Shared memory and lines between the processes of a bus: what they say and how."""
