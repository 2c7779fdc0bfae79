"""How branches end: phase two, undoing, the deadline, and the questions of whom the answer did not reach.

Each function is one entry, or a shared part, of the participant's table. Undoing comes in two kinds: work that was
never prepared is rolled back (`undo_work`), and what the database may hold prepared is ended by its identifier
(`undo_prepared`).
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
from txrpc._protocol.participant.branch import BranchState, Do, Operation, ParticipantBranch
from txrpc._protocol.participant.state import TOMBSTONE_MS, ParticipantState
from txrpc.errors import AbortCode, Reason

__all__ = [
    "ask_again",
    "break_off",
    "commit",
    "commit_again",
    "commit_foreign",
    "deadline",
    "expire",
    "finish_failed",
    "finished_commit",
    "finished_undo",
    "give_up_prepared",
    "give_up_voting",
    "inquire",
    "local_rollback",
    "overdue",
    "released",
    "resolve_absent",
    "resolve_active",
    "resolve_ended",
    "resolve_later",
    "resolved",
    "rollback_active",
    "rollback_foreign",
    "rollback_prepared",
    "rollback_voting",
    "rolled_back",
    "settle_later",
    "settle_now",
    "slow",
    "tell_local",
    "try_commit_again",
    "try_resolve_again",
    "try_undo_again",
    "undo_prepared",
    "undo_work",
]

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


# -------------------------------------------------------------------------------------------------------- phase two


def commit(state: ParticipantState, row: ParticipantBranch, message: Commit) -> None:
    # The gid is proof enough: the coordinator may tell any process that reaches the database (rule 4).
    row.state = BranchState.COMMITTING
    row.token = row.token or message.token
    state.do(Operation.COMMIT_PREPARED, row)


def commit_foreign(state: ParticipantState, row: None, message: Commit) -> None:
    commit(state, state.enter_row(message.gid, BranchState.PREPARED, state.now_ms), message)


def commit_again(state: ParticipantState, row: ParticipantBranch, message: Commit) -> None:
    # Rule 12; a branch that had been rolled back says so, which is a heuristic outcome (rule 1).
    finish = row.finish if row.outcome is Outcome.COMMITTED else FinishResult.HEURISTIC
    state.out.send.append(Acked(row.xid, row.branch, finish, row.gid.resource))


def rollback_voting(state: ParticipantState, row: ParticipantBranch, message: Rollback) -> None:
    # PREPARE is on its way, so its answer is waited for: what it has prepared must be undone by its identifier.
    row.rollback_asked = row.rollback_asked or message.reason


def rollback_prepared(state: ParticipantState, row: ParticipantBranch, message: Rollback) -> None:
    row.rollback_asked = message.reason
    row.token = row.token or message.token
    undo_prepared(state, row)


def rollback_foreign(state: ParticipantState, row: None, message: Rollback) -> None:
    rollback_prepared(state, state.enter_row(message.gid, BranchState.PREPARED, state.now_ms), message)


def undo_prepared(state: ParticipantState, row: ParticipantBranch) -> None:
    row.state = BranchState.ABORTING
    state.do(Operation.ROLLBACK_PREPARED, row)


def finished_commit(state: ParticipantState, row: ParticipantBranch, finish: FinishResult) -> None:
    state.out.send.append(Acked(row.xid, row.branch, finish, row.gid.resource))
    if not finish.is_proof:
        # Still in doubt, as far as this process can tell: another one may reach the right database, or this one later.
        row.state, row.finish = BranchState.PREPARED, finish
        state.wake_in(row, int(ASK_AGAIN_MS * (0.5 + state.jitter())))
        return
    row.finish = finish
    tell_local(state, row, Outcome.COMMITTED)
    state.end(row, Outcome.COMMITTED)


def finished_undo(state: ParticipantState, row: ParticipantBranch, finish: FinishResult) -> None:
    # Presumed abort: no process waits for this, whatever the database has answered.
    if finish is FinishResult.HEURISTIC:
        # An abort needs no acknowledgement (presumed abort); this one is for the operator.
        state.out.send.append(Acked(row.xid, row.branch, finish, row.gid.resource))
    row.finish = finish
    tell_local(state, row, Outcome.ABORTED)
    state.end(row, Outcome.ABORTED)


def finish_failed(state: ParticipantState, row: ParticipantBranch, reason: Reason) -> None:
    # Rule 20: reported at the first, second, fourth ... failure, repeated for ever; a promise is not given up (rule 4).
    wait_ms = _RETRY_MS[min(row.attempts, len(_RETRY_MS) - 1)]
    row.attempts += 1
    state.wake_in(row, int(wait_ms * (0.5 + state.jitter())))
    if row.attempts & (row.attempts - 1) == 0:  # the first, second, fourth ... failure
        _trouble(state, row, reason)


def _trouble(state: ParticipantState, row: ParticipantBranch, reason: Reason) -> None:
    """Tell the coordinator, and the reader of this process's log, what keeps the branch from ending (rule 20)."""
    row.trouble = Reason(reason.code, f"cannot {_TO_DO[row.state]} the branch in {row.gid.resource}: {reason.text}")
    state.out.send.append(Trouble(row.gid, row.trouble))


def slow(state: ParticipantState, row: ParticipantBranch, _: object) -> None:
    """The database has not answered yet; there is nothing to do but to say so."""
    waited_ms = state.now_ms - row.working_ms
    text = f"its database has not answered for {waited_ms / 1000:.0f} s"
    _trouble(state, row, Reason(AbortCode.RESOURCE_UNAVAILABLE, text))
    state.wake_in(row, waited_ms)


def try_commit_again(state: ParticipantState, row: ParticipantBranch, _: object) -> None:
    state.do(Operation.COMMIT_PREPARED, row)


def try_undo_again(state: ParticipantState, row: ParticipantBranch, _: object) -> None:
    state.do(Operation.ROLLBACK_PREPARED, row)


# -------------------------------------------------------------------------------------------------- unprepared work


def rollback_active(state: ParticipantState, row: ParticipantBranch, message: Rollback) -> None:
    state.close(row)
    undo_work(state, row, message.reason)


def local_rollback(state: ParticipantState, row: ParticipantBranch, reason: Reason) -> None:
    row.local = True
    state.close(row)
    undo_work(state, row, reason)


def deadline(state: ParticipantState, row: ParticipantBranch, _: object) -> None:
    # Rule 11: unprepared work frees its locks and its connection by itself, whichever process is gone.
    state.close(row)
    undo_work(
        state, row, Reason(AbortCode.TIMED_OUT, f"the deadline passed with the branch in {row.gid.resource} open")
    )


def give_up_voting(state: ParticipantState, row: ParticipantBranch, reason: Reason) -> None:
    """The root gives up while its own branch prepares: nothing has been promised yet."""
    row.local = True
    row.rollback_asked = row.rollback_asked or reason


def overdue(state: ParticipantState, row: ParticipantBranch, _: object) -> None:
    """PREPARE or COMMIT hangs past the deadline, and its locks with it (rule 11): a constraint waits, a connection is dead.

    What began in the last moment is given a while; then it is broken off in the database, again and again.  Its result still
    comes, and says what became of the branch.
    """
    if state.now_ms >= row.deadline_ms + _OVERDUE_MS:
        state.out.do.append(Do(Operation.INTERRUPT, row.gid, row.token))
        if row.trouble is None and not row.local:
            text = "its deadline has passed, and its database has not answered"
            _trouble(state, row, Reason(AbortCode.TIMED_OUT, text))
    heapq.heappush(state.timers, (state.now_ms + _OVERDUE_MS, row.branch))


def give_up_prepared(state: ParticipantState, row: ParticipantBranch, _: Reason) -> None:
    """The root gives up with its own branch prepared: it will ask for no commit, but only the coordinator may say so."""
    row.local = True
    inquire(state, row)


def undo_work(state: ParticipantState, row: ParticipantBranch, reason: Reason) -> None:
    # Work in use is interrupted first, and rolled back when its user has let go: a connection has one user at a time.
    row.doom = row.doom or reason
    row.state = BranchState.ROLLING_BACK
    if row.users:
        break_off(state, row, None)
        # The waiter may be the very thread that uses it; it can end in one way only by now.
        tell_local(state, row, Outcome.ABORTED)
        row.local = False
    else:
        state.do(Operation.ROLLBACK, row)


def break_off(state: ParticipantState, row: ParticipantBranch, _: object) -> None:
    """Break a use off, again and again until it has ended (rule 11): one try may fail, and the use would keep its locks."""
    if row.users:
        state.do(Operation.INTERRUPT, row)
        state.wake_in(row, _OVERDUE_MS)


def released(state: ParticipantState, row: ParticipantBranch, _: object) -> None:
    if not row.at_work:
        state.do(Operation.ROLLBACK, row)


def rolled_back(state: ParticipantState, row: ParticipantBranch, _: object) -> None:
    # Nothing is told to the coordinator: an abort needs no acknowledgement.
    tell_local(state, row, Outcome.ABORTED)
    if row.ask_resolved:
        state.out.send.append(Resolved(row.xid, row.branch, Outcome.ABORTED))
    state.end(row, Outcome.ABORTED)


def settle_later(state: ParticipantState, row: ParticipantBranch, _: object) -> None:
    row.local = True


def settle_now(state: ParticipantState, row: ParticipantBranch, _: object) -> None:
    row.local = True
    tell_local(state, row, row.outcome)


def tell_local(state: ParticipantState, row: ParticipantBranch, result: Outcome) -> None:
    if row.local:
        state.out.settle.append((row.branch, result, None if result is Outcome.COMMITTED else row.why))


# -------------------------------------------------------------------------------------------- questions, tombstones


def ask_again(state: ParticipantState, row: ParticipantBranch, _: object) -> None:
    # Rule 4: it asks for ever, at a slow, jittered pace, and never decides.
    inquire(state, row)
    state.wake_in(row, int(ASK_AGAIN_MS * (0.5 + state.jitter())))


def inquire(state: ParticipantState, row: ParticipantBranch) -> None:
    # The time left tells the coordinator whether the root may still ask for the commit (rule 5).
    asked_by_ms = 0 if row.local else state.closed_until_ms.get(row.xid, 0) - TOMBSTONE_MS
    left_ms = max(0, asked_by_ms - state.now_ms)
    state.out.send.append(Inquiry(row.gid, state.now_ms - row.in_doubt_ms, left_ms))


def resolve_active(state: ParticipantState, row: ParticipantBranch, message: Resolve) -> None:
    """The request to commit in one phase never came, and who asked for it wants to know: now it never will be done."""
    row.ask_resolved = True
    state.close(row)
    undo_work(state, row, Reason(AbortCode.COORDINATOR_RESTARTED, "the commit request was lost"))


def resolve_later(state: ParticipantState, row: ParticipantBranch, message: Resolve) -> None:
    row.ask_resolved = True


def resolve_ended(state: ParticipantState, row: ParticipantBranch, message: Resolve) -> None:
    if row.outcome is Outcome.UNKNOWN and row.token:
        # The database could not be asked then, and may be back (rule 13).
        row.state = BranchState.RESOLVING
        state.do(Operation.ONE_PHASE_RESULT, row)
        return
    state.out.send.append(Resolved(row.xid, row.branch, row.outcome))


def resolve_absent(state: ParticipantState, row: None, message: Resolve) -> None:
    """Without the token the database cannot be asked."""
    state.out.send.append(Resolved(message.xid, message.branch, Outcome.UNKNOWN))


def resolved(state: ParticipantState, row: ParticipantBranch, detail: tuple[Outcome, Reason | None]) -> None:
    state.out.send.append(Resolved(row.xid, row.branch, detail[0]))
    if state.by_use.get((row.xid, row.gid.resource)) == row.branch:
        state.end(row, detail[0])
    else:
        del state.rows[row.branch]


def try_resolve_again(state: ParticipantState, row: ParticipantBranch, _: object) -> None:
    state.do(Operation.ONE_PHASE_RESULT, row)


def expire(state: ParticipantState, row: ParticipantBranch, _: object) -> None:
    # Rule 10: the tombstone has outlasted the deadline, so no message about the branch can come any more.
    del state.rows[row.branch]
    if state.by_use.get((row.xid, row.gid.resource)) == row.branch:
        del state.by_use[row.xid, row.gid.resource]
    if state.closed_until_ms.get(row.xid, 0) <= state.now_ms:
        state.closed_until_ms.pop(row.xid, None)
