"""A decision log on the disks of a group: one replicated log a node."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from txrpc._decision_log.port import Decision, LogError, NotRecorded, Opened, RecordUncertain
from txrpc._group.acceptor import LocalAcceptor
from txrpc._group.peers import Peers
from txrpc._group.replica import Replica
from txrpc._group.shared import SharedLog
from txrpc._protocol.quorum.commands import Command, Forget, LogState, Record, Report
from txrpc._protocol.records import Incident, lineage, overflow_ms
from txrpc.errors import ConfigurationError
from txrpc.ids import BranchId, Epoch, Xid

__all__ = ["GroupLog"]

_RECORD_S: Final = 3.0
_KEPT: Final = 100_000
"""Finished decisions that are kept at most, whatever the retention time: each acceptor has them in memory."""


class GroupLog:
    """See `txrpc._decision_log.port.DecisionLog`."""

    def __init__(self, acceptor: LocalAcceptor, peers: Peers, shared: SharedLog) -> None:
        self._acceptor = acceptor
        self._peers = peers
        self._shared = shared
        self._replica = Replica("", acceptor, peers)

    @property
    def location(self) -> str:
        """See `DecisionLog.location`."""
        return f"group of {', '.join(self._peers.view.names)}"

    @property
    def _state(self) -> LogState:
        return self._replica.state

    def open(self, node: str, nonce: int, holder: str = "", expect: Epoch | None = None) -> Opened:
        """See `DecisionLog.open`; raises `NoQuorum`, which is a `ConfigurationError`, if too few members answer."""
        if not self._peers.is_member:  # it and the one that runs its node would fence each other until it has ended
            raise ConfigurationError(f"{self._acceptor.name} was removed from the group")
        self._replica = Replica(node, self._acceptor, self._peers)
        self._replica.open(nonce, holder or node, expect)
        state, epoch = self._state, self._replica.epoch
        latest = max((each.decided_ms for each in state.decisions.values()), default=0)
        return Opened(
            epoch,
            lineage({each: at for each, at in state.epochs.items() if each != epoch}, state.position),
            tuple(self.pending()),
            state.forgotten_ms,
            max(state.forgotten_ms, latest),
            state.position,
            tuple(sorted(state.incidents.values(), key=lambda incident: incident.at_ms)),
            {name: identity for name, identity in self._shared.read().items() if identity},
        )

    def record(self, decisions: Sequence[Decision]) -> int:
        """See `DecisionLog.record`."""
        wanted = Record(tuple(decisions))
        for decision in decisions:
            held = self._state.decisions.get(decision.xid, decision)
            if held != decision:
                raise AssertionError(f"two decisions about {decision.xid}: {held} and {decision}")
        if self._replica.in_flight == wanted:  # the very same batch again
            chosen = self._replica.wait(_RECORD_S)
        elif self._replica.wait(_RECORD_S):
            chosen = self._replica.propose(wanted, _RECORD_S)
        else:
            raise NotRecorded(self._peers.too_few())
        if not chosen:
            raise RecordUncertain(f"sent, and not answered: {self._peers.too_few()}")
        return self._state.position

    def done(self, xids: Iterable[Xid], now_ms: int) -> None:
        """See `DecisionLog.done`."""
        marked = tuple(xid for xid in xids if xid in self._state.decisions and xid not in self._state.done_ms)
        if marked:
            self._propose(Record((), marked, now_ms))

    def outcome(self, xid: Xid) -> Decision | None:
        """See `DecisionLog.outcome`."""
        return self._state.decisions.get(xid)

    def pending(self) -> Sequence[Decision]:
        """See `DecisionLog.pending`."""
        undone = [each for xid, each in self._state.decisions.items() if xid not in self._state.done_ms]
        return sorted(undone, key=lambda decision: decision.decided_ms)

    def overflow_ms(self) -> int:
        """See `DecisionLog.overflow_ms`."""
        return overflow_ms(self._state.done_ms.values(), _KEPT)

    def forget(self, done_before_ms: int, limit: int) -> int:
        """See `DecisionLog.forget`."""
        self._replica.tend()
        done = sorted(self._state.done_ms.items(), key=lambda item: item[1])
        gone = [xid for xid, at_ms in done if at_ms < done_before_ms][:limit]
        if gone:
            self._propose(Forget(frozenset(gone), done_before_ms))
        return len(gone)

    def report(self, incidents: Sequence[Incident]) -> None:
        """See `DecisionLog.report`."""
        if incidents:
            self._propose(Report(tuple(incidents)))

    def close_incidents(self, branches: Iterable[tuple[Xid, BranchId]], now_ms: int) -> None:
        """See `DecisionLog.close_incidents`."""
        closed = tuple(key for key in branches if key in self._state.incidents)
        if closed:
            self._propose(Report((), closed))

    def bind(self, first: Mapping[str, str], rebound: Mapping[str, str]) -> Mapping[str, str]:
        """See `DecisionLog.bind`.  Called twice a second: what has no other occasion is seen to here."""
        self._replica.tend()
        self._shared.tend()
        if not (first or rebound):
            return self._shared.read()
        self._propose(Record(()))  # whether this epoch may write still
        return self._shared.bind(first, rebound)

    def close(self) -> None:
        """See `DecisionLog.close`.  The acceptor and the peers are the process's."""

    def _propose(self, command: Command) -> None:
        if not (self._replica.wait(_RECORD_S) and self._replica.propose(command, _RECORD_S)):
            raise LogError(self._peers.too_few())
