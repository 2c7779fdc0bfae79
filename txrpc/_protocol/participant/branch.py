"""One branch as its own process sees it: states, inputs, operations, and the row that the participant's table works on."""

from __future__ import annotations

from dataclasses import dataclass, field

from txrpc._enums import KeyEnum
from txrpc._protocol.messages import FinishResult, Outcome, ToCoordinator, Vote
from txrpc._protocol.records import PreparedBranch
from txrpc.errors import Reason
from txrpc.ids import BranchId, Gid, Xid

__all__ = ["BranchInput", "BranchState", "Deciding", "Do", "Effects", "Operation", "ParticipantBranch"]


class BranchState(KeyEnum):
    """Where a branch stands in its own process."""

    ABSENT = "absent"
    ACTIVE = "active"
    VOTING = "voting"  # PREPARE is on its way to the database
    PREPARED = "prepared"  # in doubt: only the coordinator may end it
    ONE_PHASE = "one phase"  # COMMIT is on its way to the database
    COMMITTING = "committing"  # COMMIT PREPARED is, or waits for another try
    ABORTING = "undoing"  # ROLLBACK PREPARED is, or waits for another try
    ROLLING_BACK = "rolling back"  # unprepared work is being undone
    RESOLVING = "resolving"  # another process's commit in one phase: asking the database how it ended
    ENDED = "ended"


class BranchInput(KeyEnum):
    """What can happen to a branch."""

    PREPARE = "prepare"
    VOTE_EARLY = "vote early"  # the transaction's last call here has ended
    COMMIT_ONE_PHASE = "commit one phase"
    DECIDE = "decide"  # commit in one phase, with the decision
    COMMIT = "commit"
    ROLLBACK = "rollback"
    RESOLVE = "resolve"
    LOCAL_COMMIT = "local commit"
    LOCAL_ROLLBACK = "local rollback"
    RELEASED = "released"  # the last user of its work left
    TIME_UP = "time up"
    PREPARED = "prepared"
    READ_ONLY = "read only"
    KEPT_OPEN = "kept open"  # it wrote nothing, and was not to vote early for that
    PREPARE_FAILED = "prepare failed"
    ONE_PHASE_ENDED = "one phase ended"
    FINISHED = "finished"
    FINISH_FAILED = "finish failed"
    ROLLED_BACK = "rolled back"


class Operation(KeyEnum):
    """What the shell is asked to do with a resource; the names are the resource port's."""

    PREPARE = "prepare"
    COMMIT_ONE_PHASE = "commit_one_phase"
    ROLLBACK = "rollback"
    INTERRUPT = "interrupt"
    COMMIT_PREPARED = "commit_prepared"
    ROLLBACK_PREPARED = "rollback_prepared"
    ONE_PHASE_RESULT = "one_phase_result"
    ASK_AGAIN = "ask_again"
    """No step asks for it: what ends the work of a branch goes on as this one when its connection broke."""


@dataclass(frozen=True, slots=True)
class Deciding:
    """A local commit that decides its transaction: all others have voted, and these are prepared."""

    calls: int | None
    branches: tuple[PreparedBranch, ...]


@dataclass(frozen=True, slots=True)
class Do:
    """Ask a resource for *operation* on the branch *gid*, then step its result (none for INTERRUPT)."""

    operation: Operation
    gid: Gid
    token: str = ""
    early: bool = False
    """Of PREPARE: the transaction goes on elsewhere, so that what has been read may have to stay as it is."""
    decides: tuple[PreparedBranch, ...] | None = None
    """Of COMMIT_ONE_PHASE: the decision is to be written into the resource's register, with these branches."""


@dataclass(slots=True)
class Effects:
    """The effects of one step of a participant.

    They may be applied in any order: what depends on an operation is sent by the step that takes its result.
    """

    do: list[Do] = field(default_factory=list)
    """Operations to start.  Each brings its result back as an input, except INTERRUPT, which makes another one end sooner."""
    send: list[ToCoordinator] = field(default_factory=list)
    """Messages to the coordinator of their branch, in this order.  Without a session they are dropped: code that needs an answer
    asks again."""
    settle: list[tuple[BranchId, Outcome, Reason | None]] = field(default_factory=list)
    """Branches that this process ended by itself, for those who wait for that: at most once for each."""
    votes: list[tuple[BranchId, Vote | None, Reason | None]] = field(default_factory=list)
    """Early votes, for the calls whose replies carry them: at most one for each branch.  None: it does not vote yet."""
    mistakes: list[str] = field(default_factory=list)
    """Inputs that the table does not allow, for the log: the sender's mistake, or this program's.  They changed nothing."""


@dataclass(slots=True)
class ParticipantBranch:
    """The mutable record of one branch, and after its end its tombstone."""

    gid: Gid
    state: BranchState
    deadline_ms: int
    """Monotonic; later, when to look again (a retry, an inquiry, the tombstone's end)."""
    calls: int = 0
    """Completed calls that used it (rule 9)."""
    running: int = 0
    """Calls that have used it and are still running."""
    users: int = 0
    """Blocks that are using its work now."""
    at_work: bool = False
    """Whether an operation runs whose result has not come: until then no other one may start."""
    early: bool = False
    """Whether the reply of the transaction's last call here carries its vote, and not a message to the coordinator."""
    voted: Vote | None = None
    """Its answer, once given: the same question has the same answer (rule 12)."""
    doom: Reason | None = None
    """Why it may not be committed any more: an error in its work, or in a call that used it."""
    vote_reason: Reason | None = None
    """Why the database refused to prepare or to commit it."""
    token: str = ""
    """By which its database can prove how it ended (rule 16)."""
    rollback_asked: Reason | None = None
    """Why a rollback was asked for while an operation was at work; its result is waited for."""
    attempts: int = 0
    """How often finishing it has failed; paces the repetitions and the reports (rule 20)."""
    home: str = ""
    """The coordinator that its vote and its reports are for."""
    decides: tuple[PreparedBranch, ...] | None = None
    """The other branches, if the commit of this one is the decision about its transaction."""
    local: bool = False
    """Whether a local waiter, not the coordinator, is to be told how a commit in one phase or a rollback ended."""
    ask_resolved: bool = False
    """Whether the coordinator waits for `Resolved`."""
    outcome: Outcome = Outcome.UNKNOWN
    """Of a tombstone."""
    finish: FinishResult = FinishResult.DONE
    """What the database found when it was last told to finish it."""
    in_doubt_ms: int = 0
    """When it was prepared."""
    working_ms: int = 0
    """When the operation at work was started."""
    trouble: Reason | None = None
    """What the coordinator was told last of why it does not end (rule 20)."""

    @property
    def why(self) -> Reason | None:
        """Return why it is rolled back, if it is."""
        return self.vote_reason or self.doom or self.rollback_asked

    @property
    def xid(self) -> Xid:
        """The transaction."""
        return self.gid.xid

    @property
    def branch(self) -> BranchId:
        """The branch's own identifier."""
        return self.gid.branch
