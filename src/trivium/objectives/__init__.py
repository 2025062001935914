"""Objectives: pure functions of per-token log-probabilities, one family a file."""
