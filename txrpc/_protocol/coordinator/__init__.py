"""The coordinator's half of two-phase commit."""
