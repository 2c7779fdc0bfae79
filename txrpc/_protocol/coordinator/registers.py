"""Transactions that a resource decides: what this coordinator does for them, and what it asks their register.

How to think of it
    The decision is a row in a register, a table of the deciding resource's own database (`txrpc.sql.register`), and the row alone
    says how the transaction ends.  So nothing of this coordinator's own matters here: not its log, its memory or its epoch.  It
    helps in three things, and any coordinator would do: it collects votes for the root, which decides; it drives the second
    phase of what a process with the register says is COMMITTED, until all have acknowledged; and it asks for branches in doubt.

    A row that is not there means *not decided*.  A question that may *claim* makes it ABORTED then, so it is asked only for those
    whose patience is over: a branch in doubt whose root has no time left, or a root that has given up.

Each function is one entry, or a shared part, of the table.
"""

from __future__ import annotations

from typing import Final

from txrpc._protocol.coordinator import phases, questions
from txrpc._protocol.coordinator.rows import Question, State, TransactionRow
from txrpc._protocol.coordinator.sessions import SessionEntry
from txrpc._protocol.coordinator.state import MARGIN_MS, CoordinatorState
from txrpc._protocol.deciding import Decided, RegisterAnswer, Registers, Votes
from txrpc._protocol.messages import (
    AboutEnd,
    Commit,
    CommitRequest,
    Inquiry,
    OnePhaseDone,
    Outcome,
    OutcomeReply,
    OutcomeRequest,
    Rollback,
    Vote,
    Wait,
)
from txrpc._protocol.outcomes import Found, refusal
from txrpc.errors import AbortCode, Reason
from txrpc.ids import RegisterId, Xid

__all__ = [
    "answered",
    "ask",
    "claimed",
    "decided",
    "decider_done",
    "heard_of",
    "inquiry",
    "leave",
    "outcome",
    "refuses",
    "register_of",
    "say_done",
    "session_lost",
    "still_undecided",
    "tell",
    "undecided",
    "votes",
]

_CLAIMED: Final = Reason(AbortCode.PRESUMED, "its root had not decided in time")
_TOO_LATE: Final = Reason(
    AbortCode.RESOURCE_UNAVAILABLE,
    "the register refuses the decision: it came too late, or its database has failed over",
)

_ENDS: Final = {
    Found.COMMITTED: frozenset({State.COMMITTING, State.COMMITTED}),
    Found.ABORTED: frozenset({State.ABORTED}),
}
_NOT_LISTED: Final = Reason(AbortCode.PRESUMED, "its root has decided without it")
_UNKNOWN: Final = {
    Found.OPEN: "its register has not decided yet",
    Found.UNREACHABLE: "its register cannot be asked now",
    Found.FORGOTTEN: "its register remembers nothing as old as this",
    Found.LOST: "its register may have lost the decision: its database was restored, or a standby has taken over",
    Found.ELSEWHERE: "its register is not there any more: the resource is another database",
}
_REFUSED: Final = frozenset({Found.FORGOTTEN, Found.LOST, Found.ELSEWHERE})
"""No process will ever say more by itself: an operator must look."""


def heard_of(state: CoordinatorState, entry: SessionEntry) -> None:
    """A process has said Hello: all hear of registers that are new, and it of all."""
    resources = entry.hello.resources
    found = {info.name: info.register for info in resources if info.register is not None and not info.trouble}
    is_news = not found.items() <= state.registers.items()
    state.registers |= found
    if state.registers:
        message = Registers(tuple(sorted(state.registers.items())))
        for session in list(state.directory.sessions) if is_news else [entry.session]:
            state.send(session, message)


def register_of(request: AboutEnd) -> RegisterId | None:
    """Return the register in which *request*'s transaction is decided, or None if it is decided by a coordinator."""
    if isinstance(request, CommitRequest | OutcomeRequest) and request.register is not None:
        return request.register
    return next((ref.register for ref in request.branches if ref.register is not None), None)


# -------------------------------------------------------------------------------------------- the root, which decides


def votes(state: CoordinatorState, row: TransactionRow, session: int, request: CommitRequest) -> None:
    # Rule 12: the same answer as before.
    state.send(session, Votes(row.xid, row.prepared()))


def leave(state: CoordinatorState, row: TransactionRow, session: None, message: None) -> None:
    # Not aborted: the root may have decided.  What is in doubt asks, and has the register asked.
    del state.transactions[row.xid]


def outcome(state: CoordinatorState, row: TransactionRow, session: int, request: OutcomeRequest) -> None:
    assert row.register is not None
    ask(state, row.register, session, request, claim=register_of(request) is not None)


# ---------------------------------------------------------------------------------- the coordinator, which has it decided


def decider_done(state: CoordinatorState, row: TransactionRow, session: int, message: OnePhaseDone) -> None:
    branch = row.branches[message.branch]
    state.cancel_wait(row, branch)
    if message.result is Outcome.UNKNOWN:
        undecided(state, row, session, message)
    elif message.result is Outcome.ABORTED:
        # It was told once, by this coordinator alone, and its work is undone: no other can decide (rule 5).
        branch.vote = Vote.ABORT
        phases.abort(state, row, refusal(branch.ref.resource, message.reason))
    elif row.prepared():
        phases.begin_phase_two(state, row)  # rule 3: its process has seen it durable
    else:
        phases.finish(state, row, None)


def undecided(state: CoordinatorState, row: TransactionRow, session: int | None, message: object) -> None:
    """Whether it was decided only the register knows: its root, and the branches in doubt, have it asked."""
    row.state = State.LEFT
    for branch in row.branches.values():
        state.cancel_wait(row, branch)
    for waiter in row.waiters:
        still_undecided(state, row, waiter, None)
    row.waiters.clear()
    # A copy of the request that came now would begin all over, and might end otherwise: it stays known for as long as one counts.
    state.wake_at(row, state.now_ms + state.limits.max_timeout_ms + MARGIN_MS)


def still_undecided(state: CoordinatorState, row: TransactionRow, session: int, message: object) -> None:
    reason = Reason(AbortCode.RESOURCE_UNAVAILABLE, "the database that decides has not answered")
    state.send(session, OutcomeReply(row.xid, Outcome.UNKNOWN, reason))


# ------------------------------------------------------------------------------------------------ what a register says


def decided(state: CoordinatorState, before: TransactionRow | None, session: int | None, message: Decided) -> None:
    # Rule 3 holds: the row is durable, or its process would not speak of it.
    if message.xid in state.remembered:
        state.note(
            "error", "decided although aborted", xid=message.xid, reason="its root had asked for a rollback here"
        )
        state.remembered.discard(message.xid)
    row = TransactionRow.decided(message, state.now_ms)
    if before is not None:
        for branch in before.branches.values():
            state.cancel_wait(before, branch)
        row.waiters = before.waiters
        # The process that was told to decide may still say so itself.
        row = before if before.state is State.DECIDING else row
    state.transactions[row.xid] = row
    if row.prepared():
        phases.begin_phase_two(state, row)
    else:
        phases.mark_done(state, row)


def claimed(state: CoordinatorState, row: TransactionRow | None, session: int | None, message: RegisterAnswer) -> None:
    # Rule 5: from now on it can never be committed, by any coordinator or none.
    if row is not None:
        phases.abort(state, row, _CLAIMED if message.found is Found.ABORTED else _TOO_LATE)
    else:
        state.remembered.add(message.xid, _CLAIMED)


def say_done(state: CoordinatorState, row: None, session: int | None, message: Decided) -> None:
    # The mark was lost on its way, or with its process.
    phases.tell_done(state, message.register, message.xid)


# ------------------------------------------------------------------------------------------------------- questions


def inquiry(state: CoordinatorState, session: int, message: Inquiry, register: RegisterId) -> None:
    """A branch that is prepared under *register* asks."""
    gid, row = message.gid, state.transactions.get(message.gid.xid)
    if row is not None and row.state is State.COMMITTING:
        _tell_as_decided(state, row, session, message)
        return
    if gid.xid in state.remembered and state.remembered[gid.xid] is not None:
        _roll_back(state, session, message)
        return
    # Its own process knows for how long its root may still decide; another one that finds the branch does not.
    owner = state.directory.owner(gid.participant)
    awaited = message.time_left_ms > 0 or (owner is not None and owner.session != session)
    ask(state, register, session, message, claim=not awaited)


def _tell_as_decided(state: CoordinatorState, row: TransactionRow, session: int, message: Inquiry) -> None:
    listed = row.branches.get(message.gid.branch)
    if listed is not None and listed.vote is Vote.PREPARED:
        phases.tell_commit(state, row, listed, state.directory.sessions[session])
    else:
        _roll_back(state, session, message)


def _roll_back(state: CoordinatorState, session: int, message: Inquiry) -> None:
    ended = message.gid.xid in state.remembered and state.remembered[message.gid.xid]
    state.report(message.gid, message.since_ms, "prepared, told to roll back, and asks again", told=True)
    state.send(session, Rollback(message.gid, ended or _NOT_LISTED))


def ask(
    state: CoordinatorState, register: RegisterId, session: int, message: Inquiry | OutcomeRequest, claim: bool
) -> None:
    """Ask *register* on behalf of *message*, together with all that wait for the same answer."""
    xid, branch = (message.gid.xid, message.gid.branch) if isinstance(message, Inquiry) else (message.xid, None)
    question = questions.put(state, register, xid, claim)
    if isinstance(question, str):
        _cannot_tell(state, session, message, question)
    else:
        question.waiting[session, branch] = message


def answered(state: CoordinatorState, session: int, answer: RegisterAnswer) -> Question | None:
    """Return the question, which is answered by now; None if that is not the answer to what was asked last."""
    question = state.questions.get((answer.register, answer.xid))
    if question is None or question.session != session or (question.claim and answer.found is Found.OPEN):
        return None
    return state.questions.pop((answer.register, answer.xid))


def refuses(state: CoordinatorState, question: Question, answer: RegisterAnswer) -> bool:
    """Return whether the register says that it will not write the decision: it was asked once, and no other one can (rule 5)."""
    to_decide = question.commit and question.times == 1 and state.state_of(answer.xid) is State.DECIDING
    return to_decide and answer.found in _REFUSED


def tell(state: CoordinatorState, question: Question, answer: RegisterAnswer) -> None:
    """The register has answered, and the table has taken that: now to those who have waited."""
    ends = _ENDS.get(answer.found)
    if ends is not None and state.state_of(answer.xid) not in ends:
        return  # the contrary is known here, of which a violation was noted
    for (session, _branch), message in question.waiting.items():
        if session in state.directory.sessions:
            _tell(state, session, message, answer)


def _tell(state: CoordinatorState, session: int, message: Inquiry | OutcomeRequest, answer: RegisterAnswer) -> None:
    row = state.transactions.get(answer.xid)
    if answer.found not in _ENDS and isinstance(message, Inquiry) and row is not None and row.state is State.COMMITTING:
        _tell_as_decided(state, row, session, message)  # it was heard of meanwhile
    elif answer.found not in _ENDS:
        # What is under way here goes on, and may yet tell.
        refused = answer.found in _REFUSED and (row is None or row.state is State.LEFT)
        _cannot_tell(state, session, message, _UNKNOWN[answer.found], refused)
    elif isinstance(message, Inquiry):
        _tell_branch(state, session, message, answer)
    elif answer.found is Found.ABORTED:
        # Those that voted early know nothing of it, and would ask at their deadline only.
        phases.abort_unknown(state, session, message.xid, message.epoch, message.branches, _CLAIMED, count=False)
    elif row is not None:
        row.waiters[session] = Wait.ACKNOWLEDGED
    else:
        state.send(session, OutcomeReply(message.xid, Outcome.COMMITTED))


def _tell_branch(state: CoordinatorState, session: int, message: Inquiry, answer: RegisterAnswer) -> None:
    # Rule 8: a branch that is not listed is one that the root never saw, and was not committed.
    listed = answer.branches if answer.found is Found.COMMITTED else ()
    tokens = {each.branch: each.token for each in listed}
    if message.gid.branch not in tokens:
        _roll_back(state, session, message)
    elif message.gid.xid not in state.transactions:
        state.report(message.gid, message.since_ms, "prepared, told to commit, and asks again", told=True)
        state.send(session, Commit(message.gid, tokens[message.gid.branch], state.position))


def _cannot_tell(
    state: CoordinatorState, session: int, message: Inquiry | OutcomeRequest, text: str, refused: bool = False
) -> None:
    if isinstance(message, OutcomeRequest):
        # A root asks again after RESOURCE_UNAVAILABLE.  Where only an operator can tell, that would be in vain.
        code = AbortCode.UNSPECIFIED if refused else AbortCode.RESOURCE_UNAVAILABLE
        state.send(session, OutcomeReply(message.xid, Outcome.UNKNOWN, Reason(code, text)))
        return
    gid = message.gid
    state.report(gid, message.since_ms, f"prepared; {text}" + refused * ", so that an operator must end it")
    if refused:
        state.note(
            "error", "branch of a lost decision", xid=gid.xid, branch=gid.branch, resource=gid.resource, reason=text
        )


def session_lost(state: CoordinatorState, session: int) -> list[Xid]:
    """What was asked there is asked elsewhere, if that is possible; return what was to be decided there."""
    to_decide = []
    for key, question in list(state.questions.items()):
        question.waiting = {waiter: asked for waiter, asked in question.waiting.items() if waiter[0] != session}
        if question.session == session:
            del state.questions[key]
            if question.commit and state.state_of(key[1]) is State.DECIDING:
                to_decide.append(key[1])
            for (waiting, _branch), message in question.waiting.items():
                ask(state, question.register, waiting, message, question.claim)
    return to_decide
