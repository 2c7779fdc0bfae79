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
    Committing,
    Inquiry,
    Outcome,
    Owner,
    Prepare,
    Resolve,
    Rollback,
    Trouble,
)
from txrpc._protocol.participant import phase_one, phase_two
from txrpc._protocol.participant.branch import BranchInput, BranchRow, BranchState, Effects, Operation
from txrpc._protocol.participant.state import TOMBSTONE_MS, ParticipantState
from txrpc.errors import AbortCode, Reason
from txrpc.ids import BranchId, Gid

__all__ = ["TABLE", "AboutBranch", "Participant"]

AboutBranch = Prepare | CommitOnePhase | Commit | Rollback | Resolve
"""What a coordinator says about branches."""


class Participant:
    """The branches of one process.  Not thread-safe: the shell calls it under one lock, or on one event loop."""

    def __init__(self, jitter: Callable[[], float]) -> None:
        """*jitter* returns numbers from 0 to 1, which spread inquiries and retries."""
        self.state = ParticipantState(jitter)

    @property
    def rows(self) -> dict[BranchId, BranchRow]:
        """The branches that are known here, ended ones included, until their tombstones expire."""
        return self.state.rows

    # ------------------------------------------------------------------------------------------------------ local doors

    def open(self, gid: Gid, deadline_ms: int) -> BranchRow:
        """Enter a new branch, ACTIVE.  The caller has made sure that there is none, and that *xid* is not closed."""
        row = self.state.enter_row(gid, BranchState.ACTIVE, deadline_ms)
        self.state.by_use[gid.xid, gid.resource] = gid.branch
        return row

    def discard(self, row: BranchRow) -> None:
        """Take back `open`: the resource could not begin, so there is no work."""
        del self.state.rows[row.branch], self.state.by_use[row.xid, row.gid.resource]

    def step(self, kind: BranchInput, branch: BranchId, now_ms: int, detail: object = None) -> Effects:
        """Take a local input: a result, a release, a local commit or rollback."""
        self.state.begin(now_ms)
        _enter(self.state, kind, branch, detail)
        return self.state.out

    def woke(self, now_ms: int) -> Effects:
        """The time that `next_wakeup_ms` named has come."""
        self.state.begin(now_ms)
        while self.state.timers and self.state.timers[0][0] <= now_ms:
            _due, branch = heapq.heappop(self.state.timers)
            row = self.state.rows.get(branch)
            if row is None or row.deadline_ms > now_ms:
                continue
            if row.at_work and row.state in _PROMISED:
                phase_two.slow(self.state, row, None)
            elif not row.at_work or row.state in _UNPROMISED:
                _enter(self.state, BranchInput.TIME_UP, branch, None)
        return self.state.out

    def committing(self, branch: BranchId, token: str) -> Committing | None:
        """A commit in one phase is about to be given to the database: what to tell the coordinator first, if it asked for it."""
        return phase_one.committing(self.state, branch, token)

    # -------------------------------------------------------------------------------------------------- the coordinator

    def received(self, message: AboutBranch, now_ms: int) -> Effects:
        """Take a message of the coordinator's that concerns a branch."""
        self.state.begin(now_ms)
        kind = _MESSAGES[type(message)]
        named = message.gid if isinstance(message, Commit | Rollback) else message
        row = self.state.rows.get(named.branch)
        if row is None or row.xid == named.xid:
            _enter(self.state, kind, named.branch, message)
        elif named is message:
            # Somebody listed another transaction's branch as its own (rule 15): of that pair nothing is known here.
            TABLE[BranchState.ABSENT, kind](self.state, None, message)
        return self.state.out

    def connected(self, now_ms: int) -> Effects:
        """A session has begun: every branch in doubt asks, and those that vote just now will soon.

        The vote that they are about to give was asked for by somebody who may have aborted since, and said so to nobody.
        """
        self.state.begin(now_ms)
        for row in self.state.rows.values():
            if row.trouble is not None:
                self.state.out.send.append(Trouble(row.gid, row.trouble))
            if row.state is BranchState.PREPARED:
                phase_two.inquire(self.state, row)
            elif row.state is BranchState.VOTING:
                row.deadline_ms = min(row.deadline_ms, self.state.now_ms)
        return self.state.out

    def coordinator_is(self, owner: Owner, now_ms: int) -> Effects:
        """The coordinator of that node is in that epoch: what began under an earlier one can never be committed (rule 5).

        Unprepared branches of such transactions give their locks back now and not at their deadline.  Only branches that calls
        have reached: one that its root alone has used may still be committed without any coordinator.
        """
        self.state.begin(now_ms)
        reason = Reason(AbortCode.COORDINATOR_RESTARTED, f"coordinator {owner.node} has restarted since it began")
        for row in list(self.state.rows.values()):
            gone = row.gid.node == owner.node and row.gid.epoch != owner.epoch
            if gone and row.state is BranchState.ACTIVE and (row.calls or row.running):
                _enter(self.state, BranchInput.ROLLBACK, row.branch, Rollback(row.gid, reason))
        return self.state.out

    def abandon(self, message: Abandon, resources: Iterable[str], longest_ms: int, now_ms: int) -> Effects:
        """Roll back what there is of an aborted transaction in *resources*, and let none of its calls in for *longest_ms*."""
        self.state.begin(now_ms)
        while self.state.abandoned and self.state.abandoned[0][0] <= self.state.now_ms:
            _until, xid = self.state.abandoned.popleft()
            if self.state.closed_until_ms.get(xid, 0) <= self.state.now_ms:
                self.state.closed_until_ms.pop(xid, None)
        until_ms = self.state.now_ms + longest_ms + TOMBSTONE_MS
        self.state.closed_until_ms[message.xid] = max(until_ms, self.state.closed_until_ms.get(message.xid, 0))
        self.state.abandoned.append((until_ms, message.xid))
        for resource in resources:
            row = self.state.find(message.xid, resource)
            if row is not None and row.state is BranchState.ACTIVE:
                _enter(self.state, BranchInput.ROLLBACK, row.branch, Rollback(row.gid, message.reason))
        return self.state.out

    def in_doubt(self, gid: Gid, since_ms: int, now_ms: int) -> Effects:
        """The database holds *gid* prepared; if it is not a branch that this process is looking after, ask for it.

        A branch that was rolled back here may show up once more: its PREPARE had been cut off, and overtaken by the undoing.
        """
        self.state.begin(now_ms)
        row = self.state.rows.get(gid.branch)
        if row is None:
            self.state.out.send.append(Inquiry(gid, since_ms, 0))
        elif row.state is BranchState.ENDED and row.outcome is Outcome.ABORTED:
            phase_two.undo_prepared(self.state, row)
        return self.state.out

    def resolve_foreign(self, gid: Gid, token: str, now_ms: int) -> Effects:
        """Ask the database for the end of a commit in one phase that another process had begun."""
        self.state.begin(now_ms)
        if gid.branch in self.state.rows:
            _enter(self.state, BranchInput.RESOLVE, gid.branch, Resolve(gid.xid, gid.branch, gid.resource, token))
        else:
            row = self.state.enter_row(gid, BranchState.RESOLVING, now_ms)
            row.token = token
            self.state.do(Operation.ONE_PHASE_RESULT, row)
        return self.state.out


def _enter(state: ParticipantState, kind: BranchInput, branch: BranchId, detail: object) -> None:
    row = state.rows.get(branch)
    before = BranchState.ABSENT if row is None else row.state
    action = TABLE.get((before, kind))
    if action is None:
        return
    if row is not None and kind in _RESULTS:
        row.at_work = False
        if row.trouble is not None and kind is not BranchInput.FINISH_FAILED:
            row.trouble = None
            state.out.send.append(Trouble(row.gid, None))
    action(state, row, detail)


def _ignore(state: ParticipantState, row: object, detail: object) -> None:
    """Late, repeated, or answered when the work under way ends."""


_Action = Callable[[ParticipantState, Any, Any], None]
_S = BranchState
_I = BranchInput

TABLE: Final[dict[tuple[BranchState, BranchInput], _Action]] = {
    (_S.ABSENT, _I.PREPARE): phase_one.prepare_unknown,
    (_S.ABSENT, _I.COMMIT_ONE_PHASE): phase_one.one_phase_unknown,
    (_S.ABSENT, _I.COMMIT): phase_two.commit_foreign,
    (_S.ABSENT, _I.ROLLBACK): phase_two.rollback_foreign,
    (_S.ABSENT, _I.RESOLVE): phase_two.resolve_absent,
    (_S.ACTIVE, _I.PREPARE): phase_one.prepare,
    (_S.ACTIVE, _I.COMMIT_ONE_PHASE): phase_one.one_phase,
    (_S.ACTIVE, _I.ROLLBACK): phase_two.rollback_active,
    (_S.ACTIVE, _I.RESOLVE): phase_two.resolve_active,
    (_S.ACTIVE, _I.LOCAL_COMMIT): phase_one.local_commit,
    (_S.ACTIVE, _I.LOCAL_ROLLBACK): phase_two.local_rollback,
    (_S.ACTIVE, _I.TIME_UP): phase_two.deadline,
    (_S.VOTING, _I.PREPARE): _ignore,
    (_S.VOTING, _I.ROLLBACK): phase_two.rollback_voting,
    (_S.VOTING, _I.LOCAL_ROLLBACK): phase_two.give_up_voting,
    (_S.VOTING, _I.TIME_UP): phase_two.overdue,
    (_S.VOTING, _I.PREPARED): phase_one.did_prepare,
    (_S.VOTING, _I.READ_ONLY): phase_one.was_read_only,
    (_S.VOTING, _I.PREPARE_FAILED): phase_one.prepare_failed,
    (_S.PREPARED, _I.PREPARE): phase_one.prepare_again,
    (_S.PREPARED, _I.COMMIT): phase_two.commit,
    (_S.PREPARED, _I.ROLLBACK): phase_two.rollback_prepared,
    (_S.PREPARED, _I.LOCAL_ROLLBACK): phase_two.give_up_prepared,
    (_S.PREPARED, _I.TIME_UP): phase_two.ask_again,
    (_S.ONE_PHASE, _I.COMMIT_ONE_PHASE): _ignore,
    (_S.ONE_PHASE, _I.ROLLBACK): _ignore,
    (_S.ONE_PHASE, _I.RESOLVE): _ignore,
    (_S.ONE_PHASE, _I.TIME_UP): phase_two.overdue,
    (_S.ONE_PHASE, _I.ONE_PHASE_ENDED): phase_one.one_phase_ended,
    (_S.COMMITTING, _I.COMMIT): _ignore,
    (_S.COMMITTING, _I.TIME_UP): phase_two.try_commit_again,
    (_S.COMMITTING, _I.FINISHED): phase_two.finished_commit,
    (_S.COMMITTING, _I.FINISH_FAILED): phase_two.finish_failed,
    (_S.ABORTING, _I.PREPARE): phase_one.prepare_late,
    (_S.ABORTING, _I.ROLLBACK): _ignore,
    (_S.ABORTING, _I.LOCAL_ROLLBACK): phase_two.settle_later,
    (_S.ABORTING, _I.TIME_UP): phase_two.try_undo_again,
    (_S.ABORTING, _I.FINISHED): phase_two.finished_undo,
    (_S.ABORTING, _I.FINISH_FAILED): phase_two.finish_failed,
    (_S.ROLLING_BACK, _I.PREPARE): phase_one.prepare_late,
    (_S.ROLLING_BACK, _I.COMMIT_ONE_PHASE): phase_one.one_phase_undone,
    (_S.ROLLING_BACK, _I.ROLLBACK): _ignore,
    (_S.ROLLING_BACK, _I.RESOLVE): phase_two.resolve_later,
    (_S.ROLLING_BACK, _I.LOCAL_COMMIT): phase_two.settle_later,
    (_S.ROLLING_BACK, _I.LOCAL_ROLLBACK): phase_two.settle_later,
    (_S.ROLLING_BACK, _I.RELEASED): phase_two.released,
    (_S.ROLLING_BACK, _I.TIME_UP): phase_two.break_off,
    (_S.ROLLING_BACK, _I.ROLLED_BACK): phase_two.rolled_back,
    (_S.RESOLVING, _I.RESOLVE): _ignore,
    (_S.RESOLVING, _I.TIME_UP): phase_two.try_resolve_again,
    (_S.RESOLVING, _I.ONE_PHASE_ENDED): phase_two.resolved,
    (_S.RESOLVING, _I.FINISH_FAILED): phase_two.finish_failed,
    (_S.ENDED, _I.PREPARE): phase_one.prepare_late,
    (_S.ENDED, _I.COMMIT_ONE_PHASE): phase_one.one_phase_again,
    (_S.ENDED, _I.COMMIT): phase_two.commit_again,
    (_S.ENDED, _I.ROLLBACK): _ignore,
    (_S.ENDED, _I.RESOLVE): phase_two.resolve_ended,
    (_S.ENDED, _I.LOCAL_COMMIT): phase_two.settle_now,
    (_S.ENDED, _I.LOCAL_ROLLBACK): phase_two.settle_now,
    (_S.ENDED, _I.RELEASED): _ignore,
    (_S.ENDED, _I.TIME_UP): phase_two.expire,
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
