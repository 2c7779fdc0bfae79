"""Heartbeats of the nodes that share a SQL decision log, in a table of that log.

A node that is alone only reads, so that nothing is written that no other one would read.  On PostgreSQL a heartbeat does not
wait for the disk, nor for a standby: what it shows is that a process lives.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import delete, select, update
from sqlalchemy.engine import Connection
from sqlalchemy.exc import SQLAlchemyError

from txrpc._decision_log.database import checked_url, make_engine, sentence, shown
from txrpc._decision_log.port import LogError
from txrpc._decision_log.schema import heartbeats, nodes
from txrpc._decision_log.upserts import upsert
from txrpc._protocol.takeover import LEFT, NodeRow
from txrpc.ids import Epoch

__all__ = ["SqlHeartbeats"]


class SqlHeartbeats:
    """See `txrpc._decision_log.port.Heartbeats`.  Its log must have been opened before."""

    def __init__(self, url: str) -> None:
        """Raises `ConfigurationError` as `SqlLog` does."""
        parsed = checked_url(url)
        self._location: str = shown(parsed)
        self._engine = make_engine(parsed)
        self._join = upsert(parsed.get_backend_name(), heartbeats, ("group_name", "beat", "started_ms"))
        self._node = self._group = ""

    def join(self, node: str, group: str, started_ms: int) -> None:
        """See `Heartbeats.join`."""
        self._node, self._group = node, group
        row = {"node": node, "group_name": group, "beat": LEFT + 1, "started_ms": started_ms}
        self._write(self._join.values(row))

    def beat(self) -> Sequence[NodeRow]:
        """See `Heartbeats.beat`."""
        columns = (nodes.c.node, nodes.c.epoch, nodes.c.holder, heartbeats.c.beat, heartbeats.c.started_ms)
        here = heartbeats.c.group_name == self._group
        query = select(*columns).join_from(heartbeats, nodes, nodes.c.node == heartbeats.c.node).where(here)
        try:
            with self._engine.begin() as connection:
                found = connection.execute(query.order_by(nodes.c.node)).all()
                if len(found) > 1:
                    _unforced(connection)
                    mine = heartbeats.c.node == self._node
                    connection.execute(update(heartbeats).where(mine).values(beat=heartbeats.c.beat + 1))
        except (SQLAlchemyError, OSError) as error:
            raise LogError(f"the decision log {self._location} does not answer: {sentence(error)}") from error
        return [
            NodeRow(node, Epoch(epoch), holder or node, beat, started_ms)
            for node, epoch, holder, beat, started_ms in found
        ]

    def leave(self) -> None:
        """See `Heartbeats.leave`."""
        self._write(update(heartbeats).where(heartbeats.c.node == self._node).values(beat=LEFT))

    def withdraw(self, node: str) -> None:
        """See `Heartbeats.withdraw`."""
        self._write(delete(heartbeats).where(heartbeats.c.node == node))

    def close(self) -> None:
        """See `Heartbeats.close`."""
        self._engine.dispose()

    def _write(self, statement: Any) -> None:
        try:
            with self._engine.begin() as connection:
                _unforced(connection)
                connection.execute(statement)
        except (SQLAlchemyError, OSError) as error:
            raise LogError(f"the decision log {self._location} does not answer: {sentence(error)}") from error


def _unforced(connection: Connection) -> None:
    if connection.dialect.name == "postgresql":
        connection.exec_driver_sql("SET LOCAL synchronous_commit = off")
