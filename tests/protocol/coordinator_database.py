"""What a process does about its branches when a coordinator says something, as dumbly as can be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tests.protocol.coordinator_kit import REFUSED
from txrpc.ids import Gid
from txrpc.protocol.messages import (
    Acked,
    Commit,
    CommitOnePhase,
    Committing,
    Finish,
    OnePhaseDone,
    OnePhaseResult,
    Prepare,
    Resolve,
    Resolved,
    Rollback,
    Vote,
    Voted,
)


@dataclass(slots=True)
class Work:
    """One branch in its database: ``active``, ``prepared``, ``read-only``, ``committed`` or ``rolled back``."""

    gid: Gid
    plan: Vote
    """What it will answer to Prepare."""
    state: str = "active"
    voted: Vote | None = None


def vote(work: Work) -> Vote:
    """Vote, if it has not yet; a question asked twice gets one answer."""
    if work.state == "active":
        work.voted = work.plan
        work.state = {Vote.PREPARED: "prepared", Vote.READ_ONLY: "read-only", Vote.ABORT: "rolled back"}[work.plan]
    elif work.state == "rolled back":
        return Vote.ABORT
    return work.voted or Vote.ABORT


def react(work: Work, own: bool, message: Any) -> list[Any]:
    """Take a message about a branch and return the answers; *own*: whether this process has done its work."""
    xid, branch = work.gid.xid, work.gid.branch
    match message:
        case Prepare():
            answer = vote(work)
            return [Voted(xid, branch, answer, REFUSED if answer is Vote.ABORT else None, "token")]
        case CommitOnePhase():
            return _one_phase(work)
        case Commit():
            assert work.state in ("prepared", "committed"), f"told to commit, but it is {work.state}"
            work.state = "committed"
            return [Acked(xid, branch, Finish.DONE if own else Finish.ABSENT)]
        case Rollback():
            if work.state == "prepared" or (own and work.state == "active"):
                work.state = "rolled back"
            return []
        case Resolve():
            return _resolve(work, own, message)
    raise AssertionError(message)


def _one_phase(work: Work) -> list[Any]:
    xid, branch = work.gid.xid, work.gid.branch
    told: list[Any] = [Committing(xid, branch, "token")] if work.plan is Vote.PREPARED else []
    if work.state == "active":
        work.state = "rolled back" if work.plan is Vote.ABORT else "committed"
    result = OnePhaseResult.COMMITTED if work.state == "committed" else OnePhaseResult.ABORTED
    return [*told, OnePhaseDone(xid, branch, result)]


def _resolve(work: Work, own: bool, message: Resolve) -> list[Any]:
    if own and work.state == "active":
        work.state = "rolled back"
    if work.state == "active":
        return []  # still running somewhere
    known = own or bool(message.token)
    result = OnePhaseResult.COMMITTED if work.state == "committed" else OnePhaseResult.ABORTED
    return [Resolved(work.gid.xid, work.gid.branch, result if known else OnePhaseResult.UNKNOWN)]
