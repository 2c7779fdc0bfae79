"""A decision log in memory: for tests, and as the plainest statement of what a log must do.

Several logs may share one `MemoryStore`, like several coordinators one database: then the later epoch fences the earlier.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from txrpc._decision_log.port import Decision, Opened
from txrpc._protocol.records import Incident, overflow_ms
from txrpc._protocol.takeover import LEFT, NodeRow
from txrpc.errors import Fenced
from txrpc.ids import BranchId, Epoch, Xid

__all__ = ["MemoryHeartbeats", "MemoryLog", "MemoryStore"]


@dataclass
class _Node:
    epochs: dict[Epoch, int] = field(default_factory=dict)
    """Every epoch, with the greatest position that it has reached."""
    position: int = 0
    incidents: dict[tuple[Xid, BranchId], Incident] = field(default_factory=dict)
    decisions: dict[Xid, Decision] = field(default_factory=dict)
    done_ms: dict[Xid, int] = field(default_factory=dict)
    forgotten_ms: int = 0
    holder: str = ""


class MemoryStore:
    """What outlives a `MemoryLog`."""

    def __init__(self, keeps: int = 1_000_000) -> None:
        """*keeps*: how many decisions of a node that are done are kept at most."""
        self.keeps = keeps
        self.nodes: dict[str, _Node] = {}
        self.identities: dict[str, str] = {}
        self.beats: dict[str, tuple[str, int, int]] = {}
        """Of each node: its group, its heartbeat, and since when it has been there."""
        self.lock = threading.RLock()


class MemoryHeartbeats:
    """See `txrpc._decision_log.port.Heartbeats`."""

    def __init__(self, store: MemoryStore) -> None:
        self._store = store
        self._node = self._group = ""

    def join(self, node: str, group: str, started_ms: int) -> None:
        """See `Heartbeats.join`."""
        self._node, self._group = node, group
        self._store.beats[node] = group, LEFT + 1, started_ms

    def beat(self) -> Sequence[NodeRow]:
        """See `Heartbeats.beat`."""
        with self._store.lock:
            group, beat, started_ms = self._store.beats[self._node]
            self._store.beats[self._node] = group, beat + 1, started_ms
            return [
                NodeRow(node, max(held.epochs), held.holder, beat, started_ms)
                for node, (group, beat, started_ms) in self._store.beats.items()
                if group == self._group and (held := self._store.nodes.get(node)) is not None
            ]

    def leave(self) -> None:
        """See `Heartbeats.leave`."""
        group, _beat, started_ms = self._store.beats[self._node]
        self._store.beats[self._node] = group, LEFT, started_ms

    def withdraw(self, node: str) -> None:
        """See `Heartbeats.withdraw`."""
        self._store.beats.pop(node, None)

    def close(self) -> None:
        """See `Heartbeats.close`."""


class MemoryLog:
    """See `txrpc._decision_log.port.DecisionLog`."""

    location = "memory"

    def __init__(self, store: MemoryStore | None = None) -> None:
        self._store = store or MemoryStore()
        self._node = _Node()
        self._name = ""
        self._epoch = Epoch(0)

    def open(self, node: str, nonce: int, holder: str = "", expect: Epoch | None = None) -> Opened:
        """See `DecisionLog.open`."""
        with self._store.lock:
            self._name, self._node = node, self._store.nodes.setdefault(node, _Node())
            found = self._node
            if expect is not None and expect != max(found.epochs, default=None):
                raise Fenced(f"node {node!r} is not in epoch {expect} any more")
            found.holder = holder or node
            self._epoch = Epoch.make(max(found.epochs).number + 1 if found.epochs else 1, nonce)
            lineage = dict(found.epochs)
            found.epochs[self._epoch] = found.position
            clock_ms = max([found.forgotten_ms, *(d.decided_ms for d in found.decisions.values())])
            incidents = tuple(sorted(found.incidents.values(), key=lambda incident: incident.at_ms))
            identities = {name: identity for name, identity in self._store.identities.items() if identity}
            pending = tuple(self.pending())
            return Opened(
                self._epoch, lineage, pending, found.forgotten_ms, clock_ms, found.position, incidents, identities
            )

    def record(self, decisions: Sequence[Decision]) -> int:
        """See `DecisionLog.record`."""
        with self._writing() as node:
            for decision in decisions:
                held = node.decisions.get(decision.xid, decision)
                if held != decision:
                    raise AssertionError(f"two decisions about {decision.xid}: {held} and {decision}")
            node.decisions.update({decision.xid: decision for decision in decisions})
            node.position += len(decisions)
            node.epochs[self._epoch] = node.position
            return node.position

    def done(self, xids: Iterable[Xid], now_ms: int) -> None:
        """See `DecisionLog.done`."""
        with self._writing() as node:
            for xid in xids:
                if xid in node.decisions:
                    node.done_ms.setdefault(xid, now_ms)

    def outcome(self, xid: Xid) -> Decision | None:
        """See `DecisionLog.outcome`."""
        return self._node.decisions.get(xid)

    def pending(self) -> Sequence[Decision]:
        """See `DecisionLog.pending`."""
        with self._store.lock:
            undone = [d for xid, d in self._node.decisions.items() if xid not in self._node.done_ms]
        return sorted(undone, key=lambda decision: decision.decided_ms)

    def overflow_ms(self) -> int:
        """See `DecisionLog.overflow_ms`."""
        with self._store.lock:
            return overflow_ms(self._node.done_ms.values(), self._store.keeps)

    def forget(self, done_before_ms: int, limit: int) -> int:
        """See `DecisionLog.forget`."""
        with self._writing() as node:
            gone = [xid for xid, at_ms in node.done_ms.items() if at_ms < done_before_ms][:limit]
            for xid in gone:
                del node.decisions[xid], node.done_ms[xid]
            if gone:
                node.forgotten_ms = max(node.forgotten_ms, done_before_ms)
            return len(gone)

    def report(self, incidents: Sequence[Incident]) -> None:
        """See `DecisionLog.report`."""
        with self._writing() as node:
            node.incidents.update({(incident.xid, incident.branch): incident for incident in incidents})

    def close_incidents(self, branches: Iterable[tuple[Xid, BranchId]], now_ms: int) -> None:
        """See `DecisionLog.close_incidents`."""
        with self._writing() as node:
            for key in branches:
                node.incidents.pop(key, None)

    def bind(self, first: Mapping[str, str], rebound: Mapping[str, str]) -> Mapping[str, str]:
        """See `DecisionLog.bind`."""
        with self._writing():
            held = self._store.identities
            held.update({name: identity for name, identity in first.items() if not held.get(name)})
            held.update(rebound)
            return dict(held)

    def close(self) -> None:
        """See `DecisionLog.close`."""

    @contextlib.contextmanager
    def _writing(self) -> Iterator[_Node]:
        """The check of the fence and the write are one step, as in one transaction."""
        with self._store.lock:
            present = max(self._node.epochs)
            if present != self._epoch:
                raise Fenced(f"epoch {self._epoch} of node {self._name!r} is over: {present} has opened the log")
            yield self._node
