"""Enumerations that travel as numbers and print as names."""

from __future__ import annotations

import enum

__all__ = ["NamedIntEnum"]


class NamedIntEnum(enum.IntEnum):
    """An `enum.IntEnum` that prints as ``Outcome.ABORTED``, where a plain one prints ``2``."""

    def __str__(self) -> str:
        return f"{type(self).__name__}.{self.name}"

    def __format__(self, spec: str) -> str:
        return format(str(self), spec)
