"""How branches answer the question that ends their work: prepare and vote, or commit in one phase.

Each function is one entry, or a shared part, of the participant's table.
"""

from __future__ import annotations

from typing import Final

from txrpc._protocol.deciding import Decide, Decided
from txrpc._protocol.messages import (
    CommitOnePhase,
    Committing,
    OnePhaseDone,
    Outcome,
    Prepare,
    Vote,
    Voted,
)
from txrpc._protocol.participant import phase_two
from txrpc._protocol.participant.branch import BranchState, Deciding, Operation, ParticipantBranch
from txrpc._protocol.participant.state import ParticipantState
from txrpc.errors import AbortCode, Reason
from txrpc.ids import BranchId

__all__ = [
    "committing",
    "decide",
    "decide_again",
    "did_prepare",
    "kept_open",
    "local_commit",
    "one_phase",
    "one_phase_again",
    "one_phase_ended",
    "one_phase_undone",
    "one_phase_unknown",
    "prepare",
    "prepare_again",
    "prepare_failed",
    "prepare_late",
    "prepare_unknown",
    "vote_early",
    "was_read_only",
]

_ASK_AFTER_MS: Final = 1_000
"""How long at least a prepared branch waits for the decision before it asks."""

_LOST: Final = Reason(AbortCode.BRANCH_UNKNOWN, "the process that did this work has restarted, or the branch has ended")


# ------------------------------------------------------------------------------------------------------- two phases


def prepare(state: ParticipantState, row: ParticipantBranch, message: Prepare) -> None:
    # From here on no call of the transaction may come in (rule 10): what is voted for must stay what it is.
    state.close(row)
    _prepare_or_object(state, row, message.calls)


def vote_early(state: ParticipantState, row: ParticipantBranch, _: object) -> None:
    """The transaction calls this process no more, as its caller says: prepare, and give the vote to the call that is ending.

    No Prepare says what the root saw; the vote says how many calls there were, and the root compares (rule 9).
    """
    state.close(row)
    row.early = True
    _prepare_or_object(state, row, row.calls)


def _prepare_or_object(state: ParticipantState, row: ParticipantBranch, calls: int) -> None:
    reason = _objection(state, row, calls)
    if reason is None:
        row.state = BranchState.VOTING
        state.do(Operation.PREPARE, row)
    else:
        _vote(state, row, Vote.ABORT, reason)
        phase_two.undo_work(state, row, reason)


def _objection(state: ParticipantState, row: ParticipantBranch, calls: int) -> Reason | None:
    """Return why this branch may not be committed, or None (rule 9)."""
    if row.doom is not None:
        return row.doom
    if row.users and row.local:
        text = f"a session() or connection() block of {row.gid.resource} is still running: leave it before the end"
        return Reason(AbortCode.CALLS_DIFFER, text)
    if row.users or row.running:
        return Reason(AbortCode.CALLS_DIFFER, f"a call of the transaction is still running in {row.gid.resource}")
    if row.calls != calls:
        text = (
            f"{row.gid.resource} completed {row.calls} calls, the root saw {calls}: one ran twice, or its end was lost"
        )
        return Reason(AbortCode.CALLS_DIFFER, text)
    return None


def _vote(state: ParticipantState, row: ParticipantBranch, vote: Vote, reason: Reason | None = None) -> None:
    # Told once the database has answered, never before (rule 4); a lost vote is asked for again, or aborts.
    first, row.voted = row.voted is None, vote
    if row.early and first:
        state.out.votes.append((row.branch, vote, reason))
    else:
        state.out.send.append(Voted(row.xid, row.branch, vote, reason, row.token, row.gid.register))


def _withdraw(state: ParticipantState, row: ParticipantBranch) -> None:
    """A rollback was asked for while the database prepared: the call that waits for an early vote must not wait for ever."""
    if row.early and row.voted is None:
        _vote(state, row, Vote.ABORT, row.rollback_asked)


def prepare_unknown(state: ParticipantState, row: None, message: Prepare) -> None:
    # Rule 8: another incarnation of this process did that work, and it died with it.
    state.out.send.append(Voted(message.xid, message.branch, Vote.ABORT, _LOST))


def prepare_again(state: ParticipantState, row: ParticipantBranch, message: Prepare) -> None:
    # Rule 12: the same question has the same answer.
    _vote(state, row, Vote.PREPARED)


def prepare_late(state: ParticipantState, row: ParticipantBranch, message: Prepare) -> None:
    if row.outcome is Outcome.COMMITTED and row.voted is not None:
        _vote(state, row, row.voted)  # a question asked twice gets one answer
    else:
        _vote(state, row, Vote.ABORT, row.why or Reason(AbortCode.BRANCH_UNKNOWN, "the branch has ended"))


def did_prepare(state: ParticipantState, row: ParticipantBranch, token: str) -> None:
    # Rule 4: the promise is durable in the database; only the coordinator ends it now.
    row.token = token
    row.in_doubt_ms = state.now_ms
    if row.rollback_asked is not None:
        _withdraw(state, row)
        phase_two.undo_prepared(state, row)
        return
    row.state = BranchState.PREPARED
    _vote(state, row, Vote.PREPARED)
    state.wake_in(row, max(row.deadline_ms - state.now_ms, _ASK_AFTER_MS))


def was_read_only(state: ParticipantState, row: ParticipantBranch, _: object) -> None:
    # Nothing to commit and nothing to undo: it has ended, whatever is decided elsewhere.
    if row.rollback_asked is None:
        _vote(state, row, Vote.READ_ONLY)
        state.end(row, Outcome.COMMITTED)
    else:
        _withdraw(state, row)
        phase_two.tell_local(state, row, Outcome.ABORTED)
        state.end(row, Outcome.ABORTED)


def kept_open(state: ParticipantState, row: ParticipantBranch, _: object) -> None:
    # It wrote nothing, but gives its snapshot and its locks up only when the work elsewhere is done: Prepare will ask for its vote.
    if not row.early:
        was_read_only(state, row, None)  # nothing else was asked for
    elif row.rollback_asked is None:
        row.early, row.state = False, BranchState.ACTIVE
        state.out.votes.append((row.branch, None, None))
    else:
        _withdraw(state, row)
        phase_two.undo_work(state, row, row.rollback_asked)


def prepare_failed(state: ParticipantState, row: ParticipantBranch, reason: Reason) -> None:
    # A PREPARE that failed may have prepared all the same (a lost answer): ROLLBACK PREPARED until it is proven gone.
    row.vote_reason = reason
    if row.rollback_asked is None:
        _vote(state, row, Vote.ABORT, reason)
    else:
        _withdraw(state, row)
    phase_two.undo_prepared(state, row)


# -------------------------------------------------------------------------------------------------------- one phase


def decide(state: ParticipantState, row: ParticipantBranch, message: Decide) -> None:
    """All others have voted: commit, and in the same transaction of the database write down that all is committed."""
    row.decides = message.branches
    elsewhere = None
    if row.gid.register != message.register:
        elsewhere = Reason(AbortCode.PROTOCOL_VIOLATION, "it is to be decided in another register than it began under")
    one_phase(state, row, message, elsewhere)


def one_phase(
    state: ParticipantState,
    row: ParticipantBranch,
    message: CommitOnePhase | Decide,
    refused: Reason | None = None,
) -> None:
    # Rule 9 here as well: a branch that saw other calls than the root must not commit by itself.
    state.close(row)
    reason = refused or _objection(state, row, message.calls)
    if reason is None:
        row.state = BranchState.ONE_PHASE
        state.do(Operation.COMMIT_ONE_PHASE, row)
    else:
        state.out.send.append(OnePhaseDone(row.xid, row.branch, Outcome.ABORTED, reason))
        phase_two.undo_work(state, row, reason)


def decide_again(state: ParticipantState, row: ParticipantBranch, message: Decide) -> None:
    if row.decides is None:
        reason = Reason(AbortCode.PROTOCOL_VIOLATION, "it had ended before it was to decide")
        state.out.send.append(OnePhaseDone(row.xid, row.branch, Outcome.ABORTED, reason))
    else:
        one_phase_again(state, row, message)


def one_phase_unknown(state: ParticipantState, row: None, message: CommitOnePhase | Decide) -> None:
    state.out.send.append(OnePhaseDone(message.xid, message.branch, Outcome.ABORTED, _LOST))


def one_phase_again(state: ParticipantState, row: ParticipantBranch, message: CommitOnePhase | Decide) -> None:
    state.out.send.append(OnePhaseDone(row.xid, row.branch, row.outcome, row.why))


def local_commit(state: ParticipantState, row: ParticipantBranch, order: int | Deciding | None) -> None:
    # Rule 21: no coordinator is asked; the outcome is learnt from this process and its database.
    state.close(row)
    row.local = True
    calls = order.calls if isinstance(order, Deciding) else order
    row.decides = order.branches if isinstance(order, Deciding) else None
    # The root's own use counts nothing; calls that came in through a service are counted like everywhere.
    reason = _objection(state, row, row.calls if calls is None else calls)
    if reason is None:
        row.state = BranchState.ONE_PHASE
        state.do(Operation.COMMIT_ONE_PHASE, row)
    else:
        row.vote_reason = reason
        phase_two.undo_work(state, row, reason)


def committing(state: ParticipantState, branch: BranchId, token: str) -> Committing | None:
    """COMMIT is about to be sent to the database: what the coordinator must know in case this process dies now."""
    row = state.rows[branch]
    row.token = token
    return None if row.local else Committing(row.xid, branch, token)


def one_phase_undone(state: ParticipantState, row: ParticipantBranch, message: CommitOnePhase | Decide) -> None:
    state.out.send.append(OnePhaseDone(row.xid, row.branch, Outcome.ABORTED, row.doom))


def one_phase_ended(state: ParticipantState, row: ParticipantBranch, detail: tuple[Outcome, Reason | None]) -> None:
    # UNKNOWN is told as such: the asker has the token, and asks again when the database is back (rule 13).
    result, reason = detail
    row.vote_reason = reason
    if row.local and row.decides and result is Outcome.COMMITTED and row.gid.register is not None:
        # Rule 3: the decision is durable.  Should this get lost, its row is found when the register is looked through.
        state.out.send.append(Decided(row.gid.register, row.xid, row.decides))
    if row.local:
        state.out.settle.append((row.branch, result, reason))
    else:
        state.out.send.append(OnePhaseDone(row.xid, row.branch, result, reason))
    state.end(row, result)
