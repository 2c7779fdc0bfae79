"""Tables of txrpc's own in a user's database."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from sqlalchemy.engine import Connection
from sqlalchemy.exc import DBAPIError

from txrpc._sqlstate import sqlstate

__all__ = ["make_tables"]

_MADE_MEANWHILE: Final = frozenset({"23505", "42P07", "42710"})
"""IF NOT EXISTS does not help where two programs make a table at once."""


def make_tables(connection: Connection, names: Sequence[str], statements: str) -> list[str]:
    """Return the qualified names of tables, on a connection in AUTOCOMMIT; unless all are there, make them with *statements*."""
    for name in names:
        if connection.exec_driver_sql(f"SELECT to_regclass('{name}')").scalar() is not None:
            continue
        for statement in statements.split("; "):
            try:
                connection.exec_driver_sql(statement)
            except DBAPIError as error:
                if sqlstate(error) not in _MADE_MEANWHILE:
                    raise
    return [
        connection.exec_driver_sql(
            "SELECT quote_ident(nspname) || '.' || quote_ident(relname) FROM pg_class c "  # noqa: S608 - constants
            f"JOIN pg_namespace n ON n.oid = relnamespace WHERE c.oid = to_regclass('{name}')"
        ).scalar_one()
        for name in names
    ]
