"""The parts of `verification.explorer_model`: databases, services, a client, and the links between them and the coordinator."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from txrpc._protocol.coordinator.events import Limits
from txrpc._protocol.coordinator.machine import Coordinator
from txrpc._protocol.deciding import Decided, DecisionDone, RegisterAnswer, RegisterQuestion, Votes
from txrpc._protocol.messages import (
    PROTOCOL_VERSION,
    BranchRef,
    CommitRequest,
    FinishResult,
    Hello,
    Outcome,
    OutcomeReply,
    OutcomeRequest,
    Resolve,
    ResourceInfo,
    RollbackRequest,
    Tick,
    Vote,
    Welcome,
)
from txrpc._protocol.outcomes import Found
from txrpc._protocol.participant.branch import BranchInput, Do, Effects, Operation
from txrpc._protocol.participant.machine import Participant
from txrpc._protocol.records import PreparedBranch
from txrpc.errors import AbortCode, Reason
from txrpc.ids import BranchId, Epoch, Gid, ParticipantId, RegisterId, Xid

if TYPE_CHECKING:
    from verification.explorer_model import SmallWorld

__all__ = [
    "GAVE_UP",
    "LIMITS",
    "LONGEST_MS",
    "REFUSED",
    "REGISTER",
    "TIMEOUT_MS",
    "XID",
    "Client",
    "Database",
    "Ledger",
    "Link",
    "Service",
]

REGISTER = RegisterId(b"ledger".ljust(24, b"."))
XID = Xid.make(1_000, b"0123456789")
LIMITS = Limits(max_timeout_ms=60_000, recovery_wait_ms=0)
TIMEOUT_MS = 5_000
LONGEST_MS = 300_000
"""By then all must have ended: the deadline, and some rounds of the slowest question."""
REFUSED = Reason(AbortCode.CANNOT_PREPARE, "the database refused")
GAVE_UP = Reason(AbortCode.REQUESTED, "the root gave up")


def _half() -> float:
    return 0.5


@dataclass(slots=True)
class Database:
    """What one database holds: how each branch stands, and what its next PREPARE will answer."""

    branches: dict[BranchId, str] = field(default_factory=dict)
    prepared: dict[BranchId, Gid] = field(default_factory=dict)
    on_prepare: BranchInput = BranchInput.PREPARED
    forced: int = 0
    """Forced writes."""


@dataclass(slots=True)
class Ledger:
    """A database that decides: its register, and how the root's work in it stands; "elsewhere" if it is not the root's own."""

    work: str = "active"
    row: Found = Found.OPEN
    branches: tuple[PreparedBranch, ...] = ()
    worker: BranchId | None = None
    """The branch of a service's whose work is in this database."""
    id: RegisterId = REGISTER
    lost: bool = False
    """Whether it has come back without a row that it had."""

    def ask(
        self, register: RegisterId, claim: bool, commit: tuple[PreparedBranch, ...] | None
    ) -> tuple[Found, tuple[PreparedBranch, ...]]:
        """What the register says; *claim*: if that is open, it is aborted from now on, or committed, with *commit*."""
        if self.work == "inserted":  # a claim waits for it
            return (Found.UNREACHABLE if claim else Found.OPEN), ()
        if self.row is Found.OPEN and register != self.id:
            return Found.LOST, ()
        if self.row is Found.OPEN and commit is not None:
            self.row, self.branches = Found.COMMITTED, commit
        elif self.row is Found.OPEN and claim:
            self.row = Found.ABORTED
        return self.row, self.branches if self.row is Found.COMMITTED else ()


class Service:
    """One incarnation of a process that has one resource."""

    def __init__(self, world: SmallWorld, resource: str, number: int) -> None:
        self.world, self.resource = world, resource
        self.id = ParticipantId(number.to_bytes(8, "big"))
        self.table = Participant(_half)
        self.database = world.databases[resource]
        self.session = 0

    def hello(self) -> Hello:
        """What it says first."""
        resources = (ResourceInfo(self.resource, "test"), *self.world.ledger_info)
        return Hello(PROTOCOL_VERSION, "bank", self.id, self.resource, resources)

    def call(self) -> BranchRef:
        """Do the transaction's work here, in one completed call."""
        world = self.world
        node, epoch, register = ("c1", world.owner.epoch, None) if world.ledger is None else ("", Epoch(0), REGISTER)
        gid = Gid("bank", node, epoch, XID, BranchId(self.id), self.id, self.resource, register)
        self.table.open(gid, world.now_ms + TIMEOUT_MS, "c1").calls = 1
        self.database.branches[gid.branch] = "active"
        return BranchRef(gid.branch, self.resource, self.id, 1, register=register)

    def vote_early(self, ref: BranchRef) -> BranchRef:
        """Prepare before the reply; the vote rides home in it instead of going to the coordinator."""
        effects = self.table.step(BranchInput.VOTE_EARLY, ref.branch, self.world.now_ms)
        kind, detail = self._carry_out(effects.do[0])
        ((_branch, vote, _reason),) = self.table.step(kind, ref.branch, self.world.now_ms, detail).votes
        row = self.table.rows[ref.branch]
        return replace(ref, vote=vote, token=row.token, counted=row.calls)

    def take(self, message: Any) -> None:
        """A message of the coordinator's has come."""
        now_ms = self.world.now_ms
        if isinstance(message, Tick):
            return
        if isinstance(message, Welcome):
            self.honour(self.table.connected("c1", now_ms))
            self._sweep()
            self._look_through()
        elif isinstance(message, RegisterQuestion):
            self.world.jobs.append(("ask", self, message))
        elif isinstance(message, DecisionDone):
            held = [gid for database in self.world.databases.values() for gid in database.prepared]
            assert not held, "called done before every branch had committed"
        elif isinstance(message, Resolve) and message.token and message.branch not in self.table.rows:
            owner = self.world.owner
            gid = Gid("bank", owner.node, owner.epoch, message.xid, message.branch, self.id, message.resource)
            self.honour(self.table.resolve_foreign(gid, message.token, now_ms))
        else:
            self.honour(self.table.received(message, now_ms))

    def _look_through(self) -> None:
        """Say what the register has decided; that it is done is not remembered here, and may be said again."""
        ledger = self.world.ledger
        if ledger is not None and ledger.row is Found.COMMITTED:
            self.world.send_up(self.session, Decided(REGISTER, XID, ledger.branches))

    def answer(self, question: RegisterQuestion) -> None:
        """The database of the ledger, which this process reaches as well, has been asked."""
        assert self.world.ledger is not None
        found, branches = self.world.ledger.ask(question.register, question.claim, question.commit)
        self.world.send_up(self.session, RegisterAnswer(REGISTER, XID, found, branches))

    def woke(self) -> None:
        """Time has passed."""
        now_ms = self.world.now_ms
        self.honour(self.table.woke(now_ms))
        if self.world.ledger is not None and self.world.ledger.id != REGISTER:
            # Where a decision may be lost, it takes more than messages: a sweep, and an operator.
            self.table.swept(self.resource, self.database.prepared, now_ms, now_ms)
            self._sweep()

    def _sweep(self) -> None:
        for gid in list(self.database.prepared.values()):
            self.honour(self.table.in_doubt(gid, 0, self.world.now_ms))

    def honour(self, effects: Effects) -> None:
        """Do what the table says."""
        for message in effects.send:
            self.world.send_up(self.session, message)
        for do in effects.do:
            if do.operation is Operation.INTERRUPT:
                continue  # what is under way here does not hang: it ends by itself
            if do.operation is Operation.COMMIT_ONE_PHASE and do.decides is None:
                committing = self.table.committing(do.gid.branch, "token")
                if committing is not None:
                    self.world.send_up(self.session, committing)
            self.world.jobs.append(("operation", self, do))

    def end(self, do: Do) -> None:
        """An operation in the database has ended."""
        kind, detail = self._carry_out(do)
        self.honour(self.table.step(kind, do.gid.branch, self.world.now_ms, detail))

    def _carry_out(self, do: Do) -> tuple[BranchInput, object]:
        if do.decides is not None:
            return self._decide(do.gid, do.decides)
        result: tuple[BranchInput, object] = getattr(self, f"_{do.operation.value}")(do.gid)
        return result

    def _decide(self, gid: Gid, branches: tuple[PreparedBranch, ...]) -> tuple[BranchInput, object]:
        ledger = self.world.ledger
        assert ledger is not None
        assert ledger.row is not Found.COMMITTED, "decided twice"
        if ledger.row is Found.ABORTED or gid.register != ledger.id:
            self.database.branches[gid.branch] = "rolled back"
            return BranchInput.ONE_PHASE_ENDED, (Outcome.ABORTED, REFUSED)
        assert self.database.branches[gid.branch] == "active"
        assert "aborted" not in self.world.said, "decided after its abort was told"
        ledger.row, ledger.branches = Found.COMMITTED, branches
        self.database.branches[gid.branch] = "committed"
        return BranchInput.ONE_PHASE_ENDED, (Outcome.COMMITTED, None)

    def _prepare(self, gid: Gid) -> tuple[BranchInput, object]:
        kind = self.database.on_prepare
        if kind is BranchInput.PREPARED:
            self.database.branches[gid.branch] = "prepared"
            self.database.prepared[gid.branch] = gid
            self.database.forced += 1
            return kind, "token"
        if kind is BranchInput.READ_ONLY:
            self.database.branches[gid.branch] = "read-only"
            return kind, None
        self.database.branches[gid.branch] = "rolled back"
        return kind, REFUSED

    def _commit_one_phase(self, gid: Gid) -> tuple[BranchInput, object]:
        assert self.database.branches[gid.branch] == "active"
        self.database.branches[gid.branch] = "committed"
        self.database.forced += 1
        return BranchInput.ONE_PHASE_ENDED, (Outcome.COMMITTED, None)

    def _rollback(self, gid: Gid) -> tuple[BranchInput, object]:
        assert self.database.branches[gid.branch] in ("active", "rolled back")
        self.database.branches[gid.branch] = "rolled back"
        return BranchInput.ROLLED_BACK, None

    def _commit_prepared(self, gid: Gid) -> tuple[BranchInput, object]:
        return self._finish(gid, "committed")

    def _rollback_prepared(self, gid: Gid) -> tuple[BranchInput, object]:
        return self._finish(gid, "rolled back")

    def _finish(self, gid: Gid, end: str) -> tuple[BranchInput, object]:
        if self.database.prepared.pop(gid.branch, None) is None:
            ended = self.database.branches.get(gid.branch)
            assert ended in (end, None), f"told to be {end}, but {ended} before"
            return BranchInput.FINISHED, FinishResult.ALREADY if ended else FinishResult.NOT_HERE
        self.database.branches[gid.branch] = end
        self.database.forced += end == "committed"
        return BranchInput.FINISHED, FinishResult.DONE

    def _one_phase_result(self, gid: Gid) -> tuple[BranchInput, object]:
        committed = self.database.branches[gid.branch] == "committed"
        result = Outcome.COMMITTED if committed else Outcome.ABORTED
        return BranchInput.ONE_PHASE_ENDED, (result, None)


class Client:
    """The root: asks once, and if the answer is lost asks for the outcome until it has one."""

    id = ParticipantId(b"theroot!")

    def __init__(self, world: SmallWorld) -> None:
        self.world = world
        self.session = 0
        self.owner = world.owner
        self.begun_tick = world.coordinator.state.tick
        self.refs: tuple[BranchRef, ...] = ()
        self.others: tuple[BranchRef, ...] = ()
        """The branches that have voted, where a database of its own decides."""
        self.asked = False
        self.replies: list[OutcomeReply] = []

    def hello(self) -> Hello:
        """What it says first."""
        ledger = self.world.ledger
        mine = self.world.ledger_info if ledger is not None and ledger.work != "elsewhere" else ()
        return Hello(PROTOCOL_VERSION, "bank", self.id, "client", mine)

    def commit(self, *refs: BranchRef, decider: BranchRef | None = None) -> None:
        """Ask for the commit.  Where a database elsewhere decides, that gives the right to decide away."""
        self.refs, self.asked = refs, True
        register = REGISTER if self.world.ledger is not None and self.world.ledger.work == "elsewhere" else None
        request = CommitRequest(XID, self.owner.epoch, self.begun_tick, refs, TIMEOUT_MS - 1_000, register=register)
        self.world.send_up(self.session, replace(request, decider=decider.branch if decider is not None else None))

    def decide(self, *refs: BranchRef) -> None:
        """All have voted: decide, in the database of its own."""
        self.asked, self.others = True, refs
        self.world.jobs.append(("insert", tuple(ref.prepared for ref in refs)))

    def refused(self) -> None:
        """Its database has refused the decision."""
        self.told(Outcome.ABORTED)
        request = RollbackRequest(XID, self.owner.epoch, self.begun_tick, self.others, GAVE_UP)
        self.world.send_up(self.session, request)

    def told(self, outcome: Outcome) -> None:
        """How it has ended, as its own database says, or itself before that was asked."""
        self.world.watch(reply := OutcomeReply(XID, outcome))
        self.replies.append(reply)

    def give_up(self, *refs: BranchRef) -> None:
        """Ask for the rollback."""
        self.refs, self.asked = refs, True
        if self.world.ledger is not None:
            self.world.ledger.work = "rolled back"
            self.told(Outcome.ABORTED)
        self.world.send_up(self.session, RollbackRequest(XID, self.owner.epoch, self.begun_tick, refs, GAVE_UP))

    def take(self, message: Any) -> None:
        """A message of the coordinator's has come."""
        ledger = self.world.ledger
        unknown = isinstance(message, OutcomeReply) and message.outcome is Outcome.UNKNOWN
        unknown = unknown and message.reason is not None and message.reason.code is AbortCode.RESOURCE_UNAVAILABLE
        if ledger is not None and ledger.work != "elsewhere":
            self._take_votes(message, ledger)
        elif isinstance(message, Welcome) or (unknown and ledger is not None):
            if self.asked and not self.replies:
                register = REGISTER if ledger is not None else None
                request = OutcomeRequest(XID, self.owner.epoch, self.begun_tick, self.refs, register)
                self.world.send_up(self.session, request)
        elif isinstance(message, OutcomeReply):
            self.replies.append(message)

    def _take_votes(self, message: Any, ledger: Ledger) -> None:
        polling = bool(self.refs) and not self.replies
        if isinstance(message, Votes) and polling:
            refs, self.refs = self.refs, ()
            listed = {each.branch for each in message.branches}
            self.decide(*[replace(ref, vote=Vote.PREPARED) for ref in refs if ref.branch in listed])
        elif isinstance(message, OutcomeReply | Welcome) and polling:
            self.give_up(*self.refs)  # not all have voted, or the coordinator is gone that was asked for that
        elif isinstance(message, Welcome) and ledger.row is Found.COMMITTED:
            self.world.send_up(self.session, Decided(REGISTER, XID, ledger.branches))

    def woke(self) -> None:
        """Nothing here is timed."""


@dataclass(slots=True)
class Link:
    """One session's two streams."""

    peer: Service | Client
    coordinator: Coordinator
    up: deque[Any] = field(default_factory=deque)
    down: deque[Any] = field(default_factory=deque)
