"""INSERT where the row may be there already, as each database spells it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from sqlalchemy import Table, func, literal_column
from sqlalchemy.dialects import mysql, postgresql, sqlite

__all__ = ["BACKENDS", "counts_new_rows", "insert_new", "upsert"]

_ON_CONFLICT: Final[dict[str, Any]] = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}
_ON_DUPLICATE: Final = frozenset({"mysql", "mariadb"})
BACKENDS: Final = frozenset({*_ON_CONFLICT, *_ON_DUPLICATE})
"""The databases that a log can be in."""


def insert_new(backend: str, table: Table) -> Any:
    """Return an INSERT that leaves a row alone that is there."""
    if backend not in _ON_DUPLICATE:
        return _ON_CONFLICT[backend](table).on_conflict_do_nothing()
    # Not IGNORE, which cuts off what is too long.
    key = next(iter(table.primary_key))
    return mysql.insert(table).on_duplicate_key_update({key.name: key})


def counts_new_rows(backend: str) -> bool:
    """Return whether the row count of `insert_new` leaves out those that were there."""
    return backend not in _ON_DUPLICATE


def upsert(backend: str, table: Table, names: Sequence[str], where_empty: str = "") -> Any:
    """Return an INSERT that changes columns *names* of a row that is there, but, if *where_empty*, only while that column is ""."""
    if backend not in _ON_DUPLICATE:
        insertion = _ON_CONFLICT[backend](table)
        changes = {name: insertion.excluded[name] for name in names}
        keys = [column.name for column in table.primary_key]
        where = table.c[where_empty] == "" if where_empty else None
        return insertion.on_conflict_do_update(index_elements=keys, set_=changes, where=where)
    insertion = mysql.insert(table)
    changes = {name: insertion.inserted[name] for name in names}
    if where_empty:
        # No parameter behind the rows: PyMySQL makes one statement of many of them.
        is_empty = table.c[where_empty] == literal_column("''")
        changes = {name: func.if_(is_empty, new, table.c[name]) for name, new in changes.items()}
    return insertion.on_duplicate_key_update(changes)
