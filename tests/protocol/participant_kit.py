"""Names and short hands for tests of the participant: one process, two transactions, and messages about their branches."""

from __future__ import annotations

from typing import Any

from txrpc._protocol import messages as m
from txrpc._protocol.deciding import Decide
from txrpc._protocol.messages import (
    Commit,
    CommitOnePhase,
    Outcome,
    Prepare,
    Resolve,
    Rollback,
)
from txrpc._protocol.participant.branch import BranchInput, BranchState, Do, Effects, Operation, ParticipantBranch
from txrpc._protocol.participant.machine import Participant
from txrpc._protocol.records import PreparedBranch
from txrpc.errors import AbortCode, Reason
from txrpc.ids import BranchId, Epoch, Gid, ParticipantId, RegisterId, Xid
from verification.words import words

T0 = 1_000_000
"""When the tests begin, in monotonic milliseconds."""
DEADLINE_MS = T0 + 5_000
"""The deadline of every transaction here."""
FAILED = Reason(AbortCode.CANNOT_PREPARE, "the database refused")
ENOUGH = Reason(AbortCode.REQUESTED, "the root gave up")
ME = ParticipantId(b"process1")
OTHER = ParticipantId(b"process2")
REGISTER = RegisterId(bytes(23) + b"r")


def gid(branch: int = 1, xid: int = 1, resource: str = "accounts", participant: ParticipantId = ME) -> Gid:
    """A branch's identifier, from small numbers."""
    number = Xid(xid.to_bytes(16, "big"))
    return Gid("bank", "c1", Epoch.make(1, 7), number, BranchId(branch.to_bytes(8, "big")), participant, resource)


class Process:
    """A participant, a clock, and every effect so far."""

    def __init__(self) -> None:
        self.table = Participant(lambda: 0.5)
        self.now_ms = T0
        self.done: list[Do] = []
        self.sent: list[Any] = []
        self.settled: list[tuple[BranchId, Outcome, Reason | None]] = []

    def open(self, gid: Gid, calls: int = 1) -> ParticipantBranch:
        """A branch that *calls* calls have used."""
        row = self.table.open(gid, DEADLINE_MS)
        row.calls = calls
        return row

    def hear(self, message: m.Prepare | m.CommitOnePhase | Decide | m.Commit | m.Rollback | m.Resolve) -> Effects:
        """Take a message of the coordinator's."""
        return self._keep(self.table.received(message, self.now_ms))

    def local(self, kind: BranchInput, gid: Gid, detail: object = None) -> Effects:
        """Take a local input."""
        return self._keep(self.table.step(kind, gid.branch, self.now_ms, detail))

    def sleep(self, ms: int) -> Effects:
        """Let time pass in one go; the clock rings at its end."""
        self.now_ms += ms
        return self._keep(self.table.woke(self.now_ms))

    def sleep_until_quiet(self) -> None:
        """Let time pass, alarm by alarm, until none is set."""
        while (due_ms := self.table.state.next_wakeup_ms()) is not None:
            self.sleep(max(0, due_ms - self.now_ms))

    def state(self, gid: Gid) -> BranchState:
        """Where the branch stands."""
        row = self.table.rows.get(gid.branch)
        return BranchState.ABSENT if row is None else row.state

    @property
    def operations(self) -> list[Operation]:
        """Everything that was asked of resources so far."""
        return [do.operation for do in self.done]

    def _keep(self, effects: Effects) -> Effects:
        self.done += effects.do
        self.sent += effects.send
        self.settled += effects.settle
        return effects


def prepare(gid: Gid, calls: int = 1) -> Prepare:
    return Prepare(gid.xid, gid.branch, calls)


def one_phase(gid: Gid, calls: int = 1) -> CommitOnePhase:
    return CommitOnePhase(gid.xid, gid.branch, calls)


def decide(gid: Gid, calls: int = 1, branches: tuple[PreparedBranch, ...] = ()) -> Decide:
    return Decide(gid.xid, gid.branch, calls, gid.register or REGISTER, branches)


def commit(gid: Gid, token: str = "t1") -> Commit:
    return Commit(gid, token)


def rollback(gid: Gid, token: str = "") -> Rollback:
    return Rollback(gid, ENOUGH, token)


def resolve(gid: Gid, token: str = "t1") -> Resolve:
    return Resolve(gid.xid, gid.branch, gid.resource, token)


def answers(messages: list[Any]) -> list[str]:
    """Messages to the coordinator in a word or two each: ``Voted PREPARED``, ``Acked DONE``, ``Inquiry``, ..."""
    said = [next((words(getattr(m, name)) for name in _SAY if hasattr(m, name)), "") for m in messages]
    return [f"{type(m).__name__} {word}".strip() for m, word in zip(messages, said, strict=True)]


_SAY = ("vote", "result", "finish")
