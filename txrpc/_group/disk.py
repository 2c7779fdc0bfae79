"""An acceptor's disk: a SQLite file with what `txrpc._protocol.quorum.acceptor.Disk` says must survive, for the logs of all nodes.

    acceptor   one row: the version of these tables, whose disk it is, how far the founding of its group has come, and how
               often logs were written, by which a disk that comes back from a backup is known; and the group's members
    heard      one row another member: how often its disk had been written, as it has said
    log        one row a log: promise, incarnation, view, the slot of the base and the small parts of its state
    accepted   one row a slot behind the base: the command, and the epoch that it was accepted in
    decision   one row a decision of the base

SQLite runs in WAL mode with ``synchronous=FULL``: what `save` has written is on the disk when it returns.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from txrpc._protocol.quorum.acceptor import Disk, Slot
from txrpc._protocol.quorum.commands import Command, Forget, LogState, Record
from txrpc._protocol.quorum.views import View
from txrpc._wire.commands import (
    command_from,
    command_to,
    decision_from,
    decision_to,
    snapshot_from,
    snapshot_to,
    view_from,
    view_to,
)
from txrpc._wire.v1 import peer_pb2
from txrpc.errors import BadMessage, ConfigurationError
from txrpc.ids import Epoch, Xid

__all__ = ["EMPTY", "FOUNDING", "MEMBER", "DiskFile", "Stage", "Standing"]

VERSION: Final = 1

_TABLES = """
CREATE TABLE IF NOT EXISTS acceptor (
    id INTEGER PRIMARY KEY CHECK (id = 1), version INTEGER NOT NULL, name TEXT NOT NULL, stage INTEGER NOT NULL,
    group_id INTEGER NOT NULL, incarnation INTEGER NOT NULL, saves INTEGER NOT NULL, view BLOB
);
CREATE TABLE IF NOT EXISTS heard (
    node TEXT PRIMARY KEY, incarnation INTEGER NOT NULL, saves INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS log (
    log TEXT PRIMARY KEY, promised INTEGER NOT NULL, incarnation INTEGER NOT NULL, votes INTEGER NOT NULL,
    slot INTEGER NOT NULL, position INTEGER NOT NULL, view INTEGER NOT NULL, state BLOB NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS accepted (
    log TEXT NOT NULL, slot INTEGER NOT NULL, epoch INTEGER NOT NULL, command BLOB NOT NULL, PRIMARY KEY (log, slot)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS decision (
    log TEXT NOT NULL, xid BLOB NOT NULL, place INTEGER NOT NULL, decision BLOB NOT NULL, done_ms INTEGER NOT NULL,
    PRIMARY KEY (log, xid)
) WITHOUT ROWID;
"""

Stage = peer_pb2.DiskStage
EMPTY, FOUNDING, MEMBER = Stage.DISK_STAGE_EMPTY, Stage.DISK_STAGE_FOUNDING, Stage.DISK_STAGE_MEMBER


@dataclass(frozen=True, slots=True)
class Standing:
    """How far a disk has come in its group's life."""

    stage: Stage.ValueType = EMPTY
    group_id: int = 0
    """Of the group that it belongs to, or is about to."""
    incarnation: int = 1
    """Of this disk; the first, if it was there when the group began, and may then vote without being admitted."""


class DiskFile:
    """See the module's docstring.  Used by one thread at a time, which need not be always the same."""

    def __init__(self, path: str, name: str) -> None:
        """Open or create the file *path* as the disk of the acceptor *name*; raises `ConfigurationError`."""
        self.path = path
        self.name = name
        self.saves = 0
        """How often logs were written."""
        self.view: View | None = None
        """The members of the group, as far as it was heard of a change."""
        try:
            self._connection = sqlite3.connect(path, timeout=5.0, isolation_level=None, check_same_thread=False)
        except sqlite3.Error as error:
            raise ConfigurationError(f"cannot open the disk file {path}: {error}") from None
        try:
            self.standing = self._open()
        except sqlite3.Error as error:
            self.close()
            raise ConfigurationError(f"cannot open the disk file {path}: {error}") from None
        except BaseException:
            self.close()
            raise

    def _open(self) -> Standing:
        run = self._connection.execute
        run("PRAGMA journal_mode=WAL").close()
        run("PRAGMA synchronous=FULL").close()
        # One process: another one with the same file would answer for the same acceptor.
        run("PRAGMA locking_mode=EXCLUSIVE").close()
        run("BEGIN IMMEDIATE").close()
        if run("SELECT 1 FROM sqlite_master WHERE name = 'txrpc_decision'").fetchone():
            run("ROLLBACK").close()
            raise ConfigurationError(f"{self.path} is the decision log of a single coordinator: name another file")
        for statement in _TABLES.split(";\n"):
            run(statement).close()
        row = run("SELECT version, name, stage, group_id, incarnation, saves, view FROM acceptor").fetchone()
        if row is None:
            run("INSERT INTO acceptor VALUES (1, ?, ?, ?, 0, 1, 0, NULL)", (VERSION, self.name, EMPTY)).close()
            row = (VERSION, self.name, EMPTY, 0, 1, 0, None)
        run("COMMIT").close()
        version, name, stage, group_id, incarnation, self.saves, view = row
        if version > VERSION:
            raise ConfigurationError(
                f"the disk file {self.path} has version {version}, and this txrpc knows versions up to {VERSION}: "
                "upgrade this coordinator"
            )
        if name != self.name:
            raise ConfigurationError(f"the disk file {self.path} is that of node {name!r}, not of {self.name!r}")
        try:
            self.view = view_from(peer_pb2.GroupView.FromString(view)) if view else None
        except (BadMessage, ValueError) as error:
            raise ConfigurationError(self._damaged(error)) from None
        return Standing(stage, group_id, incarnation)

    def keep_view(self, view: View) -> None:
        """Write who the members are; raises `sqlite3.Error`."""
        self._connection.execute("UPDATE acceptor SET view = ?", (view_to(view).SerializeToString(),)).close()
        self.view = view

    def _damaged(self, error: Exception) -> str:
        return f"the disk file {self.path} is damaged: {error}; move it away, and this node is given a new one by its peers"

    def stand(self, standing: Standing) -> None:
        """Write how far this disk has come; raises `sqlite3.Error`."""
        change = "UPDATE acceptor SET stage = ?, group_id = ?, incarnation = ?"
        self._connection.execute(change, (standing.stage, standing.group_id, standing.incarnation)).close()
        self.standing = standing

    def load(self) -> dict[str, Disk]:
        """Return all logs; raises `ConfigurationError` if the file is damaged."""
        try:
            query = "SELECT log, promised, incarnation, votes, slot, position, view, state FROM log"
            rows = self._connection.execute(query).fetchall()
            return {row[0]: self._disk(*row) for row in rows}
        except (sqlite3.Error, BadMessage, ValueError) as error:
            raise ConfigurationError(self._damaged(error)) from None

    def _disk(
        self, log: str, promised: int, incarnation: int, votes: int, slot: int, position: int, view: int, state: bytes
    ) -> Disk:
        base = snapshot_from(peer_pb2.LogSnapshot.FromString(state))
        base.slot, base.position = slot, position
        query = "SELECT decision, done_ms FROM decision WHERE log = ? ORDER BY place"
        for data, done_ms in self._connection.execute(query, (log,)):
            decision = decision_from(peer_pb2.LogDecision.FromString(data))
            base.decisions[decision.xid] = decision
            if done_ms:
                base.done_ms[decision.xid] = done_ms
        query = "SELECT slot, epoch, command FROM accepted WHERE log = ? ORDER BY slot"
        slots = {
            number: Slot(Epoch(epoch), command_from(peer_pb2.LogCommand.FromString(data)))
            for number, epoch, data in self._connection.execute(query, (log,))
        }
        return Disk(self.name, incarnation, bool(votes), Epoch(promised), view, base, slots)

    def heard(self) -> dict[str, tuple[int, int]]:
        """Return of each other member the incarnation of its disk, and how often it had been written."""
        rows = self._connection.execute("SELECT node, incarnation, saves FROM heard")
        return {node: (incarnation, saves) for node, incarnation, saves in rows}

    def remember(self, heard: Mapping[str, tuple[int, int]]) -> None:
        """Write what `heard` returns after the next start; raises `sqlite3.Error`."""
        rows = [(node, *said) for node, said in heard.items()]
        self._connection.executemany("INSERT OR REPLACE INTO heard VALUES (?, ?, ?)", rows).close()

    def save(self, disks: Iterable[tuple[str, Disk]], standing: Standing | None = None) -> None:
        """Write what has changed in these logs, and how the disk stands, in one transaction and with one sync.

        Raises `sqlite3.Error`; what the disks hold in memory is then ahead of the file, and must be loaded from it again.
        """
        run = self._connection.execute
        run("BEGIN IMMEDIATE").close()
        try:
            for log, disk in disks:
                self._save(log, disk)
            if standing is not None:
                self.stand(standing)
            run("UPDATE acceptor SET saves = saves + 1").close()
            run("COMMIT").close()
        except BaseException:
            if self._connection.in_transaction:
                run("ROLLBACK").close()
            raise
        self.saves += 1

    def _save(self, log: str, disk: Disk) -> None:
        many, unsaved, base = self._connection.executemany, disk.unsaved, disk.base
        if unsaved.installed:
            self._connection.execute("DELETE FROM decision WHERE log = ?", (log,)).close()
            many(_NEW_DECISION, _rows(log, base, base.decisions)).close()
        else:
            self._fold(log, base, unsaved.folded)
        written = set(disk.slots if unsaved.installed else unsaved.accepted)
        gone = "DELETE FROM accepted WHERE log = ? AND (slot <= ? OR ?)"
        self._connection.execute(gone, (log, base.slot, unsaved.installed)).close()
        slots = [(number, slot) for number, slot in disk.slots.items() if number in written]
        rows = [(log, number, slot.epoch, command_to(slot.command).SerializeToString()) for number, slot in slots]
        many("INSERT OR REPLACE INTO accepted VALUES (?, ?, ?, ?)", rows).close()
        small = any(not isinstance(command, Record) for command in unsaved.folded) or unsaved.installed
        fixed = (disk.promised, disk.incarnation, disk.votes, base.slot, base.position, disk.view)
        if small or not self._knows(log):
            state = snapshot_to(base, with_decisions=False).SerializeToString()
            row = (log, *fixed, state)
            self._connection.execute("INSERT OR REPLACE INTO log VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row).close()
        else:
            change = "UPDATE log SET promised = ?, incarnation = ?, votes = ?, slot = ?, position = ?, view = ? WHERE log = ?"
            self._connection.execute(change, (*fixed, log)).close()
        unsaved.accepted.clear()
        unsaved.folded.clear()
        unsaved.installed = False

    def _knows(self, log: str) -> bool:
        return self._connection.execute("SELECT 1 FROM log WHERE log = ?", (log,)).fetchone() is not None

    def _fold(self, log: str, base: LogState, folded: Iterable[Command]) -> None:
        many = self._connection.executemany
        for command in folded:
            if isinstance(command, Record):
                # What is forgotten by now is not in the base any more.
                here = [each.xid for each in command.decisions if each.xid in base.decisions]
                many(_NEW_DECISION, _rows(log, base, here)).close()
                done = [(base.done_ms[xid], log, xid) for xid in command.done if xid in base.done_ms]
                many("UPDATE decision SET done_ms = ? WHERE log = ? AND xid = ?", done).close()
            elif isinstance(command, Forget):
                gone = [(log, xid) for xid in command.xids]
                many("DELETE FROM decision WHERE log = ? AND xid = ?", gone).close()

    def close(self) -> None:
        """Idempotent."""
        self._connection.close()


_NEW_DECISION = "INSERT OR IGNORE INTO decision VALUES (?, ?, ?, ?, ?)"


def _rows(log: str, base: LogState, xids: Collection[Xid]) -> list[tuple[Any, ...]]:
    """Rows of decisions, in the order in which they came."""
    return [
        (
            log,
            xid,
            base.position + place,
            decision_to(base.decisions[xid]).SerializeToString(),
            base.done_ms.get(xid, 0),
        )
        for place, xid in enumerate(xids)
    ]
