"""One transaction as its coordinator sees it: the state names, the inputs' names, and the record that the table works on."""

from __future__ import annotations

from dataclasses import dataclass, field

from txrpc._enums import KeyEnum
from txrpc._protocol.deciding import Decided
from txrpc._protocol.messages import BranchRef, Inquiry, OutcomeRequest, Owner, Vote, Wait
from txrpc._protocol.records import Decision, PreparedBranch
from txrpc.ids import BranchId, Epoch, Gid, RegisterId, Xid

__all__ = ["BranchRow", "Input", "Question", "State", "TransactionRow"]


class State(KeyEnum):
    """Where a transaction stands.  ABSENT, COMMITTED and ABORTED have no record in memory (see `EndedTransactions`)."""

    ABSENT = "absent"
    PREPARING = "preparing"  # votes are missing
    ONE_PHASE = "one phase"  # its only branch was told to commit at once
    POLLED = "polled"  # all have voted, and the root, which decides in a register, has been told
    DECIDING = "deciding"  # all others have voted, and the branch that decides, or its register, was told to decide
    LEFT = "left"  # it was told once, and has not answered: whether it has decided only the register knows
    RECORDING = "recording"  # the decision is on its way into the log: neither outcome may be told
    COMMITTING = "committing"  # the decision is durable; a branch has not acknowledged
    COMMITTED = "committed"
    ABORTED = "aborted"


class Input(KeyEnum):
    """What can happen to a transaction."""

    COMMIT_REQUEST = "commit request"
    ROLLBACK_REQUEST = "rollback request"
    OUTCOME_REQUEST = "outcome request"
    VOTED = "voted"
    COMMITTING = "committing"
    ONE_PHASE_DONE = "one phase done"
    RESOLVED = "resolved"
    ACKED = "acked"
    DECIDED = "decided"  # a register has it COMMITTED
    CLAIMED = "claimed"  # a register has it ABORTED
    UNDECIDED = "undecided"  # a register was to decide it, and says neither
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
    register: RegisterId | None = None
    """Where it is decided, if not here."""
    may_decide: bool = False
    """Whether the root has given the right to decide to this coordinator."""
    decider: BranchId | None = None
    """The branch that then decides, with its work."""

    def gid(self, group: str, owner: Owner, branch: BranchRow) -> Gid:
        """The identifier under which the database of *branch* holds it."""
        ref = branch.ref
        if ref.register is not None:
            return Gid(group, "", Epoch(0), self.xid, ref.branch, ref.participant, ref.resource, ref.register)
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
        return cls._committing(decision.xid, decision.epoch, decision.branches, None, now_ms)

    @classmethod
    def decided(cls, decided: Decided, now_ms: int) -> TransactionRow:
        """A decision that is in a register."""
        return cls._committing(decided.xid, Epoch(0), decided.branches, decided.register, now_ms)

    @classmethod
    def _committing(
        cls, xid: Xid, epoch: Epoch, listed: tuple[PreparedBranch, ...], register: RegisterId | None, now_ms: int
    ) -> TransactionRow:
        branches = {
            p.branch: BranchRow(
                BranchRef(p.branch, p.resource, p.participant, 0, register=register), Vote.PREPARED, p.token
            )
            for p in listed
        }
        missing = len(branches)
        return cls(xid, epoch, State.COMMITTING, branches, now_ms, now_ms, missing, register=register)


@dataclass(slots=True)
class Question:
    """What a register is being asked about a transaction: once at a time, for all that wait for the answer."""

    register: RegisterId
    session: int
    claim: bool
    commit: bool = False
    """Whether it was to make the transaction COMMITTED."""
    times: int = 1
    """How often it was put: of several answers it is not known which question each is to."""
    waiting: dict[tuple[int, BranchId | None], Inquiry | OutcomeRequest] = field(default_factory=dict)
    """By session, and branch if one has asked."""
