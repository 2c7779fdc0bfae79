"""Mistakes about transactions that a resource decides; what the register itself may get wrong is in `tests/mutants`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest.mock import patch

from txrpc._client import completion, deciding, deciding_call, effects
from txrpc._client import registers as client_registers
from txrpc._protocol.coordinator import phases, registers
from txrpc._protocol.coordinator.phases import PRESUMED
from txrpc._protocol.coordinator.rows import Input, State
from txrpc._protocol.deciding import RegisterQuestion
from txrpc._protocol.messages import Commit, Outcome, Rollback, Vote
from txrpc._protocol.outcomes import Found
from txrpc._protocol.participant import phase_one, phase_two
from txrpc._protocol.participant.branch import BranchInput, BranchState
from txrpc._protocol.participant.machine import Participant
from txrpc.errors import AbortCode, Reason
from verification.mutants import Patches, coordinator_does, mistake, participant_does
from verification.simulation import Options
from verification.simulation.register import Register, SimDecider

__all__: list[str] = []

_WORLD = Options(
    nodes=2,
    transactions=3,
    decides=1.0,
    own_resource=0.4,
    final_calls=0.5,
    crashes=4,
    client_deaths=1,
    coordinator_crashes=2,
    database_crashes=3,
    duplication=0.1,
    loss=0.03,
    stray=0.05,
    freezes=3,
    cut_prepares=0.1,
)
_CUT = replace(_WORLD, cut_prepares=0.4)
"""The answers of databases get lost."""
_ELSEWHERE = replace(
    _CUT, databases=3, services=3, clients=3, calls=2, transactions=4, final_calls=1.0, own_resource=0, nested=0
)
"""Many a root lets its last call decide."""
_GIVEN = replace(_CUT, databases=3, services=3, clients=3, calls=3, transactions=4, own_resource=0, nested=0)
"""Many a root has another process's database decide when it commits."""
_SILENCE = Input.SESSION_LOST, Input.TIME_UP, Input.UNDECIDED
_OLDER = replace(
    _WORLD,
    databases=1,
    clients=2,
    services=2,
    transactions=6,
    final_calls=0.7,
    own_resource=0.3,
    amnesia=8,
    sleeps=8,
    crashes=0,
    client_deaths=0,
    database_crashes=0,
    delay_ms=20,
)
"""Databases come back without their last decisions."""
_ASKED = replace(_WORLD, late_requests=30, final_calls=0.3)


# -------------------------------------------------------------------------------------------------------------- the root


@mistake(2, 1, 8, 13, world=_WORLD)
def _decides_before_all_have_voted() -> Patches:
    def mistaken(_client: Any, part: Any, mine: Any) -> Any:
        yield lambda: None, ()
        others = [ref for ref in part.refs if ref.branch != mine.branch]
        return tuple(ref.prepared for ref in others)

    return [patch.object(deciding, "_all_voted", mistaken)]


@mistake(2, 1, 8, 12, 13, 14, world=_WORLD)
def _leaves_out_who_was_not_asked_in_time() -> Patches:
    def mistaken(_client: Any, part: Any, mine: Any) -> Any:
        yield lambda: None, ()
        others = [ref for ref in part.refs if ref.branch != mine.branch and ref.vote is Vote.PREPARED]
        return tuple(ref.prepared for ref in others)

    return [patch.object(deciding, "_all_voted", mistaken)]


@mistake(13, 1, 5, 6, 12, world=_CUT)
def _gives_up_after_it_has_decided() -> Patches:
    commit = deciding.commit

    def mistaken(client: Any, part: Any, wait: Any) -> Any:
        ended = yield from commit(client, part, wait)
        unsure = not isinstance(ended, Reason) and ended[0] is Outcome.UNKNOWN
        return Reason(AbortCode.TIMED_OUT) if unsure else ended

    return [
        patch.object(deciding, "commit", mistaken),
        patch.object(SimDecider, "how_it_was_decided", lambda *_: _kept(Outcome.UNKNOWN)),
    ]


@mistake(13, 1, 5, 6, 12, 14, world=_CUT)
def _takes_a_row_that_is_there_for_a_refusal() -> Patches:
    return [patch.object(SimDecider, "how_it_was_decided", lambda *_: _kept(Outcome.ABORTED))]


def _kept(value: object) -> Any:
    from verification.simulation.scheduler import Promise

    promise = Promise()
    promise.keep(value)
    return promise


@mistake(13, 1, 5, 6, 12, world=_ELSEWHERE)
def _takes_a_last_call_that_was_not_answered_for_a_failure() -> Patches:
    def mistaken(client: Any, part: Any) -> Any:
        if part.committed_there:
            return Outcome.COMMITTED, None
        reason = Reason(AbortCode.CALL_END_UNKNOWN)
        yield from completion._undo(client, part, part.refs, reason)
        return Outcome.ABORTED, reason

    return [patch.object(completion, "_learn", mistaken)]


@mistake(2, 1, 8, 13, world=replace(_ELSEWHERE, final_calls=0.5))
def _lets_a_call_decide_before_all_have_voted() -> Patches:
    def mistaken(part: Any, rule: Any, owner: Any, now_ms: int, _joined: bool) -> Any:
        refs = [ref for ref in part.refs if ref.vote is not Vote.READ_ONLY]
        prepared = tuple(ref.prepared for ref in refs)
        return part.call_begins(rule, owner, now_ms, decide=prepared)

    return [patch.object(deciding_call, "begin", mistaken)]


# ------------------------------------------------------------------------------------------------------- the coordinator


@mistake(1, 2, 5, 6, 8, 13, world=_WORLD)
def _presumes_abort_where_there_is_no_row() -> Patches:
    def mistaken(state: Any, session: int, message: Any, register: Any) -> None:
        state.send(session, Rollback(message.gid, PRESUMED))

    return [patch.object(registers, "inquiry", mistaken)]


@mistake(9, 1, 2, 3, 6, 8, 13, world=replace(_WORLD, final_calls=1.0, duplication=0.4, crashes=6))
def _commits_whoever_asks_about_a_committed_transaction() -> Patches:
    def mistaken(state: Any, session: int, message: Any, answer: Any) -> None:
        if answer.found is Found.COMMITTED:
            state.send(session, Commit(message.gid, "", state.position))

    return [
        patch.object(registers, "_tell_branch", mistaken),
        patch.object(registers, "_roll_back", lambda state, session, message: state.send(session, Commit(message.gid))),
    ]


@mistake(6, 14, 16, world=_WORLD)
def _calls_a_decision_done_before_all_have_committed() -> Patches:
    def mistaken(state: Any, before: Any, session: Any, message: Any) -> None:
        registers.say_done(state, None, session, message)

    return [coordinator_does(state, Input.DECIDED, mistaken) for state in (State.ABSENT, State.POLLED)]


@mistake(1, 2, 5, 6, 8, 12, 13, world=_ASKED)
def _aborts_what_it_only_collected_votes_for() -> Patches:
    return [patch.object(phases, "not_all", phases.abort)]


@mistake(14, 6, 11, world=_WORLD)
def _never_claims() -> Patches:
    def mistaken(state: Any, register: Any, session: int, message: Any, claim: bool) -> None:
        holder = state.directory.holder(register)
        if holder is not None:
            state.send(holder.session, RegisterQuestion(register, message.gid.xid, False))

    return [patch.object(registers, "ask", mistaken)]


# ---------------------------------------------------------------------------------- the coordinator, which has it decided


@mistake(2, 1, 8, 13, world=_GIVEN)
def _has_it_decided_before_all_have_voted() -> Patches:
    return [patch.object(phases, "_voting", lambda _row: [])]


@mistake(13, 1, 5, 6, 12, world=_GIVEN)
def _calls_it_aborted_when_the_decider_does_not_answer() -> Patches:
    def mistaken(state: Any, row: Any, session: Any, message: Any) -> None:
        phases.abort(state, row, PRESUMED)

    return [coordinator_does(State.DECIDING, kind, mistaken) for kind in _SILENCE]


@mistake(13, 1, 5, 6, 12, world=replace(_GIVEN, late_requests=40, transactions=6))
def _forgets_that_it_has_given_the_right_to_decide_away() -> Patches:
    undecided = registers.undecided

    def mistaken(state: Any, row: Any, session: Any, message: Any) -> None:
        undecided(state, row, session, message)
        del state.transactions[row.xid]

    return [coordinator_does(State.DECIDING, kind, mistaken) for kind in _SILENCE]


@mistake(13, 1, 5, 6, 12, world=_GIVEN)
def _takes_a_coordinator_that_does_not_know_for_one_that_has_aborted() -> Patches:
    def mistaken(client: Any, part: Any) -> Any:
        reason = Reason(AbortCode.COORDINATOR_UNAVAILABLE)
        yield from completion._undo(client, part, part.refs, reason)
        return Outcome.ABORTED, reason

    return [patch.object(completion, "_learn", mistaken)]


@mistake(5, 1, 2, 6, 12, 13, world=_GIVEN)
def _writes_a_decision_over_a_refusal() -> Patches:
    ask = Register.ask

    def mistaken(self: Any, register: Any, xid: Any, claim: bool, commit: Any = None) -> Any:
        if commit is not None and xid in self.rows:
            del self.rows[xid]
        return ask(self, register, xid, claim, commit)

    return [patch.object(Register, "ask", mistaken)]


# ------------------------------------------------------------------------------------------------------- the participant


@mistake(1, 2, 5, 6, 12, 13, 14, world=_GIVEN)
def _commits_without_the_decision() -> Patches:
    def mistaken(state: Any, row: Any, message: Any) -> None:
        phase_one.one_phase(state, row, message)

    return [participant_does(BranchState.ACTIVE, BranchInput.DECIDE, mistaken)]


@mistake(14, 13, world=_WORLD)
def _never_asks_under_a_register() -> Patches:
    inquire = phase_two.inquire

    def mistaken(state: Any, row: Any) -> None:
        if row.gid.register is None:
            inquire(state, row)

    return [
        patch.object(phase_two, "inquire", mistaken),
        patch.object(Participant, "in_doubt", lambda self, *_: self.step(BranchInput.RELEASED, None, 0)),
    ]


@mistake(14, 6, world=_WORLD)
def _acknowledges_to_its_own_coordinator_alone() -> Patches:
    def mistaken(client: Any, message: Any) -> tuple[str, ...]:
        row = client.participant.rows.get(getattr(message, "branch", None))
        return (row.home if row is not None and row.home else effects.node_of(client, message),)

    return [patch.object(effects, "_nodes_of", mistaken)]


@mistake(6, 14, world=_WORLD)
def _never_looks_its_register_through() -> Patches:
    return [patch.object(client_registers, "look_through", lambda *_: None)]


@mistake(14, world=_OLDER)
def _asks_for_ever_for_what_other_hands_have_ended() -> Patches:
    return [patch.object(Participant, "swept", lambda *_: [])]


@mistake(9, 1, 2, 6, 13, world=replace(_WORLD, final_calls=0.0, duplication=0.4))
def _decides_though_calls_ran_twice() -> Patches:
    return [patch.object(phase_one, "_objection", lambda *_: None)]


@mistake(13, 1, 5, 8, 12, world=_OLDER)
def _claims_in_another_incarnation_than_it_decided_in() -> Patches:
    ask = SimDecider.how_it_was_decided

    def mistaken(self: Any, work: Any, xid: Any, under: Any) -> Any:
        return ask(self, work, xid, self.opened)

    return [patch.object(SimDecider, "how_it_was_decided", mistaken)]


@mistake(5, 1, 6, 12, 13, world=_WORLD)
def _writes_a_refusal_over_a_decision() -> Patches:
    ask = Register.ask

    def mistaken(self: Any, register: Any, xid: Any, claim: bool, commit: Any = None) -> Any:
        if claim and xid in self.rows:
            del self.rows[xid]
        return ask(self, register, xid, claim, commit)

    return [patch.object(Register, "ask", mistaken)]


@mistake(4, 1, 5, 6, 8, 12, 13, world=_WORLD)
def _gives_a_promise_up_at_its_deadline() -> Patches:
    def mistaken(state: Any, row: Any, _: object) -> None:
        row.rollback_asked = Reason(AbortCode.TIMED_OUT)
        phase_two.undo_prepared(state, row)

    return [participant_does(BranchState.PREPARED, BranchInput.TIME_UP, mistaken)]
