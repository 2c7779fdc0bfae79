"""What a coordinator does for transactions that a resource decides in a register (V numbers: the design's own list of holes)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.protocol.coordinator_kit import (
    CLIENT,
    EARLIER,
    EARLY,
    LEFT_MS,
    REGISTER,
    TWO,
    CoordinatorHarness,
    L,
    P,
    Q,
    acked,
    answer,
    commit_request,
    decided,
    doubt,
    effects,
    hello,
    one_phase_done,
    outcome_request,
    polled,
    registered,
    rollback_request,
    sent,
    voted,
    xid,
)
from txrpc._protocol.coordinator.events import Close, LogHealth, SessionOpened
from txrpc._protocol.coordinator.rows import State
from txrpc._protocol.deciding import Decide, DecisionDone, RegisterQuestion, Registers, Votes
from txrpc._protocol.messages import Commit, FinishResult, Outcome, Rollback, Tick, Vote, Welcome
from txrpc._protocol.outcomes import Found
from txrpc.ids import BranchId, RegisterId

UNDER = registered(*TWO)


def harness() -> CoordinatorHarness:
    return CoordinatorHarness(CLIENT, P, L)


def poll(o: CoordinatorHarness) -> None:
    o.hear(CLIENT, commit_request(UNDER))
    o.hear(P, polled(1))
    o.hear(P, polled(2))


# ---------------------------------------------------------------------------------------------------------- collecting votes


def test_the_root_is_told_the_votes_and_nothing_is_decided_here() -> None:
    o = harness()
    poll(o)
    told = [message for session, message in o.all.send if session == CLIENT and isinstance(message, Votes)]
    assert [[p.branch for p in votes.branches] for votes in told] == [[ref.branch for ref in TWO]]
    assert o.state() is State.POLLED
    assert not o.all.append
    assert not o.replies()


def test_votes_are_collected_without_a_log_and_from_any_epoch() -> None:
    o = harness()
    o.step(LogHealth(False, "the disk is full"))
    assert sent(o.hear(CLIENT, commit_request(UNDER, epoch=EARLIER))) == ["11 Prepare 1", "11 Prepare 2"]


def test_early_votes_need_no_round() -> None:
    o = harness()
    assert sent(o.hear(CLIENT, commit_request(registered(*EARLY)))) == ["1 Votes"]


@pytest.mark.parametrize("against", [Vote.ABORT, None])
def test_v18_without_all_votes_the_root_is_told_and_only_it_aborts(against: Vote | None) -> None:
    """The request may be one of long ago, and the transaction be committed: a branch that has voted is told nothing."""
    o = harness()
    o.hear(CLIENT, commit_request(UNDER))
    o.hear(P, polled(1))
    told = sent(o.hear(P, polled(2, against))) if against else sent(o.sleep(LEFT_MS))
    assert told == [f"1 reply UNKNOWN {'CANNOT_PREPARE' if against else 'TIMED_OUT'}"]
    assert o.state() is State.ABSENT
    assert sent(o.hear(P, doubt(1))) == ["14 RegisterQuestion"], "nothing is remembered"


def test_a_voter_that_is_lost_or_missing_is_told_to_the_root() -> None:
    o = harness()
    o.hear(CLIENT, commit_request(UNDER))
    assert sent(o.leave(P)) == ["1 reply UNKNOWN PARTICIPANT_LOST"]
    assert sent(o.hear(CLIENT, commit_request(UNDER))) == ["1 reply UNKNOWN PARTICIPANT_LOST"]


@pytest.mark.parametrize("register", [None, RegisterId(bytes(24))])
def test_v17_a_vote_under_another_register_or_none_is_none(register: RegisterId | None) -> None:
    o = harness()
    o.hear(CLIENT, commit_request(UNDER))
    o.hear(P, replace(voted(1), register=register))
    (reply,) = o.replies()
    assert reply.reason is not None
    assert "register" in reply.reason.text


def test_v17_branches_that_are_not_all_under_one_register_are_refused() -> None:
    o = harness()
    out = o.hear(CLIENT, commit_request((UNDER[0], TWO[1])))
    assert sent(out) == ["1 reply UNKNOWN PROTOCOL_VIOLATION"]


def test_v18_a_coordinator_that_has_told_the_votes_never_aborts_by_itself() -> None:
    o = harness()
    poll(o)
    assert o.sleep(20 * LEFT_MS) == []
    assert o.state() is State.ABSENT
    o.leave(P)
    o.leave(CLIENT)
    assert not [message for _, message in o.all.send if isinstance(message, Rollback)]


def test_the_root_gives_up_before_it_has_decided() -> None:
    for before in (poll, lambda o: None):
        o = harness()
        before(o)
        out = sent(o.hear(CLIENT, rollback_request(UNDER, epoch=EARLIER)))
        assert out == ["11 Rollback 1", "11 Rollback 2", "1 reply ABORTED REQUESTED"]
        rollbacks = [message for _, message in o.all.send if isinstance(message, Rollback)]
        assert {(each.gid.register, each.gid.node) for each in rollbacks} == {(REGISTER, "")}


# ---------------------------------------------------------------------------------------- having it decided, when it may


def give(o: CoordinatorHarness, decider: int | None = 1, **changes: Any) -> list[str]:
    """The root gives the right to decide away: to branch *decider*, or to the row alone."""
    return sent(o.hear(CLIENT, commit_request(UNDER, register=REGISTER, decider=decider, **changes)))


def test_the_branch_that_decides_is_told_once_and_only_after_all_votes() -> None:
    o = harness()
    assert give(o) == ["11 Prepare 2"]
    o.hear(P, polled(2))
    (told,) = [message for _, message in o.all.send if isinstance(message, Decide)]
    assert (told.branch, told.calls, told.register) == (TWO[0].branch, TWO[0].calls, REGISTER)
    assert [each.branch for each in told.branches] == [TWO[1].branch]
    assert give(o) == give(o, None) == [], "the same question again"
    assert not o.all.append, "nothing is recorded here"


@pytest.mark.parametrize("what", ["against", "lost", "late"])
def test_rule_5_what_is_not_told_to_decide_aborts_without_a_write_and_stays_aborted(what: str) -> None:
    o = harness()
    give(o)
    if what == "against":
        o.hear(P, polled(2, Vote.ABORT))
    elif what == "lost":
        o.leave(P)
    else:
        o.sleep(LEFT_MS)
    assert o.state() is State.ABORTED
    o.join(P + 100)
    assert give(o)[-1].startswith("1 reply ABORTED")
    assert not [message for _, message in o.all.send if isinstance(message, Decide | RegisterQuestion)]


def test_rule_5_the_right_to_decide_is_not_taken_from_another_epoch_or_another_time() -> None:
    for changes in ({"epoch": EARLIER}, {"tick": 2**31}):
        o = harness()
        assert give(o, **changes) == ["1 reply UNKNOWN RESOURCE_UNAVAILABLE"]
        assert o.state() is State.ABSENT


def test_rule_15_a_decider_that_is_not_listed_or_has_voted_is_refused() -> None:
    o = harness()
    requests = (
        replace(commit_request(UNDER, register=REGISTER, decider=1), decider=BranchId(b"another!")),
        commit_request(registered(*EARLY), tx=2, register=REGISTER, decider=1),
        commit_request((UNDER[0], TWO[1]), tx=3, register=REGISTER),
    )
    for request in requests:
        assert sent(o.hear(CLIENT, request))[-1] == "1 reply ABORTED PROTOCOL_VIOLATION"


@pytest.mark.parametrize("found", [Found.OPEN, Found.UNREACHABLE])
def test_what_a_branch_in_doubt_hears_meanwhile_does_not_end_the_wait_for_the_decider(found: Found) -> None:
    o = harness()
    give(o)
    o.hear(P, polled(2))
    o.hear(P, doubt(2, left_ms=1_000))
    assert sent(o.hear(L, answer(found))) == []
    assert o.state() is State.DECIDING
    assert sent(o.hear(P, one_phase_done())) == ["11 Commit 2"]


def test_v18_once_it_was_told_to_decide_only_its_register_says_that_it_is_aborted() -> None:
    o = harness()
    give(o)
    o.hear(P, polled(2))
    assert sent(o.leave(P)) == ["1 reply UNKNOWN RESOURCE_UNAVAILABLE"]
    o.join(P)
    assert give(o) == ["1 reply UNKNOWN RESOURCE_UNAVAILABLE"], "it is not begun again"
    claim = outcome_request(UNDER)
    assert sent(o.hear(CLIENT, replace(claim, register=REGISTER))) == ["14 RegisterQuestion"]
    assert sent(o.hear(L, answer(Found.COMMITTED, 2))) == ["11 Commit 2"]


def test_the_row_alone_decides_and_a_claim_that_was_on_its_way_counts_before_it() -> None:
    o = harness()
    o.hear(P, doubt(2))
    assert questions(o) == [(L, True)]
    o.hear(CLIENT, commit_request(registered(*EARLY), register=REGISTER))
    assert questions(o) == [(L, True)], "its answer says what is true"
    assert "1 reply ABORTED PRESUMED" in sent(o.hear(L, answer(Found.ABORTED)))


def test_a_question_that_only_read_is_asked_again_to_decide() -> None:
    o = harness()
    o.hear(P, doubt(2, left_ms=1_000))
    o.hear(CLIENT, commit_request(registered(*EARLY), register=REGISTER))
    (_, asked) = [message for _, message in o.all.send if isinstance(message, RegisterQuestion)]
    assert asked.commit is not None
    assert sent(o.hear(L, answer(Found.OPEN))) == [], "to the question that only read"
    assert sent(o.hear(L, answer(Found.COMMITTED, 1, 2)))[:2] == ["11 Commit 1", "11 Commit 2"]


@pytest.mark.parametrize("found", [Found.LOST, Found.ELSEWHERE, Found.FORGOTTEN])
def test_a_register_that_refuses_the_only_decision_aborts_it(found: Found) -> None:
    o = harness()
    o.hear(CLIENT, commit_request(registered(*EARLY), register=REGISTER))
    told = sent(o.hear(L, answer(found)))
    assert told == ["11 Rollback 1", "11 Rollback 2", "1 reply ABORTED RESOURCE_UNAVAILABLE"]


def test_a_register_that_may_have_refused_another_question_has_not_refused_the_decision() -> None:
    """Its answer is to the question that only read; the other may reach the database that its name means next."""
    o = harness()
    o.hear(P, doubt(2, left_ms=1_000))
    o.hear(CLIENT, commit_request(registered(*EARLY), register=REGISTER))
    assert sent(o.hear(L, answer(Found.LOST))) == ["1 reply UNKNOWN RESOURCE_UNAVAILABLE"]
    assert o.state() is State.LEFT


def test_an_answer_of_the_decider_to_an_epoch_that_had_not_asked_is_no_violation() -> None:
    o = harness()
    o.hear(L, decided(2))
    assert effects(o.hear(P, one_phase_done())) == []


# ------------------------------------------------------------------------------------------------------- the second phase


def test_a_decision_is_carried_out_and_then_its_register_may_forget_it() -> None:
    o = harness()
    poll(o)
    assert sent(o.hear(L, decided(1, 2))) == ["11 Commit 1", "11 Commit 2"]
    o.hear(P, acked(1))
    out = o.hear(P, acked(2))
    assert out.send == [(L, DecisionDone(REGISTER, (xid(),)))]
    assert not o.all.done, "there is no record of its own"
    assert o.state() is State.COMMITTED
    assert sent(o.hear(L, decided(1, 2))) == ["14 DecisionDone"], "the mark was lost"


def test_rule_1_a_branch_that_ended_otherwise_keeps_the_decision_until_an_operator_has_seen_to_it() -> None:
    """The incident is not in the log at once: should the coordinator crash, the register must tell of the decision again."""
    o = harness()
    o.hear(L, decided(1))
    out = o.hear(P, acked(1, FinishResult.HEURISTIC))
    assert [each.finish for each in out.incidents] == [FinishResult.HEURISTIC]
    assert sent(out) == sent(o.hear(L, decided(1))) == []
    o.step(Close(xid()))
    assert sent(o.hear(L, decided(1))) == ["14 DecisionDone"]


def test_any_coordinator_carries_it_out_also_one_that_knows_nothing_of_it() -> None:
    o = harness()
    order, _ = (message for _, message in o.hear(L, decided(1, 2)).send)
    assert isinstance(order, Commit)
    assert (order.gid.register, order.gid.node, order.gid.epoch) == (REGISTER, "", 0)
    assert order.token == "t1"


def test_rule_15_only_a_process_with_the_register_speaks_for_it() -> None:
    o = harness()
    assert effects(o.hear(P, decided(1, 2))) == ["violation"]
    o.hear(P, doubt(1))
    assert effects(o.hear(P, answer(Found.ABORTED))) == []
    assert o.state() is State.ABSENT


# ---------------------------------------------------------------------------------------------------------------- questions


def questions(o: CoordinatorHarness) -> list[tuple[int, bool]]:
    return [(session, each.claim) for session, each in o.all.send if isinstance(each, RegisterQuestion)]


def test_v9_before_its_deadline_a_branch_only_has_the_register_read() -> None:
    o = harness()
    o.hear(P, doubt(1, left_ms=10))
    assert questions(o) == [(L, False)]
    assert sent(o.hear(L, answer(Found.OPEN))) == []
    o.hear(P, doubt(1))
    assert questions(o)[1:] == [(L, True)]


def test_a_branch_that_another_process_has_found_is_not_given_up_while_its_own_is_there() -> None:
    o = CoordinatorHarness(CLIENT, P, Q, L)
    o.hear(Q, doubt(1))
    assert questions(o) == [(L, False)]
    o.leave(P)
    o.hear(Q, doubt(1))
    assert questions(o)[1:] == [(L, True)]


def test_those_who_ask_the_same_wait_for_one_answer() -> None:
    o = harness()
    o.hear(P, doubt(1, left_ms=10))
    o.hear(P, doubt(2, left_ms=10))
    o.hear(P, doubt(1))
    assert questions(o) == [(L, False), (L, True)], "what may claim is asked once more"
    assert sent(o.hear(L, answer(Found.OPEN))) == [], "to the question that only read"
    assert sent(o.hear(L, answer(Found.ABORTED))) == ["11 Rollback 1", "11 Rollback 2"]
    assert sent(o.hear(P, doubt(1))) == ["11 Rollback 1"], "remembered"
    assert not o.core.state.questions


def test_rule_15_an_answer_that_contradicts_itself_commits_nothing() -> None:
    o = harness()
    o.hear(P, doubt(1))
    assert sent(o.hear(L, answer(Found.ABORTED, 1))) == ["11 Rollback 1"]


def test_v8_a_branch_that_is_not_listed_rolls_back() -> None:
    for ended in (False, True):
        o = harness()
        if ended:
            o.hear(L, decided(1))
            o.hear(P, acked(1))
        o.hear(P, doubt(9))
        assert sent(o.hear(L, answer(Found.COMMITTED, 1)))[-1] == "11 Rollback 9"


def test_a_branch_that_shows_up_again_after_all_was_done_is_told_again() -> None:
    o = harness()
    o.hear(L, decided(1))
    o.hear(P, acked(1))
    o.hear(P, doubt(1))
    assert sent(o.hear(L, answer(Found.COMMITTED, 1))) == ["14 DecisionDone", "11 Commit 1"]


@pytest.mark.parametrize("found", [Found.FORGOTTEN, Found.LOST, Found.ELSEWHERE])
def test_what_no_register_can_say_is_left_to_an_operator(found: Found) -> None:
    o = harness()
    o.hear(P, doubt(1))
    assert effects(o.hear(L, answer(found))) == ["note branch of a lost decision"]
    assert o.state() is State.ABSENT
    ((report),) = o.core.state.reports.shown(o.now_ms)
    assert "an operator must end it" in report.text
    o.hear(CLIENT, outcome_request(UNDER))
    o.hear(L, answer(found))
    assert o.outcomes() == [Outcome.UNKNOWN]


def test_a_question_outlives_the_process_that_was_asked() -> None:
    o = harness()
    o.hear(P, doubt(1))
    o.join(L + 200, participant=hello(Q).participant, resources=hello(L).resources)
    o.leave(L)
    assert questions(o) == [(L, True), (L + 200, True)]
    o.hear(CLIENT, outcome_request(UNDER))
    out = o.leave(L + 200)
    assert sent(out) == ["1 reply UNKNOWN RESOURCE_UNAVAILABLE"]
    assert not o.core.state.questions
    o.hear(P, doubt(1))
    assert "no process with the register" in o.core.state.reports.shown(o.now_ms)[0].text


def test_a_root_that_has_given_up_has_the_decision_claimed() -> None:
    o = harness()
    poll(o)
    o.hear(CLIENT, outcome_request(UNDER))
    assert questions(o) == [(L, True)]
    out = sent(o.hear(L, answer(Found.ABORTED)))
    assert set(out) == {"11 Rollback 1", "11 Rollback 2", "1 reply ABORTED PRESUMED"}
    again = sent(o.hear(CLIENT, rollback_request(UNDER)))
    assert again == ["11 Rollback 1", "11 Rollback 2", "1 reply ABORTED PRESUMED"]


def test_early_voters_are_told_as_soon_as_their_root_has_had_it_claimed() -> None:
    o = harness()
    o.hear(CLIENT, replace(outcome_request(registered(*EARLY)), register=REGISTER))
    out = sent(o.hear(L, answer(Found.ABORTED)))
    assert out == ["11 Rollback 1", "11 Rollback 2", "1 reply ABORTED PRESUMED"]


def test_a_root_whose_only_call_decides_names_the_register_itself() -> None:
    o = harness()
    o.hear(CLIENT, replace(outcome_request(()), register=REGISTER))
    assert questions(o) == [(L, True)]


def test_all_hear_of_a_register_and_who_comes_later_too() -> None:
    o = CoordinatorHarness(CLIENT, P)
    told = [(session, message) for session, message in o.join(L).send if isinstance(message, Registers)]
    assert told == [(session, Registers((("ledger", REGISTER),))) for session in (CLIENT, P, L)]
    assert [session for session, message in o.join(Q).send if isinstance(message, Registers)] == [Q]
    o.leave(L)
    assert [session for session, message in o.join(L).send if isinstance(message, Registers)] == [L], "no news"


def test_a_root_whose_decision_had_been_made_waits_for_the_second_phase() -> None:
    o = harness()
    o.hear(CLIENT, outcome_request(UNDER))
    assert sent(o.hear(L, answer(Found.COMMITTED, 1))) == ["11 Commit 1"]
    assert sent(o.hear(P, acked(1))) == ["14 DecisionDone", "1 reply COMMITTED"]
    o.hear(CLIENT, outcome_request(UNDER))
    assert o.outcomes() == [Outcome.COMMITTED, Outcome.COMMITTED]


def test_what_the_register_says_counts_against_what_a_root_had_said() -> None:
    o = harness()
    o.hear(CLIENT, rollback_request(UNDER))
    out = o.hear(L, decided(1))
    assert effects(out) == ["11 Commit 1", "note decided although aborted"]
    o.hear(P, acked(1))
    assert o.state() is State.COMMITTED


def test_questions_are_bounded() -> None:
    o = harness()
    most = o.core.state.limits.max_transactions
    for number in range(most + 1):
        o.hear(P, doubt(1, tx=number))
    assert len(o.core.state.questions) == most
    assert len(questions(o)) == most


def test_a_process_that_says_hello_again_hears_which_of_its_databases_are_known() -> None:
    """Rule 17: a vote that travels with a reply counts only after that."""
    o = harness()
    tick = o.hear(P, replace(hello(P), version=7)).send[0][1]
    assert isinstance(tick, Tick)
    assert tick.heard == 7
    assert o.hear(P, replace(hello(P), version=6, resources=())).send == [], "overtaken by the one before"
    assert o.core.state.directory.has("accounts")
    welcome = o.step(SessionOpened(Q, replace(hello(Q), version=3))).send[0][1]
    assert isinstance(welcome, Welcome)
    assert welcome.heard == 3
