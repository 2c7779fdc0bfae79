"""How branches answer the question that ends their work: prepare and vote, or commit in one phase.

Each method is one entry, or a shared part, of the participant's table.
"""

from __future__ import annotations

from typing import Final

from txrpc._protocol.messages import (
    CommitOnePhase,
    Committing,
    OnePhaseDone,
    Outcome,
    Prepare,
    Vote,
    Voted,
)
from txrpc._protocol.participant.branch import BranchRow, BranchState, Operation
from txrpc._protocol.participant.phase_two import Finishing
from txrpc.errors import AbortCode, Reason
from txrpc.ids import BranchId

__all__ = ["Voting"]

_ASK_AFTER_MS: Final = 1_000
"""How long at least a prepared branch waits for the decision before it asks."""

_LOST: Final = Reason(AbortCode.BRANCH_UNKNOWN, "the process that did this work has restarted, or the branch has ended")


class Voting(Finishing):
    """What a branch says when it is asked whether it can commit, or told to."""

    # ------------------------------------------------------------------------------------------------------- two phases

    def _prepare(self, row: BranchRow, message: Prepare) -> None:
        self._close(row)
        reason = self._objection(row, message.calls)
        if reason is None:
            row.state = BranchState.VOTING
            self._do(Operation.PREPARE, row)
        else:
            self._vote(row, Vote.ABORT, reason)
            self._undo_work(row, reason)

    def _objection(self, row: BranchRow, calls: int) -> Reason | None:
        """Why this branch may not be committed, or None (rule 9)."""
        if row.doom is not None:
            return row.doom
        if row.users and row.local:
            text = f"a session() or connection() block of {row.gid.resource} is still running: leave it before the end"
            return Reason(AbortCode.CALLS_DIFFER, text)
        if row.users or row.running:
            return Reason(AbortCode.CALLS_DIFFER, f"a call of the transaction is still running in {row.gid.resource}")
        if row.calls != calls:
            text = f"{row.gid.resource} completed {row.calls} calls, the root saw {calls}: one ran twice, or its end was lost"
            return Reason(AbortCode.CALLS_DIFFER, text)
        return None

    def _vote(self, row: BranchRow, vote: Vote, reason: Reason | None = None) -> None:
        row.voted = vote
        self._out.send.append(Voted(row.xid, row.branch, vote, reason, row.token))

    def _prepare_unknown(self, row: None, message: Prepare) -> None:
        self._out.send.append(Voted(message.xid, message.branch, Vote.ABORT, _LOST))

    def _prepare_again(self, row: BranchRow, message: Prepare) -> None:
        self._vote(row, Vote.PREPARED)

    def _prepare_late(self, row: BranchRow, message: Prepare) -> None:
        if row.outcome is Outcome.COMMITTED and row.voted is not None:
            self._vote(row, row.voted)  # a question asked twice gets one answer
        else:
            self._vote(row, Vote.ABORT, row.why or Reason(AbortCode.BRANCH_UNKNOWN, "the branch has ended"))

    def _did_prepare(self, row: BranchRow, token: str) -> None:
        row.token = token
        row.in_doubt_ms = self._now_ms
        if row.rollback_asked is not None:
            self._undo_prepared(row)
            return
        row.state = BranchState.PREPARED
        self._vote(row, Vote.PREPARED)
        self._wake_in(row, max(row.deadline_ms - self._now_ms, _ASK_AFTER_MS))

    def _was_read_only(self, row: BranchRow, _: object) -> None:
        if row.rollback_asked is None:
            self._vote(row, Vote.READ_ONLY)
            self._end(row, Outcome.COMMITTED)
        else:
            self._tell_local(row, Outcome.ABORTED)
            self._end(row, Outcome.ABORTED)

    def _prepare_failed(self, row: BranchRow, reason: Reason) -> None:
        row.vote_reason = reason
        if row.rollback_asked is None:
            self._vote(row, Vote.ABORT, reason)
        self._undo_prepared(row)

    # -------------------------------------------------------------------------------------------------------- one phase

    def _one_phase(self, row: BranchRow, message: CommitOnePhase) -> None:
        self._close(row)
        reason = self._objection(row, message.calls)
        if reason is None:
            row.state = BranchState.ONE_PHASE
            self._do(Operation.COMMIT_ONE_PHASE, row)
        else:
            self._out.send.append(OnePhaseDone(row.xid, row.branch, Outcome.ABORTED, reason))
            self._undo_work(row, reason)

    def _one_phase_unknown(self, row: None, message: CommitOnePhase) -> None:
        self._out.send.append(OnePhaseDone(message.xid, message.branch, Outcome.ABORTED, _LOST))

    def _one_phase_again(self, row: BranchRow, message: CommitOnePhase) -> None:
        self._out.send.append(OnePhaseDone(row.xid, row.branch, row.outcome, row.why))

    def _local_commit(self, row: BranchRow, calls: int | None) -> None:
        self._close(row)
        row.local = True
        # The root's own use counts nothing; calls that came in through a service are counted like everywhere.
        reason = self._objection(row, row.calls if calls is None else calls)
        if reason is None:
            row.state = BranchState.ONE_PHASE
            self._do(Operation.COMMIT_ONE_PHASE, row)
        else:
            row.vote_reason = reason
            self._undo_work(row, reason)

    def committing(self, branch: BranchId, token: str) -> Committing | None:
        """COMMIT is about to be sent to the database: what the coordinator must know in case this process dies now."""
        row = self.rows[branch]
        row.token = token
        return None if row.local else Committing(row.xid, branch, token)

    def _one_phase_undone(self, row: BranchRow, message: CommitOnePhase) -> None:
        self._out.send.append(OnePhaseDone(row.xid, row.branch, Outcome.ABORTED, row.doom))

    def _one_phase_ended(self, row: BranchRow, detail: tuple[Outcome, Reason | None]) -> None:
        result, reason = detail
        row.vote_reason = reason
        if row.local:
            self._out.settle.append((row.branch, result, reason))
        else:
            self._out.send.append(OnePhaseDone(row.xid, row.branch, result, reason))
        self._end(row, result)
