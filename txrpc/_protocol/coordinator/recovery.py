"""What prepared branches that have not heard their decision ask, and how `recovery`'s table is entered and its answers given.

Whatever is not proved by memory is looked up in the log first.  The log's answer is as old as the question, so that what has
begun or ended meanwhile goes before it.
"""

from __future__ import annotations

from txrpc._protocol.coordinator import phases, registers
from txrpc._protocol.coordinator.events import Lookup
from txrpc._protocol.coordinator.knowledge import ANSWERS, UP_TO_THE_LOG, Answer, Knowledge, age_of
from txrpc._protocol.coordinator.phases import PRESUMED
from txrpc._protocol.coordinator.rows import State
from txrpc._protocol.coordinator.state import CoordinatorState
from txrpc._protocol.messages import Commit, Inquiry, Rollback, Trouble, Vote
from txrpc._protocol.records import Decision

__all__ = ["inquired_log", "inquiry", "trouble"]

_REFUSED = {
    Knowledge.STRANGE: (
        "branch of a strange epoch",
        "this log has never had epoch {}: it was restored from a copy, or is another one",
    ),
    Knowledge.FORGOTTEN: (
        "branch older than the log",
        "prepared for longer than this log remembers: see how its transaction ended elsewhere, and end the branch by hand",
    ),
}

_TELLS = frozenset({Answer.COMMIT, Answer.ROLL_BACK, Answer.PRESUME})
_PREPARED = {
    Answer.COMMIT: "prepared, told to commit, and asks again",
    Answer.ROLL_BACK: "prepared, told to roll back, and asks again",
    Answer.PRESUME: "prepared, told to roll back, and asks again",
    Answer.WAIT: "prepared; its root may still ask for the commit",
    Answer.REFUSE: "prepared, and this log cannot know its decision: nothing is done about it here",
}


def inquiry(state: CoordinatorState, session: int, message: Inquiry) -> None:
    gid = message.gid
    if gid.group != state.group or (gid.register is None and gid.node != state.owner.node):
        state.violation(session, message, "asks about a branch of another coordinator")
        return
    if not state.directory.sessions[session].has(gid.resource):
        # It would be told to commit, and could not, and no other acknowledgement would count.
        state.violation(session, message, "asks about a branch in a resource that it does not have")
        return
    if gid.register is not None:
        registers.inquiry(state, session, message, gid.register)
        return
    knowledge = _knowledge(state, session, message)
    if gid.xid in state.transactions or knowledge not in UP_TO_THE_LOG:
        _answer(state, session, message, knowledge)
    else:
        state.out.look.append(Lookup(session, message, gid.xid))


def inquired_log(state: CoordinatorState, session: int, message: Inquiry, decision: Decision | None) -> None:
    """The log has answered; what has begun or ended since then is looked at again."""
    gid, knowledge, token = message.gid, _knowledge(state, session, message), ""
    if gid.xid not in state.transactions and (decision is not None or knowledge is Knowledge.COMMITTED):
        # A commit without a record wrote nothing, so a branch that asks was not part of it.
        prepared = {p.branch: p.token for p in decision.branches} if decision else {}
        knowledge = Knowledge.COMMITTED if gid.branch in prepared else Knowledge.NOT_IN_RECORD
        token = prepared.get(gid.branch, "")
    if knowledge is Knowledge.EARLIER and state.hold(session, message):
        knowledge = Knowledge.AWAITED
    _answer(state, session, message, knowledge, token)


def _knowledge(state: CoordinatorState, session: int, message: Inquiry) -> Knowledge:
    # In the order of certainty: what is being decided, what is remembered, then what the age of its epoch proves.
    gid = message.gid
    row = state.transactions.get(gid.xid)
    if row is not None:
        if row.state is not State.COMMITTING:
            return Knowledge.BEING_DECIDED
        listed = row.branches.get(gid.branch)
        return Knowledge.COMMITTED if listed and listed.vote is Vote.PREPARED else Knowledge.NOT_IN_RECORD
    if gid.xid in state.remembered:
        return Knowledge.COMMITTED if state.remembered[gid.xid] is None else Knowledge.ABORTED
    age = age_of(gid.epoch, state.owner.epoch, state.lineage)
    if age is not Knowledge.STRANGE and state.now_ms + state.offset_ms - message.since_ms <= state.forgotten_ms:
        return Knowledge.FORGOTTEN
    if age is not Knowledge.OVERDUE:
        return age
    owner = state.directory.owner(gid.participant)
    owner_asks_itself = owner is not None and owner.session != session
    return Knowledge.AWAITED if message.time_left_ms > 0 or owner_asks_itself else Knowledge.OVERDUE


def _answer(state: CoordinatorState, session: int, message: Inquiry, knowledge: Knowledge, token: str = "") -> None:
    # Rule 14: whatever is said, a branch that keeps asking is shown to operators.
    gid, answer = message.gid, ANSWERS[knowledge]
    if gid.xid not in state.transactions:
        state.report(gid, message.since_ms, _PREPARED[answer], answer in _TELLS)
    if answer is Answer.COMMIT:
        row = state.transactions.get(gid.xid)
        if row is not None:
            phases.tell_commit(state, row, row.branches[gid.branch], state.directory.sessions[session])
        else:
            state.send(session, Commit(gid, token, state.position))
    elif answer is Answer.PRESUME or answer is Answer.ROLL_BACK:
        if answer is Answer.PRESUME:
            state.remembered.add(gid.xid, PRESUMED)
        ended = gid.xid in state.remembered and state.remembered[gid.xid]
        state.send(session, Rollback(gid, ended or PRESUMED, token))
    elif answer is Answer.REFUSE:
        fields = {"xid": gid.xid, "branch": gid.branch, "resource": gid.resource}
        event, reason = _REFUSED[knowledge]
        state.note("error", event, **fields, reason=reason.format(gid.epoch))


def trouble(state: CoordinatorState, session: int, message: Trouble) -> None:
    """What keeps a process from ending a branch: shown with its transaction, or by itself if that has no row (any more)."""
    gid = message.gid
    if not state.directory.sessions[session].has(gid.resource):
        state.violation(session, message, "reports a branch in a resource that it does not have")
        return
    row = state.transactions.get(gid.xid)
    branch = row.branches.get(gid.branch) if row is not None else None
    if branch is not None:
        if branch.session == session:
            branch.trouble = message.reason.text if message.reason is not None else ""
    elif message.reason is None:
        state.reports.drop(gid.xid, gid.branch)
    else:
        state.report(gid, 0, message.reason.text, session=session)
