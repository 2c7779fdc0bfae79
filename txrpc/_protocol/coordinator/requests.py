"""What roots ask for: commit, rollback, and the outcome of what they lost the answer to.

Asking again adds a waiter and never starts anything twice (rule 12).  A commit request from below the remembered horizon, or of
another epoch, is refused (rule 5); what the log says about it is still told.
"""

from __future__ import annotations

from txrpc._protocol.coordinator import one_phase, phases, registers
from txrpc._protocol.coordinator.admission import check_branches
from txrpc._protocol.coordinator.events import Lookup
from txrpc._protocol.coordinator.phases import PRESUMED
from txrpc._protocol.coordinator.rows import BranchRow, State, TransactionRow
from txrpc._protocol.coordinator.state import CoordinatorState
from txrpc._protocol.messages import (
    Abandon,
    AboutEnd,
    CommitRequest,
    Outcome,
    OutcomeReply,
    OutcomeRequest,
    RollbackRequest,
    ToCoordinator,
    Wait,
)
from txrpc.errors import AbortCode, Reason

__all__ = ["begin_commit", "give_up", "give_up_early", "join_waiters", "presume", "reply_ended", "without_record"]


def begin_commit(state: CoordinatorState, row: None, session: int, request: CommitRequest) -> None:
    # Rules 5 and 10: absence of a memory proves something only of transactions that would still be remembered.
    register = registers.register_of(request)
    if register is None and not _of_this_time(state, request):
        _ask_log(state, session, request)
        return
    may_decide = request.register is not None
    if may_decide and not _of_this_time(state, request):
        _leave_to_register(state, session, request)
        return
    reason = _refuse_commit(state, request)
    if reason is not None and register is not None and not may_decide:
        state.send(session, OutcomeReply(request.xid, Outcome.UNKNOWN, reason))
        return
    if reason is not None:
        phases.abort_unknown(state, session, request.xid, request.epoch, request.branches, reason)
        return
    left_ms = min(request.time_left_ms, state.limits.max_timeout_ms)
    begun = TransactionRow(
        request.xid,
        request.epoch,
        State.PREPARING,
        {ref.branch: BranchRow(ref, ref.vote, ref.token) for ref in request.branches},
        state.now_ms,
        state.now_ms + left_ms,
        waiters={session: request.wait},
        register=register,
        may_decide=may_decide,
        decider=request.decider,
    )
    state.transactions[request.xid] = begun
    state.wake_at(begun, begun.time_up_ms)
    if len(begun.branches) == 1 and request.branches[0].vote is None and register is None:
        one_phase.delegate(state, begun)
    else:
        phases.prepare(state, begun)


def _leave_to_register(state: CoordinatorState, session: int, request: CommitRequest) -> None:
    # The right to decide was given to another epoch, or this is a copy of long ago: only the register may say anything.
    reason = Reason(AbortCode.RESOURCE_UNAVAILABLE, "the coordinator restarted before it had the transaction decided")
    state.send(session, OutcomeReply(request.xid, Outcome.UNKNOWN, reason))


def _refuse_commit(state: CoordinatorState, request: CommitRequest) -> Reason | None:
    # Refusals are aborts, remembered like any other: the root may run the transaction again.
    if state.draining:
        return Reason(AbortCode.SHUTTING_DOWN, "the coordinator is shutting down")
    if state.log_trouble and registers.register_of(request) is None:
        return Reason(AbortCode.LOG_UNAVAILABLE, state.log_trouble)
    if len(state.transactions) >= state.limits.max_transactions:
        return Reason(
            AbortCode.LIMIT_EXCEEDED, f"the coordinator's max_transactions is {state.limits.max_transactions}"
        )
    if request.time_left_ms <= 0:
        return Reason(AbortCode.TIMED_OUT, "no time was left when the commit was asked for")
    return check_branches(request.branches, state.limits) or _check_decider(request)


def _check_decider(request: CommitRequest) -> Reason | None:
    """Return why the transaction cannot be decided as its root asks."""
    if request.register is None:
        return None
    if any(ref.register != request.register for ref in request.branches):
        return Reason(AbortCode.PROTOCOL_VIOLATION, "a branch is under another register than the one that is to decide")
    waits = (ref.branch for ref in request.branches if ref.vote is None)
    if request.decider is not None and request.decider not in waits:
        return Reason(AbortCode.PROTOCOL_VIOLATION, "the branch that is to decide is not listed, or has voted")
    return None


def join_waiters(state: CoordinatorState, row: TransactionRow, session: int, request: ToCoordinator) -> None:
    # Rule 12: a question adds a waiter; the work goes on as it was.
    wait = request.wait if isinstance(request, CommitRequest) else Wait.ACKNOWLEDGED
    waited = state.now_ms >= row.time_up_ms or state.draining
    if row.state is State.COMMITTING and (wait is Wait.DECISION or waited):
        state.send(session, phases.committed_reply(state, row))
        return
    if row.state is State.ONE_PHASE and not row.waiters:
        # All others have been told UNKNOWN.  It may be learnable by now, but is not waited for as long again.
        state.wake_at(row, state.now_ms + state.limits.ack_wait_ms)
        (branch,) = row.branches.values()
        one_phase.resolve(state, row, branch)
    row.waiters[session] = wait


def reply_ended(state: CoordinatorState, row: None, session: int, request: AboutEnd) -> None:
    # Rule 12: the same answer as before, for as long as it is remembered.
    reason = state.remembered[request.xid]
    if reason is not None and registers.register_of(request) is not None:
        # Its register has been asked for one branch, perhaps, and the others have not been told.
        phases.abort_unknown(state, session, request.xid, request.epoch, request.branches, reason, count=False)
        return
    if reason is not None:
        _abandon(state, request)
    outcome = Outcome.COMMITTED if reason is None else Outcome.ABORTED
    state.send(session, OutcomeReply(request.xid, outcome, reason, position=state.position))


def give_up(state: CoordinatorState, row: None, session: int, request: RollbackRequest) -> None:
    """Roll back what is not known; what may have been committed and forgotten here is looked up first (rule 12)."""
    if registers.register_of(request) is None and not _of_this_time(state, request):
        _ask_log(state, session, request)
        return
    phases.abort_unknown(state, session, request.xid, request.epoch, request.branches, request.reason)
    _abandon(state, request)


def give_up_early(state: CoordinatorState, row: TransactionRow, session: int, request: RollbackRequest) -> None:
    # Votes are missing, so no process can have heard COMMITTED: the root's word is enough.
    row.waiters[session] = Wait.ACKNOWLEDGED
    phases.abort(state, row, request.reason)
    _abandon(state, request)


def _abandon(state: CoordinatorState, request: AboutEnd) -> None:
    """Tell every process that may have a branch of an aborted transaction of which its root does not know (rule 19)."""
    if isinstance(request, RollbackRequest) and request.everywhere:
        for entry in state.directory.sessions.values():
            if entry.hello.resources:
                state.send(entry.session, Abandon(request.xid, request.reason))


def presume(state: CoordinatorState, row: None, session: int, request: OutcomeRequest) -> None:
    # Rule 5: no record, and not being decided in this epoch: aborted, and remembered as such before it is said.
    if (register := registers.register_of(request)) is not None:
        registers.ask(state, register, session, request, claim=True)
    elif not _of_this_time(state, request):
        _ask_log(state, session, request)
    elif _commits_by_itself(state, session, request):
        one_phase.ask_only_branch(state, session, request)
    else:
        phases.abort_unknown(state, session, request.xid, request.epoch, request.branches, PRESUMED)


def _commits_by_itself(state: CoordinatorState, session: int, request: OutcomeRequest) -> bool:
    """Return whether the only branch is one of the root's own process: it needs no coordinator, so none presumes (rule 21)."""
    # The process that asks holds the branch itself, so its own database has the answer.
    refs = request.branches
    asks = state.directory.sessions[session].hello.participant
    return len(refs) == 1 and refs[0].vote is None and refs[0].participant == asks


def _of_this_time(state: CoordinatorState, request: AboutEnd) -> bool:
    """Return whether the transaction, had it ended, would be remembered: so that the absence of a memory proves something."""
    return request.epoch == state.owner.epoch and state.remembered.floor <= request.begun_tick <= state.tick


def _ask_log(state: CoordinatorState, session: int, request: AboutEnd) -> None:
    state.out.look.append(Lookup(session, request, request.xid))


def without_record(state: CoordinatorState, session: int, request: AboutEnd) -> None:
    """Answer for a transaction of an earlier time or epoch that the log has no record of: is absence a proof?"""
    xid = request.xid
    if request.epoch != state.owner.epoch and request.epoch in state.lineage and state.hold(session, request):
        return
    if request.epoch not in state.lineage:
        reason = Reason(AbortCode.UNSPECIFIED, f"it began under epoch {request.epoch}, which this log has never had")
        state.send(session, OutcomeReply(xid, Outcome.UNKNOWN, reason))
    elif request.epoch == state.owner.epoch and request.begun_tick > state.tick:
        reason = Reason(AbortCode.PROTOCOL_VIOLATION, "it began at a time that this coordinator has not reached")
        state.send(session, OutcomeReply(xid, Outcome.UNKNOWN, reason))
    elif request.begun_tick * 1000 <= state.forgotten_ms:
        reason = Reason(AbortCode.UNSPECIFIED, "its record may have been deleted: the retention time has passed")
        state.send(session, OutcomeReply(xid, Outcome.UNKNOWN, reason))
    elif len(request.branches) == 1 and request.branches[0].vote is None:
        one_phase.ask_only_branch(state, session, request)
    else:
        phases.abort_unknown(
            state, session, xid, request.epoch, request.branches, _too_late(state, request), count=False
        )
        _abandon(state, request)


def _too_late(state: CoordinatorState, request: AboutEnd) -> Reason:
    if isinstance(request, RollbackRequest):
        return request.reason
    if request.epoch != state.owner.epoch:
        return Reason(AbortCode.COORDINATOR_RESTARTED, "the coordinator restarted before it had decided")
    return Reason(AbortCode.TIMED_OUT, "the transaction began too long ago")
