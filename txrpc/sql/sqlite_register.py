"""The register in a SQLite file: see `txrpc.sql.register` for what it is.

One connection writes at a time, and sees all that was written before: a claim waits for a branch that decides, and no floor can
pass behind its back.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final

from sqlalchemy.engine import Connection
from sqlalchemy.exc import DBAPIError

from txrpc._protocol.outcomes import Found
from txrpc.errors import ResourceUnavailable
from txrpc.ids import RegisterId, Xid
from txrpc.sql.register import Row, Verdict, register_id, written
from txrpc.sql.sqlite_file import DECISIONS, REGISTER, in_writing, incarnation, is_busy, is_durable, prove

__all__ = ["SqliteRegister", "open_register"]

_BATCH: Final = 1_000
_INSERT: Final = f"INSERT INTO {DECISIONS} VALUES (?, ?, ?, ?) ON CONFLICT DO NOTHING"  # noqa: S608
"""xid, committed, branches, done."""


@dataclass(frozen=True, slots=True)
class SqliteRegister:
    """See `Register`."""

    id: RegisterId

    def decide(self, connection: Connection, xid: Xid, branches: bytes, pid: int) -> Verdict:
        """See `Register.decide`.  Refuses as well where a power failure could undo the COMMIT."""
        del pid  # there is no server: the branch's own savepoint proves that this is its transaction
        prove(connection)
        if connection.exec_driver_sql(_INSERT, (xid, True, branches, not branches)).rowcount == 0:
            return Verdict.TAKEN
        misfit, floor = self._look(connection)
        is_fit = misfit is None and xid > floor and is_durable(connection)
        return Verdict.DECIDED if is_fit else Verdict.REFUSED

    def claim(self, connection: Connection, xid: Xid, commit: bytes | None = None) -> Row:
        """See `Register.ask`.  Raises `ResourceUnavailable` while a branch, or another program, writes."""
        with _writing(connection, f"{xid} cannot be decided"):
            misfit, floor = self._look(connection)
            if misfit is not None:
                return (self._row(connection, xid) if misfit is Found.LOST else None) or Row(misfit)
            if (row := self._row(connection, xid)) is not None:
                return row
            if xid <= floor:
                return Row(Found.FORGOTTEN)
            connection.exec_driver_sql(_INSERT, (xid, commit is not None, commit or b"", commit == b""))
            return written(commit)

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
        return self._row(connection, xid) or Row(misfit or Found.OPEN)

    def undone(
        self, connection: Connection, after: Xid | None = None, limit: int = _BATCH
    ) -> Sequence[tuple[Xid, bytes]]:
        """See `Register.undone`; in the order of their identifiers, those behind *after*."""
        rows = connection.exec_driver_sql(
            f"SELECT xid, branches FROM {DECISIONS} WHERE committed AND NOT done AND xid > ? ORDER BY xid LIMIT ?",  # noqa: S608
            (after or b"", limit),
        )
        return [(Xid(xid), branches) for xid, branches in rows]

    def done(self, connection: Connection, xids: Collection[Xid]) -> None:
        """See `Register.done`."""
        with _writing(connection, "decisions cannot be marked"):
            for xid in xids:
                connection.exec_driver_sql(
                    f"UPDATE {DECISIONS} SET done = 1 WHERE committed AND xid = ?",  # noqa: S608
                    (xid,),
                )

    def forget(self, connection: Connection, horizon_ms: int, limit: int = _BATCH) -> int:
        """See `Register.forget`."""
        floor = max(0, int(time.time() * 1000) - horizon_ms).to_bytes(6, "big") + bytes(10)
        with _writing(connection, "decisions cannot be forgotten"):
            connection.exec_driver_sql(f"UPDATE {REGISTER} SET floor = max(floor, ?)", (floor,))  # noqa: S608
            over = (
                f"SELECT xid FROM {DECISIONS} WHERE xid <= (SELECT floor FROM {REGISTER}) "  # noqa: S608
                "AND (done OR NOT committed) LIMIT ?"
            )
            return connection.exec_driver_sql(f"DELETE FROM {DECISIONS} WHERE xid IN ({over})", (limit,)).rowcount  # noqa: S608

    def _row(self, connection: Connection, xid: Xid) -> Row | None:
        query = f"SELECT committed, branches FROM {DECISIONS} WHERE xid = ?"  # noqa: S608
        row = connection.exec_driver_sql(query, (xid,)).one_or_none()
        if row is None:
            return None
        return Row(Found.COMMITTED, row[1]) if row[0] else Row(Found.ABORTED)

    def _look(self, connection: Connection) -> tuple[Found | None, bytes]:
        """Return what this is if it is not the register that was opened, else None; and the floor."""
        row: Any = _register(connection)
        if row is None or row[0] != self.id.table:
            return Found.ELSEWHERE, b""
        return (None if register_id(row[0], incarnation(connection)) == self.id else Found.LOST), row[1]


def _register(connection: Connection) -> Any:
    return connection.exec_driver_sql(f"SELECT id, floor FROM {REGISTER}").one_or_none()  # noqa: S608 - a constant


def open_register(connection: Connection, resource: str) -> SqliteRegister:
    """Return the register of this file, on a connection in AUTOCOMMIT; raises `ResourceUnavailable` if it has gone."""
    row = _register(connection)
    if row is None:
        raise ResourceUnavailable(f"the register of resource {resource!r} was deleted: start the program again")
    return SqliteRegister(register_id(row[0], incarnation(connection)))


@contextmanager
def _writing(connection: Connection, trouble: str) -> Iterator[None]:
    try:
        with in_writing(connection):
            yield
    except DBAPIError as error:
        if is_busy(error):
            raise ResourceUnavailable(f"{trouble} while another program writes") from error
        raise
