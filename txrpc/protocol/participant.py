"""The participant: the branches of one process, from first use to tombstone, as a table.

How to think of it
    `use` opens or re-enters a branch; calls complete; then the coordinator's messages, the clock and the results of database
    operations arrive as inputs, and `TABLE` says what each does in each state.  Operations run elsewhere; their results come
    back as inputs.  A branch has at most one operation at work, and a prepared branch never ends by itself (rule 4).

The rules that live here (the design's section 5)
    4   PREPARED has no way out but the coordinator's word.
    8   a branch that this process does not know votes ABORT: its work was lost with the process that did it.
    9   a branch whose completed calls differ from what the root saw, or that is being used, votes ABORT.
    10  an ended branch stays as a tombstone past its deadline, and so does its transaction: late calls are refused.
    11  an ACTIVE branch rolls back at its deadline; if somebody is using its work just then, that use is interrupted.

After a failed PREPARE nobody knows whether the database holds the branch: the vote is ABORT, and ROLLBACK PREPARED is repeated
until the database confirms that there is nothing (left) to end.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any, Final

from txrpc.errors import AbortCode, Reason
from txrpc.ids import BranchId, Gid, Xid
from txrpc.protocol.branch import BranchInput, BranchRow, BranchState, Do, Effects, Operation
from txrpc.protocol.messages import (
    Acked,
    Commit,
    CommitOnePhase,
    Committing,
    Finish,
    FromCoordinator,
    Inquiry,
    OnePhaseDone,
    OnePhaseResult,
    Outcome,
    Prepare,
    Resolve,
    Resolved,
    Rollback,
    Vote,
    Voted,
)

__all__ = ["TABLE", "Participant"]

_TOMBSTONE_MS = 60_000
_ASK_AFTER_MS = 1_000
_ASK_AGAIN_MS = 15_000
_RETRY_MS = (100, 200, 500, 1_000, 2_000, 5_000)

_RESULT: Final = {
    Outcome.COMMITTED: OnePhaseResult.COMMITTED,
    Outcome.ABORTED: OnePhaseResult.ABORTED,
    Outcome.UNKNOWN: OnePhaseResult.UNKNOWN,
}


class Participant:
    """The branches of one process.  Not thread-safe: the shell calls it under one lock, or on one event loop."""

    def __init__(self, jitter: Callable[[], float]) -> None:
        """*jitter* returns numbers from 0 to 1, which spread inquiries and retries."""
        self.rows: dict[BranchId, BranchRow] = {}
        self._by_use: dict[tuple[Xid, str], BranchId] = {}
        self._closed: dict[Xid, int] = {}
        self._timers: list[tuple[int, BranchId]] = []
        self._jitter = jitter
        self._now_ms = 0
        self._out = Effects([], [], [])

    # -------------------------------------------------------------------------------------------------- local doors

    def find(self, xid: Xid, resource: str) -> BranchRow | None:
        """The branch of *xid* in *resource* of this process, ended ones included."""
        branch = self._by_use.get((xid, resource))
        return None if branch is None else self.rows[branch]

    def closed(self, xid: Xid) -> bool:
        """Whether *xid* has begun to end here, so that a call of it comes too late (rule 10)."""
        return xid in self._closed

    def open(self, gid: Gid, deadline_ms: int) -> BranchRow:
        """Enter a new branch, ACTIVE.  The caller has made sure that there is none, and that *xid* is not closed."""
        row = self._enter_row(gid, BranchState.ACTIVE, deadline_ms)
        self._by_use[gid.xid, gid.resource] = gid.branch
        return row

    def discard(self, row: BranchRow) -> None:
        """Take back `open`: the resource could not begin, so there is no work."""
        del self.rows[row.branch], self._by_use[row.xid, row.gid.resource]

    def step(self, kind: BranchInput, branch: BranchId, now_ms: int, detail: object = None) -> Effects:
        """Take a local input: a result, a release, a local commit or rollback."""
        self._begin(now_ms)
        self._enter(kind, branch, detail)
        return self._out

    def received(self, message: FromCoordinator, now_ms: int) -> Effects:
        """Take a message of the coordinator's that concerns branches."""
        self._begin(now_ms)
        branch = message.gid.branch if isinstance(message, Commit | Rollback) else message.branch  # type: ignore[union-attr]
        self._enter(_MESSAGES[type(message)], branch, message)
        return self._out

    def woke(self, now_ms: int) -> Effects:
        """The time that `next_wakeup_ms` named has come."""
        self._begin(now_ms)
        while self._timers and self._timers[0][0] <= now_ms:
            _due, branch = heapq.heappop(self._timers)
            row = self.rows.get(branch)
            if row is not None and row.deadline_ms <= now_ms:
                self._enter(BranchInput.TIME_UP, branch, None)
        return self._out

    def connected(self, now_ms: int) -> Effects:
        """A session has begun: every branch in doubt asks."""
        self._begin(now_ms)
        for row in self.rows.values():
            if row.state is BranchState.PREPARED:
                self._inquire(row)
        return self._out

    def in_doubt(self, gid: Gid, since_ms: int, now_ms: int) -> Effects:
        """The database holds *gid* prepared; if it is not a branch that this process is looking after, ask for it."""
        self._begin(now_ms)
        if gid.branch not in self.rows:
            self._out.send.append(Inquiry(gid, since_ms, 0))
        return self._out

    def next_wakeup_ms(self) -> int | None:
        """When `woke` is due, in the monotonic time of `step`."""
        return self._timers[0][0] if self._timers else None

    # ------------------------------------------------------------------------------------------------------- voting

    def _prepare(self, row: BranchRow, message: Prepare) -> None:
        self._close(row)
        reason = self._objection(row, message.calls)
        if reason is None:
            row.state = BranchState.VOTING
            self._do(Operation.PREPARE, row)
        else:
            self._out.send.append(Voted(row.xid, row.branch, Vote.ABORT, reason))
            self._undo_work(row, reason)

    def _objection(self, row: BranchRow, calls: int) -> Reason | None:
        """Why this branch may not be committed, or None (rule 9)."""
        if row.doom is not None:
            return row.doom
        if row.users or row.running:
            return Reason(AbortCode.CALLS_DIFFER, f"a call of the transaction is still running in {row.gid.resource}")
        if row.calls != calls:
            text = f"{row.gid.resource} completed {row.calls} calls, the root saw {calls}: one ran twice, or its end was lost"
            return Reason(AbortCode.CALLS_DIFFER, text)
        return None

    def _prepare_unknown(self, row: None, message: Prepare) -> None:
        text = "the process that did this work has restarted, or the branch has ended"
        vote = Voted(message.xid, message.branch, Vote.ABORT, Reason(AbortCode.BRANCH_UNKNOWN, text))
        self._out.send.append(vote)

    def _prepare_again(self, row: BranchRow, message: Prepare) -> None:
        self._out.send.append(Voted(row.xid, row.branch, Vote.PREPARED, None, row.token))

    def _prepare_late(self, row: BranchRow, message: Prepare) -> None:
        reason = row.vote_reason or row.doom or Reason(AbortCode.BRANCH_UNKNOWN, "the branch has ended")
        self._out.send.append(Voted(row.xid, row.branch, Vote.ABORT, reason))

    def _did_prepare(self, row: BranchRow, token: str) -> None:
        row.token = token
        row.in_doubt_ms = self._now_ms
        if row.rollback_asked is not None:
            self._undo_prepared(row)
            return
        row.state = BranchState.PREPARED
        self._out.send.append(Voted(row.xid, row.branch, Vote.PREPARED, None, token))
        self._wake_in(row, max(row.deadline_ms - self._now_ms, _ASK_AFTER_MS))

    def _was_read_only(self, row: BranchRow, _: object) -> None:
        self._out.send.append(Voted(row.xid, row.branch, Vote.READ_ONLY))
        self._end(row, Outcome.COMMITTED)

    def _prepare_failed(self, row: BranchRow, reason: Reason) -> None:
        row.vote_reason = reason
        if row.rollback_asked is None:
            self._out.send.append(Voted(row.xid, row.branch, Vote.ABORT, reason))
        self._undo_prepared(row)

    # ---------------------------------------------------------------------------------------------------- one phase

    def _one_phase(self, row: BranchRow, message: CommitOnePhase) -> None:
        self._close(row)
        reason = self._objection(row, message.calls)
        if reason is None:
            row.state = BranchState.ONE_PHASE
            self._do(Operation.COMMIT_ONE_PHASE, row)
        else:
            self._out.send.append(OnePhaseDone(row.xid, row.branch, OnePhaseResult.ABORTED, reason))
            self._undo_work(row, reason)

    def _one_phase_unknown(self, row: None, message: CommitOnePhase) -> None:
        text = "the process that did this work has restarted, or the branch has ended"
        reason = Reason(AbortCode.BRANCH_UNKNOWN, text)
        self._out.send.append(OnePhaseDone(message.xid, message.branch, OnePhaseResult.ABORTED, reason))

    def _one_phase_again(self, row: BranchRow, message: CommitOnePhase) -> None:
        self._out.send.append(OnePhaseDone(row.xid, row.branch, _RESULT[row.outcome], row.vote_reason))

    def _local_commit(self, row: BranchRow, _: object) -> None:
        self._close(row)
        row.local = True
        # The root knows its own calls; what came in through other services is counted like everywhere.
        reason = self._objection(row, row.calls)
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
        self._out.send.append(OnePhaseDone(row.xid, row.branch, OnePhaseResult.ABORTED, row.doom))

    def _settle_later(self, row: BranchRow, _: object) -> None:
        row.local = True

    def _settle_now(self, row: BranchRow, _: object) -> None:
        self._out.settle.append((row.branch, _RESULT[row.outcome], row.vote_reason or row.doom))

    def _one_phase_ended(self, row: BranchRow, detail: tuple[OnePhaseResult, Reason | None]) -> None:
        result, reason = detail
        row.vote_reason = reason
        if row.local:
            self._out.settle.append((row.branch, result, reason))
        else:
            self._out.send.append(OnePhaseDone(row.xid, row.branch, result, reason))
        outcomes = {OnePhaseResult.COMMITTED: Outcome.COMMITTED, OnePhaseResult.ABORTED: Outcome.ABORTED}
        self._end(row, outcomes.get(result, Outcome.UNKNOWN))

    # ------------------------------------------------------------------------------------------------ phase two, undo

    def _commit(self, row: BranchRow, message: Commit) -> None:
        row.state = BranchState.COMMITTING
        row.token = row.token or message.token
        self._do(Operation.COMMIT_PREPARED, row)

    def _commit_foreign(self, row: None, message: Commit) -> None:
        self._commit(self._enter_row(message.gid, BranchState.PREPARED, self._now_ms), message)

    def _commit_again(self, row: BranchRow, message: Commit) -> None:
        finish = row.finish if row.outcome is Outcome.COMMITTED else Finish.HEURISTIC
        self._out.send.append(Acked(row.xid, row.branch, finish))

    def _rollback_active(self, row: BranchRow, message: Rollback) -> None:
        self._close(row)
        self._undo_work(row, message.reason)

    def _rollback_voting(self, row: BranchRow, message: Rollback) -> None:
        row.rollback_asked = message.reason

    def _rollback_prepared(self, row: BranchRow, message: Rollback) -> None:
        row.rollback_asked = message.reason
        self._undo_prepared(row)

    def _rollback_foreign(self, row: None, message: Rollback) -> None:
        self._rollback_prepared(self._enter_row(message.gid, BranchState.PREPARED, self._now_ms), message)

    def _local_rollback(self, row: BranchRow, reason: Reason) -> None:
        row.local = True
        self._close(row)
        self._undo_work(row, reason)

    def _undo_work(self, row: BranchRow, reason: Reason) -> None:
        row.doom = row.doom or reason
        row.state = BranchState.ROLLING_BACK
        self._do(Operation.INTERRUPT if row.users else Operation.ROLLBACK, row)

    def _undo_prepared(self, row: BranchRow) -> None:
        row.state = BranchState.UNDOING
        self._do(Operation.ROLLBACK_PREPARED, row)

    def _released(self, row: BranchRow, _: object) -> None:
        self._do(Operation.ROLLBACK, row)

    def _finished_commit(self, row: BranchRow, finish: Finish) -> None:
        row.finish = finish
        self._out.send.append(Acked(row.xid, row.branch, finish))
        self._end(row, Outcome.COMMITTED)

    def _finished_undo(self, row: BranchRow, finish: Finish) -> None:
        if finish is Finish.HEURISTIC:
            # An abort needs no acknowledgement (presumed abort); this one is for the operator.
            self._out.send.append(Acked(row.xid, row.branch, finish))
        row.finish = finish
        self._end(row, Outcome.ABORTED)

    def _finish_failed(self, row: BranchRow, _: object) -> None:
        wait_ms = _RETRY_MS[min(row.attempts, len(_RETRY_MS) - 1)]
        row.attempts += 1
        self._wake_in(row, int(wait_ms * (0.5 + self._jitter())))

    def _rolled_back(self, row: BranchRow, _: object) -> None:
        if row.local:
            self._out.settle.append((row.branch, OnePhaseResult.ABORTED, row.vote_reason or row.doom))
        if row.ask_resolved:
            self._out.send.append(Resolved(row.xid, row.branch, OnePhaseResult.ABORTED))
        self._end(row, Outcome.ABORTED)

    # --------------------------------------------------------------------------------------------- clocks, questions

    def _deadline(self, row: BranchRow, _: object) -> None:
        self._close(row)
        self._undo_work(
            row, Reason(AbortCode.TIMED_OUT, f"the deadline passed with the branch in {row.gid.resource} open")
        )

    def _ask_again(self, row: BranchRow, _: object) -> None:
        self._inquire(row)
        self._wake_in(row, int(_ASK_AGAIN_MS * (0.5 + self._jitter())))

    def _inquire(self, row: BranchRow) -> None:
        left_ms = max(0, self._closed.get(row.xid, 0) - _TOMBSTONE_MS - self._now_ms)
        self._out.send.append(Inquiry(row.gid, self._now_ms - row.in_doubt_ms, left_ms))

    def _try_commit_again(self, row: BranchRow, _: object) -> None:
        self._do(Operation.COMMIT_PREPARED, row)

    def _try_undo_again(self, row: BranchRow, _: object) -> None:
        self._do(Operation.ROLLBACK_PREPARED, row)

    def _try_resolve_again(self, row: BranchRow, _: object) -> None:
        self._do(Operation.ONE_PHASE_RESULT, row)

    def _bury(self, row: BranchRow, _: object) -> None:
        del self.rows[row.branch]
        if self._by_use.get((row.xid, row.gid.resource)) == row.branch:
            del self._by_use[row.xid, row.gid.resource]
        if self._closed.get(row.xid, 0) <= self._now_ms:
            self._closed.pop(row.xid, None)

    def _resolve_active(self, row: BranchRow, message: Resolve) -> None:
        """The request to commit in one phase never came, and who asked for it wants to know: now it never will be done."""
        row.ask_resolved = True
        self._close(row)
        self._undo_work(row, Reason(AbortCode.COORDINATOR_RESTARTED, "the commit request was lost"))

    def _resolve_later(self, row: BranchRow, message: Resolve) -> None:
        row.ask_resolved = True

    def _resolve_ended(self, row: BranchRow, message: Resolve) -> None:
        self._out.send.append(Resolved(row.xid, row.branch, _RESULT[row.outcome]))

    def _resolved(self, row: BranchRow, detail: tuple[OnePhaseResult, Reason | None]) -> None:
        self._out.send.append(Resolved(row.xid, row.branch, detail[0]))
        del self.rows[row.branch]

    # ----------------------------------------------------------------------------------------------------- plumbing

    def _begin(self, now_ms: int) -> None:
        self._now_ms = max(now_ms, self._now_ms)
        self._out = Effects([], [], [])

    def _enter(self, kind: BranchInput, branch: BranchId, detail: object) -> None:
        row = self.rows.get(branch)
        state = BranchState.ABSENT if row is None else row.state
        action = TABLE.get((state, kind))
        if action is not None:
            action(self, row, detail)

    def _ignore(self, row: object, detail: object) -> None:
        """Late, repeated, or answered when the work under way ends."""

    def _resolve_absent(self, row: None, message: Resolve) -> None:
        """Without the token nobody can ask the database."""
        self._out.send.append(Resolved(message.xid, message.branch, OnePhaseResult.UNKNOWN))

    def resolve_foreign(self, gid: Gid, token: str, now_ms: int) -> Effects:
        """Ask the database for the end of a commit in one phase that another process had begun."""
        self._begin(now_ms)
        row = self._enter_row(gid, BranchState.RESOLVING, now_ms)
        row.token = token
        self._do(Operation.ONE_PHASE_RESULT, row)
        return self._out

    def _enter_row(self, gid: Gid, state: BranchState, deadline_ms: int) -> BranchRow:
        row = BranchRow(gid, state, deadline_ms, in_doubt_ms=self._now_ms)
        self.rows[gid.branch] = row
        if state is BranchState.ACTIVE:
            heapq.heappush(self._timers, (deadline_ms, gid.branch))
        return row

    def _close(self, row: BranchRow) -> None:
        """The transaction begins to end here: no further call of it may come in (rule 10)."""
        self._closed.setdefault(row.xid, max(row.deadline_ms, self._now_ms) + _TOMBSTONE_MS)

    def _end(self, row: BranchRow, outcome: Outcome) -> None:
        row.state, row.outcome = BranchState.ENDED, outcome
        self._wake_in(row, max(self._closed.get(row.xid, 0) - self._now_ms, _TOMBSTONE_MS))

    def _wake_in(self, row: BranchRow, wait_ms: int) -> None:
        row.deadline_ms = self._now_ms + wait_ms
        heapq.heappush(self._timers, (row.deadline_ms, row.branch))

    def _do(self, operation: Operation, row: BranchRow) -> None:
        self._out.do.append(Do(operation, row.gid, row.token))


_Action = Callable[[Any, Any, Any], None]
_P = Participant
_S = BranchState
_I = BranchInput

TABLE: Final[dict[tuple[BranchState, BranchInput], _Action]] = {
    (_S.ABSENT, _I.PREPARE): _P._prepare_unknown,
    (_S.ABSENT, _I.COMMIT_ONE_PHASE): _P._one_phase_unknown,
    (_S.ABSENT, _I.COMMIT): _P._commit_foreign,
    (_S.ABSENT, _I.ROLLBACK): _P._rollback_foreign,
    (_S.ABSENT, _I.RESOLVE): _P._resolve_absent,
    (_S.ACTIVE, _I.PREPARE): _P._prepare,
    (_S.ACTIVE, _I.COMMIT_ONE_PHASE): _P._one_phase,
    (_S.ACTIVE, _I.ROLLBACK): _P._rollback_active,
    (_S.ACTIVE, _I.RESOLVE): _P._resolve_active,
    (_S.ACTIVE, _I.LOCAL_COMMIT): _P._local_commit,
    (_S.ACTIVE, _I.LOCAL_ROLLBACK): _P._local_rollback,
    (_S.ACTIVE, _I.TIME_UP): _P._deadline,
    (_S.VOTING, _I.PREPARE): _P._ignore,
    (_S.VOTING, _I.ROLLBACK): _P._rollback_voting,
    (_S.VOTING, _I.TIME_UP): _P._ignore,
    (_S.VOTING, _I.PREPARED): _P._did_prepare,
    (_S.VOTING, _I.READ_ONLY): _P._was_read_only,
    (_S.VOTING, _I.PREPARE_FAILED): _P._prepare_failed,
    (_S.PREPARED, _I.PREPARE): _P._prepare_again,
    (_S.PREPARED, _I.COMMIT): _P._commit,
    (_S.PREPARED, _I.ROLLBACK): _P._rollback_prepared,
    (_S.PREPARED, _I.TIME_UP): _P._ask_again,
    (_S.ONE_PHASE, _I.COMMIT_ONE_PHASE): _P._ignore,
    (_S.ONE_PHASE, _I.ROLLBACK): _P._ignore,
    (_S.ONE_PHASE, _I.RESOLVE): _P._ignore,
    (_S.ONE_PHASE, _I.TIME_UP): _P._ignore,
    (_S.ONE_PHASE, _I.ONE_PHASE_ENDED): _P._one_phase_ended,
    (_S.COMMITTING, _I.COMMIT): _P._ignore,
    (_S.COMMITTING, _I.TIME_UP): _P._try_commit_again,
    (_S.COMMITTING, _I.FINISHED): _P._finished_commit,
    (_S.COMMITTING, _I.FINISH_FAILED): _P._finish_failed,
    (_S.UNDOING, _I.PREPARE): _P._prepare_late,
    (_S.UNDOING, _I.ROLLBACK): _P._ignore,
    (_S.UNDOING, _I.TIME_UP): _P._try_undo_again,
    (_S.UNDOING, _I.FINISHED): _P._finished_undo,
    (_S.UNDOING, _I.FINISH_FAILED): _P._finish_failed,
    (_S.ROLLING_BACK, _I.PREPARE): _P._prepare_late,
    (_S.ROLLING_BACK, _I.COMMIT_ONE_PHASE): _P._one_phase_undone,
    (_S.ROLLING_BACK, _I.ROLLBACK): _P._ignore,
    (_S.ROLLING_BACK, _I.RESOLVE): _P._resolve_later,
    (_S.ROLLING_BACK, _I.LOCAL_COMMIT): _P._settle_later,
    (_S.ROLLING_BACK, _I.LOCAL_ROLLBACK): _P._settle_later,
    (_S.ROLLING_BACK, _I.RELEASED): _P._released,
    (_S.ROLLING_BACK, _I.TIME_UP): _P._ignore,
    (_S.ROLLING_BACK, _I.ROLLED_BACK): _P._rolled_back,
    (_S.RESOLVING, _I.RESOLVE): _P._ignore,
    (_S.RESOLVING, _I.TIME_UP): _P._try_resolve_again,
    (_S.RESOLVING, _I.ONE_PHASE_ENDED): _P._resolved,
    (_S.RESOLVING, _I.FINISH_FAILED): _P._finish_failed,
    (_S.ENDED, _I.PREPARE): _P._prepare_late,
    (_S.ENDED, _I.COMMIT_ONE_PHASE): _P._one_phase_again,
    (_S.ENDED, _I.COMMIT): _P._commit_again,
    (_S.ENDED, _I.ROLLBACK): _P._ignore,
    (_S.ENDED, _I.RESOLVE): _P._resolve_ended,
    (_S.ENDED, _I.LOCAL_COMMIT): _P._settle_now,
    (_S.ENDED, _I.LOCAL_ROLLBACK): _P._settle_now,
    (_S.ENDED, _I.RELEASED): _P._ignore,
    (_S.ENDED, _I.TIME_UP): _P._bury,
}
"""What each input does in each state.  A missing entry is somebody's mistake, and does nothing."""

_MESSAGES: Final[dict[type, BranchInput]] = {
    Prepare: _I.PREPARE,
    CommitOnePhase: _I.COMMIT_ONE_PHASE,
    Commit: _I.COMMIT,
    Rollback: _I.ROLLBACK,
    Resolve: _I.RESOLVE,
}
