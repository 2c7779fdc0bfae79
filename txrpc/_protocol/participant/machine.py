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
    11  an ACTIVE branch rolls back at its deadline; if a call is using its work just then, that use is interrupted.

After a failed PREPARE it is not known whether the database holds the branch: the vote is ABORT, and ROLLBACK PREPARED is repeated
until the database confirms that there is nothing (left) to end.

Where things are
    `branch` has the words and the row, `state` the rows and the small operations on them, `phase_one` and `phase_two` the
    functions that the table (`table`) names, and this module what the process calls.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Container, Iterable
from typing import Final

from txrpc._protocol.deciding import Decide
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
from txrpc._protocol.participant.branch import BranchInput, BranchState, Effects, Operation, ParticipantBranch
from txrpc._protocol.participant.state import TOMBSTONE_MS, ParticipantState
from txrpc._protocol.participant.table import TABLE, enter
from txrpc.errors import AbortCode, Reason
from txrpc.ids import BranchId, Gid

__all__ = ["Participant"]


class Participant:
    """The branches of one process.  Not thread-safe: the shell calls it under one lock, or on one event loop."""

    def __init__(self, jitter: Callable[[], float]) -> None:
        """*jitter* returns numbers from 0 to 1, which spread inquiries and retries."""
        self.state = ParticipantState(jitter)

    @property
    def rows(self) -> dict[BranchId, ParticipantBranch]:
        """The branches that are known here, ended ones included, until their tombstones expire."""
        return self.state.rows

    # ------------------------------------------------------------------------------------------------------ what the process says

    def open(self, gid: Gid, deadline_ms: int, home: str = "") -> ParticipantBranch:
        """Enter a new branch, ACTIVE.  The caller has made sure that there is none, and that *xid* is not closed.

        *home*: the coordinator of a branch whose *gid* does not name it.
        """
        row = self.state.enter_row(gid, BranchState.ACTIVE, deadline_ms)
        row.home = row.home or home
        self.state.by_use[gid.xid, gid.resource] = gid.branch
        return row

    def discard(self, row: ParticipantBranch) -> None:
        """Take back `open`: the resource could not begin, so there is no work."""
        del self.state.rows[row.branch], self.state.by_use[row.xid, row.gid.resource]

    def step(self, kind: BranchInput, branch: BranchId, now_ms: int, detail: object = None) -> Effects:
        """Take a local input: a result, a release, a local commit or rollback."""
        self.state.begin(now_ms)
        enter(self.state, kind, branch, detail)
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
                enter(self.state, BranchInput.TIME_UP, branch, None)
        return self.state.out

    def committing(self, branch: BranchId, token: str) -> Committing | None:
        """A commit in one phase is about to be given to the database: what to tell the coordinator first, if it asked for it."""
        return phase_one.committing(self.state, branch, token)

    # -------------------------------------------------------------------------------------------------- the coordinator

    def received(
        self, message: Prepare | CommitOnePhase | Decide | Commit | Rollback | Resolve, now_ms: int
    ) -> Effects:
        """Take a message of the coordinator's that concerns a branch."""
        self.state.begin(now_ms)
        kind = _MESSAGES[type(message)]
        named = message.gid if isinstance(message, Commit | Rollback) else message
        row = self.state.rows.get(named.branch)
        if isinstance(message, Commit | Rollback) and row is not None and row.gid.register != message.gid.register:
            # Its word is about a decision that is made elsewhere: who may give orders is what the two differ in.
            self.state.out.mistakes.append(f"{kind.value} of branch {named.branch} under another register, or none")
        elif row is None or row.xid == named.xid:
            enter(self.state, kind, named.branch, message)
        elif named is message:
            # A root listed another transaction's branch as its own (rule 15): of that pair nothing is known here.
            TABLE[BranchState.ABSENT, kind].action(self.state, None, message)
        return self.state.out

    def connected(self, node: str, now_ms: int) -> Effects:
        """A session with coordinator *node* has begun: its branches in doubt ask, and those that vote just now will soon.

        The vote that they are about to give was asked for by a coordinator that may have aborted since, and could not say so.
        """
        self.state.begin(now_ms)
        for row in self.state.rows.values():
            if row.gid.node not in (node, ""):  # "": its decision is in a register, and any coordinator will do
                continue
            if row.trouble is not None:
                self.state.out.send.append(Trouble(row.gid, row.trouble))
            if row.state is BranchState.PREPARED:
                phase_two.inquire(self.state, row)
            elif row.state is BranchState.VOTING and not row.early and row.home == node:
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
                enter(self.state, BranchInput.ROLLBACK, row.branch, Rollback(row.gid, reason))
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
            if row is not None and row.state in _BEFORE_PHASE_TWO:
                enter(self.state, BranchInput.ROLLBACK, row.branch, Rollback(row.gid, message.reason))
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

    def swept(self, resource: str, held: Container[BranchId], began_ms: int, now_ms: int) -> list[Gid]:
        """A look at *resource* that was begun at *began_ms* has found *held* prepared; return the branches that are not any more.

        Other hands have ended them, or their database has lost them.  They are asked for no more: a process that is told to finish
        one has the database prove what became of it (rule 16), and if it is there after all, the next look finds it.
        """
        self.state.begin(now_ms)
        gone = [
            row
            for row in self.state.rows.values()
            if row.gid.resource == resource
            and row.state is BranchState.PREPARED
            and row.branch not in held
            and max(row.in_doubt_ms + 1, self.state.closed_until_ms.get(row.xid, 0)) <= began_ms
        ]
        for row in gone:
            phase_two.expire(self.state, row, None)
        return [row.gid for row in gone]

    def resolve_foreign(self, gid: Gid, token: str, now_ms: int) -> Effects:
        """Ask the database for the end of a commit in one phase that another process had begun."""
        self.state.begin(now_ms)
        if gid.branch in self.state.rows:
            enter(self.state, BranchInput.RESOLVE, gid.branch, Resolve(gid.xid, gid.branch, gid.resource, token))
        else:
            row = self.state.enter_row(gid, BranchState.RESOLVING, now_ms)
            row.token = token
            self.state.do(Operation.ONE_PHASE_RESULT, row)
        return self.state.out


_S, _I = BranchState, BranchInput

_MESSAGES: Final[dict[type, BranchInput]] = {
    Prepare: _I.PREPARE,
    CommitOnePhase: _I.COMMIT_ONE_PHASE,
    Decide: _I.DECIDE,
    Commit: _I.COMMIT,
    Rollback: _I.ROLLBACK,
    Resolve: _I.RESOLVE,
}

_UNPROMISED: Final = frozenset({_S.VOTING, _S.ONE_PHASE})
"""What is under way here may be broken off at the deadline; everything else that is must be waited for."""

_BEFORE_PHASE_TWO: Final = frozenset({_S.ACTIVE, _S.VOTING, _S.PREPARED})
"""How a branch of an aborted transaction may stand, of which its root may not know that it has voted."""
_PROMISED: Final = frozenset({_S.COMMITTING, _S.ABORTING, _S.RESOLVING})
"""What is under way here may take its time, and is trouble when it does (rule 20)."""
