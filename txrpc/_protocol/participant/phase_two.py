"""How branches end: phase two, undoing, the deadline, and the questions of whom the answer did not reach.

Each method is one entry, or a shared part, of the participant's table. Undoing comes in two kinds: work that was
never prepared is rolled back (`_undo_work`), and what the database may hold prepared is ended by its identifier
(`_undo_prepared`).
"""

from __future__ import annotations

import heapq
from typing import Final

from txrpc._protocol.messages import (
    Acked,
    Commit,
    FinishResult,
    Inquiry,
    Outcome,
    Resolve,
    Resolved,
    Rollback,
    Trouble,
)
from txrpc._protocol.participant.branch import BranchRow, BranchState, Do, Operation
from txrpc._protocol.participant.state import TOMBSTONE_MS, Ledger
from txrpc.errors import AbortCode, Reason

__all__ = ["Finishing"]

ASK_AGAIN_MS: Final = 15_000
"""The pace at which a branch in doubt asks, before jitter."""

_OVERDUE_MS: Final = 5_000
_RETRY_MS: Final = (100, 200, 500, 1_000, 2_000, 5_000)

_TO_DO: Final = {
    BranchState.VOTING: "prepare",
    BranchState.ONE_PHASE: "commit",
    BranchState.COMMITTING: "commit",
    BranchState.ABORTING: "roll back",
    BranchState.RESOLVING: "learn the end of",
}


class Finishing(Ledger):
    """What happens to branches that end."""

    # -------------------------------------------------------------------------------------------------------- phase two

    def _commit(self, row: BranchRow, message: Commit) -> None:
        row.state = BranchState.COMMITTING
        row.token = row.token or message.token
        self._do(Operation.COMMIT_PREPARED, row)

    def _commit_foreign(self, row: None, message: Commit) -> None:
        self._commit(self._enter_row(message.gid, BranchState.PREPARED, self._now_ms), message)

    def _commit_again(self, row: BranchRow, message: Commit) -> None:
        finish = row.finish if row.outcome is Outcome.COMMITTED else FinishResult.HEURISTIC
        self._out.send.append(Acked(row.xid, row.branch, finish, row.gid.resource))

    def _rollback_voting(self, row: BranchRow, message: Rollback) -> None:
        row.rollback_asked = row.rollback_asked or message.reason

    def _rollback_prepared(self, row: BranchRow, message: Rollback) -> None:
        row.rollback_asked = message.reason
        row.token = row.token or message.token
        self._undo_prepared(row)

    def _rollback_foreign(self, row: None, message: Rollback) -> None:
        self._rollback_prepared(self._enter_row(message.gid, BranchState.PREPARED, self._now_ms), message)

    def _undo_prepared(self, row: BranchRow) -> None:
        row.state = BranchState.ABORTING
        self._do(Operation.ROLLBACK_PREPARED, row)

    def _finished_commit(self, row: BranchRow, finish: FinishResult) -> None:
        self._out.send.append(Acked(row.xid, row.branch, finish, row.gid.resource))
        if not finish.is_proof:
            # Still in doubt, as far as this process can tell: another one may reach the right database, or this one later.
            row.state, row.finish = BranchState.PREPARED, finish
            self._wake_in(row, int(ASK_AGAIN_MS * (0.5 + self._jitter())))
            return
        row.finish = finish
        self._tell_local(row, Outcome.COMMITTED)
        self._end(row, Outcome.COMMITTED)

    def _finished_undo(self, row: BranchRow, finish: FinishResult) -> None:
        if finish is FinishResult.HEURISTIC:
            # An abort needs no acknowledgement (presumed abort); this one is for the operator.
            self._out.send.append(Acked(row.xid, row.branch, finish, row.gid.resource))
        row.finish = finish
        self._tell_local(row, Outcome.ABORTED)
        self._end(row, Outcome.ABORTED)

    def _finish_failed(self, row: BranchRow, reason: Reason) -> None:
        wait_ms = _RETRY_MS[min(row.attempts, len(_RETRY_MS) - 1)]
        row.attempts += 1
        self._wake_in(row, int(wait_ms * (0.5 + self._jitter())))
        if row.attempts & (row.attempts - 1) == 0:  # the first, second, fourth ... failure
            self._trouble(row, reason)

    def _trouble(self, row: BranchRow, reason: Reason) -> None:
        """Tell the coordinator, and whoever reads this process's log, what keeps the branch from ending (rule 20)."""
        row.trouble = Reason(reason.code, f"cannot {_TO_DO[row.state]} the branch in {row.gid.resource}: {reason.text}")
        self._out.send.append(Trouble(row.gid, row.trouble))

    def _slow(self, row: BranchRow, _: object) -> None:
        """The database has not answered yet; there is nothing to do but to say so."""
        waited_ms = self._now_ms - row.working_ms
        text = f"its database has not answered for {waited_ms / 1000:.0f} s"
        self._trouble(row, Reason(AbortCode.RESOURCE_UNAVAILABLE, text))
        self._wake_in(row, waited_ms)

    def _try_commit_again(self, row: BranchRow, _: object) -> None:
        self._do(Operation.COMMIT_PREPARED, row)

    def _try_undo_again(self, row: BranchRow, _: object) -> None:
        self._do(Operation.ROLLBACK_PREPARED, row)

    # -------------------------------------------------------------------------------------------------- unprepared work

    def _rollback_active(self, row: BranchRow, message: Rollback) -> None:
        self._close(row)
        self._undo_work(row, message.reason)

    def _local_rollback(self, row: BranchRow, reason: Reason) -> None:
        row.local = True
        self._close(row)
        self._undo_work(row, reason)

    def _deadline(self, row: BranchRow, _: object) -> None:
        self._close(row)
        self._undo_work(
            row, Reason(AbortCode.TIMED_OUT, f"the deadline passed with the branch in {row.gid.resource} open")
        )

    def _give_up_voting(self, row: BranchRow, reason: Reason) -> None:
        """The root gives up while its own branch prepares: nothing has been promised yet."""
        row.local = True
        row.rollback_asked = row.rollback_asked or reason

    def _overdue(self, row: BranchRow, _: object) -> None:
        """PREPARE or COMMIT hangs past the deadline, and its locks with it (rule 11): a constraint waits, a connection is dead.

        What began in the last moment is given a while; then it is broken off in the database, again and again.  Its result still
        comes, and says what became of the branch.
        """
        if self._now_ms >= row.deadline_ms + _OVERDUE_MS:
            self._out.do.append(Do(Operation.INTERRUPT, row.gid, row.token))
            if row.trouble is None and not row.local:
                text = "its deadline has passed, and its database has not answered"
                self._trouble(row, Reason(AbortCode.TIMED_OUT, text))
        heapq.heappush(self._timers, (self._now_ms + _OVERDUE_MS, row.branch))

    def _give_up_prepared(self, row: BranchRow, _: Reason) -> None:
        """The root gives up with its own branch prepared: it will ask for no commit, but only the coordinator may say so."""
        row.local = True
        self._inquire(row)

    def _undo_work(self, row: BranchRow, reason: Reason) -> None:
        row.doom = row.doom or reason
        row.state = BranchState.ROLLING_BACK
        if row.users:
            self._break_off(row, None)
            # Whoever waits may be the very thread that uses it; it can end in one way only by now.
            self._tell_local(row, Outcome.ABORTED)
            row.local = False
        else:
            self._do(Operation.ROLLBACK, row)

    def _break_off(self, row: BranchRow, _: object) -> None:
        """Break a use off, again and again until it has ended (rule 11): one try may fail, and the use would keep its locks."""
        if row.users:
            self._do(Operation.INTERRUPT, row)
            self._wake_in(row, _OVERDUE_MS)

    def _released(self, row: BranchRow, _: object) -> None:
        if not row.at_work:
            self._do(Operation.ROLLBACK, row)

    def _rolled_back(self, row: BranchRow, _: object) -> None:
        self._tell_local(row, Outcome.ABORTED)
        if row.ask_resolved:
            self._out.send.append(Resolved(row.xid, row.branch, Outcome.ABORTED))
        self._end(row, Outcome.ABORTED)

    def _settle_later(self, row: BranchRow, _: object) -> None:
        row.local = True

    def _settle_now(self, row: BranchRow, _: object) -> None:
        row.local = True
        self._tell_local(row, row.outcome)

    def _tell_local(self, row: BranchRow, result: Outcome) -> None:
        if row.local:
            self._out.settle.append((row.branch, result, None if result is Outcome.COMMITTED else row.why))

    # -------------------------------------------------------------------------------------------- questions, tombstones

    def _ask_again(self, row: BranchRow, _: object) -> None:
        self._inquire(row)
        self._wake_in(row, int(ASK_AGAIN_MS * (0.5 + self._jitter())))

    def _inquire(self, row: BranchRow) -> None:
        asked_by_ms = 0 if row.local else self._closed.get(row.xid, 0) - TOMBSTONE_MS
        left_ms = max(0, asked_by_ms - self._now_ms)
        self._out.send.append(Inquiry(row.gid, self._now_ms - row.in_doubt_ms, left_ms))

    def _resolve_active(self, row: BranchRow, message: Resolve) -> None:
        """The request to commit in one phase never came, and who asked for it wants to know: now it never will be done."""
        row.ask_resolved = True
        self._close(row)
        self._undo_work(row, Reason(AbortCode.COORDINATOR_RESTARTED, "the commit request was lost"))

    def _resolve_later(self, row: BranchRow, message: Resolve) -> None:
        row.ask_resolved = True

    def _resolve_ended(self, row: BranchRow, message: Resolve) -> None:
        if row.outcome is Outcome.UNKNOWN and row.token:
            # The database could not be asked then, and may be back (rule 13).
            row.state = BranchState.RESOLVING
            self._do(Operation.ONE_PHASE_RESULT, row)
            return
        self._out.send.append(Resolved(row.xid, row.branch, row.outcome))

    def _resolve_absent(self, row: None, message: Resolve) -> None:
        """Without the token nobody can ask the database."""
        self._out.send.append(Resolved(message.xid, message.branch, Outcome.UNKNOWN))

    def _resolved(self, row: BranchRow, detail: tuple[Outcome, Reason | None]) -> None:
        self._out.send.append(Resolved(row.xid, row.branch, detail[0]))
        if self._by_use.get((row.xid, row.gid.resource)) == row.branch:
            self._end(row, detail[0])
        else:
            del self.rows[row.branch]

    def _try_resolve_again(self, row: BranchRow, _: object) -> None:
        self._do(Operation.ONE_PHASE_RESULT, row)

    def _expire(self, row: BranchRow, _: object) -> None:
        del self.rows[row.branch]
        if self._by_use.get((row.xid, row.gid.resource)) == row.branch:
            del self._by_use[row.xid, row.gid.resource]
        if self._closed.get(row.xid, 0) <= self._now_ms:
            self._closed.pop(row.xid, None)
