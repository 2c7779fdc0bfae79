"""Conversations as generators: one body for both colours."""
