"""The decision log in a SQL database, through SQLAlchemy: a SQLite file, or PostgreSQL.

How to think of it
    Every write is one transaction that first locks the node's row and compares its epoch with our own: that is the fence.
    A later `open` raises the epoch under the same lock, so whatever an earlier coordinator writes after that fails.

    An error *before* COMMIT was sent means that the batch is not recorded.  An error *at* COMMIT means that nobody knows; then the
    caller repeats the batch, which is harmless because a decision is written once and never changes.

SQLite runs in WAL mode with ``synchronous=FULL``, so a commit is on the disk when it returns.  On PostgreSQL
``synchronous_commit`` is switched on for these connections.  One connection is used, by one thread at a time.
"""

from __future__ import annotations

import contextlib
import logging
import sqlite3
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from sqlalchemy import bindparam, create_engine, delete, event, func, insert, select, text, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import URL, Connection, Engine, make_url
from sqlalchemy.exc import (
    ArgumentError,
    DBAPIError,
    IntegrityError,
    NoSuchModuleError,
    ProgrammingError,
    SQLAlchemyError,
)
from sqlalchemy.pool import QueuePool

from txrpc.errors import ConfigurationError, Fenced
from txrpc.ids import NODE_MAX, Epoch, Xid, check_name
from txrpc.log.base import Decision, LogError, NotRecorded, Opened, RecordUncertain
from txrpc.log.schema import decisions, epochs, nodes, pack, prepare_schema, unpack

__all__ = ["SqlLog"]

logger = logging.getLogger("txrpc.log")

_INSERT = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}
_CREATE_ATTEMPTS = 5
_REMEDY = {
    "disk": "free some space",
    "full": "free some space",
    "readonly": "give the coordinator the right to write it",
    "read-only": "give the coordinator the right to write it",
    "locked": "another program holds the file: stop it",
    "not a database": "name another file",
    "unable to open": "check that the folder exists and may be written",
    "password": "correct the user and password in the URL",
    "refused": "start the database, or correct the URL",
    "does not exist": "create the database, or correct the URL",
}


class SqlLog:
    """See `txrpc.log.base.DecisionLog`."""

    def __init__(self, url: str) -> None:
        """Raises `ConfigurationError` if *url* is not one, or names a database or driver that there is none for."""
        self._url = _checked(url)
        self.location: str = self._url.render_as_string(hide_password=True)
        self._engine = _engine(self._url, self.location)
        self._insert: Any = _INSERT[self._url.get_backend_name()]
        self._node = ""
        self._epoch = Epoch(0)

    # ------------------------------------------------------------------------------------------------------ the port

    def open(self, node: str, nonce: int) -> Opened:
        """See `DecisionLog.open`."""
        self._node = check_name("node", node, NODE_MAX)
        for attempt in range(_CREATE_ATTEMPTS):
            try:
                with self._write() as connection:
                    prepare_schema(connection, self.location)
                    return self._open(connection, nonce)
            except (SQLAlchemyError, OSError) as error:
                # Another coordinator may be creating the same tables, or the same row, at this very moment.
                if isinstance(error, IntegrityError | ProgrammingError) and attempt < _CREATE_ATTEMPTS - 1:
                    time.sleep(0.05)
                    continue
                self._engine.dispose()
                raise ConfigurationError(f"cannot open the decision log {self.location}: {_sentence(error)}") from error
        raise AssertionError("unreachable")

    def _open(self, connection: Connection, nonce: int) -> Opened:
        _warn_if_careless(connection, self.location)
        row = connection.execute(select(nodes).where(nodes.c.node == self._node).with_for_update()).one_or_none()
        self._epoch = Epoch.make(Epoch(row.epoch).number + 1 if row else 1, nonce)
        before = connection.scalars(select(epochs.c.epoch).where(epochs.c.node == self._node)).all()
        if row is None:
            connection.execute(insert(nodes).values(node=self._node, epoch=self._epoch, forgotten_ms=0))
        else:
            connection.execute(update(nodes).where(nodes.c.node == self._node).values(epoch=self._epoch))
        opened_ms = time.time_ns() // 1_000_000
        connection.execute(insert(epochs).values(node=self._node, epoch=self._epoch, opened_ms=opened_ms))
        latest = connection.scalar(select(func.max(decisions.c.decided_ms)).where(decisions.c.node == self._node))
        forgotten_ms = row.forgotten_ms if row else 0
        lineage = frozenset(map(Epoch, before))
        return Opened(self._epoch, lineage, self._pending(connection), forgotten_ms, max(forgotten_ms, latest or 0))

    def record(self, batch: Sequence[Decision]) -> None:
        """See `DecisionLog.record`."""
        rows = [
            {
                "node": self._node,
                "xid": bytes(decision.xid),
                "epoch": int(decision.epoch),
                "decided_ms": decision.decided_ms,
                "branches": pack(decision.branches),
            }
            for decision in batch
        ]
        sent = False
        try:
            with self._engine.connect() as connection:
                self._fence(connection)
                if rows:
                    connection.execute(self._insert(decisions).on_conflict_do_nothing(), rows)
                    self._check_same(connection, rows)
                sent = True
                connection.commit()
        except (SQLAlchemyError, OSError) as error:
            if sent:
                raise RecordUncertain(f"no answer to COMMIT from {self.location}: {_sentence(error)}") from error
            raise NotRecorded(f"cannot write to {self.location}: {_sentence(error)}") from error

    def done(self, xids: Iterable[Xid], now_ms: int) -> None:
        """See `DecisionLog.done`."""
        mark = update(decisions).where(
            decisions.c.node == self._node, decisions.c.xid == bindparam("b_xid"), decisions.c.done_ms.is_(None)
        )
        rows = [{"b_xid": bytes(xid), "done_ms": now_ms} for xid in xids]
        if rows:
            with self._errors(), self._write() as connection:
                self._fence(connection)
                connection.execute(mark, rows)

    def outcome(self, xid: Xid) -> Decision | None:
        """See `DecisionLog.outcome`."""
        query = select(decisions).where(decisions.c.node == self._node, decisions.c.xid == bytes(xid))
        with self._errors(), self._engine.connect() as connection:
            row = connection.execute(query).one_or_none()
            return None if row is None else _decision(row)

    def pending(self) -> Sequence[Decision]:
        """See `DecisionLog.pending`."""
        with self._errors(), self._engine.connect() as connection:
            return self._pending(connection)

    def forget(self, done_before_ms: int, limit: int) -> int:
        """See `DecisionLog.forget`."""
        old = (
            select(decisions.c.xid)
            .where(decisions.c.node == self._node, decisions.c.done_ms < done_before_ms)
            .order_by(decisions.c.done_ms)
            .limit(limit)
        )
        with self._errors(), self._write() as connection:
            self._fence(connection)
            xids = connection.scalars(old).all()
            if xids:
                here = nodes.c.node == self._node
                connection.execute(delete(decisions).where(decisions.c.node == self._node, decisions.c.xid.in_(xids)))
                later = (here, nodes.c.forgotten_ms < done_before_ms)
                connection.execute(update(nodes).where(*later).values(forgotten_ms=done_before_ms))
            return len(xids)

    def close(self) -> None:
        """See `DecisionLog.close`."""
        self._engine.dispose()

    # ------------------------------------------------------------------------------------------------------ under it

    @contextlib.contextmanager
    def _write(self) -> Iterator[Connection]:
        with self._engine.begin() as connection:
            yield connection

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (SQLAlchemyError, OSError) as error:
            raise LogError(f"the decision log {self.location} does not answer: {_sentence(error)}") from error

    def _fence(self, connection: Connection) -> None:
        """Lock the node's row for the rest of the transaction and compare its epoch (SQLite has locked the whole file)."""
        query = select(nodes.c.epoch).where(nodes.c.node == self._node).with_for_update()
        present = connection.scalar(query)
        if present != self._epoch:
            later = Epoch(present) if present else "nobody"
            raise Fenced(
                f"epoch {self._epoch} of node {self._node!r} is over: {later} has opened the log {self.location}"
            )

    def _check_same(self, connection: Connection, rows: Sequence[dict[str, Any]]) -> None:
        """A decision never changes: what is there under these xids is what was to be written."""
        wanted = {row["xid"]: row["branches"] for row in rows}
        query = select(decisions.c.xid, decisions.c.branches).where(
            decisions.c.node == self._node, decisions.c.xid.in_(list(wanted))
        )
        held = {bytes(row.xid): bytes(row.branches) for row in connection.execute(query)}
        if held != wanted:
            raise AssertionError(
                f"the log {self.location} holds other decisions than those to be recorded: {held}, {wanted}"
            )

    def _pending(self, connection: Connection) -> tuple[Decision, ...]:
        query = select(decisions).where(decisions.c.node == self._node, decisions.c.done_ms.is_(None))
        return tuple(_decision(row) for row in connection.execute(query.order_by(decisions.c.decided_ms)))


def _decision(row: Any) -> Decision:
    return Decision(Xid(bytes(row.xid)), Epoch(row.epoch), row.decided_ms, unpack(bytes(row.branches)))


def _checked(url: str) -> URL:
    try:
        parsed = make_url(url)
    except ArgumentError:
        raise ConfigurationError(f"the log is a database URL such as sqlite:///txrpc.db, not {url!r}") from None
    backend = parsed.get_backend_name()
    if backend not in _INSERT:
        raise ConfigurationError(f"a decision log can be in {' or '.join(sorted(_INSERT))}, not in {backend!r}")
    if backend == "sqlite" and parsed.database in (None, "", ":memory:"):
        raise ConfigurationError("the decision log must survive: name a file, as in sqlite:///txrpc.db")
    return parsed


def _engine(url: URL, location: str) -> Engine:
    try:
        engine = create_engine(url, poolclass=QueuePool, pool_size=1, max_overflow=1, pool_pre_ping=True)
    except (ImportError, NoSuchModuleError) as error:
        driver = url.get_driver_name()
        raise ConfigurationError(
            f"the driver {driver!r} of the log {location} is not installed: pip install {driver} ({error})"
        ) from None
    if url.get_backend_name() == "sqlite":
        event.listen(engine, "connect", _sqlite_connect)
        event.listen(engine, "begin", _sqlite_begin)
    else:
        event.listen(engine, "connect", _postgresql_connect)
    return engine


def _sqlite_connect(connection: Any, _record: object) -> None:
    connection.isolation_level = None  # BEGIN is ours
    for pragma in ("busy_timeout=5000", "journal_mode=WAL", "synchronous=FULL"):
        connection.execute(f"PRAGMA {pragma}").close()


def _sqlite_begin(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def _postgresql_connect(connection: Any, _record: object) -> None:
    with connection.cursor() as cursor:
        cursor.execute("SET synchronous_commit = on")
    connection.commit()


def _warn_if_careless(connection: Connection, location: str) -> None:
    if connection.dialect.name == "postgresql" and connection.scalar(text("SHOW fsync")) == "off":
        logger.warning("the log's database runs with fsync=off: decisions can be lost", extra={"log": location})


def _sentence(error: BaseException) -> str:
    """What went wrong, and what to do about it where that is known; never a parameter or a password."""
    cause = error.orig if isinstance(error, DBAPIError) and error.orig is not None else error
    said = " ".join(str(cause).split())[:300] or type(cause).__name__
    if isinstance(cause, sqlite3.Error):
        said = f"{said} ({getattr(cause, 'sqlite_errorname', type(cause).__name__)})"
    remedy = next((what for sign, what in _REMEDY.items() if sign in said.lower()), None)
    return f"{said}: {remedy}" if remedy else said
