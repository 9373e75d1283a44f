"""Fuzzers: each runs alone (`python -m tests.fuzz.X [SECONDS] [SEED]`); the suite runs them briefly."""
