"""Commit in one phase: a transaction with one branch is decided by that branch's database (rules 13 and 21).

The coordinator writes nothing, and so can presume nothing: absence of a record proves nothing here.  Whatever it answers, it has
learnt from the branch's process, or from its database, which `token` names the transaction to.  Each function is one entry, or a
shared part, of the table.
"""

from __future__ import annotations

from txrpc._protocol.coordinator import phases
from txrpc._protocol.coordinator.rows import BranchRow, State, TransactionRow
from txrpc._protocol.coordinator.state import MARGIN_MS, CoordinatorState
from txrpc._protocol.messages import (
    AboutEnd,
    CommitOnePhase,
    Committing,
    OnePhaseDone,
    OnePhaseToken,
    Outcome,
    OutcomeReply,
    Resolve,
    Resolved,
    Wait,
)
from txrpc.errors import AbortCode, Reason
from txrpc.ids import BranchId

__all__ = ["ask_only_branch", "committer_lost", "delegate", "done", "resolve", "resume", "time_up", "token"]


def delegate(state: CoordinatorState, row: TransactionRow) -> None:
    # No decision of ours to record, so no forced write: the database's own COMMIT decides (Mohan, Lindsay and Obermarck 1986).
    (branch,) = row.branches.values()
    entry = state.directory.owner(branch.ref.participant)
    if entry is None:
        phases.abort(state, row, phases.lost(branch))
        return
    row.state = State.ONE_PHASE
    # The participant may begin the commit in the last moment; its answer is worth a wait.
    state.wake_at(row, row.time_up_ms + state.limits.ack_wait_ms)
    state.expect_reply(entry, row, branch, CommitOnePhase(row.xid, branch.ref.branch, branch.ref.calls))


def token(state: CoordinatorState, row: TransactionRow, session: int, message: Committing) -> None:
    # A process that outlives it can ask its database with the token how the commit ended (rule 13).
    row.branches[message.branch].token = message.token


def done(state: CoordinatorState, row: TransactionRow, session: int, message: OnePhaseDone | Resolved) -> None:
    # From its own process, or from another one that asked its database: both are proof (rules 16, 21).
    reason = message.reason if isinstance(message, OnePhaseDone) else None
    if message.result is Outcome.COMMITTED:
        row.branches[message.branch].acked = True
        phases.finish(state, row, None)
    elif message.result is Outcome.ABORTED:
        phases.finish(state, row, reason or Reason(AbortCode.RESOURCE_UNAVAILABLE, "the database rolled it back"))
    else:
        _unknown(state, row, reason)


def _unknown(state: CoordinatorState, row: TransactionRow, reason: Reason | None) -> None:
    text = "the process that was committing its only branch is gone, and its database cannot tell"
    reply = OutcomeReply(row.xid, Outcome.UNKNOWN, reason or Reason(AbortCode.UNSPECIFIED, text))
    for session in row.waiters:
        state.send(session, reply)
        state.note("error", "outcome unknown", xid=row.xid, reason=text)
    row.waiters.clear()
    # Kept until no request about it can come: the truth may still arrive, and asking again must not start it again.
    state.wake_at(row, state.now_ms + MARGIN_MS)


def time_up(state: CoordinatorState, row: TransactionRow, session: None, message: None) -> None:
    begun_tick = (row.begun_ms + state.offset_ms) // 1000
    if not row.waiters and state.remembered.floor > begun_tick:
        del state.transactions[row.xid]
        for branch in row.branches.values():
            state.cancel_wait(row, branch)
    else:
        (branch,) = row.branches.values()
        reason = None
        if branch.session is not None:
            text = f"{branch.ref.resource} has not said yet how its commit ended"
            reason = Reason(AbortCode.RESOURCE_UNAVAILABLE, text)
        _unknown(state, row, reason)


def committer_lost(state: CoordinatorState, row: TransactionRow, session: int, branch: BranchId) -> None:
    # F10b: should this coordinator die as well, the root has the token and can have the database asked (rule 13).
    lost = row.branches[branch]
    if lost.token:
        for waiter in row.waiters:
            state.send(waiter, OnePhaseToken(row.xid, lost.token))
    resolve(state, row, lost)


def resume(state: CoordinatorState, row: TransactionRow, session: int, branch: BranchId) -> None:
    # Its process has come back, or another one with its resource: ask again.
    resolve(state, row, row.branches[branch])


def resolve(state: CoordinatorState, row: TransactionRow, branch: BranchRow) -> None:
    """Learn how a commit in one phase ended: from its own process, or from any process that can ask the database."""
    own = state.directory.owner(branch.ref.participant)
    entry = own or (state.directory.finisher(branch.ref.participant, branch.ref.resource) if branch.token else None)
    if entry is None:
        state.wait_for_resource(row, branch)
        if not branch.token:
            branch.trouble = "its process is gone, and had not said which transaction of the database it was committing"
        return
    ref = branch.ref
    state.expect_reply(entry, row, branch, Resolve(row.xid, ref.branch, ref.resource, branch.token))
    if own is None:
        state.await_resource(row, branch)  # its own process knows best, should it come back


def ask_only_branch(state: CoordinatorState, session: int, request: AboutEnd) -> None:
    """A commit in one phase under an earlier epoch left no record here: only its participant can know."""
    if len(state.transactions) >= state.limits.max_transactions:
        text = f"the coordinator's max_transactions is {state.limits.max_transactions}: ask again later"
        state.send(session, OutcomeReply(request.xid, Outcome.UNKNOWN, Reason(AbortCode.LIMIT_EXCEEDED, text)))
        return
    ref = request.branches[0]
    row = TransactionRow(
        request.xid,
        request.epoch,
        State.ONE_PHASE,
        {ref.branch: BranchRow(ref, None, ref.token)},
        state.now_ms,
        state.now_ms + state.limits.ack_wait_ms,
        waiters={session: Wait.ACKNOWLEDGED},
    )
    state.transactions[request.xid] = row
    state.wake_at(row, row.time_up_ms)
    resolve(state, row, row.branches[ref.branch])
