"""What processes say about branches whose transaction has no row here: prepared and asking, or in trouble (rules 14 and 20).

An aborted transaction needs no acknowledgement, so its coordinator forgets it; a branch of it that its database does not let go
of would then be seen by the database alone.  Here it is remembered for as long as its process keeps reporting it.  Nothing
is decided from this: it is for people.
"""

from __future__ import annotations

from dataclasses import dataclass

from txrpc.ids import BranchId, Xid

__all__ = ["STALE_MS", "Report", "Reports"]

STALE_MS = 60_000
"""How long what was reported stands without being repeated: longer than two questions, or two sweeps, are apart."""

_AGAIN_MS = 5_000
"""A question that comes so soon after the same one was on its way when that was answered."""
_MOST = 10_000


@dataclass(slots=True)
class Report:
    """One branch.  `since_ms` (prepared, as far as is known) and `heard_ms` are monotonic times of the coordinator's."""

    xid: Xid
    branch: BranchId
    resource: str
    since_ms: int
    heard_ms: int
    text: str
    told: int = 0
    """How often it has been told to end.  Once is what is expected to be done; it is shown if it asks after that."""
    session: int | None = None
    """The session whose trouble it is: it stands for as long as that lives."""
    unreported: bool = False
    """Whether no process with its resource was connected, so that no process can report it: then it stands."""


class Reports:
    """The latest report of each branch, bounded in number and in time."""

    def __init__(self) -> None:
        self._of: dict[tuple[Xid, BranchId], Report] = {}

    def __len__(self) -> int:
        return len(self._of)

    def add(self, report: Report) -> None:
        """Take a report, in place of what was known of the same branch."""
        before = self._of.pop((report.xid, report.branch), None)
        if before is not None:
            report.since_ms = min(report.since_ms, before.since_ms)
            if report.told and before.told:
                report.told = before.told + (report.heard_ms - before.heard_ms >= _AGAIN_MS)
        elif len(self._of) >= _MOST:
            del self._of[next(iter(self._of))]
        self._of[report.xid, report.branch] = report

    def drop(self, xid: Xid, branch: BranchId) -> None:
        """It has ended, or its transaction's row looks after it."""
        self._of.pop((xid, branch), None)

    def found(self, resource: str, now_ms: int) -> None:
        """A process with *resource* has connected: from now on what it does not report is over."""
        for report in self._of.values():
            if report.unreported and report.resource == resource:
                report.unreported, report.told, report.heard_ms = False, 1, now_ms

    def left(self, session: int, now_ms: int) -> None:
        """That session has ended: what was its trouble is over, unless another process repeats it."""
        for report in self._of.values():
            if report.session == session:
                report.session, report.heard_ms = None, now_ms

    def shown(self, now_ms: int) -> list[Report]:
        """Return what is worth an operator's attention."""
        for key in [key for key, report in self._of.items() if _is_stale(report, now_ms)]:
            del self._of[key]
        return [report for report in self._of.values() if report.told != 1]


def _is_stale(report: Report, now_ms: int) -> bool:
    return not report.unreported and report.session is None and now_ms - report.heard_ms > STALE_MS
