"""Whether a PostgreSQL database can take part in transactions: looked up once, when the process starts."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Final

from sqlalchemy.engine import Connection
from sqlalchemy.exc import DBAPIError

from txrpc._replication import deaf
from txrpc.errors import ConfigurationError

__all__ = ["current_token", "preflight"]

logger = logging.getLogger("txrpc.sql")

OLDEST: Final = 130_000
"""PostgreSQL 13 brought pg_current_xact_id and pg_xact_status(xid8)."""


def current_token(connection: Connection) -> str:
    """The identifier of the transaction that is open on *connection*, or "" if it has written nothing."""
    return connection.exec_driver_sql("SELECT pg_current_xact_id_if_assigned()::text").scalar() or ""


def preflight(
    connection: Connection, resource: str, capacity: int | None, decides: bool = False
) -> tuple[str, Sequence[str]]:
    """Check that this database can take part; returns its identity, and sentences of warning.

    Raises `ConfigurationError` with one sentence that says what to change.  *capacity*: connections that the pool may open.
    *decides*: transactions may be decided in it, so that it need not be able to prepare.
    """
    row = connection.exec_driver_sql(
        "SELECT current_setting('server_version_num')::int, current_setting('max_prepared_transactions')::int, "
        "current_setting('max_connections')::int, current_setting('synchronous_commit'), current_setting('fsync'), "
        "pg_is_in_recovery(), current_setting('transaction_read_only'), current_database(), "
        "(SELECT oid FROM pg_database WHERE datname = current_database())"
    ).one()
    version, prepared, connections, synchronous, fsync, standby, read_only, database, oid = row
    where = f"the database {database!r} of resource {resource!r}"
    if version < OLDEST:
        raise ConfigurationError(
            f"{where} runs PostgreSQL {version // 10_000}; txrpc needs {OLDEST // 10_000} or later"
        )
    if prepared == 0 and not decides:
        raise ConfigurationError(
            f"{where} cannot prepare transactions: set max_prepared_transactions in postgresql.conf to at least the number of "
            "transactions that commit at one time (max_connections is a good value) and restart PostgreSQL; where that cannot be "
            "set, let this database decide the transactions that it takes part in (decides=True)"
        )
    if standby:
        raise ConfigurationError(f"{where} is a standby and cannot write: connect to the primary")
    if read_only == "on":
        raise ConfigurationError(f"{where} is read-only: default_transaction_read_only must be off for this role")
    assigned = connection.exec_driver_sql("SELECT pg_current_xact_id()::text").scalar()
    if current_token(connection) != assigned:
        raise ConfigurationError(
            f"the engine of resource {resource!r} is in AUTOCOMMIT, without transactions: give it another isolation_level"
        )
    warnings = _of_pool(prepared, connections, capacity)
    if synchronous == "off":
        warnings.append(
            "synchronous_commit is off: a transaction that was committed in one phase can be lost in a crash"
        )
    if fsync == "off":
        warnings.append("fsync is off: prepared transactions can be lost in a crash")
    warnings += _short_timeouts(connection)
    if unheard := deaf(connection.dialect.driver, connection.exec_driver_sql("SHOW lc_messages").scalar() or ""):
        warnings.append(unheard)
    if connection.exec_driver_sql("SHOW lock_timeout").scalar() == "0":
        logger.info("resource %s: %s", resource, _NO_LOCK_TIMEOUT)
    system = _system(connection)
    if not system:
        warnings.append(_NO_IDENTITY)
    return f"{system}/{oid}" if system else "", warnings


_NO_LOCK_TIMEOUT: Final = (
    "lock_timeout is 0: two transactions that wait for each other in two databases do so until their deadline; with a lock_timeout "
    "below it (for this role, or in the URL: ?options=-c lock_timeout=2s) and retry=True they end well, and soon"
)
_NO_IDENTITY: Final = (
    "its identity is not known, so that another database under its name would not be noticed: GRANT EXECUTE ON FUNCTION "
    "pg_control_system() TO the role of the engine"
)


def _of_pool(prepared: int, connections: int, capacity: int | None) -> list[str]:
    """A warning about each limit of the server that the pool can reach."""
    warnings = []
    if not prepared:
        warnings.append(
            "it cannot prepare (max_prepared_transactions is 0): a transaction can use it alone, or let it decide"
        )
    if capacity is not None and 0 < prepared < capacity:
        warnings.append(
            f"max_prepared_transactions is {prepared}, and the connection pool may have {capacity} transactions at one time: "
            "PREPARE will fail under load; raise the one or lower the other"
        )
    if capacity is not None and 2 * capacity > connections:
        warnings.append(
            f"the pool may open {capacity} connections, and recovery as many again, of the server's {connections}"
        )
    return warnings


def _short_timeouts(connection: Connection) -> list[str]:
    """A warning about each of the server's own time-outs that is shorter than transactions are by default."""
    return [
        f"{name} is {timeout_ms} ms, and a transaction may take {_USUAL_MS // 1000} s by default: a branch that meets it is "
        "rolled back; raise it for this role, or give transactions a shorter timeout"
        for name, timeout_ms in connection.exec_driver_sql(_TIMEOUTS)
    ]


_USUAL_MS: Final = 30_000
"""How long a transaction may take that was given no timeout."""
_TIMEOUTS: Final = (
    "SELECT name, setting FROM pg_settings WHERE name IN ('idle_in_transaction_session_timeout', 'transaction_timeout', "
    "'statement_timeout') AND setting::bigint BETWEEN 1 AND 29999 ORDER BY name"
)


def _system(connection: Connection) -> str:
    """The cluster's own identifier, which is the same however it is reached; "" without the right to read it."""
    try:
        with connection.begin_nested() if connection.in_transaction() else connection.begin():
            return str(connection.exec_driver_sql("SELECT system_identifier FROM pg_control_system()").scalar())
    except DBAPIError:
        return ""
