"""The tables and the statements of a benchmark, in a schema of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import SQLAlchemyError

from txrpc.errors import ConfigurationError
from txrpc.ids import Gid
from txrpc.sql import ResourceManager

__all__ = ["ACCOUNTS", "GROUP", "SCHEMA", "add", "engine_to", "prepared_databases", "use_schema"]

SCHEMA = "txrpc_bench"
GROUP = "txrpc-bench"
"""Of the coordinator: what is prepared under it is the benchmark's."""
ACCOUNTS = 1_000
"""So many that customers seldom wait for each other's locks, which would be measured instead."""

_MADE = (
    f"CREATE SCHEMA {SCHEMA}",
    f"CREATE TABLE {SCHEMA}.account (name int PRIMARY KEY, cents bigint NOT NULL)",
    f"CREATE TABLE {SCHEMA}.journal (number bigserial PRIMARY KEY, account int NOT NULL, cents bigint NOT NULL)",
    f"INSERT INTO {SCHEMA}.account SELECT i, 1000000000 FROM generate_series(0, {ACCOUNTS - 1}) i",  # noqa: S608 - ours
)
_UPDATE = sa.text(f"UPDATE {SCHEMA}.account SET cents = cents + :cents WHERE name = :account")  # noqa: S608 - ours
_INSERT = sa.text(f"INSERT INTO {SCHEMA}.journal (account, cents) VALUES (:account, :cents)")  # noqa: S608 - ours


def add(connection: Connection, account: int, cents: int) -> None:
    """Do one side of a transfer."""
    row = {"account": account, "cents": cents}
    connection.execute(_UPDATE, row)
    connection.execute(_INSERT, row)


def engine_to(url: str, customers: int) -> Engine:
    """Return an engine whose pool is never short; raises `ConfigurationError` if *url* is none, or of no driver that is there."""
    try:
        engine = sa.create_engine(url, pool_size=customers, max_overflow=0)
    except (SQLAlchemyError, ImportError) as error:
        raise ConfigurationError(f"no engine for {shown_url(url)}: {error}") from error
    if engine.dialect.name != "postgresql":
        raise ConfigurationError(f"the databases of a benchmark are PostgreSQL's; {shown_url(url)} is not")
    return engine


def shown_url(url: str) -> str:
    """*url* without its password; "that URL" if it is none."""
    try:
        return sa.make_url(url).render_as_string(hide_password=True)
    except SQLAlchemyError:
        return "that URL"


def use_schema(connection: Any, _record: object) -> None:
    """A listener for new connections: what txrpc makes for itself goes with the benchmark's schema."""
    with contextlib.closing(connection.cursor()) as cursor:
        cursor.execute(f"SET search_path TO {SCHEMA}")
    connection.commit()


@contextlib.contextmanager
def prepared_databases(urls: tuple[str, str], customers: int) -> Iterator[None]:
    """Make the tables, and drop them at the end.

    Raises `ConfigurationError` or `ResourceUnavailable` for what cannot take part, before anything is made.
    """
    engines = [engine_to(url, customers) for url in urls]
    identities = [_look(number, engine) for number, engine in enumerate(engines)]
    if identities[0] and identities[0] == identities[1]:
        raise ConfigurationError("both URLs are of one database: a transaction over two needs two")
    with contextlib.ExitStack() as stack:
        for engine in engines:
            stack.callback(engine.dispose)
            stack.enter_context(_schema(engine))
        yield


def _look(number: int, engine: Engine) -> str:
    resource = ResourceManager(f"bank-{number}", engine)
    try:
        return resource.start().identity
    finally:
        resource.close()


@contextlib.contextmanager
def _schema(engine: Engine) -> Iterator[None]:
    where = engine.url.render_as_string()
    try:
        with engine.begin() as connection:
            if sa.inspect(connection).has_schema(SCHEMA):
                raise ConfigurationError(
                    f"{where} has a schema {SCHEMA} already, of a benchmark that is running or was cut off; if it was: "
                    f"DROP SCHEMA {SCHEMA} CASCADE"
                )
            for statement in _MADE:
                connection.exec_driver_sql(statement)
    except SQLAlchemyError as error:
        raise ConfigurationError(f"the tables cannot be made in {where}: {error}") from error
    try:
        yield
    except BaseException:
        with contextlib.suppress(SQLAlchemyError):
            _drop(engine)
        raise
    try:
        _drop(engine)
    except SQLAlchemyError as error:
        raise ConfigurationError(f"the schema {SCHEMA} in {where} could not be dropped: {error}") from error


def _drop(engine: Engine) -> None:
    """Drop the tables, and what a run that was cut off may have left prepared, which would keep them locked."""
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        ours = " OR ".join(f"starts_with(gid, '{prefix}')" for prefix in Gid.prefixes(GROUP))
        mine = f"database = current_database() AND ({ours})"
        for gid in list(connection.exec_driver_sql(f"SELECT gid FROM pg_prepared_xacts WHERE {mine}").scalars()):  # noqa: S608
            connection.exec_driver_sql(f"ROLLBACK PREPARED '{gid}'")
        connection.exec_driver_sql("SET lock_timeout = '10s'")
        connection.exec_driver_sql(f"DROP SCHEMA {SCHEMA} CASCADE")
        connection.invalidate()  # its lock_timeout goes with it
