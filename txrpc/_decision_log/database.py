"""The database under a SQL log: its URL, how its connections are set, and what its errors mean to an operator.

SQLite runs in WAL mode with ``synchronous=FULL``, so a commit is on the disk when it returns.

On PostgreSQL ``synchronous_commit`` is on whatever the database's default is.  Three waits are bounded, because a coordinator
that waits for ever cannot be replaced by another one:

- a server that vanished without a word: connect time-out, keepalives, ``tcp_user_timeout``;
- a coordinator that froze inside a transaction, holding the row that is the fence: ``idle_in_transaction_session_timeout``
  lets the server end its session, and a later epoch can open;
- a lock that is not given up: ``lock_timeout``.

MySQL and MariaDB are set alike: connect and read time-outs, ``idle_transaction_timeout`` (MySQL has none: there ``wait_timeout``
ends any session that says nothing), ``innodb_lock_wait_timeout``.  Whether a commit is on the disk is the server's own setting,
which is looked at and warned about.
"""

from __future__ import annotations

import logging
import re
import sqlite3
import time
from typing import Any

from sqlalchemy import create_engine, event, text
from sqlalchemy.engine import URL, Connection, Engine, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError, NoSuchModuleError, ProgrammingError
from sqlalchemy.pool import QueuePool

from txrpc._decision_log.upserts import BACKENDS
from txrpc._replication import deaf
from txrpc._sqlstate import refused
from txrpc.errors import ConfigurationError

__all__ = [
    "checked_url",
    "make_engine",
    "sentence",
    "shown",
    "warn_if_careless",
    "was_made_meanwhile",
    "was_refused",
]

logger = logging.getLogger("txrpc.decision_log")

_SQLITE_BUSY_S = 5.0
_POSTGRESQL_SETTINGS = (
    "synchronous_commit = on",
    "default_transaction_isolation = 'read committed'",  # what a takeover reads must not be older than its lock
    "idle_in_transaction_session_timeout = '10s'",
    "lock_timeout = '30s'",
)
_MYSQL_SETTINGS = (
    "SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED",
    "SESSION innodb_lock_wait_timeout = 30",
)
_MYSQL_PATIENCE = {True: "SESSION idle_transaction_timeout = 10", False: "SESSION wait_timeout = 10"}
"""Whether it is MariaDB."""
_MYSQL_OPTIONS = {"connect_timeout": 10, "read_timeout": 45}
_MYSQL_DRIVERS = ("pymysql", "mysqldb")
_MADE_MEANWHILE = frozenset({1050, 1061, 1213, 1412, 1684})
"""A table or an index is there already, a deadlock, and a definition that has changed or is changing: in MySQL's numbers."""
_LIBPQ_DRIVERS = ("psycopg", "psycopg2")
_LIBPQ_OPTIONS = {
    "connect_timeout": 10,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 30_000,  # milliseconds; the others are seconds
}
_REMEDY = {
    "disk": "free some space",
    "full": "free some space",
    "readonly": "give the coordinator the right to write it",
    "read-only": "give the coordinator the right to write it",
    "permission denied": "grant the coordinator's user the right to create and write its tables",
    "lock timeout": "another coordinator holds the log: stop it",
    "locked": "another program holds the file: stop it",
    "not a database": "name another file",
    "unable to open": "check that the folder exists and may be written",
    "password": "correct the user and password in the URL",
    "refused": "start the database, or correct the URL",
    "does not exist": "create the database, or correct the URL",
    "unknown database": "create the database, or correct the URL",
    "access denied": "correct the user and password in the URL",
    "can't connect": "start the database, or correct the URL",
    "command denied": "grant the coordinator's user the right to create and write its tables",
    "lock wait timeout": "another coordinator holds the log: stop it",
}


def was_refused(error: BaseException) -> bool:
    """Return whether it is certain that nothing was committed, although what commits was sent.

    PostgreSQL has said so where the connection lives on: an error rolls the statement back that was a transaction of its own.
    SQLite has where it found the disk full: the last page of a commit is what makes it one, and SQLite writes no further (no
    padding, on the file systems of today); a page that could not be written whole has a wrong checksum, so that recovery does
    not take it for one either.
    """
    return refused(error) or getattr(error, "sqlite_errorname", "") == "SQLITE_FULL"


def was_made_meanwhile(error: BaseException) -> bool:
    """Return whether another coordinator may just be making the same tables, or the same row."""
    if isinstance(error, IntegrityError | ProgrammingError):
        return True
    arguments: tuple[object, ...] = getattr(getattr(error, "orig", None), "args", ())
    return bool(arguments) and arguments[0] in _MADE_MEANWHILE


def checked_url(url: str) -> URL:
    """*url*, parsed; raises `ConfigurationError` if a log cannot be there."""
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        # Only its beginning is shown: a password may be anywhere in a text that is no URL.
        head = re.split(r"[:/@]", url)[0]
        raise ConfigurationError(f"the log is a database URL such as sqlite:///txrpc.db, not {head!r}...") from None
    backend = parsed.get_backend_name()
    if backend not in BACKENDS:
        raise ConfigurationError(f"a decision log can be in {', '.join(sorted(BACKENDS))} or etcd, not in {backend!r}")
    if backend == "sqlite" and parsed.database in (None, "", ":memory:"):
        raise ConfigurationError("the decision log must survive: name a file, as in sqlite:///txrpc.db")
    return parsed


def shown(url: URL) -> str:
    """*url* for people, without the password, wherever it is."""
    secret = [key for key in url.query if "pass" in key.lower()]
    return url.difference_update_query(secret).render_as_string(hide_password=True)


def make_engine(url: URL) -> Engine:
    """An engine of one connection, set as the module's docstring says; raises `ConfigurationError`."""
    driver, location = url.drivername.partition("+")[2], shown(url)
    try:
        if url.get_dialect().is_async:
            raise ConfigurationError(f"the log {location} needs a synchronous driver: {driver!r} is for asyncio")
        given = {key: value for key, value in _options(url.get_driver_name()).items() if key not in url.query}
        engine = create_engine(
            url, connect_args=given, poolclass=QueuePool, pool_size=1, max_overflow=1, pool_pre_ping=True
        )
    except (ImportError, NoSuchModuleError) as error:
        raise ConfigurationError(
            f"the driver {driver!r} of the log {location} is not installed: pip install {driver} ({error})"
        ) from None
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _sqlite_connect)
        event.listen(engine, "begin", _sqlite_begin)
    elif engine.dialect.name == "postgresql":
        event.listen(engine, "connect", _postgresql_connect)
    else:
        event.listen(engine, "connect", _mysql_connect)
    return engine


def _options(driver: str) -> dict[str, int]:
    if driver in _LIBPQ_DRIVERS:
        return _LIBPQ_OPTIONS
    return _MYSQL_OPTIONS if driver in _MYSQL_DRIVERS else {}


def _sqlite_connect(connection: Any, _record: object) -> None:
    connection.isolation_level = None  # BEGIN is ours
    try:
        connection.execute(f"PRAGMA busy_timeout={_SQLITE_BUSY_S * 1000:.0f}").close()
        _switch_to_wal(connection, time.monotonic() + _SQLITE_BUSY_S)
        connection.execute("PRAGMA synchronous=FULL").close()
    except BaseException:
        connection.close()  # SQLAlchemy drops it as it is
        raise


def _switch_to_wal(connection: sqlite3.Connection, until_s: float) -> None:
    # SQLite does not honour its busy time-out here when another program is creating the same log at this moment.
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL").close()
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > until_s:
                raise
        time.sleep(0.01)


def _sqlite_begin(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def _postgresql_connect(connection: Any, _record: object) -> None:
    with connection.cursor() as cursor:
        for setting in _POSTGRESQL_SETTINGS:
            cursor.execute(f"SET {setting}")
    connection.commit()


def _mysql_connect(connection: Any, _record: object) -> None:
    with connection.cursor() as cursor:
        cursor.execute("SELECT VERSION()")
        is_mariadb = "mariadb" in cursor.fetchone()[0].lower()
        for setting in (*_MYSQL_SETTINGS, _MYSQL_PATIENCE[is_mariadb]):
            cursor.execute(f"SET {setting}")
    connection.commit()


def warn_if_careless(connection: Connection, location: str) -> None:
    """Log a warning if the database is set so that it may lose what it has confirmed."""
    if connection.dialect.name in ("mysql", "mariadb"):
        _warn_of_mysql(connection, location)
    if connection.dialect.name != "postgresql":
        return
    if connection.scalar(text("SHOW fsync")) == "off":
        logger.warning("the log's database runs with fsync=off: decisions can be lost", extra={"log": location})
    if unheard := deaf(connection.dialect.driver, connection.scalar(text("SHOW lc_messages")) or ""):
        logger.warning("the log's driver: %s", unheard, extra={"log": location})
    standbys = connection.scalar(text("SELECT count(*) FROM pg_stat_replication"))
    if standbys and not connection.scalar(text("SHOW synchronous_standby_names")):
        logger.warning(
            "the log's database has standbys, and none is synchronous: a fail-over loses the last decisions; set "
            "synchronous_standby_names",
            extra={"log": location},
        )


def _warn_of_mysql(connection: Connection, location: str) -> None:
    asked = "SELECT @@GLOBAL.innodb_flush_log_at_trx_commit, @@log_bin, @@GLOBAL.sync_binlog"
    flushes, logs, syncs = connection.execute(text(asked)).one()
    if int(flushes) != 1 or (int(logs) and int(syncs) != 1):
        logger.warning(
            "the log's database may lose decisions in a crash: set innodb_flush_log_at_trx_commit = 1, and sync_binlog = 1 if "
            "there is a binary log",
            extra={"log": location},
        )


def sentence(error: BaseException) -> str:
    """Return what went wrong, and what to do about it where that is known; never a parameter or a password."""
    cause = error.orig if isinstance(error, DBAPIError) and error.orig is not None else error
    said = " ".join(str(cause).split())[:300] or type(cause).__name__
    if isinstance(cause, sqlite3.Error):
        said = f"{said} ({getattr(cause, 'sqlite_errorname', type(cause).__name__)})"
    remedy = next((what for sign, what in _REMEDY.items() if sign in said.lower()), None)
    return f"{said}: {remedy}" if remedy else said
