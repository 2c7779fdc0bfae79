"""The words for how things end: votes, outcomes, and what a resource finds when it finishes a branch."""

from __future__ import annotations

from txrpc._enums import NamedIntEnum
from txrpc.errors import AbortCode, Reason

__all__ = ["FinishResult", "Found", "Outcome", "Vote", "Wait", "refusal"]


class Vote(NamedIntEnum):
    """A participant's answer to Prepare."""

    PREPARED = 1
    READ_ONLY = 2
    ABORT = 3


class Outcome(NamedIntEnum):
    """How a transaction ended.  UNKNOWN is an honest "cannot tell" (forgotten, or not decided yet), never a guess."""

    UNKNOWN = 0
    COMMITTED = 1
    ABORTED = 2


class FinishResult(NamedIntEnum):
    """What a resource found when it was told to finish a prepared branch (rule 16)."""

    DONE = 1  # it ended now, as told
    ALREADY = 2  # the database proves that it ended so before
    NOT_HERE = 3  # there is no such branch, and no proof of how it ended: a wrong database, or one that has forgotten
    LOST = 4  # it proves that it is older than its promise, or has another history: a lagging standby, a backup
    HEURISTIC = 5  # the database proves that it ended the other way: it was done by hand

    @property
    def is_proof(self) -> bool:
        """Whether this ends a branch that was told to commit.  What is not here, or lost, is kept until an operator closes it."""
        return self not in (FinishResult.NOT_HERE, FinishResult.LOST)


class Found(NamedIntEnum):
    """What a register says about a transaction."""

    COMMITTED = 1
    ABORTED = 2
    OPEN = 3  # not decided, and the question has not changed that
    FORGOTTEN = 4  # at or below the floor, where nothing is decided any more; it may have been
    LOST = 5  # no row, and the database may have lost it: only an operator can say
    ELSEWHERE = 6  # another register: it says nothing
    UNREACHABLE = 7  # it could not be asked now


class Wait(NamedIntEnum):
    """When a client's commit returns."""

    ACKNOWLEDGED = 0  # when every branch has ended, so that the caller reads its own writes
    DECISION = 1  # as soon as the decision is durable


def refusal(resource: str, reason: Reason | None) -> Reason:
    """Return why *resource* does not commit, as roots are told: what it said, with its name.  (Early votes say nothing.)"""
    if reason is None:
        return Reason(AbortCode.CANNOT_PREPARE, f"{resource} voted to abort")
    return Reason(reason.code, f"{resource}: {reason.text}".removesuffix(": "))
