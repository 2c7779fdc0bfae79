"""The decision log in a SQL database, through SQLAlchemy: a SQLite file, PostgreSQL, MySQL or MariaDB.

How to think of it
    Every write is one transaction that first locks the node's row and compares its epoch with our own: that is the fence.
    A later `open` raises the epoch under the same lock, so whatever an earlier coordinator writes after that fails.

    An error *before* COMMIT was sent means that the batch is not recorded.  An error *at* COMMIT leaves the end unknown; then the
    caller repeats the batch, which is harmless because a decision is written once and never changes.

    On PostgreSQL a batch is one statement that commits by itself, fence and all: every transaction waits for its decision, and
    each round trip to the log's database would be one more to wait for.  On SQLite it is written through the driver alone, in half
    the time.

    The end stays unknown until a repeat succeeds: a repeat that fails *before* COMMIT says nothing about the first try.

What the connections are set to, so that a commit is on the disk when it returns and nothing waits for ever, is in
`txrpc._decision_log.database`.  One connection is used, by one thread at a time.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import bindparam, delete, func, insert, select, text, update
from sqlalchemy.engine import Connection, Row
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from txrpc._decision_log.database import (
    checked_url,
    make_engine,
    sentence,
    shown,
    warn_if_careless,
    was_made_meanwhile,
    was_refused,
)
from txrpc._decision_log.port import Decision, LogError, NotRecorded, Opened, RecordUncertain
from txrpc._decision_log.schema import decisions, epochs, incidents, nodes, pack, prepare_schema, resources, unpack
from txrpc._decision_log.upserts import counts_new_rows, insert_new, upsert
from txrpc._protocol.messages import FinishResult
from txrpc._protocol.records import Incident, lineage
from txrpc._replication import watch_replication
from txrpc.errors import ConfigurationError, Fenced
from txrpc.ids import NODE_MAX, BranchId, Epoch, Xid, check_name

__all__ = ["SqlLog"]

_CREATE_ATTEMPTS = 5

# Built once: what every decision waits for is not built anew for each.
_FENCE = select(nodes.c.epoch, nodes.c.position).where(nodes.c.node == bindparam("b_node")).with_for_update()
_MARK_DONE = update(decisions).where(
    decisions.c.node == bindparam("b_node"), decisions.c.xid == bindparam("b_xid"), decisions.c.done_ms.is_(None)
)
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
class _Attempt:
    """One try to record a batch."""

    sent: bool = False
    """Whether what commits was sent: from then on an error may leave the end unknown."""


class SqlLog:
    """See `txrpc._decision_log.port.DecisionLog`."""

    def __init__(self, url: str) -> None:
        """Raises `ConfigurationError` if *url* is not one, or names a database or driver that there is none for."""
        parsed = checked_url(url)
        self.location: str = shown(parsed)
        self._engine = make_engine(parsed)
        self._committing = self._engine.execution_options(isolation_level="AUTOCOMMIT")
        """The same connections; each statement commits by itself."""
        self._backend = parsed.get_backend_name()
        self._record = insert_new(self._backend, decisions)
        self._node = ""
        self._epoch = Epoch(0)
        self._uncertain: set[Xid] = set()

    # ------------------------------------------------------------------------------------------------------ the port

    def open(self, node: str, nonce: int, holder: str = "", expect: Epoch | None = None) -> Opened:
        """See `DecisionLog.open`."""
        self._node = check_name("node", node, NODE_MAX)
        self._uncertain.clear()
        for attempt in range(_CREATE_ATTEMPTS):
            try:
                with self._write() as connection:
                    prepare_schema(connection, self.location)
                    return self._open(connection, nonce, holder or node, expect)
            except (SQLAlchemyError, OSError) as error:
                # Another coordinator may be creating the same tables, or the same row, at this very moment.
                if was_made_meanwhile(error) and attempt < _CREATE_ATTEMPTS - 1:
                    time.sleep(0.05)
                    continue
                self._engine.dispose()
                raise ConfigurationError(f"cannot open the decision log {self.location}: {sentence(error)}") from error
        raise AssertionError("unreachable")

    def _open(self, connection: Connection, nonce: int, holder: str, expect: Epoch | None) -> Opened:
        warn_if_careless(connection, self.location)
        row = connection.execute(select(nodes).where(nodes.c.node == self._node).with_for_update()).one_or_none()
        if expect is not None and (row is None or row.epoch != expect):
            raise Fenced(f"node {self._node!r} is not in epoch {expect} any more")
        self._epoch = Epoch.make(Epoch(row.epoch).number + 1 if row else 1, nonce)
        epoch = int(self._epoch)  # not every driver knows what to do with a number that has words of its own
        position = row.position if row else 0
        lineage = self._lineage(connection, position)
        if row is None:
            first = {"node": self._node, "epoch": epoch, "forgotten_ms": 0, "position": 0, "holder": holder}
            connection.execute(insert(nodes).values(first))
        else:
            here = nodes.c.node == self._node
            connection.execute(update(nodes).where(here).values(epoch=epoch, holder=holder))
        opened = {"opened_ms": time.time_ns() // 1_000_000, "position": position}
        connection.execute(insert(epochs).values(node=self._node, epoch=epoch, **opened))
        latest = connection.scalar(select(func.max(decisions.c.decided_ms)).where(decisions.c.node == self._node))
        forgotten_ms = row.forgotten_ms if row else 0
        clock_ms = max(forgotten_ms, latest or 0)
        identities = {name: identity for name, identity in connection.execute(select(resources)) if identity}
        pending, incidents = self._pending(connection), self._incidents(connection)
        return Opened(self._epoch, lineage, pending, forgotten_ms, clock_ms, position, incidents, identities)

    def _lineage(self, connection: Connection, position: int) -> dict[Epoch, int]:
        """Every epoch so far and the position at which the next one was opened, which is the greatest that it reached."""
        query = select(epochs.c.epoch, epochs.c.position).where(epochs.c.node == self._node)
        return lineage({Epoch(epoch): at for epoch, at in connection.execute(query)}, position)

    def record(self, batch: Sequence[Decision]) -> int:
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
        xids = {decision.xid for decision in batch}
        record = {"postgresql": self._at_once, "sqlite": self._in_file}.get(self._backend, self._in_steps)
        attempt = _Attempt()
        try:
            position = record(rows, attempt)
        except (SQLAlchemyError, sqlite3.Error, OSError) as error:
            if attempt.sent and not was_refused(error):
                self._uncertain |= xids
                raise RecordUncertain(f"no answer to COMMIT from {self.location}: {sentence(error)}") from error
            if not self._uncertain.isdisjoint(xids):
                raise RecordUncertain(f"no answer to COMMIT yet from {self.location}: {sentence(error)}") from error
            raise NotRecorded(f"cannot write to {self.location}: {sentence(error)}") from error
        self._uncertain -= xids
        return position

    def _at_once(self, rows: Sequence[dict[str, Any]], attempt: _Attempt) -> int:
        """Record *rows* in PostgreSQL and return the log's position; each commits with its own statement."""
        told = [{**row, "xid": row["xid"].hex(), "branches": row["branches"].hex()} for row in rows]
        values = {"node": self._node, "epoch": int(self._epoch), "count": len(rows), "rows": json.dumps(told)}
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
                raise self._fenced(connection.scalar(_FENCE, {"b_node": self._node}))
        return position

    def _in_file(self, rows: Sequence[dict[str, Any]], attempt: _Attempt) -> int:
        """Record *rows* in a SQLite file and return the log's position."""
        with contextlib.closing(self._engine.raw_connection()) as pooled:  # which rolls back what is open on it
            file: Any = pooled.driver_connection
            file.execute("BEGIN IMMEDIATE")
            epoch, position = file.execute(_FILE_FENCE, (self._node,)).fetchone() or (None, 0)
            if epoch != self._epoch:
                raise self._fenced(epoch)
            file.execute(_FILE_ADVANCE, (position + len(rows), self._node))
            if file.executemany(_FILE_RECORD, rows).rowcount == len(rows):
                attempt.sent = True
                file.execute("COMMIT")
                return int(position) + len(rows)
        return self._in_steps(rows, attempt)  # some were there

    def _in_steps(self, rows: Sequence[dict[str, Any]], attempt: _Attempt) -> int:
        """Record *rows* and return the log's position, in a transaction of several statements."""
        with self._engine.connect() as connection:
            position = self._fence(connection) + len(rows)
            # Also without a decision: whether the log works shows in a write only.
            connection.execute(_ADVANCE, {"b_node": self._node, "b_position": position})
            if rows:
                written = connection.execute(self._record, rows).rowcount
                if written != len(rows) or not counts_new_rows(self._backend):
                    self._check_same(connection, rows)  # some were there, or nothing has counted
            attempt.sent = True
            connection.commit()
        return position

    def done(self, xids: Iterable[Xid], now_ms: int) -> None:
        """See `DecisionLog.done`."""
        rows = [{"b_node": self._node, "b_xid": bytes(xid), "done_ms": now_ms} for xid in xids]
        if rows:
            with self._errors(), self._write() as connection:
                self._fence(connection)
                connection.execute(_MARK_DONE, rows)

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

    def overflow_ms(self) -> int:
        """See `DecisionLog.overflow_ms`: a database has room."""
        return 0

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

    def report(self, found: Sequence[Incident]) -> None:
        """See `DecisionLog.report`."""
        rows = [
            {
                "node": self._node,
                "xid": bytes(incident.xid),
                "branch": bytes(incident.branch),
                "resource": incident.resource,
                "finish": int(incident.finish),
                "at_ms": incident.at_ms,
                "closed_ms": None,
            }
            for incident in found
        ]
        if rows:
            with self._errors(), self._write() as connection:
                self._fence(connection)
                connection.execute(upsert(self._backend, incidents, ("finish", "at_ms", "closed_ms")), rows)

    def close_incidents(self, branches: Iterable[tuple[Xid, BranchId]], now_ms: int) -> None:
        """See `DecisionLog.close_incidents`."""
        mark = update(incidents).where(
            incidents.c.node == self._node,
            incidents.c.xid == bindparam("b_xid"),
            incidents.c.branch == bindparam("b_br"),
        )
        rows = [{"b_xid": bytes(xid), "b_br": bytes(branch), "closed_ms": now_ms} for xid, branch in branches]
        if rows:
            with self._errors(), self._write() as connection:
                self._fence(connection)
                connection.execute(mark, rows)

    def bind(self, first: Mapping[str, str], rebound: Mapping[str, str]) -> Mapping[str, str]:
        """See `DecisionLog.bind`."""
        free = upsert(self._backend, resources, ("identity",), where_empty="identity")
        forced = upsert(self._backend, resources, ("identity",))
        with self._errors(), self._write() as connection:
            if first or rebound:
                self._fence(connection)
            for statement, identities in ((free, first), (forced, rebound)):
                rows = [{"name": name, "identity": identity} for name, identity in identities.items()]
                if rows:
                    connection.execute(statement, rows)
            return {row.name: row.identity for row in connection.execute(select(resources))}

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
            raise LogError(f"the decision log {self.location} does not answer: {sentence(error)}") from error

    def _fence(self, connection: Connection) -> int:
        """Lock the node's row for the rest of the transaction and compare its epoch (SQLite has locked the whole file).

        Returns the log's position.
        """
        row = connection.execute(_FENCE, {"b_node": self._node}).one_or_none()
        if row is None or row.epoch != self._epoch:
            raise self._fenced(row.epoch if row else None)
        position: int = row.position
        return position

    def _fenced(self, later: int | None) -> Fenced:
        told = "none" if later is None else Epoch(later)
        return Fenced(f"epoch {self._epoch} of node {self._node!r} is over: {told} has opened the log {self.location}")

    def _check_same(self, connection: Connection, rows: Sequence[dict[str, Any]]) -> None:
        """A decision never changes: what is there under these xids is what was to be written."""
        wanted = {row["xid"]: (row["epoch"], row["decided_ms"], row["branches"]) for row in rows}
        columns = (decisions.c.xid, decisions.c.epoch, decisions.c.decided_ms, decisions.c.branches)
        query = select(*columns).where(decisions.c.node == self._node, decisions.c.xid.in_(list(wanted)))
        held = {bytes(xid): (epoch, at_ms, bytes(packed)) for xid, epoch, at_ms, packed in connection.execute(query)}
        if held != wanted:
            differing = sorted(xid.hex() for xid in wanted if held.get(xid) != wanted[xid])
            raise AssertionError(f"the log {self.location} holds other decisions about {', '.join(differing)}")

    def _pending(self, connection: Connection) -> tuple[Decision, ...]:
        query = select(decisions).where(decisions.c.node == self._node, decisions.c.done_ms.is_(None))
        return tuple(_decision(row) for row in connection.execute(query.order_by(decisions.c.decided_ms)))

    def _incidents(self, connection: Connection) -> tuple[Incident, ...]:
        query = select(incidents).where(incidents.c.node == self._node, incidents.c.closed_ms.is_(None))
        return tuple(
            Incident(
                Xid(bytes(row.xid)), BranchId(bytes(row.branch)), row.resource, FinishResult(row.finish), row.at_ms
            )
            for row in connection.execute(query.order_by(incidents.c.at_ms))
        )


def _decision(row: Row[Any]) -> Decision:
    return Decision(Xid(bytes(row.xid)), Epoch(row.epoch), row.decided_ms, unpack(bytes(row.branches)))
