"""The state of one process's branches: rows, closed transactions, timers, and how effects are put into the output.

What a row does when something happens is in `phase_one` and `phase_two`; the table is in `table`.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable

from txrpc._protocol.messages import Outcome
from txrpc._protocol.participant.branch import BranchState, Do, Effects, Operation, ParticipantBranch
from txrpc.ids import BranchId, Gid, Xid

__all__ = ["SLOW_MS", "TOMBSTONE_MS", "ParticipantState"]

TOMBSTONE_MS = 60_000
"""How much longer than its transaction's deadline an ended branch is remembered: for messages on their way (rule 10)."""

SLOW_MS = 5_000
"""How long a database may take to finish a branch before that is trouble (rule 20)."""

_AFTER_THE_VOTE = frozenset({Operation.COMMIT_PREPARED, Operation.ROLLBACK_PREPARED, Operation.ONE_PHASE_RESULT})
"""What must be waited for, however long it takes."""


class ParticipantState:
    """The state of one participant, and the small operations on it that every rule uses."""

    def __init__(self, jitter: Callable[[], float]) -> None:
        """*jitter* returns numbers from 0 to 1, which spread inquiries and retries."""
        self.rows: dict[BranchId, ParticipantBranch] = {}
        """With the ended ones, until their tombstones expire."""
        self.by_use: dict[tuple[Xid, str], BranchId] = {}
        """The branch that calls of a transaction use in a resource."""
        self.closed_until_ms: dict[Xid, int] = {}
        """Transactions that have begun to end here, and until when a late call of them may come (rule 10)."""
        self.abandoned: deque[tuple[int, Xid]] = deque()
        """Transactions that were closed without a row whose tombstone would open them again, and until when."""
        self.timers: list[tuple[int, BranchId]] = []
        """A heap.  A row counts only if its own deadline has come; older entries of it are void."""
        self.jitter = jitter
        self.now_ms = 0
        self.out = Effects()

    def find(self, xid: Xid, resource: str) -> ParticipantBranch | None:
        """The branch of *xid* in *resource* of this process, ended ones included."""
        branch = self.by_use.get((xid, resource))
        return None if branch is None else self.rows[branch]

    def is_closed(self, xid: Xid) -> bool:
        """Return whether *xid* has begun to end here, so that a call of it comes too late (rule 10)."""
        return xid in self.closed_until_ms

    def next_wakeup_ms(self) -> int | None:
        """Return when `woke` is due, in the monotonic time of `step`."""
        return self.timers[0][0] if self.timers else None

    def begin(self, now_ms: int) -> None:
        self.now_ms = max(now_ms, self.now_ms)
        self.out = Effects()

    def enter_row(self, gid: Gid, state: BranchState, deadline_ms: int) -> ParticipantBranch:
        row = ParticipantBranch(gid, state, deadline_ms, in_doubt_ms=self.now_ms, home=gid.node)
        self.rows[gid.branch] = row
        if state is BranchState.ACTIVE:
            heapq.heappush(self.timers, (deadline_ms, gid.branch))
        return row

    def close(self, row: ParticipantBranch) -> None:
        """The transaction begins to end here: no further call of it may come in (rule 10)."""
        self.closed_until_ms.setdefault(row.xid, max(row.deadline_ms, self.now_ms) + TOMBSTONE_MS)

    def end(self, row: ParticipantBranch, outcome: Outcome) -> None:
        # The row stays as a tombstone (rule 10).
        row.state, row.outcome = BranchState.ENDED, outcome
        self.wake_in(row, max(self.closed_until_ms.get(row.xid, 0) - self.now_ms, TOMBSTONE_MS))

    def wake_in(self, row: ParticipantBranch, wait_ms: int) -> None:
        row.deadline_ms = self.now_ms + wait_ms
        heapq.heappush(self.timers, (row.deadline_ms, row.branch))

    def do(self, operation: Operation, row: ParticipantBranch) -> None:
        row.at_work = operation is not Operation.INTERRUPT
        if operation in _AFTER_THE_VOTE:
            row.working_ms = self.now_ms
            self.wake_in(row, SLOW_MS)
        early = operation is Operation.PREPARE and row.early
        decides = row.decides if operation is Operation.COMMIT_ONE_PHASE else None
        self.out.do.append(Do(operation, row.gid, row.token, early, decides))
