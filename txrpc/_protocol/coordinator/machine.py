"""The coordinator: two-phase commit with presumed abort (Gray 1978; Mohan, Lindsay and Obermarck 1986), as a table.

How to think of it
    `step` takes one event and the time and returns effects as values.  Every transaction that is being worked on has a row
    in `transactions`; what happened before is in `remembered` (this epoch, for as long as a request about it can come) or in
    the log.  `TABLE` names what each (state, input) does; a missing entry is somebody's mistake: it is noted and changes
    nothing.  `requests`, `inquiries` and `rounds` have the actions, `desk` the plumbing under them.

    A commit request from below the remembered horizon or of another epoch is refused (rule 5); asking again adds a waiter and
    never starts anything twice (rule 12).

Time
    `now_ms` is the shell's monotonic clock.  The coordinator's own clock runs with it from a start that is never behind the
    log, so no jump of the machine's clock can reach the protocol.  Its seconds are the *tick*.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any, Final

from txrpc._protocol.coordinator.admission import is_behind, refuse_hello, refuse_number, refuse_resources
from txrpc._protocol.coordinator.events import (
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
from txrpc._protocol.coordinator.recovery import Inquiries
from txrpc._protocol.coordinator.rows import Input, State, Transaction
from txrpc._protocol.coordinator.sessions import SessionEntry
from txrpc._protocol.messages import (
    Acked,
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
from txrpc._protocol.records import Decision, Opened
from txrpc.errors import AbortCode, Reason
from txrpc.ids import Xid

__all__ = ["TABLE", "Coordinator"]


class Coordinator(Inquiries):
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
        super().__init__(Owner(node, opened.epoch), group, opened, limits, now_ms, clock_ms)
        self._ticked_ms = now_ms
        for decision in opened.pending:
            self._recover(decision)

    # ------------------------------------------------------------------------------------------------------- doors

    def step(self, event: Event, now_ms: int) -> Output:
        """Take one event at monotonic time *now_ms* and return what must be done about it, in order."""
        self._now_ms = max(now_ms, self._now_ms)
        self._out = Output()
        _EVENTS[type(event)](self, event)
        return self._out

    def next_wakeup_ms(self) -> int | None:
        """When `Woke` is due, in the monotonic time of `step`; None while nobody is connected and nothing is timed."""
        due = [self._timers[0][0]] if self._timers else []
        if self._held:
            due.append(self._presumes_from_ms)
        if len(self.directory):
            due.append(self._ticked_ms + self.limits.tick_ms)
        return min(due, default=None)

    @property
    def deciding(self) -> int:
        """Transactions whose outcome is still open: what a graceful shutdown waits for."""
        undecided = (State.PREPARING, State.ONE_PHASE, State.RECORDING)
        return sum(1 for row in self.transactions.values() if row.state in undecided)

    def idle_sessions(self) -> list[int]:
        """Sessions of which no transaction that is being worked on knows anything."""
        waited = {session for row in self.transactions.values() for session in row.waiters}
        at_work = {b.ref.participant for row in self.transactions.values() for b in row.branches.values()}
        sessions = self.directory.sessions.values()
        return [e.session for e in sessions if e.session not in waited and e.hello.participant not in at_work]

    # ------------------------------------------------------------------------------------------------------ events

    def _session_opened(self, event: SessionOpened) -> None:
        hello = event.hello
        refusal = refuse_hello(hello, self.group, self.owner, self.lineage)
        if refusal is None and (behind := is_behind(hello, self.owner, self._ends)):
            self._out.behind = behind
            refusal = GoAway("log_behind", behind, retry=True)
        refusal = refusal or refuse_resources(hello, self.identities)
        refusal = refusal or refuse_number(hello, self.limits, self.directory)
        if refusal is not None:
            self._out.close.append((event.session, refusal))
            self._note("warning", "session refused", session=event.session, process=hello.process, reason=refusal.text)
            return
        previous = self.directory.owner(hello.participant)
        if previous is not None:
            self._out.close.append((previous.session, GoAway("replaced", "this process connected again", retry=False)))
            self._drop(previous.session)
        entry = self.directory.add(event.session, hello, self._now_ms)
        self._bind(hello)
        limits, longest_ms = self.limits, self.limits.max_timeout_ms
        welcome = Welcome(
            self.owner, self.tick, longest_ms, limits.max_branches, limits.max_message_bytes, self.position
        )
        self._send(event.session, welcome)
        self._found(entry)

    def _session_closed(self, event: SessionClosed) -> None:
        self._drop(event.session)

    def _received(self, event: Received) -> None:
        session, message = event.session, event.message
        if session not in self.directory.sessions:
            return  # the tail of a session that was closed
        if event.node == self.owner.node:
            _MESSAGES[type(message)](self, session, message)
            return
        self._violation(session, message, f"is for coordinator {event.node}")
        if isinstance(message, CommitRequest | RollbackRequest | OutcomeRequest):
            text = f"it belongs to coordinator {event.node}, and this is {self.owner.node}"
            reason = Reason(AbortCode.UNSPECIFIED, text)
            self._send(session, OutcomeReply(message.xid, Outcome.UNKNOWN, reason))

    def _logged(self, event: Logged) -> None:
        self.position = max(self.position, event.position)
        for xid in event.xids:
            self._enter(xid, Input.LOGGED, None, None)

    def _not_logged(self, event: NotLogged) -> None:
        for xid in event.xids:
            self._enter(xid, Input.NOT_LOGGED, None, event.reason)

    def _log_health(self, event: LogHealth) -> None:
        self.log_trouble = "" if event.healthy else event.text or "the decision log does not answer"

    def _forgot(self, event: Forgot) -> None:
        self._forgotten_ms = max(self._forgotten_ms, event.before_ms)

    def _drain(self, _: Drain) -> None:
        self.draining = True

    def _woke(self, _: Woke) -> None:
        while self._timers and self._timers[0][0] <= self._now_ms:
            _due, xid = heapq.heappop(self._timers)
            row = self.transactions.get(xid)
            if row is not None and row.time_up_ms <= self._now_ms:
                self._enter(xid, Input.TIME_UP, None, None)
        if self._held and self._now_ms >= self._presumes_from_ms:
            held, self._held = self._held, []
            for session, message in held:
                self._received(Received(session, self.owner.node, message))
        self.remembered.advance(self.tick)
        if self._now_ms - self._ticked_ms >= self.limits.tick_ms:
            self._ticked_ms = self._now_ms
            for session in self.directory.sessions:
                self._send(session, Tick(self.tick, self.position))

    def _looked(self, event: Looked) -> None:
        session, message, decision = event.lookup.session, event.lookup.message, event.decision
        if session not in self.directory.sessions:
            return
        if isinstance(message, Inquiry):
            self._inquired_log(session, message, decision)
        elif self.state_of(message.xid) is not State.ABSENT:
            self._client_request(session, message)  # it has begun or ended since then
        elif decision is not None:
            self._send(session, OutcomeReply(event.lookup.xid, Outcome.COMMITTED, position=self.position))
        else:
            self._without_record(session, message)

    def _drop(self, session: int) -> None:
        entry = self.directory.remove(session)
        if entry is None:
            return
        for xid, branch in sorted(entry.awaiting_reply):
            self._enter(xid, Input.SESSION_LOST, session, branch)
        self.reports.left(session, self._now_ms)

    def _found(self, entry: SessionEntry) -> None:
        """A session came: whatever waited for its process or for one of its resources goes to it."""
        for resource in entry.hello.resources:
            if resource.trouble:
                continue
            self.reports.found(resource.name, self._now_ms)
            for xid, branch in sorted(self._waiting_for_resource.pop(resource.name, ())):
                self._enter(xid, Input.SESSION_FOUND, entry.session, branch)

    def _recover(self, decision: Decision) -> None:
        row = Transaction.recovered(decision, self._now_ms)
        self.transactions[row.xid] = row
        for branch in row.branches.values():
            self._tell_commit(row, branch, None)
            incident = self.incidents.get((row.xid, branch.ref.branch))
            if incident is not None:
                self._keep_open(row, branch, incident)

    def _rebind(self, event: Rebind) -> None:
        """An operator knows better: from now on the name means that database, and whoever means another one must leave."""
        self.identities.pop(event.name, None)
        if event.identity:
            self.identities[event.name] = event.identity
        self._out.bind[event.name] = event.identity
        self._note("warning", "resource rebound", resource=event.name, identity=event.identity or "the next that comes")
        for entry in list(self.directory.sessions.values()):
            if entry.has(event.name):
                farewell = GoAway("rebound", f"resource {event.name!r} means another database now", retry=True)
                self._out.close.append((entry.session, farewell))
                self._drop(entry.session)

    # ---------------------------------------------------------------------------------------------------- messages

    def _client_request(self, session: int, message: CommitRequest | RollbackRequest | OutcomeRequest) -> None:
        self._enter(message.xid, _INPUTS[type(message)], session, message)

    def _branch_answer(self, session: int, message: Voted | Committing | OnePhaseDone | Resolved | Acked) -> None:
        row = self.transactions.get(message.xid)
        if row is not None:
            branch = row.branches.get(message.branch)
            if branch is None:
                self._violation(session, message, "names a branch that the transaction does not have")
                return
            if branch.session != session:
                return  # said before, or not by the process that was asked last
            speaker = self.directory.sessions[session].hello.participant
            if isinstance(message, Voted | Committing | OnePhaseDone) and speaker != branch.ref.participant:
                self._violation(session, message, "speaks of a branch that is another process's")
                return
        self._enter(message.xid, _INPUTS[type(message)], session, message)

    def _hello_again(self, session: int, message: Hello) -> None:
        """The resources of a process have changed: one that was out of reach is ready, or says something else."""
        first = self.directory.sessions[session].hello
        if (message.participant, message.group, message.protocol) != (first.participant, first.group, first.protocol):
            refusal: GoAway | None = GoAway("protocol", "said Hello again as somebody else", retry=True)
            self._violation(session, message, "said Hello again as somebody else")
        elif (refusal := refuse_resources(message, self.identities)) is not None:
            self._note("warning", "session refused", session=session, process=first.process, reason=refusal.text)
        if refusal is not None:
            self._out.close.append((session, refusal))
            self._drop(session)
            return
        entry = self.directory.renew(session, message)
        self._bind(message)
        self._found(entry)

    def _enter(self, xid: Xid, kind: Input, session: int | None, message: object) -> None:
        state = self.state_of(xid)
        action = TABLE.get((state, kind))
        if action is None:
            self._violation(session, message, f"{kind.value} in state {state.value}")
        else:
            action(self, self.transactions.get(xid), session, message)

    def _ignore(self, row: object, session: object, message: object) -> None:
        """Late, repeated, or overtaken: legal, and nothing to do."""


_Action = Callable[[Any, Any, Any, Any], None]
_C = Coordinator

TABLE: Final[dict[tuple[State, Input], _Action]] = {
    (State.ABSENT, Input.COMMIT_REQUEST): _C._begin_commit,
    (State.ABSENT, Input.ROLLBACK_REQUEST): _C._give_up,
    (State.ABSENT, Input.OUTCOME_REQUEST): _C._presume,
    (State.ABSENT, Input.VOTED): _C._ignore,
    (State.ABSENT, Input.ONE_PHASE_DONE): _C._ignore,
    (State.ABSENT, Input.RESOLVED): _C._ignore,
    (State.ABSENT, Input.COMMITTING): _C._ignore,
    (State.ABSENT, Input.ACKED): _C._late_ack,
    (State.ABSENT, Input.SESSION_FOUND): _C._ignore,
    (State.PREPARING, Input.COMMIT_REQUEST): _C._join_waiters,
    (State.PREPARING, Input.ROLLBACK_REQUEST): _C._give_up_early,
    (State.PREPARING, Input.OUTCOME_REQUEST): _C._join_waiters,
    (State.PREPARING, Input.VOTED): _C._voted,
    (State.PREPARING, Input.SESSION_LOST): _C._voter_lost,
    (State.PREPARING, Input.TIME_UP): _C._time_up,
    (State.ONE_PHASE, Input.COMMIT_REQUEST): _C._join_waiters,
    (State.ONE_PHASE, Input.ROLLBACK_REQUEST): _C._join_waiters,
    (State.ONE_PHASE, Input.OUTCOME_REQUEST): _C._join_waiters,
    (State.ONE_PHASE, Input.COMMITTING): _C._token,
    (State.ONE_PHASE, Input.ONE_PHASE_DONE): _C._one_phase_done,
    (State.ONE_PHASE, Input.RESOLVED): _C._one_phase_done,
    (State.ONE_PHASE, Input.SESSION_LOST): _C._committer_lost,
    (State.ONE_PHASE, Input.SESSION_FOUND): _C._resume_one_phase,
    (State.ONE_PHASE, Input.TIME_UP): _C._one_phase_time_up,
    (State.RECORDING, Input.COMMIT_REQUEST): _C._join_waiters,
    (State.RECORDING, Input.ROLLBACK_REQUEST): _C._join_waiters,
    (State.RECORDING, Input.OUTCOME_REQUEST): _C._join_waiters,
    (State.RECORDING, Input.LOGGED): _C._recorded,
    (State.RECORDING, Input.NOT_LOGGED): _C._not_recorded,
    (State.RECORDING, Input.TIME_UP): _C._ignore,
    (State.COMMITTING, Input.COMMIT_REQUEST): _C._join_waiters,
    (State.COMMITTING, Input.ROLLBACK_REQUEST): _C._join_waiters,
    (State.COMMITTING, Input.OUTCOME_REQUEST): _C._join_waiters,
    (State.COMMITTING, Input.ACKED): _C._acked,
    (State.COMMITTING, Input.SESSION_LOST): _C._finisher_lost,
    (State.COMMITTING, Input.SESSION_FOUND): _C._resume_commit,
    (State.COMMITTING, Input.TIME_UP): _C._ack_time_up,
    (State.COMMITTED, Input.COMMIT_REQUEST): _C._reply_ended,
    (State.COMMITTED, Input.ROLLBACK_REQUEST): _C._reply_ended,
    (State.COMMITTED, Input.OUTCOME_REQUEST): _C._reply_ended,
    (State.COMMITTED, Input.VOTED): _C._ignore,
    (State.COMMITTED, Input.ONE_PHASE_DONE): _C._ignore,
    (State.COMMITTED, Input.RESOLVED): _C._ignore,
    (State.COMMITTED, Input.COMMITTING): _C._ignore,
    (State.COMMITTED, Input.ACKED): _C._late_ack,
    (State.COMMITTED, Input.SESSION_FOUND): _C._ignore,
    (State.ABORTED, Input.COMMIT_REQUEST): _C._reply_ended,
    (State.ABORTED, Input.ROLLBACK_REQUEST): _C._reply_ended,
    (State.ABORTED, Input.OUTCOME_REQUEST): _C._reply_ended,
    (State.ABORTED, Input.VOTED): _C._ignore,
    (State.ABORTED, Input.ONE_PHASE_DONE): _C._ignore,
    (State.ABORTED, Input.RESOLVED): _C._ignore,
    (State.ABORTED, Input.COMMITTING): _C._ignore,
    (State.ABORTED, Input.ACKED): _C._late_ack,
    (State.ABORTED, Input.SESSION_LOST): _C._ignore,  # by the loss of another branch of the same session
    (State.ABORTED, Input.SESSION_FOUND): _C._ignore,
}
"""What each input does in each state.  A missing entry is a mistake of the sender, or of this program."""

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

_MESSAGES: Final[dict[type, Callable[[Any, int, Any], None]]] = {
    CommitRequest: _C._client_request,
    RollbackRequest: _C._client_request,
    OutcomeRequest: _C._client_request,
    Voted: _C._branch_answer,
    Committing: _C._branch_answer,
    OnePhaseDone: _C._branch_answer,
    Resolved: _C._branch_answer,
    Acked: _C._branch_answer,
    Inquiry: _C._inquiry,
    Trouble: _C._trouble,
    Hello: _C._hello_again,
}

_EVENTS: Final[dict[type, Callable[[Any, Any], None]]] = {
    SessionOpened: _C._session_opened,
    SessionClosed: _C._session_closed,
    Received: _C._received,
    Logged: _C._logged,
    NotLogged: _C._not_logged,
    Looked: _C._looked,
    LogHealth: _C._log_health,
    Forgot: _C._forgot,
    Close: _C._close,
    Rebind: _C._rebind,
    Drain: _C._drain,
    Woke: _C._woke,
}
