"""The two phases of a commit, and their ends.  Each function is one entry, or a shared part, of the table.

The rules of the design's section 5 that live here:
    3  `decide` appends and goes to RECORDING, where neither outcome is told; only LOGGED (`recorded`) tells.
    5  every end is remembered before it is told, abort and commit alike.
    6  a record is marked done when the last prepared branch has acknowledged, never before.

A branch's answer counts only from the session that was asked last (`BranchRow.session`); any other answer is late, or false.
"""

from __future__ import annotations

from collections.abc import Iterable

from txrpc._protocol.coordinator import questions
from txrpc._protocol.coordinator.events import Close
from txrpc._protocol.coordinator.rows import BranchRow, State, TransactionRow
from txrpc._protocol.coordinator.sessions import SessionEntry
from txrpc._protocol.coordinator.state import CoordinatorState, sentence
from txrpc._protocol.deciding import Decide, DecisionDone, Votes
from txrpc._protocol.messages import (
    Acked,
    BranchRef,
    Commit,
    FinishResult,
    Outcome,
    OutcomeReply,
    Prepare,
    Rollback,
    Vote,
    Voted,
    Wait,
)
from txrpc._protocol.outcomes import refusal
from txrpc._protocol.records import Decision, Incident, PreparedBranch
from txrpc.errors import AbortCode, Reason
from txrpc.ids import BranchId, Epoch, RegisterId, Xid

__all__ = ["PRESUMED"]

PRESUMED = Reason(AbortCode.PRESUMED, "no decision on record")


def lost(branch: BranchRow) -> Reason:
    text = f"the process that holds the branch in {branch.ref.resource} is not connected"
    return Reason(AbortCode.PARTICIPANT_LOST, text)


# --------------------------------------------------------------------------------------------------- two phases


def prepare(state: CoordinatorState, row: TransactionRow) -> None:
    # All branches at once; the slowest one counts, not their sum.  An early vote is not asked for again.
    against = [b.ref.resource for b in row.branches.values() if b.vote is Vote.ABORT]
    if against:
        not_all(state, row, refusal(against[0], None))
        return
    voting = _voting(row)
    row.missing = len(voting)
    entries = [(b, state.directory.owner(b.ref.participant)) for b in voting]
    for branch, entry in entries:
        if entry is None:
            not_all(state, row, lost(branch))
            return
    for branch, entry in entries:
        if entry is not None:
            state.expect_reply(entry, row, branch, Prepare(row.xid, branch.ref.branch, branch.ref.calls))
    if not row.missing:
        decide(state, row)


def _voting(row: TransactionRow) -> list[BranchRow]:
    """The branches whose vote is missing; one that decides gives none."""
    return [b for b in row.branches.values() if b.vote is None and b.ref.branch != row.decider]


def voted(state: CoordinatorState, row: TransactionRow, session: int, vote: Voted) -> None:
    # Rule 2: one vote against is enough, and COMMITTED needs every one of them.
    branch = row.branches[vote.branch]
    branch.vote, branch.token = vote.vote, vote.token
    state.cancel_wait(row, branch)
    if vote.vote is Vote.ABORT or vote.register != row.register:
        elsewhere = Reason(AbortCode.PROTOCOL_VIOLATION, "it voted under another register, or under none")
        not_all(state, row, refusal(branch.ref.resource, vote.reason if vote.vote is Vote.ABORT else elsewhere))
        return
    row.missing -= 1
    if not row.missing:
        decide(state, row)


def decide(state: CoordinatorState, row: TransactionRow) -> None:
    # Rule 3: from here to LOGGED neither outcome may be told, because the log may have it, or not.
    prepared = row.prepared()
    if row.may_decide:
        have_decided(state, row, prepared)
    elif row.register is not None:
        tell_votes(state, row)
    elif not prepared:
        finish(state, row, None)  # no branch wrote: there is nothing to make durable
    elif state.log_trouble:
        abort(state, row, Reason(AbortCode.LOG_UNAVAILABLE, state.log_trouble))
    else:
        row.state = State.RECORDING
        clock_ms = state.now_ms + state.offset_ms
        state.out.append.append(Decision(row.xid, row.epoch, clock_ms, prepared))


def tell_votes(state: CoordinatorState, row: TransactionRow) -> None:
    # The right to decide is the root's, and stays there: this coordinator does nothing about the transaction until it is told.
    row.state = State.POLLED
    votes = Votes(row.xid, row.prepared())
    for waiter in row.waiters:
        state.send(waiter, votes)
    row.waiters.clear()


def have_decided(state: CoordinatorState, row: TransactionRow, prepared: tuple[PreparedBranch, ...]) -> None:
    """Give the right to decide, which the root has given to this coordinator, to the register: once, whatever comes of it."""
    assert row.register is not None
    row.state = State.DECIDING
    decider = row.branches.get(row.decider) if row.decider is not None else None
    if decider is None:
        trouble = questions.put(state, row.register, row.xid, claim=True, commit=prepared)
        if isinstance(trouble, str):
            abort(state, row, Reason(AbortCode.RESOURCE_UNAVAILABLE, trouble))
        return
    entry = state.directory.owner(decider.ref.participant)
    if entry is None:
        abort(state, row, lost(decider))
        return
    decide = Decide(row.xid, decider.ref.branch, decider.ref.calls, row.register, prepared)
    state.expect_reply(entry, row, decider, decide)


def recorded(state: CoordinatorState, row: TransactionRow, session: None, message: None) -> None:
    # The decision is durable: the first moment at which COMMITTED may be told (rule 3).
    begin_phase_two(state, row)


def begin_phase_two(state: CoordinatorState, row: TransactionRow) -> None:
    row.state = State.COMMITTING
    row.missing = 0
    for branch in row.branches.values():
        if branch.vote is Vote.PREPARED:
            row.missing += 1
            tell_commit(state, row, branch, state.directory.finisher(branch.ref.participant, branch.ref.resource))
    # A coordinator that is shutting down will not be there for the acknowledgements.
    hasty = [s for s, wait in row.waiters.items() if wait is Wait.DECISION or state.draining]
    for waiter in hasty:
        del row.waiters[waiter]
        state.send(waiter, committed_reply(state, row))
    state.wake_at(row, state.now_ms + state.limits.ack_wait_ms)


def not_recorded(state: CoordinatorState, row: TransactionRow, session: None, reason: Reason) -> None:
    # The log is certain that it has nothing (otherwise it says uncertain, and the shell stops): presumed abort applies (rule 5).
    abort(state, row, reason)


def tell_commit(state: CoordinatorState, row: TransactionRow, branch: BranchRow, entry: SessionEntry | None) -> None:
    # Any process with its resource can finish a prepared branch; without one it is told when one connects (rule 4).
    commit = Commit(row.gid(state.group, state.owner, branch), branch.token, state.position)
    if entry is None:
        state.wait_for_resource(row, branch)
    elif branch.acked:
        state.send(entry.session, commit)  # another process saw it just before it ended: a second answer must not count
    else:
        state.expect_reply(entry, row, branch, commit)


def acked(state: CoordinatorState, row: TransactionRow, session: int, message: Acked) -> None:
    # Rule 16: only DONE and ALREADY acknowledge; everything else is recorded and kept until an operator closes it.
    branch, finish = row.branches[message.branch], message.finish
    resource = branch.ref.resource
    state.cancel_wait(row, branch)
    if finish is FinishResult.DONE or finish is FinishResult.ALREADY:
        state.end_incident(row.xid, message.branch, f"{resource} has committed it after all")
    else:
        state.incident(row.xid, message.branch, resource, finish)
    if not finish.is_proof:
        _not_here(state, row, branch, finish)
        return
    if finish is FinishResult.HEURISTIC:
        row.heuristic = f"{resource} was rolled back by hand although the decision was to commit"
    _acknowledged(state, row, branch)


def _not_here(state: CoordinatorState, row: TransactionRow, branch: BranchRow, finish: FinishResult) -> None:
    """No acknowledgement (rule 16): it asks again, and each process that connects with its resource is told."""
    state.await_resource(row, branch)
    keep_open(state, row, branch, state.incidents[row.xid, branch.ref.branch])
    if finish is FinishResult.LOST:
        ack_time_up(state, row, None, None)


def keep_open(state: CoordinatorState, row: TransactionRow, branch: BranchRow, incident: Incident) -> None:
    branch.trouble = sentence(incident)
    if incident.finish is FinishResult.LOST:
        row.heuristic = f"{branch.ref.resource} has lost its branch although the decision was to commit"


def late_ack(state: CoordinatorState, row: None, session: int, message: Acked) -> None:
    """An acknowledgement that no transaction waits for; reported only if a branch was ended by hand against the decision."""
    state.reports.drop(message.xid, message.branch)
    if message.finish is FinishResult.HEURISTIC:
        state.incident(message.xid, message.branch, message.resource, message.finish)


def close(state: CoordinatorState, event: Close) -> None:
    """An operator has seen to it: what never was acknowledged counts as if it had been."""
    for xid, branch_id in [key for key in state.incidents if key[0] == event.xid]:
        if event.branch is not None and branch_id != event.branch:
            continue
        state.end_incident(xid, branch_id, "an operator")
        row = state.transactions.get(xid)
        branch = row.branches.get(branch_id) if row is not None else None
        if row is not None and branch is not None and not branch.acked:
            state.cancel_wait(row, branch)
            _acknowledged(state, row, branch)


def _acknowledged(state: CoordinatorState, row: TransactionRow, branch: BranchRow) -> None:
    # Rule 6: the record may go when the last prepared branch has acknowledged; losing this mark only repeats phase two.
    branch.acked = True
    row.missing -= 1
    if not row.missing:
        mark_done(state, row)


def mark_done(state: CoordinatorState, row: TransactionRow) -> None:
    if row.register is None:
        state.out.done.append(row.xid)
    else:
        tell_done(state, row.register, row.xid)
    finish(state, row, None)


def tell_done(state: CoordinatorState, register: RegisterId, xid: Xid) -> None:
    """A process with *register* may mark the decision as done, unless a branch did not end so: that may be in memory alone.

    The register tells of it again and again, until an operator has closed the incident.
    """
    holder = state.directory.holder(register)
    if holder is not None and all(key[0] != xid for key in state.incidents):
        state.send(holder.session, DecisionDone(register, (xid,)))


def ack_time_up(state: CoordinatorState, row: TransactionRow, session: None, message: None) -> None:
    # The outcome is certain, so the root need not wait for a database that is away; `pending` names it.
    reply = committed_reply(state, row)
    for waiter in row.waiters:
        state.send(waiter, reply)
    row.waiters.clear()


# ---------------------------------------------------------------------------------------------------- the end


def not_all(state: CoordinatorState, row: TransactionRow, reason: Reason) -> None:
    """A branch votes against, or not in time."""
    if row.register is None or row.may_decide:
        abort(state, row, reason)
        return
    # Only the root may abort: this may be a request of long ago, and the transaction be committed.  It is told why, and will.
    del state.transactions[row.xid]
    for branch in row.branches.values():
        state.cancel_wait(row, branch)
    for waiter in row.waiters:
        state.send(waiter, OutcomeReply(row.xid, Outcome.UNKNOWN, reason))


def abort(state: CoordinatorState, row: TransactionRow, reason: Reason) -> None:
    """Abort a transaction of which no process can have heard COMMITTED: nothing is written (presumed abort)."""
    for branch in row.branches.values():
        _tell_rollback(state, row, branch, reason)
    finish(state, row, reason)


def _tell_rollback(state: CoordinatorState, row: TransactionRow, branch: BranchRow, reason: Reason) -> None:
    # A rollback that gets lost does no harm: a prepared branch asks, an unprepared one has its deadline (rules 5, 11).
    if branch.vote is Vote.ABORT or branch.vote is Vote.READ_ONLY:
        return  # has ended by itself
    ref, gid = branch.ref, row.gid(state.group, state.owner, branch)
    if branch.vote is Vote.PREPARED:
        entry = state.directory.finisher(ref.participant, ref.resource)
    else:
        entry = state.directory.owner(ref.participant)
    if entry is not None:
        state.send(entry.session, Rollback(gid, reason, branch.token))
    elif branch.vote is Vote.PREPARED:
        state.report_unreachable(gid, "prepared, and to be rolled back")
    elif branch.session is not None and not state.directory.has(ref.resource):
        state.report_unreachable(gid, "perhaps prepared: it was asked to, and its process was lost")


def time_up(state: CoordinatorState, row: TransactionRow, session: None, message: None) -> None:
    # Rule 11: what has not voted by the deadline holds others' locks; aborting needs no agreement.
    slow = sorted({branch.ref.resource for branch in _voting(row)})
    not_all(state, row, Reason(AbortCode.TIMED_OUT, f"no vote in time from {', '.join(slow)}"))


def finish(state: CoordinatorState, row: TransactionRow, reason: Reason | None) -> None:
    # Remembered before it is told (rule 5): having said ABORTED, this coordinator can never commit that XID.
    del state.transactions[row.xid]
    state.remembered.add(row.xid, reason)
    for branch in row.branches.values():
        state.cancel_wait(row, branch)
    if reason is None:
        state.committed += 1
        reply = committed_reply(state, row)
    else:
        state.aborted += 1
        reply = OutcomeReply(row.xid, Outcome.ABORTED, reason)
    for waiter in row.waiters:
        state.send(waiter, reply)


def abort_unknown(
    state: CoordinatorState,
    session: int,
    xid: Xid,
    epoch: Epoch,
    branches: Iterable[BranchRef],
    reason: Reason,
    count: bool = True,
) -> None:
    """Abort a transaction that has no row: say so, remember it, and let its branches go now, not at their deadline."""
    if epoch == state.owner.epoch:
        state.remembered.add(xid, reason)
    state.aborted += count
    row = TransactionRow(xid, epoch, State.PREPARING, {}, state.now_ms, state.now_ms)
    for ref in branches:
        _tell_rollback(state, row, BranchRow(ref, ref.vote, ref.token), reason)
    state.send(session, OutcomeReply(xid, Outcome.ABORTED, reason))


def committed_reply(state: CoordinatorState, row: TransactionRow) -> OutcomeReply:
    return OutcomeReply(row.xid, Outcome.COMMITTED, None, row.unfinished(), row.heuristic, state.position)


# ---------------------------------------------------------------------------------------- sessions come and go


def voter_lost(state: CoordinatorState, row: TransactionRow, session: int, branch: BranchId) -> None:
    # It may have prepared or not: nothing is decided yet, so the answer is the same, and its session asks when it is back.
    not_all(state, row, lost(row.branches[branch]))


def finisher_lost(state: CoordinatorState, row: TransactionRow, session: int, branch: BranchId) -> None:
    # Rule 4: the promise holds, so phase two goes on elsewhere, or waits.
    ref = row.branches[branch].ref
    tell_commit(state, row, row.branches[branch], state.directory.finisher(ref.participant, ref.resource))


def resume_commit(state: CoordinatorState, row: TransactionRow, session: int, branch: BranchId) -> None:
    if not row.branches[branch].acked:
        tell_commit(state, row, row.branches[branch], state.directory.sessions[session])
