"""What holds for all unit tests."""

from __future__ import annotations

import hypothesis

# How long an example takes says how busy the machine is, and nothing else.
hypothesis.settings.register_profile("patient", deadline=None)
hypothesis.settings.load_profile("patient")
