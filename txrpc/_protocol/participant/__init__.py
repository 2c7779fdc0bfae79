"""The participant's half of two-phase commit: the branches of one process."""
