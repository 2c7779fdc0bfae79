"""Bytes as a play: sessions that know all names connect, say any message in any order, and leave; the log answers or fails.

Whatever they say, the coordinator's core never raises, tells of no commit that is not in the log, never rolls back a branch of a
decision, and never commits an XID that it has presumed aborted.  A branch that is in no decision may roll back beside one that
commits: its root never saw it (rule 8).  (A commit in one phase is the participant's to tell, and a liar may tell what he likes
of his own transaction.)
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from txrpc._coordinator.driver import _fields
from txrpc._protocol.coordinator.events import (
    Limits,
    Logged,
    Looked,
    NotLogged,
    Output,
    Received,
    SessionClosed,
    SessionOpened,
    Woke,
)
from txrpc._protocol.coordinator.machine import Coordinator
from txrpc._protocol.deciding import RegisterAnswer
from txrpc._protocol.messages import (
    Acked,
    BranchRef,
    Commit,
    CommitRequest,
    Committing,
    FinishResult,
    Hello,
    Inquiry,
    OnePhaseDone,
    Outcome,
    OutcomeRequest,
    Owner,
    Resolved,
    ResourceInfo,
    Rollback,
    RollbackRequest,
    Vote,
    Voted,
    Wait,
)
from txrpc._protocol.outcomes import Found
from txrpc._protocol.records import Decision, Opened, PreparedBranch
from txrpc.errors import AbortCode, Reason
from txrpc.ids import BranchId, Epoch, Gid, ParticipantId, RegisterId, Xid

__all__ = ["core"]

_LOGGER = logging.getLogger("core")
_OWNER = Owner("c1", Epoch.make(3, 7))
_EPOCHS = (_OWNER.epoch, Epoch.make(2, 7), Epoch.make(9, 9))
_NAMES = ("bank-a", "bank-b", "nobody")
_XIDS = tuple(Xid.make(1_000_000 + n, bytes([n] * 10)) for n in range(3))
_REGISTERED = tuple(Xid.make(1_000_000 + n, bytes([n] * 10)) for n in (8, 9))
"""Transactions that a register decides: it has committed the first, and will never commit the second."""
_REGISTER = RegisterId(bytes(24))
_NO_DECISION = tuple(found for found in Found if found is not Found.COMMITTED)
_BRANCHES = tuple(BranchId(bytes([n] * 8)) for n in range(4))
_PARTICIPANTS = tuple(ParticipantId(bytes([n] * 8)) for n in range(3))
_REASON = Reason(AbortCode.REQUESTED, "it says so")
_LIMITS = Limits(max_transactions=4, max_branches=3, max_sessions=4, max_timeout_ms=60_000, max_remembered=8)
_STEPS_MAX = 400


class _Dice:
    """Choices out of bytes; 0 when they are used up."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.at = 0

    def __bool__(self) -> bool:
        return self.at < min(len(self._data), _STEPS_MAX)

    def below(self, most: int) -> int:
        value = self._data[self.at] if self.at < len(self._data) else 0
        self.at += 1
        return value % most

    def of(self, values: Any) -> Any:
        return list(values)[self.below(len(values))]


class _Stage:
    """The core, its sessions and its log."""

    def __init__(self, dice: _Dice) -> None:
        self.dice = dice
        self.core = Coordinator("c1", "default", Opened(_OWNER.epoch, {_EPOCHS[1]: 0}, ()), _LIMITS, 0, 1_000_000)
        self.log: dict[Xid, Decision] = {}
        self.rolled_back: dict[Xid, set[BranchId]] = {xid: set() for xid in _XIDS}
        """Branches that were told to roll back before there was a decision."""
        self.open: list[int] = []
        self.waiting: list[Any] = []
        self.sessions = 0
        self.now_ms = 0

    def step(self, event: Any) -> None:
        output: Output = self.core.step(event, self.now_ms)
        self.waiting += [tuple(output.append)] if output.append else []
        self.waiting += output.look
        for _, message in output.send:
            self._watch(message)
        for note in output.notes:  # the shell can log it, whoever's words are in it
            _LOGGER.makeRecord("core", 20, "", 0, note.event, (), None, extra=_fields(note.fields))
        for number, _ in output.close:
            if number in self.open:
                self.open.remove(number)
                self.waiting.append(SessionClosed(number))

    def _watch(self, message: Any) -> None:
        if not isinstance(message, Commit | Rollback) or message.gid.xid not in _XIDS:
            return
        xid, branch = message.gid.xid, message.gid.branch
        decided = {each.branch for each in self.log[xid].branches} if xid in self.log else set()
        if isinstance(message, Commit):
            assert branch in decided, "a Commit of what is not in the log"
            assert not self.rolled_back[xid], "a Commit after a Rollback of the same transaction"
        else:
            assert branch not in decided, "a Rollback of what is in the log"
            # Who asks under another epoch asks about another transaction: an honest XID has one owner.
            if xid not in self.log and message.gid.epoch == _OWNER.epoch:
                self.rolled_back[xid].add(branch)

    # ------------------------------------------------------------------------------------------------ what can happen

    def connect(self) -> None:
        if len(self.open) >= _LIMITS.max_sessions:
            return
        self.sessions += 1
        who = self.dice.below(3)
        register = self.dice.of((None, _REGISTER))
        resources = (ResourceInfo(_NAMES[who], "test", register=register),) if self.dice.below(2) else ()
        hello = Hello(1, "default", _PARTICIPANTS[who], "p", resources, self.dice.of((None, _OWNER)))
        self.open.append(self.sessions)
        self.step(SessionOpened(self.sessions, hello))

    def leave(self) -> None:
        if self.open:
            self.step(SessionClosed(self.open.pop(self.dice.below(len(self.open)))))

    def speak(self) -> None:
        if self.open:
            self.step(
                Received(
                    self.dice.of(self.open),
                    self.dice.of((_OWNER.node, _OWNER.node, _OWNER.node, "c2")),
                    self._message(),
                )
            )

    def answer(self) -> None:
        """The log, or the shell, does one of the things that it was asked for."""
        if not self.waiting:
            return
        asked = self.waiting.pop(self.dice.below(len(self.waiting)))
        if isinstance(asked, SessionClosed):
            self.step(asked)
        elif not isinstance(asked, tuple):
            self.step(Looked(asked, self.log.get(asked.xid)))
        elif self.dice.below(4) == 0:
            self.step(NotLogged(tuple(decision.xid for decision in asked), _REASON))
        else:
            self.log.update((decision.xid, decision) for decision in asked)
            self.step(Logged(tuple(decision.xid for decision in asked)))

    def wait(self) -> None:
        self.now_ms += self.dice.of((1, 100, 5_000, 60_000))
        self.step(Woke())

    # -------------------------------------------------------------------------------------------------- what is said

    def _refs(self) -> tuple[BranchRef, ...]:
        dice = self.dice
        branches = {dice.of(_BRANCHES): None for _ in range(dice.below(4))}
        return tuple(
            BranchRef(branch, dice.of(_NAMES), dice.of(_PARTICIPANTS), dice.below(3), dice.of((None, None, *Vote)), "7")
            for branch in branches
        )

    def _about_register(self) -> Any:
        """What is said of transactions that a register decides; a register that contradicts itself is none."""
        dice, xid = self.dice, self.dice.of(_REGISTERED)
        refs = tuple(replace(ref, register=dice.of((_REGISTER, _REGISTER, None))) for ref in self._refs())
        listed = tuple(PreparedBranch(ref.branch, ref.participant, ref.resource, "7") for ref in refs)
        begun, left_ms = 900 + dice.below(250), dice.of((0, 1_000, 2**32 - 1))
        match dice.below(4):
            case 0:
                right, decider = dice.of((None, _REGISTER)), dice.of((None, *_BRANCHES))
                return CommitRequest(xid, dice.of(_EPOCHS), begun, refs, left_ms, dice.of(Wait), right, decider)
            case 1:
                gid = Gid(
                    "default", "", Epoch(0), xid, _BRANCHES[0], dice.of(_PARTICIPANTS), dice.of(_NAMES), _REGISTER
                )
                return Inquiry(gid, dice.below(3), dice.below(3))
            case 2:
                return OutcomeRequest(xid, dice.of(_EPOCHS), begun, refs, dice.of((None, _REGISTER)))
            case _:
                found = Found.COMMITTED if xid == _REGISTERED[0] else dice.of(_NO_DECISION)
                return RegisterAnswer(_REGISTER, xid, found, listed if found is Found.COMMITTED else ())

    def _message(self) -> Any:
        dice = self.dice
        if dice.below(4) == 0:
            return self._about_register()
        xid, branch, epoch = dice.of((*_XIDS, *_XIDS, *_REGISTERED)), dice.of(_BRANCHES), dice.of(_EPOCHS)
        match dice.below(9):
            case 0:
                return CommitRequest(xid, epoch, 900 + dice.below(250), self._refs(), dice.of((0, 1_000, 2**32 - 1)))
            case 1:
                return RollbackRequest(xid, epoch, 900 + dice.below(250), self._refs(), _REASON)
            case 2:
                return OutcomeRequest(xid, epoch, 900 + dice.below(250), self._refs())
            case 3:
                return Voted(xid, branch, dice.of(Vote), None, "7")
            case 4:
                return Committing(xid, branch, "7")
            case 5:
                return OnePhaseDone(xid, branch, dice.of(Outcome))
            case 6:
                return Acked(xid, branch, dice.of(FinishResult))
            case 7:
                gid = Gid("default", dice.of(("c1", "c2")), epoch, xid, branch, dice.of(_PARTICIPANTS), dice.of(_NAMES))
                return Inquiry(gid, dice.below(3), dice.below(3))
            case _:
                return Resolved(xid, branch, dice.of(Outcome))


def core(data: bytes) -> None:
    """See the module's docstring."""
    dice = _Dice(data)
    stage = _Stage(dice)
    scenarios = (
        stage.connect,
        stage.speak,
        stage.speak,
        stage.speak,
        stage.answer,
        stage.answer,
        stage.wait,
        stage.leave,
    )
    stage.connect()
    while dice:
        scenarios[dice.below(len(scenarios))]()
