"""A SQLite file: whether it can take part in transactions, which file it is, and the right to write it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from sqlalchemy.engine import Connection
from sqlalchemy.exc import DBAPIError

from txrpc.errors import ConfigurationError, ResourceUnavailable

__all__ = [
    "DECISIONS",
    "DURABLY",
    "MARKERS",
    "REGISTER",
    "driver_of",
    "in_writing",
    "incarnation",
    "is_busy",
    "is_durable",
    "name_of",
    "preflight",
    "prove",
    "set_proof",
]

OLDEST: Final = (3, 24)
MARKERS: Final = "txrpc_branch"
DECISIONS: Final = "txrpc_decision"
REGISTER: Final = "txrpc_register"
_MADE: Final = (
    f"CREATE TABLE IF NOT EXISTS {MARKERS} (branch BLOB PRIMARY KEY) WITHOUT ROWID",
    (
        f"CREATE TABLE IF NOT EXISTS {DECISIONS} "
        "(xid BLOB PRIMARY KEY, committed INTEGER NOT NULL, branches BLOB NOT NULL, done INTEGER NOT NULL) WITHOUT ROWID"
    ),
    f"CREATE INDEX IF NOT EXISTS {DECISIONS}_undone ON {DECISIONS} (xid) WHERE committed AND NOT done",
    f"CREATE TABLE IF NOT EXISTS {REGISTER} (one INTEGER PRIMARY KEY CHECK (one = 1), id BLOB NOT NULL, floor BLOB NOT NULL)",
)

DURABLY: Final = "PRAGMA synchronous = EXTRA"
"""FULL lets a power failure undo a commit whose journal was deleted, because the folder may forget that: EXTRA does not.
It cannot be said inside a transaction."""

_PROOF: Final = "txrpc_branch"


def driver_of(connection: Connection) -> Any:
    """The `sqlite3.Connection` under *connection*; aiosqlite has one inside its own."""
    driver = connection.connection.driver_connection
    return getattr(driver, "_conn", driver)


def name_of(error: BaseException) -> str:
    """SQLite's name of an error, for example ``SQLITE_BUSY_SNAPSHOT``; "" if it is none of SQLite's."""
    return getattr(getattr(error, "orig", error), "sqlite_errorname", None) or ""


def is_busy(error: BaseException) -> bool:
    """Return whether another connection, or another program, has kept *error*'s statement from what it wanted."""
    return name_of(error).startswith(("SQLITE_BUSY", "SQLITE_LOCKED"))


def set_proof(connection: Connection) -> None:
    """Begin what `prove` ends."""
    connection.exec_driver_sql(f"SAVEPOINT {_PROOF}")


def prove(connection: Connection) -> None:
    """Raise `ResourceUnavailable` unless the open transaction is the one in which `set_proof` was called."""
    try:
        connection.exec_driver_sql(f"RELEASE {_PROOF}")
    except DBAPIError as error:
        raise ResourceUnavailable(
            f"the transaction of a branch was ended before its time, and its work is lost or stays ({name_of(error)}): by an error "
            "after which SQLite rolls back by itself (a full disk, an interrupt, ON CONFLICT ROLLBACK), or on the driver's own "
            "connection"
        ) from error


@contextmanager
def in_writing(connection: Connection) -> Iterator[None]:
    """Have the right to write for the block, on a connection in AUTOCOMMIT; what the block writes is durable then."""
    connection.exec_driver_sql(DURABLY)
    connection.exec_driver_sql("BEGIN IMMEDIATE")
    try:
        yield
        connection.exec_driver_sql("COMMIT")
    except BaseException:
        try:
            if driver_of(connection).in_transaction:
                connection.exec_driver_sql("ROLLBACK")
        except DBAPIError:
            connection.invalidate()
        raise


def incarnation(connection: Connection) -> str:
    """Return which file this is: one that is put in its place, such as a backup, is another one.

    A backup that is written *into* the file is not noticed: docs/operating.md says what to do.
    """
    return f"{Path(_path(connection)).stat().st_ino:x}"


def _path(connection: Connection) -> str:
    path = next((row[2] for row in connection.exec_driver_sql("PRAGMA database_list") if row[1] == "main"), "")
    return str(path or "")


def is_durable(connection: Connection) -> bool:
    """Return whether what commits now survives a power failure."""
    level = connection.exec_driver_sql("PRAGMA synchronous").scalar() or 0
    return level >= _EXTRA or (level == _FULL and _journal(connection) != "delete")


_FULL, _EXTRA = 2, 3


def _journal(connection: Connection) -> str:
    return str(connection.exec_driver_sql("PRAGMA journal_mode").scalar()).lower()


def preflight(
    connection: Connection, resource: str, _capacity: int | None, decides: bool = False
) -> tuple[str, Sequence[str]]:
    """Check that this file can take part, and make txrpc's tables in it; returns its identity, and sentences of warning.

    Raises `ConfigurationError` with one sentence that says what to change.
    """
    where = f"the database of resource {resource!r}"
    driver = driver_of(connection)
    if not _path(connection):
        raise ConfigurationError(f"{where} is in memory, and would not survive: name a file, as in sqlite:///ledger.db")
    version = tuple(map(int, str(connection.exec_driver_sql("SELECT sqlite_version()").scalar()).split(".")[:2]))
    if version < OLDEST:
        raise ConfigurationError(f"{where} is SQLite {version}; txrpc needs {OLDEST} or later")
    if getattr(driver, "autocommit", None) is True:
        raise ConfigurationError(f"{where} is connected with autocommit=True, without transactions: leave it away")
    if (journal := _journal(connection)) in ("off", "memory"):
        raise ConfigurationError(
            f"{where} has journal_mode={journal}: after a crash half of a transaction may be there; WAL is a good value"
        )
    if decides and driver.in_transaction and not is_durable(connection):
        raise ConfigurationError(
            f"{where} is to decide transactions, which a power failure must not undo: when the program connects, let it say PRAGMA "
            "synchronous = EXTRA (or FULL, with journal_mode = WAL)"
        )
    for statement in _MADE:
        connection.exec_driver_sql(statement)
    connection.exec_driver_sql(
        f"INSERT INTO {REGISTER} VALUES (1, ?, ?) ON CONFLICT DO NOTHING",  # noqa: S608 - a constant
        (os.urandom(16), bytes(16)),
    )
    identity: bytes = connection.exec_driver_sql(f"SELECT id FROM {REGISTER}").scalar_one()  # noqa: S608
    connection.commit()
    level = connection.exec_driver_sql("PRAGMA synchronous").scalar() or 0
    warnings = [_LOSES] if level < _FULL else []
    if not connection.exec_driver_sql("PRAGMA busy_timeout").scalar():
        warnings.append(_NEVER_WAITS)
    return f"sqlite/{identity.hex()}", warnings


_LOSES: Final = "synchronous is below FULL: a transaction that was committed can be lost when the power fails"
_NEVER_WAITS: Final = (
    "its busy time-out is 0: of two that write at one time one is aborted at once; give the driver a timeout"
)
