"""The pure protocol: tables that take values and return values."""
