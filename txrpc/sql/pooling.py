"""What a connection pooler between here and PostgreSQL does to transactions: found out at start, by trying."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import DBAPIError

from txrpc._sqlstate import connection_lost, sqlstate
from txrpc.errors import ConfigurationError, ResourceUnavailable
from txrpc.sql.postgresql_errors import sentence

__all__ = ["check_pooler", "starting"]

_ASK: Final = "SELECT pg_backend_pid()"
_UNTIL_PREPARED: Final = 8
"""After so many times every driver has made a prepared statement of a query (psycopg: five by default)."""

_NO_PREPARED: Final = frozenset({"26000", "42P05"})
"""A prepared statement does not exist, or exists already: it belongs to the backend, which is another one now."""
_REMEDIES: Final = {
    "psycopg": "create_engine(..., connect_args={'prepare_threshold': None})",
    "asyncpg": "create_async_engine(..., connect_args={'statement_cache_size': 0})",
}


def check_pooler(connection: Connection, engine: Engine, resource: str) -> None:
    """Raise `ConfigurationError` if the driver's prepared statements do not work through the pooler.

    *connection*: one of its own, in AUTOCOMMIT.  *engine*: the user's, of which one connection is taken.
    A pooler that pools by transaction gives the backend that was used last to the next client: one connection prepares a
    statement, the other takes the backend away, and the first must do without.
    """
    with engine.connect() as first:
        for _ in range(_UNTIL_PREPARED):
            first.exec_driver_sql(_ASK)
            first.commit()
        connection.exec_driver_sql("BEGIN")
        try:
            connection.exec_driver_sql(_ASK)
            first.exec_driver_sql(_ASK)
            first.commit()
        except DBAPIError as error:
            if sqlstate(error) not in _NO_PREPARED:
                raise
            first.invalidate()
            remedy = _REMEDIES.get(engine.dialect.driver, "see the driver's documentation")
            raise ConfigurationError(
                f"resource {resource!r} is behind a pooler that gives a connection another backend in each transaction, where the "
                f"driver's prepared statements are lost: switch them off: {remedy}"
            ) from error
        finally:
            connection.exec_driver_sql("ROLLBACK")


@contextmanager
def starting(resource: str) -> Iterator[None]:
    """Return what the database, or a pooler before it, says to the first transaction, as an error of ours.

    A pooler that pools by statement ends the connection there; not every driver hands on what it said.
    """
    try:
        yield
    except DBAPIError as error:
        if "statement pooling mode" in str(error.orig):
            raise ConfigurationError(
                f"resource {resource!r} is behind a pooler that pools by statement and refuses transactions: let it pool by "
                "transaction or by session"
            ) from error
        if connection_lost(error):
            raise ResourceUnavailable(
                f"the connection of resource {resource!r} was closed with its first transaction ({sentence(error)}): its database "
                "is starting or stopping, or, if it stays so, a pooler before it pools by statement and refuses transactions"
            ) from error
        raise
