"""The rounds of a commit: one phase, two phases, and their ends.  Each method is one entry, or a shared part, of the table.

The rules of the design's section 5 that live here:
    3  `_decide` appends and goes to RECORDING, where nobody is told anything; only LOGGED (`_recorded`) tells.
    5  every end is remembered before it is told, abort and commit alike.
    6  a record is marked done when the last prepared branch has acknowledged, never before.

A branch's answer counts only from the session that was asked last (`Branch.session`); whoever else answers is late, or lies.
"""

from __future__ import annotations

from collections.abc import Iterable

from txrpc._protocol.coordinator.events import Close
from txrpc._protocol.coordinator.rows import Branch, State, Transaction, aborted_vote
from txrpc._protocol.coordinator.sessions import SessionEntry
from txrpc._protocol.coordinator.state import MARGIN_MS, Desk, sentence
from txrpc._protocol.messages import (
    AboutEnd,
    Acked,
    BranchRef,
    Commit,
    CommitOnePhase,
    Committing,
    FinishResult,
    OnePhaseDone,
    OnePhaseToken,
    Outcome,
    OutcomeReply,
    Prepare,
    Resolve,
    Resolved,
    Rollback,
    Vote,
    Voted,
    Wait,
)
from txrpc._protocol.records import Decision, Incident
from txrpc.errors import AbortCode, Reason
from txrpc.ids import BranchId, Epoch, Xid

__all__ = ["PRESUMED", "Rounds"]

PRESUMED = Reason(AbortCode.PRESUMED, "no decision on record")


def _lost(branch: Branch) -> Reason:
    text = f"the process that holds the branch in {branch.ref.resource} is not connected"
    return Reason(AbortCode.PARTICIPANT_LOST, text)


class Rounds(Desk):
    """What happens to rows that are being worked on."""

    # --------------------------------------------------------------------------------------------------- one phase

    def _delegate(self, row: Transaction) -> None:
        (branch,) = row.branches.values()
        entry = self.directory.owner(branch.ref.participant)
        if entry is None:
            self._abort(row, _lost(branch))
            return
        row.state = State.ONE_PHASE
        # The participant may begin the commit in the last moment; its answer is worth a wait.
        self._wake_at(row, row.time_up_ms + self.limits.ack_wait_ms)
        self._expect_reply(entry, row, branch, CommitOnePhase(row.xid, branch.ref.branch, branch.ref.calls))

    def _token(self, row: Transaction, session: int, message: Committing) -> None:
        row.branches[message.branch].token = message.token

    def _one_phase_done(self, row: Transaction, session: int, message: OnePhaseDone | Resolved) -> None:
        reason = message.reason if isinstance(message, OnePhaseDone) else None
        if message.result is Outcome.COMMITTED:
            row.branches[message.branch].acked = True
            self._finish(row, None)
        elif message.result is Outcome.ABORTED:
            self._finish(row, reason or Reason(AbortCode.RESOURCE_UNAVAILABLE, "the database rolled it back"))
        else:
            self._one_phase_unknown(row, reason)

    def _one_phase_unknown(self, row: Transaction, reason: Reason | None) -> None:
        text = "the process that was committing its only branch is gone, and its database cannot tell"
        reply = OutcomeReply(row.xid, Outcome.UNKNOWN, reason or Reason(AbortCode.UNSPECIFIED, text))
        for session in row.waiters:
            self._send(session, reply)
            self._note("error", "outcome unknown", xid=row.xid, reason=text)
        row.waiters.clear()
        # Kept until no request about it can come: the truth may still arrive, and asking again must not start it again.
        self._wake_at(row, self._now_ms + MARGIN_MS)

    def _one_phase_time_up(self, row: Transaction, session: None, message: None) -> None:
        begun_tick = (row.begun_ms + self._offset_ms) // 1000
        if not row.waiters and self.remembered.floor > begun_tick:
            del self.transactions[row.xid]
            for branch in row.branches.values():
                self._cancel_wait(row, branch)
        else:
            (branch,) = row.branches.values()
            reason = None
            if branch.session is not None:
                text = f"{branch.ref.resource} has not said yet how its commit ended"
                reason = Reason(AbortCode.RESOURCE_UNAVAILABLE, text)
            self._one_phase_unknown(row, reason)

    def _resolve(self, row: Transaction, branch: Branch) -> None:
        """Learn how a commit in one phase ended: from its own process, or from anybody who can ask the database."""
        own = self.directory.owner(branch.ref.participant)
        entry = own or (self.directory.finisher(branch.ref.participant, branch.ref.resource) if branch.token else None)
        if entry is None:
            self._wait_for_resource(row, branch)
            if not branch.token:
                branch.trouble = (
                    "its process is gone, and had not said which transaction of the database it was committing"
                )
            return
        ref = branch.ref
        self._expect_reply(entry, row, branch, Resolve(row.xid, ref.branch, ref.resource, branch.token))
        if own is None:
            self._await_resource(row, branch)  # its own process knows best, should it come back

    def _ask_only_branch(self, session: int, request: AboutEnd) -> None:
        """A commit in one phase under an earlier epoch left no record here: only its participant can know."""
        if len(self.transactions) >= self.limits.max_transactions:
            text = f"the coordinator's max_transactions is {self.limits.max_transactions}: ask again later"
            self._send(session, OutcomeReply(request.xid, Outcome.UNKNOWN, Reason(AbortCode.LIMIT_EXCEEDED, text)))
            return
        ref = request.branches[0]
        row = Transaction(
            request.xid,
            request.epoch,
            State.ONE_PHASE,
            {ref.branch: Branch(ref, None, ref.token)},
            self._now_ms,
            self._now_ms + self.limits.ack_wait_ms,
            waiters={session: Wait.ACKNOWLEDGED},
        )
        self.transactions[request.xid] = row
        self._wake_at(row, row.time_up_ms)
        self._resolve(row, row.branches[ref.branch])

    # --------------------------------------------------------------------------------------------------- two phases

    def _prepare(self, row: Transaction) -> None:
        doomed = aborted_vote(row.branches)
        if doomed is not None:
            self._abort(row, doomed)
            return
        voting = [b for b in row.branches.values() if b.vote is None]
        row.missing = len(voting)
        entries = [(b, self.directory.owner(b.ref.participant)) for b in voting]
        for branch, entry in entries:
            if entry is None:
                self._abort(row, _lost(branch))
                return
        for branch, entry in entries:
            if entry is not None:
                self._expect_reply(entry, row, branch, Prepare(row.xid, branch.ref.branch, branch.ref.calls))
        if not row.missing:
            self._decide(row)

    def _voted(self, row: Transaction, session: int, vote: Voted) -> None:
        branch = row.branches[vote.branch]
        branch.vote, branch.token = vote.vote, vote.token
        self._cancel_wait(row, branch)
        if vote.vote is Vote.ABORT:
            reason = vote.reason or Reason(AbortCode.UNSPECIFIED)
            self._abort(row, Reason(reason.code, f"{branch.ref.resource}: {reason.text}".removesuffix(": ")))
            return
        row.missing -= 1
        if not row.missing:
            self._decide(row)

    def _decide(self, row: Transaction) -> None:
        prepared = row.prepared()
        if not prepared:
            self._finish(row, None)  # nobody wrote: there is nothing to make durable
        elif self.log_trouble:
            self._abort(row, Reason(AbortCode.LOG_UNAVAILABLE, self.log_trouble))
        else:
            row.state = State.RECORDING
            clock_ms = self._now_ms + self._offset_ms
            self._out.append.append(Decision(row.xid, row.epoch, clock_ms, prepared))

    def _recorded(self, row: Transaction, session: None, message: None) -> None:
        row.state = State.COMMITTING
        row.missing = 0
        for branch in row.branches.values():
            if branch.vote is Vote.PREPARED:
                row.missing += 1
                self._tell_commit(row, branch, self.directory.finisher(branch.ref.participant, branch.ref.resource))
        hasty = [s for s, wait in row.waiters.items() if wait is Wait.DECISION]
        for waiter in hasty:
            del row.waiters[waiter]
            self._send(waiter, self._committed_reply(row))
        self._wake_at(row, self._now_ms + self.limits.ack_wait_ms)

    def _not_recorded(self, row: Transaction, session: None, reason: Reason) -> None:
        self._abort(row, reason)

    def _tell_commit(self, row: Transaction, branch: Branch, entry: SessionEntry | None) -> None:
        commit = Commit(row.gid(self.group, self.owner, branch), branch.token, self.position)
        if entry is None:
            self._wait_for_resource(row, branch)
        elif branch.acked:
            self._send(entry.session, commit)  # somebody saw it just before it ended: a second answer must not count
        else:
            self._expect_reply(entry, row, branch, commit)

    def _acked(self, row: Transaction, session: int, message: Acked) -> None:
        branch, finish = row.branches[message.branch], message.finish
        resource = branch.ref.resource
        self._cancel_wait(row, branch)
        if finish is FinishResult.DONE or finish is FinishResult.ALREADY:
            self._end_incident(row.xid, message.branch, f"{resource} has committed it after all")
        else:
            self._incident(row.xid, message.branch, resource, finish)
        if not finish.is_proof:
            self._not_here(row, branch, finish)
            return
        if finish is FinishResult.HEURISTIC:
            row.heuristic = f"{resource} was rolled back by hand although the decision was to commit"
        self._acknowledged(row, branch)

    def _not_here(self, row: Transaction, branch: Branch, finish: FinishResult) -> None:
        """No acknowledgement (rule 16): it asks again, and whoever connects with its resource is told."""
        self._await_resource(row, branch)
        self._keep_open(row, branch, self.incidents[row.xid, branch.ref.branch])
        if finish is FinishResult.LOST:
            self._ack_time_up(row, None, None)

    def _keep_open(self, row: Transaction, branch: Branch, incident: Incident) -> None:
        branch.trouble = sentence(incident)
        if incident.finish is FinishResult.LOST:
            row.heuristic = f"{branch.ref.resource} has lost its branch although the decision was to commit"

    def _late_ack(self, row: None, session: int, message: Acked) -> None:
        """An acknowledgement that nobody waits for; worth a word only if a branch was ended by hand against the decision."""
        self.reports.drop(message.xid, message.branch)
        if message.finish is FinishResult.HEURISTIC:
            self._incident(message.xid, message.branch, message.resource, message.finish)

    def _close(self, event: Close) -> None:
        """An operator has seen to it: what never was acknowledged counts as if it had been."""
        for xid, branch_id in [key for key in self.incidents if key[0] == event.xid]:
            if event.branch is not None and branch_id != event.branch:
                continue
            self._end_incident(xid, branch_id, "an operator")
            row = self.transactions.get(xid)
            branch = row.branches.get(branch_id) if row is not None else None
            if row is not None and branch is not None and not branch.acked:
                self._cancel_wait(row, branch)
                self._acknowledged(row, branch)

    def _acknowledged(self, row: Transaction, branch: Branch) -> None:
        branch.acked = True
        row.missing -= 1
        if not row.missing:
            self._out.done.append(row.xid)
            self._finish(row, None)

    def _ack_time_up(self, row: Transaction, session: None, message: None) -> None:
        reply = self._committed_reply(row)
        for waiter in row.waiters:
            self._send(waiter, reply)
        row.waiters.clear()

    # ---------------------------------------------------------------------------------------------------- the end

    def _abort(self, row: Transaction, reason: Reason) -> None:
        """Abort a transaction of which nobody can have heard COMMITTED: nothing is written (presumed abort)."""
        for branch in row.branches.values():
            self._tell_rollback(row, branch, reason)
        self._finish(row, reason)

    def _tell_rollback(self, row: Transaction, branch: Branch, reason: Reason) -> None:
        if branch.vote is Vote.ABORT or branch.vote is Vote.READ_ONLY:
            return  # has ended by itself
        ref, gid = branch.ref, row.gid(self.group, self.owner, branch)
        if branch.vote is Vote.PREPARED:
            entry = self.directory.finisher(ref.participant, ref.resource)
        else:
            entry = self.directory.owner(ref.participant)
        if entry is not None:
            self._send(entry.session, Rollback(gid, reason, branch.token))
        elif branch.vote is Vote.PREPARED:
            self._report_unreachable(gid, "prepared, and to be rolled back")
        elif branch.session is not None and not self.directory.has(ref.resource):
            self._report_unreachable(gid, "perhaps prepared: it was asked to, and its process was lost")

    def _time_up(self, row: Transaction, session: None, message: None) -> None:
        slow = sorted({b.ref.resource for b in row.branches.values() if b.vote is None})
        self._abort(row, Reason(AbortCode.TIMED_OUT, f"no vote in time from {', '.join(slow)}"))

    def _finish(self, row: Transaction, reason: Reason | None) -> None:
        del self.transactions[row.xid]
        self.remembered.add(row.xid, reason)
        for branch in row.branches.values():
            self._cancel_wait(row, branch)
        if reason is None:
            self.committed += 1
            reply = self._committed_reply(row)
        else:
            self.aborted += 1
            reply = OutcomeReply(row.xid, Outcome.ABORTED, reason)
        for waiter in row.waiters:
            self._send(waiter, reply)

    def _abort_unknown(
        self,
        session: int,
        xid: Xid,
        epoch: Epoch,
        branches: Iterable[BranchRef],
        reason: Reason,
        count: bool = True,
    ) -> None:
        """Abort a transaction that has no row: say so, remember it, and let its branches go now, not at their deadline."""
        if epoch == self.owner.epoch:
            self.remembered.add(xid, reason)
        self.aborted += count
        row = Transaction(xid, epoch, State.PREPARING, {}, self._now_ms, self._now_ms)
        for ref in branches:
            self._tell_rollback(row, Branch(ref, ref.vote, ref.token), reason)
        self._send(session, OutcomeReply(xid, Outcome.ABORTED, reason))

    def _committed_reply(self, row: Transaction) -> OutcomeReply:
        return OutcomeReply(row.xid, Outcome.COMMITTED, None, row.unfinished(), row.heuristic, self.position)

    # ---------------------------------------------------------------------------------------- sessions come and go

    def _voter_lost(self, row: Transaction, session: int, branch: BranchId) -> None:
        self._abort(row, _lost(row.branches[branch]))

    def _committer_lost(self, row: Transaction, session: int, branch: BranchId) -> None:
        lost = row.branches[branch]
        if lost.token:
            for waiter in row.waiters:
                self._send(waiter, OnePhaseToken(row.xid, lost.token))
        self._resolve(row, lost)

    def _finisher_lost(self, row: Transaction, session: int, branch: BranchId) -> None:
        ref = row.branches[branch].ref
        self._tell_commit(row, row.branches[branch], self.directory.finisher(ref.participant, ref.resource))

    def _resume_one_phase(self, row: Transaction, session: int, branch: BranchId) -> None:
        self._resolve(row, row.branches[branch])

    def _resume_commit(self, row: Transaction, session: int, branch: BranchId) -> None:
        if not row.branches[branch].acked:
            self._tell_commit(row, row.branches[branch], self.directory.sessions[session])
