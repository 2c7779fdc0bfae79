"""Questions to registers: each is asked once at a time, for all that wait for its answer."""

from __future__ import annotations

from txrpc._protocol.coordinator.rows import Question
from txrpc._protocol.coordinator.state import CoordinatorState
from txrpc._protocol.deciding import RegisterQuestion
from txrpc._protocol.records import PreparedBranch
from txrpc.ids import RegisterId, Xid

__all__ = ["put"]


def put(
    state: CoordinatorState,
    register: RegisterId,
    xid: Xid,
    claim: bool,
    commit: tuple[PreparedBranch, ...] | None = None,
) -> Question | str:
    """Have *register* asked about *xid*, unless that was done already; return the question, or why it cannot be asked.

    *commit*: what the transaction becomes if that is open, as in `RegisterQuestion`.
    """
    question, holder = state.questions.get((register, xid)), state.directory.holder(register)
    if question is not None and (question.claim or not claim):
        return question
    if question is not None:
        question.claim, question.commit, question.times = True, commit is not None, question.times + 1
    elif holder is None:
        return "no process with the register of its decision is connected"
    elif len(state.questions) >= state.limits.max_transactions:
        return f"the coordinator's max_transactions is {len(state.questions)}"
    else:
        question = state.questions[register, xid] = Question(register, holder.session, claim, commit is not None)
    state.send(question.session, RegisterQuestion(register, xid, claim, commit))
    return question
