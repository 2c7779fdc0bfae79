"""What roots ask for: commit, rollback, and the outcome of what they lost the answer to.

Asking again adds a waiter and never starts anything twice (rule 12).  A commit request from below the remembered horizon, or of
another epoch, is refused (rule 5); what the log says about it is still told.
"""

from __future__ import annotations

from txrpc._protocol.coordinator.admission import check_branches
from txrpc._protocol.coordinator.events import Lookup
from txrpc._protocol.coordinator.phases import PRESUMED, Rounds
from txrpc._protocol.coordinator.rows import Branch, State, Transaction
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

__all__ = ["Requests"]


class Requests(Rounds):
    """The entries of the table for what a root asks."""

    def _begin_commit(self, row: None, session: int, request: CommitRequest) -> None:
        if not self._of_this_time(request):
            self._ask_log(session, request)
            return
        reason = self._refuse_commit(request)
        if reason is not None:
            self._abort_unknown(session, request.xid, request.epoch, request.branches, reason)
            return
        left_ms = min(request.time_left_ms, self.limits.max_timeout_ms)
        begun = Transaction(
            request.xid,
            request.epoch,
            State.PREPARING,
            {ref.branch: Branch(ref, ref.vote, ref.token) for ref in request.branches},
            self._now_ms,
            self._now_ms + left_ms,
            waiters={session: request.wait},
        )
        self.transactions[request.xid] = begun
        self._wake_at(begun, begun.time_up_ms)
        if len(begun.branches) == 1 and request.branches[0].vote is None:
            self._delegate(begun)
        else:
            self._prepare(begun)

    def _refuse_commit(self, request: CommitRequest) -> Reason | None:
        if self.draining:
            return Reason(AbortCode.SHUTTING_DOWN, "the coordinator is shutting down")
        if self.log_trouble:
            return Reason(AbortCode.LOG_UNAVAILABLE, self.log_trouble)
        if len(self.transactions) >= self.limits.max_transactions:
            return Reason(
                AbortCode.LIMIT_EXCEEDED, f"the coordinator's max_transactions is {self.limits.max_transactions}"
            )
        if request.time_left_ms <= 0:
            return Reason(AbortCode.TIMED_OUT, "no time was left when the commit was asked for")
        return check_branches(request.branches, self.limits)

    def _join_waiters(self, row: Transaction, session: int, request: ToCoordinator) -> None:
        wait = request.wait if isinstance(request, CommitRequest) else Wait.ACKNOWLEDGED
        waited = self._now_ms >= row.time_up_ms
        if row.state is State.COMMITTING and (wait is Wait.DECISION or waited):
            self._send(session, self._committed_reply(row))
            return
        if row.state is State.ONE_PHASE and not row.waiters:
            # All others have been told UNKNOWN.  It may be learnable by now, but is not waited for as long again.
            self._wake_at(row, self._now_ms + self.limits.ack_wait_ms)
            (branch,) = row.branches.values()
            self._resolve(row, branch)
        row.waiters[session] = wait

    def _reply_ended(self, row: None, session: int, request: AboutEnd) -> None:
        reason = self.remembered[request.xid]
        if reason is not None:
            self._abandon(request)
        outcome = Outcome.COMMITTED if reason is None else Outcome.ABORTED
        self._send(session, OutcomeReply(request.xid, outcome, reason, position=self.position))

    def _give_up(self, row: None, session: int, request: RollbackRequest) -> None:
        """Roll back what is not known; what may have been committed and forgotten here is looked up first (rule 12)."""
        if not self._of_this_time(request):
            self._ask_log(session, request)
            return
        self._abort_unknown(session, request.xid, request.epoch, request.branches, request.reason)
        self._abandon(request)

    def _give_up_early(self, row: Transaction, session: int, request: RollbackRequest) -> None:
        row.waiters[session] = Wait.ACKNOWLEDGED
        self._abort(row, request.reason)
        self._abandon(request)

    def _abandon(self, request: AboutEnd) -> None:
        """Tell everybody who may have a branch of an aborted transaction of which its root does not know (rule 19)."""
        if isinstance(request, RollbackRequest) and request.everywhere:
            for entry in self.directory.sessions.values():
                if entry.hello.resources:
                    self._send(entry.session, Abandon(request.xid, request.reason))

    def _presume(self, row: None, session: int, request: OutcomeRequest) -> None:
        if not self._of_this_time(request):
            self._ask_log(session, request)
        elif self._commits_by_itself(session, request):
            self._ask_only_branch(session, request)
        else:
            self._abort_unknown(session, request.xid, request.epoch, request.branches, PRESUMED)

    def _commits_by_itself(self, session: int, request: OutcomeRequest) -> bool:
        """Whether the only branch is one of the root's own process: it needs no coordinator, so none presumes (rule 21)."""
        refs = request.branches
        asks = self.directory.sessions[session].hello.participant
        return len(refs) == 1 and refs[0].vote is None and refs[0].participant == asks

    def _of_this_time(self, request: AboutEnd) -> bool:
        """Whether the transaction, had it ended, would be remembered: so that the absence of a memory proves something."""
        return request.epoch == self.owner.epoch and self.remembered.floor <= request.begun_tick <= self.tick

    def _ask_log(self, session: int, request: AboutEnd) -> None:
        self._out.look.append(Lookup(session, request, request.xid))

    def _without_record(self, session: int, request: AboutEnd) -> None:
        """Answer for a transaction of an earlier time or epoch that the log has no record of: is absence a proof?"""
        xid = request.xid
        if request.epoch != self.owner.epoch and request.epoch in self.lineage and self._hold(session, request):
            return
        if request.epoch not in self.lineage:
            reason = Reason(
                AbortCode.UNSPECIFIED, f"it began under epoch {request.epoch}, which this log has never had"
            )
            self._send(session, OutcomeReply(xid, Outcome.UNKNOWN, reason))
        elif request.epoch == self.owner.epoch and request.begun_tick > self.tick:
            reason = Reason(AbortCode.PROTOCOL_VIOLATION, "it began at a time that this coordinator has not reached")
            self._send(session, OutcomeReply(xid, Outcome.UNKNOWN, reason))
        elif request.begun_tick * 1000 <= self._forgotten_ms:
            reason = Reason(AbortCode.UNSPECIFIED, "its record may have been deleted: the retention time has passed")
            self._send(session, OutcomeReply(xid, Outcome.UNKNOWN, reason))
        elif len(request.branches) == 1 and request.branches[0].vote is None:
            self._ask_only_branch(session, request)
        else:
            self._abort_unknown(session, xid, request.epoch, request.branches, self._too_late(request), count=False)
            self._abandon(request)

    def _too_late(self, request: AboutEnd) -> Reason:
        if isinstance(request, RollbackRequest):
            return request.reason
        if request.epoch != self.owner.epoch:
            return Reason(AbortCode.COORDINATOR_RESTARTED, "the coordinator restarted before it had decided")
        return Reason(AbortCode.TIMED_OUT, "the transaction began too long ago")
