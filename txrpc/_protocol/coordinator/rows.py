"""One transaction as its coordinator sees it: the state names, the inputs' names, and the record that the table works on."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from txrpc._protocol.messages import BranchRef, Owner, Vote, Wait
from txrpc._protocol.records import Decision, PreparedBranch
from txrpc.errors import AbortCode, Reason
from txrpc.ids import BranchId, Epoch, Gid, Xid

__all__ = ["BranchRow", "Input", "State", "TransactionRow", "aborted_vote"]


class State(enum.Enum):
    """Where a transaction stands.  ABSENT, COMMITTED and ABORTED have no record in memory (see `EndedTransactions`)."""

    ABSENT = "absent"
    PREPARING = "preparing"  # votes are missing
    ONE_PHASE = "one phase"  # its only branch was told to commit at once
    RECORDING = "recording"  # the decision is on its way into the log: neither outcome may be told
    COMMITTING = "committing"  # the decision is durable; a branch has not acknowledged
    COMMITTED = "committed"
    ABORTED = "aborted"


class Input(enum.Enum):
    """What can happen to a transaction."""

    COMMIT_REQUEST = "commit request"
    ROLLBACK_REQUEST = "rollback request"
    OUTCOME_REQUEST = "outcome request"
    VOTED = "voted"
    COMMITTING = "committing"
    ONE_PHASE_DONE = "one phase done"
    RESOLVED = "resolved"
    ACKED = "acked"
    LOGGED = "logged"
    NOT_LOGGED = "not logged"
    SESSION_LOST = "session lost"
    SESSION_FOUND = "session found"
    TIME_UP = "time up"


@dataclass(slots=True)
class BranchRow:
    """A branch within a coordinator's transaction.  `session` is where it was last told something, while that is open."""

    ref: BranchRef
    vote: Vote | None
    token: str
    session: int | None = None
    acked: bool = False
    """Proven to have ended as decided, or closed by an operator (rules 6, 16)."""
    trouble: str = ""
    """Why it has not, for people (rule 14)."""


@dataclass(slots=True)
class TransactionRow:
    """The mutable record of one transaction between its commit request and its end."""

    xid: Xid
    epoch: Epoch
    state: State
    branches: dict[BranchId, BranchRow]
    begun_ms: int
    time_up_ms: int
    """When to look at it again: the deadline, then the end of the wait for acknowledgements."""
    missing: int = 0
    """Votes, then acknowledgements, that have not come."""
    waiters: dict[int, Wait] = field(default_factory=dict)
    """Sessions to tell the outcome."""
    heuristic: str = ""
    """A sentence if a branch was found ended against the decision (rule 1)."""

    def gid(self, group: str, owner: Owner, branch: BranchRow) -> Gid:
        """The identifier under which the database of *branch* holds it."""
        ref = branch.ref
        return Gid(group, owner.node, self.epoch, self.xid, ref.branch, ref.participant, ref.resource)

    def prepared(self) -> tuple[PreparedBranch, ...]:
        """The branches that must be told of a commit."""
        return tuple(
            PreparedBranch(b.ref.branch, b.ref.participant, b.ref.resource, b.token)
            for b in self.branches.values()
            if b.vote is Vote.PREPARED
        )

    def unfinished(self) -> tuple[str, ...]:
        """The resources whose prepared branch has not acknowledged, sorted."""
        return tuple(
            sorted({b.ref.resource for b in self.branches.values() if b.vote is Vote.PREPARED and not b.acked})
        )

    @classmethod
    def recovered(cls, decision: Decision, now_ms: int) -> TransactionRow:
        """A decision that an earlier epoch made durable and did not finish."""
        branches = {
            p.branch: BranchRow(BranchRef(p.branch, p.resource, p.participant, 0), Vote.PREPARED, p.token)
            for p in decision.branches
        }
        return cls(decision.xid, decision.epoch, State.COMMITTING, branches, now_ms, now_ms, missing=len(branches))


def aborted_vote(branches: dict[BranchId, BranchRow]) -> Reason | None:
    """The early vote that already dooms the transaction, if there is one.  (Early ABORT votes carry no reason of their own.)"""
    for branch in branches.values():
        if branch.vote is Vote.ABORT:
            return Reason(AbortCode.CANNOT_PREPARE, f"{branch.ref.resource} voted to abort")
    return None
