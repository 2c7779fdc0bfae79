"""Mistakes that the participant once made, each as the story in which it showed."""

from __future__ import annotations

import pytest

from tests.protocol.participant_kit import (
    DEADLINE_MS,
    ENOUGH,
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
from txrpc._protocol.messages import FinishResult, OnePhaseDone, Outcome, Prepare, Voted
from txrpc._protocol.participant.branch import BranchInput as In
from txrpc._protocol.participant.branch import BranchState, Operation
from txrpc._protocol.participant.state import TOMBSTONE_MS
from txrpc.errors import AbortCode
from txrpc.ids import BranchId, Gid

ONE = gid(1)


def prepared() -> Process:
    process = Process()
    process.open(ONE)
    process.hear(prepare(ONE))
    process.local(In.PREPARED, ONE, "t1")
    return process


@pytest.mark.parametrize("message", [commit(ONE), rollback(ONE)])
def test_the_alarm_set_while_in_doubt_does_not_start_a_second_operation(message: object) -> None:
    """The branch was told its end, the database is slow, and then the time comes at which it would have asked."""
    process = prepared()
    process.hear(message)  # type: ignore[arg-type]
    effects = process.sleep(60_000)
    assert effects.do == []


def test_an_alarm_does_not_start_a_second_rollback_after_a_failed_prepare() -> None:
    process = Process()
    process.open(ONE)
    process.hear(prepare(ONE))
    process.local(In.PREPARE_FAILED, ONE, FAILED)
    assert process.sleep(DEADLINE_MS - T0).do == []


def test_a_release_while_the_rollback_runs_does_not_start_a_second_one() -> None:
    process = Process()
    process.open(ONE)
    process.hear(rollback(ONE))
    assert process.local(In.RELEASED, ONE).do == []
    assert process.operations == [Operation.ROLLBACK]


@pytest.mark.parametrize(
    ("message", "answer"),
    [
        (prepare, ["Voted ABORT"]),
        (one_phase, ["OnePhaseDone ABORTED"]),
        (resolve, ["Resolved UNKNOWN"]),
        (commit, []),
        (rollback, []),
    ],
)
def test_a_message_of_one_transaction_does_not_touch_a_branch_of_another(message: object, answer: list[str]) -> None:
    """Branch ids are random, not secret: naming somebody else's must not prepare, commit or end it (rule 15)."""
    process = Process()
    process.open(ONE)
    forged = gid(1, xid=2)
    effects = process.hear(message(forged))  # type: ignore[operator]
    assert process.state(ONE) is BranchState.ACTIVE
    assert answers(effects.send) == answer
    assert all(sent.xid == forged.xid for sent in effects.send)  # type: ignore[union-attr]
    assert effects.do == []


def test_a_late_commit_in_one_phase_is_told_why_the_branch_had_ended() -> None:
    """The reason was lost, and the caller told that the database had rolled the branch back by itself."""
    process = Process()
    process.open(ONE)
    process.sleep(DEADLINE_MS - T0)
    process.local(In.ROLLED_BACK, ONE)
    (answer,) = process.hear(one_phase(ONE)).send
    assert isinstance(answer, OnePhaseDone)
    assert answer.reason is not None
    assert answer.reason.code is AbortCode.TIMED_OUT


def test_a_late_prepare_is_told_why_the_branch_had_ended() -> None:
    process = prepared()
    process.hear(rollback(ONE))
    (answer,) = process.hear(prepare(ONE)).send
    assert isinstance(answer, Voted)
    assert answer.reason == ENOUGH


@pytest.mark.parametrize(("result", "vote"), [(In.READ_ONLY, "READ_ONLY"), (In.PREPARED, "PREPARED")])
def test_a_repeated_prepare_gets_the_vote_that_was_given(result: In, vote: str) -> None:
    """An ended branch said ABORT to whoever asked twice, also after READ_ONLY or a commit."""
    process = Process()
    process.open(ONE)
    process.hear(prepare(ONE))
    process.local(result, ONE, "t1")
    if result is In.PREPARED:
        process.hear(commit(ONE))
        process.local(In.FINISHED, ONE, FinishResult.DONE)
    assert process.state(ONE) is BranchState.ENDED
    assert answers(process.hear(prepare(ONE)).send) == [f"Voted {vote}"]


def test_a_branch_rolled_back_while_it_turned_out_read_only_does_not_vote() -> None:
    process = Process()
    process.open(ONE)
    process.hear(prepare(ONE))
    process.hear(rollback(ONE))
    assert process.local(In.READ_ONLY, ONE).send == []


def test_rolling_back_for_somebody_else_keeps_the_token() -> None:
    """Without the token the database cannot say whether somebody had committed the branch by hand."""
    process = Process()
    (do,) = process.hear(rollback(gid(1, participant=OTHER), "t9")).do
    assert (do.operation, do.token) == (Operation.ROLLBACK_PREPARED, "t9")


def test_asking_the_database_for_somebody_else_twice_starts_one_question() -> None:
    process = Process()
    foreign = gid(1, participant=OTHER)
    assert len(process.table.resolve_foreign(foreign, "t9", T0).do) == 1
    assert process.table.resolve_foreign(foreign, "t9", T0).do == []
    process.local(In.FINISH_FAILED, foreign, FAILED)
    assert len(process.sleep(1_000).do) == 1


def test_resolving_a_branch_of_this_process_keeps_its_tombstone() -> None:
    process = Process()
    process.open(ONE)
    process.hear(one_phase(ONE))
    process.local(In.ONE_PHASE_ENDED, ONE, (Outcome.COMMITTED, None))
    effects = process.table.resolve_foreign(ONE, "t1", T0)
    assert answers(effects.send) == ["Resolved COMMITTED"]
    assert process.table.state.find(ONE.xid, ONE.resource) is not None


def test_a_prepare_that_reaches_the_database_after_its_undoing_is_undone_when_it_shows() -> None:
    """PREPARE was cut off, ROLLBACK PREPARED found nothing, and only then did the database get round to the PREPARE."""
    process = Process()
    process.open(ONE)
    process.hear(prepare(ONE))
    process.local(In.PREPARE_FAILED, ONE, FAILED)
    process.local(In.FINISHED, ONE, FinishResult.NOT_HERE)
    assert process.state(ONE) is BranchState.ENDED
    effects = process.table.in_doubt(ONE, 10, process.now_ms)
    assert [do.operation for do in effects.do] == [Operation.ROLLBACK_PREPARED]
    assert effects.send == []


def test_a_committed_branch_in_an_old_listing_is_left_alone() -> None:
    process = prepared()
    process.hear(commit(ONE))
    process.local(In.FINISHED, ONE, FinishResult.DONE)
    effects = process.table.in_doubt(ONE, 10, process.now_ms)
    assert (effects.do, effects.send) == ([], [])


def test_rule_14_a_branch_that_other_hands_have_ended_is_asked_for_no_more() -> None:
    """An operator had ended it, as the manual said, and it was shown in doubt until its process restarted."""
    process = prepared()
    late_ms = DEADLINE_MS + TOMBSTONE_MS
    process.sleep(late_ms - process.now_ms)

    def sweep(*held: BranchId, resource: str = ONE.resource, began_ms: int = late_ms) -> list[Gid]:
        return process.table.swept(resource, held, began_ms, process.now_ms)

    assert sweep(ONE.branch) == sweep(resource="another") == []
    assert sweep(began_ms=late_ms - 1) == [], "a message about it may be on its way, and an old look knows nothing"
    assert answers(process.sleep(15_000).send) == ["Inquiry"]
    assert sweep() == [ONE]
    assert process.sleep(60_000).send == []
    assert not process.table.rows
    assert not process.table.state.by_use
    assert not process.table.state.closed_until_ms
    # Should it be decided after all, its database says how it has ended.
    assert [do.operation for do in process.hear(commit(ONE)).do] == [Operation.COMMIT_PREPARED]
    assert answers(process.local(In.FINISHED, ONE, FinishResult.HEURISTIC).send) == ["Acked HEURISTIC"]


def test_rule_14_what_is_being_finished_is_left_alone_by_a_sweep_that_does_not_find_it() -> None:
    process = prepared()
    process.hear(commit(ONE))
    late_ms = DEADLINE_MS + TOMBSTONE_MS
    assert process.table.swept(ONE.resource, (), late_ms, late_ms) == []
    assert process.state(ONE) is BranchState.COMMITTING


def test_rule_9_a_local_commit_counts_the_calls_that_came_in_through_services() -> None:
    """The root's own service ran a call twice: one more than the root saw (rule 9), and it was committed."""
    process = Process()
    process.open(ONE, calls=2)
    process.local(In.LOCAL_COMMIT, ONE, 1)
    assert process.operations == [Operation.ROLLBACK]
    process.local(In.ROLLED_BACK, ONE)
    ((_, result, reason),) = process.settled
    assert result is Outcome.ABORTED
    assert reason is not None
    assert reason.code is AbortCode.CALLS_DIFFER


def test_a_root_that_gives_up_while_its_own_branch_votes_is_told_the_end() -> None:
    process = Process()
    process.open(ONE)
    process.hear(prepare(ONE))
    process.local(In.LOCAL_ROLLBACK, ONE, ENOUGH)
    process.local(In.PREPARED, ONE, "t1")
    assert process.operations == [Operation.PREPARE, Operation.ROLLBACK_PREPARED]
    process.local(In.FINISHED, ONE, FinishResult.DONE)
    assert process.settled == [(ONE.branch, Outcome.ABORTED, ENOUGH)]
    assert process.sent == []


def test_a_root_that_gives_up_with_its_own_branch_prepared_asks_and_is_told_the_end() -> None:
    """A promise was made (rule 4): the coordinator must say so, but it can at once, because no commit will be asked for."""
    process = prepared()
    effects = process.local(In.LOCAL_ROLLBACK, ONE, ENOUGH)
    assert answers(effects.send) == ["Inquiry"]
    assert effects.send[0].time_left_ms == 0  # type: ignore[union-attr]
    assert effects.do == []
    process.hear(rollback(ONE))
    process.local(In.FINISHED, ONE, FinishResult.DONE)
    assert process.settled == [(ONE.branch, Outcome.ABORTED, ENOUGH)]


def test_unknown_calls_is_an_abort_not_a_crash() -> None:
    process = Process()
    process.open(ONE)
    assert answers(process.hear(Prepare(ONE.xid, ONE.branch, -1)).send) == ["Voted ABORT"]


def test_a_vote_given_after_the_session_changed_is_followed_by_a_question_soon() -> None:
    """Whoever asked for the vote has aborted by now and told a session that is gone: locks were held until the deadline."""
    process = Process()
    process.open(ONE)
    process.hear(prepare(ONE))
    assert process.table.connected("c1", process.now_ms).send == []
    process.local(In.PREPARED, ONE, "t1")
    (inquiry,) = process.sleep(1_000).send
    assert answers([inquiry]) == ["Inquiry"]
    assert inquiry.time_left_ms == DEADLINE_MS - T0 - 1_000  # type: ignore[union-attr]
