"""Enumerations that travel as numbers and print as names."""

from __future__ import annotations

import enum

__all__ = ["KeyEnum", "NamedIntEnum"]


class NamedIntEnum(enum.IntEnum):
    """An `enum.IntEnum` that prints as ``Outcome.ABORTED``, where a plain one prints ``2``."""

    def __str__(self) -> str:
        return f"{type(self).__name__}.{self.name}"

    def __format__(self, spec: str) -> str:
        return format(str(self), spec)


class KeyEnum(enum.Enum):
    """Members that are the keys of a table which is looked into at every step.

    An `enum.Enum` makes its hash from its name each time, in Python; each member is one object, so that the object's own will do.
    """

    __hash__ = object.__hash__
