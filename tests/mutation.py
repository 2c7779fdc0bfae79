"""Imports txrpc with one mistake in it: the one that the environment variable TXRPC_MUTANT names (see `tests/mutants`)."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from types import CodeType, ModuleType
from typing import Any

__all__ = ["MUTANT", "Change", "install"]

MUTANT = "TXRPC_MUTANT"


@dataclass(frozen=True)
class Change:
    """In *module*, *old*, which is there once, becomes *new*."""

    module: str
    old: str
    new: str


class _Loader(importlib.machinery.SourceFileLoader):
    def __init__(self, name: str, path: str, change: Change) -> None:
        super().__init__(name, path)
        self._change = change

    def get_code(self, fullname: str) -> CodeType:
        """Compiled anew, and not kept: the next run has none of it."""
        source = self.get_data(self.path).decode()
        assert source.count(self._change.old) == 1, f"{self._change} does not fit its module any more"
        return compile(source.replace(self._change.old, self._change.new), self.path, "exec")


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, change: Change) -> None:
        self._change = change

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Of the changed module alone."""
        if fullname != self._change.module:
            return None
        found: Any = importlib.machinery.PathFinder.find_spec(fullname, path)
        return importlib.util.spec_from_loader(fullname, _Loader(fullname, found.origin, self._change))


def install(changes: dict[str, Change]) -> None:
    """Make the mistake, if one is named; before anything of txrpc is imported."""
    name = os.environ.get(MUTANT)
    if name:
        change = changes[name]
        assert change.module not in sys.modules, f"{change.module} was imported before"
        sys.meta_path.insert(0, _Finder(change))
