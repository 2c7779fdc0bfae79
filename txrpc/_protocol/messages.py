"""What the parties of two-phase commit say to each other, as frozen values.

These are the inputs and the sent effects of the state machines.  `txrpc._wire.codec` turns them to protobuf and back; nothing
in this package knows that bytes exist.
"""

from __future__ import annotations

from dataclasses import dataclass

from txrpc._protocol.calls import BranchRef, CallReport, Owner, TransactionContext
from txrpc._protocol.deciding import AboutRegister, Decide, FromRegister, Votes
from txrpc._protocol.outcomes import FinishResult, Outcome, Vote, Wait
from txrpc.errors import Reason
from txrpc.ids import BranchId, Epoch, Gid, ParticipantId, RegisterId, Xid

__all__ = [
    "PROTOCOL_VERSION",
    "Abandon",
    "AboutEnd",
    "Acked",
    "BranchAnswer",
    "BranchRef",
    "CallReport",
    "Commit",
    "CommitOnePhase",
    "CommitRequest",
    "Committing",
    "FinishResult",
    "FromCoordinator",
    "GoAway",
    "Hello",
    "Inquiry",
    "OnePhaseDone",
    "OnePhaseToken",
    "Outcome",
    "OutcomeReply",
    "OutcomeRequest",
    "Owner",
    "Prepare",
    "Resolve",
    "Resolved",
    "ResourceInfo",
    "Rollback",
    "RollbackRequest",
    "Takeover",
    "Tick",
    "ToCoordinator",
    "TransactionContext",
    "Trouble",
    "Vote",
    "Voted",
    "Wait",
    "Welcome",
]

PROTOCOL_VERSION = 1


@dataclass(frozen=True, slots=True)
class ResourceInfo:
    """A resource as a session announces it.

    `identity` names the database behind it, however it is reached.  `trouble`: why the process cannot use it yet; it is given
    nothing about that resource until it says Hello again without.  `register`: the one that it decides in, if it does.
    """

    name: str
    kind: str
    identity: str = ""
    trouble: str = ""
    register: RegisterId | None = None


# ------------------------------------------------------------------------------------------ process -> coordinator


@dataclass(frozen=True, slots=True)
class Hello:
    """First message of a session; said again on it when the process's resources have changed, and then changes nothing else.

    `seen` is the owner (node, epoch) that this process last had a session with, if any; `position` the greatest position of its
    log that this process has heard of (rule 18).  `version` goes up with every change of `resources`.
    """

    protocol: int
    group: str
    participant: ParticipantId
    process: str
    resources: tuple[ResourceInfo, ...] = ()
    seen: Owner | None = None
    position: int = 0
    version: int = 0


@dataclass(frozen=True, slots=True)
class CommitRequest:
    """The root asks for the commit.  `begun_tick` is the coordinator's own clock as the client knew it at begin.

    If its branches are under a register, it asks for their votes only (`Votes`), and decides itself.  With *register* it gives that
    away: the coordinator has the transaction decided there, once all others have voted, by the branch *decider*, with that one's
    work; None: by the row alone.
    """

    xid: Xid
    epoch: Epoch
    begun_tick: int
    branches: tuple[BranchRef, ...]
    time_left_ms: int
    wait: Wait = Wait.ACKNOWLEDGED
    register: RegisterId | None = None
    decider: BranchId | None = None


@dataclass(frozen=True, slots=True)
class RollbackRequest:
    """The root gives up: every branch that it knows of is rolled back now instead of at its deadline.

    *epoch* and *begun_tick* as for `CommitRequest`: what may have been decided and forgotten is looked up first.
    *everywhere*: calls are still running, so that there may be branches that it does not know of (rule 19).
    """

    xid: Xid
    epoch: Epoch
    begun_tick: int
    branches: tuple[BranchRef, ...]
    reason: Reason
    everywhere: bool = False


@dataclass(frozen=True, slots=True)
class OutcomeRequest:
    """A root that lost the answer asks for the outcome of *xid*, begun under *epoch* at that coordinator's *begun_tick*.

    Asking ends it: a transaction that is not being decided is presumed aborted, and a late commit request refused.
    `branches` is what the commit request listed, if there was one: a commit in one phase leaves no record, so its only branch
    has to be asked.  `register`: where it is decided, if not here; asking claims it.
    """

    xid: Xid
    epoch: Epoch
    begun_tick: int
    branches: tuple[BranchRef, ...] = ()
    register: RegisterId | None = None


@dataclass(frozen=True, slots=True)
class Voted:
    """Answer to Prepare.  `token` is the database's own transaction id, by which it can be asked for the truth later.

    `register`: under which one it was given; None: under a coordinator.
    """

    xid: Xid
    branch: BranchId
    vote: Vote
    reason: Reason | None = None
    token: str = ""
    register: RegisterId | None = None


@dataclass(frozen=True, slots=True)
class Committing:
    """Sent before a commit in one phase is given to the database, with the token by which its end can be learnt."""

    xid: Xid
    branch: BranchId
    token: str


@dataclass(frozen=True, slots=True)
class OnePhaseDone:
    """Answer to CommitOnePhase, and to Decide."""

    xid: Xid
    branch: BranchId
    result: Outcome
    reason: Reason | None = None


@dataclass(frozen=True, slots=True)
class Acked:
    """Answer to Commit: what the database said.  To Rollback only if it had been committed by hand."""

    xid: Xid
    branch: BranchId
    finish: FinishResult
    resource: str = ""


@dataclass(frozen=True, slots=True)
class Inquiry:
    """A prepared branch that has not heard its decision asks.

    `since_ms`: how long it has been prepared.  `time_left_ms`: how long its root may still take to ask for the commit, as far
    as the asking process knows; 0 lets the coordinator presume abort at once.
    """

    gid: Gid
    since_ms: int = 0
    time_left_ms: int = 0


@dataclass(frozen=True, slots=True)
class Trouble:
    """What keeps a process from doing what it was told about a branch (rule 20); None: nothing any more."""

    gid: Gid
    reason: Reason | None


@dataclass(frozen=True, slots=True)
class Resolved:
    """Answer to Resolve.  UNKNOWN means that the database has forgotten; no answer is sent while it is still running."""

    xid: Xid
    branch: BranchId
    result: Outcome


# ------------------------------------------------------------------------------------------ coordinator -> process


@dataclass(frozen=True, slots=True)
class Welcome:
    """Answer to Hello: who the coordinator is, how far its log has come, and what it allows.

    `heard`: the version of the Hello whose resources it has accepted.
    """

    owner: Owner
    tick: int
    max_timeout_ms: int
    max_branches: int
    max_message_bytes: int
    position: int = 0
    heard: int = 0


@dataclass(frozen=True, slots=True)
class Tick:
    """The coordinator's own coarse clock (see `txrpc._protocol.coordinator.machine`), and how far its log has come.

    Also the answer to a Hello that is said again.  `heard` as in `Welcome`.
    """

    tick: int
    position: int = 0
    heard: int = 0


@dataclass(frozen=True, slots=True)
class Prepare:
    """First phase: vote on this branch, in which the root saw *calls* calls complete."""

    xid: Xid
    branch: BranchId
    calls: int


@dataclass(frozen=True, slots=True)
class CommitOnePhase:
    """The only branch that may have written: commit it or roll it back, and say which."""

    xid: Xid
    branch: BranchId
    calls: int


@dataclass(frozen=True, slots=True)
class Commit:
    """Second phase: commit this prepared branch.  Goes to any session of its resource, hence the whole identifier."""

    gid: Gid
    token: str = ""
    position: int = 0


@dataclass(frozen=True, slots=True)
class Rollback:
    """The transaction is aborted: roll this branch back, prepared or not."""

    gid: Gid
    reason: Reason
    token: str = ""


@dataclass(frozen=True, slots=True)
class Abandon:
    """The transaction is aborted, and not all of its branches are known: what there is of it is rolled back, and none begun."""

    xid: Xid
    reason: Reason


@dataclass(frozen=True, slots=True)
class Resolve:
    """The process that was committing this branch in one phase is gone: ask the database how transaction *token* ended."""

    xid: Xid
    branch: BranchId
    resource: str
    token: str


@dataclass(frozen=True, slots=True)
class OutcomeReply:
    """Answer to a commit, rollback or outcome request.

    `pending` lists resources whose branch has not acknowledged yet; `heuristic` is a sentence if a branch ended the other way.
    """

    xid: Xid
    outcome: Outcome
    reason: Reason | None = None
    pending: tuple[str, ...] = ()
    heuristic: str = ""
    position: int = 0


@dataclass(frozen=True, slots=True)
class OnePhaseToken:
    """To a root that waits for a commit in one phase whose process is gone: how its end can be learnt."""

    xid: Xid
    token: str


@dataclass(frozen=True, slots=True)
class Takeover:
    """The node that says it is here now, because its own process is not: say Hello to it on this session."""


@dataclass(frozen=True, slots=True)
class GoAway:
    """The coordinator ends this session.  `retry`: whether connecting again may help.

    Of a node that was taken over it ends what that node says on the session, and not the session.
    """

    code: str
    text: str
    retry: bool


AboutEnd = CommitRequest | RollbackRequest | OutcomeRequest
"""What roots say about the end of a transaction."""

AboutBranch = Prepare | CommitOnePhase | Commit | Rollback | Abandon | Resolve
"""What a coordinator says about a branch to a process that has it, or can finish it."""

BranchAnswer = Voted | Committing | OnePhaseDone | Resolved | Acked
"""What a process answers about a branch that it was asked about."""

ToCoordinator = Hello | AboutEnd | BranchAnswer | Inquiry | Trouble | FromRegister
FromCoordinator = (
    Welcome | Takeover | Tick | AboutBranch | Decide | AboutRegister | OnePhaseToken | OutcomeReply | Votes | GoAway
)
