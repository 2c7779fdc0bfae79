"""Whether a database of MySQL's or MariaDB's can take part in transactions: looked up once, when the process starts."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any, Final

from sqlalchemy.engine import Connection
from sqlalchemy.exc import DBAPIError

from txrpc.errors import ConfigurationError
from txrpc.sql.mysql_errors import DUPLICATE, code_of, sentence

__all__ = ["DECISIONS", "FORMAT", "MARKERS", "REGISTER", "is_durable", "number_of", "one", "preflight", "recover"]

FORMAT: Final = int.from_bytes(b"txrp", "big")
"""The format of our branches' identifiers (X/Open XA, formatID): those of others are not ours."""
MARKERS: Final = "txrpc_branch"
DECISIONS: Final = "txrpc_decision"
REGISTER: Final = "txrpc_register"

_OLDEST: Final = {"MariaDB": (10, 5), "MySQL": (8, 0, 30)}
"""Before these a branch is lost with the connection that has prepared it, or in a crash that finds it in the binary log alone."""
_MADE: Final = {
    MARKERS: (
        f"CREATE TABLE {MARKERS} (branch BINARY(14) NOT NULL PRIMARY KEY, "
        "gid VARCHAR(255) CHARACTER SET ascii COLLATE ascii_bin NOT NULL, session BIGINT UNSIGNED NOT NULL, KEY (gid)) "
        "ENGINE=InnoDB"
    ),
    REGISTER: (
        f"CREATE TABLE {REGISTER} (one TINYINT NOT NULL PRIMARY KEY, id BINARY(16) NOT NULL, floor BINARY(16) NOT NULL) "
        "ENGINE=InnoDB"
    ),
    DECISIONS: (
        f"CREATE TABLE {DECISIONS} (xid BINARY(16) NOT NULL PRIMARY KEY, committed BOOLEAN NOT NULL, branches LONGBLOB NOT NULL, "
        "done BOOLEAN NOT NULL, KEY (committed, done, xid)) ENGINE=InnoDB"
    ),
}
_NUMBER: Final = 14
"""Bytes of a branch's number."""
_MADE_MEANWHILE: Final = 1050
_NO_TABLE: Final = 1146


def one(connection: Connection, query: str) -> Any:
    """Return the one row of *query*, or None."""
    return connection.exec_driver_sql(query).one_or_none()


def recover(connection: Connection) -> list[str]:
    """The numbers of our branches that are prepared, in any database of this server."""
    in_digits = "" if getattr(connection.dialect, "is_mariadb", False) else " CONVERT XID"
    rows = connection.exec_driver_sql(f"XA RECOVER{in_digits}").all()
    return [number for row in rows if row[0] == FORMAT and (number := number_of(row[3])) is not None]


def number_of(data: bytes | str) -> str | None:
    """The number in what the server has of a branch: bytes, or their hexadecimal digits; None if it is none of ours."""
    raw = bytes.fromhex(data.removeprefix("0x")) if isinstance(data, str) else bytes(data)
    return raw[:_NUMBER].hex() if len(raw) == _NUMBER + 1 else None


def is_durable(connection: Connection) -> bool:
    """Return whether what commits now survives a crash of the machine."""
    logs, flushes, syncs = one(
        connection, "SELECT @@log_bin, @@GLOBAL.innodb_flush_log_at_trx_commit, @@GLOBAL.sync_binlog"
    )
    return int(flushes) == 1 and (not int(logs) or int(syncs) == 1)


def preflight(
    connection: Connection, resource: str, capacity: int | None, decides: bool = False
) -> tuple[str, Sequence[str]]:
    """Check that this database can take part, and make txrpc's tables in it; returns its identity, and sentences of warning.

    Raises `ConfigurationError` with one sentence that says what to change.
    """
    database, version, read_only, most = one(
        connection, "SELECT DATABASE(), VERSION(), @@GLOBAL.read_only, @@GLOBAL.max_connections"
    )
    if database is None:
        raise ConfigurationError(f"the engine of resource {resource!r} names no database: put its name into the URL")
    where = f"the database {database!r} of resource {resource!r}"
    product = "MariaDB" if "mariadb" in version.lower() else "MySQL"
    numbers = tuple(map(int, re.findall(r"\d+", version)[:3]))
    if numbers < _OLDEST[product]:
        needed = ".".join(map(str, _OLDEST[product]))
        raise ConfigurationError(
            f"{where} runs {product} {version}, which may lose a prepared branch; txrpc needs {needed} or later"
        )
    if int(read_only):
        raise ConfigurationError(f"{where} is read-only, as a replica is: connect to the primary")
    _check_recovery(connection, where)
    durable = is_durable(connection)
    if decides and not durable:
        raise ConfigurationError(f"{where} is to decide transactions, which no crash may undo: {_HOW_DURABLE}")
    identity = _make_tables(connection, where, decides)
    warnings = [] if durable else [f"what was committed or prepared can be lost in a crash: {_HOW_DURABLE}"]
    if capacity is not None and 2 * capacity > int(most):
        warnings.append(
            f"the pool may open {capacity} connections, and recovery as many again, of the server's {most} (max_connections)"
        )
    return identity, warnings


_HOW_DURABLE: Final = "set innodb_flush_log_at_trx_commit = 1, and sync_binlog = 1 if there is a binary log"


def _check_recovery(connection: Connection, where: str) -> None:
    try:
        recover(connection)
    except DBAPIError as error:
        raise ConfigurationError(
            f"{where} does not tell this user which branches are prepared ({sentence(error)}), so that none could be finished "
            "after a crash: GRANT XA_RECOVER_ADMIN ON *.* to it"
        ) from error


def _make_tables(connection: Connection, where: str, decides: bool) -> str:
    """Make what is missing, and check that it can be written; returns the register's number, which is the database's identity."""
    names = [MARKERS, REGISTER, *([DECISIONS] if decides else [])]
    try:
        for name in names:
            if not _is_there(connection, name):
                _make(connection, name)
        connection.rollback()
        first = f"INSERT INTO {REGISTER} VALUES (1, X'{os.urandom(16).hex()}', X'{bytes(16).hex()}')"  # noqa: S608
        if one(connection, f"SELECT id FROM {REGISTER}") is None:  # noqa: S608
            try:
                connection.exec_driver_sql(first)
                connection.commit()
            except DBAPIError as error:
                if code_of(error) != DUPLICATE:
                    raise
                connection.rollback()  # another process was quicker, and this one's snapshot is from before
        for name in names:
            engine = one(
                connection,
                "SELECT engine FROM information_schema.tables WHERE table_schema = DATABASE() "  # noqa: S608
                f"AND table_name = '{name}'",
            )
            if engine is None or engine[0].lower() != "innodb":
                raise ConfigurationError(f"{where}: its table {name} must be one of InnoDB's")
            connection.exec_driver_sql(f"DELETE FROM {name} WHERE 1 = 0")  # noqa: S608
        identity: bytes = one(connection, f"SELECT id FROM {REGISTER}")[0]  # noqa: S608
    except DBAPIError as error:
        raise ConfigurationError(
            f"{where} needs the tables {' and '.join(names)}, and they cannot be made or not be written ({sentence(error)}): let "
            f"their owner run {'; '.join(_MADE[name] for name in names)}; then GRANT SELECT, INSERT, UPDATE, DELETE on them to "
            "this user"
        ) from error
    connection.rollback()
    return f"mysql/{bytes(identity).hex()}"


def _is_there(connection: Connection, name: str) -> bool:
    connection.rollback()  # a snapshot from before it was made does not show it (1412)
    try:
        connection.exec_driver_sql(f"SELECT 1 FROM {name} LIMIT 1")  # noqa: S608 - constants
    except DBAPIError as error:
        if code_of(error) != _NO_TABLE:
            raise
        return False
    return True


def _make(connection: Connection, name: str) -> None:
    try:
        connection.exec_driver_sql(_MADE[name])
    except DBAPIError as error:
        if code_of(error) != _MADE_MEANWHILE:
            raise
