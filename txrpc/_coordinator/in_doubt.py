"""What is in doubt, and saying so (rule 14): every branch, with its age and the reason, at a pace that slows down."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from txrpc._protocol.coordinator.machine import Coordinator
from txrpc._protocol.coordinator.rows import State
from txrpc.ids import BranchId, Xid

__all__ = ["InDoubtBranch", "InDoubtReporter", "in_doubt"]

logger = logging.getLogger("txrpc.coordinator")

_LINES_MAX = 20


@dataclass(frozen=True, slots=True)
class InDoubtBranch:
    """A branch that is prepared, or is committing in one phase, and has not been heard of since."""

    xid: Xid
    branch: BranchId
    resource: str
    age_ms: int
    reason: str


def in_doubt(core: Coordinator, now_ms: int) -> Iterator[InDoubtBranch]:
    """Every such branch at monotonic time *now_ms*: of transactions being worked on, then what processes report of others."""
    for row in core.state.transactions.values():
        if row.state not in (State.COMMITTING, State.ONE_PHASE):
            continue
        for branch in row.branches.values():
            if not branch.acked and (row.state is State.ONE_PHASE or branch.vote is not None):
                reason = branch.trouble or "its process has been told and has not answered"
                yield InDoubtBranch(row.xid, branch.ref.branch, branch.ref.resource, now_ms - row.begun_ms, reason)
    for report in core.state.reports.shown(now_ms):
        yield InDoubtBranch(report.xid, report.branch, report.resource, now_ms - report.since_ms, report.text)


class InDoubtReporter:
    """Warns of each branch when it has been in doubt for *after_ms*, and again whenever its age has doubled."""

    def __init__(self, after_ms: int) -> None:
        self._after_ms = after_ms
        self._next_ms: dict[tuple[Xid, BranchId], int] = {}

    def warn(self, core: Coordinator, now_ms: int) -> None:
        """Write what is due, a few lines at most: with thousands in doubt the others follow at the next call."""
        old = {(d.xid, d.branch): d for d in in_doubt(core, now_ms) if d.age_ms >= self._after_ms}
        self._next_ms = {key: at_ms for key, at_ms in self._next_ms.items() if key in old}
        due = (doubt for key, doubt in old.items() if doubt.age_ms >= self._next_ms.get(key, 0))
        for doubt in islice(due, _LINES_MAX):
            self._next_ms[doubt.xid, doubt.branch] = doubt.age_ms * 2
            fields = {
                "xid": str(doubt.xid),
                "branch": str(doubt.branch),
                "resource": doubt.resource,
                "age_ms": doubt.age_ms,
                "reason": doubt.reason,
            }
            logger.warning("in doubt", extra=fields)
