"""Names and short hands for tests of the coordinator: a core, numbered sessions, one transaction, and what was sent.

Sessions 1 and 2 are clients.  Session 11 is process P, which has `accounts` and `audit`; session 12 is Q, which has `accounts`
too; session 13 is R, which has `stock` alone; 14 is L, whose `ledger` has a register.  A branch is a small number; unless a test
says otherwise it lives in P.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from txrpc._protocol.coordinator.events import (
    Event,
    Limits,
    Logged,
    Looked,
    Lookup,
    NotLogged,
    Output,
    Received,
    SessionClosed,
    SessionOpened,
    Woke,
)
from txrpc._protocol.coordinator.machine import Coordinator
from txrpc._protocol.coordinator.rows import State
from txrpc._protocol.deciding import Decided, RegisterAnswer, Registers
from txrpc._protocol.messages import (
    PROTOCOL_VERSION,
    Acked,
    BranchRef,
    CommitRequest,
    Committing,
    FinishResult,
    Hello,
    Inquiry,
    OnePhaseDone,
    Outcome,
    OutcomeReply,
    OutcomeRequest,
    Owner,
    Resolved,
    ResourceInfo,
    RollbackRequest,
    Tick,
    Vote,
    Voted,
    Wait,
)
from txrpc._protocol.outcomes import Found
from txrpc._protocol.records import Decision, Opened, PreparedBranch
from txrpc.errors import AbortCode, Reason
from txrpc.ids import BranchId, Epoch, Gid, ParticipantId, RegisterId, Xid

T0 = 1_000_000
"""When the tests begin, in monotonic milliseconds; the coordinator's own clock shows `CLOCK` then."""
CLOCK = 5_000_000_000
BEGUN = CLOCK // 1000
"""The tick at which every transaction here begins."""
EARLIER, EPOCH, STRANGE = Epoch.make(1, 7), Epoch.make(2, 7), Epoch.make(2, 8)
OWNER = Owner("c1", EPOCH)
LIMITS = Limits(max_timeout_ms=60_000, ack_wait_ms=5_000, recovery_wait_ms=0)
LEFT_MS = 4_000
"""How much time the root has left when it asks."""

CLIENT, OTHER_CLIENT, P, Q, R, L = 1, 2, 11, 12, 13, 14
RESOURCES = {CLIENT: (), OTHER_CLIENT: (), P: ("accounts", "audit"), Q: ("accounts",), R: ("stock",), L: ("ledger",)}
REGISTER = RegisterId(bytes(23) + b"r")
"""Where `ledger` decides."""
ENOUGH = Reason(AbortCode.REQUESTED, "the root gave up")
REFUSED = Reason(AbortCode.CANNOT_PREPARE, "the database refused")
FULL = Reason(AbortCode.LOG_UNAVAILABLE, "the disk is full")


def xid(number: int = 1) -> Xid:
    return Xid(number.to_bytes(16, "big"))


def bid(number: int) -> BranchId:
    return BranchId(number.to_bytes(8, "big"))


def participant(session: int) -> ParticipantId:
    """The process behind a session's number; a process that connects again keeps its last two digits."""
    return ParticipantId((session % 100).to_bytes(8, "big"))


def hello(session: int, identity: str = "", **changes: Any) -> Hello:
    resources = tuple(
        ResourceInfo(name, "test", identity, register=REGISTER if name == "ledger" else None)
        for name in RESOURCES[session % 100]
    )
    fields: dict[str, Any] = {"protocol": PROTOCOL_VERSION, "group": "bank", "participant": participant(session)}
    return Hello(**(fields | {"process": f"process {session}", "resources": resources} | changes))


def ref(number: int = 1, resource: str = "accounts", process: int = P, vote: Vote | None = None) -> BranchRef:
    return BranchRef(
        bid(number), resource, participant(process), 1, vote, f"t{number}" if vote is Vote.PREPARED else ""
    )


def gid(number: int = 1, tx: int = 1, resource: str = "accounts", process: int = P, epoch: Epoch = EPOCH) -> Gid:
    return Gid("bank", "c1", epoch, xid(tx), bid(number), participant(process), resource)


def registered(*refs: BranchRef) -> tuple[BranchRef, ...]:
    """The same branches of a transaction that `ledger` decides."""
    return tuple(replace(each, register=REGISTER) for each in refs)


ONE = (ref(1),)
TWO = (ref(1), ref(2, "audit"))
EARLY = (ref(1, vote=Vote.PREPARED), ref(2, "audit", vote=Vote.PREPARED))


def commit_request(
    refs: tuple[BranchRef, ...] = TWO,
    tx: int = 1,
    epoch: Epoch = EPOCH,
    tick: int = BEGUN,
    wait: Wait = Wait.ACKNOWLEDGED,
    register: RegisterId | None = None,
    decider: int | None = None,
) -> CommitRequest:
    """*register*: the right to decide is given away with it; *decider*: the number of the branch that then decides."""
    by = refs[decider - 1].branch if decider is not None else None
    return CommitRequest(xid(tx), epoch, tick, refs, LEFT_MS, wait, register, by)


def outcome_request(
    refs: tuple[BranchRef, ...] = TWO, tx: int = 1, epoch: Epoch = EPOCH, tick: int = BEGUN
) -> OutcomeRequest:
    return OutcomeRequest(xid(tx), epoch, tick, refs)


def rollback_request(
    refs: tuple[BranchRef, ...] = TWO, tx: int = 1, epoch: Epoch = EPOCH, tick: int = BEGUN
) -> RollbackRequest:
    return RollbackRequest(xid(tx), epoch, tick, refs, ENOUGH)


def voted(number: int, vote: Vote = Vote.PREPARED, tx: int = 1) -> Voted:
    return Voted(xid(tx), bid(number), vote, REFUSED if vote is Vote.ABORT else None, f"t{number}")


def committing(number: int = 1, tx: int = 1) -> Committing:
    return Committing(xid(tx), bid(number), f"t{number}")


def one_phase_done(result: Outcome = Outcome.COMMITTED, number: int = 1, tx: int = 1) -> OnePhaseDone:
    return OnePhaseDone(xid(tx), bid(number), result)


def resolved(result: Outcome = Outcome.COMMITTED, number: int = 1, tx: int = 1) -> Resolved:
    return Resolved(xid(tx), bid(number), result)


def acked(number: int, finish: FinishResult = FinishResult.DONE, tx: int = 1) -> Acked:
    return Acked(xid(tx), bid(number), finish)


def inquiry(number: int = 1, left_ms: int = 0, **changes: Any) -> Inquiry:
    return Inquiry(gid(number, **changes), 1_000, left_ms)


def polled(number: int, vote: Vote = Vote.PREPARED, tx: int = 1) -> Voted:
    return replace(voted(number, vote, tx), register=REGISTER)


def doubt(number: int = 1, left_ms: int = 0, tx: int = 1) -> Inquiry:
    """A branch under the register asks."""
    under = replace(gid(number, tx), node="", epoch=Epoch(0), register=REGISTER)
    return Inquiry(under, 1_000, left_ms)


def listed(*numbers: int) -> tuple[PreparedBranch, ...]:
    return tuple(PreparedBranch(bid(number), participant(P), "accounts", f"t{number}") for number in numbers)


def decided(*numbers: int, tx: int = 1) -> Decided:
    return Decided(REGISTER, xid(tx), listed(*numbers))


def answer(found: Found, *numbers: int, tx: int = 1) -> RegisterAnswer:
    return RegisterAnswer(REGISTER, xid(tx), found, listed(*numbers))


def decision(refs: tuple[BranchRef, ...] = EARLY, tx: int = 1, epoch: Epoch = EARLIER) -> Decision:
    branches = tuple(ref.prepared for ref in refs)
    return Decision(xid(tx), epoch, CLOCK - 1_000, branches)


class CoordinatorHarness:
    """A coordinator, a clock, and every effect so far."""

    def __init__(
        self,
        *sessions: int,
        limits: Limits = LIMITS,
        pending: tuple[Decision, ...] = (),
        forgotten_ms: int = 0,
        lineage: tuple[Epoch, ...] = (EARLIER,),
        ends: dict[Epoch, int] | None = None,
    ) -> None:
        ends = ends or dict.fromkeys(lineage, 0)
        opened = Opened(EPOCH, ends, pending, forgotten_ms, position=max(ends.values(), default=0))
        self.core = Coordinator("c1", "bank", opened, limits, T0, CLOCK)
        self.now_ms = T0
        self.all = Output()
        for session in sessions or (CLIENT, OTHER_CLIENT, P):
            self.join(session)

    def step(self, event: Event) -> Output:
        out = self.core.step(event, self.now_ms)
        for name in Output.__slots__:
            if name not in ("behind", "bind", "rebind"):
                getattr(self.all, name).extend(getattr(out, name))
        return out

    def join(self, session: int, **changes: Any) -> Output:
        return self.step(SessionOpened(session, hello(session, **changes)))

    def step_hello(self, session: int, *resources: ResourceInfo) -> Output:
        """A process with just these."""
        return self.join(session, resources=resources)

    def leave(self, session: int) -> Output:
        return self.step(SessionClosed(session))

    def hear(self, session: int, message: Any) -> Output:
        return self.step(Received(session, "c1", message))

    def logged(self, tx: int = 1) -> Output:
        return self.step(Logged((xid(tx),)))

    def not_logged(self, tx: int = 1) -> Output:
        return self.step(NotLogged((xid(tx),), FULL))

    def looked(self, lookup: Lookup, found: Decision | None) -> Output:
        return self.step(Looked(lookup, found))

    def sleep(self, ms: int) -> list[tuple[int, Any]]:
        """Let time pass, alarm by alarm; what was sent meanwhile, clocks aside."""
        start, until_ms = len(self.all.send), self.now_ms + ms
        while (due_ms := self.core.next_wakeup_ms()) is not None and due_ms <= until_ms:
            assert due_ms > self.now_ms or self.core.state.timers, "an alarm that does not go away"
            self.now_ms = max(self.now_ms, due_ms)
            self.step(Woke())
        self.now_ms = until_ms
        return [(session, message) for session, message in self.all.send[start:] if type(message).__name__ != "Tick"]

    def state(self, tx: int = 1) -> State:
        return self.core.state.state_of(xid(tx))

    def replies(self, session: int = CLIENT, tx: int = 1) -> list[OutcomeReply]:
        """Every answer that *session* has had about the transaction."""
        return [m for s, m in self.all.send if s == session and isinstance(m, OutcomeReply) and m.xid == xid(tx)]

    def outcomes(self, session: int = CLIENT, tx: int = 1) -> list[Outcome]:
        """The outcomes that `replies` tell."""
        return [reply.outcome for reply in self.replies(session, tx)]

    @property
    def violations(self) -> list[str]:
        return [str(note.fields["reason"]) for note in self.all.notes if note.event == "protocol violation"]

    def leftovers(self) -> tuple[list[Any], ...]:
        """Everything that is kept for transactions under way: rows, debts, and what waits for a resource."""
        awaiting_reply = [
            debt for entry in self.core.state.directory.sessions.values() for debt in sorted(entry.awaiting_reply)
        ]
        unreported = [debt for debts in self.core.state.waiting_for_resource.values() for debt in sorted(debts)]
        return list(self.core.state.transactions), awaiting_reply, unreported


def sent(out: Output | list[tuple[int, Any]]) -> list[str]:
    """What was sent, clocks and the directory aside, a word or three each: ``11 Prepare 1``, ``1 reply ABORTED REQUESTED``, ..."""
    messages = out.send if isinstance(out, Output) else out
    return [_words(session, message) for session, message in messages if not isinstance(message, Tick | Registers)]


def _words(session: int, message: Any) -> str:
    if isinstance(message, OutcomeReply):
        words = [str(session), "reply", message.outcome.name]
        if message.reason is not None:
            words.append(message.reason.code.name)
        words += [f"pending {name}" for name in message.pending]
        return " ".join(words)
    about = getattr(message, "gid", message)
    branch = getattr(about, "branch", None)
    number = "" if branch is None else f" {int.from_bytes(branch, 'big')}"
    return f"{session} {type(message).__name__}{number}"


def effects(out: Output) -> list[str]:
    """All effects of a step in words, in the order of `Output`."""
    words = [f"append {int.from_bytes(d.xid, 'big')}" for d in out.append]
    words += sent(out)
    words += [f"done {int.from_bytes(x, 'big')}" for x in out.done]
    words += ["look" for _ in out.look]
    words += [f"close {session} {farewell.code}" for session, farewell in out.close]
    words += ["violation" if note.event == "protocol violation" else f"note {note.event}" for note in out.notes]
    return words
