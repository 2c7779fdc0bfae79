"""The decision log in a SQL database, through SQLAlchemy: a SQLite file, PostgreSQL, MySQL or MariaDB.

How to think of it
    Every write is one transaction that first locks the node's row and compares its epoch with our own: that is the fence.
    A later `open` raises the epoch under the same lock, so whatever an earlier coordinator writes after that fails.

    An error *before* COMMIT was sent means that the batch is not recorded.  An error *at* COMMIT leaves the end unknown; then the
    caller repeats the batch, which is harmless because a decision is written once and never changes.

    Every transaction waits for its decision: how each database records a batch with the fewest round trips is in
    `txrpc._decision_log.recording`.

    The end stays unknown until a repeat succeeds: a repeat that fails *before* COMMIT says nothing about the first try.

What the connections are set to, so that a commit is on the disk when it returns and nothing waits for ever, is in
`txrpc._decision_log.database`.  One connection is used, by one thread at a time.
"""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from sqlalchemy import bindparam, delete, func, insert, select, update
from sqlalchemy.engine import Connection, Row
from sqlalchemy.exc import SQLAlchemyError

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
from txrpc._decision_log.recording import Attempt, Fence, Recorder
from txrpc._decision_log.schema import decisions, epochs, incidents, nodes, pack, prepare_schema, resources, unpack
from txrpc._decision_log.upserts import upsert
from txrpc._protocol.messages import FinishResult
from txrpc._protocol.records import Incident, lineage
from txrpc.errors import ConfigurationError, Fenced
from txrpc.ids import NODE_MAX, BranchId, Epoch, Xid, check_name

__all__ = ["SqlLog"]

_CREATE_ATTEMPTS = 5

_MARK_DONE = update(decisions).where(
    decisions.c.node == bindparam("b_node"), decisions.c.xid == bindparam("b_xid"), decisions.c.done_ms.is_(None)
)


class SqlLog:
    """See `txrpc._decision_log.port.DecisionLog`."""

    def __init__(self, url: str) -> None:
        """Raises `ConfigurationError` if *url* is not one, or names a database or driver that there is none for."""
        parsed = checked_url(url)
        self.location: str = shown(parsed)
        self._engine = make_engine(parsed)
        self._backend = parsed.get_backend_name()
        self._fence = Fence(self.location)
        self._recorder = Recorder(self._engine, self._fence, self.location)
        self._uncertain: set[Xid] = set()

    # ------------------------------------------------------------------------------------------------------ the port

    def open(self, node: str, nonce: int, holder: str = "", expect: Epoch | None = None) -> Opened:
        """See `DecisionLog.open`."""
        self._fence.node = check_name("node", node, NODE_MAX)
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
        row = connection.execute(select(nodes).where(nodes.c.node == self._fence.node).with_for_update()).one_or_none()
        if expect is not None and (row is None or row.epoch != expect):
            raise Fenced(f"node {self._fence.node!r} is not in epoch {expect} any more")
        self._fence.epoch = Epoch.make(Epoch(row.epoch).number + 1 if row else 1, nonce)
        epoch = int(self._fence.epoch)  # not every driver knows what to do with a number that has words of its own
        position = row.position if row else 0
        lineage = self._lineage(connection, position)
        if row is None:
            first = {"node": self._fence.node, "epoch": epoch, "forgotten_ms": 0, "position": 0, "holder": holder}
            connection.execute(insert(nodes).values(first))
        else:
            here = nodes.c.node == self._fence.node
            connection.execute(update(nodes).where(here).values(epoch=epoch, holder=holder))
        opened = {"opened_ms": time.time_ns() // 1_000_000, "position": position}
        connection.execute(insert(epochs).values(node=self._fence.node, epoch=epoch, **opened))
        latest = connection.scalar(select(func.max(decisions.c.decided_ms)).where(decisions.c.node == self._fence.node))
        forgotten_ms = row.forgotten_ms if row else 0
        clock_ms = max(forgotten_ms, latest or 0)
        identities = {name: identity for name, identity in connection.execute(select(resources)) if identity}
        pending, incidents = self._pending(connection), self._incidents(connection)
        return Opened(self._fence.epoch, lineage, pending, forgotten_ms, clock_ms, position, incidents, identities)

    def _lineage(self, connection: Connection, position: int) -> dict[Epoch, int]:
        """Every epoch so far and the position at which the next one was opened, which is the greatest that it reached."""
        query = select(epochs.c.epoch, epochs.c.position).where(epochs.c.node == self._fence.node)
        return lineage({Epoch(epoch): at for epoch, at in connection.execute(query)}, position)

    def record(self, batch: Sequence[Decision]) -> int:
        """See `DecisionLog.record`."""
        rows = [
            {
                "node": self._fence.node,
                "xid": bytes(decision.xid),
                "epoch": int(decision.epoch),
                "decided_ms": decision.decided_ms,
                "branches": pack(decision.branches),
            }
            for decision in batch
        ]
        xids = {decision.xid for decision in batch}
        attempt = Attempt()
        try:
            position = self._recorder.record(rows, attempt)
        except (SQLAlchemyError, sqlite3.Error, OSError) as error:
            if attempt.sent and not was_refused(error):
                self._uncertain |= xids
                raise RecordUncertain(f"no answer to COMMIT from {self.location}: {sentence(error)}") from error
            if not self._uncertain.isdisjoint(xids):
                raise RecordUncertain(f"no answer to COMMIT yet from {self.location}: {sentence(error)}") from error
            raise NotRecorded(f"cannot write to {self.location}: {sentence(error)}") from error
        self._uncertain -= xids
        return position

    def done(self, xids: Iterable[Xid], now_ms: int) -> None:
        """See `DecisionLog.done`."""
        rows = [{"b_node": self._fence.node, "b_xid": bytes(xid), "done_ms": now_ms} for xid in xids]
        if rows:
            with self._errors(), self._write() as connection:
                self._fence.lock(connection)
                connection.execute(_MARK_DONE, rows)

    def outcome(self, xid: Xid) -> Decision | None:
        """See `DecisionLog.outcome`."""
        query = select(decisions).where(decisions.c.node == self._fence.node, decisions.c.xid == bytes(xid))
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
            .where(decisions.c.node == self._fence.node, decisions.c.done_ms < done_before_ms)
            .order_by(decisions.c.done_ms)
            .limit(limit)
        )
        with self._errors(), self._write() as connection:
            self._fence.lock(connection)
            xids = connection.scalars(old).all()
            if xids:
                here = nodes.c.node == self._fence.node
                connection.execute(
                    delete(decisions).where(decisions.c.node == self._fence.node, decisions.c.xid.in_(xids))
                )
                later = (here, nodes.c.forgotten_ms < done_before_ms)
                connection.execute(update(nodes).where(*later).values(forgotten_ms=done_before_ms))
            return len(xids)

    def report(self, found: Sequence[Incident]) -> None:
        """See `DecisionLog.report`."""
        rows = [
            {
                "node": self._fence.node,
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
                self._fence.lock(connection)
                connection.execute(upsert(self._backend, incidents, ("finish", "at_ms", "closed_ms")), rows)

    def close_incidents(self, branches: Iterable[tuple[Xid, BranchId]], now_ms: int) -> None:
        """See `DecisionLog.close_incidents`."""
        mark = update(incidents).where(
            incidents.c.node == self._fence.node,
            incidents.c.xid == bindparam("b_xid"),
            incidents.c.branch == bindparam("b_br"),
        )
        rows = [{"b_xid": bytes(xid), "b_br": bytes(branch), "closed_ms": now_ms} for xid, branch in branches]
        if rows:
            with self._errors(), self._write() as connection:
                self._fence.lock(connection)
                connection.execute(mark, rows)

    def bind(self, first: Mapping[str, str], rebound: Mapping[str, str]) -> Mapping[str, str]:
        """See `DecisionLog.bind`."""
        free = upsert(self._backend, resources, ("identity",), where_empty="identity")
        forced = upsert(self._backend, resources, ("identity",))
        with self._errors(), self._write() as connection:
            if first or rebound:
                self._fence.lock(connection)
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

    def _pending(self, connection: Connection) -> tuple[Decision, ...]:
        query = select(decisions).where(decisions.c.node == self._fence.node, decisions.c.done_ms.is_(None))
        return tuple(_decision(row) for row in connection.execute(query.order_by(decisions.c.decided_ms)))

    def _incidents(self, connection: Connection) -> tuple[Incident, ...]:
        query = select(incidents).where(incidents.c.node == self._fence.node, incidents.c.closed_ms.is_(None))
        return tuple(
            Incident(
                Xid(bytes(row.xid)), BranchId(bytes(row.branch)), row.resource, FinishResult(row.finish), row.at_ms
            )
            for row in connection.execute(query.order_by(incidents.c.at_ms))
        )


def _decision(row: Row[Any]) -> Decision:
    return Decision(Xid(bytes(row.xid)), Epoch(row.epoch), row.decided_ms, unpack(bytes(row.branches)))
