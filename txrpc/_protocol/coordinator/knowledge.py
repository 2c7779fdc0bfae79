"""Recovery's one question: what becomes of a prepared branch that asks (rules 5 and 6)?

A literal table from what the coordinator knows about the branch's transaction to the answer.  The knowledge is a value, worked
out by `knowledge`; nothing else in recovery decides anything.
"""

from __future__ import annotations

import enum
from collections.abc import Collection

from txrpc.ids import Epoch

__all__ = ["ANSWERS", "UP_TO_THE_LOG", "Answer", "Knowledge", "age_of"]


class Knowledge(enum.Enum):
    """What a coordinator knows about the transaction of a branch that asks."""

    COMMITTED = "there is a decision on record, and the branch is in it"
    NOT_IN_RECORD = "there is a decision on record, and the branch is not in it"
    BEING_DECIDED = "its commit request is being worked on"
    ABORTED = "it was aborted, and its root may have been told"
    AWAITED = "begun under this epoch, and its root may still ask for the commit"
    OVERDUE = "begun under this epoch, no record, and its root has no time left or its owner asks no more"
    EARLIER = "begun under an earlier epoch of this log, and the log has no record"
    FORGOTTEN = "prepared before the last record was deleted, so that the absence of its record proves nothing"
    STRANGE = "begun under an epoch that this log has never had"


class Answer(enum.Enum):
    """What to say to it."""

    COMMIT = "commit"
    ROLL_BACK = "roll back"
    PRESUME = "roll back, and remember that this was said"
    WAIT = "nothing now: it will be told, or ask again"
    REFUSE = "nothing, ever: another log may know; an operator must look"


ANSWERS: dict[Knowledge, Answer] = {
    Knowledge.COMMITTED: Answer.COMMIT,
    Knowledge.NOT_IN_RECORD: Answer.ROLL_BACK,
    Knowledge.BEING_DECIDED: Answer.WAIT,
    Knowledge.ABORTED: Answer.ROLL_BACK,
    Knowledge.AWAITED: Answer.WAIT,
    Knowledge.OVERDUE: Answer.PRESUME,
    # No need to remember it: commit requests that name an earlier epoch are refused.
    Knowledge.EARLIER: Answer.ROLL_BACK,
    # Here absence proves nothing: the record may be gone, or be in another log.
    Knowledge.FORGOTTEN: Answer.REFUSE,
    Knowledge.STRANGE: Answer.REFUSE,
}

UP_TO_THE_LOG = frozenset({Knowledge.COMMITTED, Knowledge.EARLIER, Knowledge.OVERDUE, Knowledge.FORGOTTEN})
"""What memory alone does not prove of a transaction that has no row: the log is asked before anything is said."""


def age_of(epoch: Epoch, current: Epoch, lineage: Collection[Epoch]) -> Knowledge:
    """Return where *epoch* stands in this log's history, for a transaction of which nothing else is known."""
    if epoch == current:
        return Knowledge.OVERDUE
    return Knowledge.EARLIER if epoch in lineage else Knowledge.STRANGE
