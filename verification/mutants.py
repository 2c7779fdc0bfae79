"""The protocol with one mistake in it, on purpose: what would a checker be worth that none of these could wake?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

from txrpc._client import completion, greeting
from txrpc._client import requests as client_requests
from txrpc._client.core import ClientCore
from txrpc._client.local_transaction import LocalTransaction, Status
from txrpc._decision_log.memory import MemoryLog
from txrpc._decision_log.port import NotRecorded
from txrpc._group import log as group_log
from txrpc._protocol.coordinator import knowledge, one_phase, phases, recovery, requests
from txrpc._protocol.coordinator import machine as coordinator_machine
from txrpc._protocol.coordinator import table as coordinator_table
from txrpc._protocol.coordinator.ended import EndedTransactions
from txrpc._protocol.coordinator.events import Forgot
from txrpc._protocol.coordinator.knowledge import Answer, Knowledge
from txrpc._protocol.coordinator.rows import Input, State
from txrpc._protocol.coordinator.state import CoordinatorState
from txrpc._protocol.messages import (
    Acked,
    CommitRequest,
    Committing,
    FinishResult,
    OnePhaseDone,
    Outcome,
    OutcomeReply,
    OutcomeRequest,
    Resolved,
    Vote,
    Voted,
)
from txrpc._protocol.participant import phase_one, phase_two
from txrpc._protocol.participant import table as participant_table
from txrpc._protocol.participant.branch import BranchInput, BranchState, Operation
from txrpc._protocol.participant.machine import Participant
from txrpc._protocol.participant.state import ParticipantState
from txrpc._protocol.quorum import proposer
from txrpc._protocol.records import overflow_ms
from txrpc._protocol.takeover import NodeWatch
from txrpc.errors import AbortCode, CoordinatorUnavailable, Reason
from txrpc.ids import ParticipantId
from verification.simulation import Options
from verification.simulation.engine import Engine
from verification.simulation.process import SimRuntime

__all__ = ["MUTANTS", "Mutant", "coordinator_does", "mistake", "participant_does"]

_S, _I = BranchState, BranchInput
Patches = list[Any]


@dataclass(frozen=True)
class Mutant:
    """One mistake: what it is, the rule that it breaks, the checkers that may notice first, how it is made, and in which world."""

    name: str
    breaks: int
    rules: frozenset[int]
    patches: Callable[[], Patches]
    world: Options | None = None

    @contextmanager
    def made(self) -> Iterator[None]:
        """The mistake is in the code, and no table objects to where it leads."""
        with ExitStack() as stack:
            stack.enter_context(patch.dict(coordinator_table.TABLE, _anywhere(coordinator_table.TABLE, State)))
            stack.enter_context(patch.dict(participant_table.TABLE, _anywhere(participant_table.TABLE, BranchState)))
            for one in self.patches():
                stack.enter_context(one)
            yield


def _anywhere(table: Any, states: Any) -> Any:
    return {key: entry._replace(next_states=frozenset(states)) for key, entry in table.items()}


MUTANTS: list[Mutant] = []


def mistake(
    breaks: int, *others: int, world: Options | None = None
) -> Callable[[Callable[[], Patches]], Callable[[], Patches]]:
    """Register a mistake that *breaks* a rule; the checkers of *others* may see it first."""

    def register(make: Callable[[], Patches]) -> Callable[[], Patches]:
        name = make.__name__.removeprefix("_").replace("_", " ")
        MUTANTS.append(Mutant(name, breaks, frozenset({breaks, *others}), make, world))
        return make

    return register


def coordinator_does(state: State, kind: Input, action: Any) -> Any:
    """Patch: *action* is what the coordinator does about that input in that state."""
    return patch.dict(coordinator_table.TABLE, {(state, kind): coordinator_table.Entry(action, frozenset(State))})


def participant_does(state: BranchState, kind: BranchInput, action: Any) -> Any:
    """Patch: *action* is what the participant does about that input in that state."""
    return patch.dict(participant_table.TABLE, {(state, kind): participant_table.Entry(action, frozenset(BranchState))})


# ------------------------------------------------------------------------------------------------- the coordinator


@mistake(3)
def _tells_before_the_decision_is_durable() -> Patches:
    decide = phases.decide

    def mistaken(state: Any, row: Any) -> None:
        decide(state, row)
        if row.state is State.RECORDING:
            phases.recorded(state, row, None, None)

    return [patch.object(phases, "decide", mistaken)]


@mistake(3)
def _answers_the_root_while_the_log_is_still_writing() -> Patches:
    decide = phases.decide

    def mistaken(state: Any, row: Any) -> None:
        decide(state, row)
        if row.state is State.RECORDING:
            for waiter in row.waiters:
                state.send(waiter, phases.committed_reply(state, row))
            row.waiters.clear()

    return [patch.object(phases, "decide", mistaken)]


@mistake(6)
def _marks_the_record_done_at_the_decision() -> Patches:
    recorded = phases.recorded

    def mistaken(state: Any, row: Any, session: None, message: None) -> None:
        recorded(state, row, session, message)
        state.out.done.append(row.xid)

    return [coordinator_does(State.RECORDING, Input.LOGGED, mistaken)]


@mistake(6, 14, 16)
def _forgets_at_the_first_acknowledgement() -> Patches:
    acked = phases.acked

    def mistaken(state: Any, row: Any, session: int, message: Any) -> None:
        row.missing = 1
        acked(state, row, session, message)

    return [coordinator_does(State.COMMITTING, Input.ACKED, mistaken)]


@mistake(6)
def _never_marks_a_record_done() -> Patches:
    acked = phases.acked

    def mistaken(state: Any, row: Any, session: int, message: Any) -> None:
        acked(state, row, session, message)
        state.out.done.clear()

    return [coordinator_does(State.COMMITTING, Input.ACKED, mistaken)]


@mistake(7, 5, 13)
def _the_log_has_no_fence() -> Patches:
    @contextmanager
    def unfenced(self: Any) -> Iterator[Any]:
        yield self._node

    return [patch.object(MemoryLog, "_writing", unfenced)]


@mistake(5, 12, 13, 14)
def _remembers_nothing_of_what_has_ended() -> Patches:
    return [patch.object(EndedTransactions, "add", lambda self, xid, ended: None)]


@mistake(5, 1, 2, 12, 13)
def _takes_commit_requests_of_earlier_epochs() -> Patches:
    return [patch.object(requests, "_of_this_time", lambda self, request: True)]


@mistake(2, 1, 13)
def _takes_a_vote_against_for_a_vote_for() -> Patches:
    voted = phases.voted

    def mistaken(state: Any, row: Any, session: int, vote: Any) -> None:
        if vote.vote is Vote.ABORT:
            object.__setattr__(vote, "vote", Vote.READ_ONLY)
        voted(state, row, session, vote)

    return [coordinator_does(State.PREPARING, Input.VOTED, mistaken)]


@mistake(2, 1, 3, 8, 12, 13)
def _counts_a_lost_voter_as_read_only() -> Patches:
    def mistaken(state: Any, row: Any, session: int, branch: Any) -> None:
        row.branches[branch].vote = Vote.READ_ONLY
        row.missing -= 1
        if not row.missing:
            phases.decide(state, row)

    return [coordinator_does(State.PREPARING, Input.SESSION_LOST, mistaken)]


@mistake(2, 1, 8, 13, 14)
def _commits_the_first_of_several_branches_in_one_phase() -> Patches:
    def mistaken(state: Any, row: Any) -> None:
        for branch in list(row.branches)[1:]:
            del row.branches[branch]
        one_phase.delegate(state, row)

    return [patch.object(phases, "prepare", mistaken)]


@mistake(5, 1, 4, 6, 14)
def _rolls_back_branches_of_earlier_epochs_without_asking_the_log() -> Patches:
    without = frozenset(knowledge.UP_TO_THE_LOG - {Knowledge.EARLIER})
    return [
        patch.object(recovery, "UP_TO_THE_LOG", without),
        patch.object(coordinator_machine, "_recover", lambda self, decision: None),
    ]


@mistake(14, 6)
def _does_not_take_up_what_the_log_has_pending() -> Patches:
    return [patch.object(coordinator_machine, "_recover", lambda self, decision: None)]


@mistake(12, 13)
def _calls_a_slow_commit_aborted() -> Patches:
    def mistaken(state: Any, row: Any, session: None, message: None) -> None:
        reply = OutcomeReply(row.xid, Outcome.ABORTED, Reason(AbortCode.TIMED_OUT))
        for waiter in row.waiters:
            state.send(waiter, reply)
        row.waiters.clear()

    return [coordinator_does(State.COMMITTING, Input.TIME_UP, mistaken)]


@mistake(13)
def _guesses_how_a_commit_in_one_phase_ended() -> Patches:
    def mistaken(state: Any, row: Any, session: int, branch: Any) -> None:
        phases.finish(state, row, Reason(AbortCode.PARTICIPANT_LOST))

    return [coordinator_does(State.ONE_PHASE, Input.SESSION_LOST, mistaken)]


@mistake(15, 1, 2, 3, 6, 13, 14)
def _believes_any_answer() -> Patches:
    inputs = coordinator_machine._INPUTS

    def mistaken(state: Any, session: int, message: Any) -> None:
        row = state.transactions.get(message.xid)
        if row is None or message.branch in row.branches:
            coordinator_table.enter(state, message.xid, inputs[type(message)], session, message)

    answers = (Voted, Acked, OnePhaseDone, Resolved, Committing)
    return [patch.dict(coordinator_machine._MESSAGES, dict.fromkeys(answers, mistaken))]


@mistake(3, 1, 5, 6, 12, 13, 14)
def _aborts_a_batch_of_which_it_does_not_know_whether_it_was_written() -> Patches:
    write = Engine._write

    def mistaken(self: Any, attempt: int) -> None:
        if attempt:
            xids = tuple(decision.xid for decision in self._writing)
            for xid in xids:
                coordinator_table.enter(self.core.state, xid, Input.NOT_LOGGED, None, Reason(AbortCode.LOG_UNAVAILABLE))
        write(self, attempt)

    def stepped(self: Any, attempt: int) -> None:
        self.core.state.out = type(self.core.state.out)()
        mistaken(self, attempt)
        self._apply(self.core.state.out)

    return [patch.object(Engine, "_write", stepped)]


@mistake(5, 1, 14, world=Options(slow=0.4, loss=0.1, freezes=6, transactions=5, read_only=0.0))
def _answers_a_question_about_a_running_transaction_with_presumed_abort() -> Patches:
    return [
        patch.dict(knowledge.ANSWERS, {Knowledge.BEING_DECIDED: Answer.ROLL_BACK, Knowledge.AWAITED: Answer.ROLL_BACK})
    ]


# ------------------------------------------------------------------------------------------------- the participant


@mistake(9)
def _ignores_the_call_count() -> Patches:
    objection = phase_one._objection

    def mistaken(state: Any, row: Any, calls: int) -> Any:
        return objection(state, row, row.calls)

    return [patch.object(phase_one, "_objection", mistaken)]


_FINAL = Options(final_calls=0.6, duplication=0.3, stray=0.1, transactions=6, calls=4, services=2, read_only=0.0)


@mistake(9, world=_FINAL)
def _believes_an_early_vote_whatever_it_has_counted() -> Patches:
    return [patch.object(LocalTransaction, "miscounted", lambda _self: None)]


@mistake(9, 2, 10, world=_FINAL)
def _votes_early_while_a_call_still_runs() -> Patches:
    def mistaken(state: Any, row: Any, _: object) -> None:
        state.close(row)
        row.early, row.state = True, _S.VOTING
        state.do(Operation.PREPARE, row)

    return [participant_does(_S.ACTIVE, _I.VOTE_EARLY, mistaken)]


@mistake(10, 9, 2, world=_FINAL)
def _lets_calls_in_after_an_early_vote() -> Patches:
    def mistaken(state: Any, row: Any, _: object) -> None:
        row.early = True
        phase_one._prepare_or_object(state, row, row.calls)
        state.by_use.pop((row.xid, row.gid.resource), None)

    return [participant_does(_S.ACTIVE, _I.VOTE_EARLY, mistaken)]


@mistake(8, 2, 13, world=Options(crashes=12, transactions=6, calls=6, delay_ms=200, read_only=0.0))
def _a_restarted_process_votes_for_the_work_of_the_dead_one() -> Patches:
    def keeps_its_name(self: Any, process: Any, resources: Any) -> None:
        made(self, process, resources)
        self.state.participant_id = ParticipantId(process.name.encode().ljust(8, b".")[-8:])

    made = SimRuntime.__init__

    def unknown(state: Any, row: None, message: Any) -> None:
        state.out.send.append(Voted(message.xid, message.branch, Vote.READ_ONLY))

    return [patch.object(SimRuntime, "__init__", keeps_its_name), participant_does(_S.ABSENT, _I.PREPARE, unknown)]


@mistake(4, 1, 2)
def _commits_a_prepared_branch_when_no_answer_comes() -> Patches:
    def mistaken(state: Any, row: Any, _: object) -> None:
        row.state = _S.COMMITTING
        state.do(Operation.COMMIT_PREPARED, row)

    return [participant_does(_S.PREPARED, _I.TIME_UP, mistaken)]


@mistake(1, 4, 6)
def _rolls_back_a_prepared_branch_at_its_deadline() -> Patches:
    def mistaken(state: Any, row: Any, _: object) -> None:
        phase_two.undo_prepared(state, row)

    return [participant_does(_S.PREPARED, _I.TIME_UP, mistaken)]


@mistake(11, 14)
def _lets_unprepared_branches_live_for_ever() -> Patches:
    return [participant_does(_S.ACTIVE, _I.TIME_UP, participant_table._ignore)]


@mistake(10)
def _lets_late_calls_in() -> Patches:
    found = ParticipantState.find

    def active(self: Any, xid: Any, resource: str) -> Any:
        row = found(self, xid, resource)
        return row if row is not None and row.state is _S.ACTIVE else None

    return [
        patch.object(ParticipantState, "is_closed", lambda self, xid: False),
        patch.object(ParticipantState, "find", active),
    ]


@mistake(2, 1, 8, 12, 13, 14)
def _votes_for_what_the_database_refused() -> Patches:
    def mistaken(state: Any, row: Any, reason: Any) -> None:
        phase_one._vote(state, row, Vote.READ_ONLY)
        state.end(row, Outcome.COMMITTED)

    return [participant_does(_S.VOTING, _I.PREPARE_FAILED, mistaken)]


@mistake(6, 14, 16)
def _acknowledges_a_commit_that_failed() -> Patches:
    def mistaken(state: Any, row: Any, _: object) -> None:
        phase_two.finished_commit(state, row, FinishResult.DONE)

    return [participant_does(_S.COMMITTING, _I.FINISH_FAILED, mistaken)]


@mistake(14, world=Options(crashes=10, cut_prepares=0.5, transactions=5, read_only=0.0))
def _never_looks_for_branches_that_no_process_knows() -> Patches:
    return [patch.object(ClientCore, "swept", lambda *_: None)]


@mistake(13, world=Options(crashes=12, transactions=6, calls=1, read_only=0.0, databases=1, services=1))
def _does_not_ask_the_database_how_a_commit_in_one_phase_ended() -> Patches:
    def mistaken(self: Any, gid: Any, token: str, now_ms: int) -> Any:
        self.state.begin(now_ms)
        self.state.out.send.append(Resolved(gid.xid, gid.branch, Outcome.ABORTED))
        return self.state.out

    return [patch.object(Participant, "resolve_foreign", mistaken)]


# ---------------------------------------------------------------------------------------------------------- the root


@mistake(
    21,
    12,
    13,
    world=Options(
        clients=2, services=1, databases=1, transactions=6, calls=1, read_only=0.0, own_resource=0.95,
        database_crashes=12, patience_s=1,
    ),
)  # fmt: skip
def _lets_the_coordinator_presume_how_a_local_commit_ended() -> Patches:
    def mistaken(client: Any, part: Any) -> None:
        if part.status is Status.UNKNOWN and part.owner is not None:
            request = OutcomeRequest(part.xid, part.owner.epoch, part.begun_tick, part.refs)
            client.unknown[part.xid] = (part.owner.node, request)

    return [
        patch.object(completion, "keep_unknown", mistaken),
        patch.object(requests, "_commits_by_itself", lambda *_: False),
    ]


@mistake(13)
def _takes_a_lost_answer_for_an_abort() -> Patches:
    def mistaken(client: Any, node: str, request: Any, until_ms: int) -> Any:
        yield client.runtime.pause, (0.0,)
        return OutcomeReply(request.xid, Outcome.ABORTED, Reason(AbortCode.COORDINATOR_UNAVAILABLE))

    return [patch.object(completion, "_ask_outcome", mistaken)]


@mistake(5, 12, 13)
def _asks_for_the_commit_again_instead_of_the_outcome() -> Patches:
    def mistaken(client: Any, node: str, request: Any, until_ms: int) -> Any:
        while client.now_ms() < until_ms:
            try:
                live = yield client.runtime.reconnect, (node, (until_ms - client.now_ms()) / 1000)
                again = CommitRequest(
                    request.xid, live.epoch, client.coordinators[live.node].tick, request.branches, 5_000
                )
                return (yield client.runtime.wait, (client_requests.post(client, live.node, again), 5.0))
            except (CoordinatorUnavailable, TimeoutError):
                yield client.runtime.pause, (0.05,)
        return None

    return [patch.object(completion, "_ask_outcome", mistaken)]


_LOG_LOST = Options(
    log_restores=2, read_only=0, gives_up=0, transactions=3, database_crashes=2, freezes=2, stray=0.1, loss=0.05
)
"""Databases that are away while the decision is made, so that branches ask after the log has lost it."""


@mistake(18, 1, 2, 6, 12, 13, 14, world=_LOG_LOST)
def _takes_a_log_that_has_lost_decisions_for_a_good_one() -> Patches:
    return [patch.object(coordinator_machine, "is_behind", lambda *_: "")]


@mistake(18, 1, 2, 6, 12, 13, 14, world=_LOG_LOST)
def _presumes_aborts_before_those_who_know_better_have_come_back() -> Patches:
    return [patch.object(CoordinatorState, "hold", lambda *_: False)]


@mistake(14, 6, 13, world=Options(crashes=10, database_crashes=12, cut_prepares=0.3, transactions=5, loss=0.05))
def _does_not_say_that_a_resource_has_become_ready() -> Patches:
    return [patch.object(greeting, "announce", lambda _: None)]


_LATE = Options(late_requests=20, transactions=3, read_only=0.0, gives_up=0.0)


@mistake(12, 5, 13, world=_LATE)
def _takes_the_absence_of_a_memory_for_a_proof_however_old_the_question() -> Patches:
    return [patch.object(requests, "_of_this_time", lambda *_: True)]


@mistake(12, 5, 13, world=_LATE)
def _presumes_aborts_where_records_have_been_deleted() -> Patches:
    return [patch.dict(coordinator_machine._EVENTS, {Forgot: lambda *_: None})]


@mistake(12, 5, 13, world=replace(_LATE, log_keeps=0, coordinator_crashes=4, clients=3, transactions=5))
def _forgets_more_than_it_was_told_to() -> Patches:
    forgets = MemoryLog.forget

    def mistaken(self: Any, done_before_ms: int, limit: int) -> int:
        return forgets(self, max(done_before_ms, overflow_ms(self._node.done_ms.values(), self._store.keeps)), limit)

    return [patch.object(MemoryLog, "overflow_ms", lambda _: 0), patch.object(MemoryLog, "forget", mistaken)]


@mistake(
    17,
    1,
    2,
    4,
    6,
    12,
    13,
    14,
    world=Options(misnames=4, databases=3, services=3, transactions=5, read_only=0.0, calls=4),
)
def _takes_any_database_under_a_name() -> Patches:
    return [patch.object(coordinator_machine, "refuse_resources", lambda *_: None)]


_GROUP = Options(nodes=3, usurpations=6, coordinator_crashes=3, freezes=3, transactions=5, clients=3, read_only=0.0)


@mistake(7, 1, 2, 3, 5, 6, 12, 13, 14, world=_GROUP)
def _takes_a_node_over_without_fencing_it() -> Patches:
    opens = MemoryLog.open

    def mistaken(self: Any, node: str, nonce: int, holder: str = "", expect: Any = None) -> Any:
        opened = opens(self, node, nonce, holder, expect)
        if holder:
            del self._node.epochs[opened.epoch]
            self._epoch = max(self._node.epochs)
            return replace(opened, epoch=self._epoch)
        return opened

    return [patch.object(MemoryLog, "open", mistaken)]


@mistake(14, 13, world=replace(_GROUP, usurpations=0, coordinator_deaths=2))
def _leaves_a_dead_node_alone() -> Patches:
    return [patch.object(NodeWatch, "observe", lambda *_: [])]


@mistake(14, 13, world=replace(_GROUP, usurpations=0, coordinator_deaths=1, coordinator_crashes=6))
def _forgets_what_it_held_before_it_was_restarted() -> Patches:
    observe = NodeWatch.observe

    def mistaken(self: Any, rows: Any, mine: Any, now_ms: int) -> Any:
        return [row for row in observe(self, rows, mine, now_ms) if row.holder != self._node]

    return [patch.object(NodeWatch, "observe", mistaken)]


@mistake(14, 13, world=replace(_GROUP, coordinator_deaths=2))
def _does_not_greet_a_node_that_was_taken_over() -> Patches:
    return [patch.object(greeting, "greet", lambda *_: None)]


@mistake(13, 1, 2, 5, 12, 14, world=_GROUP)
def _listens_to_an_epoch_that_is_over() -> Patches:
    hear = ClientCore.on_message

    def mistaken(self: Any, session: Any, node: str, message: Any) -> None:
        known = self.state.coordinators.get(node)
        if known is not None and known.session is not None:
            known.session = session
        hear(self, session, node, message)

    return [patch.object(ClientCore, "on_message", mistaken)]


# ------------------------------------------------------------------------------------------------- the group's log

_GROUP = Options(
    nodes=3, group=True, member_cuts=0.4, disk_losses=1, view_changes=2, usurpations=3, coordinator_crashes=3
)


@mistake(3, 1, 5, 6, 12, world=_GROUP)
def _calls_a_record_aborted_that_a_minority_has() -> Patches:
    return [patch.object(group_log, "RecordUncertain", NotRecorded)]


@mistake(6, 1, 12, 14, world=_GROUP)
def _leaves_behind_what_an_earlier_epoch_has_proposed() -> Patches:
    read = proposer._behind

    def only_what_is_chosen(*arguments: Any) -> Any:
        return read(*arguments)[0], []

    return [patch.object(proposer, "_behind", only_what_is_chosen)]
