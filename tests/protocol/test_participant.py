"""The design's rules as far as one process keeps them, a sentence a test; and what each way to commit costs here."""

from __future__ import annotations

from typing import Any

import pytest

from tests.protocol.participant_kit import (
    DEADLINE_MS,
    FAILED,
    OTHER,
    T0,
    Process,
    answers,
    commit,
    gid,
    one_phase,
    prepare,
    resolve,
    rollback,
)
from txrpc._protocol.messages import Committing, FinishResult, Inquiry, OnePhaseDone, Outcome, Voted
from txrpc._protocol.participant.branch import BranchInput as In
from txrpc._protocol.participant.branch import BranchState, Operation
from txrpc.errors import AbortCode

ONE, TWO = gid(1, resource="accounts"), gid(2, resource="audit")
COMMITTED = (Outcome.COMMITTED, None)
DAY_MS = 86_400_000


def prepared(branch: In = In.PREPARED) -> Process:
    process = Process()
    process.open(ONE)
    process.hear(prepare(ONE))
    process.local(branch, ONE, "t1")
    return process


# --------------------------------------------------------------------------------------------- rule 4: a promise holds


def test_a_prepared_branch_only_ever_asks_however_long_it_takes() -> None:
    process = prepared()
    process.sent.clear()
    until_ms = T0 + DAY_MS
    while process.now_ms < until_ms:
        due_ms = process.table.state.next_wakeup_ms()
        assert due_ms is not None, "nothing would ever ask again"
        process.sleep(max(0, due_ms - process.now_ms))
        assert process.state(ONE) is BranchState.PREPARED
    assert process.operations == [Operation.PREPARE]
    assert {type(message) for message in process.sent} == {Inquiry}
    assert 2_000 < len(process.sent) < 12_000, "a slow pace: about four a minute"


@pytest.mark.parametrize("kind", [k for k in In if k not in (In.COMMIT, In.ROLLBACK)])
def test_no_local_input_ends_a_prepared_branch(kind: In) -> None:
    process = prepared()
    assert process.local(kind, ONE, None).do == []
    assert process.state(ONE) is BranchState.PREPARED


def test_the_first_question_comes_at_the_deadline_and_says_that_no_time_is_left() -> None:
    process = prepared()
    assert process.sleep(DEADLINE_MS - T0 - 1).send == []
    (inquiry,) = process.sleep(1).send
    assert inquiry == Inquiry(ONE, since_ms=DEADLINE_MS - T0, time_left_ms=0)


def test_a_new_session_makes_every_branch_in_doubt_ask_and_says_how_long_its_root_may_take() -> None:
    process = prepared()
    process.open(TWO)
    process.now_ms += 100
    (inquiry,) = process.table.connected("c1", process.now_ms).send
    assert inquiry == Inquiry(ONE, since_ms=100, time_left_ms=DEADLINE_MS - T0 - 100)


def test_a_prepared_branch_whose_deadline_passed_while_voting_still_waits_before_it_asks() -> None:
    process = Process()
    process.open(ONE)
    process.hear(prepare(ONE))
    process.sleep(DEADLINE_MS - T0)
    process.local(In.PREPARED, ONE, "t1")
    assert process.sleep(999).send == []
    assert answers(process.sleep(1).send) == ["Inquiry"]


def test_what_a_database_holds_for_a_process_that_died_is_asked_for_and_ended_as_told() -> None:
    process = Process()
    orphan = gid(7, participant=OTHER)
    assert process.table.in_doubt(orphan, 9_000, T0).send == [Inquiry(orphan, 9_000, 0)]
    (do,) = process.hear(commit(orphan, "t7")).do
    assert (do.operation, do.gid, do.token) == (Operation.COMMIT_PREPARED, orphan, "t7")
    assert answers(process.local(In.FINISHED, orphan, FinishResult.DONE).send) == ["Acked DONE"]


def test_a_database_out_of_reach_is_tried_again_until_the_decision_is_carried_out() -> None:
    process = prepared()
    process.hear(commit(ONE))
    for number in range(1, 21):
        told = ["Trouble"] if number in (1, 2, 4, 8, 16) else []
        assert answers(process.local(In.FINISH_FAILED, ONE, FAILED).send) == told
        due_ms = process.table.state.next_wakeup_ms()
        assert due_ms is not None
        assert [do.operation for do in process.sleep(max(0, due_ms - process.now_ms)).do] in (
            [Operation.COMMIT_PREPARED],
            [],  # an older alarm of the branch
        )
        process.sleep(5_000)
    assert answers(process.local(In.FINISHED, ONE, FinishResult.DONE).send) == ["Trouble", "Acked DONE"]


def test_after_a_failed_prepare_the_branch_is_undone_until_the_database_confirms() -> None:
    process = Process()
    process.open(ONE)
    process.hear(prepare(ONE))
    process.local(In.PREPARE_FAILED, ONE, FAILED)
    for _ in range(5):
        process.local(In.FINISH_FAILED, ONE, FAILED)
        process.sleep(5_000)
    process.local(In.FINISHED, ONE, FinishResult.NOT_HERE)
    assert process.operations == [Operation.PREPARE] + [Operation.ROLLBACK_PREPARED] * 6
    assert answers(process.sent) == [
        "Voted ABORT",
        *["Trouble"] * 4,
    ]  # the 1st, 2nd and 4th failure, and that it is over


# ------------------------------------------------------------------------------- rule 8: lost work is not prepared


def test_preparing_work_of_an_earlier_incarnation_votes_abort_and_says_that_a_retry_may_help() -> None:
    process = Process()
    process.open(gid(2))  # the same transaction called again, after the restart
    (vote,) = process.hear(prepare(gid(1))).send
    assert isinstance(vote, Voted)
    assert (answers([vote]), vote.reason and vote.reason.code) == (["Voted ABORT"], AbortCode.BRANCH_UNKNOWN)
    assert vote.reason is not None
    assert vote.reason.retryable
    assert process.state(gid(2)) is BranchState.ACTIVE


def test_committing_work_of_an_earlier_incarnation_in_one_phase_is_refused() -> None:
    assert answers(Process().hear(one_phase(ONE)).send) == ["OnePhaseDone ABORTED"]


def test_a_taken_back_branch_is_unknown() -> None:
    process = Process()
    process.table.discard(process.open(ONE))
    assert process.table.state.find(ONE.xid, ONE.resource) is None
    assert answers(process.hear(prepare(ONE)).send) == ["Voted ABORT"]


# ------------------------------------------------------------------------------------ rule 9: checked transactions


@pytest.mark.parametrize("seen", [0, 1, 3, 99])
@pytest.mark.parametrize("ask", [prepare, one_phase])
def test_rule_9_a_count_that_differs_from_the_root_s_aborts(ask: object, seen: int) -> None:
    process = Process()
    process.open(ONE, calls=2)
    effects = process.hear(ask(ONE, seen))  # type: ignore[operator]
    assert [do.operation for do in effects.do] == [Operation.ROLLBACK]
    (answer,) = effects.send
    assert isinstance(answer, Voted | OnePhaseDone)
    assert answer.reason is not None
    assert answer.reason.code is AbortCode.CALLS_DIFFER


@pytest.mark.parametrize("ask", [prepare, one_phase])
def test_rule_9_a_call_still_running_aborts(ask: object) -> None:
    process = Process()
    process.open(ONE, calls=1).running = 1
    assert [do.operation for do in process.hear(ask(ONE, 1)).do] == [Operation.ROLLBACK]  # type: ignore[operator]


@pytest.mark.parametrize("ask", [prepare, one_phase])
def test_work_in_use_is_interrupted_and_rolled_back_when_its_user_has_left(ask: object) -> None:
    process = Process()
    row = process.open(ONE)
    row.users = 1
    assert [do.operation for do in process.hear(ask(ONE)).do] == [Operation.INTERRUPT]  # type: ignore[operator]
    row.users = 0
    process.local(In.RELEASED, ONE)
    assert process.operations == [Operation.INTERRUPT, Operation.ROLLBACK]


def test_a_doomed_branch_says_what_doomed_it() -> None:
    process = Process()
    process.open(ONE).doom = FAILED
    (vote,) = process.hear(prepare(ONE)).send
    assert isinstance(vote, Voted)
    assert vote.reason == FAILED


# ----------------------------------------------------------------------------------------- rule 10: late messages


def test_a_transaction_that_began_to_end_is_closed_to_calls_until_past_its_deadline() -> None:
    process = Process()
    process.open(ONE)
    assert not process.table.state.is_closed(ONE.xid)
    process.hear(prepare(ONE))
    process.local(In.READ_ONLY, ONE)
    process.sleep(DEADLINE_MS - T0 + 59_999)
    assert process.table.state.is_closed(ONE.xid)
    row = process.table.state.find(ONE.xid, ONE.resource)
    assert row is not None
    assert row.state is BranchState.ENDED
    process.sleep(1)
    assert not process.table.state.is_closed(ONE.xid)
    assert process.table.state.find(ONE.xid, ONE.resource) is None


@pytest.mark.parametrize("late", [prepare(ONE), one_phase(ONE), commit(ONE), rollback(ONE), resolve(ONE)])
def test_a_late_message_about_an_ended_branch_starts_nothing(late: object) -> None:
    for ended in (In.PREPARED, In.READ_ONLY):
        process = prepared(ended)
        if ended is In.PREPARED:
            process.hear(commit(ONE))
            process.local(In.FINISHED, ONE, FinishResult.DONE)
        assert process.hear(late).do == []  # type: ignore[arg-type]


def test_a_commit_for_a_branch_that_was_rolled_back_is_reported_not_hidden() -> None:
    """Contradicting words of a coordinator (a restored log): the acknowledgement says that the ends differ."""
    process = prepared()
    process.hear(rollback(ONE))
    process.local(In.FINISHED, ONE, FinishResult.DONE)
    assert answers(process.hear(commit(ONE)).send) == ["Acked HEURISTIC"]


def test_a_repeated_commit_is_acknowledged_again() -> None:
    process = prepared()
    process.hear(commit(ONE))
    process.hear(commit(ONE))
    process.local(In.FINISHED, ONE, FinishResult.ALREADY)
    process.hear(commit(ONE))
    assert answers(process.sent) == ["Voted PREPARED", "Acked ALREADY", "Acked ALREADY"]
    assert process.operations == [Operation.PREPARE, Operation.COMMIT_PREPARED]


def test_nothing_is_left_of_an_ended_transaction_in_the_end() -> None:
    process = Process()
    for branch in (ONE, TWO):
        process.open(branch)
        process.hear(prepare(branch))
    process.local(In.READ_ONLY, ONE)
    process.local(In.PREPARED, TWO, "t2")
    process.sleep(DAY_MS)
    process.hear(commit(TWO))
    process.local(In.FINISHED, TWO, FinishResult.DONE)
    process.sleep_until_quiet()
    assert leftovers(process) == (0, 0, 0, 0)


def leftovers(process: Process) -> tuple[int, int, int, int]:
    table = process.table
    return len(table.rows), len(table.state.by_use), len(table.state.closed_until_ms), len(table.state.timers)


# --------------------------------------------------------------------------------------------- rule 11: deadlines


def test_an_unprepared_branch_rolls_back_at_its_deadline_and_not_before() -> None:
    process = Process()
    process.open(ONE)
    assert process.table.state.next_wakeup_ms() == DEADLINE_MS
    assert process.sleep(DEADLINE_MS - T0 - 1).do == []
    assert [do.operation for do in process.sleep(1).do] == [Operation.ROLLBACK]
    (vote,) = process.hear(prepare(ONE)).send
    assert isinstance(vote, Voted)
    assert vote.reason is not None
    assert vote.reason.code is AbortCode.TIMED_OUT


def test_rule_11_work_in_use_at_the_deadline_is_interrupted_until_it_ends() -> None:
    """F11: one interruption may fail, for want of a connection to the database, and the locks stayed as long as the use hung."""
    process = Process()
    row = process.open(ONE)
    row.users = 1
    assert [do.operation for do in process.sleep(DEADLINE_MS - T0).do] == [Operation.INTERRUPT]
    for _ in range(3):
        assert process.sleep(4_999).do == []
        assert [do.operation for do in process.sleep(1).do] == [Operation.INTERRUPT]
    row.users = 0
    assert process.sleep(60_000).do == []
    assert [do.operation for do in process.local(In.RELEASED, ONE).do] == [Operation.ROLLBACK]


def test_a_branch_told_to_commit_in_one_phase_just_before_the_deadline_is_not_cut_off() -> None:
    process = Process()
    process.open(ONE)
    process.hear(one_phase(ONE))
    assert process.sleep(DEADLINE_MS - T0).do == []
    assert process.sleep(4_999).do == []
    assert answers(process.local(In.ONE_PHASE_ENDED, ONE, COMMITTED).send) == ["OnePhaseDone COMMITTED"]


# --------------------------------------------------------------------------------------- rule 13: the truth in errors


def test_rule_13_a_commit_that_was_unknown_is_asked_about_again() -> None:
    """F10: the database was away when it broke, and is back; what the row says is no answer."""
    process = Process()
    process.open(ONE)
    process.hear(one_phase(ONE))
    process.table.committing(ONE.branch, "t7")
    process.local(In.ONE_PHASE_ENDED, ONE, (Outcome.UNKNOWN, FAILED))
    for result in (Outcome.UNKNOWN, Outcome.COMMITTED):
        (do,) = process.hear(resolve(ONE, "t7")).do
        assert (do.operation, do.token) == (Operation.ONE_PHASE_RESULT, "t7")
        assert answers(process.local(In.ONE_PHASE_ENDED, ONE, (result, None)).send) == [f"Resolved {result.name}"]
        assert process.state(ONE) is BranchState.ENDED
    effects = process.hear(resolve(ONE, "t7"))
    assert (effects.do, answers(effects.send)) == ([], ["Resolved COMMITTED"])


def test_the_coordinator_hears_the_token_before_the_point_of_no_return() -> None:
    process = Process()
    process.open(ONE)
    process.hear(one_phase(ONE))
    assert process.table.committing(ONE.branch, "t1") == Committing(ONE.xid, ONE.branch, "t1")


def test_a_local_commit_tells_the_coordinator_nothing() -> None:
    process = Process()
    process.open(ONE, calls=0)
    process.local(In.LOCAL_COMMIT, ONE, 0)
    assert process.table.committing(ONE.branch, "t1") is None


@pytest.mark.parametrize("result", Outcome)
def test_who_lost_the_answer_of_a_commit_in_one_phase_hears_the_same_again(result: Outcome) -> None:
    process = Process()
    process.open(ONE)
    process.hear(one_phase(ONE))
    reason = None if result is Outcome.COMMITTED else FAILED
    process.local(In.ONE_PHASE_ENDED, ONE, (result, reason))
    assert answers(process.hear(resolve(ONE)).send) == [f"Resolved {result.name}"]
    assert process.hear(one_phase(ONE)).send == [OnePhaseDone(ONE.xid, ONE.branch, result, reason)]


def test_asking_how_a_commit_ended_that_never_came_ends_the_branch_first() -> None:
    """Otherwise the request could still arrive after the answer, and make a lie of it."""
    process = Process()
    process.open(ONE)
    assert process.hear(resolve(ONE)).send == []
    assert process.hear(one_phase(ONE)).do == []
    assert answers(process.local(In.ROLLED_BACK, ONE).send) == ["Resolved ABORTED"]


def test_asking_while_it_is_being_rolled_back_is_answered_when_it_is() -> None:
    process = Process()
    process.open(ONE)
    process.hear(rollback(ONE))
    assert process.hear(resolve(ONE)).send == []
    assert answers(process.local(In.ROLLED_BACK, ONE).send) == ["Resolved ABORTED"]


def test_asking_the_database_goes_on_while_it_cannot_tell_yet() -> None:
    process = Process()
    foreign = gid(7, participant=OTHER)
    process.table.resolve_foreign(foreign, "t7", T0)
    for number in range(1, 9):
        told = ["Trouble"] if number in (1, 2, 4, 8) else []
        assert answers(process.local(In.FINISH_FAILED, foreign, FAILED).send) == told
        assert [do.token for do in process.sleep(5_000).do] == ["t7"]
    assert answers(process.local(In.ONE_PHASE_ENDED, foreign, COMMITTED).send) == ["Trouble", "Resolved COMMITTED"]
    process.sleep_until_quiet()
    assert leftovers(process) == (0, 0, 0, 0)


@pytest.mark.parametrize("finish", FinishResult)
def test_an_end_made_by_hand_is_reported(finish: FinishResult) -> None:
    process = prepared()
    process.hear(commit(ONE))
    assert answers(process.local(In.FINISHED, ONE, finish).send) == [f"Acked {finish.name}"]
    process = prepared()
    process.hear(rollback(ONE))
    expected = ["Acked HEURISTIC"] if finish is FinishResult.HEURISTIC else []
    assert answers(process.local(In.FINISHED, ONE, finish).send) == expected


def test_a_local_waiter_that_comes_after_the_deadline_hears_that_the_time_was_up() -> None:
    for comes_late in (False, True):
        process = Process()
        process.open(ONE)
        process.sleep(DEADLINE_MS - T0)
        if comes_late:
            process.local(In.ROLLED_BACK, ONE)
            process.local(In.LOCAL_COMMIT, ONE, 1)
        else:
            process.local(In.LOCAL_COMMIT, ONE, 1)
            process.local(In.ROLLED_BACK, ONE)
        ((branch, result, reason),) = process.settled
        assert (branch, result) == (ONE.branch, Outcome.ABORTED)
        assert reason is not None
        assert reason.code is AbortCode.TIMED_OUT


# ------------------------------------------------------------------------------------- section 4: what a commit costs

WAYS: dict[str, tuple[list[Any], int, list[Operation]]] = {
    "read-only": ([prepare, In.READ_ONLY], 1, [Operation.PREPARE]),
    "one branch, elsewhere": ([one_phase, In.ONE_PHASE_ENDED], 1, [Operation.COMMIT_ONE_PHASE]),
    "one branch, here": ([In.LOCAL_COMMIT, In.ONE_PHASE_ENDED], 0, [Operation.COMMIT_ONE_PHASE]),
    "two phases": (
        [prepare, In.PREPARED, commit, In.FINISHED],
        2,
        [Operation.PREPARE, Operation.COMMIT_PREPARED],
    ),
    "abort, unprepared": ([rollback, In.ROLLED_BACK], 0, [Operation.ROLLBACK]),
    "abort, own vote": ([prepare, In.PREPARE_FAILED, In.FINISHED], 1, [Operation.PREPARE, Operation.ROLLBACK_PREPARED]),
    "abort, somebody else's vote": (
        [prepare, In.PREPARED, rollback, In.FINISHED],
        1,
        [Operation.PREPARE, Operation.ROLLBACK_PREPARED],
    ),
}
DETAIL = {
    In.PREPARED: "t1",
    In.PREPARE_FAILED: FAILED,
    In.FINISHED: FinishResult.DONE,
    In.ONE_PHASE_ENDED: COMMITTED,
    In.LOCAL_COMMIT: 1,
}


@pytest.mark.parametrize("way", WAYS)
def test_the_answers_and_operations_of_one_branch_are_exactly_these(way: str) -> None:
    story, sent, operations = WAYS[way]
    process = Process()
    process.open(ONE)
    for step in story:
        if isinstance(step, In):
            process.local(step, ONE, DETAIL.get(step))
        else:
            process.hear(step(ONE))
    process.sleep_until_quiet()
    assert len(process.sent) == sent, answers(process.sent)
    assert process.operations == operations
    assert leftovers(process) == (0, 0, 0, 0)
    assert len(process.settled) == (way == "one branch, here")
