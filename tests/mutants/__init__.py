"""Mistakes outside of the pure core, on purpose, and the tests that must notice each."""
