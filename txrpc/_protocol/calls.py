"""What rides on business calls: the context on the way out, the branches on the way back."""

from __future__ import annotations

from dataclasses import dataclass

from txrpc._protocol.outcomes import Vote
from txrpc._protocol.records import PreparedBranch
from txrpc.errors import Reason
from txrpc.ids import BranchId, Epoch, ParticipantId, RegisterId, Xid

__all__ = ["BranchRef", "CallReport", "Owner", "TransactionContext"]


@dataclass(frozen=True, slots=True)
class Owner:
    """The coordinator that a transaction belongs to: a node in one epoch."""

    node: str
    epoch: Epoch


@dataclass(frozen=True, slots=True)
class TransactionContext:
    """What travels with every call of a transaction, in the request metadata ``txrpc-context-bin``."""

    group: str
    xid: Xid
    owner: Owner
    time_left_ms: int
    read_only: bool = False
    call_reads_only: bool = False
    """The call may only read, though the transaction may write elsewhere."""
    final: bool = False
    """Its caller says that the transaction calls this process no more: its branches vote before the reply (an early vote)."""
    register: RegisterId | None = None
    """Where the decision will be, if a resource decides and not the owner."""
    decide: tuple[PreparedBranch, ...] | None = None
    """Of the transaction's last call, to the process that has the register: all others have voted, and these are prepared."""


@dataclass(frozen=True, slots=True)
class BranchRef:
    """A branch as the root sees it: what replies carried home and what the commit request lists.

    `calls` is the number of completed calls that used the branch *and whose reply reached the root* (rule 9); a reply
    carries the calls of its own subtree and the root adds them up.  `vote`, `token` and `counted` are set for an early vote:
    `counted` is how many calls the branch had completed, of which no Prepare can tell it what the root saw.  `register`: under
    which one it is, or will be, prepared; None: under a coordinator.
    """

    branch: BranchId
    resource: str
    participant: ParticipantId
    calls: int
    vote: Vote | None = None
    token: str = ""
    counted: int = 0
    register: RegisterId | None = None

    @property
    def prepared(self) -> PreparedBranch:
        """What a decision keeps of the branch, once it has voted to commit."""
        return PreparedBranch(self.branch, self.participant, self.resource, self.token)


@dataclass(frozen=True, slots=True)
class CallReport:
    """What a reply carries home, in the trailing metadata ``txrpc-branches-bin``: branches used, and whether doomed."""

    branches: tuple[BranchRef, ...] = ()
    doomed: Reason | None = None
    committed: bool = False
    """Whether the call has decided the transaction, and its work is committed."""
