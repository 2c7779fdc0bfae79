"""How a batch of decisions is written into each database: the fence, the log's position, and the rows, all or none.

PostgreSQL takes it as one statement that commits by itself, SQLite through the driver alone, MySQL in a transaction of several
statements.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import bindparam, select, text, update
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from txrpc._decision_log.schema import decisions, nodes
from txrpc._decision_log.upserts import counts_new_rows, insert_new
from txrpc._replication import watch_replication
from txrpc.errors import Fenced
from txrpc.ids import Epoch

__all__ = ["Attempt", "Fence", "Recorder"]

# Built once: what every decision waits for is not built anew for each.
_FENCE = select(nodes.c.epoch, nodes.c.position).where(nodes.c.node == bindparam("b_node")).with_for_update()
_ADVANCE = update(nodes).where(nodes.c.node == bindparam("b_node")).values(position=bindparam("b_position"))

_AT_ONCE: Final = text(
    f"WITH fence AS (UPDATE {nodes.name} SET position = position + :count WHERE node = :node AND epoch = :epoch "  # noqa: S608
    f"RETURNING node, position), written AS (INSERT INTO {decisions.name} AS held (node, xid, epoch, decided_ms, branches) "
    "SELECT fence.node, decode(r.xid, 'hex'), r.epoch, r.decided_ms, decode(r.branches, 'hex') FROM fence, "
    "json_to_recordset(CAST(:rows AS json)) AS r(xid text, epoch bigint, decided_ms bigint, branches text) "
    "ON CONFLICT (node, xid) DO UPDATE SET branches = CASE WHEN (held.epoch, held.decided_ms, held.branches) = "
    "(excluded.epoch, excluded.decided_ms, excluded.branches) THEN held.branches END) SELECT position FROM fence"
)
"""PostgreSQL's: fence, position and decisions in one statement, whose text is the same for any number of rows and any driver.

While a later epoch holds the node's row it waits, and then sees that epoch and does nothing.  A row that is there stays as it is;
if it is another decision, its branches would become null, which the table refuses, and all is undone.
"""

_FILE_FENCE: Final = f"SELECT epoch, position FROM {nodes.name} WHERE node = ?"  # noqa: S608
_FILE_ADVANCE: Final = f"UPDATE {nodes.name} SET position = ? WHERE node = ?"  # noqa: S608
_FILE_RECORD: Final = (
    f"INSERT INTO {decisions.name} (node, xid, epoch, decided_ms, branches) "  # noqa: S608
    "VALUES (:node, :xid, :epoch, :decided_ms, :branches) ON CONFLICT DO NOTHING"
)
"""SQLite's."""


@dataclass(slots=True)
class Attempt:
    """One try to record a batch."""

    sent: bool = False
    """Whether what commits was sent: from then on an error may leave the end unknown."""


class Fence:
    """The node's row, which says in which epoch the log is."""

    def __init__(self, location: str) -> None:
        self._location = location
        self.node = ""
        self.epoch = Epoch(0)
        """Of the coordinator that has opened the log here."""

    def lock(self, connection: Connection) -> int:
        """Lock the node's row for the rest of the transaction and compare its epoch (SQLite has locked the whole file).

        Returns the log's position.
        """
        row = connection.execute(_FENCE, {"b_node": self.node}).one_or_none()
        if row is None or row.epoch != self.epoch:
            raise self.over(row.epoch if row else None)
        position: int = row.position
        return position

    def over(self, later: int | None) -> Fenced:
        """Return what to raise: *later* has opened the log."""
        told = "none" if later is None else Epoch(later)
        return Fenced(f"epoch {self.epoch} of node {self.node!r} is over: {told} has opened the log {self._location}")


class Recorder:
    """Writes batches of decisions.  Used by one thread at a time."""

    def __init__(self, engine: Engine, fence: Fence, location: str) -> None:
        self._engine = engine
        self._committing = engine.execution_options(isolation_level="AUTOCOMMIT")
        """The same connections; each statement commits by itself."""
        self._fence = fence
        self._location = location
        self._backend = engine.url.get_backend_name()
        self._insert = insert_new(self._backend, decisions)

    def record(self, rows: Sequence[dict[str, Any]], attempt: Attempt) -> int:
        """Record *rows*, and return the log's position; raises `Fenced`, or what the database or its driver does."""
        how = {"postgresql": self._at_once, "sqlite": self._in_file}.get(self._backend, self._in_steps)
        return how(rows, attempt)

    def _at_once(self, rows: Sequence[dict[str, Any]], attempt: Attempt) -> int:
        """Record *rows* in PostgreSQL and return the log's position, with one statement, which commits by itself."""
        told = [{**row, "xid": row["xid"].hex(), "branches": row["branches"].hex()} for row in rows]
        values = {
            "node": self._fence.node,
            "epoch": int(self._fence.epoch),
            "count": len(rows),
            "rows": json.dumps(told),
        }
        with self._committing.connect() as connection:
            attempt.sent = True
            with watch_replication(connection.connection.driver_connection) as cancelled:
                try:
                    position: int | None = connection.scalar(_AT_ONCE, values)
                except IntegrityError:
                    self._check_same(connection, rows)
                    raise
            if cancelled:
                raise SQLAlchemyError(cancelled[0])
            if position is None:
                raise self._fence.over(connection.scalar(_FENCE, {"b_node": self._fence.node}))
        return position

    def _in_file(self, rows: Sequence[dict[str, Any]], attempt: Attempt) -> int:
        """Record *rows* in a SQLite file and return the log's position."""
        with contextlib.closing(self._engine.raw_connection()) as pooled:  # which rolls back what is open on it
            file: Any = pooled.driver_connection
            file.execute("BEGIN IMMEDIATE")
            epoch, position = file.execute(_FILE_FENCE, (self._fence.node,)).fetchone() or (None, 0)
            if epoch != self._fence.epoch:
                raise self._fence.over(epoch)
            file.execute(_FILE_ADVANCE, (position + len(rows), self._fence.node))
            if file.executemany(_FILE_RECORD, rows).rowcount == len(rows):
                attempt.sent = True
                file.execute("COMMIT")
                return int(position) + len(rows)
        return self._in_steps(rows, attempt)  # some were there

    def _in_steps(self, rows: Sequence[dict[str, Any]], attempt: Attempt) -> int:
        """Record *rows* and return the log's position, in a transaction of several statements."""
        with self._engine.connect() as connection:
            position = self._fence.lock(connection) + len(rows)
            # Also without a decision: whether the log works shows in a write only.
            connection.execute(_ADVANCE, {"b_node": self._fence.node, "b_position": position})
            if rows:
                written = connection.execute(self._insert, rows).rowcount
                if written != len(rows) or not counts_new_rows(self._backend):
                    self._check_same(connection, rows)  # some were there, or nothing has counted
            attempt.sent = True
            connection.commit()
        return position

    def _check_same(self, connection: Connection, rows: Sequence[dict[str, Any]]) -> None:
        """A decision never changes: what is there under these xids is what was to be written."""
        wanted = {row["xid"]: (row["epoch"], row["decided_ms"], row["branches"]) for row in rows}
        columns = (decisions.c.xid, decisions.c.epoch, decisions.c.decided_ms, decisions.c.branches)
        query = select(*columns).where(decisions.c.node == self._fence.node, decisions.c.xid.in_(list(wanted)))
        held = {bytes(xid): (epoch, at_ms, bytes(packed)) for xid, epoch, at_ms, packed in connection.execute(query)}
        if held != wanted:
            differing = sorted(xid.hex() for xid in wanted if held.get(xid) != wanted[xid])
            raise AssertionError(f"the log {self._location} holds other decisions about {', '.join(differing)}")
