"""The register in PostgreSQL: see `txrpc.sql.register` for what it is.

The incarnation of its database is the cluster's own identifier, and the history (timeline) that it is writing.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from sqlalchemy.engine import Connection
from sqlalchemy.exc import DBAPIError

from txrpc._protocol.outcomes import Found
from txrpc._replication import watch_replication
from txrpc._sqlstate import sqlstate
from txrpc.errors import ConfigurationError, ResourceUnavailable
from txrpc.ids import RegisterId, Xid
from txrpc.sql.register import Row, Verdict, register_id, written
from txrpc.sql.tables import make_tables

__all__ = ["PostgresqlRegister", "open_register"]

_DECISIONS: Final = "txrpc_decision"
_REGISTER: Final = "txrpc_register"
_CLAIM_MS: Final = 5_000
"""For how long a claim waits for a branch that has decided and not committed yet."""
_ATTEMPTS: Final = 10
_BATCH: Final = 1_000

_MADE: Final = (
    f"CREATE TABLE IF NOT EXISTS {_DECISIONS} "
    "(xid bytea PRIMARY KEY, committed boolean NOT NULL, branches bytea NOT NULL, done boolean NOT NULL DEFAULT false); "
    f"CREATE INDEX IF NOT EXISTS {_DECISIONS}_undone ON {_DECISIONS} (xid) WHERE committed AND NOT done; "
    f"CREATE TABLE IF NOT EXISTS {_REGISTER} "
    "(one boolean PRIMARY KEY DEFAULT true CHECK (one), id bytea NOT NULL, floor bytea NOT NULL)"
)
_INCARNATION: Final = (
    "(SELECT system_identifier FROM pg_control_system())::text "
    "|| '/' || left(pg_walfile_name(pg_current_wal_insert_lsn()), 8)"
)
"""The cluster, and the history that it is writing.  An error on a standby, which cannot say what is decided."""
_DURABLY: Final = (
    "CASE WHEN current_setting('synchronous_commit') = 'off' THEN set_config('synchronous_commit', 'on', true) END"
)
"""Rule 22: who configured that commits may be lost did not mean decisions."""


@dataclass(frozen=True, slots=True)
class PostgresqlRegister:
    """See `Register`."""

    id: RegisterId
    decisions: str
    table: str
    """Qualified names."""

    def decide(self, connection: Connection, xid: Xid, branches: bytes, pid: int) -> Verdict:
        """Write COMMITTED, as the last work of the open transaction on *connection*; COMMIT must follow, or ROLLBACK.

        *branches*: what phase two needs to know; nothing if there is none to come.  *pid*: the backend that did the work.  A pooler
        or a proxy may have moved the connection to another one since, which has no open transaction: there the statement would
        commit by itself, without the work.  It writes nothing there, which is TAKEN as well: a claim is needed all the same.

        After an exception, and when the end of the COMMIT is not known, only `claim` may say what is true.
        """
        row = _one(
            connection,
            f"INSERT INTO {self.decisions} (xid, committed, branches, done) "
            f"SELECT {_bytes(xid)}, true, {_bytes(branches)}, {'false' if branches else 'true'} "
            f"WHERE pg_backend_pid() = {int(pid)} AND now() <> statement_timestamp() "
            "ON CONFLICT DO NOTHING RETURNING current_setting('transaction_isolation')",
        )
        if row is None:
            return Verdict.TAKEN
        # A snapshot that is older than the floor does not show it; to lock the row then fails (FOR KEY SHARE would not: the floor
        # is no key).  At READ COMMITTED each statement sees the latest.
        current = "" if row[0] == "read committed" else " FOR SHARE"
        floor = self._floor(connection, current)
        return Verdict.DECIDED if floor is not None and xid > floor else Verdict.REFUSED

    def claim(self, connection: Connection, xid: Xid, commit: bytes | None = None) -> Row:
        """Learn how *xid* ends; if that is not decided, it is ABORTED from now on, or COMMITTED with *commit*.  Never OPEN.

        Only for those whose patience is over: it ends a transaction that might have gone on.  Waits for a branch that is deciding,
        for some seconds, and then raises `ResourceUnavailable`.
        """
        for _ in range(_ATTEMPTS):
            with _transaction(connection) as own:
                row = self._claim(connection, xid, commit)
                own.undone = row is not None and row.found is Found.FORGOTTEN
            if row is not None:
                return row
        raise ResourceUnavailable(f"the decision about {xid} is written and deleted again and again")

    def _claim(self, connection: Connection, xid: Xid, commit: bytes | None) -> Row | None:
        """None: what had taken the key has gone meanwhile."""
        if (misfit := self._misfit(connection)) is not None:
            return (self._row(connection, xid) if misfit is Found.LOST else None) or Row(misfit)
        connection.exec_driver_sql(f"SELECT set_config('lock_timeout', '{_CLAIM_MS}', true)")
        ended = "false, '', false" if commit is None else f"true, {_bytes(commit)}, {'false' if commit else 'true'}"
        insert = (
            f"INSERT INTO {self.decisions} (xid, committed, branches, done) VALUES ({_bytes(xid)}, {ended}) "  # noqa: S608
            "ON CONFLICT DO NOTHING RETURNING true"
        )
        try:
            inserted = _one(connection, insert)
        except DBAPIError as error:
            if sqlstate(error) == "55P03":
                raise ResourceUnavailable(f"{xid} is being decided at this moment") from error
            raise
        if inserted is None:
            return self._row(connection, xid)
        # Only now: while this waited for the key the floor may have passed.
        floor = self._floor(connection)
        return written(commit) if floor is not None and xid > floor else Row(Found.FORGOTTEN)

    def ask(
        self, connection: Connection, register: RegisterId, xid: Xid, claim: bool, commit: bytes | None = None
    ) -> Row:
        """`claim` or `read` on behalf of a transaction that is decided in *register*: this one, as it is or was, or another.

        Raises `ResourceUnavailable` if COMMITTED may not be as durable yet as the database's owner wants it (rule 22).
        """
        as_it_was = replace(self, id=register)
        row = as_it_was.claim(connection, xid, commit) if claim else as_it_was.read(connection, xid)
        if row.found is Found.COMMITTED:
            self._wait_for_standbys(connection)
        return row

    def _wait_for_standbys(self, connection: Connection) -> None:
        """Return when all that can be seen here is where it must be.

        A commit whose wait for its standby was cancelled, or cut short by a crash, can be seen and may yet be lost.  A later one
        that is there proves that it is as well.
        """
        if not connection.exec_driver_sql("SHOW synchronous_standby_names").scalar():
            return
        with watch_replication(connection.connection.driver_connection) as cancelled, _transaction(connection):
            connection.exec_driver_sql(f"UPDATE {self.table} SET floor = floor")  # noqa: S608
        if cancelled:
            raise ResourceUnavailable(cancelled[0])

    def read(self, connection: Connection, xid: Xid) -> Row:
        """Return what is known of *xid*, and change nothing."""
        misfit = self._misfit(connection)
        if misfit is Found.ELSEWHERE:
            return Row(misfit)
        return self._row(connection, xid) or Row(misfit or Found.OPEN)

    def undone(
        self, connection: Connection, after: Xid | None = None, limit: int = _BATCH
    ) -> Sequence[tuple[Xid, bytes]]:
        """Return transactions that are COMMITTED and not `done`, and their branches, in the order of their identifiers."""
        behind = f"AND xid > {_bytes(after)} " if after is not None else ""
        rows = connection.exec_driver_sql(
            f"SELECT xid, branches FROM {self.decisions} "  # noqa: S608
            f"WHERE committed AND NOT done {behind}ORDER BY xid LIMIT {int(limit)}"
        )
        found = [(Xid(bytes(xid)), bytes(branches)) for xid, branches in rows]
        if found:
            self._wait_for_standbys(connection)
        return found

    def done(self, connection: Connection, xids: Collection[Xid]) -> None:
        """Every branch of these has proven that it has committed: `forget` may delete them, some day."""
        if xids:
            listed = ", ".join(map(_bytes, xids))
            marked = f"UPDATE {self.decisions} SET done = true WHERE committed AND xid IN ({listed})"  # noqa: S608
            connection.exec_driver_sql(marked)

    def forget(self, connection: Connection, horizon_ms: int, limit: int = _BATCH) -> int:
        """Raise the floor to *horizon_ms* before the database's own time, and delete rows at or below it that are over; how many.

        In one transaction: a row must not go before the floor that keeps its key from being written again.  COMMITTED rows that
        are not `done` stay, wherever the floor is.
        """
        now_ms = connection.exec_driver_sql(
            "SELECT (extract(epoch FROM clock_timestamp()) * 1000)::bigint"
        ).scalar_one()
        floor = _bytes(max(0, now_ms - horizon_ms).to_bytes(6, "big") + bytes(10))
        with _transaction(connection):
            connection.exec_driver_sql(f"UPDATE {self.table} SET floor = greatest(floor, {floor})")  # noqa: S608
            over = (
                f"SELECT xid FROM {self.decisions} WHERE xid <= (SELECT floor FROM {self.table}) "  # noqa: S608
                f"AND (done OR NOT committed) LIMIT {int(limit)}"
            )
            return connection.exec_driver_sql(f"DELETE FROM {self.decisions} WHERE xid IN ({over})").rowcount  # noqa: S608

    def _row(self, connection: Connection, xid: Xid) -> Row | None:
        row = _one(connection, f"SELECT committed, branches FROM {self.decisions} WHERE xid = {_bytes(xid)}")  # noqa: S608
        if row is None:
            return None
        return Row(Found.COMMITTED, bytes(row[1])) if row[0] else Row(Found.ABORTED)

    def _floor(self, connection: Connection, current: str = "") -> bytes | None:
        """Return the floor, or None if this is not the register that was opened; what commits now does so durably."""
        row = _one(connection, f"SELECT id, floor, {_INCARNATION}, {_DURABLY} FROM {self.table}{current}")  # noqa: S608
        if row is None or register_id(row[0], row[2]) != self.id:
            return None
        return bytes(row[1])

    def _misfit(self, connection: Connection) -> Found | None:
        row = _one(connection, f"SELECT id, {_INCARNATION} FROM {self.table}")  # noqa: S608
        if row is None or bytes(row[0]) != self.id.table:
            return Found.ELSEWHERE
        return None if register_id(*row) == self.id else Found.LOST


def open_register(connection: Connection, resource: str) -> PostgresqlRegister:
    """Return the register of this database, on a connection in AUTOCOMMIT; it is made if it is not there.

    Raises `ConfigurationError` if it cannot be made, or not be written.
    """
    try:
        decisions, table = make_tables(connection, [_DECISIONS, _REGISTER], _MADE)
        connection.exec_driver_sql(
            f"INSERT INTO {table} (id, floor) "  # noqa: S608
            f"VALUES ({_bytes(os.urandom(16))}, {_bytes(bytes(16))}) ON CONFLICT DO NOTHING"
        )
        id_, incarnation = connection.exec_driver_sql(f"SELECT id, {_INCARNATION} FROM {table}").one()  # noqa: S608
        may = connection.exec_driver_sql(
            f"SELECT has_table_privilege('{decisions}', 'DELETE') AND has_table_privilege('{decisions}', 'UPDATE') "
            f"AND has_table_privilege('{table}', 'UPDATE')"
        ).scalar()
    except DBAPIError as error:
        raise ConfigurationError(_needs(resource, f"that cannot be had (SQLSTATE {sqlstate(error)})")) from error
    if not may:
        raise ConfigurationError(_needs(resource, "this role may not write them"))
    return PostgresqlRegister(register_id(id_, incarnation), decisions, table)


def _needs(resource: str, trouble: str) -> str:
    return (
        f"resource {resource!r} is to decide transactions, which needs the tables {_DECISIONS} and {_REGISTER}, and {trouble}: let "
        f"their owner run {_MADE}; then GRANT SELECT, INSERT, UPDATE, DELETE on both to the roles that write, and EXECUTE "
        "ON FUNCTION pg_control_system()"
    )


@dataclass(slots=True)
class _Own:
    undone: bool = False


@contextlib.contextmanager
def _transaction(connection: Connection) -> Iterator[_Own]:
    """A transaction of its own, whatever isolation level the database prefers: each statement must see the latest."""
    connection.exec_driver_sql("BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE")
    try:
        yield (own := _Own())
        connection.exec_driver_sql("ROLLBACK" if own.undone else "COMMIT")
    except BaseException:
        try:
            connection.exec_driver_sql("ROLLBACK")
        except DBAPIError:
            connection.invalidate()
        raise


def _one(connection: Connection, query: str) -> Any:
    return connection.exec_driver_sql(query).one_or_none()


def _bytes(value: bytes) -> str:
    return f"'\\x{value.hex()}'::bytea"
