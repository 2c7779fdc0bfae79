"""The participant: the branches of one process, from first use to tombstone, as a table.

How to think of it
    `open` enters a branch; calls use it and complete; then the coordinator's messages, the clock and the results of database
    operations arrive as inputs, and `TABLE` says what each does in each state.  Operations run elsewhere; their results come
    back as inputs.  A branch has at most one operation at work (until its result has come the clock does not speak to it),
    and a prepared branch never ends by itself (rule 4).

The rules that live here (the design's section 5)
    4   PREPARED has no way out but the coordinator's word.
    8   a branch that this process does not know votes ABORT: its work was lost with the process that did it.
    9   a branch whose completed calls differ from what the root saw, or that is being used, votes ABORT.
    10  an ended branch stays as a tombstone past its deadline, and so does its transaction: late calls are refused.
    11  an ACTIVE branch rolls back at its deadline; if somebody is using its work just then, that use is interrupted.

After a failed PREPARE nobody knows whether the database holds the branch: the vote is ABORT, and ROLLBACK PREPARED is repeated
until the database confirms that there is nothing (left) to end.

Where things are
    `branch` has the words and the row, `ledger` the rows and the plumbing, `voting` and `finishing` the actions that `TABLE`
    names, and this module the doors and the table.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable
from typing import Any, Final

from txrpc._protocol.messages import (
    Abandon,
    Commit,
    CommitOnePhase,
    Inquiry,
    Outcome,
    Owner,
    Prepare,
    Resolve,
    Rollback,
    Trouble,
)
from txrpc._protocol.participant.branch import BranchInput, BranchRow, BranchState, Effects, Operation
from txrpc._protocol.participant.phase_one import Voting
from txrpc._protocol.participant.state import TOMBSTONE_MS
from txrpc.errors import AbortCode, Reason
from txrpc.ids import BranchId, Gid

__all__ = ["TABLE", "AboutBranch", "Participant"]

AboutBranch = Prepare | CommitOnePhase | Commit | Rollback | Resolve
"""What a coordinator says about branches."""


class Participant(Voting):
    """The branches of one process.  Not thread-safe: the shell calls it under one lock, or on one event loop."""

    # ------------------------------------------------------------------------------------------------------ local doors

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

    def woke(self, now_ms: int) -> Effects:
        """The time that `next_wakeup_ms` named has come."""
        self._begin(now_ms)
        while self._timers and self._timers[0][0] <= now_ms:
            _due, branch = heapq.heappop(self._timers)
            row = self.rows.get(branch)
            if row is None or row.deadline_ms > now_ms:
                continue
            if row.at_work and row.state in _PROMISED:
                self._slow(row, None)
            elif not row.at_work or row.state in _UNPROMISED:
                self._enter(BranchInput.TIME_UP, branch, None)
        return self._out

    # -------------------------------------------------------------------------------------------------- the coordinator

    def received(self, message: AboutBranch, now_ms: int) -> Effects:
        """Take a message of the coordinator's that concerns a branch."""
        self._begin(now_ms)
        kind = _MESSAGES[type(message)]
        named = message.gid if isinstance(message, Commit | Rollback) else message
        row = self.rows.get(named.branch)
        if row is None or row.xid == named.xid:
            self._enter(kind, named.branch, message)
        elif named is message:
            # Somebody listed another transaction's branch as its own (rule 15): of that pair nothing is known here.
            TABLE[BranchState.ABSENT, kind](self, None, message)
        return self._out

    def connected(self, now_ms: int) -> Effects:
        """A session has begun: every branch in doubt asks, and those that vote just now will soon.

        The vote that they are about to give was asked for by somebody who may have aborted since, and said so to nobody.
        """
        self._begin(now_ms)
        for row in self.rows.values():
            if row.trouble is not None:
                self._out.send.append(Trouble(row.gid, row.trouble))
            if row.state is BranchState.PREPARED:
                self._inquire(row)
            elif row.state is BranchState.VOTING:
                row.deadline_ms = min(row.deadline_ms, self._now_ms)
        return self._out

    def coordinator_is(self, owner: Owner, now_ms: int) -> Effects:
        """The coordinator of that node is in that epoch: what began under an earlier one can never be committed (rule 5).

        Unprepared branches of such transactions give their locks back now and not at their deadline.  Only branches that calls
        have reached: one that its root alone has used may still be committed without any coordinator.
        """
        self._begin(now_ms)
        reason = Reason(AbortCode.COORDINATOR_RESTARTED, f"coordinator {owner.node} has restarted since it began")
        for row in list(self.rows.values()):
            gone = row.gid.node == owner.node and row.gid.epoch != owner.epoch
            if gone and row.state is BranchState.ACTIVE and (row.calls or row.running):
                self._enter(BranchInput.ROLLBACK, row.branch, Rollback(row.gid, reason))
        return self._out

    def abandon(self, message: Abandon, resources: Iterable[str], longest_ms: int, now_ms: int) -> Effects:
        """Roll back what there is of an aborted transaction in *resources*, and let none of its calls in for *longest_ms*."""
        self._begin(now_ms)
        while self._abandoned and self._abandoned[0][0] <= self._now_ms:
            _until, xid = self._abandoned.popleft()
            if self._closed.get(xid, 0) <= self._now_ms:
                self._closed.pop(xid, None)
        until_ms = self._now_ms + longest_ms + TOMBSTONE_MS
        self._closed[message.xid] = max(until_ms, self._closed.get(message.xid, 0))
        self._abandoned.append((until_ms, message.xid))
        for resource in resources:
            row = self.find(message.xid, resource)
            if row is not None and row.state is BranchState.ACTIVE:
                self._enter(BranchInput.ROLLBACK, row.branch, Rollback(row.gid, message.reason))
        return self._out

    def in_doubt(self, gid: Gid, since_ms: int, now_ms: int) -> Effects:
        """The database holds *gid* prepared; if it is not a branch that this process is looking after, ask for it.

        A branch that was rolled back here may show up once more: its PREPARE had been cut off, and overtaken by the undoing.
        """
        self._begin(now_ms)
        row = self.rows.get(gid.branch)
        if row is None:
            self._out.send.append(Inquiry(gid, since_ms, 0))
        elif row.state is BranchState.ENDED and row.outcome is Outcome.ABORTED:
            self._undo_prepared(row)
        return self._out

    def resolve_foreign(self, gid: Gid, token: str, now_ms: int) -> Effects:
        """Ask the database for the end of a commit in one phase that another process had begun."""
        self._begin(now_ms)
        if gid.branch in self.rows:
            self._enter(BranchInput.RESOLVE, gid.branch, Resolve(gid.xid, gid.branch, gid.resource, token))
        else:
            row = self._enter_row(gid, BranchState.RESOLVING, now_ms)
            row.token = token
            self._do(Operation.ONE_PHASE_RESULT, row)
        return self._out

    def _enter(self, kind: BranchInput, branch: BranchId, detail: object) -> None:
        row = self.rows.get(branch)
        state = BranchState.ABSENT if row is None else row.state
        action = TABLE.get((state, kind))
        if action is not None:
            if row is not None and kind in _RESULTS:
                row.at_work = False
                if row.trouble is not None and kind is not BranchInput.FINISH_FAILED:
                    row.trouble = None
                    self._out.send.append(Trouble(row.gid, None))
            action(self, row, detail)


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
    (_S.VOTING, _I.LOCAL_ROLLBACK): _P._give_up_voting,
    (_S.VOTING, _I.TIME_UP): _P._overdue,
    (_S.VOTING, _I.PREPARED): _P._did_prepare,
    (_S.VOTING, _I.READ_ONLY): _P._was_read_only,
    (_S.VOTING, _I.PREPARE_FAILED): _P._prepare_failed,
    (_S.PREPARED, _I.PREPARE): _P._prepare_again,
    (_S.PREPARED, _I.COMMIT): _P._commit,
    (_S.PREPARED, _I.ROLLBACK): _P._rollback_prepared,
    (_S.PREPARED, _I.LOCAL_ROLLBACK): _P._give_up_prepared,
    (_S.PREPARED, _I.TIME_UP): _P._ask_again,
    (_S.ONE_PHASE, _I.COMMIT_ONE_PHASE): _P._ignore,
    (_S.ONE_PHASE, _I.ROLLBACK): _P._ignore,
    (_S.ONE_PHASE, _I.RESOLVE): _P._ignore,
    (_S.ONE_PHASE, _I.TIME_UP): _P._overdue,
    (_S.ONE_PHASE, _I.ONE_PHASE_ENDED): _P._one_phase_ended,
    (_S.COMMITTING, _I.COMMIT): _P._ignore,
    (_S.COMMITTING, _I.TIME_UP): _P._try_commit_again,
    (_S.COMMITTING, _I.FINISHED): _P._finished_commit,
    (_S.COMMITTING, _I.FINISH_FAILED): _P._finish_failed,
    (_S.ABORTING, _I.PREPARE): _P._prepare_late,
    (_S.ABORTING, _I.ROLLBACK): _P._ignore,
    (_S.ABORTING, _I.LOCAL_ROLLBACK): _P._settle_later,
    (_S.ABORTING, _I.TIME_UP): _P._try_undo_again,
    (_S.ABORTING, _I.FINISHED): _P._finished_undo,
    (_S.ABORTING, _I.FINISH_FAILED): _P._finish_failed,
    (_S.ROLLING_BACK, _I.PREPARE): _P._prepare_late,
    (_S.ROLLING_BACK, _I.COMMIT_ONE_PHASE): _P._one_phase_undone,
    (_S.ROLLING_BACK, _I.ROLLBACK): _P._ignore,
    (_S.ROLLING_BACK, _I.RESOLVE): _P._resolve_later,
    (_S.ROLLING_BACK, _I.LOCAL_COMMIT): _P._settle_later,
    (_S.ROLLING_BACK, _I.LOCAL_ROLLBACK): _P._settle_later,
    (_S.ROLLING_BACK, _I.RELEASED): _P._released,
    (_S.ROLLING_BACK, _I.TIME_UP): _P._break_off,
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
    (_S.ENDED, _I.TIME_UP): _P._expire,
}
"""What each input does in each state.  A missing entry is somebody's mistake, and does nothing."""

_MESSAGES: Final[dict[type, BranchInput]] = {
    Prepare: _I.PREPARE,
    CommitOnePhase: _I.COMMIT_ONE_PHASE,
    Commit: _I.COMMIT,
    Rollback: _I.ROLLBACK,
    Resolve: _I.RESOLVE,
}

_UNPROMISED: Final = frozenset({_S.VOTING, _S.ONE_PHASE})
"""What is under way here may be broken off at the deadline; everything else that is must be waited for."""

_PROMISED: Final = frozenset({_S.COMMITTING, _S.ABORTING, _S.RESOLVING})
"""What is under way here may take its time, and is trouble when it does (rule 20)."""

_RESULTS: Final = frozenset(
    {_I.PREPARED, _I.READ_ONLY, _I.PREPARE_FAILED, _I.ONE_PHASE_ENDED, _I.FINISHED, _I.FINISH_FAILED, _I.ROLLED_BACK}
)
"""What ends an operation's work."""
