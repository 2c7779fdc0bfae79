"""The register in MySQL or MariaDB: see `txrpc.sql.register` for what it is.

Who reads after a wait for the key does so with a lock: a snapshot that is older than the wait would not show the latest.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

from sqlalchemy.engine import Connection
from sqlalchemy.exc import DBAPIError

from txrpc._protocol.outcomes import Found
from txrpc.errors import ResourceUnavailable
from txrpc.ids import RegisterId, Xid
from txrpc.sql.mysql_errors import DUPLICATE, code_of, is_locked
from txrpc.sql.mysql_preflight import DECISIONS, REGISTER, is_durable, one
from txrpc.sql.register import Row, Verdict, register_id, written

__all__ = ["MysqlRegister", "open_register"]

_BATCH: Final = 1_000
_CLAIM_S: Final = 3
"""How long a claim waits for a branch that is deciding."""
_LATEST: Final = " LOCK IN SHARE MODE"


@dataclass(frozen=True, slots=True)
class MysqlRegister:
    """See `Register`."""

    id: RegisterId

    def decide(self, connection: Connection, xid: Xid, branches: bytes, pid: int) -> Verdict:
        """See `Register.decide`.  Refuses as well where a crash could undo the COMMIT."""
        statement = (
            f"INSERT INTO {DECISIONS} (xid, committed, branches, done) "  # noqa: S608 - hexadecimal literals
            f"SELECT X'{xid.hex()}', TRUE, X'{branches.hex()}', {'FALSE' if branches else 'TRUE'} "
            f"FROM DUAL WHERE CONNECTION_ID() = {int(pid)}"
        )
        try:
            if connection.exec_driver_sql(statement).rowcount != 1:
                return Verdict.TAKEN  # the connection was moved: only a claim says what is true
        except DBAPIError as error:
            if code_of(error) == DUPLICATE:
                return Verdict.TAKEN
            raise
        misfit, floor = self._look(connection, _LATEST)
        is_fit = misfit is None and xid > floor and is_durable(connection)
        return Verdict.DECIDED if is_fit else Verdict.REFUSED

    def claim(self, connection: Connection, xid: Xid, commit: bytes | None = None) -> Row:
        """See `Register.ask`.  Waits for a branch that is deciding, for some seconds, and then raises `ResourceUnavailable`."""
        misfit, _floor = self._look(connection)
        if misfit is not None:
            return (self._row(connection, xid) if misfit is Found.LOST else None) or Row(misfit)
        connection.exec_driver_sql(f"SET SESSION innodb_lock_wait_timeout = {_CLAIM_S}")
        ended = "FALSE, X'', FALSE" if commit is None else f"TRUE, X'{commit.hex()}', {'FALSE' if commit else 'TRUE'}"
        insert = f"INSERT INTO {DECISIONS} VALUES (X'{xid.hex()}', {ended})"  # noqa: S608
        with _transaction(connection, f"{xid} is being decided at this moment") as own:
            try:
                connection.exec_driver_sql(insert)
            except DBAPIError as error:
                if code_of(error) != DUPLICATE:
                    raise
                row = self._row(connection, xid)
                if row is None:
                    raise ResourceUnavailable(f"the decision about {xid} was deleted at this moment") from error
                return row
            # Only now: while this waited for the key the floor may have passed.
            misfit, floor = self._look(connection, _LATEST)
            own.undone = misfit is not None or xid <= floor
            if commit is not None and not is_durable(connection):
                raise ResourceUnavailable(f"a crash of the server could undo the decision about {xid}")
            return Row(Found.FORGOTTEN) if own.undone else written(commit)

    def ask(
        self, connection: Connection, register: RegisterId, xid: Xid, claim: bool, commit: bytes | None = None
    ) -> Row:
        """See `Register.ask`."""
        as_it_was = replace(self, id=register)
        return as_it_was.claim(connection, xid, commit) if claim else as_it_was.read(connection, xid)

    def read(self, connection: Connection, xid: Xid) -> Row:
        """Return what is known of *xid*, and change nothing."""
        misfit, _floor = self._look(connection)
        if misfit is Found.ELSEWHERE:
            return Row(misfit)
        return self._row(connection, xid, "") or Row(misfit or Found.OPEN)

    def undone(
        self, connection: Connection, after: Xid | None = None, limit: int = _BATCH
    ) -> Sequence[tuple[Xid, bytes]]:
        """See `Register.undone`; in the order of their identifiers, those behind *after*."""
        behind = f"AND xid > X'{after.hex()}' " if after is not None else ""
        rows = connection.exec_driver_sql(
            f"SELECT xid, branches FROM {DECISIONS} "  # noqa: S608
            f"WHERE committed AND NOT done {behind}ORDER BY xid LIMIT {int(limit)}"
        )
        return [(Xid(bytes(xid)), bytes(branches)) for xid, branches in rows]

    def done(self, connection: Connection, xids: Collection[Xid]) -> None:
        """See `Register.done`."""
        if xids:
            listed = ", ".join(f"X'{xid.hex()}'" for xid in xids)
            connection.exec_driver_sql(f"UPDATE {DECISIONS} SET done = TRUE WHERE committed AND xid IN ({listed})")  # noqa: S608

    def forget(self, connection: Connection, horizon_ms: int, limit: int = _BATCH) -> int:
        """See `Register.forget`."""
        now_ms = int(one(connection, "SELECT CAST(UNIX_TIMESTAMP(NOW(3)) * 1000 AS UNSIGNED)")[0])
        floor = (max(0, now_ms - horizon_ms).to_bytes(6, "big") + bytes(10)).hex()
        with _transaction(connection, "decisions are being written at this moment"):
            connection.exec_driver_sql(f"UPDATE {REGISTER} SET floor = GREATEST(floor, X'{floor}')")  # noqa: S608
            latest = bytes(one(connection, f"SELECT floor FROM {REGISTER}{_LATEST}")[0]).hex()  # noqa: S608
            over = f"xid <= X'{latest}' AND (done OR NOT committed)"
            return connection.exec_driver_sql(f"DELETE FROM {DECISIONS} WHERE {over} LIMIT {int(limit)}").rowcount  # noqa: S608

    def _row(self, connection: Connection, xid: Xid, lock: str = _LATEST) -> Row | None:
        row = one(connection, f"SELECT committed, branches FROM {DECISIONS} WHERE xid = X'{xid.hex()}'{lock}")  # noqa: S608
        if row is None:
            return None
        return Row(Found.COMMITTED, bytes(row[1])) if row[0] else Row(Found.ABORTED)

    def _look(self, connection: Connection, lock: str = "") -> tuple[Found | None, bytes]:
        """Return what this is if it is not the register that was opened, else None; and the floor."""
        row = one(connection, f"SELECT id, floor, {_incarnation(connection)} FROM {REGISTER}{lock}")  # noqa: S608
        if row is None or bytes(row[0]) != self.id.table:
            return Found.ELSEWHERE, b""
        return (None if register_id(row[0], str(row[2])) == self.id else Found.LOST), bytes(row[1])


def _incarnation(connection: Connection) -> str:
    """Which server this is, in SQL: one that takes another's place may lack what that had committed.

    MariaDB has no identity of its own; in replication each server has another ``server_id``.
    """
    return "@@server_id" if getattr(connection.dialect, "is_mariadb", False) else "@@server_uuid"


def open_register(connection: Connection, resource: str) -> MysqlRegister:
    """Return the register of this database, on a connection in AUTOCOMMIT; raises `ResourceUnavailable` if it has gone."""
    row = one(connection, f"SELECT id, {_incarnation(connection)} FROM {REGISTER}")  # noqa: S608
    if row is None:
        raise ResourceUnavailable(f"the register of resource {resource!r} was deleted: start the program again")
    return MysqlRegister(register_id(row[0], str(row[1])))


@dataclass(slots=True)
class _Own:
    undone: bool = False


@contextlib.contextmanager
def _transaction(connection: Connection, busy: str) -> Iterator[_Own]:
    """A transaction of its own, on a connection in AUTOCOMMIT; raises `ResourceUnavailable`, *busy*, if another is in the way."""
    connection.exec_driver_sql("START TRANSACTION")
    try:
        yield (own := _Own())
        connection.exec_driver_sql("ROLLBACK" if own.undone else "COMMIT")
    except BaseException as error:
        try:
            connection.exec_driver_sql("ROLLBACK")
        except DBAPIError:
            connection.invalidate()
        if isinstance(error, DBAPIError) and is_locked(error):
            raise ResourceUnavailable(busy) from error
        raise
