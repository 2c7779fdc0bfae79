"""The demonstration: ``python -m examples.bank.demo``."""
