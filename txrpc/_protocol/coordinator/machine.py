"""The coordinator: two-phase commit with presumed abort (Gray 1978; Mohan, Lindsay and Obermarck 1986), as a table.

How to think of it
    `step` takes one event and the time and returns effects as values.  Every transaction that is being worked on has a row
    in `transactions`; what happened before is in `remembered` (this epoch, for as long as a request about it can come) or in
    the log.  This module takes events and turns them into inputs; `table` says what each input does to a transaction in each
    state.  `requests`, `recovery` and `phases` have those actions, as functions of a `CoordinatorState` (`state`).  Calls go one
    way: machine, table, requests and recovery, one_phase, phases, state.

Time
    `now_ms` is the shell's monotonic clock.  The coordinator's own clock runs with it from a start that is never behind the
    log, so no jump of the machine's clock can reach the protocol.  Its seconds are the *tick*.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any, Final

from txrpc._protocol.coordinator import phases, recovery, registers, requests
from txrpc._protocol.coordinator.admission import is_behind, refuse_hello, refuse_number, refuse_resources
from txrpc._protocol.coordinator.events import (
    Bound,
    Close,
    Drain,
    Event,
    Forgot,
    Limits,
    Logged,
    LogHealth,
    Looked,
    NotLogged,
    Output,
    Rebind,
    Received,
    SessionClosed,
    SessionOpened,
    Woke,
)
from txrpc._protocol.coordinator.rows import Input, State, TransactionRow
from txrpc._protocol.coordinator.sessions import SessionEntry
from txrpc._protocol.coordinator.state import CoordinatorState
from txrpc._protocol.coordinator.table import enter
from txrpc._protocol.deciding import Decided, RegisterAnswer
from txrpc._protocol.messages import (
    AboutEnd,
    Acked,
    BranchAnswer,
    CommitRequest,
    Committing,
    GoAway,
    Hello,
    Inquiry,
    OnePhaseDone,
    Outcome,
    OutcomeReply,
    OutcomeRequest,
    Owner,
    Resolved,
    RollbackRequest,
    Tick,
    Trouble,
    Voted,
    Welcome,
)
from txrpc._protocol.outcomes import Found
from txrpc._protocol.records import Decision, Opened
from txrpc.errors import AbortCode, Reason

__all__ = ["Coordinator"]


class Coordinator:
    """The decisions of one coordinator node in one epoch.  Not thread-safe: one caller at a time."""

    def __init__(
        self,
        node: str,
        group: str,
        opened: Opened,
        limits: Limits,
        now_ms: int,
        clock_ms: int,
    ) -> None:
        """*opened* is what the log returned when it was opened for *node*.

        *clock_ms* is the wall time, or the log's if that is ahead; *now_ms* the monotonic time at that moment.
        """
        self.state = CoordinatorState(Owner(node, opened.epoch), group, opened, limits, now_ms, clock_ms)
        for decision in opened.pending:
            _recover(self.state, decision)

    # ------------------------------------------------------------------------------------------------------- what drives it

    def step(self, event: Event, now_ms: int) -> Output:
        """Take one event at monotonic time *now_ms* and return what must be done about it, in order."""
        self.state.now_ms = max(now_ms, self.state.now_ms)
        self.state.out = Output()
        _EVENTS[type(event)](self.state, event)
        return self.state.out

    def next_wakeup_ms(self) -> int | None:
        """Return when `Woke` is due, in the monotonic time of `step`; None while no process is connected and nothing is timed."""
        due = [self.state.timers[0][0]] if self.state.timers else []
        if self.state.held:
            due.append(self.state.presumes_from_ms)
        if len(self.state.directory):
            due.append(self.state.ticked_ms + self.state.limits.tick_ms)
        return min(due, default=None)

    @property
    def deciding(self) -> int:
        """Transactions whose outcome is still open: what a graceful shutdown waits for."""
        undecided = (State.PREPARING, State.ONE_PHASE, State.DECIDING, State.RECORDING)
        return sum(1 for row in self.state.transactions.values() if row.state in undecided)

    def idle_sessions(self) -> list[int]:
        """Sessions of which no transaction that is being worked on knows anything."""
        waited = {session for row in self.state.transactions.values() for session in row.waiters}
        at_work = {b.ref.participant for row in self.state.transactions.values() for b in row.branches.values()}
        sessions = self.state.directory.sessions.values()
        return [e.session for e in sessions if e.session not in waited and e.hello.participant not in at_work]


# ------------------------------------------------------------------------------------------------------ events


def _session_opened(state: CoordinatorState, event: SessionOpened) -> None:
    # Rules 15, 17 and 18: a process that cannot belong here is refused before anything it says counts.
    hello = event.hello
    refusal = refuse_hello(hello, state.group, state.owner, state.lineage)
    if refusal is None and (behind := is_behind(hello, state.owner, state.ends)):
        state.out.behind = behind
        refusal = GoAway("log_behind", behind, retry=True)
    refusal = refusal or refuse_resources(hello, state.identities)
    refusal = refusal or refuse_number(hello, state.limits, state.directory)
    if refusal is not None:
        state.out.close.append((event.session, refusal))
        state.note("warning", "session refused", session=event.session, process=hello.process, reason=refusal.text)
        return
    previous = state.directory.owner(hello.participant)
    if previous is not None:
        state.out.close.append((previous.session, GoAway("replaced", "this process connected again", retry=False)))
        _drop(state, previous.session)
    entry = state.directory.add(event.session, hello, state.now_ms)
    state.bind(hello)
    limits = state.limits
    most = limits.max_timeout_ms, limits.max_branches, limits.max_message_bytes
    state.send(event.session, Welcome(state.owner, state.tick, *most, state.position, hello.version))
    _found(state, entry)


def _session_closed(state: CoordinatorState, event: SessionClosed) -> None:
    _drop(state, event.session)


def _received(state: CoordinatorState, event: Received) -> None:
    session, message = event.session, event.message
    if session not in state.directory.sessions:
        return  # the tail of a session that was closed
    if event.node == state.owner.node:
        _MESSAGES[type(message)](state, session, message)
        return
    state.violation(session, message, f"is for coordinator {event.node}")
    if isinstance(message, AboutEnd):
        text = f"it belongs to coordinator {event.node}, and this is {state.owner.node}"
        reason = Reason(AbortCode.UNSPECIFIED, text)
        state.send(session, OutcomeReply(message.xid, Outcome.UNKNOWN, reason))


def _logged(state: CoordinatorState, event: Logged) -> None:
    # Group commit: one forced write has answered for all of them.
    state.position = max(state.position, event.position)
    for xid in event.xids:
        enter(state, xid, Input.LOGGED, None, None)


def _not_logged(state: CoordinatorState, event: NotLogged) -> None:
    for xid in event.xids:
        enter(state, xid, Input.NOT_LOGGED, None, event.reason)


def _log_health(state: CoordinatorState, event: LogHealth) -> None:
    state.log_trouble = "" if event.healthy else event.text or "the decision log does not answer"


def _forgot(state: CoordinatorState, event: Forgot) -> None:
    state.forgotten_ms = max(state.forgotten_ms, event.before_ms)


def _drain(state: CoordinatorState, _: Drain) -> None:
    state.draining = True
    for row in state.transactions.values():
        if row.state is State.COMMITTING:
            phases.ack_time_up(state, row, None, None)


def _woke(state: CoordinatorState, _: Woke) -> None:
    while state.timers and state.timers[0][0] <= state.now_ms:
        _due, xid = heapq.heappop(state.timers)
        row = state.transactions.get(xid)
        if row is not None and row.time_up_ms <= state.now_ms:
            enter(state, xid, Input.TIME_UP, None, None)
    if state.held and state.now_ms >= state.presumes_from_ms:
        held, state.held = state.held, []
        for session, message in held:
            _received(state, Received(session, state.owner.node, message))
    state.remembered.advance(state.tick)  # by the coordinator's own clock, which no machine's clock can push (rule 5)
    if state.now_ms - state.ticked_ms >= state.limits.tick_ms:
        state.ticked_ms = state.now_ms
        for entry in state.directory.sessions.values():
            state.send(entry.session, Tick(state.tick, state.position, entry.hello.version))


def _looked(state: CoordinatorState, event: Looked) -> None:
    # The answer is as old as the question: what has begun or ended since then goes before it.
    session, message, decision = event.lookup.session, event.lookup.message, event.decision
    if session not in state.directory.sessions:
        return
    if isinstance(message, Inquiry):
        recovery.inquired_log(state, session, message, decision)
    elif state.state_of(message.xid) is not State.ABSENT:
        _client_request(state, session, message)  # it has begun or ended since then
    elif decision is not None:
        state.send(session, OutcomeReply(event.lookup.xid, Outcome.COMMITTED, position=state.position))
    else:
        requests.without_record(state, session, message)


def _drop(state: CoordinatorState, session: int) -> None:
    # The session is the failure detector: each branch that it was asked about is settled without it.
    entry = state.directory.remove(session)
    if entry is None:
        return
    for xid, branch in sorted(entry.awaiting_reply):
        enter(state, xid, Input.SESSION_LOST, session, branch)
    for xid in registers.session_lost(state, session):
        enter(state, xid, Input.SESSION_LOST, session, None)
    state.reports.left(session, state.now_ms)


def _found(state: CoordinatorState, entry: SessionEntry) -> None:
    """A session came: whatever waited for its process or for one of its resources goes to it."""
    registers.heard_of(state, entry)
    for resource in entry.hello.resources:
        if resource.trouble:
            continue
        state.reports.found(resource.name, state.now_ms)
        for xid, branch in sorted(state.waiting_for_resource.pop(resource.name, ())):
            enter(state, xid, Input.SESSION_FOUND, entry.session, branch)


def _recover(state: CoordinatorState, decision: Decision) -> None:
    # Rule 6: a decision without its mark of done: phase two is repeated, which is idempotent.
    row = TransactionRow.recovered(decision, state.now_ms)
    state.transactions[row.xid] = row
    for branch in row.branches.values():
        phases.tell_commit(state, row, branch, None)
        incident = state.incidents.get((row.xid, branch.ref.branch))
        if incident is not None:
            phases.keep_open(state, row, branch, incident)


def _rebind(state: CoordinatorState, event: Rebind) -> None:
    """An operator knows better: from now on the name means that database."""
    state.out.rebind[event.name] = event.identity
    _means(state, event.name, event.identity)


def _bound(state: CoordinatorState, event: Bound) -> None:
    """The log knows better: it is shared, and another coordinator has written it (rule 17)."""
    for name, identity in event.identities.items():
        if state.identities.get(name, "") != identity:
            _means(state, name, identity)


def _means(state: CoordinatorState, name: str, identity: str) -> None:
    """The name means that database, and processes that mean another one must leave."""
    before = state.identities.pop(name, "")
    if identity:
        state.identities[name] = identity
    if before:
        state.note("warning", "resource rebound", resource=name, identity=identity or "the next that comes")
    for entry in list(state.directory.sessions.values()):
        if any(each.name == name and each.identity not in ("", identity) for each in entry.hello.resources):
            farewell = GoAway("rebound", f"resource {name!r} means another database now", retry=True)
            state.out.close.append((entry.session, farewell))
            _drop(state, entry.session)


# ---------------------------------------------------------------------------------------------------- messages


def _client_request(state: CoordinatorState, session: int, message: AboutEnd) -> None:
    enter(state, message.xid, _INPUTS[type(message)], session, message)


def _decided(state: CoordinatorState, session: int, message: Decided) -> None:
    # Rule 15: only a process that has the register speaks for it.
    if state.directory.sessions[session].holds(message.register):
        enter(state, message.xid, Input.DECIDED, session, message)
    else:
        state.violation(session, message, "speaks for a register that it does not have")


def _register_answer(state: CoordinatorState, session: int, message: RegisterAnswer) -> None:
    question = registers.answered(state, session, message)
    if question is None:
        return
    if message.found is Found.COMMITTED:
        enter(state, message.xid, Input.DECIDED, session, Decided(message.register, message.xid, message.branches))
    elif message.found is Found.ABORTED or registers.refuses(state, question, message):
        enter(state, message.xid, Input.CLAIMED, session, message)
    elif question.commit and state.state_of(message.xid) is State.DECIDING:
        enter(state, message.xid, Input.UNDECIDED, session, message)
    registers.tell(state, question, message)


def _branch_answer(state: CoordinatorState, session: int, message: BranchAnswer) -> None:
    # Rule 15: an answer counts only from the process that was asked, about a branch that the transaction has.
    row = state.transactions.get(message.xid)
    if row is not None:
        branch = row.branches.get(message.branch)
        if branch is None:
            # One that has decided is not listed where that is heard of by its register alone: an earlier epoch had told it to.
            if row.register is None or not isinstance(message, OnePhaseDone):
                state.violation(session, message, "names a branch that the transaction does not have")
            return
        if branch.session != session:
            return  # said before, or not by the process that was asked last
        speaker = state.directory.sessions[session].hello.participant
        if isinstance(message, Voted | Committing | OnePhaseDone) and speaker != branch.ref.participant:
            state.violation(session, message, "speaks of a branch that is another process's")
            return
    enter(state, message.xid, _INPUTS[type(message)], session, message)


def _hello_again(state: CoordinatorState, session: int, message: Hello) -> None:
    """The resources of a process have changed: one that was out of reach is ready, or says something else."""
    first = state.directory.sessions[session].hello
    if message.version < first.version:
        return  # overtaken by what is true now
    if (message.participant, message.group, message.protocol) != (first.participant, first.group, first.protocol):
        refusal: GoAway | None = GoAway("protocol", "said Hello again as another process", retry=True)
        state.violation(session, message, "said Hello again as another process")
    elif (refusal := refuse_resources(message, state.identities)) is not None:
        state.note("warning", "session refused", session=session, process=first.process, reason=refusal.text)
    if refusal is not None:
        state.out.close.append((session, refusal))
        _drop(state, session)
        return
    state.bind(message)
    state.send(session, Tick(state.tick, state.position, message.version))
    _found(state, state.directory.renew(session, message))


_INPUTS: Final[dict[type, Input]] = {
    CommitRequest: Input.COMMIT_REQUEST,
    RollbackRequest: Input.ROLLBACK_REQUEST,
    OutcomeRequest: Input.OUTCOME_REQUEST,
    Voted: Input.VOTED,
    Committing: Input.COMMITTING,
    OnePhaseDone: Input.ONE_PHASE_DONE,
    Resolved: Input.RESOLVED,
    Acked: Input.ACKED,
}

_MESSAGES: Final[dict[type, Callable[[CoordinatorState, int, Any], None]]] = {
    CommitRequest: _client_request,
    RollbackRequest: _client_request,
    OutcomeRequest: _client_request,
    Voted: _branch_answer,
    Committing: _branch_answer,
    OnePhaseDone: _branch_answer,
    Resolved: _branch_answer,
    Acked: _branch_answer,
    Inquiry: recovery.inquiry,
    Trouble: recovery.trouble,
    Decided: _decided,
    RegisterAnswer: _register_answer,
    Hello: _hello_again,
}

_EVENTS: Final[dict[type, Callable[[CoordinatorState, Any], None]]] = {
    SessionOpened: _session_opened,
    SessionClosed: _session_closed,
    Received: _received,
    Logged: _logged,
    NotLogged: _not_logged,
    Looked: _looked,
    LogHealth: _log_health,
    Forgot: _forgot,
    Close: phases.close,
    Rebind: _rebind,
    Bound: _bound,
    Drain: _drain,
    Woke: _woke,
}
