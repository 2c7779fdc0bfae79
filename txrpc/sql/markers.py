"""Marker rows: a branch writes one of its own, so that whether it has committed can be read in any history of its database.

A number like PostgreSQL's transaction id means something only in the history that gave it; a row is there if and only if the
transaction that wrote it is.  It costs an INSERT a branch.  Rows are deleted after a week, in batches, when the database is swept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from sqlalchemy.engine import Connection
from sqlalchemy.exc import DBAPIError

from txrpc.errors import ConfigurationError
from txrpc.sql.tables import make_tables

__all__ = ["Marker", "clean", "holds", "prepare_table"]

_TABLE: Final = "txrpc_branch"
_KEPT: Final = "7 days"
_BATCH: Final = 1_000


@dataclass(frozen=True, slots=True)
class Marker:
    """One row: in *table*, a qualified name, under *number*, 16 hexadecimal digits."""

    table: str
    number: str

    def write(self, connection: Connection) -> None:
        """In the transaction of the branch."""
        connection.exec_driver_sql(f"INSERT INTO {self.table} (branch) VALUES ('\\x{self.number}')")  # noqa: S608 - ours


def prepare_table(connection: Connection, resource: str) -> str:
    """The table's qualified name; it is made if it is not there.  Raises `ConfigurationError` if it cannot be written."""
    made = (
        f"CREATE TABLE IF NOT EXISTS {_TABLE} (branch bytea PRIMARY KEY, at timestamptz NOT NULL DEFAULT now()); "
        f"CREATE INDEX IF NOT EXISTS {_TABLE}_at ON {_TABLE} (at)"
    )
    try:
        (table,) = make_tables(connection, [_TABLE], made)
        may = connection.exec_driver_sql(
            f"SELECT has_table_privilege('{table}', 'INSERT') AND has_table_privilege('{table}', 'SELECT, DELETE')"
        ).scalar()
    except DBAPIError as error:
        raise ConfigurationError(_needs(resource, f"it cannot be made ({type(error.orig).__name__})")) from error
    if not may:
        raise ConfigurationError(_needs(resource, f"{table} cannot be written"))
    return table


def _needs(resource: str, trouble: str) -> str:
    return (
        f"resource {resource!r} has markers=True, which needs the table {_TABLE}, and {trouble}: let its owner CREATE TABLE "
        f"{_TABLE} (branch bytea PRIMARY KEY, at timestamptz NOT NULL DEFAULT now()), and GRANT SELECT, INSERT, DELETE on it "
        "to the roles that write"
    )


def holds(connection: Connection, table: str, number: str) -> bool:
    """Return whether the branch that wrote this marker has committed, in the history that this database is in."""
    query = f"SELECT EXISTS (SELECT FROM {table} WHERE branch = '\\x{number}')"  # noqa: S608 - both are ours, and checked
    return bool(connection.exec_driver_sql(query).scalar())


def clean(connection: Connection, table: str) -> None:
    """Delete rows that no process will ask for any more; what another process is at just now is left to it."""
    old = f"SELECT branch FROM {table} WHERE at < now() - interval '{_KEPT}' LIMIT {_BATCH} FOR UPDATE SKIP LOCKED"  # noqa: S608
    connection.exec_driver_sql(f"DELETE FROM {table} WHERE branch IN ({old})")  # noqa: S608
