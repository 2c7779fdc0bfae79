"""Measurements, each of which compares things side by side in one run."""
